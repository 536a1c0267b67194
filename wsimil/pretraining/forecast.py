"""What a run would be like before it begins: readers and steps are timed on its own tiles."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from wsimil.extraction.pool import reader_count
from wsimil.files import atomic_path, hash_of, read_json, write_json
from wsimil.pretraining.feed import TileFeed
from wsimil.pretraining.launch import new_fabric
from wsimil.pretraining.methods import METHODS, view_recipe
from wsimil.pretraining.pictures import view_sheet
from wsimil.pretraining.process import Plan, new_loop

__all__ = ["Forecast", "forecast", "with_steps"]

_TIMED_S = 15.0
_TIMED_STEPS = 50
_ENDLESS = 100_000  # steps, for feeds of which only the first are taken: a feed lists its windows


@dataclass(frozen=True)
class Forecast:
    """What a run would be like, measured with its own tiles and its own steps."""

    slides: int
    cells: int
    mpp: tuple[float, float]
    steps: int
    tiles: int
    read_tiles_per_s: float  # by the readers alone
    redrawn: float  # share of tiles that were blank or unreadable
    compute_s: float  # a step alone, on tiles that are there
    step_s: float  # a step of the run itself, reading and computing together
    waiting: float  # share of it in which the step waits for tiles
    hours: float

    def text(self) -> str:
        """Lines for people."""
        scale = f"{self.mpp[0]:g}" if self.mpp[0] == self.mpp[1] else f"{self.mpp[0]:g} to {self.mpp[1]:g}"
        tiles_per_step = self.tiles / self.steps
        lines = [
            f"{self.slides} slides, {self.cells} tiles' worth of tissue, {scale} µm/px",
            f"readers: {self.read_tiles_per_s:.0f} tiles/s, {self.redrawn:.1%} drawn anew (blank or unreadable)",
            f"a step of {tiles_per_step:.0f} tiles: {self.compute_s:.2f} s alone, {self.step_s:.2f} s with reading "
            f"({tiles_per_step / self.step_s:.0f} tiles/s)",
            f"{self.steps} steps ({self.tiles:,} tiles): {_duration(self.hours)}",
        ]
        if self.waiting > 0.1:
            lines.append(
                f"the device would wait for tiles {self.waiting:.0%} of the time: more --workers, a local disk, "
                "or --cache-gb with --recipe-options distinct=N"
            )
        return "\n".join(lines)


def forecast(plan: Plan) -> Forecast:
    """Measured here and now, in some tens of seconds; `views.png` in the run's folder shows what the network would see."""
    measured = _rehearsed(plan)
    if plan.config.device.startswith("cuda"):  # the first of the processes to come computes on this GPU
        gc.collect()
        torch.cuda.empty_cache()
    return measured


def _rehearsed(plan: Plan) -> Forecast:
    """Three short measurements on a network that is thrown away: reading, computing, both."""
    out = plan.out
    read = _read_speed(plan)
    fabric = new_fabric(plan, devices=1)
    fabric.launch()
    with torch.random.fork_rng(devices=[fabric.device.index or 0] if fabric.device.type == "cuda" else []):
        loop = new_loop(fabric, plan)
        views, method, recipe = view_recipe(plan.recipe), METHODS[plan.recipe.method], plan.recipe

        def to_views(batch: Any) -> Any:
            seen = batch if plan.labels is None else plan.labels.labelled(batch)
            return method.views(seen, seed=plan.config.seed, recipe=views, device=fabric.device)

        parts = plan.config.accumulate
        workers = max(1, reader_count(plan.job.workers) // plan.config.devices)  # those of one device
        feed = TileFeed(plan.sampler(), batch_size=plan.part_size, steps=range(_ENDLESS), workers=workers)
        feed_steps = iter(feed)
        try:
            first = [next(feed_steps) for _ in range(parts)]
            picture = view_sheet(method.shown(to_views(first[0])), mean=recipe.mean, std=recipe.std)
            with atomic_path(out / "views.png") as temporary:
                picture.save(temporary)
            compute_s, _ = _timed(fabric, lambda: loop.advance(first, to_views))
            waited = feed.counts.waited_s
            step_s, n_steps = _timed(fabric, lambda: loop.advance([next(feed_steps) for _ in range(parts)], to_views))
            waiting = (feed.counts.waited_s - waited) / max(step_s * n_steps, 1e-9)
        finally:
            feed_steps.close()  # type: ignore[attr-defined]
    return Forecast(
        slides=len(plan.index.slides),
        cells=plan.index.n_cells,
        mpp=plan.drawn_scales,
        steps=recipe.steps,
        tiles=recipe.steps * recipe.batch_size,
        read_tiles_per_s=read.tiles_per_s,
        redrawn=read.redrawn,
        compute_s=compute_s,
        step_s=step_s,
        waiting=min(1.0, waiting),
        hours=recipe.steps * step_s / 3600,
    )


@dataclass(frozen=True)
class _Read:
    tiles_per_s: float
    redrawn: float


def _read_speed(plan: Plan) -> _Read:
    """Tiles a second of the readers alone, after their start."""
    feed = TileFeed(plan.sampler(), batch_size=plan.part_size, steps=range(_ENDLESS), workers=plan.job.workers)
    batches = iter(feed)
    try:
        for _ in range(8):  # the windows that are read while the readers start
            next(batches)
        began, before = time.monotonic(), feed.counts.reads + feed.counts.cached
        tiles = 0
        for batch in batches:
            tiles += len(batch.numbers)
            if time.monotonic() - began > _TIMED_S / 3 and tiles >= 16 * plan.part_size:
                break
        seconds = time.monotonic() - began
        reads = feed.counts.reads + feed.counts.cached - before
        counts = feed.counts
        return _Read(max(reads, 1) / seconds, (counts.rejected + counts.unreadable) / max(1, counts.reads))
    finally:
        batches.close()  # type: ignore[attr-defined]


def _timed(fabric: Any, act: Callable[[], Any]) -> tuple[float, int]:
    """(seconds that one takes after the first two, how many were timed)."""

    def finish() -> None:
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        act()
    finish()
    began = time.monotonic()
    for done in itertools.count(1):
        act()
        if done >= _TIMED_STEPS or time.monotonic() - began > _TIMED_S:
            break
    finish()
    return (time.monotonic() - began) / done, done


def with_steps(plan: Plan, say: Callable[[str], None]) -> Plan:
    """With --hours: as many steps as fit, timed once and remembered, so that a run which goes on has the same schedule."""
    hours = plan.config.hours
    if hours is None:
        return plan
    key = hash_of([hours, plan.config.devices, *map(str, asdict(replace(plan.recipe, steps=0)).values())])
    memory = plan.out / "hours.json"
    try:
        known = read_json(memory)
        steps = int(known["steps"]) if known["key"] == key else 0
    except (OSError, ValueError, KeyError, TypeError):
        steps = 0
    if not steps:
        say(f"timing some steps, to know how many fit into {_duration(hours)}")
        step_s = forecast(plan).step_s
        # the panels take their share, too: measured on GPUs and CPUs, some hundredths
        steps = max(1, int(0.95 * hours * 3600 / step_s))
        write_json(memory, {"key": key, "hours": hours, "step_s": step_s, "steps": steps})
    say(f"{_duration(hours)}: {steps} steps")
    return replace(plan, recipe=replace(plan.recipe, steps=steps))


def _duration(hours: float) -> str:
    minutes = hours * 60
    if minutes < 1:
        return f"{minutes * 60:.0f} s"
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"

"""What one process of a run does: feed the loop, keep the log, look at the panel, save, stop when asked.

- Everything that it needs is in the plan, which travels to other processes as it is.
- `last.ckpt` is written every few minutes, after each panel, and when the run is asked to stop (SIGTERM, Ctrl-C): whole or not at
  all. A run that goes on from it takes the same steps as one that never stopped, bit by bit on a CPU.
- An encoder is exported after each panel that finds it healthy: whatever happens later, the last good one lies in the folder.
- One process (the first) writes; all of them agree on when to stop.
"""

from __future__ import annotations

import csv
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wsimil.batch import EncodesTokens
from wsimil.config import JobConfig, PretrainConfig, TileConfig
from wsimil.errors import UsageError, WsimilError
from wsimil.extraction.pool import reader_count
from wsimil.files import atomic_path, hash_of, write_text
from wsimil.pretraining.export import export_encoder, seen_scales
from wsimil.pretraining.feed import TileBatch, TileFeed
from wsimil.pretraining.health import CURES, Alarm, Panel, feature_numbers
from wsimil.pretraining.health_page import health_page
from wsimil.pretraining.index import TileIndex
from wsimil.pretraining.labels import SlideClasses
from wsimil.pretraining.loop import Loop, Record, Schedule, seed_of
from wsimil.pretraining.methods import METHODS, build, pool, view_recipe
from wsimil.pretraining.pictures import neighbour_sheet, patch_sheet
from wsimil.pretraining.presets import Recipe, differences
from wsimil.pretraining.sampler import TileSampler
from wsimil.progress import progress

__all__ = ["LAST", "Outcome", "Plan", "new_loop", "read_panel", "read_table", "train"]

LAST = "last.ckpt"
_CHECKPOINT_FORMAT = 1
_LOG_EVERY = 10
_AGREE_EVERY = 10
_MOST_PICTURED = 16
_SAME_NOTICE_S = 2.0


@dataclass(frozen=True)
class Plan:
    """A run, before its first step."""

    out: Path
    name: str  # of the encoder
    recipe: Recipe  # resolved, with mean and std
    config: PretrainConfig
    tile: TileConfig
    job: JobConfig
    index: TileIndex
    facts: dict[str, Any]  # what else the encoder says of how it was trained: split, slides
    quiet: bool = False
    labels: SlideClasses | None = None  # of a method that learns from them

    @property
    def scales(self) -> tuple[float, float]:
        """Finest and coarsest µm/px asked for."""
        return self.config.scales(self.tile.mpp)

    @property
    def drawn_scales(self) -> tuple[float, float]:
        """Those that the slides have of them."""
        return self.sampler().drawn_mpp

    @property
    def part_size(self) -> int:
        """Tiles of one part of a step on one device."""
        return self.recipe.batch_size // (self.config.devices * self.config.accumulate)

    def sampler(self) -> TileSampler:
        """The tiles of the run."""
        return TileSampler(
            self.index,
            seed=self.config.seed,
            mpp_range=self.scales,
            tile_px=self.tile.tile_px,
            area_power=self.recipe.area_power,
            per_slide_per_epoch=self.recipe.tiles_per_slide if self.recipe.epochs else 0,
            distinct=self.recipe.distinct,
        )

    def identity(self, *, as_before: bool = False) -> dict[str, Any]:
        """Everything that the weights are a function of, by name, as JSON has it; `as_before`: without what was added later.

        The number of devices is not in it: a run may go on with other ones. Only the spreading loss depends on them.
        """
        tiles = {f"tiles.{name}": value for name, value in self.sampler().recipe().items()}
        split = {name: self.facts.get(name) for name in ("splits_hash", "fold")} | {"transductive": self.config.transductive}
        labels = {} if self.labels is None else {"classes": list(self.labels.classes), "labels": hash_of(self.labels.targets)}
        later = {} if as_before else {"accumulate": self.config.accumulate, "init_sha256": self.facts.get("init_sha256", "")}
        stain = {} if self.config.stain == "none" else {"stain": self.config.stain}
        named = {**asdict(self.recipe), **tiles, **split, **labels, **stain, **later}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in named.items()}

    def differs_from(self, there: Mapping[str, Any]) -> list[str]:
        """What the identity of another run says differently; one written before had one part a step, and weights nobody knows."""
        here = self.identity()
        return differences({"accumulate": 1, "init_sha256": here["init_sha256"], **there}, here)


@dataclass(frozen=True)
class Outcome:
    """How a process ended. It travels back from other processes, so it is small."""

    status: str  # finished, interrupted, collapsed
    step: int
    exported_step: int  # of the encoder in the folder; 0: none yet
    message: str = ""
    asked: bool = False  # to stop, be it after the last step


def new_loop(fabric: Any, plan: Plan) -> Loop:
    """Network, objective and optimiser before the first step."""
    recipe = plan.recipe
    model, objective, groups = build(recipe, seed=plan.config.seed, classes=plan.labels.classes if plan.labels else ())
    schedule = Schedule(recipe.steps, recipe.lr, recipe.min_lr, recipe.warm_up, recipe.weight_decay)
    return Loop(fabric, model, objective, groups, schedule, clip_norm=recipe.clip_norm, beta2=recipe.beta2, seed=plan.config.seed)


def read_panel(plan: Plan) -> Panel:
    """The fixed tiles of a run: draws of their own, as many from a small slide as from a large one."""
    count = min(plan.recipe.panel_tiles, plan.index.n_cells)
    seed = seed_of(plan.config.seed, "panel")
    sampler = TileSampler(plan.index, seed=seed, mpp_range=plan.scales, tile_px=plan.tile.tile_px, area_power=0.0)
    feed = TileFeed(
        sampler,
        batch_size=min(64, count),
        steps=range(math.ceil(count / min(64, count))),
        workers=plan.job.workers,
        read_timeout=plan.job.read_timeout,
    )
    recipe = plan.recipe
    return Panel.read(feed, count=count, px=recipe.global_px, mean=recipe.mean, std=recipe.std)


def train(fabric: Any, plan: Plan, say: Callable[[str], None] | None = None) -> Outcome:
    """Go through a plan, or on with it, in this process; with several devices each of them calls this."""
    if say is None:
        loud = not plan.quiet and fabric.global_rank == 0
        say = (lambda message: print(message, file=sys.stderr, flush=True)) if loud else (lambda message: None)
    if fabric.global_rank > 0:
        plan = replace(plan, quiet=True)
    devices = [fabric.device.index or 0] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _asked_to_stop() as asked:
        outcome = _Process(fabric, plan, say, asked).run()
        return replace(outcome, asked=asked())


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Tells whether SIGTERM or Ctrl-C came; the next one interrupts at once.

    A scheduler's notice may come twice, to the process itself and through the one that started it.
    """
    came = threading.Event()
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return

    def note(number: int, frame: object) -> None:
        nonlocal first
        if not came.is_set():
            first = time.monotonic()
        elif time.monotonic() - first > _SAME_NOTICE_S:
            raise KeyboardInterrupt
        came.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Process:
    def __init__(self, fabric: Any, plan: Plan, say: Callable[[str], None], asked: Callable[[], bool]) -> None:
        self.fabric, self.plan, self.say, self.asked = fabric, plan, say, asked
        self.recipe, self.method = plan.recipe, METHODS[plan.recipe.method]
        self.loop = new_loop(fabric, plan)
        self.panel = read_panel(plan) if fabric.global_rank == 0 else None
        self.alarm = Alarm(
            dim=int(self.loop.model.embed_dim),  # type: ignore[arg-type]
            n_tiles=0 if self.panel is None else len(self.panel.tiles),
            warm_up_steps=self.loop.schedule.warm_up_steps,
            total=self.recipe.steps,
            uniform_loss=math.log(self.recipe.prototypes) if self.recipe.method == "dino" else None,
        )
        self.panel_step, self.exported_step = -1, 0
        self.quarantined: dict[str, str] = {}
        self.out_from: dict[str, int] = {}
        self.numbers: dict[str, float] = {}  # of the last lines of the log
        self._records: list[tuple[Record, dict[str, torch.Tensor]]] = []
        self._seconds = 0.0  # of earlier sittings
        if (plan.out / LAST).exists():
            self._resume()
        self.health: list[dict[str, Any]] = [
            row for row in read_table(plan.out / "health.csv") if int(row["step"]) <= self.panel_step
        ]
        if fabric.global_rank == 0:
            _write_table(
                plan.out / "log.csv", [row for row in read_table(plan.out / "log.csv") if int(row["step"]) <= self.loop.step]
            )

    # ---------------------------------------------------------------- the run

    def run(self) -> Outcome:
        plan, loop, total = self.plan, self.loop, self.recipe.steps
        parts = plan.config.accumulate
        readers = max(1, reader_count(plan.job.workers) // self.fabric.world_size)
        feed = TileFeed(
            plan.sampler(),
            batch_size=plan.part_size,
            steps=range(loop.step * parts, total * parts),
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
            workers=readers,
            read_timeout=plan.job.read_timeout,
            cache_gb=plan.config.cache_gb,
            cache_folder=plan.out / "tiles" if plan.config.cache_gb else None,
            quarantined=self.quarantined,
            out_from=self.out_from,
            say=self.say,
        )
        self.feed = feed
        batches = iter(feed)
        bar = progress(range(total), "pretrain", unit="step", quiet=plan.quiet)
        bar.n = bar.initial = loop.step
        self._began = self._log_began = self._saved = time.monotonic()
        self._log_waited, self._log_step = 0.0, loop.step
        views = view_recipe(self.recipe)

        def to_views(batch: TileBatch) -> Any:
            seen = batch if plan.labels is None else plan.labels.labelled(batch)
            return self.method.views(seen, seed=plan.config.seed, recipe=views, device=self.fabric.device)

        try:
            while True:
                if self._panel_is_due() and (ended := self._look()) is not None:
                    return ended
                if loop.step >= total:
                    return Outcome("finished", loop.step, self.exported_step, self._counted())
                record = loop.advance([next(batches) for _ in range(parts)], to_views)
                self._records.append((record, dict(getattr(loop.objective, "monitor", {}))))
                bar.update(1)
                # by the number of the step, so that a run which goes on has the lines of one that never stopped
                if loop.step % min(_LOG_EVERY, max(1, total // 50)) == 0 or loop.step == total:
                    self._write_log(bar)
                if self._stop_now():
                    self._save()
                    return Outcome("interrupted", loop.step, self.exported_step)
                if time.monotonic() - self._saved > 60 * plan.config.checkpoint_minutes:
                    self._save()
        finally:
            bar.close()
            batches.close()  # type: ignore[attr-defined]

    def _stop_now(self) -> bool:
        if self.fabric.world_size == 1:
            return self.asked()
        if self.loop.step % _AGREE_EVERY:
            return False
        asked = torch.tensor(float(self.asked()), device=self.fabric.device)
        return bool(self.fabric.all_reduce(asked, reduce_op="sum") > 0)

    def _counted(self) -> str:
        counts, world = self.feed.counts, self.fabric.world_size
        of_one = "" if world == 1 else "of the first process: "
        return (
            f"{counts.tiles * world} tiles, {of_one}{counts.rejected + counts.unreadable} drawn anew, "
            f"{len(self.feed.quarantined)} slides left out on the way, {counts.waited_s:.0f} s waited for tiles"
        )

    # ---------------------------------------------------------------- log

    def _write_log(self, bar: Any) -> None:
        """A line of log.csv: means over the steps since the last one."""
        records, self._records = self._records, []
        last = records[-1][0]
        means = {"loss": torch.stack([record.loss for record, _ in records]).mean()}
        for name in last.losses:
            means[f"loss_{name}"] = torch.stack([record.losses[name] for record, _ in records]).mean()
        monitors = {
            name: torch.stack([monitor[name].float() for _, monitor in records]).mean() for name in records[-1][1] if name != "loss"
        }
        means |= {"grad_norm": self._mean_norm(torch.stack([record.grad_norm for record, _ in records])), **monitors}
        values = torch.stack([value.float().to(self.fabric.device) for value in means.values()])
        if self.fabric.world_size > 1:
            values = self.fabric.all_reduce(values, reduce_op="mean")
        self.numbers = dict(zip(means, values.tolist(), strict=True))  # the one place where a device is waited for
        loss = self.numbers["loss"]
        if not math.isfinite(loss):
            raise WsimilError(
                f"{self.plan.out}: the loss is {loss} at step {self.loop.step}; halve --lr, or take --precision bf16 or fp32. "
                f"{LAST} is from before that: take another --out"
            )
        main = "loss_dino" if "loss_dino" in self.numbers else "loss"
        self.alarm.watch_loss(self.loop.step, self.numbers[main])
        now = time.monotonic()
        steps, seconds = self.loop.step - self._log_step, max(now - self._log_began, 1e-9)
        waited = self.feed.counts.waited_s - self._log_waited
        row = {
            "step": self.loop.step,
            "tiles": self.loop.step * self.recipe.batch_size,
            "seconds": round(self._seconds + now - self._began, 1),
            **{name: f"{value:.6g}" for name, value in self.numbers.items()},
            "lr": f"{last.lr:.6g}",
            "weight_decay": f"{last.weight_decay:.6g}",
            "tiles_per_s": round(steps * self.recipe.batch_size / seconds, 1),
            "waiting": round(waited / seconds, 3),
        }
        if self.fabric.global_rank == 0:
            _append(self.plan.out / "log.csv", row)
        bar.set_postfix_str(f"loss {loss:.3f}, {row['tiles_per_s']:.0f} tiles/s, waiting {row['waiting']:.0%}", refresh=False)
        self._log_began, self._log_step, self._log_waited = time.monotonic(), self.loop.step, self.feed.counts.waited_s

    def _mean_norm(self, norms: torch.Tensor) -> torch.Tensor:
        """Of the gradients; fp16 finds its scale by overflowing now and then, and leaves such steps out."""
        if getattr(self.fabric.strategy.precision, "scaler", None) is None:
            return norms.mean()
        taken = norms.isfinite()
        return torch.where(taken, norms, 0).sum() / taken.sum().clamp(min=1)

    # ---------------------------------------------------------------- panel

    def _panel_is_due(self) -> bool:
        every = max(1, round(self.recipe.panel_every * self.recipe.steps))
        step = self.loop.step
        return step != self.panel_step and (step % every == 0 or step >= self.recipe.steps)

    def _look(self) -> Outcome | None:
        """Numbers, pictures, alarm, export, checkpoint; an outcome if the run ends here."""
        began = time.monotonic()
        self.panel_step = self.loop.step
        signs = self._first_looks() if self.panel is not None else []
        if self.fabric.world_size > 1:
            signs, self.alarm.warnings = self.fabric.broadcast((signs, self.alarm.warnings))
        self._log_began += time.monotonic() - began  # the panel is no part of the speed of the steps
        if signs and self.alarm.warnings >= 2 and self.plan.config.collapse == "stop":
            return Outcome("collapsed", self.loop.step, self.exported_step, "; ".join(signs))
        self._save()
        return None

    def _first_looks(self) -> list[str]:
        """What the first process finds."""
        plan, loop, panel = self.plan, self.loop, self.panel
        assert panel is not None
        model, device = loop.kept_model(), self.fabric.device

        def pooled(network: Any, images: torch.Tensor) -> torch.Tensor:
            return pool(network, images, self.method.pooling)

        features = panel.features(model, pooled, device)
        numbers = {name: value for name, value in self.numbers.items() if not name.startswith("loss_")}
        numbers |= feature_numbers(features, panel.slides)
        signs = self.alarm.judge(loop.step, numbers)
        self.health.append(
            {"step": loop.step, **{name: f"{value:.5g}" for name, value in numbers.items()}, "signs": "; ".join(signs)}
        )
        _write_table(plan.out / "health.csv", self.health)
        pictures = plan.out / "pictures"
        sheets = {"neighbours": neighbour_sheet(panel, features)}
        if isinstance(model, EncodesTokens):
            sheets["patches"] = patch_sheet(panel, model, device)
        for name, sheet in sheets.items():
            with atomic_path(pictures / f"{name}-{loop.step:07d}.jpg") as temporary:
                sheet.save(temporary, quality=85)
        write_text(plan.out / "health.html", health_page(plan.name, self.health, _pictured(pictures)))
        if signs:
            word = "WARNING" if self.alarm.warnings == 1 else f"WARNING, {self.alarm.warnings} times in a row"
            self.say(
                f"step {loop.step}: {word}: {'; '.join(signs)} (see {plan.out / 'health.html'}). What helps: {'; '.join(CURES)}"
            )
        if loop.step and (not signs or self.method.labelled):  # few directions are enough to tell classes apart
            self._export(plan.out, numbers)
            self.exported_step = loop.step
            if self.recipe.marks:
                self._export(plan.out / "marks" / f"step-{loop.step:07d}", numbers)
        return signs

    def _export(self, folder: Path, numbers: dict[str, float]) -> None:
        plan, recipe, loop = self.plan, self.recipe, self.loop
        assert self.panel is not None
        how = {
            "method": recipe.method,
            "step": loop.step,
            "steps": recipe.steps,
            "tiles": loop.step * recipe.batch_size,
            **plan.facts,
            "index": plan.index.hash,
            "seed": plan.config.seed,
            "health": {name: round(value, 5) for name, value in numbers.items()},
            "recipe": {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(recipe).items()},
        }
        scales = seen_scales(recipe, plan.tile, plan.drawn_scales)
        export_encoder(folder, loop.kept_model(), recipe, name=plan.name, scales=scales, how_trained=how, panel=self.panel)

    # ---------------------------------------------------------------- checkpoint

    def _save(self) -> None:
        self._saved = time.monotonic()
        if self.fabric.global_rank > 0:
            return
        content = {
            "format": _CHECKPOINT_FORMAT,
            "identity": self.plan.identity(),
            "devices": self.fabric.world_size,
            "loop": self.loop.state(),
            "alarm": self.alarm.state(),
            "panel_step": self.panel_step,
            "exported_step": self.exported_step,
            "numbers": self.numbers,
            "records": [_saved(record, monitor) for record, monitor in self._records],
            "seconds": self._seconds + self._saved - self._began,
            "quarantined": dict(self.feed.quarantined),
            "out_from": dict(self.feed.out_from),
        }
        with atomic_path(self.plan.out / LAST) as temporary:
            torch.save(content, temporary)

    def _resume(self) -> None:
        path = self.plan.out / LAST
        content = torch.load(path, map_location="cpu", weights_only=True)
        other = self.plan.differs_from(content.get("identity", {}))
        if content.get("format") != _CHECKPOINT_FORMAT or other:
            said = "; ".join(other[:6]) or "another version of wsimil wrote it"
            raise UsageError(f"{path} is of another run ({said}); take another --out, or delete the file to begin anew")
        self.loop.load(content["loop"])
        self.alarm.load(content["alarm"])
        self.panel_step, self.exported_step = content["panel_step"], content["exported_step"]
        self.numbers, self._seconds = content["numbers"], content["seconds"]
        self.quarantined, self.out_from = content["quarantined"], content.get("out_from", {})
        # of the first process only: with several, a line that a stop fell into is a mean over the tiles of that one
        self._records = [_restored(saved, self.fabric.device) for saved in content.get("records", [])]
        self.say(f"going on at step {self.loop.step} of {self.recipe.steps}")
        devices = content.get("devices", self.fabric.world_size)
        if devices != self.fabric.world_size and self.recipe.method == "dino" and self.recipe.spread != "none":
            self.say(
                f"begun on {devices} devices, going on with {self.fabric.world_size}: each spreads the features of its own tiles, "
                "so the weights will not be those of a run on one number of devices"
            )


def _saved(record: Record, monitor: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A step that no line of the log has yet, as a checkpoint holds it."""
    return {
        "step": record.step,
        "losses": _moved(record.losses, "cpu"),
        "sums": _moved({"loss": record.loss, "grad_norm": record.grad_norm}, "cpu"),
        "lr": record.lr,
        "weight_decay": record.weight_decay,
        "monitor": _moved(monitor, "cpu"),
    }


def _restored(saved: Mapping[str, Any], device: Any) -> tuple[Record, dict[str, torch.Tensor]]:
    losses, sums, monitor = (_moved(saved[name], device) for name in ("losses", "sums", "monitor"))
    return Record(saved["step"], losses, sums["loss"], sums["grad_norm"], saved["lr"], saved["weight_decay"]), monitor


def _moved(values: Mapping[str, torch.Tensor], device: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().to(device) for name, value in values.items()}


def _pictured(folder: Path) -> list[tuple[str, Path]]:
    """(step, picture) of the first panel and the last ones, newest first, for the page."""
    found = sorted(folder.glob("patches-*.jpg"))
    chosen = [*found[:1], *found[1:][-(_MOST_PICTURED - 1) :]]
    return [(path.stem.partition("-")[2].lstrip("0") or "0", path) for path in reversed(chosen)]


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file of ours; none where there is no file. A line that a kill cut short is left out."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if None not in row.values() and (row.get("step") or "").isdigit()]
    except FileNotFoundError:
        return []


def _write_table(path: Path, rows: list[Any]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if columns:
            writer.writeheader()
        writer.writerows(rows)


def _append(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)

"""A pretraining run: which slides, which recipe, which devices; forecast, training, and what is said in the end.

- The split is an input. With `--splits` only the training slides of the fold are opened: validation slides stay out as test
  slides do, because epochs and thresholds are chosen on them later.
- Without `--splits` every slide is used, and the encoder names them: `wsimil train` refuses a test slide that its encoder has seen,
  unless `--transductive` said that it would.
- A folder is one run. What is finished is kept, what was stopped goes on, and what differs is refused.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from wsimil.bags.labels import infer_task, match_slides, read_labels
from wsimil.bags.splits import read_splits, splits_hash
from wsimil.config import PretrainConfig, Settings, TileConfig
from wsimil.encoders.contract import FINGERPRINT_START, EncoderContract
from wsimil.errors import LabelsError, SplitsError, UsageError, WsimilError, some_of
from wsimil.extraction.extract import resolve_device
from wsimil.extraction.pool import reader_count
from wsimil.files import IMAGE_SUFFIXES, atomic_path, hash_of, mark_output, read_json, write_json
from wsimil.pretraining.feed import TileFeed
from wsimil.pretraining.health import CURES
from wsimil.pretraining.index import IndexedSlide, TileIndex, files_below, index_slides, index_tiles, with_stains
from wsimil.pretraining.labels import with_labels, with_mosaics
from wsimil.pretraining.methods import METHODS, check_sizes, network_of, normalised, view_recipe
from wsimil.pretraining.pictures import view_sheet
from wsimil.pretraining.presets import Recipe, differences, resolve_recipe
from wsimil.pretraining.process import LAST, Outcome, Plan, new_loop, train
from wsimil.settings import read_settings, save_settings
from wsimil.slides.cohort import SlideFile, find_slides
from wsimil.slides.stain import StainNormaliser, StainTarget, stain_normaliser
from wsimil.table import Table

__all__ = ["Forecast", "Pretrained", "pretrain"]

_SECTIONS = ("tile", "pretrain")
_CLASSIFYING = ("binary", "multiclass", "ordinal")
_TILE_SLACK = 1.5
_LOOKED_AT = 16
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


@dataclass(frozen=True)
class Pretrained:
    """What a run came to."""

    folder: Path  # holds backbone.safetensors and encoder.json
    recipe: Recipe
    step: int  # of the encoder in the folder
    remark: str = ""


def pretrain(
    slides: str | Path,
    out: str | Path,
    *,
    splits: str | Path | None = None,
    labels: str | Path | None = None,
    settings: Settings | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Pretrained | Forecast:
    """Train an encoder on tiles of slides; what is finished is kept, what was stopped goes on.

    Args:
        slides: folder, slide or CSV as for extraction; or a folder of tile images.
        out: folder of the run; in the end an encoder for `extract --encoder OUT`.
        splits: whose training slides are used.
        labels: table with `slide` and the target, for the method that learns from slide labels.
        dry_run: measure and forecast only; `views.png` shows what the network would see.

    Raises:
        UsageError: a wrong request, or another run in the folder.
        WsimilError: the encoder collapsed; the last good one is kept in the folder.
        KeyboardInterrupt: stopped; the same call goes on.
    """
    settings, out = settings or Settings(), Path(out)
    config, tile, job = settings.pretrain, settings.tile, settings.job
    device = _device(config)
    if config.seed >= 2**63:
        raise UsageError(f"--seed {config.seed} is too large a number; expected less than 2^63")
    if not Path(slides).exists():
        raise UsageError(f"{slides}: no such folder, slide or table")
    from_tiles = _holds_tiles(Path(slides), config, tile, say)
    if from_tiles and config.mpp_range is not None:
        raise UsageError("--mpp-range is for slides; tile images are taken at the scale they were cut at (--mpp says which)")
    normaliser = _normaliser(config, from_tiles)
    only, held_out, split = _training_ids(slides, splits, config, tile, from_tiles, say)
    diagnoses = _diagnoses(labels, settings)
    preview = resolve_recipe(config, n_slides=1)
    model = network_of(preview, seed=config.seed)  # before anything takes long: its weights may not be there
    check_sizes(preview, model)
    start = model.start
    if start is not None:
        _check_start(start, held_out, only)
    _check_same_tiles(out, tile, from_tiles)
    mark_output(out)
    if from_tiles:
        index = index_tiles(slides, tile_px=tile.tile_px, mpp=tile.mpp, only=only)
        _remark_on_sizes(index, tile, say)
    else:
        index = index_slides(slides, out / "index", tile=tile, job=job, only=only, quiet=quiet, say=say)
        if normaliser is not None:
            index = with_stains(index, slides, out / "index", normaliser, tile=tile, job=job, quiet=quiet, say=say)
    classes = None
    if diagnoses is not None:
        index, _ = with_labels(index, diagnoses, say=say)
        if config.mosaic_tiles and not from_tiles:
            index = with_mosaics(index, slides, out / "index", most=config.mosaic_tiles, tile=tile, job=job, quiet=quiet)
        index, classes = with_labels(index, diagnoses)  # of the slides that are left
        config = replace(config, collapse="warn")  # classes are told apart along few directions: that is no collapse
    recipe = normalised(resolve_recipe(config, n_slides=len(index.slides)), model)
    del model
    recipe = replace(recipe, precision=_precision(recipe, config, device, say))
    facts = {
        **split,
        "init_sha256": start.sha256 if start is not None else "",
        "transductive": config.transductive or (start is not None and start.transductive),
        "tile_px": tile.tile_px,
        "stain": "" if from_tiles else config.stain,
        "versions": {name: version(name) for name in ("wsimil", "torch", "timm")},
    }
    if classes is not None:
        facts["classes"] = list(classes.classes)
    plan = Plan(out, out.resolve().name, recipe, replace(config, device=device), tile, job, index, facts, quiet, classes)
    plan = replace(plan, facts={**facts, **_drawn_from(plan, start.seen if start is not None else (), say)})
    say(_describe(plan))
    _remark_on_cache(plan, say)
    if dry_run:
        return _forecast(plan)
    plan = _with_steps(plan, say)
    _check_same_run(plan)
    kept = _finished(plan)
    if kept is not None:
        say(f"{out}: already pretrained ({kept.recipe.steps} steps)")
        return kept
    sections = (*_SECTIONS, "labels") if diagnoses is not None else _SECTIONS
    save_settings(out / "config.yaml", replace(settings, pretrain=_resolved(plan)), sections)
    outcome = _launch(plan, say)
    return _ended(plan, outcome, say)


# ---------------------------------------------------------------- what goes in


def _device(config: PretrainConfig) -> str:
    device = resolve_device(config.device)
    if config.devices > 1:
        if ":" in device:
            raise UsageError(f"--device {device} names one device and --devices asks for {config.devices}; leave one of them out")
        if device == "cuda" and torch.cuda.device_count() < config.devices:
            raise UsageError(f"--devices {config.devices}: there are {torch.cuda.device_count()} GPUs here")
        if device == "mps":
            raise UsageError("--devices: there is one Apple GPU; leave the option out")
    return device


def _normaliser(config: PretrainConfig, from_tiles: bool) -> StainNormaliser | None:
    if config.stain == "none":
        return None
    if from_tiles:
        raise UsageError(f"--stain {config.stain} is for slides, each of which is measured; normalise tile images beforehand")
    return stain_normaliser(config.stain, StainTarget.of_image(config.stain_target) if config.stain_target else None)


def _diagnoses(labels: str | Path | None, settings: Settings) -> Table | None:
    """The label table of a method that learns from one."""
    method = settings.pretrain.method
    if not METHODS[method].labelled:
        if labels is not None:
            raise UsageError(f"--method {method} learns without labels; leave --labels out, or take --method weak")
        return None
    if labels is None:
        raise UsageError(f"--method {method} learns from slide labels; pass --labels")
    asked = settings.labels
    if asked.task not in ("auto", *_CLASSIFYING) or len(asked.target) > 1:
        what = f"--task {asked.task}" if len(asked.target) == 1 else f"--target {' '.join(asked.target)}"
        raise UsageError(f"{what}: --method {method} learns classes, one per slide; name one column of classes")
    table = read_labels(labels, asked)
    task = infer_task(table["label"], asked).kind
    if task not in _CLASSIFYING:
        raise UsageError(
            f"{labels}: column {' '.join(asked.target)!r} looks like {task}, and --method {method} learns classes, one per slide; "
            "name another column (--target), or say --task multiclass if its values are classes"
        )
    return table


def _precision(recipe: Recipe, config: PretrainConfig, device: str, say: Callable[[str], None]) -> Any:
    """That of the preset where the device has it."""
    if config.precision == "fp16" and not device.startswith("cuda"):
        raise UsageError("--precision fp16 is for CUDA; on this device take fp32 or bf16")
    if config.precision != "auto":
        return config.precision
    if not device.startswith("cuda"):
        return "fp32"
    if recipe.precision == "bf16" and torch.cuda.get_device_capability(device)[0] < 8:
        say("precision: fp16, this GPU has no bf16")
        return "fp16"
    return recipe.precision


def _holds_tiles(slides: Path, config: PretrainConfig, tile: TileConfig, say: Callable[[str], None]) -> bool:
    """Whether SLIDES is a folder of tile images: as said, else by looking at some of them."""
    if config.source != "auto":
        return config.source == "tiles"
    if not slides.is_dir():
        return False
    looked_at: list[tuple[int, int]] = []
    for path in (place / name for place, names in files_below(slides) for name in names):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            if path.suffix.lower() in (".csv", ".json", ".txt", ".md", ".yaml"):
                continue
            return False
        if len(looked_at) < _LOOKED_AT and path.is_file():  # of millions only the names are looked at
            with contextlib.suppress(OSError), Image.open(path) as image:
                looked_at.append(image.size)
    if not looked_at or max(max(size) for size in looked_at) > _TILE_SLACK * tile.tile_px:
        return False
    say("SLIDES holds tile images (--source slides if each of them is a small slide)")
    return True


def _training_ids(
    slides: str | Path,
    splits: str | Path | None,
    config: PretrainConfig,
    tile: TileConfig,
    from_tiles: bool,
    say: Callable[[str], None],
) -> tuple[list[str] | None, dict[str, SlideFile | None], dict[str, Any]]:
    """Which slides may be used (None: all), which are held out (None: not a file here), and what the encoder says about it."""
    if config.transductive and config.method == "weak":
        raise UsageError("--method weak learns from labels: with --transductive it would learn those of the test slides")
    if splits is None:
        if config.fold is not None:
            raise UsageError(f"--fold {config.fold} belongs to --splits; pass both or none")
        return None, {}, {"splits_hash": None, "fold": None}
    table = read_splits(splits)
    said = {"splits_hash": splits_hash(table), "fold": None}
    if config.transductive:
        say("transductive: test slides are used without their labels; every result of this encoder will say so")
        return None, {}, said
    folds = sorted(table["fold"].unique().tolist())
    if config.fold is None and len(folds) > 1:
        raise SplitsError(
            f"{splits} has {len(folds)} folds, and every slide is in a test set of one: pretrain an encoder per fold (--fold "
            f"{folds[0]} and so on), or say --transductive"
        )
    fold = folds[0] if config.fold is None else int(config.fold)
    if fold not in folds:
        raise UsageError(f"--fold {fold}: {splits} has folds {', '.join(map(str, folds))}")
    if from_tiles:
        known = {slide.slide_id: None for slide in index_tiles(slides, tile_px=tile.tile_px, mpp=tile.mpp).slides}
    else:
        known = {file.slide_id: file for file in find_slides(slides)}
    sides = table[table["fold"] == fold]
    by_side: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    absent: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name, side in zip(sides["slide_id"].tolist(), sides["split"].tolist(), strict=True):
        try:
            by_side[side] += match_slides([name], known)
        except LabelsError:
            absent[side].append(name)
    both = sorted(set(by_side["train"]) & {*by_side["val"], *by_side["test"]})
    if both:
        raise SplitsError(f"{splits}: {both[0]} stands on two sides of fold {fold} under two names")
    if not by_side["train"]:
        raise SplitsError(f"{splits}: no training slide of fold {fold} is in {slides}")
    unknown = len(set(known) - {name for names in by_side.values() for name in names})
    out = [f"{len(by_side[side])} {word}" for side, word in (("val", "validation"), ("test", "test")) if by_side[side]]
    out += [f"{unknown} that the splits do not name (a patient of theirs may be held out)"] if unknown else []
    say(f"fold {fold}: {len(by_side['train'])} training slides are used" + (f"; left out: {', '.join(out)}" if out else ""))
    if absent["train"]:
        say(f"fold {fold}: {len(absent['train'])} training slides of the splits are not in {slides}")
    held_out: dict[str, SlideFile | None] = {name: None for side in ("val", "test") for name in absent[side]}
    held_out |= {name: known[name] for side in ("val", "test") for name in by_side[side]}
    _check_copies({name: known[name] for name in by_side["train"]}, held_out, splits)
    return sorted(set(by_side["train"])), held_out, {**said, "fold": fold}


def _check_copies(training: Mapping[str, SlideFile | None], held_out: Mapping[str, SlideFile | None], splits: str | Path) -> None:
    """Raises SplitsError if a training slide is the copy of one that is held out; only files of one size are compared."""
    shared = {_size(file) for file in training.values()} & {_size(file) for file in held_out.values()} - {-1}
    known = {_content(file): name for name, file in held_out.items() if _size(file) in shared}
    known.pop("", None)  # cannot be read
    for name, file in training.items():
        if _size(file) in shared and (other := known.get(_content(file))):
            raise SplitsError(
                f"{splits}: {name} is a training slide and {other} is held out, and both are the same file; "
                "put them on one side, or remove one of them"
            )


def _size(file: SlideFile | None) -> int:
    """Bytes; -1 where there is no such file."""
    try:
        return -1 if file is None else file.here.stat().st_size
    except OSError:
        return -1


def _check_start(start: EncoderContract, held_out: Mapping[str, SlideFile | None], only: Sequence[str] | None) -> None:
    """Raises SplitsError if the weights to begin with come from slides that this fold holds out."""
    if only is None or not start.seen:
        return
    seen = [name for name, file in held_out.items() if start.saw(name, _content(file))]
    if seen:
        raise SplitsError(
            f"--init {start.name}: these weights have seen {len(seen)} of {len(held_out)} validation and test slides, "
            f"{seen[0]} for one; begin with others (of the same fold, imagenet, scratch), or say --transductive, which every "
            "result will repeat"
        )


def _content(file: SlideFile | None) -> str:
    """What a slide is known by; nothing where there is no such file, or it cannot be read."""
    try:
        return "" if file is None else file.fingerprint()
    except OSError:
        return ""


def _drawn_from(plan: Plan, before: Sequence[tuple[str, str]], say: Callable[[str], None]) -> dict[str, Any]:
    """What an encoder says of the slides that tiles are drawn from; those too small for one are said, and are not among them."""
    sampler = plan.sampler()
    small = sampler.left_out
    if small:
        say(
            f"{len(small)} of {len(plan.index.slides)} slides left out: smaller than a tile of {plan.tile.tile_px} px at "
            f"{plan.scales[0]:g} µm/px: {some_of(small)}"
        )
    slides = [slide for slide in plan.index.slides if slide.slide_id not in set(small)]
    return {"n_slides": len(slides), "slides": _slides_by_content(slides, before), "mpp": list(sampler.drawn_mpp)}


def _slides_by_content(slides: Sequence[IndexedSlide], before: Sequence[tuple[str, str]] = ()) -> dict[str, str]:
    """slide_id → what the file is known by, for slides; a folder of tiles is known by its name alone.

    `before` are the slides that the weights had seen already. One of an id that is another slide's here has `earlier/` before it.
    """
    seen = {slide.slide_id: "" if slide.pictures else slide.file.fingerprint()[:FINGERPRINT_START] for slide in slides}
    for slide_id, content in before:
        name = slide_id
        while seen.get(name, content) != content:
            name = f"earlier/{name}"  # no id has a slash
        seen[name] = content
    return seen


def _describe(plan: Plan) -> str:
    recipe, index = plan.recipe, plan.index
    begins = "random weights" if recipe.init == "scratch" else f"weights of {recipe.init}"
    what = "groups of tile images" if index.slides[0].pictures else "slides"
    return (
        f"{recipe.method}, preset {plan.config.size}: "
        f"{recipe.arch}{f' of {recipe.depth} blocks' if recipe.depth else ''} from {begins}; "
        f"{len(index.slides)} {what}, {index.n_cells} tiles' worth; {recipe.steps} steps of {recipe.batch_size} tiles, "
        f"learning rate {recipe.lr:.2g}, {plan.config.device} {recipe.precision}"
        + (f", colours by {plan.config.stain}" if plan.config.stain != "none" else "")
    )


def _remark_on_sizes(index: TileIndex, tile: TileConfig, say: Callable[[str], None]) -> None:
    if index.shrunk != (1.0, 1.0):
        px, mpp = ([f"{of_one * share:.4g}" for share in dict.fromkeys(index.shrunk)] for of_one in (tile.tile_px, tile.mpp))
        say(
            f"tile images of {' to '.join(px)} px are made {tile.tile_px} px wide, which makes them {' to '.join(mpp)} µm/px "
            "(--tile-px says how wide they are, --mpp at which µm/px they were cut)"
        )


def _remark_on_cache(plan: Plan, say: Callable[[str], None]) -> None:
    if plan.config.cache_gb and not plan.recipe.distinct and not plan.index.slides[0].pictures:
        say(
            "cache: every tile of this run is a new one, so none is read from it; "
            f"--recipe-options distinct={int(plan.config.cache_gb * 1e9 / (plan.tile.tile_px**2 * 3))} shows as many as it holds "
            "again and again"
        )


# ---------------------------------------------------------------- forecast and hours


def _forecast(plan: Plan) -> Forecast:
    forecast = _rehearsed(plan)
    if plan.config.device.startswith("cuda"):  # the first of the processes to come computes on this GPU
        gc.collect()
        torch.cuda.empty_cache()
    return forecast


def _rehearsed(plan: Plan) -> Forecast:
    """Three short measurements on a network that is thrown away: reading, computing, both."""
    out = plan.out
    read = _read_speed(plan)
    fabric = _fabric(plan, devices=1)
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


def _with_steps(plan: Plan, say: Callable[[str], None]) -> Plan:
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
        forecast = _forecast(plan)
        # the panels take their share, too: measured on GPUs and CPUs, some hundredths
        steps = max(1, int(0.95 * hours * 3600 / forecast.step_s))
        write_json(memory, {"key": key, "hours": hours, "step_s": forecast.step_s, "steps": steps})
    say(f"{_duration(hours)}: {steps} steps")
    return replace(plan, recipe=replace(plan.recipe, steps=steps))


# ---------------------------------------------------------------- the run itself


def _fabric(plan: Plan, *, devices: int) -> Any:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.strategies.ddp import DDPStrategy

    device = plan.config.device
    precision: Any = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[plan.recipe.precision]
    kind, _, number = device.partition(":")
    strategy: Any = "auto"
    if devices > 1:
        # buffers need no sending before each step: DINO's are alike by themselves, and of a network with batch normalisation each
        # device measures its own share; the first one's is exported
        strategy = DDPStrategy(start_method="spawn", broadcast_buffers=False)
    # processes are started here, also in a job of SLURM, which Lightning would take for the one that starts and numbers them
    where = LightningEnvironment()
    return Fabric(
        accelerator=kind, devices=[int(number)] if number else devices, strategy=strategy, precision=precision, plugins=[where]
    )


def _launch(plan: Plan, say: Callable[[str], None]) -> Outcome:
    """Train, in this process or in one per device."""
    n_devices = plan.config.devices
    fabric = _fabric(plan, devices=n_devices)
    if n_devices == 1:
        fabric.launch()
        return train(fabric, plan, say)
    from torch.multiprocessing.spawn import ProcessRaisedException

    with _passing_signals_on():
        try:
            return Outcome(**fabric.launch(_train_apart, pickle.dumps(plan)))
        except ProcessRaisedException as error:
            last = str(error).strip().splitlines()[-1]
            raise WsimilError(f"one of the {n_devices} processes ended with {last}") from error


def _train_apart(fabric: Any, plan: bytes) -> dict[str, Any]:
    """`train` in a process of its own; Lightning would walk through a plan and an outcome, and does not get through frozen ones."""
    return asdict(train(fabric, pickle.loads(plan)))


@contextlib.contextmanager
def _passing_signals_on() -> Iterator[None]:
    """SIGTERM goes on to the processes that train (Ctrl-C reaches them by itself); they save and end, and this one after them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    came: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        came.append(number)
        if len(came) > 2:  # somebody has lost patience
            raise KeyboardInterrupt
        for child in active_children() if number == signal.SIGTERM else ():
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(child.pid, signal.SIGTERM)  # type: ignore[arg-type]

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(plan: Plan, outcome: Outcome, say: Callable[[str], None]) -> Pretrained:
    out, steps = plan.out, plan.recipe.steps
    kept = f"the encoder of step {outcome.exported_step} is kept in {out}" if outcome.exported_step else "no encoder was kept"
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    if outcome.status == "collapsed":
        raise WsimilError(
            f"collapsed by step {outcome.step} of {steps}: {outcome.message}; {kept}. What helps: {'; '.join(CURES)}. "
            "Take another --out for the next try"
        )
    if not outcome.exported_step:
        raise WsimilError(
            f"{out}: no encoder was kept: every panel raised a warning (see {out / 'health.html'}). "
            f"What helps: {'; '.join(CURES)}. Take another --out for the next try"
        )
    say(outcome.message)
    remark = "" if outcome.exported_step == outcome.step else f"the last panel raised a warning: {kept}"
    write_json(
        out / "finished.json",
        {"key": _key(plan), "steps": steps, "exported_step": outcome.exported_step, "remark": remark},
    )
    return Pretrained(out, plan.recipe, outcome.exported_step, remark)


_CUT_BY = ("mpp", "tile_px", "overlap_px", "min_tissue", "tissue", "pen")


def _check_same_tiles(out: Path, tile: TileConfig, from_tiles: bool) -> None:
    """Refuse other tiles in a run's folder before its slides are tiled anew; what files decide, its index tells later."""
    try:
        there = read_settings(_SECTIONS, out / "config.yaml").tile if _begun(out) else tile
    except (OSError, UsageError):
        return
    names = ("mpp", "tile_px") if from_tiles else _CUT_BY if tile.tissue == "auto" else _CUT_BY[:-1]
    one, other = ({f"tile.{name}": getattr(config, name) for name in names} for config in (there, tile))
    if said := differences(one, other):
        raise _another_run(out, said)


def _begun(out: Path) -> bool:
    return (out / LAST).exists() or (out / "encoder.json").exists()


def _another_run(out: Path, said: Sequence[str]) -> UsageError:
    return UsageError(f"{out} is of another run ({'; '.join(said[:6])}); take another --out, or delete the folder to begin anew")


def _check_same_run(plan: Plan) -> None:
    """Note which run the folder is of; refuse another one before anything of the first is overwritten."""
    note, here = plan.out / "run.json", plan.identity()
    try:
        there = read_json(note)
    except (OSError, ValueError):
        there = here
    if _begun(plan.out) and (said := plan.differs_from(there)):
        raise _another_run(plan.out, said)
    write_json(note, here)


def _key(plan: Plan) -> str:
    return hash_of(plan.identity())


def _finished(plan: Plan) -> Pretrained | None:
    """The run, if it is done; with the same settings, slides and split only."""
    try:
        said = read_json(plan.out / "finished.json")
    except (OSError, ValueError):
        return None
    if not (plan.out / "encoder.json").exists() or not (plan.out / "backbone.safetensors").exists():
        return None
    if said.get("key") not in (_key(plan), hash_of(plan.identity(as_before=True))):
        return None
    return Pretrained(plan.out, plan.recipe, int(said["exported_step"]), str(said["remark"]))


def _resolved(plan: Plan) -> PretrainConfig:
    """The settings with every number of the recipe written out: the file says all, and is a config that gives the same run."""
    recipe = asdict(plan.recipe)
    named = {name: recipe.pop(name) for name in ("arch", "init", "steps", "batch_size", "lr", "precision")}
    del recipe["method"]
    options = tuple(f"{name}={_text(value)}" for name, value in recipe.items())
    return replace(plan.config, **named, hours=None, recipe_options=options)


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(repr(part) for part in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _duration(hours: float) -> str:
    minutes = hours * 60
    if minutes < 1:
        return f"{minutes * 60:.0f} s"
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"

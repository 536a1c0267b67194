"""Which slides a pretraining may use, and which are held out for the models that will be judged with its encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wsimil.bags.labels import match_slides
from wsimil.bags.splits import read_splits, splits_hash
from wsimil.config import PretrainConfig, TileConfig
from wsimil.encoders.contract import EncoderContract
from wsimil.errors import LabelsError, SplitsError, UsageError
from wsimil.pretraining.index import index_tiles
from wsimil.slides.cohort import SlideFile, find_slides

__all__ = ["check_start", "training_ids"]


def training_ids(
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


def check_start(start: EncoderContract, held_out: Mapping[str, SlideFile | None], only: Sequence[str] | None) -> None:
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

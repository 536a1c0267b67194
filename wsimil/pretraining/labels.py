"""Slide labels in pretraining: which slide of an index is of which class, and which of its tiles are worth showing.

- A slide without a label is left out, and so is what the mosaic leaves out: the index is what is drawn from, nothing else changes.
- Pretraining on labels has seen them: the encoder says so, and its slides must not be tested on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from wsimil.bags.labels import match_slides
from wsimil.config import JobConfig, TileConfig
from wsimil.errors import LabelsError
from wsimil.extraction.job import Job
from wsimil.extraction.mosaic import mosaic_file, mosaic_slides, read_mosaic
from wsimil.files import hash_of
from wsimil.pretraining.feed import TileBatch
from wsimil.pretraining.index import TileIndex, failed_of
from wsimil.table import Table

__all__ = ["LabelledBatch", "SlideClasses", "with_labels", "with_mosaics"]


@dataclass(frozen=True)
class LabelledBatch(TileBatch):
    """The tiles of one step, and what their slides are."""

    targets: np.ndarray  # (B,) int64


@dataclass(frozen=True)
class SlideClasses:
    """The class of every slide of an index, as its place in `classes`."""

    classes: tuple[str, ...]
    targets: tuple[int, ...]

    def labelled(self, batch: TileBatch) -> LabelledBatch:
        """The batch, with the class of the slide that each tile is of."""
        targets = np.array(self.targets, np.int64)[batch.slides]
        return LabelledBatch(batch.step, batch.numbers, batch.slides, batch.pixels, targets)


def with_labels(
    index: TileIndex, labels: Table, *, say: Callable[[str], None] = lambda message: None
) -> tuple[TileIndex, SlideClasses]:
    """The labelled slides of an index, and their classes; rows of `labels` (see `read_labels`) about other slides are passed over.

    Raises:
        LabelsError: fewer than two classes among the slides, or two labels for one of them.
    """
    ids = [slide.slide_id for slide in index.slides]
    known: dict[str, str] = {}
    for name, label in zip(labels["slide"], labels["label"], strict=True):
        try:
            (slide_id,) = match_slides([name], ids)
        except LabelsError:
            continue  # of a slide that is held out, or has no tissue
        if label and known.setdefault(slide_id, label) != label:
            raise LabelsError(f"the label table says two things of {slide_id}: {known[slide_id]!r} and {label!r}")
    kept = tuple(slide for slide in index.slides if slide.slide_id in known)
    classes = sorted({known[slide.slide_id] for slide in kept})
    if len(classes) < 2:
        raise LabelsError(f"{len(kept)} of {len(ids)} slides have a label, of {len(classes)} class; expected two classes or more")
    counts = ", ".join(f"{sum(known[slide.slide_id] == name for slide in kept)} {name}" for name in classes)
    left = len(ids) - len(kept)
    say(f"labels: {counts}" + (f"; {left} slides without a label are left out" if left else ""))
    named = SlideClasses(tuple(classes), tuple(classes.index(known[slide.slide_id]) for slide in kept))
    return replace(index, slides=kept, hash=hash_of([index.hash, [slide.slide_id for slide in kept]])), named


def with_mosaics(
    index: TileIndex,
    slides: str | Path,
    out: str | Path,
    *,
    most: int,
    tile: TileConfig,
    job: JobConfig,
    quiet: bool = False,
) -> TileIndex:
    """The index with the cells of each slide's mosaic alone.

    Raises:
        WsimilError: of more than a tenth of the slides none can be made.
    """
    ids = {slide.slide_id for slide in index.slides}
    rows = mosaic_slides(slides, out, most=most, tile=tile, job=replace(job, shard=None), only=ids, quiet=quiet)
    lost = failed_of(rows, "have no mosaic")
    kept = []
    for slide in index.slides:
        if slide.slide_id not in lost:
            chosen = read_mosaic(mosaic_file(Job(Path(out)), tile, slide.slide_id))
            kept.append(replace(slide, cells_level0_px=slide.cells_level0_px[chosen]))
    cells = [[slide.slide_id, hash_of(slide.cells_level0_px.tolist())] for slide in kept]
    left_out = (*index.left_out, *lost.items())
    return replace(index, slides=tuple(kept), hash=hash_of([index.hash, cells]), left_out=left_out, mosaic=True)

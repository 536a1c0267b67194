"""What can be drawn: the tissue cells of every slide, found once, before any training.

- The ordinary tiling finds them, in an ordinary job folder: the same tissue, pen and polygon rules, status rows, overview
  pictures and resume; features may be extracted into the same folder later.
- Slides that failed or hold no tissue are left out, each with a reason; where more than a tenth failed, nothing begins.
- An index has a hash of everything that the draws depend on: a run goes on only with the index that it began with.
- A folder of tile pictures is an index, too: each of its folders is a group that stands for a slide.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from wsimil.bags.bag import read_patches
from wsimil.config import JobConfig, TileConfig
from wsimil.errors import UsageError, WsimilError, some_of
from wsimil.extraction.job import Job, Row
from wsimil.extraction.stains import measure_stains, read_stain, stain_file
from wsimil.extraction.tile import tile_slides
from wsimil.files import IMAGE_SUFFIXES, OUTPUT_MARK, hash_of, slide_id_from_path
from wsimil.slides.cohort import SlideFile, find_slides
from wsimil.slides.stain import SlideStain, StainNormaliser

__all__ = ["MAX_FAILED", "IndexedSlide", "TileIndex", "failed_of", "files_below", "index_slides", "index_tiles", "with_stains"]

MAX_FAILED = 0.1
"""Largest share of slides that a run can do without."""

_PICTURES = (*IMAGE_SUFFIXES, ".tif", ".tiff")
_MEASURED = 16
"""So many pictures of a folder are asked for their size."""


@dataclass(frozen=True)
class IndexedSlide:
    """A slide and where on it there is tissue; or a folder of pictures, each of them a cell of its own."""

    slide_id: str
    file: SlideFile  # of pictures: the folder that their names are below
    mpp: float  # µm/px of level 0
    cells_level0_px: np.ndarray  # (n, 2) int64, top-left corners
    cell_level0_px: float  # side of a cell
    width: int  # level-0 pixels
    height: int
    pictures: tuple[str, ...] = ()  # (n,) names below `file.path`; none for a slide
    stain: SlideStain | None = None  # what changes the colours of its tiles; None: they stay

    @property
    def area(self) -> float:
        """Of tissue, mm²; of pictures, their number."""
        if self.pictures:
            return float(len(self.pictures))
        return len(self.cells_level0_px) * (self.cell_level0_px * self.mpp / 1000) ** 2


@dataclass(frozen=True)
class TileIndex:
    """Slides with tissue, sorted by id."""

    slides: tuple[IndexedSlide, ...]
    hash: str
    left_out: tuple[tuple[str, str], ...] = ()  # slide_id, why
    shrunk: tuple[float, float] = (1.0, 1.0)  # of pictures: shorter side by that of a tile, least and largest; what µm/px grow by
    mosaic: bool = False  # its cells were chosen one by one: a tile is a whole cell, not a box somewhere in it

    @property
    def n_cells(self) -> int:
        return sum(len(slide.cells_level0_px) for slide in self.slides)


def index_slides(
    slides: str | Path,
    out: str | Path,
    *,
    tile: TileConfig | None = None,
    job: JobConfig | None = None,
    only: Collection[str] | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> TileIndex:
    """Tile slides into the job folder `out`, or read back what is there.

    Args:
        slides: folder, slide, or CSV (`slide`, optional `slide_id`, `mpp`).
        tile: cells are `tile_px` at `mpp`, with at least `min_tissue`.
        only: ids of the slides to take (the training slides of a fold); None takes all. Others are not opened.
        say: receives a line about slides that are left out.

    Raises:
        UsageError: no slide, an id in `only` that is not there, or no tissue on any slide.
        WsimilError: more than a tenth of the slides failed.
    """
    tile, job = tile or TileConfig(), replace(job or JobConfig(), shard=None)
    files = {file.slide_id: file for file in find_slides(slides)}
    if only is not None and (absent := sorted(set(only) - files.keys())):
        raise UsageError(f"{slides}: {len(absent)} slides of the split are not there: {some_of(absent)}")
    rows = tile_slides(slides, out, config=tile, job=job, only=only, quiet=quiet)
    failed_of(rows, "failed")
    left_out = tuple((row.slide_id, row.reason) for row in rows if row.n_tiles == 0)
    if left_out:
        say(f"{len(left_out)} of {len(rows)} slides left out: {some_of([f'{name} ({reason})' for name, reason in left_out])}")
    folder = Job(Path(out)).geometry_folder(tile.mpp, tile.tile_px, tile.overlap_px) / "patches"
    found = [_read_cells(folder, files[row.slide_id], row) for row in rows if row.n_tiles > 0]
    if not found:
        raise UsageError(f"{slides}: no tissue on any of the {len(rows)} slides; look at {Path(out) / 'overviews'}")
    return TileIndex(tuple(slide for slide, _ in found), hash_of([identity for _, identity in found]), left_out)


def failed_of(rows: list[Row], what: str) -> dict[str, str]:
    """Failed slides and why; `what` says of the slides what became of them.

    Raises:
        WsimilError: they are more than a tenth.
    """
    failed = {row.slide_id: row.reason for row in rows if row.status == "failed"}
    if len(failed) > MAX_FAILED * len(rows):
        some = some_of([f"{name} ({reason})" for name, reason in failed.items()])
        raise WsimilError(
            f"{len(failed)} of {len(rows)} slides {what}, more than a tenth: {some}; mend them or leave them out of the slide table"
        )
    return failed


def with_stains(
    index: TileIndex,
    slides: str | Path,
    out: str | Path,
    normaliser: StainNormaliser,
    *,
    tile: TileConfig,
    job: JobConfig,
    quiet: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> TileIndex:
    """The index with each slide's tiles given the colours of one target; a slide whose stain cannot be told is left out.

    Raises:
        WsimilError: more than a tenth of the slides would be left out.
    """
    ids = {slide.slide_id for slide in index.slides}
    rows = measure_stains(slides, out, normaliser, tile=tile, job=replace(job, shard=None), only=ids, quiet=quiet)
    lost = failed_of(rows, "have a stain that cannot be estimated")
    if lost:
        some = some_of([f"{name} ({reason})" for name, reason in lost.items()])
        say(f"stain: {len(lost)} of {len(rows)} slides left out: {some}")
    kept = tuple(
        replace(slide, stain=read_stain(stain_file(Job(Path(out)), tile, slide.slide_id), normaliser))
        for slide in index.slides
        if slide.slide_id not in lost
    )
    measured = [[slide.slide_id, slide.stain.measured] for slide in kept if slide.stain is not None]
    return TileIndex(kept, hash_of([index.hash, normaliser.recipe(), measured]), (*index.left_out, *lost.items()))


def _read_cells(folder: Path, file: SlideFile, row: Row) -> tuple[IndexedSlide, list[str]]:
    """A tiled slide, and what it is known by."""
    coords, _, attributes = read_patches(folder / f"{row.slide_id}_patches.h5")
    slide = IndexedSlide(
        row.slide_id,
        file,
        mpp=float(attributes["mpp"]),
        cells_level0_px=np.asarray(coords, np.int64),
        cell_level0_px=float(attributes["tile_level0_px"]),
        width=int(attributes["level0_width"]),
        height=int(attributes["level0_height"]),
    )
    return slide, [row.slide_id, attributes["slide_fingerprint"], attributes["recipe_hash"]]


def index_tiles(folder: str | Path, *, tile_px: int, mpp: float, only: Collection[str] | None = None) -> TileIndex:
    """Index a folder of tile pictures; pictures of one folder are a group, in place of a slide.

    Pictures of another size are brought to `tile_px`, the largest square in their middle; `shrunk` says by how much, as some of
    them tell. What wsimil wrote below `folder` is passed over. A group's name is made as a
    slide's id is; pictures that lie in `folder` itself are a group of its name. The hash is of names and file sizes: a million
    pictures are not read for it.

    Args:
        mpp: µm/px that the pictures were cut at. Nothing is resampled to it; encoders carry it on.
        only: names of the groups to take; None takes all.

    Raises:
        UsageError: no picture, or a name in `only` that is not there.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    groups: dict[str, list[tuple[str, int]]] = {}
    for place, names in files_below(root):
        below = PurePosixPath(place.relative_to(root).as_posix())
        name = slide_id_from_path(below) if below.name else root.resolve().name
        pictures = sorted(name for name in names if name.lower().endswith(_PICTURES))
        if pictures:
            groups.setdefault(name, []).extend((str(below / picture), os.path.getsize(place / picture)) for picture in pictures)
    if not groups:
        raise UsageError(f"{root}: no picture in it (looked for {' '.join(_PICTURES)})")
    if only is not None:
        if absent := sorted(set(only) - groups.keys()):
            raise UsageError(f"{root}: {len(absent)} groups of the split are not there: {some_of(absent)}")
        groups = {name: pictures for name, pictures in groups.items() if name in only}
    slides = tuple(
        IndexedSlide(
            name,
            SlideFile(root, name, name, mpp),
            mpp=mpp,
            cells_level0_px=np.zeros((len(pictures), 2), np.int64),
            cell_level0_px=float(tile_px),
            width=tile_px,
            height=tile_px,
            pictures=tuple(picture for picture, _ in pictures),
        )
        for name, pictures in sorted(groups.items())
    )
    names = [root / picture for slide in slides for picture in slide.pictures]
    sides = _shorter_sides(names[:: -(-len(names) // _MEASURED)]) or [tile_px]
    shrunk = min(sides) / tile_px, max(sides) / tile_px
    return TileIndex(slides, hash_of({"tile_px": tile_px, "mpp": mpp, "groups": groups}), shrunk=shrunk)


def files_below(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders, and the names of their files; what is hidden, and folders that wsimil wrote, are passed over."""
    for place, subfolders, names in os.walk(root, followlinks=True):
        if OUTPUT_MARK in names and Path(place) != root:
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(place), [name for name in names if not name.startswith(".")]


def _shorter_sides(pictures: list[Path]) -> list[int]:
    """Of the pictures that say their size; no pixel is read."""
    sides = []
    for picture in pictures:
        try:
            with Image.open(picture) as image:
                sides.append(min(image.size))
        except (OSError, Image.DecompressionBombError):
            continue  # whoever reads it says why it cannot be read
    return sides

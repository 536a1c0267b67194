"""The mosaic of every slide: which of its tiles stand for it, remembered in the job folder beside the tiles themselves.

Readers do the work, so a slide that hangs or crashes is a row with a reason, and what is done is not done again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsimil.config import JobConfig, TileConfig
from wsimil.errors import BagFormatError
from wsimil.extraction.engine import Stage, run_slides
from wsimil.extraction.job import Job, Row
from wsimil.extraction.tile import tile_slide
from wsimil.files import hash_of
from wsimil.hdf5 import Dataset, open_hdf5, plain_attributes, read_array, write_hdf5
from wsimil.slides.cohort import SlideFile, find_slides

if TYPE_CHECKING:
    from wsimil.extraction.reader import Reading

__all__ = ["mosaic_coords", "mosaic_file", "mosaic_slides", "read_mosaic"]

_VERSION = 1
"""Count up with any change that gives other rows."""


def mosaic_file(job: Job, config: TileConfig, slide_id: str) -> Path:
    return job.geometry_folder(config.mpp, config.tile_px, config.overlap_px) / "mosaics" / f"{slide_id}.h5"


def read_mosaic(path: Path) -> np.ndarray:
    """Rows of the slide's tiles, rising. Raises BagFormatError."""
    return _read(path, "rows")


def mosaic_coords(path: Path) -> np.ndarray:
    """(n, 2) top-left corners of the tiles, level-0 pixels: rows mean these tiles and no others. Raises BagFormatError."""
    return _read(path, "coords")


def _read(path: Path, part: str) -> np.ndarray:
    with open_hdf5(path) as file:
        if plain_attributes(file).get("format") != "wsimil-mosaic":
            raise BagFormatError(f"{path}: no mosaic of wsimil's")
        return read_array(file[part]).astype(np.int64)


def mosaic_slides(
    slides: str | Path,
    out: str | Path,
    *,
    most: int = 55,
    tile: TileConfig | None = None,
    job: JobConfig | None = None,
    only: Collection[str] | None = None,
    quiet: bool = False,
) -> list[Row]:
    """Choose at most `most` tiles of every slide (see `wsimil.slides.mosaic`); slides are tiled first where they are not yet.

    Returns:
        A row per slide, with the number of tiles in its mosaic.
    """
    tile, job, folder = tile or TileConfig(), job or JobConfig(), Job(Path(out))
    files = [file for file in find_slides(slides) if only is None or file.slide_id in only]
    return run_slides(folder, files, _MosaicStage(folder, tile, most, job.retry_failed), config=job, quiet=quiet)


class _MosaicStage(Stage):
    name = "mosaic"

    def __init__(self, job: Job, config: TileConfig, most: int, retry_failed: bool) -> None:
        self.request = {"tile": asdict(config), "most": most, "mosaic": _VERSION}
        self._arguments = job, config, most, self.request, retry_failed

    def first_call(self, file: SlideFile) -> tuple[str, tuple]:
        return "wsimil.extraction.mosaic:mosaic_in_reader", (file, *self._arguments)

    def begin(self, file: SlideFile, value: Row) -> Row:
        return value


def mosaic_in_reader(
    reading: Reading, file: SlideFile, job: Job, config: TileConfig, most: int, request: dict[str, Any], retry_failed: bool
) -> Row:
    """One slide of `mosaic_slides`, in a process of its own."""
    from wsimil.slides.mosaic import mosaic_of_slide  # late: other readers need no clustering

    with job.attempt(file, request, retry_failed=retry_failed) as slide_fingerprint:
        slide = reading.slide(file, config.slide_mpp)
        tiles = tile_slide(slide, file, job, config, slide_fingerprint=slide_fingerprint).tiles
        path = mosaic_file(job, config, file.slide_id)
        key = hash_of([request, slide_fingerprint])
        try:
            with open_hdf5(path) as there:
                if plain_attributes(there).get("key") == key:
                    return Row(file.name, file.slide_id, "skipped", "already done", int(there["rows"].shape[0]))
        except (OSError, BagFormatError):
            pass
        found = mosaic_of_slide(slide, tiles.coords_level0_px, tile_level0_px=tiles.tile_level0_px, most=most)
        parts = {
            "rows": Dataset(found.rows),
            "cluster": Dataset(found.cluster),
            "coords": Dataset(tiles.coords_level0_px[found.rows].astype(np.int64)),
            "nuclear": Dataset(found.nuclear[found.rows].astype(np.float32)),
        }
        write_hdf5(path, parts, {"format": "wsimil-mosaic", "format_version": 1, "slide_id": file.slide_id, "key": key})
    count = len(found.rows)
    return Row(file.name, file.slide_id, "done" if count else "empty", "" if count else "no tissue", count)

"""The stain of every slide, measured once and remembered in the job folder beside the tiles: what pretraining normalises by.

Measured on the tiles that `extract --stain` would take, so that an encoder is trained on the colours that it is given later.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsimil.config import JobConfig, TileConfig
from wsimil.errors import BagFormatError
from wsimil.extraction.engine import Stage, run_slides
from wsimil.extraction.job import Job, Row
from wsimil.extraction.pixels import fit_stain
from wsimil.extraction.tile import tile_slide
from wsimil.files import hash_of, read_json, write_json
from wsimil.slides.cohort import SlideFile, find_slides
from wsimil.slides.stain import SlideStain, StainNormaliser

if TYPE_CHECKING:
    from wsimil.extraction.reader import Reading

__all__ = ["measure_stains", "read_stain", "stain_file"]


def stain_file(job: Job, config: TileConfig, slide_id: str) -> Path:
    return job.geometry_folder(config.mpp, config.tile_px, config.overlap_px) / "stains" / f"{slide_id}.json"


def read_stain(path: Path, normaliser: StainNormaliser) -> SlideStain:
    """What changes a slide's colours. Raises BagFormatError."""
    try:
        said = read_json(path)
        measured = tuple(float(value) for value in said["measured"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BagFormatError(f"{path}: no stain of a slide ({error}); remove the file and run again") from error
    if said.get("method") != normaliser.method:
        raise BagFormatError(f"{path}: measured by {said.get('method')}, not {normaliser.method}; remove the file and run again")
    return normaliser.of(measured)


def measure_stains(
    slides: str | Path,
    out: str | Path,
    normaliser: StainNormaliser,
    *,
    tile: TileConfig | None = None,
    job: JobConfig | None = None,
    only: Collection[str] | None = None,
    quiet: bool = False,
) -> list[Row]:
    """Measure every slide's stain; slides are tiled first where they are not yet. A row per slide, with its tiles."""
    tile, job, folder = tile or TileConfig(), job or JobConfig(), Job(Path(out))
    files = [file for file in find_slides(slides) if only is None or file.slide_id in only]
    return run_slides(folder, files, _StainStage(folder, tile, normaliser, job.retry_failed), config=job, quiet=quiet)


class _StainStage(Stage):
    name = "stain"

    def __init__(self, job: Job, config: TileConfig, normaliser: StainNormaliser, retry_failed: bool) -> None:
        # what is measured does not depend on what the slides are made to look like
        self.request = {"tile": asdict(config), "stain": {**normaliser.recipe(), "target": None}}
        self._arguments = job, config, normaliser, self.request, retry_failed

    def first_call(self, file: SlideFile) -> tuple[str, tuple]:
        return f"{__name__}:stain_in_reader", (file, *self._arguments)

    def begin(self, file: SlideFile, value: Row) -> Row:
        return value


def stain_in_reader(
    reading: Reading,
    file: SlideFile,
    job: Job,
    config: TileConfig,
    normaliser: StainNormaliser,
    request: dict[str, Any],
    retry_failed: bool,
) -> Row:
    """One slide of `measure_stains`, in a process of its own."""
    with job.attempt(file, request, retry_failed=retry_failed) as slide_fingerprint:
        slide = reading.slide(file, config.slide_mpp)
        tiled = tile_slide(slide, file, job, config, slide_fingerprint=slide_fingerprint)
        count = len(tiled.tiles.coords_level0_px)
        path, key = stain_file(job, config, file.slide_id), hash_of([request, slide_fingerprint])
        try:
            if read_json(path)["key"] == key and read_stain(path, normaliser):
                return Row(file.name, file.slide_id, "skipped", "already done", count)
        except (OSError, ValueError, KeyError, TypeError, BagFormatError):
            pass
        if count:
            stain = fit_stain(reading, slide, tiled, normaliser, tile_px=config.tile_px)
            write_json(path, {"key": key, "method": normaliser.method, "measured": stain.measured, **stain.attributes()})
    return Row(file.name, file.slide_id, "done" if count else "empty", "" if count else "no tissue", count)

"""What readers do for a bag: say whether there is anything to do, tile the slide, and fill memory with its tiles.

- A bag that exists counts as done only if the same recipe made it from the same slide file and its parts agree.
- A bag of another recipe is never overwritten unasked.
- Quality is scored where the pixels are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsimil.bags.bag import check_bag
from wsimil.config import TileConfig
from wsimil.errors import BagFormatError, StaleBagError
from wsimil.extraction.job import Job
from wsimil.extraction.tile import Request, TiledSlide, request_of, tile_slide
from wsimil.files import hash_of
from wsimil.slides.cohort import SlideFile
from wsimil.slides.direct import DCT_RESAMPLER
from wsimil.slides.quality import QUALITY_VERSION, tile_quality
from wsimil.slides.slide import RESAMPLER, Slide
from wsimil.slides.stain import SlideStain, StainNormaliser, sample_rows

if TYPE_CHECKING:
    from wsimil.extraction.reader import Reading

__all__ = ["Prepared", "Wanted", "WantedBag", "fit_stain", "prepare", "read_pixels"]


@dataclass(frozen=True)
class WantedBag:
    """A bag that a run is to make of each slide."""

    folder: Path
    recipe: Mapping[str, Any]  # what it depends on beside the tiles: encoder, dtype


@dataclass(frozen=True)
class Wanted:
    """What a run is to make of each slide."""

    job: Job
    tile: TileConfig
    bags: tuple[WantedBag, ...]
    dct_scaled: bool
    stain: StainNormaliser | None
    request: Mapping[str, Any]
    retry_failed: bool
    overwrite_stale: bool

    @property
    def resampler(self) -> str:
        return DCT_RESAMPLER if self.dct_scaled else RESAMPLER


@dataclass(frozen=True)
class Prepared:
    """What there is to do for a slide."""

    slide_fingerprint: str
    recipe_hashes: tuple[str, ...]  # one per wanted bag
    missing: tuple[int, ...]  # wanted bags that have to be made
    n_tiles: int
    tiled: TiledSlide | None  # None where nothing is missing
    stain: SlideStain | None = None


@dataclass(frozen=True)
class TilePixels:
    """Word of a piece of memory: consecutive tiles of a slide."""

    first: int  # row of the first tile
    count: int
    failures: Mapping[int, str]  # row → why it could not be read; its pixels are zeros
    qc: Mapping[str, np.ndarray]  # (count,) float32, NaN for failures
    resampler: str  # the rule these pixels follow: --decode dct is for JPEG with even reductions only


def prepare(reading: Reading, file: SlideFile, wanted: Wanted) -> Prepared:
    """Open and tile a slide, unless all its bags are there.

    Raises:
        SlideError: it cannot be opened or tiled, or failed before.
        StaleBagError: there is a bag of another recipe or slide file, and replacing it was not asked for.
    """
    with wanted.job.attempt(file, wanted.request, retry_failed=wanted.retry_failed) as slide_fingerprint:
        slide = reading.slide(file, wanted.tile.slide_mpp)
        request = request_of(slide, file.slide_id, wanted.tile)
        hashes = _recipe_hashes(request, wanted)
        counts = [
            _n_tiles_done(bag.folder / f"{file.slide_id}.h5", recipe_hash, slide_fingerprint, wanted.overwrite_stale)
            for bag, recipe_hash in zip(wanted.bags, hashes, strict=True)
        ]
        missing = tuple(number for number, count in enumerate(counts) if count is None)
        if not missing:
            return Prepared(slide_fingerprint, hashes, (), counts[0] or 0, None)
        tiled = tile_slide(
            slide,
            file,
            wanted.job,
            wanted.tile,
            slide_fingerprint=slide_fingerprint,
            request=request,
            overwrite_stale=wanted.overwrite_stale,
        )
        stain = None
        if wanted.stain is not None and len(tiled.tiles.coords_level0_px):
            stain = fit_stain(reading, slide, tiled, wanted.stain, tile_px=wanted.tile.tile_px, dct_scaled=wanted.dct_scaled)
        return Prepared(slide_fingerprint, hashes, missing, len(tiled.tiles.coords_level0_px), tiled, stain)


def read_pixels(
    reading: Reading,
    file: SlideFile,
    fallback_mpp: float | None,
    coords_level0_px: np.ndarray,
    first: int,
    tile_level0_px: float,
    tile_px: int,
    dct_scaled: bool,
    stain: SlideStain | None,
) -> None:
    """Fill memory with consecutive tiles of a slide; `first` is the row of the first of them."""
    slide = reading.slide(file, fallback_mpp)
    reader = reading.tiles(slide, tile_level0_px=tile_level0_px, tile_px=tile_px, dct_scaled=dct_scaled)
    walk = reader.walk(coords_level0_px)
    done = 0
    while done < len(coords_level0_px):
        slot, memory = reading.slot(tile_px)
        pixels = memory[: len(coords_level0_px) - done]
        failures = walk.read(pixels)
        failed = [row - done for row in failures]
        qc = tile_quality(pixels)
        for values in qc.values():
            values[failed] = np.nan
        if stain is not None:
            pixels[:] = stain(pixels)
            pixels[failed] = 0
        named = {first + row: why for row, why in failures.items()}
        reading.filled(slot, TilePixels(first + done, len(pixels), named, qc, reader.resampler))
        done += len(pixels)


def fit_stain(
    reading: Reading, slide: Slide, tiled: TiledSlide, normaliser: StainNormaliser, *, tile_px: int, dct_scaled: bool = False
) -> SlideStain:
    """The slide's own stain, from a sample of its tiles.

    Raises:
        SlideError: it cannot be estimated.
    """
    tiles = tiled.tiles
    clean = np.flatnonzero(tiles.qc["pen"] == 0)  # ink has a colour of its own
    rows = clean if len(clean) else np.arange(len(tiles.coords_level0_px))
    coords = tiles.coords_level0_px[rows[sample_rows(len(rows))]]
    sample = np.empty((len(coords), tile_px, tile_px, 3), np.uint8)
    reader = reading.tiles(slide, tile_level0_px=tiles.tile_level0_px, tile_px=tile_px, dct_scaled=dct_scaled)
    failures = reader.walk(coords).read(sample)
    return normaliser.fit(np.delete(sample, list(failures), axis=0))


def _recipe_hashes(request: Request, wanted: Wanted) -> tuple[str, ...]:
    recipe = dict(request.recipe)
    if wanted.stain is not None:
        recipe["stain"] = wanted.stain.recipe()
    return tuple(
        hash_of({**recipe, "resampler": wanted.resampler, "quality": QUALITY_VERSION, **bag.recipe}) for bag in wanted.bags
    )


def _n_tiles_done(path: Path, recipe_hash: str, slide_fingerprint: str, overwrite_stale: bool) -> int | None:
    """Tiles of a bag that is there and right; None where one has to be made."""
    if not path.exists():
        return None
    try:
        header = check_bag(path)
    except BagFormatError:
        return None  # what a crash or a full disk left: made anew
    if header.attributes.get("recipe_hash") != recipe_hash:
        what = "another recipe (scale, tissue, encoder or their settings)"
    elif header.attributes.get("slide_fingerprint") != slide_fingerprint:
        what = "another version of the slide file"
    else:
        return header.n_tiles
    if overwrite_stale:
        return None
    where = f"{path.parent.name}/{path.name}"
    raise StaleBagError(f"{where} exists and was made from {what}; pass --overwrite-stale to replace it, or another --out")

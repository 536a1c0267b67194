"""Where the tiles of a slide are: scale, tissue and grid together, remembered in the job folder.

- A slide is tiled once for all encoders: coordinates made by the same recipe from the same file are read back.
- Tissue is published as polygons that QuPath opens; edited ones come back through `--roi`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wsimil.bags.bag import Geometry, read_patches, write_patches
from wsimil.config import TileConfig
from wsimil.errors import BagFormatError, SlideError
from wsimil.extraction.job import Job, Row, run_slides
from wsimil.files import atomic_path, file_sha256, hash_of, write_json
from wsimil.slides.cohort import SlideFile, find_slides
from wsimil.slides.slide import RESAMPLER, Slide
from wsimil.slides.tiling import Scale, Tiles, resolve_scale, tile_grid
from wsimil.slides.tissue import (
    TISSUE_VERSION,
    TissueMask,
    draw_overview,
    find_tissue,
    outlines,
    read_rois,
    roi_mask,
    tissue_mpp,
    to_geojson,
)

__all__ = ["TiledSlide", "tile_recipe", "tile_slide", "tile_slides"]

OVERVIEW_PX = 1600


@dataclass(frozen=True)
class TiledSlide:
    """Tiles of an open slide and how they came about."""

    tiles: Tiles
    geometry: Geometry
    attributes: dict[str, Any]  # provenance for every file about this slide


def roi_file(config: TileConfig, slide_id: str) -> Path | None:
    """The slide's own polygons; None when none were asked for.

    Raises:
        SlideError: polygons were asked for and this slide has none.
    """
    if config.roi is None:
        return None
    candidates = [Path(config.roi, f"{slide_id}{suffix}") for suffix in (".geojson", ".geojson.gz", ".json")]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise SlideError(f"no polygons for it: expected {candidates[0]}")
    return found


def tile_recipe(config: TileConfig, scale: Scale, roi: Path | None) -> dict[str, Any]:
    """Everything the coordinates depend on, besides the slide file."""
    return {
        **asdict(scale),
        "tile_px": config.tile_px,
        "overlap_px": config.overlap_px,
        "min_tissue": config.min_tissue,
        "tissue": f"roi:{file_sha256(roi)}" if roi else "none" if config.tissue == "none" else TISSUE_VERSION,
    }


def tile_slide(slide: Slide, file: SlideFile, job: Job, config: TileConfig, *, slide_fingerprint: str) -> TiledSlide:
    """Tile one open slide, or read back what the same recipe made of the same file.

    Raises:
        ScaleError: µm/px unknown, insane, or too coarse.
        SlideUnreadableError, SlideReadError: the file breaks.
    """
    scale = resolve_scale(slide.known_mpp(), config.mpp, allow_upsampling=config.allow_upsampling)
    roi = roi_file(config, file.slide_id)
    recipe = tile_recipe(config, scale, roi)
    tile_level0_px = config.tile_px * scale.factor
    geometry = Geometry(
        tile_px=config.tile_px,
        tile_level0_px=tile_level0_px,
        overlap_px=config.overlap_px,
        level0_width=slide.width,
        level0_height=slide.height,
        slide_mpp=scale.slide_mpp,
        target_mpp=scale.target_mpp,
        name=file.slide_id,
    )
    attributes: dict[str, Any] = {
        "slide_id": file.slide_id,
        "slide_fingerprint": slide_fingerprint,
        "reader": slide.reader,
        "mpp": scale.slide_mpp,
        "mpp_source": slide.mpp_source,
        "target_mpp": scale.target_mpp,
        "effective_mpp": scale.effective_mpp,
        "tile_px": config.tile_px,
        "tile_level0_px": tile_level0_px,
        "overlap_px": config.overlap_px,
        "bounds_x": slide.bounds.x,
        "bounds_y": slide.bounds.y,
        "level0_width": slide.width,
        "level0_height": slide.height,
        "resampler": RESAMPLER,
    }
    path = job.geometry_folder(config.mpp, config.tile_px, config.overlap_px) / "patches" / f"{file.slide_id}_patches.h5"
    recipe_hash = hash_of(recipe)
    if (tiles := _read_back(path, recipe_hash, slide_fingerprint, tile_level0_px)) is None:
        tiles = _find_tiles(slide, file, job, config, scale, roi)
        write_patches(path, tiles.coords_level0_px, tiles.tissue, geometry, {**attributes, "recipe_hash": recipe_hash})
    return TiledSlide(tiles, geometry, attributes)


def _read_back(path: Path, recipe_hash: str, slide_fingerprint: str, tile_level0_px: float) -> Tiles | None:
    if not path.exists():
        return None
    try:
        coords, tissue, attributes = read_patches(path)
    except BagFormatError:
        return None
    if (attributes.get("recipe_hash"), attributes.get("slide_fingerprint")) != (recipe_hash, slide_fingerprint):
        return None
    return Tiles(coords, tissue, tile_level0_px)


def _find_tiles(slide: Slide, file: SlideFile, job: Job, config: TileConfig, scale: Scale, roi: Path | None) -> Tiles:
    size = (slide.width, slide.height)
    picture_mpp = max(scale.slide_mpp, tissue_mpp(slide.width * scale.slide_mpp, slide.height * scale.slide_mpp))
    picture = slide.thumbnail(picture_mpp)
    found = _find_tissue(picture, picture_mpp, slide, config, roi)
    origin = (slide.bounds.x, slide.bounds.y)
    polygons = [("Tissue", polygon) for polygon in outlines(found.mask, size_level0_px=size)]
    write_json(job.tissue(file.slide_id), to_geojson(polygons, origin_level0_px=origin))
    tiles = tile_grid(
        slide.bounds,
        tile_level0_px=config.tile_px * scale.factor,
        step_level0_px=(config.tile_px - config.overlap_px) * scale.factor,
        mask=found.mask,
        canvas=size,
        min_tissue=config.min_tissue,
    )
    per_px = (slide.width / picture.shape[1], slide.height / picture.shape[0])
    boxes = np.column_stack([tiles.coords_level0_px / per_px, np.full((len(tiles.tissue), 2), tiles.tile_level0_px) / per_px])
    with atomic_path(job.overview(file.slide_id)) as temporary:
        overview = Image.fromarray(draw_overview(picture, found, tiles_px=boxes))
        overview.thumbnail((OVERVIEW_PX, OVERVIEW_PX))
        overview.save(temporary, quality=85)
    return tiles


def _find_tissue(picture: np.ndarray, mpp: float, slide: Slide, config: TileConfig, roi: Path | None) -> TissueMask:
    if roi is None and config.tissue == "auto":
        return find_tissue(picture, mpp)
    shape = (picture.shape[0], picture.shape[1])
    mask = np.ones(shape, bool)
    if roi is not None:
        rois = read_rois(roi, origin_level0_px=(slide.bounds.x, slide.bounds.y))
        mask = roi_mask(rois, size_level0_px=(slide.width, slide.height), shape=shape)
    return TissueMask(mask=mask, pen=np.zeros(shape, bool), mpp=mpp, has_glass=True)


def too_small(tiled: TiledSlide) -> str:
    """Why a slide has no tile."""
    side = tiled.tiles.tile_level0_px
    if min(tiled.geometry.level0_width, tiled.geometry.level0_height) < side:
        return f"{tiled.geometry.level0_width}×{tiled.geometry.level0_height} px: smaller than one tile of {side:.0f} px"
    return "no tissue"


def tile_slides(slides: str | Path, out: str | Path, *, config: TileConfig | None = None, quiet: bool = False) -> list[Row]:
    """Tile every slide: coordinates, tissue polygons and an overview picture each.

    Args:
        slides: folder, slide, or CSV (`slide`, optional `slide_id`, `mpp`).
        out: job folder.

    Returns:
        A row per slide, as in `status.csv`.
    """
    config = config or TileConfig()
    job = Job(Path(out))

    def work(file: SlideFile) -> Row:
        with Slide(file.path, mpp=file.mpp, fallback_mpp=config.slide_mpp) as slide:
            tiled = tile_slide(slide, file, job, config, slide_fingerprint=file.fingerprint())
        count = len(tiled.tiles.coords_level0_px)
        return Row(file.name, file.slide_id, "done" if count else "empty", "" if count else too_small(tiled), count)

    return run_slides(job, find_slides(slides), work, stage="tile", request={"tile": asdict(config)}, quiet=quiet)

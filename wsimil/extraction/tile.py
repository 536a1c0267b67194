"""Where the tiles of a slide are: scale, tissue and grid together, remembered in the job folder.

- A slide is tiled once for all encoders: coordinates made by the same recipe from the same file are read back.
- Tissue is published as polygons that QuPath opens; edited ones come back through `--roi`.
- Tiles that another program has placed (`--coords`) are taken as they are, at the µm/px that they have.
"""

from __future__ import annotations

import glob
import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsimil.bags.bag import Geometry, read_patches, write_patches
from wsimil.bags.places import Places, find_places, read_places
from wsimil.config import JobConfig, TileConfig
from wsimil.errors import BagFormatError, CompanionError, ScaleError, StaleBagError, UsageError
from wsimil.extraction.engine import Stage, run_slides
from wsimil.extraction.job import Job, Row
from wsimil.files import atomic_path, file_sha256, hash_of, write_json
from wsimil.slides.cohort import SlideFile, find_slides
from wsimil.slides.overview import draw_overview
from wsimil.slides.polygons import is_of_class, outlines, rasterize, read_rois, sort_rois, to_geojson
from wsimil.slides.slide import RESAMPLER, Slide
from wsimil.slides.tiling import Scale, Tiles, resolve_scale, snapped_to, tile_grid, tiles_at
from wsimil.slides.tissue import TISSUE_VERSION, TissueMask, find_tissue, tissue_mpp

if TYPE_CHECKING:
    from wsimil.extraction.reader import Reading

__all__ = ["Request", "TiledSlide", "request_of", "tile_recipe", "tile_slide", "tile_slides"]


@dataclass(frozen=True)
class TiledSlide:
    """Tiles of an open slide and how they came about."""

    tiles: Tiles
    geometry: Geometry
    attributes: dict[str, Any]  # provenance for every file about this slide
    read_back: bool  # made by an earlier run


def roi_file(config: TileConfig, slide_id: str) -> Path | None:
    """The slide's own polygons; None when none were asked for.

    Raises:
        CompanionError: polygons were asked for and this slide has none.
    """
    if config.roi is None:
        return None
    candidates = [Path(config.roi, f"{slide_id}{suffix}") for suffix in (".geojson", ".geojson.gz", ".json")]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise CompanionError(f"no polygons for it: expected {candidates[0]}")
    return found


def coords_file(config: TileConfig, slide_id: str) -> Path | None:
    """The slide's coordinates by another program; None when none were asked for.

    Raises:
        CompanionError: coordinates were asked for and this slide has none.
    """
    if config.coords is None:
        return None
    if (found := find_places(Path(config.coords), slide_id)) is None:
        raise CompanionError(f"no coordinates for it: expected {Path(config.coords, f'{slide_id}.h5')}")
    return found


@dataclass(frozen=True)
class Request:
    """What is asked of one slide."""

    scale: Scale
    roi: Path | None
    places: Places | None  # tiles given, in place of a grid
    recipe: dict[str, Any]  # all that the coordinates depend on, besides the slide file


def request_of(slide: Slide, slide_id: str, config: TileConfig) -> Request:
    """What is asked of an open slide.

    Raises:
        ScaleError: µm/px unknown, insane, or too coarse.
        CompanionError: a file of polygons or coordinates is missing, broken, or of another scale or slide.
    """
    scale = resolve_scale(slide.known_mpp(), config.mpp, allow_upsampling=config.allow_upsampling)
    roi, path, places = roi_file(config, slide_id), coords_file(config, slide_id), None
    if path is not None:
        try:
            places = _fitting(read_places(path), slide, config, path)
            scale = snapped_to(scale, tile_px=config.tile_px, tile_level0_px=places.tile_level0_px)
        except (BagFormatError, ScaleError) as error:
            raise CompanionError(str(error)) from error
    recipe = tile_recipe(config, scale, roi)
    return Request(scale, roi, places, recipe if path is None else recipe | {"coords": file_sha256(path)})


def _fitting(places: Places, slide: Slide, config: TileConfig, path: Path) -> Places:
    """Row by row, each tile once, and inside the slide."""
    coords, side = places.coords_level0_px, places.tile_level0_px
    inside = (coords >= 0).all(1) & (coords + side <= (slide.width + 0.5, slide.height + 0.5)).all(1)
    if len(coords) and not inside.any():
        raise CompanionError(f"{path}: no tile lies inside the slide of {slide.width}×{slide.height} px: of another slide?")
    kept = np.unique(coords[inside][:, ::-1], axis=0)[:, ::-1]  # sorted by y, then x
    if len(kept) < len(coords):
        warnings.warn(
            f"{len(coords) - len(kept)} of {len(coords)} tiles of {path.name} are left out: beyond the edge, or twice", stacklevel=2
        )
    return Places(np.ascontiguousarray(kept), side)


def tile_recipe(config: TileConfig, scale: Scale, roi: Path | None) -> dict[str, Any]:
    """Everything the coordinates depend on, besides the slide file and coordinates that are given."""
    recipe = {
        **asdict(scale),
        "tile_px": config.tile_px,
        "overlap_px": config.overlap_px,
        "min_tissue": config.min_tissue,
        "tissue": "none" if config.tissue == "none" else TISSUE_VERSION,
    }
    if config.tissue == "auto" and not config.pen:
        recipe["pen"] = False
    if roi:
        recipe["roi"] = file_sha256(roi)
        for key, names in (("roi_include", config.roi_include), ("roi_exclude", config.roi_exclude)):
            recipe[key] = sorted({name.casefold() for name in names})
    return recipe


def tile_slide(
    slide: Slide,
    file: SlideFile,
    job: Job,
    config: TileConfig,
    *,
    slide_fingerprint: str,
    request: Request | None = None,
    overwrite_stale: bool = False,
) -> TiledSlide:
    """Tile one open slide, or read back what the same recipe made of the same file.

    Args:
        request: what `request_of` says of this slide, where that is known already.
        overwrite_stale: bags that were made of other tiles do not keep it from being tiled anew.

    Raises:
        ScaleError, CompanionError: see `request_of`.
        StaleBagError: there are bags of it, made of other tiles.
        SlideUnreadableError, SlideReadError: the file breaks.
    """
    request = request or request_of(slide, file.slide_id, config)
    scale = request.scale
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
    recipe_hash = hash_of(request.recipe)
    there = _read_back(path, recipe_hash, slide_fingerprint, tile_level0_px)
    if there is None and not overwrite_stale and (bag := _bag_of_other_tiles(path, recipe_hash, slide_fingerprint)):
        raise StaleBagError(
            f"{bag.parent.name}/{bag.name} exists and was made of other tiles (another recipe, or another version of the slide "
            "file); take another --out, or remove the bag (`wsimil extract --overwrite-stale` replaces it)"
        )
    if there is not None and not (job.tissue(file.slide_id).exists() and job.overview(file.slide_id).exists()):
        there = None  # somebody has tidied up: drawn again
    tiles = there or _find_tiles(slide, file, job, config, request)
    if there is None:
        write_patches(path, tiles.coords_level0_px, tiles.qc, geometry, {**attributes, "recipe_hash": recipe_hash})
    return TiledSlide(tiles, geometry, attributes, read_back=there is not None)


def _read_back(path: Path, recipe_hash: str, slide_fingerprint: str, tile_level0_px: float) -> Tiles | None:
    if not path.exists():
        return None
    try:
        coords, qc, attributes = read_patches(path)
    except BagFormatError:
        return None
    if (attributes.get("recipe_hash"), attributes.get("slide_fingerprint")) != (recipe_hash, slide_fingerprint):
        return None
    return Tiles(coords, qc, tile_level0_px)


def _bag_of_other_tiles(patches: Path, recipe_hash: str, slide_fingerprint: str) -> Path | None:
    """A bag of the slide beside patches that another recipe or slide file made."""
    try:
        attributes = read_patches(patches)[2]
    except (BagFormatError, OSError):
        return None  # none there, or broken
    if (attributes.get("recipe_hash"), attributes.get("slide_fingerprint")) == (recipe_hash, slide_fingerprint):
        return None
    return next(iter(patches.parents[1].glob(f"features_*/{glob.escape(attributes['slide_id'])}.h5")), None)


def _find_tiles(slide: Slide, file: SlideFile, job: Job, config: TileConfig, request: Request) -> Tiles:
    size, scale, roi = (slide.width, slide.height), request.scale, request.roi
    picture_mpp = max(scale.slide_mpp, tissue_mpp(slide.width * scale.slide_mpp, slide.height * scale.slide_mpp))
    picture = slide.thumbnail(picture_mpp)
    found = _find_tissue(picture, picture_mpp, slide, config, roi)
    origin = (slide.bounds.x, slide.bounds.y)
    published = job.tissue(file.slide_id)
    if roi is None or not (published.exists() and published.samefile(roi)):  # what somebody edited in place stays theirs
        polygons = [
            (name, polygon)
            for name, mask in (("Tissue", found.mask), ("Pen", found.pen))
            for polygon in outlines(mask, size_level0_px=size)
        ]
        write_json(published, to_geojson(polygons, origin_level0_px=origin))
    side = config.tile_px * scale.factor
    if request.places is not None:
        coords = request.places.coords_level0_px
        tiles = tiles_at(coords, tile_level0_px=side, mask=found.mask, pen=found.pen, canvas=size)
    else:
        step = (config.tile_px - config.overlap_px) * scale.factor
        tiles = tile_grid(
            slide.bounds,
            tile_level0_px=side,
            step_level0_px=step,
            mask=found.mask,
            pen=found.pen,
            canvas=size,
            min_tissue=config.min_tissue,
        )
    per_px = (slide.width / picture.shape[1], slide.height / picture.shape[0])
    boxes = np.hstack([tiles.coords_level0_px, np.full_like(tiles.coords_level0_px, tiles.tile_level0_px, float)]) / (per_px * 2)
    with atomic_path(job.overview(file.slide_id)) as temporary:
        draw_overview(picture, found, tiles_px=boxes).save(temporary, quality=85)
    return tiles


def _find_tissue(picture: np.ndarray, mpp: float, slide: Slide, config: TileConfig, roi: Path | None) -> TissueMask:
    """Tissue as configured: polygons to keep replace it, polygons to exclude are cut out of whatever there is."""
    size, shape = (slide.width, slide.height), (picture.shape[0], picture.shape[1])
    try:
        rois = [] if roi is None else read_rois(roi, origin_level0_px=(slide.bounds.x, slide.bounds.y))
    except UsageError as error:  # one slide's polygons, not the whole request
        raise CompanionError(str(error)) from error
    kept, cut = sort_rois(rois, include=config.roi_include, exclude=config.roi_exclude)
    # a file that only excludes says nothing of the rest; one that is empty says that nothing is left
    if roi is not None and (kept or config.roi_include or not cut):
        found = TissueMask(rasterize(kept, size_level0_px=size, shape=shape), np.zeros(shape, bool), mpp, has_glass=True)
    elif config.tissue == "auto":
        found = find_tissue(picture, mpp, pen=config.pen)
    else:
        found = TissueMask(np.ones(shape, bool), np.zeros(shape, bool), mpp, has_glass=False)
    inked = [polygon for name, polygon in rois if is_of_class(name, ("pen",))]
    return replace(
        found,
        mask=found.mask & ~rasterize(cut, size_level0_px=size, shape=shape),
        pen=found.pen | rasterize(inked, size_level0_px=size, shape=shape),
    )


def too_small(tiled: TiledSlide, config: TileConfig) -> str:
    """Why a slide has no tile. A slide without polygons of the classes asked for is no fault: a normal slide has no tumour."""
    side = tiled.tiles.tile_level0_px
    width, height = tiled.geometry.level0_width, tiled.geometry.level0_height
    if width is not None and height is not None and min(width, height) < side:
        return f"{width}×{height} px: smaller than one tile of {side:.0f} px"
    if config.coords is not None:
        return "its file of coordinates has no tile"
    if (roi := roi_file(config, tiled.geometry.name)) is None:
        return "no tissue"
    names = {name for name, _ in read_rois(roi)}
    if config.roi_include and not any(is_of_class(name, config.roi_include) for name in names):
        there = ", ".join(sorted(name or "no class" for name in names)) or "none at all"
        return f"no polygon of class {' or '.join(config.roi_include)} in {roi.name} (there are: {there})"
    return f"no tile with enough inside the polygons of {roi.name}"


def tile_in_reader(
    reading: Reading, file: SlideFile, job: Job, config: TileConfig, request: dict[str, Any], retry_failed: bool
) -> Row:
    """One slide of `tile_slides`, in a process of its own."""
    with job.attempt(file, request, retry_failed=retry_failed) as slide_fingerprint:
        slide = reading.slide(file, config.slide_mpp)
        tiled = tile_slide(slide, file, job, config, slide_fingerprint=slide_fingerprint)
    count = len(tiled.tiles.coords_level0_px)
    if count and tiled.read_back:
        return Row(file.name, file.slide_id, "skipped", "already done", count)
    return Row(file.name, file.slide_id, "done" if count else "empty", "" if count else too_small(tiled, config), count)


class _TileStage(Stage):
    name = "tile"

    def __init__(self, job: Job, config: TileConfig, retry_failed: bool) -> None:
        self.request = {"tile": asdict(config)}
        self._arguments = job, config, self.request, retry_failed

    def first_call(self, file: SlideFile) -> tuple[str, tuple]:
        return "wsimil.extraction.tile:tile_in_reader", (file, *self._arguments)

    def begin(self, file: SlideFile, value: Row) -> Row:
        return value


def tile_slides(
    slides: str | Path,
    out: str | Path,
    *,
    config: TileConfig | None = None,
    job: JobConfig | None = None,
    only: Collection[str] | None = None,
    quiet: bool = False,
) -> list[Row]:
    """Tile every slide: coordinates, tissue polygons and an overview picture each.

    Args:
        slides: folder, slide, or CSV (`slide`, optional `slide_id`, `mpp`).
        out: job folder.
        only: ids of the slides to take; None takes all.

    Returns:
        A row per slide, as in `status.csv`.

    Raises:
        UsageError: no slide, or two slides of one id.
    """
    config, job = config or TileConfig(), job or JobConfig()
    folder = Job(Path(out))
    files = [file for file in find_slides(slides) if only is None or file.slide_id in only]
    return run_slides(folder, files, _TileStage(folder, config, job.retry_failed), config=job, quiet=quiet)

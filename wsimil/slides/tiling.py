"""Where tiles go and how large they are: from a scale and a tissue mask to level-0 coordinates.

- Pure geometry: no slide, no pixels, so it is tested with numbers alone.
- The field of view is what was asked for, within half a percent, on any scanner.
- Each origin is rounded by itself from an exact grid: rounding never adds up.
- Tiles never overhang the slide; order is row by row, so files are reproducible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from wsimil.errors import ScaleError
from wsimil.units import MAX_MPP, MIN_MPP, SNAP_TOLERANCE, UPSAMPLING_TOLERANCE

__all__ = ["Rect", "Scale", "Tiles", "resolve_scale", "snapped_to", "tile_grid", "tiles_at"]


@dataclass(frozen=True)
class Rect:
    """A rectangle in level-0 pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Scale:
    """How a slide is seen: `factor` level-0 pixels along each pixel of a tile."""

    slide_mpp: float
    target_mpp: float
    effective_mpp: float
    factor: float


def resolve_scale(slide_mpp: float, target_mpp: float, *, allow_upsampling: bool = False) -> Scale:
    """The scale at which a slide of `slide_mpp` is read when `target_mpp` is asked for.

    The native scale or an integer reduction of it stands in when that changes the field of view by no more than .5 %
    (a .499 µm/px slide is read as it is for .5); otherwise the factor is exact and pixels are resampled.

    Raises:
        ScaleError: µm/px outside .05 to 20, or a slide more than 10 % coarser than asked without `allow_upsampling`.
    """
    if not MIN_MPP <= slide_mpp <= MAX_MPP:
        raise ScaleError(
            f"{slide_mpp:.4g} µm/px is outside {MIN_MPP:g} to {MAX_MPP:g}: a wrong tag, or an overview only; "
            "state the true value in the `mpp` column of a slide table"
        )
    if slide_mpp > target_mpp * UPSAMPLING_TOLERANCE * (1 + 1e-9) and not allow_upsampling:
        raise ScaleError(
            f"{slide_mpp:.4g} µm/px is coarser than the {target_mpp:g} µm/px asked for: the detail is not in the file; "
            "ask for a coarser --mpp, or pass --allow-upsampling"
        )
    ratio = target_mpp / slide_mpp
    whole = max(1, round(ratio))
    if abs(whole / ratio - 1) <= SNAP_TOLERANCE * (1 + 1e-9):
        return Scale(slide_mpp, target_mpp, whole * slide_mpp, float(whole))
    return Scale(slide_mpp, target_mpp, target_mpp, ratio)


@dataclass(frozen=True)
class Tiles:
    """The tiles of a slide, row by row."""

    coords_level0_px: np.ndarray  # (N, 2) int64, x, y of the top-left corner
    qc: Mapping[str, np.ndarray]  # (N,) float32 each: `tissue` and `pen`, their shares of a tile's area
    tile_level0_px: float


def tile_grid(
    extent: Rect,
    *,
    tile_level0_px: float,
    step_level0_px: float,
    mask: np.ndarray | None = None,
    pen: np.ndarray | None = None,
    canvas: tuple[int, int] | None = None,
    min_tissue: float = 0.5,
) -> Tiles:
    """All tiles inside `extent` that hold at least `min_tissue` of tissue.

    Args:
        extent: where tiles may lie (the slide, or its scanned bounds).
        tile_level0_px: side of a tile, may be fractional.
        step_level0_px: distance of neighbouring tiles, may be fractional; equal to the side without overlap.
        mask: (h, w) bool, tissue over the whole canvas; None takes every tile.
        pen: (h, w) bool, ink over the whole canvas; None: nowhere. It decides nothing here, its share is noted.
        canvas: (width, height) in level-0 pixels that the masks cover.
        min_tissue: 0 to 1.
    """
    if tile_level0_px <= 0 or step_level0_px <= 0:
        raise ValueError(f"tile and step must be positive, not {tile_level0_px} and {step_level0_px}")
    xs = _origins(extent.x, extent.width, tile_level0_px, step_level0_px)
    ys = _origins(extent.y, extent.height, tile_level0_px, step_level0_px)
    coords = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)  # (N, 2), rows of y, x fastest
    tiles = tiles_at(
        coords,
        tile_level0_px=tile_level0_px,
        mask=mask,
        pen=pen,
        canvas=canvas or (extent.x + extent.width, extent.y + extent.height),
    )
    if mask is None:
        return tiles
    keep = tiles.qc["tissue"] >= min_tissue - 1e-6
    return Tiles(coords[keep], {name: share[keep] for name, share in tiles.qc.items()}, tile_level0_px)


def tiles_at(
    coords_level0_px: np.ndarray,
    *,
    tile_level0_px: float,
    canvas: tuple[int, int],
    mask: np.ndarray | None = None,
    pen: np.ndarray | None = None,
) -> Tiles:
    """Tiles with these corners (N, 2), all of them, with their shares of the masks; see `tile_grid`."""
    n_tiles = len(coords_level0_px)
    tissue = np.ones(n_tiles, np.float32) if mask is None else _covered(mask, coords_level0_px, tile_level0_px, *canvas)
    inked = np.zeros(n_tiles, np.float32) if pen is None else _covered(pen, coords_level0_px, tile_level0_px, *canvas)
    return Tiles(coords_level0_px, {"tissue": tissue, "pen": inked}, tile_level0_px)


def snapped_to(scale: Scale, *, tile_px: int, tile_level0_px: float) -> Scale:
    """The scale at which tiles of a given side at level 0 are seen, which has to be the one asked for within .5 %.

    Raises:
        ScaleError: it is another.
    """
    factor = tile_level0_px / tile_px
    seen = scale.slide_mpp * factor
    if abs(seen / scale.target_mpp - 1) > SNAP_TOLERANCE * (1 + 1e-9):
        same_mpp = round(tile_level0_px * scale.slide_mpp / scale.target_mpp)
        raise ScaleError(
            f"tiles of {tile_level0_px:g} level-0 px at {scale.slide_mpp:.4g} µm/px are seen at {seen:.4g} µm/px in {tile_px} px, "
            f"not at {scale.target_mpp:g}; pass --mpp {seen:.4g}, or --tile-px {same_mpp}"
        )
    return Scale(scale.slide_mpp, scale.target_mpp, seen, factor)


def _origins(start: int, length: int, tile: float, step: float) -> np.ndarray:
    count = int(np.floor((length - tile) / step + 1e-9)) + 1
    exact = start + step * np.arange(max(0, count))
    # rounding up may push the last tile over the edge by less than a pixel
    return np.minimum(np.floor(exact + 0.5), np.floor(start + length - tile + 1e-9)).astype(np.int64)


def _covered(mask: np.ndarray, coords: np.ndarray, tile: float, width: int, height: int) -> np.ndarray:
    """(N,) share of `mask` under each tile, exact to a fraction of a mask pixel."""
    rows, columns = mask.shape
    integral = np.zeros((rows + 1, columns + 1))
    integral[1:, 1:] = mask.cumsum(0, dtype=np.float64).cumsum(1)
    x, y = coords.T
    left, right = x * (columns / width), (x + tile) * (columns / width)
    top, bottom = y * (rows / height), (y + tile) * (rows / height)
    area = _at(integral, bottom, right) - _at(integral, top, right) - _at(integral, bottom, left) + _at(integral, top, left)
    area /= (tile * columns / width) * (tile * rows / height)
    return np.clip(area, 0, 1).astype(np.float32)


def _at(integral: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(N,) the integral image at fractional positions: linear in between, which is exact."""
    (row, down), (column, along) = _whole(y, integral.shape[0]), _whole(x, integral.shape[1])
    above = integral[row, column] * (1 - along) + integral[row, column + 1] * along
    below = integral[row + 1, column] * (1 - along) + integral[row + 1, column + 1] * along
    return above * (1 - down) + below * down


def _whole(position: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The position before and the part of the way to the next; `length` positions there are."""
    position = np.clip(position, 0, length - 1)
    low = np.minimum(position.astype(np.int64), length - 2)
    return low, position - low

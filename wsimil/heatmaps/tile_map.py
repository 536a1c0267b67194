"""One number per tile, and what it is on the canvas.

- One model of the raster: every tile is a square in level-0 pixels; where tiles overlap, their mean.
- The map is the signed contribution to the predicted class (of two: to the positive one) where the model has exact ones: 0 is
  neutral, red speaks for it, blue against. Else it is the tiles' own probability, else attention as multiples of a uniform
  weight. Another class may be asked for. The raw scores stay in `scores/`.
- Work is done between the edges of tiles, not on pixels and not tile by tile, and from the top down: 100,000 tiles take a fraction
  of a second, and memory does not grow with the canvas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from wsimil.errors import BagFormatError, SlideScaleUnknownError, UsageError
from wsimil.hdf5 import open_hdf5, plain_attributes, read_array

__all__ = ["Strip", "TileMap", "read_tile_map"]


@dataclass(frozen=True)
class Strip:
    """Rows of pixels in which the map is the same, cut into C cells at the edges of tiles: nothing changes inside a cell."""

    top_px: int
    bottom_px: int
    x_edges_px: np.ndarray  # (C + 1,) from 0 to the width
    values: np.ndarray  # (C,) float32, mean over the tiles on each; 0 where there is none
    covered: np.ndarray  # (C,) bool


@dataclass(frozen=True)
class TileMap:
    """One number per tile of a slide, and where the tiles are."""

    slide_id: str
    values: np.ndarray  # (N,) float32, finite
    coords_level0_px: np.ndarray  # (N, 2)
    tile_level0_px: float
    kind: str  # contribution, attention, tile_prob
    class_name: str  # what the values speak for
    size_level0_px: tuple[int, int]
    bounds: tuple[int, int] | None  # x, y; None: not known
    unit: str = "px"  # of coordinates and sides; um: of another program's bags that do not know the slide's pixels
    slide_fingerprint: str = ""  # of the file that was predicted; empty: not known
    contribution_unit: str = "logit"

    @property
    def complete(self) -> bool:
        """Whether it needs nothing from the slide to be placed on it."""
        return self.unit == "px" and all(self.size_level0_px) and self.bounds is not None

    def on(self, slide_mpp: float | None, size_level0_px: tuple[int, int], bounds: tuple[int, int]) -> TileMap:
        """The same map in the slide's own pixels, of a slide of this size; only what the map does not know is taken over.

        Raises:
            SlideScaleUnknownError: positions are in µm, and so the slide's µm/px is needed.
        """
        if self.complete:
            return self
        bounds = bounds if self.bounds is None else self.bounds
        if self.unit == "px":
            size = self.size_level0_px if all(self.size_level0_px) else size_level0_px
            return replace(self, size_level0_px=size, bounds=bounds)
        if slide_mpp is None:
            raise SlideScaleUnknownError("tiles are placed in µm, and the slide states no µm/px; state it in a slide table (`mpp`)")
        coords, side = self.coords_level0_px / slide_mpp, self.tile_level0_px / slide_mpp
        return replace(self, coords_level0_px=coords, tile_level0_px=side, size_level0_px=size_level0_px, bounds=bounds, unit="px")

    @property
    def signed(self) -> bool:
        return self.kind == "contribution"

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Values at the two ends of the colours: robust against a single tile, the same rule for every slide."""
        if self.kind == "tile_prob":
            return 0.0, 1.0
        top = float(np.quantile(np.abs(self.values), 0.99)) if len(self.values) else 0.0
        if self.signed:
            return -(top or 1.0), top or 1.0
        return 0.0, max(top, 2.0)  # a map without a preference stays pale

    def share(self, values: np.ndarray) -> np.ndarray:
        """How far along the colours each value is, 0 to 1."""
        low, high = self.scale
        return np.clip((values - low) / (high - low), 0, 1)

    def hottest(self) -> np.ndarray:
        """(2,) centre of the tile with the highest value, level-0 px."""
        return self.coords_level0_px[int(self.values.argmax())] + self.tile_level0_px / 2

    def strips(self, size_px: tuple[int, int]) -> Iterator[Strip]:
        """The map on the canvas resampled to `size_px` (width, height), from top to bottom.

        Edges are rounded to whole pixels. A tile that lies on the canvas has at least one; what lies beside it is cut off.
        """
        low, high, values = self._on_canvas(size_px)
        xs, left, right = _numbered(low[:, 0], high[:, 0], size_px[0])
        ys, top, bottom = _numbered(low[:, 1], high[:, 1], size_px[1])
        # sums that run to the right and down change at the four corners of a tile alone
        changed_row = np.concatenate([top, bottom, top, bottom])
        order = np.argsort(changed_row, kind="stable")
        changed_column = np.concatenate([left, right, right, left])[order]
        sign = np.repeat([1.0, 1.0, -1.0, -1.0], len(values))[order]
        change = sign * np.tile(values, 4)[order]
        begin = np.searchsorted(changed_row[order], np.arange(len(ys)))
        total, count = np.zeros(len(xs)), np.zeros(len(xs))
        for y in range(len(ys) - 1):
            here = slice(begin[y], begin[y + 1])
            total += np.bincount(changed_column[here], change[here], len(xs))
            count += np.bincount(changed_column[here], sign[here], len(xs))
            n_tiles = count.cumsum()[:-1]  # whole numbers, exact
            mean = np.where(n_tiles > 0, total.cumsum()[:-1] / np.maximum(n_tiles, 1), 0)
            yield Strip(int(ys[y]), int(ys[y + 1]), xs, mean.astype(np.float32), n_tiles > 0)

    def _on_canvas(self, size_px: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Top-left and bottom-right corners, (n, 2) whole pixels each, and values (n,) of the tiles that touch the canvas."""
        low, high = self.coords_level0_px, self.coords_level0_px + self.tile_level0_px
        touching = ((low < self.size_level0_px) & (high > 0)).all(1)
        per_px = np.array(self.size_level0_px) / size_px
        low, high = (np.round(corner[touching] / per_px).astype(int) for corner in (low, high))
        low = np.clip(low, 0, np.array(size_px) - 1)
        return low, np.clip(high, low + 1, size_px), self.values[touching].astype(np.float64)

    def raster(self, size_px: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """values (h, w), mean over the tiles on each pixel, and covered (h, w) bool, on the canvas resampled to `size_px`."""
        values, covered = np.zeros(size_px[::-1], np.float32), np.zeros(size_px[::-1], bool)
        for strip in self.strips(size_px):
            columns = np.diff(strip.x_edges_px)
            values[strip.top_px : strip.bottom_px] = strip.values.repeat(columns)
            covered[strip.top_px : strip.bottom_px] = strip.covered.repeat(columns)
        return values, covered


def _numbered(low: np.ndarray, high: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All distinct edges along an axis, with 0 and `end`; and which of them each tile's are."""
    present = np.zeros(end + 1, bool)
    present[[0, end]] = present[low] = present[high] = True
    number = present.cumsum() - 1
    return np.flatnonzero(present), number[low], number[high]


def read_tile_map(scores: Path, kind: str = "auto", *, class_name: str | None = None, predicted: str | None = None) -> TileMap:
    """The map of a scores file.

    Args:
        kind: attention, contribution, tile_prob, or auto.
        class_name: which class the map speaks for.
        predicted: the class to speak for if none is asked for; where there is no map of it (of two classes, the negative one) the
            only or last one.

    Raises:
        BagFormatError: no scores file.
        UsageError: the file has no such map.
    """
    datasets = {"attention": "attention", "contribution": "contributions", "tile_prob": "tile_prob"}
    with open_hdf5(scores) as file:
        attributes = plain_attributes(file)
        if attributes.get("format") != "wsimil-scores" or not attributes.get("complete"):
            raise BagFormatError(f"{scores}: no finished scores file; `wsimil predict` makes one")
        present = {name: dataset for name, dataset in datasets.items() if dataset in file}
        if kind == "auto":
            order = ["contribution", "tile_prob", "attention"]
            if attributes.get("contribution_kind") != "exact":
                order = ["tile_prob", "attention", "contribution"]
            kind = next((name for name in order if name in present), "contribution")
        if kind not in present:
            raise UsageError(f"{scores}: no {kind} in it (it has {', '.join(present) or 'no map'})")
        table = read_array(file[present[kind]])
        coords = read_array(file["coords"])
    if "tile_level0_px" not in attributes or (unit := attributes.get("coords_unit", "px")) not in ("px", "um"):
        raise UsageError(f"{scores}: where its tiles are is not known; `wsimil convert` says what the bags lack, and takes it")
    names = [str(name) for name in attributes.get("class_names", [])]
    if class_name is not None and kind == "attention":
        raise UsageError(f"{scores}: attention speaks for no class; leave out --class-name {class_name}")
    if class_name is not None and class_name not in names:
        raise UsageError(f"{scores}: no map of {class_name!r} in it (it has {', '.join(names)})")
    spoken_for = class_name or predicted
    # one output: the map speaks for the positive class, whatever was predicted
    column = names.index(spoken_for) if spoken_for in names else -1
    if kind == "attention":
        values = table.mean(1) * np.isfinite(table).all(1).sum()
    else:
        values = table[:, column]
    valid = np.isfinite(values)
    return TileMap(
        slide_id=str(attributes["slide_id"]),
        values=values[valid].astype(np.float32),
        coords_level0_px=coords[valid],
        tile_level0_px=float(attributes["tile_level0_px"]),
        kind=kind,
        class_name=names[column] if names and kind != "attention" else "attention",
        size_level0_px=(int(attributes.get("level0_width", 0)), int(attributes.get("level0_height", 0))),
        bounds=(int(attributes["bounds_x"]), int(attributes["bounds_y"])) if "bounds_x" in attributes else None,
        slide_fingerprint=str(attributes.get("slide_fingerprint", "")),
        contribution_unit=str(attributes.get("contribution_unit", "logit")),
        unit=unit,
    )

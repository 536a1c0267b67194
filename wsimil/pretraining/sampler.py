"""Which tile comes next: a function of a seed and a number, and of nothing else.

- Tile i is the same for any number of readers, devices and restarts: to go on is to know one integer.
- Numbers come in epochs of as many draws as there are cells. In an epoch every slide has its share, to one draw, and the cells of a
  slide come round in turn; the order of both is a shuffle that is computed, not kept (a Feistel network with cycle walking).
- Random numbers are counted, too: SplitMix64 of seed, number, attempt and place. Integers only, so no library can change them.
- A slide's share grows with its tissue to the power `area_power`: 0 gives all slides the same, 1 all tissue.
- A tile's centre lies anywhere in its cell (of a mosaic: in its middle), its µm/px anywhere in the range (on a
  logarithmic scale), never finer than the slide itself and never so coarse that the box would leave the slide.
- Tiles that turn out to be of no use are replaced by the next attempt of the same number, on any slide.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from wsimil.errors import UsageError
from wsimil.pretraining.index import IndexedSlide, TileIndex
from wsimil.slides.tiling import resolve_scale

__all__ = ["Draw", "TileSampler", "shuffled"]

_VERSION = 1
"""Count it up with any change that changes a draw."""

_MASK = (1 << 64) - 1
_ROUNDS = 6
_OFFSETS, _ORDER, _CELLS, _PASSES, _DRAWS = range(5)  # what a key is for


@dataclass(frozen=True)
class Draw:
    """One tile: a square box on a slide."""

    number: int
    attempt: int
    slide: int  # index into `TileIndex.slides`
    cell: int  # index into its cells; of a folder of pictures: the picture
    x_level0_px: float  # top-left corner, whole pixels
    y_level0_px: float
    mpp: float  # of the tile


class TileSampler:
    """Draws tiles from an index.

    Args:
        seed: 0 or more.
        mpp_range: finest and coarsest µm/px; twice the same for one scale. Nothing to pictures.
        tile_px: side of a tile, pixels.
        area_power: of a slide's tissue in its share.
        per_slide_per_epoch: the epoch of Self-ViT-MIL in place of shares: so many cells of every slide, as they lie in the grid,
            drawn anew in each epoch.
        distinct: so many different tiles, shown again and again in another order each time; 0: every tile is new. What a tile
            cache is for.

    Attributes:
        epoch: draws in an epoch.
        drawn_mpp: finest and coarsest µm/px that the network is really shown: of the slides that fit, and of pictures as they are
            once they are `tile_px` wide.
        left_out: ids of slides too small for a tile of the finest µm/px asked for.

    Raises:
        UsageError: no slide is large enough.
    """

    def __init__(
        self,
        index: TileIndex,
        *,
        seed: int,
        mpp_range: tuple[float, float],
        tile_px: int,
        area_power: float = 0.5,
        per_slide_per_epoch: int = 0,
        distinct: int = 0,
    ) -> None:
        low, high = mpp_range
        if not 0 < low <= high:
            raise UsageError(f"µm/px from {low:g} to {high:g}: expected the finer one first")
        self.index, self.seed, self.tile_px = index, seed, tile_px
        self.mpp_range, self.area_power = (float(low), float(high)), area_power
        self.per_slide_per_epoch, self.distinct = per_slide_per_epoch, distinct
        self._ranges = [_range_of(slide, low, high, tile_px) for slide in index.slides]
        fits = np.array([bounds is not None for bounds in self._ranges], bool)
        self.left_out = tuple(slide.slide_id for slide, fit in zip(index.slides, fits, strict=True) if not fit)
        if not fits.any():
            raise UsageError(f"no slide is as large as one tile of {tile_px} px at {low:g} µm/px; ask for a finer --mpp")
        ranges = [bounds for bounds in self._ranges if bounds is not None]
        shrunk = index.shrunk  # only pictures are
        self.drawn_mpp = min(finest for finest, _ in ranges) * shrunk[0], max(coarsest for _, coarsest in ranges) * shrunk[1]
        areas = np.array([slide.area for slide in index.slides])
        shares = fits * (areas**area_power if per_slide_per_epoch == 0 else np.ones_like(areas))
        self._ends = [0.0, *(shares.cumsum() / shares.cumsum()[-1]).tolist()]  # (n + 1,), the last ones exactly 1
        self._in_middle = per_slide_per_epoch > 0 or index.mosaic
        whole = (self._in_middle and low == high) or all(slide.pictures for slide in index.slides)
        counts = [len(slide.cells_level0_px) for slide in index.slides]
        self._first_cells = np.append(0, np.cumsum(counts)).tolist() if whole else None
        self.epoch = int(fits.sum()) * per_slide_per_epoch or int(np.array(counts)[fits].sum())
        self._borders = lru_cache(maxsize=4)(self._make_borders)

    def recipe(self) -> dict[str, Any]:
        """Everything that a draw depends on."""
        return {
            "index": self.index.hash,
            "seed": self.seed,
            "mpp_range": list(self.mpp_range),
            "tile_px": self.tile_px,
            "area_power": self.area_power,
            "per_slide_per_epoch": self.per_slide_per_epoch,
            "distinct": self.distinct,
            "version": _VERSION,
            **({"whole_cells": True} if self.index.mosaic else {}),  # said only here: other runs are known by what they were
        }

    def source(self, number: int) -> int:
        """The number whose tile is shown as tile `number`: another one only where `distinct` tiles are shown again."""
        if not self.distinct or number < self.distinct:
            return number
        again, place = divmod(number, self.distinct)
        return shuffled(place, self.distinct, _key(self.seed, _PASSES, again))

    def cache_key(self, draw: Draw) -> int | None:
        """A number, 0 and upwards, for what a draw shows: of a whole cell its own, of any other box that of its first showing.

        None for the replacements of such boxes.
        """
        if self._first_cells is not None:
            return self._first_cells[draw.slide] + draw.cell
        return self.source(draw.number) if draw.attempt == 0 else None

    def draw(self, number: int, attempt: int = 0) -> Draw:
        """Tile `number`; a higher `attempt` gives the next one in its place."""
        source = self.source(number)
        which, where, scale, across, down = (_uniform(self.seed, _DRAWS, source, attempt, nth) for nth in range(5))
        if attempt == 0:
            slide, cell = self._in_turn(source)
        else:
            slide = bisect_right(self._ends, which) - 1
            cell = int(where * len(self.index.slides[slide].cells_level0_px))
        there, bounds = self.index.slides[slide], self._ranges[slide]
        assert bounds is not None  # such slides have no share
        if there.pictures:
            return Draw(number, attempt, slide, cell, 0.0, 0.0, there.mpp)
        low, high = bounds
        mpp = _snapped(there, low * (high / low) ** scale, self.tile_px)
        side = self.tile_px * mpp / there.mpp
        if self._in_middle:
            across = down = 0.5
        left, top = there.cells_level0_px[cell].tolist()
        x = _placed(left + there.cell_level0_px * across - side / 2, side, there.width)
        y = _placed(top + there.cell_level0_px * down - side / 2, side, there.height)
        return Draw(number, attempt, slide, cell, x, y, mpp)

    def side_level0_px(self, draw: Draw) -> float:
        """Side of the box of a draw."""
        return self.tile_px * draw.mpp / self.index.slides[draw.slide].mpp

    def _in_turn(self, source: int) -> tuple[int, int]:
        """Slide and cell of the first attempt."""
        epoch, place = divmod(source, self.epoch)
        place = shuffled(place, self.epoch, _key(self.seed, _ORDER, epoch))
        borders = self._borders(epoch)
        slide = bisect_right(borders, place) - 1
        n_cells = len(self.index.slides[slide].cells_level0_px)
        turn, nth = divmod(place - borders[slide], n_cells)
        return slide, shuffled(nth, n_cells, _key(self.seed, _CELLS, epoch, slide, turn))

    def _make_borders(self, epoch: int) -> list[int]:
        """Where in an epoch each slide's draws begin: shares rounded by an offset that changes, so that none is lost for good."""
        offset = 0.5 if self.per_slide_per_epoch else _uniform(self.seed, _OFFSETS, epoch)
        return [0, *(int(end * self.epoch + offset) for end in self._ends[1:-1]), self.epoch]


def _range_of(slide: IndexedSlide, low: float, high: float, tile_px: int) -> tuple[float, float] | None:
    """Finest and coarsest µm/px that a slide is drawn at; None where it is too small for any."""
    if slide.pictures:
        return low, high
    finest, largest = min(max(low, slide.mpp), high), _largest(slide, tile_px)
    if min(finest, _snapped(slide, finest, tile_px)) > largest:
        return None
    return finest, max(finest, min(high, largest))


def _largest(slide: IndexedSlide, tile_px: int) -> float:
    """The coarsest µm/px at which one tile is still as small as the slide."""
    return min(slide.width, slide.height) * slide.mpp / tile_px * (1 + 1e-9)


def _snapped(slide: IndexedSlide, mpp: float, tile_px: int) -> float:
    """µm/px as everywhere: the slide's own or a whole multiple of it where that is as good, and fits."""
    effective = resolve_scale(slide.mpp, mpp, allow_upsampling=True).effective_mpp
    return effective if effective <= _largest(slide, tile_px) else mpp


def _placed(corner: float, side: float, length: int) -> float:
    """A corner on a whole pixel, with the box on the slide."""
    return float(max(0, min(math.floor(corner + 0.5), math.floor(length - side + 1e-6))))


def shuffled(place: int, size: int, key: int) -> int:
    """Where `place` of `size` goes in the shuffle that `key` names: each place goes somewhere else, without a table."""
    if size == 1:
        return 0
    bits = max(2, (size - 1).bit_length())
    widths = bits // 2, bits - bits // 2
    while True:  # fewer than two rounds on average: the network shuffles a power of 2
        left, right = place >> widths[1], place & ((1 << widths[1]) - 1)
        for step in range(_ROUNDS):
            left, right = right, left ^ (_mixed(key + step * 0x9E3779B97F4A7C15 ^ right) & ((1 << widths[step % 2]) - 1))
        place = left << widths[1] | right
        if place < size:
            return place


def _key(*parts: int) -> int:
    """64 bits from numbers."""
    key = 0
    for part in parts:
        key = _mixed(key + 0x9E3779B97F4A7C15 ^ part)
    return key


def _uniform(*parts: int) -> float:
    """A number from 0 up to 1 that depends on numbers alone."""
    return (_key(*parts) >> 11) / 2**53


def _mixed(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014)."""
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31

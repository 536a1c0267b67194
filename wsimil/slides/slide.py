"""A slide: any region of it at any µm/px.

- Asked for by level-0 position and physical size, never by pyramid level.
- The slide's µm/px is the table's, else the file's, else `--slide-mpp`; never guessed from an objective's name.
- One resampling rule: the coarsest level that is still as fine as asked, then the exact area mean for a whole factor and an
  antialiasing filter over the exact box for any other (linear interpolation where a slide is coarser than asked). The filter is
  Hamming's: a .2520 µm/px scanner stays nearly as sharp as a .2500 one, where a triangle would lose a quarter of the detail.
- Whole factors start on the nearest pixel of their level, so no tile is softened by where it lies. (Where only OpenSlide decodes
  a format, it blends the pixels of coarser levels whose size is no whole fraction of level 0.)
- Where no resampling is needed, pixels are the reader's own, bit for bit.
- A level that is a whole number of times smaller, but for the odd last pixel, is exactly that many times smaller: scanners drop
  the odd pixel, and OpenSlide's quotient of the sizes would drift by up to a pixel across the slide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from wsimil.errors import SlideScaleUnknownError, SlideUnreadableError
from wsimil.slides.readers import level_downsample, open_reader
from wsimil.slides.tiling import Rect

__all__ = ["RESAMPLER", "Slide"]

RESAMPLER = "level+area|hamming|linear/2"
"""Name and version of the rule above: part of every recipe."""

_BLOCK_PX = 2048
"""Side of the pieces that a whole slide is read in, pixels of the level: some 50 MB at a time."""


class Slide:
    """An open slide. Reads may come from several threads.

    Args:
        path: file (for a multi-file slide, the one that OpenSlide opens).
        mpp: µm/px from a slide table: beats the file's.
        fallback_mpp: µm/px for a file that states none.
        on_read: called after every read from the file, failed ones too, by the thread that read: a sign of life.

    Attributes:
        width, height: level-0 pixels.
        mpp, mpp_source: µm/px or None, and where it comes from.
        bounds: the scanned part of the canvas (the whole of it for most formats).
        reader: what decodes it, e.g. "openslide:aperio".

    Raises:
        SlideUnreadableError: nothing opens the file.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        mpp: float | None = None,
        fallback_mpp: float | None = None,
        on_read: Callable[[], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self._on_read = on_read
        self._reader = open_reader(self.path)
        self.width, self.height = self._reader.level_dimensions[0]
        if self.width < 1 or self.height < 1:
            raise SlideUnreadableError(f"{self.width}×{self.height} px: nothing in it")
        self.reader = self._reader.kind
        self.mpp, self.mpp_source = self._reader.file_mpp, self._reader.mpp_key
        if mpp is not None:
            self.mpp, self.mpp_source = mpp, "table"
        elif self.mpp is None and fallback_mpp is not None:
            self.mpp, self.mpp_source = fallback_mpp, "option"
        self.bounds = _inside(Rect(0, 0, self.width, self.height), self._reader.bounds)
        self._downsamples = [
            (level_downsample(self.width, width), level_downsample(self.height, height))
            for width, height in self._reader.level_dimensions
        ]

    def known_mpp(self) -> float:
        """µm/px, or a `SlideScaleUnknownError` that says how to state it."""
        if self.mpp is None:
            raise SlideScaleUnknownError(
                "no µm/px in the file; state it in the `mpp` column of a slide table, or pass --slide-mpp if you know the scanner's"
            )
        return self.mpp

    def read_box(self, x: float, y: float, width: float, height: float, *, size_px: tuple[int, int]) -> np.ndarray:
        """A box of level-0 pixels resampled to `size_px` (width, height): uint8 (height, width, 3), white outside.

        Raises:
            SlideReadError: the file breaks there, or lacks the place.
        """
        return self._box(x, y, width, height, size_px=size_px, patch=False)

    def _box(self, x: float, y: float, width: float, height: float, *, size_px: tuple[int, int], patch: bool) -> np.ndarray:
        level, (per_x, per_y) = self._level_for(min(width / size_px[0], height / size_px[1]))
        origin_x, origin_y = self._reader.level_origins[level]
        left, right = (x - origin_x) / per_x, (x + width - origin_x) / per_x
        top, bottom = (y - origin_y) / per_y, (y + height - origin_y) / per_y
        factors = (right - left) / size_px[0], (bottom - top) / size_px[1]
        whole = max(1, round(factors[0]))
        if all(abs(factor - whole) * side < 1e-3 for factor, side in zip(factors, size_px, strict=True)):
            x0, y0 = math.floor(left + 0.5), math.floor(top + 0.5)
            pixels = self._read_level(level, x0, y0, x0 + whole * size_px[0], y0 + whole * size_px[1], patch)
            return pixels if whole == 1 else np.asarray(Image.fromarray(pixels).reduce(whole))
        # the filter reaches beyond the box: with its surroundings, a tile is what the same place is in any larger read
        margin = math.ceil(max(factors) / 2) + 1
        x0, x1 = _widened(left, right, margin, self.width / per_x)
        y0, y1 = _widened(top, bottom, margin, self.height / per_y)
        image = Image.fromarray(self._read_level(level, x0, y0, x1, y1, patch))
        method = Image.Resampling.HAMMING if min(factors) >= 1 else Image.Resampling.BILINEAR
        box = (max(left, x0) - x0, max(top, y0) - y0, min(right, x1) - x0, min(bottom, y1) - y0)
        return np.asarray(image.resize(size_px, method, box=box))

    def read_tile(self, x: int, y: int, *, tile_level0_px: float, tile_px: int) -> np.ndarray:
        """uint8 (tile_px, tile_px, 3) of the tile whose top-left corner is (x, y)."""
        return self.read_box(x, y, tile_level0_px, tile_level0_px, size_px=(tile_px, tile_px))

    def thumbnail(self, mpp: float) -> np.ndarray:
        """The whole canvas at about `mpp` (the size is rounded to whole pixels), read in blocks: memory stays flat."""
        factor = max(1.0, mpp / self.known_mpp())
        return self.overview((max(1, round(self.width / factor)), max(1, round(self.height / factor))))

    def overview(self, size_px: tuple[int, int]) -> np.ndarray:
        """The whole canvas resampled to `size_px` (width, height): uint8 (height, width, 3).

        A block that the file lacks is filled from another level or its surroundings: so tiles there are tried, fail and are
        counted, where white would make them glass.
        """
        columns, rows = size_px
        per_column, per_row = self.width / columns, self.height / rows
        _, per_level = self._level_for(min(per_column, per_row))
        block = int(_BLOCK_PX / max(per_column / per_level[0], per_row / per_level[1]))
        if block == 0:  # even one pixel covers too much: by way of a larger picture
            return np.asarray(Image.fromarray(self.overview((2 * columns, 2 * rows))).reduce(2))
        canvas = np.empty((rows, columns, 3), np.uint8)
        for row in range(0, rows, block):
            for column in range(0, columns, block):
                w, h = min(block, columns - column), min(block, rows - row)
                canvas[row : row + h, column : column + w] = self._box(
                    column * per_column, row * per_row, w * per_column, h * per_row, size_px=(w, h), patch=True
                )
        return canvas

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _level_for(self, factor: float) -> tuple[int, tuple[float, float]]:
        """The coarsest level that is still as fine as asked (half a percent is as fine), and its downsample in x and y."""
        fine_enough = [level for level, per in enumerate(self._downsamples) if max(per) <= factor * 1.005]
        level = max(fine_enough, key=lambda level: self._downsamples[level], default=0)
        return level, self._downsamples[level]

    def _read_level(self, level: int, x0: int, y0: int, x1: int, y1: int, patch: bool) -> np.ndarray:
        """Pixels of a level; the odd last one that the scanner dropped is as its neighbour."""
        try:
            pixels = self._reader.read(level, x0, y0, x1 - x0, y1 - y0, patch=patch)
        finally:
            if self._on_read is not None:
                self._on_read()
        width, height = self._reader.level_dimensions[level]
        if x0 < width < x1 and self.width > width * self._downsamples[level][0]:
            pixels = pixels.copy()
            pixels[:, width - x0] = pixels[:, width - x0 - 1]
        if y0 < height < y1 and self.height > height * self._downsamples[level][1]:
            pixels = pixels.copy()
            pixels[height - y0] = pixels[height - y0 - 1]
        return pixels


def _widened(low: float, high: float, margin: int, end: float) -> tuple[int, int]:
    """Whole pixels around a box; the margin ends with the slide, the box need not."""
    low_px, high_px = math.floor(low + 1e-6), math.ceil(high - 1e-6)
    return min(low_px, max(0, low_px - margin)), max(high_px, min(math.ceil(end), high_px + margin))


def _inside(canvas: Rect, bounds: tuple[int, int, int, int] | None) -> Rect:
    """Bounds cut to the canvas; bounds that miss it are no bounds."""
    if bounds is None:
        return canvas
    x, y = max(0, bounds[0]), max(0, bounds[1])
    right, bottom = min(canvas.width, bounds[0] + bounds[2]), min(canvas.height, bounds[1] + bounds[3])
    return Rect(x, y, right - x, bottom - y) if right > x and bottom > y else canvas

"""Tiles of a slide as pixels: uint8 from the file to the encoder.

- Straight from the compressed blocks where the format allows it and the pixels are proved to be the same, else through `Slide`.
- A tile that cannot be read is named, with the reason, and never looks like glass: its row is for nobody.
- Scaling to an encoder's input and normalising are the encoder's business, on its device.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from wsimil.errors import SlideReadError
from wsimil.slides.direct import open_direct
from wsimil.slides.slide import RESAMPLER, Slide

__all__ = ["MAX_INVALID", "TileReader", "TileWalk", "open_tiles"]

MAX_INVALID = 0.01
"""Largest share of unreadable tiles in a slide that still counts as read."""


class TileWalk(Protocol):
    """Tiles of a slide, one after the other."""

    def read(self, out: np.ndarray) -> dict[int, str]:
        """Read the next tiles into `out`, uint8 (n, tile_px, tile_px, 3); returns why tiles could not be read, by their row.

        Those tiles are zeros.
        """
        ...


class TileReader(Protocol):
    """Reads tiles of one size from one slide."""

    resampler: str  # name of the rule that its pixels follow

    def walk(self, coords_level0_px: np.ndarray) -> TileWalk:
        """Tiles with these top-left corners, (N, 2), to be read in this order; row by row is best."""
        ...


def open_tiles(slide: Slide, *, tile_level0_px: float, tile_px: int, dct_scaled: bool = False) -> tuple[TileReader, str | None]:
    """The fastest reader that gives the right pixels, and why it is not the direct one, if it is not."""
    direct, reason = open_direct(slide, tile_level0_px=tile_level0_px, tile_px=tile_px, dct_scaled=dct_scaled)
    return direct or _PlainReader(slide, tile_level0_px, tile_px), reason


class _PlainReader:
    """Every format, tile by tile."""

    resampler = RESAMPLER

    def __init__(self, slide: Slide, tile_level0_px: float, tile_px: int) -> None:
        self.slide, self.tile_level0_px, self.tile_px = slide, tile_level0_px, tile_px

    def walk(self, coords_level0_px: np.ndarray) -> _PlainWalk:
        return _PlainWalk(self, coords_level0_px)


class _PlainWalk:
    def __init__(self, reader: _PlainReader, coords_level0_px: np.ndarray) -> None:
        self._reader, self._coords, self._next = reader, coords_level0_px.tolist(), 0

    def read(self, out: np.ndarray) -> dict[int, str]:
        reader, failures = self._reader, {}
        for tile in out:
            x, y = self._coords[self._next]
            try:
                tile[:] = reader.slide.read_tile(x, y, tile_level0_px=reader.tile_level0_px, tile_px=reader.tile_px)
            except SlideReadError as error:
                tile[:] = 0
                failures[self._next] = str(error)
            self._next += 1
        return failures

"""Tiles of a slide as batches of pixels, read ahead by threads.

- uint8 from the file to the encoder; scaling and normalising is the encoder's business, on its device.
- A tile that cannot be read is marked, with the reason, and never looks like glass: its row is for nobody.
- A slide with more than 1 % of such tiles is damaged: reading stops there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from wsimil.errors import SlideReadError, SlideUnreadableError
from wsimil.slides.slide import Slide
from wsimil.slides.tiling import Tiles

__all__ = ["MAX_INVALID", "TileBatch", "read_tiles"]

MAX_INVALID = 0.01
"""Largest share of unreadable tiles in a slide that still counts as read."""


@dataclass(frozen=True)
class TileBatch:
    """Consecutive tiles of a slide."""

    first: int  # row of the first tile
    pixels: np.ndarray  # uint8 (n, tile_px, tile_px, 3); unreadable tiles are zeros
    failures: dict[int, str]  # row → reason


def read_tiles(slide: Slide, tiles: Tiles, *, tile_px: int, batch_size: int = 64, workers: int = 2) -> Iterator[TileBatch]:
    """All tiles in their order, `batch_size` at a time; about two batches are read ahead.

    Raises:
        SlideUnreadableError: more than 1 % of the slide's tiles cannot be read.
    """
    total, started, failed = len(tiles.coords_level0_px), 0, 0

    def read(row: int) -> np.ndarray | str:
        x, y = tiles.coords_level0_px[row]
        try:
            return slide.read_tile(int(x), int(y), tile_level0_px=tiles.tile_level0_px, tile_px=tile_px)
        except SlideReadError as error:
            return str(error)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="tiles")
    ahead: deque[Future[np.ndarray | str]] = deque()
    try:
        for first in range(0, total, batch_size):
            count = min(batch_size, total - first)
            pixels = np.zeros((count, tile_px, tile_px, 3), np.uint8)
            failures: dict[int, str] = {}
            for row in range(first, first + count):
                while started < min(total, row + 2 * batch_size + workers):
                    ahead.append(pool.submit(read, started))
                    started += 1
                result = ahead.popleft().result()
                if isinstance(result, str):
                    failures[row] = result
                else:
                    pixels[row - first] = result
            failed += len(failures)
            if failed > MAX_INVALID * total:
                raise SlideUnreadableError(
                    f"{failed} of the first {first + count} tiles (of {total}) cannot be read, more than {MAX_INVALID:.0%}; "
                    f"the last: {failures[max(failures)]}"
                )
            yield TileBatch(first, pixels, failures)
    finally:
        pool.shutdown(cancel_futures=True)

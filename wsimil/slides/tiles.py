"""Tiles of a slide as pixels: uint8 from the file to the encoder.

- A tile that cannot be read is named, with the reason, and never looks like glass: its row is for nobody.
- Scaling to an encoder's input and normalising are the encoder's business, on its device.
"""

from __future__ import annotations

import numpy as np

from wsimil.errors import SlideReadError
from wsimil.slides.slide import Slide

__all__ = ["MAX_INVALID", "read_tiles"]

MAX_INVALID = 0.01
"""Largest share of unreadable tiles in a slide that still counts as read."""


def read_tiles(
    slide: Slide,
    coords_level0_px: np.ndarray,  # (n, 2)
    *,
    tile_level0_px: float,
    out: np.ndarray,  # uint8 (n, tile_px, tile_px, 3)
) -> dict[int, str]:
    """Read tiles into `out`; returns why tiles could not be read, by their place. Those are zeros."""
    failures: dict[int, str] = {}
    for place, (x, y) in enumerate(coords_level0_px.tolist()):
        try:
            out[place] = slide.read_tile(x, y, tile_level0_px=tile_level0_px, tile_px=out.shape[1])
        except SlideReadError as error:
            out[place] = 0
            failures[place] = str(error)
    return failures

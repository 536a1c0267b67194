"""Tile scores back on the slide: a picture to look at and polygons for QuPath.

Names are imported when first used: the processes that draw pass through here and need no pandas.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsimil.heatmaps.draw import draw_heatmaps
    from wsimil.heatmaps.tile_map import TileMap, read_tile_map

_HOMES = {"TileMap": "tile_map", "draw_heatmaps": "draw", "read_tile_map": "tile_map"}

__all__ = ["TileMap", "draw_heatmaps", "read_tile_map"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"wsimil.heatmaps.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'wsimil.heatmaps' has no attribute {name!r}")

"""From slides to an encoder, without labels: DINO and MAE on tiles that are read while the network learns.

- An index, not a stream: tile i is a function of seed and i. Workers, devices and restarts change nothing.
- A recipe is a preset with what was set in its place (presets.py); methods are entries of a table (methods.py).
- A panel of label-free numbers says while it runs whether the encoder learns (health.py); twice collapsed, the run stops and keeps
  the last good weights.
- Training slides only: the split is an input, and what the encoder saw is written into it.

Names are imported when first used: to look at a recipe, torch is not needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsimil.pretraining.forecast import Forecast
    from wsimil.pretraining.index import IndexedSlide, TileIndex, index_slides, index_tiles
    from wsimil.pretraining.presets import Recipe, preset, resolve_recipe
    from wsimil.pretraining.run import Pretrained, pretrain
    from wsimil.pretraining.sampler import Draw, TileSampler

_HOMES = {
    "Draw": "sampler",
    "Forecast": "forecast",
    "IndexedSlide": "index",
    "Pretrained": "run",
    "Recipe": "presets",
    "TileIndex": "index",
    "TileSampler": "sampler",
    "index_slides": "index",
    "index_tiles": "index",
    "preset": "presets",
    "pretrain": "run",
    "resolve_recipe": "presets",
}

__all__ = [
    "Draw",
    "Forecast",
    "IndexedSlide",
    "Pretrained",
    "Recipe",
    "TileIndex",
    "TileSampler",
    "index_slides",
    "index_tiles",
    "preset",
    "pretrain",
    "resolve_recipe",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"wsimil.pretraining.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'wsimil.pretraining' has no attribute {name!r}")

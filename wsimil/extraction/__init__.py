"""slide → bag, resumable: `tile_slides` for coordinates, `extract_features` for features.

Names are imported when first used: the processes that read slides pass through here and need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsimil.extraction.extract import Extraction, extract_features
    from wsimil.extraction.tile import tile_slides

_HOMES = {"Extraction": "extract", "extract_features": "extract", "tile_slides": "tile"}

__all__ = ["Extraction", "extract_features", "tile_slides"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"wsimil.extraction.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'wsimil.extraction' has no attribute {name!r}")

"""slide → bag, resumable: `tile_slides` for coordinates, `extract_features` for features."""

from __future__ import annotations

from wsimil.extraction.extract import Extraction, extract_features
from wsimil.extraction.tile import tile_slides

__all__ = ["Extraction", "extract_features", "tile_slides"]

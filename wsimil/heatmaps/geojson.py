"""Tiles as objects that QuPath opens.

- QuPath's origin is OpenSlide's bounds offset, so that is subtracted (`--qupath-bounds keep` leaves it).
- The text is put together directly: building twenty thousand objects first and turning them into JSON takes three times as long.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from wsimil.heatmaps.colors import in_colors
from wsimil.heatmaps.tile_map import TileMap

__all__ = ["MAX_GEOJSON_TILES", "tiles_geojson"]

MAX_GEOJSON_TILES = 20_000
"""QuPath grows slow beyond; the hottest are kept, and the picture shows them all."""

_NAMESPACE = uuid.UUID("6c1b4e0a-5b1c-5f6e-8d3e-2f2f0f1f7a11")  # any constant: the same tile gets the same id

_FEATURE = (
    '{"type":"Feature","id":"%s","geometry":{"type":"Polygon","coordinates":[[[%s,%s],[%s,%s],[%s,%s],[%s,%s],[%s,%s]]]},'
    '"properties":{"objectType":"tile","color":[%d,%d,%d],"classification":%s,"measurements":{"%s":%.6g},"isLocked":true}}'
)


def tiles_geojson(tile_map: TileMap, *, origin: tuple[int, int] = (0, 0)) -> str:
    """QuPath tile objects as JSON, `origin` (level-0 px) subtracted; beyond 20,000 only the hottest."""
    rows = np.sort(np.argsort(-tile_map.values, kind="stable")[:MAX_GEOJSON_TILES])
    values, low = tile_map.values[rows], tile_map.coords_level0_px[rows] - np.array(origin)
    high = low + tile_map.tile_level0_px
    speaks_for = _compact({"name": tile_map.class_name, "color": [200, 40, 40]})
    speaks_against = _compact({"name": f"not {tile_map.class_name}", "color": [60, 90, 200]})
    features = ",".join(
        [
            _FEATURE
            % (
                *(tile_id, x0, y0, x1, y0, x1, y1, x0, y1, x0, y0, *color),
                *(speaks_for if value > 0 or not tile_map.signed else speaks_against, tile_map.kind, value),
            )
            for tile_id, x0, y0, x1, y1, color, value in zip(
                _ids(f"{tile_map.slide_id}/{tile_map.kind}/", rows.tolist()),
                *(_numbers(edge) for edge in (low[:, 0], low[:, 1], high[:, 0], high[:, 1])),
                in_colors(tile_map.share(values), signed=tile_map.signed).tolist(),
                values.tolist(),
                strict=True,
            )
        ]
    )
    head = {
        "slide_id": tile_map.slide_id,
        "map": tile_map.kind,
        "frame": "level-0 pixels, origin subtracted",
        "origin_level0_px": list(origin),
        "n_tiles": len(tile_map.values),
        "n_written": len(rows),
    }
    return f'{{"type":"FeatureCollection","wsimil":{_compact(head)},"features":[{features}]}}'


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _numbers(edges: np.ndarray) -> list[str]:
    """Each as JSON with at most two decimals; equal ones are put into words once, for tiles stand in rows and columns."""
    distinct, which = np.unique(edges, return_inverse=True)
    return np.array([json.dumps(round(number, 2)) for number in distinct.tolist()], object)[which].tolist()


def _ids(prefix: str, numbers: list[int]) -> Iterator[str]:
    """`uuid.uuid5` of prefix and number, the prefix hashed once."""
    begun = hashlib.sha1(_NAMESPACE.bytes + prefix.encode(), usedforsecurity=False)
    variant = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}
    for number in numbers:
        digest = begun.copy()
        digest.update(b"%d" % number)
        text = digest.hexdigest()
        yield f"{text[:8]}-{text[8:12]}-5{text[13:16]}-{variant[text[16]]}{text[17:20]}-{text[20:32]}"

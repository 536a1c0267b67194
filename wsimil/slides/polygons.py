"""Between masks and polygons: outlines as QuPath opens them, and what its edited ones leave of a slide.

- A mask becomes polygons along the edges of its pixels, and they become the same mask again: nothing is lost on the way.
- A pixel is inside a polygon when its centre is.
- QuPath counts from OpenSlide's bounds; that offset is taken off on writing and added on reading.
- Classes are compared as QuPath's users write them: whatever the letter case, with or without a trailing *, and a derived
  class ("Tumor: Positive") is also of the class it comes from.
"""

from __future__ import annotations

import gzip
import json
import uuid
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import shapely

from wsimil.config import TileConfig
from wsimil.errors import UsageError

__all__ = ["CLASS_COLORS", "Region", "is_of_class", "outlines", "rasterize", "read_rois", "sort_rois", "to_geojson"]

Region: TypeAlias = tuple[str | None, shapely.Polygon]
"""Class and outline in level-0 px; drawn without a class it is None."""

CLASS_COLORS = {"Tissue": (0, 160, 0), "Pen": (200, 0, 200)}

_NOT_ANNOTATIONS = {"detection", "cell", "tile"}
_ID_SPACE = uuid.UUID("2c3a5b0e-6f0f-5d0b-9a53-7d0a4c1f8e21")  # any constant: it makes ids a function of the polygon


def outlines(mask: np.ndarray, *, size_level0_px: tuple[int, int]) -> list[shapely.Polygon]:
    """Polygons with holes of a mask over a canvas (width, height), along pixel edges; `rasterize` restores the mask."""
    # Every pixel becomes 2 x 2. OpenCV traces through the centres of the outermost quarters; the parity of a quarter
    # says on which edge of its pixel it lies: quarters 2a and 2a + 1 are next to edges a and a + 1.
    quarters = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, tree = cv2.findContours(quarters, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    scale = np.array(size_level0_px) / mask.shape[::-1]
    rings = [(contour[:, 0] + 1) // 2 * scale for contour in contours]
    inside: dict[int, list[int]] = {}  # ring → the rings of its holes; -1 → the shells
    for ring, parent in enumerate(tree[0, :, 3] if rings else ()):
        inside.setdefault(int(parent), []).append(ring)
    polygons = (shapely.Polygon(rings[i], [rings[hole] for hole in inside.get(i, ())]) for i in inside.get(-1, ()))
    return [part for polygon in polygons for part in _valid_parts(polygon)]


def rasterize(polygons: Iterable[shapely.Polygon], *, size_level0_px: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Mask of `shape` (h, w) over a canvas `(width, height)`: True where a pixel's centre is inside a polygon."""
    mask = np.zeros(shape, bool)
    scale = np.array(shape[::-1]) / size_level0_px
    for polygon in polygons:
        _fill(mask, [np.asarray(ring.coords)[:, :2] * scale for ring in (polygon.exterior, *polygon.interiors)])
    return mask


def to_geojson(regions: Iterable[Region], *, origin_level0_px: tuple[float, float] = (0, 0)) -> dict[str, Any]:
    """QuPath annotations of `(class, polygon)` as a FeatureCollection.

    `origin_level0_px` is where QuPath has its (0, 0): OpenSlide's `bounds-x`, `bounds-y` where a slide has them. It is
    noted in the collection. Object ids follow from class and polygon, so writing twice gives the same file.
    """
    features = []
    for number, (name, polygon) in enumerate(regions):
        moved = shapely.transform(polygon, lambda xy: np.round(xy - origin_level0_px, 2))
        properties: dict[str, Any] = {"objectType": "annotation", "isLocked": False}
        if name is not None:
            properties["classification"] = {"name": name, "color": list(CLASS_COLORS.get(name, (128, 128, 128)))}
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(_ID_SPACE, f"{number} {name} {moved.wkt}")),
                "geometry": shapely.geometry.mapping(moved),
                "properties": properties,
            }
        )
    return {"type": "FeatureCollection", "origin_level0_px": [*origin_level0_px], "features": features}


def read_rois(path: str | Path, *, origin_level0_px: tuple[float, float] = (0, 0)) -> list[Region]:
    """`(class, polygon)` of every area annotated in a GeoJSON file of QuPath's, gzipped or not.

    Detections, cells and tiles are not annotations; points and lines have no area: both are passed over.
    `origin_level0_px` is added, as `to_geojson` takes it off.

    Raises:
        UsageError: no such file, not GeoJSON, or a ring that is none.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        document = json.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error}); give an existing GeoJSON file") from error
    except (ValueError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: not GeoJSON ({error}); export the annotations from QuPath again") from error
    rois = []
    for number, feature in enumerate(_features(document, path), start=1):
        try:
            properties = feature.get("properties") or {}
            if str(properties.get("objectType", "annotation")).lower() in _NOT_ANNOTATIONS:
                continue
            name = _class_name(properties.get("classification"))
            for polygon in _polygons(feature.get("geometry")):
                rois.append((name, shapely.transform(polygon, lambda xy: xy + origin_level0_px)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problem = f"{path}: feature {number} is malformed ({type(error).__name__}: {error})"
            raise UsageError(f"{problem}; mend it or export the annotations from QuPath again") from error
    return rois


def is_of_class(name: str | None, classes: Collection[str]) -> bool:
    """Whether a region's class, or one that it is derived from, is among these."""
    wanted = {_plain(name) for name in classes}
    return name is not None and any(_plain(part) in wanted for part in (name, *name.split(":")))


def sort_rois(
    rois: Iterable[Region], *, include: Collection[str] = (), exclude: Collection[str] = TileConfig.roi_exclude
) -> tuple[list[shapely.Polygon], list[shapely.Polygon]]:
    """Polygons to keep (of the `include` classes; none given: of any) and those to cut out, which `exclude` names."""
    kept: list[shapely.Polygon] = []
    cut: list[shapely.Polygon] = []
    for name, polygon in rois:
        if is_of_class(name, exclude):
            cut.append(polygon)
        elif not include or is_of_class(name, include):
            kept.append(polygon)
    return kept, cut


def _plain(name: str) -> str:
    return ":".join(part.strip(" *") for part in name.casefold().split(":"))


def _features(document: Any, path: Path) -> list[Any]:
    if isinstance(document, dict) and document.get("type") == "FeatureCollection":
        document = document.get("features")
    elif isinstance(document, dict) and document.get("type") == "Feature":
        document = [document]
    if not isinstance(document, list):
        raise UsageError(f"{path}: neither a FeatureCollection nor a list of features; export the annotations from QuPath again")
    return document


def _class_name(classification: Any) -> str | None:
    """QuPath writes {"name": …}, newer versions {"names": [base, derived …]}, other tools a plain string."""
    if isinstance(classification, dict):
        names = classification.get("names")
        classification = ": ".join(map(str, names)) if names else classification.get("name")
    return None if classification is None else str(classification)


def _polygons(geometry: Any) -> Iterator[shapely.Polygon]:
    if geometry is None:
        return
    kind = geometry["type"]
    if kind == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _polygons(part)
    elif kind in ("Polygon", "MultiPolygon"):
        for rings in [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]:
            shell, *holes = [_ring(points) for points in rings]
            yield from _valid_parts(shapely.Polygon(shell, holes))


def _ring(points: Any) -> np.ndarray:
    ring = np.asarray(points, dtype=float)  # closed or not: shapely closes it
    if ring.ndim != 2 or ring.shape[0] < 3 or ring.shape[1] < 2 or not np.isfinite(ring).all():
        raise ValueError(f"a ring needs three points or more with finite x and y, got {str(points)[:60]}")
    return ring[:, :2]


def _valid_parts(polygon: shapely.Polygon) -> list[shapely.Polygon]:
    """Hand-drawn outlines cross themselves and traced ones touch themselves: cut them there."""
    parts = [polygon] if polygon.is_valid else shapely.get_parts(shapely.make_valid(polygon))
    parts = [part for whole in parts for part in shapely.get_parts(whole)]
    return [part for part in parts if isinstance(part, shapely.Polygon) and part.area > 0]


def _fill(mask: np.ndarray, rings: list[np.ndarray]) -> None:
    """Set the pixels whose centres lie inside, by even-odd scan lines: cv2.fillPoly would paint all that it touches."""
    h, w = mask.shape
    starts, ends = np.concatenate([r[:-1] for r in rings]), np.concatenate([r[1:] for r in rings])  # (edges, 2)
    down = starts[:, 1] <= ends[:, 1]
    top, bottom = np.where(down[:, None], starts, ends), np.where(down[:, None], ends, starts)
    first = np.clip(np.ceil(top[:, 1] - 0.5), 0, h).astype(np.int64)
    crossed = np.clip(np.ceil(bottom[:, 1] - 0.5), 0, h).astype(np.int64) - first  # centre lines of pixel rows
    if not crossed.any():
        return
    edge = np.repeat(np.arange(len(crossed)), crossed)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(crossed) - crossed, crossed) + first[edge]
    along = (row + 0.5 - top[edge, 1]) / (bottom[edge, 1] - top[edge, 1])
    x = top[edge, 0] + along * (bottom[edge, 0] - top[edge, 0])
    column = np.clip(np.ceil(x - 0.5), 0, w).astype(np.int64)  # the first centre to the right of the crossing
    y0, y1, x0, x1 = row.min(), row.max() + 1, column.min(), column.max()
    crossings = np.bincount((row - y0) * (x1 - x0 + 1) + column - x0, minlength=(y1 - y0) * (x1 - x0 + 1))
    mask[y0:y1, x0:x1] |= (crossings.reshape(y1 - y0, -1).cumsum(axis=1)[:, :-1] & 1).astype(bool)

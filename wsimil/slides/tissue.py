"""Where the tissue is: from a small picture of the slide to a mask, and between masks and QuPath's polygons.

- The picture's µm/px follows from the slide's physical size alone, never from its pyramid or from free memory.
- Glass is found first: flat, nearly colourless, in a patch too large for a lumen. A field without glass is all tissue.
- Absorbance is measured against the slide's own glass, so grey or yellow glass and any stain are treated alike. Colour
  counts for more than darkness: dust, bubbles, shading and coverslip edges are grey; stained tissue is not.
- Two thresholds: whatever is stained a little is tissue if it hangs together with something stained more than Otsu's
  threshold of all that is not glass. Pale stroma, fat and pale IHC stay; faint smears and dust go.
- Pen is told by the ratios of its absorbances, which thickness does not change, and by the width of a stroke. It has a
  mask of its own.
- Every length is physical (µm, mm²). No randomness, no model: the same picture gives the same mask.
"""

from __future__ import annotations

import gzip
import json
import uuid
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely

from wsimil.errors import UsageError

__all__ = [
    "ROI_EXCLUDE",
    "TISSUE_VERSION",
    "TissueMask",
    "draw_overview",
    "find_tissue",
    "outlines",
    "rasterize",
    "read_rois",
    "roi_mask",
    "tissue_mpp",
    "to_geojson",
]

TISSUE_VERSION = "auto-1"
"""Part of the recipe of a bag: count it up with any change that changes a mask."""

TISSUE_MPP = (8.0, 4.0, 2.0)
"""8 µm is a cell: a 112 µm tile is still 14 x 14 px, a 25 x 75 mm slide only 3,125 x 9,375. Finer for small fields."""
LONG_SIDE_PX = 512
"""A field with fewer pixels than this on its long side is looked at more finely, or it would be all edge."""

# Sizes on the glass.
GLASS_MM2 = 0.05
"""Smallest clear patch that is glass. Fat cells (.02) and most lumens are smaller, and stay in the tissue."""
TISSUE_MM2 = 0.01
"""Smallest piece of tissue; less than one tile of 224 px at 0.5 µm/px."""
PEN_MM2 = 0.03
"""Smallest pen mark: a felt tip's dot is .3 mm across or more; margin ink on the tissue itself is thinner."""
BLUR_UM = 8.0
"""Everything is judged on cell-sized averages, whatever the µm/px: single nuclei and JPEG noise decide nothing."""
TEXTURE_UM = 40.0
"""Window in which flatness is measured."""
NECK_UM = 16.0
"""Clear patches joined by a neck thinner than twice this are separate: lumens that cracks connect do not make glass."""
CLOSE_UM = 40.0
"""Gaps in tissue up to twice this are closed: the width of a fat cell, of which only the wall takes stain."""
STROKE_UM = 20.0
"""Half the width of the thinnest pen stroke, or of the rims of one whose middle ran dry."""
PEN_REACH_UM = 500.0
"""What has about a pen's colour is taken for it up to this far from a stroke: red ink pales into eosin's colour."""
PEN_RIM_UM = 60.0
"""A stroke fades out over about this width."""

# Absorbance: -log10 of transmitted light, averaged over BLUR_UM. Real glass varies by .005; pale stroma has .1.
DARKNESS_WEIGHT = 0.3
"""Stain: spread between channels + this times their mean. A grey speck (.1, .1, .1) is nearly glass, pale pink not."""
STAINED = 0.03
"""Stain that is more than glass shows."""
SURELY_STAINED = (0.05, 0.10)
"""Otsu's threshold stays inside this: dust cannot put it into the noise, nor dark nuclei put it above stroma."""
FLAT, FLAT_RELATIVE = 0.005, 0.05
"""Flat: standard deviation in a window below .005 + this share of the absorbance (shading grows with darkness)."""
GREY, GREY_RELATIVE = 0.02, 0.15
"""Grey: spread between channels below .02 + this share of the absorbance. Stains have a share of .4 and more."""
GREY_TISSUE = 0.3
"""Silver stains are dark grey; grey paler than this is dirt or a shadow, unless it hangs together with stain."""
DARK = 0.5
"""Flat patches that are grey and darker than this are padding, the edge of the slide or black pen; not glass."""

ROI_EXCLUDE = ("exclude", "ignore", "artefact", "artifact", "pen")
"""Regions of these classes are cut out, whatever their letter case and QuPath's trailing *. All others are kept."""

_COLORS = {"Tissue": (0, 160, 0), "Pen": (200, 0, 200)}
_NOT_ANNOTATIONS = {"detection", "cell", "tile"}
_ID_SPACE = uuid.UUID("2c3a5b0e-6f0f-5d0b-9a53-7d0a4c1f8e21")  # any constant: it makes ids a function of the polygon
_ABSORBANCE = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)


@dataclass(frozen=True)
class TissueMask:
    """What a slide shows, on a grid that covers its canvas exactly. `mask` and `pen` never overlap."""

    mask: np.ndarray  # (h, w) bool, tissue
    pen: np.ndarray  # (h, w) bool, ink on glass or on tissue
    mpp: float  # of the grid
    has_glass: bool  # False: everything but pen and dark edges is tissue


def tissue_mpp(width_um: float, height_um: float) -> float:
    """µm/px of the picture `find_tissue` wants of a slide of this size; a slide that is coarser is taken as it is."""
    for mpp in TISSUE_MPP:
        if max(width_um, height_um) / mpp >= LONG_SIDE_PX:
            return mpp
    return TISSUE_MPP[-1]


def find_tissue(rgb: np.ndarray, mpp: float, *, pen: bool = True) -> TissueMask:
    """Tissue and pen in a picture of the whole slide, uint8 (h, w, 3) at `mpp`.

    `pen=False` looks for no pen, for stains that are blue or green over wide areas themselves (trichrome, Alcian blue).
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or not rgb.size:
        raise ValueError(f"tissue wants a uint8 RGB picture (h, w, 3), got {rgb.dtype} {rgb.shape}")
    if rgb.shape[0] * rgb.shape[1] * mpp**2 < 2 * GLASS_MM2 * 1e6:
        # a field that somebody cut out: too small to hold both tissue and a patch of glass to tell it from
        everything = np.ones(rgb.shape[:2], bool)
        return TissueMask(mask=everything, pen=~everything, mpp=mpp, has_glass=False)
    planes = [_blur(_ABSORBANCE[plane], mpp) for plane in np.moveaxis(rgb, 2, 0)]  # 3 x (h, w), against white
    mean = _mean(planes)
    texture = _texture(mean, mpp)
    planes = _over_glass(planes, (texture < FLAT) & (mean < 0.2) & (rgb < 253).any(axis=2), mpp)

    mean, spread = np.maximum(_mean(planes), 0), _spread(planes)
    stain = spread + DARKNESS_WEIGHT * mean
    flat, grey = texture < FLAT + FLAT_RELATIVE * mean, spread < GREY + GREY_RELATIVE * mean
    glass = _larger(_open(flat & (grey | (stain < STAINED)) & (mean < DARK), NECK_UM / mpp), GLASS_MM2, mpp)
    dark = grey & (mean >= DARK)
    dark = _connected(dark, _larger(dark & flat, GLASS_MM2, mpp) | _full_sides(dark))
    ink = _find_pen(planes, dark, mpp) if pen else np.zeros_like(dark)
    outside = ink | _dilate(dark, 2 * BLUR_UM / mpp)  # the blur has smeared it
    if not glass.any():
        return TissueMask(~outside, ink, mpp, has_glass=False)

    unclear = ~(glass | outside)
    sure = np.clip(_otsu(stain[unclear]), *SURELY_STAINED)
    tissue = _close(unclear & (stain > STAINED), CLOSE_UM / mpp) & ~outside
    tissue = _connected(tissue, (stain > sure) & (~grey | (mean > GREY_TISSUE)))
    gaps = ~(tissue | outside)
    tissue |= gaps & ~_larger(gaps, GLASS_MM2, mpp)
    return TissueMask(_larger(tissue, TISSUE_MM2, mpp), ink, mpp, has_glass=True)


def draw_overview(
    rgb: np.ndarray,
    found: TissueMask,
    *,
    tiles_px: np.ndarray | None = None,  # (N, 4) x, y, width, height in pixels of `rgb`
) -> np.ndarray:
    """The picture with tissue outlined in green, pen in magenta and tiles in black: uint8 (h, w, 3)."""
    drawn = np.ascontiguousarray(rgb).copy()
    width = max(1, round(max(rgb.shape) / 800))
    for x, y, w, h in [] if tiles_px is None else np.rint(tiles_px).astype(int).tolist():
        cv2.rectangle(drawn, (x, y), (x + w - 1, y + h - 1), (0, 0, 0), 1)
    for mask, name in ((found.mask, "Tissue"), (found.pen, "Pen")):
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(drawn, contours, -1, _COLORS[name], width)
    return drawn


# ---------------------------------------------------------------- polygons, level-0 px


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


def to_geojson(
    regions: Iterable[tuple[str | None, shapely.Polygon]], *, origin_level0_px: tuple[float, float] = (0, 0)
) -> dict[str, Any]:
    """QuPath annotations of `(class, polygon)` as a FeatureCollection.

    `origin_level0_px` is where QuPath has its (0, 0): OpenSlide's `bounds-x`, `bounds-y` where a slide has them. It is
    noted in the collection. Object ids follow from class and polygon, so writing twice gives the same file.
    """
    features = []
    for number, (name, polygon) in enumerate(regions):
        moved = shapely.transform(polygon, lambda xy: np.round(xy - origin_level0_px, 2))
        properties: dict[str, Any] = {"objectType": "annotation", "isLocked": False}
        if name is not None:
            properties["classification"] = {"name": name, "color": list(_COLORS.get(name, (128, 128, 128)))}
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(_ID_SPACE, f"{number} {name} {moved.wkt}")),
                "geometry": shapely.geometry.mapping(moved),
                "properties": properties,
            }
        )
    return {"type": "FeatureCollection", "origin_level0_px": [*origin_level0_px], "features": features}


def read_rois(path: str | Path, *, origin_level0_px: tuple[float, float] = (0, 0)) -> list[tuple[str | None, shapely.Polygon]]:
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


def roi_mask(
    rois: Collection[tuple[str | None, shapely.Polygon]],
    *,
    size_level0_px: tuple[int, int],
    shape: tuple[int, int],
    exclude: Collection[str] = ROI_EXCLUDE,
) -> np.ndarray:
    """What regions of interest leave of a canvas, (h, w) bool: their union less those of the `exclude` classes.

    Regions that only exclude are cut out of the whole canvas; no regions at all leave nothing.
    """
    cut = {name.casefold() for name in exclude}
    out, kept = [], []
    for name, polygon in rois:
        excluded = name is not None and any(part.strip(" *").casefold() in cut for part in name.split(":"))
        (out if excluded else kept).append(polygon)
    inside = rasterize(kept, size_level0_px=size_level0_px, shape=shape)
    if out and not kept:
        inside[:] = True
    return inside & ~rasterize(out, size_level0_px=size_level0_px, shape=shape)


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


# ---------------------------------------------------------------- pictures


def _over_glass(planes: list[np.ndarray], candidates: np.ndarray, mpp: float) -> list[np.ndarray]:
    """Absorbances less those of the slide's glass; against white where there is too little glass to tell.

    Candidates leave out pure white, with which readers fill what was never scanned: it is not the glass's own colour.
    """
    candidates &= _spread(planes) < 0.1
    if np.count_nonzero(candidates) * mpp**2 < GLASS_MM2 * 1e6:
        return planes
    mean = _mean(planes)
    # The brightest of them, not the most: a large piece of pale tissue can be flat too.
    candidates &= mean < np.percentile(mean[candidates], 5) + 0.01
    return [plane - np.median(plane[candidates]) for plane in planes]


def _find_pen(planes: list[np.ndarray], dark: np.ndarray, mpp: float) -> np.ndarray:
    """Ink, (h, w): wide strokes of a pen's colour, and what is near them in the same colour."""
    edge = _connected(dark, _frame(dark.shape))  # padding or the slide's own edge, not ink
    red, green, blue = (np.maximum(plane, 1e-3) for plane in planes)
    least = np.minimum(np.minimum(red, green), blue)
    cyan = red - green
    crimson = blue > 0.62 * green
    inks = (  # (surely ink, paler ink of that colour, what may be ink or tissue)
        # Green and blue ink take clearly more red than green light. Eosin, haematoxylin, DAB and blood take less, pale
        # blue counterstain up to 1.3 times as much.
        (
            ((red > 1.6 * green) & (red > 0.15)) | ((red > 1.1 * green) & (cyan > 0.15) & (red > 0.4)),
            (red > 1.6 * green) & (cyan > 0.03),
            (red > 1.05 * green) & (cyan > 0.03),
        ),
        # Red ink takes blue light almost as it takes green; eosin half as much. So does blood, but never so strongly.
        (
            (red < 0.25 * green) & crimson & (green > 0.7),
            (red < 0.18 * green) & crimson & (green > 0.05),
            (red < 0.25 * green) & crimson,
        ),
        # Black ink over anything: nothing comes through in any colour.
        (least > 0.7, least > 0.5, least > 0.4),
    )
    pen = dark & ~edge
    for surely, paler, alike in inks:
        core = _larger(surely & ~edge, PEN_MM2, mpp)
        if core.any():
            core = _larger(_open(core, STROKE_UM / mpp), PEN_MM2, mpp)
            pen |= core | _connected(paler | (alike & _dilate(core, PEN_REACH_UM / mpp)), core)
    return _dilate(pen, PEN_RIM_UM / mpp)


def _mean(planes: list[np.ndarray]) -> np.ndarray:
    return (planes[0] + planes[1] + planes[2]) / 3


def _spread(planes: list[np.ndarray]) -> np.ndarray:
    a, b, c = planes
    return np.maximum(np.maximum(a, b), c) - np.minimum(np.minimum(a, b), c)


def _blur(plane: np.ndarray, mpp: float) -> np.ndarray:
    return cv2.GaussianBlur(plane, (0, 0), max(BLUR_UM / mpp, 0.5), borderType=cv2.BORDER_REPLICATE)


def _texture(plane: np.ndarray, mpp: float) -> np.ndarray:
    """Standard deviation in a window."""
    side = max(3, 2 * round(TEXTURE_UM / mpp / 2) + 1)
    first, second = (cv2.blur(p, (side, side), borderType=cv2.BORDER_REPLICATE) for p in (plane, plane * plane))
    return np.sqrt(np.maximum(second - first * first, 0))


def _otsu(stain: np.ndarray) -> float:
    """Otsu's threshold, in steps of .004 up to 1; 0 for no pixels."""
    levels = np.clip(stain * 250, 0, 255).astype(np.uint8).reshape(-1, 1)
    return cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0] / 250 if len(levels) else 0.0


# Morphology by distances (right within 2 %): any radius costs the same, and the picture's edge neither adds nor takes.


def _distance(mask: np.ndarray) -> np.ndarray:
    return cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)


def _erode(mask: np.ndarray, radius_px: float) -> np.ndarray:
    return _distance(mask) > max(1.0, radius_px)


def _dilate(mask: np.ndarray, radius_px: float) -> np.ndarray:
    return ~_erode(~mask, radius_px)


def _open(mask: np.ndarray, radius_px: float) -> np.ndarray:
    return _dilate(_erode(mask, radius_px), radius_px)


def _close(mask: np.ndarray, radius_px: float) -> np.ndarray:
    return _erode(_dilate(mask, radius_px), radius_px)


def _larger(mask: np.ndarray, mm2: float, mpp: float) -> np.ndarray:
    """The connected parts of a mask that are at least so large."""
    labels: np.ndarray
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep: np.ndarray = stats[:, cv2.CC_STAT_AREA] * mpp**2 >= mm2 * 1e6
    keep[0] = False
    return keep[labels]


def _connected(mask: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The connected parts of a mask that contain a seed."""
    labels: np.ndarray
    n, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    keep: np.ndarray = np.bincount(labels[seeds & mask], minlength=n) > 0
    return keep[labels]


def _frame(shape: tuple[int, ...]) -> np.ndarray:
    """The outermost pixels of a picture."""
    frame = np.ones(shape, bool)
    frame[1:-1, 1:-1] = False
    return frame


def _full_sides(dark: np.ndarray) -> np.ndarray:
    """The sides of the picture that are dark nearly all along: a frame too thin to have a flat patch."""
    sides = np.zeros_like(dark)
    for side in (np.s_[0, :], np.s_[-1, :], np.s_[:, 0], np.s_[:, -1]):
        sides[side] = dark[side].mean() > 0.9
    return sides & dark

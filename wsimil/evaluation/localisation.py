"""Did it look at the right place: FROC over lesions, ranking and overlap over tiles.

- FROC follows the CAMELYON16 evaluation: annotations dilated by half of 75 µm on each side and filled, 8-connected
  regions are lesions, regions under 275 µm are isolated tumour cells (hits on them count for nothing, and they leave
  the denominator), one hit per lesion with its best score, false positives per slide over all slides, score = mean
  sensitivity at ¼, ½, 1, 2, 4, 8.
- One difference: every distinct score is a threshold here. The published script leaves its lowest value out, which is
  the 0 it gives to missed lesions, but a real detection when none is missed.
- Thresholds are arguments. `best_dice_threshold` on validation gives one; on the evaluated tiles it gives an oracle, to
  be called so.
- Masks are (rows, columns) at 1/`downsample` of the slide's finest level; points are (x, y) in level-0 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage
from scipy.spatial import KDTree

from wsimil.evaluation.binary import as_bool
from wsimil.evaluation.metrics import auroc, average_precision

__all__ = [
    "FROC_RATES",
    "Froc",
    "Lesions",
    "SlideHits",
    "best_dice_threshold",
    "dice_and_iou",
    "find_lesions",
    "froc",
    "froc_score",
    "hottest_tile_in_lesion",
    "local_maxima",
    "match_detections",
    "sensitivity_by_size",
    "tile_centre_in_mask",
    "tile_mask_fraction",
    "tile_ranking",
]

FROC_RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives per slide at which CAMELYON16 reads the sensitivity."""


@dataclass(frozen=True)
class Lesions:
    """The lesions of one slide's mask, numbered from 1 in `label_map`; 0 is outside."""

    label_map: np.ndarray  # (rows, columns) int32
    diameter_um: np.ndarray  # (L,) major axis of the ellipse of equal second moments, dilation included
    is_itc: np.ndarray  # (L,) bool, isolated tumour cells
    downsample: float


@dataclass(frozen=True)
class SlideHits:
    """What the detections of one slide hit."""

    false_positive_scores: np.ndarray  # (F,)
    lesion_scores: np.ndarray  # (L,) the best detection inside, -inf for none
    lesion_diameter_um: np.ndarray  # (L,)
    is_itc: np.ndarray  # (L,) bool


@dataclass(frozen=True)
class Froc:
    """The curve, strictest threshold first, from no detection at all; and the sensitivity at the asked rates."""

    threshold: np.ndarray  # (T,) first inf
    false_positives_per_slide: np.ndarray  # (T,)
    sensitivity: np.ndarray  # (T,)
    sensitivity_at: dict[float, float]
    score: float
    n_slides: int
    n_lesions: int


def find_lesions(
    mask: np.ndarray,
    *,
    slide_mpp: float,
    downsample: float,
    dilation_um: float = 75.0,
    itc_um: float = 275.0,
) -> Lesions:
    """Lesions of an annotation mask (rows, columns).

    The defaults are CAMELYON16's: 75 µm, five tumour cells, joins regions that close (37.5 µm on each side); what is
    then shorter than 200 + 75 µm is isolated tumour cells. There, slide_mpp=0.243 and downsample=32.
    """
    mask = np.asarray(mask, dtype=bool)
    if mask.ndim != 2:
        raise ValueError(f"a mask is (rows, columns); got shape {mask.shape}")
    mask_mpp = slide_mpp * downsample
    if not mask.any():
        return Lesions(np.zeros(mask.shape, np.int32), np.zeros(0), np.zeros(0, dtype=bool), downsample)
    near = np.asarray(ndimage.distance_transform_edt(~mask)) < dilation_um / (2.0 * mask_mpp)
    label_map = np.zeros(mask.shape, np.int32)
    ndimage.label(ndimage.binary_fill_holes(near), structure=np.ones((3, 3)), output=label_map)
    n_lesions = int(label_map.max())
    diameter_um = _major_axes(label_map, n_lesions) * mask_mpp
    return Lesions(label_map, diameter_um, diameter_um < itc_um, downsample)


def match_detections(points_level0_px: ArrayLike, scores: ArrayLike, lesions: Lesions | None) -> SlideHits:
    """What detections (N, 2) with scores (N,) hit; `lesions` is None for a slide without annotation, where all are
    false.

    Raises ValueError for a point more than a mask pixel outside the mask: mask and points are then not of one slide or
    scale.
    """
    points = np.asarray(points_level0_px, dtype=np.float64).reshape(-1, 2)
    scores = np.asarray(scores, dtype=np.float64)
    if len(points) != scores.size or not np.isfinite(scores).all():
        raise ValueError(f"{len(points)} detections need as many finite scores; got {scores.size}")
    if lesions is None:
        return SlideHits(scores, np.zeros(0), np.zeros(0), np.zeros(0, dtype=bool))
    n_rows, n_columns = lesions.label_map.shape
    columns, rows = np.floor(points / lesions.downsample).astype(np.int64).T
    outside = (columns < 0) | (columns > n_columns) | (rows < 0) | (rows > n_rows)
    if outside.any():
        x, y = points[np.argmax(outside)]
        raise ValueError(
            f"detection at ({x:g}, {y:g}) level-0 px is outside the mask of {n_columns} x {n_rows} px"
            f" at 1/{lesions.downsample:g}; check that both are of one slide and that downsample is right"
        )
    # levels are rounded down, so the slide's last pixels may lie just past the mask
    hit = lesions.label_map[np.minimum(rows, n_rows - 1), np.minimum(columns, n_columns - 1)]
    best = np.full(lesions.diameter_um.size + 1, -np.inf)
    np.maximum.at(best, hit, scores)
    return SlideHits(scores[hit == 0], best[1:], lesions.diameter_um, lesions.is_itc)


def froc(slides: Sequence[SlideHits], *, rates: Sequence[float] = FROC_RATES) -> Froc:
    """FROC over all slides, normal ones included. Sensitivities are NaN when there is no lesion to find."""
    if not slides:
        raise ValueError("no slides; FROC averages false positives over at least one")
    events = _events(slides)
    rate, sensitivity = _curve(events, np.ones(len(slides)))
    at = {float(r): float(np.interp(r, rate, sensitivity)) for r in rates}
    score = float(np.mean(list(at.values())))
    return Froc(events.threshold, rate, sensitivity, at, score, len(slides), int(events.n_lesions.sum()))


def froc_score(slides: Sequence[SlideHits], weights: np.ndarray, *, rates: Sequence[float] = FROC_RATES) -> np.ndarray:
    """The FROC score of every row of slide multiplicities (B, n_slides): the statistic for `cluster_bootstrap`."""
    events = _events(slides)
    # row by row: a slide may have thousands of detections, and all resamples of all of them at once would not fit
    return np.array([np.interp(rates, *_curve(events, row)).mean() for row in weights])


def sensitivity_by_size(
    slides: Sequence[SlideHits],
    *,
    threshold: float,
    edges_um: Sequence[float] = (200.0, 2000.0),
    dilation_um: float = 75.0,
) -> dict[str, tuple[int, int]]:
    """Lesions found at this threshold and lesions there are, by diameter: "itc" < 200 µm ≤ "micro" < 2 mm ≤ "macro".

    Diameters are those of the annotation: `dilation_um` is what `find_lesions` added to them.
    """
    diameter_um = np.concatenate([np.zeros(0), *(slide.lesion_diameter_um for slide in slides)]) - dilation_um
    found = np.concatenate([np.zeros(0), *(slide.lesion_scores for slide in slides)]) >= threshold
    group = np.searchsorted(np.asarray(edges_um), diameter_um, side="right")
    names = ("itc", "micro", "macro")
    return {name: (int(found[group == k].sum()), int((group == k).sum())) for k, name in enumerate(names)}


def local_maxima(points: ArrayLike, scores: ArrayLike, *, radius: float, min_score: float) -> np.ndarray:
    """Indices of detections among scored tiles: the best one, all within `radius` of it gone, then the next best; best
    first.

    `points` (N, 2) and `radius` share a unit. Tiles under `min_score` are never detections. Equal scores: the earlier
    tile.
    """
    points, scores = np.asarray(points, dtype=np.float64).reshape(-1, 2), np.asarray(scores, dtype=np.float64)
    candidates = np.flatnonzero(scores >= min_score)
    candidates = candidates[np.argsort(-scores[candidates], kind="stable")]
    if candidates.size == 0:
        return candidates
    tree = KDTree(points[candidates])
    alive = np.ones(candidates.size, dtype=bool)
    kept = []
    for rank in range(candidates.size):
        if alive[rank]:
            kept.append(rank)
            alive[tree.query_ball_point(tree.data[rank], radius)] = False
    return candidates[kept]


# tiles


def tile_mask_fraction(mask: np.ndarray, coords_level0_px: ArrayLike, tile_level0_px: float, *, downsample: float) -> np.ndarray:
    """Part of every tile's area (N,) that is inside the mask; coords (N, 2) are top-left corners. Beyond the mask is
    outside.
    """
    corners = np.asarray(coords_level0_px, dtype=np.float64).reshape(-1, 2) / downsample
    side = tile_level0_px / downsample
    # area left of and above each grid point; between grid points it is bilinear, so tiles that cut pixels are exact
    area = np.pad(np.asarray(mask, dtype=np.float64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))

    def area_up_to(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return ndimage.map_coordinates(area, [y, x], order=1, mode="nearest")

    left, top = corners.T
    right, bottom = left + side, top + side
    inside = area_up_to(right, bottom) - area_up_to(left, bottom) - area_up_to(right, top) + area_up_to(left, top)
    return np.clip(inside / side**2, 0.0, 1.0)


def tile_centre_in_mask(mask: np.ndarray, coords_level0_px: ArrayLike, tile_level0_px: float, *, downsample: float) -> np.ndarray:
    """Whether the centre of every tile (N,) is inside the mask; coords (N, 2) are top-left corners."""
    centres = (np.asarray(coords_level0_px, dtype=np.float64).reshape(-1, 2) + tile_level0_px / 2.0) / downsample
    columns, rows = np.floor(centres).astype(np.int64).T
    within = (columns >= 0) & (columns < mask.shape[1]) & (rows >= 0) & (rows < mask.shape[0])
    return within & np.asarray(mask, dtype=bool)[np.where(within, rows, 0), np.where(within, columns, 0)]


def tile_ranking(slides: Sequence[tuple[ArrayLike, ArrayLike]]) -> dict[str, float]:
    """AUROC and AP of tile scores; each slide is (labels (N,), scores (N,)).

    Micro: all tiles in one ranking, normal slides included. Macro: mean over the slides that hold both kinds of tile
    (their number is n_slides_macro).
    """
    if not slides:
        raise ValueError("no slides; a tile ranking needs at least one")
    labels = np.concatenate([as_bool(label, "label") for label, _ in slides])
    scores = np.concatenate([np.asarray(score, dtype=np.float64) for _, score in slides])
    mixed = [(label, score) for label, score in slides if 0 < np.count_nonzero(label) < np.asarray(label).size]
    return {
        "auroc_micro": float(auroc(labels, scores)),
        "ap_micro": float(average_precision(labels, scores)),
        "auroc_macro": float(np.mean([auroc(*pair) for pair in mixed])) if mixed else float("nan"),
        "ap_macro": float(np.mean([average_precision(*pair) for pair in mixed])) if mixed else float("nan"),
        "n_slides_macro": len(mixed),
    }


def dice_and_iou(label: ArrayLike, score: ArrayLike, *, threshold: float) -> tuple[float, float]:
    """Overlap of `score >= threshold` with the true tiles; NaN when both are empty, as on a normal slide rightly left
    alone.
    """
    label, called = as_bool(label, "label"), np.asarray(score, dtype=np.float64) >= threshold
    both, either = np.count_nonzero(label & called), np.count_nonzero(label | called)
    if either == 0:
        return float("nan"), float("nan")
    return 2.0 * both / (both + either), both / either


def best_dice_threshold(label: ArrayLike, score: ArrayLike) -> tuple[float, float]:
    """The score that, as a threshold, gives the best Dice, and that Dice; the highest such score. NaN when no tile is
    true.

    On validation tiles this chooses a threshold. On the evaluated tiles its Dice is an oracle, not a result.
    """
    label, score = as_bool(label, "label"), np.asarray(score, dtype=np.float64)
    if not label.any():
        return float("nan"), float("nan")
    values, index = np.unique(-score, return_inverse=True)
    called = np.cumsum(np.bincount(index))
    both = np.cumsum(np.bincount(index, weights=label))
    dice = 2.0 * both / (called + np.count_nonzero(label))
    return float(-values[dice.argmax()]), float(dice.max())


def hottest_tile_in_lesion(label: ArrayLike, score: ArrayLike) -> float:
    """Whether the tile with the highest score is a true one: 1 or 0, or the part of the tied hottest tiles; NaN without
    tiles.
    """
    label, score = as_bool(label, "label"), np.asarray(score, dtype=np.float64)
    return float(label[score == score.max()].mean()) if score.size else float("nan")


def _major_axes(label_map: np.ndarray, n_regions: int) -> np.ndarray:
    """Major axis (L,) in pixels of the ellipse with the second moments of each region, pixels taken as points."""
    rows, columns = np.nonzero(label_map)
    region = label_map[rows, columns] - 1
    size = np.bincount(region, minlength=n_regions)

    def region_mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(region, weights=values, minlength=n_regions) / size

    dy, dx = rows - region_mean(rows)[region], columns - region_mean(columns)[region]
    yy, xx, xy = region_mean(dy * dy), region_mean(dx * dx), region_mean(dx * dy)
    largest = (yy + xx + np.sqrt((yy - xx) ** 2 + 4.0 * xy**2)) / 2.0
    return 4.0 * np.sqrt(largest)


@dataclass(frozen=True)
class _Events:
    """Everything detected on all slides, best score first; E detections and T distinct scores, inf (no detection)
    before them.
    """

    slide: np.ndarray  # (E,) index of the slide
    is_lesion: np.ndarray  # (E,) a lesion's best detection, else a false positive
    last: np.ndarray  # (T - 1,) the last detection of every distinct score
    threshold: np.ndarray  # (T,)
    n_lesions: np.ndarray  # (n_slides,) to be found: without isolated tumour cells


def _events(slides: Sequence[SlideHits]) -> _Events:
    counted = [slide.lesion_scores[~slide.is_itc] for slide in slides]
    found = [scores[np.isfinite(scores)] for scores in counted]
    false = [slide.false_positive_scores for slide in slides]
    score = np.concatenate([*found, *false])
    slide = np.concatenate([np.full(part.size, index) for group in (found, false) for index, part in enumerate(group)])
    is_lesion = np.arange(score.size) < sum(part.size for part in found)
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    last = np.flatnonzero(np.concatenate([ordered[1:] != ordered[:-1], np.ones(min(1, ordered.size), dtype=bool)]))
    threshold = np.concatenate([[np.inf], ordered[last]])
    return _Events(slide[order], is_lesion[order], last, threshold, np.array([part.size for part in counted]))


def _curve(events: _Events, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False positives per slide and sensitivity at every threshold, each (T,), slides weighted (n_slides,)."""
    weight = weights[events.slide]
    false = np.concatenate([[0.0], np.cumsum(weight * ~events.is_lesion)[events.last]])
    found = np.concatenate([[0.0], np.cumsum(weight * events.is_lesion)[events.last]])
    n_lesions = weights @ events.n_lesions
    return false / weights.sum(), found / n_lesions if n_lesions > 0 else np.full(found.size, np.nan)

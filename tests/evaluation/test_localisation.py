"""FROC against a brute-force reading of the CAMELYON16 rules; tiles against hand counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage
from sklearn import metrics as sk

from wsimil.evaluation.intervals import cluster_bootstrap, percentile_interval
from wsimil.evaluation.localisation import (
    FROC_RATES,
    SlideHits,
    best_dice_threshold,
    dice_and_iou,
    find_lesions,
    froc,
    froc_score,
    hottest_tile_in_lesion,
    local_maxima,
    match_detections,
    sensitivity_by_size,
    tile_centre_in_mask,
    tile_mask_fraction,
    tile_ranking,
)

CAMELYON16 = {"slide_mpp": 0.243, "downsample": 32}
MASK_MPP = 0.243 * 32


def disc(mask: np.ndarray, row: float, column: float, radius: float) -> None:
    rows, columns = np.indices(mask.shape)
    mask |= (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def small_cohort(seed: int) -> list[tuple[np.ndarray | None, np.ndarray, np.ndarray]]:
    """(mask or None, points, scores with ties) of six slides: large and tiny lesions, lesions that nothing hits."""
    rng = np.random.default_rng(seed)
    slides: list[tuple[np.ndarray | None, np.ndarray, np.ndarray]] = []
    for index in range(6):
        mask = None
        if index % 3:
            mask = np.zeros((160, 200), dtype=bool)
            disc(mask, 40, 40, 25)
            disc(mask, 110, 150, rng.integers(18, 30))
            disc(mask, 120, 30, 3)  # isolated tumour cells: 7 px of 7.8 µm, dilated to about 130 µm
        n = int(rng.integers(5, 30))
        points = rng.uniform(0, 1, (n, 2)) * [200 * 32, 160 * 32]
        slides.append((mask, points, np.round(rng.uniform(0.05, 1, n), 1)))
    return slides


def brute_froc(slides: list[tuple[np.ndarray | None, np.ndarray, np.ndarray]]) -> tuple[float, dict[float, float]]:
    """The published rules, read one detection at a time; thresholds are all distinct scores."""
    false_scores, lesion_best, n_lesions = [], [], 0
    for mask, points, scores in slides:
        if mask is None:
            false_scores += scores.tolist()
            continue
        near = ndimage.distance_transform_edt(~mask) < 75 / (0.243 * 2**5 * 2)
        labels, n_regions = ndimage.label(ndimage.binary_fill_holes(near), structure=np.ones((3, 3)))
        best = {}
        for region in range(1, n_regions + 1):
            where = np.argwhere(labels == region).astype(float)
            axis = 4 * math.sqrt(np.linalg.eigvalsh(np.cov(where.T, bias=True))[-1])
            if axis >= 275 / (0.243 * 2**5):
                best[region] = None
        n_lesions += len(best)
        for (x, y), score in zip(points, scores, strict=True):
            region = labels[int(y / 32), int(x / 32)]
            if region == 0:
                false_scores.append(score)
            elif region in best:
                best[region] = score if best[region] is None else max(best[region], score)
        lesion_best += [score for score in best.values() if score is not None]
    rate, sensitivity = [0.0], [0.0]
    for threshold in sorted({*false_scores, *lesion_best}, reverse=True):
        rate.append(sum(score >= threshold for score in false_scores) / len(slides))
        sensitivity.append(sum(score >= threshold for score in lesion_best) / n_lesions)
    at = {}
    for wanted in (0.25, 0.5, 1, 2, 4, 8):
        reached = max(i for i, r in enumerate(rate) if r <= wanted)
        at[wanted] = sensitivity[reached]
        if reached + 1 < len(rate):  # straight line to the next point
            along = (wanted - rate[reached]) / (rate[reached + 1] - rate[reached])
            at[wanted] += along * (sensitivity[reached + 1] - sensitivity[reached])
    return sum(at.values()) / 6, at


def hits_of(slides: list[tuple[np.ndarray | None, np.ndarray, np.ndarray]]) -> list[SlideHits]:
    return [
        match_detections(points, scores, None if mask is None else find_lesions(mask, **CAMELYON16))
        for mask, points, scores in slides
    ]


@pytest.mark.parametrize("seed", range(6))
def test_froc_matches_brute_force(seed: int) -> None:
    slides = small_cohort(seed)
    score, at = brute_froc(slides)
    ours = froc(hits_of(slides))
    assert ours.score == pytest.approx(score, abs=1e-12)
    assert ours.sensitivity_at == pytest.approx(at, abs=1e-12)
    assert ours.n_lesions == 8  # four slides with two each; isolated tumour cells do not count


def hits(false: list[float], lesions: list[float], itc: list[float] | None = None) -> SlideHits:
    itc = itc or []
    return SlideHits(
        np.array(false, dtype=float),
        np.array([*lesions, *itc], dtype=float),
        np.array([1000.0] * len(lesions) + [100.0] * len(itc)),
        np.array([False] * len(lesions) + [True] * len(itc), dtype=bool),
    )


def test_froc_by_hand() -> None:
    # four slides, three lesions; strictest first: .9 hit, .8 false, .7 hit, .6 false ×2, .5 hit
    slides = [hits([0.8], [0.9]), hits([0.6], [0.7]), hits([0.6], [0.5]), hits([], [])]
    curve = froc(slides)
    assert curve.threshold.tolist() == [np.inf, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert curve.false_positives_per_slide.tolist() == [0, 0, 0.25, 0.25, 0.75, 0.75]
    assert curve.sensitivity * 3 == pytest.approx([0, 1, 1, 2, 2, 3])
    # at ¼ the loosest threshold that reaches it; at ½ halfway along a flat piece; from ¾ on everything
    assert list(curve.sensitivity_at.values()) == pytest.approx([2 / 3, 2 / 3, 1, 1, 1, 1])
    assert curve.score == pytest.approx((2 / 3 + 2 / 3 + 4) / 6)


def test_normal_slides_lower_the_false_positive_rate() -> None:
    slides = [hits([0.8, 0.7], [0.6])]
    assert froc(slides).sensitivity_at[1.0] < froc([*slides, hits([], [])]).sensitivity_at[1.0] == 1.0


def test_isolated_tumour_cells_are_neither_found_nor_missed_nor_false() -> None:
    without, found, missed = (
        froc([hits([0.5], [0.9, -np.inf], itc)]) for itc in ([], [0.95], [-np.inf])
    )  # fmt: skip
    assert without.score == found.score == missed.score
    assert found.n_lesions == 2


def test_a_lesion_found_with_score_zero_is_found() -> None:
    assert froc([hits([], [0.0])]).score == 1.0
    assert froc([hits([], [-np.inf])]).score == 0.0


def test_froc_without_lesions_is_undefined_and_without_slides_an_error() -> None:
    assert np.isnan(froc([hits([0.5], [])]).score)
    with pytest.raises(ValueError, match="no slides"):
        froc([])


def test_froc_of_resamples_is_froc_of_copied_slides() -> None:
    slides = hits_of(small_cohort(9))
    counts = np.array([[1, 1, 1, 1, 1, 1], [0, 2, 1, 0, 3, 0], [6, 0, 0, 0, 0, 0]], dtype=float)
    scores = froc_score(slides, counts)
    assert scores[0] == pytest.approx(froc(slides).score)
    assert scores[1] == pytest.approx(froc([slides[i] for i in (1, 1, 2, 4, 4, 4)]).score)
    assert np.isnan(scores[2])  # normal slides only
    replicates = cluster_bootstrap(lambda w: froc_score(slides, w), np.arange(6), n_bootstrap=200)
    interval = percentile_interval(replicates)
    assert interval.low < scores[0] < interval.high


def test_regions_closer_than_75_um_are_one_lesion() -> None:
    for gap_px, n_lesions in ((8, 1), (11, 2)):  # 37.5 µm are 4.8 px on each side
        mask = np.zeros((60, 120), dtype=bool)
        mask[10:50, 10:50] = True
        mask[10:50, 50 + gap_px : 110] = True
        assert len(find_lesions(mask, **CAMELYON16).diameter_um) == n_lesions


def test_holes_are_filled_and_corners_connect() -> None:
    ring = np.zeros((100, 100), dtype=bool)
    disc(ring, 50, 50, 40)
    ring[35:65, 35:65] = False
    lesions = find_lesions(ring, **CAMELYON16)
    assert lesions.label_map[50, 50] == 1
    corners = np.zeros((20, 20), dtype=bool)
    corners[5:10, 5:10] = corners[10:15, 10:15] = True
    assert len(find_lesions(corners, slide_mpp=1, downsample=1, dilation_um=1.0).diameter_um) == 1


def test_diameter_is_the_major_axis_of_an_ellipse() -> None:
    rows, columns = np.indices((300, 300))
    y, x = rows - 150, columns - 150
    along, across = (x + y) / np.sqrt(2), (x - y) / np.sqrt(2)
    ellipse = (along / 100) ** 2 + (across / 30) ** 2 <= 1
    lesions = find_lesions(ellipse, slide_mpp=0.5, downsample=4, dilation_um=0.5)
    assert lesions.diameter_um[0] == pytest.approx(200 * 2.0, rel=0.01)


def test_isolated_tumour_cells_are_under_200_um_of_annotation() -> None:
    for radius_um, is_itc in ((90, True), (110, False)):
        mask = np.zeros((100, 100), dtype=bool)
        disc(mask, 50, 50, radius_um / MASK_MPP)
        assert find_lesions(mask, **CAMELYON16).is_itc.tolist() == [is_itc]


def test_an_empty_mask_has_no_lesion() -> None:
    lesions = find_lesions(np.zeros((5, 5)), **CAMELYON16)
    assert lesions.diameter_um.size == 0
    found = match_detections([[10.0, 10.0]], [0.5], lesions)
    assert found.false_positive_scores.tolist() == [0.5]
    assert match_detections(np.zeros((0, 2)), [], lesions).false_positive_scores.size == 0


def test_x_is_the_column() -> None:
    mask = np.zeros((50, 200), dtype=bool)
    mask[10:40, 140:190] = True
    lesions = find_lesions(mask, **CAMELYON16)
    assert match_detections([[160 * 32, 20 * 32]], [0.5], lesions).lesion_scores.tolist() == [0.5]


def test_detections_of_another_scale_are_refused() -> None:
    lesions = find_lesions(np.ones((10, 10)), **CAMELYON16)
    match_detections([[10 * 32, 10 * 32]], [0.5], lesions)  # the slide's last pixels, past a level rounded down
    with pytest.raises(ValueError, match="outside the mask of 10 x 10"):
        match_detections([[12 * 32, 0]], [0.5], lesions)
    with pytest.raises(ValueError, match="finite"):
        match_detections([[0, 0]], [np.nan], lesions)


def test_sensitivity_by_size_counts_every_lesion_once() -> None:
    slide = SlideHits(
        np.array([0.9]),
        np.array([0.8, 0.2, 0.6, -np.inf]),
        np.array([2100.0, 2000.0, 280.0, 270.0]),  # less 75 µm: macro, micro, micro, itc
        np.array([False, False, False, True]),
    )
    assert sensitivity_by_size([slide], threshold=0.5) == {"itc": (0, 1), "micro": (1, 2), "macro": (1, 1)}
    assert sensitivity_by_size([], threshold=0.5)["macro"] == (0, 0)


def test_local_maxima_leave_no_two_detections_close() -> None:
    points = np.array([[0, 0], [1, 0], [5, 0], [6, 0], [20, 0]], dtype=float)
    score = np.array([0.8, 0.9, 0.7, 0.7, 0.1])
    assert local_maxima(points, score, radius=2, min_score=0.5).tolist() == [1, 2]
    assert local_maxima(points, score, radius=2, min_score=0.95).tolist() == []
    # only a detection removes its neighbours: a removed tile removes none
    chain = np.array([[0, 0], [2, 0], [4, 0]], dtype=float)
    assert local_maxima(chain, np.array([0.9, 0.8, 0.7]), radius=2, min_score=0).tolist() == [0, 2]


def test_tile_fraction_is_the_exact_area() -> None:
    rng = np.random.default_rng(0)
    mask = rng.uniform(size=(12, 15)) < 0.5
    fine = np.kron(mask, np.ones((8, 8)))  # one cell per level-0 pixel
    coords = np.array([[0, 0], [13, 21], [50, 3], [115, 90]])  # the last one overhangs
    by_hand = [np.pad(fine, ((0, 40), (0, 40)))[y : y + 20, x : x + 20].mean() for x, y in coords]
    np.testing.assert_allclose(tile_mask_fraction(mask, coords, 20.0, downsample=8), by_hand, atol=1e-12)
    centres = [bool(np.pad(fine, ((0, 40), (0, 40)))[y + 10, x + 10]) for x, y in coords]
    assert tile_centre_in_mask(mask, coords, 20.0, downsample=8).tolist() == centres


def test_tile_ranking_micro_and_macro() -> None:
    rng = np.random.default_rng(1)
    slides = []
    for index in range(4):
        label = rng.integers(0, 2, 50) * (index > 0)  # the first slide is normal
        slides.append((label, rng.normal(size=50) + label))
    ranking = tile_ranking(slides)
    labels, scores = (np.concatenate(column) for column in zip(*slides, strict=True))
    assert ranking["auroc_micro"] == pytest.approx(sk.roc_auc_score(labels, scores))
    assert ranking["ap_micro"] == pytest.approx(sk.average_precision_score(labels, scores))
    assert ranking["auroc_macro"] == pytest.approx(np.mean([sk.roc_auc_score(*pair) for pair in slides[1:]]))
    assert ranking["n_slides_macro"] == 3
    assert np.isnan(tile_ranking(slides[:1])["auroc_macro"])


def test_dice_and_iou_by_hand() -> None:
    label, score = [1, 1, 1, 0, 0], [0.9, 0.8, 0.1, 0.7, 0.2]
    assert dice_and_iou(label, score, threshold=0.7) == pytest.approx((4 / 6, 2 / 4))
    assert np.isnan(dice_and_iou([0, 0], [0.1, 0.2], threshold=0.5)[0])
    assert dice_and_iou([0, 0], [0.1, 0.9], threshold=0.5) == (0.0, 0.0)


def test_best_dice_threshold_is_the_best_of_all_thresholds() -> None:
    rng = np.random.default_rng(2)
    label = rng.integers(0, 2, 60)
    score = np.round(rng.normal(size=60) + label, 1)
    threshold, dice = best_dice_threshold(label, score)
    assert dice == pytest.approx(max(dice_and_iou(label, score, threshold=t)[0] for t in score))
    assert dice_and_iou(label, score, threshold=threshold)[0] == pytest.approx(dice)
    assert np.isnan(best_dice_threshold([0, 0], [0.1, 0.2])[0])


def test_tied_hottest_tiles_share_the_answer() -> None:
    assert hottest_tile_in_lesion([0, 1], [0.1, 0.9]) == 1.0
    assert hottest_tile_in_lesion([0, 1], [0.9, 0.9]) == 0.5
    assert np.isnan(hottest_tile_in_lesion([], []))


def test_the_rates_are_camelyons() -> None:
    assert FROC_RATES == (0.25, 0.5, 1, 2, 4, 8)

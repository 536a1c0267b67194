"""Intervals and tests: formulas by hand, agreement between methods, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from wsimil.evaluation.intervals import (
    bootstrap_p_value,
    cluster_bootstrap,
    corrected_t_interval,
    delong,
    delong_interval,
    delong_test,
    holm,
    mcnemar_exact,
    percentile_interval,
)
from wsimil.evaluation.metrics import auroc


def scores(n: int, *, seed: int = 0, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = (np.arange(n) % 3 == 0).astype(int)
    return label, rng.normal(size=n) + shift * label


def bootstrap_auroc(label, score, patients, *, n_bootstrap: int = 2000, seed: int = 0) -> np.ndarray:
    return cluster_bootstrap(lambda w: auroc(label, score, w), patients, n_bootstrap=n_bootstrap, seed=seed)


def width(replicates: np.ndarray) -> float:
    interval = percentile_interval(replicates)
    return interval.high - interval.low


def test_copies_of_a_patients_slides_add_no_certainty() -> None:
    label, score = scores(90)
    patients = np.arange(90)
    four = [np.tile(column, 4) for column in (label, score, patients)]
    one = width(bootstrap_auroc(label, score, patients))
    clustered = width(bootstrap_auroc(*four))
    unclustered = width(bootstrap_auroc(four[0], four[1], np.arange(360)))
    assert clustered == pytest.approx(one, rel=1e-9)  # the same patients are drawn, whatever the number of copies
    assert unclustered == pytest.approx(one / 2, rel=0.15)  # four times the "observations" halve the width


def test_slides_of_a_patient_are_drawn_together() -> None:
    patients = np.array(["b", "a", "b", "c", "a"])
    draws = cluster_bootstrap(lambda weights: weights, patients, n_bootstrap=50)
    np.testing.assert_array_equal(draws[:, 0], draws[:, 2])
    np.testing.assert_array_equal(draws[:, 1], draws[:, 4])
    assert (draws[:, [0, 1, 3]].sum(axis=1) == 3).all()


def test_chunks_and_row_order_change_no_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    label, score = scores(40)
    patients = np.array([f"p{index // 2}" for index in range(40)])
    whole = bootstrap_auroc(label, score, patients, n_bootstrap=64)
    monkeypatch.setattr("wsimil.evaluation.intervals._CHUNK_VALUES", 40 * 7)
    np.testing.assert_array_equal(whole, bootstrap_auroc(label, score, patients, n_bootstrap=64))
    order = np.random.default_rng(1).permutation(40)
    np.testing.assert_allclose(whole, bootstrap_auroc(label[order], score[order], patients[order], n_bootstrap=64), rtol=1e-12)


def test_bootstrap_interval_covers_the_truth_at_about_its_rate() -> None:
    truth = float(stats.norm.cdf(1.0 / np.sqrt(2)))  # two unit normals one apart
    hits = 0
    for trial in range(200):
        rng = np.random.default_rng([11, trial])
        # 40 patients with 1-4 slides that share label and most of their score
        patients = np.repeat(np.arange(40), rng.integers(1, 5, 40))
        label = (np.arange(40) % 2)[patients]
        score = label + np.sqrt(0.7) * rng.normal(size=40)[patients] + np.sqrt(0.3) * rng.normal(size=patients.size)
        interval = percentile_interval(bootstrap_auroc(label, score, patients, n_bootstrap=300, seed=trial))
        hits += interval.low <= truth <= interval.high
    assert 0.88 <= hits / 200 <= 0.98


def test_an_interval_needs_half_of_its_resamples() -> None:
    replicates = np.linspace(0, 1, 1000)
    assert percentile_interval(replicates).low == pytest.approx(0.025)
    replicates[:600] = np.nan
    assert np.isnan(percentile_interval(replicates).low)
    assert np.isnan(bootstrap_p_value(replicates))


def test_delong_agrees_with_the_bootstrap() -> None:
    label, score = scores(300)
    area, covariance = delong(label, score)
    replicates = bootstrap_auroc(label, score, np.arange(300))
    assert area[0] == pytest.approx(float(auroc(label, score)))
    assert np.sqrt(covariance[0, 0]) == pytest.approx(replicates.std(), rel=0.08)
    by_delong, by_bootstrap = delong_interval(label, score), percentile_interval(replicates)
    assert by_delong.low == pytest.approx(by_bootstrap.low, abs=0.01)
    assert by_delong.high == pytest.approx(by_bootstrap.high, abs=0.01)


def test_delong_variance_matches_its_definition() -> None:
    label, score = scores(30)
    score = np.round(score, 1)
    positives, negatives = score[label == 1], score[label == 0]
    kernel = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    by_hand = kernel.mean(axis=1).var(ddof=1) / positives.size + kernel.mean(axis=0).var(ddof=1) / negatives.size
    assert delong(label, score)[1][0, 0] == pytest.approx(by_hand)


def test_clustered_delong_pays_for_slides_of_one_patient() -> None:
    label, score = scores(150)
    single = delong(label, score)[1][0, 0]
    copies = [np.tile(column, 3) for column in (label, score)]
    assert delong(*copies, clusters=np.tile(np.arange(150), 3))[1][0, 0] == pytest.approx(single, rel=1e-9)
    assert delong(*copies)[1][0, 0] == pytest.approx(single / 3, rel=0.05)
    # patients with slides of both classes: against the clustered bootstrap
    patients = np.arange(150) // 3
    rng = np.random.default_rng(2)
    score = score + 1.5 * rng.normal(size=50)[patients]
    deviation = np.sqrt(delong(label, score, clusters=patients)[1][0, 0])
    assert deviation == pytest.approx(bootstrap_auroc(label, score, patients).std(), rel=0.1)


def test_paired_delong_sees_what_two_intervals_hide() -> None:
    label, score = scores(200)
    worse = score + 0.6 * np.random.default_rng(3).normal(size=200)
    difference, p = delong_test(label, score, worse)
    assert difference == pytest.approx(float(auroc(label, score) - auroc(label, worse)))
    paired = bootstrap_auroc(label, score, np.arange(200)) - bootstrap_auroc(label, worse, np.arange(200))
    assert p == pytest.approx(bootstrap_p_value(paired), abs=0.03)
    assert delong_test(label, score, score) == (0.0, 1.0)
    assert delong_test(label, score, np.exp(score))[1] == 1.0  # same order, same AUROC


def test_delong_is_silent_where_it_cannot_speak() -> None:
    assert np.isnan(delong([1, 1], [0.1, 0.2])[0][0])
    assert np.isnan(delong([1, 0, 0], [0.1, 0.2, 0.0])[1][0, 0])
    assert np.isnan(delong_interval([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]).low)  # a perfect ranking has no variance
    assert np.isnan(delong_test([0, 0, 1, 1], [1, 2, 3, 4], [4, 3, 2, 1])[1])


def test_corrected_t_interval_by_hand() -> None:
    values = [0.80, 0.85, 0.90, 0.75, 0.85]
    # mean .83, s² = .00325; (1/5 + 1/4) s² = .0014625, root .038243; t(.975, 4) = 2.776445
    interval = corrected_t_interval(values, test_to_train=0.25)
    assert interval.low == pytest.approx(0.83 - 2.776445 * 0.0382426, abs=1e-6)
    assert interval.high == pytest.approx(0.83 + 2.776445 * 0.0382426, abs=1e-6)
    assert np.isnan(corrected_t_interval([0.8], test_to_train=0.25).low)


def test_bootstrap_p_value_is_never_zero_and_never_above_one() -> None:
    assert bootstrap_p_value(np.ones(999)) == pytest.approx(2 / 1000)
    assert bootstrap_p_value(np.zeros(999)) == 1.0


def test_mcnemar_is_a_fair_coin_over_disagreements() -> None:
    a = np.array([1] * 8 + [0] * 2 + [1] * 50, dtype=bool)
    b = np.array([0] * 8 + [1] * 2 + [1] * 50, dtype=bool)
    assert mcnemar_exact(a, b) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar_exact(a, a) == 1.0


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, then never falling
    assert holm([0.02, 0.01, 0.04, 0.03]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    adjusted = holm([0.02, float("nan")])
    assert adjusted[0] == pytest.approx(0.02)
    assert np.isnan(adjusted[1])

"""Metrics of survival against brute force, scikit-survival and what they must be without censoring."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from wsimil.evaluation import survival as ours


def brute_concordance(time, event, risk, pair_weight) -> float:
    won = total = 0.0
    for i in range(len(time)):
        for j in range(len(time)):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                total += pair_weight[i]
                won += pair_weight[i] * ((risk[i] > risk[j]) + 0.5 * (risk[i] == risk[j]))
    return won / total


def test_concordance_matches_brute_force_over_pairs() -> None:
    rng = np.random.default_rng(5)
    time, event = rng.integers(1, 15, 60).astype(float), rng.uniform(size=60) < 0.6
    risk = np.round(rng.normal(size=60) - 0.1 * time, 1)
    assert ours.harrell_c(time, event, risk) == pytest.approx(brute_concordance(time, event, risk, np.ones(60)))
    # chance of being uncensored until just before t, as a product over earlier censoring times; events of a time leave first
    chance = [
        np.prod([
            1 - np.sum((time == u) & ~event) / np.sum((time > u) | ((time == u) & ~event)) for u in np.unique(time[~event]) if u < t
        ])
        for t in time
    ]  # fmt: skip
    assert ours.ipcw_c(time, event, risk) == pytest.approx(brute_concordance(time, event, risk, np.array(chance) ** -2.0))


def test_kaplan_meier_by_hand() -> None:
    times, without = ours.kaplan_meier([1, 2, 2, 3], [True, False, True, True])
    np.testing.assert_array_equal(times, [1, 2, 3])
    np.testing.assert_allclose(without, [0.75, 0.5, 0.0])


def survivors() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Risk, time (no two alike) and event of forty slides, a formula so that anybody can make them."""
    index = np.arange(40)
    risk = np.sin(1.7 * index) + 0.01 * index
    time = np.round(20 * np.exp(-0.8 * risk) * (1 + 0.5 * np.cos(2.3 * index)) + 0.013 * index, 3)
    return risk, time, (index * 7) % 10 < 6


HORIZONS = (5.0, 8.0, 15.0, 25.0)


def test_survival_metrics_are_those_of_scikit_survival() -> None:
    """scikit-survival 0.28.0 on these slides, censoring estimated on them: concordance_index_censored, concordance_index_ipcw
    (tau 25), cumulative_dynamic_auc, integrated_brier_score. lifelines 0.30.3 gives the same concordance.
    """
    risk, time, event = survivors()
    assert ours.harrell_c(time, event, risk) == pytest.approx(0.8395348837209302, abs=1e-12)
    assert ours.ipcw_c(time, event, risk, tau=25.0) == pytest.approx(0.8505927161850823, abs=1e-12)
    areas = [ours.time_dependent_auc(time, event, risk, at=at) for at in HORIZONS]
    np.testing.assert_allclose(areas, [0.9736842105263158, 0.8179025858991371, 0.9866320965103603, 0.9383851114589669], atol=1e-12)
    chances = np.exp(-np.exp(risk)[:, None] * np.array(HORIZONS) / 20)
    assert ours.integrated_brier(time, event, chances, HORIZONS) == pytest.approx(0.16011218696415513, abs=1e-12)


def test_without_censoring_the_auc_over_time_is_an_auc_and_the_brier_score_a_brier_score() -> None:
    risk, time, _ = survivors()
    event = np.ones(40, dtype=bool)
    chances = np.exp(-np.exp(risk)[:, None] * np.array(HORIZONS) / 20)
    for at in HORIZONS:
        assert ours.time_dependent_auc(time, event, risk, at=at) == pytest.approx(sk.roc_auc_score(time <= at, risk))
    scores = [np.mean((chances[:, column] - (time > at)) ** 2) for column, at in enumerate(HORIZONS)]
    by_hand = np.dot(np.add(scores[1:], scores[:-1]) / 2, np.diff(HORIZONS)) / (HORIZONS[-1] - HORIZONS[0])
    assert ours.integrated_brier(time, event, chances, HORIZONS) == pytest.approx(by_hand)


def test_censoring_that_knows_nothing_does_not_move_the_brier_score() -> None:
    rng = np.random.default_rng(9)
    time, lost = rng.exponential(10, 40_000), rng.exponential(15, 40_000)
    horizons, seen = np.array([2.0, 5.0, 9.0]), np.minimum(time, lost)
    chances = np.tile(np.exp(-horizons / 10), (40_000, 1))
    whole = ours.integrated_brier(time, np.ones(40_000, bool), chances, horizons)
    assert ours.integrated_brier(seen, time <= lost, chances, horizons) == pytest.approx(float(whole), abs=0.004)
    # leaving the censored out would not do
    kept = time <= lost
    assert abs(ours.integrated_brier(time[kept], np.ones(kept.sum(), bool), chances[kept], horizons) - whole) > 0.01


def test_horizons_that_nobody_outlives_are_left_out() -> None:
    risk, time, event = survivors()
    late = (*HORIZONS, time.max(), 1e3)
    chances = np.exp(-np.exp(risk)[:, None] * np.array(late) / 20)
    within = ours.integrated_brier(time, event, chances[:, :4], HORIZONS)
    assert ours.integrated_brier(time, event, chances, late) == pytest.approx(float(within))
    assert np.isnan(ours.integrated_brier(time, event, chances[:, -2:], late[-2:]))
    assert np.isnan(ours.time_dependent_auc(time, event, risk, at=1e3))


# ---------------------------------------------------------------- several labels, grades

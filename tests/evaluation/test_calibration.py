"""What validation decides: temperature, threshold, conformal sets."""

from __future__ import annotations

import numpy as np
import pytest

from wsimil.evaluation.calibration import (
    calibrate,
    choose_threshold,
    conformal_cutoff,
    conformal_sets,
    coverage_and_set_size,
    fit_temperature,
    reliability_curve,
)
from wsimil.evaluation.metrics import auroc, nll
from wsimil.task import Task


def true_logits(n: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=n)
    return logits, (rng.uniform(size=n) < 1 / (1 + np.exp(-logits))).astype(int)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_temperature_undoes_a_factor_on_the_logits(factor: float) -> None:
    logits, label = true_logits(4000)
    assert fit_temperature(factor * logits, label) == pytest.approx(factor, rel=0.1)
    # one column and two columns are the same model
    two = np.stack([np.zeros(4000), factor * logits], axis=1)
    assert fit_temperature(two, label) == pytest.approx(fit_temperature(factor * logits[:, None], label), rel=1e-4)


def test_temperature_lowers_the_loss_and_keeps_the_order() -> None:
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3, 300)
    logits = 6 * (rng.normal(size=(300, 3)) + np.eye(3)[label])

    def probabilities(temperature: float) -> np.ndarray:
        p = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
        return p / p.sum(axis=1, keepdims=True)

    temperature = fit_temperature(logits, label)
    assert temperature > 1
    assert nll(label, probabilities(temperature)) < nll(label, probabilities(1.0))
    for nudged in (0.97 * temperature, 1.03 * temperature):
        assert nll(label, probabilities(temperature)) <= nll(label, probabilities(nudged))


def test_temperature_is_one_when_validation_cannot_tell() -> None:
    logits, label = true_logits(4000)
    assert fit_temperature(logits[:10], label[:10]) == 1.0  # too few
    assert fit_temperature(logits, np.ones(4000, dtype=int)) == 1.0  # one class
    assert fit_temperature(np.where(label, 2.0, -2.0), label) == 1.0  # separated: the best fit is certainty
    assert fit_temperature(np.zeros(0), np.zeros(0)) == 1.0
    assert fit_temperature(np.zeros(50), np.arange(50) % 2) == 1.0  # constant logits


def test_temperature_stays_within_its_bounds_on_useless_logits() -> None:
    logits, label = true_logits(400)
    assert fit_temperature(100 * logits, 1 - label) <= 10.0


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        fit_temperature([np.nan] * 30, [0, 1] * 15)
    with pytest.raises(ValueError, match="NaN"):
        choose_threshold([0, 1], [np.nan, 0.5])


def balanced_accuracy_of(label: np.ndarray, probability: np.ndarray, threshold: float) -> float:
    called = probability >= threshold
    return (called[label == 1].mean() + (~called[label == 0]).mean()) / 2


@pytest.mark.parametrize("seed", range(5))
def test_threshold_is_the_best_cut_there_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    label = np.concatenate([[0, 1], rng.integers(0, 2, 38)])
    probability = np.round(np.clip(0.5 * rng.uniform(size=40) + 0.4 * label, 0, 1), 2)
    cuts = [0.0, *np.unique(probability), 1.01]
    best = max(balanced_accuracy_of(label, probability, cut) for cut in cuts)
    assert balanced_accuracy_of(label, probability, choose_threshold(label, probability)) == pytest.approx(best)


def test_threshold_lies_in_the_middle_of_the_gap() -> None:
    assert choose_threshold([0, 0, 1, 1], [0.1, 0.3, 0.7, 0.9]) == pytest.approx(0.5)
    assert choose_threshold([0, 0, 1, 1], [0.01, 0.02, 0.04, 0.09]) == pytest.approx(0.03)


def test_equal_cuts_are_settled_by_rule_not_by_order() -> None:
    # cutting between .1 and .2 or between .6 and .9 is equally good: the wider gap wins
    label, probability = np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.6, 0.9])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        assert choose_threshold(label[order], probability[order]) == pytest.approx(0.75)
    # gaps of the same width: nearest to .5
    assert choose_threshold([0, 1, 0, 1], [0.2, 0.4, 0.5, 0.7]) == pytest.approx(0.6)


def test_threshold_is_half_when_validation_cannot_tell() -> None:
    assert choose_threshold([1, 1], [0.2, 0.9]) == 0.5
    assert choose_threshold([0, 1], [0.3, 0.3]) == 0.5
    assert choose_threshold([1, 0], [0.2, 0.9]) == 0.5  # worse than chance at every cut
    assert choose_threshold([], []) == 0.5


def test_threshold_between_neighbouring_floats_keeps_the_rule() -> None:
    low = 0.7
    high = np.nextafter(low, 1)
    assert low < choose_threshold([0, 1], [low, high]) <= high


def test_reliability_bins_add_up() -> None:
    logits, label = true_logits(500)
    probability = 1 / (1 + np.exp(-logits))
    curve = reliability_curve(label, probability)
    assert curve.n_slides.sum() == 500
    assert curve.n_slides.max() - curve.n_slides.min() <= 1  # equal size
    assert (curve.frequency * curve.n_slides).sum() == pytest.approx(label.sum())
    assert (np.diff(curve.probability) > 0).all()
    assert ((curve.low <= curve.frequency) & (curve.frequency <= curve.high)).all()


@pytest.mark.parametrize("method", ["lac", "aps"])
def test_conformal_sets_keep_their_promise(method: str) -> None:
    rng = np.random.default_rng(5)
    label = rng.integers(0, 4, 6000)
    logits = rng.normal(size=(6000, 4)) + 1.5 * np.eye(4)[label]
    probability = np.exp(3 * logits)  # badly overconfident: the promise must hold all the same
    probability /= probability.sum(axis=1, keepdims=True)
    cutoff = conformal_cutoff(label[:1000], probability[:1000], coverage=0.9, method=method)
    sets = conformal_sets(probability[1000:], cutoff, method=method)
    coverage, size = coverage_and_set_size(label[1000:], sets)
    assert 0.88 <= coverage <= (0.92 if method == "lac" else 1.0)
    assert 1.0 <= size < 4.0


def test_conformal_sets_are_everything_when_validation_is_too_small() -> None:
    cutoff = conformal_cutoff([0, 1], [[0.9, 0.1], [0.2, 0.8]], coverage=0.9)
    assert conformal_sets(np.array([[1.0, 0.0]]), cutoff).all()


def test_conformal_cutoff_by_hand() -> None:
    # nine slides: the ⌈10 × .8⌉ = 8th smallest of .1 … .9
    probability = np.array([[1 - k / 10, k / 10] for k in range(1, 10)])
    assert conformal_cutoff([0] * 9, probability, coverage=0.8) == pytest.approx(0.8)
    # adaptive: .5 + .3 are needed to reach the second class
    sets = conformal_sets(np.array([[0.5, 0.3, 0.2]]), 0.8, method="aps")
    assert sets.tolist() == [[True, True, False]]


def test_temperature_changes_no_ranking() -> None:
    logits, label = true_logits(200)
    assert auroc(label, logits / fit_temperature(logits, label)) == pytest.approx(float(auroc(label, logits)))


def test_a_task_decides_what_validation_may_set() -> None:
    rng = np.random.default_rng(20)
    label = rng.integers(0, 2, 200)
    logits = (3 * (rng.normal(size=200) + label - 0.5))[:, None]
    binary = Task("binary", ("a", "b"))
    temperature, threshold = calibrate(binary, logits, label.astype(np.float32))
    assert temperature == fit_temperature(logits, label) != 1.0 and threshold is not None and threshold != 0.5
    # a probability as label counts as its likelier class
    assert calibrate(binary, logits, np.where(label == 1, 0.8, 0.1)) == (temperature, threshold)
    three, classes = np.concatenate([logits, 0 * logits, -logits], 1), Task("multiclass", ("a", "b", "c"))
    hard = calibrate(classes, three, label)
    assert hard == calibrate(classes, three, np.eye(3)[label] * 0.6 + 0.1) and hard[1] is None
    for task in (Task("multilabel", ("a",)), Task("ordinal", ("1", "2")), Task("regression"), Task("survival")):
        assert calibrate(task, logits, label) == (1.0, None)

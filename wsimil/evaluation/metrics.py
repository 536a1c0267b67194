"""Numbers for one set of predictions: every metric is a weighted sum, so a bootstrap is one call.

- `weights` has shape (..., n): none is every slide once; (B, n) multiplicities give B resamples at once, and a result
  of shape (...).
- A whole-number weight is the same as that many copies of the row: ties are never broken by row order. Only what a
  metric estimates first (the bins of `ece`, the censoring curve of `ipcw_c`) stays that of the whole sample.
- What is not defined (one class only, constant labels) is NaN, never 0 or .5; `evaluate` turns it into null with a
  reason.
- Labels are class indices; of two classes, 1 is the positive one. Of several labels each is 0, 1, or NaN where unknown: then the
  slide is left out for that label alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from wsimil.evaluation.binary import as_bool

__all__ = [
    "accuracy",
    "auroc",
    "average_precision",
    "balanced_accuracy",
    "binary_metrics",
    "brier",
    "calibration_bins",
    "confusion_matrix",
    "ece",
    "f1",
    "harrell_c",
    "integrated_brier",
    "ipcw_c",
    "kaplan_meier",
    "macro_auroc",
    "macro_f1",
    "mae",
    "matthews",
    "multiclass_metrics",
    "multilabel_metrics",
    "nll",
    "quadratic_kappa",
    "r_squared",
    "regression_metrics",
    "risk_coverage_auc",
    "roc_points",
    "sensitivity",
    "sensitivity_at_specificity",
    "spearman",
    "specificity",
    "survival_metrics",
    "time_dependent_auc",
]

_SMALLEST_PROBABILITY = float(np.finfo(np.float32).eps)
"""Probabilities come from float32: an exact 0 there means "below this", not "impossible"."""


# ranking


def auroc(label: ArrayLike, score: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Chance that a positive scores above a negative, ties counting half."""
    positive, negative = _by_class(label, score, weights)
    below = np.cumsum(negative, axis=-1) - negative
    won = (positive * (below + 0.5 * negative)).sum(axis=-1)
    return _ratio(won, positive.sum(axis=-1) * negative.sum(axis=-1))


def average_precision(label: ArrayLike, score: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Area under the precision-recall curve as the step sum over distinct scores (AUPRC)."""
    positive, negative = (counts[..., ::-1] for counts in _by_class(label, score, weights))
    true_positives, false_positives = np.cumsum(positive, axis=-1), np.cumsum(negative, axis=-1)
    precision = _ratio(true_positives, true_positives + false_positives, otherwise=0.0)
    area = _ratio((precision * positive).sum(axis=-1), true_positives[..., -1])
    return np.where(false_positives[..., -1] > 0, area, np.nan)


def roc_points(label: ArrayLike, score: ArrayLike, weights: ArrayLike | None = None) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rate at every distinct score, from (0, 0) to (1, 1); each (..., distinct + 1)."""
    positive, negative = (counts[..., ::-1] for counts in _by_class(label, score, weights))
    rates = []
    for counts in (negative, positive):
        reached = np.cumsum(counts, axis=-1)
        reached = np.concatenate([np.zeros_like(reached[..., :1]), reached], axis=-1)
        rates.append(_ratio(reached, reached[..., -1:]))
    return rates[0], rates[1]


def sensitivity_at_specificity(
    label: ArrayLike, score: ArrayLike, weights: ArrayLike | None = None, *, specificity: float = 0.95
) -> np.ndarray:
    """Highest sensitivity of any cut whose specificity is at least this: a point of the ROC, not of a fixed cut."""
    false_rate, true_rate = roc_points(label, score, weights)
    allowed = false_rate <= 1.0 - specificity + 1e-12
    best = np.where(allowed, true_rate, 0.0).max(axis=-1)  # NaN rates of a missing positive class stay NaN
    return np.where(np.isnan(false_rate[..., -1]), np.nan, best)


def macro_auroc(label: ArrayLike, probability: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean one-vs-rest AUROC over the classes that occur; probability (n, C)."""
    label, probability = np.asarray(label), np.asarray(probability, dtype=np.float64)
    columns = [auroc(label == index, probability[:, index], weights) for index in range(probability.shape[1])]
    return _mean_of_defined(np.stack(columns, axis=-1))


# decisions: all from the confusion matrix


def confusion_matrix(label: ArrayLike, predicted: ArrayLike, weights: ArrayLike | None = None, *, n_classes: int) -> np.ndarray:
    """Weight of every (true class, predicted class): (..., C, C)."""
    label, predicted = np.asarray(label, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    weights = _weights(weights, label.size)
    cells = np.zeros((label.size, n_classes * n_classes))
    cells[np.arange(label.size), label * n_classes + predicted] = 1.0
    return (weights @ cells).reshape(*weights.shape[:-1], n_classes, n_classes)


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """Part of the slides whose class was predicted."""
    return _ratio(_diagonal(confusion).sum(axis=-1), confusion.sum(axis=(-2, -1)))


def balanced_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Mean recall over the classes that occur; undefined when only one does."""
    true = confusion.sum(axis=-1)
    recall = _mean_of_defined(_ratio(_diagonal(confusion), true))
    return np.where((true > 0).sum(axis=-1) > 1, recall, np.nan)


def sensitivity(confusion: np.ndarray) -> np.ndarray:
    """Of the positives (class 1), the part called positive."""
    return _ratio(confusion[..., 1, 1], confusion[..., 1, :].sum(axis=-1))


def specificity(confusion: np.ndarray) -> np.ndarray:
    """Of the negatives (class 0), the part called negative."""
    return _ratio(confusion[..., 0, 0], confusion[..., 0, :].sum(axis=-1))


def f1(confusion: np.ndarray) -> np.ndarray:
    """F1 of the positive class (1); undefined when nothing is positive, neither in truth nor in prediction."""
    return _f1_per_class(confusion)[..., 1]


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur in truth or prediction."""
    return _mean_of_defined(_f1_per_class(confusion))


def matthews(confusion: np.ndarray) -> np.ndarray:
    """Matthews correlation, for any number of classes: 0 when one class is predicted throughout, undefined when one is
    true throughout.
    """
    true, predicted = confusion.sum(axis=-1), confusion.sum(axis=-2)
    total = confusion.sum(axis=(-2, -1))
    covariance = _diagonal(confusion).sum(axis=-1) * total - (true * predicted).sum(axis=-1)
    spread_true = total**2 - (true**2).sum(axis=-1)
    spread_predicted = total**2 - (predicted**2).sum(axis=-1)
    correlation = _ratio(covariance, np.sqrt(np.maximum(spread_true * spread_predicted, 0.0)), otherwise=0.0)
    return np.where(spread_true > 0, correlation, np.nan)


def quadratic_kappa(confusion: np.ndarray) -> np.ndarray:
    """Agreement beyond chance, a miss by two classes costing four times a miss by one. Only for ordered classes."""
    n_classes = confusion.shape[-1]
    cost = np.subtract.outer(np.arange(n_classes), np.arange(n_classes)) ** 2.0
    chance = confusion.sum(axis=-1)[..., :, None] * confusion.sum(axis=-2)[..., None, :]
    expected = _ratio((cost * chance).sum(axis=(-2, -1)), confusion.sum(axis=(-2, -1)))
    return 1.0 - _ratio((cost * confusion).sum(axis=(-2, -1)), expected)


# probabilities


def brier(label: ArrayLike, probability: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean squared error of the probabilities: of the positive class (n,), or summed over the classes (n, C)."""
    label, probability = np.asarray(label), np.asarray(probability, dtype=np.float64)
    if probability.ndim == 1:
        return _mean((probability - label) ** 2, weights)
    return _mean(((probability - np.eye(probability.shape[1])[label]) ** 2).sum(axis=1), weights)


def nll(label: ArrayLike, probability: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean negative log-likelihood in nats, for probabilities (n,) of the positive class or (n, C)."""
    label, probability = np.asarray(label, dtype=np.int64), np.asarray(probability, dtype=np.float64)
    if probability.ndim == 1:
        probability = np.stack([1.0 - probability, probability], axis=1)
    given = probability[np.arange(label.size), label]
    return _mean(-np.log(np.clip(given, _SMALLEST_PROBABILITY, 1.0)), weights)


def calibration_bins(probability: ArrayLike, *, n_bins: int = 15, adaptive: bool = True) -> np.ndarray:
    """Bin (n,) of every probability: of equal size (adaptive) or equal width. Equal probabilities share a bin."""
    probability = np.asarray(probability, dtype=np.float64)
    inner = np.linspace(0.0, 1.0, n_bins + 1)[1:-1]
    edges = np.unique(np.quantile(probability, inner)) if adaptive and probability.size else inner
    return np.unique(np.searchsorted(edges, probability, side="right"), return_inverse=True)[1]


def ece(
    outcome: ArrayLike,
    probability: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    n_bins: int = 15,
    adaptive: bool = True,
) -> np.ndarray:
    """Expected calibration error: mean gap between a bin's mean probability and the frequency of `outcome` (0/1) in it.

    Biased upwards where bins hold few slides; so compare it only between models on the same slides.
    """
    outcome, probability = np.asarray(outcome, dtype=np.float64), np.asarray(probability, dtype=np.float64)
    weights = _weights(weights, outcome.size)
    bins = calibration_bins(probability, n_bins=n_bins, adaptive=adaptive)
    excess = np.zeros((outcome.size, int(bins.max(initial=-1)) + 1))
    excess[np.arange(outcome.size), bins] = probability - outcome
    return _ratio(np.abs(weights @ excess).sum(axis=-1), weights.sum(axis=-1))


def risk_coverage_auc(error: ArrayLike, confidence: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean error rate over all coverages when the least confident slides are left out first; lower is better.

    The area under the risk-coverage curve, with the errors of equally confident slides spread evenly among them.
    """
    wrong, right = (counts[..., ::-1] for counts in _by_class(error, confidence, weights))
    size = wrong + right
    covered = np.cumsum(size, axis=-1)
    before = covered - size
    errors_before = np.cumsum(wrong, axis=-1) - wrong
    rate = _ratio(wrong, size, otherwise=0.0)
    # inside a group the risk at m covered slides is (errors_before + rate (m - before)) / m; this is its integral
    grown = np.log(_ratio(covered, before, otherwise=1.0))
    area = (rate * size + (errors_before - rate * before) * grown).sum(axis=-1)
    return _ratio(area, covered[..., -1])


# regression


def mae(target: ArrayLike, value: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean absolute error, in the label's unit."""
    return _mean(np.abs(np.asarray(target, dtype=np.float64) - np.asarray(value, dtype=np.float64)), weights)


def r_squared(target: ArrayLike, value: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Share of the labels' variance explained; below 0 is worse than always saying their mean."""
    target, value = np.asarray(target, dtype=np.float64), np.asarray(value, dtype=np.float64)
    weights = _weights(weights, target.size)
    centred = target - _mean(target, None)  # shifting first keeps large labels from losing digits
    spread = _mean(centred**2, weights) - _mean(centred, weights) ** 2
    spread = np.where(spread > 1e-12 * np.max(centred**2, initial=0.0), spread, 0.0)  # rounding is no variance
    return 1.0 - _ratio(_mean((target - value) ** 2, weights), spread)


def spearman(target: ArrayLike, value: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Correlation of the ranks, ties at their mean rank; undefined when either side is constant."""
    weights = _weights(weights, np.asarray(target).size)
    total = weights.sum(axis=-1)
    deviations = [_ranks(side, weights) - (total[..., None] + 1.0) / 2.0 for side in (target, value)]
    covariance = (weights * deviations[0] * deviations[1]).sum(axis=-1)
    spread = (weights * deviations[0] ** 2).sum(axis=-1) * (weights * deviations[1] ** 2).sum(axis=-1)
    return _ratio(covariance, np.sqrt(spread))


# survival


def kaplan_meier(time: ArrayLike, event: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Times (U,), rising, and the share still without the event just after each (U,)."""
    time, event = np.asarray(time, dtype=np.float64), as_bool(event, "event")
    times, index = np.unique(time, return_inverse=True)
    events = np.bincount(index, weights=event, minlength=times.size)
    leaving = np.bincount(index, minlength=times.size)
    at_risk = time.size - (np.cumsum(leaving) - leaving)
    return times, np.cumprod(1.0 - events / np.maximum(at_risk, 1))


def harrell_c(time: ArrayLike, event: ArrayLike, risk: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Of the pairs whose order is known, the part in which the earlier event has the higher risk (ties of risk count
    half).

    Two events at one time are no pair; an event and a censoring at one time are (the censored one lived longer).
    """
    return _concordance(time, event, risk, weights, np.ones(np.asarray(time).size))


def ipcw_c(
    time: ArrayLike,
    event: ArrayLike,
    risk: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    tau: float | None = None,
) -> np.ndarray:
    """Uno's concordance: pairs weighted by the inverse chance of being still uncensored, so censoring does not tilt it.

    Events at or after `tau` (default: none is left out) start no pair. The censoring curve is estimated on the
    evaluated slides, once: a resample keeps it.
    """
    time = np.asarray(time, dtype=np.float64)
    before = _uncensored_before(time, event)
    pair_weight = _ratio(np.ones_like(before), before**2, otherwise=0.0)
    if tau is not None:
        pair_weight = np.where(time < tau, pair_weight, 0.0)
    return _concordance(time, event, risk, weights, pair_weight)


def time_dependent_auc(
    time: ArrayLike, event: ArrayLike, risk: ArrayLike, weights: ArrayLike | None = None, *, at: float
) -> np.ndarray:
    """Chance that a slide with the event until `at` has a higher risk than one without it then, ties half (Uno et al. 2007).

    Slides censored before `at` are neither; those with the event stand for them, by the inverse chance of being uncensored.
    """
    time, risk = np.asarray(time, dtype=np.float64), np.asarray(risk, dtype=np.float64)
    weights = _weights(weights, time.size)
    struck = as_bool(event, "event") & (time <= at)
    counted = struck * _ratio(np.ones(time.size), _uncensored_before(time, event), otherwise=0.0) + (time > at)
    return auroc(struck, risk, weights * counted)


def integrated_brier(
    time: ArrayLike,
    event: ArrayLike,
    survival: ArrayLike,
    horizons: ArrayLike,
    weights: ArrayLike | None = None,
) -> np.ndarray:
    """Mean squared error of the predicted chance (n, H) to be without the event at the horizons (H,), integrated between them
    (trapezoids) and divided by their span; censoring as in `time_dependent_auc` (Graf et al. 1999). Lower is better: always
    saying .5 gives .25.

    Horizons from the last observed time on are left out, for nobody is known to be without the event there; NaN when fewer than
    two remain.
    """
    time, event = np.asarray(time, dtype=np.float64), as_bool(event, "event")
    horizons, survival = np.asarray(horizons, dtype=np.float64), np.asarray(survival, dtype=np.float64)
    weights = _weights(weights, time.size)
    seen = horizons < time.max(initial=-np.inf)
    horizons, survival = horizons[seen], survival.reshape(time.size, horizons.size)[:, seen]
    if horizons.size < 2:
        return np.full(weights.shape[:-1], np.nan)
    known = _ratio(np.ones(time.size), _uncensored_before(time, event), otherwise=0.0)
    times, uncensored = _uncensored(time, event)
    errors = []
    for column, horizon in enumerate(horizons):
        left = uncensored[np.searchsorted(times, horizon, side="right")]
        struck = (time <= horizon) & event
        squared = struck * known * survival[:, column] ** 2
        squared = squared + (time > horizon) * _ratio(1.0, left, otherwise=0.0) * (1.0 - survival[:, column]) ** 2
        errors.append(_mean(squared, weights))
    return np.trapezoid(np.stack(errors, axis=-1), horizons, axis=-1) / (horizons[-1] - horizons[0])


# everything about one kind of task


def binary_metrics(
    label: ArrayLike, probability: ArrayLike, predicted: ArrayLike, weights: ArrayLike | None = None
) -> dict[str, np.ndarray]:
    """Every binary metric. `probability` (n,) of the positive class; `predicted` (n,) by the threshold chosen on
    validation.
    """
    label = np.asarray(label, dtype=np.int64)
    probability = np.asarray(probability, dtype=np.float64)
    weights = _weights(weights, label.size)
    halved = probability >= 0.5
    metrics = {
        "auroc": auroc(label, probability, weights),
        "auprc": average_precision(label, probability, weights),
        "sensitivity_at_95_specificity": sensitivity_at_specificity(label, probability, weights),
        "brier": brier(label, probability, weights),
        "nll": nll(label, probability, weights),
        "ece": ece(label, probability, weights),
        "risk_coverage_auc": risk_coverage_auc(halved != label, np.maximum(probability, 1 - probability), weights),
    }
    for decision, suffix in ((np.asarray(predicted), ""), (halved, "_at_0.5")):
        confusion = confusion_matrix(label, decision, weights, n_classes=2)
        metrics |= {
            f"accuracy{suffix}": accuracy(confusion),
            f"balanced_accuracy{suffix}": balanced_accuracy(confusion),
            f"f1{suffix}": f1(confusion),
            f"mcc{suffix}": matthews(confusion),
            f"sensitivity{suffix}": sensitivity(confusion),
            f"specificity{suffix}": specificity(confusion),
        }
    return metrics


def multiclass_metrics(
    label: ArrayLike,
    probability: ArrayLike,
    predicted: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    classes: Sequence[str],
    ordered: bool = False,
) -> dict[str, np.ndarray]:
    """Every metric of C classes, probability (n, C): macro means, and one-vs-rest AUROC and recall by class name. Of ordered
    classes also the quadratic kappa and the mean number of steps by which the prediction is off.
    """
    label, predicted = np.asarray(label, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    probability = np.asarray(probability, dtype=np.float64)
    weights = _weights(weights, label.size)
    confusion = confusion_matrix(label, predicted, weights, n_classes=len(classes))
    areas = [auroc(label == index, probability[:, index], weights) for index in range(len(classes))]
    recalls = _ratio(_diagonal(confusion), confusion.sum(axis=-1))
    confidence, wrong = probability.max(axis=1), probability.argmax(axis=1) != label
    metrics = {
        "auroc": _mean_of_defined(np.stack(areas, axis=-1)),
        "accuracy": accuracy(confusion),
        "balanced_accuracy": balanced_accuracy(confusion),
        "f1": macro_f1(confusion),
        "mcc": matthews(confusion),
        "brier": brier(label, probability, weights),
        "nll": nll(label, probability, weights),
        "ece": ece(~wrong, confidence, weights),
        "risk_coverage_auc": risk_coverage_auc(wrong, confidence, weights),
    }
    if ordered:
        metrics["quadratic_kappa"] = quadratic_kappa(confusion)
        metrics["mae_steps"] = mae(label, predicted, weights)
    metrics |= {f"auroc_{name}": area for name, area in zip(classes, areas, strict=True)}
    metrics |= {f"recall_{name}": recalls[..., index] for index, name in enumerate(classes)}
    return metrics


def regression_metrics(target: ArrayLike, value: ArrayLike, weights: ArrayLike | None = None) -> dict[str, np.ndarray]:
    """Every regression metric."""
    weights = _weights(weights, np.asarray(target).size)
    return {
        "mae": mae(target, value, weights),
        "r2": r_squared(target, value, weights),
        "spearman": spearman(target, value, weights),
    }


def multilabel_metrics(
    label: ArrayLike, probability: ArrayLike, predicted: ArrayLike, weights: ArrayLike | None = None, *, classes: Sequence[str]
) -> dict[str, np.ndarray]:
    """Every metric of L labels, all (n, L), on the slides where each is known: means over the labels where it is defined, and
    AUROC, AUPRC and F1 by label.
    """
    label, probability = np.asarray(label, dtype=np.float64), np.asarray(probability, dtype=np.float64)
    predicted = np.asarray(predicted, dtype=np.int64)
    weights = _weights(weights, len(label))
    each = []
    for column in range(len(classes)):
        known = ~np.isnan(label[:, column])
        truth, score, mine = label[known, column].astype(np.int64), probability[known, column], weights[..., known]
        confusion = confusion_matrix(truth, predicted[known, column], mine, n_classes=2)
        each.append(
            {
                "auroc": auroc(truth, score, mine),
                "auprc": average_precision(truth, score, mine),
                "accuracy": accuracy(confusion),
                "balanced_accuracy": balanced_accuracy(confusion),
                "f1": f1(confusion),
                "brier": brier(truth, score, mine),
                "nll": nll(truth, score, mine),
            }
        )
    metrics = {name: _mean_of_defined(np.stack([one[name] for one in each], axis=-1)) for name in each[0]}
    for name in ("auroc", "auprc", "f1"):
        metrics |= {f"{name}_{which}": one[name] for which, one in zip(classes, each, strict=True)}
    return metrics


def survival_metrics(
    time: ArrayLike,
    event: ArrayLike,
    risk: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    survival: ArrayLike | None = None,
    horizons: Sequence[float] = (),
) -> dict[str, np.ndarray]:
    """Every survival metric; a higher risk means an earlier event. With horizons (H,) the AUROC at the first, middle and last of
    them, and their mean over all; with chances `survival` (n, H) the integrated Brier score.
    """
    weights = _weights(weights, np.asarray(time).size)
    metrics = {"harrell_c": harrell_c(time, event, risk, weights), "ipcw_c": ipcw_c(time, event, risk, weights)}
    if horizons:
        areas = {f"{at:g}": time_dependent_auc(time, event, risk, weights, at=at) for at in horizons}
        metrics["auroc_over_time"] = _mean_of_defined(np.stack(list(areas.values()), axis=-1))
        named = list(areas)
        metrics |= {f"auroc_at_{name}": areas[name] for name in (named[0], named[len(named) // 2], named[-1])}
        if survival is not None:
            metrics["integrated_brier"] = integrated_brier(time, event, survival, horizons, weights)
    return metrics


# shared arithmetic


def _uncensored(time: ArrayLike, event: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Times (U,), rising, and the chance of not being censored until just before the first (of all, 1) and just after each
    (U + 1,): events leave before censorings of the same time.
    """
    time, event = np.asarray(time, dtype=np.float64), as_bool(event, "event")
    times, index = np.unique(time, return_inverse=True)
    events, leaving = np.bincount(index, weights=event, minlength=times.size), np.bincount(index, minlength=times.size)
    at_risk = time.size - (np.cumsum(leaving) - leaving) - events
    staying = 1.0 - _ratio(leaving - events, at_risk, otherwise=0.0)
    return times, np.concatenate([[1.0], np.cumprod(staying)])


def _uncensored_before(time: np.ndarray, event: ArrayLike) -> np.ndarray:
    """Chance (n,) of not being censored before a slide's own time."""
    times, chance = _uncensored(time, event)
    return chance[np.searchsorted(times, time, side="left")]


def _weights(weights: ArrayLike | None, n: int) -> np.ndarray:
    array = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] != n:
        raise ValueError(f"weights have shape {array.shape}; the last axis must be the {n} slides")
    return array


def _ratio(numerator: ArrayLike, denominator: ArrayLike, *, otherwise: float = np.nan) -> np.ndarray:
    """numerator / denominator, and `otherwise` where there is nothing to divide by."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, dtype=np.float64), denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, otherwise), where=denominator > 0)


def _mean(values: np.ndarray, weights: ArrayLike | None) -> np.ndarray:
    weights = _weights(weights, values.size)
    return _ratio(weights @ values, weights.sum(axis=-1))


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis, leaving NaN out; NaN where all are."""
    return _ratio(np.nansum(values, axis=-1), (~np.isnan(values)).sum(axis=-1))


def _diagonal(confusion: np.ndarray) -> np.ndarray:
    return np.diagonal(confusion, axis1=-2, axis2=-1)


def _f1_per_class(confusion: np.ndarray) -> np.ndarray:
    return _ratio(2.0 * _diagonal(confusion), confusion.sum(axis=-1) + confusion.sum(axis=-2))


def _by_class(label: ArrayLike, score: ArrayLike, weights: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    """Weight of positives and of negatives at every distinct score, rising: twice (..., distinct)."""
    label, score = as_bool(label, "label"), np.asarray(score, dtype=np.float64)
    weights = _weights(weights, score.size)
    if np.isnan(score).any():
        raise ValueError("scores hold NaN, which has no rank")
    order, starts = _order_and_starts(score)
    ordered = weights[..., order]
    return _sums(ordered * label[order], starts), _sums(ordered * ~label[order], starts)


def _order_and_starts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rising order of the values, and where in it each distinct one begins."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    return order, np.flatnonzero(np.concatenate([np.ones(min(1, ordered.size), dtype=bool), ordered[1:] != ordered[:-1]]))


def _sums(ordered: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sum of every run of the last axis; one empty run when there is nothing."""
    if starts.size == 0:
        return np.zeros((*ordered.shape[:-1], 1))
    return np.add.reduceat(ordered, starts, axis=-1)


def _ranks(values: ArrayLike, weights: np.ndarray) -> np.ndarray:
    """Mean rank (..., n) of every value among all, from 1."""
    values = np.asarray(values, dtype=np.float64)
    order, starts = _order_and_starts(values)
    size = _sums(weights[..., order], starts)
    index = np.empty(values.size, dtype=np.int64)
    index[order] = np.repeat(np.arange(starts.size), np.diff(starts, append=values.size))
    return (np.cumsum(size, axis=-1) - size + (size + 1.0) / 2.0)[..., index]


def _concordance(
    time: ArrayLike, event: ArrayLike, risk: ArrayLike, weights: ArrayLike | None, pair_weight: np.ndarray
) -> np.ndarray:
    time, risk = np.asarray(time, dtype=np.float64), np.asarray(risk, dtype=np.float64)
    event = as_bool(event, "event")
    weights = _weights(weights, time.size)
    concordant, comparable = np.zeros(weights.shape[:-1]), np.zeros(weights.shape[:-1])
    starters = np.flatnonzero(event)
    for block in np.array_split(starters, max(1, -(-starters.size // 1024))):  # bounds the memory of the pair table
        later = (time[block, None] < time) | ((time[block, None] == time) & ~event)
        pairs = later * pair_weight[block, None]  # (block, n)
        won = (risk[block, None] > risk) + 0.5 * (risk[block, None] == risk)
        comparable = comparable + (weights[..., block] * (weights @ pairs.T)).sum(axis=-1)
        concordant = concordant + (weights[..., block] * (weights @ (pairs * won).T)).sum(axis=-1)
    return _ratio(concordant, comparable)

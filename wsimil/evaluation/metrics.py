"""Numbers for one set of predictions: every metric is a weighted sum, so a bootstrap is one call.

- `weights` has shape (..., n): none is every slide once; (B, n) multiplicities give B resamples at once, and a result
  of shape (...).
- A whole-number weight is the same as that many copies of the row: ties are never broken by row order. Only the bins of
  `ece`, which are estimated first, stay those of the whole sample.
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
from wsimil.evaluation.weighted import mean, mean_of_defined, ratio, weights_of

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
]

_SMALLEST_PROBABILITY = float(np.finfo(np.float32).eps)
"""Probabilities come from float32: an exact 0 there means "below this", not "impossible"."""


# ranking


def auroc(label: ArrayLike, score: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Chance that a positive scores above a negative, ties counting half."""
    positive, negative = _by_class(label, score, weights)
    below = np.cumsum(negative, axis=-1) - negative
    won = (positive * (below + 0.5 * negative)).sum(axis=-1)
    return ratio(won, positive.sum(axis=-1) * negative.sum(axis=-1))


def average_precision(label: ArrayLike, score: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Area under the precision-recall curve as the step sum over distinct scores (AUPRC)."""
    positive, negative = (counts[..., ::-1] for counts in _by_class(label, score, weights))
    true_positives, false_positives = np.cumsum(positive, axis=-1), np.cumsum(negative, axis=-1)
    precision = ratio(true_positives, true_positives + false_positives, otherwise=0.0)
    area = ratio((precision * positive).sum(axis=-1), true_positives[..., -1])
    return np.where(false_positives[..., -1] > 0, area, np.nan)


def roc_points(label: ArrayLike, score: ArrayLike, weights: ArrayLike | None = None) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rate at every distinct score, from (0, 0) to (1, 1); each (..., distinct + 1)."""
    positive, negative = (counts[..., ::-1] for counts in _by_class(label, score, weights))
    rates = []
    for counts in (negative, positive):
        reached = np.cumsum(counts, axis=-1)
        reached = np.concatenate([np.zeros_like(reached[..., :1]), reached], axis=-1)
        rates.append(ratio(reached, reached[..., -1:]))
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
    return mean_of_defined(np.stack(columns, axis=-1))


# decisions: all from the confusion matrix


def confusion_matrix(label: ArrayLike, predicted: ArrayLike, weights: ArrayLike | None = None, *, n_classes: int) -> np.ndarray:
    """Weight of every (true class, predicted class): (..., C, C)."""
    label, predicted = np.asarray(label, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    weights = weights_of(weights, label.size)
    cells = np.zeros((label.size, n_classes * n_classes))
    cells[np.arange(label.size), label * n_classes + predicted] = 1.0
    return (weights @ cells).reshape(*weights.shape[:-1], n_classes, n_classes)


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """Part of the slides whose class was predicted."""
    return ratio(_diagonal(confusion).sum(axis=-1), confusion.sum(axis=(-2, -1)))


def balanced_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Mean recall over the classes that occur; undefined when only one does."""
    true = confusion.sum(axis=-1)
    recall = mean_of_defined(ratio(_diagonal(confusion), true))
    return np.where((true > 0).sum(axis=-1) > 1, recall, np.nan)


def sensitivity(confusion: np.ndarray) -> np.ndarray:
    """Of the positives (class 1), the part called positive."""
    return ratio(confusion[..., 1, 1], confusion[..., 1, :].sum(axis=-1))


def specificity(confusion: np.ndarray) -> np.ndarray:
    """Of the negatives (class 0), the part called negative."""
    return ratio(confusion[..., 0, 0], confusion[..., 0, :].sum(axis=-1))


def f1(confusion: np.ndarray) -> np.ndarray:
    """F1 of the positive class (1); undefined when nothing is positive, neither in truth nor in prediction."""
    return _f1_per_class(confusion)[..., 1]


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur in truth or prediction."""
    return mean_of_defined(_f1_per_class(confusion))


def matthews(confusion: np.ndarray) -> np.ndarray:
    """Matthews correlation, for any number of classes: 0 when one class is predicted throughout, undefined when one is
    true throughout.
    """
    true, predicted = confusion.sum(axis=-1), confusion.sum(axis=-2)
    total = confusion.sum(axis=(-2, -1))
    covariance = _diagonal(confusion).sum(axis=-1) * total - (true * predicted).sum(axis=-1)
    spread_true = total**2 - (true**2).sum(axis=-1)
    spread_predicted = total**2 - (predicted**2).sum(axis=-1)
    correlation = ratio(covariance, np.sqrt(np.maximum(spread_true * spread_predicted, 0.0)), otherwise=0.0)
    return np.where(spread_true > 0, correlation, np.nan)


def quadratic_kappa(confusion: np.ndarray) -> np.ndarray:
    """Agreement beyond chance, a miss by two classes costing four times a miss by one. Only for ordered classes."""
    n_classes = confusion.shape[-1]
    cost = np.subtract.outer(np.arange(n_classes), np.arange(n_classes)) ** 2.0
    chance = confusion.sum(axis=-1)[..., :, None] * confusion.sum(axis=-2)[..., None, :]
    expected = ratio((cost * chance).sum(axis=(-2, -1)), confusion.sum(axis=(-2, -1)))
    return 1.0 - ratio((cost * confusion).sum(axis=(-2, -1)), expected)


# probabilities


def brier(label: ArrayLike, probability: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean squared error of the probabilities: of the positive class (n,), or summed over the classes (n, C)."""
    label, probability = np.asarray(label), np.asarray(probability, dtype=np.float64)
    if probability.ndim == 1:
        return mean((probability - label) ** 2, weights)
    return mean(((probability - np.eye(probability.shape[1])[label]) ** 2).sum(axis=1), weights)


def nll(label: ArrayLike, probability: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean negative log-likelihood in nats, for probabilities (n,) of the positive class or (n, C)."""
    label, probability = np.asarray(label, dtype=np.int64), np.asarray(probability, dtype=np.float64)
    if probability.ndim == 1:
        probability = np.stack([1.0 - probability, probability], axis=1)
    given = probability[np.arange(label.size), label]
    return mean(-np.log(np.clip(given, _SMALLEST_PROBABILITY, 1.0)), weights)


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
    weights = weights_of(weights, outcome.size)
    bins = calibration_bins(probability, n_bins=n_bins, adaptive=adaptive)
    excess = np.zeros((outcome.size, int(bins.max(initial=-1)) + 1))
    excess[np.arange(outcome.size), bins] = probability - outcome
    return ratio(np.abs(weights @ excess).sum(axis=-1), weights.sum(axis=-1))


def risk_coverage_auc(error: ArrayLike, confidence: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean error rate over all coverages when the least confident slides are left out first; lower is better.

    The area under the risk-coverage curve, with the errors of equally confident slides spread evenly among them.
    """
    wrong, right = (counts[..., ::-1] for counts in _by_class(error, confidence, weights))
    size = wrong + right
    covered = np.cumsum(size, axis=-1)
    before = covered - size
    errors_before = np.cumsum(wrong, axis=-1) - wrong
    rate = ratio(wrong, size, otherwise=0.0)
    # inside a group the risk at m covered slides is (errors_before + rate (m - before)) / m; this is its integral
    grown = np.log(ratio(covered, before, otherwise=1.0))
    area = (rate * size + (errors_before - rate * before) * grown).sum(axis=-1)
    return ratio(area, covered[..., -1])


# regression


def mae(target: ArrayLike, value: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean absolute error, in the label's unit."""
    return mean(np.abs(np.asarray(target, dtype=np.float64) - np.asarray(value, dtype=np.float64)), weights)


def r_squared(target: ArrayLike, value: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Share of the labels' variance explained; below 0 is worse than always saying their mean."""
    target, value = np.asarray(target, dtype=np.float64), np.asarray(value, dtype=np.float64)
    weights = weights_of(weights, target.size)
    centred = target - mean(target, None)  # shifting first keeps large labels from losing digits
    spread = mean(centred**2, weights) - mean(centred, weights) ** 2
    spread = np.where(spread > 1e-12 * np.max(centred**2, initial=0.0), spread, 0.0)  # rounding is no variance
    return 1.0 - ratio(mean((target - value) ** 2, weights), spread)


def spearman(target: ArrayLike, value: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Correlation of the ranks, ties at their mean rank; undefined when either side is constant."""
    weights = weights_of(weights, np.asarray(target).size)
    total = weights.sum(axis=-1)
    deviations = [_ranks(side, weights) - (total[..., None] + 1.0) / 2.0 for side in (target, value)]
    covariance = (weights * deviations[0] * deviations[1]).sum(axis=-1)
    spread = (weights * deviations[0] ** 2).sum(axis=-1) * (weights * deviations[1] ** 2).sum(axis=-1)
    return ratio(covariance, np.sqrt(spread))


# everything about one kind of task


def binary_metrics(
    label: ArrayLike, probability: ArrayLike, predicted: ArrayLike, weights: ArrayLike | None = None
) -> dict[str, np.ndarray]:
    """Every binary metric. `probability` (n,) of the positive class; `predicted` (n,) by the threshold chosen on
    validation.
    """
    label = np.asarray(label, dtype=np.int64)
    probability = np.asarray(probability, dtype=np.float64)
    weights = weights_of(weights, label.size)
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
    weights = weights_of(weights, label.size)
    confusion = confusion_matrix(label, predicted, weights, n_classes=len(classes))
    areas = [auroc(label == index, probability[:, index], weights) for index in range(len(classes))]
    recalls = ratio(_diagonal(confusion), confusion.sum(axis=-1))
    confidence, wrong = probability.max(axis=1), probability.argmax(axis=1) != label
    metrics = {
        "auroc": mean_of_defined(np.stack(areas, axis=-1)),
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
    weights = weights_of(weights, np.asarray(target).size)
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
    weights = weights_of(weights, len(label))
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
    metrics = {name: mean_of_defined(np.stack([one[name] for one in each], axis=-1)) for name in each[0]}
    for name in ("auroc", "auprc", "f1"):
        metrics |= {f"{name}_{which}": one[name] for which, one in zip(classes, each, strict=True)}
    return metrics


# shared arithmetic


def _diagonal(confusion: np.ndarray) -> np.ndarray:
    return np.diagonal(confusion, axis1=-2, axis2=-1)


def _f1_per_class(confusion: np.ndarray) -> np.ndarray:
    return ratio(2.0 * _diagonal(confusion), confusion.sum(axis=-1) + confusion.sum(axis=-2))


def _by_class(label: ArrayLike, score: ArrayLike, weights: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    """Weight of positives and of negatives at every distinct score, rising: twice (..., distinct)."""
    label, score = as_bool(label, "label"), np.asarray(score, dtype=np.float64)
    weights = weights_of(weights, score.size)
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

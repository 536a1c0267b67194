"""What validation decides and how honest a probability is: temperature, threshold, reliability, conformal sets.

- Everything that is fitted here takes validation data and returns plain numbers to be stored with the model: nothing is
  fitted on a test set.
- Small validation sets leave the temperature at 1 rather than believe a few slides; one-sided ones leave the threshold at .5, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from wsimil.evaluation.binary import as_bool
from wsimil.evaluation.metrics import calibration_bins
from wsimil.task import Task

__all__ = [
    "Reliability",
    "calibrate",
    "choose_threshold",
    "conformal_cutoff",
    "conformal_sets",
    "coverage_and_set_size",
    "fit_temperature",
    "reliability_curve",
]

_TEMPERATURES = (0.1, 10.0)


def calibrate(task: Task, logits: ArrayLike, targets: ArrayLike) -> tuple[float, float | None]:
    """Temperature and (binary) threshold from validation logits and targets as `task.encode` gives them.

    Of targets that are probabilities the likeliest class counts. Tasks without exclusive classes stay as they are: (1, None).
    """
    logits, targets = np.asarray(logits), np.asarray(targets)
    if task.kind == "multiclass":
        return fit_temperature(logits, targets.argmax(axis=1) if targets.ndim == 2 else targets), None
    if task.kind != "binary":
        return 1.0, None
    labels = (targets > 0.5).astype(int)
    temperature = fit_temperature(logits, labels)
    return temperature, choose_threshold(labels, task.probabilities(logits, temperature)[:, 1])


def fit_temperature(logits: ArrayLike, labels: ArrayLike, *, min_slides: int = 20) -> float:
    """Temperature by which to divide the logits so that validation labels are most likely (Guo et al. 2017), within
    0.1-10.

    `logits` are (n,) or (n, 1) of the positive class, or (n, C); `labels` (n,) class indices. Returns 1.0, that is no
    change, for fewer than `min_slides` slides, for one class only, and when every slide is classified rightly: then the
    likelihood rises without end as the temperature falls, and the best fit would be certainty.
    """
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    logits = logits.reshape(labels.size, -1) if labels.size else np.zeros((0, 2))
    if not np.isfinite(logits).all():
        raise ValueError("logits hold NaN or infinity; a temperature cannot be fitted")
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    if labels.size < min_slides or np.unique(labels).size < 2:
        return 1.0
    given = logits[np.arange(labels.size), labels]
    others = np.where(np.eye(logits.shape[1], dtype=bool)[labels], -np.inf, logits).max(axis=1)
    if (given > others).all():
        return 1.0

    def loss(log_temperature: float) -> float:
        scale = np.exp(-log_temperature)
        return float(np.mean(special.logsumexp(logits * scale, axis=1) - given * scale))

    # convex in 1/T, so one minimum on the log scale too
    bounds = tuple(np.log(_TEMPERATURES))
    found = cast(Any, optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}))
    return float(np.exp(found.x)) if found.fun < loss(0.0) else 1.0


def choose_threshold(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """The cut of validation probabilities (n,) with the best balanced accuracy; positive is `probability >= threshold`.

    It lies midway between two neighbouring probabilities. Equal cuts: the widest gap, then the one nearest .5, then the
    lower. Returns .5 for one class only, and when no cut is better than chance.
    """
    labels, probabilities = as_bool(labels, "labels"), np.asarray(probabilities, dtype=np.float64)
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities hold NaN or infinity; a threshold cannot be chosen")
    values, index = np.unique(probabilities, return_inverse=True)
    n_positive, n_negative = int(labels.sum()), int((~labels).sum())
    if n_positive == 0 or n_negative == 0 or values.size < 2:
        return 0.5
    missed = np.cumsum(np.bincount(index, weights=labels, minlength=values.size))[:-1]
    rejected = np.cumsum(np.bincount(index, weights=~labels, minlength=values.size))[:-1]
    # twice the balanced accuracy times both class sizes, a whole number: equal cuts are equal exactly
    merit = (n_positive - missed) * n_negative + rejected * n_positive
    if merit.max() <= n_positive * n_negative:
        return 0.5
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2.0
    middle = np.where(middle > low, middle, high)  # neighbours one rounding step apart have no middle
    # rounded, so that gaps that are equal on paper are equal here
    order = np.lexsort((middle, np.round(np.abs(middle - 0.5), 12), -np.round(high - low, 12), -merit))
    return float(middle[order[0]])


@dataclass(frozen=True)
class Reliability:
    """Mean probability and observed frequency of every bin that holds a slide, with a 95 % Wilson interval of the
    frequency.
    """

    probability: np.ndarray  # (bins,)
    frequency: np.ndarray  # (bins,)
    low: np.ndarray  # (bins,)
    high: np.ndarray  # (bins,)
    n_slides: np.ndarray  # (bins,)


def reliability_curve(outcome: ArrayLike, probability: ArrayLike, *, n_bins: int = 15, adaptive: bool = True) -> Reliability:
    """Bins of the reliability plot, the same as those of `ece`; `outcome` (n,) is 0 or 1."""
    outcome, probability = np.asarray(outcome, dtype=np.float64), np.asarray(probability, dtype=np.float64)
    bins = calibration_bins(probability, n_bins=n_bins, adaptive=adaptive)
    size = np.bincount(bins)
    frequency = np.bincount(bins, weights=outcome) / size
    z = float(special.ndtri(0.975))
    centre = (frequency + z**2 / (2 * size)) / (1 + z**2 / size)
    margin = z * np.sqrt(frequency * (1 - frequency) / size + (z / (2 * size)) ** 2) / (1 + z**2 / size)
    return Reliability(
        np.bincount(bins, weights=probability) / size,
        frequency,
        np.minimum(centre - margin, frequency),  # rounding must not push the end past the point
        np.maximum(centre + margin, frequency),
        size,
    )


def conformal_cutoff(labels: ArrayLike, probabilities: ArrayLike, *, coverage: float = 0.9, method: str = "lac") -> float:
    """Nonconformity up to which a class belongs in the set, from validation slides; probabilities (n, C).

    Sets made with it hold the true class of a new slide with at least the asked chance, if new slides come from where
    the validation slides came from. Infinite (every class is in the set) when there are too few slides for that
    promise.
    """
    labels = np.asarray(labels, dtype=np.int64)
    scores = _nonconformity(probabilities, method)[np.arange(labels.size), labels]
    rank = int(np.ceil((labels.size + 1) * coverage - 1e-9))  # (n + 1) * .9 is not always what it is on paper
    return float(np.sort(scores)[rank - 1]) if 0 < rank <= labels.size else float("inf")


def conformal_sets(probabilities: ArrayLike, cutoff: float, *, method: str = "lac") -> np.ndarray:
    """Which classes are in each slide's set: (n, C) bool. Use the method that the cutoff was made with."""
    return _nonconformity(probabilities, method) <= cutoff


def coverage_and_set_size(labels: ArrayLike, sets: np.ndarray) -> tuple[float, float]:
    """Part of the sets that hold the true class, and the mean number of classes in a set; NaN without slides."""
    labels = np.asarray(labels, dtype=np.int64)
    if labels.size == 0:
        return float("nan"), float("nan")
    return float(sets[np.arange(labels.size), labels].mean()), float(sets.sum(axis=1).mean())


def _nonconformity(probabilities: ArrayLike, method: str) -> np.ndarray:
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if method == "lac":  # least ambiguous sets (Sadinle et al. 2019): 1 - p
        return 1.0 - probabilities
    if method == "aps":  # adaptive sets (Romano et al. 2020), without the random part: mass of all at least as likely
        at_least = probabilities[:, None, :] >= probabilities[:, :, None]  # (n, C, C)
        return (at_least * probabilities[:, None, :]).sum(axis=2)
    raise ValueError(f"conformal method {method!r} is unknown; expected lac or aps")

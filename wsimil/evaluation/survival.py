"""Metrics of survival; as in `wsimil.evaluation.metrics`, each is a weighted sum, and what is not defined is NaN.

The censoring curve is estimated on the evaluated slides, once: a resample keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from wsimil.evaluation.binary import as_bool
from wsimil.evaluation.metrics import auroc
from wsimil.evaluation.weighted import mean, mean_of_defined, ratio, weights_of

__all__ = ["harrell_c", "integrated_brier", "ipcw_c", "kaplan_meier", "survival_metrics", "time_dependent_auc"]


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

    Events at or after `tau` (default: none is left out) start no pair.
    """
    time = np.asarray(time, dtype=np.float64)
    before = _uncensored_before(time, event)
    pair_weight = ratio(np.ones_like(before), before**2, otherwise=0.0)
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
    weights = weights_of(weights, time.size)
    struck = as_bool(event, "event") & (time <= at)
    counted = struck * ratio(np.ones(time.size), _uncensored_before(time, event), otherwise=0.0) + (time > at)
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
    weights = weights_of(weights, time.size)
    seen = horizons < time.max(initial=-np.inf)
    horizons, survival = horizons[seen], survival.reshape(time.size, horizons.size)[:, seen]
    if horizons.size < 2:
        return np.full(weights.shape[:-1], np.nan)
    known = ratio(np.ones(time.size), _uncensored_before(time, event), otherwise=0.0)
    times, uncensored = _uncensored(time, event)
    errors = []
    for column, horizon in enumerate(horizons):
        left = uncensored[np.searchsorted(times, horizon, side="right")]
        struck = (time <= horizon) & event
        squared = struck * known * survival[:, column] ** 2
        squared = squared + (time > horizon) * ratio(1.0, left, otherwise=0.0) * (1.0 - survival[:, column]) ** 2
        errors.append(mean(squared, weights))
    found, steps = np.stack(errors, axis=-1), np.diff(horizons)  # (..., H), (H - 1,)
    return (found[..., 1:] + found[..., :-1]) @ steps / (2.0 * steps.sum())


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
    weights = weights_of(weights, np.asarray(time).size)
    metrics = {"harrell_c": harrell_c(time, event, risk, weights), "ipcw_c": ipcw_c(time, event, risk, weights)}
    if horizons:
        areas = {f"{at:g}": time_dependent_auc(time, event, risk, weights, at=at) for at in horizons}
        metrics["auroc_over_time"] = mean_of_defined(np.stack(list(areas.values()), axis=-1))
        named = list(areas)
        metrics |= {f"auroc_at_{name}": areas[name] for name in (named[0], named[len(named) // 2], named[-1])}
        if survival is not None:
            metrics["integrated_brier"] = integrated_brier(time, event, survival, horizons, weights)
    return metrics


def _uncensored(time: ArrayLike, event: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Times (U,), rising, and the chance of not being censored until just before the first (of all, 1) and just after each
    (U + 1,): events leave before censorings of the same time.
    """
    time, event = np.asarray(time, dtype=np.float64), as_bool(event, "event")
    times, index = np.unique(time, return_inverse=True)
    events, leaving = np.bincount(index, weights=event, minlength=times.size), np.bincount(index, minlength=times.size)
    at_risk = time.size - (np.cumsum(leaving) - leaving) - events
    staying = 1.0 - ratio(leaving - events, at_risk, otherwise=0.0)
    return times, np.concatenate([[1.0], np.cumprod(staying)])


def _uncensored_before(time: np.ndarray, event: ArrayLike) -> np.ndarray:
    """Chance (n,) of not being censored before a slide's own time."""
    times, chance = _uncensored(time, event)
    return chance[np.searchsorted(times, time, side="left")]


def _concordance(
    time: ArrayLike, event: ArrayLike, risk: ArrayLike, weights: ArrayLike | None, pair_weight: np.ndarray
) -> np.ndarray:
    time, risk = np.asarray(time, dtype=np.float64), np.asarray(risk, dtype=np.float64)
    event = as_bool(event, "event")
    weights = weights_of(weights, time.size)
    concordant, comparable = np.zeros(weights.shape[:-1]), np.zeros(weights.shape[:-1])
    starters = np.flatnonzero(event)
    for block in np.array_split(starters, max(1, -(-starters.size // 1024))):  # bounds the memory of the pair table
        later = (time[block, None] < time) | ((time[block, None] == time) & ~event)
        pairs = later * pair_weight[block, None]  # (block, n)
        won = (risk[block, None] > risk) + 0.5 * (risk[block, None] == risk)
        comparable = comparable + (weights[..., block] * (weights @ pairs.T)).sum(axis=-1)
        concordant = concordant + (weights[..., block] * (weights @ (pairs * won).T)).sum(axis=-1)
    return ratio(concordant, comparable)

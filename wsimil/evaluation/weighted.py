"""Weighted means for metrics: weights (..., n), undefined results NaN."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["mean", "mean_of_defined", "ratio", "weights_of"]


def weights_of(weights: ArrayLike | None, n: int) -> np.ndarray:
    array = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] != n:
        raise ValueError(f"weights have shape {array.shape}; the last axis must be the {n} slides")
    return array


def ratio(numerator: ArrayLike, denominator: ArrayLike, *, otherwise: float = np.nan) -> np.ndarray:
    """numerator / denominator, and `otherwise` where there is nothing to divide by."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, dtype=np.float64), denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, otherwise), where=denominator > 0)


def mean(values: np.ndarray, weights: ArrayLike | None) -> np.ndarray:
    weights = weights_of(weights, values.size)
    return ratio(weights @ values, weights.sum(axis=-1))


def mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis, leaving NaN out; NaN where all are."""
    return ratio(np.nansum(values, axis=-1), (~np.isnan(values)).sum(axis=-1))

"""How sure a number is: resampled patients, corrected t over folds, DeLong, and what several tests cost.

- The unit is the patient: slides of one patient are drawn together, so ten slides of one person are not ten
  observations. Where folds kept groups of patients together, such as hospitals, it is the group.
- Folds share training data, so their plain standard error is too small; `corrected_t_interval` pays for that.
- A resample is a row of multiplicities, not a copied table: `statistic` gets weights (b, n) and returns (b, ...).
- Results depend on the seed and the set of patients' names, not on chunk size or free memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from wsimil.evaluation.binary import as_bool

__all__ = [
    "Interval",
    "bootstrap_p_value",
    "cluster_bootstrap",
    "corrected_t_interval",
    "delong",
    "delong_interval",
    "delong_test",
    "holm",
    "mcnemar_exact",
    "percentile_interval",
]

_CHUNK_VALUES = 1 << 21
"""Multiplicities held at once: 16 MB of them, so that the metrics' temporaries stay in the low hundreds of MB."""


@dataclass(frozen=True)
class Interval:
    """Lower and upper end; both NaN when there is no interval."""

    low: float
    high: float


def cluster_bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    clusters: ArrayLike,
    *,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """`statistic` of every resample, (n_bootstrap, ...): whole clusters (patients) are drawn with replacement.

    `clusters` (n,) names the patient of every row.
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    if names.size == 0 or n_bootstrap < 1:
        raise ValueError(f"{names.size} patients and {n_bootstrap} resamples: nothing to draw")
    rng = np.random.default_rng(seed)
    chunks = _resamples(rng, names.size, n_bootstrap, per_chunk=max(1, _CHUNK_VALUES // index.size))
    return np.concatenate([statistic(counts[:, index]) for counts in chunks])


def percentile_interval(replicates: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Percentile interval of bootstrap replicates (B,); undefined ones (NaN) are left out.

    No interval when fewer than half of the resamples are defined: what is left no longer stands for the sample.
    """
    defined = replicates[np.isfinite(replicates)]
    if 2 * defined.size < replicates.size or defined.size == 0:
        return Interval(np.nan, np.nan)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(defined, [tail, 1.0 - tail])
    return Interval(float(low), float(high))


def bootstrap_p_value(differences: np.ndarray) -> float:
    """Two-sided p of "no difference" from paired bootstrap differences (B,); never 0, since B resamples cannot show
    that.
    """
    defined = differences[np.isfinite(differences)]
    if 2 * defined.size < differences.size or defined.size == 0:
        return float("nan")
    smaller_side = min(np.count_nonzero(defined <= 0), np.count_nonzero(defined >= 0))
    return min(1.0, 2.0 * (smaller_side + 1.0) / (defined.size + 1.0))


def corrected_t_interval(values: ArrayLike, *, test_to_train: float, confidence: float = 0.95) -> Interval:
    """Interval of the mean over folds whose training sets overlap (Nadeau and Bengio 2003).

    The variance of the mean is taken as (1/J + test_to_train) s², not s²/J; `test_to_train` is slides tested over
    slides trained on in one fold, so 1/(K-1) in K-fold cross-validation. No interval for fewer than two folds.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size < 2 or not np.isfinite(values).all():
        return Interval(np.nan, np.nan)
    error = np.sqrt((1.0 / values.size + test_to_train) * values.var(ddof=1))
    margin = float(stats.t.ppf(0.5 + confidence / 2.0, values.size - 1) * error)
    return Interval(float(values.mean()) - margin, float(values.mean()) + margin)


def delong(label: ArrayLike, scores: ArrayLike, *, clusters: ArrayLike | None = None) -> tuple[np.ndarray, np.ndarray]:
    """AUROC (k,) of k scores of the same slides and their covariance (k, k); scores are (n,) or (n, k).

    With `clusters`, the variance of clustered ROC data (Obuchowski 1997), which is DeLong's (1988) when every slide is
    its own patient. NaN covariance when a class has fewer than two patients.
    """
    label = as_bool(label, "label")
    columns = np.asarray(scores, dtype=np.float64).reshape(label.size, -1)
    names = np.arange(label.size) if clusters is None else np.asarray(clusters)
    cluster = np.unique(names, return_inverse=True)[1]
    n_clusters = int(cluster.max(initial=-1)) + 1
    n_positive, n_negative = int(label.sum()), int((~label).sum())
    n_scores = columns.shape[1]
    if n_positive == 0 or n_negative == 0:
        return np.full(n_scores, np.nan), np.full((n_scores, n_scores), np.nan)

    # placement of a slide: the part of the other class that it stands on the right side of
    placement = np.empty_like(columns)
    for k, column in enumerate(columns.T):
        overall = stats.rankdata(column)
        placement[label, k] = (overall[label] - stats.rankdata(column[label])) / n_negative
        placement[~label, k] = 1.0 - (overall[~label] - stats.rankdata(column[~label])) / n_positive
    area = placement[label].mean(axis=0)

    deviation = placement - area
    sums = []
    for member in (label, ~label):
        total = np.zeros((n_clusters, n_scores))
        np.add.at(total, cluster[member], deviation[member])
        sums.append(total)
    holding = [np.unique(cluster[member]).size for member in (label, ~label)]
    if min(holding) < 2:
        return area, np.full((n_scores, n_scores), np.nan)
    covariance = np.zeros((n_scores, n_scores))
    for total, n_holding, n_slides in zip(sums, holding, (n_positive, n_negative), strict=True):
        covariance += n_holding / (n_holding - 1) * total.T @ total / n_slides**2
    crossed = sums[0].T @ sums[1]
    covariance += n_clusters / (n_clusters - 1) * (crossed + crossed.T) / (n_positive * n_negative)
    return area, covariance


def delong_interval(label: ArrayLike, score: ArrayLike, *, clusters: ArrayLike | None = None, confidence: float = 0.95) -> Interval:
    """DeLong interval of one AUROC, on the logit scale so that it stays within 0-1; none for an AUROC of 0 or 1."""
    area, covariance = delong(label, score, clusters=clusters)
    area, variance = float(area[0]), float(covariance[0, 0])
    if not np.isfinite(variance) or not 0.0 < area < 1.0:
        return Interval(np.nan, np.nan)
    margin = stats.norm.ppf(0.5 + confidence / 2.0) * np.sqrt(max(variance, 0.0)) / (area * (1.0 - area))
    centre = np.log(area / (1.0 - area))
    low, high = 1.0 / (1.0 + np.exp(-(centre + np.array([-margin, margin]))))
    return Interval(float(low), float(high))


def delong_test(
    label: ArrayLike, score_a: ArrayLike, score_b: ArrayLike, *, clusters: ArrayLike | None = None
) -> tuple[float, float]:
    """AUROC of a minus AUROC of b on the same slides, and the two-sided p of "no difference"; p is NaN if it has no
    variance.
    """
    area, covariance = delong(label, np.stack([np.asarray(score_a), np.asarray(score_b)], axis=1), clusters=clusters)
    difference = float(area[0] - area[1])
    if difference == 0.0:
        return difference, 1.0
    variance = float(covariance[0, 0] + covariance[1, 1] - 2.0 * covariance[0, 1])
    if not variance > 0.0:
        return difference, float("nan")
    return difference, float(2.0 * stats.norm.sf(abs(difference) / np.sqrt(variance)))


def mcnemar_exact(correct_a: ArrayLike, correct_b: ArrayLike) -> float:
    """Two-sided exact p that two classifiers, right or wrong on the same slides, are equally often right.

    Takes the slides as independent: with several slides per patient, prefer the paired bootstrap.
    """
    correct_a, correct_b = as_bool(correct_a, "correct_a"), as_bool(correct_b, "correct_b")
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((~correct_a & correct_b).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979), in the order given: below .05 means significant though all were tried. NaN stays
    NaN.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.size, np.nan)
    order = [index for index in np.argsort(p, kind="stable") if not np.isnan(p[index])]
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p[index]))
        adjusted[index] = highest
    return adjusted.tolist()


def _resamples(rng: np.random.Generator, n: int, n_bootstrap: int, *, per_chunk: int) -> Iterator[np.ndarray]:
    """Multiplicities (b, n), each row summing to n."""
    for start in range(0, n_bootstrap, per_chunk):
        yield rng.multinomial(n, np.full(n, 1.0 / n), size=min(per_chunk, n_bootstrap - start)).astype(np.float64)

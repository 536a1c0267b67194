"""From a predictions table to numbers with intervals, and to the files that hold them.

- Three views, side by side: pooled out-of-fold slides (bootstrap of patients, or groups of them), every fold, and the mean over
  folds with the interval corrected for overlapping training sets. Pooling compares scores of different models, so the
  two can differ: both are shown.
- With several seeds a pooled number is the mean of each seed's, its bootstrap draws the same patients for all, and
  `seed_sd` stands beside it.
- New slides (fold `ensemble`) are never mixed with out-of-fold ones.
- A number that cannot be computed is null, and `notes` says why under the path of that number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wsimil.errors import UsageError
from wsimil.evaluation import metrics, plots
from wsimil.evaluation.intervals import (
    Interval,
    bootstrap_p_value,
    cluster_bootstrap,
    corrected_t_interval,
    delong_test,
    mcnemar_exact,
    percentile_interval,
)
from wsimil.evaluation.survival import survival_metrics
from wsimil.evaluation.table import ENSEMBLE, Predictions, check_predictions
from wsimil.files import make_output_folder, write_json

__all__ = ["compare_predictions", "evaluate_predictions", "write_evaluation"]

_NO_BOOTSTRAP = {"ece": "resampling itself adds to a mean absolute gap, so bootstrap intervals of ece lie too high"}


def evaluate_predictions(
    predictions: pd.DataFrame,
    *,
    labels: pd.DataFrame | None = None,
    kind: str | None = None,
    classes: Sequence[str] | None = None,
    positive: str | None = None,
    n_bootstrap: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Every metric of a predictions table, ready for JSON.

    Args:
        predictions: one row per slide and testing fold; see `read_predictions`.
        labels: slide_id, label (survival: time, event) and optional patient and group; instead of the predictions' own.
        kind, classes, positive: None is read from the columns, `prob_<negative>` before `prob_<positive>`.
        n_bootstrap: resamples of patients, or groups; 0 for no intervals.

    Returns: n_slides, n_evaluated, n_empty, n_failed, n_without_label, …; `pooled`: {"metrics": {name: {value, low,
    high}}, …}; `folds`: {fold: {"metrics": {name: value}}}; `fold_mean`: {name: {value, sd, low, high, n_folds}};
    `ensemble`: as pooled, when both kinds of slide are in the table; `notes`.
    """
    checked = check_predictions(predictions, labels=labels, kind=kind, classes=classes, positive=positive)
    return _evaluate(checked, n_bootstrap=n_bootstrap, seed=seed, confidence=confidence)


def write_evaluation(
    folder: str | os.PathLike[str],
    predictions: pd.DataFrame,
    *,
    labels: pd.DataFrame | None = None,
    kind: str | None = None,
    classes: Sequence[str] | None = None,
    positive: str | None = None,
    n_bootstrap: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """`evaluate_predictions` into `folder`: metrics.json and the plots that the data allow; returns what metrics.json
    holds.

    Raises:
        UsageError, LabelsError: as `check_predictions` does; a file is where `folder` is to be.
    """
    checked = check_predictions(predictions, labels=labels, kind=kind, classes=classes, positive=positive)
    result = _evaluate(checked, n_bootstrap=n_bootstrap, seed=seed, confidence=confidence)
    folder = Path(folder)
    make_output_folder(folder)
    (folder / "metrics.json").unlink(missing_ok=True)  # written last: a folder that holds one is complete
    result["plots"] = plots.write_plots(folder, _pooled_rows(checked), n_bootstrap=n_bootstrap, seed=seed, confidence=confidence)
    write_json(folder / "metrics.json", result)
    return result


def compare_predictions(
    predictions_a: pd.DataFrame,
    predictions_b: pd.DataFrame,
    *,
    labels: pd.DataFrame | None = None,
    kind: str | None = None,
    classes: Sequence[str] | None = None,
    positive: str | None = None,
    n_bootstrap: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Difference a - b of every metric on the slides (and folds) that both predicted, from a paired bootstrap over
    patients.

    `difference_detected` is whether the interval leaves out 0; it does not pay for the number of metrics looked at, nor
    of methods: take one metric, and `holm` over its p-values. Binary: also `delong_p` for AUROC and `mcnemar_p` for
    accuracy.
    """
    both = [
        check_predictions(table, labels=labels, kind=kind, classes=classes, positive=positive)
        for table in (predictions_a, predictions_b)
    ]
    if (both[0].kind, both[0].classes) != (both[1].kind, both[1].classes):
        raise UsageError(
            f"the two tables predict different things: {both[0].kind} {', '.join(both[0].classes)}"
            f" and {both[1].kind} {', '.join(both[1].classes)}"
        )
    keys = [pd.MultiIndex.from_arrays([rows.slide_id, rows.fold, rows.seed]) for rows in both]
    common = keys[0].intersection(keys[1]).sort_values()
    if len(common) == 0:
        raise UsageError("no slide is predicted by the same fold (and seed) in both tables; they need the same splits")
    a, b = (rows.take(key.get_indexer(common)) for rows, key in zip(both, keys, strict=True))
    differs = (a.event != b.event) | _differs(a.label, b.label)
    if differs.any():
        slide = a.slide_id[np.argmax(differs)]
        raise UsageError(f"slide {slide} has different labels in the two tables; pass the labels table")

    value_a, value_b = _values(a), _values(b)
    names = list(value_a)
    replicates = _replicates(
        lambda weights: np.stack(list(_values(a, weights).values()), axis=-1)
        - np.stack(list(_values(b, weights).values()), axis=-1),
        a.group, len(names), n_bootstrap=n_bootstrap, seed=seed,
    )  # fmt: skip
    found = {f"leak.encoder.{one}": rows.notes.get("leak.encoder", "") for one, rows in (("a", a), ("b", b))}
    notes = {path: text for path, text in found.items() if text}
    compared: dict[str, Any] = {}
    for column, name in enumerate(names):
        interval, reason = _interval(replicates[:, column], name, confidence)
        if np.isnan(value_a[name] - value_b[name]):
            reason = _why_undefined(a, name)
        if reason:
            notes[f"metrics.{name}"] = reason
        compared[name] = {
            "a": float(value_a[name]),
            "b": float(value_b[name]),
            "difference": float(value_a[name] - value_b[name]),
            "low": interval.low,
            "high": interval.high,
            "p": np.nan if name in _NO_BOOTSTRAP else bootstrap_p_value(replicates[:, column]),
            "difference_detected": None if np.isnan(interval.low) else interval.low > 0.0 or interval.high < 0.0,
        }
    result: dict[str, Any] = {
        "kind": a.kind,
        **_sizes(a),
        "n_only_a": len(both[0]) - len(a),
        "n_only_b": len(both[1]) - len(b),
        "n_bootstrap": n_bootstrap,
        "bootstrap_seed": seed,
        "confidence": confidence,
        "metrics": compared,
    }
    if a.kind == "binary":
        if _n(a.slide_id) == len(a):
            result["delong_p"] = delong_test(a.label == 1, a.score[:, 1], b.score[:, 1], clusters=a.group)[1]
            if _n(a.group) == len(a):
                result["mcnemar_p"] = mcnemar_exact(a.predicted == a.label, b.predicted == b.label)
            else:
                notes["mcnemar_p"] = (
                    "slides of one patient err together, and the test counts each by itself: use the paired bootstrap"
                )
        else:
            notes["delong_p"] = "slides are predicted more than once (folds or seeds): use the paired bootstrap"
    return _json_safe({**result, "notes": notes})


def _evaluate(rows: Predictions, *, n_bootstrap: int, seed: int, confidence: float) -> dict[str, Any]:
    notes = dict(rows.notes)
    result: dict[str, Any] = {"kind": rows.kind, "classes": list(rows.classes)}
    if rows.kind == "binary":
        result["positive"] = rows.classes[1]
    result |= {**rows.counts, "n_bootstrap": n_bootstrap, "bootstrap_seed": seed, "confidence": confidence}

    new = rows.fold == ENSEMBLE
    _note_leaks(rows, notes)
    pooled = _pooled_rows(rows)
    view: dict[str, Any] = {"n_bootstrap": n_bootstrap, "seed": seed, "confidence": confidence, "notes": notes}
    result["pooled"] = {
        "source": "ensemble" if new.all() and len(rows) else "out-of-fold",
        **_pooled_view(pooled, "pooled", **view),
    }
    folds = {} if new.all() else {fold: pooled.take(pooled.fold == fold) for fold in pooled.folds}
    result["folds"] = {fold: _fold_view(part, f"folds.{fold}", notes) for fold, part in folds.items()}
    result["fold_mean"] = _fold_mean(pooled, folds, confidence, notes) if len(folds) > 1 else None
    if len(folds) < 2:
        notes["fold_mean"] = "a mean over folds needs at least two"
    if new.any() and not new.all():
        result["ensemble"] = {"source": "ensemble", **_pooled_view(rows.take(new), "ensemble", **view)}
    result["notes"] = notes
    return _json_safe(result)


def _pooled_rows(rows: Predictions) -> Predictions:
    """Out-of-fold rows where there are any, else the ensemble's."""
    new = rows.fold == ENSEMBLE
    return rows if new.all() else rows.take(~new)


def _pooled_view(
    rows: Predictions, path: str, *, n_bootstrap: int, seed: int, confidence: float, notes: dict[str, str]
) -> dict[str, Any]:
    values = _values(rows)
    names = list(values)
    replicates = _replicates(
        lambda weights: np.stack(list(_values(rows, weights).values()), axis=-1),
        rows.group, len(names), n_bootstrap=n_bootstrap, seed=seed,
    )  # fmt: skip
    seeds = rows.seeds
    by_seed = [_measure(rows.take(rows.seed == one)) for one in seeds]
    entries: dict[str, Any] = {}
    for column, name in enumerate(names):
        interval, reason = _interval(replicates[:, column], name, confidence)
        if np.isnan(values[name]):
            reason = _why_undefined(rows, name)
        if reason:
            notes[f"{path}.{name}"] = reason
        entry = {"value": float(values[name]), "low": interval.low, "high": interval.high}
        if len(seeds) > 1:
            entry["seed_sd"] = float(np.std([one[name] for one in by_seed], ddof=1))
        entries[name] = entry
    view: dict[str, Any] = {**_sizes(rows), "metrics": entries}
    if len(seeds) > 1:
        view["n_seeds"] = len(seeds)
    if rows.kind == "multilabel":
        known = ~np.isnan(rows.label)
        view["n_per_class"] = {name: _n(rows.slide_id[rows.label[:, index] == 1]) for index, name in enumerate(rows.classes)}
        view["n_known"] = {name: _n(rows.slide_id[known[:, index]]) for index, name in enumerate(rows.classes)}
    elif rows.classes:
        table = metrics.confusion_matrix(rows.label, rows.predicted, n_classes=len(rows.classes))
        view["n_per_class"] = {name: _n(rows.slide_id[rows.label == index]) for index, name in enumerate(rows.classes)}
        view["confusion"] = table.astype(int).tolist()  # rows: true class, columns: predicted; summed over seeds
    if rows.kind == "survival":
        view["n_events"] = _n(rows.slide_id[rows.event])
    return view


def _fold_view(rows: Predictions, path: str, notes: dict[str, str]) -> dict[str, Any]:
    values = {name: float(value) for name, value in _values(rows).items()}
    for name, value in values.items():
        if np.isnan(value):
            notes[f"{path}.{name}"] = _why_undefined(rows, name)
    view: dict[str, Any] = {**_sizes(rows), "metrics": values}
    thresholds = np.unique(rows.threshold[~np.isnan(rows.threshold)])
    if rows.kind == "binary":
        view["thresholds"] = thresholds.tolist()
    return view


def _fold_mean(rows: Predictions, folds: dict[str, Predictions], confidence: float, notes: dict[str, str]) -> dict[str, Any]:
    n_total = _n(rows.slide_id)
    tested = np.array([_n(part.slide_id) for part in folds.values()])
    if tested.mean() > n_total / 2:  # the folds tested the same slides, but perhaps a few: they were all trained elsewhere
        test_to_train = 0.0
        same = "every fold tested the same slides" if (tested == n_total).all() else "folds tested mostly the same slides"
        notes["fold_mean"] = f"{same}: the interval is about training, not the choice of slides"
    else:
        # what a fold did not test it may train on; part of that is validation, which the table does not show
        test_to_train = float(np.mean(tested / np.maximum(n_total - tested, 1)))
    per_fold = [_values(part) for part in folds.values()]
    means: dict[str, Any] = {}
    for name in per_fold[0]:
        values = np.array([float(one[name]) for one in per_fold])
        defined = values[np.isfinite(values)]
        entry: dict[str, Any] = {"value": np.nan, "sd": np.nan, "low": np.nan, "high": np.nan, "n_folds": defined.size}
        if defined.size < values.size:
            notes[f"fold_mean.{name}"] = f"defined in {defined.size} of {values.size} folds"
        if defined.size:
            entry["value"] = float(defined.mean())
        if defined.size > 1:
            interval = corrected_t_interval(defined, test_to_train=test_to_train, confidence=confidence)
            low, high = _range(name)
            entry |= {"sd": float(defined.std(ddof=1)), "low": max(interval.low, low), "high": min(interval.high, high)}
        means[name] = entry
    return means


def _values(rows: Predictions, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Every metric, as the mean over seeds of each seed's; weights (..., n)."""
    seeds = rows.seeds
    if len(seeds) < 2:
        return _measure(rows, weights)
    parts = [np.flatnonzero(rows.seed == one) for one in seeds]
    each = [_measure(rows.take(part), None if weights is None else weights[..., part]) for part in parts]
    return {name: np.mean([one[name] for one in each], axis=0) for name in each[0]}


def _measure(rows: Predictions, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    if rows.kind == "binary":
        return metrics.binary_metrics(rows.label, rows.score[:, 1], rows.predicted, weights)
    if rows.kind == "multilabel":
        return metrics.multilabel_metrics(rows.label, rows.score, rows.predicted, weights, classes=rows.classes)
    if rows.kind in ("regression", "proportion"):
        return metrics.regression_metrics(rows.label, rows.score, weights)
    if rows.kind == "survival":
        chances = rows.survival if rows.survival.shape[1] else None
        return survival_metrics(rows.label, rows.event, rows.score, weights, survival=chances, horizons=rows.horizons)
    ordered = rows.kind == "ordinal" or all(name.isdigit() for name in rows.classes)  # grades, as 0-5
    return metrics.multiclass_metrics(rows.label, rows.score, rows.predicted, weights, classes=rows.classes, ordered=ordered)


def _replicates(
    statistic: Callable[[np.ndarray], np.ndarray], groups: np.ndarray, n_metrics: int, *, n_bootstrap: int, seed: int
) -> np.ndarray:
    """(B, metrics), or no rows where there is nothing to resample."""
    if n_bootstrap < 1 or _n(groups) < 2:
        return np.zeros((0, n_metrics))
    return cluster_bootstrap(statistic, groups, n_bootstrap=n_bootstrap, seed=seed)


def _interval(replicates: np.ndarray, name: str, confidence: float) -> tuple[Interval, str | None]:
    """The interval, and why it is missing or means less than it seems."""
    none = Interval(np.nan, np.nan)
    if name in _NO_BOOTSTRAP:
        return none, f"no interval: {_NO_BOOTSTRAP[name]}"
    if replicates.size == 0:
        return none, "no interval: fewer than two patients (or groups), or no resamples asked for"
    interval = percentile_interval(replicates, confidence=confidence)
    if np.isnan(interval.low):
        defined = int(np.isfinite(replicates).sum())
        return none, f"no interval: defined in {defined} of {replicates.size} resamples of the patients (or groups)"
    if interval.low == interval.high:
        return interval, "every resample gives the same number: too few or too easy slides for a meaningful interval"
    return interval, None


def _why_undefined(rows: Predictions, name: str) -> str:
    n = _n(rows.slide_id)
    if n == 0:
        return "no slide to evaluate"
    if rows.kind == "multilabel":
        named = [one for one in rows.classes if name in (f"auroc_{one}", f"auprc_{one}", f"f1_{one}")]
        return f"the slides where {named[0]} is known are all alike" if named else "no label is known with both 0 and 1"
    if rows.classes:
        present = [rows.classes[index] for index in np.unique(rows.label)]
        named = next((one for one in rows.classes if name in (f"auroc_{one}", f"recall_{one}")), None)
        if named is not None and named not in present:
            return f"no slide is {named}"
        return f"all {n} slides are {present[0]}" if len(present) == 1 else "not defined for these predictions"
    if rows.kind == "survival" and name.startswith(("auroc", "integrated")):
        return f"too few of {n} slides have the event before a horizon, or live beyond it"
    if rows.kind == "survival":
        return f"no two of {n} slides have a known order of events"
    n_labels, n_values = np.unique(rows.label).size, np.unique(rows.score).size
    return f"{n} slides with {n_labels} different labels and {n_values} different predictions"


def _sizes(rows: Predictions) -> dict[str, int]:
    """How many slides, patients and, where they are something else, groups."""
    grouped = (rows.group != rows.patient).any()
    return {
        "n_slides": _n(rows.slide_id),
        "n_patients": _n(rows.patient),
        **({"n_groups": _n(rows.group)} if grouped else {}),
    }


def _differs(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(n,) whether the labels of a row differ; what both do not know is the same."""
    same = (one == other) | (np.isnan(one.astype(np.float64)) & np.isnan(other.astype(np.float64)))
    return ~same.reshape(len(one), -1).all(axis=1)


def _note_leaks(rows: Predictions, notes: dict[str, str]) -> None:
    """What the table itself shows about training slides among the evaluated ones."""
    new = rows.fold == ENSEMBLE
    both = np.intersect1d(rows.slide_id[new], rows.slide_id[~new])
    if both.size:
        raise UsageError(
            f"slide {both[0]} is predicted by its own fold and by the ensemble, which was trained on it;"
            f" leave out the ensemble's row ({both.size} such slides)"
        )
    shared = np.intersect1d(rows.patient[new], rows.patient[~new])
    if shared.size:
        notes["leak.ensemble"] = f"{shared.size} patients of the new slides are in the folds: the ensemble has seen them"
    # a patient with different slides in different folds was trained on in one and tested in the other
    tested: dict[str, dict[str, set[str]]] = {}
    for patient, fold, slide in zip(rows.patient[~new], rows.fold[~new], rows.slide_id[~new], strict=True):
        tested.setdefault(patient, {}).setdefault(fold, set()).add(slide)
    split = sum(len({frozenset(slides) for slides in folds.values()}) > 1 for folds in tested.values())
    if split:
        notes["leak.folds"] = f"{split} patients have different slides in different folds: not split by patient"


def _range(name: str) -> tuple[float, float]:
    """The values a metric can take, so that a t interval does not promise an AUROC of 1.03."""
    if name in ("nll", "mae", "brier", "mae_steps", "integrated_brier"):
        return 0.0, np.inf
    if name == "r2":
        return -np.inf, 1.0
    if name in ("spearman", "quadratic_kappa") or name.startswith("mcc"):
        return -1.0, 1.0
    return 0.0, 1.0


def _n(names: np.ndarray) -> int:
    return int(np.unique(names).size)


def _json_safe(value: Any) -> Any:
    """Plain Python; NaN and infinity are None."""
    if isinstance(value, dict):
        return {str(key): _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value

"""Pictures of an evaluation: ROC with its band, precision-recall, reliability, confusion, scatter, survival curves.

- Figures are made as objects and drawn by Agg: no display, no pyplot, no global state; matplotlib is imported when a
  plot is drawn.
- A plot that the data do not allow (one class, no slide) is not drawn; `write_plots` returns the names of those it
  wrote.
- With several seeds the plots show the first one: curves of different models on the same slides do not add up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wsimil.evaluation.calibration import reliability_curve
from wsimil.evaluation.intervals import cluster_bootstrap, percentile_interval
from wsimil.evaluation.metrics import auroc, average_precision, confusion_matrix, roc_points
from wsimil.evaluation.survival import kaplan_meier
from wsimil.evaluation.table import Predictions
from wsimil.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["write_plots"]

_INK, _REFERENCE, _GRID = "#2b2f36", "#b4bac2", "#e4e7eb"
_COLOURS = ("#2563a8", "#d1495b", "#2a9d6f", "#e09f3e", "#7b5ea7", "#5c6b73", "#c26a9b", "#3aa6b9")


def write_plots(folder: Path, rows: Predictions, *, n_bootstrap: int = 2000, seed: int = 0, confidence: float = 0.95) -> list[str]:
    """Draw what fits the task into `folder`, remove plots of an earlier evaluation, and return the names of those drawn."""
    drawers: dict[str, Callable[[Predictions, str], Figure | None]] = {
        "roc.png": lambda one, amount: _roc(one, amount, n_bootstrap, seed, confidence),
        "pr.png": _precision_recall,
        "reliability.png": _reliability,
        "confusion.png": _confusion,
        "scatter.png": _scatter,
        "survival.png": _survival,
    }
    one_seed = rows.take(rows.seed == rows.seeds[0]) if len(rows) else rows
    written = []
    for name, draw in drawers.items():
        figure = draw(one_seed, _amount(rows)) if len(rows) else None
        if figure is None:
            (folder / name).unlink(missing_ok=True)
            continue
        with atomic_path(folder / name) as path:
            figure.savefig(path, format="png", metadata={"Software": None})
        written.append(name)
    return written


def _roc(rows: Predictions, amount: str, n_bootstrap: int, seed: int, confidence: float) -> Figure | None:
    curves = _one_vs_rest(rows)
    if not curves:
        return None
    figure, axes = _axes("False positive rate (1 - specificity)", "True positive rate (sensitivity)", square=True)
    axes.plot([0, 1], [0, 1], color=_REFERENCE, linewidth=1.2, zorder=1)
    for colour, (name, label, score) in zip(_cycle(len(curves)), curves, strict=True):
        false_rate, true_rate = roc_points(label, score)
        text = f"{float(auroc(label, score)):.3f}"
        if len(curves) == 1 and rows.kind != "multilabel" and n_bootstrap > 1 and np.unique(rows.group).size > 1:
            grid = np.linspace(0.0, 1.0, 101)
            replicates = _roc_replicates(label, score, rows.group, grid, n_bootstrap=n_bootstrap, seed=seed)
            tail = (1.0 - confidence) / 2.0
            defined = replicates[np.isfinite(replicates).all(axis=1), :-1]
            band = np.quantile(defined, [tail, 1.0 - tail], axis=0) if len(defined) else np.full((2, grid.size), np.nan)
            axes.fill_between(grid, band[0], band[1], color=colour, alpha=0.15, linewidth=0, zorder=2)
            interval = percentile_interval(replicates[:, -1], confidence=confidence)
            if interval.low < interval.high:  # neither missing nor of no width
                text += f" ({interval.low:.3f}-{interval.high:.3f})"
        axes.plot(false_rate, true_rate, color=colour, linewidth=2, label=f"AUROC {text}{_named(name, curves)}", zorder=3)
    return _finished(figure, axes, f"ROC, {amount}", legend="lower right")


def _roc_replicates(
    label: np.ndarray, score: np.ndarray, patients: np.ndarray, grid: np.ndarray, *, n_bootstrap: int, seed: int
) -> np.ndarray:
    """Sensitivity at every false positive rate of `grid`, then the AUROC, of every resample: (B, grid + 1)."""

    def curve_and_area(weights: np.ndarray) -> np.ndarray:
        false_rate, true_rate = roc_points(label, score, weights)
        curves = [np.interp(grid, x, y) for x, y in zip(false_rate, true_rate, strict=True)]
        return np.column_stack([curves, auroc(label, score, weights)])

    return cluster_bootstrap(curve_and_area, patients, n_bootstrap=n_bootstrap, seed=seed)


def _precision_recall(rows: Predictions, amount: str) -> Figure | None:
    curves = _one_vs_rest(rows)
    if not curves:
        return None
    figure, axes = _axes("Recall (sensitivity)", "Precision", square=True)
    for colour, (name, label, score) in zip(_cycle(len(curves)), curves, strict=True):
        false_rate, true_rate = roc_points(label, score)
        true, false = true_rate[1:] * label.sum(), false_rate[1:] * (~label).sum()
        precision = true / (true + false)
        text = f"AUPRC {float(average_precision(label, score)):.3f}{_named(name, curves)}"
        axes.step(
            np.concatenate([[0.0], true_rate[1:]]), np.concatenate([precision[:1], precision]),
            where="pre", color=colour, linewidth=2, label=text,
        )  # fmt: skip
        axes.axhline(label.mean(), color=colour, linewidth=1, linestyle=(0, (2, 3)))  # what guessing reaches
    return _finished(figure, axes, f"Precision-recall, {amount}", legend="lower left")


def _reliability(rows: Predictions, amount: str) -> Figure | None:
    if not rows.classes or rows.kind == "multilabel":
        return None
    if rows.kind == "binary":
        outcome, probability = rows.label == 1, rows.score[:, 1]
        x, y = f"Predicted probability of {rows.classes[1]}", "Observed frequency"
    else:
        outcome, probability = rows.score.argmax(axis=1) == rows.label, rows.score.max(axis=1)
        x, y = "Confidence in the likeliest class", "Part that is right"
    curve = reliability_curve(outcome, probability)
    figure, axes = _axes(x, y, square=True)
    axes.plot([0, 1], [0, 1], color=_REFERENCE, linewidth=1.2, zorder=1)
    errors = np.stack([curve.frequency - curve.low, curve.high - curve.frequency])
    axes.errorbar(
        curve.probability, curve.frequency, yerr=errors,
        fmt="o-", color=_COLOURS[0], ecolor="#a9c3de", elinewidth=1.5, linewidth=1.5, markersize=5, zorder=3,
    )  # fmt: skip
    return _finished(figure, axes, f"Reliability, {amount}")


def _confusion(rows: Predictions, amount: str) -> Figure | None:
    if not rows.classes or rows.kind == "multilabel":
        return None
    n_classes = len(rows.classes)
    table = confusion_matrix(rows.label, rows.predicted, n_classes=n_classes)
    part = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    figure, axes = _axes("Predicted", "True", side_inches=max(4.6, 1.6 + 0.55 * n_classes))
    axes.imshow(part, cmap="Blues", vmin=0, vmax=1)
    axes.grid(visible=False)
    for row in range(n_classes):
        for column in range(n_classes):
            share = f"\n{part[row, column]:.0%}" if n_classes <= 8 else ""
            axes.text(
                column, row, f"{table[row, column]:.0f}{share}",
                ha="center", va="center", fontsize=9, color="white" if part[row, column] > 0.55 else _INK,
            )  # fmt: skip
    names = [_plain(name) for name in rows.classes]
    tilt: dict[str, Any] = {"rotation": 45, "ha": "right"} if max(map(len, names)) > 8 or n_classes > 5 else {}
    axes.set_xticks(range(n_classes), names, **tilt)
    axes.set_yticks(range(n_classes), names)
    return _finished(figure, axes, f"Confusion, {amount}")


def _scatter(rows: Predictions, amount: str) -> Figure | None:
    if rows.kind not in ("regression", "proportion"):
        return None
    figure, axes = _axes("True value", "Predicted value", square=False)
    both = np.concatenate([rows.label, rows.score])
    ends = [float(both.min()), float(both.max())]
    axes.plot(ends, ends, color=_REFERENCE, linewidth=1.2, zorder=1)
    axes.scatter(rows.label, rows.score, s=22, color=_COLOURS[0], alpha=0.6, linewidths=0, zorder=3)
    return _finished(figure, axes, f"Predicted and true, {amount}")


def _survival(rows: Predictions, amount: str) -> Figure | None:
    if rows.kind != "survival":
        return None
    figure, axes = _axes("Time", "Part without the event", square=False)
    high = rows.score > np.median(rows.score)
    for colour, group, name in ((_COLOURS[0], ~high, "risk up to the median"), (_COLOURS[1], high, "risk above it")):
        if group.any():
            times, without = kaplan_meier(rows.label[group], rows.event[group])
            axes.step(
                np.concatenate([[0.0], times]), np.concatenate([[1.0], without]),
                where="post", color=colour, linewidth=2, label=f"{name} (n = {int(group.sum())})",
            )  # fmt: skip
    axes.set_ylim(0, 1.02)
    return _finished(figure, axes, f"Kaplan-Meier by predicted risk, {amount}", legend="upper right")


def _one_vs_rest(rows: Predictions) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(name, label (n,) bool, score (n,)) of every class that has slides on both sides; of two classes, the positive
    one.
    """
    if rows.kind == "multilabel":
        parts = [(name, ~np.isnan(rows.label[:, index]), index) for index, name in enumerate(rows.classes)]
        labels = [(name, rows.label[known, index] == 1, rows.score[known, index]) for name, known, index in parts]
        return [(name, label, score) for name, label, score in labels if 0 < label.sum() < label.size]
    indices = [1] if rows.kind == "binary" else range(len(rows.classes))
    curves = [(rows.classes[index], rows.label == index, rows.score[:, index]) for index in indices]
    return [(name, label, score) for name, label, score in curves if 0 < label.sum() < label.size]


def _axes(x: str, y: str, *, square: bool = False, side_inches: float = 4.8) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(side_inches, side_inches), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(_plain(x), color=_INK)
    axes.set_ylabel(_plain(y), color=_INK)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa1aa")
    axes.tick_params(colors=_INK, labelsize=9, length=3)
    if square:
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    return figure, axes


def _finished(
    figure: Figure, axes: Axes, title: str, *, legend: Literal["lower left", "lower right", "upper right"] | None = None
) -> Figure:
    axes.set_title(_plain(title), loc="left", fontsize=10.5, fontweight="bold", color=_INK)
    if legend:
        axes.legend(loc=legend, frameon=False, fontsize=9, labelcolor=_INK)
    return figure


def _cycle(n: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(n)]


def _named(name: str, curves: list[Any]) -> str:
    return f"  {_plain(name)}" if len(curves) > 1 else ""


def _amount(rows: Predictions) -> str:
    n_slides, n_patients = np.unique(rows.slide_id).size, np.unique(rows.patient).size
    text = f"{n_slides} slides" if n_slides == n_patients else f"{n_slides} slides of {n_patients} patients"
    return text if len(rows.seeds) == 1 else f"{text}, seed {rows.seeds[0]}"


def _plain(text: str) -> str:
    """A class may be called `$x$`; that is a name, not mathematics."""
    return text.replace("$", r"\$")

"""What a label asks of a model: how many outputs, which loss, how an output becomes a prediction.

- Binary is one output with a logistic loss; its classes are (negative, positive). Multi-label is one such output per label.
- Regression is predicted on the training targets' scale (mean 0, deviation 1) and turned back on decoding; a proportion is the
  sigmoid of its output, times 100 where labels are percentages.
- Ordinal has K - 1 outputs, one per step up; survival has the hazards of K intervals (nll) or one log-hazard (cox).
- A label is text. Several facts of a slide are one text too: `ER=1;HER2=0` (what is not named is unknown; probabilities
  are written so as well), and for survival the time, with a `+` where the slide was lost sight of: `12.5+`.
- A task is plain data: it is written to `model.json` and read back. What it learns from training slides is in `fitted`.
- Torch is imported where a tensor is made, so that reading a label table does not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from wsimil.config import TrainConfig
from wsimil.errors import LabelsError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KINDS", "Task", "agreed", "facts_of", "facts_text", "survival_of", "survival_text"]

_CRITERIA = {
    "binary": ("cross_entropy",),
    "multiclass": ("cross_entropy",),
    "multilabel": ("cross_entropy",),
    "ordinal": ("corn",),
    "regression": ("mse", "huber"),
    "proportion": ("cross_entropy", "mse", "huber"),
    "survival": ("nll", "cox"),
}
"""Kind of task → the losses it knows; the first is the default."""

KINDS = tuple(_CRITERIA)

_MAX_POSITIVE_WEIGHT = 100.0
"""A label with one positive among thousands must not shout down all others."""

_MIN_EVENTS = 20
"""Validation events below which Cox's log-hazards are left as they are."""


@dataclass(frozen=True)
class Task:
    """A prediction problem.

    Attributes:
        kind: one of `KINDS`.
        classes: names in the order of the outputs; binary: (negative, positive); ordinal: from low to high; multi-label: the
            labels; empty for regression, proportion and survival.
        center, scale: of the targets of a regression, from the training slides; of a proportion the scale is 1 or 100; Cox: the
            center is the mean log-hazard of the validation slides, which is risk 0, the scale what theirs are shrunk by.
        criterion: the loss by name; empty is the kind's first.
        focal_gamma, label_smoothing: of the losses of binary, multi-class and multi-label tasks.
        positive_weights: multi-label: how often a positive counts, by label.
        intervals: survival with nll: upper ends of the K intervals.
        alpha: survival with nll: censored slides count 1 - alpha.
        horizons: survival: times at which the chance of being without the event is stated.
        baseline: survival with cox: cumulative hazard of an average slide at the horizons.
    """

    kind: str
    classes: tuple[str, ...] = ()
    center: float = 0.0
    scale: float = 1.0
    criterion: str = ""
    focal_gamma: float = 0.0
    label_smoothing: float = 0.0
    positive_weights: tuple[float, ...] = ()
    intervals: tuple[float, ...] = ()
    alpha: float = 0.0
    horizons: tuple[float, ...] = ()
    baseline: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in _CRITERIA:
            raise LabelsError(f"task {self.kind!r} is unknown; expected {', '.join(KINDS[:-1])} or {KINDS[-1]}")
        n_classes = len(self.classes)
        if self.kind == "binary" and n_classes != 2:
            raise LabelsError(f"a binary task has two classes, not {n_classes}: {', '.join(self.classes)}")
        if self.kind in ("multiclass", "ordinal") and n_classes < 2:
            named = {"multiclass": "a multi-class", "ordinal": "an ordinal"}[self.kind]
            raise LabelsError(f"{named} task has at least two classes, not {n_classes}")
        if self.kind == "multilabel" and n_classes < 1:
            raise LabelsError("a multi-label task has at least one label")
        known = _CRITERIA[self.kind]
        object.__setattr__(self, "criterion", self.criterion or known[0])
        if self.criterion not in known:
            raise LabelsError(f"loss {self.criterion!r} is not for a {self.kind} task; expected {' or '.join(known)}")
        if (self.focal_gamma or self.label_smoothing) and not self.has_classes:
            name = "focal_gamma" if self.focal_gamma else "label_smoothing"
            option = f"--{name.replace('_', '-')}"
            raise LabelsError(f"{name} is for binary, multi-class and multi-label tasks, not for {self.kind}; leave {option} out")

    # what it is

    @property
    def has_classes(self) -> bool:
        """Whether the outputs are logits of classes or labels."""
        return self.kind in ("binary", "multiclass", "multilabel")

    @property
    def has_values(self) -> bool:
        """Whether a prediction is one number in the label's unit."""
        return self.kind in ("regression", "proportion")

    @property
    def n_outputs(self) -> int:
        """C: the logits of a bag."""
        if self.kind in ("multiclass", "multilabel"):
            return len(self.classes)
        if self.kind == "ordinal":
            return len(self.classes) - 1
        return max(1, len(self.intervals))

    @property
    def output_names(self) -> tuple[str, ...]:
        """What each column of tile scores (`map_columns`) speaks for: of two classes, the positive one."""
        if self.kind == "binary":
            return self.classes[1:]
        if self.kind in ("ordinal", "survival"):
            return ("grade",) if self.kind == "ordinal" else ("risk",)
        return self.classes or ("value",)

    @property
    def contribution_unit(self) -> str:
        """What the contributions of tiles add up to, in words."""
        return {
            "regression": "in units of the label",
            "ordinal": "logit, mean of the steps",
            "survival": "log-hazard" if self.criterion == "cox" else "logit, mean of the intervals",
        }.get(self.kind, "logit")

    def map_columns(self, outputs: np.ndarray) -> np.ndarray:
        """Tile scores (N, C) of the outputs → (N, `output_names`): steps and intervals are one column, their mean.

        The mean of the steps' probabilities is the expected grade, 0 to 1.
        """
        return outputs.mean(axis=1, keepdims=True) if self.kind in ("ordinal", "survival") else outputs

    def hard_label(self, label: str) -> str:
        """A label for people and tables: of probabilities, the likeliest class (of equals the first)."""
        if self.kind not in ("binary", "multiclass") or label in self.classes or "=" not in label:
            return label
        facts = facts_of(label)
        return max(self.classes, key=lambda name: facts.get(name, 0.0))

    def strata(self, label: str) -> tuple[str, ...]:
        """What folds should balance: the class, every known label, or whether there was an event."""
        if self.kind == "multilabel":
            return tuple(label.split(";"))
        if self.kind == "survival":
            return ("event" if survival_of(label)[1] else "censored",)
        return (self.hard_label(label),)

    def describe(self, labels: Sequence[str]) -> str:
        """One line about the task and the cohort's labels, empty ones passed over."""
        labels = [label for label in labels if label]
        if self.has_values:
            unit = " (percentages)" if self.kind == "proportion" and self.scale == 100 else ""
            return f"task: {self.kind}{unit} of {len(labels)} slides"
        if self.kind == "survival":
            return f"task: survival of {len(labels)} slides, {sum(survival_of(label)[1] for label in labels)} with an event"
        if self.kind == "multilabel":
            facts = [facts_of(label) for label in labels]
            known = {name: [one[name] for one in facts if name in one] for name in self.classes}
            parts = [f"{name} ({sum(values):g} of {len(values)})" for name, values in known.items()]
            return f"task: multilabel: {', '.join(parts)}"
        hard = [self.hard_label(label) for label in labels]
        counted = ", ".join(f"{name} ({hard.count(name)})" for name in self.classes)
        soft = ", soft" if any(one != label for one, label in zip(hard, labels, strict=True)) else ""
        positive = f"; positive: {self.classes[-1]}" if self.kind == "binary" else ""
        return f"task: {self.kind}{soft}: {counted}{positive}"

    # learning

    def fitted(self, labels: Sequence[str], config: TrainConfig, *, validation: Sequence[str] = ()) -> Task:
        """The task as the training slides of a fold define it: scale, intervals, weights of positives, and the loss asked for.

        Raises:
            LabelsError: the loss or its settings are not for this task, or there is nothing to learn from: one class alone, or no
                event.
        """
        chosen = "" if config.loss == "auto" else config.loss
        task = replace(
            self,
            criterion=chosen,
            focal_gamma=config.focal_gamma,
            label_smoothing=config.label_smoothing,
            alpha=config.survival_alpha,
        )
        if task.kind != "survival" or task.criterion != "nll":
            for name in ("time_bins", "survival_alpha"):
                if getattr(config, name) != getattr(TrainConfig, name):
                    raise LabelsError(
                        f"{name} is for survival with the nll loss, not for {task.kind} with {task.criterion}; leave "
                        f"--{name.replace('_', '-')} out"
                    )
        if task.kind == "regression":
            values = np.array([float(label) for label in labels])
            if np.ptp(values) <= 1e-12 * np.abs(values).max():  # the deviation of equal numbers is rounding, not always 0
                raise LabelsError(
                    f"all {len(labels)} training slides have the value {labels[0]}: nothing to learn from; use splits with "
                    "several values in train"
                )
            return replace(task, center=float(values.mean()), scale=float(values.std()))
        if task.kind == "multilabel":
            facts = [facts_of(label) for label in labels]
            if unknown := [name for name in task.classes if not any(name in one for one in facts)]:
                raise LabelsError(
                    f"label {unknown[0]!r} is known of none of the {len(labels)} training slides: nothing to learn from; leave it "
                    "out of the targets, or use splits with such slides in train"
                )
            if config.balance and config.sampling != "balanced":  # both would pay twice
                return replace(task, positive_weights=tuple(_positive_weight(facts, name) for name in task.classes))
            return task
        if task.kind in ("binary", "multiclass", "ordinal") and len(task.encode(labels).unique(dim=0)) == 1:
            raise LabelsError(
                f"all {len(labels)} training slides are {task.hard_label(labels[0])}: nothing to learn from; use splits with "
                "two classes or more in train"
            )
        if task.kind == "survival":
            return _with_intervals(task, labels, validation, config.time_bins)
        return task

    def encode(self, labels: Sequence[Any]) -> Tensor:
        """Labels → targets: float 0-1 (B,) (binary), int64 class (B,) (multi-class, ordinal), float on the training scale (B,)
        (regression, proportion), float with NaN where unknown (B, L) (multi-label), time and event (B, 2) (survival);
        multi-class labels that are probabilities: (B, C).
        """
        import torch

        if self.kind == "regression":
            values = torch.tensor([float(label) for label in labels], dtype=torch.float64)
            return ((values - self.center) / self.scale).float()
        if self.kind == "proportion":
            return torch.tensor([float(label) for label in labels]) / self.scale
        if self.kind == "survival":
            return torch.tensor([survival_of(str(label)) for label in labels], dtype=torch.float32).reshape(-1, 2)
        if self.kind == "multilabel":
            rows = [self._row(facts_of(str(label)), math.nan) for label in labels]
            return torch.tensor(rows, dtype=torch.float32).reshape(-1, len(self.classes))
        names = [str(label) for label in labels]
        soft = {name: facts_of(name) for name in names if name not in self.classes and "=" in name}
        unknown = sorted(set(names) - set(self.classes) - set(soft))
        if unknown:
            raise LabelsError(f"label {unknown[0]!r} is not one of the classes {', '.join(self.classes)}")
        if soft and self.kind != "ordinal":
            rows = torch.tensor([self._row(soft.get(name, {name: 1.0}), 0.0) for name in names])
            return rows[:, 1] if self.kind == "binary" else rows
        indices = torch.tensor([self.classes.index(name) for name in names])
        return indices.float() if self.kind == "binary" else indices

    def _row(self, facts: Mapping[str, float], otherwise: float) -> list[float]:
        unknown = sorted(set(facts) - set(self.classes))
        if unknown:
            raise LabelsError(f"label {unknown[0]!r} is not one of {', '.join(self.classes)}")
        return [facts.get(name, otherwise) for name in self.classes]

    def slide_weights(self, targets: Tensor, training: Tensor) -> Tensor | None:
        """Weights (B,) that make the classes of the training targets count the same; their mean over those is 1.

        None where there are no classes to balance: multi-label tasks weigh positives inside the loss.
        """
        if self.kind not in ("binary", "multiclass", "ordinal"):
            return None
        counts = self._shares(training).sum(0)
        per_class = len(training) / ((counts > 0).sum() * counts.where(counts > 0, 1))  # one that training lacks: as one slide
        return self._shares(targets) @ per_class

    def likeliest(self, targets: Tensor) -> Tensor:
        """Targets of a binary, multi-class or ordinal task → the class (B,) int64 that each says most of (of equals the first)."""
        return self._shares(targets).argmax(1)

    def _shares(self, targets: Tensor) -> Tensor:
        """Targets as shares of each class, (B, classes)."""
        import torch

        if self.kind == "binary":
            return torch.stack([1 - targets, targets], 1)
        if targets.ndim == 2:
            return targets
        return torch.nn.functional.one_hot(targets, len(self.classes)).float()

    @property
    def compares_slides(self) -> bool:
        """Whether the loss of a slide depends on the others: Cox's does, and needs more of them than a step holds."""
        return self.criterion == "cox"

    def row_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss (M,) of each row of logits (M, C) against its target. Not for Cox, whose loss is of the set."""
        import torch
        import torch.nn.functional as F

        from wsimil import losses

        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        options: dict[str, Any] = {"gamma": self.focal_gamma, "smoothing": self.label_smoothing}
        if self.kind == "binary":
            return losses.binary_losses(logits[:, 0], targets, **options)
        if self.kind == "multiclass":
            return losses.class_losses(logits, targets, **options)
        if self.kind == "multilabel":
            weight = logits.new_tensor(self.positive_weights) if self.positive_weights else None
            return losses.multilabel_losses(logits, targets, positive_weight=weight, **options)
        if self.kind == "ordinal":
            return losses.ordinal_losses(logits, targets)
        if self.kind == "survival":
            time, event = targets.unbind(1)
            return losses.discrete_time_losses(logits, time, event, upper=self.intervals, alpha=self.alpha)
        values, targets = logits[:, 0], targets.to(logits.dtype)
        if self.criterion == "cross_entropy":
            return losses.binary_losses(values, targets)
        values = values.sigmoid() if self.kind == "proportion" else values
        if self.criterion == "huber":  # a proportion is never further than 1 from another: it would be mse alone
            return F.huber_loss(values, targets, reduction="none", delta=0.1 if self.kind == "proportion" else 1.0)
        return F.mse_loss(values, targets, reduction="none")

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean loss of logits (M, C) against targets (M, …); `weights` (M,) multiply the rows (their mean over the cohort is 1).

        Cox: of the events among these rows; `SlideLabel` adds the slides of earlier steps.
        """
        if self.compares_slides:
            from wsimil.losses import cox_loss

            return cox_loss(logits[:, 0], targets[:, 0], targets[:, 1], weights)
        each = self.row_losses(logits, targets)
        return (each if weights is None else each * weights).mean()

    # predicting

    def calibrated(self, logits: np.ndarray, targets: np.ndarray) -> Task:
        """Cox, from validation slides: mean log-hazard (risk 0), shrinkage and baseline hazard; any other task as it is.

        Log-hazards that promise more than validation keeps are shrunk, where it has events enough to tell.
        """
        if not self.compares_slides:
            return self
        import torch

        from wsimil.losses import breslow_hazard

        center = float(np.mean(logits[:, 0], dtype=np.float64))
        risk = torch.from_numpy(np.asarray(logits[:, 0], dtype=np.float64) - center)
        time, event = torch.from_numpy(np.asarray(targets)).unbind(1)
        scale = _shrinkage(risk, time, event)
        return replace(self, center=center, scale=scale, baseline=tuple(breslow_hazard(risk * scale, time, event, self.horizons)))

    def output_probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Probability (M, C) that each output is the logit of; of steps, to be above. Not for values and survival."""
        if self.kind == "ordinal":
            return np.exp(np.cumsum(_log_sigmoid(logits), axis=1))
        return self.probabilities(logits)[:, 1 if self.kind == "binary" else 0 :]

    def probabilities(self, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Logits (M, C) → probabilities (M, number of classes); binary gives both columns; those of a multi-label task are each
        label's own.

        Not for regression, proportion and survival: see `values`, `risks`, `survival`.
        """
        scaled = np.asarray(logits, dtype=np.float64) / temperature
        if self.kind == "multilabel":
            return np.exp(_log_sigmoid(scaled))
        if self.kind == "ordinal":
            above = np.exp(np.cumsum(_log_sigmoid(scaled), axis=1))
            edge = np.ones((len(above), 1))
            return np.concatenate([edge, above], axis=1) - np.concatenate([above, 0 * edge], axis=1)
        if self.kind == "binary":
            logits = np.stack([-scaled[:, 0], scaled[:, 0]], axis=1)
            return np.exp(_log_sigmoid(logits))  # 1 minus the other would be 0 long before it is
        shifted = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)

    def decided(self, probabilities: np.ndarray, threshold: float = 0.5) -> list[str]:
        """What probabilities (M, classes) say, as text: the likeliest class; of two the positive one from the threshold on; of
        grades the median; of labels a `name=0` or `name=1` each.
        """
        if self.kind == "binary":
            return [self.classes[int(row[1] >= threshold)] for row in probabilities]
        if self.kind == "multilabel":
            return [facts_text(dict(zip(self.classes, (row >= threshold).astype(int), strict=True))) for row in probabilities]
        if self.kind == "ordinal":
            return [self.classes[int((np.cumsum(row)[:-1] < 0.5).sum())] for row in probabilities]
        return [self.classes[int(row.argmax())] for row in probabilities]

    def values(self, logits: np.ndarray) -> np.ndarray:
        """Outputs (M, 1) of a regression or proportion → values (M,) in the label's own unit."""
        outputs = np.asarray(logits, dtype=np.float64)[:, 0]
        return np.exp(_log_sigmoid(outputs)) * self.scale if self.kind == "proportion" else outputs * self.scale + self.center

    def risks(self, logits: np.ndarray) -> np.ndarray:
        """Outputs (M, C) of a survival task → risks (M,): higher is earlier. Cox: log-hazard against an average slide;
        nll: minus the expected share of intervals outlived; folds may have different numbers of them.
        """
        outputs = np.asarray(logits, dtype=np.float64)
        if self.compares_slides:
            return (outputs[:, 0] - self.center) * self.scale
        return -np.exp(np.cumsum(_log_sigmoid(-outputs), axis=1)).mean(axis=1)

    def survival(self, logits: np.ndarray) -> np.ndarray:
        """Outputs (M, C) of a survival task → chance (M, H) to be without the event at each horizon; Cox without a
        baseline: NaN.

        Inside an interval the hazard is taken as constant, after the last one as ended.
        """
        outputs = np.asarray(logits, dtype=np.float64)
        if self.compares_slides:
            baseline = np.array(self.baseline or [np.nan] * len(self.horizons))
            return np.exp(-np.exp(self.risks(outputs))[:, None] * baseline)
        ends = np.array([0.0, *self.intervals])
        log_survival = np.cumsum(_log_sigmoid(-outputs), axis=1)
        log_survival = np.concatenate([np.zeros((len(outputs), 1)), log_survival], axis=1)  # (M, K + 1)
        return np.exp(np.stack([np.interp(self.horizons, ends, row) for row in log_survival])) if len(outputs) else np.empty((0, 0))

    # storing

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Task:
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(content) - known):
            raise LabelsError(f"the task has a field {unknown[0]!r} that this wsimil does not know; upgrade it")
        plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
        return cls(**plain)


# ---------------------------------------------------------------- labels as text


def facts_of(text: str) -> dict[str, float]:
    """`ER=1;HER2=0` → {"ER": 1.0, "HER2": 0.0}. Raises LabelsError."""
    facts = {}
    for part in filter(None, text.split(";")):
        name, equals, value = part.rpartition("=")
        try:
            facts[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise LabelsError(f"label {text!r}: {part!r} does not say name=number")
    return facts


def facts_text(facts: Mapping[str, Any]) -> str:
    """The inverse of `facts_of`; what is None or empty is unknown and left out."""
    return ";".join(f"{name}={value}" for name, value in facts.items() if value is not None and value != "")


def agreed(labels: Iterable[str]) -> str:
    """The label of several slides of one patient: the one that is not empty, or all labels that are known of some slide.

    Raises:
        LabelsError: two that contradict each other.
    """
    said = {_meaning(label): label for label in labels if label}
    several = list(said.values())
    if len(several) < 2:
        return several[0] if several else ""
    facts: dict[str, str] = {}
    for label in several:
        parts = [part.rpartition("=") for part in label.split(";")]
        if any(not equals or facts.setdefault(name, value) != value for name, equals, value in parts):
            raise LabelsError(f"labels {' and '.join(map(repr, several))}")
    return facts_text(facts)


def _meaning(label: str) -> Any:
    """What labels that are written differently have in common: `12.0+` and `12+` are one time."""
    try:
        return survival_of(label)
    except LabelsError:
        return label


def survival_of(text: str) -> tuple[float, bool]:
    """`12.5` → (12.5, True), an event; `12.5+` → (12.5, False), lost sight of. Raises LabelsError."""
    try:
        return float(text.removesuffix("+")), not text.endswith("+")
    except ValueError:
        raise LabelsError(f"label {text!r} is not a time, with + where the slide is censored") from None


def survival_text(time: str, event: bool) -> str:
    """The inverse of `survival_of`."""
    return time if event else f"{time}+"


# ---------------------------------------------------------------- from the training slides


def _positive_weight(facts: Sequence[Mapping[str, float]], name: str) -> float:
    """Negatives over positives among the slides where the label is known; 1 where one side is missing."""
    values = [one[name] for one in facts if name in one]
    positive = sum(values)
    if not 0 < positive < len(values):
        return 1.0
    return min(_MAX_POSITIVE_WEIGHT, max(1 / _MAX_POSITIVE_WEIGHT, (len(values) - positive) / positive))


def _with_intervals(task: Task, labels: Sequence[str], validation: Sequence[str], n_intervals: int) -> Task:
    """Intervals that hold equally many training events; equal quantiles make fewer."""
    seen = [survival_of(label) for label in labels]
    struck = [time for time, event in seen if event]
    if not struck:
        raise LabelsError(f"none of the {len(seen)} training slides has an event: nothing to learn from")
    if validation and not any(survival_of(label)[1] for label in validation):
        raise LabelsError(f"none of the {len(validation)} validation slides has an event: no epoch can be chosen; use other splits")
    if task.compares_slides:
        return task
    inner = np.unique(np.quantile(struck, np.linspace(0, 1, n_intervals + 1)[1:-1]))
    end = max(time for time, _ in seen)
    inner = inner[(inner > 0) & (inner < max(struck))]  # the last one holds an event, too
    inner = inner[np.diff(np.searchsorted(np.sort(struck), inner, side="right"), prepend=0) > 0]  # and so does every other
    return replace(task, intervals=(*map(float, inner), float(end)))


def _shrinkage(risk: Tensor, time: Tensor, event: Tensor) -> float:
    """Factor of .05 to 1 on the log-hazards that makes these events most likely; 1 where they are fewer than `_MIN_EVENTS`."""
    if int(event.sum()) < _MIN_EVENTS:
        return 1.0
    from scipy import optimize

    from wsimil.losses import cox_loss

    found = optimize.minimize_scalar(
        lambda factor: float(cox_loss(risk * factor, time, event)), bounds=(0.05, 1.0), method="bounded"
    )
    return float(found.x) if found.fun < float(cox_loss(risk, time, event)) else 1.0


def _log_sigmoid(values: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -np.asarray(values, dtype=np.float64))

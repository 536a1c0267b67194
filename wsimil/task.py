"""What a label asks of a model: how many outputs, which loss, how an output becomes a prediction.

- Binary is one output with a logistic loss; its classes are (negative, positive).
- Regression is predicted on the training targets' scale (mean 0, deviation 1) and turned back on decoding.
- A task is plain data: it is written to `model.json` and read back.
- Torch is imported where a tensor is made, so that reading a label table does not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wsimil.errors import LabelsError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """A prediction problem.

    Attributes:
        kind: "binary", "multiclass" or "regression".
        classes: names in the order of the outputs; binary: (negative, positive); empty for regression.
        center, scale: of the targets of a regression, from the training slides.
    """

    kind: str
    classes: tuple[str, ...] = ()
    center: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("binary", "multiclass", "regression"):
            raise LabelsError(f"task {self.kind!r} is unknown; expected binary, multiclass or regression")
        if self.kind == "binary" and len(self.classes) != 2:
            raise LabelsError(f"a binary task has two classes, not {len(self.classes)}: {', '.join(self.classes)}")
        if self.kind == "multiclass" and len(self.classes) < 2:
            raise LabelsError(f"a multi-class task has at least two classes, not {len(self.classes)}")

    @property
    def n_outputs(self) -> int:
        """C: the logits of a bag."""
        return len(self.classes) if self.kind == "multiclass" else 1

    @property
    def output_names(self) -> tuple[str, ...]:
        """What each of the C outputs speaks for: of two classes, the positive one."""
        if self.kind == "binary":
            return self.classes[1:]
        return self.classes or ("value",)

    def encode(self, labels: Sequence[Any]) -> Tensor:
        """Labels → targets (B,): float 0/1 (binary), int64 class (multi-class), float on the training scale (regression)."""
        import torch

        if self.kind == "regression":
            return (torch.tensor([float(label) for label in labels]) - self.center) / self.scale
        unknown = sorted({str(label) for label in labels} - set(self.classes))
        if unknown:
            raise LabelsError(f"label {unknown[0]!r} is not one of the classes {', '.join(self.classes)}")
        indices = torch.tensor([self.classes.index(str(label)) for label in labels])
        return indices.float() if self.kind == "binary" else indices

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean loss of logits (M, C) against targets (M,); `weights` (M,) multiply the rows (their mean over the cohort is 1)."""
        import torch.nn.functional as F

        if self.kind == "binary":
            losses = F.binary_cross_entropy_with_logits(logits[:, 0], targets.to(logits.dtype), reduction="none")
        elif self.kind == "multiclass":
            losses = F.cross_entropy(logits, targets, reduction="none")
        else:
            losses = F.mse_loss(logits[:, 0], targets.to(logits.dtype), reduction="none")
        return (losses if weights is None else losses * weights).mean()

    def probabilities(self, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Logits (M, C) → probabilities (M, number of classes); binary gives both columns.

        Not for regression: see `values`.
        """
        scaled = np.asarray(logits, dtype=np.float64) / temperature
        if self.kind == "binary":
            positive = np.exp(-np.logaddexp(0.0, -scaled[:, 0]))
            return np.stack([1.0 - positive, positive], axis=1)
        shifted = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)

    def values(self, logits: np.ndarray) -> np.ndarray:
        """Regression outputs (M, 1) → values (M,) in the label's own unit."""
        return np.asarray(logits, dtype=np.float64)[:, 0] * self.scale + self.center

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Task:
        return cls(content["kind"], tuple(content["classes"]), float(content["center"]), float(content["scale"]))

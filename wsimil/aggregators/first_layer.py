"""The layer that reads the features of tiles as they are stored, most of them in half precision."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["FirstLayer", "less"]


def less(features: Tensor, shift: Tensor) -> Tensor:
    """features (ΣN, D) - shift (D,), in the type of the shift.

    Widened first: on operands of two types torch's CPU kernels take three times as long.
    """
    wide = features.to(shift.dtype)
    return wide - shift if wide is features else wide.sub_(shift)


class FirstLayer(nn.Linear):
    """`nn.Linear` for features of any floating type; with a `centre` (D,), that is taken from them first."""

    centre: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        wide = features.to(self.weight.dtype) if self.centre is None else less(features, self.centre)
        return super().forward(wide)

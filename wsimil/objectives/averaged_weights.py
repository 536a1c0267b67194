"""Weights averaged over training: the average is what is validated and kept, the last step's noise is not.

- The average reaches back over a tenth of the steps so far, at most 1 / (1 - decay): early weights, which are still random, are
  forgotten however short the run.
- Models that began at different weights are not averaged weight by weight. Those that begin alike: wsimil/training/soup.py.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from wsimil.batch import Objective
from wsimil.config import Range
from wsimil.objectives.wrapping import Wrapping

__all__ = ["AveragedWeights"]


class AveragedWeights(Wrapping):
    """`inner`, minimised as ever; beside the model an average of its weights, w̄ ← d w̄ + (1 - d) w after every step.

    The average is the objective's state, is what `inner` judges in eval mode, and what `kept_model` hands out. Buffers are copied.

    Args:
        decay: d; at step t it is min(decay, (t - 1) / (t + 9)), so it begins as the first step's weights.
    """

    average: nn.Module
    step: Tensor

    def __init__(self, inner: Objective, *, decay: Annotated[float, Range(0, below=1)] = 0.999) -> None:
        super().__init__(inner)
        self.decay = decay
        # a tuple, not a module: the model is not the objective's state
        self.model: tuple[nn.Module, ...] = ()
        self.register_buffer("step", torch.tensor(0))

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        self.model = (model,)
        self.average = copy.deepcopy(model).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> AveragedWeights:
        super().train(mode)
        if self.model:
            self.average.eval()
        return self

    def losses(self, model: nn.Module, batch: Any, progress: float) -> dict[str, Tensor]:
        return self.inner.losses(model if model.training else self.average, batch, progress)

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        (model,) = self.model
        self.step += 1
        decay = torch.clamp((self.step - 1) / (self.step + 9), max=self.decay)  # on the device: no step waits for it
        for average, weight in zip(self.average.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, (1 - decay).to(weight.dtype))
        for kept, buffer in zip(self.average.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)

    def kept_model(self, model: nn.Module) -> nn.Module:
        return self.average

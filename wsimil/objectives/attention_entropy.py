"""Attention kept from settling on few tiles: its entropy is rewarded, less and less as training goes on.

AEM, Zhang et al. 2024 (arXiv 2406.15303), around any other objective.

- Only in training: a reward that fades would tell validation losses of different epochs apart that are the same.
- The model's output is listened to, so the wrapped objective may be any that calls the model.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from wsimil.batch import BagBatch, Objective
from wsimil.config import Range
from wsimil.errors import ConfigError
from wsimil.objectives.wrapping import Wrapping, listening

__all__ = ["AttentionEntropy", "attention_entropy"]


class AttentionEntropy(Wrapping):
    """The losses of `inner`, and `entropy`: -λ_t · the mean entropy of the attention, λ_t = λ (1 + cos π t) / 2, t the progress.

    Args:
        weight: λ, per nat.
    """

    def __init__(self, inner: Objective, *, weight: Annotated[float, Range(0)] = 0.1) -> None:
        super().__init__(inner)
        self.weight = weight

    def losses(self, model: nn.Module, batch: Any, progress: float) -> dict[str, Tensor]:
        with listening(model) as heard:
            losses = self.inner.losses(model, batch, progress)
        if not model.training:
            return losses
        bags, output = heard[0] if heard else (batch.bags, None)
        if output is None or output.attention_logits is None:
            named = type(getattr(model, "inner", model)).__name__  # of a wrapper, what is in it
            raise ConfigError(
                f"{named} gives no attention_logits, so attention_entropy has nothing to spread; take an aggregator with "
                "attention, such as gated_abmil, or leave it out"
            )
        weight = self.weight * (1 + math.cos(math.pi * progress)) / 2
        return losses | {"entropy": -weight * attention_entropy(output.attention_logits, bags)}


def attention_entropy(attention_logits: Tensor, bags: BagBatch) -> Tensor:
    """(ΣN, K) → a scalar: -Σ_i a_i log a_i in nats, mean over bags and columns. At most the mean of log N."""
    logits = attention_logits.to(torch.promote_types(attention_logits.dtype, torch.float32))
    per_bag = []
    for start, end in pairwise(bags.bounds):
        log_weights = logits[start:end].log_softmax(0)  # (N, K)
        per_bag.append(-(log_weights.exp() * log_weights).sum(0))  # (K,)
    return torch.stack(per_bag).mean()

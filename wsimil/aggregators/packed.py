"""Arithmetic on packed bags: softmax and sums within each bag.

- Works on any device and differentiates; bags never see one another.
- Sums in float32 at least: a bag of 100,000 tiles would lose its small weights in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wsimil.batch import BagBatch

__all__ = ["segment_max", "segment_mean", "segment_softmax", "segment_sum"]


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def segment_sum(values: Tensor, bags: BagBatch) -> Tensor:
    """(ΣN, K) → (B, K)."""
    values = _wide(values)
    sums = values.new_zeros(len(bags), values.shape[1])
    return sums.index_add(0, bags.bag_index, values)  # (B, K)


def segment_mean(values: Tensor, bags: BagBatch) -> Tensor:
    """(ΣN, K) → (B, K)."""
    return segment_sum(values, bags) / bags.sizes.unsqueeze(1)


def segment_max(values: Tensor, bags: BagBatch) -> Tensor:
    """(ΣN, K) → (B, K)."""
    values = _wide(values)
    index = bags.bag_index.unsqueeze(1).expand_as(values)
    lowest = values.new_full((len(bags), values.shape[1]), -torch.inf)
    return lowest.scatter_reduce(0, index, values, "amax")


def segment_softmax(logits: Tensor, bags: BagBatch) -> Tensor:
    """(ΣN, K) → (ΣN, K): each column sums to 1 within each bag."""
    logits = _wide(logits)
    # the maximum only guards against overflow: its gradient cancels
    peak = segment_max(logits.detach(), bags)[bags.bag_index]
    weights = (logits - peak).exp()
    return weights / segment_sum(weights, bags)[bags.bag_index]

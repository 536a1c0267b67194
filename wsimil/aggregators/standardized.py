"""Any aggregator behind a fixed shift and scale of its features, so that one learning rate fits every encoder."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from wsimil.batch import Aggregator, BagBatch, BagOutput

__all__ = ["Standardized"]


class Standardized(Aggregator):
    """inner((features - mean) / deviation).

    Mean and deviation are buffers: they are those of the training tiles and travel with the weights. A feature that never
    varied in training (deviation infinite) reads as zero.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, inner: Aggregator, mean: Tensor | None = None, deviation: Tensor | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.dim, self.n_outputs = inner.dim, inner.n_outputs
        self.needs_coords, self.contribution_kind = inner.needs_coords, inner.contribution_kind
        self.register_buffer("mean", torch.zeros(inner.dim) if mean is None else mean)
        self.register_buffer("deviation", torch.ones(inner.dim) if deviation is None else deviation)

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        return self.inner(replace(bags, features=(bags.features - self.mean) / self.deviation), explain=explain)

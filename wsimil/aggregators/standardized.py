"""Any aggregator behind a fixed shift and scale of its features, so that one learning rate fits every encoder."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from wsimil.aggregators.first_layer import FirstLayer, less
from wsimil.aggregators.packed import recomputing
from wsimil.batch import Aggregator, BagBatch, BagOutput

__all__ = ["Standardized"]


class Standardized(Aggregator):
    """inner((features - mean) / deviation).

    Mean and deviation are buffers: they are those of the training tiles and travel with the weights. A feature that never
    varied in training (deviation infinite) reads as zero. Where one layer reads the features, both are folded into its weights:
    no second copy of a large bag is made.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, inner: Aggregator, mean: Tensor | None = None, deviation: Tensor | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.dim, self.n_outputs = inner.dim, inner.n_outputs
        self.needs_coords, self.contribution_kind = inner.needs_coords, inner.contribution_kind
        self.attends_per_output, self.shares_rows = inner.attends_per_output, inner.shares_rows
        self.register_buffer("mean", torch.zeros(inner.dim) if mean is None else mean)
        self.register_buffer("deviation", torch.ones(inner.dim) if deviation is None else deviation)

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        first = self.inner.first_layer
        if first is None or bags.features.requires_grad:
            features = less(bags.features, self.mean).div_(self.deviation)
            return self.inner(replace(bags, features=features), explain=explain)
        linear = self.inner.get_submodule(first)
        assert isinstance(linear, FirstLayer)
        weight = linear.weight / self.deviation
        if torch.is_autocast_enabled(bags.features.device.type):
            # in half precision a feature must be centred before it is multiplied, or its digits go to the mean
            folded = _Reading(linear, weight, linear.bias, self.mean)
        else:
            shift = weight @ self.mean
            folded = _Reading(linear, weight, -shift if linear.bias is None else linear.bias - shift)
        with folded, recomputing(folded):
            return self.inner(bags, explain=explain)


class _Reading:
    """A layer with other weights and a centre, for a while; may be entered again."""

    def __init__(self, layer: FirstLayer, weight: Tensor, bias: Tensor | None, centre: Tensor | None = None) -> None:
        self._layer, self._others, self._centre = layer, {"weight": weight, "bias": bias}, centre

    def __enter__(self) -> None:
        self._own = self._layer._parameters
        self._layer._parameters, self._layer.centre = self._others, self._centre  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        self._layer._parameters, self._layer.centre = self._own, None

"""Additive MIL: every tile is classified by itself, so its contribution to the slide is exact even through a deep classifier.

Javed, Juyal, Padigela et al. 2022 (arXiv 2206.01794): logits = Σ_i ψ(a_i h_i) instead of ψ(Σ_i a_i h_i).

- With biases in ψ, as in the authors' code, every tile adds ψ(0), however little it is attended to: 20,000 tiles shift the logits
  by 20,000 ψ(0). Here ψ has none, and the slide gets one intercept b, so the size of a bag is no evidence. `bias=True` is the
  authors' form.
"""

from __future__ import annotations

import torch
from torch import nn

from wsimil.aggregators.abmil import AttentionScore, attended
from wsimil.aggregators.first_layer import FirstLayer
from wsimil.aggregators.packed import segment_softmax, segment_sum
from wsimil.batch import Aggregator, BagBatch, BagOutput

__all__ = ["Additive"]


class Additive(Aggregator):
    """logits = Σ_i ψ(a_i φ(h_i)) + b, a = softmax of the attention score, φ = Linear, ReLU, Dropout, ψ = Linear, ReLU, Linear.

    The contribution of tile i is exactly ψ(a_i φ(h_i)) + a_i b.

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H of φ and of ψ's hidden layer.
        attention: width L of the attention network.
        gated: attention with the sigmoid gate.
        bias: biases inside ψ, added once for each tile, in place of b.
        dropout: on φ's output.
    """

    contribution_kind = "exact"
    first_layer = "project.0"

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        *,
        hidden: int = 256,
        attention: int = 128,
        gated: bool = True,
        bias: bool = False,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        self.dim, self.n_outputs = dim, n_outputs
        self.project = nn.Sequential(FirstLayer(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.attend = AttentionScore(hidden, attention, gated=gated)
        self.classify = nn.Sequential(nn.Linear(hidden, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, n_outputs, bias=bias))
        self.intercept = None if bias else nn.Parameter(torch.zeros(n_outputs))

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        tiles, scores = attended(self.project, self.attend, bags.features)  # (ΣN, H), (ΣN, 1)
        attention = segment_softmax(scores, bags)  # (ΣN, 1)
        contributions = self.classify(attention * tiles)  # (ΣN, C)
        if self.intercept is not None:
            contributions = contributions + attention * self.intercept
        return BagOutput(
            segment_sum(contributions, bags),  # (B, C)
            attention_logits=scores,
            tile_embedding=tiles,
            contributions=contributions if explain else None,
        )

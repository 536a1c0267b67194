"""Attention-based MIL: a weighted mean of the tiles, the weights learned.

Ilse, Tomczak, Welling 2018 (arXiv 1802.04712), with and without the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsimil.aggregators.packed import segment_softmax, segment_sum
from wsimil.batch import Aggregator, BagBatch, BagOutput

__all__ = ["ABMIL", "AttentionScore"]


class AttentionScore(nn.Module):
    """e_i = w·(tanh(V h_i) ⊙ σ(U h_i)) + b, or w·tanh(V h_i) + b without the gate: (ΣN, H) → (ΣN, K)."""

    def __init__(self, hidden: int, attention: int, *, heads: int = 1, gated: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.feature = nn.Linear(hidden, attention)  # V
        self.gate = nn.Linear(hidden, attention) if gated else None  # U
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(attention, heads)  # w

    def forward(self, tiles: Tensor) -> Tensor:
        features = self.dropout(torch.tanh(self.feature(tiles)))  # (ΣN, L)
        if self.gate is not None:
            features = features * self.dropout(torch.sigmoid(self.gate(tiles)))
        return self.score(features)  # (ΣN, K)


class ABMIL(Aggregator):
    """logits = W Σ_i a_i φ(h_i) + b, a = softmax of the attention score, φ = Linear, ReLU, Dropout.

    With one head and a linear classifier the contribution of tile i is exactly a_i (W φ(h_i) + b), and they sum to the logits.

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H of φ.
        attention: width L of the attention network.
        gated: with the sigmoid gate (section 2.4 of the paper).
        dropout: on φ's output.
    """

    contribution_kind = "exact"

    def __init__(
        self, dim: int, n_outputs: int, *, hidden: int = 256, attention: int = 128, gated: bool = True, dropout: float = 0.25
    ) -> None:
        super().__init__()
        self.dim, self.n_outputs = dim, n_outputs
        self.project = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.attend = AttentionScore(hidden, attention, gated=gated)
        self.classify = nn.Linear(hidden, n_outputs)

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        tiles = self.project(bags.features)  # (ΣN, H)
        scores = self.attend(tiles)  # (ΣN, 1)
        attention = segment_softmax(scores, bags)  # (ΣN, 1)
        bag = segment_sum(attention * tiles, bags)  # (B, H)
        return BagOutput(
            self.classify(bag),  # (B, C)
            bag_embedding=bag,
            attention_logits=scores,
            tile_embedding=tiles,
            contributions=attention * self.classify(tiles) if explain else None,  # (ΣN, C)
        )

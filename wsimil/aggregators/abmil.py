"""Attention-based MIL: a weighted mean of the tiles, the weights learned.

Ilse, Tomczak, Welling 2018 (arXiv 1802.04712), with and without the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsimil.aggregators.explain import leave_one_out
from wsimil.aggregators.first_layer import FirstLayer
from wsimil.aggregators.packed import in_pieces, segment_softmax, segment_weighted_sum
from wsimil.batch import Aggregator, BagBatch, BagOutput

__all__ = ["ABMIL", "AttentionScore", "attended"]


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


def attended(project: nn.Module, attend: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings project(h) (ΣN, H) and their scores (ΣN, K), piece by piece."""

    def of_piece(piece: Tensor) -> tuple[Tensor, Tensor]:
        tiles = project(piece)
        return tiles, attend(tiles)

    tiles, scores = in_pieces(of_piece, features)
    return tiles, scores


class ABMIL(Aggregator):
    """logits = W Σ_i a_i φ(h_i) + b, a = softmax of the attention score, φ = Linear, ReLU, Dropout.

    With the linear classifier the contribution of tile i is exactly a_i (W φ(h_i) + b), and they sum to the logits. A classifier
    with a hidden layer is no sum over tiles: contributions are then what the logits lose without the tile.

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H of φ.
        attention: width L of the attention network.
        gated: with the sigmoid gate (section 2.4 of the paper).
        classifier_hidden: width of a hidden layer in the classifier; without, it is linear, as in the paper.
        dropout: on φ's output, and in a classifier with a hidden layer.
    """

    first_layer = "project.0"

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        *,
        hidden: int = 256,
        attention: int = 128,
        gated: bool = True,
        classifier_hidden: int | None = None,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        self.dim, self.n_outputs = dim, n_outputs
        self.contribution_kind = "exact" if classifier_hidden is None else "leave-one-out"
        self.project = nn.Sequential(FirstLayer(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.attend = AttentionScore(hidden, attention, gated=gated)
        if classifier_hidden is None:
            self.classify = nn.Linear(hidden, n_outputs)
        else:
            self.classify = nn.Sequential(
                nn.Linear(hidden, classifier_hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(classifier_hidden, n_outputs)
            )

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        tiles, scores = attended(self.project, self.attend, bags.features)  # (ΣN, H), (ΣN, 1)
        attention = segment_softmax(scores, bags)  # (ΣN, 1)
        bag = segment_weighted_sum(attention, tiles, bags).squeeze(1)  # (B, H)
        contributions = None  # (ΣN, C)
        if explain and self.contribution_kind == "exact":
            contributions = attention * self.classify(tiles)
        elif explain:
            contributions = leave_one_out(scores, tiles, bags, self.classify)
        return BagOutput(
            self.classify(bag),  # (B, C)
            bag_embedding=bag,
            attention_logits=scores,
            tile_embedding=tiles,
            contributions=contributions,
        )

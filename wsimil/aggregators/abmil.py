"""Attention-based MIL: a weighted mean of the tiles, the weights learned.

Ilse, Tomczak, Welling 2018 (arXiv 1802.04712), with and without the gate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.aggregators import fused
from wsimil.aggregators.explain import leave_one_out
from wsimil.aggregators.first_layer import FirstLayer
from wsimil.aggregators.packed import in_pieces, segment_softmax, segment_weighted_sum
from wsimil.batch import Aggregator, BagBatch, BagOutput
from wsimil.errors import ConfigError

__all__ = ["ABMIL", "AttentionScore", "attended"]


class AttentionScore(nn.Module):
    """e_i = w·(tanh(V h_i) ⊙ σ(U h_i)) + b, or w·tanh(V h_i) + b without the gate: (ΣN, H) → (ΣN, K)."""

    def __init__(
        self, hidden: int, attention: int, *, heads: int = 1, gated: bool = True, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.feature = nn.Linear(hidden, attention, bias=bias)  # V
        self.gate = nn.Linear(hidden, attention, bias=bias) if gated else None  # U
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(attention, heads, bias=bias)  # w

    def forward(self, tiles: Tensor) -> Tensor:
        features = self.dropout(torch.tanh(self.feature(tiles)))  # (ΣN, L)
        if self.gate is not None:
            features = features * self.dropout(torch.sigmoid(self.gate(tiles)))
        return self.score(features)  # (ΣN, K)


def attended(project: nn.Sequential, attend: AttentionScore, features: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings project(h) (ΣN, H) and their scores (ΣN, K), piece by piece; project is Linear, ReLU, Dropout."""
    found = _attended_at_once(project, attend, features)
    if found is not None:
        return found

    def of_piece(piece: Tensor) -> tuple[Tensor, Tensor]:
        tiles = project(piece)
        return tiles, attend(tiles)

    tiles, scores = in_pieces(of_piece, features)
    return tiles, scores


def _attended_at_once(project: nn.Sequential, attend: AttentionScore, features: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same by `fused`, where it applies: to these layers as they come, to nobody's in their place."""
    gates = [attend.feature] if attend.gate is None else [attend.feature, attend.gate]
    linear, relu, dropout = project
    layers = [linear, relu, *gates, attend.score]
    kinds = [FirstLayer, nn.ReLU, *(nn.Linear for _ in gates), nn.Linear]
    drops = [dropout, attend.dropout]
    if [type(layer).forward for layer in layers] != [kind.forward for kind in kinds] or not all(
        isinstance(layer, nn.Dropout) for layer in drops
    ):
        return None  # somebody put another layer in
    assert isinstance(linear, FirstLayer)
    weights = [part for layer in (linear, *gates, attend.score) for part in (layer.weight, layer.bias)]
    if features.requires_grad or not fused.applies(features, *weights):
        return None
    if any(module._forward_hooks or module._forward_pre_hooks for module in (project, attend, *drops, *layers)):
        return None  # they are to see what passes
    biases = tuple(gate.bias for gate in gates if gate.bias is not None)
    return fused.embed_and_score(
        features,
        linear.centre,
        (linear.weight, linear.bias),
        (torch.cat(tuple(gate.weight for gate in gates)), torch.cat(biases) if biases else None),
        (attend.score.weight, attend.score.bias),
        gated=attend.gate is not None,
        drop=tuple(layer.p if layer.training else 0.0 for layer in drops),  # type: ignore[arg-type]
    )


class ABMIL(Aggregator):
    """logits = W Σ_i a_i φ(h_i) + b, a = softmax of the attention score, φ = Linear, ReLU, Dropout.

    With the linear classifier the contribution of tile i is exactly a_i (W φ(h_i) + b), and they sum to the logits. A classifier
    with a hidden layer is no sum over tiles: contributions are then what the logits lose without the tile. With K heads the K
    means are classified side by side, and a head is owed its part of W and b / K.

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H of φ.
        attention: width L of the attention network.
        gated: with the sigmoid gate (section 2.4 of the paper).
        heads: K attentions, of scores of their own.
        attention_bias: biases in the attention network: the paper's formulas have none, its code has them.
        classifier_hidden: width of a hidden layer in the classifier; without, it is linear, as in the paper.
        dropout: on φ's output, and in a classifier with a hidden layer.
    """

    first_layer = "project.0"
    shares_rows = True

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        *,
        hidden: int = 256,
        attention: int = 128,
        gated: bool = True,
        heads: int = 1,
        attention_bias: bool = True,
        classifier_hidden: int | None = None,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if heads < 1:
            raise ConfigError(f"heads = {heads}; expected at least 1")
        self.dim, self.n_outputs = dim, n_outputs
        self.contribution_kind = "exact" if classifier_hidden is None else "leave-one-out"
        self.project = nn.Sequential(FirstLayer(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.attend = AttentionScore(hidden, attention, heads=heads, gated=gated, bias=attention_bias)
        if classifier_hidden is None:
            self.classify = nn.Linear(heads * hidden, n_outputs)
        else:
            last = nn.Linear(classifier_hidden, n_outputs)
            self.classify = nn.Sequential(nn.Linear(heads * hidden, classifier_hidden), nn.ReLU(), nn.Dropout(dropout), last)

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        tiles, scores = attended(self.project, self.attend, bags.features)  # (ΣN, H), (ΣN, K)
        attention = segment_softmax(scores, bags)  # (ΣN, K)
        bag = segment_weighted_sum(attention, tiles, bags).flatten(1)  # (B, K · H)
        contributions = None  # (ΣN, C)
        if explain and isinstance(self.classify, nn.Linear):
            per_head = self.classify.weight.reshape(-1, tiles.shape[1])  # (C · K, H)
            owed = F.linear(tiles, per_head).unflatten(1, (self.n_outputs, -1))  # (ΣN, C, K)
            owed = owed + (self.classify.bias / scores.shape[1]).unsqueeze(1)
            contributions = (attention.unsqueeze(1) * owed).sum(2)
        elif explain:
            contributions = leave_one_out(scores, tiles, bags, self.classify)
        return BagOutput(
            self.classify(bag),  # (B, C)
            bag_embedding=bag,
            attention_logits=scores,
            tile_embedding=tiles,
            contributions=contributions,
        )

"""ACMIL: several attention branches, kept apart, whose strongest tiles are hidden at random in training.

Zhang et al. 2024 (arXiv 2311.07125), the gated-attention variant.

- Hiding draws from torch's generator as dropout does, in training only.
- The branches' own logits are `extra_logits`, their likeness is a penalty: the method adds no loss of its own.
- The bag's attention is the mean of the branches', behind which all is linear: contributions are exact.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn

from wsimil.aggregators.abmil import AttentionScore, attended
from wsimil.aggregators.first_layer import FirstLayer
from wsimil.aggregators.packed import segment_softmax, segment_sum, segment_weighted_sum
from wsimil.batch import Aggregator, BagBatch, BagOutput, ExtraLogits
from wsimil.errors import ConfigError

__all__ = ["ACMIL"]

HIDDEN_SCORE = -1e9
"""Of a hidden tile: its weight is zero, and the score stays finite for whoever multiplies with it."""


class ACMIL(Aggregator):
    """logits = W Σ_i (mean_t a_ti) φ(h_i) + b, a_t the softmax of branch t; φ = Linear without bias, ReLU, Dropout.

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H of φ.
        attention: width of the attention network.
        n_branches: T.
        n_top: of each branch's so many strongest tiles, `mask_rate` are hidden from it in training.
        mask_rate: at least 0 (hide none), below 1.
        dropout: on φ's output (none in the paper).
    """

    contribution_kind = "exact"
    first_layer = "project.0"
    shares_rows = True

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        *,
        hidden: int = 512,
        attention: int = 128,
        n_branches: int = 5,
        n_top: int = 10,
        mask_rate: float = 0.6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if n_branches < 2:
            raise ConfigError(f"ACMIL: {n_branches} branch; it needs two to keep apart (one is gated_abmil)")
        if not 0 <= mask_rate < 1:
            raise ConfigError(f"ACMIL: mask_rate {mask_rate} is not within [0, 1): some tile must stay")
        self.dim, self.n_outputs = dim, n_outputs
        self.n_branches, self.n_top, self.mask_rate = n_branches, n_top, mask_rate
        self.project = nn.Sequential(FirstLayer(dim, hidden, bias=False), nn.ReLU(), nn.Dropout(dropout))
        self.attend = AttentionScore(hidden, attention, heads=n_branches)
        self.classify_branch = nn.ModuleList(nn.Linear(hidden, n_outputs) for _ in range(n_branches))
        self.classify = nn.Linear(hidden, n_outputs)

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        tiles, scores = attended(self.project, self.attend, bags.features)  # (ΣN, H), (ΣN, T)
        if self.training:
            scores = self.hide(scores, bags)
        attention = segment_softmax(scores, bags)  # (ΣN, T)
        branches = segment_weighted_sum(attention, tiles, bags)  # (B, T, H)
        bag = branches.mean(1)  # (B, H): the mean of the branches' attentions is what weighs the tiles
        branch_logits = torch.stack([head(branches[:, t]) for t, head in enumerate(self.classify_branch)], 1)  # (B, T, C)
        branch_bags = torch.arange(len(bags), device=bag.device).repeat_interleave(self.n_branches)
        return BagOutput(
            self.classify(bag),  # (B, C)
            bag_embedding=bag,
            attention_logits=scores,
            tile_embedding=tiles,
            contributions=attention.mean(1, keepdim=True) * self.classify(tiles) if explain else None,  # (ΣN, C)
            extra_logits=(ExtraLogits("branches", branch_logits.flatten(0, 1), branch_bags),),
            penalties={"diversity": likeness(attention, bags)},
        )

    def hide(self, scores: Tensor, bags: BagBatch) -> Tensor:
        """Scores (ΣN, T), strong ones hidden: for each bag and branch ⌊mask_rate · n⌋ of the n = min(n_top, N) largest."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        hidden = torch.zeros_like(scores, dtype=torch.bool)
        start = 0
        for of_bag in scores.detach().split(bags.lengths):
            top = of_bag.topk(min(self.n_top, len(of_bag)), dim=0).indices + start  # (n, T)
            drawn = torch.rand(top.shape, device=top.device).argsort(0)[: int(self.mask_rate * len(top))]
            hidden.scatter_(0, top.gather(0, drawn), True)
            start += len(of_bag)
        return scores.masked_fill(hidden, HIDDEN_SCORE)


def likeness(attention: Tensor, bags: BagBatch) -> Tensor:
    """Mean cosine of the angle between two branches' attentions (ΣN, T), over pairs of branches and bags: a scalar."""
    lengths = segment_sum(attention.square(), bags).sqrt()  # (B, T)
    pairs = list(combinations(range(attention.shape[1]), 2))
    left, right = (list(side) for side in zip(*pairs, strict=True))
    products = segment_sum(attention[:, left] * attention[:, right], bags)  # (B, pairs)
    return (products / (lengths[:, left] * lengths[:, right])).mean()

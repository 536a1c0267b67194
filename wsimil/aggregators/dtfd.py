"""DTFD-MIL: each bag is split into pseudo-bags; attention pools them, and a second attention pools what they distil to.

Zhang et al. 2022 (arXiv 2203.12081).

- The split is random in training, drawn anew every time, and strided otherwise (tile i goes to pseudo-bag i mod G), so that
  a prediction never depends on a draw. Bags of fewer than G tiles have as many pseudo-bags as tiles.
- The second tier reads detached features: the projection learns from the pseudo-bags' own logits alone, as in the paper.
- All that follows the two attentions is linear, so contributions are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsimil.aggregators.abmil import AttentionScore, attended
from wsimil.aggregators.first_layer import FirstLayer
from wsimil.aggregators.packed import segment_softmax, segment_sum, segment_topk
from wsimil.batch import Aggregator, BagBatch, BagOutput, ExtraLogits
from wsimil.errors import ConfigError

__all__ = ["DTFD"]

DISTILLATIONS = ("AFS", "MaxS", "MaxMinS")


class DTFD(Aggregator):
    """logits = W₂ Σ_m b_m z_m + c₂ over distilled features z_m, b the second attention; φ = Linear without bias, ReLU, Dropout.

    `attention_logits` are the logarithms of each tile's whole weight, first tier times second: their softmax over the bag is
    that weight.

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H of φ.
        attention: width of both attention networks.
        n_pseudo: pseudo-bags G of each bag.
        distill: what a pseudo-bag hands on: "AFS" its attention-weighted mean, "MaxS" its most, "MaxMinS" its most and least
            positive tiles, by the first tier's classifier (of several classes: by the probability of the last).
        n_distilled: tiles at each end, for "MaxS" and "MaxMinS".
        dropout: on φ's output (none in the paper).
    """

    contribution_kind = "exact"
    first_layer = "project.0"

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        *,
        hidden: int = 512,
        attention: int = 128,
        n_pseudo: int = 4,
        distill: str = "AFS",
        n_distilled: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if distill not in DISTILLATIONS:
            raise ConfigError(f"DTFD: distill {distill!r} is unknown; expected one of {', '.join(DISTILLATIONS)}")
        self.dim, self.n_outputs = dim, n_outputs
        self.n_pseudo, self.distill, self.n_distilled = n_pseudo, distill, n_distilled
        self.project = nn.Sequential(FirstLayer(dim, hidden, bias=False), nn.ReLU(), nn.Dropout(dropout))
        self.attend_tiles, self.classify_pseudo = AttentionScore(hidden, attention), nn.Linear(hidden, n_outputs)
        self.attend_pseudo, self.classify = AttentionScore(hidden, attention), nn.Linear(hidden, n_outputs)

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        tiles, scores = attended(self.project, self.attend_tiles, bags.features)  # (ΣN, H), (ΣN, 1)
        member, counts = self._split(bags)
        order = member.argsort(stable=True)
        back = order.argsort()
        pseudo = BagBatch(tiles[order], _offsets(member.bincount()))  # M pseudo-bags; rows in their order from here on
        bag_of_pseudo = torch.arange(len(bags), device=order.device).repeat_interleave(counts)  # (M,)

        within = segment_softmax(scores[order], pseudo)  # (ΣN, 1)
        means = segment_sum(within * pseudo.features, pseudo)  # (M, H)
        if self.distill == "AFS":
            distilled, bag_of_distilled = means, bag_of_pseudo
        else:
            chosen, bag_of_distilled = self._chosen(within, pseudo, bag_of_pseudo)
            distilled = pseudo.features[chosen]
        upper = BagBatch(distilled.detach(), _offsets(bag_of_distilled.bincount()))  # B bags of distilled features
        across = segment_softmax(self.attend_pseudo(upper.features), upper)  # (·, 1)
        embedding = segment_sum(across * upper.features, upper)  # (B, H)

        if self.distill == "AFS":
            weights = within * across[pseudo.bag_index]  # (ΣN, 1)
        else:  # a tile alone in its pseudo-bag is chosen from both ends
            weights = torch.zeros_like(within).index_add(0, chosen, across)
        weights = weights[back]
        return BagOutput(
            self.classify(embedding),  # (B, C)
            bag_embedding=embedding,
            attention_logits=weights.clamp_min(1e-30).log(),
            tile_embedding=tiles,
            contributions=weights * self.classify(tiles) if explain else None,  # (ΣN, C)
            extra_logits=(ExtraLogits("pseudo_bags", self.classify_pseudo(means), bag_of_pseudo),),
        )

    def _split(self, bags: BagBatch) -> tuple[Tensor, Tensor]:
        """Pseudo-bag of each tile (ΣN,), counted over the batch, and the number of pseudo-bags of each bag (B,)."""
        counts = bags.sizes.clamp(max=self.n_pseudo)
        of_bag, device = bags.bag_index, bags.offsets.device
        if self.training:
            ranks = torch.cat([torch.randperm(size, device=device) for size in bags.lengths])
        else:
            ranks = torch.arange(len(of_bag), device=device) - bags.offsets[of_bag]
        return (counts.cumsum(0) - counts)[of_bag] + ranks % counts[of_bag], counts

    def _chosen(self, within: Tensor, pseudo: BagBatch, bag_of_pseudo: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the tiles that stand for their pseudo-bags, and the bag of each."""
        evidence = (within * pseudo.features) @ self.classify_pseudo.weight.to(within.dtype).T  # (ΣN, C) without the bias
        rank = (evidence if self.n_outputs == 1 else evidence.softmax(1))[:, -1].detach()  # (ΣN,)
        ends = [segment_topk(rank, pseudo, self.n_distilled)]
        if self.distill == "MaxMinS":
            ends.append(segment_topk(-rank, pseudo, self.n_distilled))
        per_pseudo = [torch.cat(rows) for rows in zip(*ends, strict=True)]
        lengths = torch.tensor([len(rows) for rows in per_pseudo], device=bag_of_pseudo.device)
        return torch.cat(per_pseudo), bag_of_pseudo.repeat_interleave(lengths)


def _offsets(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])

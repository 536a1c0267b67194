"""Five aggregators that ask most of the contracts, each as small as it can be and still be its method.

- They stand for what a library of them must hold: an embedding per class, logits beside the bag's, bags within bags, scored
  tiles, coordinates. No dropout, and everything a method leaves open is fixed, so that facts can be stated exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsimil.aggregators.abmil import AttentionScore
from wsimil.aggregators.packed import segment_max, segment_mean, segment_softmax, segment_sum
from wsimil.batch import Aggregator, BagBatch, BagOutput, ExtraLogits

__all__ = ["ClamMB", "Dsmil", "Dtfd", "ScoreThenPool", "SmoothAttention"]


def pool_per_class(attention: Tensor, tiles: Tensor, bags: BagBatch) -> Tensor:
    """attention (ΣN, C), tiles (ΣN, H) → (B, C, H): one weighted mean for each class."""
    weighted = attention.unsqueeze(2) * tiles.unsqueeze(1)  # (ΣN, C, H)
    return segment_sum(weighted.flatten(1), bags).unflatten(1, weighted.shape[1:])  # (B, C, H)


class ClamMB(Aggregator):
    """z_c = Σ_i a_ic φ(h_i), logit_c = w_c·z_c + b_c: attention and embedding per class (Lu 2021, arXiv 2004.09666).

    The instance loss needs labels, so it is an objective: `ClamInstances`.
    """

    contribution_kind = "exact"

    def __init__(self, dim: int, n_outputs: int, *, hidden: int = 16) -> None:
        super().__init__()
        self.dim, self.n_outputs = dim, n_outputs
        self.project = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU())
        self.attend = AttentionScore(hidden, 8, heads=n_outputs)
        self.classify = nn.Linear(hidden, n_outputs)  # row c reads z_c alone

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        tiles = self.project(bags.features)  # (ΣN, H)
        scores = self.attend(tiles)  # (ΣN, C)
        attention = segment_softmax(scores, bags)  # (ΣN, C)
        embedding = pool_per_class(attention, tiles, bags)  # (B, C, H)
        return BagOutput(
            (embedding * self.classify.weight).sum(2) + self.classify.bias,  # (B, C)
            bag_embedding=embedding,
            attention_logits=scores,
            tile_embedding=tiles,
            contributions=attention * self.classify(tiles) if explain else None,  # (ΣN, C)
        )


class Dsmil(Aggregator):
    """Each class's top tile asks the others; its own logits are trained beside the bag's (Li 2021, arXiv 2011.08939)."""

    def __init__(self, dim: int, n_outputs: int, *, width: int = 8) -> None:
        super().__init__()
        self.dim, self.n_outputs = dim, n_outputs
        self.score = nn.Linear(dim, n_outputs)
        self.query = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh())
        self.classify = nn.Conv1d(n_outputs, n_outputs, kernel_size=dim)  # every output reads every class's embedding

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        scores = self.score(bags.features)  # (ΣN, C)
        top = self.top_tile(scores, bags)  # (B, C) rows of the packed features
        query = self.query(bags.features)  # (ΣN, Q)
        likeness = (query.unsqueeze(1) * query[top][bags.bag_index]).sum(2) / query.shape[1] ** 0.5  # (ΣN, C)
        embedding = pool_per_class(segment_softmax(likeness, bags), bags.features, bags)  # (B, C, D)
        best = ExtraLogits("top_tile", scores.gather(0, top), torch.arange(len(bags), device=top.device))
        return BagOutput(
            self.classify(embedding).squeeze(2),  # (B, C)
            bag_embedding=embedding,
            attention_logits=likeness,
            tile_logits=scores,
            extra_logits=(best,),
        )

    @staticmethod
    def top_tile(scores: Tensor, bags: BagBatch) -> Tensor:
        """(ΣN, C) → (B, C): the first row of each bag that holds its highest score."""
        rows = torch.arange(len(scores), device=scores.device).unsqueeze(1)
        is_top = scores >= segment_max(scores.detach(), bags)[bags.bag_index]
        candidates = rows.where(is_top, len(scores))  # (ΣN, C)
        index = bags.bag_index.unsqueeze(1).expand_as(candidates)
        return candidates.new_full((len(bags), scores.shape[1]), len(scores)).scatter_reduce(0, index, candidates, "amin")


class Dtfd(Aggregator):
    """Bags within bags: attention pools pseudo-bags, then a second one pools their embeddings (Zhang 2022, arXiv 2203.12081).

    The split is random in training, from `seed` and a counter that is saved with the model, and strided otherwise. The second
    tier reads detached embeddings: the projection learns from the pseudo-bags alone.
    """

    draws: Tensor

    def __init__(self, dim: int, n_outputs: int, *, hidden: int = 16, n_pseudo: int = 4, seed: int = 0) -> None:
        super().__init__()
        self.dim, self.n_outputs, self.n_pseudo, self.seed = dim, n_outputs, n_pseudo, seed
        self.project = nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.ReLU())
        self.attend_tiles, self.classify_pseudo = AttentionScore(hidden, 8), nn.Linear(hidden, n_outputs)
        self.attend_pseudo, self.classify = AttentionScore(hidden, 8), nn.Linear(hidden, n_outputs)
        self.register_buffer("draws", torch.tensor(0))

    def split(self, bags: BagBatch) -> tuple[Tensor, Tensor]:
        """Pseudo-bag of every tile (ΣN,), counted over the batch, and the number of pseudo-bags of each bag (B,)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.draws))
        counts = bags.sizes.clamp(max=self.n_pseudo)
        ranks = [torch.randperm(size, generator=generator) if self.training else torch.arange(size) for size in bags.sizes.tolist()]
        if self.training:
            self.draws += 1
        of_bag = bags.bag_index
        return torch.cat(ranks).to(of_bag) % counts[of_bag] + (counts.cumsum(0) - counts)[of_bag], counts

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        tiles = self.project(bags.features)  # (ΣN, H)
        member, counts = self.split(bags)
        order = member.argsort(stable=True)
        zero = counts.new_zeros(1)
        pseudo = BagBatch(tiles[order], torch.cat([zero, member.bincount().cumsum(0)]))  # M bags

        scores = self.attend_tiles(pseudo.features)  # (ΣN, 1)
        within = segment_softmax(scores, pseudo)
        embedding = segment_sum(within * pseudo.features, pseudo)  # (M, H)
        tier_two = BagBatch(embedding.detach(), torch.cat([zero, counts.cumsum(0)]))  # B bags of pseudo-bags
        across = segment_softmax(self.attend_pseudo(tier_two.features), tier_two)  # (M, 1)
        bag = segment_sum(across * tier_two.features, tier_two)  # (B, H)

        # as the logarithm of a tile's whole weight: its softmax over the bag is that weight again
        weight = within * across[pseudo.bag_index]
        attention_logits = torch.empty_like(weight).index_copy(0, order, weight.clamp_min(1e-30).log())
        return BagOutput(
            self.classify(bag),  # (B, C)
            bag_embedding=bag,
            attention_logits=attention_logits,
            tile_embedding=tiles,
            extra_logits=(ExtraLogits("pseudo_bags", self.classify_pseudo(embedding), tier_two.bag_index),),
        )


class ScoreThenPool(Aggregator):
    """logits = Σ_i a_i s(h_i): the map is in the label's own units (Schirris 2021, arXiv 2109.05892; Schirris 2025, 2501.14379).

    Args:
        attend: weigh the tiles; a plain mean without.
        proportion: scores between 0 and 1.
    """

    contribution_kind = "exact"

    def __init__(self, dim: int, n_outputs: int, *, hidden: int = 16, attend: bool = True, proportion: bool = False) -> None:
        super().__init__()
        self.dim, self.n_outputs, self.proportion = dim, n_outputs, proportion
        self.project = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU())
        self.score = nn.Linear(hidden, n_outputs)
        self.attend = AttentionScore(hidden, 8) if attend else None

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        tiles = self.project(bags.features)  # (ΣN, H)
        tile_logits = self.score(tiles)  # (ΣN, C)
        if self.proportion:
            tile_logits = tile_logits.sigmoid()
        if self.attend is None:
            scores, pooled = None, segment_mean(tile_logits, bags)
            contributions = tile_logits / bags.sizes[bags.bag_index].unsqueeze(1)
        else:
            scores = self.attend(tiles)  # (ΣN, 1)
            contributions = segment_softmax(scores, bags) * tile_logits
            pooled = segment_sum(contributions, bags)
        return BagOutput(
            pooled,  # (B, C)
            attention_logits=scores,
            tile_logits=tile_logits,
            tile_embedding=tiles,
            contributions=contributions if explain else None,
        )


class SmoothAttention(Aggregator):
    """Attention scores smoothed over the eight neighbours on the slide (Castro-Macías 2024, arXiv 2410.03276).

    G_0 = e, G_t = α Â G_{t-1} + (1 - α) e, Â the symmetrically normalised adjacency, α = 1 / (1 + γ), γ learned.
    """

    needs_coords = True

    def __init__(self, dim: int, n_outputs: int, *, hidden: int = 16, steps: int = 10) -> None:
        super().__init__()
        self.dim, self.n_outputs, self.steps = dim, n_outputs, steps
        self.project = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU())
        self.attend = AttentionScore(hidden, 8)
        self.classify = nn.Linear(hidden, n_outputs)
        self.gamma = nn.Parameter(torch.tensor(1.0))

    def smooth(self, scores: Tensor, coords_um: Tensor, tile_um: Tensor) -> Tensor:
        """(N, 1) of one bag → (N, 1)."""
        apart = (coords_um.unsqueeze(1) - coords_um.unsqueeze(0)).abs().amax(2)  # (N, N) Chebyshev distance
        # half a tile of slack: a grid at a fractional scale is rounded to whole pixels
        adjacent = ((apart > 0) & (apart < 1.5 * tile_um)).to(scores.dtype)
        root = adjacent.sum(1, keepdim=True).clamp_min(1).sqrt()  # an island has no neighbour and keeps its own score
        alpha = 1 / (1 + self.gamma)
        smoothed = scores
        for _ in range(self.steps):
            smoothed = alpha * (adjacent @ (smoothed / root)) / root + (1 - alpha) * scores
        return smoothed

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        assert bags.coords_um is not None and bags.tile_um is not None  # `check` made sure
        tiles = self.project(bags.features)  # (ΣN, H)
        sizes = bags.sizes.tolist()
        per_bag = zip(self.attend(tiles).split(sizes), bags.coords_um.split(sizes), bags.tile_um, strict=True)
        scores = torch.cat([self.smooth(*bag) for bag in per_bag])  # (ΣN, 1)
        bag = segment_sum(segment_softmax(scores, bags) * tiles, bags)  # (B, H)
        return BagOutput(self.classify(bag), bag_embedding=bag, attention_logits=scores, tile_embedding=tiles)

"""ABMILX: ABMIL with several heads, whose attention scores are refined by how alike the tiles are.

Tang et al. 2025 (arXiv 2506.02408). e ← e + v · softmax(Q Kᵀ / √d) e in each head: a tile's score hears of those like it.

- Every tile meets every other, so time grows with N²; memory does not (fused attention).
- Heads share their layers and none has a bias, as in the authors' code.
- Bags are walked one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsimil.aggregators.packed import segment_softmax, segment_sum, softmax_attention
from wsimil.batch import Aggregator, BagBatch, BagOutput
from wsimil.errors import ConfigError

__all__ = ["ABMILX"]


class Refine(nn.Module):
    """Scores (heads, N, 1) + v · attention of all tiles to all, on the scores; queries and keys from LN(tiles)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.value = nn.Linear(1, 1, bias=False)

    def forward(self, tiles: Tensor, scores: Tensor) -> Tensor:
        known = self.norm(tiles)  # (heads, N, d)
        query, key, value = self.query(known), self.key(known), self.value(scores)
        heard = softmax_attention(query.unsqueeze(0), key.unsqueeze(0), value.to(key.dtype).unsqueeze(0))
        return scores + heard[0]


class ABMILX(Aggregator):
    """logits = W P [Σ_i a_i^1 h_i^1 | … | Σ_i a_i^M h_i^M], the head's part h^m of h = Dropout(GELU(φ x)) weighed on its own.

    All that follows the attention is linear and without bias, so tile i contributes exactly W P [a_i^m h_i^m].

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H of h; a multiple of `heads`.
        heads: M.
        refine: let scores hear of tiles that look alike; without it this is ABMIL with heads.
        dropout: on h.
    """

    contribution_kind = "exact"

    def __init__(
        self, dim: int, n_outputs: int, *, hidden: int = 512, heads: int = 8, refine: bool = True, dropout: float = 0.25
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ConfigError(f"hidden = {hidden} is not a multiple of heads = {heads}")
        self.dim, self.n_outputs, self.heads = dim, n_outputs, heads
        width = hidden // heads
        self.project = nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Dropout(dropout))
        self.attend = nn.Sequential(nn.Linear(width, width, bias=False), nn.GELU(), nn.Linear(width, 1, bias=False))
        self.refine = Refine(width) if refine else None
        self.join = nn.Linear(hidden, hidden, bias=False)
        self.classify = nn.Linear(hidden, n_outputs, bias=False)

    def scores(self, tiles: Tensor) -> Tensor:
        """(N, H) of one bag → (N, M)."""
        by_head = tiles.unflatten(1, (self.heads, -1)).transpose(0, 1)  # (M, N, d)
        scores = self.attend(by_head)  # (M, N, 1)
        if self.refine is not None:
            scores = self.refine(by_head, scores)
        return scores.squeeze(2).T

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        bags = self.read(bags)
        tiles = self.project(bags.features)  # (ΣN, H)
        scores = torch.cat([self.scores(bag) for bag in tiles.split(bags.lengths)])  # (ΣN, M)
        weights = segment_softmax(scores, bags).repeat_interleave(tiles.shape[1] // self.heads, 1)  # (ΣN, H)
        weighted = weights * tiles
        bag = self.join(segment_sum(weighted, bags))  # (B, H)
        return BagOutput(
            self.classify(bag),  # (B, C)
            bag_embedding=bag,
            attention_logits=scores,
            tile_embedding=tiles,
            contributions=self.classify(self.join(weighted)) if explain else None,  # (ΣN, C)
        )

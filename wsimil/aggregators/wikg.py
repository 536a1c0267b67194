"""WiKG: every tile draws on the tiles that its own head vector likes best, then attention pools them.

Li et al. 2024 (arXiv 2403.07719). A directed graph is made anew for every bag: edges lead to the k tiles with the largest
head·tail; a gate weighs what comes along them; sum and product of tile and neighbourhood make the new tile.

- The neighbours are found in chunks of rows: all likenesses are computed, none but the k best are kept.
- The weight of an edge is t·tanh(h + r), the inner product of the paper. The authors' code multiplies the two vectors' sums
  instead; MIL-Lab's has the inner product but leaves the (1 - p) h out of r. `gate` chooses.
- A bag of fewer than k tiles uses all of them. Bags are walked one by one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wsimil.aggregators.explain import gradient_contributions
from wsimil.aggregators.packed import segment_softmax, segment_sum
from wsimil.batch import Aggregator, BagBatch, BagOutput
from wsimil.errors import ConfigError

__all__ = ["WiKG", "nearest"]

GATES = ("paper", "authors", "mil-lab")

ROWS = 4_096
"""Tiles whose neighbourhoods are held at a time: (rows, k, H) several times over."""

LIKENESSES = 1 << 24
"""Likenesses held at a time while neighbours are looked for: 64 MB."""


@torch.no_grad()
def nearest(heads: Tensor, tails: Tensor, k: int) -> Tensor:
    """(N, H), (N, H) → (N, min(k, N)) rows of the tails with the largest inner product, largest first."""
    rows = max(1, LIKENESSES // len(tails))
    with torch.autocast(heads.device.type, enabled=False):  # rounded to eight bits, others would be nearest
        heads, tails = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (heads, tails))
        return torch.cat([(chunk @ tails.T).topk(min(k, len(tails)), 1).indices for chunk in heads.split(rows)])


class WiKG(Aggregator):
    """logits = W LN(Σ_i a_i z_i) + b, z = LReLU(W₁ (h + n)) + LReLU(W₂ (h ⊙ n)), n the gated mean of h's k neighbours.

    Contributions are gradient × input on z.

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H.
        neighbours: k.
        gate: how edges are weighed: "paper", "authors" or "mil-lab".
        dropout: on z.
    """

    contribution_kind = "gradient"

    def __init__(
        self, dim: int, n_outputs: int, *, hidden: int = 512, neighbours: int = 6, gate: str = "paper", dropout: float = 0.3
    ) -> None:
        super().__init__()
        if gate not in GATES:
            raise ConfigError(f"gate = {gate!r}; expected {', '.join(GATES)}")
        self.dim, self.n_outputs, self.neighbours, self.gate = dim, n_outputs, neighbours, gate
        self.project = nn.Sequential(nn.Linear(dim, hidden), nn.LeakyReLU())
        self.head, self.tail = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.sum, self.product = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        narrow = max(1, hidden // 2)
        self.attend = nn.Sequential(nn.Linear(hidden, narrow), nn.LeakyReLU(), nn.Linear(narrow, 1))
        self.norm, self.classify = nn.LayerNorm(hidden), nn.Linear(hidden, n_outputs)

    def neighbourhood(self, heads: Tensor, tails: Tensor, places: Tensor) -> Tensor:
        """Some tiles' heads (M, H), all tails (N, H), neighbours (M, k) → what comes along the edges (M, H)."""
        around = tails[places]  # (M, k, H)
        own = heads.unsqueeze(1)
        share = ((own * around).sum(2) * heads.shape[1] ** -0.5).softmax(1).unsqueeze(2)  # (M, k, 1)
        relation = share * around
        if self.gate != "mil-lab":
            relation = relation + (1 - share) * own
        knowing = torch.tanh(own + relation)
        weight = around.sum(2) * knowing.sum(2) if self.gate == "authors" else (around * knowing).sum(2)  # (M, k)
        return (weight.softmax(1).unsqueeze(2) * around).sum(1)

    def embed(self, tiles: Tensor) -> Tensor:
        """(N, H) of one bag → (N, H)."""
        tiles = (tiles + tiles.mean(0)) / 2
        heads, tails = self.head(tiles), self.tail(tiles)
        places = nearest(heads, tails, self.neighbours)
        if len(tiles) <= ROWS:
            around = self.neighbourhood(heads, tails, places)
        else:  # computed again on the way back, so that one chunk at a time is in memory
            chunks = zip(heads.split(ROWS), places.split(ROWS), strict=True)
            around = torch.cat([checkpoint(self.neighbourhood, one, tails, near, use_reentrant=False) for one, near in chunks])
        return F.leaky_relu(self.sum(heads + around)) + F.leaky_relu(self.product(heads * around))

    def pooled(self, bags: BagBatch) -> tuple[Tensor, Tensor]:
        """Bags of embedded tiles → (B, H), and the scores (ΣN, 1)."""
        scores = self.attend(bags.features)
        return self.norm(segment_sum(segment_softmax(scores, bags) * bags.features, bags)), scores

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        bags = self.read(bags)
        tiles = torch.cat([self.embed(bag) for bag in self.project(bags.features).split(bags.lengths)])
        tiles = self.dropout(tiles)  # (ΣN, H)
        bag, scores = self.pooled(replace(bags, features=tiles))
        return BagOutput(
            self.classify(bag),  # (B, C)
            bag_embedding=bag,
            attention_logits=scores,
            tile_embedding=tiles,
            contributions=gradient_contributions(tiles, bags, lambda own: self.classify(self.pooled(own)[0])) if explain else None,
        )

"""ILRA-MIL: tiles exchange what they know through a few latent vectors, then one query pools them.

Xiang and Zhang 2023 (ICLR, "Exploring low-rank property in multiple instance learning"). Each block lets the latents read the
tiles and the tiles read the latents back: attention of all with all at the cost of N × 64.

- Linear layers stand before the attention's own, as in the authors' code: two in a row learn differently from one.
- Dropout, of which the authors have none, is on the tiles after each block.
- Bags are walked one by one: their arithmetic is dense.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.aggregators.explain import gradient_contributions
from wsimil.aggregators.packed import in_pieces
from wsimil.batch import Aggregator, BagBatch, BagOutput
from wsimil.errors import ConfigError

__all__ = ["ILRA"]


class Reading(nn.Module):
    """Queries (Q, D) read keys (N, D'): O = LN(q + MHA(q, k)), O = LN(O + ReLU(W O)), times SiLU(gate(query)) where gated.

    Returns the queries' new values (Q, H) and the scores (heads, Q, N) before softmax.
    """

    def __init__(self, query_dim: int, key_dim: int, hidden: int, heads: int, *, gated: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.query_inner = nn.Linear(query_dim, hidden), nn.Linear(hidden, hidden)
        self.key = nn.Sequential(nn.Linear(key_dim, hidden), nn.Linear(hidden, hidden))
        self.value = nn.Sequential(nn.Linear(key_dim, hidden), nn.Linear(hidden, hidden))
        self.mix = nn.Linear(hidden, hidden)
        self.norm, self.out, self.norm_out = nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        self.gate = nn.Linear(query_dim, hidden) if gated else None

    def forward(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        def by_head(values: Tensor) -> Tensor:
            return values.unflatten(1, (self.heads, -1)).transpose(0, 1)  # (heads, rows, H / heads)

        query = self.query(queries)  # (Q, H)
        q = by_head(self.query_inner(query))
        k, v = map(by_head, in_pieces(lambda rows: (self.key(rows), self.value(rows)), keys))
        # written out: at scores of 1e9 the gradient of the fused attention is not a number any more
        scores = q @ k.mT * q.shape[2] ** -0.5  # (heads, Q, N)
        read = (scores.softmax(2) @ v).transpose(0, 1).flatten(1)  # (Q, H)
        value = self.norm(query + self.mix(read))
        value = self.norm_out(value + F.relu(self.out(value)))
        if self.gate is not None:
            value = value * F.silu(self.gate(queries))
        return value, scores


class Exchange(nn.Module):
    """One block: latents read the tiles, tiles read the latents."""

    def __init__(self, dim: int, hidden: int, heads: int, latents: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(nn.init.xavier_uniform_(torch.empty(latents, hidden)))
        self.gather = Reading(hidden, dim, hidden, heads)
        self.spread = Reading(dim, hidden, hidden, heads)

    def forward(self, tiles: Tensor) -> Tensor:
        latents, _ = self.gather(self.latents, tiles)
        return in_pieces(lambda rows: self.spread(rows, latents)[:1], tiles)[0]  # (N, H)


class ILRA(Aggregator):
    """logits = W LN(…query reads tiles…) + b, the tiles after two exchanges with the latents.

    Contributions are gradient × input on the tiles as the query reads them.

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H; a multiple of `heads`.
        blocks: exchanges.
        heads: of each attention.
        latents: low rank, of the bag.
        dropout: on the tiles after each block.
    """

    contribution_kind = "gradient"

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        *,
        hidden: int = 256,
        blocks: int = 2,
        heads: int = 8,
        latents: int = 64,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ConfigError(f"hidden = {hidden} is not a multiple of heads = {heads}")
        self.dim, self.n_outputs = dim, n_outputs
        self.blocks = nn.ModuleList(Exchange(hidden if index else dim, hidden, heads, latents) for index in range(blocks))
        self.dropout = nn.Dropout(dropout)
        self.query = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, hidden)))
        self.pool = Reading(hidden, hidden, hidden, heads, gated=False)
        self.classify = nn.Linear(hidden, n_outputs)

    def embed(self, tiles: Tensor) -> Tensor:
        """(N, D) of one bag → (N, H)."""
        for block in self.blocks:
            tiles = self.dropout(block(tiles))
        return tiles

    def pooled(self, bags: BagBatch) -> tuple[Tensor, Tensor]:
        """Bags of embedded tiles → (B, H), and the scores (ΣN, heads)."""
        pooled = [self.pool(self.query, tiles) for tiles in bags.features.split(bags.lengths)]
        return torch.cat([bag for bag, _ in pooled]), torch.cat([scores[:, 0].T for _, scores in pooled])

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        bags = self.read(bags)
        tiles = torch.cat([self.embed(one) for one in bags.features.split(bags.lengths)])  # (ΣN, H)
        bag, scores = self.pooled(replace(bags, features=tiles))
        return BagOutput(
            self.classify(bag),  # (B, C)
            bag_embedding=bag,
            attention_logits=scores,
            tile_embedding=tiles,
            contributions=gradient_contributions(tiles, bags, lambda own: self.classify(self.pooled(own)[0])) if explain else None,
        )

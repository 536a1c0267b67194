"""Query decoder: every output has a query of its own, which reads the tiles and talks to the other queries.

A transformer decoder with one learned query per label, as Query2Label (Liu 2021, arXiv 2107.10834) has for images; for slides with
several labels at once: attention, embedding and contributions are per label.

- Layers are pre-norm: queries attend to one another, to the tiles, then a feed-forward layer.
- The attention column of a label is the mean over heads of the last layer, as a logarithm: its softmax over the bag is that mean.
- Contributions are gradient × input through what is read, the attention held: how much of a label's logit came from each tile.
  Values have no bias, so what a query reads is a sum over the tiles.
- Bags are walked one by one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wsimil.aggregators.explain import gradient_contributions
from wsimil.batch import Aggregator, BagBatch, BagOutput
from wsimil.errors import ConfigError

__all__ = ["QueryDecoder"]


class Reading(nn.Module):
    """Multi-head attention of queries (C, H) to keys (N, H): what they read (C, H), and the scores (heads, C, N)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.value, self.mix = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden)

    def forward(self, queries: Tensor, keys: Tensor, *, hold: bool = False) -> tuple[Tensor, Tensor]:
        """`hold`: no gradient through the attention."""

        def by_head(values: Tensor) -> Tensor:
            return values.unflatten(1, (self.heads, -1)).transpose(0, 1)  # (heads, rows, H / heads)

        query, key = by_head(self.query(queries)), by_head(self.key(keys))
        scores = query @ key.mT * query.shape[2] ** -0.5  # (heads, C, N)
        if hold:
            scores = scores.detach()
        read = scores.softmax(2) @ by_head(self.value(keys))
        return self.mix(read.transpose(0, 1).flatten(1)), scores


class Layer(nn.Module):
    """q ← q + self(LN q), q ← q + tiles(LN q), q ← q + FFN(LN q)."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_self, self.talk = nn.LayerNorm(hidden), Reading(hidden, heads)
        self.norm_cross, self.read = nn.LayerNorm(hidden), Reading(hidden, heads)
        self.norm_feed = nn.LayerNorm(hidden)
        self.feed = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * hidden, hidden))
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, tiles: Tensor, *, hold: bool = False) -> tuple[Tensor, Tensor]:
        normed = self.norm_self(queries)
        queries = queries + self.dropout(self.talk(normed, normed)[0])
        read, scores = self.read(self.norm_cross(queries), tiles, hold=hold)
        queries = queries + self.dropout(read)
        return queries + self.dropout(self.feed(self.norm_feed(queries))), scores


class QueryDecoder(Aggregator):
    """logit_c = w_c·LN(z_c) + b_c, z_c the query of output c after the layers; tiles are Dropout(LN(φ x)).

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H; a multiple of `heads`.
        layers: of the decoder.
        heads: of each attention.
        dropout: on the tiles, and on what each part of a layer adds.
    """

    attends_per_output = True
    contribution_kind = "gradient"

    def __init__(
        self, dim: int, n_outputs: int, *, hidden: int = 256, layers: int = 2, heads: int = 8, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ConfigError(f"hidden = {hidden} is not a multiple of heads = {heads}")
        self.dim, self.n_outputs = dim, n_outputs
        self.project = nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.Dropout(dropout))
        self.queries = nn.Parameter(torch.randn(n_outputs, hidden) * 0.02)
        self.layers = nn.ModuleList(Layer(hidden, heads, dropout) for _ in range(layers))
        self.norm, self.classify = nn.LayerNorm(hidden), nn.Linear(hidden, n_outputs)  # row c reads z_c alone

    def decode(self, tiles: Tensor, *, hold: bool = False) -> tuple[Tensor, Tensor]:
        """(N, H) of one bag → (C, H), and the logarithm of the last layer's attention (N, C)."""
        queries, scores = self.queries, tiles.new_empty(0)
        for layer in self.layers:
            queries, scores = layer(queries, tiles, hold=hold)
        logarithm = scores.float() if scores.dtype != torch.float64 else scores
        attention = logarithm.log_softmax(2).logsumexp(0) - math.log(len(scores))  # (C, N)
        return self.norm(queries), attention.T

    def logits(self, embedding: Tensor) -> Tensor:
        """(B, C, H) → (B, C)."""
        return (embedding * self.classify.weight).sum(2) + self.classify.bias

    def read_logits(self, bags: BagBatch) -> Tensor:
        """Bags of embedded tiles → (B, C), the attention held."""
        return self.logits(torch.stack([self.decode(tiles, hold=True)[0] for tiles in bags.features.split(bags.lengths)]))

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        bags = self.read(bags)
        tiles = self.project(bags.features)  # (ΣN, H)
        decoded = [self.decode(one) for one in tiles.split(bags.lengths)]
        embedding = torch.stack([one for one, _ in decoded])  # (B, C, H)
        return BagOutput(
            self.logits(embedding),
            bag_embedding=embedding,
            attention_logits=torch.cat([attention for _, attention in decoded]),  # (ΣN, C)
            tile_embedding=tiles,
            contributions=gradient_contributions(tiles, bags, self.read_logits) if explain else None,  # (ΣN, C)
        )

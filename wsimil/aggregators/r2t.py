"""R²T-MIL: tiles are re-embedded by attention within regions and between them, then pooled as in ABMIL.

Tang et al. 2024 (arXiv 2402.17228). The tiles of a bag, in file order, fill a square row by row; 8 × 8 regions divide it.

- The method goes by the order of tiles: bags written row by row make the square a rough picture of the tissue.
- EPEG, a convolution of the attention matrix along its queries, is the same convolution of the queries themselves (its bias
  falls out of the softmax): exact, and no matrix of N × N / 64 entries is ever held.
- Of the square only what holds tiles is computed. The authors' code pads it with zeros and lets tiles attend to them; `compat`
  does so too.
- Bags are walked one by one.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.aggregators.packed import pad, segment_softmax, segment_sum, softmax_attention, unpad
from wsimil.batch import Aggregator, BagBatch, BagOutput, offsets_of
from wsimil.config import Range
from wsimil.errors import ConfigError

__all__ = ["R2T"]


class Attention(nn.Module):
    """Multi-head self-attention of tokens (R, P, H) over P, those that the mask (R, P) says are real; R-MSA: R regions of P tiles.

    With `reach`, queries are first joined by those around them (EPEG).
    """

    def __init__(self, hidden: int, heads: int, reach: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.in_project = nn.Linear(hidden, 3 * hidden)
        self.around = nn.Conv1d(heads, heads, reach, padding=reach // 2, groups=heads, bias=False) if reach else None
        self.out_project, self.dropout = nn.Linear(hidden, hidden), nn.Dropout(dropout)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = self.in_project(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (R, heads, P, d)
        if self.around is not None:
            query = query if mask is None else query.masked_fill(~mask[:, None, :, None], 0)
            along = query.permute(0, 3, 1, 2)  # (R, d, heads, P)
            query = query + self.around(along.flatten(0, 1)).unflatten(0, along.shape[:2]).permute(0, 2, 3, 1)
        read = softmax_attention(query, key, value, None if mask is None else mask[:, None, None, :])
        return self.dropout(self.out_project(read.transpose(1, 2).flatten(2)))


class BetweenRegions(nn.Module):
    """CR-MSA: each region speaks through k representatives, which attend to those of other regions and report back."""

    def __init__(self, hidden: int, heads: int, representatives: int, dropout: float) -> None:
        super().__init__()
        self.assign = nn.Linear(hidden, representatives, bias=False)  # φ
        self.attend = Attention(hidden, heads, 0, dropout)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        logits = self.assign(tokens)  # (R, P, k)
        real = tokens.new_ones(1, 1, 1, dtype=torch.bool) if mask is None else mask.unsqueeze(2)
        gather = logits.masked_fill(~real, -torch.inf).softmax(1)
        spoken = (gather.mT @ tokens).transpose(0, 1)  # (k, R, H)
        heard = self.attend(spoken, None).transpose(0, 1)  # (R, k, H)
        least = logits.masked_fill(~real, torch.inf).amin(1, keepdim=True)
        most = logits.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
        scatter = (logits - least) / (most - least + 1e-8) * logits.softmax(2)
        return scatter.masked_fill(~real, 0) @ heard  # (R, P, H)


def regions_of(n_tiles: int, per_side: int) -> tuple[int, Tensor]:
    """Tiles fill a square row by row: its side, a multiple of `per_side`, and the region of every place (side²,)."""
    side = math.isqrt(n_tiles - 1) + 1
    side += -side % per_side
    place, size = torch.arange(side * side), side // per_side
    return side, place // side // size * per_side + place % side // size


class R2T(Aggregator):
    """logits = W Σ_i a_i z_i + b, the tiles re-embedded: z = LN(h + within(LN h) + between(LN …)), h = Dropout(ReLU(φ x)).

    The classifier is linear, so tile i contributes exactly a_i (W z_i + b), z_i what it became among the others.

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H; a multiple of `heads`.
        heads: of the attention within and between regions.
        regions: along a side of the square.
        reach: width of the EPEG convolution, odd; 0 leaves it out.
        representatives: k of each region.
        shortcut: add h once more after the two layers, as the authors do for some data sets.
        attention: width of the pooling's attention network.
        compat: let tiles attend to the zeros that fill the square, as the authors' code does.
        dropout: on h.
        inner_dropout: on what the attention layers give.
    """

    contribution_kind = "exact"

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        *,
        hidden: int = 512,
        heads: int = 8,
        regions: int = 8,
        reach: Annotated[int, Range(0)] = 15,
        representatives: int = 3,
        shortcut: bool = False,
        attention: int = 128,
        compat: bool = False,
        dropout: float = 0.25,
        inner_dropout: Annotated[float, Range(0, below=1)] = 0.1,
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ConfigError(f"hidden = {hidden} is not a multiple of heads = {heads}")
        if reach and reach % 2 == 0:
            raise ConfigError(f"reach = {reach} is even; a tile stands in the middle of its convolution")
        self.dim, self.n_outputs = dim, n_outputs
        self.regions, self.shortcut, self.compat = regions, shortcut, compat
        self.project = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.norm_within, self.within = nn.LayerNorm(hidden), Attention(hidden, heads, reach, inner_dropout)
        self.norm_between, self.between = nn.LayerNorm(hidden), BetweenRegions(hidden, heads, representatives, inner_dropout)
        self.norm = nn.LayerNorm(hidden)
        self.attend = nn.Sequential(nn.Linear(hidden, attention, bias=False), nn.ReLU(), nn.Linear(attention, 1, bias=False))
        self.classify = nn.Linear(hidden, n_outputs)

    def by_region(self, tiles: Tensor, layer: nn.Module) -> Tensor:
        """layer(tiles of each region (R, P, H), which are real (R, P), None: all), put back in file order: (N, H) → (N, H)."""
        side, region = regions_of(len(tiles), self.regions)
        filled = F.pad(tiles, (0, 0, 0, side * side - len(tiles))) if self.compat else tiles
        region = region[: len(filled)]
        order, counts = region.argsort(stable=True).to(tiles.device), region.bincount().tolist()  # known without asking a GPU
        # tiles come first in every region and what fills it after them, so that each region is a bag
        regions = BagBatch(filled, offsets_of([count for count in counts if count], tiles.device))
        dense, mask = pad(filled[order], regions)
        back = unpad(layer(dense, None if len(set(regions.lengths)) == 1 else mask), regions)
        return torch.empty_like(back).index_copy(0, order, back)[: len(tiles)]

    def embed(self, tiles: Tensor) -> Tensor:
        """(N, H) of one bag → (N, H)."""
        within = tiles + self.by_region(self.norm_within(tiles), self.within)
        between = within + self.by_region(self.norm_between(within), self.between)
        return self.norm(between + tiles if self.shortcut else between)

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        bags = self.read(bags)
        tiles = torch.cat([self.embed(bag) for bag in self.project(bags.features).split(bags.lengths)])  # (ΣN, H)
        scores = self.attend(tiles)  # (ΣN, 1)
        attention = segment_softmax(scores, bags)
        bag = segment_sum(attention * tiles, bags)  # (B, H)
        return BagOutput(
            self.classify(bag),  # (B, C)
            bag_embedding=bag,
            attention_logits=scores,
            tile_embedding=tiles,
            contributions=attention * self.classify(tiles) if explain else None,  # (ΣN, C)
        )

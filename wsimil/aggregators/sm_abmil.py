"""Sm-ABMIL: attention smoothed over the tissue, so that a tile is judged with those around it.

Castro-Macías et al. 2024 (arXiv 2410.03276). The smooth operator is G_0 = U, G_t = α Â G_{t-1} + (1 - α) U with T steps.

- Â is the symmetrically normalised adjacency of tiles that touch or overlap: on a grid, the eight neighbours. It is sparse: a
  slide of 100,000 tiles has 800,000 entries.
- α = 1 / (1 + γ) with γ learned, kept positive as exp: a negative γ would amplify instead of smooth.
- A tile without neighbours keeps its own value. (A zero row in Â, as in other code, would shrink it to (1 - α) U.)
- The paper's spectral normalisation of the attention layers is not here.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from wsimil.aggregators.first_layer import FirstLayer
from wsimil.aggregators.packed import in_pieces, segment_softmax, segment_sum
from wsimil.batch import Aggregator, BagBatch, BagOutput
from wsimil.config import Range
from wsimil.errors import AggregatorInputError, ConfigError

__all__ = ["SmABMIL", "neighbours"]

REACH = 1.13
"""Tiles whose centres are nearer than this many sides, in x and in y, are neighbours: those that touch or overlap, with slack for
rounded pixels. No multiple of a fraction by which tiles overlap, so that rounding never decides."""

CROWD = 128
"""Candidates per tile above which the positions cannot be right: an overlap of three quarters gives 81."""


def neighbours(bags: BagBatch) -> tuple[Tensor, Tensor]:
    """Rows (E,), (E,) of all ordered pairs of neighbouring tiles; bags are never joined.

    Tiles are sorted into cells of `REACH` sides, and each looks through its own and the eight cells around: O(N).

    Raises:
        AggregatorInputError: so many tiles in one place that the positions must be wrong.
    """
    assert bags.coords_um is not None and bags.tile_um is not None  # `Aggregator.check` made sure
    bag = bags.bag_index
    coords = bags.coords_um / bags.tile_um[bag].unsqueeze(1)  # (ΣN, 2) in sides of a tile
    cells = (coords / REACH).floor().long()
    cells = cells - cells.amin(0) + 1  # (ΣN, 2) from 1: room for the cells around
    height, width = (cells.amax(0) + 2).tolist()
    keys = (bag * height + cells[:, 0]) * width + cells[:, 1]
    sorted_keys, order = keys.sort()
    tiles = torch.arange(len(keys), device=keys.device)
    rows, columns = [], []
    for step in (down * width + right for down in (-1, 0, 1) for right in (-1, 0, 1)):
        first = torch.searchsorted(sorted_keys, keys + step)
        counts = torch.searchsorted(sorted_keys, keys + step, right=True) - first  # (ΣN,) candidates of each tile
        total = int(counts.sum())
        if total > CROWD * len(keys):
            raise AggregatorInputError(
                f"{total // len(keys)} tiles lie within reach of a tile on average; coords_um and tile_um do not fit together"
            )
        row = tiles.repeat_interleave(counts, output_size=total)
        place = torch.arange(total, device=keys.device) - (counts.cumsum(0) - counts)[row]
        column = order[first[row] + place]
        near = ((coords[row] - coords[column]).abs().amax(1) < REACH) & (row != column)
        rows.append(row[near])
        columns.append(column[near])
    return torch.cat(rows), torch.cat(columns)


class Smooth(nn.Module):
    """The operator Sm: values (ΣN, K) smoothed over the neighbours, in float32 at least."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.log_gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, values: Tensor, bags: BagBatch) -> Tensor:
        values = values if values.dtype == torch.float64 else values.float()
        rows, columns = neighbours(bags)
        degree = torch.bincount(rows, minlength=len(values)).to(values.dtype)  # (ΣN,)
        alone = (degree == 0).nonzero().squeeze(1)
        weights = torch.cat([(degree[rows] * degree[columns]).rsqrt(), torch.ones_like(degree[alone])])
        places = torch.stack([torch.cat([rows, alone]), torch.cat([columns, alone])])
        alpha = 1 / (1 + self.log_gamma.to(values.dtype).exp())
        with torch.autocast(values.device.type, enabled=False):
            adjacency = torch.sparse_coo_tensor(places, weights, (len(values), len(values)), check_invariants=False).coalesce()
            smooth = values
            for _ in range(self.steps):
                smooth = alpha * torch.sparse.mm(adjacency, smooth) + (1 - alpha) * values
        return smooth


class SmABMIL(Aggregator):
    """ABMIL with the smooth operator on the tiles ("early"), in the attention network ("mid") or on its scores ("late").

    The classifier is linear, so tile i contributes exactly a_i (W g_i + b), g its embedding (with "early": the smoothed one).

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H of φ.
        attention: width L of the attention network.
        where: "early", "mid" or "late".
        steps: T.
        dropout: on φ's output.
    """

    needs_coords = True
    contribution_kind = "exact"
    first_layer = "project.0"

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        *,
        hidden: int = 256,
        attention: int = 128,
        where: str = "early",
        steps: Annotated[int, Range(0)] = 10,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if where not in ("early", "mid", "late"):
            raise ConfigError(f"where = {where!r}; expected early, mid or late")
        self.dim, self.n_outputs, self.where = dim, n_outputs, where
        self.project = nn.Sequential(FirstLayer(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.feature = nn.Linear(hidden, attention)
        self.score = nn.Linear(attention, 1, bias=False)
        self.smooth = Smooth(steps)
        self.classify = nn.Linear(hidden, n_outputs)

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        (tiles,) = in_pieces(lambda piece: (self.project(piece),), bags.features)  # (ΣN, H)
        if self.where == "early":
            tiles = self.smooth(tiles, bags)
        features = self.feature(tiles)  # (ΣN, L)
        if self.where == "mid":
            features = self.smooth(features, bags)
        scores = self.score(torch.tanh(features))  # (ΣN, 1)
        if self.where == "late":
            scores = self.smooth(scores, bags)
        attention = segment_softmax(scores, bags)  # (ΣN, 1)
        bag = segment_sum(attention * tiles, bags)  # (B, H)
        return BagOutput(
            self.classify(bag),  # (B, C)
            bag_embedding=bag,
            attention_logits=scores,
            tile_embedding=tiles,
            contributions=attention * self.classify(tiles) if explain else None,  # (ΣN, C)
        )

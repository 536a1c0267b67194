"""TransMIL: two Nyström attention layers over the tiles of a slide and, between them, convolutions over their places.

Shao et al. 2021 (arXiv 2106.00908); the attention is that of Xiong et al. 2021 (arXiv 2102.03902).

- Bags are read one at a time: landmarks are means of segments of the sequence, and no bag's may hold another's tiles.
- The paper lays tiles out in the order of the file, in a square filled up with the first tiles again: `tile_order="file"`. With
  `"coords"` each tile lies where it lies on the slide, and the order of the file changes nothing.
- softmax(Q K̃ᵀ) P softmax(Q̃ Kᵀ) V is taken from the right, so that nothing wider than N × head width is ever held.
- Nyström attention is computed in float32 at least: the pseudo-inverse has no digits to give away.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.aggregators.explain import gradient_contributions
from wsimil.aggregators.packed import softmax_attention
from wsimil.batch import Aggregator, BagBatch, BagOutput
from wsimil.config import Range
from wsimil.errors import ConfigError

__all__ = ["NystromAttention", "PlaceConvolutions", "TransMIL", "pseudo_inverse"]


def pseudo_inverse(matrix: Tensor, steps: int) -> Tensor:
    """(K, M, M) → (K, M, M), approximately A⁺: cubic iteration from Aᵀ / (‖A‖₁ ‖A‖∞), the norms being the largest of the K."""
    size = matrix.abs()
    inverse = matrix.mT / (size.sum(-1).max() * size.sum(-2).max())
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(steps):
        product = matrix @ inverse
        inverse = inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product))) / 4
    return inverse


class NystromAttention(nn.Module):
    """Self-attention of one sequence (N, H) → (N, H), plus a depthwise convolution of the values along the sequence.

    Args:
        landmarks: M segments whose means stand for all queries and keys; None computes the softmax attention itself.
        kernel: reach of the convolution, in tokens.
    """

    def __init__(
        self, hidden: int, *, heads: int = 8, landmarks: int | None = 256, steps: int = 6, kernel: int = 33, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.heads, self.landmarks, self.steps = heads, landmarks, steps
        self.to_qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.convolve = nn.Conv1d(heads, heads, kernel, padding=kernel // 2, groups=heads, bias=False)
        self.out = nn.Sequential(nn.Linear(hidden, hidden), nn.Dropout(dropout))

    def forward(self, tokens: Tensor, *, first: int | None = None) -> Tensor:
        """All rows of the result, or the `first` ones alone, which costs less."""
        # zeros in front make the segments equally long, as the reference has it: they are keys like any other
        front = 0 if self.landmarks is None else -len(tokens) % self.landmarks
        query, key, value = self._heads(F.pad(tokens, (0, 0, front, 0)))  # (K, N, H/K) each
        wanted = slice(front, None if first is None else front + first)
        with torch.autocast(tokens.device.type, enabled=False):
            mixed = self._attend(query, key, value, wanted) + self._along(value)[:, wanted]  # (K, N or first, H/K)
        return self.out(mixed.transpose(0, 1).flatten(1))

    def scores_of_first(self, tokens: Tensor) -> Tensor:
        """(N, H) → (N - 1, K): logits of the attention that the first token pays to the others, before any approximation."""
        query, key, _ = self._heads(tokens)
        return (key[:, 1:] @ query[:, 0].unsqueeze(2)).squeeze(2).T / math.sqrt(query.shape[2])

    def _heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.to_qkv(tokens)
        if self.landmarks is not None:
            qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
        query, key, value = qkv.unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        return query, key, value

    def _along(self, value: Tensor) -> Tensor:
        """The convolution, one kernel for each head: (K, N, d) → the same."""
        kernel, reach = self.convolve.weight.to(value.dtype), self.convolve.kernel_size[0] // 2
        return F.conv1d(value.permute(2, 0, 1), kernel, padding=reach, groups=self.heads).permute(1, 2, 0)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, wanted: slice) -> Tensor:
        if self.landmarks is None:
            return _softmax_attention(query[:, wanted], key, value)
        query_means, key_means = (part.unflatten(1, (self.landmarks, -1)).mean(2) for part in (query, key))  # (K, M, H/K)
        between = (query_means @ key_means.mT / math.sqrt(query.shape[2])).softmax(-1)  # (K, M, M)
        gathered = pseudo_inverse(between, self.steps) @ _softmax_attention(query_means, key, value)  # (K, M, H/K)
        return _softmax_attention(query[:, wanted], key_means, gathered)


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(K, N, d), (K, M, d), (K, M, d) → (K, N, d); the fused kernels want a leading axis."""
    return softmax_attention(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)).squeeze(0)


class PlaceConvolutions(nn.Module):
    """x + conv₇ x + conv₅ x + conv₃ x, each depthwise (the paper's PPEG): (H, rows, columns) → the same.

    The four are one linear map, so they are summed into one 7 × 7 kernel before the image is touched.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.seven, self.five, self.three = (nn.Conv2d(hidden, hidden, size, groups=hidden) for size in (7, 5, 3))

    def forward(self, image: Tensor) -> Tensor:
        kernel = self.seven.weight + F.pad(self.five.weight, [1] * 4) + F.pad(self.three.weight, [2] * 4)  # (H, 1, 7, 7)
        biases = [conv.bias for conv in (self.seven, self.five, self.three) if conv.bias is not None]
        bias = biases[0] + biases[1] + biases[2]  # of torch.stack the three gradients would be one piece of memory, added to thrice
        return image + F.conv2d(image.unsqueeze(0), kernel, bias, padding=3, groups=len(image)).squeeze(0)


class TransMIL(Aggregator):
    """logits = W LN(class token) + b after attention, place convolutions, attention; φ = Linear, ReLU, Dropout.

    `attention_logits` are those of the class token in the second layer, one column for each head: of the softmax attention
    that the Nyström one approximates (whose own weights may be negative).

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H of φ, a multiple of `heads`.
        attention: "nystrom" with H/2 landmarks, or "sdpa", softmax attention among all tiles at N² cost in time, not in memory.
        tile_order: "file" as in the paper, or "coords", on the slide's own grid.
        dropout: on φ's output (none in the paper).
        attention_dropout: on each attention layer's output.
    """

    contribution_kind = "gradient"

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        *,
        hidden: int = 512,
        heads: int = 8,
        attention: str = "nystrom",
        tile_order: str = "file",
        dropout: float = 0.0,
        attention_dropout: Annotated[float, Range(0, below=1)] = 0.1,
    ) -> None:
        super().__init__()
        if attention not in ("nystrom", "sdpa"):
            raise ConfigError(f"TransMIL: attention {attention!r} is unknown; expected nystrom or sdpa")
        if tile_order not in ("file", "coords"):
            raise ConfigError(f"TransMIL: tile_order {tile_order!r} is unknown; expected file or coords")
        if hidden % heads:
            raise ConfigError(f"TransMIL: hidden {hidden} is not a multiple of the {heads} heads")
        self.dim, self.n_outputs, self.needs_coords = dim, n_outputs, tile_order == "coords"
        self.project = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.class_token = nn.Parameter(torch.randn(1, hidden))
        landmarks = max(1, hidden // 2) if attention == "nystrom" else None
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attend1 = NystromAttention(hidden, heads=heads, landmarks=landmarks, dropout=attention_dropout)
        self.attend2 = NystromAttention(hidden, heads=heads, landmarks=landmarks, dropout=attention_dropout)
        self.places = PlaceConvolutions(hidden)
        self.norm = nn.LayerNorm(hidden)
        self.classify = nn.Linear(hidden, n_outputs)

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        bags = self.read(bags)
        tiles = self.project(bags.features)  # (ΣN, H)
        embedding, scores = self._read(tiles, bags)
        contributions = None
        if explain:
            contributions = gradient_contributions(
                tiles, bags, lambda embedded: self.classify(self._read(embedded.features, embedded)[0])
            )
        return BagOutput(
            self.classify(embedding),  # (B, C)
            bag_embedding=embedding,
            attention_logits=scores,
            tile_embedding=tiles,
            contributions=contributions,
        )

    def _read(self, tiles: Tensor, bags: BagBatch) -> tuple[Tensor, Tensor]:
        """Embeddings of tiles (ΣN, H) → embeddings of bags (B, H), attention logits (ΣN, K)."""
        embeddings, scores = [], []
        for index, of_bag in enumerate(tiles.split(bags.lengths)):
            if self.needs_coords:
                bag = bags.bag(index)
                assert bag.coords_um is not None and bag.tile_um is not None  # `check` made sure
                cells, shape = grid_cells(bag.coords_um, bag.tile_um)
                order = _reading_order(cells, bag.coords_um)
                sequence, cells = of_bag[order], cells[order]
                back = order.argsort()
            else:
                side = math.isqrt(len(of_bag) - 1) + 1
                sequence = torch.cat([of_bag, of_bag[: side**2 - len(of_bag)]])  # a full square
                cells, shape, back = None, (side, side), torch.arange(len(of_bag), device=tiles.device)
            tokens = torch.cat([self.class_token.to(sequence.dtype), sequence])  # (1 + N, H)
            tokens = tokens + self.attend1(self.norm1(tokens))
            tokens = torch.cat([tokens[:1], self._by_place(tokens[1:], cells, shape)])
            normed = self.norm2(tokens)
            scores.append(self.attend2.scores_of_first(normed)[back])
            embeddings.append(self.norm((tokens[:1] + self.attend2(normed, first=1))[0]))
        return torch.stack(embeddings), torch.cat(scores)

    def _by_place(self, tokens: Tensor, cells: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Place convolutions of tokens (N, H) that fill a grid row by row, or lie in its `cells` (N, 2)."""
        rows, columns = shape
        if cells is None:
            image = tokens.T.unflatten(1, shape)  # (H, rows, columns)
            return self.places(image).flatten(1).T
        flat = cells[:, 0] * columns + cells[:, 1]  # (N,)
        # tiles that overlap may share a cell: it holds their mean, and what it gains goes to each of them
        counts = flat.bincount(minlength=rows * columns).clamp(min=1).to(tokens.dtype)
        image = tokens.new_zeros(rows * columns, tokens.shape[1]).index_add(0, flat, tokens) / counts.unsqueeze(1)
        gained = self.places(image.T.unflatten(1, shape)).flatten(1).T - image
        return tokens + gained[flat]


_ON_EDGE = 0.13
"""Sides of a tile by which rounded pixels may be off: no fraction by which tiles overlap."""


def grid_cells(coords_um: Tensor, tile_um: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Places (N, 2) → row and column of each tile (N, 2) on a grid of tiles, and the grid's shape.

    A tile is in the cell that its corner lies in, or lies as good as on the edge of: half-overlapping ones are two to a cell.
    """
    cells = ((coords_um - coords_um.amin(0)) / tile_um + _ON_EDGE).floor().long().flip(1)  # (N, 2)
    rows, columns = (cells.amax(0) + 1).tolist()
    return cells, (rows, columns)


def _reading_order(cells: Tensor, coords_um: Tensor) -> Tensor:
    """(N,) row by row; tiles that share a cell by their exact places."""
    order = torch.arange(len(cells), device=cells.device)
    for key in (coords_um[:, 0], coords_um[:, 1], cells[:, 1], cells[:, 0]):  # the last is the first that counts
        order = order[key[order].argsort(stable=True)]
    return order

"""Arithmetic on packed bags: softmax and sums within each bag.

- Works on any device and differentiates; bags never see one another.
- Sums in float32 at least: a bag of 100,000 tiles would lose its small weights in half precision.
- `pad` is the only place where parts of different lengths are padded: what needs a dense tensor gets the mask with it, and `unpad`
  takes it back. What a paper itself fills up (TransMIL's square and segments, R²T's with `compat`) is filled within one bag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wsimil.aggregators import fused
from wsimil.batch import BagBatch

__all__ = [
    "in_pieces",
    "pad",
    "recomputing",
    "segment_argmax",
    "segment_max",
    "segment_mean",
    "segment_softmax",
    "segment_sum",
    "segment_topk",
    "segment_weighted_sum",
    "softmax_attention",
    "unpad",
]


_ROWS_OF_A_THREAD = 1024
_RECOMPUTED_FROM = 65_536
_FEW = 8
"""Columns; for more of them a matrix product is faster."""


_AS_IT_IS = nullcontext()
_around: ContextVar[AbstractContextManager | None] = ContextVar("around", default=_AS_IT_IS)


@contextmanager
def recomputing(around: AbstractContextManager | None) -> Iterator[None]:
    """What `in_pieces` computes again on the way back, it computes inside of `around`; None: it computes nothing again.

    For whoever gives an aggregator other weights for the time of a call: on the way back that time is over. `around` is entered
    many times.
    """
    token = _around.set(around)
    try:
        yield
    finally:
        _around.reset(token)


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def in_pieces(function: Callable[[Tensor], tuple[Tensor, ...]], tiles: Tensor) -> tuple[Tensor, ...]:
    """function(tiles), for one that takes each row by itself: on a CPU in pieces that stay in its cache.

    Very many rows are taken in pieces anywhere, and in training what happens inside is then computed again on the way back:
    memory grows with what the function returns, and no longer with what it goes through.
    """
    around, many = _around.get(), len(tiles) >= _RECOMPUTED_FROM
    recomputed = around is not None and torch.is_grad_enabled() and many
    on_cpu = tiles.device.type == "cpu"
    piece = _RECOMPUTED_FROM // 4
    if on_cpu:
        piece = min(piece, _ROWS_OF_A_THREAD * torch.get_num_threads())
    if len(tiles) <= piece or not (on_cpu or recomputed or (many and not torch.is_grad_enabled())):
        return function(tiles)
    pieces = tiles.split(piece)
    if recomputed:
        inside = _AS_IT_IS, around or _AS_IT_IS
        found = [checkpoint(function, piece, use_reentrant=False, context_fn=lambda: inside) for piece in pieces]
    else:
        found = [function(piece) for piece in pieces]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def segment_sum(values: Tensor, bags: BagBatch) -> Tensor:
    """(ΣN, K) → (B, K)."""
    # each bag by itself: adding rows up one by one loses digits where there are a hundred thousand
    return torch.stack([one.sum(0) for one in _wide(values).split(bags.lengths)])


def segment_mean(values: Tensor, bags: BagBatch) -> Tensor:
    """(ΣN, K) → (B, K)."""
    return segment_sum(values, bags) / bags.sizes.unsqueeze(1)


def segment_weighted_sum(weights: Tensor, values: Tensor, bags: BagBatch) -> Tensor:
    """weights (ΣN, K), values (ΣN, H) → (B, K, H): Σ_i w_ik v_i, without a tensor of ΣN × K × H."""
    weights = _wide(weights)
    if weights.shape[1] <= _FEW and values.dtype != torch.float16 and fused.applies(values, weights):
        return fused.weighted_sum(weights, values, bags.bounds)
    values = _wide(values)
    with torch.autocast(weights.device.type, enabled=False):
        # split, not slices: the gradient of a slice is a tensor of zeros as large as the whole
        sizes = bags.lengths
        return torch.stack([one.T @ other for one, other in zip(weights.split(sizes), values.split(sizes), strict=True)])


def segment_max(values: Tensor, bags: BagBatch) -> Tensor:
    """(ΣN, K) → (B, K)."""
    values = _wide(values)
    if len(bags) == 1:
        return values.amax(0, keepdim=True)
    index = bags.bag_index.unsqueeze(1).expand_as(values)
    lowest = values.new_full((len(bags), values.shape[1]), -torch.inf)
    return lowest.scatter_reduce(0, index, values, "amax")


def segment_softmax(logits: Tensor, bags: BagBatch) -> Tensor:
    """(ΣN, K) → (ΣN, K): each column sums to 1 within each bag."""
    # each bag by itself: the way back from "the row of my bag", where 100,000 tiles read one row, is slow on a GPU
    return torch.cat([one.softmax(0) for one in _wide(logits).split(bags.lengths)])


def segment_argmax(values: Tensor, bags: BagBatch) -> Tensor:
    """(ΣN, K) → (B, K) rows of the packed batch: where each column is largest in each bag, the first of equals."""
    return torch.stack([values[rows].argmax(0) + rows.start for rows in _rows(bags)])


def segment_topk(values: Tensor, bags: BagBatch, k: int) -> list[Tensor]:
    """(ΣN,) → for each bag the rows of its min(k, N) largest values, largest first."""
    return [values[rows].topk(min(k, rows.stop - rows.start)).indices + rows.start for rows in _rows(bags)]


def _rows(bags: BagBatch) -> list[slice]:
    offsets = bags.bounds
    return [slice(start, end) for start, end in pairwise(offsets)]


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, multiple: int | None = None
) -> Tensor:
    """softmax(q kᵀ / √d + mask) v of (…, M, d), (…, N, d), (…, N, v) → (…, M, v), by a fused kernel: without M × N memory.

    Args:
        multiple: of which those kernels want the widths; zeros fill what is missing. By default 8 on a GPU; the CPU takes any.
    """
    width, narrow = query.shape[-1], value.shape[-1]
    multiple = multiple or (8 if query.device.type == "cuda" else 1)
    wide = -(-max(width, narrow) // multiple) * multiple  # and values as wide as keys
    query, key, value = (F.pad(part, (0, wide - part.shape[-1])) if part.shape[-1] < wide else part for part in (query, key, value))
    read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=width**-0.5)
    return read[..., :narrow]


def pad(values: Tensor, bags: BagBatch, *, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """(ΣN, K) → dense (B, largest N, K), and the mask (B, largest N) bool of what is real. Gradients pass."""
    mask = torch.arange(max(bags.lengths), device=values.device) < bags.sizes.unsqueeze(1)  # (B, N)
    dense = values.new_full((*mask.shape, values.shape[1]), fill)
    return dense.masked_scatter(mask.unsqueeze(2), values), mask


def unpad(dense: Tensor, bags: BagBatch) -> Tensor:
    """(B, largest N, K), as `pad` makes it of these bags → (ΣN, K)."""
    bag = bags.bag_index
    place = torch.arange(len(bag), device=bag.device) - bags.offsets[bag]
    return dense.flatten(0, 1)[bag * dense.shape[1] + place]  # not by the mask: a GPU would be asked how many there are

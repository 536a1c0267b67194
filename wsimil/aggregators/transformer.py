"""A transformer over the tiles of a slide: class token, pre-norm layers, softmax attention among all tiles of a bag.

The aggregator of Wagner et al. 2023 (arXiv 2301.09617) and of STAMP (El Nahhas 2023, arXiv 2312.10944); with `alibi_um`, attention
falls with the distance between tiles in micrometres (after Press et al. 2022, arXiv 2108.12409).

- Linear layers see the packed batch, attention sees one bag at a time: no padding, no mask. Time grows with N², memory does not.
- Distances are those on the glass, so a model can read bags of another scale; the class token is at distance zero of all.
- The last layer is computed for the class token alone: nothing else of it is read.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wsimil.aggregators.explain import gradient_contributions
from wsimil.aggregators.packed import softmax_attention
from wsimil.batch import Aggregator, BagBatch, BagOutput
from wsimil.config import Range
from wsimil.errors import ConfigError

__all__ = ["EncoderLayer", "TransformerMIL"]

MASK_ELEMENTS = 2**24
"""A mask of distances is made for so many (head, query, key) at a time: 64 MB."""


class EncoderLayer(nn.Module):
    """x + attention(LN x), then x + FFN(LN x): the pre-norm layer of `torch.nn.TransformerEncoderLayer`, on packed sequences.

    Args:
        hidden: width H.
        heads: K, each H / K wide.
        ffn: width of the feed-forward network, with GELU.
        dropout: on what attention and feed-forward network give, and within the latter.
        alibi_um: see `TransformerMIL`.
    """

    slopes: Tensor | None

    def __init__(self, hidden: int, *, heads: int, ffn: int, dropout: float, alibi_um: float | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.to_qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Sequential(nn.Linear(hidden, hidden), nn.Dropout(dropout))
        self.ffn = nn.Sequential(
            nn.Linear(hidden, ffn), nn.GELU(), nn.Dropout(dropout), nn.Linear(ffn, hidden), nn.Dropout(dropout)
        )
        slopes = None if alibi_um is None else 2.0 ** (-8 * torch.arange(1, heads + 1) / heads) / alibi_um  # (K,) per µm
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, tokens: Tensor, sizes: list[int], places: list[Tensor] | None) -> Tensor:
        """tokens (ΣN, H) of sequences of `sizes`, `places` (N, 2) in µm of all but the first token of each → (ΣN, H)."""
        query, key, value = self._heads(tokens)  # (ΣN, K, H/K) each
        parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), places or [None] * len(sizes), strict=True)
        return self._add(tokens, torch.cat([self._attend(*part) for part in parts]))

    def first(self, tokens: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        """The same for the first token of each sequence alone (B, H), and its attention logits over the others (ΣN - B, K)."""
        starts = [0, *accumulate(sizes)][:-1]
        query, key, value = self._heads(tokens)
        query = query[starts]  # (B, K, H/K)
        mixed, scores = [], []
        for own, keys, values in zip(query, key.split(sizes), value.split(sizes), strict=True):
            logits = torch.einsum("kd,nkd->nk", own, keys) / own.shape[1] ** 0.5  # (N, K)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            mixed.append(torch.einsum("nk,nkd->kd", logits.softmax(0), values.to(logits.dtype)))
            scores.append(logits[1:])
        return self._add(tokens[starts], torch.stack(mixed)), torch.cat(scores)

    def _heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.to_qkv(self.norm1(tokens)).unflatten(1, (3, self.heads, -1)).unbind(1)
        return query, key, value

    def _add(self, tokens: Tensor, mixed: Tensor) -> Tensor:
        tokens = tokens + self.out(mixed.flatten(1))
        return tokens + self.ffn(self.norm2(tokens))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, places: Tensor | None) -> Tensor:
        """(N, K, d) of one sequence → (N, K, d)."""
        query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))  # (1, K, N, d)
        if places is None or self.slopes is None:
            return softmax_attention(query, key, value).squeeze(0).transpose(0, 1)
        step = max(1, MASK_ELEMENTS // (self.heads * key.shape[2]))
        mixed = []
        for start in range(0, query.shape[2], step):
            part = query[:, :, start : start + step], key, value, places, start
            # a mask is made again for the backward pass: kept, they would be N² in all
            mixed.append(checkpoint(self._attend_from, *part, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(mixed, 2).squeeze(0).transpose(0, 1)

    def _attend_from(self, query: Tensor, key: Tensor, value: Tensor, places: Tensor, start: int) -> Tensor:
        """Of the tokens from `start` on: (1, K, M, d) and keys, values (1, K, N, d) → (1, K, M, d)."""
        assert self.slopes is not None
        everyone = F.pad(places, (0, 0, 1, 0))  # (N, 2): the first token is nowhere, its distances are set to zero
        own = everyone[start : start + query.shape[2]]
        # all heads at once: one more tensor of (M, N) would leave the memory in holes that the next part does not fit into
        slopes = self.slopes.to(places.dtype)[:, None, None]
        if places.device.type == "cuda":  # where cdist starts a group of threads for each pair
            mask = -slopes * torch.hypot(*(own[:, None, axis] - everyone[None, :, axis] for axis in (0, 1)))  # (K, M, N)
        else:
            mask = torch.cdist(slopes * own, slopes * everyone, compute_mode="donot_use_mm_for_euclid_dist").neg_()
        mask[:, :, 0] = 0
        if start == 0:
            mask[:, 0] = 0
        return softmax_attention(query, key, value, mask.to(query.dtype).unsqueeze(0))


class TransformerMIL(Aggregator):
    """logits = W LN(class token) + b behind `layers` layers; φ = Linear, Dropout.

    `attention_logits` are those of the class token in the last layer, one column for each head.

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H of φ, a multiple of `heads`.
        layers: at least 1.
        ffn: width of the feed-forward networks; 4 H by default.
        dropout: on φ's output and in every layer.
        alibi_um: head k of K lowers the attention logit between two tiles by 2^(-8k/K) for each `alibi_um` between them
            (k = 1 … K); None for attention that knows no places.
    """

    contribution_kind = "gradient"

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        *,
        hidden: int = 512,
        layers: int = 2,
        heads: int = 8,
        ffn: int | None = None,
        dropout: float = 0.1,
        alibi_um: Annotated[float, Range(1)] | None = None,
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ConfigError(f"TransformerMIL: hidden {hidden} is not a multiple of the {heads} heads")
        if layers < 1:
            raise ConfigError(f"TransformerMIL: {layers} layers; expected at least 1")
        self.dim, self.n_outputs, self.needs_coords = dim, n_outputs, alibi_um is not None
        self.project = nn.Sequential(nn.Linear(dim, hidden), nn.Dropout(dropout))
        self.class_token = nn.Parameter(0.02 * torch.randn(1, hidden))
        self.layers = nn.ModuleList(
            EncoderLayer(hidden, heads=heads, ffn=ffn or 4 * hidden, dropout=dropout, alibi_um=alibi_um) for _ in range(layers - 1)
        )
        self.last_layer = EncoderLayer(hidden, heads=heads, ffn=ffn or 4 * hidden, dropout=dropout)
        self.norm = nn.LayerNorm(hidden)
        self.classify = nn.Linear(hidden, n_outputs)

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        bags = self.read(bags)
        tiles = self.project(bags.features)  # (ΣN, H)
        embedding, scores = self._read(tiles, bags)
        contributions = None
        if explain:
            contributions = gradient_contributions(tiles, bags, lambda own: self.classify(self._read(own.features, own)[0]))
        return BagOutput(
            self.classify(embedding),  # (B, C)
            bag_embedding=embedding,
            attention_logits=scores,
            tile_embedding=tiles,
            contributions=contributions,
        )

    def _read(self, tiles: Tensor, bags: BagBatch) -> tuple[Tensor, Tensor]:
        """Embeddings of tiles (ΣN, H) → embeddings of bags (B, H), attention logits (ΣN, K)."""
        sizes = bags.lengths
        token = self.class_token.to(tiles.dtype)
        tokens = torch.cat([part for of_bag in tiles.split(sizes) for part in (token, of_bag)])  # (ΣN + B, H)
        longer = [size + 1 for size in sizes]
        places = None
        if self.needs_coords:
            assert bags.coords_um is not None  # `check` made sure
            # a hundredth of a micrometre is left of float32 at the far end of a slide
            places = list(bags.coords_um.to(torch.promote_types(tiles.dtype, torch.float32)).split(sizes))
        for layer in self.layers:
            tokens = layer(tokens, longer, places)
        embedding, scores = self.last_layer.first(tokens, longer)
        return self.norm(embedding), scores

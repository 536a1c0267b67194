"""SimpleMIL: gated attention that sees a random part of the features at every step, and all parts in turn when it predicts.

Luo et al. 2025 (nnMIL, arXiv 2511.14907).

- Only the attention is deprived: pooling and classifier have every feature.
- The part is smaller than the whole, for narrow encoders too: at most half of the features (the authors' code takes
  `hidden` of them, which for a width of 256 or less drops nothing and is plain attention).
- Prediction averages over parts that follow from a permutation kept with the weights. The classifier is linear, so the mean of
  the parts' logits is the logit of their mean attention: computed once, with exact contributions.
- Of log-hazards (Cox) the mean is taken, too; the authors take the logarithm of the mean hazard, of which no tile has a share.
- Which tiles of a slide are seen in an epoch is the data set's business, and packed bags have no padding to attend to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.aggregators.packed import segment_softmax, segment_sum
from wsimil.batch import Aggregator, BagBatch, BagOutput
from wsimil.errors import ConfigError

__all__ = ["SimpleMIL"]


class SimpleMIL(Aggregator):
    """logits = W Σ_i a_i h_i + b, a the softmax of w·(tanh(V_S h_S) ⊙ σ(U_S h_S)) for a part S of the features.

    When predicting, `attention_logits` are the logarithms of the mean of the parts' attentions.

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H of the attention network.
        n_features: size of S; min(H, D / 2) by default.
        overlap: parts that a feature is in when predicting: each part begins |S| / `overlap` features after the one before.
        dropout: on both factors of the attention network.
    """

    contribution_kind = "exact"
    permutation: Tensor

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        *,
        hidden: int = 256,
        n_features: int | None = None,
        overlap: int = 4,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        self.dim, self.n_outputs = dim, n_outputs
        self.n_features = max(1, min(hidden, dim // 2)) if n_features is None else n_features
        if not 1 <= self.n_features <= dim:
            raise ConfigError(f"n_features is {n_features}; the features of these bags have {dim} numbers, expected 1 to {dim}")
        self.overlap = overlap
        self.feature, self.gate = nn.Linear(dim, hidden), nn.Linear(dim, hidden)  # V, U
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(hidden, 1)  # w
        self.classify = nn.Linear(dim, n_outputs)
        self.register_buffer("permutation", torch.randperm(dim, generator=torch.Generator().manual_seed(42)))

    def parts(self) -> list[Tensor]:
        """The features that the attention sees, one tensor of indices for each of its views: one drawn in training, else all."""
        if self.training:
            return [torch.randperm(self.dim, device=self.permutation.device)[: self.n_features]]
        last, step = self.dim - self.n_features, max(1, self.n_features // self.overlap)
        return [self.permutation[start : start + self.n_features] for start in sorted({*range(0, last, step), last})]

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        bags = self.read(bags)
        tiles = bags.features  # (ΣN, D)
        parts = self.parts()
        if len(parts) == 1:
            scores = self._scores(tiles, parts[0])  # (ΣN, 1)
            attention = segment_softmax(scores, bags)
        else:
            attention = torch.stack([segment_softmax(self._scores(tiles, part), bags) for part in parts]).mean(0)
            scores = attention.clamp_min(1e-30).log()
        bag = segment_sum(attention * tiles, bags)  # (B, D)
        return BagOutput(
            self.classify(bag),  # (B, C)
            bag_embedding=bag,
            attention_logits=scores,
            tile_embedding=tiles,
            contributions=attention * self.classify(tiles) if explain else None,  # (ΣN, C)
        )

    def logits_of_parts(self, bags: BagBatch) -> Tensor:
        """(parts, B, C): where they disagree, the model is uncertain; their mean is the prediction."""
        attentions = [segment_softmax(self._scores(bags.features, part), bags) for part in self.parts()]
        return torch.stack([self.classify(segment_sum(attention * bags.features, bags)) for attention in attentions])

    def _scores(self, tiles: Tensor, part: Tensor) -> Tensor:
        seen = tiles[:, part]  # (ΣN, S)
        feature = torch.tanh(F.linear(seen, self.feature.weight[:, part], self.feature.bias))
        gate = torch.sigmoid(F.linear(seen, self.gate.weight[:, part], self.gate.bias))
        return self.score(self.dropout(feature) * self.dropout(gate))

"""Pooling without attention: mean, max, mean of the top k, log-mean-exp, noisy-or.

- Embedding level: the tiles' embeddings are pooled feature by feature, then classified. Instance level: every tile is scored, the
  scores are pooled output by output, and `tile_logits` holds them. With a linear classifier the mean is the same at both.
- Mammadov et al. 2025 (arXiv 2505.01109): with good features instance pooling keeps up with much larger models.
- Mean, max and top-k select tiles, and what they select adds up: contributions are exact. Log-mean-exp and noisy-or are no sums:
  their contributions are leave-one-out, in closed form; the only tile of a bag is owed all of the logits.
- Noisy-or takes a bag for positive if any tile is: 1 - p = Π_i (1 - p_i). Scores start at -7, p_i = .0009: with p_i = ½ a bag
  of thousands would begin at certainty, where nothing is learned. Its logits grow with the size of the bag: that is the rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.aggregators.packed import segment_argmax, segment_max, segment_mean, segment_softmax, segment_sum
from wsimil.batch import Aggregator, BagBatch, BagOutput
from wsimil.errors import ConfigError

__all__ = ["Pool"]


class Mean:
    """Every tile alike."""

    def __call__(self, values: Tensor, bags: BagBatch) -> Tensor:
        return segment_mean(values, bags)

    def weights(self, values: Tensor, bags: BagBatch) -> Tensor:
        return torch.ones_like(values) / bags.sizes[bags.bag_index].unsqueeze(1)


class Max:
    """The largest; of equals the first is credited."""

    def __call__(self, values: Tensor, bags: BagBatch) -> Tensor:
        return segment_max(values, bags)

    def weights(self, values: Tensor, bags: BagBatch) -> Tensor:
        return torch.zeros_like(values).scatter(0, segment_argmax(values, bags), 1.0)


class TopK:
    """Mean of the k largest; k below 1 is a share of the bag, rounded up."""

    def __init__(self, k: float) -> None:
        if k <= 0:
            raise ConfigError(f"k is {k}; expected a number of tiles, or a share of the bag between 0 and 1")
        if k > 1 and k != int(k):
            raise ConfigError(f"k is {k}; from 1 on it is a number of tiles, which is whole")
        self.k = k

    def _per_bag(self, values: Tensor, bags: BagBatch) -> list[tuple[Tensor, Tensor]]:
        """Of each bag: the k largest of every column (k, K), and their rows in the bag."""
        parts = _wide(values).split(bags.lengths)
        counts = [max(1, math.ceil(self.k * len(part) - 1e-9)) if self.k < 1 else min(int(self.k), len(part)) for part in parts]
        return [part.topk(count, dim=0) for part, count in zip(parts, counts, strict=True)]

    def __call__(self, values: Tensor, bags: BagBatch) -> Tensor:
        return torch.stack([largest.mean(0) for largest, _ in self._per_bag(values, bags)])

    def weights(self, values: Tensor, bags: BagBatch) -> Tensor:
        weights = torch.zeros_like(values)
        for start, (_, rows) in zip(bags.bounds, self._per_bag(values, bags), strict=False):
            weights.scatter_(0, rows + start, 1 / len(rows))
        return weights


class LogMeanExp:
    """(1/r) log mean exp(r v): the mean for small r, the maximum for large r (Ramon and De Raedt 2000)."""

    def __init__(self, sharpness: float) -> None:
        if sharpness <= 0:
            raise ConfigError(f"sharpness is {sharpness}; expected a positive number")
        self.sharpness = sharpness

    def __call__(self, values: Tensor, bags: BagBatch) -> Tensor:
        total = _log_sum_exp(self.sharpness * _wide(values), bags)
        return (total - bags.sizes.to(total.dtype).log().unsqueeze(1)) / self.sharpness

    def lost_without_each(self, values: Tensor, bags: BagBatch) -> Tensor:
        lost = _log_sum_exp_lost(self.sharpness * _wide(values), bags)
        by_number = torch.log1p(-1 / bags.sizes.clamp_min(2).to(lost.dtype))  # log (N - 1) - log N
        return (lost + by_number[bags.bag_index].unsqueeze(1)) / self.sharpness


class NoisyOr:
    """Logit of 1 - Π_i (1 - σ(v_i)), from log Σ_i softplus(v_i): no product, no probability that rounds to 0 or 1."""

    def __call__(self, values: Tensor, bags: BagBatch) -> Tensor:
        return _log_expm1_exp(_log_sum_exp(_log_softplus(_wide(values)), bags))

    def lost_without_each(self, values: Tensor, bags: BagBatch) -> Tensor:
        values = _wide(values)
        parts = _log_softplus(values)  # log s_i
        rest = _log_expm1_exp(_log_sum_exp(parts, bags)[bags.bag_index] - _log_sum_exp_lost(parts, bags))  # logit without i
        # log (e^(t + s) - 1) - log (e^t - 1) = s + log (1 + (1 - e^-s) / (e^t - 1)), of positive terms alone: t of the rest, s of i
        return F.softplus(values, threshold=40) + F.softplus(F.logsigmoid(values) - rest, threshold=40)


Selects = Mean | Max | TopK
"""pool = Σ_i weights_i v_i, with `weights` (ΣN, K)."""

Blends = LogMeanExp | NoisyOr
"""No sums: `lost_without_each` (ΣN, K) is how much smaller the pool is without that tile; a bag of one tile has no such number."""


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _log_sum_exp(values: Tensor, bags: BagBatch) -> Tensor:
    """(ΣN, K) → (B, K)."""
    peak = segment_max(values.detach(), bags)
    return segment_sum((values - peak[bags.bag_index]).exp(), bags).log() + peak


def _log_sum_exp_lost(values: Tensor, bags: BagBatch) -> Tensor:
    """(ΣN, K) → (ΣN, K): log Σ e^v minus the same without the tile, from its share: in a large bag both agree in all their digits.

    Of a tile that has more than half the rest is summed by itself: subtracting it would leave rounding alone.
    """
    bag = bags.bag_index
    share = segment_softmax(values, bags)
    rest = _log_sum_exp(values.scatter(0, segment_argmax(values, bags), torch.finfo(values.dtype).min / 4), bags)
    lost_with_top = _log_sum_exp(values, bags) - rest  # (B, K)
    return torch.where(share > 0.5, lost_with_top[bag], -torch.log1p(-share.clamp_max(0.5)))


def _log_softplus(values: Tensor) -> Tensor:
    """log log(1 + e^v), which is v - e^v / 2 + … far on the left, where log(1 + e^v) rounds away."""
    left = values.clamp_max(-15)
    right = F.softplus(values.clamp_min(-15), threshold=40)
    return torch.where(values < -15, left - left.exp() / 2, right.log())


def _log_expm1_exp(values: Tensor) -> Tensor:
    """log(e^s - 1) for s = e^v."""
    small = values.clamp_max(-7).exp()
    large = values.clamp_min(-7).exp()
    return torch.where(values < -7, values + small / 2 + small**2 / 24, large + (-torch.expm1(-large)).log())


def _pool(name: str, k: float, sharpness: float) -> Selects | Blends:
    pools: dict[str, Callable[[], Selects | Blends]] = {
        "mean": Mean,
        "max": Max,
        "topk": lambda: TopK(k),
        "lse": lambda: LogMeanExp(sharpness),
        "noisy_or": NoisyOr,
    }
    if name not in pools:
        raise ConfigError(f"pool is {name!r}; expected {', '.join(pools)}")
    return pools[name]()


class Pool(Aggregator):
    """logits = W pool_i φ(h_i) + b at the level of embeddings, pool_i (W φ(h_i) + b) at that of instances.

    φ = Linear, ReLU, Dropout.

    Args:
        dim: width D of the features.
        n_outputs: C.
        level: "embedding" pools every feature by itself, "instance" every output.
        hidden: width H of φ.
        pool: "mean", "max", "topk", "lse" or "noisy_or"; of embeddings "max", "topk" or "lse".
        k: of "topk": a number of tiles, or below 1 a share of the bag, rounded up.
        sharpness: r of "lse".
        dropout: on φ's output.
    """

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        *,
        level: str,
        hidden: int = 256,
        pool: str = "max",
        k: float = 0.01,
        sharpness: float = 5.0,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if level not in ("embedding", "instance"):
            raise ConfigError(f"level is {level!r}; expected embedding or instance")
        if level == "embedding" and pool not in ("max", "topk", "lse"):
            raise ConfigError(
                f"embeddings are pooled by max, topk or lse, not by {pool!r}; their mean is mean_pool, other pools are of instances"
            )
        self.dim, self.n_outputs = dim, n_outputs
        self.pool = _pool(pool, k, sharpness)
        self.contribution_kind = "exact" if isinstance(self.pool, Selects) else "leave-one-out"
        self.project = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.score = nn.Linear(hidden, n_outputs) if level == "instance" else None  # of tiles
        self.classify = nn.Linear(hidden, n_outputs) if level == "embedding" else None  # of bags
        if self.score is not None and isinstance(self.pool, NoisyOr):
            nn.init.constant_(self.score.bias, -7.0)

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        bags = self.read(bags)
        tiles = self.project(bags.features)  # (ΣN, H)
        values = tiles if self.score is None else self.score(tiles)  # (ΣN, H) or (ΣN, C)
        pooled = self.pool(values, bags)  # (B, H) or (B, C)
        logits = pooled if self.classify is None else self.classify(pooled)  # (B, C)
        return BagOutput(
            logits,
            bag_embedding=pooled if self.score is None else None,
            tile_logits=values if self.classify is None else None,
            tile_embedding=tiles,
            contributions=self._contributions(values, logits, bags) if explain else None,
        )

    def _contributions(self, values: Tensor, logits: Tensor, bags: BagBatch) -> Tensor:
        """(ΣN, C)."""
        if isinstance(self.pool, Blends):
            lost = self.pool.lost_without_each(values, bags)
            lost = lost if self.classify is None else F.linear(lost, self.classify.weight)
            alone = (bags.sizes == 1)[bags.bag_index].unsqueeze(1)
            return torch.where(alone, logits[bags.bag_index], lost)
        selected = self.pool.weights(values, bags) * values
        if self.classify is None:
            return selected
        # the bias is shared by all tiles
        return F.linear(selected, self.classify.weight) + self.classify.bias / bags.sizes[bags.bag_index].unsqueeze(1)

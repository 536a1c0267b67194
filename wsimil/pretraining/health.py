"""Is the encoder learning, or has it collapsed? Label-free numbers on fixed tiles, and an alarm.

- The loss is no sign of quality: a collapsed teacher has a small one, and a healthy run may have a rising one.
- Each number has one known failure behind it; the alarm wants two of them at once, twice in a row, before it stops a run.
- Numbers compare within one architecture and one set of tiles only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "CURES",
    "MEANINGS",
    "Alarm",
    "Panel",
    "correlation",
    "feature_numbers",
    "rank_me",
    "same_slide_share",
    "spread",
]

MEANINGS = {
    "loss": "what is minimised; no sign of quality",
    "entropy": "entropy of the teacher's answer to one tile, share of the largest possible; 1: it says nothing",
    "mean_entropy": "entropy of its mean answer; near 1: all prototypes in use, near 0: all tiles are one",
    "kl": "Kullback-Leibler divergence of the student from its teacher; 0 for good: nothing left to learn, or collapse",
    "spread": "deviation of normalised features times √width: 1 spread out, 0 all the same",
    "rank": "RankMe: how many directions the features use; falls with collapse",
    "correlation": "mean correlation between two features; rises as they repeat one another",
    "same_slide": "share of the five nearest tiles that are of the same slide",
    "same_slide_chance": "the same by chance; far above it with a rising rank, the encoder knows stain or scanner",
    "grad_norm": "length of the gradient before clipping",
}
"""Column of health.csv → what it says."""

_NEIGHBOURS = 5


def spread(features: np.ndarray) -> float:
    """Deviation of the L2-normalised features (N, D) over the tiles, times √D: 1 where they fill all directions, 0 collapsed."""
    return float(_normalised(features).std(0).mean() * math.sqrt(features.shape[1]))


def rank_me(features: np.ndarray) -> float:
    """exp(entropy of the normalised singular values) of (N, D): between 1 and D (Garrido 2023). It wants N ≥ 2 D."""
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / max(values.sum(), 1e-12)
    return float(np.exp(-(shares * np.log(shares + 1e-12)).sum()))


def correlation(features: np.ndarray) -> float:
    """Mean absolute correlation between two different features of (N, D); a feature that never changes counts as 1."""
    centred = features.astype(np.float64) - features.mean(0)
    norms = np.linalg.norm(centred, axis=0)
    alive = norms > 1e-7 * max(1.0, float(np.abs(features).max()))
    units = np.where(alive, centred / np.where(alive, norms, 1), 0)
    table = np.abs(units.T @ units)
    table[~alive] = table[:, ~alive] = 1
    dim = len(table)
    return float((table.sum() - np.trace(table)) / (dim * (dim - 1))) if dim > 1 else 0.0


def same_slide_share(features: np.ndarray, slides: np.ndarray) -> tuple[float, float]:
    """(share of the five nearest tiles, by cosine, that are of the same slide; that share if neighbours were drawn by lot)."""
    counts = np.unique(slides, return_counts=True)[1].astype(float)
    n = len(slides)
    chance = float((counts * (counts - 1)).sum() / max(1, n * (n - 1)))
    if n <= _NEIGHBOURS:
        return chance, chance
    units = _normalised(features)
    alike = units @ units.T
    np.fill_diagonal(alike, -np.inf)
    nearest = np.argpartition(-alike, _NEIGHBOURS, axis=1)[:, :_NEIGHBOURS]
    return float((slides[nearest] == slides[:, None]).mean()), chance


def feature_numbers(features: np.ndarray, slides: np.ndarray) -> dict[str, float]:
    """All numbers that features alone give."""
    share, chance = same_slide_share(features, slides)
    return {
        "spread": spread(features),
        "rank": rank_me(features),
        "correlation": correlation(features),
        "same_slide": share,
        "same_slide_chance": chance,
    }


def _normalised(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class Panel:
    """Fixed tiles, kept at the network's size, from which the numbers and the pictures are made."""

    tiles: Tensor  # (N, px, px, 3) uint8
    slides: np.ndarray  # (N,) which slide each is of
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, batches: Iterable[Any], *, count: int, px: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Panel:
        """The first `count` tiles of the batches, made `px` wide."""
        tiles, slides, have = [], [], 0
        for batch in batches:
            pixels = torch.from_numpy(np.ascontiguousarray(batch.pixels)).permute(0, 3, 1, 2)
            if pixels.shape[-1] != px:
                resized = F.interpolate(pixels.float(), size=(px, px), mode="bicubic", antialias=True, align_corners=False)
                pixels = resized.round().clamp(0, 255).byte()
            tiles.append(pixels.permute(0, 2, 3, 1).contiguous())
            slides.append(np.asarray(batch.slides))
            have += len(pixels)
            if have >= count:
                break
        return cls(torch.cat(tiles)[:count], np.concatenate(slides)[:count], mean, std)

    def images(self, rows: slice | np.ndarray, device: Any) -> Tensor:
        """(n, 3, px, px), normalised as the network sees them."""
        tiles = self.tiles[rows].to(device).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values, device=device, dtype=torch.float32).view(3, 1, 1) for values in (self.mean, self.std))
        return (tiles - mean) / std

    @torch.no_grad()
    def features(
        self, model: nn.Module, pool: Callable[[nn.Module, Tensor], Tensor], device: Any, *, at_once: int = 64
    ) -> np.ndarray:
        """(N, D) of all tiles, in float32, the model in eval mode for as long."""
        was_training = model.training
        model.eval()
        each = [
            pool(model, self.images(slice(start, start + at_once), device)).float().cpu().numpy()
            for start in range(0, len(self.tiles), at_once)
        ]
        model.train(was_training)
        return np.concatenate(each)


CURES = (
    "halve --lr",
    "lower the teacher's temperature (--recipe-options teacher_temp=0.02,0.04,0.3)",
    "fewer prototypes (--recipe-options prototypes=4096, or 1024 for some thousand tiles)",
    "a slower teacher (momentum nearer to 1), or in a run of less than 1,000 steps a faster one",
    "spread the features (--recipe-options spread=kde)",
    "look at views.png: does the stain jitter leave tissue recognisable?",
    "begin with weights (--init imagenet), or take --method mae, which has no constant solution",
)

_UNIFORM, _ONE_HOT, _TOLD_APART = 0.98, 0.02, 0.01
_LEAST_SPREAD, _LEAST_RANK, _RANK_LOSS = 0.1, 0.05, 0.5
_ONE_DIRECTION, _SOME_TILES = 2.0, 64
_PLATEAU, _PLATEAU_STEPS = 1e-3, 200


@dataclass
class Alarm:
    """Two signs of collapse at once are a warning; two warnings in a row mean stop.

    Args:
        dim: width of the features.
        n_tiles: how many the panel has; ranks of fewer than 2 × dim tiles mean little and do not count, but for a rank below 2 of
            64 tiles and more: that is one direction. A handful of tiles of one slide may be as much alike to a healthy network.
        warm_up_steps: until then only entropies and the loss count: features change their scale while a run warms up.
        total: steps of the run.
        uniform_loss: what a teacher that says nothing costs: ln of the number of prototypes; None where there is no such loss.

    Attributes:
        warnings: how many in a row.
    """

    dim: int
    n_tiles: int
    warm_up_steps: int
    total: int
    uniform_loss: float | None = None
    warnings: int = 0
    rank_max: float = 0.0
    plateau_since: int | None = field(default=None)

    def watch_loss(self, step: int, loss: float) -> None:
        """Note for how long the loss has been that of a teacher that says nothing; to be called as often as the loss is read."""
        flat = self.uniform_loss is not None and abs(loss - self.uniform_loss) <= _PLATEAU * self.uniform_loss
        self.plateau_since = (step if self.plateau_since is None else self.plateau_since) if flat else None

    def signs(self, step: int, numbers: Mapping[str, float]) -> list[str]:
        """What speaks for a collapse, each as a sentence."""
        found = []
        warm = step >= self.warm_up_steps
        entropy, mean_entropy = numbers.get("entropy"), numbers.get("mean_entropy")
        if warm and entropy is not None and entropy > _UNIFORM:
            found.append(f"the teacher says nothing: entropy {entropy:.3f} of 1")
        elif warm and mean_entropy is not None and mean_entropy < _ONE_HOT:
            found.append(f"the teacher says the same of every tile: entropy of its mean answer {mean_entropy:.3f}")
        elif warm and entropy is not None and mean_entropy is not None and mean_entropy - entropy < _TOLD_APART:
            found.append(
                f"the teacher says the same of every tile: entropy {entropy:.3f}, of its mean answer no more ({mean_entropy:.3f})"
            )
        if self.plateau_since is not None and step - self.plateau_since >= min(_PLATEAU_STEPS, self.total // 4):
            found.append(f"the loss has been ln(prototypes) = {self.uniform_loss:.4f} for {step - self.plateau_since} steps")
        if not all(math.isfinite(value) for value in numbers.values()):
            found += ["a number is not finite", "the weights are lost"]
        if not warm:
            return found
        if numbers.get("spread", 1.0) < _LEAST_SPREAD:
            found.append(f"features of all tiles are alike: spread {numbers['spread']:.3f} of 1")
        rank = numbers.get("rank")
        if rank is not None and rank < _ONE_DIRECTION and self.n_tiles >= _SOME_TILES:
            found.append(f"features use {rank:.1f} of {self.dim} directions")
        elif rank is not None and self.n_tiles >= 2 * self.dim:
            if rank < _LEAST_RANK * self.dim:
                found.append(f"features use {rank:.1f} of {self.dim} directions")
            elif rank < _RANK_LOSS * self.rank_max:
                found.append(f"features use {rank:.1f} directions, and used {self.rank_max:.1f}")
        return found

    def judge(self, step: int, numbers: Mapping[str, float]) -> list[str]:
        """The signs, if they are enough for a warning; `warnings` counts how many there were in a row."""
        signs = self.signs(step, numbers)
        if step >= self.warm_up_steps and math.isfinite(numbers.get("rank", 0.0)):
            self.rank_max = max(self.rank_max, numbers.get("rank", 0.0))
        if len(signs) < 2:
            self.warnings = 0
            return []
        self.warnings += 1
        return signs

    def state(self) -> dict[str, Any]:
        return {"warnings": self.warnings, "rank_max": self.rank_max, "plateau_since": self.plateau_since}

    def load(self, state: Mapping[str, Any]) -> None:
        self.warnings, self.rank_max, self.plateau_since = state["warnings"], state["rank_max"], state["plateau_since"]

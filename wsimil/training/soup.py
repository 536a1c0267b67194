"""A soup of weights: short trainings that begin alike; the training proper begins at the mean of the best.

Mammadov 2025, "Reducing variability of multiple instance learning methods for digital pathology" (arXiv 2507.00292); weights that
began alike may be averaged after Wortsman 2022 (arXiv 2203.05482). The authors judge by the validation AUC and merge with elected
signs; here the validation loss judges, which every task has, and weights are averaged as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wsimil.config import TrainConfig
from wsimil.files import hash_of
from wsimil.training.loop import Fitted

__all__ = ["SOUP", "Soup", "candidate_settings", "mixed"]

SOUP = "soup"
"""Folder of the short trainings, while they and the training proper are under way."""


@dataclass(frozen=True)
class Soup:
    """What the short trainings came to."""

    state: dict[str, Tensor]  # mean of the weights of those kept
    kept: list[int]  # best first
    val_loss: list[float]  # of each, mean over its epochs


def candidate_settings(config: TrainConfig, fold: int, index: int) -> TrainConfig:
    """Settings of one short training: an order of slides and tiles of its own, and the weights of its last epoch."""
    seed = int(hash_of([fold, config.seed, SOUP, index])[:8], 16)
    return replace(config, seed=seed, select="last", patience=config.epochs, keep_epochs=False)


def mixed(candidates: Sequence[Fitted], n_kept: int) -> Soup:
    """The mean weights of the `n_kept` with the least validation loss over all their epochs: good, and early and steadily so."""
    val_loss = [sum(row["val_loss"] for row in one.history) / len(one.history) for one in candidates]
    kept = sorted(range(len(candidates)), key=val_loss.__getitem__)[:n_kept]
    states = [candidates[index].best_state for index in kept]
    return Soup({name: _mean([state[name] for state in states]) for name in states[0]}, kept, val_loss)


def _mean(values: Sequence[Tensor]) -> Tensor:
    """Summed in float64, so that the order of the candidates is nothing. Counters, which have no mean, are the first's."""
    if not values[0].is_floating_point():
        return values[0].clone()
    return torch.stack(list(values)).double().mean(0).to(values[0].dtype)

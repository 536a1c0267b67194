"""Weights and bags from a seed: the golden files hold only a reference's answers, for what it was asked is made here again.

Legacy `RandomState` on purpose: its streams are frozen, so these numbers are the same with every NumPy and PyTorch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from wsimil.batch import BagBatch, pack

__all__ = ["make_bags", "seed_weights"]


def seed_weights(model: nn.Module, seed: int) -> None:
    """Fill the parameters, in the order of their names, with normal numbers of deviation 1/√(fan in); biases .1."""
    stream = np.random.RandomState(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            spread = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.from_numpy(spread * stream.standard_normal(parameter.shape)))


def make_bags(*sizes: int, dim: int, seed: int = 0) -> BagBatch:
    """Bags of normal features, float64; the bag of `seed` and its place in the batch."""
    return pack(
        [
            BagBatch(
                torch.from_numpy(np.random.RandomState(1000 * seed + place).standard_normal((size, dim))), torch.tensor([0, size])
            )
            for place, size in enumerate(sizes)
        ]
    )

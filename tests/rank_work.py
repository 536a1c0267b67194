"""What the processes of tests/training/test_ranks.py do: they import this module and nothing of the tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import torch
from torch import nn

from wsimil.training.ranks import Ranks

BAGS = 5
DEALT = [[0, 2, 4], [1, 3]], [[], [0, 1, 2, 3, 4]]
"""Bags of a step, by rank: unevenly, and to one alone."""


def weights() -> nn.ParameterList:
    torch.manual_seed(0)
    first = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    return nn.ParameterList([first, nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))])


def mean_loss(parameters: nn.ParameterList, bags: list[int]) -> torch.Tensor:
    """Over bags; the second weight matters to bag 0 alone, the third to none."""
    values = [(parameters[0].sum(0) * (bag + 1)).square().sum() + (parameters[1].sum() * 3 if bag == 0 else 0) for bag in bags]
    return torch.stack(values).mean()


def share_steps(ranks: Ranks, device: str) -> Iterator[list]:
    for dealt in DEALT:
        parameters, mine = weights(), dealt[ranks.rank]
        if ranks.rank:
            with torch.no_grad():
                parameters[0].add_(7)
        ranks.begin_alike(parameters)
        loss = mean_loss(parameters, mine) if mine else torch.zeros((), dtype=torch.float64)
        if mine:
            loss.backward()
        together = ranks.combine(list(parameters), loss.detach(), len(mine))
        mean = ranks.mean(float(sum(mine)), len(mine), device)
        yield [float(together), mean, *(None if value.grad is None else value.grad.tolist() for value in parameters)]


def share_and_die(ranks: Ranks, device: str) -> Iterator[list]:
    yield from share_steps(ranks, device)
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.mean(1.0, 1, device)  # waits for the other

"""Weights averaged over training: the average is what is validated and kept, the last step's noise is not.

- The average reaches back over a tenth of the steps so far, at most 1 / (1 - decay): early weights, which are still random, are
  forgotten however short the run.
- Soups average the weights of finished models (Wortsman 2022, arXiv 2203.05482). It makes sense for models that began at the
  same weights; whether a model joins the greedy soup is for the validation loss to say, never for test slides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wsimil.batch import Objective
from wsimil.errors import UsageError

__all__ = ["AveragedWeights", "greedy_soup", "soup"]


class AveragedWeights(Objective):
    """`inner`, minimised as ever; beside the model an average of its weights, w̄ ← d w̄ + (1 - d) w after every step.

    The average is the objective's state, is what `inner` judges in eval mode, and what `kept_model` hands out. Buffers are copied.

    Args:
        decay: d; at step t it is min(decay, (t - 1) / (t + 9)), so it begins as the first step's weights.
    """

    average: nn.Module
    step: Tensor

    def __init__(self, inner: Objective, *, decay: float = 0.999) -> None:
        super().__init__()
        self.inner, self.decay = inner, decay
        self.per_bag = inner.per_bag
        # a tuple, not a module: the model is not the objective's state
        self.model: tuple[nn.Module, ...] = ()
        self.register_buffer("step", torch.tensor(0))

    def prepare(self, model: nn.Module) -> None:
        self.inner.prepare(model)
        self.model = (model,)
        self.average = copy.deepcopy(model).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> AveragedWeights:
        super().train(mode)
        if self.model:
            self.average.eval()
        return self

    def losses(self, model: nn.Module, batch: Any, progress: float) -> dict[str, Tensor]:
        return self.inner.losses(model if model.training else self.average, batch, progress)

    @torch.no_grad()
    def after_step(self) -> None:
        self.inner.after_step()
        (model,) = self.model
        self.step += 1
        decay = torch.clamp((self.step - 1) / (self.step + 9), max=self.decay)  # on the device: no step waits for it
        for average, weight in zip(self.average.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, (1 - decay).to(weight.dtype))
        for kept, buffer in zip(self.average.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)

    def kept_model(self, model: nn.Module) -> nn.Module:
        return self.average

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return self.inner.param_groups(model)

    def sampler(self, epoch: int) -> Iterable[int] | None:
        return self.inner.sampler(epoch)

    def on_epoch_start(self, epoch: int, infer: Callable[[], Iterable[tuple[Any, Any]]]) -> None:
        self.inner.on_epoch_start(epoch, infer)

    def after_backward(self) -> None:
        self.inner.after_backward()


def soup(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several models' weights, name by name; whole numbers (counters, permutations) must agree.

    Raises:
        UsageError: the models do not have the same names and shapes, or differ in whole numbers.
    """
    if not states:
        raise UsageError("no model to average")
    shapes = [{name: tuple(values.shape) for name, values in state.items()} for state in states]
    if any(other != shapes[0] for other in shapes):
        raise UsageError("the models have other names or shapes of weights; only models of one kind can be averaged")
    mean = {}
    for name, first in states[0].items():
        values = [state[name] for state in states]
        if first.is_floating_point():
            mean[name] = torch.stack([value.double() for value in values]).mean(0).to(first.dtype)
        elif all(torch.equal(value, first) for value in values):
            mean[name] = first.clone()
        else:
            raise UsageError(f"{name} differs between the models and cannot be averaged")
    return mean


def greedy_soup(
    states: Sequence[Mapping[str, Tensor]], loss_of: Callable[[Mapping[str, Tensor]], float]
) -> tuple[dict[str, Tensor], list[int]]:
    """Models from the best on, each kept if the mean with it has no greater loss: the mean, and the places of those in it.

    Args:
        loss_of: validation loss of a model with these weights.
    """
    losses = [loss_of(state) for state in states]
    order = sorted(range(len(states)), key=lambda place: losses[place])
    chosen: list[int] = order[:1]
    best = losses[order[0]] if order else 0.0
    for place in order[1:]:
        loss = loss_of(soup([states[one] for one in (*chosen, place)]))
        if loss <= best:
            chosen, best = [*chosen, place], loss
    return soup([states[one] for one in chosen]), chosen

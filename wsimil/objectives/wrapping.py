"""Objectives around another: what they do not state themselves, the inner one decides.

- A hook that a wrapper overrides calls the inner one's too: techniques wrap one another in any order.
- What the model said may be listened to, so the inner objective may be any that calls the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from wsimil.batch import BagBatch, BagOutput, Objective

__all__ = ["Wrapping", "listening"]


class Wrapping(Objective):
    """`inner`, as it is."""

    def __init__(self, inner: Objective) -> None:
        super().__init__()
        self.inner, self.per_bag = inner, inner.per_bag

    def prepare(self, model: nn.Module) -> None:
        self.inner.prepare(model)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        inside = {id(parameter) for parameter in self.inner.parameters()}
        own = [parameter for parameter in self.parameters() if parameter.requires_grad and id(parameter) not in inside]
        return [*self.inner.param_groups(model), *([{"params": own}] if own else [])]

    def sampler(self, epoch: int) -> Iterable[int] | None:
        return self.inner.sampler(epoch)

    def on_epoch_start(self, epoch: int, infer: Callable[[], Iterable[tuple[Any, Any]]]) -> None:
        self.inner.on_epoch_start(epoch, infer)

    def on_validation_start(self, infer: Callable[[], Iterable[tuple[Any, Any]]]) -> None:
        self.inner.on_validation_start(infer)

    def losses(self, model: nn.Module, batch: Any, progress: float) -> dict[str, Tensor]:
        return self.inner.losses(model, batch, progress)

    def after_backward(self) -> None:
        self.inner.after_backward()

    def after_step(self) -> None:
        self.inner.after_step()

    def kept_model(self, model: nn.Module) -> nn.Module:
        return self.inner.kept_model(model)


@contextmanager
def listening(model: nn.Module) -> Iterator[list[tuple[BagBatch, BagOutput]]]:
    """What the model is asked and says in between, call by call: a wrapped objective may show it fewer tiles than there are."""
    heard: list[tuple[BagBatch, BagOutput]] = []

    def hear(module: nn.Module, arguments: Any, output: Any) -> None:
        heard.append((arguments[0], output))

    hook = model.register_forward_hook(hear)
    try:
        yield heard
    finally:
        hook.remove()

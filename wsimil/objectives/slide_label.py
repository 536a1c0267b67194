"""Learning from slide labels alone: the task's loss on the bag and on every extra logit the aggregator offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated

import torch
from torch import Tensor, nn

from wsimil.batch import BagOutput, LabelledBags, Objective
from wsimil.config import Range
from wsimil.objectives.risk_bank import RiskBank
from wsimil.task import Task

__all__ = ["SlideLabel"]


class SlideLabel(Objective):
    """Loss of the bag's logits, of `extra_logits` at their weights, and the aggregator's own penalties.

    Where the loss compares slides (Cox), those of earlier steps take part: see `RiskBank`.

    Args:
        order: epoch → order of the training slides (see `samplers`); None leaves it to the loop.
        bag_weight, extra_weight: of the loss of the bag, and of all extra logits beside their own weights (DSMIL's paper: ½, ½).
    """

    def __init__(
        self,
        task: Task,
        *,
        order: Callable[[int], Iterable[int]] | None = None,
        bag_weight: Annotated[float, Range(0)] = 1.0,
        extra_weight: Annotated[float, Range(0)] = 1.0,
    ) -> None:
        super().__init__()
        self.task, self.order = task, order
        self.bag_weight, self.extra_weight = bag_weight, extra_weight
        self.bank = RiskBank() if task.compares_slides else None
        self.per_bag = self.bank is None

    def sampler(self, epoch: int) -> Iterable[int] | None:
        return None if self.order is None else self.order(epoch)

    def losses(self, model: nn.Module, batch: LabelledBags, progress: float) -> dict[str, Tensor]:
        return self.losses_of(model(batch.bags), batch)

    def losses_of(self, output: BagOutput, batch: LabelledBags) -> dict[str, Tensor]:
        """The same from an output that is there already: for objectives that wrap this one."""
        every = torch.arange(len(batch.targets), device=batch.targets.device)
        parts = [("bag", self.bag_weight * self._loss(output.logits, batch, every))]
        for extra in output.extra_logits:
            weight = self.extra_weight * extra.weight
            parts.append((extra.name, weight * self._loss(extra.logits, batch, extra.bag_index)))
        if self.bank is not None:
            self.bank.remember(output.logits[:, 0].detach(), batch.targets, batch.bags.slide_ids)
        losses: dict[str, Tensor] = {}
        for name, loss in (*parts, *output.penalties.items()):
            losses[name] = losses[name] + loss if name in losses else loss  # branches may share a name; none is lost
        return losses

    def _loss(self, logits: Tensor, batch: LabelledBags, rows: Tensor) -> Tensor:
        """Of logits (M, C), each of which answers to the bag in `rows` (M,)."""
        targets = batch.targets[rows]
        weights = None if batch.weights is None else batch.weights[rows]
        # the rows of a slide stand for one slide, however many they are: of a small bag there are fewer pseudo-bags
        share = 1 / torch.bincount(rows, minlength=len(batch.targets))[rows].to(logits.dtype)
        weights = share if weights is None else share * weights
        if self.bank is None:
            return self.task.loss(logits, targets, weights * (len(rows) / len(batch.targets)))
        names = tuple(batch.bags.slide_ids[row] for row in rows.tolist()) if batch.bags.slide_ids else ()
        return self.bank.loss(logits[:, 0], targets, names, weights)

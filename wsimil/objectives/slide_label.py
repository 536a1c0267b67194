"""Learning from slide labels alone: the task's loss on the bag and on every extra logit the aggregator offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from wsimil.batch import BagOutput, LabelledBags, Objective
from wsimil.config import Range
from wsimil.objectives.risk_bank import RiskBank
from wsimil.task import Task

__all__ = ["SlideLabel"]


class SlideLabel(Objective):
    """Loss of the bag's logits, of `extra_logits` at their weights, and the aggregator's own penalties.

    A model in eval mode is judged by the bag's logits alone, which are what it predicts with: the rest is there to teach.

    Where the loss compares slides (Cox), those of earlier steps take part, unless each step is a set at risk of its own (nested
    case-control sampling, Thomas 1977): see `RiskBank`.

    Args:
        order: epoch → order of the training slides (see `samplers`); None leaves it to the loop.
        own_sets: every step is a set at risk of its own; for losses that compare slides.
        bag_weight, extra_weight: of the loss of the bag, and of all extra logits beside their own weights (DSMIL's paper: ½, ½).
    """

    def __init__(
        self,
        task: Task,
        *,
        order: Callable[[int], Iterable[int]] | None = None,
        own_sets: bool = False,
        bag_weight: Annotated[float, Range(0)] = 1.0,
        extra_weight: Annotated[float, Range(0)] = 1.0,
    ) -> None:
        super().__init__()
        self.task, self.order, self.own_sets = task, order, own_sets
        self.bag_weight, self.extra_weight = bag_weight, extra_weight
        self.bank = RiskBank() if task.compares_slides else None
        self.per_bag = self.bank is None

    def sampler(self, epoch: int) -> Iterable[int] | None:
        return None if self.order is None else self.order(epoch)

    def on_validation_start(self, infer: Callable[[], Iterable[tuple[Any, Any]]]) -> None:
        if self.bank is not None:
            said = [(output.logits[:, 0], batch.targets) for batch, output in infer()]
            self.bank.refer_to(*map(torch.cat, zip(*said, strict=True)))

    def losses(self, model: nn.Module, batch: LabelledBags, progress: float) -> dict[str, Tensor]:
        output = model(batch.bags)
        return self.losses_of(output, batch) if model.training else {"bag": self._loss_of_bags(output, batch)}

    def losses_of(self, output: BagOutput, batch: LabelledBags) -> dict[str, Tensor]:
        """Those of training from an output that is there already: for objectives that wrap this one."""
        parts = [("bag", self.bag_weight * self._loss_of_bags(output, batch))]
        for extra in output.extra_logits:
            weight = self.extra_weight * extra.weight
            parts.append((extra.name, weight * self._loss(extra.logits, batch, extra.bag_index)))
        if self.bank is not None and not self.own_sets:
            self.bank.remember(output.logits[:, 0].detach(), batch.targets, batch.bags.slide_ids)
        losses: dict[str, Tensor] = {}
        for name, loss in (*parts, *output.penalties.items()):
            losses[name] = losses[name] + loss if name in losses else loss  # branches may share a name; none is lost
        return losses

    def _loss_of_bags(self, output: BagOutput, batch: LabelledBags) -> Tensor:
        return self._loss(output.logits, batch, torch.arange(len(batch.targets), device=batch.targets.device))

    def _loss(self, logits: Tensor, batch: LabelledBags, rows: Tensor) -> Tensor:
        """Of logits (M, C), each of which answers to the bag in `rows` (M,)."""
        targets = batch.targets[rows]
        weights = None if batch.weights is None else batch.weights[rows]
        # the rows of a slide stand for one slide, however many they are: of a small bag there are fewer pseudo-bags
        counts = torch.zeros(len(batch.targets), device=rows.device).index_add(0, rows, torch.ones(len(rows), device=rows.device))
        share = 1 / counts[rows].to(logits.dtype)
        weights = share if weights is None else share * weights
        if self.bank is None or (self.own_sets and self.training):
            return self.task.loss(logits, targets, weights * (len(rows) / len(batch.targets)))
        names = tuple(batch.bags.slide_ids[row] for row in rows.tolist()) if batch.bags.slide_ids else ()
        return self.bank.loss(logits[:, 0], targets, names, weights)

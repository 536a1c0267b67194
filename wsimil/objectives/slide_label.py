"""Learning from slide labels alone: the task's loss on the bag and on every extra logit the aggregator offers."""

from __future__ import annotations

from torch import Tensor, nn

from wsimil.batch import BagOutput, LabelledBags, Objective
from wsimil.task import Task

__all__ = ["SlideLabel"]


class SlideLabel(Objective):
    """Loss of the bag's logits, of `extra_logits` at their weights, and the aggregator's own penalties."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def losses(self, model: nn.Module, batch: LabelledBags, progress: float) -> dict[str, Tensor]:
        return self.losses_of(model(batch.bags), batch)

    def losses_of(self, output: BagOutput, batch: LabelledBags) -> dict[str, Tensor]:
        """The same from an output that is there already: for objectives that wrap this one."""
        parts = [("bag", self.task.loss(output.logits, batch.targets, batch.weights))]
        for extra in output.extra_logits:
            weights = None if batch.weights is None else batch.weights[extra.bag_index]
            parts.append((extra.name, extra.weight * self.task.loss(extra.logits, batch.targets[extra.bag_index], weights)))
        losses: dict[str, Tensor] = {}
        for name, loss in (*parts, *output.penalties.items()):
            losses[name] = losses[name] + loss if name in losses else loss  # branches may share a name; none is lost
        return losses

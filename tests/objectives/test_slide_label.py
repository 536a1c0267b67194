"""The slides' loss: what counts, and how much."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from wsimil.aggregators import AGGREGATORS, make_aggregator
from wsimil.batch import BagBatch, BagOutput, ExtraLogits, LabelledBags
from wsimil.objectives import SlideLabel
from wsimil.task import Task

TASK = Task("binary", ("0", "1"))


def test_weights_scale_the_bag_and_the_extra_logits_each_by_itself() -> None:
    bags = BagBatch(torch.zeros(3, 2), torch.tensor([0, 2, 3]))
    batch = LabelledBags(bags, TASK.encode(["0", "1"]))
    extra = ExtraLogits("top", torch.tensor([[2.0], [-1.0]]), torch.arange(2), weight=0.4)
    output = BagOutput(torch.tensor([[0.3], [0.7]]), extra_logits=(extra,), penalties={"spread": torch.tensor(0.1)})
    plain = SlideLabel(TASK).losses_of(output, batch)
    halved = SlideLabel(TASK, bag_weight=0.5, extra_weight=0.25).losses_of(output, batch)
    torch.testing.assert_close(plain["top"], 0.4 * TASK.loss(extra.logits, batch.targets, None))
    torch.testing.assert_close(halved["bag"], 0.5 * plain["bag"])
    torch.testing.assert_close(halved["top"], 0.25 * plain["top"])
    assert halved["spread"] == plain["spread"]  # the aggregator's own weight


def test_a_slide_counts_once_however_few_pseudo_bags_it_has() -> None:
    task = Task("binary", ("a", "b"))
    targets = torch.tensor([1.0, 0.0])
    rows = torch.tensor([0, 1, 1, 1])
    logits = torch.tensor([[0.3], [1.0], [-2.0], [0.5]])
    objective = SlideLabel(task)
    batch = LabelledBags(BagBatch(torch.zeros(2, 1), torch.tensor([0, 1, 2])), targets)
    whole = objective._loss(logits, batch, rows)
    parts = [
        objective._loss(
            logits[rows == bag],
            replace(batch, targets=targets[bag : bag + 1]),
            torch.zeros(int((rows == bag).sum()), dtype=torch.long),
        )
        for bag in (0, 1)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


@pytest.mark.parametrize("name", AGGREGATORS)
def test_validation_judges_what_is_predicted_with_and_nothing_else(name) -> None:
    torch.manual_seed(0)
    model = make_aggregator(name, 6, 1, hidden=16)
    place = torch.arange(12)
    places = 112.0 * torch.stack([place % 4, place // 4], 1).float()
    bags = BagBatch(torch.randn(12, 6), torch.tensor([0, 5, 12]), coords_um=places, tile_um=torch.full((2,), 112.0))
    batch = LabelledBags(bags, TASK.encode(["0", "1"]))
    learned = SlideLabel(TASK, bag_weight=0.5).losses(model.train(), batch, 0.0)
    assert (len(learned) > 1) == (name in ("dsmil", "dsmil_linear", "dtfd", "acmil"))
    judged = SlideLabel(TASK, bag_weight=0.5).losses(model.eval(), batch, 0.0)
    assert judged == {"bag": TASK.loss(model(bags).logits, batch.targets)}

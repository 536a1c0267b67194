"""An objective around another hands every hook on: order of slides, heads, what is kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from wsimil.aggregators import make_aggregator
from wsimil.batch import BagBatch, LabelledBags, Objective
from wsimil.config import TrainConfig
from wsimil.errors import UsageError
from wsimil.objectives import AttentionEntropy, AveragedWeights, ClamInstances, MaskedHardInstances, SlideLabel
from wsimil.task import Task
from wsimil.training.goals import OBJECTIVES, build_objective

TASK = Task("binary", ("neg", "pos"))
WRAPPERS: dict[str, Callable[[SlideLabel], Objective]] = {
    "clam_instances": lambda inner: ClamInstances(inner, 8),
    "mhim": MaskedHardInstances,
    "attention_entropy": AttentionEntropy,
    "averaged_weights": AveragedWeights,
}


class Spy(SlideLabel):
    """Says which of its hooks were called; brings a head of its own."""

    def __init__(self) -> None:
        super().__init__(TASK)
        self.called: list[str] = []
        self.head = nn.Linear(2, 2)

    def prepare(self, model: nn.Module) -> None:
        self.called.append("prepare")

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        self.called.append("param_groups")
        return [{"params": [*model.parameters()], "lr": 1.0}, {"params": [*self.head.parameters()], "lr": 2.0}]

    def sampler(self, epoch: int) -> Iterable[int]:
        self.called.append("sampler")
        return [epoch]

    def on_epoch_start(self, epoch: int, infer: Callable[[], Iterable[tuple[Any, Any]]]) -> None:
        self.called.append("on_epoch_start")

    def on_validation_start(self, infer: Callable[[], Iterable[tuple[Any, Any]]]) -> None:
        self.called.append("on_validation_start")

    def after_backward(self) -> None:
        self.called.append("after_backward")

    def after_step(self) -> None:
        self.called.append("after_step")


def test_every_objective_but_the_plain_one_is_here():
    assert {*WRAPPERS, "slide_label"} == {*OBJECTIVES}


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_hook_reaches_the_inner_objective(name):
    spy = Spy()
    objective, model = WRAPPERS[name](spy), make_aggregator("clam_sb", 6, 1, hidden=8)
    objective.prepare(model)
    groups = objective.param_groups(model)
    assert list(objective.sampler(3) or ()) == [3]
    objective.on_epoch_start(0, lambda: [])
    objective.on_validation_start(lambda: [])
    bags = BagBatch(torch.randn(9, 6), torch.tensor([0, 4, 9]), slide_ids=("a", "b"))
    losses = objective.losses(model, LabelledBags(bags, torch.tensor([0.0, 1.0])), 0.0)
    objective.after_backward()
    objective.after_step()
    hooks = ["prepare", "param_groups", "sampler", "on_epoch_start", "on_validation_start", "after_backward", "after_step"]
    assert spy.called == hooks
    assert "bag" in losses
    # the inner one's groups as it made them; every weight that learns in one group
    assert [group["lr"] for group in groups[:2]] == [1.0, 2.0]
    learning = [parameter for parameter in [*model.parameters(), *objective.parameters()] if parameter.requires_grad]
    assert sorted(map(id, learning)) == sorted(id(parameter) for group in groups for parameter in group["params"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_balanced_sampling_reaches_every_objective(name):
    config = TrainConfig(sampling="balanced", objective=name, hidden=8)
    order = build_objective(config, TASK, ["neg"] * 9 + ["pos"]).sampler(0)
    assert order is not None and list(order).count(9) == 5


@pytest.mark.parametrize("value", ["0", "-1", "2", "maybe"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_option_is_refused_by_name_or_the_objective_takes_a_step(name, value):
    bags = BagBatch(torch.randn(9, 6), torch.tensor([0, 4, 9]), slide_ids=("a", "b"))
    batch = LabelledBags(bags, torch.tensor([0.0, 1.0]))
    arguments = inspect.signature(OBJECTIVES[name].make).parameters.values()
    options = {one.name: one.default for one in arguments if isinstance(one.default, bool | int | float) and one.name != "seed"}
    assert options
    for option, default in options.items():
        config = TrainConfig(objective=name, hidden=8, objective_options=(f"{option}={value}",))
        try:
            objective = build_objective(config, TASK, ["neg", "pos"])
        except UsageError as error:
            assert option in str(error) and value in str(error), error
            continue
        assert not isinstance(default, bool) and value != "maybe"
        assert type(default) is not int or int(value) > 0
        model = make_aggregator("clam_sb", 6, 1, hidden=8).train()
        objective.prepare(model)
        losses = torch.stack(list(objective.losses(model, batch, 0.0).values()))
        losses.sum().backward()
        objective.after_backward()
        objective.after_step()
        assert losses.isfinite().all(), (option, value)


@pytest.mark.parametrize(
    ("name", "wrong"), [("clam_instances", "share=2"), ("averaged_weights", "decay=2"), ("attention_entropy", "weight=-1")]
)
def test_a_share_that_is_none_is_refused(name, wrong):
    option, value = wrong.split("=")
    with pytest.raises(UsageError, match=rf"objective {name}: {option} is {value}.*expected at least 0"):
        build_objective(TrainConfig(objective=name, objective_options=(wrong,)), TASK, ["neg", "pos"])

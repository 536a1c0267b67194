"""Averages of weights: by hand, what is validated and kept, resumed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from wsimil.aggregators import Standardized
from wsimil.aggregators.abmil import ABMIL
from wsimil.batch import BagBatch, LabelledBags
from wsimil.objectives import AttentionEntropy, AveragedWeights, SlideLabel
from wsimil.task import Task

BINARY = Task("binary", ("no", "yes"))


def make(decay: float = 0.9, seed: int = 0) -> tuple[nn.Module, AveragedWeights]:
    torch.manual_seed(seed)
    model = Standardized(ABMIL(6, 1, hidden=8, dropout=0.0), torch.randn(6))
    objective = AveragedWeights(SlideLabel(BINARY), decay=decay)
    objective.prepare(model)
    return model.train(), objective.train()


def batch(seed: int) -> LabelledBags:
    features = torch.randn(24, 6, generator=torch.Generator().manual_seed(seed))
    return LabelledBags(BagBatch(features, torch.tensor([0, 4, 24])), torch.tensor([0.0, 1.0]))


def advance(model: nn.Module, objective: AveragedWeights, steps: range) -> list[dict[str, Tensor]]:
    """Plain steps; the model's weights after each."""
    optimiser = torch.optim.SGD(objective.param_groups(model), lr=0.1)
    history = []
    for step in steps:
        optimiser.zero_grad()
        torch.stack(list(objective.losses(model, batch(step), 0.0).values())).sum().backward()
        optimiser.step()
        objective.after_step()
        history.append(copy.deepcopy(model.state_dict()))
    return history


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_average_is_that_of_a_calculation_by_hand(decay):
    model, objective = make(decay)
    history = advance(model, objective, range(12))
    expected = history[0]
    for t, weights in enumerate(history, start=1):
        d = min(decay, (t - 1) / (t + 9))
        expected = {name: d * expected[name] + (1 - d) * weights[name] for name in weights}
    found = objective.kept_model(model).state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name])
    assert not torch.equal(found["inner.classify.weight"], history[-1]["inner.classify.weight"])


def test_constant_weights_are_their_own_average_and_buffers_are_copied():
    model, objective = make()
    model.get_buffer("mean").fill_(5.0)
    before = copy.deepcopy(model.state_dict())
    for _ in range(5):
        objective.after_step()
    for name, values in objective.kept_model(model).state_dict().items():
        torch.testing.assert_close(values, before[name])


def test_training_sees_the_model_and_validation_the_average():
    model, objective = make()
    advance(model, objective, range(5))
    plain, average = SlideLabel(BINARY), objective.kept_model(model)
    assert objective.losses(model, batch(9), 0.0)["bag"] == plain.losses(model, batch(9), 0.0)["bag"]
    validated = objective.losses(model.eval(), batch(9), 0.0)["bag"]
    assert validated == plain.losses(average, batch(9), 0.0)["bag"] != plain.losses(model, batch(9), 0.0)["bag"]
    assert not any(module.training for module in average.modules())


def test_the_optimiser_never_sees_the_average():
    model, objective = make()
    optimised = {id(parameter) for group in objective.param_groups(model) for parameter in group["params"]}
    assert optimised == {id(parameter) for parameter in model.parameters()}


def test_a_resumed_run_has_the_same_average():
    model, objective = make()
    advance(model, objective, range(4))
    again, resumed = make(seed=99)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(objective.state_dict())
    advance(model, objective, range(4, 8))
    advance(again, resumed, range(4, 8))
    for one, other in zip(objective.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_the_model_is_not_the_objectives_state():
    model, objective = make()
    assert not {id(parameter) for parameter in objective.parameters()} & {id(parameter) for parameter in model.parameters()}


def test_a_wrapper_hands_the_average_on():
    model, objective = make()
    assert AttentionEntropy(objective).kept_model(model) is objective.average
    assert SlideLabel(BINARY).kept_model(model) is model

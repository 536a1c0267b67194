"""Slide labels spread to tiles: what counts, what is frozen, and what is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wsimil.errors import ConfigError
from wsimil.objectives.weak_labels import LabelledTiles, WeakLabels


class TinyDenseNet(nn.Module):
    """DenseNet's names, one convolution in each place, under a `network` as trainable networks have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = ["conv0", "norm0", "denseblock1", "transition1", "denseblock2", "transition2", "denseblock3", "transition3"]
        stages = nn.ModuleDict()
        width = 3
        for name in (*parts, "denseblock4", "norm5"):
            stages[name] = (
                nn.BatchNorm2d(width) if name.startswith("norm") else nn.Sequential(nn.Conv2d(width, 4, 1), nn.BatchNorm2d(4))
            )
            width = 4
        self.network = nn.Module()
        self.network.features = stages

    def forward(self, images):
        for stage in self.network.features.values():
            images = stage(images)
        return images.mean((2, 3))


def batch(n: int = 6, *, seed: int = 0, unlabelled: int = 0) -> LabelledTiles:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % 3
    targets[:unlabelled] = -1
    return LabelledTiles(torch.randn(n, 3, 4, 4, generator=generator), targets)


def moved(model: nn.Module, before: dict) -> set[str]:
    return {name.split(".")[2] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_the_loss_is_cross_entropy_of_labelled_tiles_alone():
    model, objective = nn.Flatten(), WeakLabels(48, ("a", "b", "c"))
    tiles = batch(6, unlabelled=2)
    (loss,) = objective.losses(model, tiles, 0.0).values()
    logits = objective.classify(tiles.images.flatten(1))
    assert torch.allclose(loss, F.cross_entropy(logits[2:], tiles.targets[2:]))
    right = (logits[2:].argmax(1) == tiles.targets[2:]).float().mean()
    assert torch.allclose(objective.monitor["accuracy"].float(), right) and objective.monitor["chance"] == 0.5


def test_a_batch_without_labels_teaches_nothing():
    objective = WeakLabels(48, ("a", "b"))
    loss = objective.losses(nn.Flatten(), batch(3, unlabelled=3), 0.0)["tile"]
    loss.backward()
    assert loss == 0 and objective.classify.weight.grad is not None and not objective.classify.weight.grad.any()


@pytest.mark.parametrize(
    ("blocks", "trained"),
    [
        (1, {"denseblock4", "norm5"}),
        (2, {"denseblock3", "transition3", "denseblock4", "norm5"}),
        (3, {"denseblock2", "transition2", "denseblock3", "transition3", "denseblock4", "norm5"}),
    ],
)
def test_what_lies_before_the_trained_blocks_stays_as_it_was_to_the_running_mean(blocks, trained):
    model, objective = TinyDenseNet(), WeakLabels(4, ("a", "b", "c"), trained_blocks=blocks)
    objective.prepare(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(objective.param_groups(model), lr=0.1)
    model.train()  # as the loop does
    sum(objective.losses(model, batch(), 0.0).values()).backward()
    optimizer.step()
    assert moved(model, before) == trained


def test_all_blocks_train_in_configuration_four():
    model, objective = TinyDenseNet(), WeakLabels(4, ("a", "b", "c"))
    objective.prepare(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(objective.param_groups(model)[0]["params"]) == len([*model.parameters()]) + 2


def test_the_classifier_is_no_part_of_the_encoder_that_is_kept():
    model, objective = TinyDenseNet(), WeakLabels(4, ("a", "b", "c"), trained_blocks=1)
    objective.prepare(model)
    assert objective.kept_model(model) is model
    assert set(objective.state_dict()) == {"classify.weight", "classify.bias"}  # frozen blocks are the model's state, not its own


def test_the_blocks_are_those_of_timms_densenet():
    from wsimil.encoders.trainable_cnn import trainable_cnn

    model = trainable_cnn("densenet121", init=None)
    WeakLabels(model.embed_dim, ("a", "b"), trained_blocks=1).prepare(model)
    trains = {name.split(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert model.embed_dim == 1024 and trains == {"denseblock4", "norm5"}


def test_wrong_configurations_say_what_would_be_right():
    with pytest.raises(ConfigError, match="I to IV"):
        WeakLabels(4, ("a", "b"), trained_blocks=5)
    with pytest.raises(ConfigError, match="two classes"):
        WeakLabels(4, ("a",))
    with pytest.raises(ConfigError, match="four dense blocks"):
        WeakLabels(4, ("a", "b"), trained_blocks=2).prepare(nn.Linear(3, 4))


def test_tiles_learn_their_slides_label():
    torch.manual_seed(0)
    model, objective = nn.Sequential(nn.Flatten(), nn.Linear(48, 8)), WeakLabels(8, ("a", "b", "c"))
    optimizer = torch.optim.Adam(objective.param_groups(model), lr=0.02)
    tiles = batch(24)
    for _ in range(60):
        optimizer.zero_grad()
        objective.losses(model, tiles, 0.0)["tile"].backward()
        optimizer.step()
    assert objective.monitor["accuracy"] == 1 > objective.monitor["chance"]

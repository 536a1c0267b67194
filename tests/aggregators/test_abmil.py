"""ABMIL, gated and not, against the authors' code and torchmil's; and with a classifier of two layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from seeded import make_bags, seed_weights
from torch import nn

from wsimil.aggregators.abmil import ABMIL
from wsimil.aggregators.packed import segment_softmax, segment_sum
from wsimil.batch import pack
from wsimil.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"

plain_and_gated = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


@plain_and_gated
def test_probability_and_attention_are_those_of_the_authors_code(gated):
    golden, name = np.load(GOLDEN / "abmil.npz"), "gated" if gated else "plain"
    model = ABMIL(800, 1, hidden=500, attention=128, gated=gated).double().eval()
    seed_weights(model, seed=2)
    bags = pack([make_bags(size, dim=800, seed=size) for size in golden["sizes"].tolist()])
    output = model(bags)
    np.testing.assert_allclose(output.logits.sigmoid()[:, 0].detach(), golden[f"{name}_probability"], rtol=0, atol=1e-8)
    attention = segment_softmax(output.attention_logits, bags)[:, 0].detach()
    np.testing.assert_allclose(attention, golden[f"{name}_attention"], rtol=0, atol=1e-8)


@plain_and_gated
def test_logits_and_attention_are_those_of_torchmil(gated):
    golden, name = np.load(GOLDEN / "abmil_torchmil.npz"), "gated" if gated else "plain"
    model = ABMIL(16, 1, hidden=24, attention=8, gated=gated).double().eval()
    seed_weights(model, seed=3)
    with torch.no_grad():
        model.attend.score.bias.zero_()  # torchmil's attention has none
    output = model(pack([make_bags(size, dim=16, seed=size) for size in golden["sizes"].tolist()]))
    np.testing.assert_allclose(output.logits[:, 0].detach(), golden[f"{name}_logit"], rtol=0, atol=1e-8)
    np.testing.assert_allclose(output.attention_logits[:, 0].detach(), golden[f"{name}_attention_logits"], rtol=0, atol=1e-8)


def test_a_classifier_of_two_layers_is_explained_by_leaving_tiles_out():
    torch.manual_seed(0)
    model = ABMIL(6, 3, hidden=8, attention=4, classifier_hidden=5).double().eval()
    assert model.contribution_kind == "leave-one-out"
    bag = make_bags(9, dim=6)
    output = model(bag, explain=True)
    assert output.contributions is not None
    for tile in range(9):
        keep = torch.arange(9) != tile
        rest = model(type(bag)(bag.features[keep], torch.tensor([0, 8]))).logits[0]
        torch.testing.assert_close(output.contributions[tile], output.logits[0] - rest, rtol=0, atol=1e-8)


def test_every_head_attends_by_itself_and_their_means_are_classified_side_by_side():
    torch.manual_seed(0)
    model = ABMIL(6, 3, hidden=8, attention=4, heads=3).double().eval()
    bags = make_bags(1, 2, 9, dim=6)
    output = model(bags, explain=True)
    assert output.attention_logits is not None and output.bag_embedding is not None and output.contributions is not None
    for index in range(3):
        bag = bags.bag(index)
        tiles = model.project(bag.features)
        weights = model.attend(tiles).softmax(0)
        means = torch.cat([(weights[:, head, None] * tiles).sum(0) for head in range(3)])
        torch.testing.assert_close(output.bag_embedding[index], means)
        torch.testing.assert_close(output.logits[index], model.classify(means))
    torch.testing.assert_close(segment_sum(output.contributions, bags), output.logits)
    # a tile is owed what its features would add, had every other tile none
    rows = bags.bag_index == 2
    tiles, weights = model.project(bags.features[rows]), segment_softmax(output.attention_logits, bags)[rows]
    linear = model.classify
    assert isinstance(linear, nn.Linear)
    alone = (weights[4].unsqueeze(1) * tiles[4]).flatten() @ linear.weight.T + linear.bias * weights[4].mean()
    torch.testing.assert_close(output.contributions[rows][4], alone)


def test_one_head_among_several_that_are_all_alike_is_the_model_with_one():
    torch.manual_seed(0)
    one, three = (ABMIL(6, 2, hidden=8, attention=4, heads=heads).double().eval() for heads in (1, 3))
    weights = one.state_dict()
    weights["attend.score.weight"] = weights["attend.score.weight"].repeat(3, 1)
    weights["attend.score.bias"] = weights["attend.score.bias"].repeat(3)
    weights["classify.weight"] = weights["classify.weight"].repeat(1, 3) / 3
    three.load_state_dict(weights)
    bags = make_bags(2, 9, dim=6)
    left, right = one(bags, explain=True), three(bags, explain=True)
    torch.testing.assert_close(left.logits, right.logits)
    torch.testing.assert_close(left.contributions, right.contributions)


@plain_and_gated
def test_without_biases_the_attention_is_the_formula_of_the_paper(gated):
    torch.manual_seed(0)
    model = ABMIL(6, 1, hidden=8, attention=4, gated=gated, attention_bias=False).double().eval()
    bag = make_bags(9, dim=6)
    tiles, attend = model.project(bag.features), model.attend
    inside = torch.tanh(tiles @ attend.feature.weight.T)
    if gated:
        assert attend.gate is not None
        inside = inside * torch.sigmoid(tiles @ attend.gate.weight.T)
    torch.testing.assert_close(model(bag).attention_logits, inside @ attend.score.weight.T)


def test_no_heads_are_refused():
    with pytest.raises(ConfigError, match="heads = 0; expected at least 1"):
        ABMIL(6, 1, heads=0)

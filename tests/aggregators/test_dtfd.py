"""DTFD-MIL: the official numbers, how bags are split, and what each tier learns from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsimil.aggregators.dtfd import DTFD
from wsimil.aggregators.packed import segment_sum
from wsimil.batch import BagBatch
from wsimil.errors import ConfigError

GOLDEN = {name: torch.as_tensor(values) for name, values in np.load(Path(__file__).parent / "golden" / "dtfd.npz").items()}
DIM = 6


def make(*, seed: int = 0, **options) -> DTFD:
    torch.manual_seed(seed)
    return DTFD(DIM, 2, hidden=16, attention=8, **options).double().eval()


def bags_of(*sizes: int) -> BagBatch:
    features = torch.randn(sum(sizes), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return BagBatch(features, torch.tensor([0, *sizes]).cumsum(0))


@pytest.mark.parametrize(("distill", "n_distilled"), [("AFS", 1), ("MaxS", 1), ("MaxS", 3), ("MaxMinS", 1), ("MaxMinS", 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_the_numbers_are_those_of_the_official_code(distill, n_distilled, dtype, tolerance):
    model = DTFD(16, 2, hidden=24, attention=12, distill=distill, n_distilled=n_distilled).eval()
    model.load_state_dict({name[7:]: values for name, values in GOLDEN.items() if name.startswith("weight/")})
    bags = BagBatch(GOLDEN["features"], F.pad(GOLDEN["sizes"].cumsum(0), (1, 0)))
    output = model.to(dtype)(bags.to("cpu", dtype))
    expected, pseudo = GOLDEN[f"{distill}-{n_distilled}/logits"].to(dtype), GOLDEN["pseudo_logits"].to(dtype)
    torch.testing.assert_close(output.logits, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(output.extra_logits[0].logits, pseudo, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [False, True])
def test_a_split_gives_every_tile_to_one_pseudo_bag_of_its_own_bag_and_fair_shares(training):
    bags, model = bags_of(1, 3, 4, 10, 41), make().train(training)
    member, counts = model._split(bags)
    assert counts.tolist() == [1, 3, 4, 4, 4]
    shares = member.bincount(minlength=int(counts.sum())).split(counts.tolist())
    assert [share.tolist() for share in shares] == [[1], [1] * 3, [1] * 4, [3, 3, 2, 2], [11, 10, 10, 10]]
    first = counts.cumsum(0) - counts
    assert (member >= first[bags.bag_index]).all() and (member < (first + counts)[bags.bag_index]).all()


def test_the_split_is_drawn_anew_in_training_and_fixed_otherwise():
    bags, model = bags_of(41), make()
    assert torch.equal(model._split(bags)[0], torch.arange(41) % 4)
    model.train()
    torch.manual_seed(0)
    one, two = model._split(bags)[0], model._split(bags)[0]
    torch.manual_seed(0)
    assert not torch.equal(one, two) and torch.equal(one, model._split(bags)[0])


@pytest.mark.parametrize("distill", ["AFS", "MaxS", "MaxMinS"])
def test_the_projection_learns_from_pseudo_bags_alone(distill):
    model, bags = make(distill=distill), bags_of(9, 20)
    output = model(bags)
    weight = model.get_parameter("project.0.weight")
    assert torch.autograd.grad(output.logits.sum(), weight, retain_graph=True, allow_unused=True) == (None,)
    (gradient,) = torch.autograd.grad(output.extra_logits[0].logits.sum(), weight)
    assert gradient.abs().sum() > 0


def test_with_one_pseudo_bag_the_first_tier_is_gated_attention_pooling():
    model, bags = make(n_pseudo=1), bags_of(9, 20)
    output = model(bags)
    tiles = model.project(bags.features).split([9, 20])
    means = torch.stack([(model.attend_tiles(bag).softmax(0) * bag).sum(0) for bag in tiles])
    torch.testing.assert_close(output.extra_logits[0].logits, model.classify_pseudo(means), rtol=0, atol=1e-12)
    torch.testing.assert_close(output.logits, model.classify(means), rtol=0, atol=1e-12)  # its only feature has weight 1


@pytest.mark.parametrize(("distill", "most"), [("MaxS", 4), ("MaxMinS", 8)])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_only_distilled_tiles_contribute_and_nothing_is_lost(distill, most, n_outputs):
    torch.manual_seed(0)
    model, bags = DTFD(DIM, n_outputs, hidden=16, distill=distill).double().eval(), bags_of(30, 3)
    output = model(bags, explain=True)
    contributing = output.contributions.abs().sum(1) > 0
    assert contributing[:30].sum() == most and contributing[30:].all()
    torch.testing.assert_close(segment_sum(output.contributions, bags), output.logits, rtol=0, atol=1e-10)
    weights = torch.cat([part.softmax(0) for part in output.attention_logits.split([30, 3])])
    torch.testing.assert_close((weights[:, 0] > 1e-20), contributing)


def test_the_most_positive_tile_is_distilled():
    torch.manual_seed(0)
    model, bags = DTFD(DIM, 1, hidden=16, distill="MaxS", n_pseudo=1).double().eval(), bags_of(30)
    with torch.no_grad():
        model.attend_tiles.score.weight.zero_()  # equal attention: evidence is the first tier's classifier alone
    evidence = model.project(bags.features) @ model.classify_pseudo.weight[0]
    contributions = model(bags, explain=True).contributions
    assert contributions.abs().argmax() == evidence.argmax()
    flipped = replace(bags, features=bags.features.flip(0))
    assert model(flipped, explain=True).contributions.abs().argmax() == 29 - evidence.argmax()


def test_an_unknown_distillation_is_refused():
    with pytest.raises(ConfigError, match="'MinS' is unknown"):
        make(distill="MinS")

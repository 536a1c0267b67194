"""ACMIL: the official numbers, which tiles are hidden, and when branches are alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsimil.aggregators.acmil import ACMIL, HIDDEN_SCORE, likeness
from wsimil.aggregators.packed import segment_softmax
from wsimil.batch import BagBatch
from wsimil.errors import ConfigError

GOLDEN = {name: torch.as_tensor(values) for name, values in np.load(Path(__file__).parent / "golden" / "acmil.npz").items()}
DIM, T = 6, 5


def make(**options) -> ACMIL:
    torch.manual_seed(0)
    return ACMIL(DIM, 2, hidden=16, attention=8, **options).double()


def bags_of(*sizes: int) -> BagBatch:
    features = torch.randn(sum(sizes), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return BagBatch(features, torch.tensor([0, *sizes]).cumsum(0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_the_numbers_are_those_of_the_official_code(dtype, tolerance):
    model = ACMIL(16, 3, hidden=24, attention=12).eval()
    model.load_state_dict({name[7:]: values for name, values in GOLDEN.items() if name.startswith("weight/")})
    bags = BagBatch(GOLDEN["features"], F.pad(GOLDEN["sizes"].cumsum(0), (1, 0))).to("cpu", dtype)
    output = model.to(dtype)(bags)
    found = {
        "logits": output.logits,
        "branch_logits": output.extra_logits[0].logits,
        "attention_logits": output.attention_logits,
        "diversity": torch.stack([model(bags.bag(index)).penalties["diversity"] for index in range(len(bags))]),
    }
    for name, values in found.items():
        torch.testing.assert_close(values, GOLDEN[name].to(dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(output.penalties["diversity"], found["diversity"].mean())


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.6, 0.99])
def test_hidden_tiles_are_among_the_strongest_of_their_bag_and_branch_and_exactly_so_many(rate):
    sizes = (1, 2, 7, 50, 300)
    bags, model = bags_of(*sizes), make(mask_rate=rate)
    scores = torch.randn(sum(sizes), T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    after = model.hide(scores, bags)
    hidden = after == HIDDEN_SCORE
    assert torch.equal(after[~hidden], scores[~hidden])
    for of_bag, gone in zip(scores.split(sizes), hidden.split(sizes), strict=True):
        n_top = min(10, len(of_bag))
        assert gone.sum(0).tolist() == [int(rate * n_top)] * T
        weakest_of_top = of_bag.sort(0, descending=True).values[n_top - 1]
        assert (of_bag[gone] >= weakest_of_top.expand_as(of_bag)[gone]).all()


def test_hidden_tiles_weigh_nothing_differ_between_branches_and_are_drawn_anew():
    bags, model = bags_of(50), make()
    scores = torch.randn(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).expand(-1, T)
    one, two = model.hide(scores, bags), model.hide(scores, bags)
    assert (segment_softmax(one, bags)[one == HIDDEN_SCORE] == 0).all()
    assert not torch.equal(one, two) and not (one == one[:, :1]).all()


def test_every_strong_tile_is_hidden_as_often_as_any_other():
    bags, model = bags_of(50), make()
    scores = torch.arange(50.0, dtype=torch.float64).unsqueeze(1).expand(-1, 1000)
    share = (model.hide(scores, bags) == HIDDEN_SCORE).double().mean(1)
    assert share[:40].sum() == 0
    assert (share[40:] - 0.6).abs().max() < 0.07  # 4.5 standard errors of 1,000 draws


def test_nothing_is_hidden_in_evaluation_and_something_in_training():
    bags, model = bags_of(50, 3), make()
    assert (model.eval()(bags).attention_logits > HIDDEN_SCORE).all()
    assert (model.train()(bags).attention_logits == HIDDEN_SCORE).sum() == T * (6 + 1)


def test_a_hidden_tile_teaches_its_branch_nothing():
    bags, model = bags_of(50), make().train()
    scores = torch.randn(50, T, dtype=torch.float64, requires_grad=True)
    hidden = model.hide(scores, bags)
    (gradient,) = torch.autograd.grad((segment_softmax(hidden, bags) * bags.features[:, :1]).sum(), scores)
    assert (gradient[hidden == HIDDEN_SCORE] == 0).all() and gradient.isfinite().all()


def test_branches_that_look_at_the_same_tiles_are_alike_and_others_are_not():
    bags = bags_of(4, 6)
    same = segment_softmax(torch.randn(10, 1).double().expand(-1, 3), bags)
    torch.testing.assert_close(likeness(same, bags), torch.tensor(1.0).double())
    apart = torch.zeros(10, 2).double()
    apart[[0, 4], 0] = apart[[1, 5], 1] = 1
    assert likeness(apart, bags) == 0
    apart[5, 1], apart[4, 1] = 0, 1  # the second bag's branches meet
    assert likeness(apart, bags) == 0.5


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="1 branch"):
        make(n_branches=1)
    with pytest.raises(ConfigError, match=r"mask_rate 1.0"):
        make(mask_rate=1.0)

"""ABMILX: the authors' numbers, and what the refinement does to the scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from wsimil.aggregators.abmilx import ABMILX
from wsimil.aggregators.packed import segment_softmax
from wsimil.batch import BagBatch
from wsimil.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden" / "abmilx.npz"


def make_bags(*sizes: int) -> BagBatch:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(sum(sizes), 6, generator=generator, dtype=torch.float64)
    return BagBatch(features, torch.tensor([0, *sizes]).cumsum(0))


def make_model(**options) -> ABMILX:
    torch.manual_seed(0)
    return ABMILX(6, 2, hidden=8, heads=2, **options).double().eval()


def test_the_numbers_are_the_authors():
    golden = {name: torch.as_tensor(values) for name, values in np.load(GOLDEN).items()}
    model = ABMILX(12, 3, hidden=32, heads=4).double().eval()
    model.load_state_dict({name[7:]: values for name, values in golden.items() if name.startswith("weight/")})
    bags = BagBatch(golden["features"].double(), golden["offsets"])
    output = model(bags)
    assert output.attention_logits is not None
    torch.testing.assert_close(output.logits, golden["logits"], rtol=0, atol=1e-8)
    torch.testing.assert_close(segment_softmax(output.attention_logits, bags), golden["attention"], rtol=0, atol=1e-8)


def test_a_refined_score_is_the_sum_over_all_tiles_by_likeness():
    model, bags = make_model(), make_bags(9)
    refine, tiles = model.refine, model.project(bags.features)
    assert refine is not None
    for head, part in enumerate(tiles.split(4, 1)):
        own = model.attend(part)  # (N, 1)
        likeness = (refine.query(refine.norm(part)) @ refine.key(refine.norm(part)).T / 2).softmax(1)
        expected = own + refine.value.weight.item() * likeness @ own
        torch.testing.assert_close(model.scores(tiles)[:, head : head + 1], expected, rtol=0, atol=1e-12)


def test_without_refinement_a_tile_does_not_hear_of_others():
    bags = make_bags(9, 4)
    hot = bags.features.clone()
    hot[0] += 5
    for refine, heard in ((False, 1), (True, 9)):
        model = make_model(refine=refine)
        before, after = model(bags).attention_logits, model(replace(bags, features=hot)).attention_logits
        assert before is not None and after is not None
        assert (before != after).any(1).tolist() == [True] * heard + [False] * (13 - heard)


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="hidden = 20 is not a multiple of heads = 8"):
        ABMILX(6, 1, hidden=20)

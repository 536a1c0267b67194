"""Additive MIL: slide logits that are a sum over tiles, and the authors' classifier on the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from seeded import make_bags, seed_weights

from wsimil.aggregators.additive import Additive
from wsimil.aggregators.packed import segment_softmax
from wsimil.batch import BagBatch, pack

GOLDEN = Path(__file__).parent / "golden" / "additive.npz"


def make(*, bias: bool = False) -> Additive:
    model = Additive(16, 3, hidden=24, attention=8, bias=bias).double().eval()
    seed_weights(model, seed=4)
    return model


def test_logits_and_contributions_are_those_of_the_authors_classifier():
    golden = np.load(GOLDEN)
    bags = pack([make_bags(size, dim=16, seed=size) for size in golden["sizes"].tolist()])
    output = make(bias=True)(bags, explain=True)
    np.testing.assert_allclose(output.logits.detach(), golden["logits"], rtol=0, atol=1e-8)
    np.testing.assert_allclose(output.contributions.detach(), golden["patch_logits"], rtol=0, atol=1e-8)


def test_the_classifier_sees_one_tile_at_a_time():
    model, bags = make(), make_bags(9, dim=16)
    output = model(bags, explain=True)
    attention = segment_softmax(output.attention_logits, bags)
    for tile in range(9):
        alone = model.classify(attention[tile] * output.tile_embedding[tile]) + attention[tile] * model.intercept
        torch.testing.assert_close(output.contributions[tile], alone)


def test_a_slide_scanned_twice_is_the_same_slide():
    bag = make_bags(50, dim=16)
    twice = BagBatch(bag.features.repeat(2, 1), torch.tensor([0, 100]))
    torch.testing.assert_close(make()(twice).logits, make()(bag).logits)
    shift = make(bias=True)(twice).logits - make(bias=True)(bag).logits
    assert shift.abs().max() > 1  # the authors' form adds ψ(0) fifty times more

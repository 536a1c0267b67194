"""ABMIL, gated and not, against the authors' code and torchmil's; and with a classifier of two layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from seeded import make_bags, seed_weights

from wsimil.aggregators.abmil import ABMIL
from wsimil.aggregators.packed import segment_softmax
from wsimil.batch import pack

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

"""CLAM-SB and CLAM-MB against the authors' code, and what tells the two apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from seeded import make_bags, seed_weights

from wsimil.aggregators import make_aggregator
from wsimil.aggregators.clam import CLAM
from wsimil.batch import pack
from wsimil.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden" / "clam.npz"
BRANCHES = {"sb": "single", "mb": "multiple"}


@pytest.mark.parametrize("name", BRANCHES)
def test_logits_and_attention_are_those_of_the_authors_code(name):
    golden = np.load(GOLDEN)
    model = CLAM(16, 3, branches=BRANCHES[name]).double().eval()
    seed_weights(model, seed=5)
    output = model(pack([make_bags(size, dim=16, seed=size) for size in golden["sizes"].tolist()]))
    np.testing.assert_allclose(output.logits.detach(), golden[f"{name}_logits"], rtol=0, atol=1e-8)
    np.testing.assert_allclose(output.attention_logits.detach(), golden[f"{name}_attention_logits"], rtol=0, atol=1e-8)


def test_with_several_branches_an_output_follows_its_own_attention_alone():
    model, bags = CLAM(6, 3, hidden=8, attention=4, branches="multiple").double().eval(), make_bags(5, 9, dim=6)
    before = model(bags)
    with torch.no_grad():
        model.attend.score.weight[1].neg_()
    after = model(bags)
    assert ((after.logits - before.logits).abs().amax(0) > 1e-9).tolist() == [False, True, False]
    assert ((after.bag_embedding - before.bag_embedding).abs().amax((0, 2)) > 1e-9).tolist() == [False, True, False]


def test_of_one_output_both_are_the_same_model():
    bags = make_bags(5, 9, dim=6)
    logits = []
    for name in ("clam_sb", "clam_mb"):
        torch.manual_seed(0)
        logits.append(make_aggregator(name, 6, 1, hidden=8).double().eval()(bags).logits)
    torch.testing.assert_close(*logits)


def test_dropout_acts_inside_the_attention():
    model, bags = CLAM(6, 1, hidden=8, attention=64, dropout=0.5).double(), make_bags(9, dim=6)
    model.project.eval()
    assert not torch.equal(model(bags).attention_logits, model(bags).attention_logits)


def test_branches_of_another_name_are_refused():
    with pytest.raises(ConfigError, match="single or multiple"):
        CLAM(6, 1, branches="two")

"""Both DSMILs against their authors' code, the top tile, and weights read from the authors' files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from seeded import make_bags, seed_weights

from wsimil.aggregators.dsmil import DSMIL, dsmil_from_reference
from wsimil.aggregators.packed import segment_softmax
from wsimil.batch import LabelledBags, pack
from wsimil.errors import ConfigError
from wsimil.objectives import SlideLabel
from wsimil.task import Task

GOLDEN = Path(__file__).parent / "golden" / "dsmil.npz"
VARIANTS = {"repository": {}, "self_vit_mil": {"nonlinear_query": False, "value_projection": True}}

every_variant = pytest.mark.parametrize("name", VARIANTS)


def make(name: str, dim: int = 24) -> DSMIL:
    model = DSMIL(dim, 3, **VARIANTS[name]).double().eval()
    seed_weights(model, seed=7)
    return model


@every_variant
def test_logits_attention_and_top_tile_are_those_of_the_authors_code(name):
    golden = np.load(GOLDEN)
    bags = pack([make_bags(size, dim=24, seed=size) for size in golden["sizes"].tolist()])
    output = make(name)(bags)
    attention = segment_softmax(output.attention_logits, bags)
    (top,) = output.extra_logits
    for ours, theirs in ((output.logits, "logits"), (attention, "attention"), (top.logits, "top")):
        np.testing.assert_allclose(ours.detach(), golden[f"{name}_{theirs}"], rtol=0, atol=1e-8, err_msg=theirs)


@every_variant
def test_the_top_tile_is_looked_for_within_its_own_bag(name):
    output = make(name)(make_bags(4, 1, 9, dim=24))
    (top,) = output.extra_logits
    assert torch.equal(top.logits, torch.stack([part.amax(0) for part in output.tile_logits.split([4, 1, 9])]))
    assert top.bag_index.tolist() == [0, 1, 2]


def test_slide_and_top_tile_count_the_same():
    task = Task("multiclass", ("a", "b", "c"))
    batch = LabelledBags(make_bags(4, 9, dim=24), torch.tensor([2, 0]))
    output = make("repository")(batch.bags)
    losses = SlideLabel(task).losses_of(output, batch)
    torch.testing.assert_close(losses["bag"], task.loss(output.logits, batch.targets))
    torch.testing.assert_close(losses["top_tile"], task.loss(output.extra_logits[0].logits, batch.targets))


@every_variant
def test_every_output_reads_the_embedding_of_every_class(name):
    model = make(name)
    (gradient,) = torch.autograd.grad(
        model.classify(embedding := torch.randn(1, 3 * 24, dtype=torch.float64, requires_grad=True))[0, 0], embedding
    )
    assert (gradient.view(3, 24).abs().amax(1) > 0).all()


def reference_weights(model: DSMIL) -> dict[str, torch.Tensor]:
    """The weights under the authors' names and in their shapes."""
    state = model.state_dict()
    names = {"score": "i_classifier.fc.0", "query.0": "b_classifier.q.0", "query.2": "b_classifier.q.2", "query": "b_classifier.q"}
    weights = {}
    for name, values in state.items():
        layer, _, part = name.rpartition(".")
        weights[f"{names.get(layer, 'b_classifier.fcc')}.{part}"] = values
    weights["b_classifier.fcc.weight"] = weights["b_classifier.fcc.weight"].unflatten(1, (model.n_outputs, model.dim))
    return weights


@pytest.mark.parametrize("nonlinear_query", [True, False])
@pytest.mark.parametrize("n_outputs", [1, 2])
def test_weights_of_the_authors_are_read(n_outputs, nonlinear_query, tmp_path):
    torch.manual_seed(0)
    model = DSMIL(24, n_outputs, hidden=8, nonlinear_query=nonlinear_query).eval()
    encoder = {"i_classifier.feature_extractor.conv1.weight": torch.zeros(3)}
    torch.save(reference_weights(model) | encoder, tmp_path / "weights.pth")
    other = dsmil_from_reference(torch.load(tmp_path / "weights.pth", weights_only=True)).eval()
    bags = make_bags(4, 9, dim=24).to("cpu", torch.float32)
    torch.testing.assert_close(other(bags).logits, model(bags).logits, rtol=0, atol=0)


def test_weights_with_learned_values_or_of_another_model_are_refused():
    weights = reference_weights(DSMIL(24, 2))
    with pytest.raises(ConfigError, match=r"b_classifier\.v\.1\.weight"):
        dsmil_from_reference(weights | {"b_classifier.v.1.weight": torch.zeros(24, 24)})
    with pytest.raises(ConfigError, match="not the weights of a DSMIL"):
        dsmil_from_reference({"attention.0.weight": torch.zeros(3)})


def test_dropout_is_on_what_learned_values_read_and_nowhere_else():
    bags = make_bags(9, dim=6)
    for projected in (False, True):
        model = DSMIL(6, 1, hidden=4, value_projection=projected, dropout=0.5).double()
        torch.manual_seed(0)
        dropped = model.train()(bags)
        whole = model.eval()(bags)
        assert torch.equal(dropped.logits, whole.logits) != projected
        assert torch.equal(dropped.attention_logits, whole.attention_logits)

"""SimpleMIL: the official numbers, and which features the attention sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsimil.aggregators.packed import segment_softmax
from wsimil.aggregators.simple_mil import SimpleMIL
from wsimil.batch import BagBatch
from wsimil.errors import ConfigError

GOLDEN = {name: torch.as_tensor(values) for name, values in np.load(Path(__file__).parent / "golden" / "simple_mil.npz").items()}
BAGS = BagBatch(GOLDEN["features"], F.pad(GOLDEN["sizes"].cumsum(0), (1, 0)))


def golden_model(dtype: torch.dtype) -> SimpleMIL:
    model = SimpleMIL(40, 3, hidden=12, dropout=0.0).eval()
    model.load_state_dict({name[7:]: values for name, values in GOLDEN.items() if name.startswith("weight/")})
    return model.to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_predictions_are_those_of_the_official_code(dtype, tolerance):
    model, bags = golden_model(dtype), BAGS.to("cpu", dtype)
    output = model(bags)
    attention = segment_softmax(output.attention_logits, bags)[:, 0]
    of_parts = model.logits_of_parts(bags)
    chances = of_parts.softmax(2)
    entropy = lambda p: -(p * (p + 1e-8).log()).sum(-1)  # noqa: E731
    found = {
        "logits": output.logits,
        "attention": attention,
        "mutual_information": entropy(chances.mean(0)) - entropy(chances).mean(0),
    }
    for name, values in found.items():
        torch.testing.assert_close(values, GOLDEN[name].to(dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(of_parts.mean(0), output.logits, rtol=tolerance, atol=tolerance)


def test_a_training_step_is_that_of_the_official_code(monkeypatch):
    model = golden_model(torch.float64).train()
    for index, (part, logits) in enumerate(zip(GOLDEN["train_part"], GOLDEN["train_logits"], strict=True)):
        monkeypatch.setattr(model, "parts", lambda part=part: [part])
        torch.testing.assert_close(model(BAGS.to("cpu", torch.float64).bag(index)).logits[0], logits, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("dim", "hidden", "size"), [(1024, 256, 256), (384, 256, 192), (100, 512, 50), (1, 16, 1)])
def test_a_part_is_a_part_and_the_parts_together_are_the_whole(dim, hidden, size):
    model = SimpleMIL(dim, 2, hidden=hidden).eval()
    parts = model.parts()
    assert {len(part) for part in parts} == {size} and all(len(part.unique()) == size for part in parts)
    seen = torch.cat(parts).bincount(minlength=dim)
    assert seen.min() >= 1 and seen.max() <= 5
    assert all(torch.equal(one, other) for one, other in zip(parts, SimpleMIL(dim, 2, hidden=hidden).eval().parts(), strict=True))
    (drawn,), (again,) = model.train().parts(), model.parts()
    assert len(drawn) == len(drawn.unique()) == size
    assert dim == 1 or not torch.equal(drawn, again)


def test_attention_sees_its_part_alone_and_pooling_sees_everything(monkeypatch):
    model = golden_model(torch.float64)
    monkeypatch.setattr(model, "parts", lambda: [torch.arange(10)])
    bag = BAGS.to("cpu", torch.float64).bag(3)
    before = model(bag)
    bag.features[:, 10:] += torch.randn(50, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    after = model(bag)
    assert torch.equal(after.attention_logits, before.attention_logits)
    assert not torch.allclose(after.logits, before.logits, atol=1e-3)


@pytest.mark.parametrize("n_features", [0, 41, 80])
def test_more_features_than_there_are_are_refused(n_features):
    assert sum(len(part) for part in SimpleMIL(40, 1, n_features=40).eval().parts()) == 40
    with pytest.raises(ConfigError, match=f"n_features is {n_features}; the features of these bags have 40 numbers"):
        SimpleMIL(40, 1, n_features=n_features)

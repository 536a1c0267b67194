"""ILRA-MIL: the authors' numbers, and that tiles meet through the latents alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from wsimil.aggregators.ilra import ILRA
from wsimil.aggregators.packed import segment_softmax, segment_sum
from wsimil.batch import BagBatch
from wsimil.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden" / "ilra.npz"


def make_bags(dim: int = 6, sizes: tuple[int, ...] = (9, 4)) -> BagBatch:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(sum(sizes), dim, generator=generator, dtype=torch.float64)
    return BagBatch(features, torch.tensor([0, *sizes]).cumsum(0))


def test_the_numbers_are_the_authors():
    golden = {name: torch.as_tensor(values) for name, values in np.load(GOLDEN).items()}
    model = ILRA(12, 3, hidden=16, heads=4, latents=6).double().eval()
    model.load_state_dict({name[7:]: values for name, values in golden.items() if name.startswith("weight/")})
    output = model(BagBatch(golden["features"].double(), golden["offsets"]))
    torch.testing.assert_close(output.logits, golden["logits"], rtol=0, atol=1e-8)


def test_every_tile_hears_of_every_other_of_its_bag_and_of_no_other_bag():
    torch.manual_seed(0)
    model, bags = ILRA(6, 2, hidden=8, heads=2, latents=3).double().eval(), make_bags()
    hot = bags.features.clone()
    hot[0] += 5
    before, after = model(bags).tile_embedding, model(replace(bags, features=hot)).tile_embedding
    assert before is not None and after is not None
    moved = (after != before).any(1)
    assert moved[:9].all() and not moved[9:].any()


def test_attention_is_what_the_pooling_query_reads():
    torch.manual_seed(0)
    model, bags = ILRA(6, 2, hidden=8, heads=2).double().eval(), make_bags()
    output = model(bags)
    assert output.attention_logits is not None and output.tile_embedding is not None
    weights = segment_softmax(output.attention_logits, bags)  # (ΣN, heads)
    values = model.pool.value(output.tile_embedding).unflatten(1, (2, 4))
    read = segment_sum((weights.unsqueeze(2) * values).flatten(1), bags)
    value = model.pool.norm(model.pool.query(model.query) + model.pool.mix(read))
    value = model.pool.norm_out(value + model.pool.out(value).relu())
    torch.testing.assert_close(model.classify(value), output.logits, rtol=0, atol=1e-10)


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="hidden = 20 is not a multiple of heads = 8"):
        ILRA(6, 1, hidden=20)

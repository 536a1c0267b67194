"""WiKG: the numbers of two other implementations, and the neighbours it finds in chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from wsimil.aggregators import wikg
from wsimil.aggregators.wikg import WiKG, nearest
from wsimil.batch import BagBatch
from wsimil.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden" / "wikg.npz"


def make_bags(*sizes: int) -> BagBatch:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(sum(sizes), 6, generator=generator, dtype=torch.float64)
    return BagBatch(features, torch.tensor([0, *sizes]).cumsum(0))


def make_model(**options) -> WiKG:
    torch.manual_seed(0)
    return WiKG(6, 2, hidden=8, **options).double().eval()


@pytest.mark.parametrize("gate", ["authors", "mil-lab"])
def test_the_numbers_are_those_of_the_reference(gate):
    golden = {name: torch.as_tensor(values) for name, values in np.load(GOLDEN).items()}
    model = WiKG(12, 3, hidden=32, gate=gate).double().eval()
    model.load_state_dict({name[7:]: values for name, values in golden.items() if name.startswith("weight/")})
    output = model(BagBatch(golden["features"].double(), golden["offsets"]))
    torch.testing.assert_close(output.logits, golden[gate], rtol=0, atol=1e-8)


def test_an_edge_weighs_what_the_paper_says():
    model, bag = make_model(neighbours=3), make_bags(7)
    tiles = model.project(bag.features)
    tiles = (tiles + tiles.mean(0)) / 2
    heads, tails = model.head(tiles), model.tail(tiles)
    for tile in range(7):
        likeness = tails @ heads[tile] / 8**0.5
        best = likeness.argsort(descending=True)[:3]
        share = likeness[best].softmax(0)
        weight = torch.stack(
            [
                tails[other] @ torch.tanh(heads[tile] + part * tails[other] + (1 - part) * heads[tile])
                for other, part in zip(best, share, strict=True)
            ]
        )
        expected = weight.softmax(0) @ tails[best]
        found = model.neighbourhood(heads, tails, nearest(heads, tails, 3))[tile]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_chunks_change_neither_values_nor_gradients(monkeypatch):
    model, bags = make_model(), make_bags(50, 3)
    whole = model(bags).logits
    gradients = torch.autograd.grad(whole.sum(), list(model.parameters()))
    monkeypatch.setattr(wikg, "ROWS", 7)
    monkeypatch.setattr(wikg, "LIKENESSES", 450)  # nine rows of fifty
    chunked = model(bags).logits
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)
    for one, other in zip(torch.autograd.grad(chunked.sum(), list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_neighbours_are_the_best_of_all_and_a_small_bag_gives_all_it_has(monkeypatch):
    monkeypatch.setattr(wikg, "LIKENESSES", 100)
    generator = torch.Generator().manual_seed(0)
    heads, tails = torch.randn(30, 4, generator=generator), torch.randn(30, 4, generator=generator)
    assert torch.equal(nearest(heads, tails, 5), (heads @ tails.T).argsort(1, descending=True)[:, :5])
    assert nearest(heads[:2], tails[:2], 6).shape == (2, 2)


def test_an_unknown_gate_is_refused():
    with pytest.raises(ConfigError, match="'mean'; expected paper, authors, mil-lab"):
        WiKG(6, 1, gate="mean")

"""R²T-MIL: the authors' numbers, and the same arithmetic region by region without any padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wsimil.aggregators.r2t import R2T, Attention, BetweenRegions, regions_of
from wsimil.batch import BagBatch
from wsimil.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden" / "r2t.npz"


def make_bags(*sizes: int) -> BagBatch:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(sum(sizes), 6, generator=generator, dtype=torch.float64)
    return BagBatch(features, torch.tensor([0, *sizes]).cumsum(0))


def make_model(**options) -> R2T:
    torch.manual_seed(0)
    return R2T(6, 2, hidden=16, heads=4, **options).double().eval()


def test_the_numbers_are_the_authors():
    golden = {name: torch.as_tensor(values) for name, values in np.load(GOLDEN).items()}
    model = R2T(12, 3, hidden=32, heads=4, reach=5, compat=True).double().eval()
    model.load_state_dict({name[7:]: values for name, values in golden.items() if name.startswith("weight/")})
    bags = BagBatch(golden["features"].double(), golden["offsets"])
    output = model(bags)
    assert output.attention_logits is not None
    torch.testing.assert_close(output.logits, golden["logits"], rtol=0, atol=1e-8)
    torch.testing.assert_close(output.attention_logits[:, 0], golden["attention_logits"], rtol=0, atol=1e-8)
    model.compat = False
    assert (model(bags).logits - golden["logits"])[-1].abs().max() > 0.01  # the zeros that fill the square do count


@pytest.mark.parametrize("n_tiles", [1, 3, 64, 65, 100, 257])
def test_regions_are_squares_and_hold_tiles_before_they_hold_nothing(n_tiles):
    side, region = regions_of(n_tiles, 8)
    assert side * side >= n_tiles and side % 8 == 0 and (side - 8) ** 2 < n_tiles
    picture = region.reshape(side, side)
    size = side // 8
    for number in range(64):
        rows, columns = (picture == number).nonzero().T
        assert (rows // size).unique().tolist() == [number // 8] and (columns // size).unique().tolist() == [number % 8]
    order = region.argsort(stable=True).reshape(64, size * size)
    real = order < n_tiles
    assert (real[:, :-1] >= real[:, 1:]).all()


def attend_by_hand(layer: Attention, tokens: Tensor) -> Tensor:
    """(P, H) → (P, H), the convolution on the attention matrix as in the paper."""
    query, key, value = layer.in_project(tokens).split(tokens.shape[1], 1)
    parts = []
    for head in range(layer.heads):
        width = tokens.shape[1] // layer.heads
        q, k, v = (part[:, head * width : (head + 1) * width] for part in (query, key, value))
        scores = q @ k.T / width**0.5  # (P, P)
        if layer.around is not None:
            kernel = layer.around.weight[head].reshape(1, 1, -1, 1)
            scores = scores + torch.nn.functional.conv2d(scores[None, None], kernel, padding=(kernel.shape[2] // 2, 0))[0, 0]
        parts.append(scores.softmax(1) @ v)
    return layer.out_project(torch.cat(parts, 1))


def between_by_hand(layer: BetweenRegions, regions: list[Tensor]) -> list[Tensor]:
    logits = [layer.assign(region) for region in regions]  # (P, k) each
    spoken = torch.stack([one.softmax(0).T @ region for one, region in zip(logits, regions, strict=True)])  # (R, k, H)
    heard = torch.stack([attend_by_hand(layer.attend, spoken[:, k]) for k in range(spoken.shape[1])], 1)
    scaled = [(one - one.amin(0)) / (one.amax(0) - one.amin(0) + 1e-8) for one in logits]
    return [(scale * one.softmax(1)) @ part for scale, one, part in zip(scaled, logits, heard, strict=True)]


@pytest.mark.parametrize("shortcut", [False, True])
def test_each_region_is_computed_as_if_there_were_no_padding(shortcut):
    model, bag = make_model(reach=5, shortcut=shortcut), make_bags(150)
    tiles = model.project(bag.features)
    places = [(regions_of(150, 8)[1][:150] == number).nonzero().squeeze(1) for number in range(64)]
    places = [place for place in places if len(place)]
    assert 1 < len(places) < 64 and len({len(place) for place in places}) > 1
    within = tiles.clone()
    for place in places:
        within[place] += attend_by_hand(model.within, model.norm_within(tiles[place]))
    between = within.clone()
    known = model.norm_between(within)
    for place, heard in zip(places, between_by_hand(model.between, [known[place] for place in places]), strict=True):
        between[place] += heard
    expected = model.norm(between + tiles if shortcut else between)
    torch.testing.assert_close(model(bag).tile_embedding, expected, rtol=0, atol=1e-10)


def test_bags_large_enough_to_have_regions_do_not_see_one_another():
    model, bags = make_model(), make_bags(150, 70, 300)
    singles = torch.cat([model(bags.bag(index)).logits for index in range(3)])
    torch.testing.assert_close(model(bags).logits, singles, rtol=0, atol=1e-10)


def test_gradients_reach_every_layer_between_regions():
    model = make_model()
    model(make_bags(150)).logits.sum().backward()
    assert all(values.grad is not None and values.grad.abs().max() > 0 for values in model.between.parameters())


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="hidden = 20 is not a multiple of heads = 8"):
        R2T(6, 1, hidden=20)
    with pytest.raises(ConfigError, match="reach = 14 is even"):
        R2T(6, 1, reach=14)

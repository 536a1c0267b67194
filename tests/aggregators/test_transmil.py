"""TransMIL: the official numbers, what Nyström attention approximates, and tiles where they lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wsimil.aggregators.transmil import NystromAttention, PlaceConvolutions, TransMIL, grid_cells, pseudo_inverse
from wsimil.batch import BagBatch
from wsimil.errors import AggregatorInputError, ConfigError

GOLDEN = Path(__file__).parent / "golden" / "transmil.npz"
DIM, TILE_UM = 6, 112.0


def slide(cells: Tensor, seed: int = 0) -> BagBatch:
    """One bag of random tiles at (row, column) `cells`."""
    features = torch.randn(len(cells), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    coords_um = TILE_UM * cells.flip(1).double() + 5_000.0
    return BagBatch(features, torch.tensor([0, len(cells)]), coords_um, torch.tensor([TILE_UM]).double())


def square(side: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(side), torch.arange(side))


def on_grid(seed: int = 0, **options) -> TransMIL:
    torch.manual_seed(seed)
    return TransMIL(DIM, 2, hidden=16, tile_order="coords", **options).double().eval()


def golden_model(**options) -> tuple[TransMIL, BagBatch, Tensor]:
    golden = {name: torch.as_tensor(values) for name, values in np.load(GOLDEN).items()}
    model = TransMIL(24, 3, hidden=32, **options).eval()
    model.load_state_dict({name[7:]: values for name, values in golden.items() if name.startswith("weight/")})
    return model, BagBatch(golden["features"], F.pad(golden["sizes"].cumsum(0), (1, 0))), golden["logits"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_the_numbers_are_those_of_the_official_code(dtype, tolerance):
    model, bags, logits = golden_model()
    output = model.to(dtype)(bags.to("cpu", dtype))
    torch.testing.assert_close(output.logits, logits.to(dtype), rtol=tolerance, atol=tolerance)


def test_the_numbers_notice_another_attention_or_order():
    model, bags, logits = golden_model()
    last = bags.bag(4)
    backwards = replace(last, features=last.features.flip(0))
    assert not torch.allclose(model(backwards).logits[0], logits[4].float(), atol=1e-3)
    exact, _, _ = golden_model(attention="sdpa")
    assert not torch.allclose(exact(last).logits[0], logits[4].float(), atol=1e-3)


def test_the_pseudo_inverse_converges_to_the_pseudo_inverse():
    matrices = torch.randn(3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    errors = [float((pseudo_inverse(matrices, steps) - torch.linalg.pinv(matrices)).abs().max()) for steps in (2, 6, 12, 24)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-8


def test_with_a_landmark_for_every_token_nystrom_is_softmax_attention():
    torch.manual_seed(0)
    nystrom = NystromAttention(16, heads=4, landmarks=12, steps=40).double().eval()
    softmax = NystromAttention(16, heads=4, landmarks=None).double().eval()
    softmax.load_state_dict(nystrom.state_dict())
    tokens = torch.randn(12, 16, dtype=torch.float64)
    torch.testing.assert_close(nystrom(tokens), softmax(tokens), rtol=0, atol=1e-8)


def test_softmax_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, tokens = NystromAttention(16, heads=4, landmarks=None).double().eval(), torch.randn(30, 16, dtype=torch.float64)
    torch.nn.init.zeros_(ours.convolve.weight)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True).double().eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.to_qkv.weight)
        theirs.out_proj.load_state_dict(ours.out[0].state_dict())
    expected, weights = theirs(*[tokens.unsqueeze(0)] * 3, average_attn_weights=False)
    torch.testing.assert_close(ours(tokens), expected[0], rtol=0, atol=1e-10)
    # the logits of the first token's attention, over the others, are the logarithm of its weights but for a constant
    scores, log_weights = ours.scores_of_first(tokens), weights[0, :, 0, 1:].T.log()
    torch.testing.assert_close((scores - log_weights).std(0), torch.zeros(4).double(), rtol=0, atol=1e-10)


def test_one_kernel_does_what_three_convolutions_do():
    torch.manual_seed(0)
    places, image = PlaceConvolutions(4).double(), torch.randn(4, 5, 9, dtype=torch.float64)
    expected = image.clone()
    for conv, reach in ((places.seven, 3), (places.five, 2), (places.three, 1)):
        expected += F.conv2d(image, conv.weight, conv.bias, padding=reach, groups=4)
    torch.testing.assert_close(places(image), expected, rtol=0, atol=1e-12)


def test_on_a_full_square_the_grid_is_the_order_of_the_file():
    by_file = TransMIL(DIM, 2, hidden=16).double().eval()
    by_place = on_grid()
    by_place.load_state_dict(by_file.state_dict())
    bag = slide(square(7))
    torch.testing.assert_close(by_place(bag).logits, by_file(bag).logits, rtol=0, atol=1e-10)
    holed = replace(slide(square(7)[:-1]), coords_um=None, tile_um=None)
    assert by_file(holed).logits.isfinite().all()
    with pytest.raises(AggregatorInputError, match="needs the position"):
        by_place(holed)


def test_moving_tiles_apart_changes_the_logits_and_moving_the_slide_does_not():
    model, cells = on_grid(), square(6)
    bag = slide(cells)
    assert bag.coords_um is not None
    moved = replace(bag, coords_um=bag.coords_um + 1234.5)
    torch.testing.assert_close(model(moved).logits, model(bag).logits, rtol=0, atol=1e-10)
    apart = cells + 20 * (cells[:, :1] > 2)
    assert not torch.allclose(model(slide(apart)).logits, model(bag).logits, atol=1e-6)


def test_coordinates_rounded_to_whole_pixels_lie_in_the_same_cells():
    cells = square(120)
    exact = TILE_UM * 0.9981 * cells.flip(1).double()
    rounded = (exact / 0.2527).round() * 0.2527 + 7654.3
    found, shape = grid_cells(rounded, torch.tensor(TILE_UM * 0.9981))
    assert torch.equal(found, cells) and shape == (120, 120)


@pytest.mark.parametrize(("overlap", "tiles"), [(0.5, 2), (0.75, 4)])
@pytest.mark.parametrize("mpp", [0.499, 0.2325, 0.5])
def test_overlapping_tiles_are_as_many_in_every_cell(overlap, tiles, mpp):
    row = 224 * (1 - overlap) * torch.arange(40) * mpp + 7_654.3
    cells, _ = grid_cells(torch.stack([row, row], 1).float(), torch.tensor(224 * mpp))
    assert torch.bincount(cells[:, 0]).unique().tolist() == [tiles]


def test_overlapping_tiles_share_a_cell_whatever_their_order():
    model = on_grid()
    bag = slide(square(5))
    assert bag.coords_um is not None
    half = replace(bag, coords_um=bag.coords_um / 2)  # steps of half a tile
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    shuffled = replace(half, features=half.features[order], coords_um=bag.coords_um[order] / 2)
    before, after = model(half, explain=True), model(shuffled, explain=True)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(after.contributions, before.contributions[order], rtol=0, atol=1e-10)
    assert not torch.allclose(before.logits, model(bag).logits, atol=1e-6)


@pytest.mark.parametrize("tile_order", ["file", "coords"])
def test_contributions_sum_to_the_slope_of_the_logit_along_the_embedding(tile_order):
    torch.manual_seed(0)
    model, bag = TransMIL(DIM, 2, hidden=16, tile_order=tile_order).double().eval(), slide(square(4))
    with torch.inference_mode():  # as `predict` calls it
        contributions = model(bag, explain=True).contributions

    def logits(scale: float) -> Tensor:
        with torch.no_grad():
            return model.classify(model._read(model.project(bag.features) * scale, bag)[0])[0]

    slope = (logits(1 + 1e-5) - logits(1 - 1e-5)) / 2e-5
    torch.testing.assert_close(contributions.sum(0), slope, rtol=0, atol=1e-7)
    assert contributions.isfinite().all() and (contributions > 0).any() and (contributions < 0).any()


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="hidden 20 is not a multiple of the 8 heads"):
        TransMIL(DIM, 2, hidden=20)
    with pytest.raises(ConfigError, match="'nystroem' is unknown"):
        TransMIL(DIM, 2, attention="nystroem")
    with pytest.raises(ConfigError, match="'true' is unknown"):
        TransMIL(DIM, 2, tile_order="true")

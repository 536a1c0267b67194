"""Sm-ABMIL: neighbours on the slide, the smooth operator, and the numbers of another implementation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from wsimil.aggregators.sm_abmil import SmABMIL, Smooth, neighbours
from wsimil.batch import BagBatch, pack
from wsimil.errors import AggregatorInputError, ConfigError

GOLDEN = Path(__file__).parent / "golden" / "sm_abmil.npz"


def grid(columns: int, rows: int, *, step_um: float = 112.0, tile_um: float = 112.0, width: int = 1) -> BagBatch:
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    coords = step_um * torch.stack([x.flatten(), y.flatten()], 1).double()
    features = torch.randn(len(coords), width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return BagBatch(features, torch.tensor([0, len(coords)]), coords, torch.tensor([tile_um]).double())


def pairs(bags: BagBatch) -> set[tuple[int, int]]:
    return set(zip(*(rows.tolist() for rows in neighbours(bags)), strict=True))


def pairs_by_hand(bags: BagBatch) -> set[tuple[int, int]]:
    assert bags.coords_um is not None and bags.tile_um is not None
    side = bags.tile_um[bags.bag_index]
    apart = (bags.coords_um.unsqueeze(1) - bags.coords_um.unsqueeze(0)).abs().amax(2) / side
    near = (apart < 1.13) & (bags.bag_index.unsqueeze(1) == bags.bag_index) & ~torch.eye(len(side), dtype=torch.bool)
    return set(map(tuple, near.nonzero().tolist()))


@pytest.mark.parametrize("where", ["early", "mid", "late"])
def test_the_numbers_are_those_of_torchmil(where):
    golden = {name: torch.as_tensor(values) for name, values in np.load(GOLDEN).items()}
    model = SmABMIL(16, 1, hidden=24, attention=8, where=where).double().eval()
    model.load_state_dict({name[7:]: values for name, values in golden.items() if name.startswith("weight/")})
    features = golden["features"]
    bag = BagBatch(features, torch.tensor([0, len(features)]), golden["coords_um"], torch.tensor([112.0]).double())
    output = model(bag)
    assert output.attention_logits is not None
    torch.testing.assert_close(output.logits[0], golden[f"{where}/logits"], rtol=0, atol=1e-8)
    torch.testing.assert_close(output.attention_logits[:, 0], golden[f"{where}/attention_logits"], rtol=0, atol=1e-8)


def test_a_tile_inside_a_grid_has_eight_neighbours_and_a_corner_three():
    rows, _ = neighbours(grid(5, 4))
    counts = torch.bincount(rows).reshape(4, 5)
    assert counts[1:-1, 1:-1].unique().tolist() == [8] and counts[0, 0] == 3 and counts[0, 1] == 5


def test_neighbours_are_those_found_by_comparing_all():
    generator = torch.Generator().manual_seed(0)
    scattered = replace(grid(12, 12), coords_um=1500 * torch.rand(144, 2, generator=generator, dtype=torch.float64) - 700)
    overlapping, coarse = grid(7, 6, step_um=56.0), grid(6, 5, step_um=448.3, tile_um=448.0)
    batch = pack([scattered, overlapping, coarse, grid(1, 1)])
    assert pairs(batch) == pairs_by_hand(batch)


def test_neighbours_on_a_rounded_grid_are_those_of_the_exact_one():
    exact = grid(40, 40, step_um=224 * 0.4987, tile_um=224 * 0.4987)
    assert exact.coords_um is not None
    shifted = replace(exact, coords_um=(exact.coords_um / 0.2527).round() * 0.2527 + 7_654.3)
    assert pairs(shifted) == pairs(exact)


@pytest.mark.parametrize(("overlap", "within"), [(0.0, 8), (0.25, 8), (0.5, 24), (0.75, 80)])
def test_rounding_does_not_decide_which_overlapping_tiles_touch(overlap, within):
    for n in (12, 30):
        for mpp, shift_px in ((0.499, 0), (0.2325, 7_655), (0.5, 12_001)):
            bag = grid(n, n, step_um=224 * (1 - overlap) * mpp, tile_um=224 * mpp)
            assert bag.coords_um is not None and bag.tile_um is not None
            stored = replace(bag, coords_um=(bag.coords_um + shift_px * mpp).float(), tile_um=bag.tile_um.float())
            degrees = torch.bincount(neighbours(stored)[0]).reshape(n, n)
            assert degrees[4:-4, 4:-4].unique().tolist() == [within]


def test_neighbours_of_a_large_slide_are_found_in_little_memory():
    rows, _ = neighbours(grid(400, 250))
    assert len(rows) == 8 * 400 * 250 - 6 * (400 + 250) + 4


def test_positions_that_cannot_be_right_are_refused():
    bag = grid(30, 30)
    with pytest.raises(AggregatorInputError, match="do not fit together"):
        neighbours(replace(bag, tile_um=torch.tensor([112_000.0])))


def test_an_unknown_place_is_refused():
    with pytest.raises(ConfigError, match="'middle'; expected early, mid or late"):
        SmABMIL(4, 1, where="middle")


def test_smoothing_is_the_recursion_of_the_paper():
    bag, smooth = grid(6, 5, width=3), Smooth(10).double()
    with torch.no_grad():
        smooth.log_gamma.fill_(-0.7)
    adjacency = torch.zeros(30, 30, dtype=torch.float64)
    adjacency[neighbours(bag)] = 1
    degree = adjacency.sum(1)
    adjacency = adjacency / (degree.unsqueeze(1) * degree).sqrt()
    alpha = 1 / (1 + np.exp(-0.7))
    expected = bag.features
    for _ in range(10):
        expected = alpha * adjacency @ expected + (1 - alpha) * bag.features
    torch.testing.assert_close(smooth(bag.features, bag), expected, rtol=0, atol=1e-12)


def test_many_steps_solve_the_smoothing_equation():
    bag, smooth = grid(6, 5), Smooth(300).double()  # γ = 1
    adjacency = torch.zeros(30, 30, dtype=torch.float64)
    adjacency[neighbours(bag)] = 1
    degree = adjacency.sum(1)
    laplacian = torch.eye(30) - adjacency / (degree.unsqueeze(1) * degree).sqrt()
    torch.testing.assert_close((torch.eye(30) + laplacian) @ smooth(bag.features, bag), bag.features, rtol=0, atol=1e-10)


def test_a_tile_without_neighbours_keeps_its_value():
    bag = grid(4, 1, step_um=500.0)
    torch.testing.assert_close(Smooth(10).double()(bag.features, bag), bag.features, rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", ["early", "mid", "late"])
def test_a_hot_tile_warms_its_neighbours_only(where):
    torch.manual_seed(0)
    model = SmABMIL(4, 2, hidden=8, attention=8, where=where, steps=2).double().eval()
    bag = grid(9, 9, width=4)
    hot = bag.features.clone()
    hot[0] += 5
    before, after = model(bag).attention_logits, model(replace(bag, features=hot)).attention_logits
    assert before is not None and after is not None
    moved = ((after - before).abs() > 1e-12).reshape(9, 9)
    assert moved[:3, :3].all() and not moved[3:].any() and not moved[:, 3:].any()  # two steps reach two tiles


def test_the_strength_of_smoothing_is_learned():
    model, bag = SmABMIL(4, 1, hidden=8, where="late").double(), grid(6, 6, width=4)
    model(bag).logits.sum().backward()
    assert model.smooth.log_gamma.grad is not None and model.smooth.log_gamma.grad.abs() > 0

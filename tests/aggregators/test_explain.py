"""Contributions of models whose logits are no sum: against taking each tile out, and against the derivative by hand."""

from __future__ import annotations

import pytest
import torch
from seeded import make_bags
from torch import Tensor, nn

from wsimil.aggregators import explain
from wsimil.aggregators.explain import gradient_contributions, leave_one_out
from wsimil.aggregators.packed import segment_mean
from wsimil.batch import BagBatch

H, C = 5, 3


def make_head(heads: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(heads * H, 7), nn.Tanh(), nn.Linear(7, C)).double()


def logits_by_hand(scores: Tensor, tiles: Tensor, head: nn.Module) -> Tensor:
    """scores (N, K), tiles (N, H) of one bag → (C,)."""
    return head((scores.softmax(0).T @ tiles).flatten())


def lost_by_hand(scores: Tensor, tiles: Tensor, bags: BagBatch, head: nn.Module) -> Tensor:
    """(ΣN, C): the bag attended again without each tile."""
    lost = []
    for score, tile in zip(scores.split(bags.sizes.tolist()), tiles.split(bags.sizes.tolist()), strict=True):
        whole = logits_by_hand(score, tile, head)
        for index in range(len(tile)):
            keep = torch.arange(len(tile)) != index
            lost.append(whole - logits_by_hand(score[keep], tile[keep], head) if len(tile) > 1 else whole)
    return torch.stack(lost)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("sharpness", [0.1, 1, 30, 3000])  # to attention of exactly 0 and 1
def test_leaving_one_out_in_closed_form_is_leaving_it_out(heads, sharpness):
    bags, head = make_bags(1, 2, 7, 20, dim=H), make_head(heads)
    scores = sharpness * make_bags(30, dim=heads, seed=1).features
    found = leave_one_out(scores, bags.features, bags, head)
    torch.testing.assert_close(found, lost_by_hand(scores, bags.features, bags, head), rtol=1e-8, atol=1e-8)


def test_chunks_change_nothing(monkeypatch):
    bags, head = make_bags(3, 20, dim=H), make_head(1)
    scores = bags.features[:, :1]
    whole = leave_one_out(scores, bags.features, bags, head)
    monkeypatch.setattr(explain, "CHUNK", 4)
    torch.testing.assert_close(leave_one_out(scores, bags.features, bags, head), whole, rtol=0, atol=1e-12)


def test_a_tile_among_very_many_keeps_its_digits_in_float32():
    bags, head = make_bags(50_000, dim=H), make_head(1)
    exact = leave_one_out(bags.features[:, :1], bags.features, bags, head)
    plain = bags.to("cpu", torch.float32)
    rounded = leave_one_out(plain.features[:, :1], plain.features, plain, head.float())
    assert rounded.dtype == torch.float32
    assert ((rounded - exact).abs() / exact.abs()).median() < 1e-4


def test_tiles_that_are_all_alike_are_owed_nothing():
    bags, head = make_bags(6, dim=H), make_head(1)
    alike = bags.features[:1].expand(6, H)
    scores = bags.features[:, :1]
    assert leave_one_out(scores, alike, bags, head).abs().max() < 1e-12


def test_gradient_times_input_is_exact_for_what_is_linear():
    bags, head = make_bags(1, 2, 7, dim=H), nn.Linear(H, C, bias=False).double()
    found = gradient_contributions(bags.features, bags, lambda given: head(segment_mean(given.features, given)))
    torch.testing.assert_close(found, head(bags.features) / bags.sizes[bags.bag_index].unsqueeze(1))
    assert not found.requires_grad


def test_gradient_times_input_is_the_derivative_along_the_tile():
    bags, head = make_bags(2, 7, dim=H), make_head(1)

    def logits_of(given: BagBatch) -> Tensor:
        return head(segment_mean(given.features.square(), given))

    found = gradient_contributions(bags.features, bags, logits_of)
    for tile in (0, 5):
        scaled = []
        for scale in (1 - 1e-5, 1 + 1e-5):
            features = bags.features.clone()
            features[tile] *= scale
            scaled.append(logits_of(BagBatch(features, bags.offsets))[bags.bag_index[tile]])
        torch.testing.assert_close(found[tile], (scaled[1] - scaled[0]) / 2e-5, rtol=1e-6, atol=1e-8)


def test_both_work_under_inference_mode():
    head = make_head(1)
    with torch.inference_mode():
        bags = make_bags(2, 7, dim=H)
        scores = bags.features[:, :1]
        assert leave_one_out(scores, bags.features, bags, head).isfinite().all()
        assert gradient_contributions(bags.features, bags, lambda given: head(segment_mean(given.features, given))).isfinite().all()

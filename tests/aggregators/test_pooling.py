"""Pooling: what each rule computes, tile by tile, against NumPy and against CLAM's instance baseline."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from seeded import make_bags, seed_weights

from wsimil.aggregators.mean_pool import MeanPool
from wsimil.aggregators.pooling import Pool, TopK
from wsimil.batch import pack
from wsimil.errors import ConfigError

DIM, C = 6, 3
SIZES = (1, 2, 7, 50, 230)
POOLS = ("mean", "max", "topk", "lse", "noisy_or")
GOLDEN = Path(__file__).parent / "golden"


def pooled_by_numpy(name: str, values: np.ndarray) -> np.ndarray:
    """(N, K) → (K,), by the formula in the paper."""
    if name == "topk":
        return np.sort(values, 0)[-math.ceil(0.01 * len(values)) :].mean(0)
    if name == "lse":
        return np.log(np.mean(np.exp(5 * values), 0)) / 5
    if name == "noisy_or":
        negative = np.prod(1 - 1 / (1 + np.exp(-values)), 0)
        return np.log((1 - negative) / negative)
    return {"mean": np.mean, "max": np.max}[name](values, 0)


def instance_pool(name: str, **options: float) -> Pool:
    torch.manual_seed(0)
    return Pool(DIM, C, level="instance", hidden=8, pool=name, **options).double().eval()


@pytest.mark.parametrize("name", POOLS)
def test_scores_are_pooled_as_the_formula_says(name):
    model, bags = instance_pool(name), make_bags(*SIZES, dim=DIM)
    output = model(bags)
    scores = output.tile_logits.detach().split(SIZES)
    expected = [pooled_by_numpy(name, part.numpy()) for part in scores]
    np.testing.assert_allclose(output.logits.detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["max", "topk", "lse"])
def test_embeddings_are_pooled_feature_by_feature(name):
    torch.manual_seed(0)
    model, bags = Pool(DIM, C, level="embedding", hidden=8, pool=name).double().eval(), make_bags(*SIZES, dim=DIM)
    output = model(bags)
    expected = np.stack([pooled_by_numpy(name, part.numpy()) for part in output.tile_embedding.detach().split(SIZES)])
    np.testing.assert_allclose(output.bag_embedding.detach(), expected, rtol=1e-10, atol=1e-10)
    by_hand = expected @ model.classify.weight.detach().numpy().T + model.classify.bias.detach().numpy()
    np.testing.assert_allclose(output.logits.detach(), by_hand, rtol=1e-10)


@pytest.mark.parametrize(("level", "name"), [("embedding", "lse"), ("instance", "lse"), ("instance", "noisy_or")])
def test_contributions_are_what_the_logits_lose_without_the_tile(level, name):
    torch.manual_seed(0)
    model = Pool(DIM, C, level=level, hidden=8, pool=name).double().eval()
    assert model.contribution_kind == "leave-one-out"
    bags = make_bags(1, 2, 9, dim=DIM)
    bags.features[4] *= 40.0  # one tile that outweighs the rest by far
    output = model(bags, explain=True)
    torch.testing.assert_close(output.contributions, brute_force(model, bags), rtol=1e-8, atol=1e-8)


def brute_force(model, bags):
    """(ΣN, C) logits minus those of the bag without the tile; of the only tile, the logits."""
    lost = []
    for index in range(len(bags)):
        bag = bags.bag(index)
        whole, size = model(bag).logits[0], len(bag.features)
        for tile in range(size):
            if size == 1:
                lost.append(whole)
                continue
            keep = torch.arange(size) != tile
            rest = type(bag)(bag.features[keep], torch.tensor([0, size - 1]))
            lost.append(whole - model(rest).logits[0])
    return torch.stack(lost)


def test_a_tile_far_above_the_rest_leaves_their_pool_untouched():
    bags = make_bags(3, dim=DIM)
    model = instance_pool("lse")
    scores = torch.tensor([[200.0], [1.0], [0.0]], dtype=torch.float64)  # exp(1000) swallows exp(5)
    without = model.pool(scores, bags) - model.pool.lost_without_each(scores, bags)
    torch.testing.assert_close(without[0, 0], torch.tensor([5.0, 0.0]).double().exp().mean().log() / 5)


def test_max_and_top_k_credit_the_chosen_tiles_alone():
    bags = make_bags(230, dim=DIM)
    for name, chosen in (("max", 1), ("topk", 3)):  # a hundredth of 230, rounded up
        contributions = instance_pool(name)(bags, explain=True).contributions
        assert (contributions != 0).sum(0).tolist() == [chosen] * C


@pytest.mark.parametrize(("k", "expected"), [(1, 1), (4, 4), (500, 50), (0.5, 25), (0.001, 1)])
def test_k_is_a_number_of_tiles_or_a_share_of_the_bag(k, expected):
    output = instance_pool("topk", k=k)(make_bags(50, dim=DIM), explain=True)
    assert (output.contributions[:, 0] != 0).sum() == expected


def test_log_mean_exp_lies_between_the_mean_and_the_maximum():
    bags = make_bags(50, dim=DIM)
    mean, largest = instance_pool("mean")(bags).logits, instance_pool("max")(bags).logits
    torch.testing.assert_close(instance_pool("lse", sharpness=1e-6)(bags).logits, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(instance_pool("lse", sharpness=1e6)(bags).logits, largest, rtol=0, atol=1e-5)


def test_noisy_or_stays_exact_where_probabilities_round():
    bags, model = make_bags(4, 4, dim=DIM), instance_pool("noisy_or")
    scores = torch.tensor([[-400.0]] * 4 + [[300.0]] * 4, dtype=torch.float64)
    expected = torch.tensor([[-400 + math.log(4)], [1200.0]], dtype=torch.float64)  # log Σ p_i and -log Π (1 - p_i)
    torch.testing.assert_close(model.pool(scores, bags), expected)
    near = torch.linspace(-30, 30, 601, dtype=torch.float64).unsqueeze(1)  # one tile: the logit is the score, across the seams
    assert (model.pool(near, make_bags(*[1] * 601, dim=DIM)) - near).abs().max() < 1e-9


def test_a_new_noisy_or_is_not_certain_about_a_large_bag():
    torch.manual_seed(0)
    new = Pool(DIM, 1, level="instance", pool="noisy_or").eval()
    probability = new(make_bags(1000, dim=DIM).to("cpu", torch.float32)).logits.sigmoid()
    assert 0.2 < probability.item() < 0.95


def test_the_largest_score_is_what_clam_trains_its_instance_baseline_on():
    golden = np.load(GOLDEN / "mil_fc.npz")
    model = Pool(16, 1, level="instance", hidden=512, pool="max").double().eval()
    seed_weights(model, seed=1)
    sizes = golden["sizes"].tolist()
    bags = pack([make_bags(size, dim=16, seed=size) for size in sizes])
    np.testing.assert_allclose(model(bags).logits[:, 0].detach(), golden["logit_difference"], rtol=0, atol=1e-8)


def test_a_share_of_a_bag_is_not_rounded_up_by_rounding_errors():
    for k, size, expected in ((0.07, 100, 7), (0.01, 100, 1), (0.01, 101, 2), (0.29, 100, 29)):
        ((largest, _),) = TopK(k)._per_bag(torch.rand(size, 1), make_bags(size, dim=1))
        assert len(largest) == expected


@pytest.mark.parametrize(
    "options", [{"pool": "median"}, {"pool": "topk", "k": 0}, {"pool": "lse", "sharpness": 0}, {"level": "tile"}]
)
def test_what_cannot_be_is_refused(options):
    with pytest.raises(ConfigError):
        Pool(DIM, C, **{"level": "instance", **options})


@pytest.mark.parametrize("pool", ["mean", "noisy_or"])
def test_what_has_no_embedding_level_of_its_own_is_refused(pool):
    with pytest.raises(ConfigError, match="their mean is mean_pool"):
        Pool(DIM, C, level="embedding", pool=pool)


def test_the_mean_is_the_same_at_both_levels():
    torch.manual_seed(0)
    whole, tiles, bags = MeanPool(DIM, C, hidden=8).double().eval(), instance_pool("mean"), make_bags(*SIZES, dim=DIM)
    whole.load_state_dict({name.replace("score", "classify"): values for name, values in tiles.state_dict().items()})
    torch.testing.assert_close(whole(bags).logits, tiles(bags).logits)
    torch.testing.assert_close(whole(bags, explain=True).contributions, tiles(bags, explain=True).contributions)

"""What must be true of every aggregator in the registry; a new line there is enrolled here by itself."""

from __future__ import annotations

import copy
import inspect
import sys
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from wsimil.aggregators import AGGREGATORS, Standardized, make_aggregator
from wsimil.aggregators.packed import (
    pad,
    segment_argmax,
    segment_max,
    segment_mean,
    segment_softmax,
    segment_sum,
    segment_topk,
    segment_weighted_sum,
    softmax_attention,
    unpad,
)
from wsimil.batch import Aggregator, BagBatch, BagOutput, pack
from wsimil.errors import AggregatorInputError, ConfigError

DIM, C = 12, 3
SIZES = (1, 2, 7, 50, 13)
ORDER_MATTERS: set[str] = {"transmil", "dtfd", "r2t"}  # aggregators that go by the order of tiles and say so
# aggregators whose time grows with N², so that their large bag is smaller
QUADRATIC: set[str] = {"abmilx", "wikg", "transformer", "transformer_alibi"}
TILE_PARTS = ("attention_logits", "tile_logits", "tile_embedding", "contributions")

STANDARDIZED = ("gated_abmil, standardized", "acmil, standardized", "dsmil, standardized")
every_aggregator = pytest.mark.parametrize("name", [*AGGREGATORS, *STANDARDIZED])


def make(name: str, n_outputs: int = C, *, dropout: float = 0.25) -> Aggregator:
    torch.manual_seed(0)
    model = make_aggregator(name.split(",")[0], DIM, n_outputs, hidden=16, dropout=dropout)
    if name in STANDARDIZED:
        model = Standardized(model, torch.randn(DIM), torch.rand(DIM) + 0.5)
    return model.double().eval()


def make_batch(*sizes: int, seed: int = 0) -> BagBatch:
    """Random features on a grid of ten tiles a row, the same grid on every slide."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.cat([torch.arange(size) for size in sizes])
    return BagBatch(
        torch.randn(sum(sizes), DIM, generator=generator, dtype=torch.float64),
        torch.tensor([0, *sizes]).cumsum(0),
        coords_um=112.0 * torch.stack([place % 10, place // 10], 1).double(),
        tile_um=torch.full((len(sizes),), 112.0, dtype=torch.float64),
        slide_ids=tuple(f"slide-{index}" for index in range(len(sizes))),
    )


def parts_of(output: BagOutput) -> dict[str, Tensor]:
    """Every part of an output that has a row for each bag or tile, by name."""
    parts = {field.name: getattr(output, field.name) for field in fields(output)}
    extra = {f"extra {extra.name}": extra.logits for extra in parts.pop("extra_logits")}
    del parts["penalties"]
    return extra | {key: value for key, value in parts.items() if value is not None}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")


def gradients(model: Aggregator, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {key: gradient for key, gradient in zip(parameters, found, strict=True) if gradient is not None}


@every_aggregator
def test_a_packed_batch_equals_one_bag_at_a_time(name):
    model, batch = make(name), make_batch(*SIZES)
    singles = [parts_of(model(batch.bag(index), explain=True)) for index in range(len(batch))]
    assert_same(parts_of(model(batch, explain=True)), {key: torch.cat([single[key] for single in singles]) for key in singles[0]})


@every_aggregator
def test_gradients_of_a_packed_batch_are_the_sum_over_its_bags(name):
    model, batch = make(name), make_batch(*SIZES)
    packed = gradients(model, model(batch).logits.square().sum())
    singles = [gradients(model, model(batch.bag(index)).logits.square().sum()) for index in range(len(batch))]
    assert packed
    assert_same(packed, {key: torch.stack([single[key] for single in singles]).sum(0) for key in singles[0]})


@every_aggregator
def test_what_padding_is_filled_with_changes_nothing(name, monkeypatch):
    model, batch = make(name), make_batch(*SIZES)
    before = parts_of(model(batch, explain=True))
    ours = [module for path, module in sys.modules.items() if path.startswith("wsimil.aggregators.")]
    for module in [module for module in ours if hasattr(module, "pad")]:
        monkeypatch.setattr(module, "pad", partial(pad, fill=1e3))
    assert_same(parts_of(model(batch, explain=True)), before)


@every_aggregator
def test_order_of_tiles_changes_nothing(name):
    if name in ORDER_MATTERS:
        pytest.skip("goes by the order of tiles")
    model, bag = make(name), make_batch(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert bag.coords_um is not None
    shuffled = replace(bag, features=bag.features[order], coords_um=bag.coords_um[order])
    before = parts_of(model(bag, explain=True))
    assert_same(
        {key: part[order] if key in TILE_PARTS else part for key, part in before.items()}, parts_of(model(shuffled, explain=True))
    )


@every_aggregator
def test_order_of_bags_changes_nothing(name):
    model, batch = make(name), make_batch(*SIZES)
    backwards = pack([batch.bag(index) for index in reversed(range(len(batch)))])
    torch.testing.assert_close(model(backwards).logits.flip(0), model(batch).logits, rtol=0, atol=1e-8)


@every_aggregator
def test_evaluation_is_deterministic_and_draws_nothing(name):
    model, batch = make(name, dropout=0.5), make_batch(*SIZES)
    before = torch.get_rng_state()
    assert torch.equal(model(batch).logits, model(batch).logits)
    assert torch.equal(torch.get_rng_state(), before)


@every_aggregator
def test_dropout_is_really_there_in_training(name):
    model, batch = make(name, dropout=0.5).train(), make_batch(50)
    nothing_to_drop = name.split(",")[0] == "dsmil"  # pools the features as they are, as its authors do
    assert torch.equal(model(batch).logits, model(batch).logits) == nothing_to_drop


@every_aggregator
def test_an_empty_bag_is_refused_by_name(name):
    with pytest.raises(AggregatorInputError, match="slide-1: the bag is empty"):
        make(name)(make_batch(3, 0, 2))


@every_aggregator
def test_features_of_another_encoder_are_refused(name):
    batch = make_batch(3)
    with pytest.raises(AggregatorInputError, match=f"{DIM - 1} wide"):
        make(name)(replace(batch, features=batch.features[:, 1:]))


@every_aggregator
def test_bags_without_places_are_used_or_refused_as_declared(name):
    model, bare = make(name), replace(make_batch(3, 4), coords_um=None, tile_um=None)
    if model.needs_coords:
        with pytest.raises(AggregatorInputError, match="needs the position"):
            model(bare)
        batch = make_batch(3, 4)
        assert batch.coords_um is not None and batch.tile_um is not None
        for wrong in ({"coords_um": batch.coords_um * torch.nan}, {"tile_um": batch.tile_um * 0}):
            with pytest.raises(AggregatorInputError, match="finite coords_um, and a tile_um above 0"):
                model(replace(batch, **wrong))
    else:
        assert model(bare).logits.isfinite().all()


@every_aggregator
@pytest.mark.parametrize("n_outputs", [1, 2, 5])
def test_shapes_are_those_of_the_contract(name, n_outputs):
    model, batch = make(name, n_outputs), make_batch(*SIZES)
    output = model(batch, explain=True)
    assert (model.dim, model.n_outputs) == (DIM, n_outputs)
    assert output.logits.shape == (len(SIZES), n_outputs)
    for part in TILE_PARTS:
        rows = getattr(output, part)
        assert rows is None or (rows.ndim == 2 and len(rows) == sum(SIZES)), part
    for per_class in (output.tile_logits, output.contributions):
        assert per_class is None or per_class.shape[1] == n_outputs
    assert output.bag_embedding is None or output.bag_embedding.shape[:-1] in ((len(SIZES),), (len(SIZES), n_outputs))
    for extra in output.extra_logits:
        assert extra.logits.shape == (len(extra.bag_index), n_outputs)
        assert extra.bag_index.min() >= 0 and extra.bag_index.max() < len(SIZES)
    assert all(penalty.ndim == 0 for penalty in output.penalties.values())


@every_aggregator
def test_contributions_come_only_when_asked_and_change_nothing_else(name):
    model, batch = make(name), make_batch(*SIZES)
    plain, explained = parts_of(model(batch)), parts_of(model(batch, explain=True))
    assert "contributions" not in plain
    assert (explained.pop("contributions", None) is None) == (model.contribution_kind is None)
    assert_same(plain, explained)


@every_aggregator
def test_gradients_of_bags_one_after_the_other_add_up_to_those_of_the_batch(name):
    model, batch = make(name), make_batch(*SIZES)

    def of_bag(bag: BagBatch) -> Tensor:
        output = model(bag)
        return output.logits.square().sum()

    parameters = dict(model.named_parameters())
    sums = {key: torch.zeros_like(value) for key, value in parameters.items()}
    for index in range(len(SIZES)):
        found = torch.autograd.grad(of_bag(batch.bag(index)), list(parameters.values()), allow_unused=True)
        for key, gradient in zip(parameters, found, strict=True):
            sums[key] += 0 if gradient is None else gradient
        of_bag(batch.bag(index)).backward()  # as training does: into one .grad
    for key, value in parameters.items():
        torch.testing.assert_close(torch.zeros_like(value) if value.grad is None else value.grad, sums[key], rtol=1e-9, atol=1e-12)
    held = [value.grad.data_ptr() for value in parameters.values() if value.grad is not None]
    assert len(set(held)) == len(held)  # clipping would scale what two share twice


@every_aggregator
def test_exact_contributions_add_up_to_the_logits(name):
    model, batch = make(name), make_batch(*SIZES)
    assert model.contribution_kind in (None, "exact", "leave-one-out", "gradient")
    if model.contribution_kind == "exact":
        output = model(batch, explain=True)
        assert output.contributions is not None
        torch.testing.assert_close(segment_sum(output.contributions, batch), output.logits, rtol=0, atol=1e-8)


@every_aggregator
def test_contributions_are_the_same_in_inference_mode(name):
    model = make(name)
    outside = model(make_batch(*SIZES), explain=True).contributions
    with torch.inference_mode():
        inside = model(make_batch(*SIZES), explain=True).contributions  # the bags themselves are made in inference mode
    if outside is None or inside is None:
        assert outside is inside
    else:
        torch.testing.assert_close(inside, outside, rtol=0, atol=1e-10)


@every_aggregator
def test_contributions_of_a_large_bag_keep_their_digits(name):
    model, batch = make(name), make_batch(1_000 if name in QUADRATIC else 20_000)
    with torch.no_grad():
        exact = model(batch, explain=True).contributions
        rounded = model.float()(batch.to("cpu", torch.float32), explain=True).contributions
    if exact is None or rounded is None:
        assert exact is rounded
        return
    assert ((rounded - exact).abs() / exact.abs().clamp_min(1e-30)).median() < 3e-4


@every_aggregator
def test_extreme_values_do_not_overflow(name):
    model, batch = make(name).float(), make_batch(*SIZES).to("cpu", torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(100)  # attention scores of thousands: a bare exp of them is infinite
    output = model(replace(batch, features=batch.features * 100), explain=True)
    parts = parts_of(output)
    assert all(part.isfinite().all() for part in parts.values()), {key: bool(part.isfinite().all()) for key, part in parts.items()}
    assert all(gradient.isfinite().all() for gradient in gradients(model, output.logits.sum()).values())


@every_aggregator
def test_half_precision_stays_close_on_a_large_bag(name):
    model, batch = make(name).float(), make_batch(1_000 if name in QUADRATIC else 5_000, 3).to("cpu", torch.float32)
    model.eval()
    with torch.no_grad():
        exact = model(batch).logits
        with torch.autocast("cpu", torch.bfloat16):
            half = model(batch).logits.float()
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0.02)  # bfloat16 has 8 bits: 2^-8 = .004 for each rounding


@every_aggregator
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_features_are_taken_in_the_type_they_are_stored_in(name, stored):
    model, batch = make(name).float(), make_batch(*SIZES).to("cpu", stored)
    taken, widened = (parts_of(model(bags, explain=True)) for bags in (batch, batch.to("cpu", torch.float32)))
    assert all(torch.equal(taken[key], widened[key]) for key in widened)


@every_aggregator
def test_half_precision_keeps_what_lies_far_from_zero(name):
    plain = make_batch(40, 3).to("cpu", torch.float32)
    features = (plain.features + 50).half()  # steps of 1/32: in bfloat16 they would be of 1/4
    stored = replace(plain, features=features)
    deviation = features.float().std(0)
    deviation[0] = torch.inf  # never varied in training
    model = Standardized(make(name).float(), torch.full_like(deviation, 50.0), deviation).eval()
    with torch.no_grad():
        exact = model(stored).logits
        with torch.autocast("cpu", torch.bfloat16):
            half = model(stored).logits.float()
        wide = model(replace(stored, features=features.float())).logits
    assert torch.equal(stored.features, features) and torch.equal(wide, exact)
    torch.testing.assert_close(half, exact, rtol=0.03, atol=0.03)


@every_aggregator
def test_every_parameter_learns(name):
    model = make(name).train()
    output = model(make_batch(*SIZES))
    loss = torch.cat([output.logits, *(extra.logits for extra in output.extra_logits)]).square().sum()
    found = gradients(model, loss)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in found.values())


@every_aggregator
def test_weights_make_the_round_trip(name):
    model, batch = make(name), make_batch(*SIZES)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for values in other.state_dict().values():
            values.zero_()
    assert not torch.equal(other(batch).logits, model(batch).logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch).logits, model(batch).logits)


@every_aggregator
def test_the_seed_decides_the_first_weights(name):
    one, other = make(name).state_dict(), make(name).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


@every_aggregator
def test_no_label_can_reach_an_aggregator(name):
    assert list(inspect.signature(type(make(name)).forward).parameters) == ["self", "bags", "explain"]


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_entry_says_what_it_is(name):
    entry = AGGREGATORS[name]
    assert len(entry.summary) > 5 and entry.paper
    assert isinstance(make(name), Aggregator)


def test_an_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'gated_abmill' is unknown; did you mean gated_abmil\?.*mean_pool"):
        make_aggregator("gated_abmill", DIM, C)


def test_standardizing_is_a_shift_and_scale_that_travels_with_the_weights():
    batch, model = make_batch(*SIZES), make(STANDARDIZED[0])
    assert isinstance(model, Standardized)
    shifted = replace(batch, features=batch.features * model.deviation + model.mean)
    assert_same(parts_of(model(shifted, explain=True)), parts_of(model.inner(batch, explain=True)))
    fresh = Standardized(make_aggregator("gated_abmil", DIM, C, hidden=16)).double().eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(batch).logits, model(batch).logits)


def test_a_feature_that_never_varied_reads_as_zero():
    batch, model = make_batch(5, 3), make(STANDARDIZED[0])
    assert isinstance(model, Standardized)
    model.deviation[4] = torch.inf
    other = batch.features.clone()
    other[:, 4] = 1e6
    assert torch.equal(model(replace(batch, features=other)).logits, model(batch).logits)


# The arithmetic they share


def test_segments_agree_with_one_bag_at_a_time():
    batch = make_batch(*SIZES)
    for packed, whole in ((segment_sum, torch.sum), (segment_mean, torch.mean), (segment_max, torch.amax)):
        by_hand = torch.stack([whole(part, 0) for part in batch.features.split(SIZES)])
        torch.testing.assert_close(packed(batch.features, batch), by_hand, rtol=0, atol=1e-12)
    by_hand = torch.cat([part.softmax(0) for part in batch.features.split(SIZES)])
    torch.testing.assert_close(segment_softmax(batch.features, batch), by_hand, rtol=0, atol=1e-12)


def test_weighted_sums_agree_with_one_bag_at_a_time():
    batch = make_batch(*SIZES)
    weights = batch.features[:, :2].sin()
    parts = zip(weights.split(SIZES), batch.features.split(SIZES), strict=True)
    by_hand = [torch.einsum("nk,nh->kh", part, tiles) for part, tiles in parts]
    torch.testing.assert_close(segment_weighted_sum(weights, batch.features, batch), torch.stack(by_hand), rtol=0, atol=1e-12)


def test_the_largest_are_found_in_their_own_bag():
    batch = make_batch(*SIZES)
    best = segment_argmax(batch.features, batch)
    assert torch.equal(batch.features.gather(0, best), segment_max(batch.features, batch))
    for bag, rows in enumerate(segment_topk(batch.features[:, 0], batch, 5)):
        values = batch.bag(bag).features[:, 0]
        assert torch.equal(batch.features[rows, 0], values.sort(descending=True).values[:5])


def test_padding_is_marked_and_comes_off_again():
    batch = make_batch(*SIZES)
    dense, mask = pad(batch.features, batch, fill=1e4)
    assert dense.shape == (len(SIZES), max(SIZES), DIM) and mask.sum(1).tolist() == list(SIZES)
    assert (dense[~mask] == 1e4).all() and torch.equal(unpad(dense, batch), batch.features)
    assert torch.equal(dense[3, : SIZES[3]], batch.bag(3).features)
    assert torch.autograd.gradcheck(lambda values: pad(values, make_batch(2, 3))[0], torch.randn(5, 2).double().requires_grad_())


def test_the_gradient_of_a_segment_softmax_is_the_softmax_gradient():
    batch = make_batch(1, 4, 3)
    logits = batch.features[:, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: segment_softmax(values, batch), logits)


def test_a_score_of_another_bag_does_not_flatten_this_one():
    batch = make_batch(2, 2)
    logits = torch.tensor([[0.0], [1.0], [10_000.0], [10_001.0]])
    weights = segment_softmax(logits, batch)
    torch.testing.assert_close(weights[:2], weights[2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_many_halves_lose_nothing(dtype):
    batch = make_batch(100_000)
    ones = torch.ones(100_000, 1, dtype=dtype)
    assert segment_sum(ones, batch).item() == 100_000  # float16 ends at 65,504, bfloat16 stops counting at 256
    assert segment_softmax(ones, batch).sum().item() == pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------- attention between tiles


@pytest.mark.parametrize("widths", [(25, 25), (8, 1), (7, 12), (16, 16)])
def test_zeros_that_fill_up_a_width_change_nothing(widths):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, n, widths[0], generator=generator, dtype=torch.float64) for n in (5, 9))
    value = torch.randn(1, 2, 9, widths[1], generator=generator, dtype=torch.float64)
    mask = torch.randn(1, 1, 5, 9, generator=generator, dtype=torch.float64)
    for bias in (None, mask):
        logits = query @ key.mT / widths[0] ** 0.5 + (0 if bias is None else bias)
        for multiple in (1, 8):
            found = softmax_attention(query, key, value, bias, multiple=multiple)
            torch.testing.assert_close(found, logits.softmax(3) @ value, rtol=0, atol=1e-12)

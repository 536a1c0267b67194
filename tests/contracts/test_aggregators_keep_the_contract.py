"""The contract of bags and outputs holds for the five hardest aggregators: what is true of one bag is true of a packed batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from aggregator_tenants import ClamMB, Dsmil, Dtfd, ScoreThenPool, SmoothAttention
from torch import Tensor

from wsimil.aggregators.packed import segment_softmax, segment_sum
from wsimil.batch import Aggregator, BagBatch, BagOutput, LabelledBags, pack
from wsimil.errors import AggregatorInputError
from wsimil.objectives import SlideLabel
from wsimil.task import Task

DIM = 6
TENANTS: dict[str, Callable[..., Aggregator]] = {
    "clam_mb": ClamMB,
    "dsmil": Dsmil,
    "dtfd": Dtfd,
    "score_then_attend": ScoreThenPool,
    "score_then_mean": partial(ScoreThenPool, attend=False),
    "smooth": SmoothAttention,
}
ORDER_MATTERS = {"dtfd"}  # its strided split goes by the order of the file
TASKS = (Task("binary", ("no", "yes")), Task("multiclass", ("a", "b", "c")))

every_tenant = pytest.mark.parametrize("name", TENANTS)
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)


def make(name: str, n_outputs: int = 3) -> Aggregator:
    torch.manual_seed(0)
    return TENANTS[name](DIM, n_outputs).double().eval()


def make_bag(n_tiles: int, seed: int = 0, name: str = "slide") -> BagBatch:
    """Random features on a grid of six tiles a row, the same grid on every slide."""
    generator = torch.Generator().manual_seed(1000 * seed + n_tiles)
    place = torch.arange(n_tiles)
    return BagBatch(
        torch.randn(n_tiles, DIM, generator=generator, dtype=torch.float64),
        torch.tensor([0, n_tiles]),
        coords_um=112.0 * torch.stack([place % 6, place // 6], 1).double() + 56.0,
        tile_um=torch.tensor([112.0], dtype=torch.float64),
        slide_ids=(name,),
    )


def make_batch(*sizes: int) -> BagBatch:
    return pack([make_bag(size, seed, f"slide-{seed}") for seed, size in enumerate(sizes)])


def rows_of(output: BagOutput) -> dict[str, Tensor]:
    """Every part of an output whose rows belong to bags or tiles, by name."""
    parts = {field.name: getattr(output, field.name) for field in fields(output)}
    extra = {f"extra {logits.name}": logits.logits for logits in parts.pop("extra_logits")}
    parts.pop("penalties")
    return extra | {key: value for key, value in parts.items() if value is not None}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")


@every_tenant
def test_a_packed_batch_equals_one_bag_at_a_time(name):
    model, batch = make(name), make_batch(1, 7, 2, 30, 12)
    packed = model(batch, explain=True)
    singles = [model(batch.bag(index), explain=True) for index in range(len(batch))]
    rows = [rows_of(single) for single in singles]
    assert_same(rows_of(packed), {key: torch.cat([row[key] for row in rows]) for key in rows[0]})
    for position, extra in enumerate(packed.extra_logits):
        owners = [single.extra_logits[position].bag_index + bag for bag, single in enumerate(singles)]
        assert torch.equal(extra.bag_index, torch.cat(owners))


@every_tenant
def test_shapes_are_those_of_the_contract(name):
    model, batch = make(name), make_batch(1, 7, 12)
    output, n_tiles = model(batch, explain=True), len(batch.features)
    assert output.logits.shape == (3, 3)
    for part in (output.attention_logits, output.tile_logits, output.tile_embedding, output.contributions):
        assert part is None or (part.ndim == 2 and len(part) == n_tiles)
    assert output.tile_logits is None or output.tile_logits.shape[1] == 3
    per_class = name in ("clam_mb", "dsmil")
    assert output.bag_embedding is None or output.bag_embedding.shape[:-1] == ((3, 3) if per_class else (3,))
    for extra in output.extra_logits:
        assert extra.logits.shape == (len(extra.bag_index), 3)


@every_tenant
def test_order_of_bags_changes_nothing(name):
    model, batch = make(name), make_batch(7, 1, 30)
    backwards = pack([batch.bag(index) for index in (2, 1, 0)])
    torch.testing.assert_close(model(backwards).logits.flip(0), model(batch).logits, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", sorted(TENANTS.keys() - ORDER_MATTERS))
def test_order_of_tiles_changes_nothing(name):
    model, bag = make(name), make_bag(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert bag.coords_um is not None
    shuffled = replace(bag, features=bag.features[order], coords_um=bag.coords_um[order])
    before, after = rows_of(model(bag, explain=True)), rows_of(model(shuffled, explain=True))
    tile_parts = {key for key in before if key in ("attention_logits", "tile_logits", "tile_embedding", "contributions")}
    assert_same({key: part[order] if key in tile_parts else part for key, part in before.items()}, after)


@every_tenant
def test_a_bag_of_one_tile_works(name):
    assert make(name)(make_batch(1)).logits.isfinite().all()


@every_tenant
def test_an_empty_bag_is_refused_by_name(name):
    with pytest.raises(AggregatorInputError, match="slide-1: the bag is empty"):
        make(name)(make_batch(3, 0, 2))


@every_tenant
def test_features_of_another_encoder_are_refused(name):
    batch = make_batch(3)
    with pytest.raises(AggregatorInputError, match=r"5 wide.*takes 6"):
        make(name)(replace(batch, features=batch.features[:, :5]))


@every_tenant
@every_task
def test_slide_labels_reach_every_parameter(name, task):
    model = make(name, task.n_outputs).train()
    batch = LabelledBags(make_batch(9, 4, 30, 12), task.encode([task.classes[index % len(task.classes)] for index in range(4)]))
    losses = SlideLabel(task).losses(model, batch, progress=0.0)
    torch.stack(list(losses.values())).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@every_tenant
def test_no_label_can_reach_an_aggregator(name):
    assert list(inspect.signature(type(make(name)).forward).parameters) == ["self", "bags", "explain"]
    assert {field.name for field in fields(BagBatch)} == {"features", "offsets", "coords_um", "tile_um", "slide_ids"}


@every_tenant
def test_exact_contributions_add_up_to_the_logits(name):
    model, batch = make(name), make_batch(1, 7, 30)
    output = model(batch, explain=True)
    assert (model.contribution_kind == "exact") == (output.contributions is not None)
    if output.contributions is not None:
        torch.testing.assert_close(segment_sum(output.contributions, batch), output.logits, rtol=0, atol=1e-8)


def test_clam_reads_only_its_own_embedding_for_a_class():
    model, batch = make("clam_mb"), make_batch(5, 9)
    embedding = model(batch).bag_embedding
    for row in range(3):
        with torch.no_grad():
            model.attend.score.weight[row].neg_()  # another attention for this class alone
        changed = (model(batch).bag_embedding - embedding).abs().amax((0, 2)) > 1e-9
        assert changed.tolist() == [index == row for index in range(3)]
        with torch.no_grad():
            model.attend.score.weight[row].neg_()


def test_the_top_tile_of_dsmil_is_looked_for_within_its_own_bag():
    model, batch = make("dsmil"), make_batch(4, 1, 9)
    scores = model(batch).tile_logits
    best = torch.stack([part.amax(0) for part in scores.split([4, 1, 9])])
    (extra,) = model(batch).extra_logits
    assert torch.equal(extra.logits, best)
    assert extra.bag_index.tolist() == [0, 1, 2]
    assert (Dsmil.top_tile(torch.zeros(14, 3), batch) == torch.tensor([[0], [4], [5]])).all()  # ties: the first


def test_every_output_of_dsmil_reads_every_class_embedding():
    model = make("dsmil")
    embedding = torch.randn(1, 3, DIM, dtype=torch.float64, requires_grad=True)
    model.classify(embedding)[0, 0].backward()
    assert (embedding.grad[0].abs().amax(1) > 0).all()


def test_pseudo_bags_answer_to_the_label_of_their_bag():
    batch = make_batch(1, 3, 30)
    (extra,) = make("dtfd")(batch).extra_logits
    assert extra.bag_index.tolist() == [0] + 3 * [1] + 4 * [2]  # never an empty pseudo-bag
    task = TASKS[1]
    losses = SlideLabel(task).losses_of(make("dtfd")(batch), LabelledBags(batch, task.encode(["c", "a", "b"])))
    each = task.row_losses(extra.logits, task.encode(["c"] + 3 * ["a"] + 4 * ["b"]))
    by_hand = (each[0] + each[1:4].mean() + each[4:].mean()) / 3  # a bag counts once, however few pseudo-bags it has
    torch.testing.assert_close(losses["pseudo_bags"], by_hand)


def test_pseudo_bags_are_strided_in_evaluation_and_random_in_training():
    model, batch = make("dtfd"), make_batch(10, 30)
    member, counts = model.split(batch)
    assert counts.tolist() == [4, 4]
    assert member[:10].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert torch.equal(model(batch).logits, model(batch).logits)
    model.train()
    first, second = model.split(batch)[0], model.split(batch)[0]
    assert not torch.equal(first, second)
    assert torch.equal(first.bincount(), member.bincount())  # sizes differ by one tile at most, however they are drawn
    again = make("dtfd").train()
    assert torch.equal(again.split(batch)[0], first)


def test_the_second_tier_teaches_the_projection_nothing():
    model = make("dtfd")
    model(make_batch(10, 30)).logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.project.parameters())
    assert all(parameter.grad is None for parameter in model.attend_tiles.parameters())
    assert model.attend_pseudo.score.weight.grad is not None


def test_attention_of_two_tiers_is_one_weight_per_tile():
    model, batch = make("dtfd"), make_batch(1, 10, 30)
    output = model(batch)
    pooled = segment_sum(segment_softmax(output.attention_logits, batch) * output.tile_embedding, batch)
    torch.testing.assert_close(pooled, output.bag_embedding, rtol=0, atol=1e-8)


@pytest.mark.parametrize("attend", [True, False])
def test_tile_scores_are_in_the_units_of_the_label(attend):
    task = Task("regression", center=0.0, scale=100.0)  # per cent
    torch.manual_seed(0)
    model = ScoreThenPool(DIM, task.n_outputs, attend=attend, proportion=True).double()
    batch = make_batch(6, 11)
    output = model(batch)
    percent = task.values(output.tile_logits.detach().numpy())
    assert ((percent > 0) & (percent < 100)).all()
    slide_percent = task.values(output.logits.detach().numpy())
    for index, rows in enumerate((slice(0, 6), slice(6, 17))):
        assert percent[rows].min() <= slide_percent[index] <= percent[rows].max()
    loss = SlideLabel(task).losses_of(output, LabelledBags(batch, task.encode([20, "70"])))["bag"]
    by_hand = ((output.logits[:, 0] - torch.tensor([0.2, 0.7])) ** 2).mean()
    torch.testing.assert_close(loss, by_hand, rtol=0, atol=1e-7)  # targets are float32


def test_smoothing_without_coordinates_is_refused():
    batch = make_batch(3, 4)
    for missing in ({"coords_um": None}, {"tile_um": None}):
        with pytest.raises(AggregatorInputError, match="SmoothAttention needs the position of each tile"):
            make("smooth")(replace(batch, **missing))


def test_smoothing_uses_the_place_of_a_tile():
    model, bag = make("smooth"), make_bag(12)
    assert bag.coords_um is not None
    far = replace(bag, coords_um=bag.coords_um * torch.where(torch.arange(12) == 0, 50.0, 1.0).double().unsqueeze(1))
    assert (model(far).attention_logits - model(bag).attention_logits).abs().amax() > 1e-3


def test_smoothing_links_eight_neighbours_and_keeps_islands():
    model = make("smooth")
    scores = torch.eye(9, dtype=torch.float64)[:, 4:5]  # a peak in the middle of 3 × 3
    place = torch.arange(9)
    grid = 112.0 * torch.stack([place % 3, place // 3], 1).double()
    model.steps = 1
    once = model.smooth(scores, grid, torch.tensor(112.0))
    assert (once > 0).all()  # all eight neighbours heard of it
    apart = model.smooth(scores, 10 * grid, torch.tensor(112.0))
    torch.testing.assert_close(apart, 0.5 * scores)  # α = 1/2, and Â is empty

"""Packed bags: nothing is lost or mixed on the way in, and what cannot be used is refused by name."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wsimil.batch import Aggregator, BagBatch, BagOutput, EncodesTokens, LabelledBags, Objective, pack
from wsimil.errors import AggregatorInputError


def make_bag(n_tiles: int, name: str = "slide", *, first: float = 0.0) -> BagBatch:
    rows = first + torch.arange(n_tiles, dtype=torch.float32)
    return BagBatch(
        torch.stack([rows, -rows, rows**2], 1),
        torch.tensor([0, n_tiles]),
        coords_um=torch.stack([rows, 2 * rows], 1),
        tile_um=torch.tensor([100.0 + first]),
        slide_ids=(name,),
    )


def assert_equal(left: BagBatch, right: BagBatch) -> None:
    for field in fields(BagBatch):
        one, other = getattr(left, field.name), getattr(right, field.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, field.name


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_unpacking_gives_the_bags_that_were_packed(sizes):
    bags = [make_bag(size, f"slide-{index}", first=10.0 * index) for index, size in enumerate(sizes)]
    batch = pack(bags)
    assert len(batch) == len(sizes)
    assert batch.sizes.tolist() == sizes
    assert batch.bag_index.tolist() == [index for index, size in enumerate(sizes) for _ in range(size)]
    for index, bag in enumerate(bags):
        assert_equal(batch.bag(index), bag)


def test_packing_batches_is_packing_their_bags():
    bags = [make_bag(size, f"slide-{size}") for size in (2, 1, 3)]
    assert_equal(pack([pack(bags[:2]), bags[2]]), pack(bags))


def test_the_numbers_of_the_offsets_are_read_once_and_go_along(monkeypatch):
    batch = pack([make_bag(size) for size in (2, 1, 3)])
    monkeypatch.setattr(Tensor, "tolist", lambda self: pytest.fail("read off the device again"))
    moved = replace(batch, features=batch.features + 1).to("cpu", torch.float16)
    for bags in (batch, moved, pack([moved, moved.bag(2)])):
        assert bags.bounds == [0, 2, 3, 6, *([9] if len(bags) == 4 else [])]
        assert bags.lengths == [2, 1, 3, *([3] if len(bags) == 4 else [])]
        assert bags.checked() is bags


def test_offsets_of_others_are_read_too():
    bags = BagBatch(torch.zeros(5, 2), torch.tensor([0, 2, 5]))
    assert bags.bounds == [0, 2, 5] and bags.lengths == [2, 3]
    assert replace(bags, offsets=torch.tensor([0, 5])).lengths == [5]


def test_coordinates_travel_only_if_every_bag_has_them():
    bags = [make_bag(2), replace(make_bag(3), coords_um=None), replace(make_bag(1), tile_um=None)]
    assert pack(bags[:1]).coords_um is not None
    assert pack(bags).coords_um is None
    assert pack(bags).tile_um is None
    assert pack(bags[:2]).tile_um is not None


def test_bags_of_two_encoders_do_not_mix():
    with pytest.raises(AggregatorInputError, match=r"\[2, 3\].*different encoders"):
        pack([make_bag(2), replace(make_bag(2), features=torch.zeros(2, 2))])


def test_nothing_cannot_be_packed():
    with pytest.raises(AggregatorInputError, match="no bag"):
        pack([])


def test_a_usable_batch_is_itself():
    batch = pack([make_bag(1), make_bag(4)])
    assert batch.checked() is batch


def test_an_empty_bag_is_named():
    with pytest.raises(AggregatorInputError, match="second: the bag is empty"):
        pack([make_bag(1, "first"), make_bag(0, "second")]).checked()
    with pytest.raises(AggregatorInputError, match="bag 1: the bag is empty"):
        BagBatch(torch.zeros(2, 3), torch.tensor([0, 2, 2])).checked()


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 4]])
def test_offsets_must_cover_the_instances(offsets):
    with pytest.raises(AggregatorInputError, match=f"from {offsets[0]} to {offsets[-1]}; expected 0 to 3"):
        BagBatch(torch.zeros(3, 2), torch.tensor(offsets)).checked()


def test_features_must_be_a_table():
    with pytest.raises(AggregatorInputError, match=r"\(1, 3, 2\)"):
        BagBatch(torch.zeros(1, 3, 2), torch.tensor([0, 3])).checked()


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"coords_um": torch.zeros(2, 2)}, r"coords_um.*\(2, 2\).*\(3, 2\)"),
        ({"tile_um": torch.ones(3)}, r"tile_um.*\(3,\).*\(2,\)"),
        ({"slide_ids": ("a",)}, r"1 slide_ids.*2 bags"),
    ],
)
def test_every_part_must_fit_the_others(part, said):
    batch = pack([make_bag(1), make_bag(2)])
    with pytest.raises(AggregatorInputError, match=said):
        replace(batch, **part).checked()


def test_moving_changes_the_features_type_only():
    moved = pack([make_bag(2), make_bag(1)]).to("cpu", torch.float16)
    assert moved.features.dtype == torch.float16
    assert moved.offsets.dtype == torch.int64
    assert moved.coords_um is not None and moved.coords_um.dtype == torch.float32
    assert moved.slide_ids == ("slide", "slide")
    bare = BagBatch(torch.zeros(2, 3), torch.tensor([0, 2]))
    assert_equal(bare.to("cpu"), bare)


def test_moving_reaches_every_tensor():
    batch = LabelledBags(pack([make_bag(2), make_bag(1)]), torch.tensor([0.0, 1.0]), torch.ones(2)).to("meta")
    tensors = [batch.targets, batch.weights, *(getattr(batch.bags, field.name) for field in fields(BagBatch))]
    assert all(tensor.device.type == "meta" for tensor in tensors if isinstance(tensor, Tensor))


def test_records_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        make_bag(1).features = torch.zeros(1, 1)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(FrozenInstanceError):
        BagOutput(torch.zeros(1, 1)).logits = torch.zeros(1, 1)  # pyright: ignore[reportAttributeAccessIssue]


def test_outputs_do_not_share_their_penalties():
    assert BagOutput(torch.zeros(1, 1)).penalties is not BagOutput(torch.zeros(1, 1)).penalties


class NeedsPlaces(Aggregator):
    dim, n_outputs, needs_coords = 3, 1, True


def test_an_aggregator_refuses_what_it_cannot_use():
    model, bag = NeedsPlaces(), make_bag(2)
    assert model.check(bag) is bag
    with pytest.raises(AggregatorInputError, match="features are 2 wide, NeedsPlaces takes 3"):
        model.check(replace(bag, features=bag.features[:, :2]))
    for missing in ({"coords_um": None}, {"tile_um": None}):
        with pytest.raises(AggregatorInputError, match="NeedsPlaces needs the position of each tile"):
            model.check(replace(bag, **missing))
    with pytest.raises(AggregatorInputError, match="empty"):
        model.check(make_bag(0))


class Halving(Objective):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def losses(self, model: nn.Module, batch: Tensor, progress: float) -> dict[str, Tensor]:
        return {"half": self.scale * model(batch).square().mean() / 2}


def test_only_losses_must_be_written():
    objective, model = Halving(), nn.Linear(2, 1)
    objective.prepare(model)
    assert objective.sampler(0) is None
    objective.on_epoch_start(0, infer=lambda: ())
    objective.losses(model, torch.ones(3, 2), 0.0)["half"].backward()
    objective.after_backward()
    objective.after_step()
    with pytest.raises(NotImplementedError):
        Objective().losses(model, None, 0.0)


def test_the_optimiser_gets_what_learns_of_both_model_and_objective():
    objective, model = Halving(), nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    (group,) = objective.param_groups(model)
    assert [id(parameter) for parameter in group["params"]] == [id(model.weight), id(objective.scale)]


def test_a_vit_is_known_by_its_tokens():
    class Vit(nn.Module):
        def encode_tokens(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
            return images

    assert isinstance(Vit(), EncodesTokens)
    assert not isinstance(nn.Linear(1, 1), EncodesTokens)

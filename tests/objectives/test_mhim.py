"""MHIM: the authors' masks, what may be hidden and how much of it, and a teacher that follows but never learns."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from seeded import make_bags
from torch import nn

from wsimil.aggregators import AGGREGATORS, make_aggregator
from wsimil.aggregators.abmil import ABMIL
from wsimil.aggregators.mean_pool import MeanPool
from wsimil.aggregators.standardized import Standardized
from wsimil.batch import BagBatch, BagOutput, LabelledBags
from wsimil.errors import ConfigError
from wsimil.objectives import ClamInstances, MaskedHardInstances, SlideLabel
from wsimil.objectives.mhim import hide
from wsimil.task import Task

GOLDEN = Path(__file__).parents[1] / "aggregators" / "golden" / "mhim.npz"
BINARY = Task("binary", ("no", "yes"))


def labelled(*sizes: int) -> LabelledBags:
    bags = replace(make_bags(*sizes, dim=6), slide_ids=tuple(f"slide-{size}" for size in sizes))
    return LabelledBags(bags, (torch.arange(len(sizes)) % 2).double())


def make(**options) -> tuple[MaskedHardInstances, Standardized]:
    torch.manual_seed(0)
    model = Standardized(ABMIL(6, 1, hidden=8, attention=4, dropout=0.0)).double().train()
    objective = MaskedHardInstances(SlideLabel(BINARY), **options)
    objective.prepare(model)
    return objective, model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("case", range(5))
def test_what_is_hidden_is_what_the_authors_code_hides(case):
    golden = np.load(GOLDEN)
    n_tiles, ratio, among = golden[f"{case}/case"].tolist()
    attention = torch.as_tensor(golden["attention"])[: int(n_tiles)]
    hidden = hide(attention, ratio, among=among, generator=seeded(case))
    assert hidden.sort().values.tolist() == golden[f"{case}/hidden"].tolist()


def test_the_agreement_is_the_authors():
    golden = {name: torch.as_tensor(values) for name, values in np.load(GOLDEN).items()}
    objective, _ = make(temperature=0.1)
    outputs = [BagOutput(torch.zeros(3, 1), bag_embedding=golden[name].double()) for name in ("student", "teacher")]
    found = objective._disagreement(*outputs, None)
    torch.testing.assert_close(found.double(), golden["consistency"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_tiles", [1, 7, 50, 1000])
@pytest.mark.parametrize(("ratio", "among"), [(0.0, 0.5), (0.03, 0.5), (0.1, 1.0), (0.6, 0.2)])
def test_hidden_high_tiles_are_among_the_highest_and_counted_exactly(n_tiles, ratio, among):
    attention = torch.rand(n_tiles, generator=seeded(n_tiles))
    hidden = hide(attention, ratio, among=among, generator=seeded(1))
    share, part = (ratio / among, among) if ratio <= among else (1.0, ratio)
    n_highest = math.ceil(n_tiles * share)
    assert len(hidden) == len(hidden.unique()) == math.ceil(n_highest * part)
    assert set(hidden.tolist()) <= set(attention.argsort(descending=True)[:n_highest].tolist())


def test_which_of_the_highest_are_hidden_is_chance():
    attention = torch.rand(1000, generator=seeded(0))
    drawn = [set(hide(attention, 0.03, among=0.5, generator=seeded(seed)).tolist()) for seed in range(40)]
    assert len(set.union(*drawn)) == 60 and max(len(a & b) for a in drawn[:5] for b in drawn[5:]) < 30


@pytest.mark.parametrize("case", range(6))
def test_masks_together_are_those_of_the_authors_code(case, monkeypatch):
    golden = np.load(GOLDEN)
    n_tiles, random, low, high, among = golden[f"masks/{case}/case"].tolist()
    objective = MaskedHardInstances(SlideLabel(BINARY), high=high, among=among, low=low, random=random)
    attention = torch.as_tensor(golden["attention"])[: int(n_tiles)].log().unsqueeze(1)
    bags = make_bags(int(n_tiles), dim=6)
    monkeypatch.setattr("wsimil.objectives.mhim.zlib.crc32", lambda text: case)  # the authors' coin
    kept = objective.kept(BagOutput(torch.zeros(1, 1), attention_logits=attention), bags, 0.0)
    assert (~kept).nonzero()[:, 0].tolist() == golden[f"masks/{case}/hidden"].tolist()


@pytest.mark.parametrize(("low", "n_hidden"), [(0.0, 0), (0.2, 20), (0.005, 1), (1.0, 99)])
def test_low_tiles_are_the_lowest(low, n_hidden):
    objective, model = make(high=0.0, low=low)
    bags = labelled(100).bags
    output = model(bags)
    hidden = (~objective.kept(output, bags, 0.0)).nonzero()[:, 0]
    assert output.attention_logits is not None
    lowest = output.attention_logits[:, 0].argsort().tolist()
    assert set(hidden.tolist()) == set(lowest[1:] if low == 1 else lowest[:n_hidden])  # where none would stay, the lowest does


def test_random_tiles_are_any():
    objective, model = make(high=0.0, random=0.3)
    bags, times = labelled(100).bags, torch.zeros(100)
    for step in range(200):
        objective.step.fill_(step)
        hidden = ~objective.kept(model(bags), bags, 0.0)
        assert hidden.sum() == 30
        times += hidden
    assert times.min() > 30 and times.max() < 90  # 60 expected, deviation 6.5


@pytest.mark.parametrize(("progress", "hidden"), [(0.0, 20), (0.5, 10), (1.0, 0)])
def test_the_share_of_hidden_high_tiles_falls_along_half_a_cosine(progress, hidden):
    objective, model = make(high=0.2, among=1.0)
    bags = labelled(100).bags
    assert (~objective.kept(model(bags), bags, progress)).sum() == hidden


def test_at_least_one_tile_of_a_bag_stays():
    objective, model = make(high=1.0, among=1.0, low=1.0, random=1.0)
    bags = labelled(1, 2, 9).bags
    kept = objective.kept(model(bags), bags, 0.0)
    assert [int(part.sum()) for part in kept.split([1, 2, 9])] == [1, 1, 1]


def test_what_is_hidden_depends_on_neither_batch_mates_nor_their_order():
    objective, model = make(high=0.2, low=0.1, random=0.1)
    bags = labelled(30, 50, 20).bags
    together = objective.kept(model(bags), bags, 0.0).split([30, 50, 20])
    for index in range(3):
        alone = objective.kept(model(bags.bag(index)), bags.bag(index), 0.0)
        assert torch.equal(alone, together[index])
    objective.step += 1
    assert not torch.equal(objective.kept(model(bags), bags, 0.0), torch.cat(together))


class Watched(nn.Module):
    """A model that remembers the bags it was shown."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, bags: BagBatch) -> BagOutput:
        self.seen.append(bags.checked())
        return self.inner(bags)


def test_the_student_sees_what_is_kept_and_the_teacher_all():
    objective, model = make(high=0.2, low=0.1)
    watched, batch = Watched(model).train(), labelled(30, 50)
    places = torch.rand(80, 2, dtype=torch.float64, generator=seeded(0))
    batch = replace(batch, bags=replace(batch.bags, coords_um=places, tile_um=torch.ones(2)))
    kept = objective.kept(model(batch.bags), batch.bags, 0.0)
    objective.losses(watched, batch, 0.0)
    (seen,) = watched.seen
    assert torch.equal(seen.features, batch.bags.features[kept]) and torch.equal(seen.coords_um, places[kept])
    assert seen.sizes.tolist() == [int(part.sum()) for part in kept.split([30, 50])] and seen.slide_ids == batch.bags.slide_ids
    assert 0.6 * 80 < len(seen.features) < 0.75 * 80


def test_nothing_is_hidden_in_validation():
    objective, model = make(high=0.5, low=0.5)
    batch = labelled(30, 50)
    model.eval()
    found = objective.losses(model, batch, 0.0)
    assert found == SlideLabel(BINARY).losses(model, batch, 0.0)


def test_the_teacher_follows_as_a_moving_average():
    objective, model = make(momentum=0.25)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.mean[:] = step
        objective.after_step()
        share = min(0.25, (1 + step) / (10 + step))  # .1, .18, .25, .25 …
        for name, value in model.state_dict().items():
            expected[name] = value if name in ("mean", "deviation") else share * expected[name] + (1 - share) * value
        for name, value in objective.teacher.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)


def test_the_student_learns_and_the_teacher_does_not():
    objective, model = make(consistency=1.0)
    losses = objective.losses(model, labelled(30, 50), 0.0)
    assert losses.keys() == {"bag", "consistency"}
    total(losses).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in objective.teacher.parameters())
    (group,) = objective.param_groups(model)
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in model.parameters()}


def test_it_wraps_any_objective_that_calls_the_model():
    torch.manual_seed(0)
    model = Standardized(ABMIL(6, 1, hidden=8, attention=4)).double().train()
    objective = MaskedHardInstances(ClamInstances(SlideLabel(BINARY), 8, k=2).double())
    objective.prepare(model)
    losses = objective.losses(model, labelled(30, 50), 0.0)
    assert losses.keys() == {"bag", "tiles", "consistency"}
    learning = {id(parameter) for group in objective.param_groups(model) for parameter in group["params"]}
    judges = {id(parameter) for parameter in objective.inner.parameters()}
    assert learning == {id(parameter) for parameter in model.parameters()} | judges
    assert not model._forward_hooks  # nothing listens any more


def test_agreement_is_best_where_student_and_teacher_agree():
    objective, _ = make(temperature=1.0, consistency=1.0)
    embedding = torch.randn(2, 8, generator=seeded(0))
    same, other = (
        BagOutput(torch.zeros(2, 1), bag_embedding=embedding),
        BagOutput(torch.zeros(2, 1), bag_embedding=embedding.flip(1)),
    )
    assert objective._disagreement(same, same, None) < objective._disagreement(other, same, None)


def test_weights_of_slides_count_in_the_agreement():
    objective, model = make(consistency=1.0)
    batch = labelled(30, 50)
    plain = objective.losses(model, batch, 1.0)
    first = objective.losses(model, replace(batch, weights=torch.tensor([2.0, 0.0])), 1.0)
    second = objective.losses(model, replace(batch, weights=torch.tensor([0.0, 2.0])), 1.0)
    for name, loss in plain.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, loss)


def test_a_model_without_attention_is_refused():
    objective = MaskedHardInstances(SlideLabel(BINARY))
    model = MeanPool(6, 1).double()
    objective.prepare(model)
    with pytest.raises(ConfigError, match="mhim hides tiles by attention"):
        objective.losses(model, labelled(3, 4), 0.0)


@pytest.mark.parametrize(
    "option", [{"high": 1.5}, {"low": -0.1}, {"random": 1.1}, {"among": 0.0}, {"temperature": 0.0}, {"momentum": 2.0}]
)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        MaskedHardInstances(SlideLabel(BINARY), **option)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_it_trains_every_aggregator_that_has_attention(name):
    torch.manual_seed(0)
    model = make_aggregator(name, 6, 1, hidden=16).double().train()
    batch = labelled(30, 50)
    place = torch.arange(80)
    places = 112.0 * torch.stack([place % 10, place // 10], 1).double()
    batch = replace(batch, bags=replace(batch.bags, coords_um=places, tile_um=torch.full((2,), 112.0).double()))
    objective = MaskedHardInstances(SlideLabel(BINARY), high=0.2, low=0.1)
    objective.prepare(model)
    output = model.eval()(batch.bags)
    model.train()
    if output.attention_logits is None or output.bag_embedding is None:
        with pytest.raises(ConfigError, match="mhim hides tiles by attention"):
            objective.losses(model, batch, 0.0)
        return
    losses = objective.losses(model, batch, 0.0)
    total(losses).backward()
    assert {"bag", "consistency"} <= losses.keys() and total(losses).isfinite()
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())
    objective.after_step()

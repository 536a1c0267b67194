"""Steps: schedules, accumulation, state, and what a device must not change."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from wsimil.batch import Objective
from wsimil.encoders.trainable import param_groups
from wsimil.objectives.dino import DinoObjective, MultiCrop
from wsimil.pretraining.loop import Loop, Schedule, seed_of


class Net(nn.Module):
    """(B, 3, px, px) → (B, 8), any px."""

    embed_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(3, 8), nn.LayerNorm(8), nn.Dropout(0.2)

    def forward(self, images: Tensor) -> Tensor:
        return self.drop(self.norm(self.linear(images.mean((2, 3)))))


class Squares(Objective):
    """Mean square of the model's answer; keeps what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[float] = []

    def losses(self, model: nn.Module, batch: Tensor, progress: float) -> dict[str, Tensor]:
        self.told.append(progress)
        return {"squares": (model(batch) - 1).square().mean(), "half": 0.5 * model(batch).mean()}


def images(number: int, count: int = 8) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(number))


def crops(number: int) -> MultiCrop:
    return MultiCrop((images(number), images(number + 1000)), (images(number + 2000),))


def dino(freeze_last: float = 0.0) -> DinoObjective:
    torch.manual_seed(3)
    return DinoObjective(8, prototypes=16, bottleneck=4, hidden=8, freeze_last=freeze_last, momentum=(0.9, 1.0))


def loop_of(objective: Objective, *, total: int = 20, seed: int = 0, drop: float = 0.2, **settings) -> Loop:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    torch.manual_seed(5)
    model = Net()
    model.drop.p = drop
    objective.prepare(model)
    groups = param_groups(model, weight_decay=0.1) + param_groups(objective, weight_decay=0.1)
    schedule = Schedule(total, 0.01, 1e-4, 0.2, (0.1, 0.4))
    return Loop(fabric, model, objective, groups, schedule, seed=seed, **settings)


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


# ---------------------------------------------------------------- schedules


def test_schedules_hit_their_endpoints() -> None:
    schedule = Schedule(total=100, lr=0.5, min_lr=0.01, warm_up=0.1, weight_decay=(0.04, 0.4))
    assert schedule.lr_at(0) == pytest.approx(0.05) and schedule.lr_at(9) == 0.5 and schedule.lr_at(10) == 0.5
    assert schedule.lr_at(99) == pytest.approx(0.01)
    assert schedule.weight_decay_at(0) == pytest.approx(0.04) and schedule.weight_decay_at(99) == pytest.approx(0.4)
    rates = [schedule.lr_at(step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    decays = [schedule.weight_decay_at(step) for step in range(100)]
    assert decays == sorted(decays)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_shortest_runs_have_schedules_too(total: int) -> None:
    schedule = Schedule(total, 0.5, 0.0, 0.1, (0.1, 0.1))
    assert all(math.isfinite(schedule.lr_at(step)) for step in range(total)) and schedule.lr_at(0) > 0


def test_a_step_uses_the_rates_of_its_number() -> None:
    loop = loop_of(Squares(), clip_norm=1.0)
    seen = []
    for number in range(20):
        record = loop.advance([images(number)], lambda batch: batch)
        seen.append((record.lr, record.weight_decay))
        for group in loop._adamw.param_groups:
            assert group["lr"] == record.lr and group["weight_decay"] == (record.weight_decay if group["decays"] else 0)
    assert seen == [(loop.schedule.lr_at(step), loop.schedule.weight_decay_at(step)) for step in range(20)]
    assert loop.objective.told == [step / 20 for step in range(20)]


def test_norms_and_biases_do_not_decay() -> None:
    loop = loop_of(Squares())
    kinds = {id(parameter): group["decays"] for group in loop._adamw.param_groups for parameter in group["params"]}
    assert kinds[id(loop.model.linear.weight)] and not kinds[id(loop.model.linear.bias)] and not kinds[id(loop.model.norm.weight)]


# ---------------------------------------------------------------- steps


def test_parts_add_up_to_their_batch() -> None:
    whole, parts = loop_of(Squares(), drop=0.0), loop_of(Squares(), drop=0.0)
    batch = images(1, 8)
    one = whole.advance([batch], lambda part: part)
    other = parts.advance([batch[:4], batch[4:]], lambda part: part)
    assert other.loss == pytest.approx(one.loss.item(), rel=1e-6)
    assert other.grad_norm == pytest.approx(one.grad_norm.item(), rel=1e-5)
    for left, right in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-6)


def test_long_gradients_are_shortened_and_the_record_says_how_long_they_were() -> None:
    loop = loop_of(Squares(), clip_norm=1e-3)
    record = loop.advance([images(1)], lambda part: part)
    clipped = math.sqrt(sum(float(p.grad.square().sum()) for p in loop.model.parameters() if p.grad is not None))
    assert record.grad_norm > 1e-2 and clipped == pytest.approx(1e-3, rel=1e-3)


def test_losses_are_named_and_summed() -> None:
    record = loop_of(Squares()).advance([images(1)], lambda part: part)
    assert set(record.losses) == {"squares", "half"}
    assert float(record.loss) == pytest.approx(sum(float(loss) for loss in record.losses.values()))


def test_last_layer_stands_still_for_its_share_then_moves() -> None:
    loop = loop_of(dino(freeze_last=0.25))
    start = loop.objective.head.prototypes.detach().clone()
    for number in range(5):
        loop.advance([crops(number)], lambda batch: batch)
    assert torch.equal(loop.objective.head.prototypes, start)
    loop.advance([crops(5)], lambda batch: batch)
    assert not torch.equal(loop.objective.head.prototypes, start)


def test_teacher_is_no_part_of_the_optimiser_and_stays_in_eval_mode() -> None:
    loop = loop_of(dino())
    trained = {id(parameter) for group in loop._adamw.param_groups for parameter in group["params"]}
    objective = loop.objective
    assert not trained & {id(p) for p in [*objective.teacher.parameters(), *objective.teacher_head.parameters()]}
    loop.advance([crops(0)], lambda batch: batch)
    assert loop.model.training and not objective.teacher.training and loop.kept_model() is objective.teacher
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())


# ---------------------------------------------------------------- state


def test_ten_steps_and_ten_after_loading_are_twenty_steps(tmp_path) -> None:
    straight = loop_of(dino())
    losses = [straight.advance([crops(2 * n), crops(2 * n + 1)], lambda batch: batch).loss for n in range(20)]
    first = loop_of(dino())
    for number in range(10):
        first.advance([crops(2 * number), crops(2 * number + 1)], lambda batch: batch)
    torch.save(first.state(), tmp_path / "state")
    torch.manual_seed(99)  # whatever happens between: the state is complete
    second = loop_of(dino())
    second.load(torch.load(tmp_path / "state", weights_only=True))
    again = [second.advance([crops(2 * n), crops(2 * n + 1)], lambda batch: batch).loss for n in range(10, 20)]
    assert torch.equal(torch.stack(losses[10:]), torch.stack(again))
    assert same(straight.model.state_dict(), second.model.state_dict())
    assert same(straight.objective.state_dict(), second.objective.state_dict())


def test_chance_inside_a_step_is_a_function_of_seed_and_step() -> None:
    one, other, third = loop_of(Squares(), drop=0.5), loop_of(Squares(), drop=0.5), loop_of(Squares(), drop=0.5, seed=1)
    torch.manual_seed(1)
    first = one.advance([images(1)], lambda part: part).loss
    torch.manual_seed(2)
    assert torch.equal(first, other.advance([images(1)], lambda part: part).loss)
    assert not torch.equal(first, third.advance([images(1)], lambda part: part).loss)


def test_seeds_of_different_parts_differ() -> None:
    seeds = {seed_of(*parts) for parts in [(0, 1, 0), (0, 0, 1), (1, 0, 0), (0, 10), (0, 1), ("panel", 0)]}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)


def test_bf16_learns_and_pixels_are_not_rounded() -> None:
    class Watched(Squares):
        def losses(self, model, batch, progress):
            self.dtype = batch.dtype
            self.inside = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            return super().losses(model, batch, progress)

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    model, objective = Net(), Watched()
    loop = Loop(fabric, model, objective, param_groups(model, weight_decay=0.0), Schedule(10, 0.05), seed=0)
    losses = [float(loop.advance([images(1)], lambda part: part).losses["squares"]) for _ in range(10)]
    assert objective.dtype == torch.float32 and objective.inside == torch.bfloat16
    assert losses[-1] < losses[0] and next(model.parameters()).dtype == torch.float32

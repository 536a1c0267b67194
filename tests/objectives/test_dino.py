"""DINO against plain loops: its loss, centring, spreading, the teacher, and when prototypes move."""

from __future__ import annotations

import copy
import inspect
import math
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.errors import ConfigError
from wsimil.objectives.dino import DinoHead, DinoObjective, MultiCrop, center_update, dino_loss, ema_, kde, koleo, sinkhorn

K = 12


class Backbone(nn.Module):
    """Crops of any size → (B, 8); with dropout and batch statistics, by which a mode is told."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(F.dropout(self.norm(self.conv(images)).relu().mean((2, 3)), 0.2, self.training))


def crops(seed: int, n_tiles: int = 4) -> MultiCrop:
    """Each tile has a colour of its own, each crop noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.randn(n_tiles, 3, 1, 1, generator=generator)
    sizes = (8, 8, 4, 4, 4)
    views = [colour + 0.3 * torch.randn(n_tiles, 3, px, px, generator=generator) for px in sizes]
    return MultiCrop(tuple(views[:2]), tuple(views[2:]))


def make(seed: int = 0, **options) -> tuple[nn.Module, DinoObjective]:
    torch.manual_seed(seed)
    model = Backbone()
    objective = DinoObjective(8, **{"prototypes": K, "bottleneck": 6, "hidden": 16, "freeze_last": 0.0} | options)
    objective.prepare(model)
    return model.train(), objective.train()


def advance(
    model: nn.Module, objective: DinoObjective, steps: range, *, total: int = 20, n_tiles: int = 4, optimiser=None
) -> list[float]:
    optimiser = optimiser or torch.optim.AdamW(objective.param_groups(model), lr=1e-3, weight_decay=0.1)
    losses = []
    for step in steps:
        torch.manual_seed(1000 + step)
        optimiser.zero_grad()
        loss = torch.stack(list(objective.losses(model, crops(step, n_tiles), step / total).values())).sum()
        loss.backward()
        objective.after_backward()
        optimiser.step()
        objective.after_step()
        losses.append(float(loss.detach()))
    return losses


# the loss


def test_loss_is_the_mean_over_pairs_of_different_views():
    student, teacher = torch.randn(5, 3, K), torch.randn(2, 3, K).softmax(-1)
    pairs = []
    for g in range(2):
        for v in range(5):
            if v == g:  # the same crop seen by both
                continue
            for b in range(3):
                log_q = torch.log_softmax(student[v, b] / 0.1, 0)
                pairs.append(-sum(teacher[g, b, k] * log_q[k] for k in range(K)))
    assert len(pairs) == (2 * 5 - 2) * 3
    torch.testing.assert_close(dino_loss(student, teacher, student_temp=0.1), torch.stack(pairs).mean())


def test_uniform_logits_give_the_logarithm_of_the_number_of_prototypes():
    loss = dino_loss(torch.zeros(6, 4, 4096), torch.full((2, 4, 4096), 1 / 4096))
    assert float(loss) == pytest.approx(8.3178, abs=1e-4)


# centring


def test_the_center_is_a_running_mean():
    logits = torch.randn(10, K)
    center = center_update(torch.ones(K), logits.mean(0), 0.9)
    torch.testing.assert_close(center, 0.9 * torch.ones(K) + 0.1 * logits.mean(0))


def test_parts_of_a_batch_move_the_center_as_the_whole_does():
    view = crops(3, 8)
    centers = []
    for parts in ([slice(8)], [slice(2), slice(2, 8)]):
        model, objective = make()
        for rows in parts:
            objective.losses(model, MultiCrop(tuple(x[rows] for x in view.globals_), tuple(x[rows] for x in view.locals_)), 0.1)
        objective.after_step()
        centers.append(objective.center)
    assert centers[0].abs().max() > 1e-3
    torch.testing.assert_close(*centers)


def test_the_center_is_taken_off_before_the_softmax():
    _, objective = make(teacher_temp=(0.05, 0.05, 0.0))
    objective.center.copy_(torch.linspace(-1, 1, K))
    logits = torch.randn(6, K)
    torch.testing.assert_close(objective._teacher_probs(logits), ((logits - objective.center) / 0.05).softmax(1))


def test_validation_moves_no_center():
    model, objective = make()
    model.eval(), objective.eval()
    objective.losses(model, crops(0), 0.5)
    objective.after_step()
    assert not objective.center.any()


def test_sinkhorn_rows_are_probabilities_and_prototypes_are_used_alike():
    logits = 2 * torch.rand(512, 16, generator=torch.Generator().manual_seed(0)) - 1
    logits[:, 0] += 2.0  # everybody's favourite
    before = (logits / 0.05).softmax(1).mean(0)
    after = sinkhorn(logits, 0.05, iterations=3)
    torch.testing.assert_close(after.sum(1), torch.ones(512))
    assert before.max() > 0.9
    assert after.mean(0).max() < 1.3 / 16
    assert after.mean(0).min() > 0.7 / 16


def test_sinkhorn_is_that_of_plain_sums():
    logits = torch.randn(20, K, dtype=torch.float64)
    q = (logits / 0.5).exp()
    for _ in range(3):
        q = q / q.sum(0) / K
        q = q / q.sum(1, keepdim=True)
    torch.testing.assert_close(sinkhorn(logits, 0.5).double(), q, rtol=1e-5, atol=1e-7)


def test_sinkhorn_survives_logits_that_no_float_can_exponentiate():
    logits = torch.zeros(8, K)
    logits[:, 0] = 100.0  # e^2500 at this temperature
    logits[0, 1] = -100.0
    probs = sinkhorn(logits, 0.04)
    assert probs.isfinite().all()
    torch.testing.assert_close(probs.sum(1), torch.ones(8))


def center_of(views: list[Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """The center after a step on these crops, and Sinkhorn's probabilities."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
    objective = DinoObjective(8, prototypes=K, bottleneck=6, hidden=16)
    objective.prepare(model)
    objective.losses(model, MultiCrop(tuple(views)), 0.1)
    objective.after_step()
    return objective.center, sinkhorn(logits, 0.05)


_OTHER_PROCESS = """
import sys, torch, torch.distributed as dist
from torch import nn, Tensor
from wsimil.objectives.dino import DinoObjective, MultiCrop, sinkhorn
exec(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meeting", rank=1, world_size=2)
given = torch.load(f"{sys.argv[1]}/given.pt")
torch.save(center_of(*given), f"{sys.argv[1]}/said.pt")
dist.destroy_process_group()
"""


def test_two_processes_center_like_one_with_twice_the_batch(tmp_path: Path):
    logits, views = torch.randn(8, K), list(torch.randn(2, 8, 3, 4, 4))
    torch.save(([view[4:] for view in views], logits[4:]), tmp_path / "given.pt")
    source = f"K = {K}\n{inspect.getsource(center_of)}"
    other = subprocess.Popen([sys.executable, "-c", _OTHER_PROCESS, str(tmp_path), source])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=2, timeout=timedelta(seconds=90))
    try:
        here = center_of([view[:4] for view in views], logits[:4])
    finally:
        dist.destroy_process_group()
    assert other.wait(60) == 0
    there = torch.load(tmp_path / "said.pt")
    whole = center_of(views, logits)
    assert whole[0].abs().max() > 1e-3
    torch.testing.assert_close(here[0], whole[0])
    torch.testing.assert_close(there[0], whole[0])
    torch.testing.assert_close(torch.cat([here[1], there[1]]), whole[1])
    assert not torch.allclose(here[1], sinkhorn(logits[:4], 0.05))


# spreading


@pytest.mark.parametrize("measure", [kde, koleo])
def test_a_step_down_the_gradient_pushes_features_apart(measure):
    x = (torch.randn(32, 8, generator=torch.Generator().manual_seed(0)) * 0.3 + 1).requires_grad_()

    def mean_cosine() -> float:
        unit = F.normalize(x.detach(), dim=1)
        return float((unit @ unit.T).fill_diagonal_(0).sum() / (32 * 31))

    before = mean_cosine()
    for _ in range(5):
        (gradient,) = torch.autograd.grad(measure(x), x)
        x.data -= 0.5 * gradient
    assert mean_cosine() < before - 1e-3


@pytest.mark.parametrize("measure", [kde, koleo])
def test_duplicates_leave_loss_and_gradient_finite(measure):
    x = torch.ones(6, 4)
    x[3:] = torch.randn(3, 4)
    x.requires_grad_()
    loss = measure(x)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


def test_density_does_not_grow_with_the_batch():
    assert float(kde(torch.ones(5, 4))) == pytest.approx(0, abs=1e-5)
    assert float(kde(torch.ones(50, 4))) == pytest.approx(0, abs=1e-5)
    x = F.normalize(torch.randn(7, 4), dim=1)
    by_hand = [math.log(sum(math.exp(3 * (float(x[i] @ x[j]) - 1)) for j in range(7) if j != i) / 6) for i in range(7)]
    assert float(kde(x, concentration=3.0)) == pytest.approx(sum(by_hand) / 7, abs=1e-5)


def test_koleo_is_the_log_distance_to_the_nearest():
    x = F.normalize(torch.randn(7, 4), dim=1)
    distances = [min(float((x[i] - x[j]).norm()) for j in range(7) if j != i) for i in range(7)]
    assert float(koleo(5 * x)) == pytest.approx(-sum(map(math.log, distances)) / 7, abs=1e-5)


def test_the_spreading_loss_is_that_of_each_view_alone():
    model, objective = make(spread="kde", spread_weight=0.5)
    model.eval()
    view = crops(1)
    losses = objective.losses(model, view, 0.0)
    assert losses.keys() == {"dino", "kde"}
    expected = 0.5 * torch.stack([kde(model(part)) for part in view.globals_]).mean()
    torch.testing.assert_close(losses["kde"], expected)
    assert losses["kde"].requires_grad


# teacher and student


def test_ema_is_exact():
    torch.manual_seed(0)
    teacher, student = nn.Linear(5, 5), nn.Linear(5, 5)
    before = [p.clone() for p in teacher.parameters()]
    ema_(teacher, student, 0.9)
    for was, mean, weight in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.9 * was + (1 - 0.9) * weight, rtol=0, atol=1e-7)
    kept = [p.clone() for p in teacher.parameters()]
    ema_(teacher, student, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, teacher.parameters(), strict=True))
    ema_(teacher, student, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))


def test_teacher_and_student_begin_equal_in_storage_of_their_own():
    model, objective = make()
    for mine, theirs in ((model, objective.teacher), (objective.head, objective.teacher_head)):
        for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(one, other)
            assert one.data_ptr() != other.data_ptr()


def test_the_teacher_is_never_in_training_and_no_tensor_of_it_is_optimised():
    model, objective = make()
    objective.train()
    assert not any(part.training for part in (*objective.teacher.modules(), *objective.teacher_head.modules()))
    teachers = {id(p) for part in (objective.teacher, objective.teacher_head) for p in part.parameters()}
    optimised = [p for group in objective.param_groups(model) for p in group["params"]]
    assert not teachers & {id(p) for p in optimised}
    assert {id(p) for p in (*model.parameters(), *objective.head.parameters())} == {id(p) for p in optimised}
    advance(model, objective, range(2))
    assert all(p.grad is None for part in (objective.teacher, objective.teacher_head) for p in part.parameters())


def test_the_teacher_follows_backbone_and_head_along_a_cosine():
    model, objective = make(momentum=(0.5, 1.0))
    for progress, momentum in ((0.0, 0.5), (0.5, 0.75), (1.0, 1.0)):
        before = copy.deepcopy((objective.teacher.state_dict(), objective.teacher_head.state_dict()))
        with torch.no_grad():
            model.out.weight += 1
            objective.head.prototypes += 1
        objective.progress = progress
        objective.after_step()
        for was, now, student, name in (
            (before[0], objective.teacher, model, "out.weight"),
            (before[1], objective.teacher_head, objective.head, "prototypes"),
        ):
            expected = momentum * was[name] + (1 - momentum) * student.state_dict()[name]
            torch.testing.assert_close(now.state_dict()[name], expected)


@pytest.mark.parametrize(("progress", "temp"), [(0.0, 0.04), (0.125, 0.055), (0.25, 0.07), (1.0, 0.07)])
def test_the_teachers_temperature_rises_in_a_straight_line(progress, temp):
    _, objective = make(teacher_temp=(0.04, 0.07, 0.25))
    objective.progress = progress
    logits = torch.randn(3, K)
    torch.testing.assert_close(objective._teacher_probs(logits), (logits / temp).softmax(1))


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_prototypes_stand_still_for_their_share_of_the_run_and_then_move(norm_last_layer):
    model, objective = make(freeze_last=0.3, norm_last_layer=norm_last_layer)
    optimiser = torch.optim.AdamW(objective.param_groups(model), lr=1e-3, weight_decay=0.1)
    start = [p.detach().clone() for p in objective.head.last_layer()]
    rest = objective.head.mlp[0].weight.detach().clone()
    for step in range(3):  # 0, .1, .2 of the run
        advance(model, objective, range(step, step + 1), total=10, optimiser=optimiser)
        assert all(torch.equal(a, b) for a, b in zip(start, objective.head.last_layer(), strict=True))
    assert not torch.equal(rest, objective.head.mlp[0].weight)
    advance(model, objective, range(3, 4), total=10, optimiser=optimiser)
    assert not any(torch.equal(a, b) for a, b in zip(start, objective.head.last_layer(), strict=True))


def test_logits_are_cosines_unless_lengths_are_learned():
    head = DinoHead(8, prototypes=K, bottleneck=6, hidden=16)
    with torch.no_grad():
        head.prototypes *= 7
    logits = head(10 * torch.randn(20, 8))
    assert logits.abs().max() <= 1 + 1e-6
    free = DinoHead(8, prototypes=K, bottleneck=6, hidden=16, norm_last_layer=False)
    with torch.no_grad():
        free.length *= 3
    assert free(torch.randn(200, 8)).abs().max() > 1


def test_the_head_starts_with_small_weights():
    head = DinoHead(64, prototypes=K, bottleneck=32, hidden=256)
    for layer in head.mlp[::2]:
        assert 0.015 < float(layer.weight.detach().std()) < 0.025
        assert not layer.bias.any()


# the whole


def test_monitors_tell_collapse_from_health():
    _, objective = make()
    one_hot, several = torch.zeros(2, 4, K), torch.zeros(2, 4, K)
    one_hot[..., 0] = 1
    several[:, range(4), range(4)] = 1
    readings = {}
    for name, probs in (("uniform", torch.full((2, 4, K), 1 / K)), ("one-hot", one_hot), ("several", several)):
        objective._watch(probs, torch.tensor(3.0))
        readings[name] = {key: float(value) for key, value in objective.monitor.items()}
    assert readings["uniform"]["entropy"] == readings["uniform"]["mean_entropy"] == pytest.approx(1)
    assert readings["uniform"]["kl"] == pytest.approx(3 - math.log(K))
    assert readings["one-hot"]["entropy"] == readings["one-hot"]["mean_entropy"] == 0
    assert readings["several"]["entropy"] == 0
    assert readings["several"]["mean_entropy"] == pytest.approx(math.log(4) / math.log(K))


@pytest.mark.parametrize("centring", ["ema", "sinkhorn"])
def test_a_resumed_objective_goes_on_as_if_nothing_had_happened(centring):
    options = {"centring": centring, "momentum": (0.9, 1.0), "spread": "koleo", "spread_weight": 0.1}
    model, objective = make(**options)
    through = advance(model, objective, range(6))

    model, objective = make(**options)
    optimiser = torch.optim.AdamW(objective.param_groups(model), lr=1e-3, weight_decay=0.1)
    first = advance(model, objective, range(3), optimiser=optimiser)
    saved = copy.deepcopy((model.state_dict(), objective.state_dict(), optimiser.state_dict()))
    model, objective = make(seed=9, **options)
    optimiser = torch.optim.AdamW(objective.param_groups(model), lr=1e-3, weight_decay=0.1)
    for part, state in zip((model, objective, optimiser), saved, strict=True):
        part.load_state_dict(state)
    assert first + advance(model, objective, range(3, 6), optimiser=optimiser) == through


def test_the_student_comes_to_say_what_the_teacher_says():
    model, objective = make(momentum=(0.9, 1.0), centring="sinkhorn")
    optimiser = torch.optim.AdamW(objective.param_groups(model), lr=5e-3)
    advance(model, objective, range(1), total=80, n_tiles=16, optimiser=optimiser)
    at_first = float(objective.monitor["kl"])
    advance(model, objective, range(1, 80), total=80, n_tiles=16, optimiser=optimiser)
    assert float(objective.monitor["kl"]) < at_first / 4


def test_low_precision_products_change_the_losses_little():
    model, objective = make(spread="kde", spread_weight=0.1)
    model.eval()
    exact = objective.losses(model, crops(0), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective.losses(model, crops(0), 0.5)
    for name, value in exact.items():
        assert rough[name].dtype == torch.float32
        torch.testing.assert_close(rough[name], value, rtol=0.05, atol=0.05)


def test_what_is_kept_is_the_teacher_and_fits_the_model():
    model, objective = make()
    advance(model, objective, range(2))
    kept = objective.kept_model(model)
    assert kept is objective.teacher
    model.load_state_dict(kept.state_dict())


def test_unknown_words_are_refused():
    with pytest.raises(ConfigError, match="centring 'mean'"):
        DinoObjective(8, centring="mean")  # type: ignore[arg-type]

"""The contract of objectives holds for the hardest ones: one plain loop trains every tenant, and resumes it exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from aggregator_tenants import ClamMB, Dsmil, Dtfd, ScoreThenPool, SmoothAttention
from objective_tenants import ClamInstances, LowRankLinear, MaskedAutoencoder, OrthogonalLora, TinyViT, patches_of
from torch import Tensor, nn

from wsimil.aggregators.abmil import ABMIL
from wsimil.batch import BagBatch, BagOutput, EncodesTokens, ExtraLogits, LabelledBags, Objective
from wsimil.objectives import MaskedHardInstances, SlideLabel
from wsimil.task import Task

DIM, HIDDEN = 6, 16
BINARY = Task("binary", ("no", "yes"))
TYPES = Task("multiclass", ("a", "b", "c"))
PERCENT = Task("regression", center=0.0, scale=100.0)


def bags_with(task: Task, seed: int) -> LabelledBags:
    """Six slides of a 5 × 4 grid; a third of the tiles of class c lean along axis c, for a regression along axis 0 by its value."""
    generator = torch.Generator().manual_seed(seed)
    n_bags, n_tiles = 6, 20
    features = torch.randn(n_bags, n_tiles, DIM, generator=generator)
    if task.kind == "regression":
        labels: list[Any] = torch.linspace(5, 95, n_bags).tolist()
        for bag, label in enumerate(labels):
            features[bag, : round(label / 100 * n_tiles), 0] += 3
    else:
        labels = [task.classes[bag % len(task.classes)] for bag in range(n_bags)]
        for bag, label in enumerate(labels):
            features[bag, :7, task.classes.index(label)] += 3
    place = torch.arange(n_tiles)
    grid = 112.0 * torch.stack([place % 5, place // 5], 1)
    bags = BagBatch(
        features.flatten(0, 1),
        torch.arange(n_bags + 1) * n_tiles,
        coords_um=grid.repeat(n_bags, 1),
        tile_um=torch.full((n_bags,), 112.0),
        slide_ids=tuple(f"slide-{seed}-{bag}" for bag in range(n_bags)),
    )
    return LabelledBags(bags, task.encode(labels))


def ramps(seed: int) -> Tensor:
    """(16, 3, 32, 32) images whose grey rises steadily in one direction: hidden patches follow from visible ones."""
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * torch.pi * torch.rand(16, 1, 1, generator=generator)
    across = torch.linspace(-1, 1, 32)
    grey = angle.cos() * across + angle.sin() * across.unsqueeze(1)
    return grey.unsqueeze(1).repeat(1, 3, 1, 1)


def orthogonal_lora(task: Task) -> OrthogonalLora:
    return OrthogonalLora(SlideLabel(task), heads=("classify", "attend.score"))


Tenant = tuple[Callable[[], nn.Module], Callable[[], Objective], Sequence[Any]]
TENANTS: dict[str, Tenant] = {
    "clam": (partial(ClamMB, DIM, 3), lambda: ClamInstances(SlideLabel(TYPES), HIDDEN), [bags_with(TYPES, s) for s in (0, 1)]),
    "clam, one output": (
        partial(ClamMB, DIM, 1),
        lambda: ClamInstances(SlideLabel(BINARY), HIDDEN),
        [bags_with(BINARY, s) for s in (0, 1)],
    ),
    "dsmil": (partial(Dsmil, DIM, 3), lambda: SlideLabel(TYPES), [bags_with(TYPES, s) for s in (0, 1)]),
    "dtfd": (partial(Dtfd, DIM, 3), lambda: SlideLabel(TYPES), [bags_with(TYPES, s) for s in (0, 1)]),
    "score then pool": (
        partial(ScoreThenPool, DIM, 1, proportion=True),
        lambda: SlideLabel(PERCENT),
        [bags_with(PERCENT, s) for s in (0, 1)],
    ),
    "smooth": (partial(SmoothAttention, DIM, 1), lambda: SlideLabel(BINARY), [bags_with(BINARY, s) for s in (0, 1)]),
    "masked autoencoder": (TinyViT, lambda: MaskedAutoencoder(24), [ramps(0), ramps(1)]),
    "mhim": (
        partial(ABMIL, DIM, 3, hidden=HIDDEN, attention=8, dropout=0.0),
        lambda: MaskedHardInstances(SlideLabel(TYPES), high=0.1, low=0.1),
        [bags_with(TYPES, s) for s in (0, 1)],
    ),
    "orthogonal lora": (
        partial(ABMIL, DIM, 3, hidden=HIDDEN, attention=8, dropout=0.0),
        lambda: orthogonal_lora(TYPES),
        [bags_with(TYPES, s) for s in (0, 1)],
    ),
}
every_tenant = pytest.mark.parametrize("name", TENANTS)


class Run:
    """The one loop: it knows models, objectives and batches by the contract alone."""

    def __init__(self, tenant: Tenant, *, seed: int = 0, saved: dict[str, Any] | None = None) -> None:
        torch.manual_seed(seed)
        make_model, make_objective, self.batches = tenant
        self.model, self.objective = make_model().train(), make_objective().train()
        self.objective.prepare(self.model)
        self.optimiser = torch.optim.AdamW(self.objective.param_groups(self.model), lr=5e-3)
        if saved is not None:
            for part, state in saved.items():
                getattr(self, part).load_state_dict(state)

    def state(self) -> dict[str, Any]:
        return copy.deepcopy({part: getattr(self, part).state_dict() for part in ("model", "objective", "optimiser")})

    def advance(self, epochs: range, total: int) -> list[dict[str, float]]:
        history = []
        for epoch in epochs:
            self.objective.on_epoch_start(epoch, self.infer)
            order = self.objective.sampler(epoch)
            for item in range(len(self.batches)) if order is None else order:
                losses = self.objective.losses(self.model, self.batches[item], epoch / total)
                self.optimiser.zero_grad()
                torch.stack(list(losses.values())).sum().backward()
                self.objective.after_backward()
                self.optimiser.step()
                self.objective.after_step()
                history.append({name: float(loss.detach()) for name, loss in losses.items()})
        return history

    def infer(self):
        for batch in self.batches:
            with torch.no_grad():
                yield batch, self.model(batch.bags if isinstance(batch, LabelledBags) else batch)


@every_tenant
def test_the_same_loop_trains_every_tenant(name):
    history = Run(TENANTS[name]).advance(range(40), 40)
    totals = [sum(losses.values()) for losses in history]
    assert sum(totals[-2:]) < 0.75 * sum(totals[:2]), (totals[:2], totals[-2:])


@every_tenant
def test_a_resumed_run_goes_on_as_if_never_stopped(name):
    run = Run(TENANTS[name])
    run.advance(range(3), 6)
    resumed = Run(TENANTS[name], seed=99, saved=run.state())  # fresh objects, other initial weights
    assert resumed.advance(range(3, 6), 6) == run.advance(range(3, 6), 6)


@every_tenant
def test_losses_are_named_finite_scalars_of_a_graph(name):
    run = Run(TENANTS[name])
    losses = run.objective.losses(run.model, run.batches[0], progress=0.0)
    assert losses
    for key, loss in losses.items():
        assert isinstance(key, str)
        assert loss.shape == () and loss.isfinite() and loss.requires_grad, key


@every_tenant
def test_no_parameter_is_optimised_twice_or_forgotten(name):
    run = Run(TENANTS[name])
    optimised = [id(parameter) for group in run.optimiser.param_groups for parameter in group["params"]]
    wanted = [*run.model.parameters(), *run.objective.parameters()]
    assert sorted(optimised) == sorted(id(parameter) for parameter in wanted if parameter.requires_grad)


class Recorded(nn.Module):
    """A model whose output is given."""

    def __init__(self, output: BagOutput) -> None:
        super().__init__()
        self.output = output

    def forward(self, bags: BagBatch) -> BagOutput:
        return self.output


def test_losses_of_one_name_add_up_and_none_is_lost():
    extra = [
        ExtraLogits(name, torch.full((1, 1), logit), torch.tensor([0])) for name, logit in (("bag", 1.0), ("x", 2.0), ("x", 3.0))
    ]
    output = BagOutput(torch.zeros(1, 1), extra_logits=tuple(extra), penalties={"x": torch.tensor(4.0)})
    batch = LabelledBags(BagBatch(torch.zeros(1, 2), torch.tensor([0, 1])), BINARY.encode(["yes"]))
    by_hand = torch.nn.functional.softplus(-torch.tensor([0.0, 1.0, 2.0, 3.0])).sum() + 4
    losses = SlideLabel(BINARY).losses(Recorded(output), batch, 0.0)
    torch.testing.assert_close(torch.stack(list(losses.values())).sum(), by_hand)


# CLAM


def test_instance_loss_takes_the_ends_of_the_true_class_attention():
    tiles = torch.zeros(6, 2)
    attention = torch.tensor([[5.0, 0.0], [1.0, 9.0], [2.0, 1.0], [0.0, 8.0], [3.0, 2.0], [4.0, 3.0]])
    tiles[[1, 3]], tiles[[0, 2]] = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])  # by the second column
    task = Task("multiclass", ("a", "b"))
    objective = ClamInstances(SlideLabel(task), 2, k=2)
    with torch.no_grad():  # evidence is what points along the first axis
        objective.judges[1].weight.copy_(torch.tensor([[-20.0, 0.0], [20.0, 0.0]]))
        objective.judges[1].bias.zero_()
    output = BagOutput(torch.zeros(1, 2), attention_logits=attention, tile_embedding=tiles)
    bags = BagBatch(torch.zeros(6, 3), torch.tensor([0, 6]))
    right = objective.losses(Recorded(output), LabelledBags(bags, task.encode(["b"])), 0.0)
    assert right["tiles"] < 1e-6
    assert right["bag"] == pytest.approx(0.7 * torch.tensor(2.0).log().item())
    wrong_end = BagOutput(torch.zeros(1, 2), attention_logits=-attention, tile_embedding=tiles)
    assert objective.losses(Recorded(wrong_end), LabelledBags(bags, task.encode(["b"])), 0.0)["tiles"] > 1


def test_instance_loss_accepts_bags_smaller_than_k():
    task = BINARY
    objective, model = ClamInstances(SlideLabel(task), HIDDEN, k=8), ClamMB(DIM, 1)
    batch = LabelledBags(BagBatch(torch.randn(4, DIM), torch.tensor([0, 1, 4])), task.encode(["no", "yes"]))
    assert objective.losses(model, batch, 0.0)["tiles"].isfinite()


def test_instance_loss_of_a_model_without_attention_is_refused():
    batch = bags_with(PERCENT, 0)
    with pytest.raises(TypeError, match=r"ScoreThenPool gives no attention_logits"):
        ClamInstances(SlideLabel(BINARY), HIDDEN).losses(ScoreThenPool(DIM, 1, attend=False), batch, 0.0)


def test_instance_classifiers_are_the_objectives_own():
    run = Run(TENANTS["clam"])
    run.advance(range(1), 1)
    for judge in run.objective.judges:
        assert judge.weight.grad is not None
    assert not any("judges" in key for key in run.model.state_dict())


# Masked autoencoder


def test_the_share_of_hidden_patches_is_exact():
    for ratio, n_visible in ((0.75, 4), (0.5, 8), (0.6, 6)):
        keep, hidden = MaskedAutoencoder(24, ratio=ratio).hide(5)
        assert keep.shape == (5, n_visible)
        assert (hidden.sum(1) == 16 - n_visible).all()
        assert not hidden.gather(1, keep).any()


def test_other_patches_are_hidden_at_every_step_and_in_every_image():
    objective = MaskedAutoencoder(24)
    _, first = objective.hide(8)
    assert len(first.unique(dim=0)) > 1
    assert torch.equal(objective.hide(8)[1], first)  # asking changes nothing
    objective.after_step()
    assert not torch.equal(objective.hide(8)[1], first)


def test_visible_patches_have_no_part_in_the_loss():
    objective, images = MaskedAutoencoder(24), ramps(0)
    _, hidden = objective.hide(16)
    pixels = torch.randn(16, 16, 192, requires_grad=True)
    objective.reconstruction_loss(pixels, images, hidden).backward()
    assert pixels.grad is not None
    touched = pixels.grad.abs().amax(2) > 0
    assert torch.equal(touched, hidden)


def test_the_encoder_never_sees_a_hidden_patch():
    objective, model, images = MaskedAutoencoder(24), TinyViT(), ramps(0).requires_grad_()
    keep, hidden = objective.hide(16)
    model.encode_tokens(images, keep).square().sum().backward()
    seen = patches_of(images.grad, 8).abs().amax(2) > 0
    assert torch.equal(seen, ~hidden)


def test_patches_are_cut_row_by_row_without_loss():
    images = torch.arange(2 * 3 * 16 * 24.0).view(2, 3, 16, 24)
    patches = patches_of(images, 8)
    assert patches.shape == (2, 6, 192)
    assert torch.equal(patches[0, 1].view(3, 8, 8), images[0, :, :8, 8:16])
    back = nn.functional.fold(patches.transpose(1, 2), (16, 24), 8, stride=8)
    assert torch.equal(back, images)


def test_a_model_without_tokens_is_refused():
    assert isinstance(TinyViT(), EncodesTokens)
    with pytest.raises(TypeError, match="Linear has no encode_tokens"):
        MaskedAutoencoder(24).losses(nn.Linear(3, 3), ramps(0), 0.0)


def test_the_decoder_is_saved_with_the_objective_not_the_model():
    run = Run(TENANTS["masked autoencoder"])
    assert "to_pixels.weight" in run.objective.state_dict()
    assert set(run.model.state_dict()) == set(TinyViT().state_dict())


# Orthogonal LoRA


def lora_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def test_swapping_layers_changes_no_output_before_the_first_step():
    torch.manual_seed(0)
    model = ABMIL(DIM, 3, hidden=HIDDEN, attention=8).eval()
    bags = bags_with(TYPES, 0).bags
    before = model(bags).logits
    orthogonal_lora(TYPES).prepare(model)
    assert len(lora_layers(model)) == 3  # projection, V and U; w and the classifier are heads
    torch.testing.assert_close(model(bags).logits, before, rtol=0, atol=0)


def test_old_weights_stay_and_new_ones_keep_off_their_subspace():
    run = Run(TENANTS["orthogonal lora"])
    before = copy.deepcopy(run.model.state_dict())
    run.advance(range(5), 5)
    after = run.model.state_dict()
    frozen = {f"{name}.{key}" for name, layer in lora_layers(run.model).items() for key, _ in layer.named_buffers()}
    assert {key for key in after if torch.equal(after[key], before[key])} == frozen
    for layer in lora_layers(run.model).values():
        assert layer.up.abs().max() > 1e-3  # it learned
        assert (layer.output_space @ layer.up).abs().max() < 1e-6
        assert (layer.down @ layer.input_space).abs().max() < 1e-6


def test_gradients_are_projected_after_backward():
    run = Run(TENANTS["orthogonal lora"])
    losses = run.objective.losses(run.model, run.batches[0], 0.0)
    torch.stack(list(losses.values())).sum().backward()
    layers = lora_layers(run.model).values()
    assert max((layer.output_space @ layer.up.grad).abs().max() for layer in layers) > 1e-4
    run.objective.after_backward()
    for layer in layers:
        assert (layer.output_space @ layer.up.grad).abs().max() < 1e-6
        assert (layer.down.grad @ layer.input_space).abs().max() < 1e-6
        assert layer.up.grad.abs().max() > 0


def test_layers_of_the_model_are_not_the_objectives():
    run = Run(TENANTS["orthogonal lora"])
    assert not list(run.objective.parameters()) and not run.objective.state_dict()

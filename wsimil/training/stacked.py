"""Many folds and seeds of one aggregator as one program: every model sees the same packed bags, each with its own slides counted.

- A slide that is not in a model's fold has weight zero in its loss: the gradient of what it does not count is exactly zero. Only
  models whose whole loss is a sum over slides are stacked: `STACKABLE`.
- Clipping, the best epoch, patience and Adam's moments are each model's own; a model without a slide in a step does not move.
- All walk through the slides in one order, that of the first seed; seeds differ by initial weights and dropout.
- Features are shifted and scaled once, by what the models have on average, and what is left of each model's own shift and scale is
  folded into its first layer: no copy of the features per model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from wsimil.aggregators import Standardized
from wsimil.aggregators.first_layer import less
from wsimil.aggregators.packed import recomputing
from wsimil.batch import BagBatch
from wsimil.config import TrainConfig
from wsimil.errors import UsageError
from wsimil.files import atomic_path
from wsimil.task import Task
from wsimil.training.items import LabelledSlides, Steps, TileStore, piece_tiles
from wsimil.training.loop import Fitted, learning_rate, read_checkpoint, resolve_precision

__all__ = ["STACKABLE", "Member", "fit_stacked", "unstackable"]

STACKABLE = {
    "abmil": "project.0",
    "gated_abmil": "project.0",
    "mean_pool": "project.0",
    "max_pool": "project.0",
    "topk_pool": "project.0",
    "lse_pool": "project.0",
}
"""Aggregator → its one layer that reads the features."""

_EPS = 1e-8  # torch's AdamW


@dataclass(frozen=True)
class Member:
    """One of the models: where it starts, and its slides with what they say to it."""

    model: Standardized
    task: Task
    ids: dict[str, list[str]]  # by side: train, val
    targets: dict[str, Tensor]
    weights: dict[str, Tensor | None]


def unstackable(config: TrainConfig, tasks: Sequence[Task]) -> str | None:
    """Why models with these settings cannot be stacked; None if they can."""
    if config.aggregator not in STACKABLE:
        return f"{config.aggregator} is none of {', '.join(STACKABLE)}"
    if config.objective not in ("auto", "slide_label"):
        return f"objective {config.objective} is not the slides' labels alone"
    if config.optimizer != "adamw" or config.objective_options or config.keep_epochs:
        return "optimizer, objective_options or keep_epochs are set"
    if config.soup:
        return "soup is set, whose short trainings are each by itself"
    if config.sampling != "shuffle":
        return f"sampling {config.sampling} orders the slides of each fold by itself"
    if any(task.compares_slides for task in tasks):
        return f"the loss {tasks[0].criterion} compares slides with each other"
    if len({replace(task, center=0.0, scale=1.0) for task in tasks}) > 1:
        return f"the folds of this {tasks[0].kind} task have losses of their own"
    return None


def fit_stacked(
    members: Sequence[Member],
    store: TileStore,
    config: TrainConfig,
    *,
    device: str = "cpu",
    checkpoint: Path | None = None,
    key: str = "",
) -> list[Fitted]:
    """Train all members together; what came out for each.

    Args:
        members: models of one architecture and one task, but for the scale of its targets.
        store: features of their slides.
        config: of all of them; its seed orders the slides.
        checkpoint: where the state is kept while training, to go on after a kill.
        key: what that state must be of.
    """
    ids = {side: sorted({name for member in members for name in member.ids[side]}) for side in ("train", "val")}
    slides = {
        "train": LabelledSlides(
            store,
            ids["train"],
            torch.arange(len(ids["train"])),  # a slide's place; the targets are each model's own
            tiles_per_bag=config.tiles_per_bag,
            instance_dropout=config.instance_dropout,
            seed=config.seed,
        ),
        "val": LabelledSlides(store, ids["val"], torch.arange(len(ids["val"]))),
    }
    # of the slides of a step, a model counts on average as many as it would have alone
    wider = len(ids["train"]) * len(members) / sum(len(member.ids["train"]) for member in members)
    limit = max(1, piece_tiles(device) // len(members))
    on_gpu = device != "cpu"
    steps = Steps(
        slides["train"],
        bags_per_step=max(1, round(config.bags_per_step * wider)),
        tiles_per_step=round(config.tiles_per_step * wider),
        limit=limit,
        shuffle_seed=config.seed,
        on_gpu=on_gpu,
    )
    stack = _Stack(members, ids, config, device)
    total_steps, step = sum(len(steps.plan(epoch)) for epoch in range(config.epochs)), 0
    first, saved = 0, -math.inf
    if checkpoint is not None and checkpoint.exists():
        first, step = stack.load(checkpoint, key)
    for epoch in range(first, config.epochs):
        steps.set_epoch(epoch)
        for pieces in steps:
            pieces = [(piece.bags.to(device), piece.targets.to(device)) for piece in pieces]
            stack.step(pieces, learning_rate(config, step, total_steps))
            step += 1
        stack.validate(Steps(slides["val"], bags_per_step=config.bags_per_step, limit=limit, on_gpu=on_gpu), epoch)
        done = epoch + 1 == config.epochs or not stack.running.any()
        if checkpoint is not None and (done or time.monotonic() - saved > 5):
            stack.save(checkpoint, key, config.epochs if done else epoch + 1, step)
            saved = time.monotonic()
        if done:
            break
    return stack.fitted()


class _Stack:
    """The models, their optimiser and their books; a leading axis M everywhere."""

    def __init__(self, members: Sequence[Member], ids: dict[str, list[str]], config: TrainConfig, device: str) -> None:
        self.members, self.config, self.device = members, config, device
        self.precision = resolve_precision(config.precision, device)
        self.inner, self.task, self.first = members[0].model.inner, members[0].task, STACKABLE[config.aggregator]
        params, buffers = stack_module_state([member.model.inner for member in members])
        self.inner = self.inner.to(device)
        self.params = {name: value.detach().to(device).requires_grad_() for name, value in params.items()}
        self.buffers = {name: value.to(device) for name, value in buffers.items()}
        self.moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in self.params.items()}
        n = len(members)
        self.n_steps = torch.zeros(n, device=device, dtype=torch.float64)  # that each model took part in
        self.running = torch.ones(n, dtype=torch.bool, device=device)
        self.best = {name: value.detach().clone() for name, value in self.params.items()}
        self.best_loss = torch.full((n,), math.inf, device=device, dtype=torch.float64)
        self.best_epoch = torch.full((n,), -1, device=device)
        self.history: list[list[dict[str, float]]] = [[] for _ in members]
        self._losses: list[tuple[Tensor, Tensor]] = []  # of the steps of an epoch: (M,) loss, (M,) whether it took part
        self.targets = {side: _table(members, ids[side], side, "targets").to(device) for side in ids}  # (M, slides, …)
        self.counts = {side: _table(members, ids[side], side, "weights").to(device) for side in ids}  # (M, slides), 0: not its own
        self.mine = {side: _membership(members, ids[side], side).to(device) for side in ids}  # (M, slides) bool
        self._shift_and_scale(device)

    def _shift_and_scale(self, device: str) -> None:
        means = torch.stack([member.model.mean for member in self.members]).to(device)  # (M, D)
        scales = 1 / torch.stack([member.model.deviation for member in self.members]).to(device)  # of what never varies: 0
        self.shared_mean = means.mean(0)
        varies = (scales > 0).sum(0)
        self.shared_scale = torch.where(varies > 0, scales.sum(0) / varies.clamp(min=1), 1.0)
        self.mean = (means - self.shared_mean) * self.shared_scale
        self.scale = scales / self.shared_scale

    def _row_losses(self, bags: BagBatch, places: Tensor, side: str) -> Tensor:
        """(M, B): what each bag costs each model, weighted; zero where it is not the model's."""
        bags = replace(bags, features=less(bags.features, self.shared_mean).mul_(self.shared_scale))

        def one(params: dict[str, Tensor], buffers: dict[str, Tensor], mean: Tensor, scale: Tensor, targets: Tensor) -> Tensor:
            weight = params[f"{self.first}.weight"] * scale
            bias = params[f"{self.first}.bias"] - weight @ mean
            changed = {**params, f"{self.first}.weight": weight, f"{self.first}.bias": bias}
            logits = functional_call(self.inner, (changed, buffers), (bags,)).logits
            return self.task.row_losses(logits, targets)

        # what is computed again is computed outside of vmap, where the stacked weights are none
        precision = torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16")
        with precision, recomputing(None):
            each = vmap(one, randomness="different")(
                self.params, self.buffers, self.mean, self.scale, self.targets[side][:, places]
            )
        return each * self.counts[side][:, places]

    def step(self, pieces: Sequence[tuple[BagBatch, Tensor]], lr: float) -> None:
        self.inner.train()
        places = torch.cat([places for _, places in pieces])
        mine = self.mine["train"][:, places].sum(1)  # (M,) slides of the step that are the model's
        loss = torch.zeros_like(self.best_loss)
        for bags, inside in pieces:
            each = self._row_losses(bags, inside, "train").sum(1) / mine.clamp(min=1)  # (M,)
            each.sum().backward()
            loss += each.detach()
        active = self.running & (mine > 0)
        self._losses.append((loss, active))
        self._update(active, lr)

    @torch.no_grad()
    def _update(self, active: Tensor, lr: float) -> None:
        """AdamW, of each active model as if it were alone."""
        gradients = {name: value.grad for name, value in self.params.items() if value.grad is not None}
        if self.config.clip_norm:
            norm = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients.values()]).sum(0).sqrt()
            shorten = (self.config.clip_norm / (norm + 1e-6)).clamp(max=1)
            for gradient in gradients.values():
                gradient.mul_(_like(shorten, gradient))
        self.n_steps += active
        taken = self.n_steps.clamp(min=1)
        fast, slow = self.config.betas
        for name, gradient in gradients.items():
            value, (first, second) = self.params[name], self.moments[name]
            moves, one, two = (_like(part, value) for part in (active, 1 - fast**taken, 1 - slow**taken))
            first.copy_(torch.where(moves, first.lerp(gradient, 1 - fast), first))
            second.copy_(torch.where(moves, second * slow + (1 - slow) * gradient.square(), second))
            length = (second / two.to(second.dtype)).sqrt_().add_(_EPS)
            moved = value * (1 - lr * self.config.weight_decay) - lr * (first / one.to(first.dtype)) / length
            value.copy_(torch.where(moves, moved, value))
            gradient.zero_()

    @torch.no_grad()
    def validate(self, steps: Steps, epoch: int) -> None:
        self.inner.eval()
        total = torch.zeros_like(self.best_loss)
        for pieces in steps:
            for piece in pieces:
                total += self._row_losses(piece.bags.to(self.device), piece.targets.to(self.device), "val").sum(1)
        loss = total / self.mine["val"].sum(1)
        if not loss[self.running].isfinite().all():
            raise UsageError(f"validation loss is {float(loss[self.running].sum())} in epoch {epoch}; lower --lr")
        better = self.running & ((loss < self.best_loss) | (self.config.select == "last"))
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_epoch[better] = epoch
        for name, value in self.params.items():
            self.best[name][better] = value.detach()[better]
        taken = torch.stack([active for _, active in self._losses]).double()  # (steps, M)
        trained = (torch.stack([loss for loss, _ in self._losses]) * taken).sum(0) / taken.sum(0).clamp(min=1)
        self._losses = []
        for index in self.running.nonzero()[:, 0].tolist():
            self.history[index].append({"epoch": epoch, "train_loss": float(trained[index]), "val_loss": float(loss[index])})
        self.running &= epoch - self.best_epoch < self.config.patience

    def fitted(self) -> list[Fitted]:
        found = []
        for index, member in enumerate(self.members):
            state = {f"inner.{name}": value[index].detach().cpu().clone() for name, value in (self.best | self.buffers).items()}
            state |= {"mean": member.model.mean.cpu(), "deviation": member.model.deviation.cpu()}
            found.append(Fitted(state, int(self.best_epoch[index]), self.history[index]))
        return found

    # going on after a kill

    def _state(self) -> dict[str, Any]:
        return {
            "params": {name: value.detach() for name, value in self.params.items()},
            "moments": {name: list(pair) for name, pair in self.moments.items()},
            "best": self.best,
            "books": {name: getattr(self, name) for name in ("n_steps", "running", "best_loss", "best_epoch")},
        }

    def save(self, path: Path, key: str, epoch: int, step: int) -> None:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.startswith("cuda") else []
        more = {"key": key, "epoch": epoch, "step": step, "history": self.history, "rng": torch.get_rng_state(), "cuda": cuda}
        with atomic_path(path) as temporary:
            torch.save(self._state() | more, temporary)

    def load(self, path: Path, key: str) -> tuple[int, int]:
        """Epoch and step to go on from; (0, 0) if what is there is of other models."""
        kept = read_checkpoint(path, self.device)
        if kept["key"] != key:
            return 0, 0
        for part, value in kept["books"].items():
            setattr(self, part, value)
        self.best, self.history = kept["best"], kept["history"]
        self.moments = {name: (first, second) for name, (first, second) in kept["moments"].items()}
        with torch.no_grad():
            for name, value in self.params.items():
                value.copy_(kept["params"][name])
        torch.set_rng_state(kept["rng"].cpu())
        for state in kept["cuda"]:
            torch.cuda.set_rng_state(state.cpu(), self.device)
        return kept["epoch"], kept["step"]


def _like(per_model: Tensor, value: Tensor) -> Tensor:
    """(M,) → (M, 1, …) beside a stacked parameter."""
    return per_model.view(-1, *[1] * (value.ndim - 1))


def _membership(members: Sequence[Member], ids: Sequence[str], side: str) -> Tensor:
    return torch.tensor([[name in own for name in ids] for own in (set(member.ids[side]) for member in members)])


def _table(members: Sequence[Member], ids: Sequence[str], side: str, part: str) -> Tensor:
    """(M, slides, …) of each member's targets or weights, in the order of `ids`; zero where a slide is not its own."""
    rows = []
    for member in members:
        values = getattr(member, part)[side]
        values = torch.ones(len(member.ids[side])) if values is None else values
        places = torch.tensor([ids.index(name) for name in member.ids[side]])
        rows.append(values.new_zeros(len(ids), *values.shape[1:]).index_copy(0, places, values))
    return torch.stack(rows)

"""The loop: one optimiser step after the other, as functions of the number of the step alone.

- It knows a model, an objective and schedules. Slides, tiles, views and files are other modules' business.
- A run is counted in steps, not in epochs: learning rate and weight decay are functions of step / total, and the state to go on
  from is one integer beside the weights. Random numbers of a step are seeded by (seed, step, part, rank): none need saving.
- Model and objective are one module for the devices (`_Step`): the gradients of a projection head are shared like the backbone's,
  and a teacher, which asks for no gradient, stays out of it. What an objective counts over a batch it sums over devices itself.
- Lightning's Fabric does precision, scaling of gradients and devices; the steps themselves stand here to be read
  (docs/decisions/0012-pretraining-has-its-own-loop.md).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wsimil.batch import Objective

__all__ = ["Loop", "Record", "Schedule", "seed_of"]


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay at a step of a run of `total`."""

    total: int
    lr: float
    min_lr: float = 0.0
    warm_up: float = 0.0  # share of the run
    weight_decay: tuple[float, ...] = (0.0, 0.0)  # at the first and the last step

    @property
    def warm_up_steps(self) -> int:
        return round(self.warm_up * self.total)

    def lr_at(self, step: int) -> float:
        """Linear up to `lr` at the end of the warm-up, then half a cosine down to `min_lr` at the last step."""
        if step < self.warm_up_steps:
            return self.lr * (step + 1) / self.warm_up_steps
        return _half_cosine(self.lr, self.min_lr, (step - self.warm_up_steps) / max(1, self.total - 1 - self.warm_up_steps))

    def weight_decay_at(self, step: int) -> float:
        return _half_cosine(self.weight_decay[0], self.weight_decay[1], step / max(1, self.total - 1))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def seed_of(*parts: object) -> int:
    """A seed that is a function of these parts and of nothing else, the process least of all."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class Record:
    """What a step came to. Tensors stay on the device: asking for a number makes a GPU wait."""

    step: int  # counted from 0
    losses: dict[str, Tensor]
    loss: Tensor  # their sum
    grad_norm: Tensor
    lr: float
    weight_decay: float


class _Sealed:
    """What passes through Fabric and DDP untouched: they would cast the pixels to the precision of the products."""

    def __init__(self, content: Any) -> None:
        self.content = content


class _Step(nn.Module):
    """Model and objective as one module, whose output is the losses."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, views: _Sealed, progress: float) -> dict[str, Tensor]:
        return self.objective.losses(self.model, views.content, progress)


class Loop:
    """Minimises an objective over a model, step by step.

    Args:
        fabric: a launched `lightning.Fabric`.
        model, objective: `objective.prepare(model)` has been called.
        groups: parameter groups for AdamW; `lr_scale` multiplies the learning rate of a group, `decays` says whether weight decay
            is meant for it.
        clip_norm: gradients longer than this are shortened to it; 0: none.
        seed: of everything random inside a step (drop path, masks).

    Attributes:
        step: steps done.
    """

    def __init__(
        self,
        fabric: Any,
        model: nn.Module,
        objective: Objective,
        groups: Sequence[dict[str, Any]],
        schedule: Schedule,
        *,
        clip_norm: float = 0.0,
        beta2: float = 0.999,
        seed: int = 0,
    ) -> None:
        self.fabric, self.model, self.objective, self.schedule = fabric, model, objective, schedule
        self.clip_norm, self.seed, self.step = clip_norm, seed, 0
        # fused steps undo the scaling of fp16 by themselves, after the clipping that has to come in between
        fused = fabric.device.type in ("cpu", "cuda") and getattr(fabric.strategy.precision, "scaler", None) is None
        optimizer = torch.optim.AdamW(list(groups), lr=schedule.lr, betas=(0.9, beta2), weight_decay=0.0, fused=fused)
        self._adamw = optimizer
        self._module, self._optimizer = fabric.setup(_Step(model, objective), optimizer)
        self._module.train()

    @property
    def progress(self) -> float:
        return self.step / self.schedule.total

    def advance(self, parts: Sequence[Any], to_views: Callable[[Any], Any]) -> Record:
        """One step from the parts of its batch, whose gradients add up; `to_views` makes of a part what the objective sees."""
        lr, weight_decay = self.schedule.lr_at(self.step), self.schedule.weight_decay_at(self.step)
        for group in self._adamw.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            group["weight_decay"] = weight_decay if group.get("decays", True) else 0.0
        self._optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            torch.manual_seed(seed_of(self.seed, self.step, number, self.fabric.global_rank))
            views = to_views(part)
            with self.fabric.no_backward_sync(self._module, enabled=number + 1 < len(parts)):
                losses = self._module(_Sealed(views), self.progress)
                self.fabric.backward(torch.stack(list(losses.values())).sum() / len(parts))
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach() / len(parts)
        self.objective.after_backward()
        norm = self.fabric.clip_gradients(
            self._module, self._optimizer, max_norm=self.clip_norm or math.inf, error_if_nonfinite=False
        )
        self._optimizer.step()
        self.objective.after_step()
        record = Record(self.step, sums, torch.stack(list(sums.values())).sum(), norm, lr, weight_decay)
        self.step += 1
        return record

    def kept_model(self) -> nn.Module:
        """The network that is exported: the teacher where there is one."""
        return self.objective.kept_model(self.model)

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on, beside the data."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self._adamw.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        self._adamw.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.step = int(state["step"])

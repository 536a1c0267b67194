"""The loop: minimise an objective over a model, keep the epoch with the least validation loss, resume after a kill.

- It knows models, objectives and batches by their contract alone: encoders are trained by the same loop.
- A step may come in pieces; their gradients add up to the step's before the optimiser moves.
- Matrices are multiplied in bfloat16 where the device is built for it; weights, sums and the optimiser stay in float32.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from wsimil.batch import LabelledBags, Objective
from wsimil.config import TrainConfig
from wsimil.errors import UsageError
from wsimil.files import atomic_path
from wsimil.training.dropout import quicken_dropout
from wsimil.training.items import LabelledSlides, Steps, piece_tiles

__all__ = ["Fitted", "Loop", "cosine_factor", "fit", "resolve_precision"]


def resolve_precision(precision: str, device: str) -> str:
    """`auto` is bf16 on a device with instructions for it, fp32 elsewhere: emulated, bf16 is slower than fp32."""
    if precision != "auto":
        return precision
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if device == "cpu" and (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")) else "fp32"


def cosine_factor(step: int, total_steps: int) -> float:
    """Share of the learning rate at a step: a twentieth of linear warm-up, then half a cosine to zero."""
    warm_up = max(1, total_steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, total_steps - warm_up))))


class Loop(lightning.LightningModule):
    """Minimises an objective over a model; keeps the weights of the epoch with the least validation loss.

    Nothing here knows what a bag is: encoders are trained by the same loop.

    Args:
        model: what is trained.
        objective: what is minimised.
        lr, weight_decay: of AdamW.
        total_steps: length of the cosine from `lr` to zero, after a twentieth of linear warm-up.
        patience: epochs without a better validation loss after which to stop.
        select: "val_loss" keeps the epoch with the least, "last" the last; then there is no patience.
        clip_norm: gradients longer than this are shortened to it; 0: none.
        precision: "fp32" or "bf16", of matrix products.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        lr: float,
        weight_decay: float,
        total_steps: int,
        patience: int,
        select: str = "val_loss",
        clip_norm: float = 0.0,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # a step has several backward passes, one per piece
        self.model, self.objective = model, objective
        self.lr, self.weight_decay = lr, weight_decay
        self.total_steps, self.patience = total_steps, patience
        self.select, self.clip_norm, self.precision = select, clip_norm, precision
        self.history: list[dict[str, float]] = []
        self.best_state: dict[str, Tensor] = {}
        self.best_epoch = -1
        self._train_losses: list[Tensor] = []
        self._val_losses: list[tuple[Tensor, int]] = []
        objective.prepare(model)

    def configure_optimizers(self) -> Any:
        groups = self.objective.param_groups(self.model)
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_factor(step, self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def progress(self) -> float:
        return min(1.0, self.global_step / self.total_steps)

    def on_train_epoch_start(self) -> None:
        self.objective.on_epoch_start(self.current_epoch, self._infer)

    @torch.no_grad()
    def _infer(self) -> Iterator[tuple[Any, Any]]:
        """Every training batch and what the model, as it is, says of it."""
        self.model.eval()
        for batch in self.trainer.train_dataloader or ():
            for piece in _pieces(self.transfer_batch_to_device(batch, self.device, 0)):
                yield piece, self.model(piece.bags if isinstance(piece, LabelledBags) else piece)
        self.model.train()

    def _loss(self, piece: Any) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            losses = self.objective.losses(self.model, piece, self.progress)
        return torch.stack(list(losses.values())).sum()

    def training_step(self, batch: Any, batch_index: int) -> None:
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        optimizer.zero_grad()
        n_items, step_loss = sum(map(_items, _pieces(batch))), torch.zeros((), device=self.device)
        for piece in _pieces(batch):
            loss = self._loss(piece) * (_items(piece) / n_items)
            self.manual_backward(loss)
            step_loss += loss.detach()
        self._train_losses.append(step_loss)
        self.objective.after_backward()
        if self.clip_norm:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        optimizer.step()
        schedule.step()
        self.objective.after_step()

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self._val_losses += [(self._loss(piece), _items(piece)) for piece in _pieces(batch)]

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            self._val_losses.clear()
            return
        items = sum(count for _, count in self._val_losses)
        # read off the device once an epoch: asking after every step would make a GPU wait
        val_loss = sum(float(loss) * count for loss, count in self._val_losses) / max(1, items)
        train_loss = sum(map(float, self._train_losses)) / max(1, len(self._train_losses))
        self._val_losses, self._train_losses = [], []
        if not math.isfinite(val_loss):
            raise UsageError(f"validation loss is {val_loss} in epoch {self.current_epoch}; lower --lr")
        best = min((row["val_loss"] for row in self.history), default=math.inf)
        if val_loss < best or self.select == "last":
            self.best_epoch = self.current_epoch
            kept = self.objective.kept_model(self.model).state_dict()
            self.best_state = {name: value.detach().cpu().clone() for name, value in kept.items()}
        self.history.append({"epoch": self.current_epoch, "train_loss": train_loss, "val_loss": val_loss})
        if self.current_epoch - self.best_epoch >= self.patience:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["wsimil"] = {
            "history": self.history,
            "best_state": self.best_state,
            "best_epoch": self.best_epoch,
            "rng": torch.get_rng_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["wsimil"]
        self.history, self.best_state, self.best_epoch = kept["history"], kept["best_state"], kept["best_epoch"]
        torch.set_rng_state(kept["rng"])


def _pieces(batch: Any) -> Sequence[Any]:
    return batch if isinstance(batch, tuple) else (batch,)


def _items(batch: Any) -> int:
    return len(batch.bags) if isinstance(batch, LabelledBags) else len(batch)


@dataclass(frozen=True)
class Fitted:
    """What came out of training: weights of the best epoch, on the CPU, and the losses of every epoch."""

    best_state: dict[str, Tensor]
    best_epoch: int
    history: list[dict[str, float]]


class _LastCheckpoint(lightning.Callback):
    """The whole state after the first epoch and then every few seconds, atomically: a kill leaves a file that resumes."""

    def __init__(self, path: Path, *, every_seconds: float = 5.0) -> None:
        self.path, self.every_seconds, self.last = path, every_seconds, -math.inf

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if time.monotonic() - self.last < self.every_seconds:
            return  # syncing a file to the disk costs more than an epoch over a small cohort
        with atomic_path(self.path) as temporary:
            trainer.save_checkpoint(temporary)
        self.last = time.monotonic()


def fit(
    run: Path,
    model: nn.Module,
    objective: Objective,
    train: LabelledSlides,
    val: LabelledSlides,
    config: TrainConfig,
    *,
    device: str = "cpu",
) -> Fitted:
    """Train in a run folder, going on from its `last.ckpt` if there is one."""
    limit = piece_tiles(device) if objective.per_bag else None
    steps = Steps(
        train,
        bags_per_step=config.bags_per_step,
        tiles_per_step=config.tiles_per_step,
        limit=limit,
        shuffle_seed=config.seed,
        order=objective.sampler,
    )
    # an objective that is a mean over something else than bags (events) is added up bag by bag
    val_bags = config.bags_per_step if objective.per_bag else 1
    loop = Loop(
        model,
        objective,
        lr=config.lr,
        weight_decay=config.weight_decay,
        total_steps=sum(len(steps.plan(epoch)) for epoch in range(config.epochs)),
        patience=config.patience,
        select=config.select,
        clip_norm=config.clip_norm,
        precision=resolve_precision(config.precision, device),
    )
    if device == "cpu":
        quicken_dropout(model)
    last = run / "last.ckpt"
    if last.exists():  # Lightning draws the first step before it tells the loader which epoch it is
        steps.set_epoch(len(torch.load(last, map_location="cpu", weights_only=True)["wsimil"]["history"]))
    with _quiet_lightning():
        trainer = lightning.Trainer(
            max_epochs=config.epochs,
            accelerator=device.split(":")[0],
            devices=[int(device.split(":")[1])] if ":" in device else 1,
            default_root_dir=run,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[_LastCheckpoint(last)],
        )
        trainer.fit(
            loop,
            steps,
            Steps(val, bags_per_step=val_bags, limit=limit),
            ckpt_path=str(last) if last.exists() else None,
            weights_only=True,
        )
    return Fitted(loop.best_state, loop.best_epoch, loop.history)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's remarks about hardware and loaders are not about this loop."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric", "pytorch.utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", message=".*(does not have many workers|number of training batches).*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

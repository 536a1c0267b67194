"""The loop: minimise an objective over a model, keep the epoch with the least validation loss, resume after a kill.

- It knows models, objectives and batches by their contract alone: encoders are trained by the same loop.
- A step may come in pieces, and be shared by several processes; the gradients add up to the step's before the optimiser moves.
- Matrices are multiplied in bfloat16 where the device is built for it; weights, sums and the optimiser stay in float32.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wsimil.aggregators.fused import sharing_rows
from wsimil.batch import LabelledBags, Objective
from wsimil.config import TrainConfig
from wsimil.errors import UsageError
from wsimil.files import atomic_path, hash_of
from wsimil.training.dropout import quicken_dropout
from wsimil.training.items import LabelledSlides, Steps, piece_tiles
from wsimil.training.ranks import ALONE, Ranks

__all__ = ["EPOCHS", "Fitted", "Loop", "fit", "learning_rate", "read_checkpoint", "resolve_precision"]


EPOCHS = "epochs"
"""Folder with the weights of every epoch, where they are kept."""

_JUDGED = "bag"
"""What the validation loss is of; a training that began with another one begins anew."""


def resolve_precision(precision: str, device: str) -> str:
    """`auto` is bf16 on a device with instructions for it, fp32 elsewhere: emulated, bf16 is slower than fp32."""
    if precision != "auto":
        return precision
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if device == "cpu" and (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")) else "fp32"


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """At a step: linear warm-up, then half a cosine from `lr` to `min_lr`."""
    warm_up = max(1, int(config.warm_up * total_steps)) if config.warm_up else 0
    if step < warm_up:
        return config.lr * (step + 1) / warm_up
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, total_steps - warm_up))))
    return config.min_lr + (config.lr - config.min_lr) * share


class Loop(lightning.LightningModule):
    """Minimises an objective over a model; keeps the weights of the epoch with the least validation loss.

    Nothing here knows what a bag is: encoders are trained by the same loop.

    Args:
        model: what is trained.
        objective: what is minimised.
        config: optimiser and schedule, `select` and `patience`, `clip_norm`.
        total_steps: length of the schedule.
        precision: "fp32" or "bf16", of matrix products.
        ranks: who share its steps.
        keep: folder for the weights of every epoch, `<epoch>.safetensors`; None: only the best are kept.
        key: of the run, written into its checkpoints.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: TrainConfig,
        *,
        total_steps: int,
        precision: str = "fp32",
        ranks: Ranks = ALONE,
        keep: Path | None = None,
        key: str = "",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # a step has several backward passes, one per piece
        self.model, self.objective, self.config = model, objective, config
        self.total_steps, self.precision, self.keep, self.key = total_steps, precision, keep, key
        self.ranks, self.seed = ranks, torch.initial_seed()
        self.history: list[dict[str, float]] = []
        self.best_state: dict[str, Tensor] = {}
        self.best_epoch = -1
        self._train_losses: list[Tensor] = []
        self._val_losses: list[tuple[Tensor, int]] = []
        self._coins: list[Tensor] = []  # of a GPU, where a run goes on
        objective.prepare(model)

    def configure_optimizers(self) -> Any:
        groups = self.objective.param_groups(self.model)
        fused = self.device.type in ("cpu", "cuda")
        config, kind = self.config, torch.optim.AdamW if self.config.optimizer == "adamw" else torch.optim.Adam
        one, two = config.betas
        optimizer = kind(groups, lr=config.lr, betas=(one, two), weight_decay=config.weight_decay, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(config, step, self.total_steps) / config.lr
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def progress(self) -> float:
        return min(1.0, self.global_step / self.total_steps)

    def on_train_start(self) -> None:
        for state in self._coins if self.device.type == "cuda" else []:  # dropout on a GPU is tossed there
            torch.cuda.set_rng_state(state.cpu(), self.device)
        self.ranks.begin_alike([*self.parameters(), *self.buffers()])

    def on_train_epoch_start(self) -> None:
        if self.ranks.count > 1:  # coins of their own for the ranks, and the same again in a run that goes on
            torch.manual_seed(int(hash_of([self.seed, self.current_epoch, self.ranks.rank])[:8], 16))
        self.objective.on_epoch_start(self.current_epoch, lambda: self._infer(self.model))

    def on_validation_epoch_start(self) -> None:
        self.objective.on_validation_start(lambda: self._infer(self.objective.kept_model(self.model)))

    @torch.no_grad()
    def _infer(self, model: nn.Module) -> Iterator[tuple[Any, Any]]:
        """Every training item, in batches, and what a model says of them in eval mode."""
        was_training = model.training
        model.eval()
        try:
            steps: Any = self.trainer.train_dataloader or ()
            for batch in steps.every() if isinstance(steps, Steps) else steps:
                for piece in _pieces(self.transfer_batch_to_device(batch, self.device, 0)):
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                        output = model(piece.bags if isinstance(piece, LabelledBags) else piece)
                    yield piece, output
        finally:
            model.train(was_training)

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
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._train_losses.append(self.ranks.combine(parameters, step_loss, n_items))
        self.objective.after_backward()
        if self.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
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
        val_loss = self.ranks.mean(sum(float(loss) * count for loss, count in self._val_losses), items, self.device)
        train_loss = sum(map(float, self._train_losses)) / max(1, len(self._train_losses))
        self._val_losses, self._train_losses = [], []
        if not math.isfinite(val_loss):
            raise UsageError(f"validation loss is {val_loss} in epoch {self.current_epoch}; lower --lr")
        best = min((row["val_loss"] for row in self.history), default=math.inf)
        better = val_loss < best or self.config.select == "last"
        if better or self.keep is not None:
            kept = self.objective.kept_model(self.model).state_dict()
            state = {name: value.detach().cpu().clone() for name, value in kept.items()}
            if better:
                self.best_epoch, self.best_state = self.current_epoch, state
            if self.keep is not None:
                with atomic_path(self.keep / f"{self.current_epoch}.safetensors") as temporary:
                    save_file(state, temporary)
        self.history.append({"epoch": self.current_epoch, "train_loss": train_loss, "val_loss": val_loss})
        if _has_patience_ended(self.current_epoch, self.best_epoch, self.config):
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["wsimil"] = {
            "key": self.key,
            "judged": _JUDGED,
            "history": self.history,
            "best_state": self.best_state,
            "best_epoch": self.best_epoch,
            "rng": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["wsimil"]
        self.history, self.best_state, self.best_epoch = kept["history"], kept["best_state"], kept["best_epoch"]
        torch.set_rng_state(kept["rng"])
        self._coins = kept.get("cuda", [])  # Lightning calls this before it moves the model, and with it `self.device`


def _has_patience_ended(epoch: float, best_epoch: int, config: TrainConfig) -> bool:
    return epoch - best_epoch >= config.patience


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


def read_checkpoint(path: Path, device: str = "cpu") -> dict[str, Any]:
    """The state of a training. Raises UsageError: it cannot be read."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # of many kinds; a kill leaves no such file, a disk may
        why = str(error).partition("\n")[0]
        raise UsageError(f"{path}: damaged ({why}); delete it to train from the start") from error


def fit(
    run: Path,
    model: nn.Module,
    objective: Objective,
    train: LabelledSlides,
    val: LabelledSlides,
    config: TrainConfig,
    *,
    device: str = "cpu",
    ranks: Ranks = ALONE,
    key: str = "",
    epochs: int | None = None,
) -> Fitted:
    """Train in a run folder, going on from its `last.ckpt` if there is one of this key. Of several ranks the first writes there.

    With `epochs` it stops after so many of those that the settings plan, with the learning rate as planned for all.

    Raises:
        UsageError: a `last.ckpt` that cannot be read.
        KeyboardInterrupt: stopped; the same call goes on.
    """
    shares_rows = device == "cpu" and getattr(model, "shares_rows", False)
    limit = piece_tiles(device) * (8 if shares_rows else 1) if objective.per_bag else None  # what it keeps of a tile is little
    steps = Steps(
        train,
        bags_per_step=config.bags_per_step,
        tiles_per_step=config.tiles_per_step,
        limit=limit,
        shuffle_seed=config.seed,
        order=objective.sampler,
        ranks=ranks,
        on_gpu=device != "cpu",
    )
    # an objective that is a mean over something else than bags (events) is added up bag by bag
    val_bags = config.bags_per_step if objective.per_bag else 1
    loop = Loop(
        model,
        objective,
        config,
        total_steps=sum(len(steps.plan(epoch)) for epoch in range(config.epochs)),
        precision=resolve_precision(config.precision, device),
        ranks=ranks,
        keep=run / EPOCHS if config.keep_epochs and ranks.rank == 0 else None,
        key=key,
    )
    if device == "cpu":
        quicken_dropout(model)
    elif device.startswith("cuda"):
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new length, and every bag has its own
    epochs = epochs or config.epochs
    last = run / "last.ckpt"
    kept = read_checkpoint(last)["wsimil"] if last.exists() else {}
    resumed = kept.get("key") == key and kept.get("judged") == _JUDGED
    if resumed:
        before = Fitted(kept["best_state"], kept["best_epoch"], kept["history"])
        if len(before.history) >= epochs or _has_patience_ended(before.history[-1]["epoch"], before.best_epoch, config):
            return before  # Lightning knows that only after another epoch, which could be a better one
        steps.set_epoch(len(before.history))  # Lightning draws the first step before it tells the loader which epoch it is
    elif loop.keep is not None:
        shutil.rmtree(loop.keep, ignore_errors=True)  # epochs of another training
    with _quiet_lightning(), _interruptible(), sharing_rows() if shares_rows else nullcontext():
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator=device.split(":")[0],
            devices=[int(device.split(":")[1])] if ":" in device else 1,
            default_root_dir=run,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[_LastCheckpoint(last)] if ranks.rank == 0 else [],
        )
        trainer.fit(
            loop,
            steps,
            Steps(val, bags_per_step=val_bags, limit=limit, ranks=ranks, on_gpu=device != "cpu"),
            ckpt_path=str(last) if resumed else None,
            weights_only=True,
        )
    return Fitted(loop.best_state, loop.best_epoch, loop.history)


@contextmanager
def _interruptible() -> Iterator[None]:
    """At Ctrl-C Lightning ends the process without a word, deaf to the next one: here it is KeyboardInterrupt again."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, before)
        raise error.__context__ from None


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

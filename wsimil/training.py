"""From bags and labels to models: one loop for every model and objective, one run folder per fold and seed.

- Test slides are dropped from the splits before anything is loaded: no argument leads from them to the loop.
- Epoch, temperature and threshold are chosen on validation slides only; the rule is fixed: least validation loss.
- A run is a function of its settings, seed and data: killed and resumed, it ends in the same weights.
- A finished run is `model.safetensors` + `model.json`; `last.ckpt` is only there to resume, and is read without executing code.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from wsimil.aggregators import Standardized, make_aggregator
from wsimil.bags.dataset import BagFolder
from wsimil.bags.filter import NO_FILTER
from wsimil.bags.labels import infer_task, match_labels, match_slides, read_labels
from wsimil.bags.splits import check_splits, make_splits, read_splits, splits_hash, write_splits
from wsimil.batch import Aggregator, LabelledBags, Objective, pack
from wsimil.config import FilterConfig, LabelsConfig, Settings, SplitConfig, TrainConfig, save_settings
from wsimil.errors import SplitsError, UsageError
from wsimil.evaluation.calibration import choose_threshold, fit_temperature
from wsimil.extraction.job import slides_of_job
from wsimil.files import atomic_path, hash_of, read_json, write_json
from wsimil.objectives import SlideLabel
from wsimil.task import Task

__all__ = ["Loop", "TrainedModel", "load_model", "prepare_cohort", "train"]

MODEL_FORMAT = 1

_SECTIONS = ["filter", "labels", "split", "train"]
"""What a run depends on, and keeps in its config.yaml."""


# ---------------------------------------------------------------- the loop


class Loop(lightning.LightningModule):
    """Minimises an objective over a model; keeps the weights of the epoch with the least validation loss.

    Nothing here knows what a bag is: encoders are trained by the same loop.

    Args:
        model: what is trained.
        objective: what is minimised.
        lr, weight_decay: of AdamW.
        total_steps: length of the cosine from `lr` to zero, after a twentieth of linear warm-up.
        patience: epochs without a better validation loss after which to stop.
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
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.lr, self.weight_decay = lr, weight_decay
        self.total_steps, self.patience = total_steps, patience
        self.history: list[dict[str, float]] = []
        self.best_state: dict[str, Tensor] = {}
        self.best_epoch = -1
        self._train_losses: list[float] = []
        self._val_losses: list[tuple[float, int]] = []
        objective.prepare(model)

    def configure_optimizers(self) -> Any:
        groups = self.objective.param_groups(self.model)
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay, fused=fused)
        warm_up = max(1, self.total_steps // 20)

        def factor(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, self.total_steps - warm_up))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def progress(self) -> float:
        return min(1.0, self.global_step / self.total_steps)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        losses = self.objective.losses(self.model, batch, self.progress)
        loss = torch.stack(list(losses.values())).sum()
        self._train_losses.append(float(loss.detach()))
        return loss

    def on_after_backward(self) -> None:
        self.objective.after_backward()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.objective.after_step()

    def validation_step(self, batch: Any, batch_index: int) -> None:
        losses = self.objective.losses(self.model, batch, self.progress)
        self._val_losses.append((float(torch.stack(list(losses.values())).sum()), _items(batch)))

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            self._val_losses.clear()
            return
        items = sum(count for _, count in self._val_losses)
        val_loss = sum(loss * count for loss, count in self._val_losses) / max(1, items)
        train_loss = sum(self._train_losses) / max(1, len(self._train_losses))
        self._val_losses, self._train_losses = [], []
        if not math.isfinite(val_loss):
            raise UsageError(f"validation loss is {val_loss} in epoch {self.current_epoch}; lower --lr")
        best = min((row["val_loss"] for row in self.history), default=math.inf)
        if val_loss < best:
            self.best_epoch = self.current_epoch
            self.best_state = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
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


def _items(batch: Any) -> int:
    return len(batch.bags) if isinstance(batch, LabelledBags) else len(batch)


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


class EpochShuffle(Sampler[int]):
    """Another order every epoch, a function of (seed, epoch) alone: Lightning tells the epoch through `set_epoch`."""

    def __init__(self, items: Sized, seed: int) -> None:
        self.items, self.seed, self.epoch = items, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng((self.seed, self.epoch)).permutation(len(self.items)).tolist())


# ---------------------------------------------------------------- slides as training items


class _LabelledSlides(Dataset):
    def __init__(self, bags: BagFolder, slide_ids: list[str], targets: Tensor, weights: Tensor | None) -> None:
        self.bags, self.slide_ids, self.targets, self.weights = bags, slide_ids, targets, weights

    def __len__(self) -> int:
        return len(self.slide_ids)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: list[int]) -> LabelledBags:
        weights = None if self.weights is None else self.weights[indices]
        return LabelledBags(pack([self.bags.load(self.slide_ids[index]) for index in indices]), self.targets[indices], weights)


@dataclass(frozen=True)
class Cohort:
    """Labelled slides with their folds."""

    labels: pd.DataFrame  # slide, slide_id, patient, site, label
    splits: pd.DataFrame
    task: Task


def prepare_cohort(
    bags: BagFolder,
    labels: str | Path,
    *,
    splits: str | Path | None = None,
    labels_config: LabelsConfig | None = None,
    split_config: SplitConfig | None = None,
) -> Cohort:
    """Match labels to slides, infer the task, read or make the folds.

    A label of a slide that the job knows and that has no bag (it failed) is no error; such a slide is in no fold.

    Raises:
        LabelsError, SplitsError: what does not fit, by name.
    """
    labels_config, split_config = labels_config or LabelsConfig(), split_config or SplitConfig()
    table = read_labels(labels, labels_config, group=split_config.group, site=split_config.site)
    known = {*bags.slide_ids, *slides_of_job(bags)}
    table = match_labels(table, known)
    task = infer_task(table["label"], labels_config)
    usable = table[table["slide_id"].isin(bags.filled) & (table["label"] != "")]
    if splits is None:
        return Cohort(table, make_splits(usable, task, split_config), task)
    given = read_splits(splits)
    given["slide_id"] = match_slides(given["slide_id"], known)
    # whose a slide is, the label table says; two names may turn out to be one slide: so the check comes after
    patients = dict(zip(table["slide_id"].tolist(), table["patient"].tolist(), strict=True))
    given["patient"] = [patients.get(name, patient) for name, patient in zip(given["slide_id"], given["patient"], strict=True)]
    check_splits(given)
    unknown = sorted(set(given["slide_id"]) - set(table["slide_id"]))
    if unknown:
        raise SplitsError(f"{splits}: {unknown[0]} is not a labelled slide ({len(unknown)} such rows)")
    return Cohort(table, given, task)


# ---------------------------------------------------------------- runs


def train(
    bags: str | Path,
    labels: str | Path,
    out: str | Path,
    *,
    splits: str | Path | None = None,
    settings: Settings | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> list[Path]:
    """Train one model per fold and seed on slide labels; finished ones with the same settings and data are kept.

    Args:
        bags: job folder or `features_*` folder.
        labels: table with `slide` and the target column.
        out: folder of the run: `splits.csv`, `labels.csv` and a `fold<k>-seed<s>` folder each.
        splits: folds; made (5, by patient) and written to `out` if not given.

    Returns:
        The run folders.
    """
    settings, out = settings or Settings(), Path(out)
    config = settings.train
    bag_folder = BagFolder(bags, filter=settings.filter)
    cohort = prepare_cohort(bag_folder, labels, splits=splits, labels_config=settings.labels, split_config=settings.split)
    say(_describe(cohort))
    if settings.filter != NO_FILTER:
        say(_describe_filter(bag_folder))
    folds = sorted(cohort.splits["fold"].unique().tolist())
    if config.fold != "all":
        if int(config.fold) not in folds:
            raise UsageError(f"--fold {config.fold}: the splits have folds {', '.join(map(str, folds))}")
        folds = [int(config.fold)]
    out.mkdir(parents=True, exist_ok=True)
    write_splits(out / "splits.csv", cohort.splits)
    with atomic_path(out / "labels.csv") as temporary:
        cohort.labels.to_csv(temporary, index=False)
    save_settings(out / "config.yaml", settings, _SECTIONS)
    runs = []
    for fold in folds:
        sides = cohort.splits.query("fold == @fold and split != 'test'")
        for seed in range(config.seed, config.seed + config.seeds):
            run = out / f"fold{fold}-seed{seed}"
            line = _train_one(run, bag_folder, cohort, sides, fold, replace(config, seed=seed, seeds=1, fold=str(fold)), settings)
            runs.append(run)
            if not quiet:
                say(line)
    return runs


def _describe(cohort: Cohort) -> str:
    if cohort.task.kind == "regression":
        return f"task: regression of {len(cohort.labels)} slides"
    counts = cohort.labels.loc[cohort.labels["label"] != "", "label"].value_counts()
    classes = ", ".join(f"{name} ({counts.get(name, 0)})" for name in cohort.task.classes)
    positive = f"; positive: {cohort.task.classes[-1]}" if cohort.task.kind == "binary" else ""
    return f"task: {cohort.task.kind}: {classes}{positive}"


def _describe_filter(bags: BagFolder) -> str:
    kept, stored = sum(map(bags.n_valid, bags.slide_ids)), sum(header.n_tiles for header in bags.headers.values())
    bare = [slide_id for slide_id in bags.slide_ids if bags.headers[slide_id].n_tiles and not bags.n_valid(slide_id)]
    left = f"; none of {', '.join(bare[:5])}{' …' if len(bare) > 5 else ''}" if bare else ""
    return f"filter: {kept} of {stored} tiles are kept{left}"


def _train_one(
    run: Path, bags: BagFolder, cohort: Cohort, sides: pd.DataFrame, fold: int, config: TrainConfig, settings: Settings
) -> str:
    """Train, or find trained, the model of one fold and seed; a line about it."""
    labels: dict[str, str] = dict(zip(cohort.labels["slide_id"].tolist(), cohort.labels["label"].tolist(), strict=True))
    usable = set(bags.filled)
    ids = {side: [name for name in sides.loc[sides["split"] == side, "slide_id"] if name in usable] for side in ("train", "val")}
    for side, members in ids.items():
        if not members:
            raise SplitsError(f"fold {fold}: no {side} slide has a bag with tiles")
    device_free = {key: value for key, value in asdict(config).items() if key not in ("device",)}
    # everything the weights are a function of
    data = [[side, name, labels[name], bags.fingerprint(name)] for side in ids for name in ids[side]]
    key = hash_of(
        {
            "config": device_free,
            "filter": asdict(bags.filter),
            "task": cohort.task.to_json(),
            "encoder": bags.encoder,
            "data": data,
        }
    )
    if (done := _finished(run, key)) is not None:
        return f"{run.name}: already trained (epoch {done['best_epoch']}, validation loss {done['val_loss']:.3f})"
    if run.exists() and (run / "key.txt").exists() and (run / "key.txt").read_text() != key:
        (run / "last.ckpt").unlink(missing_ok=True)  # of other settings or data
    run.mkdir(parents=True, exist_ok=True)
    (run / "key.txt").write_text(key)
    save_settings(run / "config.yaml", replace(settings, train=config), _SECTIONS)

    task = cohort.task
    if task.kind == "regression":
        values = np.array([float(labels[name]) for name in ids["train"]])
        task = replace(task, center=float(values.mean()), scale=float(values.std()) or 1.0)
    targets = {side: task.encode([labels[name] for name in members]) for side, members in ids.items()}
    weights = _class_weights(task, targets) if config.balance else dict.fromkeys(ids)
    slides = {side: _LabelledSlides(bags, ids[side], targets[side], weights[side]) for side in ids}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(hash_of([fold, config.seed])[:8], 16))
        inner = make_aggregator(config.aggregator, bags.dim, task.n_outputs, hidden=config.hidden, dropout=config.dropout)
        moments = bags.moments(ids["train"]) if config.standardize else (None, None)
        model = Standardized(inner, *moments)
        loop = _fit(run, model, SlideLabel(task), slides["train"], slides["val"], config)
    model.load_state_dict(loop.best_state)
    model.eval()

    logits = np.concatenate([_logits(model, slides["val"], index) for index in range(len(ids["val"]))])
    temperature, threshold = _calibrate(task, logits, targets["val"].numpy())
    val_loss = min(row["val_loss"] for row in loop.history)
    encoder, sha256 = bags.encoder
    header = bags.headers[ids["train"][0]].attributes
    with atomic_path(run / "model.safetensors") as temporary:
        save_file({name: value.contiguous() for name, value in loop.best_state.items()}, temporary)
    write_json(
        run / "model.json",
        {
            "format": "wsimil-model",
            "format_version": MODEL_FORMAT,
            "aggregator": config.aggregator,
            "dim": bags.dim,
            "hidden": config.hidden,
            "dropout": config.dropout,
            "task": task.to_json(),
            "threshold": threshold,
            "temperature": temperature,
            "encoder": {"name": encoder, "sha256": sha256},
            "effective_mpp": _number(header.get("effective_mpp")),
            "tile_px": _number(header.get("tile_px")),
            "filter": asdict(bags.filter),
            "fold": fold,
            "seed": config.seed,
            "splits_hash": splits_hash(cohort.splits),
            "best_epoch": loop.best_epoch,
            "epochs": len(loop.history),
            "val_loss": val_loss,
            "n_train": len(ids["train"]),
            "n_val": len(ids["val"]),
            "config": asdict(config),
            "versions": {name: version(name) for name in ("wsimil", "torch", "lightning")},
            "key": key,
        },
    )
    return f"{run.name}: epoch {loop.best_epoch} of {len(loop.history)}, validation loss {val_loss:.3f}"


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _finished(run: Path, key: str) -> dict[str, Any] | None:
    try:
        content = read_json(run / "model.json")
    except (OSError, ValueError):
        return None
    return content if content.get("key") == key and (run / "model.safetensors").exists() else None


def _class_weights(task: Task, targets: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Weights that make the classes of the training slides count the same; their mean over those slides is 1."""
    if task.kind == "regression":
        return dict.fromkeys(targets)
    counts = torch.bincount(targets["train"].long(), minlength=len(task.classes)).float()
    per_class = len(targets["train"]) / ((counts > 0).sum() * counts.clamp(min=1))
    return {side: per_class[values.long()] for side, values in targets.items()}


def _calibrate(task: Task, logits: np.ndarray, targets: np.ndarray) -> tuple[float, float | None]:
    """Temperature and (binary) threshold on the validation slides."""
    if task.kind == "regression":
        return 1.0, None
    temperature = fit_temperature(logits, targets.astype(int))
    if task.kind == "multiclass":
        return temperature, None
    return temperature, choose_threshold(targets.astype(int), task.probabilities(logits, temperature)[:, 1])


def _logits(model: Aggregator, slides: _LabelledSlides, index: int) -> np.ndarray:
    with torch.inference_mode():
        return model(slides.collate([index]).bags).logits.numpy()


def _fit(
    run: Path, model: nn.Module, objective: Objective, train: _LabelledSlides, val: _LabelledSlides, config: TrainConfig
) -> Loop:
    def loader(slides: _LabelledSlides, sampler: Sampler[int] | None) -> DataLoader:
        return DataLoader(slides, config.bags_per_step, sampler=sampler, collate_fn=slides.collate)

    loop = Loop(
        model,
        objective,
        lr=config.lr,
        weight_decay=config.weight_decay,
        total_steps=config.epochs * math.ceil(len(train) / config.bags_per_step),
        patience=config.patience,
    )
    last = run / "last.ckpt"
    with _quiet_lightning():
        trainer = lightning.Trainer(
            max_epochs=config.epochs,
            accelerator="auto" if config.device == "auto" else config.device.split(":")[0],
            devices=[int(config.device.split(":")[1])] if ":" in config.device else 1,
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
            loader(train, EpochShuffle(train, config.seed)),
            loader(val, None),
            ckpt_path=str(last) if last.exists() else None,
            weights_only=True,
        )
    loop.cpu()
    with atomic_path(run / "metrics.csv") as temporary:
        pd.DataFrame(loop.history).to_csv(temporary, index=False)
    return loop


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


# ---------------------------------------------------------------- finished models


@dataclass(frozen=True)
class TrainedModel:
    """A finished run, ready to predict."""

    model: Aggregator  # in eval mode, on the CPU
    task: Task
    fold: int
    seed: int
    threshold: float | None
    temperature: float
    encoder: tuple[str, str]
    filter: FilterConfig  # which tiles it learned from, and may see
    splits_hash: str
    folder: Path
    content: dict[str, Any]


def load_model(run: str | Path) -> TrainedModel:
    """Read `model.json` and `model.safetensors`; nothing in them is executed.

    Raises:
        UsageError: not a finished run, or of a newer format.
    """
    run = Path(run)
    try:
        content = read_json(run / "model.json")
        state = load_file(run / "model.safetensors")
    except Exception as error:  # safetensors raises its own kind on a damaged file
        raise UsageError(f"{run}: no finished model in it ({error})") from error
    if content.get("format") != "wsimil-model" or content.get("format_version", 0) > MODEL_FORMAT:
        raise UsageError(f"{run}: model format {content.get('format_version')} is newer than this wsimil reads; upgrade it")
    try:
        limits = FilterConfig(**content.get("filter", {}))  # models older than filters saw every tile
    except TypeError as error:
        raise UsageError(f"{run}: its filter {content['filter']} has keys this wsimil does not know; upgrade it") from error
    task = Task.from_json(content["task"])
    inner = make_aggregator(
        content["aggregator"], content["dim"], task.n_outputs, hidden=content["hidden"], dropout=content["dropout"]
    )
    model = Standardized(inner)
    model.load_state_dict(state)
    model.eval()
    return TrainedModel(
        model=model,
        task=task,
        fold=content["fold"],
        seed=content["seed"],
        threshold=content["threshold"],
        temperature=content["temperature"],
        encoder=(content["encoder"]["name"], content["encoder"]["sha256"]),
        filter=limits,
        splits_hash=content["splits_hash"],
        folder=run,
        content=content,
    )

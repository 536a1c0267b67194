"""What a run's folder holds of a model: what it says while the model is trained, when it is finished, and when it is found again.

- `model.json` is written last: where it stands, all is there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from wsimil.aggregators import Standardized
from wsimil.bags.splits import splits_hash
from wsimil.batch import Aggregator
from wsimil.config import Settings
from wsimil.errors import UsageError
from wsimil.evaluation.calibration import calibrate
from wsimil.files import atomic_path, locked, read_json, sweep_temporary_files, write_json
from wsimil.settings import save_settings
from wsimil.training.cohort import Cohort, labels_hash
from wsimil.training.items import LabelledSlides, TileStore
from wsimil.training.loop import EPOCHS, Fitted, resolve_precision
from wsimil.training.model import MODEL_FORMAT, build_aggregator
from wsimil.training.plan import Plan, content_of, slides_of
from wsimil.training.soup import SOUP, Soup

__all__ = ["SECTIONS", "alone", "already_trained", "begin", "finish", "finished"]

SECTIONS = ["filter", "labels", "split", "train"]
"""What a run depends on, and keeps in its config.yaml."""


@contextmanager
def alone(plans: Sequence[Plan]) -> Iterator[None]:
    """Nobody else trains these models meanwhile, where the file system knows locks.

    Raises:
        UsageError: another process does.
    """
    with ExitStack() as held:
        for plan in plans:
            plan.folder.mkdir(parents=True, exist_ok=True)
            if not locked(held.enter_context(open(plan.folder / "key.txt", "a")), wait=False):
                raise UsageError(f"{plan.folder} is being trained by another process; wait for it, or take another --out")
        yield


def begin(plan: Plan, settings: Settings) -> None:
    """Clear the folder of what is of other settings or data, and say in it what is going to be trained."""
    key = plan.folder / "key.txt"
    if key.exists() and key.read_text() != plan.key:
        (plan.folder / "last.ckpt").unlink(missing_ok=True)  # of other settings or data
        for folder in (EPOCHS, SOUP):
            shutil.rmtree(plan.folder / folder, ignore_errors=True)
    plan.folder.mkdir(parents=True, exist_ok=True)
    for folder in (plan.folder, plan.folder / EPOCHS):
        sweep_temporary_files(folder)
    key.write_text(plan.key)
    (plan.folder / "model.json").unlink(missing_ok=True)  # a run that is killed now predicts with no old model
    save_settings(plan.folder / "config.yaml", replace(settings, train=plan.config), SECTIONS)


def already_trained(plan: Plan, done: dict[str, Any], cohort: Cohort) -> str:
    """A line about a model that is kept.

    Its key says that it learned from the very slides that these splits give it to learn from. Where the rest of the splits has
    changed, the model takes their hash: no slide that they call its test slide was learned from.
    """
    current = _learned_from(cohort, plan.fold)
    if any(done.get(name) != value for name, value in current.items()):
        for path in plan.folder.parent.glob(f"{EPOCHS}/*/{plan.folder.name}/model.json"):
            _copy_tables(plan, path.parent.parent)
            write_json(path, read_json(path) | current)
        write_json(plan.folder / "model.json", done | current)  # last: until then it is done again
    return f"{plan.folder.name}: already trained (epoch {done['best_epoch']}, validation loss {done['val_loss']:.3f})"


def finish(plan: Plan, store: TileStore, cohort: Cohort, fitted: Fitted, device: str, soup: Soup | None = None) -> str:
    """Calibrate the best weights on the validation slides and write the run; a line about it."""
    config, task, bags = plan.config, plan.task, store.bags
    model = Standardized(build_aggregator(content_of(plan, bags), task))
    model.load_state_dict(fitted.best_state)
    logits = _logits(model, slides_of(plan, store)["val"], device)
    targets = plan.targets["val"].numpy()
    temperature, threshold = calibrate(task, logits, targets)
    task = task.calibrated(logits, targets)
    val_loss = fitted.history[fitted.best_epoch]["val_loss"]
    encoder, sha256 = bags.encoder
    header = bags.headers[plan.ids["train"][0]].attributes
    with atomic_path(plan.folder / "metrics.csv") as temporary:
        temporary.write_text(
            "\n".join(["epoch,train_loss,val_loss", *(",".join(map(str, row.values())) for row in fitted.history), ""])
        )
    with atomic_path(plan.folder / "model.safetensors") as temporary:
        save_file({name: value.contiguous() for name, value in fitted.best_state.items()}, temporary)
    content = {
        "format": "wsimil-model",
        "format_version": MODEL_FORMAT,
        **content_of(plan, bags),
        "task": task.to_json(),
        "threshold": threshold,
        "temperature": temperature,
        "encoder": {"name": encoder, "sha256": sha256},
        "effective_mpp": _number(header.get("effective_mpp")),
        "tile_px": _number(header.get("tile_px")),
        "filter": asdict(bags.filter),
        "fold": plan.fold,
        "seed": config.seed,
        **_learned_from(cohort, plan.fold),
        "best_epoch": fitted.best_epoch,
        "epochs": len(fitted.history),
        "val_loss": val_loss,
        "n_train": len(plan.ids["train"]),
        "n_val": len(plan.ids["val"]),
        "precision": resolve_precision(config.precision, device),
        "stack": plan.stack,
        "soup": None if soup is None else {"kept": soup.kept, "val_loss": soup.val_loss},
        "config": asdict(config),
        "versions": {name: version(name) for name in ("wsimil", "torch", "lightning")},
        "key": plan.key,
    }
    _publish_epochs(plan, content)
    write_json(plan.folder / "model.json", content)  # last: it says that all is there
    shutil.rmtree(plan.folder / SOUP, ignore_errors=True)
    begun = f" (begun at the mean of {len(soup.kept)} of {config.soup} short trainings)" if soup else ""
    return f"{plan.folder.name}: epoch {fitted.best_epoch} of {len(fitted.history)}, validation loss {val_loss:.3f}{begun}"


def _learned_from(cohort: Cohort, fold: int) -> dict[str, str]:
    """What tells later whether the tables beside a model are still those it learned from."""
    return {"splits_hash": splits_hash(cohort.splits), "labels_hash": labels_hash(cohort.splits, cohort.labels, fold)}


def _publish_epochs(plan: Plan, content: dict[str, Any]) -> None:
    """Make runs of the epochs that were kept: `epochs/<epoch>/fold<k>-seed<s>/` beside the folds, with nothing calibrated."""
    for old in plan.folder.parent.glob(f"{EPOCHS}/*/{plan.folder.name}"):
        if _key_of(old) != plan.key:  # of the model that this one replaces, not this one's before it was killed here
            shutil.rmtree(old)
    for weights in sorted((plan.folder / EPOCHS).glob("[0-9]*.safetensors")):  # no temporary files
        run = plan.folder.parent / EPOCHS / f"{int(weights.stem):03d}"
        own = run / plan.folder.name
        own.mkdir(parents=True, exist_ok=True)
        _copy_tables(plan, run)
        threshold = None if content["threshold"] is None else 0.5
        write_json(own / "model.json", content | {"best_epoch": int(weights.stem), "threshold": threshold, "temperature": 1.0})
        os.replace(weights, own / "model.safetensors")  # last: what has gone from there is a run here
    shutil.rmtree(plan.folder / EPOCHS, ignore_errors=True)


def _copy_tables(plan: Plan, run: Path) -> None:
    for table in ("splits.csv", "labels.csv"):
        shutil.copyfile(plan.folder.parent / table, run / table)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def finished(plan: Plan) -> dict[str, Any] | None:
    """What `model.json` says, if the model is trained already."""
    done = _key_of(plan.folder) == plan.key and _is_whole(plan.folder / "model.safetensors")
    return read_json(plan.folder / "model.json") if done else None


def _is_whole(weights: Path) -> bool:
    """Whether a file of weights is as long as its header says; no weight is read."""
    try:
        with safe_open(weights, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _key_of(run: Path) -> str | None:
    """The key of a model, if there is one that can be read."""
    try:
        return read_json(run / "model.json").get("key")
    except (OSError, ValueError):
        return None


def _logits(model: Aggregator, slides: LabelledSlides, device: str) -> np.ndarray:
    """(n, C) of all slides, one bag at a time, in float32 as predictions are."""
    model.eval().to(device)
    each = []
    with torch.inference_mode():
        for index in range(len(slides)):
            (piece,) = slides.pieces([index], 0, limit=None)
            each.append(model(piece.bags.to(device)).logits.float().cpu().numpy())
    return np.concatenate(each)

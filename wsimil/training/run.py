"""Runs: one model per fold and seed, in a folder of its own; what is finished with the same settings and data is kept.

- The data of a model are its training and validation slides: a change of its test slides, or of other folds, leaves it trained.
- Models in the folder that are not of the plan are left alone, and said.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wsimil.aggregators import Standardized
from wsimil.bags.dataset import BagFolder
from wsimil.bags.filter import NO_FILTER
from wsimil.bags.splits import COLUMNS, refuse_to_lose, splits_hash
from wsimil.batch import Aggregator
from wsimil.config import Settings, TrainConfig
from wsimil.errors import LabelsError, SplitsError, UsageError, some_of
from wsimil.evaluation.calibration import calibrate
from wsimil.extraction.extract import resolve_device
from wsimil.files import atomic_path, hash_of, read_json, sweep_temporary_files, write_json, write_text
from wsimil.settings import save_settings
from wsimil.task import Task
from wsimil.training.cohort import Cohort, check_not_seen, labels_hash, prepare_cohort
from wsimil.training.goals import build_objective
from wsimil.training.items import LabelledSlides, TileStore, free_bytes
from wsimil.training.loop import EPOCHS, Fitted, fit, resolve_precision
from wsimil.training.model import MODEL_FORMAT, build_aggregator, differences, recipe
from wsimil.training.ranks import ALONE, Ranks, devices_of, run_ranks
from wsimil.training.soup import SOUP, Soup, candidate_settings, mixed
from wsimil.training.stacked import Member, fit_stacked, unstackable

__all__ = ["train"]

_SECTIONS = ["filter", "labels", "split", "train"]
"""What a run depends on, and keeps in its config.yaml."""

_CHANGES_NOTHING = ("device", "devices", "memory_gb")
"""Settings that weights are no function of, up to rounding and the coins of dropout."""


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

    With `settings.train.devices` above 1, call it below `if __name__ == "__main__":`, for Python starts processes anew.

    Returns:
        The run folders.
    """
    settings, out = settings or Settings(), Path(out)
    config = settings.train
    bag_folder = BagFolder(bags, filter=settings.filter, cache_bytes=0)  # the store below keeps what is kept
    for remark in bag_folder.remarks:
        say(remark)
    cohort = prepare_cohort(bag_folder, labels, splits=splits, labels_config=settings.labels, split_config=settings.split)
    say(cohort.task.describe(cohort.labels["label"].tolist()))
    say(cohort.owners())
    for line in cohort.left_out(bag_folder):
        say(line)
    if settings.filter != NO_FILTER:
        say(_describe_filter(bag_folder))
    folds = sorted(cohort.splits["fold"].unique().tolist())
    if config.fold != "all":
        if int(config.fold) not in folds:
            raise UsageError(f"--fold {config.fold}: the splits have folds {', '.join(map(str, folds))}")
        folds = [int(config.fold)]
    check_not_seen(bag_folder, cohort.splits, folds)
    device = resolve_device(config.device)
    seeds = range(config.seed, config.seed + config.seeds)
    plans = [
        _plan(out, bag_folder, cohort, fold, replace(config, seed=seed, seeds=1, fold=str(fold)))
        for fold in folds
        for seed in seeds
    ]
    stacked = _are_stacked(plans, config, device, say)
    _check(plans, bag_folder, device)
    known = cohort.labels.assign(slide_fingerprint=_fingerprints(bag_folder, cohort))
    tables = {out / "splits.csv": (cohort.splits[COLUMNS], splits), out / "labels.csv": (known, labels)}
    for path, (table, given) in tables.items():
        refuse_to_lose(path, table, given)
    # nothing is refused from here on: what a finished run says of itself stands until then
    for path, (table, _) in tables.items():
        write_text(path, table.to_csv(index=False))
    save_settings(out / "config.yaml", settings, _SECTIONS)
    sweep_temporary_files(out)
    for line in _not_planned(out, plans, cohort):
        say(line)
    if stacked:
        lines = _train_stacked(out, plans, _store(bag_folder, plans, config, device), cohort, settings, device)
    elif config.devices > 1:
        lines = _train_shared(plans, bag_folder, cohort, settings, device)
    else:
        lines = _train_each(ALONE, device, plans, bag_folder, cohort, settings)
    for line in lines:
        if not quiet:
            say(line)
    return [plan.folder for plan in plans]


def _fingerprints(bags: BagFolder, cohort: Cohort) -> list[str]:
    """Of the slides' content, as their bags state it: under another id they are known by it."""
    headers = (bags.headers.get(name) for name in cohort.labels["slide_id"])
    return ["" if header is None else str(header.attributes.get("slide_fingerprint", "")) for header in headers]


def _not_planned(out: Path, plans: list[_Plan], cohort: Cohort) -> Iterator[str]:
    """A line about each model in the folder that is of another plan. Other folds of the same plan are expected with --fold."""
    planned, folds = {plan.folder for plan in plans}, set(cohort.splits["fold"])
    ours, expected = recipe(asdict(plans[0].config)), splits_hash(cohort.splits)
    for folder in sorted({path.parent for path in out.glob("fold*-seed*/model.json")} - planned):
        try:
            content = read_json(folder / "model.json")
        except (OSError, ValueError):
            continue
        theirs = recipe(content.get("config", {}))
        if content["fold"] not in folds:
            wrong, way_out = f"the splits have no fold {content['fold']} any more", f"delete {folder}"
        elif theirs != ours:
            wrong = f"it has other settings ({differences([theirs, ours])[0]})"
            way_out = f"delete {folder}, or train into another --out"
        elif content["splits_hash"] != expected:
            wrong, way_out = "its splits were others, and it is not trained now", f"train it too, or delete {folder}"
        elif content.get("labels_hash", "") not in ("", labels_hash(cohort.splits, cohort.labels, content["fold"])):
            wrong, way_out = "it learned other labels, and it is not trained now", f"train it too, or delete {folder}"
        elif content["fold"] in {plan.fold for plan in plans}:
            yield f"{folder.name}: it is of another seed, and takes part in predictions; delete {folder} to leave it out"
            continue
        else:
            continue
        yield f"{folder.name}: {wrong}, so predictions will refuse it; {way_out}"


def _describe_filter(bags: BagFolder) -> str:
    kept, stored = sum(map(bags.n_valid, bags.slide_ids)), sum(header.n_tiles for header in bags.headers.values())
    bare = [slide_id for slide_id in bags.slide_ids if bags.headers[slide_id].n_tiles and not bags.n_valid(slide_id)]
    left = f"; none of {some_of(bare)}" if bare else ""
    return f"filter: {kept} of {stored} tiles are kept{left}"


@dataclass(frozen=True)
class _Plan:
    """A model to be: its training and validation slides, and what they say."""

    folder: Path
    fold: int
    config: TrainConfig
    task: Task
    ids: dict[str, list[str]]  # by side: train, val
    labels: dict[str, list[str]]
    targets: dict[str, Tensor]
    weights: dict[str, Tensor | None]
    key: str  # hash of everything the weights are a function of
    stack: int = 1  # models trained as one program with it


def _plan(out: Path, bags: BagFolder, cohort: Cohort, fold: int, config: TrainConfig) -> _Plan:
    sides = cohort.splits.query("fold == @fold and split != 'test'")
    text = dict(zip(cohort.labels["slide_id"].tolist(), cohort.labels["label"].tolist(), strict=True))
    usable = {name for name in bags.filled if text.get(name)}
    ids = {side: [name for name in sides.loc[sides["split"] == side, "slide_id"] if name in usable] for side in ("train", "val")}
    for side, members in ids.items():
        if not members:
            raise SplitsError(f"fold {fold}: no {side} slide has a label and a bag with tiles")
    labels = {side: [text[name] for name in members] for side, members in ids.items()}
    try:
        task = cohort.task.fitted(labels["train"], config, validation=labels["val"])
    except LabelsError as error:
        raise LabelsError(f"fold {fold}: {error}") from None
    targets = {side: task.encode(members) for side, members in labels.items()}
    balance = config.balance and config.sampling != "balanced"  # both would pay twice
    weights = {side: task.slide_weights(targets[side], targets["train"]) if balance else None for side in ids}
    key = hash_of(
        {
            "config": {key: value for key, value in asdict(config).items() if key not in _CHANGES_NOTHING},
            "filter": asdict(bags.filter),
            "task": cohort.task.to_json(),
            "encoder": bags.encoder,
            "data": [[side, name, text[name], bags.fingerprint(name)] for side in ids for name in ids[side]],
        }
    )
    return _Plan(out / f"fold{fold}-seed{config.seed}", fold, config, task, ids, labels, targets, weights, key)


def _check(plans: list[_Plan], bags: BagFolder, device: str) -> None:
    """Raises UsageError for settings with which no model can be made, or not on these devices."""
    with torch.random.fork_rng(devices=[]):
        for plan in plans:
            objective, n_devices = build_objective(plan.config, plan.task, plan.labels["train"]), plan.config.devices
            if n_devices > 1 and not objective.per_bag:
                raise UsageError(
                    f"--devices {n_devices}: loss {plan.task.criterion} compares the slides of a step with each other, "
                    "so no step can be shared; train with --devices 1"
                )
        build_aggregator(_content(plans[0], bags), plans[0].task)
    if plans[0].config.devices > 1:
        devices_of(device, plans[0].config.devices)


def _store(bags: BagFolder, plans: list[_Plan], config: TrainConfig, device: str, *, sharers: int = 1) -> TileStore:
    """On the GPU if all slides fit there beside the work, else in this process's share of the memory, as far as it goes."""
    wanted = sorted({name for plan in plans for members in plan.ids.values() for name in members})
    if device.startswith("cuda"):
        store = TileStore(bags, memory_bytes=free_bytes(device), device=device)
        if store.keeps(wanted):
            return store
    return TileStore(bags, memory_bytes=(int(config.memory_gb * 1e9) or free_bytes()) // sharers)


def _are_stacked(plans: list[_Plan], config: TrainConfig, device: str, say: Callable[[str], None]) -> bool:
    """Whether all are trained as one program; where that would be worth it and cannot be, the reason is said."""
    worth = len(plans) > 1 and device.startswith("cuda") and config.devices == 1
    if config.stack == "off" or (config.stack == "auto" and not worth):
        return False
    reason = "a stack trains on one device" if config.devices > 1 else unstackable(config, [plan.task for plan in plans])
    if reason and config.stack == "on":
        raise UsageError(f"--stack on: {reason}; train one after the other with --stack off")
    if reason:
        say(f"models are trained one after the other: {reason}")
    return reason is None


def _train_stacked(
    out: Path, plans: list[_Plan], store: TileStore, cohort: Cohort, settings: Settings, device: str
) -> Iterator[str]:
    """Train all as one program, or find all trained; a line about each."""
    together = hash_of([plan.key for plan in plans])  # the order of slides follows from all of them
    plans = [replace(plan, key=hash_of([plan.key, together]), stack=len(plans)) for plan in plans]
    found = [_finished(plan) for plan in plans]
    if all(found):
        yield from (_already(plan, done, cohort) for plan, done in zip(plans, found, strict=True) if done)
        return
    for plan in plans:
        _begin(plan, settings)
    with torch.random.fork_rng():
        models = [_fresh_model(plan, store) for plan in plans]
        torch.manual_seed(int(together[:8], 16))
        members = [
            Member(model, plan.task, plan.ids, plan.targets, plan.weights) for model, plan in zip(models, plans, strict=True)
        ]
        last = out / "stack.ckpt"
        fitted = fit_stacked(members, store, settings.train, device=device, checkpoint=last, key=together)
    for plan, one in zip(plans, fitted, strict=True):
        yield _finish(plan, store, cohort, one, device)
    last.unlink(missing_ok=True)


def _already(plan: _Plan, done: dict[str, Any], cohort: Cohort) -> str:
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


def _train_each(
    ranks: Ranks, device: str, plans: list[_Plan], bags: BagFolder, cohort: Cohort, settings: Settings
) -> Iterator[str]:
    """Train, or find trained, one model after the other; a line about each."""
    store = _store(bags, plans, settings.train, device, sharers=ranks.count)
    for plan in plans:
        if ranks.count == 1:  # of several, the run has seen to it
            if (done := _finished(plan)) is not None:
                yield _already(plan, done, cohort)
                continue
            _begin(plan, settings)
        soup = None
        with torch.random.fork_rng(devices=[]):
            model = _fresh_model(plan, store, ranks)
            if plan.config.soup:
                soup = _soup(plan, model, store, device, ranks)
                model.load_state_dict(soup.state)
            fitted = _fit(plan, model, store, device, ranks)
        yield _finish(plan, store, cohort, fitted, device, soup) if ranks.rank == 0 else ""


def _fit(plan: _Plan, model: Standardized, store: TileStore, device: str, ranks: Ranks, *, epochs: int | None = None) -> Fitted:
    objective = build_objective(plan.config, plan.task, plan.labels["train"])
    slides = _slides(plan, store)
    sides = slides["train"], slides["val"]
    return fit(plan.folder, model, objective, *sides, plan.config, device=device, ranks=ranks, key=plan.key, epochs=epochs)


def _soup(plan: _Plan, model: Standardized, store: TileStore, device: str, ranks: Ranks) -> Soup:
    """Of short trainings that all begin as this model is, which stays as it is."""
    candidates = []
    for index in range(plan.config.soup):
        config = candidate_settings(plan.config, plan.fold, index)
        one = replace(plan, folder=plan.folder / SOUP / str(index), config=config)
        one.folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            candidates.append(_fit(one, copy.deepcopy(model), store, device, ranks, epochs=plan.config.soup_epochs))
    return mixed(candidates, plan.config.soup_kept)


def _train_shared(plans: list[_Plan], bags: BagFolder, cohort: Cohort, settings: Settings, device: str) -> Iterator[str]:
    """The same on several devices; what is finished, and what a new run does away with, is seen to before they start."""
    waiting = []
    for plan in plans:
        if (done := _finished(plan)) is not None:
            yield _already(plan, done, cohort)
        else:
            _begin(plan, settings)
            waiting.append(plan)
    if waiting:
        yield from run_ranks(devices_of(device, settings.train.devices), _train_each, waiting, bags, cohort, settings)


def _begin(plan: _Plan, settings: Settings) -> None:
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
    save_settings(plan.folder / "config.yaml", replace(settings, train=plan.config), _SECTIONS)


def _slides(plan: _Plan, store: TileStore) -> dict[str, LabelledSlides]:
    config = plan.config
    sampled = {"tiles_per_bag": config.tiles_per_bag, "instance_dropout": config.instance_dropout, "seed": config.seed}
    return {
        "train": LabelledSlides(store, plan.ids["train"], plan.targets["train"], plan.weights["train"], **sampled),
        "val": LabelledSlides(store, plan.ids["val"], plan.targets["val"], plan.weights["val"]),
    }


def _content(plan: _Plan, bags: BagFolder) -> dict[str, Any]:
    """What describes the aggregator in `model.json`."""
    config = plan.config
    return {
        "aggregator": config.aggregator,
        "aggregator_options": config.options_of("aggregator_options"),
        "dim": bags.dim,
        "hidden": config.hidden,
        "dropout": config.dropout,
    }


def _fresh_model(plan: _Plan, store: TileStore, ranks: Ranks = ALONE) -> Standardized:
    """The model before its first step, a function of fold and seed. Ranks begin as the first, which alone reads all features."""
    torch.manual_seed(int(hash_of([plan.fold, plan.config.seed])[:8], 16))
    inner = build_aggregator(_content(plan, store.bags), plan.task)
    return Standardized(inner, *(store.moments(plan.ids["train"]) if plan.config.standardize and not ranks.rank else (None, None)))


def _finish(
    plan: _Plan, store: TileStore, cohort: Cohort, fitted: Fitted, device: str, soup: Soup | None = None
) -> str:
    """Calibrate the best weights on the validation slides and write the run; a line about it."""
    config, task, bags = plan.config, plan.task, store.bags
    model = Standardized(build_aggregator(_content(plan, bags), task))
    model.load_state_dict(fitted.best_state)
    logits = _logits(model, _slides(plan, store)["val"], device)
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
        **_content(plan, bags),
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


def _publish_epochs(plan: _Plan, content: dict[str, Any]) -> None:
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


def _copy_tables(plan: _Plan, run: Path) -> None:
    for table in ("splits.csv", "labels.csv"):
        shutil.copyfile(plan.folder.parent / table, run / table)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _finished(plan: _Plan) -> dict[str, Any] | None:
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
            each.append(model(piece.bags.to(device, torch.float32)).logits.float().cpu().numpy())
    return np.concatenate(each)

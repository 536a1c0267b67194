"""Runs: one model per fold and seed, in a folder of its own; what is finished with the same settings and data is kept.

- Models in the folder that are not of the plan are left alone, and said.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from wsimil.aggregators import Standardized
from wsimil.bags.dataset import BagFolder
from wsimil.bags.filter import NO_FILTER
from wsimil.bags.splits import COLUMNS, refuse_to_lose, splits_hash
from wsimil.config import Settings, SplitConfig, TrainConfig
from wsimil.errors import BagFormatError, UsageError, some_of
from wsimil.extraction.extract import resolve_device
from wsimil.files import hash_of, read_json, sweep_temporary_files, write_text
from wsimil.settings import save_settings
from wsimil.table import read_table
from wsimil.task import facts_of
from wsimil.training.cohort import Cohort, check_not_seen, labels_hash, prepare_cohort
from wsimil.training.goals import build_objective, try_together
from wsimil.training.items import TileStore, free_bytes
from wsimil.training.loop import Fitted, fit
from wsimil.training.model import build_aggregator, differences, recipe
from wsimil.training.plan import Plan, content_of, fresh_model, make_plan, slides_of
from wsimil.training.ranks import ALONE, Ranks, devices_of, run_ranks
from wsimil.training.record import SECTIONS, alone, already_trained, begin, finish, finished
from wsimil.training.soup import SOUP, Soup, candidate_settings, mixed
from wsimil.training.stacked import Member, fit_stacked, unstackable

__all__ = ["train"]

_STACK_BYTES = 32
"""Of a tile, a model and a hidden number, in a step of a stack with attention, about: 20 forward, the rest on the way back."""


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
    # the store below keeps what is kept
    bag_folder = BagFolder(bags, filter=settings.filter, cache_bytes=0, leave_damaged=True)
    for remark in bag_folder.remarks:
        say(remark)
    cohort = prepare_cohort(bag_folder, labels, splits=splits, labels_config=settings.labels, split_config=settings.split)
    if ignored := _made_already(settings) if splits else []:
        say(f"{', '.join(ignored)}: without effect, the folds are those of {splits}")
    elif settings.split.test and settings.split.folds != SplitConfig().folds:
        say(f"--folds: without effect, column {settings.split.test} makes one fold")
    if not config.balance and cohort.task.kind not in ("binary", "multiclass", "ordinal", "multilabel"):
        say(f"--no-balance: without effect, there are no classes to balance in a task of {cohort.task.kind}")
    if not config.soup and (
        idle := [key for key in ("soup_epochs", "soup_kept") if getattr(config, key) != getattr(TrainConfig, key)]
    ):
        say(f"{', '.join(idle)}: without effect, soup is 0")
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
        make_plan(out, bag_folder, cohort, fold, replace(config, seed=seed, seeds=1, fold=str(fold)))
        for fold in folds
        for seed in seeds
    ]
    stacked = _are_stacked(plans, bag_folder, config, device, say)
    _check(plans, bag_folder, device)
    _check_none_was_whole(out, bag_folder)
    known = cohort.labels.assign(slide_fingerprint=_fingerprints(bag_folder, cohort))
    tables = {out / "splits.csv": (cohort.splits[COLUMNS], splits), out / "labels.csv": (known, labels)}
    for path, (table, given) in tables.items():
        refuse_to_lose(path, table, given)
    with alone(plans):
        # nothing is refused from here on: what a finished run says of itself stands until then
        for path, (table, _) in tables.items():
            write_text(path, table.to_csv(index=False))
        save_settings(out / "config.yaml", settings, SECTIONS)
        sweep_temporary_files(out)
        for line in [*_not_planned(out, plans, cohort), *_one_sided(plans, cohort)]:
            say(line)
        if stacked:
            lines = _train_stacked(out, plans, _store(bag_folder, plans, config, device), cohort, settings, device)
        elif config.devices > 1:
            lines = _train_shared(plans, bag_folder, cohort, settings, device)
        else:
            lines = _train_each(ALONE, device, plans, bag_folder, cohort, settings)
        try:
            for line in lines:
                if not quiet:
                    say(line)
        except torch.OutOfMemoryError as error:
            instead = "--stack off, " if stacked else ""
            raise UsageError(
                f"the memory of {device} does not suffice for a step with {config.aggregator} ({str(error).partition('. ')[0]}): "
                f"{instead}--tiles-per-bag 20000, a narrower --hidden, another --aggregator or --device cpu need less"
            ) from None
    return [plan.folder for plan in plans]


def _made_already(settings: Settings) -> list[str]:
    """Options that make folds, where they are not the default."""
    usual = SplitConfig()
    names = ("folds", "val_fraction", "test", "site")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(settings.split, name) != getattr(usual, name)]


def _fingerprints(bags: BagFolder, cohort: Cohort) -> list[str]:
    """Of the slides' content: under another id they are known by it."""
    return [bags.content(name) if name in bags.headers else "" for name in cohort.labels["slide_id"]]


def _check_none_was_whole(out: Path, bags: BagFolder) -> None:
    """Raises BagFormatError if the run there had a bag that is damaged now: its models would be trained again without it."""
    if not bags.damaged or not (out / "labels.csv").exists():
        return
    before = read_table(out / "labels.csv", UsageError)
    if not {"slide_id", "slide_fingerprint"} <= set(before.columns):
        return
    whole = set(before.loc[before["slide_fingerprint"] != "", "slide_id"])
    if gone := sorted(whole & set(bags.damaged)):
        raise BagFormatError(
            f"{bags.damaged[gone[0]]}; {out} has been trained with it ({some_of(gone)}): extract again, or train without it into "
            "another --out"
        )


def _one_sided(plans: list[Plan], cohort: Cohort) -> Iterator[str]:
    """A line about each fold whose validation cannot tell classes apart, or whose test has one that is not learned."""
    text = dict(zip(cohort.labels["slide_id"].tolist(), cohort.labels["label"].tolist(), strict=True))
    for fold, plan in {plan.fold: plan for plan in plans}.items():
        task = plan.task
        if task.kind == "multilabel":
            facts = [facts_of(label) for label in plan.labels["train"]]
            for name in task.classes:
                if len(values := {one[name] for one in facts if name in one}) == 1:
                    yield f"fold {fold}: {name} is {values.pop():g} wherever it is known in train: nothing is learned about it"
        if task.kind not in ("binary", "multiclass", "ordinal"):
            continue
        sides = cohort.splits.query("fold == @fold and split == 'test'")["slide_id"]
        by_side = {"train": plan.labels["train"], "val": plan.labels["val"], "test": [text.get(name, "") for name in sides]}
        found = {side: {task.hard_label(label) for label in labels if label} for side, labels in by_side.items()}
        if len(found["val"]) == 1:
            only = next(iter(found["val"]))
            yield (
                f"fold {fold}: every validation slide is {only}, so the best epoch, the threshold and the calibration are chosen "
                "without another class (--val-fraction, or other --splits)"
            )
        if unknown := sorted(found["test"] - found["train"]):
            yield f"fold {fold}: no training slide is {some_of(unknown)}, which test slides are: no model of this fold knows it"


def _not_planned(out: Path, plans: list[Plan], cohort: Cohort) -> Iterator[str]:
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


def _check(plans: list[Plan], bags: BagFolder, device: str) -> None:
    """Raises UsageError for settings with which no model can be made, or not on these devices."""
    with torch.random.fork_rng(devices=[]):
        for plan in plans:
            objective, n_devices = build_objective(plan.config, plan.task, plan.labels["train"]), plan.config.devices
            if n_devices > 1 and not objective.per_bag:
                raise UsageError(
                    f"--devices {n_devices}: loss {plan.task.criterion} compares the slides of a step with each other, "
                    "so no step can be shared; train with --devices 1"
                )
        model = build_aggregator(content_of(plans[0], bags), plans[0].task)
        try_together(plans[0].config, plans[0].task, plans[0].labels["train"], dim=bags.dim)
    learned = sorted({name for plan in plans for members in plan.ids.values() for name in members})
    if model.needs_coords and (nowhere := [name for name in learned if not bags.has_places(name)]):
        raise UsageError(
            f"--aggregator {plans[0].config.aggregator} needs the place of each tile, and {len(nowhere)} bags do not say it in µm "
            f"(mpp, tile_level0_px): {some_of(nowhere)}; convert them with --slide-mpp, or take another aggregator"
        )
    if plans[0].config.devices > 1:
        devices_of(device, plans[0].config.devices)


def _store(bags: BagFolder, plans: list[Plan], config: TrainConfig, device: str, *, sharers: int = 1) -> TileStore:
    """On the GPU if all slides fit there beside the work, else in this process's share of the memory, as far as it goes."""
    wanted = sorted({name for plan in plans for members in plan.ids.values() for name in members})
    if device.startswith("cuda"):
        store = TileStore(bags, memory_bytes=free_bytes(device), device=device)
        if store.keeps(wanted):
            return store
    return TileStore(bags, memory_bytes=(int(config.memory_gb * 1e9) or free_bytes()) // sharers)


def _are_stacked(plans: list[Plan], bags: BagFolder, config: TrainConfig, device: str, say: Callable[[str], None]) -> bool:
    """Whether all are trained as one program; where that would be worth it and cannot be, the reason is said."""
    worth = len(plans) > 1 and device.startswith("cuda") and config.devices == 1
    if config.stack == "off" or (config.stack == "auto" and not worth):
        return False
    reason = "a stack trains on one device" if config.devices > 1 else unstackable(config, [plan.task for plan in plans])
    if device == "mps":
        reason = "a stack needs float64, which Apple's GPUs lack"
    if reason and config.stack == "on":
        raise UsageError(f"--stack on: {reason}; train one after the other with --stack off")
    if not reason and config.stack == "auto" and device.startswith("cuda"):
        most = max(bags.n_valid(name) for plan in plans for name in plan.ids["train"])
        needed = min(most, config.tiles_per_bag or most) * len(plans) * config.hidden * _STACK_BYTES
        if needed > free_bytes(device):
            reason = f"{len(plans)} in a stack need about {needed / 1e9:.0f} GB for the largest bag (--tiles-per-bag: a part of it)"
    if reason:
        say(f"models are trained one after the other: {reason}")
    return reason is None


def _train_stacked(
    out: Path, plans: list[Plan], store: TileStore, cohort: Cohort, settings: Settings, device: str
) -> Iterator[str]:
    """Train all as one program, or find all trained; a line about each."""
    together = hash_of([plan.key for plan in plans])  # the order of slides follows from all of them
    plans = [replace(plan, key=hash_of([plan.key, together]), stack=len(plans)) for plan in plans]
    found = [finished(plan) for plan in plans]
    if all(found):
        yield from (already_trained(plan, done, cohort) for plan, done in zip(plans, found, strict=True) if done)
        return
    for plan in plans:
        begin(plan, settings)
    with _own_coins(device):
        models = [fresh_model(plan, store) for plan in plans]
        torch.manual_seed(int(hash_of([[plan.fold, plan.config.seed] for plan in plans])[:8], 16))  # of no label
        members = [
            Member(model, plan.task, plan.ids, plan.targets, plan.weights) for model, plan in zip(models, plans, strict=True)
        ]
        last = out / "stack.ckpt"
        fitted = fit_stacked(members, store, settings.train, device=device, checkpoint=last, key=together)
    for plan, one in zip(plans, fitted, strict=True):
        yield finish(plan, store, cohort, one, device)
    last.unlink(missing_ok=True)


def _train_each(ranks: Ranks, device: str, plans: list[Plan], bags: BagFolder, cohort: Cohort, settings: Settings) -> Iterator[str]:
    """Train, or find trained, one model after the other; a line about each."""
    store = _store(bags, plans, settings.train, device, sharers=ranks.count)
    for plan in plans:
        if ranks.count == 1:  # of several, the run has seen to it
            if (done := finished(plan)) is not None:
                yield already_trained(plan, done, cohort)
                continue
            begin(plan, settings)
        soup = None
        with _own_coins(device):
            model = fresh_model(plan, store, ranks)
            if plan.config.soup:
                soup = _soup(plan, model, store, device, ranks)
                model.load_state_dict(soup.state)
            fitted = _fit(plan, model, store, device, ranks)
        yield finish(plan, store, cohort, fitted, device, soup) if ranks.rank == 0 else ""


def _own_coins(device: str) -> AbstractContextManager[None]:
    """Chance inside leaves that outside as it was, on the CPU and on a GPU."""
    gpus = [torch.device(device).index or 0] if device.startswith("cuda") else []
    return torch.random.fork_rng(devices=gpus)


def _fit(plan: Plan, model: Standardized, store: TileStore, device: str, ranks: Ranks, *, epochs: int | None = None) -> Fitted:
    objective = build_objective(plan.config, plan.task, plan.labels["train"])
    slides = slides_of(plan, store)
    sides = slides["train"], slides["val"]
    return fit(plan.folder, model, objective, *sides, plan.config, device=device, ranks=ranks, key=plan.key, epochs=epochs)


def _soup(plan: Plan, model: Standardized, store: TileStore, device: str, ranks: Ranks) -> Soup:
    """Of short trainings that all begin as this model is, which stays as it is."""
    candidates = []
    for index in range(plan.config.soup):
        config = candidate_settings(plan.config, plan.fold, index)
        one = replace(plan, folder=plan.folder / SOUP / str(index), config=config)
        one.folder.mkdir(parents=True, exist_ok=True)
        with _own_coins(device):
            torch.manual_seed(config.seed)
            candidates.append(_fit(one, copy.deepcopy(model), store, device, ranks, epochs=plan.config.soup_epochs))
    return mixed(candidates, plan.config.soup_kept)


def _train_shared(plans: list[Plan], bags: BagFolder, cohort: Cohort, settings: Settings, device: str) -> Iterator[str]:
    """The same on several devices; what is finished, and what a new run does away with, is seen to before they start."""
    waiting = []
    for plan in plans:
        if (done := finished(plan)) is not None:
            yield already_trained(plan, done, cohort)
        else:
            begin(plan, settings)
            waiting.append(plan)
    if waiting:
        yield from run_ranks(devices_of(device, settings.train.devices), _train_each, waiting, bags, cohort, settings)

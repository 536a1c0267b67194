"""What a model of a run is to be: its slides, its targets, and its weights before the first step, all functions of fold and seed.

- The data of a model are its training and validation slides: a change of its test slides, or of other folds, leaves it trained.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsimil.aggregators import Standardized, check_aggregator
from wsimil.bags.dataset import BagFolder
from wsimil.config import TrainConfig
from wsimil.errors import LabelsError, SplitsError
from wsimil.files import hash_of
from wsimil.task import Task
from wsimil.training.cohort import Cohort
from wsimil.training.items import LabelledSlides, TileStore
from wsimil.training.model import build_aggregator
from wsimil.training.ranks import ALONE, Ranks

__all__ = ["Plan", "content_of", "fresh_model", "make_plan", "slides_of"]

_CHANGES_NOTHING = ("device", "devices", "memory_gb")
"""Settings that weights are no function of, up to rounding and the coins of dropout."""


@dataclass(frozen=True)
class Plan:
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


def make_plan(out: Path, bags: BagFolder, cohort: Cohort, fold: int, config: TrainConfig) -> Plan:
    """Of one fold and seed, in the folder `out` of the run.

    Raises:
        SplitsError, LabelsError: a fold without slides on a side, or whose labels make no task.
    """
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
    return Plan(out / f"fold{fold}-seed{config.seed}", fold, config, task, ids, labels, targets, weights, key)


def slides_of(plan: Plan, store: TileStore) -> dict[str, LabelledSlides]:
    """By side, as they are trained and validated on."""
    config = plan.config
    sampled = {"tiles_per_bag": config.tiles_per_bag, "instance_dropout": config.instance_dropout, "seed": config.seed}
    return {
        "train": LabelledSlides(store, plan.ids["train"], plan.targets["train"], plan.weights["train"], **sampled),
        "val": LabelledSlides(store, plan.ids["val"], plan.targets["val"], plan.weights["val"]),
    }


def content_of(plan: Plan, bags: BagFolder) -> dict[str, Any]:
    """What describes the aggregator in `model.json`."""
    config = plan.config
    return {
        "aggregator": config.aggregator,
        "aggregator_options": check_aggregator(config.aggregator, config.options_of("aggregator_options")),  # as they are used
        "dim": bags.dim,
        "hidden": config.hidden,
        "dropout": config.dropout,
    }


def fresh_model(plan: Plan, store: TileStore, ranks: Ranks = ALONE) -> Standardized:
    """The model before its first step, a function of fold and seed. Ranks begin as the first, which alone reads all features."""
    torch.manual_seed(int(hash_of([plan.fold, plan.config.seed])[:8], 16))
    inner = build_aggregator(content_of(plan, store.bags), plan.task)
    return Standardized(inner, *(store.moments(plan.ids["train"]) if plan.config.standardize and not ranks.rank else (None, None)))

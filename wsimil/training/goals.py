"""Which objective a run minimises: slide labels, what an aggregator's paper adds to them, and what may be put around that.

To add an objective: write its file in `wsimil/objectives/`, add its line to `OBJECTIVES`, and to `PREFERRED` where an aggregator
asks for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wsimil.aggregators import make_aggregator
from wsimil.batch import BagBatch, LabelledBags, Objective, offsets_of
from wsimil.config import TrainConfig
from wsimil.errors import ConfigError
from wsimil.objectives import AttentionEntropy, AveragedWeights, ClamInstances, MaskedHardInstances, SlideLabel
from wsimil.objectives.samplers import balanced_order, risk_set_order
from wsimil.objectives.wrapping import listening
from wsimil.settings import checked_options, nearest
from wsimil.task import Task, survival_of

__all__ = ["OBJECTIVES", "PREFERRED", "ObjectiveEntry", "build_objective", "objectives_of", "try_together"]


@dataclass(frozen=True)
class ObjectiveEntry:
    """How an objective is made: all but the slides' own loss around another."""

    make: Callable[..., Objective]
    summary: str
    paper: str
    parity: str  # against the authors' code on the same weights: verified | approximate, why | untested | own
    settings: tuple[str, ...] = ()  # arguments that are settings of the training

    def options(self) -> dict[str, Any]:
        """What `--objective-options` may set, with defaults."""
        parameters = inspect.signature(self.make).parameters.values()
        named = (one for one in parameters if one.kind is one.KEYWORD_ONLY)
        return {one.name: one.default for one in named if one.name not in (*self.settings, "order", "own_sets")}


OBJECTIVES: dict[str, ObjectiveEntry] = {
    "slide_label": ObjectiveEntry(SlideLabel, "the labels of the slides; inside of all others", "baseline", "own"),
    "clam_instances": ObjectiveEntry(
        ClamInstances,
        "tiles judged as evidence for the class or not",
        "Lu 2021, arXiv 2004.09666",
        "verified",
        settings=("hidden",),
    ),
    "mhim": ObjectiveEntry(
        MaskedHardInstances,
        "a teacher hides the tiles it finds easiest; needs attention and a bag embedding",
        "Tang 2023, arXiv 2307.15254",
        "verified: what is hidden and the loss; our teacher starts with the student, and drops nothing out",
        settings=("seed",),
    ),
    "attention_entropy": ObjectiveEntry(
        AttentionEntropy,
        "attention spread over many tiles, less and less",
        "AEM, Zhang 2024, arXiv 2406.15303",
        "verified: the entropy; its weight fades as in the paper, in the authors' code it is constant",
    ),
    "averaged_weights": ObjectiveEntry(AveragedWeights, "a moving average of the weights is validated and kept", "baseline", "own"),
}
"""Name → objective. Annotations of the classes say what options may be."""

PREFERRED = {"clam_sb": "clam_instances", "clam_mb": "clam_instances"}
"""Aggregator → objective of its paper, where it is not the slides' labels alone; for tasks of exclusive classes."""


def objectives_of(config: TrainConfig, task: Task) -> tuple[str, ...]:
    """Names of the objectives that the settings ask for, `slide_label` first, each around those before it.

    Raises:
        ConfigError: no such objective, one of them twice, or one that cannot stand where it stands.
    """
    asked = config.objective.split("+")
    exclusive = task.kind in ("binary", "multiclass")
    names = [PREFERRED.get(config.aggregator, "slide_label") if name == "auto" and exclusive else name for name in asked]
    names = [name for name in names if name not in ("auto", "slide_label")]
    for name in names:
        if name not in OBJECTIVES:
            raise ConfigError(f"objective {name!r} is unknown{nearest(name, OBJECTIVES)} (known: {', '.join(OBJECTIVES)})")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"objective {config.objective}: {twice} stands there twice")
    if "clam_instances" in names[1:]:
        raise ConfigError(f"objective {config.objective}: clam_instances looks at the slides' loss itself, so it stands first")
    return "slide_label", *names


def build_objective(config: TrainConfig, task: Task, labels: Sequence[str]) -> Objective:
    """The objective that the settings ask for; `labels` are those of the training slides, in their order.

    Raises:
        ConfigError: no such objective, not its options, one of the wrong kind or out of range, or not for this task.
    """
    names = objectives_of(config, task)
    options, taken = config.options_of("objective_options"), {name: OBJECTIVES[name].options() for name in names}
    for option, value in options.items():
        if not any(option in own for own in taken.values()):
            known = [option for own in taken.values() for option in own]
            listed = f"{nearest(option, known)} (options: {', '.join(known)})"
            raise ConfigError(f"objective {config.objective}: no option {option} (of {value}){listed}")
    given: Any = (task,)
    for name, own in taken.items():
        entry = OBJECTIVES[name]
        mine = {option: value for option, value in options.items() if option in own}
        mine = checked_options(entry.make, mine, f"objective {name}")
        mine |= {setting: getattr(config, setting) for setting in entry.settings}
        if name == "slide_label":
            mine |= {"order": _order(config, task, labels), "own_sets": config.sampling == "risk_set"}
        given = (entry.make(*given, **mine),)
    return given[0]


def try_together(config: TrainConfig, task: Task, labels: Sequence[str], *, dim: int | None = None) -> None:
    """Try a step of the aggregator and the objective asked for, on a few tiles of noise, before anything is done for them.

    Args:
        labels: of training slides.
        dim: width of the features; one that suits, where it is not known yet.

    Raises:
        ConfigError: they do not go together, or as `build_objective` and `make_aggregator` do.
    """
    labels, options = labels[:2], config.options_of("aggregator_options")
    dim = dim or max(config.hidden, int(options.get("n_features") or 0))
    with torch.random.fork_rng(devices=[]):
        place = torch.arange(9 * len(labels))
        bags = BagBatch(
            torch.randn(len(place), dim),
            offsets_of([9] * len(labels)),
            coords_um=100.0 * torch.stack([place % 3, place // 3], 1).float(),
            tile_um=torch.full((len(labels),), 100.0),
            slide_ids=tuple(map(str, range(len(labels)))),
        )
        model = make_aggregator(config.aggregator, dim, task.n_outputs, hidden=config.hidden, dropout=config.dropout, **options)
        objective = build_objective(config, task, labels)
        objective.prepare(model.train())
        try:
            with listening(model) as heard:
                objective.losses(model, LabelledBags(bags, task.encode(labels)), 0.0)
        except ConfigError as error:
            raise ConfigError(f"--objective {config.objective} with --aggregator {config.aggregator}: {error}") from None
    if "extra_weight" in config.options_of("objective_options") and not heard[0][1].extra_logits:
        raise ConfigError(
            f"extra_weight is of further outputs that are learned from, and {config.aggregator} has none; leave it out"
        )


def _order(config: TrainConfig, task: Task, labels: Sequence[str]) -> Callable[[int], Iterable[int]] | None:
    if config.sampling == "balanced":
        if task.has_values or task.kind == "multilabel":
            instead = "; train.balance balances its labels" if task.kind == "multilabel" else ""
            raise ConfigError(
                "train.sampling is balanced, which is for classes that exclude one another, and events; "
                f"the task is {task.kind}{instead}"
            )
        if task.compares_slides:
            raise ConfigError(
                "train.sampling is balanced, and train.loss is cox, whose likelihood is that of the cohort as it is: with events "
                "drawn more often it would be another one; take sampling risk_set (an event in every step), or loss nll"
            )
        strata = [task.strata(label) for label in labels]
        return lambda epoch: balanced_order(strata, seed=config.seed, epoch=epoch)
    if config.sampling == "risk_set":
        if task.kind != "survival":
            raise ConfigError(f"train.sampling is risk_set, which is for survival; the task is {task.kind}")
        time, event = zip(*map(survival_of, labels), strict=True)
        slides = config.bags_per_step
        return lambda epoch: risk_set_order(time, event, slides_per_step=slides, seed=config.seed, epoch=epoch)
    return None

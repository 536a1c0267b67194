"""Which objective a run minimises: slide labels, or what an aggregator's paper adds to them.

To add an objective: write its file in `wsimil/objectives/`, add its line to `OBJECTIVES`, and to `PREFERRED` where an aggregator
asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from wsimil.batch import Objective
from wsimil.config import TrainConfig
from wsimil.errors import ConfigError
from wsimil.objectives import AttentionEntropy, AveragedWeights, ClamInstances, MaskedHardInstances, SlideLabel
from wsimil.objectives.samplers import balanced_order, risk_set_order
from wsimil.settings import checked_options, nearest
from wsimil.task import Task, survival_of

__all__ = ["OBJECTIVES", "PREFERRED", "build_objective"]

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "slide_label": SlideLabel,
    "clam_instances": ClamInstances,
    "mhim": MaskedHardInstances,
    "attention_entropy": AttentionEntropy,
    "averaged_weights": AveragedWeights,
}
"""Name → class; all but the slides' own loss are made around it. Annotations say what options may be."""

_SETTINGS = {"clam_instances": ("hidden",), "mhim": ("seed",)}
"""Name → arguments that are settings of the training."""

PREFERRED = {"clam_sb": "clam_instances", "clam_mb": "clam_instances"}
"""Aggregator → objective of its paper, where it is not the slides' labels alone; for tasks of exclusive classes."""


def build_objective(config: TrainConfig, task: Task, labels: Sequence[str]) -> Objective:
    """The objective that the settings ask for; `labels` are those of the training slides, in their order.

    Raises:
        ConfigError: no such objective, not its options, one of the wrong kind or out of range, or not for this task.
    """
    name = config.objective
    if name == "auto":
        name = PREFERRED.get(config.aggregator, "slide_label") if task.kind in ("binary", "multiclass") else "slide_label"
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} is unknown{nearest(name, OBJECTIVES)} (known: {', '.join(OBJECTIVES)})")
    options = checked_options(OBJECTIVES[name], config.options_of("objective_options"), f"objective {name}")
    order = _order(config, task, labels)
    own_sets = config.sampling == "risk_set"
    try:
        if name == "slide_label":
            return SlideLabel(task, order=order, own_sets=own_sets, **options)
        given = {key: getattr(config, key) for key in _SETTINGS.get(name, ())}
        return OBJECTIVES[name](SlideLabel(task, order=order, own_sets=own_sets), **given, **options)
    except TypeError as error:
        if not options:
            raise
        raise ConfigError(f"objective {name} with {options}: {str(error).partition('() ')[2] or error}") from error


def _order(config: TrainConfig, task: Task, labels: Sequence[str]) -> Callable[[int], Iterable[int]] | None:
    if config.sampling == "balanced":
        if task.has_values:
            raise ConfigError(f"train.sampling is balanced, which is for classes and events; the task is {task.kind}")
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

"""Which objective a run minimises: slide labels, or what an aggregator's paper adds to them.

To add an objective: write its file in `wsimil/objectives/`, add its line to `OBJECTIVES`, and to `PREFERRED` where an aggregator
asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from wsimil.batch import Objective
from wsimil.config import TrainConfig, nearest
from wsimil.errors import ConfigError
from wsimil.objectives import AttentionEntropy, AveragedWeights, ClamInstances, MaskedHardInstances, SlideLabel
from wsimil.objectives.samplers import balanced_order, risk_set_order
from wsimil.task import Task, survival_of

__all__ = ["OBJECTIVES", "PREFERRED", "build_objective"]

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "slide_label": lambda slide_label, config, **weights: SlideLabel(slide_label.task, order=slide_label.order, **weights),
    "clam_instances": lambda slide_label, config, **options: ClamInstances(slide_label, config.hidden, **options),
    "mhim": lambda slide_label, config, **options: MaskedHardInstances(slide_label, seed=config.seed, **options),
    "attention_entropy": lambda slide_label, config, **options: AttentionEntropy(slide_label, **options),
    "averaged_weights": lambda slide_label, config, **options: AveragedWeights(slide_label, **options),
}
"""Name → what makes it from the slides' loss, the settings and its own options."""

PREFERRED = {"clam_sb": "clam_instances", "clam_mb": "clam_instances"}
"""Aggregator → objective of its paper, where it is not the slides' labels alone; for tasks of exclusive classes."""


def build_objective(config: TrainConfig, task: Task, labels: Sequence[str]) -> Objective:
    """The objective that the settings ask for; `labels` are those of the training slides, in their order.

    Raises:
        ConfigError: no such objective, not its options, or not for this task.
    """
    name = config.objective
    if name == "auto":
        name = PREFERRED.get(config.aggregator, "slide_label") if task.kind in ("binary", "multiclass") else "slide_label"
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} is unknown{nearest(name, OBJECTIVES)} (known: {', '.join(OBJECTIVES)})")
    options = config.options_of("objective_options")
    try:
        return OBJECTIVES[name](SlideLabel(task, order=_order(config, task, labels)), config, **options)
    except TypeError as error:
        if not options:
            raise
        raise ConfigError(f"objective {name} with {options}: {str(error).partition('() ')[2] or error}") from error


def _order(config: TrainConfig, task: Task, labels: Sequence[str]) -> Callable[[int], Iterable[int]] | None:
    if config.sampling == "balanced":
        strata = [task.strata(label) for label in labels]
        return lambda epoch: balanced_order(strata, seed=config.seed, epoch=epoch)
    if config.sampling == "risk_set":
        if task.kind != "survival":
            raise ConfigError(f"train.sampling is risk_set, which is for survival; the task is {task.kind}")
        time, event = zip(*map(survival_of, labels), strict=True)
        slides = config.bags_per_step
        return lambda epoch: risk_set_order(time, event, slides_per_step=slides, seed=config.seed, epoch=epoch)
    return None

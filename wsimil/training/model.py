"""A finished run as others read it: `model.json` and `model.safetensors`, nothing in them executed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from wsimil.aggregators import Standardized, make_aggregator
from wsimil.batch import Aggregator
from wsimil.config import FilterConfig, TrainConfig
from wsimil.errors import ConfigError, UsageError
from wsimil.files import file_sha256, read_json
from wsimil.task import Task

__all__ = ["MODEL_FORMAT", "TrainedModel", "build_aggregator", "differences", "load_model", "recipe"]

MODEL_FORMAT = 1

_NOT_OF_THE_RECIPE = ("seed", "seeds", "fold", "device", "devices", "memory_gb", "precision", "stack", "keep_epochs")
"""Settings that say which model of a run it is, and where and how it was computed: folds trained on two machines are one run."""


def recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that models must share to be averaged, from the `config` of their `model.json`."""
    settings = asdict(TrainConfig()) | dict(config)  # models older than a setting had its default
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return {key: value for key, value in plain.items() if key not in _NOT_OF_THE_RECIPE}


def differences(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each of these recipes has that is not in all of them, as text."""
    keys = [key for key in recipes[0] if any(one.get(key) != recipes[0][key] for one in recipes)]
    return [", ".join(f"{key} {one.get(key)}" for key in keys) for one in recipes]


def build_aggregator(content: Mapping[str, Any], task: Task, *, check: bool = True) -> Aggregator:
    """A fresh aggregator as `model.json` describes it: aggregator, dim, hidden, dropout and its own options.

    Without `check`, options may have any value that a model was once trained with.

    Raises:
        ConfigError: no such aggregator, or not its options.
    """
    options = content.get("aggregator_options", {})  # models older than options had none
    sizes = {"hidden": content["hidden"], "dropout": content["dropout"]}
    try:
        return make_aggregator(content["aggregator"], content["dim"], task.n_outputs, **sizes, check=check, **options)
    except TypeError as error:
        if not options:
            raise
        raise ConfigError(
            f"aggregator {content['aggregator']} with {options}: {str(error).partition('() ')[2] or error}"
        ) from error


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
    weights_sha256: str

    @property
    def recipe(self) -> dict[str, Any]:
        return recipe(self.content.get("config", {}))


def load_model(run: str | Path) -> TrainedModel:
    """Read `model.json` and `model.safetensors`; nothing in them is executed.

    Raises:
        UsageError: not a finished run, a damaged one, or of a newer format.
    """
    run = Path(run)
    if not (run / "model.json").exists():
        raise UsageError(f"{run}: no finished model in it; `wsimil train` makes one")
    with _whole(run / "model.json"):
        content = read_json(run / "model.json")
        form, form_version = content["format"], content.get("format_version", 0)
    with _whole(run / "model.safetensors"):
        state = load_file(run / "model.safetensors")
    if form != "wsimil-model" or form_version > MODEL_FORMAT:
        raise UsageError(f"{run}: model format {form_version} is newer than this wsimil reads; upgrade it")
    try:
        limits = FilterConfig(**content.get("filter", {}))  # models older than filters saw every tile
    except TypeError as error:
        raise UsageError(f"{run}: its filter {content['filter']} has keys this wsimil does not know; upgrade it") from error
    task = Task.from_json(content["task"])
    model = Standardized(build_aggregator(content, task, check=False))
    with _whole(run / "model.safetensors"):
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
        weights_sha256=file_sha256(run / "model.safetensors"),
    )


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Whatever a damaged file of a model trips over becomes a UsageError that names it."""
    try:
        yield
    except Exception as error:  # safetensors and torch raise kinds of their own
        said = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{path}: cannot be read, or is damaged ({said}); copy it anew, or delete {path.parent} and train again"
        ) from error

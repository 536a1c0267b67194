"""From bags and labels to models: one loop for every model and objective, one run folder per fold and seed.

- Test slides are dropped from the splits before anything is loaded: no argument leads from them to the loop.
- Epoch, temperature and threshold are chosen on validation slides only; the rule is fixed: least validation loss.
- A run is a function of its settings, seed and data: killed and resumed, it ends in the same weights.
- A finished run is `model.safetensors` + `model.json`; `last.ckpt` is only there to resume, and is read without executing code.

Names are imported when first used: to read a finished model, Lightning is not needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsimil.training.cohort import Cohort, prepare_cohort
    from wsimil.training.loop import Loop
    from wsimil.training.model import TrainedModel, load_model
    from wsimil.training.run import train

_HOMES = {
    "Cohort": "cohort",
    "Loop": "loop",
    "TrainedModel": "model",
    "load_model": "model",
    "prepare_cohort": "cohort",
    "train": "run",
}

__all__ = ["Cohort", "Loop", "TrainedModel", "load_model", "prepare_cohort", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"wsimil.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'wsimil.training' has no attribute {name!r}")

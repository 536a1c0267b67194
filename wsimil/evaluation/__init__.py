"""Evaluation: from a predictions table to numbers with intervals."""

from wsimil.evaluation.calibration import choose_threshold, fit_temperature
from wsimil.evaluation.evaluate import compare_predictions, evaluate_predictions, write_evaluation
from wsimil.evaluation.table import read_predictions

__all__ = [
    "choose_threshold",
    "compare_predictions",
    "evaluate_predictions",
    "fit_temperature",
    "read_predictions",
    "write_evaluation",
]

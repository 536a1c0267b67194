"""wsimil: multiple-instance learning on whole-slide images, from slide folders to predictions and heatmaps.

Every stage of the command line is a function here:

    pretrain(slides, encoder)               an encoder, without labels
    extract_features(slides, job)           bags of features, one HDF5 file per slide
    train(job, labels, run)                 one model per fold and seed
    predict(job, run, predictions)          predictions.csv and tile scores
    write_evaluation(folder, predictions)   metrics with intervals
    draw_heatmaps(predictions, slides, out) pictures and QuPath polygons
    run_study(slides, labels, study)        all of it, redoing only what changed

Names are imported when they are first used: `import wsimil` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsimil.aggregators import AGGREGATORS, make_aggregator
    from wsimil.bags.bag import read_bag
    from wsimil.bags.dataset import BagFolder
    from wsimil.batch import Aggregator, BagBatch, BagOutput, Objective, pack
    from wsimil.config import Settings
    from wsimil.conversion import convert_bags
    from wsimil.encoders import load_encoder
    from wsimil.errors import WsimilError
    from wsimil.evaluation import evaluate_predictions, write_evaluation
    from wsimil.extraction import extract_features, tile_slides
    from wsimil.heatmaps import draw_heatmaps
    from wsimil.prediction import predict
    from wsimil.pretraining import pretrain
    from wsimil.probing import probe
    from wsimil.report import write_report
    from wsimil.retrieval import search
    from wsimil.settings import read_settings
    from wsimil.slides.slide import Slide
    from wsimil.study import run_study
    from wsimil.task import Task
    from wsimil.training import load_model, train
    from wsimil.validation import validate_bags

_HOMES = {
    "AGGREGATORS": "aggregators",
    "Aggregator": "batch",
    "BagBatch": "batch",
    "BagFolder": "bags.dataset",
    "BagOutput": "batch",
    "Objective": "batch",
    "Settings": "config",
    "Slide": "slides.slide",
    "Task": "task",
    "WsimilError": "errors",
    "convert_bags": "conversion",
    "draw_heatmaps": "heatmaps",
    "evaluate_predictions": "evaluation",
    "extract_features": "extraction",
    "load_encoder": "encoders",
    "load_model": "training",
    "make_aggregator": "aggregators",
    "pack": "batch",
    "predict": "prediction",
    "pretrain": "pretraining",
    "probe": "probing",
    "read_bag": "bags.bag",
    "read_settings": "settings",
    "run_study": "study",
    "search": "retrieval",
    "tile_slides": "extraction",
    "train": "training",
    "validate_bags": "validation",
    "write_evaluation": "evaluation",
    "write_report": "report",
}

__all__ = [
    "AGGREGATORS",
    "Aggregator",
    "BagBatch",
    "BagFolder",
    "BagOutput",
    "Objective",
    "Settings",
    "Slide",
    "Task",
    "WsimilError",
    "convert_bags",
    "draw_heatmaps",
    "evaluate_predictions",
    "extract_features",
    "load_encoder",
    "load_model",
    "make_aggregator",
    "pack",
    "predict",
    "pretrain",
    "probe",
    "read_bag",
    "read_settings",
    "run_study",
    "search",
    "tile_slides",
    "train",
    "validate_bags",
    "write_evaluation",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"wsimil.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'wsimil' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

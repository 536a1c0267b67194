"""That an encoder has seen test slides stands with every result: in the table of predictions, in the metrics, on the page."""

from __future__ import annotations

from pathlib import Path

import h5py
import pandas as pd
import pytest
from toy_bags import write_cohort

from wsimil.bags.splits import read_splits
from wsimil.config import Settings, SplitConfig, TrainConfig
from wsimil.evaluation import compare_predictions, write_evaluation
from wsimil.evaluation.table import read_predictions
from wsimil.files import read_json
from wsimil.prediction import predict
from wsimil.report import write_report
from wsimil.training import train

SETTINGS = Settings(split=SplitConfig(folds=2), train=TrainConfig(epochs=2, hidden=8, bags_per_step=4, device="cpu"))


def study_of(folder: Path, *, seen: list[str]) -> Path:
    """A study whose encoder says that it was pretrained on these slides, knowingly."""
    write_cohort(folder, n_slides=12)
    for name in seen:
        with h5py.File(folder / "features_toy" / f"{name}.h5", "r+") as file:
            file.attrs["encoder_saw_slide"] = True
            file.attrs["encoder_transductive"] = True
    train(folder / "features_toy", folder / "labels.csv", folder / "run", settings=SETTINGS, quiet=True)
    predict(folder / "features_toy", folder / "run", folder / "predictions", quiet=True)
    table = read_predictions(folder / "predictions" / "predictions.csv")
    write_evaluation(folder / "evaluation", table, n_bootstrap=0)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def transductive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_of(tmp_path_factory.mktemp("transductive"), seen=["s03", "s04", "s08"])


@pytest.fixture(scope="module")
def inductive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_of(tmp_path_factory.mktemp("inductive"), seen=[])


def test_the_table_marks_the_slides(transductive: Path, inductive: Path) -> None:
    table = read_predictions(transductive / "predictions" / "predictions.csv")
    tested = set(read_splits(transductive / "run" / "splits.csv").query("split == 'test'")["slide_id"])
    assert set(table.loc[table["encoder_saw_slide"] == "1", "slide_id"]) == {"s03", "s04", "s08"} & tested
    assert set(table["encoder_saw_slide"]) == {"", "1"}
    assert "encoder_saw_slide" not in read_predictions(inductive / "predictions" / "predictions.csv")


def test_metrics_and_page_say_it_above_the_numbers(transductive: Path) -> None:
    said = read_json(transductive / "evaluation" / "metrics.json")["notes"]["leak.encoder"]
    assert "3 of these 12 slides" in said and "--transductive" in said
    page = (transductive / "report.html").read_text()
    assert page.index(said) < page.index("<h2>Metrics</h2>") and page.count(said) == 1


def test_an_encoder_that_saw_no_test_slide_is_not_suspected(inductive: Path) -> None:
    assert not [path for path in read_json(inductive / "evaluation" / "metrics.json")["notes"] if path.startswith("leak.")]
    assert 'class="leak"' not in (inductive / "report.html").read_text()


def test_a_comparison_says_whose_encoder_it_was(transductive: Path, inductive: Path) -> None:
    tables = [read_predictions(folder / "predictions" / "predictions.csv") for folder in (transductive, inductive)]
    notes = compare_predictions(*tables, n_bootstrap=0)["notes"]
    assert "3 of these 12" in notes["leak.encoder.a"] and "leak.encoder.b" not in notes


def test_the_mark_is_understood_from_a_reader_that_made_it_a_number(transductive: Path) -> None:
    table = pd.read_csv(transductive / "predictions" / "predictions.csv", dtype={"slide_id": str})
    assert table["encoder_saw_slide"].dtype == float
    assert "3 of these 12" in compare_predictions(table, table, n_bootstrap=0)["notes"]["leak.encoder.a"]

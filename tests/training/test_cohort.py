"""Who is learned from: slides of given splits that have no label are predicted, and teach nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsimil.cli import main
from wsimil.config import LabelsConfig, Settings, SplitConfig, TrainConfig
from wsimil.errors import SplitsError, UsageError
from wsimil.evaluation.table import read_predictions
from wsimil.files import read_json
from wsimil.training import train

N_SLIDES = 24
UNLABELLED = ("s00", "s10", "s20")
"""Of the training, validation and test slides below, one each."""

TASKS = {
    "survival": (LabelsConfig(time="months", event="died"), "months,died", lambda number: f"{number + 1},{number % 3 and 1}", ","),
    "binary": (LabelsConfig(), "label", lambda number: ("neg", "pos")[number % 2], ""),
    "regression": (LabelsConfig(), "label", lambda number: f"{number + 0.5}", ""),
}


def side_of(number: int) -> str:
    return "train" if number < 10 else "val" if number < 18 else "test"


def write_tables(folder: Path, kind: str, unlabelled: tuple[str, ...] = UNLABELLED) -> LabelsConfig:
    config, columns, label, empty = TASKS[kind]
    names = [f"s{number:02}" for number in range(N_SLIDES)]
    rows = [f"{name},{empty if name in unlabelled else label(number)}" for number, name in enumerate(names)]
    (folder / "labels.csv").write_text("\n".join([f"slide,{columns}", *rows]))
    splits = [f"0,{name},{name},,{side_of(number)}" for number, name in enumerate(names)]
    (folder / "splits.csv").write_text("\n".join(["fold,slide_id,patient,site,split", *splits]))
    return config


@pytest.mark.parametrize("kind", TASKS)
def test_slides_without_a_label_in_given_splits_teach_nothing_and_are_predicted(toy, tmp_path, kind):
    config = write_tables(tmp_path, kind)
    said: list[str] = []
    settings = Settings(labels=config, train=TrainConfig(epochs=1, hidden=8, device="cpu"))
    (run,) = train(
        toy, tmp_path / "labels.csv", tmp_path / "run", splits=tmp_path / "splits.csv", settings=settings, say=said.append
    )
    content = read_json(run / "model.json")
    assert (content["n_train"], content["n_val"]) == (9, 7)
    assert "s00, s10, s20: in the splits without a label; nothing is learned from them" in said
    assert main(["predict", str(toy), "--model", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    table = read_predictions(tmp_path / "out" / "predictions.csv").set_index("slide_id")
    assert table.loc["s20", "status"] == "done" and len(table) == N_SLIDES - 18
    assert (table["label"].fillna("") == "").sum() == 1


def test_a_side_without_any_label_is_an_error(toy, tmp_path):
    write_tables(tmp_path, "binary", tuple(f"s{number}" for number in range(10, 18)))
    settings = Settings(split=SplitConfig(), train=TrainConfig(epochs=1, hidden=8, device="cpu"))
    with pytest.raises(SplitsError, match="fold 0: no val slide has a label and a bag with tiles"):
        train(toy, tmp_path / "labels.csv", tmp_path / "run", splits=tmp_path / "splits.csv", settings=settings)


def test_training_slides_of_one_class_alone_are_an_error_that_names_fold_and_class(toy, tmp_path):
    write_tables(tmp_path, "binary", tuple(f"s{number:02}" for number in range(1, 10, 2)))
    settings = Settings(train=TrainConfig(epochs=1, hidden=8, device="cpu"))
    with pytest.raises(UsageError, match="fold 0: all 5 training slides are neg"):
        train(toy, tmp_path / "labels.csv", tmp_path / "run", splits=tmp_path / "splits.csv", settings=settings)

"""Who is learned from: slides of given splits that have no label are predicted, and teach nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from wsimil.bags.bag import Geometry, read_bag, write_bag
from wsimil.bags.dataset import BagFolder
from wsimil.bags.splits import read_splits
from wsimil.cli import main
from wsimil.config import LabelsConfig, PredictConfig, Settings, SplitConfig, TrainConfig
from wsimil.errors import SplitsError, UsageError
from wsimil.evaluation.table import read_predictions
from wsimil.files import read_json
from wsimil.prediction import predict
from wsimil.training import train
from wsimil.training.cohort import prepare_cohort

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


def test_slides_that_are_in_no_fold_are_named_with_the_reason(toy, tmp_path):
    names = [f"s{number:02}" for number in range(N_SLIDES)]
    labels = {name: ("neg", "pos")[number % 2] for number, name in enumerate(names)} | {"s03": ""}
    del labels["s07"]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["slide,label", *(f"{name},{label}" for name, label in labels.items())]))
    bags = BagFolder(toy)
    cohort = prepare_cohort(bags, table)
    assert cohort.left_out(bags) == ["s03: without a label, so in no fold", "s07: not in the label table"]
    bags.headers["s05"] = replace(bags.headers["s05"], attributes={"n_invalid": bags.headers["s05"].n_tiles})
    cohort = prepare_cohort(bags, table)
    assert cohort.left_out(bags)[1] == "s05: labelled, but without usable tiles, so in no fold"
    splits = cohort.splits[cohort.splits["slide_id"] != "s09"]
    assert "s09: labelled, but not in the splits" in replace(cohort, splits=splits).left_out(bags)


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


def test_a_group_is_kept_together_beside_the_patient_which_stays_what_it_is(toy, tmp_path):
    """Twelve patients of two slides in five hospitals; one of them, p00, has slides in two; s23 has no label."""
    rows = [(f"s{n:02}", f"p{n // 4 * 2 + n % 2:02}", f"h{n // 4 % 5}", ("neg", "pos")[n % 2]) for n in range(N_SLIDES)]
    rows[0], rows[23] = (*rows[0][:2], "h1", "neg"), (*rows[23][:3], "")
    table = pd.DataFrame(rows, columns=["slide", "patient", "hosp", "label"]).set_index("slide")
    table.to_csv(tmp_path / "labels.csv")
    common = ["--labels", str(tmp_path / "labels.csv"), "--group", "hosp", "--quiet"]
    run = ["--folds", "3", "--epochs", "1", "--hidden", "8", "--device", "cpu", "--val-fraction", "0.3"]
    assert main(["train", str(toy), *common, *run, "--out", str(tmp_path / "run")]) == 0
    sides = read_splits(tmp_path / "run" / "splits.csv").merge(table["hosp"], left_on="slide_id", right_index=True)
    for unit in ("patient", "hosp"):
        assert sides.groupby(["fold", unit])["split"].nunique().max() == 1
    out = str(tmp_path / "slides")
    assert main(["predict", str(toy), "--model", str(tmp_path / "run"), "--out", out, "--quiet"]) == 0
    slides = read_predictions(tmp_path / "slides" / "predictions.csv").set_index("slide_id")
    assert slides["patient"].to_dict() == table["patient"].to_dict()
    assert slides.loc[["s01", "s04", "s08"], "group"].tolist() == ["h0+h1", "h0+h1", "h2"]
    # s23 was in no fold, but others of its hospital were: it is not new to the models that learned from them
    assert slides.groupby("group")["fold"].nunique().max() == 1 and set(slides["split"]) == {"test"}
    patients = predict(toy, tmp_path / "run", tmp_path / "patients", config=PredictConfig(bag="patient"), quiet=True)
    assert sorted(patients["slide_id"]) == sorted(set(table["patient"])) and (patients["slide"].str.count(";") == 1).all()
    assert main(["evaluate", out, "--out", str(tmp_path / "evaluation"), "--bootstrap", "20", "--quiet"]) == 0
    found = read_json(tmp_path / "evaluation" / "metrics.json")
    assert (found["n_slides"], found["n_patients"], found["n_groups"]) == (24, 12, 4)
    assert main(["evaluate", out, *common, "--out", str(tmp_path / "again"), "--bootstrap", "20"]) == 0
    assert read_json(tmp_path / "again" / "metrics.json")["pooled"] == found["pooled"]


def test_patients_are_counted_and_it_is_said_where_none_are_named(toy, tmp_path):
    names = [f"s{number:02}" for number in range(N_SLIDES)]
    bags = BagFolder(toy)
    for column, said in {
        "patient": "24 slides of 12 patients",
        "ward": "24 slides of 24 patients; every slide counts as a patient of its own (column patient, or --group)",
    }.items():
        rows = [f"{name},P{number // 2},{number // 2 % 2}" for number, name in enumerate(names)]
        (tmp_path / "labels.csv").write_text("\n".join([f"slide,{column},label", *rows]))
        assert prepare_cohort(bags, tmp_path / "labels.csv").owners() == f"folds: {said}"


def copy_of(toy: Path, folder: Path, other: float, **attributes) -> BagFolder:
    """The toy bags, and s00 once more in single precision, as `again`; its features by so much other."""
    shutil.copytree(toy / "features_toy", folder / "features_toy")
    bag = read_bag(toy / "features_toy/s00.h5")
    again = replace(
        bag, features=bag.features.astype(np.float32) + other, attributes={**bag.attributes, "slide_id": "again", **attributes}
    )
    write_bag(folder / "features_toy/again.h5", again, Geometry(224, 224.0, 0, 20_000, 20_000, 0.5, 0.5, "again"))
    return BagFolder(folder)


@pytest.mark.parametrize(
    ("attributes", "other", "said"),
    [
        ({"slide_fingerprint": "s05"}, "s05", "are of the same slide file"),
        ({"slide_fingerprint": "x"}, "s00", "have the same features"),
    ],
)
def test_one_slide_under_two_names_is_refused_on_two_sides(toy, tmp_path, attributes, other, said):
    bags = copy_of(toy, tmp_path, float(other == "s05"), **attributes)
    names = [f"s{number:02}" for number in range(N_SLIDES)]
    rows = [f"{name},{name},{('neg', 'pos')[number % 2]}" for number, name in enumerate(names)]
    for patient, refused in (("again", True), (other, False)):
        table = tmp_path / "labels.csv"
        table.write_text("\n".join(["slide,patient,label", *rows, f"again,{patient},{'neg' if other == 's00' else 'pos'}"]))
        if refused:
            with pytest.raises(SplitsError, match=f"again and {other} {said}|{other} and again {said}"):
                prepare_cohort(bags, table)
        else:
            assert len(prepare_cohort(bags, table).labels) == N_SLIDES + 1


def test_slides_without_a_patient_are_counted_where_others_have_one(toy, tmp_path):
    rows = [f"s{number:02},{'' if number < 3 else number // 2},{('neg', 'pos')[number % 2]}" for number in range(N_SLIDES)]
    (tmp_path / "labels.csv").write_text("\n".join(["slide,patient,label", *rows]))
    cohort = prepare_cohort(BagFolder(toy), tmp_path / "labels.csv")
    assert cohort.owners().endswith("; 3 slides without a patient count as patients of their own")


def test_sides_that_lack_a_class_and_options_without_effect_are_said(toy, tmp_path):
    labels = [("neg", "pos")[number % 2] if number < 10 else "neg" if number < 18 else "rare" for number in range(N_SLIDES)]
    names = [f"s{number:02}" for number in range(N_SLIDES)]
    (tmp_path / "labels.csv").write_text("\n".join(["slide,label", *map(",".join, zip(names, labels, strict=True))]))
    splits = [f"0,{name},{name},,{side_of(number)}" for number, name in enumerate(names)]
    (tmp_path / "splits.csv").write_text("\n".join(["fold,slide_id,patient,site,split", *splits]))
    said: list[str] = []
    settings = Settings(train=TrainConfig(epochs=1, hidden=8, device="cpu"), split=SplitConfig(folds=7, val_fraction=0.3))
    given = {"splits": tmp_path / "splits.csv", "settings": settings, "say": said.append}
    train(toy, tmp_path / "labels.csv", tmp_path / "run", **given)
    assert any(line.startswith("fold 0: every validation slide is neg, so the best epoch") for line in said)
    assert "fold 0: no training slide is rare, which test slides are: no model of this fold knows it" in said
    assert f"--folds, --val-fraction: without effect, the folds are those of {tmp_path / 'splits.csv'}" in said


def test_balance_switched_off_where_there_are_no_classes_is_said(toy, tmp_path):
    table = pd.read_csv(toy / "labels.csv").assign(label=lambda rows: range(len(rows)))
    table.to_csv(tmp_path / "labels.csv", index=False)
    remark = "--no-balance: without effect, there are no classes to balance in a task of regression"
    for balance, expected in ((False, [remark]), (True, [])):
        said: list[str] = []
        config = TrainConfig(epochs=1, hidden=8, device="cpu", fold="0", balance=balance)
        settings = Settings(train=config, labels=LabelsConfig(task="regression"))
        train(toy, tmp_path / "labels.csv", tmp_path / f"run-{balance}", settings=settings, say=said.append)
        assert [line for line in said if "balance" in line] == expected

"""A predictions table and the labels that it is measured against: of slides, of pooled patients, of a part of the cohort."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from toy_bags import write_cohort

from wsimil.bags.bag import Geometry, read_bag, write_bag
from wsimil.bags.dataset import BagFolder
from wsimil.cli import main
from wsimil.config import LabelsConfig, PredictConfig, Settings, SplitConfig, TrainConfig
from wsimil.errors import BagFormatError, EncoderMismatchError, LabelsError, UsageError
from wsimil.evaluation import evaluate_predictions
from wsimil.evaluation.table import mean_over_folds, read_predictions
from wsimil.files import atomic_path
from wsimil.hdf5 import read_attributes
from wsimil.prediction import _decoded, _outputs, _predict_one, predict
from wsimil.task import Task
from wsimil.training import load_model, train

POOLED = PredictConfig(bag="patient")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 slides, two a patient; models of the first of three folds; predictions of slides and of patients."""
    folder = write_cohort(tmp_path_factory.mktemp("predictions"))
    table = pd.read_csv(folder / "labels.csv")
    table["patient"] = [f"p{number // 4}{number % 2}" for number in range(24)]
    table.to_csv(folder / "labels.csv", index=False)
    config = TrainConfig(epochs=8, lr=0.02, hidden=8, device="cpu", fold="0", stack="off")
    settings = Settings(train=config, split=SplitConfig(folds=3))
    train(folder, folder / "labels.csv", folder / "run", settings=settings, quiet=True)
    predict(folder, folder / "run", folder / "slides", quiet=True)
    predict(folder, folder / "run", folder / "patients", config=POOLED, quiet=True)
    return folder


@pytest.fixture
def label_of(cohort: Path):
    """Changes labels in the table that the run keeps, and puts it back."""
    path = cohort / "run/labels.csv"
    before = path.read_bytes()

    def change(**labels: str) -> None:
        table = pd.read_csv(path, dtype=str, keep_default_na=False).set_index("slide_id", drop=False)
        for name, label in labels.items():
            table.loc[name, "label"] = label
        with atomic_path(path) as temporary:
            table[["slide", "patient", "site", "label", "slide_id"]].to_csv(temporary, index=False)

    yield change
    path.write_bytes(before)


def slides_of_a_patient(cohort: Path) -> tuple[str, str, str]:
    row = read_predictions(cohort / "patients/predictions.csv").iloc[0]
    one, other = row["slide"].split(";")
    return row["slide_id"], one, other


@pytest.mark.parametrize("without", [0, 1])
def test_a_patient_has_the_label_of_any_of_its_slides(cohort, tmp_path, label_of, without):
    patient, *slides = slides_of_a_patient(cohort)
    label_of(**{slides[without]: ""})
    rows = predict(cohort, cohort / "run", tmp_path, config=POOLED, quiet=True).set_index("slide_id")
    assert rows.loc[patient, "label"] == read_predictions(cohort / "patients/predictions.csv")["label"].iloc[0] != ""


def test_slides_of_one_patient_that_contradict_each_other_are_an_error_before_any_work(cohort, tmp_path, label_of):
    patient, one, other = slides_of_a_patient(cohort)
    label_of(**{one: "pos", other: "neg"})
    with pytest.raises(LabelsError, match=f"patient {patient}: labels 'pos' and 'neg' of its slides"):
        predict(cohort, cohort / "run", tmp_path, config=POOLED, quiet=True)
    assert not list(tmp_path.iterdir())
    predict(cohort, cohort / "run", tmp_path, quiet=True)  # slides may differ


@pytest.mark.parametrize("kind", ["slides", "patients"])
def test_the_table_of_the_whole_cohort_measures_what_was_predicted_of_it(cohort, tmp_path, capsys, kind):
    command = ["evaluate", str(cohort / kind), "--out", str(tmp_path), "--bootstrap", "0", "--json"]
    assert main([*command, "--labels", str(cohort / "labels.csv")]) == 0
    said = capsys.readouterr()
    assert "labels.csv are of slides that were not predicted" in said.err and said.err.count("\n") == 1
    own = evaluate_predictions(read_predictions(cohort / kind / "predictions.csv"), n_bootstrap=0)
    assert json.loads(said.out)["pooled"]["metrics"] == own["pooled"]["metrics"]
    assert json.loads(said.out)["n_evaluated"] == own["n_evaluated"] > 3
    (tmp_path / "other.csv").write_text("slide,label\nS00.svs,pos\nt0,neg\n")
    assert main([*command, "--labels", str(tmp_path / "other.csv")]) == 2
    assert "slide 'S00.svs' (and 1 more) of the table is none of the" in capsys.readouterr().err


def test_a_slide_too_large_for_a_gpu_is_predicted_on_the_cpu(cohort, tmp_path, monkeypatch):
    asked, said = [], []

    def once_too_large(batch, models, device):
        asked.append(device)
        if len(asked) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return _outputs(batch, models, "cpu")

    monkeypatch.setattr("wsimil.prediction._outputs", once_too_large)
    predict(cohort, cohort / "run", tmp_path, quiet=True, say=said.append)
    assert len(asked) == 1 + sum(read_predictions(cohort / "slides/predictions.csv")["status"] == "done")
    assert sum("predicted on the CPU" in line for line in said) == 1
    assert (tmp_path / "predictions.csv").read_bytes() == (cohort / "slides/predictions.csv").read_bytes()


@pytest.mark.parametrize(("kind", "config"), [("slides", PredictConfig()), ("patients", POOLED)])
def test_an_interrupted_prediction_goes_on(cohort, tmp_path, monkeypatch, kind, config):
    done: list[str] = []

    def until_the_fourth(*args, **options):
        done.append(options["name"])
        if len(done) == 4:
            raise KeyboardInterrupt
        return _predict_one(*args, **options)

    monkeypatch.setattr("wsimil.prediction._predict_one", until_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        predict(cohort, cohort / "run", tmp_path, config=config, quiet=True)
    assert not (tmp_path / "predictions.csv").exists()
    said: list[str] = []
    rows = predict(cohort, cohort / "run", tmp_path, config=config, quiet=True, say=said.append)
    names = rows["slide_id"].tolist()
    assert sorted(done) == sorted([*names, done[3]]) and f"3 of {len(names)} {config.bag}s were predicted before" in said[0]
    before = cohort / kind
    assert (tmp_path / "predictions.csv").read_bytes() == (before / "predictions.csv").read_bytes()
    for path in (before / "scores").glob("*.h5"):
        assert (tmp_path / "scores" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("changed", ["weights", "recipe", "bag", "scores", "pooling"])
def test_what_is_no_longer_so_is_predicted_again(cohort, tmp_path, changed):
    for name in ("features_toy", "run"):
        shutil.copytree(cohort / name, tmp_path / name)
    shutil.copytree(cohort / "slides", tmp_path / "out")
    name = read_predictions(tmp_path / "out/predictions.csv")["slide_id"].iloc[0]
    scores, config = tmp_path / f"out/scores/{name}.h5", PredictConfig()
    if changed == "weights":
        path = tmp_path / "run/fold0-seed0/model.safetensors"
        save_file({key: 1.5 * value for key, value in load_file(path).items()}, path)
    elif changed == "recipe":
        path = tmp_path / "run/fold0-seed0/model.json"
        path.write_text(path.read_text().replace('"temperature"', '"another_key": 1, "temperature"'))
    elif changed == "bag":
        path = tmp_path / f"features_toy/{name}.h5"
        bag = read_bag(path)
        other = replace(bag, features=bag.features + 1, attributes={**bag.attributes, "recipe_hash": "other"})
        write_bag(path, other, Geometry(224, 224.0, 0, 20_000, 20_000, 0.5, 0.5, name))
    elif changed == "scores":
        scores.write_bytes(scores.read_bytes()[:200])
    else:
        config = POOLED
    said: list[str] = []
    rows = predict(tmp_path / "features_toy", tmp_path / "run", tmp_path / "out", config=config, quiet=True, say=said.append)
    alone = {"bag", "scores"}
    kept = [line for line in said if "predicted before" in line]
    assert (f"{len(rows) - 1} of {len(rows)} slides" in kept[0]) if changed in alone else not kept
    fresh = predict(tmp_path / "features_toy", tmp_path / "run", tmp_path / "fresh", config=config, quiet=True)
    pd.testing.assert_frame_equal(rows, fresh)
    assert read_attributes(scores) == read_attributes(tmp_path / f"fresh/scores/{name}.h5")


def test_every_digit_of_a_prediction_comes_back(cohort, tmp_path):
    rows = predict(cohort, cohort / "run", tmp_path, quiet=True)
    table = read_predictions(tmp_path / "predictions.csv")
    for column in ("prob_pos", "prob_neg", "threshold"):
        assert np.array_equal(table[column], rows[column])


def test_confident_predictions_are_no_ties(cohort):
    """Whichever class is called positive."""
    model = load_model(cohort / "run/fold0-seed0")
    logits = np.array([17.0, 17.5, 18.0, 25.0], np.float32)
    rows = [_decoded([np.array([[logit]])], [model]) for logit in logits]
    for name in model.task.classes:
        assert len({row[f"prob_{name}"] for row in rows}) == len(rows)
    smaller = Task("binary", ("neg", "pos")).probabilities(np.array([[-60.0], [60.0]]))
    assert smaller[0, 1] == smaller[1, 0] == pytest.approx(np.exp(-60.0))


def test_a_slide_that_two_folds_tested_has_a_row_of_each_and_one_map(cohort, tmp_path):
    """As with Monte-Carlo splits: a test set in two folds, with other training slides; s00 is in test in one of them."""
    names, rows = [f"s{number:02}" for number in range(24)], ["fold,slide_id,patient,site,split"]
    for fold in (0, 1):
        tests = names[fold:8]
        sides = ["test" if name in tests else "val" if number % 3 == fold else "train" for number, name in enumerate(names)]
        rows += [f"{fold},{name},{name},,{side}" for name, side in zip(names, sides, strict=True)]
    (tmp_path / "splits.csv").write_text("\n".join(rows))
    labels = pd.read_csv(cohort / "labels.csv").drop(columns="patient")
    labels.to_csv(tmp_path / "labels.csv", index=False)
    config = TrainConfig(epochs=2, hidden=8, device="cpu", seeds=2)
    settings = Settings(train=config)
    train(cohort, tmp_path / "labels.csv", tmp_path / "run", splits=tmp_path / "splits.csv", settings=settings, quiet=True)
    both = predict(cohort, tmp_path / "run", tmp_path / "both", quiet=True)
    assert Counter(both["slide_id"]) == {name: 1 + (name != "s00") for name in names[:8]} and set(both["fold"]) == {"0", "1"}
    for fold in (0, 1):  # what the fold alone says
        alone = tmp_path / f"fold{fold}"
        shutil.copytree(tmp_path / "run", alone)
        for seed in (0, 1):
            shutil.rmtree(alone / f"fold{1 - fold}-seed{seed}")
        own = predict(cohort, alone, tmp_path / "alone", quiet=True)
        pd.testing.assert_frame_equal(own, both[both["fold"] == str(fold)].reset_index(drop=True))
    table = read_predictions(tmp_path / "both/predictions.csv")
    metrics = evaluate_predictions(table, n_bootstrap=20)
    assert set(metrics["folds"]) == {"0", "1"} and metrics["folds"]["1"]["n_slides"] == 7 and metrics["n_slides"] == 8
    shown = mean_over_folds(table)
    assert shown["slide_id"].tolist() == names[:8] and set(shown["fold"]) == {"0", "0;1"}
    mean = table[table["slide_id"] == "s03"][["prob_pos", "threshold"]].mean()
    row = shown.set_index("slide_id").loc["s03"]
    assert row["prob_pos"] == mean["prob_pos"]
    assert row["prediction"] == ("pos" if mean["prob_pos"] >= mean["threshold"] else "neg")
    assert len(read_attributes(tmp_path / "both/scores/s03.h5")["models"]) == 4


def test_files_of_somebody_else_among_the_scores_stay_and_no_old_table_stands_beside_new_scores(cohort, tmp_path, monkeypatch):
    out = tmp_path / "p"
    predict(cohort, cohort / "run", out, quiet=True)
    left = out / "scores" / "of-another-slide.h5"
    shutil.copy(next((out / "scores").glob("*.h5")), left)
    (out / "scores" / "mine.h5").write_text("mine")
    predict(cohort, cohort / "run", out, quiet=True)
    assert not left.exists() and (out / "scores" / "mine.h5").read_text() == "mine"

    def broken(*arguments, **options):
        raise RuntimeError("in the middle")

    monkeypatch.setattr("wsimil.prediction._predict_one", broken)
    next(path for path in (out / "scores").glob("*.h5") if path.stem != "mine").unlink()
    with pytest.raises(RuntimeError):
        predict(cohort, cohort / "run", out, quiet=True)
    assert not (out / "predictions.csv").exists()


def test_some_slides_alone_are_predicted(cohort, tmp_path):
    every = predict(cohort, cohort / "run", tmp_path / "all", quiet=True)
    some = sorted(every["slide_id"])[:3]
    few = predict(cohort, cohort / "run", tmp_path / "few", only=some, quiet=True)
    assert sorted(few["slide_id"]) == some


@pytest.mark.parametrize("called", [".", "link", "copied beside its tables", "linked beside its tables"])
def test_a_fold_knows_its_training_slides_whatever_its_folder_is_called(cohort, tmp_path, monkeypatch, called):
    fold, model = cohort / "run/fold0-seed0", Path(".")
    if called == ".":
        monkeypatch.chdir(fold)
    elif called == "link":
        (model := tmp_path / "best").symlink_to(fold)
    else:
        (model := tmp_path / "run/fold0-seed0").parent.mkdir()
        for table in ("splits.csv", "labels.csv"):
            shutil.copy(cohort / "run" / table, tmp_path / "run")
        shutil.copytree(fold, tmp_path / "elsewhere/fold0-seed0")
        if called.startswith("copied"):
            shutil.copytree(fold, model)
        else:
            model.symlink_to(tmp_path / "elsewhere/fold0-seed0")
    rows = predict(cohort, model, tmp_path / "out", quiet=True)
    pd.testing.assert_frame_equal(rows, predict(cohort, fold, tmp_path / "plain", quiet=True))
    assert set(rows["split"]) == {"test"}


@pytest.mark.parametrize("called", ["features_toy", ".", "../features_toy", "link", "a link in the job"])
def test_slides_that_failed_are_rows_however_the_folder_of_bags_is_called(cohort, tmp_path, monkeypatch, called):
    geometry = tmp_path / "job/20x_224px_0px_overlap"
    shutil.copytree(cohort / "features_toy", geometry / "features_toy")
    (tmp_path / "job/status.csv").write_text("slide,slide_id,status,reason,n_tiles,seconds\nx.svs,x,failed,broken,0,1\n")
    bags = Path(called)
    if called == "link":
        (bags := tmp_path / "link").symlink_to(geometry / "features_toy")
    elif called == "a link in the job":
        (geometry / "features_toy").rename(tmp_path / "features_toy")
        (bags := geometry / "features_toy").symlink_to(tmp_path / "features_toy")
    else:
        monkeypatch.chdir(geometry if called == "features_toy" else geometry / "features_toy")
    rows = predict(bags, cohort / "run", tmp_path / "out", quiet=True).set_index("slide_id")
    assert rows.loc["x", ["slide", "status"]].tolist() == ["x.svs", "failed"]


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut off", "gone", "another's"])
def test_a_damaged_model_is_named_with_the_way_out(cohort, tmp_path, name, damage):
    shutil.copytree(cohort / "run", tmp_path / "run")
    path = tmp_path / "run/fold0-seed0" / name
    if damage == "gone":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:60])
    else:
        path.write_bytes(b"[]" if name == "model.json" else save({"another": torch.zeros(3)}))
    said = f"fold0-seed0/{name}: cannot be read, or is damaged .*delete .*fold0-seed0 and train again"
    with pytest.raises(UsageError, match="no finished model" if (name, damage) == ("model.json", "gone") else said):
        predict(cohort, tmp_path / "run", tmp_path / "out", quiet=True)


@pytest.mark.parametrize("out", ["run", "run/fold0-seed0", "project"])
def test_predictions_replace_the_settings_of_nothing_else(cohort, tmp_path, out):
    shutil.copytree(cohort / "run", tmp_path / "run")
    (tmp_path / "project").mkdir()
    (tmp_path / "project/config.yaml").write_text("train: {epochs: 3}\n")
    before = (tmp_path / out / "config.yaml").read_bytes()
    with pytest.raises(UsageError, match=rf"{out}/config\.yaml is not of predictions.*another --out"):
        predict(cohort, cohort / "run", tmp_path / out, quiet=True)
    assert (tmp_path / out / "config.yaml").read_bytes() == before and not (tmp_path / out / "scores").exists()


def test_bags_of_another_width_are_refused_before_anything_is_written(cohort, tmp_path):
    for number in range(2):
        path = tmp_path / f"features_toy/w{number}.h5"
        bag = read_bag(cohort / "features_toy/s00.h5")
        wide = replace(bag, features=np.tile(bag.features, 2), attributes={**bag.attributes, "slide_id": path.stem})
        write_bag(path, wide, Geometry(224, 224.0, 0, 20_000, 20_000, 0.5, 0.5, path.stem))
    shutil.copytree(cohort / "slides", tmp_path / "out")
    for out in ("out", "new"):
        with pytest.raises(EncoderMismatchError, match="are 24 wide, those that fold0-seed0 learned from 12"):
            predict(tmp_path, cohort / "run", tmp_path / out, quiet=True)
    assert (tmp_path / "out/predictions.csv").exists() and not (tmp_path / "new").exists()


def add_bag(cohort: Path, folder: Path, name: str, **attributes: str) -> Path:
    """The cohort's bags, and one more: s00 with features of its own."""
    if not (folder / "features_toy").exists():  # else to the bags that are there
        shutil.copytree(cohort / "features_toy", folder / "features_toy")
    bag = read_bag(cohort / "features_toy/s00.h5")
    attributes = {**bag.attributes, "slide_id": name, "slide_fingerprint": name, **attributes}
    other = replace(bag, features=bag.features + 1, attributes=attributes)
    write_bag(folder / f"features_toy/{name}.h5", other, Geometry(224, 224.0, 0, 20_000, 20_000, 0.5, 0.5, name))
    return folder / f"features_toy/{name}.h5"


def test_a_new_slide_named_like_a_patient_is_not_pooled_with_him(cohort, tmp_path):
    patient, one, other = slides_of_a_patient(cohort)
    add_bag(cohort, tmp_path, patient)
    with pytest.raises(UsageError, match=rf"{patient} is a new slide and a patient of the model's \({one}, {other}\)"):
        predict(tmp_path, cohort / "run", tmp_path / "out", config=POOLED, quiet=True)
    assert not (tmp_path / "out").exists()
    rows = predict(tmp_path, cohort / "run", tmp_path / "out", quiet=True).set_index("slide_id")
    assert rows.loc[patient, "split"] == "new"


@pytest.mark.parametrize("wrong", ["NaN", "cut off", "no bytes", "not to be read", "its name", "replaced meanwhile"])
def test_a_slide_that_cannot_be_predicted_is_a_row_with_a_reason(cohort, tmp_path, monkeypatch, capsys, wrong):
    name = "caf\udce9" if wrong == "its name" else "zz"
    path = add_bag(cohort, tmp_path, name.encode(errors="backslashreplace").decode())
    if wrong == "its name":  # of another program's bag, its file is its id
        path.unlink()
        with h5py.File(os.fsencode(tmp_path / f"features_toy/{name}.h5"), "w") as file:
            file.attrs.update({"encoder": "toy", "encoder_sha256": "0" * 64})
            file["features"], file["coords"] = np.ones((3, 12), np.float32), np.zeros((3, 2), np.int64)
        said, row = "is not UTF-8, so it cannot be written; rename that", "caf\\udce9"
    elif wrong == "NaN":
        bag = read_bag(path)
        bag.features[1] = np.nan
        write_bag(path, bag, Geometry(224, 224.0, 0, 20_000, 20_000, 0.5, 0.5, name))
        said, row = "zz.h5: the features of tile 1 are NaN", name
    elif wrong in ("cut off", "no bytes"):
        path.write_bytes(path.read_bytes()[: 300 if wrong == "cut off" else 0])
        said, row = "zz.h5: ", name
    else:
        load = BagFolder.load

        def spoiled(self, slide_id, **options):
            if slide_id == name and wrong == "not to be read":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            if slide_id == name:
                path.write_bytes(path.read_bytes() + b"1")
            return load(self, slide_id, **options)

        monkeypatch.setattr(BagFolder, "load", spoiled)
        said, row = {"not to be read": "zz.h5: cannot be read (Permission", "replaced meanwhile": "changed while"}[wrong], name
    shutil.copytree(cohort / "slides", tmp_path / "out")
    assert main(["predict", str(tmp_path), "--model", str(cohort / "run"), "--out", str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"1 failed: {row} (reasons: ") and f"{row}: failed: " in "".join(lines)
    table = read_predictions(tmp_path / "out/predictions.csv").set_index("slide_id")
    assert table.loc[row, "status"] == "failed" and said in table.loc[row, "reason"]
    others = read_predictions(cohort / "slides/predictions.csv").set_index("slide_id")
    pd.testing.assert_frame_equal(table.drop(index=row)[others.columns], others)
    assert {path.stem for path in (tmp_path / "out/scores").glob("*.h5")} == set(others.index)
    metrics = evaluate_predictions(read_predictions(tmp_path / "out/predictions.csv"), n_bootstrap=0)
    assert metrics["n_failed"] == 1


def test_a_damaged_bag_of_a_test_slide_is_a_row_of_its_fold(cohort, tmp_path):
    shutil.copytree(cohort / "features_toy", tmp_path / "features_toy")
    before = read_predictions(cohort / "slides/predictions.csv").set_index("slide_id")
    name = before.index[before["split"] == "test"][0]
    (tmp_path / f"features_toy/{name}.h5").write_bytes(b"nothing")
    rows = predict(tmp_path, cohort / "run", tmp_path / "out", quiet=True).set_index("slide_id")
    known = ["fold", "split", "label", "patient"]
    assert rows.loc[name, known].tolist() == before.loc[name, known].tolist()
    assert rows.loc[name, "status"] == "failed" and f"{name}.h5" in rows.loc[name, "reason"]
    assert (rows.drop(index=name)["status"] == "done").all() and len(rows) == len(before)
    learned_from = next(path for path in (tmp_path / "features_toy").glob("*.h5") if path.stem not in before.index)
    learned_from.write_bytes(b"nothing")  # it would not have been predicted
    assert len(predict(tmp_path, cohort / "run", tmp_path / "out", quiet=True)) == len(before)
    for path in (tmp_path / "features_toy").glob("*.h5"):
        path.write_bytes(b"nothing")
    with pytest.raises(BagFormatError, match=r"\.h5: "):
        predict(tmp_path, cohort / "run", tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("splits.csv", None, r"run/splits\.csv: no such file, and without it .* copy the whole folder of the run"),
        ("labels.csv", None, r"run/labels\.csv: no such file, and without it "),
        ("labels.csv", b"", r"run/labels\.csv: not a table that can be read"),
        ("labels.csv", b"\xff\x00", r"run/labels\.csv: not a table that can be read"),
        ("labels.csv", b"slide_id,slide,patient\n", r"run/labels\.csv: no column 'label'"),
    ],
)
def test_a_run_without_its_tables_is_named_with_the_way_out(cohort, tmp_path, name, content, said):
    shutil.copytree(cohort / "run", tmp_path / "run")
    (tmp_path / "run" / name).unlink() if content is None else (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(UsageError, match=said):
        predict(cohort, tmp_path / "run", tmp_path / "out", quiet=True)


@pytest.mark.parametrize("config", [PredictConfig(), POOLED])
def test_slides_of_the_cohort_under_other_ids_are_predicted_as_those_they_are(cohort, tmp_path, config):
    for number in range(24):
        old = cohort / f"features_toy/s{number:02}.h5"
        bag = read_bag(old)
        renamed = replace(bag, attributes={**bag.attributes, "slide_id": f"batch1__{old.stem}"})
        path = tmp_path / f"features_toy/batch1__{old.name}"
        write_bag(path, renamed, Geometry(224, 224.0, 0, 20_000, 20_000, 0.5, 0.5, path.stem))
    add_bag(cohort, tmp_path, "new")
    said: list[str] = []
    rows = predict(tmp_path, cohort / "run", tmp_path / "out", config=config, quiet=True, say=said.append)
    told = [line for line in said if "under another id" in line]
    assert told[0].startswith("24 slides are the model's own") and "batch1__s00 is s00" in told[0]
    assert rows.loc[rows["split"] == "new", "slide_id"].tolist() == ["new"] and not (rows["status"] == "failed").any()
    own = predict(cohort, cohort / "run", tmp_path / "own", config=config, quiet=True)
    known = rows[rows["split"] == "test"].reset_index(drop=True)
    pd.testing.assert_frame_equal(known.drop(columns=["slide", "slide_id"]), own.drop(columns=["slide", "slide_id"]))
    assert known["slide"].str.replace("batch1__", "").tolist() == own["slide"].tolist()


def test_a_run_that_does_not_know_the_content_of_its_slides_predicts_as_before(cohort, tmp_path):
    shutil.copytree(cohort / "run", tmp_path / "run")
    labels = pd.read_csv(tmp_path / "run/labels.csv", dtype=str)
    labels.drop(columns="slide_fingerprint").to_csv(tmp_path / "run/labels.csv", index=False)
    add_bag(cohort, tmp_path, "s00-again", slide_fingerprint="s00")
    said: list[str] = []
    rows = predict(tmp_path, tmp_path / "run", tmp_path / "out", quiet=True, say=said.append).set_index("slide_id")
    assert rows.loc["s00-again", "split"] == "new" and not any("another id" in line for line in said)


def test_a_table_without_slides_is_no_predictions_table(tmp_path):
    (tmp_path / "predictions.csv").write_text("slide,prob_a,prob_b\ns,0.1,0.9\n")
    with pytest.raises(UsageError, match="no column slide_id"):
        read_predictions(tmp_path / "predictions.csv")


def test_copies_that_are_labelled_and_in_no_fold_are_predicted_as_what_they_are(cohort, tmp_path):
    shutil.copytree(cohort / "run", tmp_path / "run")
    labels = pd.read_csv(tmp_path / "run/labels.csv", dtype=str)
    copy = labels[labels["slide_id"] == "s00"].assign(slide="s00-again", slide_id="s00-again", patient="s00-again", label="")
    pd.concat([labels, copy]).to_csv(tmp_path / "run/labels.csv", index=False)
    add_bag(cohort, tmp_path, "s00-again", slide_fingerprint="s00")
    rows = predict(tmp_path, tmp_path / "run", tmp_path / "out", quiet=True)
    assert not (rows["split"] == "new").any()
    found = rows.set_index("slide_id")[["fold", "split", "label", "patient"]]
    tested = "s00" in found.index
    assert ("s00-again" in found.index) == tested
    if tested:
        assert found.loc["s00-again"].tolist() == found.loc["s00"].tolist()


def test_another_slide_of_the_same_id_is_not_taken_for_the_models_own(cohort, tmp_path):
    shutil.copytree(cohort / "features_toy", tmp_path / "features_toy")
    bag = read_bag(tmp_path / "features_toy/s00.h5")
    other = replace(bag, attributes={**bag.attributes, "slide_fingerprint": "another"})
    write_bag(tmp_path / "features_toy/s00.h5", other, Geometry(224, 224.0, 0, 20_000, 20_000, 0.5, 0.5, "s00"))
    with pytest.raises(UsageError, match=r"1 slides of .* but are other files \(slide_fingerprint\): s00;.* rename them"):
        predict(tmp_path, cohort / "run", tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_bags_of_others_are_known_under_another_name(tmp_path):
    """They state no file of the slide, so the file of the bag is compared."""
    rng, folder = np.random.default_rng(0), tmp_path / "bags"
    for place in (folder, tmp_path / "renamed"):
        place.mkdir()
    rows = []
    for number in range(12):
        with h5py.File(folder / f"a{number:02}.h5", "w") as file:
            file["features"] = rng.normal(size=(9, 6)).astype(np.float32)
            file["coords"] = np.zeros((9, 2), np.int64)
        shutil.copy(folder / f"a{number:02}.h5", tmp_path / f"renamed/b{number:02}.h5")
        rows.append(f"a{number:02},{'xy'[number % 2]}")
    (tmp_path / "labels.csv").write_text("\n".join(["slide,label", *rows]))
    settings = Settings(train=TrainConfig(epochs=1, hidden=8, device="cpu"), split=SplitConfig(folds=2))
    train(folder, tmp_path / "labels.csv", tmp_path / "run", settings=settings)
    found = predict(tmp_path / "renamed", tmp_path / "run", tmp_path / "out", quiet=True)
    assert (found["split"] == "test").all() and len(found) == 12


@pytest.mark.parametrize("kind", ["survival", "proportion"])
def test_models_that_speak_of_other_times_or_units_are_not_averaged(tmp_path, kind):
    """The labels of test slides changed between two folds: neither of them learned from those, and both stay as they are."""
    folder = write_cohort(tmp_path)
    names = [f"s{number:02}" for number in range(24)]
    side = {name: "test" if number < 12 else "val" if number < 16 else "train" for number, name in enumerate(names)}
    splits = [f"0,{name},{name},,{side[name]}" for name in names]
    turned = [
        f"1,{name},{name},,{'test' if number >= 12 else 'val' if number >= 8 else 'train'}" for number, name in enumerate(names)
    ]
    (tmp_path / "splits.csv").write_text("\n".join(["fold,slide_id,patient,site,split", *splits, *turned]))
    config = LabelsConfig(time="time", event="event") if kind == "survival" else LabelsConfig(task="proportion")
    for fold in ("0", "1"):
        # fold 1 tests the second half
        values = [0.9 * (number + 1) / 24 * (7.5 if fold == "1" and number >= 12 else 1) for number in range(24)]
        cells = [f"{name},{value:.3f}" + (",1" if kind == "survival" else "") for name, value in zip(names, values, strict=True)]
        head = "slide,time,event" if kind == "survival" else "slide,label"
        (tmp_path / "labels.csv").write_text("\n".join([head, *cells]))
        settings = Settings(labels=config, train=TrainConfig(epochs=1, hidden=8, device="cpu", fold=fold))
        train(folder, tmp_path / "labels.csv", tmp_path / "run", splits=tmp_path / "splits.csv", settings=settings, quiet=True)
    labels = pd.read_csv(tmp_path / "run/labels.csv", dtype=str, keep_default_na=False)
    with pytest.raises(UsageError, match=r"other labels than those|in other units or at other times"):
        predict(folder, tmp_path / "run", tmp_path / "out", quiet=True)
    for path in (tmp_path / "run").glob("fold*/model.json"):  # as if those of the other fold had been told apart by nothing
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"labels_hash": ""}))
    assert len(labels) == 24
    with pytest.raises(UsageError, match="in other units or at other times"):
        predict(folder, tmp_path / "run", tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("aggregator", "options"),
    [
        ("topk_pool", ["k=1e-1"]),
        ("transformer", ["heads=4.0"]),
        ("abmil", {"classifier_hidden": None}),
        ("acmil", {"mask_rate": "5e-1"}),
    ],
)
def test_options_are_kept_as_they_were_used(cohort, tmp_path, aggregator, options):
    (tmp_path / "c.yaml").write_text(json.dumps({"train": {"aggregator": aggregator, "aggregator_options": options}}))
    call = ["train", str(cohort), "--labels", str(cohort / "labels.csv"), "--out", str(tmp_path / "run"), "--folds", "3"]
    more = ["--epochs", "1", "--hidden", "8", "--device", "cpu", "--fold", "0", "--config", str(tmp_path / "c.yaml"), "--quiet"]
    assert main([*call, *more]) == 0
    assert (predict(cohort, tmp_path / "run", tmp_path / "out", quiet=True)["status"] == "done").all()


def test_contributions_of_a_cox_model_are_in_the_unit_of_its_risk(tmp_path):
    folder = write_cohort(tmp_path)
    times = np.random.default_rng(1).permutation(24) + 1
    rows = [f"s{number:02},{time},{number % 3 != 0:d}" for number, time in enumerate(times)]
    (tmp_path / "labels.csv").write_text("\n".join(["slide,time,event", *rows]))
    config = TrainConfig(epochs=3, lr=0.02, hidden=8, device="cpu", fold="0", loss="cox", precision="fp32")
    settings = Settings(labels=LabelsConfig(time="time", event="event"), train=config, split=SplitConfig(folds=3))
    (run,) = train(folder, tmp_path / "labels.csv", tmp_path / "run", settings=settings, quiet=True)
    content = json.loads((run / "model.json").read_text())
    content["task"] |= {"scale": 0.25, "center": 0.5}  # as of a model whose risks had to be shrunk
    (run / "model.json").write_text(json.dumps(content))
    task = load_model(run).task
    for _, row in predict(folder, tmp_path / "run", tmp_path / "out", quiet=True).iterrows():
        with h5py.File(tmp_path / f"out/scores/{row['slide_id']}.h5") as file:
            total = float(np.sum(file["contributions"][:], dtype=np.float64))  # type: ignore[index]
        assert row["risk"] == pytest.approx(total - task.scale * task.center, abs=1e-4)


# ---------------------------------------------------------------- models that need places


@pytest.fixture(scope="module")
def placed(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an aggregator that needs to know where tiles lie."""
    run = tmp_path_factory.mktemp("placed") / "run"
    config = TrainConfig(aggregator="sm_abmil", epochs=1, hidden=8, device="cpu", fold="0")
    train(cohort, cohort / "labels.csv", run, settings=Settings(train=config, split=SplitConfig(folds=3)), quiet=True)
    return run


def test_a_slide_without_places_is_a_failed_row(cohort, placed, tmp_path):
    shutil.copytree(cohort / "features_toy", tmp_path / "features_toy")
    names = predict(cohort, placed, tmp_path / "whole", quiet=True).query("status == 'done'")["slide_id"].tolist()
    with h5py.File(tmp_path / "features_toy" / f"{names[1]}.h5", "a") as file:
        del file.attrs["mpp"]
    rows = predict(tmp_path, placed, tmp_path / "out", quiet=True).set_index("slide_id")
    assert rows.loc[names[1], "status"] == "failed" and "SmABMIL needs the position of each tile" in rows.loc[names[1], "reason"]
    assert (rows.loc[[name for name in names if name != names[1]], "status"] == "done").all()


def test_pooled_patients_have_no_places(cohort, placed, tmp_path):
    with pytest.raises(UsageError, match=r"--bag patient pools slides.* sm_abmil needs the position .*--bag slide"):
        predict(cohort, placed, tmp_path / "out", config=POOLED, quiet=True)
    assert not (tmp_path / "out").exists()
    one_each = predict(cohort, placed, tmp_path / "slides", quiet=True).drop_duplicates("patient")["slide_id"].tolist()
    rows = predict(cohort, placed, tmp_path / "out", config=POOLED, only=one_each, quiet=True)
    assert (rows["status"] == "done").all() and len(rows) == len(one_each)  # a patient of one slide is that slide


def test_models_that_are_moved_still_explain_by_gradients(cohort, tmp_path, monkeypatch):
    config = TrainConfig(aggregator="transformer", epochs=1, hidden=8, device="cpu", fold="0")
    run = tmp_path / "run"
    train(cohort, cohort / "labels.csv", run, settings=Settings(train=config, split=SplitConfig(folds=3)), quiet=True)
    moved = torch.nn.Module.to

    def copied(module, *args, **options):  # as a move to a GPU and back makes other tensors of the weights
        return moved(moved(module, torch.float64), torch.float32)

    monkeypatch.setattr(torch.nn.Module, "to", copied)
    rows = predict(cohort, run, tmp_path / "out", quiet=True)
    assert (rows.query("fold == '0'")["status"] == "done").all()


def test_folds_that_were_never_trained_are_named(cohort, tmp_path):
    said: list[str] = []
    predict(cohort, cohort / "run", tmp_path, quiet=True, say=said.append)
    assert any("the splits have test slides in fold 1, 2, of which there is no finished model here" in line for line in said)

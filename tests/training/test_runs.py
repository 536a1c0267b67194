"""Runs that share a folder: what is averaged is of one kind, and what is trained stays trained when only others' slides change."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from wsimil.config import PredictConfig, Settings, SplitConfig, TrainConfig
from wsimil.errors import ConfigError, UsageError
from wsimil.prediction import predict
from wsimil.task import Task
from wsimil.training import load_model, train
from wsimil.training.goals import build_objective
from wsimil.training.model import recipe

QUICK = TrainConfig(epochs=1, hidden=8, device="cpu")


def trained(toy: Path, out: Path, *, folds: int = 2, labels: Path | None = None, **changes) -> list[str]:
    """What is said."""
    said: list[str] = []
    test = "official" if labels else None
    settings = Settings(train=replace(QUICK, **changes), split=SplitConfig(folds=folds, test=test))
    train(toy, labels or toy / "labels.csv", out, settings=settings, say=said.append)
    return said


def test_models_of_different_settings_are_not_averaged(toy, tmp_path):
    trained(toy, tmp_path / "run", aggregator="abmil", seeds=2)
    said = trained(toy, tmp_path / "run", aggregator="max_pool")
    remarks = [line for line in said if "predictions will refuse it" in line]
    assert len(remarks) == 2 and all("fold" in line and "-seed1" in line and "aggregator abmil" in line for line in remarks)
    two = r"fold0-seed0, fold1-seed0 \(aggregator max_pool\); fold0-seed1, fold1-seed1 \(aggregator abmil\)"
    with pytest.raises(UsageError, match=two):
        predict(toy, tmp_path / "run", tmp_path / "out", quiet=True)
    for fold in (0, 1):
        shutil.rmtree(tmp_path / "run" / f"fold{fold}-seed1")
    predict(toy, tmp_path / "run", tmp_path / "out", quiet=True)


def test_folds_trained_by_themselves_and_elsewhere_are_one_run(toy, tmp_path):
    trained(toy, tmp_path / "run", fold="0", precision="bf16", memory_gb=1.0)
    assert not any("fold0" in line for line in trained(toy, tmp_path / "run", fold="1", seeds=2) if "fold1" not in line)
    assert len(predict(toy, tmp_path / "run", tmp_path / "out", quiet=True)) == 24
    assert any("takes part in predictions" in line for line in trained(toy, tmp_path / "run"))
    assert recipe({"aggregator": "abmil"}) == recipe({**vars(TrainConfig(aggregator="abmil")), "seed": 3})  # of an older wsimil


@pytest.mark.parametrize("stack", ["on", "off"])
def test_a_test_slide_that_arrives_late_is_predicted_by_the_model_that_is_there(toy, tmp_path, stack):
    bags = tmp_path / "features_toy"
    shutil.copytree(toy / "features_toy", bags)
    table = pd.read_csv(toy / "labels.csv").assign(official=["test"] * 6 + ["train"] * 18)
    table.to_csv(tmp_path / "all.csv", index=False)
    table.iloc[1:].to_csv(tmp_path / "some.csv", index=False)
    late = bags / "s00.h5"
    late.rename(tmp_path / "late.h5")
    keep = {"keep_epochs": True} if stack == "off" else {}
    trained(bags, tmp_path / "run", labels=tmp_path / "some.csv", stack=stack, **keep)
    before = (tmp_path / "run/fold0-seed0/model.safetensors").stat().st_mtime_ns
    (tmp_path / "late.h5").rename(late)
    said = trained(bags, tmp_path / "run", labels=tmp_path / "all.csv", stack=stack, **keep)
    assert "already trained" in said[-1] and (tmp_path / "run/fold0-seed0/model.safetensors").stat().st_mtime_ns == before
    for run in [tmp_path / "run", *(tmp_path / "run").glob("epochs/*")]:
        rows = predict(bags, run, tmp_path / "out", quiet=True)
        assert set(rows["slide_id"]) == {f"s{number:02}" for number in range(6)} and set(rows["split"]) == {"test"}
    # a training slide that becomes a test slide is another matter
    table.assign(official=["test"] * 7 + ["train"] * 17).to_csv(tmp_path / "all.csv", index=False)
    said = trained(bags, tmp_path / "run", labels=tmp_path / "all.csv", stack=stack, **keep)
    assert not any("already trained" in line for line in said)
    assert load_model(tmp_path / "run/fold0-seed0").content["n_train"] < 15


def test_models_of_labels_that_were_corrected_since_are_named_and_refused(toy, tmp_path):
    trained(toy, tmp_path / "run")
    table = pd.read_csv(toy / "labels.csv")
    turned = tmp_path / "labels.csv"
    table.assign(label=table["label"].map({"neg": "pos", "pos": "neg"})).to_csv(turned, index=False)
    said: list[str] = []
    settings = Settings(train=replace(QUICK, fold="0"), split=SplitConfig(folds=2))
    splits = tmp_path / "run" / "splits.csv"
    train(toy, turned, tmp_path / "run", splits=splits, settings=settings, say=said.append)
    assert any("fold1-seed0: it learned other labels" in line for line in said)
    with pytest.raises(UsageError, match="fold1-seed0 learned other labels"):
        predict(toy, tmp_path / "run", tmp_path / "out", quiet=True)
    train(toy, turned, tmp_path / "run", splits=splits, settings=replace(settings, train=QUICK))
    assert len(predict(toy, tmp_path / "run", tmp_path / "out", quiet=True)) == 24


def test_a_test_slide_without_a_bag_is_a_row(toy, tmp_path):
    shutil.copytree(toy / "features_toy", tmp_path / "features_toy")
    trained(toy, tmp_path / "run")
    (tmp_path / "features_toy" / "s03.h5").unlink()
    said: list[str] = []
    table = predict(tmp_path / "features_toy", tmp_path / "run", tmp_path / "out", quiet=True, say=said.append)
    assert len(table) == 24 and table.loc[table["status"] == "failed", "slide_id"].tolist() == ["s03"]
    assert any("1 test slides of the model have no bag" in line and "s03" in line for line in said)


def test_splits_keep_their_patients_where_the_label_table_names_none(toy, tmp_path):
    table = pd.read_csv(toy / "labels.csv")
    patients = [f"p{number // 2 % 6}-{label}" for number, label in enumerate(table["label"])]
    table.assign(patient=patients).to_csv(tmp_path / "a.csv", index=False)
    settings = Settings(train=QUICK, split=SplitConfig(folds=2))
    train(toy, tmp_path / "a.csv", tmp_path / "one", settings=settings)
    table[["slide", "label"]].to_csv(tmp_path / "b.csv", index=False)
    train(toy, tmp_path / "b.csv", tmp_path / "two", splits=tmp_path / "one" / "splits.csv", settings=settings)
    one, two = (pd.read_csv(tmp_path / run / "splits.csv") for run in ("one", "two"))
    assert one["patient"].nunique() < 24 and one["patient"].equals(two["patient"])
    pooled = predict(toy, tmp_path / "two", tmp_path / "out", config=PredictConfig(bag="patient"), quiet=True)
    assert len(pooled) == one["patient"].nunique()


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"sampling": "balanced"}, "for classes that exclude one another, and events"), ({"sampling": "risk_set"}, "for survival")],
)
def test_an_order_of_slides_that_the_task_cannot_have_is_refused(toy, tmp_path, changes, said):
    table = pd.read_csv(toy / "labels.csv")
    table.assign(label=[number / 7 for number in range(len(table))]).to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(ConfigError, match=said):
        train(toy, tmp_path / "labels.csv", tmp_path / "run", settings=Settings(train=replace(QUICK, **changes)))


def test_events_are_not_drawn_more_often_for_a_likelihood_of_the_cohort_as_it_is():
    labels = ["1", "2+", "3", "4"]
    with pytest.raises(ConfigError, match=r"balanced.*cox.*risk_set"):
        build_objective(TrainConfig(sampling="balanced", loss="cox"), Task("survival", criterion="cox"), labels)
    discrete = Task("survival", criterion="nll", intervals=(2.0, 4.0), horizons=(2.0,))
    assert sorted(build_objective(TrainConfig(sampling="balanced"), discrete, labels).sampler(0) or ())


def test_a_fold_that_is_gone_is_named(toy, tmp_path):
    trained(toy, tmp_path / "run", folds=3)
    said = trained(toy, tmp_path / "run", folds=2)
    assert any(line.startswith("fold2-seed0: the splits have no fold 2 any more") for line in said)
    with pytest.raises(UsageError, match=r"fold2-seed0 was trained on other splits .* or delete .*fold2-seed0"):
        predict(toy, tmp_path / "run", tmp_path / "out", quiet=True)


def test_a_model_that_was_taken_elsewhere_predicts_new_slides(toy, tmp_path):
    trained(toy, tmp_path / "run", fold="0")
    shutil.copytree(tmp_path / "run/fold0-seed0", tmp_path / "elsewhere/fold0-seed0")
    for model in (tmp_path / "elsewhere", tmp_path / "elsewhere/fold0-seed0"):
        said: list[str] = []
        rows = predict(toy, model, tmp_path / f"out-{model.name}", quiet=True, say=said.append)
        assert len(rows) == 24 and set(rows["split"]) == {"new"} and set(rows["label"]) == {""}
        assert len(said) == 1 and "no splits.csv and labels.csv: every slide is taken for a new one" in said[0]
    (tmp_path / "run/splits.csv").rename(tmp_path / "elsewhere/splits.csv")
    with pytest.raises(UsageError, match=r"splits\.csv"):  # labels, but nobody knows whose test slides they are of
        predict(toy, tmp_path / "run", tmp_path / "out", quiet=True)

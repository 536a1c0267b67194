"""Every kind of task, end to end: a label table, tiny bags that hold the answer, train → predict → evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from wsimil.bags.bag import Bag, Geometry, write_bag
from wsimil.cli import main
from wsimil.config import LabelsConfig, Settings, SplitConfig, TrainConfig
from wsimil.evaluation import evaluate_predictions
from wsimil.evaluation.metrics import spearman
from wsimil.evaluation.survival import harrell_c
from wsimil.evaluation.table import check_predictions, read_predictions
from wsimil.hdf5 import open_hdf5, read_attributes
from wsimil.heatmaps import read_tile_map
from wsimil.prediction import predict
from wsimil.report import write_report
from wsimil.training import load_model, train

GEOMETRY = Geometry(128, 128.0, 0, 5000, 5000, 0.5, 0.5, "slide")
N_SLIDES = 36


def signal(index: int) -> float:
    """What a slide is about, -1 to 1; the features say it and every label follows from it."""
    return 2 * (index * 7 % N_SLIDES) / (N_SLIDES - 1) - 1


@dataclass(frozen=True)
class Study:
    """A kind of task: what its label table holds for a signal, how it is asked for, and what must come out."""

    labels: Callable[[float, int], dict[str, object]]
    config: LabelsConfig
    kind: str
    columns: list[str]
    metric: str
    least: float
    loss: str = "auto"


def several(x: float, index: int) -> dict[str, object]:
    return {"ER": int(x > 0), "HER2": int(x < -0.3) if index % 4 else "", "PR": int(x > 0.2) if index % 5 else "NA"}


def survival(x: float, index: int) -> dict[str, object]:
    return {"months": round(20 * np.exp(-1.5 * x) + index / 10, 1), "died": int(index % 4 != 0)}


HIGH = LabelsConfig()
STUDIES = {
    "binary": Study(lambda x, i: {"label": "high" if x > 0 else "low"}, HIGH, "binary", ["prob_high", "prob_low"], "auroc", 0.9),
    "multiclass": Study(
        lambda x, i: {"label": "abc"[int(1.49 * (x + 1))]}, HIGH, "multiclass", ["prob_a", "prob_b", "prob_c"], "auroc", 0.75
    ),
    "soft": Study(
        lambda x, i: {"low": round(0.5 - x / 2, 3), "high": round(0.5 + x / 2, 3)},
        LabelsConfig(target=("low", "high"), task="binary"),
        "binary",
        ["prob_low", "prob_high"],
        "auroc",
        0.9,
    ),
    "multilabel": Study(
        several, LabelsConfig(target=("ER", "HER2", "PR")), "multilabel", ["prob_ER", "prob_HER2", "prob_PR"], "auroc", 0.85
    ),
    "listed": Study(
        lambda x, i: {"label": ";".join(name for name, cut in (("up", 0), ("far up", 0.4)) if x > cut) or "none"},
        HIGH,
        "multilabel",
        ["prob_up", "prob_far up"],
        "auroc",
        0.85,
    ),
    "ordinal": Study(
        lambda x, i: {"grade": int(1.99 * (x + 1))},
        LabelsConfig(target=("grade",), task="ordinal"),
        "ordinal",
        ["prob_0", "prob_1", "prob_2", "prob_3", "value"],
        "quadratic_kappa",
        0.6,
    ),
    "regression": Study(lambda x, i: {"label": round(10 * x, 2)}, HIGH, "regression", ["value"], "spearman", 0.8, "huber"),
    "proportion": Study(
        lambda x, i: {"share": round(50 + 45 * x, 1)},
        LabelsConfig(target=("share",), task="proportion"),
        "proportion",
        ["value"],
        "spearman",
        0.8,
    ),
    "survival": Study(survival, LabelsConfig(time="months", event="died"), "survival", ["risk"], "harrell_c", 0.75),
    "cox": Study(survival, LabelsConfig(time="months", event="died"), "survival", ["risk"], "harrell_c", 0.75, "cox"),
}


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("every_task") / "bags"
    for index in range(N_SLIDES):
        name = f"s{index:02}"
        draw = np.random.default_rng(index)
        features = draw.normal(0, 0.5, (6, 4)) + np.array([2, 0, -2, 0]) * signal(index)
        stated = {"slide_id": name, "encoder": "texture", "encoder_sha256": "a" * 64, "mpp": 0.5, "tile_level0_px": 128.0}
        stated |= {"recipe_hash": "r", "level0_width": 5000, "level0_height": 5000}
        bag = Bag(features.astype(np.float16), draw.integers(0, 4000, (6, 2)), np.ones(6, bool), {}, stated)
        write_bag(folder / f"{name}.h5", bag, GEOMETRY)
    return folder


def settings_of(study: Study) -> Settings:
    training = TrainConfig(
        aggregator="mean_pool", epochs=8, lr=0.1, hidden=8, dropout=0, bags_per_step=6, device="cpu", loss=study.loss, fold="0"
    )  # fmt: skip
    return Settings(labels=study.config, split=SplitConfig(folds=2, val_fraction=0.25), train=training)


@pytest.fixture(scope="module", params=STUDIES)
def done(request: pytest.FixtureRequest, bags: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    study, folder = STUDIES[request.param], tmp_path_factory.mktemp(request.param)
    rows = [{"slide": f"s{i:02}", "patient": f"p{i // 2:02}", **study.labels(signal(i), i)} for i in range(N_SLIDES)]
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    train(bags, folder / "labels.csv", folder / "run", settings=settings_of(study), quiet=True)
    predict(bags, folder / "run", folder / "predictions", quiet=True)
    return study, folder


def test_what_predict_returns_is_measured_as_the_table_is(done: tuple[Study, Path], bags: Path) -> None:
    study, folder = done
    returned = predict(bags, folder / "run", folder / "predictions", quiet=True)
    table = read_predictions(folder / "predictions" / "predictions.csv")
    of_both = [evaluate_predictions(one, kind=study.kind, n_bootstrap=0)["pooled"]["metrics"] for one in (returned, table)]
    assert of_both[0] == of_both[1]
    known = returned[returned["split"] == "test"]
    if study.kind == "survival":
        direct = harrell_c(known["time"], known["event"], known["risk"])
    elif study.metric == "spearman":
        direct = spearman(known["label"], known["value"])
    else:
        return
    assert float(direct) == pytest.approx(of_both[0][study.metric]["value"])


def test_the_answer_is_found_and_measured(done: tuple[Study, Path]) -> None:
    study, folder = done
    table = read_predictions(folder / "predictions" / "predictions.csv")
    assert set(study.columns) <= set(table.columns)
    assert load_model(folder / "run" / "fold0-seed0").task.kind == study.kind
    metrics = evaluate_predictions(table, kind=study.kind, n_bootstrap=50)
    assert metrics["n_evaluated"] == len(table) >= 14 and metrics["n_without_label"] == 0
    entry = metrics["pooled"]["metrics"][study.metric]
    assert entry["value"] > study.least and entry["low"] <= entry["value"] <= entry["high"]


def test_the_columns_alone_tell_the_task(done: tuple[Study, Path]) -> None:
    study, folder = done
    checked = check_predictions(read_predictions(folder / "predictions" / "predictions.csv"))
    assert checked.kind == ("regression" if study.kind == "proportion" else study.kind)


def test_the_command_evaluates_against_the_label_table(
    done: tuple[Study, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    study, folder = done
    config = study.config
    if config == LabelsConfig() and study.kind != "multilabel":
        return  # one plain column: other tests go that way
    command = ["evaluate", str(folder / "predictions"), "--out", str(folder / "evaluation"), "--bootstrap", "0", "--json"]
    command += ["--labels", str(folder / "labels.csv"), "--task", config.task, "--target", *config.target]
    command += ["--time", config.time, "--event", config.event] if config.time and config.event else []
    rows = pd.read_csv(folder / "labels.csv", dtype=str)
    tested = set(read_predictions(folder / "predictions" / "predictions.csv")["slide_id"])
    rows[rows["slide"].isin(tested)].to_csv(tmp_path / "labels.csv", index=False)
    command[command.index("--labels") + 1] = str(tmp_path / "labels.csv")
    assert main(command) == 0
    other = json.loads(capsys.readouterr().out)
    own = evaluate_predictions(read_predictions(folder / "predictions" / "predictions.csv"), n_bootstrap=0)
    assert {name: entry["value"] for name, entry in own["pooled"]["metrics"].items()} == {
        name: entry["value"] for name, entry in other["pooled"]["metrics"].items()
    }
    drawn = {"binary": "roc.png", "survival": "survival.png", "regression": "scatter.png", "proportion": "scatter.png"}
    assert drawn.get(study.kind, "pr.png") in other["plots"]
    page = write_report(folder).read_text()
    assert study.metric in page and f"<figcaption>{min(tested)}<br>" in page


def test_tile_scores_have_a_column_for_each_name(done: tuple[Study, Path]) -> None:
    _, folder = done
    path = next((folder / "predictions" / "scores").glob("*.h5"))
    task = load_model(folder / "run" / "fold0-seed0").task
    with open_hdf5(path) as file:
        names, contributions = list(file.attrs["class_names"]), file["contributions"][:]
        assert contributions.shape == (6, len(names)) and np.isfinite(contributions).all()
    assert len(names) == len(task.output_names)
    tile_map = read_tile_map(path)
    assert len(tile_map.values) == 6 and tile_map.class_name == task.output_names[-1]


def test_contributions_of_values_add_up_in_units_of_the_label(done: tuple[Study, Path]) -> None:
    study, folder = done
    path = min((folder / "predictions" / "scores").glob("*.h5"))
    with open_hdf5(path) as file:
        sums = np.nansum(file["contributions"][:], axis=0)
    assert read_attributes(path)["contribution_unit"] == load_model(folder / "run" / "fold0-seed0").task.contribution_unit
    if study.kind != "regression":
        return
    table = read_predictions(folder / "predictions" / "predictions.csv").set_index("slide_id", drop=False)
    model = load_model(folder / "run" / f"fold{table.at[path.stem, 'fold']}-seed0")
    assert float(table.at[path.stem, "value"]) == pytest.approx(model.task.center + float(sums[0]), abs=1e-3)


def test_survival_states_chances_that_fall_with_time(done: tuple[Study, Path]) -> None:
    study, folder = done
    if study.kind != "survival":
        return
    table = read_predictions(folder / "predictions" / "predictions.csv")
    chances = table[[name for name in table.columns if name.startswith("surv_")]].to_numpy()
    assert chances.shape[1] >= 5 and ((chances >= 0) & (chances <= 1)).all()
    assert (np.diff(chances, axis=1) <= 1e-9).all()
    late = table["time"] > table["time"].median()
    assert table.loc[late, "risk"].mean() < table.loc[~late, "risk"].mean()
    assert chances[late].mean() > chances[~late].mean()
    metrics = evaluate_predictions(table, n_bootstrap=0)["pooled"]["metrics"]
    assert metrics["integrated_brier"]["value"] < 0.3 and metrics["auroc_over_time"]["value"] > 0.8


def test_a_loss_of_another_task_is_refused_by_name(bags: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    labels = pd.DataFrame({"slide": [f"s{i:02}" for i in range(N_SLIDES)], "label": ["a", "b"] * (N_SLIDES // 2)})
    labels.to_csv(tmp_path / "labels.csv", index=False)
    command = ["train", str(bags), "--labels", str(tmp_path / "labels.csv"), "--out", str(tmp_path / "run")]
    assert main([*command, "--folds", "2", "--loss", "cox"]) == 2
    assert "loss 'cox' is not for a binary task; expected cross_entropy" in capsys.readouterr().err


def test_focal_and_smoothed_labels_reach_the_model(bags: Path, tmp_path: Path) -> None:
    study = STUDIES["binary"]
    labels = pd.DataFrame([{"slide": f"s{i:02}", **study.labels(signal(i), i)} for i in range(N_SLIDES)])
    labels.to_csv(tmp_path / "labels.csv", index=False)
    plain = settings_of(study)
    training = replace(plain.train, focal_gamma=2.0, label_smoothing=0.1, epochs=2, fold="0")
    train(bags, tmp_path / "labels.csv", tmp_path / "run", settings=replace(plain, train=training), quiet=True)
    task = load_model(tmp_path / "run" / "fold0-seed0").task
    assert (task.focal_gamma, task.label_smoothing) == (2.0, 0.1)

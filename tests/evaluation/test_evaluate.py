"""A table in, numbers with intervals out: the views, the notes, degenerate cohorts, and the files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from wsimil.errors import UsageError
from wsimil.evaluation.evaluate import compare_predictions, evaluate_predictions, write_evaluation
from wsimil.evaluation.intervals import corrected_t_interval


def binary_table(n: int = 100, *, n_folds: int = 5, seed: int = 0, shift: float = 1.5) -> pd.DataFrame:
    """Two slides a patient; folds by patient."""
    rng = np.random.default_rng(seed)
    patient = np.arange(n) // 2
    label = (patient % 2).astype(int)
    probability = 1 / (1 + np.exp(-(rng.normal(size=n) + shift * (label - 0.5))))
    return pd.DataFrame(
        {
            "slide_id": [f"s{i}" for i in range(n)],
            "patient": [f"p{i}" for i in patient],
            "fold": (patient // 2) % n_folds,
            "split": "test",
            "status": "done",
            "label": np.where(label == 1, "tumour", "normal"),
            "prob_normal": 1 - probability,
            "prob_tumour": probability,
            "threshold": 0.4,
        }
    )


def class_table(n: int = 90, *, seed: int = 1, names: str = "abc") -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    label = np.arange(n) % len(names)
    probability = np.exp(rng.normal(size=(n, len(names))) + np.eye(len(names))[label])
    probability /= probability.sum(axis=1, keepdims=True)
    columns = {f"prob_{name}": probability[:, i] for i, name in enumerate(names)}
    ids = {"slide_id": [f"s{i}" for i in range(n)], "fold": (np.arange(n) // len(names)) % 3}
    return pd.DataFrame({**ids, "label": [names[i] for i in label], **columns})


def survival_table(n: int = 80) -> pd.DataFrame:
    rng = np.random.default_rng(2)
    risk = rng.normal(size=n)
    time = rng.exponential(np.exp(-risk))
    ids = {"slide_id": [f"s{i}" for i in range(n)], "fold": np.arange(n) % 4}
    return pd.DataFrame({**ids, "risk": risk, "time": time, "event": rng.integers(0, 2, n)})


def regression_table(n: int = 80) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    label = rng.normal(size=n)
    ids = {"slide_id": [f"s{i}" for i in range(n)], "fold": np.arange(n) % 4}
    return pd.DataFrame({**ids, "label": label, "value": label + rng.normal(size=n)})


def survival_chances_table(n: int = 80) -> pd.DataFrame:
    table = survival_table(n)
    chances = {f"surv_{at:g}": np.exp(-np.exp(table["risk"]) * at) for at in (0.2, 0.5, 1.0)}
    return table.assign(**chances)


def labels_table(n: int = 80) -> pd.DataFrame:
    """Two labels; every fifth slide's second is not known."""
    rng = np.random.default_rng(4)
    truth = rng.integers(0, 2, (n, 2))
    chance = np.clip(0.3 * truth + rng.uniform(0, 0.7, (n, 2)), 0, 1)
    label = [f"x={one};y={two}" if i % 5 else f"x={one}" for i, (one, two) in enumerate(truth)]
    said = [f"x={int(one)};y={int(two)}" for one, two in chance >= 0.5]
    columns = {"label": label, "prob_x": chance[:, 0], "prob_y": chance[:, 1], "prediction": said, "threshold": 0.5}
    return pd.DataFrame({"slide_id": [f"s{i}" for i in range(n)], "fold": np.arange(n) % 4, **columns})


def grade_table(n: int = 90) -> pd.DataFrame:
    table = class_table(n, names="123")
    return table.assign(value=table[["prob_1", "prob_2", "prob_3"]].to_numpy() @ np.arange(3))


def every_null(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in every_null(item, f"{path}.{key}" if path else key)]
    return [path] if value is None else []


def unexplained(result: dict[str, Any]) -> list[str]:
    """Nulls that no note speaks of, at their own path or a path above; folds.0.metrics.x is noted as folds.0.x."""
    missing = []
    for path in every_null({key: value for key, value in result.items() if key != "notes"}):
        short = path.replace(".metrics", "")
        parts = short.split(".")
        if not any(".".join(parts[:k]) in result["notes"] for k in range(1, len(parts) + 1)):
            missing.append(path)
    return missing


def test_pooled_values_match_scikit_learn() -> None:
    table = binary_table()
    result = evaluate_predictions(table, n_bootstrap=200)
    label = table["label"] == "tumour"
    pooled = result["pooled"]["metrics"]
    assert pooled["auroc"]["value"] == pytest.approx(sk.roc_auc_score(label, table["prob_tumour"]))
    assert pooled["f1"]["value"] == pytest.approx(sk.f1_score(label, table["prob_tumour"] >= 0.4))
    assert pooled["f1_at_0.5"]["value"] == pytest.approx(sk.f1_score(label, table["prob_tumour"] >= 0.5))
    assert result["pooled"]["confusion"] == sk.confusion_matrix(label, table["prob_tumour"] >= 0.4).tolist()
    for name, entry in pooled.items():
        if name != "ece":
            assert entry["low"] <= entry["value"] <= entry["high"], name
            assert entry["low"] < entry["high"], name


@pytest.mark.parametrize(
    "make",
    [binary_table, class_table, regression_table, survival_table, survival_chances_table, labels_table, grade_table],
)
def test_every_kind_gives_json_whose_nulls_are_explained(make: Any) -> None:
    result = evaluate_predictions(make(), n_bootstrap=50)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["n_evaluated"] == len(make())
    assert len(result["folds"]) >= 3
    assert unexplained(result) == []


def test_fold_mean_uses_the_corrected_interval() -> None:
    table = binary_table()
    result = evaluate_predictions(table, n_bootstrap=0)
    by_fold = [sk.roc_auc_score(part["label"] == "tumour", part["prob_tumour"]) for _, part in table.groupby("fold")]
    entry = result["fold_mean"]["auroc"]
    interval = corrected_t_interval(by_fold, test_to_train=1 / 4)  # five equal folds
    assert entry["value"] == pytest.approx(np.mean(by_fold))
    assert entry["sd"] == pytest.approx(np.std(by_fold, ddof=1))
    assert entry["low"] == pytest.approx(interval.low)
    assert entry["high"] == pytest.approx(min(1.0, interval.high))
    assert entry["n_folds"] == 5
    assert [result["folds"][str(k)]["metrics"]["auroc"] for k in range(5)] == pytest.approx(by_fold)


def test_groups_are_resampled_and_counted_beside_their_patients() -> None:
    plain = binary_table(80)
    hospitals = plain["patient"].str[1:].astype(int) % 5
    grouped = plain.assign(group="h" + hospitals.astype(str))
    found, as_patients = (evaluate_predictions(one, n_bootstrap=50) for one in (grouped, plain.assign(patient=grouped["group"])))
    assert (found["n_patients"], found["n_groups"], found["pooled"]["n_groups"]) == (40, 5, 5)
    assert found["pooled"]["metrics"] == as_patients["pooled"]["metrics"]
    given = grouped[["slide_id", "label", "group"]]
    assert evaluate_predictions(plain, labels=given, n_bootstrap=50)["pooled"] == found["pooled"]
    assert "n_groups" not in evaluate_predictions(plain, n_bootstrap=0)  # nor in tables that are older


def test_patients_not_slides_are_resampled() -> None:
    table = binary_table(40)
    copies = pd.concat([table.assign(slide_id=table["slide_id"] + f"-{k}") for k in range(4)])
    widths = []
    for rows in (table, copies, copies.assign(patient=copies["slide_id"])):
        entry = evaluate_predictions(rows, n_bootstrap=400)["pooled"]["metrics"]["auroc"]
        widths.append(entry["high"] - entry["low"])
    assert widths[1] == pytest.approx(widths[0], rel=1e-9)
    assert widths[2] < 0.7 * widths[1]


def test_row_order_and_seed_decide_nothing_but_the_resamples() -> None:
    table = binary_table()
    result = evaluate_predictions(table, n_bootstrap=100)
    shuffled = evaluate_predictions(table.sample(frac=1, random_state=1), n_bootstrap=100)
    other = evaluate_predictions(table, n_bootstrap=100, seed=1)
    mine, theirs, new = (one["pooled"]["metrics"]["auroc"] for one in (result, shuffled, other))
    assert mine == pytest.approx(theirs, rel=1e-12)
    assert mine["value"] == new["value"]
    assert mine["low"] != new["low"]


def test_seeds_are_averaged_not_pooled() -> None:
    tables = [binary_table(seed=seed).assign(seed=seed) for seed in range(3)]
    result = evaluate_predictions(pd.concat(tables), n_bootstrap=100)
    each = [evaluate_predictions(one, n_bootstrap=0)["pooled"]["metrics"]["auroc"]["value"] for one in tables]
    entry = result["pooled"]["metrics"]["auroc"]
    assert entry["value"] == pytest.approx(np.mean(each))
    assert entry["seed_sd"] == pytest.approx(np.std(each, ddof=1))
    assert entry["low"] < entry["value"] < entry["high"]
    assert result["pooled"]["n_seeds"] == 3
    assert result["pooled"]["n_slides"] == 100


def test_new_slides_stand_apart_from_the_folds() -> None:
    table = binary_table()
    new = binary_table(40, seed=5).assign(fold="ensemble")
    new["slide_id"], new["patient"] = "new-" + new["slide_id"], "new-" + new["patient"]
    result = evaluate_predictions(pd.concat([table, new]), n_bootstrap=50)
    alone = evaluate_predictions(table, n_bootstrap=50)
    assert result["pooled"] == alone["pooled"]
    assert result["ensemble"]["n_slides"] == 40
    only_new = evaluate_predictions(new, n_bootstrap=50)
    assert only_new["pooled"] == result["ensemble"]
    assert only_new["folds"] == {}
    assert unexplained(only_new) == []


def test_a_training_slide_predicted_by_the_ensemble_is_refused() -> None:
    table = binary_table()
    with pytest.raises(UsageError, match="slide s0 is predicted by its own fold and by the ensemble"):
        evaluate_predictions(pd.concat([table, table[:1].assign(fold="ensemble")]), n_bootstrap=0)


def test_leaks_that_the_table_shows_are_noted() -> None:
    table = binary_table()
    assert not [path for path in evaluate_predictions(table, n_bootstrap=0)["notes"] if path.startswith("leak")]
    by_slide = table.assign(fold=np.arange(len(table)) % 5)
    assert "50 patients" in evaluate_predictions(by_slide, n_bootstrap=0)["notes"]["leak.folds"]
    repeated = pd.concat([table, table.assign(fold=table["fold"] + 5)])  # repeated cross-validation is no leak
    assert "leak.folds" not in evaluate_predictions(repeated, n_bootstrap=0)["notes"]
    sibling = table[:1].assign(fold="ensemble", slide_id="sibling")
    notes = evaluate_predictions(pd.concat([table, sibling]), n_bootstrap=0)["notes"]
    assert "1 patients" in notes["leak.ensemble"]


def test_a_fold_with_one_class_is_null_with_a_reason() -> None:
    table = binary_table()
    table = table[(table["fold"] != 2) | (table["label"] == "normal")]
    result = evaluate_predictions(table, n_bootstrap=50)
    assert result["folds"]["2"]["metrics"]["auroc"] is None
    assert result["notes"]["folds.2.auroc"] == "all 10 slides are normal"
    assert result["fold_mean"]["auroc"]["n_folds"] == 4
    assert result["notes"]["fold_mean.auroc"] == "defined in 4 of 5 folds"
    assert result["pooled"]["metrics"]["auroc"]["value"] is not None
    assert unexplained(result) == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rows",
    [
        binary_table(2),  # one patient
        binary_table(4, n_folds=1).iloc[[0, 2]],  # two slides, two patients, two classes
        binary_table(40).query("label == 'tumour'"),
        binary_table(6).assign(status="empty", prob_normal=np.nan, prob_tumour=np.nan),
        binary_table(6).assign(label=None),
        binary_table(0),
        binary_table(20).assign(prob_normal=0.5, prob_tumour=0.5),
        class_table(2),
        class_table(9).query("label == 'a'"),
        regression_table(1),
        regression_table(4).assign(label=1.0),
        survival_table(2),
        survival_table(9).assign(event=0),
        survival_chances_table(9).assign(event=0),
        survival_chances_table(3),
        labels_table(2),
        labels_table(8).assign(label="x=1"),
        labels_table(0).assign(prediction="x=1;y=0"),
        grade_table(3),
    ],
)
def test_degenerate_cohorts_end_in_nulls_with_reasons(rows: pd.DataFrame) -> None:
    result = evaluate_predictions(rows, n_bootstrap=20)
    assert unexplained(result) == []
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("rows", "plots"),
    [
        (binary_table(0), []),
        (binary_table(2), ["reliability.png", "confusion.png"]),
        (class_table(4), ["roc.png", "pr.png", "reliability.png", "confusion.png"]),
        (regression_table(1), ["scatter.png"]),
        (survival_table(1), ["survival.png"]),
    ],
)
def test_degenerate_cohorts_are_drawn_as_far_as_they_go(rows: pd.DataFrame, plots: list[str], tmp_path: Path) -> None:
    assert write_evaluation(tmp_path, rows, n_bootstrap=20)["plots"] == plots


def test_a_pooled_number_that_cannot_be_says_why_itself_not_its_interval() -> None:
    result = evaluate_predictions(binary_table(40).query("label == 'tumour'"), n_bootstrap=20)
    assert result["notes"]["pooled.auroc"] == "all 20 slides are tumour"
    assert result["pooled"]["metrics"]["sensitivity"]["low"] is not None


def test_a_perfect_test_set_does_not_boast() -> None:
    table = binary_table(20, shift=50.0)
    result = evaluate_predictions(table, n_bootstrap=50)
    assert result["pooled"]["metrics"]["auroc"]["low"] == 1.0
    assert "too few or too easy" in result["notes"]["pooled.auroc"]


def test_t_intervals_stay_within_what_a_metric_can_be() -> None:
    table = binary_table(40, shift=3.5)
    for entry in evaluate_predictions(table, n_bootstrap=0)["fold_mean"].values():
        assert entry["high"] is None or entry["high"] <= 1.0 or entry["value"] > 1.0


def test_grades_are_in_their_order_whatever_the_order_of_columns() -> None:
    table = class_table(names="012")
    shuffled = table[[*(name for name in table if not name.startswith("prob_")), "prob_2", "prob_0", "prob_1"]]
    one, other = (evaluate_predictions(rows, n_bootstrap=0)["pooled"]["metrics"] for rows in (table, shuffled))
    assert one["quadratic_kappa"] == other["quadratic_kappa"] and one["mae_steps"] == other["mae_steps"]


def test_grades_get_a_quadratic_kappa_and_names_do_not() -> None:
    assert "quadratic_kappa" in evaluate_predictions(class_table(names="012"), n_bootstrap=0)["pooled"]["metrics"]
    assert "quadratic_kappa" not in evaluate_predictions(class_table(), n_bootstrap=0)["pooled"]["metrics"]
    ordinal = evaluate_predictions(class_table(), kind="ordinal", n_bootstrap=0)
    assert "quadratic_kappa" in ordinal["pooled"]["metrics"]


def test_comparison_of_a_model_with_itself_finds_no_difference() -> None:
    table = binary_table()
    result = compare_predictions(table, table, n_bootstrap=200)
    for entry in result["metrics"].values():
        assert entry["difference"] == 0.0
        assert entry["difference_detected"] in (False, None)
        assert entry["p"] in (1.0, None)
    assert result["delong_p"] == 1.0
    # two slides a patient: McNemar's test would count both
    assert "mcnemar_p" not in result and "of one patient" in result["notes"]["mcnemar_p"]
    alone = table.assign(patient=table["slide_id"])
    assert compare_predictions(alone, alone, n_bootstrap=0)["mcnemar_p"] == 1.0


def test_comparison_finds_a_better_model_in_any_row_order() -> None:
    good, poor = binary_table(200, shift=3), binary_table(200, seed=9, shift=0.3)
    result = compare_predictions(good, poor.sample(frac=1, random_state=0), n_bootstrap=300)
    entry = result["metrics"]["auroc"]
    label = good["label"] == "tumour"
    gain = sk.roc_auc_score(label, good["prob_tumour"]) - sk.roc_auc_score(label, poor["prob_tumour"])
    assert entry["difference"] == pytest.approx(gain)
    assert entry["low"] > 0
    assert entry["difference_detected"] is True
    assert max(entry["p"], result["delong_p"]) < 0.01
    alone = [table.assign(patient=table["slide_id"]) for table in (good, poor)]
    assert compare_predictions(*alone, n_bootstrap=0)["mcnemar_p"] < 0.01


def test_comparison_needs_common_slides_and_labels() -> None:
    table = binary_table()
    part = compare_predictions(table, table[20:], n_bootstrap=0)
    assert (part["n_slides"], part["n_only_a"], part["n_only_b"]) == (80, 20, 0)
    with pytest.raises(UsageError, match="same splits"):
        compare_predictions(table, table.assign(fold=table["fold"] + 9))
    with pytest.raises(UsageError, match="different labels"):
        compare_predictions(table, table.assign(label=table["label"].to_numpy()[::-1]))
    with pytest.raises(UsageError, match="different things"):
        compare_predictions(table, class_table())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("make", "plots"),
    [
        (binary_table, ["roc.png", "pr.png", "reliability.png", "confusion.png"]),
        (survival_table, ["survival.png"]),
        (labels_table, ["roc.png", "pr.png"]),
    ],
)
def test_evaluation_is_written_whole(make: Any, plots: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "evaluation"
    result = write_evaluation(folder, make(), n_bootstrap=20)
    assert result["plots"] == plots
    assert sorted(path.name for path in folder.iterdir()) == sorted([*plots, "metrics.json"])
    assert json.loads((folder / "metrics.json").read_text()) == result
    for name in plots:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_plots_of_an_earlier_evaluation_do_not_stay(tmp_path: Path) -> None:
    for name in ("roc.png", "metrics.json", "mine.png"):
        (tmp_path / name).write_text("old")
    write_evaluation(tmp_path, regression_table(), n_bootstrap=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "mine.png", "scatter.png"]
    assert json.loads((tmp_path / "metrics.json").read_text())["kind"] == "regression"


def test_class_names_may_hold_any_character(tmp_path: Path) -> None:
    table = binary_table(20).rename(columns={"prob_tumour": "prob_$\\frac{_a_very_long_class_name"})
    table["label"] = table["label"].replace("tumour", "$\\frac{_a_very_long_class_name")
    assert len(write_evaluation(tmp_path, table, n_bootstrap=0)["plots"]) == 4


def test_evaluation_needs_no_torch_and_numbers_no_matplotlib() -> None:
    code = "import sys, wsimil.evaluation as e; print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_several_labels_are_counted_and_measured_where_known() -> None:
    table = labels_table()
    result = evaluate_predictions(table, n_bootstrap=100)
    pooled = result["pooled"]
    assert (result["kind"], result["classes"]) == ("multilabel", ["x", "y"])
    assert pooled["n_known"] == {"x": 80, "y": 64} and "confusion" not in pooled
    known = table[table["label"].str.contains("y")]
    entry = pooled["metrics"]["auroc_y"]
    assert entry["value"] == pytest.approx(sk.roc_auc_score(known["label"].str.contains("y=1"), known["prob_y"]))
    assert entry["low"] < entry["value"] < entry["high"]
    same = compare_predictions(table, table, n_bootstrap=20)  # what is unknown in both is no difference
    assert same["metrics"]["auroc"]["difference"] == 0


def test_chances_over_time_are_scored_and_a_gap_in_them_is_said() -> None:
    table = survival_chances_table()
    pooled = evaluate_predictions(table, n_bootstrap=100)["pooled"]["metrics"]
    at = {"auroc_at_0.2", "auroc_at_0.5", "auroc_at_1"}
    assert {"harrell_c", "ipcw_c", "auroc_over_time", "integrated_brier", *at} == set(pooled)
    assert pooled["integrated_brier"]["low"] < pooled["integrated_brier"]["value"] < pooled["integrated_brier"]["high"]
    result = evaluate_predictions(table.assign(surv_1=np.nan), n_bootstrap=0)
    assert "integrated_brier" not in result["pooled"]["metrics"] and "no baseline hazard" in result["notes"]["integrated_brier"]

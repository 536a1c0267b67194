"""Which rows are evaluated, which are counted, and which are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from wsimil.cli import main
from wsimil.errors import LabelsError, UsageError
from wsimil.evaluation.table import check_predictions, mean_over_folds, read_predictions
from wsimil.files import read_json


def table(**columns: object) -> pd.DataFrame:
    """Four slides of three patients in two folds."""
    return pd.DataFrame(
        {
            "slide": ["a.svs", "b.svs", "c.svs", "d.svs"],
            "slide_id": ["a", "b", "c", "d"],
            "patient": ["p1", "p1", "p2", "p3"],
            "fold": [0, 0, 1, 1],
            "split": "test",
            "status": "done",
            "label": ["normal", "tumour", "normal", "tumour"],
            "prob_normal": [0.9, 0.2, 0.6, 0.3],
            "prob_tumour": [0.1, 0.8, 0.4, 0.7],
            "prediction": ["normal", "tumour", "tumour", "tumour"],
            "threshold": [0.5, 0.5, 0.35, 0.35],
        }
        | columns
    )


def test_columns_say_what_the_task_is() -> None:
    binary = check_predictions(table())
    assert (binary.kind, binary.classes) == ("binary", ("normal", "tumour"))
    assert binary.label.tolist() == [0, 1, 0, 1]
    assert binary.predicted.tolist() == [0, 1, 1, 1]
    three = table(prob_other=0.0)
    assert check_predictions(three).kind == "multiclass"
    value = table(value=[1.0, 2.0, 3.0, 4.0], label=[1.0, 2.0, 3.0, 5.0]).drop(columns=["prob_normal", "prob_tumour"])
    assert check_predictions(value).kind == "regression"
    risk = table(risk=0.5, time=[1, 2, 3, 4], event=[1, 0, 1, 0]).drop(columns=["prob_normal", "prob_tumour", "label"])
    survival = check_predictions(risk)
    assert survival.kind == "survival"
    assert survival.event.tolist() == [True, False, True, False]
    with pytest.raises(UsageError, match="nothing to evaluate"):
        check_predictions(table().drop(columns=["prob_normal", "prob_tumour"]))


def test_the_positive_class_can_be_named() -> None:
    swapped = check_predictions(table(), positive="normal")
    assert swapped.classes == ("tumour", "normal")
    assert swapped.score[:, 1].tolist() == [0.9, 0.2, 0.6, 0.3]
    with pytest.raises(UsageError, match="'tumor' is not one of normal, tumour"):
        check_predictions(table(), positive="tumor")


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7, np.nan])
def test_renaming_the_positive_class_changes_no_decision(threshold: float) -> None:
    """The threshold stays that of the class it was chosen for; .5 and .7 are decided on the edge."""
    rows = table(prob_tumour=[0.1, 0.5, 0.7, 0.65], prob_normal=[0.9, 0.5, 0.3, 0.35], threshold=threshold)
    said = [
        [one.classes[index] for index in one.predicted]
        for one in (check_predictions(rows.drop(columns="prediction"), positive=name) for name in ("tumour", "normal"))
    ]
    assert said[0] == said[1]
    swapped = check_predictions(rows, positive="normal")
    np.testing.assert_allclose(swapped.threshold, 1 - threshold)


def test_slides_without_a_prediction_or_label_are_counted_not_evaluated() -> None:
    rows = table(status=["done", "empty", "failed", "done"], label=["normal", "tumour", "normal", None])
    rows.loc[[1, 2], ["prob_normal", "prob_tumour"]] = np.nan
    checked = check_predictions(rows)
    assert checked.slide_id.tolist() == ["a"]
    assert checked.counts == {
        "n_slides": 4, "n_patients": 3, "n_empty": 1, "n_failed": 1, "n_skipped": 0,
        "n_without_label": 1, "n_not_test": 0, "n_evaluated": 1,
    }  # fmt: skip


def test_training_and_validation_rows_are_never_evaluated() -> None:
    checked = check_predictions(table(split=["test", "train", "val", "test"]))
    assert checked.slide_id.tolist() == ["a", "d"]
    assert checked.counts["n_not_test"] == 2
    assert "not test results" in checked.notes["split"]


def test_a_labels_table_has_the_last_word() -> None:
    labels = pd.DataFrame({"slide_id": ["a", "b", "c"], "label": ["tumour", "tumour", "normal"], "patient": ["x", "y", None]})
    checked = check_predictions(table(), labels=labels)
    assert checked.slide_id.tolist() == ["a", "b", "c"]
    assert checked.label.tolist() == [1, 1, 0]
    assert checked.patient.tolist() == ["x", "y", "p2"]
    assert checked.counts["n_without_label"] == 1
    assert checked.notes["labels"].startswith("1 rows have another label")
    check_predictions(table(), labels=pd.concat([labels, labels]))  # said twice, in the same words
    with pytest.raises(LabelsError, match="slide a is in the labels table twice"):
        check_predictions(table(), labels=pd.concat([labels, labels.assign(label="normal")]))
    with pytest.raises(LabelsError, match="no column label"):
        check_predictions(table(), labels=labels[["slide_id"]])


def test_ids_match_whether_they_were_read_as_text_or_numbers() -> None:
    rows = table(slide_id=["1", "2", "3", "4"]).drop(columns="label")
    labels = pd.DataFrame(
        {"slide_id": [1, 2, 3, 4], "label": ["normal", "tumour", "normal", "tumour"], "patient": [7.0, 7.0, 8.0, np.nan]}
    )
    checked = check_predictions(rows, labels=labels)
    assert len(checked) == 4
    assert checked.patient.tolist() == ["7", "7", "8", "p3"]


def test_numeric_classes_survive_a_column_with_gaps() -> None:
    rows = table().rename(columns={"prob_normal": "prob_0", "prob_tumour": "prob_1"}).drop(columns="prediction")
    for label in ([0.0, 1.0, np.nan, 1.0], ["0.0", "1.0", "", "1.0"], [0, 1, None, 1]):
        checked = check_predictions(rows.assign(label=pd.Series(label)))
        assert checked.label.tolist() == [0, 1, 1]


def test_text_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    rows = table(slide_id=["007", "1.0", "NA", "d"], patient=["01", "01", "None", ""], label=["NA", "tumour", "NA", "tumour"])
    rows = rows.rename(columns={"prob_normal": "prob_NA"}).assign(prediction="")
    rows["status"] = ["done", "done", "done", "empty"]
    rows.loc[3, ["prob_NA", "prob_tumour", "threshold"]] = np.nan
    rows.to_csv(path, index=False)
    checked = check_predictions(read_predictions(path))
    assert checked.slide_id.tolist() == ["007", "1.0", "NA"]
    assert checked.patient.tolist() == ["01", "01", "None"]
    assert checked.classes == ("NA", "tumour")
    assert checked.label.tolist() == [0, 1, 0]
    assert checked.fold.tolist() == ["0", "0", "1"]


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.csv"):
        read_predictions(tmp_path / "nothing.csv")
    (tmp_path / "text.csv").write_text("slide_id,prob_a,prob_b\ns1,high,low\n")
    with pytest.raises(UsageError, match="column prob_a"):
        read_predictions(tmp_path / "text.csv")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prob_tumour": [0.1, np.nan, 0.4, 0.7]}, "slide b is done but its .* is missing"),
        ({"prob_tumour": [0.1, 0.8, np.inf, 0.7]}, "slide c is done but"),
        ({"prob_tumour": [0.1, 0.8, 0.4, 0.2]}, "slide d: probabilities"),
        ({"prob_tumour": [-0.1, 0.8, 0.4, 0.7], "prob_normal": [1.1, 0.2, 0.6, 0.3]}, "slide a: probabilities"),
        ({"slide_id": ["a", "a", "c", "d"]}, "slide a has two rows in fold 0"),
        ({"slide_id": ["a", "", "c", "d"]}, "row 2 .* no slide_id"),
        ({"label": ["normal", "cancer", "normal", "tumour"]}, "slide b: label 'cancer' is not one of"),
        ({"prediction": ["normal", "cancer", "normal", "tumour"]}, "slide b: prediction 'cancer'"),
        ({"status": ["done", "finished", "done", "done"]}, "status 'finished' is unknown"),
    ],
)
def test_impossible_rows_are_named(columns: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_predictions(table(**columns))


def test_unlabelled_slides_must_still_have_possible_predictions() -> None:
    with pytest.raises(UsageError, match="slide b is done"):
        check_predictions(table(label=["normal", None, "normal", "tumour"], prob_tumour=[0.1, np.nan, 0.4, 0.7]))


def test_without_predictions_the_threshold_decides() -> None:
    assert check_predictions(table().drop(columns="prediction")).predicted.tolist() == [0, 1, 1, 1]
    at_threshold = table(threshold=[0.1, 0.8, 0.41, 0.71]).drop(columns="prediction")
    assert check_predictions(at_threshold).predicted.tolist() == [1, 1, 0, 0]  # equal is positive
    bare = check_predictions(table().drop(columns=["prediction", "threshold"]))
    assert bare.predicted.tolist() == [0, 1, 0, 1]
    assert "4 rows" in bare.notes["threshold"]


def test_a_slide_may_be_tested_by_several_folds_and_seeds() -> None:
    twice = pd.concat([table(), table(fold=[2, 2, 3, 3]), table().assign(seed=1)])
    checked = check_predictions(twice)
    assert len(checked) == 12
    assert checked.counts["n_slides"] == 4


def test_missing_columns_are_named() -> None:
    with pytest.raises(UsageError, match="no column slide_id"):
        check_predictions(table().drop(columns="slide_id"))
    with pytest.raises(LabelsError, match="pass the labels table"):
        check_predictions(table().drop(columns="label"))
    with pytest.raises(UsageError, match="no column prob_x"):
        check_predictions(table(), classes=["x", "normal"])
    with pytest.raises(UsageError, match="kind 'ternary' is unknown"):
        check_predictions(table(), kind="ternary")


def test_columns_tell_grades_labels_and_times_apart() -> None:
    grades = table(value=[0.1, 0.8, 0.4, 0.7])
    assert check_predictions(grades).kind == "ordinal"
    facts = {"label": ["normal=1;tumour=0", "tumour=1", "", "normal=0;tumour=1"], "prediction": ["normal=1;tumour=0"] * 4}
    several = check_predictions(table(**facts))
    assert several.kind == "multilabel" and several.counts["n_without_label"] == 1
    np.testing.assert_array_equal(several.label, [[1, 0], [np.nan, 1], [0, 1]])
    np.testing.assert_array_equal(several.predicted, [[1, 0], [0, 1], [0, 1]])  # by probability and threshold
    times = table(risk=0.5, label=["12.5", "3+", "", "4"], surv_2=0.9, surv_10=0.4).drop(columns=["prob_normal", "prob_tumour"])
    survival = check_predictions(times)
    assert survival.label.tolist() == [12.5, 3, 4] and survival.event.tolist() == [True, False, True]
    assert survival.horizons == (2.0, 10.0) and survival.survival.tolist() == [[0.9, 0.4]] * 3


def test_grades_are_predicted_by_their_median() -> None:
    rows = table(value=1.0).drop(columns="prediction").rename(columns={"prob_normal": "prob_1", "prob_tumour": "prob_3"})
    rows = rows.assign(prob_1=0.4, prob_2=0.25, prob_3=0.35, label=["1", "2", "3", "1"])
    rows = rows[["slide_id", "label", "prob_1", "prob_2", "prob_3", "value"]]
    assert check_predictions(rows).predicted.tolist() == [1] * 4
    assert check_predictions(rows, kind="multiclass").predicted.tolist() == [0] * 4


def test_a_labels_table_may_say_times_as_one_text() -> None:
    rows = table(risk=0.5).drop(columns=["prob_normal", "prob_tumour", "label"])
    labels = pd.DataFrame({"slide_id": ["a", "b", "c"], "label": ["7", "9+", "11"]})
    survival = check_predictions(rows, labels=labels)
    assert survival.label.tolist() == [7, 9, 11] and survival.event.tolist() == [True, False, True]


def test_soft_labels_count_as_their_likeliest_class() -> None:
    labels = pd.DataFrame({"slide_id": list("abcd"), "label": ["normal=0.3;tumour=0.7", "normal", "normal=1", "tumour=0.6"]})
    assert check_predictions(table(), labels=labels).label.tolist() == [1, 0, 0, 1]
    own = table(label=["tumour", "normal", "normal", "tumour"])  # as predictions write them
    assert "labels" not in check_predictions(own, labels=labels).notes
    assert check_predictions(own.assign(label="normal"), labels=labels).notes["labels"].startswith("2 rows have another label")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"label": "normal=2"}, "slide a: label 'normal=2'; expected 0 or 1 of normal, tumour"),
        ({"label": "other=1"}, "slide a: label 'other=1'"),
        ({"label": "normal"}, "does not say name=number"),
    ],
)
def test_several_labels_that_make_no_sense_are_refused(columns: dict[str, str], said: str) -> None:
    with pytest.raises(LabelsError, match=said):
        check_predictions(table(**columns), kind="multilabel")


def test_a_probability_above_one_is_refused_for_labels_too() -> None:
    with pytest.raises(UsageError, match="not between 0 and 1"):
        check_predictions(table(label="tumour=1", prob_tumour=1.2), kind="multilabel")


def test_rows_of_another_side_are_left_out_however_they_are_written() -> None:
    found = check_predictions(table(split=["Train", "test", "VAL", "test"]))
    assert found.counts["n_not_test"] == 2 and len(found.label) == 2
    with pytest.raises(UsageError, match="split 'validation' is unknown; expected one of train, val, test, new"):
        check_predictions(table(split=["validation", "test", "test", "test"]))


def test_without_a_threshold_the_mean_over_folds_decides_at_one_half() -> None:
    twice = table(slide_id=["a", "a", "c", "d"], fold=["0", "1", "1", "1"], threshold=np.nan, prob_tumour=[0.9, 0.8, 0.4, 0.7])
    assert mean_over_folds(twice).set_index("slide_id").loc["a", "prediction"] == "tumour"


@pytest.mark.parametrize("labels", ["slide,label\n", "slide,patient,label\n"])
def test_patients_of_the_predictions_stay_where_the_label_table_names_none(tmp_path: Path, labels: str) -> None:
    table().to_csv(tmp_path / "predictions.csv", index=False)
    gap = "," if "patient" in labels else ""
    rows = [f"{name},{gap}{'normal' if name in 'ac' else 'tumour'}\n" for name in "abcd"]
    (tmp_path / "labels.csv").write_text(labels + "".join(rows))
    options = ["--labels", str(tmp_path / "labels.csv"), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(["evaluate", str(tmp_path / "predictions.csv"), *options]) == 0
    assert read_json(tmp_path / "out" / "metrics.json")["pooled"]["n_patients"] == 3

"""A task turns labels into targets, outputs into losses and predictions, and survives being written down."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsimil.config import TrainConfig
from wsimil.errors import LabelsError
from wsimil.task import Task, agreed, facts_of, facts_text, survival_of, survival_text

BINARY = Task("binary", ("normal", "tumour"))
TYPES = Task("multiclass", ("a", "b", "c"))
SCORE = Task("regression", center=30.0, scale=20.0)


def test_outputs_are_counted_and_named():
    assert (BINARY.n_outputs, BINARY.output_names) == (1, ("tumour",))
    assert (TYPES.n_outputs, TYPES.output_names) == (3, ("a", "b", "c"))
    assert (SCORE.n_outputs, SCORE.output_names) == (1, ("value",))


@pytest.mark.parametrize(
    ("kind", "classes", "said"),
    [
        ("ranking", (), "ranking.*binary, multiclass, .* or survival"),
        ("binary", ("a",), "two classes, not 1: a"),
        ("binary", ("a", "b", "c"), "two classes, not 3"),
        ("multiclass", ("a",), "at least two classes, not 1"),
    ],
)
def test_impossible_tasks_are_refused(kind, classes, said):
    with pytest.raises(LabelsError, match=said):
        Task(kind, classes)


def test_labels_become_targets():
    assert torch.equal(BINARY.encode(["tumour", "normal"]), torch.tensor([1.0, 0.0]))
    assert torch.equal(TYPES.encode(["c", "a"]), torch.tensor([2, 0]))
    assert torch.equal(SCORE.encode(["50", 30, 10.0]), torch.tensor([1.0, 0.0, -1.0]))
    assert torch.equal(Task("multiclass", ("0", "1", "2")).encode([2, 0]), torch.tensor([2, 0]))  # numbers as class names


def test_an_unknown_label_is_named():
    with pytest.raises(LabelsError, match=r"label 'Tumour' is not one of the classes normal, tumour"):
        BINARY.encode(["normal", "Tumour"])


def test_losses_are_those_of_the_textbook():
    logits = torch.tensor([[2.0], [-1.0]])
    by_hand = -(torch.sigmoid(torch.tensor(2.0)).log() + torch.sigmoid(torch.tensor(1.0)).log()) / 2
    torch.testing.assert_close(BINARY.loss(logits, torch.tensor([1.0, 0.0])), by_hand)
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
    by_hand = -(logits.log_softmax(1)[0, 0] + logits.log_softmax(1)[1, 1]) / 2
    torch.testing.assert_close(TYPES.loss(logits, torch.tensor([0, 1])), by_hand)
    torch.testing.assert_close(SCORE.loss(torch.tensor([[1.0], [0.0]]), torch.tensor([0.0, 2.0])), torch.tensor(2.5))


@pytest.mark.parametrize("task", [BINARY, TYPES, SCORE], ids=lambda task: task.kind)
def test_weights_multiply_the_rows(task):
    torch.manual_seed(0)
    logits = torch.randn(3, task.n_outputs)
    targets = torch.tensor([1, 0, 1]) if task.kind == "multiclass" else torch.tensor([1.0, 0.0, 1.0])
    rows = torch.stack([task.loss(logits[[row]], targets[[row]]) for row in range(3)])
    weights = torch.tensor([0.5, 0.0, 4.0])
    # not divided by their sum: a slide alone in its step would lose its weight
    torch.testing.assert_close(task.loss(logits, targets, weights), (rows * weights).mean())
    torch.testing.assert_close(task.loss(logits[:1], targets[:1], weights[:1]), 0.5 * rows[0])
    torch.testing.assert_close(task.loss(logits, targets, torch.ones(3)), task.loss(logits, targets))


@pytest.mark.parametrize("task", [BINARY, TYPES, SCORE], ids=lambda task: task.kind)
def test_extreme_logits_give_finite_losses_and_gradients(task):
    logits = torch.full((2, task.n_outputs), 1e4)
    logits[:, 0] = -1e4
    logits.requires_grad_()
    targets = torch.tensor([0, 1]) if task.kind == "multiclass" else torch.tensor([0.0, 1.0])
    loss = task.loss(logits, targets)
    loss.backward()
    assert loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4), min_size=3, max_size=3), st.floats(0.1, 10))
def test_probabilities_are_probabilities(logits, temperature):
    for task in (BINARY, TYPES):
        probabilities = task.probabilities(np.array([logits])[:, : task.n_outputs], temperature)
        assert probabilities.shape == (1, len(task.classes))
        assert np.isfinite(probabilities).all() and (probabilities >= 0).all()
        assert probabilities.sum() == pytest.approx(1)


def test_probabilities_agree_with_the_loss():
    logits = np.array([[0.3], [-2.0]])
    positive = torch.sigmoid(torch.tensor(logits))[:, 0].numpy()
    np.testing.assert_allclose(BINARY.probabilities(logits), np.stack([1 - positive, positive], 1))
    logits = np.array([[0.3, -2.0, 1.0]])
    np.testing.assert_allclose(TYPES.probabilities(logits), torch.tensor(logits).softmax(1).numpy())


def test_a_higher_temperature_makes_milder_probabilities():
    logits = np.array([[2.0]])
    cold, warm = (BINARY.probabilities(logits, temperature)[0, 1] for temperature in (0.5, 2.0))
    assert 0.5 < warm < BINARY.probabilities(logits)[0, 1] < cold


def test_regression_comes_back_in_the_units_of_the_label():
    labels = [5.0, 30.0, 95.5]
    outputs = SCORE.encode(labels).unsqueeze(1).numpy()
    np.testing.assert_allclose(SCORE.values(outputs), labels, rtol=1e-6)


@pytest.mark.parametrize("task", [BINARY, TYPES, SCORE], ids=lambda task: task.kind)
def test_a_task_survives_being_written_down(task):
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task


# ---------------------------------------------------------------- several labels, grades, survival, soft labels

LABELS = Task("multilabel", ("ER", "HER2", "PR"))
GRADES = Task("ordinal", ("1", "2", "3", "4"))
TIMES = Task("survival", intervals=(2.0, 5.0, 9.0), horizons=(1.0, 2.0, 4.0, 8.0, 20.0))
COX = Task("survival", criterion="cox", center=0.5, horizons=(1.0, 3.0), baseline=(0.1, 0.7))
SHARE = Task("proportion", scale=100.0)


def test_labels_as_text_say_several_things():
    assert facts_of("ER=1;HER2=0") == {"ER": 1.0, "HER2": 0.0} and facts_of("") == {}
    assert facts_text({"ER": 1, "HER2": None, "PR": 0}) == "ER=1;PR=0"
    assert survival_of("12.5") == (12.5, True) and survival_of("12.5+") == (12.5, False)
    assert survival_of(survival_text("7", False)) == (7.0, False)
    for wrong in ("ER", "ER=yes", "ER=1;HER2"):
        with pytest.raises(LabelsError, match="does not say name=number"):
            facts_of(wrong)
    with pytest.raises(LabelsError, match="'soon' is not a time"):
        survival_of("soon")


def test_what_is_not_named_is_not_known():
    targets = LABELS.encode(["ER=1;PR=0", "HER2=1"])
    np.testing.assert_array_equal(targets.numpy(), np.array([[1, np.nan, 0], [np.nan, 1, np.nan]], dtype=np.float32))
    with pytest.raises(LabelsError, match="'Ki67' is not one of ER, HER2, PR"):
        LABELS.encode(["Ki67=1"])


def test_probabilities_as_labels_become_targets():
    assert torch.allclose(TYPES.encode(["b", "a=0.25;c=0.75"]), torch.tensor([[0, 1, 0], [0.25, 0, 0.75]]))
    assert torch.allclose(BINARY.encode(["normal=0.3;tumour=0.7", "normal"]), torch.tensor([0.7, 0.0]))
    assert TYPES.hard_label("a=0.25;b=0;c=0.75") == "c" and TYPES.hard_label("b") == "b"
    assert Task("multiclass", ("x=1", "y")).encode(["y", "x=1"]).tolist() == [1, 0]  # a class may have any name


def test_soft_labels_that_are_certain_are_hard_labels():
    logits = torch.randn(3, 3)
    hard, soft = TYPES.encode(["c", "a", "b"]), TYPES.encode(["c=1", "a=1;b=0", "b=1"])
    torch.testing.assert_close(TYPES.loss(logits, hard), TYPES.loss(logits, soft))
    torch.testing.assert_close(TYPES.slide_weights(hard, hard), TYPES.slide_weights(soft, soft))


def test_weights_of_slides_make_classes_count_the_same():
    targets = TYPES.encode(["a"] * 6 + ["b"] * 3 + ["c"])
    weights = TYPES.slide_weights(targets, targets)
    assert weights is not None
    np.testing.assert_allclose([weights[targets == c].sum() for c in range(3)], 10 / 3, rtol=1e-6)
    assert LABELS.slide_weights(torch.ones(2, 3), torch.ones(2, 3)) is None


@pytest.mark.parametrize("soft", [["a=0.5;b=0.4;c=0.1", "a=0.3;b=0.7", "a"], ["a=0.9;b=0.1", "a"]])
def test_the_mean_weight_of_slides_is_one_however_little_a_class_weighs(soft):
    targets = TYPES.encode(soft)
    weights = TYPES.slide_weights(targets, targets)
    assert weights is not None and weights.isfinite().all()
    np.testing.assert_allclose(weights.mean(), 1.0, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=3, max_size=3))
def test_grades_have_probabilities_that_add_up_and_steps_that_fall(logits):
    rows = np.array([logits])
    probabilities, steps = GRADES.probabilities(rows)[0], GRADES.output_probabilities(rows)[0]
    assert (probabilities >= 0).all() and probabilities.sum() == pytest.approx(1)
    assert (np.diff(steps) <= 0).all()
    np.testing.assert_allclose(np.cumsum(probabilities[::-1])[::-1][1:], steps, atol=1e-12)
    loss = [float(GRADES.loss(torch.tensor(rows), torch.tensor([grade]))) for grade in range(4)]
    np.testing.assert_allclose(np.exp(-np.array(loss)), probabilities, atol=1e-6)


def test_decisions():
    assert BINARY.decided(np.array([[0.6, 0.4], [0.1, 0.9]]), 0.3) == ["tumour", "tumour"]
    assert TYPES.decided(np.array([[0.2, 0.5, 0.3]])) == ["b"]
    assert LABELS.decided(np.array([[0.2, 0.5, 0.7]])) == ["ER=0;HER2=1;PR=1"]
    # the median, not the likeliest: a grade of .4 at each end and little between is no reason to say an end
    assert GRADES.decided(np.array([[0.4, 0.15, 0.1, 0.35], [0.6, 0.2, 0.1, 0.1], [0, 0, 0.2, 0.8]])) == ["2", "1", "4"]


def test_chances_over_time_are_those_of_the_hazards():
    logits = np.array([[0.0, 1.0, -1.0]])
    hazard = 1 / (1 + np.exp(-logits[0]))
    at_ends = np.cumprod(1 - hazard)
    chances = TIMES.survival(logits)[0]
    assert chances[0] == pytest.approx(np.sqrt(at_ends[0]))  # half way through the first interval, hazard constant in it
    assert chances[1] == pytest.approx(at_ends[0])
    assert chances[2] == pytest.approx(at_ends[0] * (1 - hazard[1]) ** (2 / 3))
    assert chances[4] == pytest.approx(at_ends[2])
    assert (np.diff(chances) <= 0).all()
    assert TIMES.risks(logits)[0] == pytest.approx(-at_ends.mean())


def test_a_higher_hazard_anywhere_is_a_higher_risk():
    base = TIMES.risks(np.zeros((1, 3)))[0]
    for interval in range(3):
        assert TIMES.risks(np.eye(3)[[interval]])[0] > base


def test_cox_risks_stand_against_an_average_slide():
    logits = np.array([[0.5], [1.5]])
    np.testing.assert_allclose(COX.risks(logits), [0, 1])
    np.testing.assert_allclose(COX.survival(logits), np.exp(-np.exp([[0.0], [1.0]]) * np.array([[0.1, 0.7]])))
    assert np.isnan(Task("survival", criterion="cox", horizons=(1.0,)).survival(logits)).all()


def test_calibration_centres_cox_and_finds_its_baseline():
    targets = COX.encode(["1", "2+", "3", "4"]).numpy()
    task = Task("survival", criterion="cox", horizons=(2.0, 3.5)).calibrated(np.array([[1.0], [1.0], [1.0], [1.0]]), targets)
    assert task.center == 1.0
    np.testing.assert_allclose(task.baseline, [1 / 4, 1 / 4 + 1 / 2])  # nobody differs: Nelson-Aalen
    assert TIMES.calibrated(np.zeros((4, 3)), targets) is TIMES


def test_log_hazards_that_promise_too_much_are_shrunk_and_only_those():
    rng = np.random.default_rng(0)
    true = rng.normal(size=400)
    targets = np.stack([rng.exponential(np.exp(-true)), np.ones(400)], 1).astype(np.float32)
    task = Task("survival", criterion="cox", horizons=(0.5, 1.0))
    loud = task.calibrated(5 * true[:, None], targets)
    assert loud.scale == pytest.approx(0.2, rel=0.15)
    np.testing.assert_allclose(loud.risks(5 * true[:, None]), true - true.mean(), atol=0.5)
    assert task.calibrated(0.3 * true[:, None], targets).scale == 1.0
    assert task.calibrated(5 * true[:10, None], targets[:10]).scale == 1.0  # too few to tell
    # what is said at a time is what happens until then
    said, seen = loud.survival(5 * true[:, None]).mean(0), [(targets[:, 0] > at).mean() for at in loud.horizons]
    np.testing.assert_allclose(said, seen, atol=0.03)


def test_a_proportion_is_a_share_in_the_unit_of_the_label():
    np.testing.assert_allclose(SHARE.values(np.array([[0.0], [-1e3], [1e3]])), [50, 0, 100])
    torch.testing.assert_close(SHARE.encode(["25", "100"]), torch.tensor([0.25, 1.0]))
    # the logistic loss is least at the share itself, whatever the share
    grid = torch.linspace(-4, 4, 801).unsqueeze(1)
    each = SHARE.row_losses(grid, torch.full((801,), 0.3))
    assert grid[each.argmin()].sigmoid().item() == pytest.approx(0.3, abs=3e-3)


def test_huber_forgives_an_outlier():
    task = Task("regression", criterion="huber")
    logits = torch.tensor([[0.5], [10.0]], requires_grad=True)
    task.loss(logits, torch.zeros(2)).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[:, 0], torch.tensor([0.25, 0.5]))  # the residual, at most 1; over two rows


def test_options_reach_the_loss():
    logits, targets = torch.tensor([[2.0], [-1.0]]), torch.tensor([1.0, 0.0])
    for options in ({"focal_gamma": 2.0}, {"label_smoothing": 0.2}):
        task = Task("binary", BINARY.classes, **options)
        assert task.loss(logits, targets) != BINARY.loss(logits, targets)
    with pytest.raises(LabelsError, match="focal_gamma is for binary, multi-class and multi-label tasks, not for ordinal"):
        Task("ordinal", ("1", "2"), focal_gamma=1.0)
    with pytest.raises(LabelsError, match="loss 'cox' is not for a regression task; expected mse or huber"):
        Task("regression", criterion="cox")
    with pytest.raises(LabelsError, match="time_bins is for survival with the nll loss, not for survival with cox"):
        Task("survival").fitted(["1", "2"], TrainConfig(loss="cox", time_bins=8))
    with pytest.raises(LabelsError, match="survival_alpha is for survival with the nll loss, not for binary"):
        BINARY.fitted(BINARY.classes, TrainConfig(survival_alpha=0.2))


# ---------------------------------------------------------------- what training slides decide


def test_a_regression_is_scaled_by_its_training_slides():
    task = Task("regression").fitted(["1", "3", "8"], TrainConfig(loss="huber"))
    assert task.criterion == "huber" and task.encode(["1", "3", "8"]).mean() == pytest.approx(0, abs=1e-6)
    assert task.encode(["1", "3", "8"]).std(correction=0) == pytest.approx(1)


def test_positives_weigh_what_negatives_outnumber_them():
    labels = ["ER=1", "ER=0", "ER=0", "ER=0", "HER2=1;ER=0", "PR=0"]
    task = LABELS.fitted(labels, TrainConfig())
    assert task.positive_weights == (4.0, 1.0, 1.0)  # one side only, or nothing known: no weight
    assert LABELS.fitted(labels, TrainConfig(balance=False)).positive_weights == ()
    assert LABELS.fitted(labels, TrainConfig(sampling="balanced")).positive_weights == ()


def test_intervals_hold_equally_many_events():
    events = [f"{time}" for time in range(1, 41)]
    task = Task("survival").fitted([*events, *(f"{time}+" for time in range(1, 100))], TrainConfig())
    assert task.n_outputs == len(task.intervals) == 4 and task.intervals[-1] == 99
    held = np.histogram(np.arange(1, 41), [0, *task.intervals])[0]
    assert held.tolist() == [10, 10, 10, 10]
    assert Task("survival").fitted(events, TrainConfig(time_bins=7)).n_outputs == 7
    assert Task("survival").fitted(events, TrainConfig(loss="cox")).n_outputs == 1


@pytest.mark.parametrize(("times", "bins"), [((1, 2), 4), ((1, 2, 3, 50), 8), ((4, 4, 9, 9, 9, 30), 5)])
def test_no_interval_is_without_an_event(times, bins):
    task = Task("survival").fitted([*map(str, times), "99+"], TrainConfig(time_bins=bins))
    held = np.histogram(np.array(times) - 0.001, [0, *task.intervals])[0]  # an interval holds its upper end
    assert (held > 0).all() and len(held) == len(task.intervals) > 1


def test_equal_times_make_fewer_intervals():
    task = Task("survival").fitted(["3", "3", "3", "3", "7", "9+"], TrainConfig())
    assert 1 <= task.n_outputs < 4 and list(task.intervals) == sorted(set(task.intervals))
    assert task.loss(torch.zeros(1, task.n_outputs), task.encode(["3"])).isfinite()


def test_survival_without_events_cannot_be_learned_or_chosen():
    with pytest.raises(LabelsError, match="none of the 2 training slides has an event"):
        Task("survival").fitted(["1+", "2+"], TrainConfig())
    with pytest.raises(LabelsError, match="none of the 1 validation slides has an event"):
        Task("survival").fitted(["1", "2+"], TrainConfig(), validation=["3+"])


@pytest.mark.parametrize(
    ("task", "labels", "others"),
    [
        (BINARY, ["tumour"] * 3, ["tumour", "normal"]),
        (TYPES, ["b", "b=1"], ["b", "b=0.9;a=0.1"]),
        (Task("ordinal", ("1", "2")), ["2", "2"], ["2", "1"]),
    ],
)
def test_one_class_alone_cannot_be_learned(task, labels, others):
    with pytest.raises(LabelsError, match=rf"all {len(labels)} training slides are {task.hard_label(labels[0])}"):
        task.fitted(labels, TrainConfig())
    assert task.fitted(others, TrainConfig()).kind == task.kind


def test_a_task_says_what_it_is():
    assert BINARY.describe(["normal", "tumour", "", "tumour"]) == "task: binary: normal (1), tumour (2); positive: tumour"
    assert LABELS.describe(["ER=1;PR=0", "ER=0"]) == "task: multilabel: ER (1 of 2), HER2 (0 of 0), PR (0 of 1)"
    assert Task("survival").describe(["3", "4+", ""]) == "task: survival of 2 slides, 1 with an event"
    assert "soft" in TYPES.describe(["a=0.9;b=0.1"]) and SHARE.describe(["5"]) == "task: proportion (percentages) of 1 slides"


EVERY = [BINARY, TYPES, SCORE, LABELS, GRADES, TIMES, COX, SHARE, Task("binary", BINARY.classes, focal_gamma=2.0)]


@pytest.mark.parametrize("task", EVERY, ids=lambda task: f"{task.kind}-{task.criterion}")
def test_every_task_survives_being_written_down(task):
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task


def test_a_task_of_an_older_or_newer_wsimil():
    assert Task.from_json({"kind": "binary", "classes": ["normal", "tumour"], "center": 0.0, "scale": 1.0}) == BINARY
    with pytest.raises(LabelsError, match="'tilt' that this wsimil does not know; upgrade"):
        Task.from_json({**BINARY.to_json(), "tilt": 1})


@pytest.mark.parametrize("task", EVERY, ids=lambda task: f"{task.kind}-{task.criterion}")
def test_columns_of_tile_scores_are_named(task):
    assert task.map_columns(np.zeros((5, task.n_outputs))).shape == (5, len(task.output_names))


@pytest.mark.parametrize(
    ("labels", "label"),
    [
        ([], ""),
        (["", "a", "", "a"], "a"),
        (["12.0+", "", "12+"], "12+"),
        (["ER=1", "ER=1;HER2=0", "PR=1"], "ER=1;HER2=0;PR=1"),
        (["a=0.3;b=0.7", "a=0.3;b=0.7"], "a=0.3;b=0.7"),
        (["12", "12+"], None),
        (["1.5", "1.25"], None),
        (["ER=1", "HER2=0", "ER=0"], None),
    ],
)
def test_slides_of_one_patient_agree_or_do_not(labels, label):
    if label is None:
        with pytest.raises(LabelsError, match=re.escape(f"labels {' and '.join(map(repr, labels))}")):
            agreed(labels)
    else:
        assert agreed(labels) == label


@pytest.mark.parametrize("value", ["0.1", "0", "1640.5", "-3e-5"])
def test_one_value_alone_cannot_be_learned(value):
    with pytest.raises(LabelsError, match="all 14 training slides have the value"):
        Task("regression").fitted([value] * 14, TrainConfig())


def test_large_values_keep_their_digits():
    labels = ["1000000000", "1000000001", "1000000002", "1000000003"]
    targets = Task("regression").fitted(labels, TrainConfig()).encode(labels)
    assert targets.tolist() == pytest.approx([-1.3416408, -0.4472136, 0.4472136, 1.3416408])


@pytest.mark.parametrize("kind", ["regression", "proportion", "survival", "binary"])
def test_losses_of_half_precision_logits_are_computed_in_float32(kind):
    task = {
        "regression": Task("regression"),
        "proportion": Task("proportion", criterion="mse"),
        "survival": Task("survival", intervals=(1.0, 2.0, 3.0)),
        "binary": Task("binary", ("a", "b")),
    }[kind]
    targets = torch.tensor([[1.234, 1.0]]) if kind == "survival" else torch.tensor([0.1234567])
    logits = torch.full((1, task.n_outputs), 0.3).bfloat16()
    found = task.row_losses(logits, targets)
    assert found.dtype == torch.float32 and torch.equal(found, task.row_losses(logits.float(), targets))


def test_huber_of_a_proportion_is_not_half_of_mse():
    huber, mse = (Task("proportion", criterion=name) for name in ("huber", "mse"))
    logits, targets = torch.tensor([[2.0], [0.1]]), torch.tensor([0.1, 0.5])
    ratio = huber.row_losses(logits, targets) / mse.row_losses(logits, targets)
    assert ratio[1] == pytest.approx(0.5) and ratio[0] < 0.2


@pytest.mark.parametrize("loss", ["nll", "cox"])
def test_chances_over_time_are_those_of_the_events_until_then_also_with_ties(loss):
    """One hazard for all slides, the likeliest: what is left at a horizon is who has no event until then."""
    rng = np.random.default_rng(0)
    times = rng.integers(1, 6, 300)
    labels = [str(time) for time in times]
    config = TrainConfig(loss=loss, **({"time_bins": 20} if loss == "nll" else {}))
    task = replace(Task("survival"), horizons=(1.0, 2.0, 3.0, 4.0)).fitted(labels, config)
    task = replace(task, horizons=(1.0, 2.0, 3.0, 4.0))
    targets = task.encode(labels)
    if loss == "cox":
        logits = np.zeros((1, 1))
        task = task.calibrated(np.zeros((300, 1)), targets.numpy())
    else:
        hazard = torch.zeros(1, task.n_outputs, requires_grad=True)
        optimiser = torch.optim.LBFGS([hazard], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimiser.zero_grad()
            loss = task.loss(hazard.expand(300, -1), targets)
            loss.backward()
            return loss

        optimiser.step(closure)  # type: ignore[arg-type]
        logits = hazard.detach().numpy()
    hazards = np.array([(times == at).sum() / (times >= at).sum() for at in task.horizons])
    left = np.cumprod(1 - hazards) if loss == "nll" else np.exp(-np.cumsum(hazards))  # Kaplan-Meier; Breslow is Nelson-Aalen's
    assert task.survival(logits)[0] == pytest.approx(left, abs=1e-3)


def test_risks_of_folds_with_other_numbers_of_intervals_are_on_one_scale():
    def risk(n: int) -> float:
        hazard = 1 - np.exp(-0.1 * 12 / n)  # .1 a month, for 12 months in n intervals
        ends = tuple(12 / n * (k + 1) for k in range(n))
        return float(replace(TIMES, intervals=ends).risks(np.full((1, n), np.log(hazard / (1 - hazard))))[0])

    assert risk(3) == pytest.approx(risk(4), rel=0.1) and risk(4) == pytest.approx(risk(6), rel=0.1)


def test_a_label_that_is_known_of_no_training_slide_is_not_learned():
    task = Task("multilabel", ("ER", "HER2"))
    with pytest.raises(LabelsError, match="label 'ER' is known of none of the 2 training slides"):
        task.fitted(["HER2=1", "HER2=0"], TrainConfig())
    assert task.fitted(["ER=0;HER2=1", "HER2=0"], TrainConfig()).positive_weights == (1.0, 1.0)

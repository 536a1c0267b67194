"""Metrics against brute force, scikit-learn and hand-made cases; weights against copied rows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from wsimil.evaluation import choose_threshold, survival
from wsimil.evaluation import metrics as ours
from wsimil.evaluation.intervals import delong, mcnemar_exact
from wsimil.evaluation.localisation import dice_and_iou


def cohort(n: int = 120, *, seed: int = 0, decimals: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities with ties (rounded)."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, n)
    return label, np.round(1 / (1 + np.exp(-(rng.normal(size=n) + label))), decimals)


def grades(n: int = 150, n_classes: int = 4, *, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, n_classes, n)
    logits = rng.normal(size=(n, n_classes)) + 1.5 * np.eye(n_classes)[label]
    probability = np.exp(logits)
    return label, probability / probability.sum(axis=1, keepdims=True)


def test_auroc_is_the_share_of_pairs_won() -> None:
    label, score = cohort(decimals=1)
    pairs = [(p > q) + 0.5 * (p == q) for p in score[label == 1] for q in score[label == 0]]
    assert ours.auroc(label, score) == pytest.approx(np.mean(pairs), abs=1e-12)


@pytest.mark.parametrize("decimals", [1, 6])
def test_ranking_metrics_match_scikit_learn(decimals: int) -> None:
    label, score = cohort(decimals=decimals)
    assert ours.auroc(label, score) == pytest.approx(sk.roc_auc_score(label, score))
    assert ours.average_precision(label, score) == pytest.approx(sk.average_precision_score(label, score))
    false_rate, true_rate, _ = sk.roc_curve(label, score, drop_intermediate=False)
    np.testing.assert_allclose(ours.roc_points(label, score), [false_rate, true_rate], atol=1e-12)
    best = max(t for f, t in zip(false_rate, true_rate, strict=True) if f <= 0.05 + 1e-12)
    assert ours.sensitivity_at_specificity(label, score) == pytest.approx(best)


def test_decision_metrics_match_scikit_learn() -> None:
    label, score = cohort()
    predicted = score >= 0.6
    confusion = ours.confusion_matrix(label, predicted, n_classes=2)
    np.testing.assert_array_equal(confusion, sk.confusion_matrix(label, predicted))
    assert ours.accuracy(confusion) == pytest.approx(sk.accuracy_score(label, predicted))
    assert ours.balanced_accuracy(confusion) == pytest.approx(sk.balanced_accuracy_score(label, predicted))
    assert ours.f1(confusion) == pytest.approx(sk.f1_score(label, predicted))
    assert ours.matthews(confusion) == pytest.approx(sk.matthews_corrcoef(label, predicted))
    assert ours.sensitivity(confusion) == pytest.approx(sk.recall_score(label, predicted))
    assert ours.specificity(confusion) == pytest.approx(sk.recall_score(label, predicted, pos_label=0))


def test_multiclass_metrics_match_scikit_learn() -> None:
    label, probability = grades()
    predicted = probability.argmax(axis=1)
    confusion = ours.confusion_matrix(label, predicted, n_classes=4)
    assert ours.macro_auroc(label, probability) == pytest.approx(
        sk.roc_auc_score(label, probability, multi_class="ovr", average="macro")
    )
    assert ours.quadratic_kappa(confusion) == pytest.approx(sk.cohen_kappa_score(label, predicted, weights="quadratic"))
    assert ours.macro_f1(confusion) == pytest.approx(sk.f1_score(label, predicted, average="macro"))
    assert ours.matthews(confusion) == pytest.approx(sk.matthews_corrcoef(label, predicted))
    assert ours.balanced_accuracy(confusion) == pytest.approx(sk.balanced_accuracy_score(label, predicted))
    assert ours.nll(label, probability) == pytest.approx(sk.log_loss(label, probability))


def test_macro_means_leave_out_classes_that_do_not_occur() -> None:
    label, probability = grades()
    kept = label != 3
    present = [sk.roc_auc_score(label[kept] == c, probability[kept, c]) for c in range(3)]
    assert ours.macro_auroc(label[kept], probability[kept]) == pytest.approx(np.mean(present))


def test_probability_metrics_match_scikit_learn_and_hand_counts() -> None:
    label, score = cohort()
    assert ours.brier(label, score) == pytest.approx(sk.brier_score_loss(label, score))
    assert ours.nll(label, score) == pytest.approx(sk.log_loss(label, score, labels=[0, 1]))
    assert ours.brier([0, 2], [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]) == pytest.approx(0.25)
    assert np.isfinite(ours.nll([1], [0.0]))  # a float32 probability of 0 does not cost infinity
    # two bins of equal size: means .15 and .85, frequencies .5 and .5
    assert ours.ece([0, 1, 0, 1], [0.1, 0.2, 0.8, 0.9], n_bins=2) == pytest.approx(0.35)


def test_calibrated_forecasts_have_a_small_ece_and_shifted_ones_do_not() -> None:
    rng = np.random.default_rng(3)
    probability = rng.uniform(size=20_000)
    outcome = rng.uniform(size=20_000) < probability
    assert ours.ece(outcome, probability) < 0.02
    assert ours.ece(outcome, np.clip(probability + 0.2, 0, 1)) == pytest.approx(0.18, abs=0.02)


def test_equal_probabilities_share_a_calibration_bin() -> None:
    bins = ours.calibration_bins([0.5] * 40 + [0.1, 0.9], n_bins=15)
    assert len(set(bins[:40])) == 1
    assert set(bins) == set(range(bins.max() + 1))


def test_risk_coverage_rewards_confidence_in_the_right_slides() -> None:
    confidence = np.linspace(0, 1, 2000)
    early = ours.risk_coverage_auc(confidence < 0.2, confidence)  # errors where unsure
    late = ours.risk_coverage_auc(confidence > 0.8, confidence)
    plain = ours.risk_coverage_auc(confidence < 0.2, np.zeros(2000))
    # closed forms: ∫_{.8}^1 (c - .8)/c dc, and .2 + ∫_{.2}^1 .2/c dc
    assert early == pytest.approx(0.2 + 0.8 * np.log(0.8), abs=1e-3)
    assert late == pytest.approx(0.2 - 0.2 * np.log(0.2), abs=1e-3)
    assert plain == pytest.approx(0.2)  # no ranking: the error rate at every coverage


def test_regression_metrics_match_scipy_and_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    target = np.round(rng.normal(size=80), 1)
    value = np.round(target + rng.normal(size=80), 1)
    assert ours.mae(target, value) == pytest.approx(sk.mean_absolute_error(target, value))
    assert ours.r_squared(target, value) == pytest.approx(sk.r2_score(target, value))
    assert ours.r_squared(target + 1e6, value + 1e6) == pytest.approx(sk.r2_score(target, value))
    assert ours.spearman(target, value) == pytest.approx(stats.spearmanr(target, value).statistic)


KINDS = ["binary", "multiclass", "multilabel", "regression", "survival"]
CENSORED = ("ipcw_c", "integrated_brier", "auroc_over_time", "auroc_at_0.5", "auroc_at_0.9", "auroc_at_1.4")


def every_metric(kind: str, index: np.ndarray, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    if kind == "binary":
        label, score = cohort(60, decimals=1)
        return ours.binary_metrics(label[index], score[index], score[index] > 0.6, weights)
    if kind == "multiclass":
        label, probability = grades(60)
        predicted = probability.argmax(axis=1)
        return ours.multiclass_metrics(label[index], probability[index], predicted[index], weights, classes="abcd", ordered=True)
    rng = np.random.default_rng(6)
    label, score = np.round(rng.exponential(size=60), 1) + 0.1, np.round(rng.normal(size=60), 1)
    if kind == "regression":
        return ours.regression_metrics(label[index], score[index], weights)
    if kind == "multilabel":
        several = np.where(rng.uniform(size=(60, 3)) < 0.2, np.nan, rng.integers(0, 2, (60, 3)))
        chance = np.round(rng.uniform(size=(60, 3)), 1)
        return ours.multilabel_metrics(several[index], chance[index], (chance > 0.5)[index], weights, classes="abc")
    event, horizons = (label > 0.4)[index], (0.5, 0.9, 1.4)
    chances = np.exp(-np.exp(score)[:, None] * np.array(horizons))
    return survival.survival_metrics(label[index], event, score[index], weights, survival=chances[index], horizons=horizons)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_so_many_copies_of_the_row(kind: str) -> None:
    counts = np.random.default_rng(7).integers(0, 4, size=(3, 60))
    weighted = every_metric(kind, np.arange(60), counts)
    for b in range(3):
        copied = every_metric(kind, np.repeat(np.arange(60), counts[b]))
        for name, value in weighted.items():
            assert value.shape == (3,)
            if name not in ("ece", *CENSORED):  # these keep the bins and the censoring curve of the whole sample
                assert value[b] == pytest.approx(float(copied[name]), abs=1e-9), name


@pytest.mark.parametrize("kind", KINDS)
def test_row_order_changes_nothing(kind: str) -> None:
    shuffled = every_metric(kind, np.random.default_rng(8).permutation(60))
    for name, value in every_metric(kind, np.arange(60)).items():
        assert float(value) == pytest.approx(float(shuffled[name]), abs=1e-12), name


@pytest.mark.filterwarnings("error")
def test_what_is_not_defined_is_nan_not_a_guess() -> None:
    one_class = ours.binary_metrics([1, 1, 1], [0.2, 0.6, 0.9], [0, 1, 1])
    for name in ("auroc", "auprc", "sensitivity_at_95_specificity", "balanced_accuracy", "mcc", "specificity"):
        assert np.isnan(one_class[name]), name
    assert one_class["accuracy"] == pytest.approx(2 / 3)
    assert np.isnan(ours.regression_metrics([2.0, 2.0], [1.0, 3.0])["spearman"])
    assert np.isnan(ours.r_squared([0.1, 0.1, 0.1], [1.0, 2.0, 3.0]))
    assert np.isnan(survival.harrell_c([1.0, 2.0], [False, False], [0.0, 1.0]))
    for empty in (
        ours.binary_metrics([], [], []),
        ours.multiclass_metrics([], np.zeros((0, 3)), [], classes="abc", ordered=True),
        ours.regression_metrics([], []),
        survival.survival_metrics([], [], [], survival=np.zeros((0, 2)), horizons=(1.0, 2.0)),
        ours.multilabel_metrics(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros((0, 2)), classes="ab"),
    ):
        assert all(np.isnan(value) for value in empty.values())


def test_constant_prediction_has_no_correlation_but_a_value() -> None:
    assert ours.matthews(ours.confusion_matrix([0, 1, 1], [1, 1, 1], n_classes=2)) == 0.0
    assert ours.auroc([0, 1, 1], [0.5, 0.5, 0.5]) == 0.5


@pytest.mark.parametrize("wrong", [["0", "1", "0"], [1.0, np.nan, 0.0], [0, 1, 2], [True, None, False], [0.2, 0.9, 0.4]])
def test_what_is_neither_true_nor_false_is_refused(wrong: list) -> None:
    """numpy takes the text "0" and NaN for true: every censored slide would have had the event."""
    score, right = np.array([0.1, 0.8, 0.3]), [0, 1, 0]
    for measured in (
        lambda truth: ours.auroc(truth, score),
        lambda truth: ours.average_precision(truth, score),
        lambda truth: survival.harrell_c(score, truth, score),
        lambda truth: survival.ipcw_c(score, truth, score),
        lambda truth: survival.time_dependent_auc(score, truth, score, at=0.2),
        lambda truth: survival.kaplan_meier(score, truth),
        lambda truth: choose_threshold(truth, score),
        lambda truth: delong(truth, score),
        lambda truth: mcnemar_exact(right, truth),
        lambda truth: dice_and_iou(truth, score, threshold=0.5),
    ):
        measured(right)
        measured(np.array(right, dtype=object))
        with pytest.raises(ValueError, match="expected True and False, or the numbers 1 and 0"):
            measured(wrong)


def test_nan_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        ours.auroc([0, 1], [np.nan, 1.0])


def test_a_label_is_measured_where_it_is_known() -> None:
    rng = np.random.default_rng(10)
    label, chance = rng.integers(0, 2, (50, 2)).astype(float), rng.uniform(size=(50, 2))
    gaps = label.copy()
    gaps[:20, 1] = np.nan
    metrics = ours.multilabel_metrics(gaps, chance, chance > 0.5, classes=("x", "y"))
    areas = [sk.roc_auc_score(label[:, 0], chance[:, 0]), sk.roc_auc_score(label[20:, 1], chance[20:, 1])]
    assert [metrics["auroc_x"], metrics["auroc_y"]] == pytest.approx(areas)
    assert metrics["auroc"] == pytest.approx(np.mean(areas))
    f1 = [sk.f1_score(label[:, 0], chance[:, 0] > 0.5), sk.f1_score(label[20:, 1], chance[20:, 1] > 0.5)]
    assert metrics["f1"] == pytest.approx(np.mean(f1))
    nobody = ours.multilabel_metrics(np.full((5, 2), np.nan), np.zeros((5, 2)), np.zeros((5, 2)), classes=("x", "y"))
    assert all(np.isnan(value) for value in nobody.values())


def test_grades_are_measured_in_steps() -> None:
    label, predicted = np.array([0, 1, 2, 3, 3]), np.array([0, 2, 2, 1, 3])
    chances = np.eye(4)[predicted]
    metrics = ours.multiclass_metrics(label, chances, predicted, classes="0123", ordered=True)
    assert metrics["mae_steps"] == pytest.approx(3 / 5)
    assert metrics["quadratic_kappa"] == pytest.approx(sk.cohen_kappa_score(label, predicted, weights="quadratic"))

"""Probes of frozen features: groups stay whole, noise scores by chance, and every number has an oracle."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from wsimil.errors import LabelsError, UsageError
from wsimil.evaluation.probe import check_labels, deal_groups, probe_features
from wsimil.probing import _some_groups


def cohort(n_groups: int, per_group: int, *, signal: float, group_signal: float = 0.0, dim: int = 8, seed: int = 0):
    """Features, labels and groups: two classes `signal` apart, each group shifted by itself, the class decided by the group."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), per_group)
    label = groups % 2
    features = rng.normal(size=(len(groups), dim)) + group_signal * rng.normal(size=(n_groups, dim))[groups]
    features[:, 0] += signal * label
    return features.astype(np.float32), np.array(["benign", "tumour"])[label], groups


def test_a_group_is_in_one_fold_and_every_fold_has_every_class():
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 40, 400)
    label = (groups % 8 == 0).astype(np.int64) + (rng.random(400) < 0.3)  # groups of several classes, one of them rare
    for seed in range(3):
        fold = deal_groups(label, groups, folds=5, seed=seed)
        assert all(np.unique(fold[groups == group]).size == 1 for group in np.unique(groups))
        assert all(set(label[fold == k]) == set(label) for k in range(5))


def test_no_fold_is_empty_where_there_are_groups_for_all():
    fold = deal_groups(np.array([0, 0, 1, 1, 2, 2]), np.arange(6), folds=5, seed=0)
    assert set(fold) == set(range(5))
    rng = np.random.default_rng(2)
    for seed in range(300):
        folds, n_classes = int(rng.integers(3, 7)), int(rng.integers(2, 6))
        groups = np.concatenate([np.arange(folds), rng.integers(0, folds + rng.integers(0, 10), 30)])
        label = rng.integers(0, n_classes, 40)[groups] if seed % 2 else rng.integers(0, n_classes, len(groups))
        assert set(deal_groups(label, groups, folds=folds, seed=seed)) == set(range(folds))


def test_classes_that_share_no_group_are_probed_in_all_folds():
    features = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    found = probe_features(features, ["a", "a", "b", "b", "c", "c"], range(6), probes=("5-NN", "logistic"), seeds=(0, 1))
    assert all(np.isfinite(probed.probability).all() for probed in found.values())


def test_fewer_tiles_than_a_group_has_are_refused():
    table = pd.DataFrame({"group": list("aaabbbb"), "label": list("xxxyyyy")})
    assert len(_some_groups(table, 3)) == 3
    with pytest.raises(LabelsError, match=r"--max-tiles 2: every group has more tiles, 3"):
        _some_groups(table, 2)


def test_folds_are_of_one_size_and_a_seed_deals_them_anew():
    _, labels, groups = cohort(50, 4, signal=0)
    label = np.unique(labels, return_inverse=True)[1]
    deals = [deal_groups(label, groups, folds=5, seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(deals[0], deals[1]) and not np.array_equal(deals[0], deals[2])
    counts = np.array([np.bincount(label[deals[0] == k]) for k in range(5)])
    assert counts.min() == counts.max() == 20


def test_the_order_of_tiles_moves_no_group():
    _, labels, groups = cohort(12, 3, signal=0)
    label = np.unique(labels, return_inverse=True)[1]
    order = np.random.default_rng(0).permutation(len(groups))
    fold = deal_groups(label, groups, folds=3, seed=0)
    assert np.array_equal(deal_groups(label[order], groups[order], folds=3, seed=0), fold[order])


def test_what_only_tells_groups_apart_scores_by_chance():
    """Features that name the group and nothing else: with tiles of a group on two sides every probe would be right."""
    features, labels, groups = cohort(60, 6, signal=0, group_signal=20)
    for probed in probe_features(features, labels, groups).values():
        assert 0.3 < probed.scores()["balanced_accuracy"].mean() < 0.7
    leaking = probe_features(features, labels, np.arange(len(groups)))
    assert leaking["5-NN"].scores()["balanced_accuracy"].mean() > 0.97


def test_what_tells_classes_apart_is_found_and_the_interval_holds_it():
    features, labels, groups = cohort(30, 4, signal=6)
    found = probe_features(features, labels, groups, probes=("20-NN", "5-NN", "logistic", "mlp"), seeds=(0, 1))
    for probed in found.values():
        scores, drawn = probed.scores(), probed.resampled(200)
        assert min(scores["balanced_accuracy"].min(), scores["auroc"].min(), scores["f1"].min()) > 0.9
        assert drawn.min() <= scores["balanced_accuracy"].mean() <= drawn.max() and drawn.shape == (200,)


def test_neighbours_vote_as_scikit_learns_would():
    features, labels, groups = cohort(30, 5, signal=1)
    (probed,) = probe_features(features, labels, groups, probes=("7-NN",), seeds=(3,)).values()
    fold = deal_groups(probed.label, groups, folds=5, seed=3)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for k in range(5):
        oracle = KNeighborsClassifier(7, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07))
        oracle.fit(unit[fold != k], probed.label[fold != k])
        np.testing.assert_allclose(probed.probability[0, fold == k], oracle.predict_proba(unit[fold == k]), atol=1e-4)


def test_the_penalty_is_one_of_four_and_no_test_tile_had_a_say():
    features, labels, groups = cohort(30, 5, signal=1, dim=20)
    (probed,) = probe_features(features, labels, groups, probes=("logistic",), seeds=(0,)).values()
    fold = deal_groups(probed.label, groups, folds=5, seed=0)
    spoiled = features.copy()
    spoiled[fold == 0] = 100 * np.random.default_rng(0).normal(size=spoiled[fold == 0].shape)
    mean, deviation = features[fold != 0].mean(0), features[fold != 0].std(0)
    candidates = []
    for penalty in (0.001, 0.01, 0.1, 1.0):
        model = LogisticRegression(C=penalty, class_weight="balanced", max_iter=500)
        model.fit((features[fold != 0] - mean) / deviation, probed.label[fold != 0])
        candidates.append(model.predict_proba((features[fold == 0] - mean) / deviation))
    assert min(np.abs(one - probed.probability[0, fold == 0]).max() for one in candidates) < 1e-3
    (other,) = probe_features(spoiled, labels, groups, probes=("logistic",), seeds=(0,)).values()
    # fold 4 is the one whose penalty is chosen on fold 0; folds 1 to 3 only train on it
    assert not np.allclose(other.probability[0, fold == 1], probed.probability[0, fold == 1])


def test_a_scale_and_a_shift_of_the_features_change_no_linear_probe():
    features, labels, groups = cohort(30, 4, signal=1)
    plain, moved = (
        probe_features(one, labels, groups, probes=("logistic",), seeds=(0,))["logistic"].probability
        for one in (features, 1000 * features + 7)
    )
    np.testing.assert_allclose(plain, moved, atol=1e-3)


def test_rare_classes_count_as_much_as_frequent_ones():
    rng = np.random.default_rng(0)
    groups, label = np.arange(220), (np.arange(220) < 20).astype(int)
    features = rng.normal(size=(220, 4)) + 1.5 * label[:, None]
    scores = probe_features(features, label, groups, probes=("logistic",))["logistic"].scores()
    assert scores["balanced_accuracy"].min() > 0.85  # without class weights the rare class is hardly ever said


def test_equal_groups_are_resampled_alike_so_encoders_are_compared_in_pairs():
    features, labels, groups = cohort(40, 3, signal=1.5)
    first, same = (probe_features(one, labels, groups, probes=("logistic",))["logistic"] for one in (features, 2 * features))
    difference = first.resampled(300) - same.resampled(300)
    assert np.abs(difference).max() < 0.02 < first.resampled(300).std()


@pytest.mark.parametrize(
    ("labels", "groups", "folds", "said"),
    [
        (["a"] * 6, range(6), 5, "labelled 'a'"),
        (["a", "b"] * 3, [0, 1] * 3, 5, "2 group"),
        (["a", "a", "a", "a", "b", "b"], [0, 1, 2, 3, 4, 4], 5, "'b' are of one group"),
        ([], [], 5, "no tile"),
        (["a", "b"] * 3, range(6), 2, "at least 3"),
    ],
)
def test_labels_that_cannot_be_probed_are_refused_with_the_reason(labels, groups, folds, said):
    with pytest.raises((LabelsError, UsageError), match=said):
        check_labels(labels, list(groups), folds=folds)


def test_a_class_of_two_groups_can_be_probed():
    features, labels, groups = cohort(12, 3, signal=3)
    few = np.where(groups < 2, "rare", labels)
    for probed in probe_features(features, few, groups, probes=("20-NN", "logistic", "mlp"), seeds=(0,)).values():
        assert np.isfinite(probed.probability).all()
        np.testing.assert_allclose(probed.probability.sum(-1), 1, atol=1e-6)


def test_features_that_are_no_numbers_and_unknown_probes_are_refused():
    features, labels, groups = cohort(12, 2, signal=1)
    with pytest.raises(UsageError, match="0-NN"):
        probe_features(features, labels, groups, probes=("0-NN",))
    features[5] = np.nan
    with pytest.raises(UsageError, match="tile 5"):
        probe_features(features, labels, groups)

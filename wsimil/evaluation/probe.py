"""How much a frozen encoder's features say about labelled tiles: nearest neighbours and a linear probe, groups kept apart.

- The features are fixed and the probes have nothing to tune but one penalty, which is chosen within the training part.
- Tiles of one group (a slide, a patient) are never on two sides. Each tile is predicted once per seed, by a model that never saw
  its group; a seed deals the groups anew.
- Scores are given per seed. Their interval comes from resampled groups, so that ten tiles of one slide are not ten witnesses;
  the same groups are drawn for every encoder, so that two encoders are compared in pairs.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from wsimil.errors import LabelsError, UsageError
from wsimil.evaluation.intervals import cluster_bootstrap
from wsimil.evaluation.metrics import accuracy, auroc, balanced_accuracy, confusion_matrix, macro_auroc, macro_f1, nll

__all__ = ["PROBES", "Probed", "check_labels", "deal_groups", "probe_features"]

PROBES = ("20-NN", "5-NN", "logistic")
"""What is asked of every encoder; `mlp` is the other one there is."""

_TEMPERATURE = 0.07
"""Of the neighbours' votes, exp(cosine / temperature): that of DINO's k-NN evaluation (Caron 2021)."""

_PENALTIES = (0.001, 0.01, 0.1, 1.0)
"""scikit-learn's C, on standardised features."""

_BLOCK = 4096

_MLP_STEPS = 300
"""Least number of steps of the MLP. The five passes of the site study (Dehkharghanian 2023, Diagn Pathol 18:67) were over the tiles
of thousands of slides; five over a thousand tiles would leave it where it began."""


@dataclass(frozen=True)
class Probed:
    """Out-of-fold predictions of one probe, S seeds side by side."""

    classes: tuple[str, ...]
    label: np.ndarray  # (n,) index of the class
    groups: np.ndarray  # (n,)
    probability: np.ndarray  # (S, n, C)

    @cached_property
    def predicted(self) -> np.ndarray:
        """(S, n)"""
        return self.probability.argmax(-1)

    def scores(self) -> dict[str, np.ndarray]:
        """balanced_accuracy, f1 (macro), auroc (mean of one against the rest) and accuracy: (S,) each."""
        confusion = np.stack([confusion_matrix(self.label, one, n_classes=len(self.classes)) for one in self.predicted])
        if len(self.classes) == 2:
            areas = [auroc(self.label == 1, one[:, 1]) for one in self.probability]
        else:
            areas = [macro_auroc(self.label, one) for one in self.probability]
        return {
            "balanced_accuracy": balanced_accuracy(confusion),
            "f1": macro_f1(confusion),
            "auroc": np.array(areas, dtype=np.float64),
            "accuracy": accuracy(confusion),
        }

    def resampled(self, n_bootstrap: int = 1000) -> np.ndarray:
        """Balanced accuracy, mean over the seeds, of resampled groups: (n_bootstrap,). The same groups for equal `groups`."""

        def statistic(weights: np.ndarray) -> np.ndarray:
            n_classes = len(self.classes)
            each = [balanced_accuracy(confusion_matrix(self.label, one, weights, n_classes=n_classes)) for one in self.predicted]
            return np.mean(each, axis=0)

        return cluster_bootstrap(statistic, self.groups, n_bootstrap=n_bootstrap)


def probe_features(
    features: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    *,
    probes: Sequence[str] = PROBES,
    folds: int = 5,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, Probed]:
    """Cross-validated probes of features (n, D): `<k>-NN`, `logistic`, `mlp`.

    - `<k>-NN`: votes of the k nearest by cosine, weighed by exp(cosine / .07).
    - `logistic`: standardised features, classes weighed by the inverse of their share, L2 penalty by the likelihood of one
      training fold that is set aside for it.
    - `mlp`: hidden layers of 500 and 200, as in the site study, on standardised features.

    Args:
        labels: (n,) names of classes.
        groups: (n,) what must not be on two sides: slides, or patients.
        folds: at least 3; fewer where there are fewer groups.

    Raises:
        LabelsError: one class only, a class whose tiles are all of one group, or fewer than three groups.
        UsageError: an unknown probe, or features that are not finite.
    """
    features, groups = np.asarray(features, dtype=np.float32), np.asarray(groups)
    classes, label = check_labels(labels, groups, folds=folds)
    if not np.isfinite(features).all():
        row = int(np.argmin(np.isfinite(features).all(1)))
        raise UsageError(f"the features of tile {row} are NaN or infinite: nothing can be probed with them")
    judges = {name: _judge(name) for name in probes}
    most = max((int(name.removesuffix("-NN")) for name in probes if name.endswith("-NN")), default=0)
    folds = min(folds, np.unique(groups).size)
    probability = {name: np.zeros((len(seeds), len(label), len(classes))) for name in probes}
    for row, seed in enumerate(seeds):
        fold = deal_groups(label, groups, folds=folds, seed=seed)
        for k in range(folds):
            test = fold == k
            # the next fold chooses the penalty: it is as balanced as the others, and no test tile is in it
            part = _Part(features, label, ~test, test, fold == (k + 1) % folds, len(classes), most, seed)
            for name, judge in judges.items():
                probability[name][row, test] = judge(part)
    return {name: Probed(tuple(classes.tolist()), label, groups, values) for name, values in probability.items()}


def deal_groups(label: np.ndarray, groups: ArrayLike, *, folds: int, seed: int) -> np.ndarray:
    """Fold (n,) of every tile, groups whole: those of the rarest class first, each to the fold that has least of what it brings."""
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.zeros((names.size, int(label.max(initial=0)) + 1))
    np.add.at(counts, (index, label), 1)
    shares = counts / np.maximum(counts.sum(0), 1)  # (G, C) of each class's tiles
    frequency = (counts > 0).sum(0)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(names.size)
    rarest = np.where(counts > 0, frequency, np.iinfo(np.int64).max).argmin(1)  # (G,)
    # large ones ahead, where all folds have their turn; by powers of two, so that seeds differ in who goes where
    size = np.ceil(np.log2(counts.sum(1)))
    order = shuffled[np.lexsort((-size[shuffled], rarest[shuffled], frequency[rarest[shuffled]]))]
    had, turn = np.zeros((folds, counts.shape[1])), rng.permutation(folds)
    fold_of = np.zeros(names.size, dtype=np.int64)
    for group in order.tolist():
        behind = had @ (shares[group] > 0)
        # what a fold has of all classes decides before the turn: classes that share no group would all begin with the same folds
        fold = min(range(folds), key=lambda k: (had[k, rarest[group]], behind[k], had[k].sum(), turn[k]))
        fold_of[group] = fold
        had[fold] += shares[group]
    return fold_of[index]


def check_labels(labels: ArrayLike, groups: ArrayLike, *, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """Names of the classes, and the class (n,) of every tile, if they can be probed. Raises as `probe_features`."""
    classes, label = np.unique(np.asarray(labels).astype(str), return_inverse=True)
    groups = np.asarray(groups)
    if folds < 3:
        raise UsageError(f"{folds} folds; a probe needs at least 3: to train, to choose its penalty, to be tested")
    if classes.size < 2:
        found = f"every tile is labelled {str(classes[0])!r}" if classes.size else "no tile has a label"
        raise LabelsError(f"{found}; a probe tells classes apart and needs two")
    if np.unique(groups).size < 3:
        raise LabelsError(f"the tiles are of {np.unique(groups).size} group(s); a probe needs at least 3 to keep apart")
    for number, name in enumerate(classes.tolist()):
        if np.unique(groups[label == number]).size < 2:
            raise LabelsError(f"all tiles labelled {name!r} are of one group: none is left to test on; leave the class out")
    return classes, label


@dataclass(frozen=True)
class _Part:
    """One fold: what may be learned from, what is to be predicted."""

    features: np.ndarray
    label: np.ndarray
    train: np.ndarray  # (n,) bool
    test: np.ndarray
    held_out: np.ndarray  # part of train
    n_classes: int
    most_neighbours: int
    seed: int

    @cached_property
    def standardised(self) -> np.ndarray:
        """All features, by mean and deviation of the training part."""
        mean = self.features[self.train].mean(0, dtype=np.float64)
        deviation = self.features[self.train].std(0, dtype=np.float64)
        deviation[deviation < 1e-6 * (1 + np.abs(mean))] = np.inf  # a feature that never varies says nothing
        return ((self.features - mean) / deviation).astype(np.float32)

    @cached_property
    def neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """Class and cosine of the nearest tiles that may be learned from, nearest first: (tests, k) each."""
        unit = self.features / np.maximum(np.linalg.norm(self.features, axis=1, keepdims=True), 1e-12)
        train, label, test = unit[self.train], self.label[self.train], unit[self.test]
        k, found = min(self.most_neighbours, len(train)), []
        for start in range(0, len(test), _BLOCK):  # bounds the memory of the table of cosines
            cosine = test[start : start + _BLOCK] @ train.T
            nearest = np.argpartition(cosine, -k, axis=1)[:, -k:]
            close = np.take_along_axis(cosine, nearest, 1)
            order = np.argsort(-close, axis=1, kind="stable")
            found.append((label[np.take_along_axis(nearest, order, 1)], np.take_along_axis(close, order, 1)))
        return np.concatenate([one for one, _ in found]), np.concatenate([one for _, one in found])


def _judge(name: str) -> Callable[[_Part], np.ndarray]:
    """part → probabilities (tests, C)."""
    if match := re.fullmatch(r"([1-9]\d*)-NN", name):
        k = int(match[1])
        return lambda part: _neighbours(part, k)
    if name == "logistic":
        return _logistic
    if name == "mlp":
        return _mlp
    raise UsageError(f"probe {name!r} is unknown; expected logistic, mlp, or a number of neighbours such as 20-NN")


def _neighbours(part: _Part, k: int) -> np.ndarray:
    label, cosine = (found[:, :k] for found in part.neighbours)
    weight = np.exp((cosine - cosine[:, :1]) / _TEMPERATURE)
    votes = np.stack([(weight * (label == c)).sum(1) for c in range(part.n_classes)], axis=1)  # (tests, C)
    return votes / votes.sum(1, keepdims=True)


def _logistic(part: _Part) -> np.ndarray:
    x, inner, held_out = part.standardised, part.train & ~part.held_out, part.held_out
    share = np.bincount(part.label[held_out], minlength=part.n_classes)[part.label[held_out]]
    losses = [float(nll(part.label[held_out], _fitted(part, inner, penalty)(x[held_out]), 1 / share)) for penalty in _PENALTIES]
    return _fitted(part, part.train, _PENALTIES[int(np.argmin(losses))])(x[part.test])


def _fitted(part: _Part, rows: np.ndarray, penalty: float) -> Callable[[np.ndarray], np.ndarray]:
    if np.unique(part.label[rows]).size < 2:
        return _constant(part, rows)
    model = LogisticRegression(C=penalty, class_weight="balanced", max_iter=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 500 steps from the optimum nothing changes that is reported
        model.fit(part.standardised[rows], part.label[rows])
    return lambda x: _all_classes(np.asarray(model.predict_proba(x)), model.classes_, part.n_classes)


def _constant(part: _Part, rows: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Where every tile learned from is of one class, as may happen to a class of two groups: always that."""
    return lambda x: np.tile(np.eye(part.n_classes)[part.label[rows][0]], (len(x), 1))


def _mlp(part: _Part) -> np.ndarray:
    x, label = part.standardised[part.train], part.label[part.train]
    if np.unique(label).size < 2:
        return _constant(part, part.train)(part.standardised[part.test])
    passes = max(5, -(-_MLP_STEPS // -(-len(x) // 200)))
    # as a mapping: scikit-learn's own annotation of batch_size knows "auto" alone
    settings: dict[str, Any] = {"batch_size": min(200, len(x)), "max_iter": passes, "random_state": part.seed}
    model = MLPClassifier((500, 200), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of passes is the recipe, not a limit
        model.fit(x, label)
    return _all_classes(np.asarray(model.predict_proba(part.standardised[part.test])), model.classes_, part.n_classes)


def _all_classes(probability: np.ndarray, seen: np.ndarray, n_classes: int) -> np.ndarray:
    """Columns for classes that the training part lacked, too."""
    full = np.zeros((len(probability), n_classes))
    full[:, seen] = probability
    return full

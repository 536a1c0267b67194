"""A task turns labels into targets, outputs into losses and predictions, and survives being written down."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsimil.errors import LabelsError
from wsimil.task import Task

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
        ("ranking", (), "ranking.*binary, multiclass or regression"),
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

"""Losses against their formulas, written out in numpy one row, one pair, one interval at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from wsimil.losses import (
    binary_losses,
    breslow_hazard,
    class_losses,
    cox_loss,
    discrete_time_losses,
    multilabel_losses,
    ordinal_losses,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_binary_losses_are_their_formula(gamma, smoothing):
    logits, targets = normal(5, 3), torch.tensor([[0, 1, 0.3], [1, 1, 0], [0.9, 0, 0.5], [0, 0, 0], [1, 0, 1]])
    weight = torch.tensor([1.0, 4.0, 0.5]).double()
    got = binary_losses(logits, targets, gamma=gamma, smoothing=smoothing, positive_weight=weight)
    for (row, column), x in np.ndenumerate(logits.numpy()):
        y, p = float(targets[row, column]) * (1 - smoothing) + smoothing / 2, sigmoid(x)
        by_hand = -weight[column] * y * (1 - p) ** gamma * math.log(p) - (1 - y) * p**gamma * math.log(1 - p)
        assert float(got[row, column]) == pytest.approx(float(by_hand), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_losses_are_their_formula_for_names_and_for_probabilities(gamma, smoothing):
    logits, hard = normal(4, 3), torch.tensor([2, 0, 1, 1])
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    for soft in (np.eye(3)[hard], np.array([[0.2, 0.3, 0.5], [1, 0, 0], [0, 0.5, 0.5], [0.1, 0.8, 0.1]])):
        q = soft * (1 - smoothing) + smoothing / 3
        by_hand = -(q * (1 - p) ** gamma * np.log(p)).sum(1)
        got = class_losses(logits, torch.from_numpy(soft), gamma=gamma, smoothing=smoothing)
        np.testing.assert_allclose(got, by_hand, rtol=1e-9)
    one_hot = torch.eye(3, dtype=torch.float64)[hard]
    options = {"gamma": gamma, "smoothing": smoothing}
    torch.testing.assert_close(class_losses(logits, hard, **options), class_losses(logits, one_hot, **options))


def test_a_focal_loss_looks_away_from_what_is_right_already():
    easy, hard = torch.tensor([4.0]), torch.tensor([-4.0])
    plain = [binary_losses(x, torch.ones(1)).item() for x in (easy, hard)]
    focal = [binary_losses(x, torch.ones(1), gamma=2.0).item() for x in (easy, hard)]
    assert focal[0] / plain[0] < 1e-3 and focal[1] / plain[1] > 0.9


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_logits_have_finite_losses_and_gradients(gamma):
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[1.0, 1.0], [0.0, math.nan], [0.5, 0.0]])
    total = multilabel_losses(logits, targets, gamma=gamma).sum() + class_losses(logits, torch.tensor([0, 0, 1]), gamma=gamma).sum()
    total.backward()
    assert total.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


# ---------------------------------------------------------------- several labels


def test_a_label_that_is_not_known_counts_nothing_and_gives_no_gradient():
    logits, targets = normal(3, 4).requires_grad_(), torch.tensor([[0, 1, math.nan, 1], [math.nan] * 4, [1, 1, 0, 0]])
    losses = multilabel_losses(logits, targets)
    losses.sum().backward()
    assert logits.grad is not None and torch.equal(logits.grad == 0, targets.isnan()) and losses[1] == 0
    each = binary_losses(logits.detach(), targets.nan_to_num())
    torch.testing.assert_close(losses.detach()[0], (each[0, 0] + each[0, 1] + each[0, 3]) / 4)


def test_a_positive_weight_counts_positives_so_often():
    logits, weight = normal(2, 3), torch.tensor([5.0, 1.0, 1.0]).double()
    for targets, ratio in ((torch.tensor([[1.0, math.nan, math.nan]]), 5.0), (torch.tensor([[0.0, math.nan, math.nan]]), 1.0)):
        weighed = multilabel_losses(logits[:1], targets, positive_weight=weight)
        torch.testing.assert_close(weighed, ratio * multilabel_losses(logits[:1], targets))


# ---------------------------------------------------------------- grades


def test_the_ordinal_loss_is_the_likelihood_of_the_grade():
    logits = normal(6, 3)
    for row, grade in enumerate([0, 1, 2, 3, 0, 3]):
        steps = [sigmoid(float(x)) for x in logits[row]]  # of those at a grade or above, who goes on
        chance = math.prod(steps[:grade]) * (1 - steps[grade] if grade < 3 else 1)
        got = ordinal_losses(logits[row : row + 1], torch.tensor([grade]))
        assert float(got) == pytest.approx(-math.log(chance))


def test_steps_above_the_grade_learn_nothing_from_it():
    logits = normal(1, 4).requires_grad_()
    ordinal_losses(logits, torch.tensor([1])).sum().backward()
    assert logits.grad is not None and (logits.grad[0, 2:] == 0).all() and (logits.grad[0, :2] != 0).all()


# ---------------------------------------------------------------- survival

UPPER = (2.0, 5.0, 9.0)
"""Intervals [0, 2], (2, 5], (5, …)."""


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize(("time", "interval"), [(0.0, 0), (1.9, 0), (2.0, 0), (4.0, 1), (5.0, 1), (9.0, 2), (50.0, 2)])
def test_the_discrete_time_loss_is_the_likelihood_of_the_interval(time, interval, alpha):
    logits = normal(1, 3)
    hazard = [sigmoid(float(x)) for x in logits[0]]
    for event in (True, False):
        outlived = math.prod(1 - h for h in hazard[: interval + (not event)])
        by_hand = -math.log(outlived * (hazard[interval] if event else 1)) * (1 if event else 1 - alpha)
        got = discrete_time_losses(logits, torch.tensor([time]), torch.tensor([float(event)]), upper=UPPER, alpha=alpha)
        assert float(got) == pytest.approx(by_hand, rel=1e-6)


def cohort(n: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Risk, time (with ties) and event."""
    rng = np.random.default_rng(seed)
    time, event = torch.from_numpy(rng.integers(1, n // 2, n).astype(float)), torch.from_numpy((rng.uniform(size=n) < 0.6) * 1.0)
    return normal(n, seed=seed), time, event


def brute_cox(risk, time, event, weights=None) -> float:
    weights = np.ones(len(risk)) if weights is None else np.asarray(weights)
    total = 0.0
    for i in np.flatnonzero(event):
        at_risk = [weights[j] * math.exp(risk[j]) for j in range(len(risk)) if time[j] >= time[i]]
        total += weights[i] * (math.log(sum(at_risk)) - risk[i])
    return total / (weights * np.asarray(event)).sum()


def test_cox_is_the_partial_likelihood_over_all_sets_at_risk():
    risk, time, event = cohort(30)
    assert float(cox_loss(risk, time, event)) == pytest.approx(brute_cox(risk.numpy(), time.numpy(), event.numpy()))
    assert torch.autograd.gradcheck(lambda values: cox_loss(values, time, event), risk.requires_grad_())


def test_cox_weights_are_copies_of_the_row():
    risk, time, event = cohort(12)
    times_each = torch.tensor([1, 2, 3, 1, 1, 4, 1, 2, 1, 1, 1, 2])
    copies = [values.repeat_interleave(times_each) for values in (risk, time, event)]
    torch.testing.assert_close(cox_loss(risk, time, event, times_each), cox_loss(*copies))
    without = cox_loss(risk[1:], time[1:], event[1:])
    torch.testing.assert_close(cox_loss(risk, time, event, torch.tensor([0, *[1] * 11])), without)


def test_cox_knows_order_only():
    risk, time, event = cohort(20)
    torch.testing.assert_close(cox_loss(risk + 100, time, event), cox_loss(risk, time, event))
    torch.testing.assert_close(cox_loss(risk, time**2, event), cox_loss(risk, time, event))
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(cox_loss(risk[shuffled], time[shuffled], event[shuffled]), cox_loss(risk, time, event))


def test_cox_without_an_event_is_zero_with_no_gradient():
    risk = normal(4).requires_grad_()
    loss = cox_loss(risk, torch.arange(4.0), torch.zeros(4))
    loss.backward()
    assert loss == 0 and risk.grad is not None and (risk.grad == 0).all()


def test_extreme_risks_do_not_overflow():
    risk = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    loss = cox_loss(risk, torch.tensor([3.0, 1.0, 2.0]), torch.ones(3))
    loss.backward()
    assert loss.isfinite() and risk.grad is not None and risk.grad.isfinite().all()


def test_the_baseline_hazard_is_that_of_breslow():
    """Each event adds one over the summed exp(risk) of those still at risk; a censored slide leaves without adding."""
    time, event = torch.tensor([2.0, 3, 3, 5, 7, 8]), torch.tensor([1.0, 1, 0, 1, 0, 1])
    risk = torch.tensor([0.4, 0.1, -0.3, 0.0, 0.2, -0.5])
    size = risk.exp()
    first, second, third = 1 / size.sum(), 1 / size[1:].sum(), 1 / size[3:].sum()
    expected = [0.0, first, first + second, first + second + third, first + second + third + 1 / size[5]]
    np.testing.assert_allclose(breslow_hazard(risk, time, event, [1, 2, 4, 7, 100]), torch.tensor(expected), rtol=1e-5)


def test_events_on_a_horizon_have_happened_by_then():
    time = torch.tensor([0.1 * step for step in range(1, 11)])  # in float32, some are a little later than in float64
    found = breslow_hazard(torch.zeros(10), time, torch.ones(10), [0.1 * step for step in range(1, 11)])
    np.testing.assert_allclose(found, np.cumsum(1 / np.arange(10, 0, -1)))

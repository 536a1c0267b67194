"""Losses on logits, as plain functions: a number per row (Cox: per set), so that weights and folds are a multiplication.

- Targets may be soft (probabilities); a missing one is NaN, counts nothing and gives no gradient.
- Everything is computed from log-sigmoids and log-sums: extreme logits give large losses, never NaN.
- Row losses do not depend on the other rows. Cox's partial likelihood does, by its nature: it compares slides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "binary_losses",
    "breslow_hazard",
    "class_losses",
    "cox_loss",
    "discrete_time_losses",
    "multilabel_losses",
    "ordinal_losses",
]


def binary_losses(
    logits: Tensor, targets: Tensor, *, gamma: float = 0.0, smoothing: float = 0.0, positive_weight: Tensor | None = None
) -> Tensor:
    """Logistic loss of every element; targets 0-1 of the same shape.

    Args:
        gamma: focal loss (Lin et al. 2017): what is already right by probability p counts (1 - p)^gamma.
        smoothing: this share of the target is spread evenly over both classes.
        positive_weight: multiplies the positive part.
    """
    targets = targets.to(logits.dtype) * (1 - smoothing) + smoothing / 2
    if gamma == 0:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=positive_weight)
    yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
    positive = -targets * (gamma * no).exp() * yes
    return (positive if positive_weight is None else positive * positive_weight) - (1 - targets) * (gamma * yes).exp() * no


def class_losses(logits: Tensor, targets: Tensor, *, gamma: float = 0.0, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy (M,) of logits (M, C) against classes (M,) or their probabilities (M, C); options as `binary_losses`."""
    if targets.is_floating_point():
        targets = targets.to(logits.dtype)
    if gamma == 0:
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    n_classes = logits.shape[1]
    soft = targets if targets.is_floating_point() else F.one_hot(targets, n_classes).to(logits.dtype)
    soft = soft * (1 - smoothing) + smoothing / n_classes
    log_p = logits.log_softmax(1)
    wrong = (1 - log_p.exp()).clamp_min(1e-12)  # a root of zero has no gradient
    return -(soft * wrong**gamma * log_p).sum(1)


def multilabel_losses(
    logits: Tensor, targets: Tensor, *, gamma: float = 0.0, smoothing: float = 0.0, positive_weight: Tensor | None = None
) -> Tensor:
    """Logistic losses (M,) summed over the labels that are known, over the number of all L: a known label counts the same
    whatever else is known of its slide. Logits and targets (M, L), NaN where unknown.
    """
    known = ~targets.isnan()
    each = binary_losses(logits, targets.nan_to_num(), gamma=gamma, smoothing=smoothing, positive_weight=positive_weight)  # (M, L)
    return torch.where(known, each, 0.0).sum(1) / logits.shape[1]


def ordinal_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood (M,) of a grade (M,) from the K - 1 conditional steps (M, K - 1).

    Step k says: of those above grade k - 1, who is above grade k (CORN, Shi et al. 2021). Their product along the grades is the
    likelihood of the grade, so this sum over steps is exact, and no grade is less likely than nothing.
    """
    steps = torch.arange(logits.shape[1], device=logits.device)
    grade = targets.unsqueeze(1)  # (M, 1)
    each = F.binary_cross_entropy_with_logits(logits, (grade > steps).to(logits.dtype), reduction="none")
    return torch.where(grade >= steps, each, 0.0).sum(1)


def discrete_time_losses(logits: Tensor, time: Tensor, event: Tensor, *, upper: Sequence[float], alpha: float = 0.0) -> Tensor:
    """Negative log-likelihood (M,) of K time intervals whose hazards are sigmoid(logits) (Zadeh and Schmid 2020).

    Args:
        logits: (M, K).
        time, event: (M,); a censored slide has outlived the interval it was lost in, as in the paper.
        upper: ends of the K intervals; each holds its upper end; the last takes all that is later.
        alpha: censored slides count 1 - alpha.
    """
    inner = torch.tensor(upper[:-1], dtype=time.dtype, device=time.device)
    interval = torch.bucketize(time.contiguous(), inner).unsqueeze(1)  # (M, 1)
    event = event.to(logits.dtype)
    index = torch.arange(logits.shape[1], device=logits.device)
    outlived = torch.where(event.unsqueeze(1) > 0, index < interval, index <= interval)
    survived = -torch.where(outlived, F.logsigmoid(-logits), 0.0).sum(1)
    struck = -F.logsigmoid(logits).gather(1, interval).squeeze(1)
    return event * (survived + struck) + (1 - event) * (1 - alpha) * survived


def cox_loss(risk: Tensor, time: Tensor, event: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean negative log partial likelihood over the events of a set of slides (Cox 1972; ties as Breslow), all (M,).

    An event is compared with everybody whose time is not earlier. Without an event the loss is 0, with gradient 0.
    `weights` (M,) count a row so many times, in the events and in the sets at risk.
    """
    risk = risk if risk.dtype == torch.float64 else risk.float()
    event = event.to(risk.dtype) * (1.0 if weights is None else weights.to(risk.dtype))
    order = torch.argsort(time, descending=True, stable=True)
    risk, time, event = risk[order], time[order], event[order]
    sizes = risk if weights is None else risk + weights.to(risk.dtype)[order].clamp_min(1e-30).log()
    at_risk = torch.logcumsumexp(sizes, 0)
    last = torch.searchsorted(-time, -time, right=True) - 1  # equal times share their set
    # a row that is no event is left out by `where`: its set may be empty, and 0 times infinity is no number
    each = torch.where(event > 0, event * (at_risk[last] - risk), 0.0)
    return each.sum() / event.sum().clamp_min(1e-12)


def breslow_hazard(risk: Tensor, time: Tensor, event: Tensor, at: Sequence[float]) -> list[float]:
    """Cumulative baseline hazard at the times `at`: the events until then, each over the summed exp(risk) still at risk."""
    exponential, ends = risk.double().exp(), torch.tensor(at, dtype=time.dtype)  # as exact as the times: some are equal
    result = []
    for end in ends:
        struck = time[(event > 0) & (time <= end)]
        at_risk = torch.stack([exponential[time >= one].sum() for one in struck]) if len(struck) else exponential[:0]
        result.append(float((1 / at_risk).sum()))
    return result

"""Cox's loss for a few slides at a time: the others' last log-hazards are remembered, so that an event meets its whole set at risk.

- The bank holds one entry per training slide: its log-hazard when it was last seen, without gradient. With every slide in it, the
  loss of a step is that of the whole cohort at once.
- A step's gradient is scaled to be, on average over the steps of an epoch, the gradient of the whole: a learning rate means the
  same as for losses that are means over slides.
- In evaluation nothing is remembered, and every event is set against the training slides and itself alone: a validation loss does
  not depend on batch mates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wsimil.losses import cox_loss

__all__ = ["RiskBank"]


class RiskBank(nn.Module):
    """The last log-hazards of up to `capacity` slides; the oldest newcomer makes room. All of it is in buffers."""

    ids: Tensor
    entries: Tensor
    n_seen: Tensor

    def __init__(self, capacity: int = 8192) -> None:
        super().__init__()
        self.register_buffer("ids", torch.full((capacity,), -1, dtype=torch.int64))
        self.register_buffer("entries", torch.zeros(capacity, 3, dtype=torch.float64))  # log-hazard, time, event
        self.register_buffer("n_seen", torch.zeros((), dtype=torch.int64))

    def loss(self, risk: Tensor, targets: Tensor, slide_ids: Sequence[str], weights: Tensor | None = None) -> Tensor:
        """Mean negative log partial likelihood per event, of rows (M,) with targets (M, 2): time and event.

        Several rows may be of one slide. Rows without slide ids are compared among themselves.
        """
        time, event = targets.unbind(1)
        if not slide_ids:
            return cox_loss(risk, time, event, weights)
        others = self.entries[(self.ids >= 0) & ~torch.isin(self.ids, _hashed(slide_ids, self.ids.device))]
        if not len(others):
            return cox_loss(risk, time, event, weights)
        other_risk, other_time, other_event = others.to(time.dtype).unbind(1)
        other_risk = other_risk.to(risk.dtype)
        if not self.training:
            return _against(risk, time, event, weights, other_risk, other_time, other_event) / len(set(slide_ids))
        together = None if weights is None else torch.cat([weights, torch.ones_like(other_time)])
        whole = cox_loss(torch.cat([risk, other_risk]), torch.cat([time, other_time]), torch.cat([event, other_event]), together)
        n_rows = len(set(slide_ids))
        return whole.detach() + (whole - whole.detach()) * ((n_rows + len(others)) / n_rows)

    @torch.no_grad()
    def remember(self, risk: Tensor, targets: Tensor, slide_ids: Sequence[str]) -> None:
        """Put in the slides of a step (M rows, one each), in place of what was known of them."""
        if not self.training or not slide_ids:
            return
        row_of = {name: row for row, name in enumerate(slide_ids)}  # a slide may be drawn twice
        rows = list(row_of.values())
        hashed = _hashed(list(row_of), self.ids.device)
        same = hashed.unsqueeze(1) == self.ids  # (M, capacity)
        new = ~same.any(1)
        # the oldest first, none of them a slide of this step: what is free lies behind what came last
        turn = (torch.arange(len(self.ids), device=self.ids.device) + self.n_seen) % len(self.ids)
        free = turn[~same.any(0)[turn]]
        free = free if len(free) else turn  # a step of more slides than there is room for
        slots = torch.where(new, free[(new.cumsum(0) - 1).clamp(min=0, max=len(free) - 1)], same.int().argmax(1))
        self.ids[slots] = hashed
        self.entries[slots] = torch.cat([risk.unsqueeze(1), targets], 1)[rows].to(self.entries.dtype)
        self.n_seen += new.sum()


def _against(
    risk: Tensor, time: Tensor, event: Tensor, weights: Tensor | None, other_risk: Tensor, other_time: Tensor, other_event: Tensor
) -> Tensor:
    """Each event against the others at risk and itself; summed over rows, over the share of events among the others."""
    at_risk = torch.where(other_time >= time.unsqueeze(1), other_risk, -torch.inf)  # (M, N)
    each = torch.logsumexp(torch.cat([risk.unsqueeze(1), at_risk], 1), 1) - risk
    each = each * event if weights is None else each * event * weights
    share = other_event.mean().clamp_min(1 / len(other_event))
    return each.sum() / share


def _hashed(slide_ids: Sequence[str], device: torch.device) -> Tensor:
    """Ids as whole numbers that are the same in every process."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in slide_ids]
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests], device=device)

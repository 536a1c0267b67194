"""Cox's loss for a few slides at a time: the others' last log-hazards are remembered, so that an event meets its whole set at risk.

- The bank holds one entry per training slide: its log-hazard when it was last seen, without gradient. With every slide in it, the
  loss of a step is that of the whole cohort at once.
- A step's gradient is scaled to be, on average over the steps of an epoch, the gradient of the whole: a learning rate means the
  same as for losses that are means over slides.
- A slide of validation is judged by what the training slides' likelihood loses or gains when it joins them, each by itself
  (cross-validated partial likelihood: Verweij and van Houwelingen 1993), at the log-hazards that the judged weights give the
  training slides. So its loss depends on nothing but these weights, and censored slides are judged, too.
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
        self.register_buffer("entries", torch.zeros(capacity, 3))  # log-hazard, time, event
        self.register_buffer("n_seen", torch.zeros((), dtype=torch.int64))
        # risk, time, event of the training slides: no state, they are found anew before each validation
        self._references: tuple[Tensor, Tensor, Tensor] | None = None

    def refer_to(self, risk: Tensor, targets: Tensor) -> None:
        """Log-hazards (N,) and targets (N, 2) of all training slides, which slides of validation are set against from now on."""
        self._references = _wide(risk), targets[:, 0], _wide(targets[:, 1])

    def loss(self, risk: Tensor, targets: Tensor, slide_ids: Sequence[str], weights: Tensor | None = None) -> Tensor:
        """Mean negative log partial likelihood per event, of rows (M,) with targets (M, 2): time and event.

        Several rows may be of one slide. Rows without slide ids are compared among themselves; so are those of validation as long
        as there is nobody to `refer_to`.
        """
        time, event = targets.unbind(1)
        if not self.training and self._references is not None:
            each = _left_out(_wide(risk), time, _wide(event), *self._references)
            return (each if weights is None else each * weights).sum() / len(set(slide_ids) or risk)
        if not slide_ids or not self.training:
            return cox_loss(risk, time, event, weights)
        others = self.entries[(self.ids >= 0) & ~torch.isin(self.ids, _hashed(slide_ids, self.ids.device))]
        if not len(others):
            return cox_loss(risk, time, event, weights)
        other_risk, other_time, other_event = others.to(time.dtype).unbind(1)
        other_risk = other_risk.to(risk.dtype)
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


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.device.type == "mps" else values.double()  # which Apple's GPUs lack


def _left_out(risk: Tensor, time: Tensor, event: Tensor, others: Tensor, other_time: Tensor, other_event: Tensor) -> Tensor:
    """What each row (M,) takes from the log likelihood of the others (N,) by joining them alone, over their share of events."""
    order = torch.argsort(other_time, descending=True)
    times = -other_time[order]  # from the latest, so ascending
    sums = torch.cat([others.new_full((1,), -torch.inf), torch.logcumsumexp(others[order], 0)])  # of the first 0, 1, … N

    def at_risk(at: Tensor) -> Tensor:
        return sums[torch.searchsorted(times, -at, right=True)]

    own = event * (torch.logaddexp(at_risk(time), risk) - risk)  # as an event, among those still at risk
    struck = other_time[other_event > 0]
    joined = torch.nn.functional.softplus(risk.unsqueeze(1) - at_risk(struck))  # as one more at risk: log(1 + e^risk / sum)
    theirs = torch.where(struck <= time.unsqueeze(1), joined, 0.0).sum(1)
    return (own + theirs) / other_event.mean().clamp_min(1 / len(other_event))


def _hashed(slide_ids: Sequence[str], device: torch.device) -> Tensor:
    """Ids as whole numbers that are the same in every process."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in slide_ids]
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests], device=device)

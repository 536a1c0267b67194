"""Orders of the training slides other than a shuffle: an epoch is a list of indices, a function of (seed, epoch) alone.

- Each gives as many indices as there are slides, so that an epoch stays an epoch; some slides come twice, some not at all.
- They are for objectives to hand out (`Objective.sampler`); steps are cut from the list in its order.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

__all__ = ["balanced_order", "risk_set_order"]


def balanced_order(strata: Sequence[Hashable], *, seed: int, epoch: int) -> list[int]:
    """Every stratum (class) equally often, as far as whole slides allow; within one, no slide comes k + 1 times before all came k.

    Not together with weights that balance the classes: that would pay twice.
    """
    rng = np.random.default_rng((seed, epoch))
    members: dict[Hashable, list[int]] = {}
    for index, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(index)
    order: list[int] = []
    quotas = np.full(len(members), len(strata) // max(1, len(members)))
    quotas[rng.permutation(len(members))[: len(strata) - int(quotas.sum())]] += 1
    for quota, indices in zip(quotas.tolist(), members.values(), strict=True):
        rounds = [rng.permutation(indices) for _ in range(-(-quota // len(indices)))]
        order += np.concatenate(rounds)[:quota].tolist() if rounds else []
    return [order[place] for place in rng.permutation(len(order))]


def risk_set_order(time: Sequence[float], event: Sequence[bool], *, slides_per_step: int, seed: int, epoch: int) -> list[int]:
    """Every step begins with an event, followed by slides that were still at risk when it happened (nested case-control).

    Events take turns. Where fewer slides are at risk than a step holds, any others fill it.
    """
    rng = np.random.default_rng((seed, epoch))
    times, events = np.asarray(time, dtype=np.float64), np.flatnonzero(event)
    if not len(events):
        return rng.permutation(len(times)).tolist()
    n_steps = -(-len(times) // slides_per_step)
    cases = np.concatenate([rng.permutation(events) for _ in range(-(-n_steps // len(events)))])[:n_steps]
    order: list[int] = []
    for case in cases.tolist():
        others = rng.permutation(np.delete(np.arange(len(times)), case))
        at_risk_first = others[np.argsort(times[others] < times[case], kind="stable")]
        order += [case, *at_risk_first[: slides_per_step - 1].tolist()]
    return order[: len(times)]

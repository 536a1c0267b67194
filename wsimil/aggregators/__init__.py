"""bag → logits, attention, contributions: one file per method, one line in the table below.

To add an aggregator: write its file, add its line to `AGGREGATORS`; the tests enrol it by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wsimil.aggregators.abmil import ABMIL
from wsimil.aggregators.mean_pool import MeanPool
from wsimil.aggregators.standardized import Standardized
from wsimil.batch import Aggregator
from wsimil.config import nearest
from wsimil.errors import ConfigError

__all__ = ["AGGREGATORS", "AggregatorEntry", "Standardized", "make_aggregator"]


@dataclass(frozen=True)
class AggregatorEntry:
    """How an aggregator is made: make(dim, n_outputs, hidden=…, dropout=…)."""

    make: Callable[..., Aggregator]
    summary: str
    paper: str
    parity: str = "untested"  # against the authors' code on the same weights: verified | approximate, why | untested | own


AGGREGATORS: dict[str, AggregatorEntry] = {
    "mean_pool": AggregatorEntry(MeanPool, "average of the tiles, linear classifier", "baseline"),
    "abmil": AggregatorEntry(
        lambda *sizes, **options: ABMIL(*sizes, gated=False, **options), "attention-weighted mean", "Ilse 2018, arXiv 1802.04712"
    ),
    "gated_abmil": AggregatorEntry(ABMIL, "attention-weighted mean, gated", "Ilse 2018, arXiv 1802.04712"),
}


def make_aggregator(
    name: str, dim: int, n_outputs: int, *, hidden: int = 256, dropout: float = 0.25, **options: Any
) -> Aggregator:
    """A freshly initialised aggregator by its registry name.

    Args:
        options: further arguments of the aggregator's own.

    Raises:
        ConfigError: the name is not in `AGGREGATORS`.
    """
    if name not in AGGREGATORS:
        raise ConfigError(f"aggregator {name!r} is unknown{nearest(name, AGGREGATORS)} (known: {', '.join(AGGREGATORS)})")
    return AGGREGATORS[name].make(dim, n_outputs, hidden=hidden, dropout=dropout, **options)

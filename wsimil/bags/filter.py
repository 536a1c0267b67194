"""Which tiles of a bag count: thresholds on its stored scores, applied on reading, never to a file.

- A limit that excludes nothing needs no score: bags of other programs have none.
- A limit on a score that a bag lacks is an error: half a cohort filtered is worse than none.
- A score that is NaN meets no limit: what is not known to be good is not taken for good.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from wsimil.config import FilterConfig
from wsimil.errors import UsageError

__all__ = ["NO_FILTER", "kept_tiles"]

NO_FILTER = FilterConfig()
"""Keeps every valid tile."""


def kept_tiles(valid: np.ndarray, qc: Mapping[str, np.ndarray], limits: FilterConfig, *, bag: str) -> np.ndarray:
    """Rows of a bag that are valid and within the limits, (N,) bool.

    Args:
        valid, qc: of the bag; (N,) bool, and (N,) float each.
        bag: its name, for the error.

    Raises:
        UsageError: a limit on a score that the bag lacks.
    """
    keep = valid.copy()
    for key, limit in vars(limits).items():
        if limit == getattr(NO_FILTER, key) or not len(valid):
            continue
        score = key.removeprefix("qc_")
        if score not in qc:
            there = f"only {', '.join(sorted(qc))}" if qc else "no scores at all"
            raise UsageError(
                f"{bag}: no score `{score}` in it ({there}), which filter.{key} needs; "
                f"extract the slide again, or train without --{key.replace('_', '-')}"
            )
        bound = np.float32(limit)  # as the scores are stored, so that a score equal to the limit meets it
        keep &= qc[score] >= bound if score == "tissue" else qc[score] <= bound
    return keep

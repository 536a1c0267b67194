"""How long it still takes: one progress bar for every stage, on stderr.

In a terminal it moves; in a log file it is a line every half minute, so that a batch job can be followed and read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

__all__ = ["progress"]


def progress(items: Sequence[Any], title: str, *, unit: str, quiet: bool = False) -> tqdm:
    """Iterate over `items` with count, rate and time left; the result has tqdm's `write` and `set_postfix_str`."""
    terminal = sys.stderr.isatty()
    return tqdm(
        items,
        desc=title,
        unit=unit,
        disable=quiet,
        file=sys.stderr,
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else 30.0,
        bar_format=None if terminal else "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} so far, {remaining} left {postfix}\n",
        leave=terminal,
    )

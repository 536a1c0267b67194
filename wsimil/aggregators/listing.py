"""The aggregators as a table: for the terminal, for programs and for docs/aggregators.md.

Each is made once, small: whether it needs coordinates and how its contributions come about may depend on how it is made.
"""

from __future__ import annotations

import inspect
from typing import Any

from wsimil.aggregators import AGGREGATORS, AggregatorEntry

__all__ = ["aggregator_rows", "aggregator_table", "describe_aggregators", "options_text"]

_OF_ALL = ("dim", "n_outputs", "hidden", "dropout")
"""What every aggregator takes; `train` sets them."""


def aggregator_rows() -> list[dict[str, Any]]:
    """One row per registry line; `options` are its own settings with their defaults."""
    return [_row(name, entry) for name, entry in AGGREGATORS.items()]


def _row(name: str, entry: AggregatorEntry) -> dict[str, Any]:
    model = entry.make(8, 2, hidden=64, dropout=0.0)
    parameters = inspect.signature(entry.make).parameters.values()
    return {
        "kind": "aggregator",
        "name": name,
        "summary": entry.summary,
        "paper": entry.paper,
        "parity": entry.parity,
        "contributions": model.contribution_kind,
        "needs_coords": model.needs_coords,
        "options": {one.name: one.default for one in parameters if one.name not in _OF_ALL},
    }


def options_text(row: dict[str, Any]) -> str:
    """`name=value …` of a row, as the command line takes them."""
    return " ".join(f"{name}={_yaml(value)}" for name, value in row["options"].items())


def _yaml(value: Any) -> str:
    """As `--aggregator-options` reads it."""
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)


def describe_aggregators() -> str:
    """The table as text for a terminal: two lines each, and how options are given."""
    rows = aggregator_rows()
    cells = [("name", "contributions", "tiles", "what it is")]
    for row in rows:
        cells.append((row["name"], row["contributions"] or "none", "need places" if row["needs_coords"] else "", row["summary"]))
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    text = [lines[0]]
    for line, row in zip(lines[1:], rows, strict=True):
        options = options_text(row)
        text += [line, f"  {row['paper']}; parity {row['parity']}" + (f"; {options}" if options else "")]
    return "\n".join(
        [
            *text,
            "",
            "Settings of its own: wsimil train … --aggregator NAME --aggregator-options name=value …",
            "Parity: the same numbers as the authors' code on the same weights. docs/aggregators.md says what contributions are.",
        ]
    )


def aggregator_table() -> str:
    """The table as Markdown."""
    lines = ["| `--aggregator` | what it is | paper | parity | contributions | own settings |", "|---|---|---|---|---|---|"]
    for row in aggregator_rows():
        places = "; needs coordinates" if row["needs_coords"] else ""
        options = options_text(row)
        facts = (f"`{row['name']}`", row["summary"] + places, row["paper"], row["parity"], row["contributions"] or "none")
        lines.append(f"| {' | '.join(facts)} | {f'`{options}`' if options else ''} |")
    return "\n".join(lines)

"""The objectives as a table: for the terminal, for programs and for docs/aggregators.md."""

from __future__ import annotations

from typing import Any

from wsimil.aggregators.listing import options_text
from wsimil.training.goals import OBJECTIVES

__all__ = ["describe_objectives", "objective_rows", "objective_table"]


def objective_rows() -> list[dict[str, Any]]:
    """One row per registry line; `options` are its settings with their defaults."""
    return [
        {
            "kind": "objective",
            "name": name,
            "summary": entry.summary,
            "paper": entry.paper,
            "parity": entry.parity,
            "options": entry.options(),
        }
        for name, entry in OBJECTIVES.items()
    ]


def describe_objectives() -> str:
    """The table as text for a terminal: two lines each, and how they are joined."""
    rows = objective_rows()
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'objective':<{width}}  what it adds"]
    for row in rows:
        options = options_text(row)
        lines.append(f"{row['name']:<{width}}  {row['summary']}")
        lines.append(f"  {row['paper']}; parity {row['parity']}" + (f"; {options}" if options else ""))
    joined = "wsimil train … --objective auto+averaged_weights --objective-options decay=.99"
    return "\n".join([*lines, "", f"Joined by +, each around those before it: {joined}"])


def objective_table() -> str:
    """The table as Markdown."""
    lines = ["| `--objective` | adds | paper | parity | settings |", "|---|---|---|---|---|"]
    for row in objective_rows():
        facts = (f"`{row['name']}`", row["summary"], row["paper"], row["parity"], f"`{options_text(row)}`")
        lines.append(f"| {' | '.join(facts)} |")
    return "\n".join(lines)

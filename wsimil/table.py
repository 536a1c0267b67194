"""A table as people keep it, read as text: nothing in it is guessed to be a number, and no row is lost in silence.

- Separated by commas, semicolons or tabs, whichever the first line holds most of outside of quotes, or as a line `sep=;` above it
  says; with or without a byte-order mark.
- Cells are stripped; empty rows and columns without a name, as spreadsheets leave them, are passed over.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from wsimil.errors import UsageError
from wsimil.settings import nearest

__all__ = ["Cells", "Table", "read_cells", "read_table", "require_column"]

Table: TypeAlias = Any
"""A `pandas.DataFrame`; pandas' own annotations make every column a union that no type checker can follow."""


@dataclass(frozen=True)
class Cells:
    """What stands in a table."""

    columns: list[str]
    rows: dict[int, dict[str, str]]  # line in the file → column → stripped text
    separator: str


def read_cells(path: str | Path, error: type[UsageError]) -> Cells:
    """All cells as text.

    Raises:
        error: no such file, not UTF-8 text, no header, a column twice, or a row with more cells than the header.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            header = handle.readline()
            stated = re.fullmatch(r"sep=([,;\t|])", header.strip("\r\n"), re.IGNORECASE)
            bare = re.sub(r'"[^"]*"', "", header)
            separator = stated[1] if stated else max(",;\t", key=bare.count)
            above = 1 if stated else handle.seek(0)
            reader = csv.reader(handle, delimiter=separator, skipinitialspace=True)
            rows = [(above + reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except UnicodeDecodeError as cause:
        raise error(f"{path}: not UTF-8 text; save it as CSV (UTF-8), not as a spreadsheet file") from cause
    except (OSError, csv.Error) as cause:
        raise error(f"{path}: not a table that can be read ({cause})") from cause
    rows = [(line, row) for line, row in rows if any(row)]
    if not rows:
        raise error(f"{path}: no table in it")
    columns = rows[0][1]
    named = [column for column in columns if column]
    if len(set(named)) < len(named):
        twice = next(column for column in named if named.count(column) > 1)
        raise error(f"{path}: two columns are named {twice!r}")
    for line, row in rows:
        if run_on := next((cell for cell in row if re.search(r"[\r\n]", cell) and separator in cell), None):
            raise error(
                f"{path}, line {line}: a cell runs over several lines ({run_on[:30]!r} …); is there a quote that is never closed?"
            )
    for line, row in rows[1:]:
        if any(row[len(columns) :]):
            raise error(f"{path}, line {line}: more cells than columns; text that holds {separator!r} must be quoted")
    cells = {}
    for line, row in rows[1:]:
        filled = [*row[: len(columns)], *[""] * (len(columns) - len(row))]
        cells[line] = {column: cell for column, cell in zip(columns, filled, strict=True) if column}
    return Cells(named, cells, separator)


def read_table(path: str | Path, error: type[UsageError]) -> Table:
    """The same as a data frame of text; the index is the line in the file. Raises as `read_cells`."""
    import pandas as pd  # here: processes that read slides know tables too, and none of them needs a data frame

    cells = read_cells(path, error)
    return pd.DataFrame(list(cells.rows.values()), index=list(cells.rows), columns=cells.columns, dtype=str)


def require_column(path: str | Path, table: Table, column: str, error: type[UsageError]) -> None:
    """Raises `error`, which names the nearest column, where there is none of that name."""
    if column not in table:
        there = ", ".join(table.columns)
        raise error(f"{path}: no column {column!r}{nearest(column, table.columns)} (columns: {there})")

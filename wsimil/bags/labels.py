"""The label table: which slide is what, whose it is, and what kind of task that makes.

- A row finds its slide by id, else by file name if that is unique; anything else is an error, never a silent loss.
- The kind of task follows from the values and is printed; what cannot be told must be said with --task.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import pandas as pd

from wsimil.config import LabelsConfig, nearest
from wsimil.errors import LabelsError
from wsimil.files import slide_id_from_path, slide_name, strip_suffix
from wsimil.task import Task

__all__ = ["infer_task", "match_labels", "match_slides", "read_labels", "slide_ids_of"]

_MISSING = ("", "na", "nan", "none", "null")
_MAX_INTEGER_CLASSES = 20


def read_labels(path: str | Path, config: LabelsConfig, *, group: str = "patient", site: str | None = None) -> pd.DataFrame:
    """Columns `slide, patient, site, label`, all text; rows without a label have an empty one.

    `patient` is the table's `group` column, or the slide itself where there is none; `site` is empty where there is none.

    Raises:
        LabelsError: no such file or column, a slide twice, a slide without a name.
    """
    path = Path(path)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise LabelsError(f"{path}: not a table that can be read ({error})") from error
    table.columns = [column.strip() for column in table.columns]
    _require_column(path, table, "slide")
    _require_column(path, table, config.target)
    if group != "patient":
        _require_column(path, table, group)
    if site is not None:
        _require_column(path, table, site)
    slides = table["slide"].str.strip()
    if (slides == "").any():
        raise LabelsError(f"{path}, line {int((slides == '').argmax()) + 2}: the slide is empty")
    patients = table[group].str.strip() if group in table else slides
    labels = table[config.target].str.strip()
    site_column = site or ("site" if "site" in table else None)
    return pd.DataFrame(
        {
            "slide": slides,
            "patient": patients.where(patients != "", slides),
            "site": table[site_column].str.strip() if site_column else "",
            "label": labels.where(~labels.str.lower().isin(_MISSING), ""),
        }
    )


def _require_column(path: Path, table: pd.DataFrame, column: str) -> None:
    if column not in table:
        raise LabelsError(f"{path}: no column {column!r}{nearest(column, table.columns)} (columns: {', '.join(table.columns)})")


def match_labels(labels: pd.DataFrame, slide_ids: Iterable[str]) -> pd.DataFrame:
    """The table with a `slide_id` column, one row per labelled slide, sorted by id; slides are found as in `match_slides`.

    Raises:
        LabelsError: a row that fits no slide or several, or two rows for one slide.
    """
    return _unique(labels.assign(slide_id=match_slides(labels["slide"], slide_ids)))


def _unique(labels: pd.DataFrame) -> pd.DataFrame:
    twice = labels["slide_id"].duplicated()
    if twice.any():
        raise LabelsError(f"{labels['slide_id'][twice].iloc[0]} has two rows in the label table")
    return labels.sort_values("slide_id", ignore_index=True)


def match_slides(names: Iterable[str], slide_ids: Iterable[str]) -> list[str]:
    """The slide id that each name means: an id (or the path it comes from), else a file name that only one slide has.

    Suffixes are ignored.

    Raises:
        LabelsError: a name that fits no slide, or several.
    """
    known = sorted(slide_ids)
    by_id = {slide_id: slide_id for slide_id in known}
    by_name: dict[str, list[str]] = defaultdict(list)
    for slide_id in known:
        by_name[slide_name(slide_id)].append(slide_id)
    matched: list[str] = []
    for given in names:
        plain = strip_suffix(given)
        found = next((by_id[key] for key in (given, plain, slide_id_from_path(PurePosixPath(plain))) if key in by_id), None)
        if found is None:
            candidates = by_name.get(plain.replace("\\", "/").split("/")[-1], [])
            if len(candidates) > 1:
                raise LabelsError(f"slide {given!r} of the table could be {', '.join(candidates)}; name it by its id")
            if not candidates:
                raise LabelsError(
                    f"slide {given!r} of the table is none of the {len(known)} slides{nearest(plain, known)} "
                    "(correct its name, or take its row out)"
                )
            found = candidates[0]
        matched.append(found)
    return matched


def slide_ids_of(labels: pd.DataFrame) -> pd.DataFrame:
    """The table with a `slide_id` column made from the names alone, for when no slide is at hand; sorted by id.

    Raises:
        LabelsError: two rows for one slide.
    """
    ids = [slide_id_from_path(PurePosixPath(strip_suffix(slide))) for slide in labels["slide"]]
    return _unique(labels.assign(slide_id=ids))


def infer_task(labels: pd.Series, config: LabelsConfig) -> Task:
    """The task that these labels make (empty ones are passed over).

    Two values are binary (positive: `config.positive`, else the last in sorted order); text or few small integers are
    multi-class; numbers with a fraction are regression.

    Raises:
        LabelsError: fewer than two values, or values that could be several things.
    """
    values = labels[labels != ""]
    classes = sorted(values.unique(), key=_natural)
    if len(classes) < 2:
        raise LabelsError(f"column {config.target!r} has {len(classes)} value(s); two are needed to learn a difference")
    kind = config.task
    if kind == "auto":
        kind = _kind_of(classes, config.target)
    if kind == "regression":
        numbers = pd.to_numeric(values, errors="coerce")
        if numbers.isna().any():
            raise LabelsError(f"column {config.target!r}: {values[numbers.isna()].iloc[0]!r} is not a number, which regression needs")
        return Task("regression")
    if kind == "multiclass":
        return Task("multiclass", tuple(classes))
    positive = config.positive if config.positive is not None else classes[-1]
    if positive not in classes:
        raise LabelsError(f"--positive {positive!r} is not a value of {config.target!r} ({', '.join(classes)})")
    if len(classes) != 2:
        raise LabelsError(f"column {config.target!r} has {len(classes)} values ({', '.join(classes[:8])}), so it is not binary")
    negative = next(value for value in classes if value != positive)
    return Task("binary", (negative, positive))


def _kind_of(classes: list[str], target: str) -> str:
    if len(classes) == 2:
        return "binary"
    numbers = [_number(value) for value in classes]
    if not any(number is not None for number in numbers):
        return "multiclass"
    if all(number is not None for number in numbers):
        if any("." in value or "e" in value.lower() for value in classes):
            return "regression"
        if len(classes) <= _MAX_INTEGER_CLASSES and all(0 <= float(number or 0) <= 100 for number in numbers):
            return "multiclass"
    raise LabelsError(
        f"column {target!r} has {len(classes)} values such as {', '.join(classes[:4])}: classes or quantities? "
        "Say it with --task multiclass or --task regression"
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _natural(text: str) -> tuple[int, float, str]:
    """Numbers in their own order, before text."""
    number = _number(text)
    return (1, 0.0, text) if number is None else (0, number, text)

"""The label table: which slide is what, whose it is, and what kind of task that makes.

- A row finds its slide by id, else by file name if that is unique; anything else is an error, never a silent loss.
- Labels are text: `007` stays as it is. Only `1.0` becomes `1` where a column holds nothing but whole numbers: programs
  write whole numbers so beside an empty cell.
- The kind of task follows from the values and is printed; what cannot be told must be said with --task.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

import pandas as pd

from wsimil.config import LabelsConfig, nearest
from wsimil.errors import LabelsError
from wsimil.files import slide_id_from_path, slide_name, strip_suffix
from wsimil.table import Table, read_table, require_column
from wsimil.task import Task

__all__ = ["infer_task", "match_labels", "match_slides", "read_labels", "slide_ids_of"]

_MISSING = ("", "na", "n/a", "#n/a", "nan", "null")  # not "none": that is what some columns call their negative class
_MAX_INTEGER_CLASSES = 20


def read_labels(
    path: str | Path, config: LabelsConfig, *, group: str = "patient", site: str | None = None
) -> Table:
    """Columns `slide, patient, site, label`, all text; rows without a label have an empty one.

    `patient` is the `group` column, or the slide itself where that is empty; `site` is empty where there is none.

    Raises:
        LabelsError: no such file or column, a slide without a name.
    """
    table = read_table(path, LabelsError)
    asked = {"slide", config.target, group, site} - {"patient", None}
    for column in sorted(filter(None, asked)):
        require_column(path, table, column, LabelsError)
    table = table.where(~table.apply(lambda cells: cells.str.lower()).isin(_MISSING), "")
    slides, labels = table["slide"], table[config.target]
    if (slides == "").any():
        raise LabelsError(f"{path}, line {slides.index[slides == ''][0]}: the slide is empty")
    if labels[labels != ""].str.fullmatch(r"[+-]?\d+(\.0+)?").all():
        labels = labels.str.replace(r"\.0+$", "", regex=True)
    patients = table.get(group, slides)
    return pd.DataFrame(
        {
            "slide": slides,
            "patient": patients.where(patients != "", slides),
            "site": table.get(site or "site", ""),
            "label": labels,
        }
    ).reset_index(drop=True)


def match_labels(labels: Table, slide_ids: Iterable[str]) -> Table:
    """The table with a `slide_id` column, found as in `match_slides`: one row per slide, sorted by id.

    Raises:
        LabelsError: a row that fits no slide or several, or two rows that say different things of one slide.
    """
    return _unique(labels.assign(slide_id=match_slides(labels["slide"], slide_ids)))


def slide_ids_of(labels: Table) -> Table:
    """The table with a `slide_id` column made from the names alone, for when no slide is at hand; sorted by id.

    Raises:
        LabelsError: two rows that say different things of one slide.
    """
    paths = [_path_of(slide) for slide in labels["slide"]]
    # a name without folders may be an id already: escaped once more, it would not be found again
    ids = [slide_id_from_path(path) if len(path.parts) > 1 else str(path) for path in paths]
    return _unique(labels.assign(slide_id=ids))


def _unique(labels: Table) -> Table:
    facts = [column for column in ("slide_id", "patient", "site", "label") if column in labels]
    labels = labels.drop_duplicates(facts)  # the same said twice is no contradiction
    twice = labels["slide_id"].duplicated(keep=False)
    if twice.any():
        slide_id = min(labels["slide_id"][twice])
        one, other = labels[labels["slide_id"] == slide_id].to_dict("records")[:2]
        said = next(fact for fact in facts if one[fact] != other[fact])
        raise LabelsError(f"the label table says two things of {slide_id}: {said} {one[said]!r} and {other[said]!r}")
    return labels.sort_values("slide_id", ignore_index=True)


def match_slides(names: Iterable[str], slide_ids: Iterable[str]) -> list[str]:
    """The slide id that each name means: an id (or the path it comes from), else a file name that only one slide has.

    Suffixes are ignored.

    Raises:
        LabelsError: a name that fits no slide, or several.
    """
    known = set(slide_ids)
    by_name: dict[str, list[str]] = defaultdict(list)
    for slide_id in sorted(known):
        by_name[slide_name(slide_id)].append(slide_id)
    matched, unknown = [], []
    for given in names:
        path = _path_of(given)
        found = [name for name in (given, str(path), slide_id_from_path(path)) if name in known][:1]
        found = found or by_name.get(path.name, [])
        if len(found) > 1:
            raise LabelsError(f"slide {given!r} of the table could be {', '.join(found)}; name it by its id")
        (matched if found else unknown).append(found[0] if found else given)
    if unknown:
        others = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise LabelsError(
            f"slide {unknown[0]!r}{others} of the table is none of the {len(known)} slides"
            f"{nearest(_path_of(unknown[0]).name, sorted(known))}; correct the name, or take the row out"
        )
    return matched


def _path_of(name: str) -> PurePosixPath:
    """The path a table calls a slide by, without suffix; of a path on someone's machine only the file name counts."""
    path = PurePosixPath(strip_suffix(name.replace("\\", "/")))
    elsewhere = path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive
    return PurePosixPath(path.name) if elsewhere else path


def infer_task(labels: Iterable[str], config: LabelsConfig) -> Task:
    """The task that these labels make (empty ones are passed over).

    Two values are binary (positive: `config.positive`, else the last in sorted order); text or few small integers are
    multi-class; numbers with a fraction are regression.

    Raises:
        LabelsError: fewer than two values, or values that could be several things.
    """
    classes = sorted(set(labels) - {""}, key=_natural)
    if len(classes) < 2:
        raise LabelsError(f"column {config.target!r} has {len(classes)} value(s); two are needed to learn a difference")
    some = f"{len(classes)} values ({', '.join(classes[:8])}{', …' if len(classes) > 8 else ''})"
    kind = config.task if config.task != "auto" else _kind_of(classes, config.target)
    if kind == "regression":
        wrong = [value for value in classes if _number(value) is None]
        if wrong:
            raise LabelsError(f"column {config.target!r}: {wrong[0]!r} is not a number, which regression needs")
        return Task("regression")
    _check_spelling(classes, config.target)
    if kind == "multiclass":
        if config.positive is not None:
            raise LabelsError(f"--positive is for two classes; column {config.target!r} has {some}")
        return Task("multiclass", tuple(classes))
    if len(classes) != 2:
        raise LabelsError(f"column {config.target!r} has {some}, so it is not binary")
    positive = config.positive if config.positive is not None else classes[-1]
    if positive not in classes:
        raise LabelsError(f"--positive {positive!r} is not a value of {config.target!r} ({', '.join(classes)})")
    return Task("binary", (classes[1 - classes.index(positive)], positive))


def _kind_of(classes: list[str], target: str) -> str:
    if len(classes) == 2:
        return "binary"
    numbers = [number for value in classes if (number := _number(value)) is not None]
    if not numbers and not all(re.fullmatch(r"[+-]?\d+,\d+", value) for value in classes):
        return "multiclass"
    if len(numbers) == len(classes):
        if not all(number.is_integer() for number in numbers):
            return "regression"
        if len(classes) <= _MAX_INTEGER_CLASSES and min(numbers) >= 0 and max(numbers) <= 100:
            return "multiclass"
    raise LabelsError(
        f"column {target!r} has {len(classes)} values such as {'  '.join(classes[:4])}: classes or quantities? "
        "Say it with --task multiclass or --task regression (numbers need a decimal point, not a comma)"
    )


def _check_spelling(classes: list[str], target: str) -> None:
    """Refuse two classes that are one: `Tumour` and `tumour`, `7` and `007`."""
    seen: dict[object, str] = {}
    for value in classes:
        number = _number(value)
        other = seen.setdefault(" ".join(value.casefold().split()) if number is None else number, value)
        if other != value:
            raise LabelsError(f"column {target!r}: {other!r} and {value!r} look like one class; spell them alike")


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None  # Python reads 3_4 as 34


def _natural(text: str) -> tuple[bool, float, str]:
    """Numbers in their own order, before text."""
    number = _number(text)
    return number is None, number or 0.0, text

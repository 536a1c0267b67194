"""From a predictions table to arrays: what is counted, what is left out, and what is refused.

- Only slides that were predicted, are labelled and were not trained on enter a metric; the number of all others is
  stated.
- Ids, folds and class names are text: `007` stays `007`, and a class `1` is found whether a reader made it 1, 1.0 or
  "1".
- A probability that is missing or impossible on a predicted slide is an error, never a slide quietly left out.
- A labels table, when given, has the last word on label, patient and group.
- The columns tell the task: `prob_…` of classes; with `value` beside them grades; several labels where a prediction reads
  `a=1;b=0`; `value` alone a regression or proportion; `risk` (and `surv_<time>`) survival.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pandas as pd

from wsimil.errors import LabelsError, UsageError
from wsimil.task import Task, facts_of, survival_of

__all__ = [
    "ENSEMBLE",
    "KINDS",
    "SEEN",
    "Predictions",
    "check_predictions",
    "labels_of_predictions",
    "mean_over_folds",
    "read_predictions",
]

KINDS = ("binary", "multiclass", "multilabel", "ordinal", "regression", "proportion", "survival")

ENSEMBLE = "ensemble"
"""The fold of new slides, which the mean of all folds predicts."""

SEEN = "encoder_saw_slide"
"""Column that is 1 for slides that the encoder was pretrained on; not there where it saw none."""

_STATUSES = ("done", "empty", "failed", "skipped")
_SPLITS = ("train", "val", "test", "new")
_PREFIX = "prob_"
_SURVIVAL_PREFIX = "surv_"
_NUMBER_OF_KIND = {"regression": "value", "proportion": "value", "survival": "risk"}


@dataclass(frozen=True)
class Predictions:
    """n evaluated rows, one for each slide and fold that tested it (and seed, where there are several)."""

    kind: str
    classes: tuple[str, ...]  # binary: (negative, positive); the labels of a multi-label task; empty for values and survival
    slide_id: np.ndarray  # (n,) str
    patient: np.ndarray  # (n,) str
    group: np.ndarray  # (n,) str: what the folds kept together and intervals resample; the patient where the table has no groups
    fold: np.ndarray  # (n,) str
    seed: np.ndarray  # (n,) str
    label: np.ndarray  # (n,) class index; the target of a regression; the time of an event or censoring; (n, L) 0, 1 or NaN
    event: np.ndarray  # (n,) bool, survival: the event happened; else False
    score: np.ndarray  # (n, classes) probabilities; (n,) value or risk
    predicted: np.ndarray  # (n,) class index, (n, L) of several labels; zeros without classes
    threshold: np.ndarray  # (n,) of the binary decision, on the positive class; NaN where the table does not say
    survival: np.ndarray  # (n, H) chance of being without the event at the horizons
    horizons: tuple[float, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)  # slides of the whole table by what became of them
    notes: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.slide_id)

    @property
    def folds(self) -> list[str]:
        """Distinct folds, numbers by value before text."""
        return _sorted(self.fold)

    @property
    def seeds(self) -> list[str]:
        """Distinct seeds, numbers by value before text."""
        return _sorted(self.seed)

    def take(self, rows: np.ndarray) -> Predictions:
        """The rows chosen by a mask or by indices."""
        columns = {column.name: getattr(self, column.name) for column in fields(self)}
        return replace(self, **{name: c[rows] for name, c in columns.items() if isinstance(c, np.ndarray)})


def read_predictions(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A predictions.csv with ids and names as text (leading zeros, "NA" and "None" kept) and numbers as numbers."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, UnicodeDecodeError, pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise UsageError(f"{path}: not a predictions table: {error}") from error
    if "slide_id" not in table:
        raise UsageError(f"{path}: not a predictions table: no column slide_id (columns: {', '.join(table.columns)})")
    for column in table.columns:
        if column.startswith((_PREFIX, _SURVIVAL_PREFIX)) or column in ("value", "risk", "threshold", "time"):
            try:
                table[column] = pd.to_numeric(table[column].mask(table[column].isin(["", "nan", "NaN"])))
            except ValueError as error:
                raise UsageError(f"{path}: column {column}: {error}") from error
    return table


def mean_over_folds(table: Any) -> pd.DataFrame:
    """One row for each slide, to look at: where several folds tested it, the mean of their numbers and what that decides."""
    repeated = table["slide_id"].duplicated(keep=False)
    if not repeated.any():
        return table
    kind, classes = _task(table, None, None, None)
    numbers = [name for name in table if name.startswith((_PREFIX, _SURVIVAL_PREFIX)) or name in ("value", "risk", "threshold")]
    rows: list[dict[str, Any]] = table[~repeated].to_dict("records")
    for _, several in table[repeated].groupby("slide_id"):
        mean = several[numbers].mean().to_dict()
        row = several.iloc[0].to_dict() | mean
        if "fold" in row:
            row["fold"] = ";".join(several["fold"])
        if classes and row["status"] == "done":
            chances = np.array([[mean[_PREFIX + name] for name in classes]])
            threshold = mean.get("threshold", 0.5)
            row["prediction"] = Task(kind, classes).decided(chances, threshold if np.isfinite(threshold) else 0.5)[0]
        rows.append(row)
    return pd.DataFrame(rows, columns=table.columns).sort_values("slide_id", ignore_index=True)


def labels_of_predictions(predictions: Any) -> tuple[str, ...]:
    """The labels that predictions of a multi-label task speak of; none of any other task."""
    names = tuple(str(column).removeprefix(_PREFIX) for column in predictions if str(column).startswith(_PREFIX))
    return names if names and _kind_of_classes(predictions, list(names)) == "multilabel" else ()


def check_predictions(
    predictions: pd.DataFrame,
    *,
    labels: pd.DataFrame | None = None,
    kind: str | None = None,
    classes: Sequence[str] | None = None,
    positive: str | None = None,
) -> Predictions:
    """The rows to evaluate, checked. What is None is read from the columns: `prob_<class>` (two: negative, positive),
    `value`, `risk`.

    Args:
        labels: slide_id with label (survival: as `12.5+`, or time and event) and optional patient and group; instead of what
            `predictions` says.
        positive: the positive one of two classes; default the second.

    Raises:
        UsageError, LabelsError: naming the column or slide.
    """
    if "slide_id" not in predictions:
        raise UsageError(f"predictions have no column slide_id; they have {', '.join(map(str, predictions.columns))}")
    kind, classes = _task(predictions, kind, classes, positive)
    table, notes = _joined(predictions.reset_index(drop=True), labels, kind, classes)

    tested = ~table["split"].isin(["train", "val"])
    predicted = tested & (table["status"] == "done")
    counts = {
        "n_slides": _n_slides(table),
        "n_patients": int(table["patient"].nunique()),
        **({"n_groups": int(table["group"].nunique())} if (table["group"] != table["patient"]).any() else {}),
        **{f"n_{status}": _n_slides(table[tested & (table["status"] == status)]) for status in _STATUSES[1:]},
        "n_without_label": _n_slides(table[predicted & ~table["labelled"]]),
        "n_not_test": len(set(table.loc[~tested, "slide_id"]) - set(table.loc[tested, "slide_id"])),
    }
    if (~tested).any():
        notes["split"] = f"{int((~tested).sum())} rows of train or val were left out: they are not test results"
    _refuse_impossible(table[predicted], kind, classes)
    rows = table[predicted & table["labelled"]]
    repeated = rows.duplicated(["fold", "seed", "slide_id"])
    if repeated.any():
        slide = rows.loc[repeated, "slide_id"].iloc[0]
        raise UsageError(f"slide {slide} has two rows in fold {rows.loc[repeated, 'fold'].iloc[0]}; keep one")
    counts["n_evaluated"] = _n_slides(rows)
    seen = _n_slides(rows[rows[SEEN].map(_plain_label).isin(["1", "True"])]) if SEEN in rows else 0
    if seen:
        notes["leak.encoder"] = (
            f"the encoder was pretrained on {seen} of these {counts['n_evaluated']} slides (--transductive, or new slides that it "
            "knew): results on slides that it has not seen may be worse"
        )
    return _arrays(rows, kind, classes, counts, notes)


# Tables are `Any` below: pandas' own annotations make every column a union that no checker can follow.


def _task(table: Any, kind: str | None, classes: Sequence[str] | None, positive: str | None) -> tuple[str, tuple[str, ...]]:
    found = [str(column).removeprefix(_PREFIX) for column in table.columns if str(column).startswith(_PREFIX)]
    if kind is None:
        if found:
            kind = _kind_of_classes(table, found)
        elif "value" in table or "risk" in table:
            kind = "regression" if "value" in table else "survival"
        else:
            raise UsageError("predictions have none of the columns prob_<class>, value, risk: nothing to evaluate")
    if kind not in KINDS:
        raise UsageError(f"kind {kind!r} is unknown; expected one of {', '.join(KINDS)}")
    if kind in _NUMBER_OF_KIND:
        if _NUMBER_OF_KIND[kind] not in table:
            raise UsageError(f"predictions of a {kind} need the column {_NUMBER_OF_KIND[kind]}")
        return kind, ()
    names = tuple(str(name) for name in classes) if classes else tuple(found)
    if kind == "multiclass" and all(name.isdigit() for name in names):  # grades: their order is a fact, that of columns is none
        names = tuple(sorted(names, key=int))
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(f"predictions have no column {_PREFIX}{missing[0]}; they have classes {', '.join(found)}")
    if len(names) < (1 if kind == "multilabel" else 2) or (kind == "binary" and len(names) != 2):
        raise UsageError(f"{kind} predictions with {len(names)} classes: {', '.join(names) or 'no column prob_…'}")
    if positive is not None and kind == "binary":
        if positive not in names:
            raise UsageError(f"positive class {positive!r} is not one of {', '.join(names)}")
        names = (*(name for name in names if name != positive), positive)
    return kind, names


def _kind_of_classes(table: Any, names: list[str]) -> str:
    said = [] if "prediction" not in table else [value for value in table["prediction"].map(_plain) if value]
    if said and all("=" in value and value not in names for value in said):
        return "multilabel"
    if "value" in table:
        return "ordinal"
    return "binary" if len(names) == 2 else "multiclass"


def _joined(table: Any, labels: Any, kind: str, classes: tuple[str, ...]) -> tuple[Any, dict[str, str]]:
    """The table with every column that is optional filled in, and labels and patients from the labels table."""
    table, notes = table.copy(), {}
    table["slide_id"] = _text(table["slide_id"])
    if (table["slide_id"] == "").any():
        raise UsageError(f"row {int(np.argmax(table['slide_id'] == '')) + 1} of the predictions has no slide_id")
    truth = ["time", "event"] if kind == "survival" else ["label"]
    if kind == "survival":
        table, labels = _with_times(table), labels if labels is None else _with_times(labels)
    if labels is not None:
        missing = [column for column in ("slide_id", *truth) if column not in labels]
        if missing:
            raise LabelsError(f"labels have no column {missing[0]}; they have {', '.join(map(str, labels.columns))}")
        owners = [column for column in ("patient", "group") if column in labels]
        given = labels[["slide_id", *truth, *owners]].copy()
        given["slide_id"] = _text(given["slide_id"])
        given = given.drop_duplicates()
        if given["slide_id"].duplicated().any():
            slide = given.loc[given["slide_id"].duplicated(), "slide_id"].iloc[0]
            raise LabelsError(f"slide {slide} is in the labels table twice, with different entries; keep one")
        by_slide = given.set_index("slide_id")
        if kind not in _NUMBER_OF_KIND and "label" in table:
            there, here = (column.map(_plain_label) for column in (table["slide_id"].map(by_slide["label"]), table["label"]))
            if kind in ("binary", "multiclass"):  # predictions name the likeliest of classes that are probabilities
                there = there.map(Task("multiclass", classes).hard_label)
            differ = int(((there != here) & (there != "") & (here != "")).sum())
            if differ:
                notes["labels"] = f"{differ} rows have another label than the labels table, which was used"
        for column in owners:
            known = _text(table["slide_id"].map(by_slide[column]))
            table[column] = known.where(known != "", _text(table[column]) if column in table else "")
        for column in truth:
            table[column] = table["slide_id"].map(by_slide[column])
    missing = [column for column in truth if column not in table]
    if missing:
        raise LabelsError(f"no column {missing[0]} in the predictions; pass the labels table")
    table["labelled"] = ~table[truth].map(_is_missing).any(axis=1)
    for column, default in (("patient", ""), ("group", ""), ("fold", "0"), ("seed", "0"), ("split", "test"), ("status", "done")):
        table[column] = _text(table[column]) if column in table else default
    table["patient"] = table["patient"].where(table["patient"] != "", table["slide_id"])
    table["group"] = table["group"].where(table["group"] != "", table["patient"])
    unknown = table.loc[~table["status"].isin(_STATUSES), "status"]
    if len(unknown):
        raise UsageError(f"status {unknown.iloc[0]!r} is unknown; expected one of {', '.join(_STATUSES)}")
    table["split"] = table["split"].str.lower()
    unknown = table.loc[~table["split"].isin([*_SPLITS, ""]), "split"]
    if len(unknown):
        raise UsageError(f"split {unknown.iloc[0]!r} is unknown; expected one of {', '.join(_SPLITS)}")
    return table, notes


def _with_times(table: Any) -> Any:
    """Columns time and event, from labels such as `12.5+` where the table has none."""
    if "time" in table or "label" not in table:
        return table
    parts = [None if _is_missing(label) else survival_of(str(label)) for label in table["label"]]
    time = [np.nan if part is None else part[0] for part in parts]
    return table.assign(time=time, event=["" if part is None else str(int(part[1])) for part in parts])


def _refuse_impossible(table: Any, kind: str, classes: tuple[str, ...]) -> None:
    columns = [_PREFIX + name for name in classes] or [_NUMBER_OF_KIND[kind]]
    try:
        numbers = table[columns].to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"predictions hold text among the numbers of {', '.join(columns)}: {error}") from error
    finite = np.isfinite(numbers).all(axis=1)
    if not finite.all():
        slide = table["slide_id"].iloc[int(np.argmin(finite))]
        raise UsageError(
            f"slide {slide} is done but its {' or '.join(columns)} is missing or not finite"
            f" ({int((~finite).sum())} such rows); predict it again, or set its status to failed"
        )
    if classes:
        several = kind == "multilabel"  # each has a probability of its own
        possible = (numbers >= -1e-6).all(axis=1) & (numbers <= 1 + 1e-6).all(axis=1)
        possible &= several | (np.abs(numbers.sum(axis=1) - 1.0) < 1e-2)
        if not possible.all():
            first = int(np.argmin(possible))
            sum_ = "" if several else " with sum 1"
            raise UsageError(
                f"slide {table['slide_id'].iloc[first]}: probabilities {numbers[first].tolist()} are not between 0 and 1{sum_}"
            )


def _arrays(rows: Any, kind: str, classes: tuple[str, ...], counts: dict[str, int], notes: dict[str, str]) -> Predictions:
    n = len(rows)
    event, predicted, threshold = np.zeros(n, dtype=bool), np.zeros(n, dtype=np.int64), np.full(n, np.nan)
    survival, horizons = np.zeros((n, 0)), ()
    if classes and "threshold" in rows:
        threshold = _floats(rows["threshold"])
    if kind == "multilabel":
        label, score = _facts(rows, "label", classes), rows[[_PREFIX + name for name in classes]].to_numpy(dtype=np.float64)
        predicted = (score >= np.where(np.isnan(threshold), 0.5, threshold)[:, None]).astype(np.int64)
    elif classes:
        label = _class_indices(rows, "label", classes)
        score = rows[[_PREFIX + name for name in classes]].to_numpy(dtype=np.float64)
        if kind == "binary":
            # the threshold is of the table's own positive class, its second column, whichever is asked for
            own = int(rows.columns.get_loc(_PREFIX + classes[1]) > rows.columns.get_loc(_PREFIX + classes[0]))
            predicted = np.where(score[:, own] >= np.where(np.isnan(threshold), 0.5, threshold), own, 1 - own)
            threshold = threshold if own else 1 - threshold
        elif kind == "ordinal":  # the median grade
            predicted = (np.cumsum(score, axis=1)[:, :-1] < 0.5).sum(axis=1)
        else:
            predicted = score.argmax(axis=1)
        said = np.zeros(n, dtype=bool)
        if "prediction" in rows:
            said = ~rows["prediction"].map(_is_missing).to_numpy(dtype=bool)
            predicted[said] = _class_indices(rows[said], "prediction", classes)
        undecided = int((~said & np.isnan(threshold)).sum()) if kind == "binary" else 0
        if undecided:
            notes["threshold"] = f"{undecided} rows have neither prediction nor threshold; .5 was used"
    elif kind in ("regression", "proportion"):
        label, score = _numbers(rows, "label"), rows["value"].to_numpy(dtype=np.float64)
    else:
        label, score = _numbers(rows, "time"), rows["risk"].to_numpy(dtype=np.float64)
        events = rows["event"].map(_plain_label).str.lower()
        unknown = events[~events.isin(["0", "1", "true", "false"])]
        if len(unknown):
            slide = rows["slide_id"].loc[unknown.index[0]]
            raise LabelsError(f"slide {slide}: event {unknown.iloc[0]!r} is not 0 or 1")
        event = events.isin(["1", "true"]).to_numpy(dtype=bool)
        survival, horizons = _chances(rows, notes)
    ids = {name: rows[name].to_numpy(dtype=str) for name in ("slide_id", "patient", "group", "fold", "seed")}
    return Predictions(
        kind, classes, **ids, label=label, event=event, score=score, predicted=predicted, threshold=threshold,
        survival=survival, horizons=horizons, counts=counts, notes=notes,
    )  # fmt: skip


def _chances(rows: Any, notes: dict[str, str]) -> tuple[np.ndarray, tuple[float, ...]]:
    """The columns `surv_<time>`, by time; none where any row lacks one."""
    columns = {float(name.removeprefix(_SURVIVAL_PREFIX)): name for name in rows.columns if str(name).startswith(_SURVIVAL_PREFIX)}
    horizons = tuple(sorted(columns))
    chances = np.stack([_floats(rows[columns[at]]) for at in horizons], axis=1) if horizons else np.zeros((len(rows), 0))
    if not np.isfinite(chances).all():
        notes["integrated_brier"] = "some slides have no chance to be without the event (no baseline hazard): not computed"
        return np.zeros((len(rows), 0)), horizons
    return chances, horizons


def _facts(rows: Any, column: str, classes: tuple[str, ...]) -> np.ndarray:
    """(n, labels) 0, 1 or NaN of cells such as `a=1;b=0`."""
    table = np.full((len(rows), len(classes)), np.nan)
    for row, (slide, text) in enumerate(zip(rows["slide_id"], rows[column].map(_plain), strict=True)):
        for name, value in facts_of(text).items():
            if name not in classes or value not in (0, 1):
                raise LabelsError(f"slide {slide}: {column} {text!r}; expected 0 or 1 of {', '.join(classes)}")
            table[row, classes.index(name)] = value
    return table


def _class_indices(rows: Any, column: str, classes: tuple[str, ...]) -> np.ndarray:
    exact = rows[column].map(_plain)
    names = exact.where(exact.isin(classes), rows[column].map(_plain_label))
    names = names.map(Task("multiclass", classes).hard_label)  # of probabilities, the likeliest
    unknown = ~names.isin(classes)
    if unknown.any():
        slide = rows.loc[unknown, "slide_id"].iloc[0]
        name = names[unknown].iloc[0]
        raise LabelsError(f"slide {slide}: {column} {name!r} is not one of the classes {', '.join(classes)}")
    return names.map({name: index for index, name in enumerate(classes)}).to_numpy(dtype=np.int64)


def _numbers(rows: Any, column: str) -> np.ndarray:
    numbers = _floats(rows[column])
    if not np.isfinite(numbers).all():
        row = rows.iloc[int(np.argmin(np.isfinite(numbers)))]
        raise LabelsError(f"slide {row['slide_id']}: {column} {row[column]!r} is not a number")
    return numbers


def _floats(column: Any) -> np.ndarray:
    """Numbers of a column, NaN for what is none."""
    numbers: Any = pd.to_numeric(column, errors="coerce")
    return numbers.to_numpy(dtype=np.float64)


def _is_missing(value: Any) -> bool:
    return bool(pd.isna(value)) or str(value).strip() == ""


def _plain(value: Any) -> str:
    """Text of a value; a whole number that a reader made a float (a column with gaps) loses its .0, missing is ""."""
    if _is_missing(value):
        return ""
    whole = isinstance(value, float | np.floating) and float(value).is_integer()
    return str(int(value)) if whole else str(value).strip()


def _plain_label(value: Any) -> str:
    """As `_plain`, and the .0 goes from text too: label columns with gaps are often written as 1.0. Not for ids, where
    it is a name.
    """
    text = _plain(value)
    return text[:-2] if text.endswith(".0") and text[:-2].lstrip("-").isdigit() else text


def _text(column: Any) -> Any:
    return column.map(_plain).astype(object)


def _n_slides(table: Any) -> int:
    return int(table["slide_id"].nunique())


def _sorted(names: np.ndarray) -> list[str]:
    distinct = {str(name) for name in names}
    return sorted(distinct, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))

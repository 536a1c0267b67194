"""The label table: which slide is what, whose it is, and what kind of task that makes.

- A row finds its slide by id, else by file name if that is unique; anything else is an error, never a silent loss.
- Labels are text: `007` stays as it is. Only `1.0` becomes `1` where a column holds nothing but whole numbers: programs
  write whole numbers so beside an empty cell.
- A group (`--group hospital`) is added to the patient and does not take its place: what hangs together through either is one
  group, in the column `group`.
- The kind of task follows from the values and is printed; what cannot be told must be said with --task.
- Several facts of a slide become one text, as `wsimil.task` reads it: `ER=1;HER2=0`, `12.5+`. So one column is a label everywhere.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pandas as pd

from wsimil.config import LabelsConfig
from wsimil.errors import LabelsError
from wsimil.files import slide_id_from_path, slide_name, strip_suffix
from wsimil.settings import nearest
from wsimil.table import Table, read_table, require_column
from wsimil.task import Task, agreed, facts_of, facts_text, survival_of, survival_text

__all__ = ["composed", "infer_task", "labels_of_rows", "match_labels", "match_slides", "read_labels", "slide_ids_of"]

_MISSING = ("", "na", "n/a", "#n/a", "nan", "null")  # not "none": that is what some columns call their negative class
_MAX_INTEGER_CLASSES = 20
_NOTHING = ("none", "-")
"""A cell of a multi-label column that says: looked at, and none of them."""
_OWNERS = (
    *("patient", "patients", "patientid", "patientname", "patientno", "patientnumber", "patientbarcode", "mrn", "pid"),
    *("case", "caseid", "casesubmitterid", "subject", "subjectid", "participant", "participantid", "donor", "donorid"),
    *("bcrpatientbarcode", "bcrpatientuuid"),
)
"""What others call the column `patient`, in small letters alone."""
_YES, _NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")


def read_labels(
    path: str | Path,
    config: LabelsConfig,
    *,
    group: str = "patient",
    site: str | None = None,
    test: str | None = None,
    named_only: bool = False,
    names: Sequence[str] = (),
) -> Table:
    """Columns `slide, patient, site, label`, all text; rows without a label have an empty one.

    `patient` is the slide itself where it is empty, and the `group` where the table has no such column; `site` is empty where
    there is none. With a `group` other than the patient there is a column `group`: the least parts that tear neither a patient nor
    a value of that column apart, named by its values (`A`; `A+B` where a patient has slides in both; of slides without one, by the
    patient). With `test`, the column that names an official test set, there is a column `official` of its values. With `named_only`
    `patient` is empty where the table names none: for whoever knows patients from elsewhere. `names` are labels that a column of
    several knows besides those in it. CLAM's columns `case_id` and `slide_id` are patient and slide.

    Raises:
        LabelsError: no such file or column, a slide without a name, a column that seems to name patients and is not called so.
    """
    table = read_table(path, LabelsError)
    if {"case_id", "slide_id"} <= set(table) and not {"slide", "patient"} & set(table):  # CLAM's
        table = table.rename(columns={"case_id": "patient", "slide_id": "slide"})
    if config.event is not None and "censor" in config.event.lower():
        raise LabelsError(
            f"--event {config.event}: 1 must mean that the event happened, and a column of that name means the opposite; "
            "write 1 minus it into a column of its own, with another name"
        )
    if config.task == "survival" and config.time is None:
        raise LabelsError("a survival task needs two columns: pass --time and --event")
    truth = [config.time, config.event] if config.time and config.event else list(config.target)
    asked = {"slide", *truth, group, site, test} - {"patient", None}
    for column in sorted(filter(None, asked)):
        require_column(path, table, column, LabelsError)
    table = table.where(~table.apply(lambda cells: cells.str.lower()).isin(_MISSING), "")
    _check_owner(path, table, group)
    slides = table["slide"]
    table = table.map(composed)  # `José` is one patient, however it is typed; slides keep the bytes of their file names
    if (slides == "").any():
        raise LabelsError(f"{path}, line {slides.index[slides == ''][0]}: the slide is empty")
    nobody = pd.Series("", table.index, dtype=str)
    named = table.get("patient", nobody if group == "patient" else table[group])  # the only owner that such a table names
    patients = named.where(named != "", slides.map(composed))
    for column in {"patient", group} & set(table) - {"slide"}:
        check_owners_spelling(path, sorted(set(table[column]) - {""}), column)
    return pd.DataFrame(
        {
            "slide": slides,
            "patient": named if named_only else patients,
            **({} if group == "patient" else {"group": _joined(patients, table[group])}),
            "site": table.get(site or "site", ""),
            "label": _labels(path, table[truth], config, names),
            **({} if test is None else {"official": table[test].str.lower()}),
        }
    ).reset_index(drop=True)


def _check_owner(path: str | Path, table: Table, group: str) -> None:
    """Folds would tear patients apart whose column is not known as such."""
    if ("patient" in table and (table["patient"] != "").any()) or group == "slide":
        return
    others = (column for column in table if column != "patient")
    owner = next((column for column in others if re.sub("[^a-z]", "", column.lower()) in _OWNERS), None)
    if owner not in (None, group):
        say_so = "" if group != "patient" else f", or pass --group {owner} (--group slide: every slide is a patient of its own)"
        raise LabelsError(f"{path}: column {owner!r} looks like the patients, and no other is called patient: rename it{say_so}")


def _joined(patients: Table, groups: Table) -> list[str]:
    """The group of each slide: slides are joined by their patient and by their group, where it is not empty."""
    above: dict[tuple[str, str], tuple[str, str]] = {}

    def top(node: tuple[str, str]) -> tuple[str, str]:
        while above.setdefault(node, node) != node:
            above[node] = above[above[node]]  # every other step is left out next time
            node = above[node]
        return node

    owners = [("patient", patient) for patient in patients]
    for owner, group in zip(owners, groups, strict=True):
        if group:
            above[top(owner)] = top(("group", group))
    names: dict[tuple[str, str], set[str]] = defaultdict(set)
    for kind, name in list(above):
        if kind == "group":
            names[top((kind, name))].add(name)
    return ["+".join(sorted(names.get(top(owner), {owner[1]}))) for owner in owners]


def _labels(path: str | Path, cells: Table, config: LabelsConfig, names: Sequence[str] = ()) -> Table:
    """One text per slide from the columns of the target."""
    if config.time is not None:
        return _per_row(path, cells, lambda row: _survival(*row))
    if cells.shape[1] > 1:
        for name in cells.columns:
            if "=" in name or ";" in name:
                raise LabelsError(f"{path}: column {name!r} cannot be a label: rename it without = and ;")
        if config.task not in ("auto", "multilabel", "multiclass", "binary"):
            raise LabelsError(f"a {config.task} task has one target column, not {cells.shape[1]}")
        soft = config.task in ("multiclass", "binary")
        return _per_row(path, cells, lambda row: (_shares if soft else _known)(dict(zip(cells.columns, row, strict=True))))
    labels = cells.iloc[:, 0]
    if config.task == "multilabel" or (config.task == "auto" and not config.order and labels.str.contains(";").any()):
        named = labels.map(_listed)
        every = sorted({*names, *(name for listed in named for name in listed)}, key=_natural)
        if wrong := next((name for name in every if "=" in name), None):
            raise LabelsError(f"{path}: {wrong!r} cannot be a label: write it without =")
        said = [facts_text({name: int(name in listed) for name in every}) for listed in named]
        return pd.Series(said, labels.index, dtype=str).where(labels != "", "")
    if labels[labels != ""].str.fullmatch(r"[+-]?\d+(\.0+)?").all():
        labels = labels.str.replace(r"\.0+$", "", regex=True)
    return labels


def _per_row(path: str | Path, cells: Table, text: Callable[[list[str]], str]) -> Table:
    labels = []
    for line, row in zip(cells.index, cells.itertuples(index=False), strict=True):
        try:
            labels.append(text(list(row)))
        except ValueError as error:
            raise LabelsError(f"{path}, line {line}: {error}") from None
    return pd.Series(labels, cells.index, dtype=str)


def _listed(cell: str) -> list[str]:
    names = [name.strip() for name in cell.split(";") if name.strip()]
    return [] if len(names) == 1 and names[0].lower() in _NOTHING else names


def _known(row: dict[str, str]) -> str:
    """Labels of a slide that are known to be there or not."""
    wrong = next((name for name, cell in row.items() if cell.lower() not in (*_YES, *_NO, "")), None)
    if wrong is not None:
        raise ValueError(
            f"{wrong} is {row[wrong]!r}; several targets are labels of 0 or 1, empty where unknown "
            "(probabilities of classes need --task multiclass or binary)"
        )
    return facts_text({name: int(cell.lower() in _YES) for name, cell in row.items() if cell})


def _shares(row: dict[str, str]) -> str:
    """Probabilities of the classes; all empty is no label."""
    if not any(row.values()):
        return ""
    for name, cell in row.items():
        number = _number(cell or "0")
        if number is None or not 0 <= number <= 1:
            raise ValueError(f"{name} is {cell!r}; expected a probability, 0 to 1")
    total = sum(float(cell or 0) for cell in row.values())
    if abs(total - 1) > 0.01:
        raise ValueError(f"the probabilities of {', '.join(row)} add up to {total:g}, not 1")
    return facts_text({name: cell or "0" for name, cell in row.items()})


def _survival(time: str, event: str) -> str:
    if not time or not event:
        return ""
    number = _number(time)
    if number is None or number < 0:
        raise ValueError(f"time is {time!r}; expected a number, 0 or more")
    if event.lower() not in (*_YES, *_NO):
        raise ValueError(f"event is {event!r}; expected 0 (censored) or 1 (it happened)")
    return survival_text(time, event.lower() in _YES)


def match_labels(labels: Table, slide_ids: Iterable[str]) -> Table:
    """The table with a `slide_id` column, found as in `match_slides`: one row per slide, sorted by id.

    Raises:
        LabelsError: a row that fits no slide or several, or two rows that say different things of one slide.
    """
    return _unique(labels.assign(slide_id=match_slides(labels["slide"], slide_ids)))


def labels_of_rows(labels: Table, rows: Table) -> tuple[Table, int]:
    """Columns `slide_id, patient, label` (and `group`) for the rows of a predictions table; how many labels are of other slides.

    A slide is found as in `match_slides`; a row of the pooled slides of a patient by the patient.

    Raises:
        LabelsError: no label is of a predicted slide, or two contradict each other.
    """
    ids = rows["slide_id"]
    found = pd.Series(_found(labels["slide"], set(ids)), labels.index, dtype=object)
    paths = labels["slide"].map(_path_of)
    exact = (found == labels["slide"]) | (found == paths.map(slide_id_from_path))
    # y/a.svs, which was not predicted, is not x/a.svs, which was
    found = found.mask(~exact & found.isin(found[exact]) & paths.map(lambda path: len(path.parts) > 1), None)
    if "patient" in rows:
        several = _name_several(rows["slide"], ids) if "slide" in rows else False
        pooled = set(ids[(ids == rows["patient"]) & (several | ~ids.isin(found))])
    else:
        pooled = set()
    of_patient = labels["patient"].isin(pooled)
    of_slide = found.notna() & ~found.isin(pooled)
    if not (of_patient | of_slide).any():
        match_slides(labels["slide"], ids)  # says what is near
    owners = [column for column in ("patient", "group") if column in labels]
    named = _unique(labels[of_slide].assign(slide_id=found[of_slide]))[["slide_id", *owners, "label"]]
    parts = []
    for patient, said in labels[of_patient].groupby("patient"):
        try:
            # all slides of a patient are of one group
            parts.append({"slide_id": patient, **said.iloc[0][owners].to_dict(), "label": agreed(said["label"])})
        except LabelsError as error:
            raise LabelsError(f"patient {patient}: {error} of its slides; one bag per patient has one label") from error
    matched = pd.concat([named, pd.DataFrame(parts, columns=named.columns)], ignore_index=True)
    return matched, int((~of_patient & ~of_slide).sum())


def _name_several(slides: Table, ids: Table) -> Table:
    """Whether a cell names the slides of a patient, separated by `;`, and not one slide with a `;` in its name."""
    return slides.str.contains(";") & (slides != ids) & (slides.map(_path_of).map(slide_id_from_path) != ids)


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
    facts = [column for column in ("slide_id", "patient", "group", "site", "label", "official") if column in labels]
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
    known, names = set(slide_ids), list(names)
    matched = _found(names, known)
    unknown = [given for given, found in zip(names, matched, strict=True) if found is None]
    if unknown:
        others = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise LabelsError(
            f"slide {unknown[0]!r}{others} of the table is none of the {len(known)} slides"
            f"{nearest(_path_of(unknown[0]).name, sorted(known))}; correct the name, or take the row out"
        )
    return [found for found in matched if found is not None]


def _found(names: Iterable[str], known: set[str]) -> list[str | None]:
    """As `match_slides`, None where a name fits no slide."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for slide_id in sorted(known):
        by_name[composed(slide_name(slide_id))].append(slide_id)
    as_written = {composed(slide_id): slide_id for slide_id in sorted(known)} | {slide_id: slide_id for slide_id in known}
    matched = []
    for given in names:
        path = _path_of(given)
        said = [name for one in (given, str(path), slide_id_from_path(path)) for name in (one, composed(one))]
        found = [as_written[name] for name in said if name in as_written][:1]
        found = found or [name for name in by_name.get(composed(path.name), []) if _may_be(path, name)]
        if len(found) > 1:
            raise LabelsError(f"slide {given!r} of the table could be {', '.join(found)}; name it by its id")
        matched.append(found[0] if found else None)
    return matched


def composed(name: str) -> str:
    """Letters with their accents as one character: some systems write file names in two."""
    return unicodedata.normalize("NFC", name)


def _may_be(path: PurePosixPath, slide_id: str) -> bool:
    """Whether folders agree as far as both sides have some: y/a.svs is a, and z/y/a.svs, and not x/a.svs."""
    given, slide_id = composed(slide_id_from_path(path)), composed(slide_id)
    return len(path.parts) == 1 or f"__{given}".endswith(f"__{slide_id}") or f"__{slide_id}".endswith(f"__{given}")


def _path_of(name: str) -> PurePosixPath:
    """The path a table calls a slide by, without suffix; of a path on someone's machine only the file name counts."""
    path = PurePosixPath(strip_suffix(name.replace("\\", "/")))
    elsewhere = path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive
    return PurePosixPath(path.name) if elsewhere else path


def infer_task(labels: Iterable[str], config: LabelsConfig) -> Task:
    """The task that these labels (as `read_labels` gives them) make; empty ones are passed over.

    Two values are binary (positive: `config.positive`, else the last in sorted order); text or few small integers are
    multi-class; numbers with a fraction are regression. Several columns, or cells with `;`, are multi-label.

    Raises:
        LabelsError: fewer than two values, values that could be several things, or a setting that is for another task.
    """
    task = _task_of(sorted(set(labels) - {""}, key=_natural), config)
    target = " ".join(config.target if config.time is None else (config.time, config.event or ""))
    if config.positive is not None and task.kind != "binary":
        raise LabelsError(
            f"--positive is for two classes; column {target!r} is {task.kind}, for which it means nothing: leave it out"
        )
    if config.order and task.kind != "ordinal":
        raise LabelsError(f"--order is for grades; column {target!r} is {task.kind}, for which it means nothing: leave it out")
    return task


def _task_of(values: list[str], config: LabelsConfig) -> Task:
    target = " ".join(config.target)
    if config.time is not None:
        return _survival_task(values)
    if len(config.target) > 1 or config.task == "multilabel" or (config.task == "auto" and _are_facts(values)):
        return _task_of_facts(values, config)
    if len(values) < 2:
        raise LabelsError(f"column {target!r} has {len(values)} value(s); two are needed to learn a difference")
    some = f"{len(values)} values ({', '.join(values[:8])}{', …' if len(values) > 8 else ''})"
    kind = config.task if config.task != "auto" else "ordinal" if config.order else _kind_of(values, target)
    if kind in ("regression", "proportion"):
        numbers = [_number(value) for value in values]
        if None in numbers:
            raise LabelsError(f"column {target!r}: {values[numbers.index(None)]!r} is not a number, which {kind} needs")
        if (most := max(abs(float(value)) for value in values)) > 1e30 or most < 1e-30:
            raise LabelsError(f"column {target!r} goes up to {most:g}, beyond what is computed with; state it in another unit")
        return Task("regression") if kind == "regression" else _proportion([float(value) for value in values], target)
    _check_spelling(values, target)
    if kind == "binary":
        if len(values) != 2:
            raise LabelsError(f"column {target!r} has {some}, so it is not binary")
        return _binary(values, config)
    if kind == "ordinal":
        return Task("ordinal", _ordered(values, config))
    return Task("multiclass", tuple(values))


def _binary(classes: list[str], config: LabelsConfig) -> Task:
    positive = config.positive if config.positive is not None else classes[-1]
    if positive not in classes:
        raise LabelsError(f"--positive {positive!r} is not a value of {' '.join(config.target)!r} ({', '.join(classes)})")
    return Task("binary", (classes[1 - classes.index(positive)], positive))


def _ordered(values: list[str], config: LabelsConfig) -> tuple[str, ...]:
    """Grades from low to high: as `--order` says, else by number. A grade that no slide has keeps its place."""
    target = " ".join(config.target)
    if config.order:
        if twice := next((value for value in config.order if config.order.count(value) > 1), None):
            raise LabelsError(f"--order has {twice!r} twice ({', '.join(config.order)})")
        unknown = [value for value in values if value not in config.order]
        if unknown:
            raise LabelsError(f"--order lacks {unknown[0]!r}, a value of {target!r} ({', '.join(values)})")
        return config.order
    if any(_number(value) is None for value in values):
        raise LabelsError(f"column {target!r} has text ({', '.join(values[:8])}); say which is lower: --order {' '.join(values)}")
    return tuple(values)


def _proportion(numbers: list[float], target: str) -> Task:
    low, high = min(numbers), max(numbers)
    if low < 0 or high > 100:
        raise LabelsError(f"column {target!r} runs from {low:g} to {high:g}; a proportion is 0 to 1, or 0 to 100")
    return Task("proportion", scale=1.0 if high <= 1 else 100.0)


def _are_facts(values: list[str]) -> bool:
    return bool(values) and all(re.fullmatch(r"([^;=]+=[01](;|$))+", value) for value in values)


def _task_of_facts(values: list[str], config: LabelsConfig) -> Task:
    named = list(dict.fromkeys(name for value in values for name in facts_of(value)))
    classes = list(config.target) if len(config.target) > 1 else named
    if not classes:
        raise LabelsError(f"column {' '.join(config.target)!r} has no label in it")
    if config.task == "binary":
        if len(classes) != 2:
            raise LabelsError(f"{len(classes)} targets are not two classes; say --task multiclass or multilabel")
        return _binary(classes, config)
    return Task("multiclass" if config.task == "multiclass" else "multilabel", tuple(classes))


def _survival_task(values: list[str]) -> Task:
    """Chances are stated at the deciles of the cohort's events: a grid for reports, from which nothing is learned."""
    struck = [time for time, event in map(survival_of, values) if event]
    if not struck:
        raise LabelsError("no slide has an event: nothing to learn, whatever the times are")
    deciles = np.quantile(struck, np.linspace(0.1, 0.9, 9))
    return Task("survival", horizons=tuple(sorted({float(f"{time:.4g}") for time in deciles})))


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


def check_owners_spelling(path: str | Path, names: list[str], column: str) -> None:
    """Refuse two patients (or groups) who are one: `Pat1` and `PAT1`, `7` and `007`. Folds would tear them apart."""
    seen: dict[str, str] = {}
    for name in names:
        seen_as = "".join(
            "-" if unicodedata.category(letter) == "Pd" else letter
            for letter in unicodedata.normalize("NFKC", name).casefold()
            if unicodedata.category(letter) != "Cf"  # letters that cannot be seen
        )
        whole = re.fullmatch(r"0*(\d+?)(\.0+)?", seen_as)
        other = seen.setdefault(whole[1] if whole else " ".join(seen_as.split()), name)
        if other != name:
            raise LabelsError(
                f"{path}: {other!r} and {name!r} in column {column!r} look like one {column}, whose slides could come to lie on "
                "two sides of a fold; spell them alike, or quite differently if they are two"
            )


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

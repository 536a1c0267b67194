"""Folds that keep patients apart, as a file that can be read, checked and hashed.

- Every patient is wholly in train, val or test of a fold; every slide is in test exactly once over a cross-validation. Where the
  label table has groups (`--group`), every group is, and its patients with it: groups are then dealt as patients are.
- Patients are dealt like cards, label by label, each to the side that has had fewest of that label for its share: folds
  differ by at most one patient of a label, and no side lacks a label that has patients enough. Sites, then numbers of
  slides, decide between equals. (scikit-learn's StratifiedGroupKFold balances slides, and in small cohorts leaves
  validation sets without a class.)
- Survival is balanced on who had the event, several labels one by one, a regression on quantiles.
- The hash of the sorted rows goes into every checkpoint: a model knows which slides it must never be praised for.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from wsimil.bags.labels import composed
from wsimil.config import SplitConfig
from wsimil.errors import SplitsError, UsageError
from wsimil.files import atomic_path
from wsimil.table import Table, read_table, require_column
from wsimil.task import Task

__all__ = ["COLUMNS", "check_splits", "make_splits", "read_splits", "refuse_to_lose", "splits_hash", "write_splits"]

COLUMNS = ["fold", "slide_id", "patient", "site", "split"]


def make_splits(labels: Table, task: Task, config: SplitConfig) -> Table:
    """Cross-validation folds for a matched label table (`slide_id, patient, site, label`), unlabelled rows left out.

    With a column `group`, as `read_labels` makes it, groups of patients are kept on one side. A table with a column `official`
    (train or test) gives one fold with that test set; only validation is drawn.

    Raises:
        SplitsError: too few patients for the folds, in all or in one class.
    """
    table: Table = labels[labels["label"] != ""]
    table = table.sort_values("slide_id", ignore_index=True)
    table = table.assign(unit=table[_unit(table)])
    official = _official(table) if "official" in table else None
    folds = 1 if official is not None else config.folds
    patients = _patients(table, task, folds=max(2, folds), use_site=config.site is not None)
    if official is None:
        _check_enough(patients, task, folds, _unit(table))
        official = _deal(patients, [1 / folds] * folds, np.random.default_rng(config.seed))
    tests = official
    parts = []
    for fold in range(folds):
        rest = [patient for patient in patients if tests[patient.name] != fold]
        rng = np.random.default_rng([config.seed, fold + 1])
        inner = _deal(rest, [1 - config.val_fraction, config.val_fraction], rng)
        sides = dict.fromkeys(tests, "test") | {name: ("train", "val")[side] for name, side in inner.items()}
        parts.append(table.assign(fold=fold, split=table["unit"].map(sides)))
    splits: Table = pd.concat(parts).sort_values(["fold", "slide_id"], ignore_index=True)
    check_splits(splits)
    return splits[COLUMNS]


def _unit(table: Table) -> str:
    """The column of what is never parted."""
    return "group" if "group" in table else "patient"


def _official(table: Table) -> dict[str, int]:
    """Patient (or group) → 0 for those of the official test set, -1 for the others.

    Raises:
        SplitsError: a value that is neither, a patient or group on both sides, a side without slides.
    """
    sides = table["official"]
    unknown = ~sides.isin(["train", "test"])
    if unknown.any():
        row = table[unknown].iloc[0]
        raise SplitsError(f"{row['slide_id']}: the official side is {row['official']!r}; expected train or test")
    for side in ("train", "test"):
        if not (sides == side).any():
            raise SplitsError(f"no labelled slide is officially {side}")
    both = table.groupby("unit")["official"].nunique()
    if (both > 1).any():
        name = both.index[both > 1][0]
        raise SplitsError(f"{_unit(table)} {name} is officially in train and in test; no model may learn from one it is tested on")
    return {name: 0 if side == "test" else -1 for name, side in zip(table["unit"], sides, strict=True)}


@dataclass(frozen=True)
class _Patient:
    """What is dealt: a patient, or a group of them."""

    name: str
    labels: frozenset[str]  # strata of the slides; of a regression, the quantile of their mean
    site: str
    n_slides: int


def _patients(table: Table, task: Task, *, folds: int, use_site: bool) -> list[_Patient]:
    strata = [task.strata(label) for label in table["label"]]
    if task.has_values:
        values = table["label"].astype(float).groupby(table["unit"]).mean()
        bins = min(5, max(1, len(values) // (2 * folds)))
        ranks = values.rank(method="first") - 1
        strata = [(name,) for name in table["unit"].map((ranks * bins // len(values)).astype(int).astype(str))]
    slides: dict[str, list[tuple[tuple[str, ...], str]]] = defaultdict(list)
    for name, stratum, site in zip(table["unit"], strata, table["site"], strict=True):
        slides[name].append((stratum, site))
    return [
        _Patient(name, frozenset(one for strata, _ in rows for one in strata), rows[0][1] if use_site else "", len(rows))
        for name, rows in slides.items()
    ]


def _deal(patients: Sequence[_Patient], shares: Sequence[float], rng: np.random.Generator) -> dict[str, int]:
    """Patient → side. A patient of several labels counts for each of them, and is dealt with the rarest."""
    frequency = Counter(label for patient in patients for label in patient.labels)
    rarest_first = {
        patient.name: sorted(patient.labels, key=lambda label: (frequency[label], label)) for patient in patients
    }
    sites = sorted({patient.site for patient in patients})
    site_rank = dict(zip(sites, rng.permutation(len(sites)).tolist(), strict=True))
    side_rank = rng.permutation(len(shares)).tolist()
    shuffled = [patients[index] for index in rng.permutation(len(patients))]
    even = len(set(shares)) == 1

    def hardest_first(patient: _Patient) -> tuple:
        rarest = rarest_first[patient.name][0]
        # the largest ahead, where every side has its turn; by powers of two, so that seeds differ in who goes where
        size = patient.n_slides.bit_length() if even else 0
        return frequency[rarest], rarest, site_rank[patient.site], -size

    had: Counter = Counter()  # (side, label or site) → patients
    n_slides = [0] * len(shares)
    sides: dict[str, int] = {}
    for patient in sorted(shuffled, key=hardest_first):
        labels = rarest_first[patient.name]
        strata = [*labels, (labels[0], patient.site)]

        def turn(side: int, strata: list = strata) -> list:
            """The lowest is next: a side that has none, the largest ahead; then the one furthest behind its share."""
            behind = [(had[side, stratum] > 0, (2 * had[side, stratum] + 1) / shares[side]) for stratum in strata]
            return [*behind, n_slides[side] / shares[side], side_rank[side]]

        side = sides[patient.name] = min(range(len(shares)), key=turn)
        had.update((side, stratum) for stratum in strata)
        n_slides[side] += patient.n_slides
    return sides


def _check_enough(patients: Sequence[_Patient], task: Task, folds: int, unit: str) -> None:
    """Every fold needs a patient of each class (survival: with an event) in test, and two others for train and val.

    A grade or one of several labels may be missing from a fold: the others still teach and count.
    """
    counts = {"": len(patients)}
    if task.kind in ("binary", "multiclass", "survival"):
        counts |= Counter(label for patient in patients for label in sorted(patient.labels) if label != "censored")
    for label, count in counts.items():
        if count < folds or count - math.ceil(count / folds) < 2:
            whose = f"with label {label!r}" if label else "with a label"
            way_out = f"use --folds {count}" if count >= 3 else "train, val and test need one each: add some"
            if label and count < 3:
                way_out += ", or leave the class out"
            if unit == "group":
                way_out += " (groups that share a patient are one)"
            raise SplitsError(f"{count} {unit}(s) {whose} are too few for {folds} folds; {way_out}")


def check_splits(splits: Table) -> None:
    """Refuse splits that leak.

    Raises:
        SplitsError: a missing column, no row, an unknown split, a slide twice in a fold, a patient (or group, where there is such
            a column) on two sides, or a fold without train or val.
    """
    missing = [column for column in COLUMNS if column not in splits]
    if missing:
        raise SplitsError(f"splits have no column {missing[0]!r}; expected {', '.join(COLUMNS)}")
    if splits.empty:
        raise SplitsError("the splits have no row")
    unknown = set(splits["split"]) - {"train", "val", "test"}
    if unknown:
        raise SplitsError(f"split {sorted(unknown)[0]!r} is unknown; expected train, val or test")
    twice = splits.duplicated(["fold", "slide_id"])
    if twice.any():
        row = splits[twice].iloc[0]
        raise SplitsError(f"{row['slide_id']} stands twice in fold {row['fold']}")
    for unit in ("patient", "group"):
        if unit not in splits:
            continue
        sides = splits.groupby(["fold", unit])["split"].nunique()
        if (sides > 1).any():
            fold, name = sides[sides > 1].index[0]
            raise SplitsError(f"{unit} {name} is on two sides of fold {fold}; all slides of a {unit} belong to one")
    for fold, part in splits.groupby("fold"):
        for split in ("train", "val"):
            if not (part["split"] == split).any():
                raise SplitsError(f"fold {fold} has no {split} slide")


def refuse_to_lose(path: Path, table: Table, given: str | Path | None) -> None:
    """Raises UsageError if `path`, to which `table` goes, is the table that was `given` and says anything else."""
    if given is None or not path.exists() or not path.samefile(given):
        return
    if path.read_text(encoding="utf-8-sig").splitlines() != table.to_csv(index=False).splitlines():
        raise UsageError(f"{path}: the table that was given would be written over; keep it elsewhere, or take another --out")


def write_splits(path: Path, splits: Table) -> None:
    with atomic_path(path) as temporary:
        splits[COLUMNS].to_csv(temporary, index=False)


def read_splits(path: str | Path) -> Table:
    """A checked splits table; `site` may be missing, and an empty patient is the slide itself.

    CLAM's are read too: a `splits_<fold>.csv` with the slides of each side in columns train, val and test, or the folder of
    several. They know no patients: match them with the label table and check again.

    Raises:
        SplitsError: a file that is neither, or splits that leak.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.glob("splits_*.csv") if re.fullmatch(r"splits_\d+", file.stem))
        if not files:
            raise SplitsError(f"{path}: no splits_<fold>.csv in it")
        return _checked(path, pd.concat([_clam_fold(file) for file in files], ignore_index=True))
    splits = read_table(path, SplitsError)
    if {"train", "val", "test"} & set(splits.columns) and not {"fold", "slide_id"} & set(splits.columns):
        return _checked(path, _clam_fold(path))
    for column in COLUMNS:
        if column != "site":
            require_column(path, splits, column, SplitsError)
    folds = splits["fold"].str.replace(r"\.0+$", "", regex=True)
    bad = ~folds.str.fullmatch("[0-9]+")
    if bad.any():
        raise SplitsError(f"{path}, line {bad.idxmax()}: fold {splits['fold'][bad].iloc[0]!r} is not a number")
    splits = splits.assign(
        fold=folds.astype(int),
        patient=splits["patient"].where(splits["patient"] != "", splits["slide_id"]).map(composed),
        site=splits.get("site", ""),
        split=splits["split"].str.lower(),
    )
    return _checked(path, splits[COLUMNS].reset_index(drop=True))


def _clam_fold(path: Path) -> Table:
    """One of CLAM's: three columns of slides, as long as they happen to be. The fold is the number in the name, else 0."""
    table = read_table(path, SplitsError)
    for side in ("train", "val", "test"):
        require_column(path, table, side, SplitsError)
    digits = re.fullmatch(r"splits_(\d+)", path.stem)
    fold = int(digits[1]) if digits else 0
    sides = [(slide, side) for side in ("train", "val", "test") for slide in _slides_of(table[side])]
    if any(slide.lower() in ("true", "false") for slide, _ in sides):
        raise SplitsError(f"{path}: true and false in columns of slides; take the file without _bool in its name")
    rows = [{"fold": fold, "slide_id": slide, "patient": slide, "site": "", "split": side} for slide, side in sides]
    return pd.DataFrame(rows, columns=COLUMNS)


def _slides_of(column: pd.Series) -> list[str]:
    slides = [slide for slide in column if slide.lower() not in ("", "nan")]
    # whoever pads a column of whole numbers with gaps in pandas makes them floats: 118.0
    if len(slides) < len(column) and all(re.fullmatch(r"[0-9]+\.0", slide) for slide in slides):
        return [slide.removesuffix(".0") for slide in slides]
    return slides


def _checked(path: Path, splits: Table) -> Table:
    try:
        check_splits(splits)
    except SplitsError as error:
        raise SplitsError(f"{path}: {error}") from None
    return splits


def splits_hash(splits: Table) -> str:
    """SHA-256 of the sorted rows, as they are when written and read: without spaces around, letters with their accents as one."""
    rows = sorted(json.dumps([composed(str(value).strip()) for value in row]) for row in splits[COLUMNS].itertuples(index=False))
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()

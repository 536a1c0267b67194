"""Folds that keep patients apart, as a file that can be read, checked and hashed.

- Every patient is wholly in train, val or test of a fold; every slide is in test exactly once over a cross-validation.
- Labels (and sites, when asked) are balanced over folds; validation comes out of the training patients.
- The hash of the sorted rows goes into every checkpoint: a model knows which slides it must never be praised for.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from wsimil.config import SplitConfig
from wsimil.errors import SplitsError
from wsimil.files import atomic_path
from wsimil.task import Task

__all__ = ["COLUMNS", "check_splits", "make_splits", "read_splits", "splits_hash", "write_splits"]

COLUMNS = ["fold", "slide_id", "patient", "site", "split"]


def make_splits(labels: pd.DataFrame, task: Task, config: SplitConfig) -> pd.DataFrame:
    """Cross-validation folds for a matched label table (`slide_id, patient, site, label`); unlabelled rows are left out.

    Raises:
        SplitsError: too few patients for the folds, in all or in one class.
    """
    table = labels[labels["label"] != ""].sort_values("slide_id", ignore_index=True)
    strata = _strata(table, task, use_site=config.site is not None)
    _check_enough(table, task, config)
    rows = []
    everyone = np.arange(len(table))
    for fold, (rest, test) in enumerate(_group_folds(table, strata, everyone, config.folds, config.seed)):
        inner = max(2, round(1 / config.val_fraction))
        train, val = next(iter(_group_folds(table, strata, rest, inner, config.seed + 1 + fold)))
        for split, members in (("train", train), ("val", val), ("test", test)):
            part = table.loc[members, ["slide_id", "patient", "site"]].assign(fold=fold, split=split)
            rows.append(part)
    splits = pd.concat(rows, ignore_index=True)[COLUMNS].sort_values(["fold", "slide_id"], ignore_index=True)
    check_splits(splits)
    return splits


def _group_folds(table: pd.DataFrame, strata: np.ndarray, members: np.ndarray, folds: int, seed: int):
    """(rest, held out) row numbers of `table` for each fold over `members`, patients kept whole."""
    patients = table["patient"].to_numpy()[members]
    folds = min(folds, len(np.unique(patients)))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rare strata (a label at one site) cannot reach every fold
        for rest, held_out in splitter.split(members, strata[members], patients):
            yield members[rest], members[held_out]


def _strata(table: pd.DataFrame, task: Task, *, use_site: bool) -> np.ndarray:
    if task.kind == "regression":
        bins = min(5, max(2, len(table) // 10))
        labels = pd.qcut(pd.to_numeric(table["label"]).rank(method="first"), bins, labels=False).astype(str)
    else:
        labels = table["label"]
    names = labels + "|" + table["site"] if use_site else labels
    codes = pd.factorize(names, sort=True)[0]
    # a stratum smaller than two cannot be balanced; it joins the others of its label
    counts = np.bincount(codes)
    return np.where(counts[codes] >= 2, codes, pd.factorize(labels, sort=True)[0] + len(counts))


def _check_enough(table: pd.DataFrame, task: Task, config: SplitConfig) -> None:
    patients = table["patient"].nunique()
    if patients < config.folds + 1:
        raise SplitsError(f"{patients} labelled patients are too few for {config.folds} folds and a validation set; use fewer --folds")
    if task.kind == "regression":
        return
    per_class = table.groupby("label")["patient"].nunique()
    for label, count in per_class.items():
        if count < 3:
            raise SplitsError(
                f"only {count} patient(s) with label {label!r}: train, validation and test need one each; "
                "add slides, or leave the class out"
            )
        if count < config.folds:
            raise SplitsError(f"only {count} patients with label {label!r} for {config.folds} folds; use --folds {max(2, count)}")


def check_splits(splits: pd.DataFrame) -> None:
    """Refuse splits that leak.

    Raises:
        SplitsError: a missing column, an unknown split, a slide twice in a fold, or a patient on two sides.
    """
    missing = [column for column in COLUMNS if column not in splits]
    if missing:
        raise SplitsError(f"splits have no column {missing[0]!r}; expected {', '.join(COLUMNS)}")
    unknown = set(splits["split"]) - {"train", "val", "test"}
    if unknown:
        raise SplitsError(f"split {sorted(unknown)[0]!r} is unknown; expected train, val or test")
    twice = splits.duplicated(["fold", "slide_id"])
    if twice.any():
        row = splits[twice].iloc[0]
        raise SplitsError(f"{row['slide_id']} stands twice in fold {row['fold']}")
    sides = splits.groupby(["fold", "patient"])["split"].nunique()
    if (sides > 1).any():
        fold, patient = sides[sides > 1].index[0]
        raise SplitsError(f"patient {patient} is on two sides of fold {fold}; every slide of a patient belongs to one side")
    for fold, part in splits.groupby("fold"):
        for split in ("train", "val"):
            if not (part["split"] == split).any():
                raise SplitsError(f"fold {fold} has no {split} slide")


def write_splits(path: Path, splits: pd.DataFrame) -> None:
    with atomic_path(path) as temporary:
        splits[COLUMNS].to_csv(temporary, index=False)


def read_splits(path: str | Path) -> pd.DataFrame:
    """A checked splits table. Raises SplitsError."""
    try:
        splits = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise SplitsError(f"{path}: not a table that can be read ({error})") from error
    if "fold" in splits:
        bad = ~splits["fold"].str.isdigit()
        if bad.any():
            raise SplitsError(f"{path}: fold {splits['fold'][bad].iloc[0]!r} is not a number")
        splits["fold"] = splits["fold"].astype(int)
    check_splits(splits)
    return splits[COLUMNS]


def splits_hash(splits: pd.DataFrame) -> str:
    """SHA-256 of the sorted rows."""
    rows = sorted(",".join(str(value) for value in row) for row in splits[COLUMNS].itertuples(index=False))
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()

"""Who is in the study: labels matched to slides, the task they make, and the folds.

- Two slides with the same features, or of one file, are one slide under two names. On two sides of a fold they are a leak that no
  table of patients shows, and an error.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from wsimil.bags.dataset import BagFolder
from wsimil.bags.labels import check_owners_spelling, composed, infer_task, match_labels, match_slides, read_labels
from wsimil.bags.splits import check_splits, make_splits, read_splits
from wsimil.config import LabelsConfig, SplitConfig
from wsimil.errors import SplitsError, some_of
from wsimil.extraction.job import slides_of_job
from wsimil.files import hash_of
from wsimil.table import Table
from wsimil.task import Task

_FEW_ROWS = 4

__all__ = ["Cohort", "check_not_seen", "labels_hash", "prepare_cohort"]


@dataclass(frozen=True)
class Cohort:
    """Labelled slides with their folds."""

    labels: pd.DataFrame  # slide, slide_id, patient, site, label; with --group, group
    splits: pd.DataFrame
    task: Task

    def owners(self) -> str:
        """How many patients there are; folds cannot keep the slides of one together who is not named."""
        dealt: Table = self.splits.drop_duplicates("slide_id")
        n_slides, n_patients = len(dealt), dealt["patient"].nunique()
        alone = ""
        if n_patients == n_slides:
            alone = "; every slide counts as a patient of its own (column patient, or --group)"
        elif nobodys := int((dealt["patient"] == dealt["slide_id"].map(self._names())).sum()):
            alone = f"; {nobodys} slides without a patient count as patients of their own"
        return f"folds: {n_slides} slides of {n_patients} patients{alone}"

    def _names(self) -> dict[str, str]:
        """Slide id → the slide as the label table names it, which is the patient of a slide without one."""
        return dict(zip(self.labels["slide_id"], self.labels["slide"].map(composed), strict=True))

    def left_out(self, bags: BagFolder) -> list[str]:
        """A line for each reason why slides take no part, with the first of them."""
        labelled, dealt = self.labels["label"] != "", set(self.splits["slide_id"])
        with_label, without = (set(self.labels.loc[rows, "slide_id"]) for rows in (labelled, ~labelled))
        reasons = {
            "in the splits without a label; nothing is learned from them": without & dealt,
            "without a label, so in no fold": without - dealt,
            "labelled, but without usable tiles, so in no fold": with_label - dealt - set(bags.filled) - set(bags.damaged),
            "labelled, but not in the splits": (with_label & set(bags.filled)) - dealt,
            "not in the label table": set(bags.slide_ids) - with_label - without,
        }
        damaged = [f"{name}: its bag cannot be read, so it takes no part: {reason}" for name, reason in bags.damaged.items()]
        return damaged + [f"{some_of(sorted(names))}: {reason}" for reason, names in reasons.items() if names]


def prepare_cohort(
    bags: BagFolder,
    labels: str | Path,
    *,
    splits: str | Path | None = None,
    labels_config: LabelsConfig | None = None,
    split_config: SplitConfig | None = None,
) -> Cohort:
    """Match labels to slides, infer the task, read or make the folds.

    A label of a slide that the job knows and that has no bag (it failed), or a damaged one, is no error; the slide is in no fold.

    Raises:
        LabelsError, SplitsError: what does not fit, by name.
    """
    labels_config, split_config = labels_config or LabelsConfig(), split_config or SplitConfig()
    table = read_labels(
        labels,
        labels_config,
        group=split_config.group,
        site=split_config.site,
        test=split_config.test,
        named_only=splits is not None,
    )
    known = {*bags.slide_ids, *bags.damaged, *slides_of_job(bags)}
    table = match_labels(table, known)
    task = infer_task(table["label"], labels_config)
    usable = table[table["slide_id"].isin(bags.filled) & (table["label"] != "")]
    if splits is None:
        made = make_splits(usable, task, split_config)
        _check_no_twins(bags, made)
        return Cohort(table, made, task)
    given = read_splits(splits)
    given["slide_id"] = match_slides(given["slide_id"], known)
    # whose a slide is, the label table says, or else the splits
    whose = table["slide_id"].map(given.drop_duplicates("slide_id").set_index("slide_id")["patient"])
    named = table["patient"].where(table["patient"] != "", whose)
    table["patient"] = named.where(named.notna(), table["slide"])
    # two names may turn out to be one slide: so the check comes after
    by_slide = table.set_index("slide_id")
    for column in ["patient", "group"] if "group" in table else ["patient"]:
        said = given["slide_id"].map(by_slide[column])
        given[column] = said.where(said.notna(), given["patient"])
        itself = given[column] == given["slide_id"].map(by_slide["slide"].map(composed)).fillna(given["slide_id"])
        check_owners_spelling(splits, sorted(set(given.loc[~itself, column])), column)
    check_splits(given)
    unknown = sorted(set(given["slide_id"]) - set(table["slide_id"]))
    if unknown:
        raise SplitsError(f"{splits}: {unknown[0]} is not a labelled slide ({len(unknown)} such rows)")
    _check_no_twins(bags, given)
    return Cohort(table, given, task)


def labels_hash(splits: pd.DataFrame, labels: Table, fold: int) -> str:
    """Of what the slides that a fold learns from are said to be."""
    text = dict(zip(labels["slide_id"], labels["label"], strict=True))
    sides = splits[(splits["fold"] == fold) & (splits["split"] != "test")]
    return hash_of(sorted([name, text.get(name, "")] for name in sides["slide_id"]))


def check_not_seen(bags: BagFolder, splits: pd.DataFrame, folds: Iterable[int]) -> None:
    """Raises SplitsError if the encoder was pretrained on a test slide of these folds, unless that was said."""
    for fold in folds:
        sides = splits[(splits["fold"] == fold) & (splits["split"] == "test")]
        attributes = {name: bags.headers[name].attributes for name in sides["slide_id"] if name in bags.headers}
        seen = [name for name, said in attributes.items() if said.get("encoder_saw_slide") and not said.get("encoder_transductive")]
        if seen:
            raise SplitsError(
                f"fold {fold}: the encoder was pretrained on {len(seen)} of {len(sides)} test slides, {seen[0]} for one; train "
                f"only the fold it was pretrained for (--fold), pretrain one with --splits and --fold {fold}, or with "
                "--transductive, which says so in every result"
            )


def _check_no_twins(bags: BagFolder, splits: pd.DataFrame) -> None:
    """Raises SplitsError if two slides on different sides of a fold have the same features, tile for tile, or are of one file."""
    dealt = sorted(set(splits["slide_id"]) & set(bags.headers))
    how = {pair: "are of the same slide file (slide_fingerprint)" for pair in _of_one_file(bags, dealt)}
    how |= dict.fromkeys(_twins(bags, dealt), "have the same features, tile for tile,")
    for (one, other), same in how.items():
        sides = splits[splits["slide_id"].isin([one, other])].groupby("fold")["split"].nunique()
        if (sides.to_numpy() > 1).any():
            raise SplitsError(
                f"{one} and {other} {same} and are on two sides of fold {sides.idxmax()}: "
                "they are one slide under two names; take one out of the labels, or give both the same patient"
            )


def _of_one_file(bags: BagFolder, slide_ids: Iterable[str]) -> list[tuple[str, str]]:
    """The first bag of each slide file, and every other of it."""
    first: dict[str, str] = {}
    pairs = []
    for slide_id in slide_ids:
        if content := bags.headers[slide_id].attributes.get("slide_fingerprint"):
            one = first.setdefault(str(content), slide_id)
            pairs += [(one, slide_id)] if one != slide_id else []
    return pairs


def _twins(bags: BagFolder, slide_ids: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of bags of the same tiles, in whatever order.

    Read whole are only those of equal length that begin alike, or whose tiles lie in the same places.
    """
    of_length: dict[int, list[str]] = defaultdict(list)
    for slide_id in slide_ids:
        of_length[bags.headers[slide_id].n_tiles].append(slide_id)
    alike: dict[tuple, list[str]] = defaultdict(list)
    for n_tiles, group in of_length.items():
        for slide_id in group if n_tiles and len(group) > 1 else ():
            header = bags.headers[slide_id]
            first = header.features.read(np.arange(min(_FEW_ROWS, n_tiles)))
            alike[n_tiles, "begins", _blind_to_precision(first).tobytes()].append(slide_id)
            alike[n_tiles, "lies", _blind_to_order(header.coords_level0_px.read())].append(slide_id)
    found: dict[str, bytes] = {}
    pairs: set[tuple[str, str]] = set()
    for group in alike.values():
        for one, other in combinations(group, 2):
            for slide_id in (one, other):
                if slide_id not in found:
                    found[slide_id] = _blind_to_order(_blind_to_precision(bags.headers[slide_id].features.read()))
            if found[one] == found[other]:
                pairs.add((one, other))
    return sorted(pairs)


def _blind_to_precision(features: np.ndarray) -> np.ndarray:
    """In half precision, as one of two copies may be stored, where that holds the numbers."""
    with np.errstate(over="ignore"):
        half = features.astype(np.float16, copy=False)
    if not np.isfinite(half).all():
        return features + 0
    bits = half.view(np.uint16).copy()
    bits[bits == 0x8000] = 0  # of two zeros one
    return bits


def _blind_to_order(rows: np.ndarray) -> bytes:
    digests = [hashlib.blake2b(row, digest_size=16).digest() for row in np.ascontiguousarray(rows)]
    return hashlib.blake2b(b"".join(sorted(digests)), digest_size=16).digest()

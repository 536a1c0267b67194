"""What the pipelines share: bags from arrays, cross-validation through wsimil's own commands, tables."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from wsimil import predict, train
from wsimil.bags.bag import Bag, Geometry, write_bag
from wsimil.config import Settings
from wsimil.evaluation.intervals import corrected_t_interval

__all__ = ["command_of", "cross_validate", "interval", "machine", "per_fold", "write_bags", "write_table"]


def write_bags(
    folder: Path, bags: Mapping[str, np.ndarray], *, encoder: str, coords: Mapping[str, np.ndarray] | None = None
) -> Path:
    """One bag file per array (N, D), below `folder/features_<encoder>`; there already, they are kept."""
    folder = folder / f"features_{encoder}"
    for name, features in bags.items():
        path = folder / f"{name}.h5"
        if path.exists():
            continue
        places = np.zeros((len(features), 2), np.int64) if coords is None else coords[name]
        geometry = Geometry(1, 1.0, 0, 1, 1, 0.5, 0.5, name)
        attributes = {"slide_id": name, "encoder": encoder}
        write_bag(path, Bag(features.astype(np.float32), places, np.ones(len(features), bool), {}, attributes), geometry)
    return folder


def cross_validate(
    bags: Path,
    labels: Path,
    out: Path,
    settings: Settings,
    *,
    repeats: Iterable[int] = (0,),
) -> pd.DataFrame:
    """Out-of-fold predictions, once per repeat: each has its own folds and first weights. The rows have a column `repeat`.

    Runs that are finished are not done again.
    """
    tables = []
    for repeat in repeats:
        run = out / f"repeat{repeat}"
        own = replace(settings, split=replace(settings.split, seed=repeat), train=replace(settings.train, seed=repeat))
        train(bags, labels, run, settings=own, quiet=True)
        predictions = predict(bags, run, out / f"predictions{repeat}", config=own.predict, quiet=True)
        tables.append(predictions[predictions["split"] == "test"].assign(repeat=repeat))  # others have no label
    return pd.concat(tables, ignore_index=True)


def per_fold(predictions: pd.DataFrame, statistic) -> np.ndarray:
    """`statistic(rows)` of every repeat and fold."""
    return np.array([statistic(rows) for _, rows in predictions.groupby(["repeat", "fold"])])


def interval(values: np.ndarray, *, folds: int) -> str:
    """mean ± sd over folds, and the 95 % interval of the mean after Nadeau and Bengio 2003."""
    around = corrected_t_interval(values, test_to_train=1 / (folds - 1))
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f} [{around.low:.3f}, {around.high:.3f}]"


def machine() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("wsimil", "torch", "numpy"))
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; {libraries}"


def command_of(parser: argparse.ArgumentParser, options: argparse.Namespace, **shown: str) -> str:
    """The command that was given, as somebody else would type it: every option that is not at its default.

    Args:
        shown: words for arguments that are this machine's folders, such as `data="$DATA/mil", out="--out classic/"`.
    """
    words = ["python", f"pipelines/{Path(sys.argv[0]).name}", *shown.values()]
    for name, value in vars(options).items():
        if name in shown or name == "table" or value == parser.get_default(name):
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words.append(shlex.join([f"--{name.replace('_', '-')}", *map(str, values)]))
    return " ".join(words)


def write_table(
    path: Path | None, title: str, command: str, rows: list[dict[str, str]], *, started: float, notes: str = ""
) -> None:
    """The rows as Markdown, on the terminal and where asked."""
    columns = list(rows[0])
    lines = [
        f"# {title}",
        "",
        f"`{command}` on {machine()}; {(time.monotonic() - started) / 60:.0f} minutes.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row[column] for column in columns) + " |" for row in rows),
        *(["", notes] if notes else []),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

"""CAMELYON16 as tables: which slide has metastases, and which is in the official test set.

    python pipelines/camelyon16.py CAMELYON16/ --out camelyon16/slides.csv

The folder is searched for `normal_*.tif`, `tumor_*.tif` and `test_*.tif`, wherever they lie; the labels of test slides come from
the `reference.csv` below it, or --reference (first two columns: name, then Normal or Tumor). Written: `slide, label, patient,
split`, where `split` is the official one. The challenge has no patient numbers: each slide stands for itself.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pandas as pd

EXPECTED = {"train": 270, "test": 129}
"""After the organisers' corrections: normal_086 became tumor_111, test_049 is a duplicate. docs/camelyon16.md has the sources."""

_NAME = re.compile(r"(normal|tumor|test)_\d+")


def slide_table(folder: Path, reference: Path | None = None) -> pd.DataFrame:
    """One row per slide of the folder.

    Raises:
        SystemExit: no slides, a name twice, or test slides without a reference.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.tif")):
        name = path.stem.lower()
        if not _NAME.fullmatch(name) or "mask" in path.parent.name.lower():
            continue
        if name in found:
            sys.exit(f"{name} is there twice: {found[name]} and {path}")
        found[name] = path
    if not found:
        sys.exit(f"{folder}: no normal_*.tif, tumor_*.tif or test_*.tif below it")
    truth = _reference(folder, reference) if any(name.startswith("test") for name in found) else {}
    rows = []
    for name, path in found.items():
        kind = name.split("_")[0]
        if kind == "test" and name not in truth:
            sys.exit(f"{name} is not in the reference table")
        label = truth[name] if kind == "test" else kind
        rows.append((path.relative_to(folder).as_posix(), label, name, "test" if kind == "test" else "train"))
    return pd.DataFrame(rows, columns=["slide", "label", "patient", "split"])


def _reference(folder: Path, given: Path | None) -> dict[str, str]:
    path = given or next(iter(sorted(folder.rglob("reference.csv"))), None)
    if path is None:
        sys.exit(f"{folder}: there are test slides, but no reference.csv; pass --reference FILE")
    # the challenge's own file has no header, mirrors have one
    table = pd.read_csv(path, header=None, dtype=str).iloc[:, :2].set_axis(["name", "label"], axis=1)
    table["name"] = table["name"].str.lower().str.removesuffix(".tif")
    table = table[table["name"].str.fullmatch(r"test_\d+")]
    found = dict(zip(table["name"], table["label"].str.lower(), strict=True))
    return {name: "tumor" if label == "tumor" else "normal" for name, label in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the slides are, in any folders below it")
    parser.add_argument("--out", type=Path, default=Path("slides.csv"))
    parser.add_argument("--reference", type=Path, help="table with the labels of the test slides")
    options = parser.parse_args()
    table = slide_table(options.folder, options.reference)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out, index=False)
    print(table.groupby(["split", "label"]).size().to_string())
    for split, count in EXPECTED.items():
        here = int((table["split"] == split).sum())
        if here != count:
            print(f"{here} {split} slides; the published comparisons have {count}", file=sys.stderr)


if __name__ == "__main__":
    main()

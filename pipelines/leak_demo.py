"""What looking at the test set does to a number: labels that are pure noise, and an AUROC that is not .5.

    python pipelines/leak_demo.py --out leak/ [--cohorts 20] [--candidates 20] [--table leak.md]

Cohorts of random bags with random labels. In each, 5-fold cross-validation of several candidates (seeds). Two ways to report one
number:

- nested: the candidate of a fold is the one with the least loss on validation slides; the test fold is predicted by it once.
- peeking: the candidate of a fold is the one with the best AUROC on the test fold itself. Training has no argument for this: the
  finished candidates are replayed through `predict`, and the choice is made here, in this file.

The truth is .5. The interval of the first has to cover it, and the second does not.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from cohorts import command_of, write_bags, write_table
from scipy import stats

from wsimil import predict, train
from wsimil.config import Settings, TrainConfig
from wsimil.evaluation.metrics import auroc
from wsimil.files import read_json

N_SLIDES, DIM, FOLDS = 100, 16, 5


def cohort_areas(folder: Path, seed: int, candidates: int) -> tuple[float, float]:
    """AUROC of a cohort of noise, nested and peeking: mean over folds."""
    rng = np.random.default_rng(seed)
    names = [f"s{index:03}" for index in range(N_SLIDES)]
    bags = write_bags(folder, {name: rng.normal(size=(rng.integers(5, 30), DIM)) for name in names}, encoder="noise")
    labels = folder / "labels.csv"
    pd.DataFrame({"slide": names, "label": rng.permutation(np.arange(N_SLIDES) % 2)}).to_csv(labels, index=False)
    config = TrainConfig(hidden=16, epochs=15, patience=5, bags_per_step=8, seeds=candidates, stack="on")
    runs = train(bags, labels, folder / "run", settings=Settings(train=config), quiet=True)
    found = []
    for run in runs:
        predictions = predict(bags, run, folder / "predictions" / run.name, quiet=True).query("split == 'test'")
        area = float(auroc(predictions["label"].astype(int), predictions["prob_1"]))
        content = read_json(run / "model.json")
        found.append((content["fold"], content["val_loss"], area))
    table = pd.DataFrame(found, columns=["fold", "val_loss", "area"])
    nested = table.loc[table.groupby("fold")["val_loss"].idxmin(), "area"].mean()
    return float(nested), float(table.groupby("fold")["area"].max().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where bags, runs and predictions go")
    parser.add_argument("--cohorts", type=int, default=20)
    parser.add_argument("--candidates", type=int, default=20, help="seeds in each fold")
    parser.add_argument("--table", type=Path, help="where the Markdown goes")
    options = parser.parse_args()
    started = time.monotonic()
    areas = np.array([cohort_areas(options.out / str(seed), seed, options.candidates) for seed in range(options.cohorts)])
    rows = []
    for name, values in zip(("nested: candidate by validation loss", "peeking: candidate by test AUROC"), areas.T, strict=True):
        margin = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)  # cohorts are independent
        low, high = values.mean() - margin, values.mean() + margin
        covered = "yes" if low <= 0.5 <= high else "no"
        rows.append(
            {"choice": name, "AUROC, mean [95 % interval]": f"{values.mean():.3f} [{low:.3f}, {high:.3f}]", "covers .5": covered}
        )
    command = command_of(parser, options, out="--out leak/")
    notes = (
        f"{options.cohorts} independent cohorts of {N_SLIDES} slides of noise, {FOLDS} folds, {options.candidates} candidates each."
    )
    write_table(options.table, "Noise labels: nested against peeking", command, rows, started=started, notes=notes)


if __name__ == "__main__":
    main()

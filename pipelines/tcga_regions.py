"""TCGA lung and breast on region features: subtypes by patient and by held-out site, and survival, against two plain baselines.

    python pipelines/tcga_regions.py $DATA/tcga_regions --out tcga/ [--table tcga.md]

Bags are the 192-d features that HIPT (Chen 2022) gives for all regions of 4,096 px of a slide. Folds are by patient, or by site:
then no hospital stands on two sides, which is what a new hospital would see. Beside the aggregators: the mean of the regions with
logistic regression (for survival: Cox regression, the same ridge), on the same folds. Every repeat has folds and first weights of
its own. Intervals: bootstrap over patients (AUROC), corrected t over folds (concordance).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from cohorts import command_of, cross_validate, interval, per_fold, write_bags, write_table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from wsimil.bags.splits import read_splits
from wsimil.config import LabelsConfig, Settings, SplitConfig, TrainConfig
from wsimil.evaluation.intervals import cluster_bootstrap, percentile_interval
from wsimil.evaluation.metrics import auroc
from wsimil.evaluation.survival import harrell_c
from wsimil.losses import cox_loss

COHORTS = {"NSCLC": ("tcga_lung", ("LUAD", "LUSC")), "BRCA": ("tcga_brca", ("IDC", "ILC"))}
"""Files, and the two subtypes that are told apart; slides of others take part in survival only."""
AGGREGATORS = ("mean_pool", "gated_abmil")
BASELINE, RIDGE_C = "mean of regions, logistic (Cox) regression", 0.01
FOLDS = 5
TRAIN = TrainConfig(hidden=128, lr=5e-4, weight_decay=1e-3, epochs=30, patience=8, bags_per_step=8, stack="on")


def load(data: Path, name: str, out: Path) -> tuple[Path, pd.DataFrame, dict[str, np.ndarray]]:
    """Bag folder, one row per slide, mean features."""
    with h5py.File(data / f"{name}_hipt4k.h5") as file:
        offsets, features = file["offsets"][:], file["features"][:]
        columns = {key: [str(value.decode()) for value in file[key][:]] for key in ("slide_id", "case_id", "site", "oncotree_code")}
    ids = [Path(slide).stem if slide.endswith(".svs") else slide for slide in columns["slide_id"]]
    bags = {slide: features[start:end] for slide, start, end in zip(ids, offsets, offsets[1:], strict=False)}
    table = pd.DataFrame({"slide": ids, "patient": columns["case_id"], "site": columns["site"], "label": columns["oncotree_code"]})
    clinic = pd.read_csv(data / f"{name}_subset.csv", usecols=["slide_id", "survival_months", "censorship"])
    clinic["slide"] = clinic["slide_id"].str.removesuffix(".svs")
    table = table.merge(clinic.drop(columns="slide_id").drop_duplicates("slide"), on="slide", how="left")
    table["event"] = 1 - table["censorship"]
    return write_bags(out / name, bags, encoder="hipt4k"), table, {slide: rows.mean(0) for slide, rows in bags.items()}


def area(predictions: pd.DataFrame, positive: str) -> str:
    """Pooled AUROC, the mean over repeats, with its interval over patients."""
    scores = predictions.pivot(index="slide_id", columns="repeat", values=f"prob_{positive}")
    slides = predictions.drop_duplicates("slide_id").set_index("slide_id").loc[scores.index]
    truth = (slides["label"] == positive).to_numpy()

    def mean_area(weights: np.ndarray | None = None) -> np.ndarray:
        return np.mean([auroc(truth, scores[repeat].to_numpy(), weights) for repeat in scores], axis=0)

    around = percentile_interval(cluster_bootstrap(mean_area, slides["patient"].to_numpy(), n_bootstrap=1000))
    return f"{float(mean_area()):.3f} [{float(around.low):.3f}, {float(around.high):.3f}]"


def logistic(runs: list[Path], means: dict[str, np.ndarray], table: pd.DataFrame, positive: str) -> pd.DataFrame:
    """Mean features and logistic regression on the folds of each run; validation slides are trained on, too."""
    labels = dict(zip(table["slide"], table["label"], strict=True))
    parts = []
    for repeat, fold in folds_of(runs):
        test = fold["split"] == "test"
        x, y = (np.stack([means[name] for name in fold.loc[side, "slide_id"]]) for side in (~test, test))
        model = make_pipeline(StandardScaler(), LogisticRegression(C=RIDGE_C, max_iter=2000, class_weight="balanced"))
        model.fit(x, [labels[name] == positive for name in fold.loc[~test, "slide_id"]])
        rows = fold.loc[test, ["slide_id", "patient", "fold"]]
        parts.append(rows.assign(**{f"prob_{positive}": model.predict_proba(y)[:, 1], "repeat": repeat}))
    found = pd.concat(parts, ignore_index=True)
    return found.assign(label=found["slide_id"].map(labels))


def repeats_of(out: Path, count: int) -> list[Path]:
    """The runs that `cross_validate` has left in `out`."""
    return [out / f"repeat{repeat}" for repeat in range(count)]


def folds_of(runs: list[Path]) -> Iterator[tuple[int, pd.DataFrame]]:
    """The number of a run, and the rows of its splits that are of one fold."""
    for number, run in enumerate(runs):
        yield from ((number, fold) for _, fold in read_splits(run / "splits.csv").groupby("fold"))


def cox_regression(runs: list[Path], means: dict[str, np.ndarray], table: pd.DataFrame) -> list[float]:
    """Concordance by fold of a ridge Cox regression on mean features; validation slides are trained on, too."""
    known = table.set_index("slide")
    found = []
    for _, fold in folds_of(runs):
        test = fold["split"] == "test"
        names, others = fold.loc[~test, "slide_id"], fold.loc[test, "slide_id"]
        x, new = (np.stack([means[name] for name in side]).astype(float) for side in (names, others))
        scale = StandardScaler().fit(x)
        x, new = (torch.from_numpy(scale.transform(rows)) for rows in (x, new))
        time, event = (torch.tensor(known.loc[names, column].to_numpy(float)) for column in ("survival_months", "event"))
        weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

        def loss(x=x, time=time, event=event, weight=weight, optimizer=optimizer) -> torch.Tensor:  # type: ignore[no-untyped-def]
            optimizer.zero_grad()
            penalized = cox_loss(x @ weight, time, event) * event.sum() + weight.square().sum() / (2 * RIDGE_C)
            penalized.backward()
            return penalized

        optimizer.step(loss)
        risk = (new @ weight.detach()).numpy()
        ends = known.loc[others]
        found.append(float(harrell_c(ends["survival_months"].to_numpy(), ends["event"].to_numpy(), risk)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with tcga_lung_hipt4k.h5 and the other three files")
    parser.add_argument("--out", type=Path, required=True, help="where bags, runs and predictions go")
    parser.add_argument("--tasks", nargs="+", choices=("subtype", "survival"), default=("subtype", "survival"))
    parser.add_argument("--repeats", type=int, default=5, help="how many times folds are dealt anew (5)")
    parser.add_argument("--table", type=Path, help="where the Markdown goes")
    options = parser.parse_args()
    started, rows = time.monotonic(), []
    for cohort, (name, subtypes) in COHORTS.items():
        bags, whole, means = load(options.data, name, options.out)
        table, positive = whole[whole["label"].isin(subtypes)], subtypes[1]
        labels = options.out / name / "labels.csv"
        table.to_csv(labels, index=False)
        for group in ("patient", "site") if "subtype" in options.tasks else ():
            row = {"task": f"{cohort} subtype", "folds by": group}
            for aggregator in AGGREGATORS:
                config = Settings(
                    labels=LabelsConfig(positive=positive),
                    split=SplitConfig(folds=FOLDS, group=group),
                    train=replace(TRAIN, aggregator=aggregator),
                )
                out = options.out / name / f"{group}-{aggregator}"
                predictions = cross_validate(bags, labels, out, config, repeats=range(options.repeats))
                row[aggregator] = area(predictions, positive)
            row[BASELINE] = area(logistic(repeats_of(out, options.repeats), means, table, positive), positive)
            rows.append(row)
            print(rows[-1], flush=True)
        if "survival" not in options.tasks:
            continue
        rows.append(survival(options.out, cohort, name, bags, whole, means, options.repeats))
        print(rows[-1], flush=True)
    notes = (
        "Subtype: AUROC of the pooled out-of-fold predictions, mean over repeats [95 % interval over patients]. "
        "Survival: concordance (Harrell), mean ± sd over folds and repeats [95 % interval after Nadeau and Bengio]. "
        f"Seeds 0 to {options.repeats - 1}."
    )
    write_table(
        options.table,
        "TCGA regions",
        command_of(parser, options, data="$DATA/tcga_regions", out="--out tcga/"),
        rows,
        started=started,
        notes=notes,
    )


def survival(
    out: Path, cohort: str, name: str, bags: Path, table: pd.DataFrame, means: dict[str, np.ndarray], repeats: int
) -> dict[str, str]:
    labels = out / name / "survival.csv"
    known = table.dropna(subset=["survival_months", "event"])
    known.drop(columns="label").to_csv(labels, index=False)
    row = {"task": f"{cohort} survival", "folds by": "patient"}
    for aggregator in AGGREGATORS:
        config = Settings(
            labels=LabelsConfig(time="survival_months", event="event"),
            split=SplitConfig(folds=FOLDS),
            train=replace(TRAIN, aggregator=aggregator, loss="cox", bags_per_step=32, stack="off"),
        )
        predictions = cross_validate(bags, labels, out / name / f"survival-{aggregator}", config, repeats=range(repeats))
        known_end = predictions.dropna(subset=["time", "event"])
        values = per_fold(known_end, lambda one: float(harrell_c(one["time"], one["event"], one["risk"])))
        row[aggregator] = interval(values, folds=FOLDS)
    baseline = cox_regression(repeats_of(out / name / f"survival-{AGGREGATORS[0]}", repeats), means, known)
    return row | {BASELINE: interval(np.array(baseline), folds=FOLDS)}


if __name__ == "__main__":
    main()

"""MUSK1, MUSK2, FOX and MNIST-bags: the sets on which attention-based MIL was introduced (Ilse 2018, arXiv 1802.04712).

    python pipelines/classic_mil.py $DATA/mil --out classic/ [--sets musk1 musk2 fox mnist] [--table classic.md]

- MUSK1, MUSK2, FOX: 10-fold cross-validation, five times over. Two rules, both fixed before: the last epoch, and the epoch with
  the least loss on a tenth of the training bags; the threshold is .5 with the first and chosen on validation bags with the second.
  The paper's figures are its best settings per set.
- MNIST-bags: is a nine among about ten digits? A small convolutional network (LeNet, as in the paper) and the attention are trained
  together on 50 to 500 bags and tested on 1,000 bags of the test digits, over several seeds.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from cohorts import command_of, cross_validate, interval, per_fold, write_bags, write_table
from image_instances import register_image_aggregators

from wsimil import predict, train
from wsimil.bags.splits import write_splits
from wsimil.config import LabelsConfig, Settings, SplitConfig, TrainConfig
from wsimil.evaluation.metrics import auroc

PAPER = {  # accuracy, mean ± standard error over 5 × 10 folds (table 1 of the paper)
    ("musk1", "abmil"): ".892 ± .040",
    ("musk2", "abmil"): ".858 ± .048",
    ("fox", "abmil"): ".615 ± .043",
    ("musk1", "gated_abmil"): ".900 ± .050",
    ("musk2", "gated_abmil"): ".863 ± .042",
    ("fox", "gated_abmil"): ".603 ± .029",
}
FOLDS, REPEATS = 10, 5
SETTINGS = Settings(
    labels=LabelsConfig(positive="1"),
    split=SplitConfig(folds=FOLDS, val_fraction=0.1),
    train=TrainConfig(
        hidden=64, dropout=0.0, lr=5e-4, weight_decay=5e-3, epochs=40, patience=40, bags_per_step=1, balance=False, stack="on"
    ),
)

MNIST_BAGS = (50, 100, 200, 300, 500)
MNIST_PAPER = {50: ".768", 100: ".948", 200: ".970", 300: ".980", 500: ".986"}
"""Test AUC of the attention, read off the paper's figure: second-hand."""


def tables(data: Path, out: Path, names: list[str], repeats: int) -> list[dict[str, str]]:
    rows = []
    for name in names:
        content = np.load(data / f"{name}.npz")
        bags = {f"b{index}": content["X"][content["bag"] == index] for index in np.unique(content["bag"])}
        folder = write_bags(out / name, bags, encoder=name)
        labels = out / name / "labels.csv"
        pd.DataFrame({"slide": list(bags), "label": content["bag_label"].astype(int)}).to_csv(labels, index=False)
        for aggregator in ("abmil", "gated_abmil"):
            row = {"set": name, "aggregator": aggregator}
            for rule, select in (("last epoch, threshold .5", "last"), ("epoch and threshold by validation", "val_loss")):
                config = replace(SETTINGS, train=replace(SETTINGS.train, aggregator=aggregator, select=select))
                predictions = cross_validate(folder, labels, out / name / f"{aggregator}-{select}", config, repeats=range(repeats))
                cut = 0.5 if select == "last" else predictions["threshold"]
                predictions["right"] = (predictions["prob_1"] >= cut) == (predictions["label"].astype(str) == "1")
                row[rule] = interval(per_fold(predictions, lambda fold: fold["right"].mean()), folds=FOLDS)
            rows.append(row | {"paper": PAPER[name, aggregator]})
            print(rows[-1], flush=True)
    return rows


# ---------------------------------------------------------------- MNIST-bags


def draw_bags(images: np.ndarray, digits: np.ndarray, count: int, rng: np.random.Generator) -> tuple[list[np.ndarray], list[int]]:
    """Bags of about ten digits, as many with a nine as without."""
    bags, labels = [], []
    while len(bags) < count:
        rows = rng.integers(0, len(images), max(1, round(rng.normal(10, 2))))
        label = int((digits[rows] == 9).any())
        if sum(labels) < count / 2 if label else len(labels) - sum(labels) < count / 2:
            bags.append(images[rows].reshape(len(rows), -1).astype(np.float32) / 255)
            labels.append(label)
    return bags, labels


def mnist(data: Path, out: Path, seeds: int, sizes: tuple[int, ...]) -> list[dict[str, str]]:
    register_image_aggregators()
    content = np.load(data / "mnist.npz")
    config = Settings(
        labels=LabelsConfig(positive="1"),
        train=TrainConfig(
            aggregator="image_abmil",
            aggregator_options=("side_px=28", "channels=1", "augment=false"),
            hidden=500, dropout=0.0, lr=5e-4, weight_decay=1e-4, epochs=30, patience=30, bags_per_step=1,
            standardize=False, balance=False, select="val_loss",
        ),
    )  # fmt: skip
    rows = []
    for n_bags in sizes:
        scores = []
        for seed in range(seeds):
            rng = np.random.default_rng([seed, n_bags])
            parts = {
                "train": draw_bags(content["x_train"][:50_000], content["y_train"][:50_000], n_bags, rng),
                "val": draw_bags(content["x_train"][50_000:], content["y_train"][50_000:], max(20, n_bags // 5), rng),
                "test": draw_bags(content["x_test"], content["y_test"], 1000, np.random.default_rng(0)),
            }
            folder = out / "mnist" / f"{n_bags}-{seed}"
            table = pd.DataFrame(
                [(f"{part}{index}", label, part) for part, (_, labels) in parts.items() for index, label in enumerate(labels)],
                columns=["slide_id", "label", "split"],
            )
            named = {f"{part}{index}": bag for part, (found, _) in parts.items() for index, bag in enumerate(found)}
            bags = write_bags(folder, named, encoder="mnist")
            table.rename(columns={"slide_id": "slide"}).to_csv(folder / "labels.csv", index=False)
            splits = table.assign(fold=0, patient=table["slide_id"], site="")
            write_splits(folder / "splits.csv", splits[["fold", "slide_id", "patient", "site", "split"]])
            own = replace(config, train=replace(config.train, seed=seed))
            train(bags, folder / "labels.csv", folder / "run", splits=folder / "splits.csv", settings=own, quiet=True)
            predictions = predict(bags, folder / "run", folder / "predictions", quiet=True)
            scores.append(float(auroc(predictions["label"].astype(int), predictions["prob_1"])))
        rows.append(
            {
                "training bags": str(n_bags),
                "AUC, mean ± sd": f"{np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f}",
                "seeds": str(seeds),
                "paper": MNIST_PAPER[n_bags],
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with musk1.npz, musk2.npz, fox.npz, mnist.npz")
    parser.add_argument("--out", type=Path, required=True, help="where bags, runs and predictions go")
    parser.add_argument("--sets", nargs="+", default=["musk1", "musk2", "fox", "mnist"], choices=["musk1", "musk2", "fox", "mnist"])
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of the ten folds; seeds of MNIST-bags")
    parser.add_argument("--mnist-bags", type=int, nargs="+", default=MNIST_BAGS, choices=MNIST_BAGS)
    parser.add_argument("--table", type=Path, help="where the Markdown goes; MNIST-bags gets a file of its own beside it")
    options = parser.parse_args()
    started, command = time.monotonic(), command_of(parser, options, data="$DATA/mil", out="--out classic/")
    if classic := [name for name in options.sets if name != "mnist"]:
        rows = tables(options.data, options.out, classic, options.repeats)
        notes = (
            f"Accuracy, mean ± sd over {FOLDS} folds × {options.repeats} [95 % interval of the mean after Nadeau and Bengio]. "
            f"Seeds 0 to {options.repeats - 1}."
        )
        write_table(options.table, "Classic MIL sets", command, rows, started=started, notes=notes)
    if "mnist" in options.sets:
        path = options.table and options.table.with_name(f"{options.table.stem}-mnist.md")
        rows = mnist(options.data, options.out, options.repeats, tuple(options.mnist_bags))
        write_table(path, "MNIST-bags", command, rows, started=started)


if __name__ == "__main__":
    main()

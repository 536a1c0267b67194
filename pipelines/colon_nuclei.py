"""Colon cancer of the attention-MIL paper (Ilse 2018, arXiv 1802.04712): is there an epithelial nucleus among those of an image?

    python pipelines/colon_nuclei.py $DATA/colon_nuclei --out colon/ [--table colon.md]

CRCHistoPhenotypes: 100 H&E images of 500 px; every nucleus is an instance of 27 × 27 px, an image is a bag, and positive if a
nucleus is epithelial. 10-fold cross-validation, five times; the epoch is the one with the least loss on a tenth of the training
images. The set has no patients, so images of one patient may stand on both sides: in the paper, too.

Instances: within positive images of the test folds, how well attention and contributions rank epithelial nuclei above others
(AUROC, mean over images), and how often the first of that ranking is epithelial; no instance label was used in training.

What the table is made of, a row for every image and repeat, is left in OUT/<model>.csv. Repeats that are in a file given with
--known are not run again: the repository has those of its table in pipelines/results/.
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
from PIL import Image

from wsimil.config import LabelsConfig, Settings, SplitConfig, TrainConfig
from wsimil.evaluation.metrics import auroc
from wsimil.hdf5 import open_hdf5, read_array

SIDE, FOLDS, REPEATS = 27, 10, 5
PAPER = {"attention": (".904", ".968"), "gated": (".898", ".968")}
SETTINGS = Settings(
    labels=LabelsConfig(positive="1"),
    split=SplitConfig(folds=FOLDS, val_fraction=0.1),
    train=TrainConfig(
        aggregator="image_abmil", hidden=512, dropout=0.25, lr=1e-4, weight_decay=5e-4, epochs=60, patience=60, bags_per_step=1,
        standardize=False, balance=False, select="val_loss",
    ),
)  # fmt: skip


def patches(data: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By image: its nuclei as rows of pixels, their corners, and which are epithelial."""
    nuclei = pd.read_csv(data / "nuclei.csv")
    pixels, corners, epithelial = {}, {}, {}
    for name, rows in nuclei.groupby("image"):
        path = next((data / "images").glob(f"{Path(str(name)).stem}.*"))
        margin = SIDE // 2
        image = np.pad(np.asarray(Image.open(path).convert("RGB")), ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
        places = np.clip(np.rint(rows[["x", "y"]].to_numpy()).astype(np.int64), 0, 499)
        cut = [image[y : y + SIDE, x : x + SIDE] for x, y in places.tolist()]
        pixels[path.stem] = np.stack(cut).reshape(len(cut), -1).astype(np.float32) / 255
        corners[path.stem] = places
        epithelial[path.stem] = (rows["class"] == "epithelial").to_numpy()
    return pixels, corners, epithelial


def instances(folder: Path, rows: pd.DataFrame, epithelial: dict[str, np.ndarray]) -> pd.DataFrame:
    """Of images with epithelial nuclei and others: AUROC of the ranking, and whether its first is epithelial (1 or 0)."""
    found = []
    for repeat, name in zip(rows["repeat"], rows["slide"], strict=True):
        truth, columns = epithelial[name], {}
        if truth.any() and not truth.all():
            with open_hdf5(folder / f"predictions{repeat}" / "scores" / f"{name}.h5") as file:
                scores = {part: read_array(file[part])[:, 0] for part in ("attention", "contributions")}
            columns = {f"auroc_{part}": float(auroc(truth, values)) for part, values in scores.items()}
            columns |= {f"first_{part}": int(truth[values.argmax()]) for part, values in scores.items()}
        found.append(columns)
    return pd.DataFrame(found, index=rows.index)


def row_of(model: str, rows: pd.DataFrame) -> dict[str, str]:
    right = per_fold(rows, lambda fold: ((fold["prob_1"] >= 0.5) == fold["truth"]).mean())
    by_fold = per_fold(rows, lambda fold: float(auroc(fold["truth"], fold["prob_1"])))
    areas = np.array([float(auroc(one["truth"], one["prob_1"])) for _, one in rows.groupby("repeat")])
    row = {
        "model": "gated attention" if model == "gated" else model,
        "accuracy": interval(right, folds=FOLDS),
        "AUC": interval(by_fold, folds=FOLDS),
        "AUC of a repeat's pooled predictions, mean ± sd": f"{areas.mean():.3f} ± {areas.std(ddof=1) if len(areas) > 1 else 0:.3f}",
        "paper: accuracy, AUC": ", ".join(PAPER[model]),
    }
    for part, title in (("attention", "attention"), ("contributions", "contribution")):
        row[f"instances, {title}: AUROC, first"] = f"{rows[f'auroc_{part}'].mean():.3f}, {rows[f'first_{part}'].mean():.0%}"
    return row


def known_rows(folder: Path | None, model: str, repeats: int) -> pd.DataFrame:
    if folder is None or not (path := folder / f"{model}.csv").exists():
        return pd.DataFrame()
    rows = pd.read_csv(path)
    return rows[rows["repeat"] < repeats]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with images/ and nuclei.csv")
    parser.add_argument("--out", type=Path, required=True, help="where bags, runs and predictions go")
    parser.add_argument("--models", nargs="+", default=list(PAPER), choices=list(PAPER))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--epochs", type=int, default=SETTINGS.train.epochs)
    parser.add_argument("--known", type=Path, help="folder with <model>.csv of repeats that need not be run again")
    parser.add_argument("--table", type=Path, help="where the Markdown goes")
    options = parser.parse_args()
    started = time.monotonic()
    register_image_aggregators()
    pixels, corners, epithelial = patches(options.data)
    bags = write_bags(options.out, pixels, encoder="nuclei27", coords=corners)
    labels = options.out / "labels.csv"
    pd.DataFrame({"slide": list(epithelial), "label": [int(one.any()) for one in epithelial.values()]}).to_csv(labels, index=False)
    rows = []
    for model in options.models:
        own = (f"side_px={SIDE}", "channels=3", f"gated={str(model == 'gated').lower()}")
        settings = replace(
            SETTINGS, train=replace(SETTINGS.train, aggregator_options=own, epochs=options.epochs, patience=options.epochs)
        )
        folder = options.out / model
        known = known_rows(options.known, model, options.repeats)
        left = [repeat for repeat in range(options.repeats) if repeat not in set(known.get("repeat", ()))]
        if left:
            predictions = cross_validate(bags, labels, folder, settings, repeats=left)
            new = predictions[["repeat", "fold", "slide", "prob_1"]].assign(truth=predictions["label"].astype(int))
            known = pd.concat([known, new.join(instances(folder, new, epithelial))], ignore_index=True)
        known = known.sort_values(["repeat", "fold", "slide"])
        known.to_csv(options.out / f"{model}.csv", index=False)
        rows.append(row_of(model, known))
        print(rows[-1], flush=True)
    notes = (
        f"Accuracy at .5 and AUC: mean ± sd over {FOLDS} folds × {options.repeats} [95 % interval of the mean, Nadeau and Bengio]; "
        f"pooled, the scores of ten models are compared with each other. Seeds 0 to {options.repeats - 1}, {options.epochs} epochs."
        " Instances: in positive images that have other nuclei, too, mean AUROC, and the share of images whose first nucleus is "
        "epithelial."
    )
    command = command_of(parser, options, data="$DATA/colon_nuclei", out="--out colon/")
    write_table(options.table, "Colon nuclei", command, rows, started=started, notes=notes)


if __name__ == "__main__":
    main()

"""KimiaNet on your own slides (arXiv 2101.07903): an encoder from slide labels, and slides found again by it.

    python pipelines/kimianet.py slides/ --labels labels.csv --out kimia/ [--size toy] [--table kimia.md]

1. Patients are dealt into folds. An encoder has seen the labels of its training slides, so nothing is measured on them.
2. Of every slide a mosaic: at most 55 tiles, of nine kinds by colour, in proportion, from the half that is richest in nuclei.
3. A DenseNet-121 learns the diagnosis of each tile's slide; `--configuration` I to IV trains its last one to four dense blocks.
4. Test slides are searched among test slides, never among those of their own patient: median of the minimum distances between
   mosaics, and the three nearest vote. Beside it the network that training began with, and one with random weights.

The paper: tiles of 1,000 px at 20x, more than 240,000 of them from 7,126 slides of 30 types; F1, mean over the 26 types of its
table III (computed here from its columns): DenseNet 63.8, configurations I 74.2, II 69.4, III 80.2, IV 81.3 %. Neighbours may be of
one hospital: a later study tells the site from these features with an accuracy of 86 % (DenseNet: 70 %). So the table says how
often the nearest slide is of the query's own site, and `wsimil search --apart site` leaves such slides out.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from cohorts import command_of, write_table

from wsimil import Settings, extract_features
from wsimil.bags.labels import infer_task, match_labels, read_labels
from wsimil.bags.splits import make_splits, write_splits
from wsimil.config import ExtractConfig, LabelsConfig, PretrainConfig, SplitConfig, TileConfig
from wsimil.encoders import encoder_contract, load_encoder, save_encoder
from wsimil.encoders.trainable import start_name
from wsimil.encoders.vit import NetworkEncoder
from wsimil.errors import UsageError, WsimilError
from wsimil.evaluation.metrics import accuracy, balanced_accuracy, confusion_matrix, macro_f1
from wsimil.extraction.mosaic import mosaic_slides
from wsimil.pretraining import pretrain
from wsimil.retrieval import evaluate_search
from wsimil.slides.cohort import find_slides

CONFIGURATIONS = {"I": 1, "II": 2, "III": 3, "IV": 4}


def settings_of(options: argparse.Namespace) -> Settings:
    toy = options.size == "toy"
    recipe = (f"trained_blocks={CONFIGURATIONS[options.configuration]}",)
    if not toy:
        recipe += (f"global_px={options.tile_px}",)
    return Settings(
        tile=TileConfig(mpp=0.5, tile_px=options.tile_px),
        split=SplitConfig(folds=options.folds),
        pretrain=PretrainConfig(
            method="weak", size=options.size, arch=options.arch, init=options.init, steps=options.steps, recipe_options=recipe,
            device=options.device,
        ),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", help="folder of slides, or CSV")
    parser.add_argument("--labels", required=True, help="CSV with slide, label, patient, and site if known")
    parser.add_argument("--out", type=Path, required=True, help="where splits, encoders, bags and results go")
    parser.add_argument("--size", choices=("toy", "lab", "multi"), default="lab")
    parser.add_argument("--arch", default="densenet121")
    parser.add_argument("--init", help="weights to begin with; default: the preset's (ImageNet, but scratch for toy)")
    parser.add_argument("--configuration", choices=tuple(CONFIGURATIONS), default="IV")
    parser.add_argument("--tile-px", type=int, default=1000)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--fold", type=int, nargs="*", help="which; default: all")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", type=Path, help="where the Markdown goes")
    options = parser.parse_args()
    try:
        study(parser, options)
    except WsimilError as error:
        sys.exit(f"failed: {error}")


def study(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Folds, encoders, searches, table."""
    started, settings = time.monotonic(), settings_of(options)
    files = {file.slide_id: file for file in find_slides(options.slides)}
    labels = match_labels(read_labels(options.labels, LabelsConfig()), files)
    splits = make_splits(labels, infer_task(labels["label"], LabelsConfig()), settings.split)
    write_splits(options.out / "splits.csv", splits)
    found: dict[str, list[pd.DataFrame]] = {}
    for fold in range(options.folds) if options.fold is None else options.fold:
        folder = options.out / f"fold{fold}"
        own = replace(settings, pretrain=replace(settings.pretrain, fold=str(fold)))
        pretrain(
            options.slides, folder / "encoder", splits=options.out / "splits.csv", labels=options.labels, settings=own, say=print
        )
        test = splits.query("fold == @fold and split == 'test'")["slide_id"].tolist()
        table = pd.DataFrame({"slide": [str(files[name].path.resolve()) for name in test], "slide_id": test})
        table["mpp"] = [files[name].mpp or "" for name in test]
        table.to_csv(folder / "test.csv", index=False)
        labels[labels["slide_id"].isin(test)].drop(columns="slide").rename(columns={"slide_id": "slide"}).to_csv(
            folder / "labels.csv", index=False
        )
        trained = folder / "encoder"
        encoders = {f"trained, configuration {options.configuration}": str(trained)}
        for number, (name, other) in enumerate(beside(options).items()):
            encoders[name] = str(seen_alike(other, trained, folder / f"beside{number}"))
        mosaic_slides(folder / "test.csv", folder / "job", tile=settings.tile)
        extraction = extract_features(
            folder / "test.csv",
            folder / "job",
            tile=settings.tile,
            extract=ExtractConfig(encoder=tuple(encoders.values()), device=options.device),
        )
        for name, bags in zip(encoders, extraction.features_folders, strict=True):
            searched = evaluate_search(bags, folder / "labels.csv", say=print)
            searched.write(folder / f"search-{bags.name}")
            same = searched.content["same_site"], searched.content["same_site_chance"]
            found.setdefault(name, []).append(searched.rows.assign(same_site=same[0], same_site_chance=same[1]))
            print(f"fold {fold}, {name}\n{searched.text()}\n", flush=True)
    rows = [summary(name, pd.concat(parts, ignore_index=True)) for name, parts in found.items()]
    command = command_of(parser, options, slides="slides/", labels="--labels labels.csv", out="--out kimia/")
    notes = (
        "Each test slide is searched among the test slides of its fold, without those of its patient; 3 nearest vote. "
        "Site: share of queries whose nearest slide is of their own site (by chance)."
    )
    write_table(options.table, "Slides found again (KimiaNet)", command, rows, started=started, notes=notes)


def beside(options: argparse.Namespace) -> dict[str, str]:
    """What the trained encoder is compared with, by the name of its line: where it began, and random weights."""
    init = options.init or ("scratch" if options.size == "toy" else "imagenet")
    began = {} if init in ("scratch", "none") else {f"where it began ({init})": start_name(options.arch, init)}
    return {**began, "random weights": f"random:{options.arch.partition('.')[0]}"}


def seen_alike(name: str, trained: Path, folder: Path) -> Path:
    """Another encoder, written so that it sees tiles as large as the trained one does: what differs is weights alone."""
    encoder, contract = load_encoder(name), encoder_contract(str(trained))
    if not isinstance(encoder, NetworkEncoder):
        raise UsageError(f"{name} is no network: it has no place beside a trained one")
    alike = replace(
        encoder.contract, name=folder.name, tile_px=contract.tile_px, mpp=contract.mpp, trained_mpps=(), local=False, sha256=""
    )
    return save_encoder(folder, encoder.network, alike)


def summary(name: str, rows: pd.DataFrame) -> dict[str, str]:
    """One line of the table: the queries of all folds together."""
    classes = sorted(set(rows["label"]) | set(rows["prediction"]))
    truth, said = (np.array([classes.index(one) for one in rows[column]]) for column in ("label", "prediction"))
    confusion = confusion_matrix(truth, said, n_classes=len(classes))
    site = "–" if rows["same_site"].isna().any() else f"{rows['same_site'].mean():.2f} ({rows['same_site_chance'].mean():.2f})"
    return {
        "encoder": name,
        "queries": str(len(rows)),
        "macro F1": f"{float(macro_f1(confusion)):.3f}",
        "balanced accuracy": f"{float(balanced_accuracy(confusion)):.3f}",
        "accuracy": f"{float(accuracy(confusion)):.3f}",
        "nearest of own site": site,
    }


if __name__ == "__main__":
    main()

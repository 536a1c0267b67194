"""Self-ViT-MIL from raw slides (Gul et al. 2022, arXiv 2210.09021): a ViT pretrained on the slides without labels, then DSMIL.

    python pipelines/self_vit_mil.py SLIDES --labels labels.csv --config configs/self_vit_mil/small.yaml --out study/
    python pipelines/self_vit_mil.py CAMELYON16/ --labels camelyon16/slides.csv --splits camelyon16/splits.csv \\
        --config configs/self_vit_mil/camelyon16.yaml --out study/

- Fold by fold: DINO on tiles of the fold's training slides, the 5 × dim embedding of all slides, DSMIL, predictions of the fold's
  test slides, heatmaps, report. Splits of one fold (an official test set) make one study in --out, of several one in each
  `fold<k>/`, and the pooled predictions are evaluated together.
- Epoch and threshold are chosen on validation slides. The published code chose both on the test set (epoch by the mean of AUC,
  accuracy and 1 - loss, threshold at the largest sensitivity + specificity - 1); `--replay-published-selection` says what that
  gives: every epoch is kept and replayed through `predict`. That figure flatters, and is printed as what it is.
- The same command goes on after a kill; what is done is kept.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import log_loss, roc_auc_score, roc_curve

from wsimil import predict
from wsimil.bags.labels import infer_task, match_labels, read_labels
from wsimil.bags.splits import make_splits, read_splits, write_splits
from wsimil.config import SECTIONS, Settings
from wsimil.errors import WsimilError
from wsimil.evaluation import write_evaluation
from wsimil.pretraining import pretrain
from wsimil.settings import read_settings
from wsimil.slides.cohort import find_slides
from wsimil.study import Study, run_study


def run_folds(
    slides: Path, labels: Path, out: Path, settings: Settings, *, splits: Path | None = None, quiet: bool = False
) -> list[Study]:
    """A study per fold, each with an encoder that never saw the fold's validation and test slides."""
    say = _silent if quiet else _say
    table = read_splits(splits) if splits else _deal(slides, labels, settings)
    folds = sorted(table["fold"].unique().tolist())
    studies = []
    for fold in folds:
        folder = out if len(folds) == 1 else out / f"fold{fold}"
        own = folder / "fold.csv"
        folder.mkdir(parents=True, exist_ok=True)
        write_splits(own, table[table["fold"] == fold])
        say(f"fold {fold}: pretraining on its training slides")
        asked = replace(settings, pretrain=replace(settings.pretrain, fold=str(fold)))
        encoder = pretrain(slides, folder / "encoder", splits=own, settings=asked, quiet=quiet, say=say)
        used = replace(settings, extract=replace(settings.extract, encoder=(str(encoder.folder),)))
        studies.append(run_study(slides, labels, folder, splits=own, settings=used, quiet=quiet, say=say))
    return studies


def _deal(slides: Path, labels: Path, settings: Settings) -> pd.DataFrame:
    """Folds by patient over the slides that are there."""
    split = settings.split
    table = read_labels(labels, settings.labels, group=split.group, site=split.site, test=split.test)
    table = match_labels(table, [file.slide_id for file in find_slides(slides)])
    return make_splits(table, infer_task(table["label"], settings.labels), split)


def pooled(studies: list[Study], out: Path, settings: Settings) -> dict:
    """Metrics of all test slides, each predicted by its own fold."""
    if len(studies) == 1:
        return studies[0].metrics
    rows = pd.concat([study.predictions.query("split == 'test'") for study in studies], ignore_index=True)
    classes = tuple(column.removeprefix("prob_") for column in rows.columns if column.startswith("prob_"))
    return write_evaluation(
        out / "evaluation", rows, kind="binary", classes=classes, positive=classes[-1],
        n_bootstrap=settings.evaluate.bootstrap, seed=settings.evaluate.seed,
    )  # fmt: skip


def published_selection(study: Study, aggregator: str) -> pd.DataFrame:
    """The rule of the published code, replayed: epoch and threshold chosen on the test slides. One row per epoch, best first."""
    run = study.folder / "runs" / aggregator
    (bags,) = (study.folder / "bags").glob("*/features_*")
    rows = []
    for epoch in sorted((run / "epochs").iterdir()):
        found = predict(bags, epoch, study.folder / "replayed" / epoch.name, quiet=True)
        found = found.query("split == 'test' and status == 'done'")
        positive = [column for column in found if column.startswith("prob_")][-1]
        truth = (found["label"] == positive.removeprefix("prob_")).to_numpy()
        score = found[positive].to_numpy()
        false_positive, true_positive, cuts = roc_curve(truth, score)
        cut = cuts[int((false_positive - true_positive).argmin())]
        accuracy, area = float(((score >= cut) == truth).mean()), float(roc_auc_score(truth, score))
        merit = (2 * area + accuracy + 1 - float(log_loss(truth, np.clip(score, 1e-7, 1 - 1e-7), labels=[False, True]))) / 4
        rows.append({"epoch": epoch.name, "auc": area, "accuracy": accuracy, "threshold": cut, "merit": merit})
    return pd.DataFrame(rows).sort_values("merit", ascending=False, ignore_index=True)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _silent(message: str) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", type=Path, help="folder of slides, or CSV")
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--splits", type=Path, help="folds to use; made by patient if not given")
    parser.add_argument("--config", type=Path, required=True, help="settings of all stages")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--replay-published-selection", action="store_true", help="also what choosing on the test set would give")
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args()
    settings = read_settings(SECTIONS, options.config)
    if options.replay_published_selection:
        settings = replace(settings, train=replace(settings.train, keep_epochs=True))
    try:
        studies = run_folds(options.slides, options.labels, options.out, settings, splits=options.splits, quiet=options.quiet)
    except WsimilError as error:
        sys.exit(f"failed: {error}")
    metrics = pooled(studies, options.out, settings)["pooled"]["metrics"]
    for name in ("auroc", "accuracy"):
        one = metrics[name]
        print(f"{name}: {one['value']:.3f} (95 % interval {one['low']:.3f} to {one['high']:.3f}), chosen on validation slides")
    if options.replay_published_selection:
        for study in studies:
            best = published_selection(study, settings.train.aggregator).iloc[0]
            print(
                f"{study.folder.name}: chosen on the test set, as published (optimistic): AUC {best['auc']:.3f}, "
                f"accuracy {best['accuracy']:.3f}, epoch {best['epoch']}"
            )
    sys.exit(1 if any(study.failed for study in studies) else 0)


if __name__ == "__main__":
    main()

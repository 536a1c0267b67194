"""A toy cohort through every stage, and a look at whether the heatmaps found what was planted.

- The slides are painted here: nothing is downloaded, and the truth is known.
- A small network is pretrained on an archive of slides that have no labels and take no part in anything else, as a laboratory
  would with its own. What that buys is shown by the same network with random weights.
- The study is an ordinary one (`wsimil run` on the same folder gives the same); the truth is read only after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import shapely

from wsimil.config import ExtractConfig, PretrainConfig, Settings, SplitConfig, TileConfig, TrainConfig
from wsimil.encoders import save_random_twin
from wsimil.evaluation.metrics import auroc
from wsimil.extraction import extract_features
from wsimil.files import read_json
from wsimil.heatmaps import read_tile_map
from wsimil.prediction import predict
from wsimil.pretraining import pretrain
from wsimil.slides.synthetic import write_cohort
from wsimil.study import run_study
from wsimil.training import train

__all__ = ["DEMO_SETTINGS", "HottestTile", "hottest_tiles", "run_demo"]

DEMO_SETTINGS = Settings(
    tile=TileConfig(mpp=0.5, tile_px=128),
    pretrain=PretrainConfig(method="dino", size="toy", steps=80),
    split=SplitConfig(folds=4),
    train=TrainConfig(aggregator="gated_abmil", epochs=20, patience=8, hidden=128),
)
N_ARCHIVE, _ARCHIVE_SEED = 8, 1000


@dataclass(frozen=True)
class HottestTile:
    """Where the tile with the highest score of a tumour slide fell."""

    slide_id: str
    on_tumour: bool
    tumour_share: float  # of the tissue's tiles: the chance of a blind hit


def hottest_tiles(predictions: Path, rows: pd.DataFrame, truth: Path) -> list[HottestTile]:
    """For every slide with planted tumour: does its hottest tile touch it?"""
    result = []
    for slide_id in rows.loc[(rows["label"] == "tumour") & (rows["status"] == "done"), "slide_id"].tolist():
        tile_map = read_tile_map(predictions / "scores" / f"{slide_id}.h5", class_name="tumour")
        tumour = shapely.union_all(
            [shapely.geometry.shape(feature["geometry"]) for feature in read_json(truth / f"{slide_id}.geojson")["features"]]
        )
        x, y = tile_map.coords_level0_px.T
        boxes = shapely.box(x, y, x + tile_map.tile_level0_px, y + tile_map.tile_level0_px)
        touches = shapely.intersects(tumour, boxes)
        result.append(HottestTile(slide_id, bool(touches[int(tile_map.values.argmax())]), float(touches.mean())))
    return result


def run_demo(out: Path, *, n_slides: int = 24, quiet: bool = False, say: Callable[[str], None] = print) -> int:
    """Paint, pretrain, run the study, print what came out; 0 if everything worked."""
    cohort, settings = out / "cohort", DEMO_SETTINGS
    say(f"painting {n_slides} slides into {cohort} (H&E look-alikes, two scanners, half with a planted tumour)")
    write_cohort(cohort, n_slides=n_slides)
    say(f"painting {N_ARCHIVE} more into {out / 'archive'}: without labels, for pretraining only")
    write_cohort(out / "archive", n_slides=N_ARCHIVE, seed=_ARCHIVE_SEED)
    say(f"pretrain: a tiny ViT on the archive ({settings.pretrain.method}, {settings.pretrain.steps} steps)")
    pretrain(out / "archive" / "slides", out / "encoder", settings=settings, quiet=quiet, say=say)
    own = out / "encoder"
    encoders = {
        "pretrained here, without labels": str(own),
        "the same network, random weights": str(save_random_twin(str(own), out / "encoder-random")),
    }
    bags = extract_features(
        cohort / "slides", out / "study" / "bags", tile=settings.tile, extract=ExtractConfig(encoder=tuple(encoders.values())),
        job=settings.job, quiet=quiet, say=say,
    ).features_folders  # fmt: skip
    used = replace(settings, extract=ExtractConfig(encoder=(str(own),)))
    study = run_study(cohort / "slides", cohort / "labels.csv", out / "study", settings=used, quiet=quiet, say=say)

    lines: list[dict[str, str]] = []
    hottest: list[HottestTile] = []  # of the study
    for name, folder in zip(encoders, bags, strict=True):
        if name == next(iter(encoders)):
            predictions, rows = study.folder / "predictions", study.predictions
        else:
            run = out / "compared" / Path(folder).name
            train(folder, cohort / "labels.csv", run, settings=settings, quiet=True)
            predictions = run / "predictions"
            rows = predict(folder, run, predictions, quiet=True)
        tiles = hottest_tiles(predictions, rows, cohort / "truth")
        hottest = hottest or tiles
        done = rows[rows["status"] == "done"]
        area = float(auroc(np.asarray(done["label"] == "tumour"), np.asarray(done["prob_tumour"])))
        hits = f"{sum(tile.on_tumour for tile in tiles)} of {len(tiles)}"
        lines.append({"encoder": name, "AUROC": f"{area:.3f}", "hottest tile on the tumour": hits})
    blind = sum(tile.tumour_share for tile in hottest) / max(1, len(hottest))
    area = study.metrics["pooled"]["metrics"]["auroc"]
    print(pd.DataFrame(lines).to_string(index=False))
    print()
    print(f"AUROC of held-out slides: {area['value']:.3f} (95 % interval {area['low']:.3f} to {area['high']:.3f})")
    print(f"a blind guess of the hottest tile would hit the tumour in {blind:.0%} of the slides")
    print("painted tissue is told apart by random weights, too; for real tiles see pipelines/results/ssl_probe.md")
    print(f"encoder:  {own} (for --encoder), {own / 'health.html'}")
    print(f"heatmaps: {study.folder / 'heatmaps'} (PNG to look at, GeoJSON for QuPath)")
    print(f"report:   {study.folder / 'report.html'}")
    return 1 if study.failed else 0

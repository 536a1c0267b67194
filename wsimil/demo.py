"""A toy cohort through every stage, and a look at whether the heatmaps found what was planted.

- The slides are painted here: nothing is downloaded, and the truth is known.
- The study is an ordinary one (`wsimil run` on the same folder gives the same); the truth is read only after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import shapely

from wsimil.config import ExtractConfig, Settings, SplitConfig, TileConfig, TrainConfig
from wsimil.files import read_json
from wsimil.heatmaps import read_tile_map
from wsimil.slides.synthetic import write_cohort
from wsimil.study import Study, run_study

__all__ = ["DEMO_SETTINGS", "HottestTile", "hottest_tiles", "run_demo"]

DEMO_SETTINGS = Settings(
    tile=TileConfig(mpp=0.5, tile_px=128),
    extract=ExtractConfig(encoder=("texture",)),
    split=SplitConfig(folds=4),
    train=TrainConfig(aggregator="gated_abmil", epochs=20, patience=8, hidden=128),
)


@dataclass(frozen=True)
class HottestTile:
    """Where the tile with the highest score of a tumour slide fell."""

    slide_id: str
    on_tumour: bool
    tumour_share: float  # of the tissue's tiles: the chance of a blind hit


def hottest_tiles(study: Study, truth: Path) -> list[HottestTile]:
    """For every slide with planted tumour: does its hottest tile touch it?"""
    result = []
    rows = study.predictions
    for slide_id in rows.loc[(rows["label"] == "tumour") & (rows["status"] == "done"), "slide_id"].tolist():
        tile_map = read_tile_map(study.folder / "predictions" / "scores" / f"{slide_id}.h5", class_name="tumour")
        tumour = shapely.union_all(
            [shapely.geometry.shape(feature["geometry"]) for feature in read_json(truth / f"{slide_id}.geojson")["features"]]
        )
        x, y = tile_map.coords_level0_px.T
        boxes = shapely.box(x, y, x + tile_map.tile_level0_px, y + tile_map.tile_level0_px)
        touches = shapely.intersects(tumour, boxes)
        result.append(HottestTile(slide_id, bool(touches[int(tile_map.values.argmax())]), float(touches.mean())))
    return result


def run_demo(out: Path, *, n_slides: int = 24, quiet: bool = False, say: Callable[[str], None] = print) -> int:
    """Paint, run the study, print what came out; 0 if everything worked."""
    say(f"painting {n_slides} slides into {out / 'cohort'} (H&E look-alikes, two scanners, half with a planted tumour)")
    write_cohort(out / "cohort", n_slides=n_slides)
    study = run_study(
        out / "cohort" / "slides",
        out / "cohort" / "labels.csv",
        out / "study",
        settings=DEMO_SETTINGS,
        quiet=quiet,
        say=say,
    )
    hottest = hottest_tiles(study, out / "cohort" / "truth")
    auroc = study.metrics["pooled"]["metrics"]["auroc"]
    hits = sum(tile.on_tumour for tile in hottest)
    blind = sum(tile.tumour_share for tile in hottest) / max(1, len(hottest))
    table = pd.DataFrame([vars(tile) for tile in hottest])
    print(table.assign(tumour_share=table["tumour_share"].map("{:.0%}".format)).to_string(index=False))
    print()
    print(f"AUROC of held-out slides: {auroc['value']:.3f} (95 % interval {auroc['low']:.3f} to {auroc['high']:.3f})")
    print(f"hottest tile on the planted tumour: {hits} of {len(hottest)} tumour slides (a blind guess: {blind:.0%})")
    print(f"heatmaps: {study.folder / 'heatmaps'} (PNG to look at, GeoJSON for QuPath)")
    print(f"report:   {study.folder / 'report.html'}")
    return 1 if study.failed else 0

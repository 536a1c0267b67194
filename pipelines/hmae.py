"""HMAE (Chiocchetti et al. 2024, arXiv 2410.12006): a masked autoencoder on random crops of slides, judged by a linear probe.

    python pipelines/hmae.py slides/ --tiles labelled_tiles/ --labels tiles.csv --out hmae/ [--splits splits.csv --fold 0]

1. Crops are drawn from the tissue of the slides wherever it is, not from a grid and not into files; three quarters of each are
   hidden and painted in again by a ViT.
2. The encoder is frozen and a linear model is fitted on labelled tiles (the paper: regions of BRACS, seven classes), in folds by
   `group`; beside it the same network with random weights.
3. The encoder folder serves `wsimil extract --encoder hmae/encoder` like any other.

Pretrain on other patients than those of the labelled tiles: `--splits` and `--fold` leave out the slides of a test set. The paper's
settings and numbers were not at hand, so none are quoted and the presets are ours (docs/pretraining.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wsimil.config import PretrainConfig, ProbeConfig, Settings, TileConfig
from wsimil.errors import WsimilError
from wsimil.pretraining import pretrain
from wsimil.probing import probe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", type=Path, help="folder of slides, or CSV")
    parser.add_argument("--tiles", type=Path, required=True, help="folder of labelled tile images")
    parser.add_argument("--labels", type=Path, help="CSV with tile, label, group; default: sub-folders are classes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=("toy", "lab", "multi"), default="lab")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--mpp", type=float, default=0.5)
    parser.add_argument("--tile-px", type=int, default=224)
    parser.add_argument("--splits", type=Path)
    parser.add_argument("--fold")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    settings = Settings(
        tile=TileConfig(mpp=options.mpp, tile_px=options.tile_px),
        pretrain=PretrainConfig(method="mae", size=options.size, steps=options.steps, fold=options.fold, device=options.device),
    )
    try:
        encoder = pretrain(
            options.slides, options.out / "encoder", splits=options.splits, settings=settings,
            say=lambda message: print(message, file=sys.stderr, flush=True),
        )  # fmt: skip
        report = probe(options.tiles, options.labels, config=ProbeConfig(encoder=(str(encoder.folder),), device=options.device))
    except WsimilError as error:
        sys.exit(f"failed: {error}")
    report.write(options.out)
    print(report.text())


if __name__ == "__main__":
    main()

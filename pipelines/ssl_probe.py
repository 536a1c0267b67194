"""Does pretraining on tiles, without labels, teach a network anything? DINO and MAE against the same network with random weights.

    python pipelines/ssl_probe.py $DATA/lung_tiles --groups groups.csv --out lung/ --table lung.md

- Tiles that come from one source image belong together (`--groups`: columns class, file, source_tile_group). Seed by seed, half of
  the groups are pretrained on and the other half is probed: no probed tile, nor an augmentation of one, was in pretraining.
- Probes are those of `wsimil probe`: k nearest neighbours and a linear model on frozen features, in folds by group.
- Beside every encoder its twin: the same network with random weights. The last column is what pretraining bought.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
from cohorts import command_of, write_table

from wsimil.config import PretrainConfig, ProbeConfig, Settings, TileConfig
from wsimil.pretraining import pretrain
from wsimil.probing import probe

METHODS = {
    "dino": PretrainConfig(
        method="dino", size="toy", source="tiles",
        recipe_options=("centring=sinkhorn", "spread=kde", "spread_weight=0.05", "stain_sigma=0.015"),
    ),
    "mae": PretrainConfig(method="mae", size="toy", source="tiles", recipe_options=("stain_sigma=0.015",)),
}  # fmt: skip
"""The toy presets. Both were chosen in short runs on tiles of this very set, by the health panel and by the probes; those of MAE
were dealt with seed 100. What a dealing says that was used for choosing is too good by an unknown amount: quote others."""


def halves(table: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Groups dealt into two halves, class by class."""
    rng = np.random.default_rng(seed)
    first: set[str] = set()
    for _, part in table.groupby("class"):
        names = rng.permutation(np.unique(part["source_tile_group"]))
        first |= set(names[: len(names) // 2].tolist())
    chosen = table["source_tile_group"].isin(first)
    return table[chosen], table[~chosen]


def linked(tiles: Path, table: pd.DataFrame, folder: Path) -> Path:
    """A folder of links to these tiles, in a sub-folder for each group."""
    for row in table.itertuples():
        link = folder / str(row.source_tile_group) / str(row.file)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            os.symlink((tiles / str(row[1]) / str(row.file)).resolve(), link)
    return folder


def trial(tiles: Path, table: pd.DataFrame, out: Path, method: str, seed: int, steps: int | None, device: str) -> pd.DataFrame:
    """Pretrain on one half, probe on the other: rows of `wsimil probe`."""
    pretrained_on, probed_on = halves(table, seed)
    own = PretrainConfig(**{**vars(METHODS[method]), "seed": seed, "steps": steps, "device": device})
    settings = Settings(tile=TileConfig(mpp=0.5, tile_px=224), pretrain=own)
    folder = linked(tiles, pretrained_on, out / f"seed{seed}" / "tiles")
    encoder = pretrain(folder, out / f"seed{seed}" / method, settings=settings, quiet=True)
    seconds = pd.read_csv(encoder.folder / "log.csv")["seconds"].iloc[-1]
    probed = out / f"seed{seed}" / f"probe-{method}"
    facts = {"method": method, "seed": seed, "minutes": seconds / 60, "steps": encoder.step}
    if (probed / "probe.csv").exists():  # by an earlier call
        return pd.read_csv(probed / "probe.csv", keep_default_na=False).assign(**facts)
    labels = out / f"seed{seed}" / "labels.csv"
    names = probed_on["class"] + "/" + probed_on["file"]
    pd.DataFrame({"tile": names, "label": probed_on["class"], "group": probed_on["source_tile_group"]}).to_csv(labels, index=False)
    report = probe(tiles, labels, config=ProbeConfig(encoder=(str(encoder.folder),), device=device), quiet=True)
    report.write(probed)
    return report.rows.assign(**facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", type=Path, help="folder with a sub-folder for each class")
    parser.add_argument("--groups", default="groups.csv", help="table below it: class, file, source_tile_group")
    parser.add_argument("--out", type=Path, required=True, help="where encoders and probes go")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of pretraining; default: the preset's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", type=Path, help="where the Markdown goes")
    options = parser.parse_args()
    started = time.monotonic()
    table = pd.read_csv(options.tiles / options.groups, dtype=str)
    found = []
    for seed in options.seeds:
        for method in options.methods:
            found.append(trial(options.tiles, table, options.out, method, seed, options.steps, options.device))
            print(found[-1][["method", "seed", "encoder", "probe", "balanced_accuracy"]].to_string(index=False), flush=True)
    rows = pd.concat(found)
    rows["network"] = np.where(rows["twin_of"] == "", "pretrained", "random weights")
    lines = []
    for (method, kind), part in rows.groupby(["method", "probe"]):
        by_seed = part.pivot(index="seed", columns="network", values="balanced_accuracy")
        gain = by_seed["pretrained"] - by_seed["random weights"]
        spread = {
            name: f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")
            for name, values in by_seed.items()
        }
        lines.append(
            {
                "method": str(method),
                "probe": str(kind),
                "pretrained": spread["pretrained"],
                "random weights": spread["random weights"],
                "gain, seed by seed": ", ".join(f"{value:+.3f}" for value in gain),
                "steps": str(part["steps"].iloc[0]),
                "minutes": f"{part['minutes'].mean():.1f}",
            }
        )
    command = command_of(parser, options, tiles="$DATA/lung_tiles", out="--out lung/")
    seeds = ", ".join(map(str, sorted(options.seeds)))  # as the gains stand in their column
    notes = (
        f"Balanced accuracy of three classes on tiles that pretraining never saw, mean ± sd over seeds {seeds}: each deals the "
        "groups anew and draws anew the weights that pretraining begins with; the network with random weights is always the same. "
        "Chance: .333."
    )
    write_table(options.table, "Pretraining on lung tiles", command, lines, started=started, notes=notes)


if __name__ == "__main__":
    main()

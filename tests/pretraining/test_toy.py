"""The toy preset on painted tissue: in seconds of a CPU it learns to tell tumour, and its panel finds it healthy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from wsimil.config import PretrainConfig, Settings, TileConfig
from wsimil.encoders import load_encoder, load_random_twin
from wsimil.pretraining import pretrain
from wsimil.pretraining.process import read_table
from wsimil.slides.painting import paint_slide, place_lesions

TILE_PX, PER_CLASS = 64, 40


def cut_tiles(folder: Path, n_slides: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles of normal and of tumour tissue, as files and as (tiles, labels, slides)."""
    tiles, labels, owners = [], [], []
    for seed in range(n_slides):
        painted = paint_slide(800, 700, mpp=0.5, seed=seed, lesions=place_lesions(seed, 800, 700))
        rng, counts = np.random.default_rng(seed), [0, 0]
        share = painted.tumour.shape[0] / painted.rgb.shape[0]
        (folder / f"slide{seed}").mkdir(parents=True)
        for _ in range(4000):
            y, x = (int(rng.integers(0, side - TILE_PX)) for side in painted.rgb.shape[:2])
            tile = painted.rgb[y : y + TILE_PX, x : x + TILE_PX]
            rows, columns = (slice(int(start * share), int((start + TILE_PX) * share)) for start in (y, x))
            tumour = painted.tumour[rows, columns].mean()
            label = 1 if tumour > 0.8 else 0
            between = 0.05 <= tumour <= 0.8
            if between or counts[label] == PER_CLASS or (tile.min(-1) < 220).mean() < 0.6:
                continue
            Image.fromarray(tile).save(folder / f"slide{seed}" / f"{label}-{counts[label]}.png")
            counts[label] += 1
            tiles.append(tile)
            labels.append(label)
            owners.append(seed)
    return np.stack(tiles), np.array(labels), np.array(owners)


def balanced_accuracy(features: np.ndarray, labels: np.ndarray, owners: np.ndarray, *, k: int = 10) -> float:
    """Of the majority among the k nearest tiles of other slides."""
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    alike = np.where(owners[:, None] == owners[None], -np.inf, units @ units.T)
    said = labels[np.argsort(-alike, 1)[:, :k]].mean(1) > 0.5
    return float(np.mean([(said[labels == label] == label).mean() for label in (0, 1)]))


def test_dino_on_painted_tissue_beats_its_random_weights_and_is_healthy(tmp_path: Path, readers) -> None:
    tiles, labels, owners = cut_tiles(tmp_path / "tiles")
    config = PretrainConfig(
        size="toy", arch="test_vit", steps=100, device="cpu",
        recipe_options=("global_px=64", "local_px=32", "hidden=128", "prototypes=256", "panel_tiles=256", "panel_every=0.25"),
    )  # fmt: skip
    out = tmp_path / "run"
    pretrain(tmp_path / "tiles", out, settings=Settings(tile=TileConfig(tile_px=TILE_PX), pretrain=config), quiet=True)
    twins = [load_random_twin(str(out), seed=seed) for seed in range(3)]
    accuracies = [
        balanced_accuracy(encoder(torch.from_numpy(tiles)).numpy(), labels, owners)
        for encoder in (load_encoder(str(out)), *twins)
        if encoder is not None
    ]
    print(accuracies)
    assert len(accuracies) == 4 and accuracies[0] > max(accuracies[1:])
    panels = read_table(out / "health.csv")
    assert len(panels) == 5 and not any(row["signs"] for row in panels)
    assert float(panels[-1]["spread"]) > 0.5 and float(panels[-1]["rank"]) > float(panels[0]["rank"])

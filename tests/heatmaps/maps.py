"""Maps made of numbers alone, and scores files of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsimil.hdf5 import Dataset, write_hdf5
from wsimil.heatmaps import TileMap

__all__ = ["random_map", "write_scores"]


def random_map(
    seed: int, *, n: int, side: float, size: tuple[int, int], kind: str = "contribution", margin: float = 0.0, whole: bool = True
) -> TileMap:
    """Tiles anywhere on a canvas of `size`, overlapping at will; with `margin` also beyond its edges by so many level-0 px."""
    rng = np.random.default_rng(seed)
    coords = rng.uniform(-margin, np.array(size) + margin - (0 if margin else side), (n, 2))
    values = rng.normal(size=n) if kind == "contribution" else rng.uniform(0, 3, n)
    return TileMap(
        slide_id="s",
        values=values.astype(np.float32),
        coords_level0_px=np.floor(coords).astype(np.int64) if whole else coords,
        tile_level0_px=side,
        kind=kind,
        class_name="tumour",
        size_level0_px=size,
        bounds=(0, 0),
    )


def write_scores(path: Path, size: tuple[int, int], *, side: float = 100.0, values: np.ndarray | None = None) -> None:
    """Scores of tiles side by side over a whole slide of `size`, in rows; they differ from slide to slide."""
    xs, ys = np.meshgrid(np.arange(0, size[0] - side + 1, side), np.arange(0, size[1] - side + 1, side))
    coords = np.stack([xs.ravel(), ys.ravel()], 1).astype(np.int64)
    if values is None:
        values = np.random.default_rng(list(path.stem.encode())).normal(size=len(coords))
    write_hdf5(
        path,
        {"coords": Dataset(coords), "contributions": Dataset(values.astype(np.float32)[:, None])},
        {
            "format": "wsimil-scores",
            "slide_id": path.stem,
            "tile_level0_px": float(side),
            "level0_width": size[0],
            "level0_height": size[1],
            "class_names": ["tumour"],
            "contribution_kind": "exact",
        },
    )

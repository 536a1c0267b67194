"""A small cohort of bags whose classes can be learned; random numbers, no slide."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsimil.bags.bag import Bag, Geometry, write_bag

DIM = 12


def write_cohort(folder: Path, *, n_slides: int = 24, seed: int = 0) -> Path:
    """`features_toy` of bags of 20 to 60 tiles and `labels.csv`; a fifth of a positive slide's tiles stands out."""
    rng = np.random.default_rng(seed)
    rows = ["slide,label"]
    for number in range(n_slides):
        size, positive = int(rng.integers(20, 60)), number % 2
        features = rng.normal(3, 2, (size, DIM))
        features[: size // 5 if positive else 0, 0] += 12
        name = f"s{number:02}"
        geometry = Geometry(224, 224.0, 0, 20_000, 20_000, 0.5, 0.5, name)
        attributes = {"slide_id": name, "encoder": "toy", "encoder_sha256": "0" * 64, "recipe_hash": "r", "slide_fingerprint": name}
        bag = Bag(
            features.astype(np.float16),
            224 * np.stack(np.divmod(np.arange(size), 8), 1),
            np.ones(size, bool),
            attributes=attributes | {"mpp": 0.5, "tile_level0_px": 224.0},
        )
        write_bag(folder / "features_toy" / f"{name}.h5", bag, geometry)
        rows.append(f"{name},{'pos' if positive else 'neg'}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder

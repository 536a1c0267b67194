"""Where the tiles of a slide lie, in files without features: CLAM's `patches`, TRIDENT's, AtlasPatch's, and our own.

All count level-0 pixels from the top-left corner of the whole canvas. They differ in where the side of a tile stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsimil.bags.bag import trident_geometry
from wsimil.errors import BagFormatError
from wsimil.hdf5 import open_hdf5, plain_attributes, read_array

__all__ = ["Places", "clam_side", "find_places", "read_places"]


@dataclass(frozen=True)
class Places:
    """Tiles of one slide."""

    coords_level0_px: np.ndarray  # (N, 2) int64, x, y of the top-left corner; in the order of the file
    tile_level0_px: float


def find_places(folder: Path, slide_id: str) -> Path | None:
    """The file of a slide in a folder of coordinates; None where there is none."""
    named = (f"{slide_id}.h5", f"{slide_id}_patches.h5")
    candidates = [place / name for place in (folder, folder / "patches") for name in named]
    return next((path for path in candidates if path.is_file()), None)


def read_places(path: Path) -> Places:
    """The tiles of a file.

    Raises:
        BagFormatError: it holds no coordinates, or does not say how large a tile is.
    """
    with open_hdf5(path) as file:
        if "coords" not in file or not hasattr(file["coords"], "shape"):
            raise BagFormatError(f"{path}: no dataset `coords` (it has {', '.join(file) or 'none'})")
        coords = read_array(file["coords"])
        about, whole = plain_attributes(file["coords"]), plain_attributes(file)
    if coords.ndim != 2 or coords.shape[1] not in (2, 5) or coords.dtype.kind not in "iu":
        raise BagFormatError(f"{path}: coords are {coords.shape} of {coords.dtype}, not whole level-0 pixels (N, 2)")
    side = whole.get("tile_level0_px") or trident_geometry(about).get("tile_level0_px") or whole.get("patch_size_level0")
    if not side and "downsample" in about:
        side = clam_side(about)
    if not side:
        raise BagFormatError(
            f"{path}: says nowhere how large a tile is at level 0 (patch_size_level0, or patch_size and downsample)"
        )
    return Places(coords[:, :2].astype(np.int64), float(side))


def clam_side(stated: Mapping[str, Any]) -> float | None:
    """Side of a tile at level 0 from CLAM's attributes of `coords`: its `patch_size` counts pixels of `patch_level`."""
    if "patch_size" not in stated:
        return None
    downsample = float(np.ravel(stated.get("downsample", 1.0))[0]) * float(stated.get("custom_downsample", 1))
    return float(stated["patch_size"]) * downsample

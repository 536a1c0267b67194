"""CLAM: `h5_files/<id>.h5` and `pt_files/<id>.pt`; the size of tiles stands in the file of coordinates, `patches/<id>.h5`.

- Coordinates are level-0 pixels. `patch_size` counts pixels of `patch_level`, so a tile is `patch_size x downsample` at level 0.
- CLAM states no µm/px and no encoder. Without its `patches` folder, the side of a tile is inferred from their distance.
- Written: both folders in float32, coordinates in int32, and `patches` at level 0 with the true side of a tile, rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsimil.bags.bag import Bag, BagHeader
from wsimil.bags.interop.layout import (
    Known,
    attributes_of_ours,
    exportable,
    hdf5_part,
    header_of,
    inferred_side,
    integer_coords,
    no_coords,
    rows_of_array,
    rows_of_file,
    spacing_of,
)
from wsimil.bags.places import clam_side
from wsimil.errors import BagFormatError
from wsimil.files import atomic_path
from wsimil.hdf5 import Dataset, open_hdf5, plain_attributes, read_array, stored_rows, write_hdf5

__all__ = ["Clam"]


class Clam:
    name = "clam"

    def find(self, folder: Path) -> dict[str, Path]:
        root = folder.parent if folder.name in ("h5_files", "pt_files") else folder
        found = {path.stem: path for path in sorted((root / "pt_files").glob("*.pt")) if not path.name.startswith(".")}
        return found | {path.stem: path for path in sorted((root / "h5_files").glob("*.h5")) if not path.name.startswith(".")}

    def header(self, path: Path, slide_id: str, known: Known) -> BagHeader:
        places = [place / "patches" / f"{path.stem}.h5" for place in path.parents[1:3]]
        patches = next(filter(Path.is_file, places), None)
        geometry, there = ({}, None) if patches is None else _geometry(patches)
        ours: dict[str, Any] = {}
        if path.suffix == ".h5":
            with open_hdf5(path) as file:
                features = stored_rows(hdf5_part(path, file, "features"))
                coords = integer_coords(read_array(hdf5_part(path, file, "coords")))
                ours = attributes_of_ours(plain_attributes(file))
        else:
            features, coords = rows_of_file(path), there
        if coords is not None and there is not None and not np.array_equal(coords, there):
            raise BagFormatError(f"{path}: other coordinates than in {patches}: not of one run; extract the slide again")
        remarks: tuple[str, ...] = ()
        attributes = {"tile_level0_px": known.tile_level0_px, "encoder": known.encoder, "mpp": known.mpp_of(slide_id)}
        attributes |= {"mpp_source": "option" if attributes["mpp"] else None} | geometry | {"slide_id": slide_id} | ours
        if coords is None:
            remarks = ("coordinates are in neither h5_files nor patches: positions and heatmaps are not possible",)
            attributes["coords_unit"] = "none"
        elif attributes["tile_level0_px"] is None and (spacing := spacing_of(coords)):
            attributes["tile_level0_px"] = float(spacing)
            remarks = (inferred_side(spacing),)
        placed = no_coords(path, features.shape[0]) if coords is None else rows_of_array(path, coords)
        return header_of(path, features, placed, attributes, remarks=remarks)

    def write(self, out: Path, bag: Bag) -> list[str]:
        features, coords, attributes = exportable(bag)
        wide, name = features.astype(np.float32), attributes["slide_id"]
        remarks = []
        if attributes.get("coords_unit") == "none":
            remarks.append("only pt_files are written, for positions are not known")
        else:
            parts = {"features": Dataset(wide), "coords": Dataset(coords.astype(np.int32))}
            write_hdf5(out / "h5_files" / f"{name}.h5", parts, attributes, free_text=True)
            write_hdf5(out / "patches" / f"{name}.h5", {"coords": Dataset(coords, _as_patches(attributes))}, {})
            if not attributes.get("tile_level0_px"):
                remarks.append("patches holds no patch_size, for the side of a tile is not known")
        with atomic_path(out / "pt_files" / f"{name}.pt") as temporary:  # last: by it CLAM knows a finished slide
            torch.save(torch.from_numpy(wide), temporary)
        return remarks

    def files(self, out: Path, stated: Mapping[str, Any]) -> list[Path]:
        name, placed = stated["slide_id"], stated.get("coords_unit") != "none"
        paths = [out / "h5_files" / f"{name}.h5", out / "patches" / f"{name}.h5"] if placed else []
        return [out / "pt_files" / f"{name}.pt", *paths]


def _as_patches(stated: Mapping[str, Any]) -> dict[str, Any]:
    """What CLAM says of coordinates; as if read from level 0, where every side can be said."""
    size, side = [stated.get("level0_width", 0), stated.get("level0_height", 0)], stated.get("tile_level0_px")
    return {
        "patch_size": round(side) if side else None,
        "patch_level": 0,
        "downsample": [1.0, 1.0],
        "downsampled_level_dim": size,
        "level_dim": size,
        "name": stated["slide_id"],
        "save_path": "",
    }


def _geometry(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """What a coordinates file of CLAM says, under our names; and its coordinates."""
    with open_hdf5(path) as file:
        coords = integer_coords(read_array(hdf5_part(path, file, "coords")))
        stated = plain_attributes(file["coords"])
    found: dict[str, Any] = {}
    if side := clam_side(stated):
        found["tile_level0_px"] = side
    if stated.get("patch_level") == 0 and all(stated.get("level_dim", [0])):
        found["level0_width"], found["level0_height"] = (int(side) for side in stated["level_dim"])
    return found, coords

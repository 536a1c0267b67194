"""torchmil: a folder per part, `features/`, `coords/`, `labels/` …, each with one `.npy` or `.h5` file per bag.

- torchmil builds graphs of neighbours at distance 1.5, so `coords` are places on a grid. Datasets of pixels exist, too: their class
  divides by the side of a tile. Which of the two a file holds shows in the distance of its tiles: 1 is a grid.
- Of a grid, pixels are known only with the side of a tile, and only up to where the grid begins.
- Written: features in float32 (torchmil's models take nothing else), grid coordinates that are not to be divided again, and beside
  them what torchmil does not look at, `coords_level0_px/` and `attributes/`, from which our bags come back exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wsimil.bags.bag import Bag, BagHeader, Rows
from wsimil.bags.interop.layout import (
    Known,
    attributes_of_ours,
    exportable,
    hdf5_part,
    header_of,
    in_file,
    inferred_side,
    integer_coords,
    load_array,
    no_coords,
    rows_of_array,
    rows_of_file,
    spacing_of,
)
from wsimil.errors import BagFormatError
from wsimil.files import atomic_path, write_json
from wsimil.hdf5 import open_hdf5, plain_attributes, read_array, stored_rows

__all__ = ["TorchMIL"]

_OURS, _ATTRIBUTES = "coords_level0_px", "attributes"


class TorchMIL:
    name = "torchmil"

    def find(self, folder: Path) -> dict[str, Path]:
        root = folder.parent if folder.name == "features" else folder
        if not any((root / part).is_dir() for part in ("coords", "labels", _ATTRIBUTES)):
            return {}
        paths = [path for path in sorted((root / "features").glob("*")) if path.suffix in (".npy", ".h5")]
        return {path.stem: path for path in paths if not path.name.startswith(".")}

    def header(self, path: Path, slide_id: str, known: Known) -> BagHeader:
        root = path.parents[1]
        ours = _attributes(root / _ATTRIBUTES / f"{path.stem}.json")
        features, stated = _features(path)
        side = ours.get("tile_level0_px") or known.tile_level0_px
        mpp = known.mpp_of(slide_id)
        attributes: dict[str, Any] = {"slide_id": slide_id, "encoder": stated.get("encoder") or known.encoder, "mpp": mpp}
        attributes |= {"mpp_source": "option" if mpp else None, "tile_level0_px": side} | ours
        exact, stored = root / _OURS / f"{path.stem}.npy", root / "coords" / path.name
        remarks: tuple[str, ...] = ()
        if exact.is_file():
            coords = integer_coords(_table(exact))
        elif stored.is_file():
            coords = _table(stored)[:, :2]
            spacing = spacing_of(coords)
            if spacing == 1 and side:
                coords = coords * side
                remarks = ("coordinates are places on a grid: pixels count from where it begins, not from the slide's corner",)
            elif spacing == 1:
                attributes["coords_unit"] = "tile"
                remarks = ("coordinates are places on a grid of unknown width (`wsimil convert --tile-level0-px`)",)
            elif side is None and spacing:
                attributes["tile_level0_px"] = float(spacing)
                remarks = (inferred_side(spacing),)
            coords = integer_coords(coords)
        else:
            coords, attributes["coords_unit"] = no_coords(path, features.shape[0]).read(), "none"
            remarks = ("there is no file of coordinates: positions and heatmaps are not possible",)
        return header_of(path, features, rows_of_array(path, coords), attributes, remarks=remarks)

    def write(self, out: Path, bag: Bag) -> list[str]:
        features, coords, attributes = exportable(bag)
        name, remarks = attributes["slide_id"], []
        parts = {"features": features.astype(np.float32)}
        if attributes.get("coords_unit") == "none":
            remarks.append("no coordinates are written, for positions are not known")
        elif (step := _step(attributes, coords)) is None:
            remarks.append("no coordinates are written: neither the side nor the distance of tiles is known")
        else:
            parts[_OURS] = coords
            grid = np.rint((coords - coords.min(0, initial=2**62)) / step).astype(np.int64)
            parts["coords"] = grid
            if shared := len(grid) - len(np.unique(grid, axis=0)):
                remarks.append(f"{shared} of {len(grid)} tiles share a place with another: they lie on no common grid")
        write_json(out / _ATTRIBUTES / f"{name}.json", attributes)
        for part in (_OURS, "coords", "features"):  # features last: by them a bag is found
            if part in parts:
                with atomic_path(out / part / f"{name}.npy") as temporary:
                    np.save(temporary, parts[part], allow_pickle=False)
        return remarks

    def files(self, out: Path, stated: Mapping[str, Any]) -> list[Path]:
        slide_id = stated["slide_id"]
        return [out / "features" / f"{slide_id}.npy", out / _ATTRIBUTES / f"{slide_id}.json"]


def _step(attributes: dict[str, Any], coords: np.ndarray) -> float | None:
    """Distance of neighbouring tiles, level-0 px."""
    side, tile_px, overlap = (attributes.get(name) for name in ("tile_level0_px", "tile_px", "overlap_px"))
    if side and overlap and tile_px:
        return side * (1 - overlap / tile_px)
    return side or spacing_of(coords)


def _features(path: Path) -> tuple[Rows, dict[str, Any]]:
    if path.suffix == ".npy":
        return rows_of_file(path), {}
    with open_hdf5(path) as file:
        part = hdf5_part(path, file, "features")
        return stored_rows(part), plain_attributes(part)


def _table(path: Path) -> np.ndarray:
    """Coordinates (N, 2 or more)."""
    if path.suffix == ".npy":
        found = load_array(path)
    else:
        with open_hdf5(path) as file:
            found = read_array(hdf5_part(path, file, "coords"))
    if found.ndim != 2 or found.shape[1] < 2 or found.dtype.kind not in "fiu":
        raise BagFormatError(f"{path}: {found.shape} of {found.dtype} in it, not coordinates (N, 2)")
    return np.asarray(found)


def _attributes(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with in_file(path):
        return attributes_of_ours(json.loads(path.read_text(encoding="utf-8")))

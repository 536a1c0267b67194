"""STAMP: one HDF5 file per slide with `feats`, and `coords` in micrometres.

- Pixels follow from the slide's µm/px, which STAMP does not store (`tile_size_um / tile_size_px` is the scale of the tile). Where
  it is not known, positions stay exact micrometres (`coords_unit` um): enough for models and heatmaps, not for other layouts.
- Three generations are read: `tile_size_um`; `tile_size` with unit `um`; and the oldest, in units of 256 µm / 224 px.
- Features of whole slides or patients (`feat_type`) are no bags.
- Written: features as they are stored, float32 coordinates (to 1/100 px on any slide), and what STAMP's reader asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wsimil.bags.bag import Bag, BagHeader
from wsimil.bags.interop.layout import Known, attributes_of_ours, exportable, hdf5_part, header_of, rows_of_array, spacing_of
from wsimil.errors import BagFormatError
from wsimil.hdf5 import Dataset, open_hdf5, plain_attributes, read_array, stored_rows, write_hdf5

__all__ = ["Stamp"]

_HISTORIC_PX, _HISTORIC_UM = 224, 256.0


class Stamp:
    name = "stamp"

    def find(self, folder: Path) -> dict[str, Path]:
        names = sorted(path.relative_to(folder) for path in folder.rglob("*.h5"))
        paths = [folder / name for name in names if not any(part.startswith(".") for part in name.parts)]
        if not paths or not any(_has_feats(path) for path in paths[:3]):
            return {}
        return {"__".join(path.relative_to(folder).with_suffix("").parts): path for path in paths}

    def header(self, path: Path, slide_id: str, known: Known) -> BagHeader:
        with open_hdf5(path) as file:
            stated = plain_attributes(file)
            if stated.get("feat_type") not in (None, "tile"):
                raise BagFormatError(f"{path}: features of a {stated['feat_type']}, not of its tiles; give the folder of those")
            features = stored_rows(hdf5_part(path, file, "feats"))
            coords = read_array(hdf5_part(path, file, "coords"))
        tile_um, tile_px, coords_um = _scale(path, stated, coords)
        ours = attributes_of_ours(stated)
        mpp = ours.get("mpp") or known.mpp_of(slide_id)
        attributes: dict[str, Any] = {"slide_id": slide_id, "encoder": stated.get("extractor") or known.encoder}
        attributes |= {"tile_px": tile_px, "effective_mpp": tile_um / tile_px if tile_px else None}
        remarks: tuple[str, ...] = ()
        if mpp:
            placed = np.rint(coords_um / mpp).astype(np.int64)
            said = {} if "mpp" in ours else {"mpp_source": "option"}
            attributes |= {"mpp": mpp, "tile_level0_px": tile_um / mpp} | said | ours
        else:
            placed = coords_um
            attributes |= {"coords_unit": "um", "mpp": 1.0, "tile_level0_px": tile_um}
            remarks = (
                "positions are in µm, for STAMP does not store the slide's µm/px (`wsimil convert --slides` or `--slide-mpp`)",
            )
        return header_of(path, features, rows_of_array(path, placed), attributes, remarks=remarks)

    def write(self, out: Path, bag: Bag) -> list[str]:
        features, coords, attributes = exportable(bag)
        missing = [name for name in ("mpp", "tile_level0_px") if not attributes.get(name)]
        if missing or attributes.get("coords_unit") == "none":
            raise BagFormatError(
                f"{attributes['slide_id']}: STAMP wants positions in µm, and {' and '.join(missing) or 'they are'} not known; "
                "pass --slide-mpp or --slides, and --tile-level0-px"
            )
        side_um = attributes["tile_level0_px"] * attributes["mpp"]
        stated = {"extractor": attributes.get("encoder", "unknown"), "unit": "um", "tile_size_um": side_um, "feat_type": "tile"}
        if "tile_px" in attributes:
            stated["tile_size_px"] = attributes["tile_px"]
        coords_um = (coords * attributes["mpp"]).astype(np.float32)
        # `encoder` would make STAMP take the file for features of a slide
        kept = {name: value for name, value in attributes.items() if name != "encoder"}
        parts = {"feats": Dataset(features), "coords": Dataset(coords_um)}
        write_hdf5(out / f"{attributes['slide_id']}.h5", parts, kept | stated, free_text=True)
        return []

    def files(self, out: Path, stated: Mapping[str, Any]) -> list[Path]:
        slide_id = stated["slide_id"]
        return [out / f"{slide_id}.h5"]


def _has_feats(path: Path) -> bool:
    try:
        with open_hdf5(path) as file:
            return "feats" in file
    except (BagFormatError, OSError):
        return False


def _scale(path: Path, stated: dict[str, Any], coords: np.ndarray) -> tuple[float, int | None, np.ndarray]:
    """Side of a tile in µm and in pixels as seen, and coordinates in µm (N, 2)."""
    wide = coords.astype(np.float64)
    tile_px = int(stated["tile_size_px"]) if stated.get("tile_size_px") else None
    if stated.get("tile_size_um"):
        return float(stated["tile_size_um"]), tile_px, wide
    if stated.get("tile_size") and stated.get("unit") == "um":
        return float(stated["tile_size"]), tile_px, wide
    if round(float(stated.get("tile_size", spacing_of(coords) or 0))) == _HISTORIC_PX:
        return _HISTORIC_UM, _HISTORIC_PX, wide * (_HISTORIC_UM / _HISTORIC_PX)
    raise BagFormatError(f"{path}: neither tile_size_um nor another sign of the unit of its coordinates; extract the slide again")

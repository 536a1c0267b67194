"""slide2vec on hs2p's tiles: `<id>.pt` or `<id>.npz` and `<id>.meta.json`; `<id>.coordinates.npz` and its own `.meta.json`.

- Coordinates are looked for beside the features, in sibling folders, and where the features' sidecar says they were.
- hs2p states the slide's µm/px and size and the side of a tile: nothing is inferred. Its tissue fractions become `qc/tissue`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from wsimil.bags.bag import BagHeader
from wsimil.bags.interop.layout import Known, header_of, in_file, load_array, no_coords, rows_of_array, rows_of_file
from wsimil.errors import BagFormatError

__all__ = ["Slide2Vec"]

_COORDINATES = ".coordinates.npz"


class Slide2Vec:
    name = "slide2vec"

    def find(self, folder: Path) -> dict[str, Path]:
        for place in (folder / "tile_embeddings", folder):
            found = {}
            for sidecar in sorted(place.glob("*.meta.json")):
                slide_id = sidecar.name.removesuffix(".meta.json")
                if slide_id.startswith(".") or slide_id.endswith(".coordinates"):
                    continue
                path = next((file for suffix in ("pt", "npz") if (file := place / f"{slide_id}.{suffix}").is_file()), None)
                # a sidecar alone is a slide that was not finished: it has to be seen, not passed over
                found[slide_id] = path or place / f"{slide_id}.pt"
            if found:
                return found
        return {}

    def header(self, path: Path, slide_id: str, known: Known) -> BagHeader:
        stated = _json(path.with_name(f"{slide_id}.meta.json"))
        if stated.get("artifact_type", "tile_embeddings") != "tile_embeddings":
            raise BagFormatError(f"{path}: {stated['artifact_type']}, not tile_embeddings; give the folder of those")
        if not path.is_file():
            raise BagFormatError(f"{path}: its sidecar is there, the features are not; extract the slide again")
        features = rows_of_file(path, "features")
        n_tiles = stated.get("num_tiles", features.shape[0])
        if n_tiles != features.shape[0]:
            raise BagFormatError(f"{path}: {features.shape[0]} rows, but its sidecar says {n_tiles}; extract the slide again")
        attributes: dict[str, Any] = {"slide_id": slide_id, "encoder": stated.get("encoder_name") or known.encoder}
        attributes |= {"tile_px": stated.get("requested_tile_size_px"), "target_mpp": stated.get("requested_spacing_um")}
        side = stated.get("tile_size_lv0")
        attributes |= {"tile_level0_px": float(side) if side else known.tile_level0_px, "mpp": known.mpp_of(slide_id)}
        attributes["mpp_source"] = "option" if attributes["mpp"] else None
        file = _coordinates(path, slide_id, stated)
        if file is None:
            remark = f"<id>{_COORDINATES} was not found beside the features: positions and heatmaps are not possible"
            coords = no_coords(path, features.shape[0])
            return header_of(path, features, coords, attributes | {"coords_unit": "none"}, remarks=(remark,))
        sidecar = file.with_name(f"{slide_id}.coordinates.meta.json")
        attributes |= _geometry(_json(sidecar)) if sidecar.is_file() else {}
        coords = np.stack([load_array(file, "x"), load_array(file, "y")], 1).astype(np.int64)
        if path.suffix == ".npz" and len(coords) == features.shape[0]:
            coords = coords[_order(path, len(coords))]
        return header_of(
            path, features, rows_of_array(path, coords), attributes, scores=partial(_scores, file, path, features.shape[0])
        )


def _json(path: Path) -> dict[str, Any]:
    with in_file(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise BagFormatError(f"{path}: no JSON object")
        return found


def _coordinates(path: Path, slide_id: str, stated: dict[str, Any]) -> Path | None:
    name = f"{slide_id}{_COORDINATES}"
    said = Path(str(stated.get("coordinates_npz_path") or name))
    places = [path.parent, *(folder for folder in sorted(path.parents[1].iterdir()) if folder.is_dir())]
    return next((file for file in (*(place / name for place in places), said) if file.is_file()), None)


def _order(path: Path, n_tiles: int) -> np.ndarray:
    """Which tile each row of features is of."""
    with in_file(path), np.load(path, allow_pickle=False) as content:
        order = content["tile_index"] if "tile_index" in content else np.arange(n_tiles)
    if sorted(order.tolist()) != list(range(n_tiles)):
        raise BagFormatError(f"{path}: tile_index does not number its {n_tiles} tiles; extract the slide again")
    return order


def _geometry(content: dict[str, Any]) -> dict[str, Any]:
    """What hs2p says of the slide and its tiles, under our names."""
    slide, tiling = content.get("slide", {}), content.get("tiling", {})
    found: dict[str, Any] = {}
    if slide.get("base_spacing_um"):
        found |= {"mpp": float(slide["base_spacing_um"]), "mpp_source": "hs2p"}
    if slide.get("dimensions"):
        found["level0_width"], found["level0_height"] = (int(side) for side in slide["dimensions"])
    if tiling.get("tile_size_lv0"):
        found["tile_level0_px"] = float(tiling["tile_size_lv0"])
    for name, key in (("tile_px", "requested_tile_size_px"), ("target_mpp", "requested_spacing_um")):
        if tiling.get(key):
            found[name] = tiling[key]
    if tiling.get("overlap") is not None and "tile_px" in found:
        found["overlap_px"] = round(float(tiling["overlap"]) * found["tile_px"])  # a share of the side
    return found


def _scores(coordinates: Path, path: Path, n_tiles: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    tissue = load_array(coordinates, "tissue_fractions").astype(np.float32)
    order = _order(path, n_tiles) if path.suffix == ".npz" else np.arange(n_tiles)
    return np.ones(n_tiles, bool), {"tissue": tissue[order]}

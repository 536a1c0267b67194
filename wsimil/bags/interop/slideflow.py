"""slideflow: `<slide>.pt` with `<slide>.index.npz` and one `bags_config.json`.

- Positions are centres of tiles in level-0 pixels; ours are corners, so half a tile is subtracted as slideflow added it.
- A tile is `tile_um` wide; in level-0 pixels that is `int(tile_um / µm/px)`. Where the µm/px is not known, the distance of tiles
  stands for their side, and the µm/px follows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wsimil.bags.bag import BagHeader
from wsimil.bags.interop.layout import (
    Known,
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

__all__ = ["Slideflow"]


class Slideflow:
    name = "slideflow"

    def find(self, folder: Path) -> dict[str, Path]:
        paths = sorted(path for path in folder.glob("*.pt") if not path.name.startswith("."))
        mark = (folder / "bags_config.json").is_file() or any(map(_index, paths[:3]))
        return {path.stem: path for path in paths} if mark else {}

    def header(self, path: Path, slide_id: str, known: Known) -> BagHeader:
        features, config = rows_of_file(path), _config(path.parent / "bags_config.json")
        extractor = config.get("extractor")
        encoder = str(extractor.get("class", "")).split(".")[-1] if isinstance(extractor, dict) else ""
        tile_px, tile_um = config.get("tile_px"), config.get("tile_um")
        tile_um = float(tile_um) if isinstance(tile_um, int | float) else None  # a text is a magnification
        mpp, side = known.mpp_of(slide_id), known.tile_level0_px
        attributes: dict[str, Any] = {"slide_id": slide_id, "encoder": encoder or known.encoder, "tile_px": tile_px, "mpp": mpp}
        attributes["mpp_source"] = "option" if mpp else None
        attributes["effective_mpp"] = tile_um / tile_px if tile_um and tile_px else None
        index = _index(path)
        if index is None:
            remark = "<slide>.index.npz is not there: positions and heatmaps are not possible"
            placed = no_coords(path, features.shape[0])
            return header_of(path, features, placed, attributes | {"coords_unit": "none"}, remarks=(remark,))
        centres = load_array(index, "arr_0")
        if centres.ndim != 2 or centres.shape[1] != 2:
            raise BagFormatError(f"{index}: {centres.shape} in it, not positions (N, 2); export the bags again")
        centres = integer_coords(centres)
        remarks: tuple[str, ...] = ()
        if side is None and tile_um and mpp:
            side = int(tile_um / mpp)
        elif side is None and (side := spacing_of(centres)):
            remarks = (inferred_side(side),)
        if not mpp and tile_um and side:
            attributes |= {"mpp": tile_um / side, "mpp_source": "slideflow"}
        if side is None:
            attributes["coords_unit"] = "none"
            placed = no_coords(path, features.shape[0])
        else:
            attributes["tile_level0_px"] = float(side)
            placed = rows_of_array(path, centres - int(side / 2))
        return header_of(path, features, placed, attributes, remarks=remarks)


def _index(path: Path) -> Path | None:
    return next((file for suffix in ("npz", "npy") if (file := path.with_name(f"{path.stem}.index.{suffix}")).is_file()), None)


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with in_file(path):
        found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}

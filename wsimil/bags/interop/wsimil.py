"""Ours, and TRIDENT's HDF5 bags: `features_<encoder>/<id>.h5`; see `wsimil.bags.bag` for what stands in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsimil.bags.bag import Bag, BagHeader, Geometry, read_header, write_bag
from wsimil.bags.dataset import find_features_folder
from wsimil.bags.interop.layout import Known, unknowns_of

__all__ = ["Wsimil"]


class Wsimil:
    name = "wsimil"

    def find(self, folder: Path) -> dict[str, Path]:
        found = find_features_folder(folder)
        return {path.stem: path for path in sorted(found.glob("*.h5")) if not path.name.startswith(".")}

    def header(self, path: Path, slide_id: str, known: Known) -> BagHeader:
        header = read_header(path)
        said = dict(header.attributes)
        if "mpp" not in said and (mpp := known.mpp_of(header.slide_id)):
            said |= {"mpp": mpp, "mpp_source": "option"}
        if "tile_level0_px" not in said and known.tile_level0_px:
            said["tile_level0_px"] = known.tile_level0_px
        if said.get("encoder", "unknown") == "unknown" and known.encoder:
            said["encoder"] = known.encoder
        if "effective_mpp" not in said and all(said.get(name) for name in ("mpp", "tile_level0_px", "tile_px")):
            said["effective_mpp"] = said["mpp"] * said["tile_level0_px"] / said["tile_px"]
        return replace(header, attributes=said, remarks=unknowns_of(said))

    def write(self, out: Path, bag: Bag) -> list[str]:
        stated = bag.attributes
        geometry = Geometry(
            *(stated.get(name) for name in ("tile_px", "tile_level0_px", "overlap_px", "level0_width", "level0_height", "mpp")),
            target_mpp=stated.get("target_mpp", stated.get("effective_mpp")),
            name=str(stated["slide_id"]),
        )
        write_bag(self.files(out, stated)[0], bag, geometry)
        return []

    def files(self, out: Path, stated: Mapping[str, Any]) -> list[Path]:
        encoder = re.sub(r"[^\w.=@+-]", "-", str(stated.get("encoder", "unknown")))  # may be a path or an address
        return [out / f"features_{encoder}" / f"{stated['slide_id']}.h5"]

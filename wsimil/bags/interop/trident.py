"""TRIDENT with features saved as tensors: `features_<encoder>/<id>.pt`, coordinates in `patches/<id>_patches.h5`.

Its HDF5 bags need no layout of their own: `wsimil.bags.bag` reads them as it reads ours.
"""

from __future__ import annotations

from pathlib import Path

from wsimil.bags.bag import BagHeader, trident_geometry
from wsimil.bags.interop.layout import Known, hdf5_part, header_of, integer_coords, no_coords, rows_of_array, rows_of_file
from wsimil.errors import UsageError
from wsimil.hdf5 import open_hdf5, plain_attributes, read_array

__all__ = ["TridentTensors"]


class TridentTensors:
    name = "trident"

    def find(self, folder: Path) -> dict[str, Path]:
        inside = [folder] if folder.name.startswith("features_") else [*folder.glob("features_*"), *folder.glob("*/features_*")]
        places = [place for place in inside if any(place.glob("*.pt")) and not any(place.glob("*.h5"))]
        if len(places) > 1:
            names = ", ".join(str(place.relative_to(folder)) for place in sorted(places))
            raise UsageError(f"{folder}: several folders of bags ({names}); give one of them")
        return {path.stem: path for place in places for path in sorted(place.glob("*.pt")) if not path.name.startswith(".")}

    def header(self, path: Path, slide_id: str, known: Known) -> BagHeader:
        features = rows_of_file(path)
        mpp = known.mpp_of(slide_id)
        attributes = {"slide_id": slide_id, "encoder": path.parent.name.removeprefix("features_"), "mpp": mpp}
        attributes |= {"mpp_source": "option" if mpp else None, "tile_level0_px": known.tile_level0_px}
        patches = path.parents[1] / "patches" / f"{path.stem}_patches.h5"
        if not patches.is_file():
            remark = "patches/<id>_patches.h5 is not there: positions and heatmaps are not possible"
            placed = no_coords(path, features.shape[0])
            return header_of(path, features, placed, attributes | {"coords_unit": "none"}, remarks=(remark,))
        with open_hdf5(patches) as file:
            part = hdf5_part(patches, file, "coords")
            coords = rows_of_array(path, integer_coords(read_array(part)))
            attributes |= trident_geometry(plain_attributes(part))
        return header_of(path, features, coords, attributes)

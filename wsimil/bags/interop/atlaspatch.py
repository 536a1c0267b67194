"""AtlasPatch: one HDF5 file per slide, `coords` (x, y, width, height, level) and a group `features` with a dataset per encoder.

- x and y are level-0 pixels; width, height and level say how a tile was read, `patch_size_level0` how large it is.
- A file of several encoders is several bags: which one has to be said.
"""

from __future__ import annotations

from pathlib import Path

from wsimil.bags.bag import BagHeader
from wsimil.bags.interop.layout import Known, hdf5_part, header_of, integer_coords, rows_of_array
from wsimil.errors import BagFormatError, UsageError
from wsimil.hdf5 import open_hdf5, plain_attributes, read_array, stored_rows

__all__ = ["AtlasPatch"]


class AtlasPatch:
    name = "atlaspatch"

    def find(self, folder: Path) -> dict[str, Path]:
        for place in (folder, folder / "patches"):
            paths = sorted(path for path in place.glob("*.h5") if not path.name.startswith("."))
            if paths and any(map(_is_one, paths[:3])):
                return {path.stem: path for path in paths}
        return {}

    def header(self, path: Path, slide_id: str, known: Known) -> BagHeader:
        with open_hdf5(path) as file:
            stated = plain_attributes(file)
            group = file.get("features")
            names = sorted(group) if group is not None else []
            encoder = known.encoder or (names[0] if len(names) == 1 else None)
            if encoder is None and names:
                raise UsageError(f"{path}: features of several encoders ({', '.join(names)}); `wsimil convert --encoder` takes one")
            if encoder not in names:
                raise BagFormatError(f"{path}: no features of {encoder or 'any encoder'} (it has {', '.join(names) or 'none'})")
            features = stored_rows(hdf5_part(path, file, f"features/{encoder}"))
            coords = integer_coords(read_array(hdf5_part(path, file, "coords"))[:, :2])
        mpp = stated.get("mpp") if isinstance(stated.get("mpp"), float | int) else None
        side = stated.get("patch_size_level0")
        attributes = {
            "slide_id": slide_id,
            "encoder": encoder,
            "mpp": mpp or known.mpp_of(slide_id),
            "mpp_source": "atlaspatch" if mpp else "option" if known.mpp_of(slide_id) else None,
            "tile_px": stated.get("patch_size"),
            "tile_level0_px": known.tile_level0_px if side is None else float(side),
            "overlap_px": stated.get("overlap"),
            "level0_magnification": stated.get("level0_magnification") or None,
            "target_magnification": stated.get("target_magnification"),
            "level0_width": stated.get("level0_width"),
            "level0_height": stated.get("level0_height"),
        }
        return header_of(path, features, rows_of_array(path, coords), attributes)


def _is_one(path: Path) -> bool:
    try:
        with open_hdf5(path) as file:
            return hasattr(file.get("features"), "keys") and "coords" in file and file["coords"].shape[1:] == (5,)
    except (BagFormatError, OSError):
        return False

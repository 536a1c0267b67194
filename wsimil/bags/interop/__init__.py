"""Bags as other programs lay them out: read in place, for training and prediction too, and converted both ways.

- One module and one class per layout. `find` says which files of a folder are bags, `header` opens one, `write` makes one.
- A folder of ours or of TRIDENT's is no business of this package: `wsimil.bags.bag` reads those.
"""

from __future__ import annotations

from pathlib import Path

from wsimil.bags.interop.atlaspatch import AtlasPatch
from wsimil.bags.interop.clam import Clam
from wsimil.bags.interop.layout import Known, Layout
from wsimil.bags.interop.slide2vec import Slide2Vec
from wsimil.bags.interop.slideflow import Slideflow
from wsimil.bags.interop.stamp import Stamp
from wsimil.bags.interop.torchmil import TorchMIL
from wsimil.bags.interop.trident import TridentTensors
from wsimil.errors import BagFormatError
from wsimil.hdf5 import read_attributes

__all__ = ["LAYOUTS", "Known", "Layout", "find_foreign"]

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (Clam(), TorchMIL(), Slide2Vec(), TridentTensors(), Slideflow(), AtlasPatch(), Stamp())  # the vaguest last
}
"""Layouts of other programs, in the order in which a folder is compared with them."""


def find_foreign(folder: Path) -> tuple[Layout, dict[str, Path]] | None:
    """The layout of a folder and its bags by slide id; None where it holds bags of ours or TRIDENT's, or none at all."""
    folder = folder.absolute()
    if not folder.is_dir() or _is_ours(folder):
        return None
    for layout in LAYOUTS.values():
        if found := layout.find(folder):
            return layout, found
    return None


def _is_ours(folder: Path) -> bool:
    """Whether the first bag here or in a `features_*` folder says so; a folder of many is not searched."""
    below = next((path for pattern in ("features_*/*.h5", "*/features_*/*.h5") for path in folder.glob(pattern)), None)
    first = next((path for path in sorted(folder.glob("*.h5")) if not path.name.startswith(".")), None)
    if first is None:
        return below is not None
    try:
        return read_attributes(first).get("format") == "wsimil-bag"
    except (BagFormatError, OSError):
        return False

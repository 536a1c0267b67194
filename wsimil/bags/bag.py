"""The bag: one HDF5 file per slide and encoder, TRIDENT's layout with what it lacks.

- `features` is contiguous and uncompressed: the file that is exchanged is the file that is trained from.
- Rows whose pixels could not be read are zeros with `valid` false; readers leave them out.
- A file of ours counts only when `complete` is set; any file only when its parts agree and are all there.
- A file without our root attributes is read as TRIDENT's: what it says stands on its datasets, its id is the file name.
- `patches/<slide_id>_patches.h5` holds the same coordinates for readers that look for them there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from wsimil.errors import BagFormatError
from wsimil.files import is_file_name
from wsimil.hdf5 import Allocate, Dataset, is_whole, open_hdf5, plain_attributes, read_array, stored_rows, write_hdf5
from wsimil.units import nominal_magnification

__all__ = [
    "FORMAT_VERSION",
    "SCALE_UNKNOWN",
    "SEEN_IN_PRETRAINING",
    "Bag",
    "BagHeader",
    "Geometry",
    "Rows",
    "check_bag",
    "describe_encoder",
    "read_bag",
    "read_header",
    "read_patches",
    "read_scores",
    "stored_features",
    "trident_geometry",
    "write_bag",
    "write_patches",
]

FORMAT_VERSION = 1

_TRIDENT_COORDS = {
    "patch_size": "tile_px",
    "patch_size_level0": "tile_level0_px",
    "overlap": "overlap_px",
    "level0_magnification": "level0_magnification",
    "target_magnification": "target_magnification",
    "level0_width": "level0_width",
    "level0_height": "level0_height",
}
"""TRIDENT's attribute of `coords` → ours of the root."""

SEEN_IN_PRETRAINING = "their encoder was pretrained on these slides, test slides included (--transductive)"
SCALE_UNKNOWN = "the slide's µm/px is not stated, so models see no positions (`wsimil convert --slide-mpp` or `--slides`)"
"""Remark on bags of other programs."""

_KINDS = {"features": "f", "coords": "iuf", "valid": "biu"}
"""Kinds of number that a part may hold; scores are floats."""


@dataclass(frozen=True)
class Geometry:
    """What a reader needs to put tiles back on the slide: TRIDENT's attributes of `coords`; None: not known."""

    tile_px: int | None
    tile_level0_px: float | None
    overlap_px: int | None
    level0_width: int | None
    level0_height: int | None
    slide_mpp: float | None
    target_mpp: float | None
    name: str

    def attributes(self) -> dict[str, Any]:
        return {
            "patch_size": self.tile_px,
            # TRIDENT's readers want an integer; the root is exact
            "patch_size_level0": None if self.tile_level0_px is None else round(self.tile_level0_px),
            "level0_magnification": None if self.slide_mpp is None else nominal_magnification(self.slide_mpp),
            "target_magnification": None if self.target_mpp is None else nominal_magnification(self.target_mpp),
            "overlap": self.overlap_px,
            "name": self.name,
            "savetodir": "",
            "level0_width": self.level0_width,
            "level0_height": self.level0_height,
        }


@dataclass(frozen=True)
class Bag:
    """A slide as instances."""

    features: np.ndarray  # (N, D)
    coords_level0_px: np.ndarray  # (N, 2) int64, x, y of the top-left corner
    valid: np.ndarray  # (N,) bool
    qc: Mapping[str, np.ndarray] = field(default_factory=dict)  # (N,) float32 each
    attributes: Mapping[str, Any] = field(default_factory=dict)  # of the file's root


class Rows(Protocol):
    """Rows of a file (N, D), unread: `wsimil.hdf5.StoredRows`, or those of another program's file."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def nbytes(self) -> int: ...
    def read(self, rows: np.ndarray | None = None, *, allocate: Allocate = ...) -> np.ndarray: ...
    def read_checked(self) -> np.ndarray: ...


@dataclass(frozen=True)
class BagHeader:
    """What a bag says of itself, its rows unread but ready to be: `header.features.read()`."""

    path: Path
    n_tiles: int
    dim: int
    attributes: Mapping[str, Any]
    features: Rows  # (N, D)
    coords_level0_px: Rows  # (N, 2), of any number type
    foreign_scores: Callable[[], tuple[np.ndarray, dict[str, np.ndarray]]] | None = None  # of a layout that is not ours
    remarks: tuple[str, ...] = ()  # what had to be assumed to read it

    @property
    def slide_id(self) -> str:
        slide_id = str(self.attributes.get("slide_id") or self.path.stem)
        if not is_file_name(slide_id):  # files of other names are made of it
            raise BagFormatError(f"{self.path}: its slide_id {slide_id!r} cannot be a file name")
        return slide_id

    def scores(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """valid (N,) bool and qc {name: (N,)}, features unread. Raises BagFormatError as `read_header` does."""
        return read_scores(self.path) if self.foreign_scores is None else self.foreign_scores()

    def coords(self) -> np.ndarray:
        """Top-left corners (N, 2): whole level-0 pixels, but for layouts that have only micrometres (`coords_unit` um)."""
        found = self.coords_level0_px.read_checked()
        return found if self.attributes.get("coords_unit") == "um" else found.astype(np.int64, copy=False)

    @property
    def encoder(self) -> tuple[str, str]:
        """Name and SHA-256 of the weights: bags are mixed only if both agree."""
        return str(self.attributes.get("encoder", "unknown")), str(self.attributes.get("encoder_sha256", ""))


def describe_encoder(encoder: tuple[str, str]) -> str:
    """An encoder's name and weights, for people."""
    name, sha256 = encoder
    if name == "unknown" and not sha256:
        return "an encoder that is not stated"
    return f"{name} ({sha256[:8]})" if sha256 else name


def stored_features(features: np.ndarray, dtype: str) -> np.ndarray:
    """Features as they are stored: fp16 unless a value overflows it (then float32), or float32 on request."""
    wide = np.asarray(features, dtype=np.float32)
    if dtype == "fp32" or (wide.size and max(wide.max(), -wide.min()) > np.finfo(np.float16).max):
        return wide
    return wide.astype(np.float16)


def write_bag(path: Path, bag: Bag, geometry: Geometry) -> None:
    """Write a bag atomically. An empty bag has features (0, D)."""
    valid = bag.valid.astype(bool)
    _check_parts(path, {"features": bag.features, "coords": bag.coords_level0_px, "valid": valid, **_qc_parts(bag.qc)})
    encoder = bag.attributes.get("encoder", "")
    write_hdf5(
        path,
        {
            "features": Dataset(bag.features, {"name": geometry.name, "savetodir": "", "encoder": encoder}),
            "coords": Dataset(bag.coords_level0_px.astype(np.int64), geometry.attributes()),
            "valid": Dataset(valid),
            **{name: Dataset(values.astype(np.float32)) for name, values in _qc_parts(bag.qc).items()},
        },
        {**bag.attributes, "format": "wsimil-bag", "format_version": FORMAT_VERSION, "n_invalid": int((~valid).sum())},
    )


def read_header(path: Path) -> BagHeader:
    """Shapes and attributes, parts checked against each other.

    Raises:
        BagFormatError: not HDF5, unfinished, of a newer format, or parts that are missing or do not fit.
    """
    with open_hdf5(path) as file:
        return _header(Path(path), file)


def check_bag(path: Path) -> BagHeader:
    """As `read_header`; all but the features, which are too much to read for that, is compared with its checksums, too."""
    with open_hdf5(path) as file:
        header = _header(Path(path), file)
        _scores(header, file)
        read_array(file["coords"])
        plain_attributes(file["features"])  # whether they can be read, and what they are checked by later
        return header


def read_bag(path: Path) -> Bag:
    """The whole bag. Raises BagFormatError as `read_header` does."""
    with open_hdf5(path) as file:
        header = _header(Path(path), file)
        valid, qc = _scores(header, file)
        return Bag(
            features=read_array(file["features"]),
            coords_level0_px=read_array(file["coords"]).astype(np.int64),
            valid=valid,
            qc=qc,
            attributes=header.attributes,
        )


def read_scores(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """valid (N,) bool and qc {name: (N,)} of a bag, features unread. Raises BagFormatError as `read_header` does."""
    with open_hdf5(path) as file:
        return _scores(_header(Path(path), file), file)


def _scores(header: BagHeader, file: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    valid = read_array(file["valid"]).astype(bool) if "valid" in file else np.ones(header.n_tiles, bool)
    if int((~valid).sum()) != header.attributes["n_invalid"]:
        stated = header.attributes["n_invalid"]
        raise BagFormatError(f"{header.path}: n_invalid is {stated}, but {(~valid).sum()} rows are not valid")
    return valid, {name: read_array(values) for name, values in file["qc"].items()} if "qc" in file else {}


def _header(path: Path, file: Any) -> BagHeader:
    attributes = plain_attributes(file)
    ours = attributes.get("format") == "wsimil-bag"
    if ours:
        _check_finished(path, attributes)
    needed = ("features", "coords", "valid") if ours else ("features", "coords")
    for name in needed:
        if name not in file:
            only = name == "features" and "coords" in file
            what = "coordinates only; `wsimil extract --coords` makes a bag of them" if only else "it is no bag of features"
            raise BagFormatError(f"{path}: no dataset `{name}`; {what}")
    parts = {name: file[name] for name in ("features", "coords", "valid") if name in file}
    cure = "delete it and extract again" if ours else "write it again so"
    _check_parts(path, parts | (_qc_parts(file["qc"]) if "qc" in file else {}), cure=cure)
    if not ours:
        attributes = _trident_attributes(path, file) | attributes
    if "n_invalid" not in attributes:
        attributes["n_invalid"] = int((~read_array(file["valid"]).astype(bool)).sum()) if "valid" in file else 0
    n_tiles, dim = file["features"].shape
    remarks = () if ours or attributes.get("mpp") else (SCALE_UNKNOWN,)
    if attributes.get("encoder_transductive") and attributes.get("encoder_saw_slide"):
        remarks += (SEEN_IN_PRETRAINING,)
    rows = stored_rows(file["features"]), stored_rows(file["coords"])
    return BagHeader(path, n_tiles, dim, attributes, *rows, remarks=remarks)


def _check_finished(path: Path, attributes: Mapping[str, Any]) -> None:
    if not attributes.get("complete"):
        raise BagFormatError(f"{path}: the writer did not finish it; delete it and extract again")
    version = attributes.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise BagFormatError(f"{path}: format version {version}; this wsimil reads up to {FORMAT_VERSION}: upgrade it")


def _trident_attributes(path: Path, file: Any) -> dict[str, Any]:
    """What TRIDENT states on the datasets, under our names."""
    found = trident_geometry(plain_attributes(file["coords"]))
    encoder = plain_attributes(file["features"]).get("encoder", "None")
    folder = path.absolute().parent.name
    if encoder == "None" and folder.startswith("features_"):
        encoder = folder.removeprefix("features_")
    return {**found, "slide_id": path.stem, "encoder": "unknown" if encoder == "None" else encoder}


def trident_geometry(coords: Mapping[str, Any]) -> dict[str, Any]:
    """TRIDENT's attributes of `coords` under our names; it writes a missing value as the text None."""
    stated = {name: coords.get(key, "None") for key, name in _TRIDENT_COORDS.items()}
    found = {name: value for name, value in stated.items() if value != "None"}
    if "tile_level0_px" in found:
        found["tile_level0_px"] = float(found["tile_level0_px"])
    return found


def write_patches(
    path: Path,
    coords_level0_px: np.ndarray,
    qc: Mapping[str, np.ndarray],  # (N,) each, as in a bag
    geometry: Geometry,
    attributes: Mapping[str, Any],
) -> None:
    """Write the coordinates and what is known of the tiles, for other people's readers and for the next encoder."""
    scores = _qc_parts(qc)
    _check_parts(path, {"coords": coords_level0_px, **scores})
    write_hdf5(
        path,
        {
            "coords": Dataset(coords_level0_px.astype(np.int64), geometry.attributes()),
            **{name: Dataset(values.astype(np.float32)) for name, values in scores.items()},
        },
        {**attributes, "format": "wsimil-patches", "format_version": FORMAT_VERSION},
    )


def read_patches(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    """coords (N, 2), qc {name: (N,)}, root attributes of a finished patches file of ours. Raises BagFormatError."""
    with open_hdf5(path) as file:
        attributes = plain_attributes(file)
        if attributes.get("format") != "wsimil-patches":
            raise BagFormatError(f"{path}: no patches file of wsimil's")
        _check_finished(path, attributes)
        if "coords" not in file or "qc" not in file:
            raise BagFormatError(f"{path}: no datasets `coords` and `qc`; delete it and tile again")
        _check_parts(path, {"coords": file["coords"], **_qc_parts(file["qc"])})
        return read_array(file["coords"]), {name: read_array(values) for name, values in file["qc"].items()}, attributes


def _qc_parts(qc: Any) -> dict[str, Any]:
    return {f"qc/{name}": values for name, values in qc.items()}


def _check_parts(path: Path, parts: Mapping[str, Any], *, cure: str = "delete it and extract again") -> None:
    """Arrays or datasets that make a bag: numbers of the right kind, as many rows as the first, every value there."""
    rows = None
    for name, part in parts.items():
        found = getattr(part, "dtype", None)
        if found is None or found.kind not in _KINDS.get(name, "f"):
            raise BagFormatError(f"{path}: {name} is {found or 'a group'}, not numbers of the kind expected")
        rows = part.shape[:1] if rows is None else rows
        expected = (*rows, *{"features": part.shape[1:2] or ("D",), "coords": (2,)}.get(name, ()))
        wrong = ""
        if part.shape != expected:
            named = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
            wrong = f"has shape {part.shape}, expected ({named})"
        elif not isinstance(part, np.ndarray) and not is_whole(part):
            wrong = "is not wholly in the file"
        if wrong:
            raise BagFormatError(f"{path}: {name} {wrong}; {cure}")

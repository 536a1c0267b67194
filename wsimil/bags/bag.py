"""The bag: one HDF5 file per slide and encoder, TRIDENT's layout with what it lacks.

- `features` is contiguous and uncompressed: the file that is exchanged is the file that is trained from.
- Rows whose pixels could not be read are zeros with `valid` false; readers leave them out.
- A file counts only when `complete` is set and its parts agree; an older or foreign file without `complete` is read with its parts checked.
- `patches/<slide_id>_patches.h5` holds the same coordinates for readers that look for them there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wsimil.errors import BagFormatError
from wsimil.hdf5 import Dataset, open_hdf5, read_attributes, write_hdf5

__all__ = ["FORMAT_VERSION", "Bag", "BagHeader", "Geometry", "read_bag", "read_header", "read_patches", "write_bag", "write_patches"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Geometry:
    """What a reader needs to put tiles back on the slide: TRIDENT's attributes of `coords`."""

    tile_px: int
    tile_level0_px: float
    overlap_px: int
    level0_width: int
    level0_height: int
    slide_mpp: float
    target_mpp: float
    name: str

    def attributes(self) -> dict[str, Any]:
        return {
            "patch_size": self.tile_px,
            "patch_size_level0": round(self.tile_level0_px),
            "level0_magnification": max(1, round(10 / self.slide_mpp)),
            "target_magnification": max(1, round(10 / self.target_mpp)),
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


@dataclass(frozen=True)
class BagHeader:
    """What a bag says of itself, features unread."""

    path: Path
    n_tiles: int
    dim: int
    attributes: Mapping[str, Any]

    @property
    def slide_id(self) -> str:
        return str(self.attributes.get("slide_id") or self.path.stem)

    @property
    def encoder(self) -> tuple[str, str]:
        """Name and SHA-256 of the weights: bags are mixed only if both agree."""
        return str(self.attributes.get("encoder", "unknown")), str(self.attributes.get("encoder_sha256", ""))


def stored_features(features: np.ndarray, dtype: str) -> np.ndarray:
    """Features as they are stored: fp16 unless a value overflows it (then float32), or float32 on request."""
    wide = np.asarray(features, dtype=np.float32)
    if dtype == "fp32" or (wide.size and float(np.abs(wide).max()) > np.finfo(np.float16).max):
        return wide
    return wide.astype(np.float16)


def write_bag(path: Path, bag: Bag, geometry: Geometry) -> None:
    """Write a bag atomically. An empty bag has features (0, D)."""
    _check_rows(path, len(bag.features), {"coords": bag.coords_level0_px, "valid": bag.valid, **bag.qc})
    write_hdf5(
        path,
        {
            "features": Dataset(
                bag.features, {"name": geometry.name, "savetodir": "", "encoder": bag.attributes.get("encoder", "")}
            ),
            "coords": Dataset(bag.coords_level0_px.astype(np.int64), geometry.attributes()),
            "valid": Dataset(bag.valid.astype(bool)),
            **{f"qc/{name}": Dataset(values.astype(np.float32)) for name, values in bag.qc.items()},
        },
        {"format": "wsimil-bag", "format_version": FORMAT_VERSION, **bag.attributes, "n_invalid": int((~bag.valid).sum())},
    )


def read_header(path: Path) -> BagHeader:
    """Shapes and attributes, parts checked against each other.

    Raises:
        BagFormatError: not HDF5, unfinished, or parts that do not fit.
    """
    attributes = read_attributes(path)
    with open_hdf5(path) as file:
        if attributes.get("format") == "wsimil-bag" and not attributes.get("complete"):
            raise BagFormatError(f"{path}: the writer did not finish it; delete it and extract again")
        for name in ("features", "coords"):
            if name not in file:
                raise BagFormatError(f"{path}: no dataset `{name}`; it is no bag of features")
        if file["features"].ndim != 2:
            raise BagFormatError(f"{path}: features have shape {file['features'].shape}; expected (N, D)")
        n_tiles, dim = file["features"].shape
        parts = {name: file[name] for name in ("coords", "valid") if name in file}
        _check_rows(path, n_tiles, parts)
        # TRIDENT states the encoder on the dataset
        attributes.setdefault("encoder", _text(file["features"].attrs.get("encoder", "unknown")))
        coords_attributes = file["coords"].attrs
        if "tile_level0_px" not in attributes and "patch_size_level0" in coords_attributes:
            attributes["tile_level0_px"] = float(coords_attributes["patch_size_level0"])
        for name in ("level0_width", "level0_height"):
            if name not in attributes and name in coords_attributes:
                attributes[name] = int(coords_attributes[name])
    return BagHeader(Path(path), n_tiles, dim, attributes)


def read_bag(path: Path) -> Bag:
    """The whole bag. Raises BagFormatError as `read_header` does."""
    header = read_header(path)
    with open_hdf5(path) as file:
        features = np.empty(file["features"].shape, file["features"].dtype)
        if features.size:
            file["features"].read_direct(features)
        return Bag(
            features=features,
            coords_level0_px=file["coords"][:].astype(np.int64),
            valid=file["valid"][:].astype(bool) if "valid" in file else np.ones(header.n_tiles, bool),
            qc={name: values[:] for name, values in file["qc"].items()} if "qc" in file else {},
            attributes=header.attributes,
        )


def write_patches(
    path: Path, coords_level0_px: np.ndarray, tissue: np.ndarray, geometry: Geometry, attributes: Mapping[str, Any]
) -> None:
    """Write the coordinates alone, for other people's readers and for the next encoder."""
    write_hdf5(
        path,
        {
            "coords": Dataset(coords_level0_px.astype(np.int64), geometry.attributes()),
            "qc/tissue": Dataset(tissue.astype(np.float32)),
        },
        {"format": "wsimil-patches", "format_version": FORMAT_VERSION, **attributes},
    )


def read_patches(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """coords (N, 2), tissue (N,), root attributes of a finished patches file of ours."""
    attributes = read_attributes(path)
    if attributes.get("format") != "wsimil-patches" or not attributes.get("complete"):
        raise BagFormatError(f"{path}: no finished patches file of wsimil's")
    with open_hdf5(path) as file:
        return file["coords"][:], file["qc/tissue"][:], attributes


def _check_rows(path: Path, n_tiles: int, parts: Mapping[str, Any]) -> None:
    for name, part in parts.items():
        if part.shape[0] != n_tiles:
            raise BagFormatError(f"{path}: {part.shape[0]} rows of {name} for {n_tiles} of features; delete it and extract again")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

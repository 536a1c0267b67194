"""What every layout is made of: files found in a folder, each opened as the header of a bag, and rows that are read when asked for.

- A layout only says where its files lie and what stands in them; whoever trains, converts or validates works on bag headers.
- Nothing that could run code is read: tensors without pickled objects, arrays without pickles.
- Coordinates are top-left corners in level-0 pixels. Where a layout cannot say those, it says so: `coords_unit` is then `um`
  (exact micrometres, µm/px of the slide unknown), `tile` (places on a grid of unknown width) or `none`.
- What is not known is not there, or was inferred from the distance of tiles; either is a remark that names the way out.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from wsimil.bags.bag import SCALE_UNKNOWN, Bag, BagHeader, Rows
from wsimil.errors import BagFormatError, WsimilError
from wsimil.hdf5 import Allocate, is_whole

__all__ = [
    "Known",
    "Layout",
    "Opened",
    "Writer",
    "attributes_of_ours",
    "exportable",
    "header_of",
    "hdf5_part",
    "in_file",
    "inferred_side",
    "integer_coords",
    "load_array",
    "no_coords",
    "rows_of_array",
    "rows_of_file",
    "spacing_of",
    "unknowns_of",
]

_KEPT = (
    *("slide_id", "slide_fingerprint", "reader", "mpp", "mpp_source", "target_mpp", "effective_mpp", "tile_px", "overlap_px"),
    *("tile_level0_px", "level0_width", "level0_height", "bounds_x", "bounds_y", "resampler", "encoder", "encoder_sha256"),
    *("encoder_source", "encoder_revision", "encoder_mean", "encoder_std", "encoder_mpp", "wsimil_version"),
    *("encoder_saw_slide", "encoder_transductive"),
    *("source_layout", "coords_unit"),
)
"""Attributes of a bag of ours that are written into other layouts, too, and come back from there."""


@dataclass(frozen=True)
class Known:
    """What the user knows of bags whose files do not say it; what a file says itself goes first."""

    slide_mpp: float | None = None
    mpp_by_slide: Mapping[str, float] = field(default_factory=dict)  # of a slide table, or of the slides themselves
    tile_level0_px: float | None = None
    encoder: str | None = None

    def mpp_of(self, slide_id: str) -> float | None:
        return self.mpp_by_slide.get(slide_id, self.slide_mpp)


class Layout(Protocol):
    """How another program lays out bags."""

    @property
    def name(self) -> str: ...

    def find(self, folder: Path) -> dict[str, Path]:
        """Slide id → main file of each bag; none where `folder` is not of this layout. Looks into few files."""
        ...

    def header(self, path: Path, slide_id: str, known: Known) -> BagHeader:
        """A bag, its rows unread. Raises BagFormatError."""
        ...


@dataclass(frozen=True)
class Opened:
    """The rows of a file that cannot be read piece by piece, or that have to be computed."""

    path: Path
    shape: tuple[int, int]
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    stamp: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def read(self, rows: np.ndarray | None = None, *, allocate: Allocate = np.empty) -> np.ndarray:
        """All rows, or those asked for, in memory that `allocate` gives.

        Raises:
            BagFormatError: the file changed since it was found, or broke.
        """
        if _stamp(self.path) != self.stamp:
            raise BagFormatError(f"{self.path}: the file changed while it was in use; start again")
        content = self.load()
        if content.shape != self.shape:
            raise BagFormatError(f"{self.path}: holds {content.shape}, not the {self.shape} it held at first; start again")
        out = allocate((len(content) if rows is None else len(rows), self.shape[1]), self.dtype)
        out[:] = content if rows is None else content[rows]  # a copy: the file may be mapped
        return out

    def read_checked(self) -> np.ndarray:
        """All rows; nothing to compare them with."""
        return self.read()


def _stamp(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


@contextmanager
def in_file(path: Path) -> Iterator[None]:
    """Whatever a damaged file trips over becomes a BagFormatError that names it."""
    try:
        yield
    except (WsimilError, FileNotFoundError, PermissionError):
        raise
    except pickle.UnpicklingError as error:
        raise BagFormatError(
            f"{path}: holds more than tensors, and loading that could run code, so it is not read; save the features as one tensor"
        ) from error
    except MemoryError as error:
        raise BagFormatError(f"{path}: does not fit into memory ({error})") from error
    except Exception as error:  # torch and numpy raise whatever a damaged part happens to trip over
        said = " ".join(str(error).split())[:200]
        raise BagFormatError(f"{path}: not a whole file of its kind ({type(error).__name__}: {said}); make it again") from error


def load_array(path: Path, key: str = "") -> np.ndarray:
    """The array of a `.npy`, `.pt` or `.npz` (by key) file, mapped into memory where that is possible.

    Raises:
        BagFormatError: damaged, no array of that name, or more than tensors.
    """
    with in_file(path):
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as content:
                if key not in content:
                    raise BagFormatError(f"{path}: no array `{key}` in it (it has {', '.join(content.files) or 'none'})")
                return content[key]
        # files of old torch versions are no archives, and those cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(content, torch.Tensor):
            raise BagFormatError(f"{path}: holds a {type(content).__name__}, not one tensor (N, D)")
        content = content.detach()
        # numpy has no bfloat16; float32 holds every value of it
        return (content.float() if content.dtype == torch.bfloat16 else content).numpy()


def rows_of_file(path: Path, key: str = "") -> Opened:
    """The features of a `.npy`, `.pt` or `.npz` file. A leading axis of one is dropped. Raises BagFormatError."""
    load = partial(_load_rows, path, key)
    with in_file(path):
        stamp, content = _stamp(path), load()
    return Opened(path, content.shape, content.dtype, load, stamp)


def _load_rows(path: Path, key: str) -> np.ndarray:
    content = load_array(path, key)
    if content.ndim == 3 and len(content) == 1:
        content = content[0]
    if content.ndim != 2 or content.dtype.kind != "f":
        raise BagFormatError(f"{path}: holds {content.shape} of {content.dtype}, not features (N, D)")
    return content


def rows_of_array(path: Path, content: np.ndarray) -> Opened:
    """Rows that are small enough to be held in memory from the start: coordinates."""
    return Opened(path, content.shape, content.dtype, partial(np.asarray, content), _stamp(path))


def hdf5_part(path: Path, file: Any, name: str) -> Any:
    """A dataset (N, D) of numbers that is wholly in an open file. Raises BagFormatError."""
    if name not in file:
        raise BagFormatError(f"{path}: no dataset `{name}` (it has {', '.join(file) or 'none'})")
    part = file[name]
    if getattr(part, "dtype", None) is None or part.dtype.kind not in "fiu" or part.ndim != 2:
        raise BagFormatError(f"{path}: {name} is no table of numbers")
    if not is_whole(part):
        raise BagFormatError(f"{path}: {name} is not wholly in the file; make it again")
    return part


def no_coords(path: Path, n_tiles: int) -> Opened:
    """Stands for coordinates that are not known: -1."""
    return rows_of_array(path, np.full((n_tiles, 2), -1, np.int64))


def integer_coords(coords: np.ndarray) -> np.ndarray:
    """Positions as whole pixels, (N, 2) int64."""
    return np.rint(coords).astype(np.int64) if coords.dtype.kind == "f" else coords.astype(np.int64)


def spacing_of(coords: np.ndarray) -> int | None:
    """Distance of neighbouring tiles, which is their side where they do not overlap; None if no two are neighbours.

    The commonest distance between a tile and the next one in its row or column: contours may start anywhere, so the smallest
    distance says nothing.
    """
    steps = []
    for along, across in ((0, 1), (1, 0)):
        order = np.lexsort((coords[:, along], coords[:, across]))
        line = coords[order]
        step = np.diff(line[:, along])[np.diff(line[:, across]) == 0]
        steps.append(step[step > 0])
    found = np.concatenate(steps)
    if not len(found):
        return None
    values, counts = np.unique(np.rint(found).astype(np.int64), return_counts=True)
    return int(values[counts.argmax()]) or None


def inferred_side(spacing: int) -> str:
    """The remark that goes with a side of tiles from `spacing_of`."""
    return f"a tile is taken to be {spacing} px wide at level 0, as far as tiles are apart (`wsimil convert --tile-level0-px`)"


def attributes_of_ours(stated: Mapping[str, Any]) -> dict[str, Any]:
    """What an exported file of ours says beside what its layout asks for."""
    return {name: stated[name] for name in _KEPT if name in stated}


def header_of(
    path: Path,
    features: Rows,
    coords: Rows,
    attributes: Mapping[str, Any],
    *,
    scores: Callable[[], tuple[np.ndarray, dict[str, np.ndarray]]] | None = None,
    remarks: tuple[str, ...] = (),
) -> BagHeader:
    """A bag of another layout; `attributes` that are None are left out, `effective_mpp` follows from the others.

    Raises:
        BagFormatError: as many coordinates as features are needed.
    """
    n_tiles, dim = features.shape
    if coords.shape != (n_tiles, 2):
        raise BagFormatError(f"{path}: {n_tiles} rows of features, but {coords.shape[0]} coordinates; extract the slide again")
    stated = {name: value for name, value in attributes.items() if value is not None}
    if "effective_mpp" not in stated and all(name in stated for name in ("mpp", "tile_level0_px", "tile_px")):
        stated["effective_mpp"] = stated["mpp"] * stated["tile_level0_px"] / stated["tile_px"]
    stated = {"encoder": "unknown", "n_invalid": 0, **stated}
    scores = scores or partial(_all_valid, n_tiles)
    return BagHeader(path, n_tiles, dim, stated, features, coords, scores, (*remarks, *unknowns_of(stated)))


def unknowns_of(stated: Mapping[str, Any]) -> tuple[str, ...]:
    """Remarks on what a bag does not say and models or heatmaps need."""
    ways_out = {
        "mpp": SCALE_UNKNOWN,
        "tile_level0_px": "the side of a tile is not stated (`wsimil convert --tile-level0-px`)",
        "encoder": "the encoder is not stated (`wsimil convert --encoder`)",
    }
    return tuple(text for name, text in ways_out.items() if stated.get(name, "unknown") == "unknown")


def _all_valid(n_tiles: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return np.ones(n_tiles, bool), {}


class Writer(Protocol):
    """How bags are laid out for another program."""

    @property
    def name(self) -> str: ...

    def write(self, out: Path, bag: Bag) -> list[str]:
        """Write a bag, each file atomically; returns remarks. Raises BagFormatError where the layout needs what is not known."""
        ...

    def files(self, out: Path, stated: Mapping[str, Any]) -> list[Path]:
        """What `write` makes of a bag of these attributes."""
        ...


def exportable(bag: Bag) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Valid rows of a bag, features and coordinates, and its attributes as they go into another layout."""
    attributes = attributes_of_ours(bag.attributes)
    if bag.valid.all():
        return bag.features, bag.coords_level0_px, attributes
    return bag.features[bag.valid], bag.coords_level0_px[bag.valid], attributes

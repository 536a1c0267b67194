"""The one door to HDF5: files that appear whole, are never appended to, and open where locks do not work.

- Written under a temporary name, `complete = 1` last, then renamed: a killed run leaves no file that looks finished.
- Datasets are contiguous and uncompressed, so a file is read at the speed of the disk and can be memory-mapped.
- Read without file locking: network folders often have none, and a finished file never changes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from wsimil.errors import BagFormatError
from wsimil.files import atomic_path

__all__ = ["Dataset", "open_hdf5", "read_attributes", "write_hdf5"]


@dataclass(frozen=True)
class Dataset:
    """An array and the attributes that go on it."""

    array: np.ndarray
    attributes: Mapping[str, Any] = field(default_factory=dict)


def write_hdf5(path: str | os.PathLike[str], datasets: Mapping[str, Dataset], attributes: Mapping[str, Any]) -> None:
    """Write datasets (names may hold `/`) and root attributes as one atomic file; attributes that are None are left out."""
    with atomic_path(path) as temporary:
        with h5py.File(temporary, "w", libver=("earliest", "v110")) as file:
            for name, dataset in datasets.items():
                stored = file.create_dataset(name, data=dataset.array)
                _set_attributes(stored, dataset.attributes)
            _set_attributes(file, attributes)
            file.attrs["complete"] = 1


def _set_attributes(target: Any, attributes: Mapping[str, Any]) -> None:
    for key, value in attributes.items():
        if value is not None:
            target.attrs[key] = value


@contextmanager
def open_hdf5(path: str | os.PathLike[str]):
    """Open a file for reading; a file that is no HDF5, is truncated, or breaks inside is a `BagFormatError` that names it."""
    try:
        file = h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BagFormatError(f"{path}: not a readable HDF5 file ({error}); delete it and extract again") from error
    try:
        with file:
            yield file
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise BagFormatError(f"{path}: broken inside ({error}); delete it and extract again") from error


def read_attributes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Root attributes as plain Python values."""
    with open_hdf5(path) as file:
        return {key: _plain(value) for key, value in file.attrs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value


def dataset_offset(path: Path, name: str) -> int | None:
    """Byte at which a contiguous dataset starts; None for an empty or chunked one (read it the ordinary way)."""
    with open_hdf5(path) as file:
        return file[name].id.get_offset()

"""The one door to HDF5: files that appear whole, are never appended to, and open where locks do not work.

- Written under a temporary name, `complete = 1` last, then renamed: a killed run leaves no file that looks finished.
- Datasets are contiguous, uncompressed and aligned: a file is read at the speed of the disk and can be memory-mapped.
- Metadata carry HDF5's checksums, and text at the root is of fixed length, which they cover (free length they do not):
  a flipped bit is an error, where it could have hung or crashed the library.
- Neither reading nor writing locks: network folders often cannot, and a finished file never changes.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np

from wsimil.errors import BagFormatError, WsimilError
from wsimil.files import atomic_path

__all__ = ["Dataset", "is_whole", "open_hdf5", "plain_attributes", "read_attributes", "write_hdf5"]


@dataclass(frozen=True)
class Dataset:
    """An array and the attributes that go on it."""

    array: np.ndarray
    attributes: Mapping[str, Any] = field(default_factory=dict)


def write_hdf5(path: str | os.PathLike[str], datasets: Mapping[str, Dataset], attributes: Mapping[str, Any]) -> None:
    """Write datasets (names may hold `/`) and root attributes as one atomic file, attributes that are None left out.

    Raises:
        OSError: the file cannot be written; it names the path.
    """
    try:
        with atomic_path(path) as temporary:
            layout: dict[str, Any] = {"libver": ("v108", "v110"), "alignment_threshold": 1, "alignment_interval": 8}
            with h5py.File(temporary, "w", locking=False, **layout) as file:
                for name, dataset in datasets.items():
                    stored = file.create_dataset(name, data=dataset.array)
                    stored.attrs.update({key: value for key, value in dataset.attributes.items() if value is not None})
                file.attrs.update({key: _fixed_length(value) for key, value in attributes.items() if value is not None})
                file.attrs["complete"] = 1
    except (OSError, RuntimeError) as error:  # h5py reports a full disk as a RuntimeError
        code = getattr(error, "errno", None)
        reason = os.strerror(code) if code else f"cannot be written ({error})"
        raise OSError(code or errno.EIO, reason, str(path)) from error


def _fixed_length(value: Any) -> Any:
    """Text, alone or in a list, as bytes of one length; anything else as it is."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        return value
    encoded = [text.encode() for text in texts]
    longest = max(1, *map(len, encoded))
    return np.array(encoded, h5py.string_dtype("utf-8", longest)).reshape(np.shape(value))


@contextmanager
def open_hdf5(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open an `h5py.File` for reading (`Any`: h5py's own annotation of an item is a union no checker can follow).

    Raises:
        BagFormatError: no HDF5, truncated, or something in it breaks while it is open; it names the file.
        OSError: the file is not there or may not be read.
    """
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        if error.errno:  # the system's refusal, not the file's fault
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise BagFormatError(f"{path}: not a whole HDF5 file ({error}); delete it and extract again") from error
    try:
        with file:
            yield file
    except WsimilError:
        raise
    except MemoryError as error:
        raise BagFormatError(f"{path}: does not fit into memory ({error})") from error
    except Exception as error:  # h5py raises whatever a damaged part happens to trip over
        what = f"{type(error).__name__}: {error}"
        raise BagFormatError(f"{path}: broken inside ({what}); delete it and extract again") from error


def is_whole(dataset: h5py.Dataset) -> bool:
    """Whether the file holds all that the dataset's shape promises; HDF5 itself answers what is missing with zeros."""
    if dataset.chunks is None:
        return dataset.id.get_storage_size() == dataset.nbytes
    chunks = (math.ceil(length / chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    return dataset.id.get_num_chunks() == math.prod(chunks)


def plain_attributes(target: h5py.HLObject) -> dict[str, Any]:
    """Attributes of a file, group or dataset as plain Python values."""
    return {key: _plain(value) for key, value in target.attrs.items()}


def read_attributes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Root attributes as plain Python values."""
    with open_hdf5(path) as file:
        return plain_attributes(file)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()] if value.ndim else _plain(value.item())
    if isinstance(value, np.generic):
        return value.item()
    return value

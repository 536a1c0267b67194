"""The one door to HDF5: files that appear whole, are never appended to, and open where locks do not work.

- Written under a temporary name, `complete = 1` last, then renamed: a killed run leaves no file that looks finished.
- Datasets are contiguous, uncompressed and aligned: a file is read at the speed of the disk and can be memory-mapped.
- Metadata carry HDF5's checksums, and text at the root is of fixed length, which they cover (free length they do not):
  a flipped bit is an error, where it could have hung or crashed the library.
- So do values, in an attribute of ours that is compared when an array is read whole.
- Neither reading nor writing locks: network folders often cannot, and a finished file never changes.
- Rows that were checked once are read again and again past HDF5, straight from where they lie in the file: `StoredRows`.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import DTypeLike

from wsimil.errors import BagFormatError, WsimilError
from wsimil.files import atomic_path

__all__ = [
    "Allocate",
    "Dataset",
    "StoredRows",
    "is_whole",
    "open_hdf5",
    "plain_attributes",
    "read_array",
    "read_attributes",
    "stored_rows",
    "write_hdf5",
]

Allocate = Callable[[tuple[int, ...], DTypeLike], np.ndarray]
"""Memory of a shape and type, like `np.empty`."""


@dataclass(frozen=True)
class Dataset:
    """An array and the attributes that go on it."""

    array: np.ndarray
    attributes: Mapping[str, Any] = field(default_factory=dict)


def write_hdf5(
    path: str | os.PathLike[str], datasets: Mapping[str, Dataset], attributes: Mapping[str, Any], *, free_text: bool = False
) -> None:
    """Write datasets (names may hold `/`) and root attributes as one atomic file, attributes that are None left out.

    Args:
        free_text: root attributes that are text are of free length: other programs' readers compare them with a `str`, and
            h5py gives `bytes` for those of fixed length.

    Raises:
        OSError: the file cannot be written; it names the path.
        BagFormatError: an attribute is text that cannot be written, as of a file name that is not UTF-8.
    """
    layout: dict[str, Any] = {"libver": ("v108", "v110"), "alignment_threshold": 1, "alignment_interval": 8}
    try:
        with atomic_path(path) as temporary, _Sink(temporary, "w+") as sink:
            with h5py.File(sink, "w", **layout) as file:
                for name, dataset in datasets.items():
                    stored = file.create_dataset(name, data=dataset.array)
                    stored.attrs.update({key: value for key, value in dataset.attributes.items() if value is not None})
                    stored.attrs[_CHECKSUM] = _checksum(dataset.array)
                stated = {key: value for key, value in attributes.items() if value is not None}
                file.attrs.update(stated if free_text else {key: _fixed_length(value) for key, value in stated.items()})
                file.attrs["complete"] = 1
            if sink.error is not None:
                raise sink.error
    except UnicodeEncodeError as error:
        raise BagFormatError(f"{path}: {error.object!r} is not UTF-8, so it cannot be written; rename that file") from error
    except OSError as error:
        code = error.errno or errno.EIO
        raise OSError(code, os.strerror(code) if error.errno else f"cannot be written ({error})", str(path)) from error


_CHECKSUM = "crc32"
"""Attribute of every dataset: HDF5's own checksums cover metadata alone, and values in chunks."""


def _checksum(array: np.ndarray) -> np.uint32:
    content: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return np.uint32(zlib.crc32(content))


def read_array(dataset: h5py.Dataset) -> np.ndarray:
    """A whole dataset. Raises BagFormatError if it holds a checksum and other values than were written."""
    array = dataset[()]
    if _CHECKSUM in dataset.attrs and dataset.attrs[_CHECKSUM] != _checksum(array):
        raise BagFormatError(
            f"{dataset.file.filename}: values of {str(dataset.name).lstrip('/')} changed since they were written (checksum); "
            "delete it and extract again"
        )
    return array


class _Sink(FileIO):
    """A file for HDF5 to write to that keeps the first refusal of the system to itself: HDF5 can crash when it hears of one."""

    error: OSError | None = None

    def write(self, content: Any, /) -> int:
        left = memoryview(content)
        try:
            while left and self.error is None:  # one call writes 2 GB at most
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return len(content)

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0


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


@dataclass(frozen=True)
class StoredRows:
    """Where a dataset (N, D) lies, for reading it as often as needed, by any number of threads and processes.

    Rows in one piece are read by the system, without HDF5 and its lock; in chunks or compressed, by HDF5 and only as a whole,
    for picking more than a few rows out of chunks takes longer. Nothing is kept open. A file that is no longer the one that
    was checked is refused, by its size and time.
    """

    path: Path
    name: str
    shape: tuple[int, int]
    dtype: np.dtype
    offset: int | None  # bytes from the start of the file; None if not in one piece, or empty
    stamp: tuple[int, int]  # size and time of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, rows: np.ndarray | None = None, *, allocate: Allocate = np.empty) -> np.ndarray:
        """All rows, or those asked for, in memory that `allocate` gives. Raises as `read_into` and `read_rows` do."""
        out = allocate((self.shape[0] if rows is None else len(rows), self.shape[1]), self.dtype)
        if rows is None:
            self.read_into(out)
        else:
            self.read_rows(rows, out)
        return out

    def read_checked(self) -> np.ndarray:
        """All rows, compared with the checksum written with them. Raises BagFormatError as `read_into` and `read_array` do."""
        with open_hdf5(self.path) as file:
            self._check_same(file.id.get_vfd_handle())
            return read_array(file[self.name])

    def read_into(self, out: np.ndarray) -> None:
        """All rows, into an array of the same type.

        Raises:
            BagFormatError: the file changed since it was checked, or broke.
            ValueError: `out` (N, D) does not fit.
        """
        self._check_fits(out, self.shape)
        if not out.size:
            return
        if self.offset is None:
            with open_hdf5(self.path) as file:
                self._check_same(file.id.get_vfd_handle())
                file[self.name].read_direct(out)
            return
        with open(self.path, "rb", buffering=0) as file:
            self._check_same(file.fileno())
            file.seek(self.offset)
            left = out.data.cast("B")
            while left:  # one call reads 2 GB at most
                count = file.readinto(left)
                if not count:
                    raise self._changed()
                left = left[count:]

    def read_rows(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Row `rows[i]` as `out[i]`, in any order, repeated or not.

        Raises:
            BagFormatError, ValueError: as `read_into`; `out` is (M, D).
            IndexError: a row below 0 or beyond the last.
        """
        rows = np.asarray(rows, np.intp)
        self._check_fits(out, (len(rows), self.shape[1]))
        if not len(rows):
            return
        if rows.min() < 0 or rows.max() >= self.shape[0]:
            raise IndexError(f"{self.path}: rows {rows.min()} to {rows.max()} asked for; it has 0 to {self.shape[0] - 1}")
        if self.offset is None:
            content = self.read()
        else:
            with open(self.path, "rb", buffering=0) as file:
                self._check_same(file.fileno())  # mapped, a page that is not there would end the process
                mapped: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            content = np.ndarray(self.shape, self.dtype, mapped, self.offset)
        content.take(rows, axis=0, out=out, mode="clip")  # nothing to clip: the other modes take a detour over a copy

    def _check_fits(self, out: np.ndarray, shape: tuple[int, int]) -> None:
        if out.shape != shape or out.dtype != self.dtype or not out.flags.c_contiguous:
            kind = f"{out.shape} of {out.dtype}" + ("" if out.flags.c_contiguous else " with gaps")
            raise ValueError(f"{self.path}: {self.name} goes into {shape} of {self.dtype}, not into {kind}")

    def _check_same(self, handle: int) -> None:
        if _stamp(handle) != self.stamp:
            raise self._changed()

    def _changed(self) -> BagFormatError:
        return BagFormatError(f"{self.path}: the file changed while it was in use; start again")


def stored_rows(dataset: h5py.Dataset) -> StoredRows:
    """How to read a dataset (N, D) of an open file that `is_whole`."""
    file = dataset.file
    direct = (
        dataset.size  # an empty one lies nowhere, whatever HDF5 says
        and dataset.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
        and not dataset.external
        and h5py.h5t.py_create(dataset.dtype) == dataset.id.get_type()  # a float that numpy lacks is converted by HDF5
    )
    offset = dataset.id.get_offset() if direct else None
    stamp = _stamp(file.id.get_vfd_handle())
    return StoredRows(Path(file.filename), str(dataset.name).lstrip("/"), dataset.shape, dataset.dtype, offset, stamp)


def _stamp(handle: int) -> tuple[int, int]:
    found = os.fstat(handle)
    return found.st_size, found.st_mtime_ns


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

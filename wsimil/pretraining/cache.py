"""Tiles that were read once and come again: kept on disk byte for byte.

- A tile lies where its key says, under a checksum of its own: what a crash, a full disk or another process left half written is
  read from the slide again. Several devices share a folder without a word to each other.
- Bounded: keys beyond the size given are not kept. A disk that is full ends the keeping, not the run.
- One file per recipe of draws; those of other recipes in the folder are removed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wsimil.files import hash_of, mark_output

__all__ = ["TileCache"]

_HEADER = np.dtype([("sum", "<u8"), ("share", "<f4"), ("unused", "<u4")])
_WRITTEN = 1 << 32  # beside the checksum: a hole in the file is all zeros


class TileCache:
    """Tiles by key, 0 and upwards.

    Args:
        folder: of ours; made if it is not there.
        recipe: what the tiles depend on.
        gb: size at most, 10^9 bytes.
        say: receives a line when nothing more can be written.
    """

    def __init__(
        self, folder: str | Path, recipe: Mapping[str, Any], *, tile_px: int, gb: float, say: Callable[[str], None]
    ) -> None:
        mark_output(Path(folder))
        self.path = Path(folder) / f"tiles-{hash_of(recipe)[:12]}.raw"
        for other in Path(folder).glob("tiles-*.raw"):
            if other != self.path:
                other.unlink(missing_ok=True)
        self._tile_bytes = tile_px * tile_px * 3
        self._record_bytes = _HEADER.itemsize + self._tile_bytes
        self._capacity = int(gb * 1e9) // self._record_bytes
        self._say, self._full = say, False
        self._file = open(self.path, "r+b" if self.path.exists() else "w+b", buffering=0)  # noqa: SIM115 (it lives as long as the object)

    def read(self, key: int, out: np.ndarray) -> float | None:
        """Fill `out` with a tile and return the share of it that shows something; None where it is not there."""
        if not 0 <= key < self._capacity:
            return None
        content = os.pread(self._file.fileno(), self._record_bytes, key * self._record_bytes)
        if len(content) < self._record_bytes:
            return None
        header = np.frombuffer(content, _HEADER, 1)[0]
        if int(header["sum"]) != self._sum(header["share"], memoryview(content)[_HEADER.itemsize :]):
            return None
        out[:] = np.frombuffer(content, np.uint8, offset=_HEADER.itemsize).reshape(out.shape)
        return float(header["share"])

    def write(self, key: int, tile: np.ndarray, share: float) -> None:
        """Keep a tile."""
        if self._full or not 0 <= key < self._capacity:
            return
        pixels = np.ascontiguousarray(tile).tobytes()
        header = np.zeros(1, _HEADER)
        header["share"] = share
        header["sum"] = self._sum(header["share"][0], pixels)
        try:
            os.pwrite(self._file.fileno(), header.tobytes() + pixels, key * self._record_bytes)
        except OSError as error:
            self._full = True
            self._say(f"{self.path}: no more tiles are kept: {error.strerror}")

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def _sum(share: np.float32, pixels: bytes | memoryview) -> int:
        return _WRITTEN | zlib.crc32(pixels, zlib.crc32(share.tobytes()))

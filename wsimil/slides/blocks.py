"""Compressed blocks of a tiled TIFF: where they lie, their bytes, their pixels.

- The file is parsed once; what stays is arrays of numbers and a file descriptor, so threads can share it.
- Neighbouring blocks are fetched in one read: on a network folder the round trip is what costs.
- JPEG is decoded by libjpeg-turbo at its defaults (accurate DCT, smooth chroma), as OpenSlide does, so pixels are the same bit
  for bit. The binding has to let other threads run, to take a warning of the decoder for an error (a JPEG that breaks off is grey
  from there on, and no exception says so), and to scale in the DCT: of those at hand only simplejpeg does all three.
- The TIFF says what a JPEG's colours are, not the guess that decoders make: a marker that states it is put in front.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import simplejpeg
import tifffile

__all__ = ["BlockError", "BlockLevel", "BlocksUnknownError", "open_blocks"]

_MAX_GAP = 64 << 10
_MAX_READ = 8 << 20

_JPEG = 7
_APERIO_JPEG2000 = {33003: "ycbcr", 33005: "rgb"}
_RGB, _YCBCR = 2, 6
_START = b"\xff\xd8"

_Decode = Callable[[memoryview, np.ndarray, int], np.ndarray]
"""From the bytes of a block, memory for its pixels and how many times smaller it is wanted, to its pixels."""


class BlockError(Exception):
    """A block cannot be read or decoded."""


class BlocksUnknownError(Exception):
    """The blocks of a file cannot be told; the message says why."""


@dataclass(frozen=True)
class BlockLevel:
    """One level of a slide as a grid of compressed blocks, counted row by row. May be used by several threads."""

    width: int
    height: int
    block_width: int
    block_height: int
    columns: int
    offsets: np.ndarray  # (rows * columns,) int64, bytes
    sizes: np.ndarray  # (rows * columns,) int64, bytes; 0 where the scanner left a block out
    codec: str  # "jpeg" or "jpeg2000"
    _decode: _Decode
    _file: _File

    def read(self, blocks: Sequence[int]) -> dict[int, bytes | memoryview | BlockError]:
        """The bytes of blocks, with as few reads as are sensible; an error in place of those that cannot be had."""
        found: dict[int, bytes | memoryview | BlockError] = {}
        run: list[int] = []
        start = end = 0
        for block in sorted(blocks, key=self.offsets.__getitem__):
            offset, size = int(self.offsets[block]), int(self.sizes[block])
            if run and (offset - end > _MAX_GAP or offset + size - start > _MAX_READ):
                self._read_run(run, start, end, found)
                run = []
            if not run:
                start = end = offset
            run.append(block)
            end = max(end, offset + size)
        if run:
            self._read_run(run, start, end, found)
        return found

    def _read_run(self, run: list[int], start: int, end: int, found: dict[int, bytes | memoryview | BlockError]) -> None:
        try:
            content = memoryview(os.pread(self._file.number, end - start, start))
        except OSError as error:
            found.update((block, BlockError(f"cannot be read: {error.strerror}")) for block in run)
            return
        for block in run:
            at, size = int(self.offsets[block]) - start, int(self.sizes[block])
            whole = at + size <= len(content)
            found[block] = content[at : at + size] if whole else BlockError("the file ends before it does")

    def region(self, x0: int, y0: int, x1: int, y1: int) -> np.ndarray | None:
        """Pixels uint8 (y1 - y0, x1 - x0, 3) of a place inside the level; None where a block was left out.

        Raises:
            BlockError: a block of it cannot be read.
        """
        out, decoded = np.empty((y1 - y0, x1 - x0, 3), np.uint8), np.empty((self.block_height, self.block_width, 3), np.uint8)
        rows = range(y0 // self.block_height, (y1 - 1) // self.block_height + 1)
        columns = range(x0 // self.block_width, (x1 - 1) // self.block_width + 1)
        needed = [row * self.columns + column for row in rows for column in columns]
        if not self.sizes[needed].all():
            return None
        for block, content in self.read(needed).items():
            if isinstance(content, BlockError):
                raise content
            self.decode(content, decoded)
            row, column = divmod(block, self.columns)
            # the block's corner seen from the place
            top, left = row * self.block_height - y0, column * self.block_width - x0
            down, right = min(top + self.block_height, y1 - y0), min(left + self.block_width, x1 - x0)
            part = decoded[max(0, -top) : down - top, max(0, -left) : right - left]
            out[max(0, top) : down, max(0, left) : right] = part
        return out

    def decode(self, content: bytes | memoryview, pixels: np.ndarray, *, reduce: int = 1) -> None:
        """Decode a block into `pixels`, uint8 (block_height / reduce, block_width / reduce, 3); `reduce` 2 is for JPEG alone.

        Raises:
            BlockError: it breaks off, is damaged, or has another size.
        """
        decoded = self._decode(memoryview(content), pixels, reduce)
        if decoded.shape != pixels.shape:
            raise BlockError(f"it is {decoded.shape[1::-1]} px, not {pixels.shape[1::-1]}")


class _File:
    """A file descriptor that closes itself with its last user."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (it lives as long as the object)
        self.number = self._file.fileno()


def open_blocks(path: Path, level_dimensions: tuple[int, int], *, nth: int = 0, gaps_spread: bool = False) -> BlockLevel:
    """The level of this (width, height) in a tiled TIFF; `nth` among levels of the same size.

    Args:
        gaps_spread: count a block as left out where a finer level has left one out.

    Raises:
        BlocksUnknownError: no such level, or one stored in another way.
    """
    if not hasattr(os, "pread"):
        raise BlocksUnknownError("this system cannot read at a position")
    try:
        with tifffile.TiffFile(path) as tiff:
            # the label and the overview of a slide are stored in strips
            tiled = [page for page in tiff.pages if isinstance(page, tifffile.TiffPage) and page.is_tiled]
            pages = [page for page in tiled if (page.imagewidth, page.imagelength) == level_dimensions]
            if len(pages) <= nth:
                raise BlocksUnknownError("no tiled page of the level's size")
            level = _level(pages[nth], _File(path))
            finer = [page for page in tiled if page.imagewidth > level.width] if gaps_spread else []
            for page in finer:
                level.sizes[_below_gaps(level, page)] = 0
            return level
    except BlocksUnknownError:
        raise
    except Exception as error:  # whatever a strange file makes tifffile trip over
        raise BlocksUnknownError(f"its TIFF structure cannot be read: {error}") from error


def _level(page: tifffile.TiffPage, file: _File) -> BlockLevel:
    if (page.samplesperpixel, page.bitspersample, page.planarconfig) != (3, 8, 1):
        raise BlocksUnknownError(f"{page.samplesperpixel} channels of {page.bitspersample} bit")
    if page.compression == _JPEG and page.photometric in (_RGB, _YCBCR):
        # the marker says what is stored: 0 RGB, 1 YCbCr
        stated = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([page.photometric == _YCBCR])
        codec, decode = "jpeg", _jpeg_decoder(_START + stated + (page.jpegtables or b"")[2:-2])
    elif page.compression in _APERIO_JPEG2000:
        codec, decode = "jpeg2000", _jpeg2000_decoder(_APERIO_JPEG2000[page.compression])
    else:
        raise BlocksUnknownError(f"compression {page.compression} with photometric {page.photometric}")
    columns, rows = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
    offsets, sizes = np.asarray(page.dataoffsets, np.int64), np.asarray(page.databytecounts, np.int64)
    if not len(offsets) == len(sizes) == columns * rows:
        raise BlocksUnknownError(f"{len(offsets)} blocks where there should be {columns * rows}")
    sizes = np.where(offsets > 0, sizes, 0)
    shape = page.imagewidth, page.imagelength, page.tilewidth, page.tilelength
    return BlockLevel(*shape, columns, offsets, sizes, codec, decode, file)


def _below_gaps(level: BlockLevel, finer: tifffile.TiffPage) -> list[int]:
    """Blocks of a level that show what lies in blocks that a finer level has left out."""
    gaps = np.flatnonzero((np.asarray(finer.databytecounts) == 0) | (np.asarray(finer.dataoffsets) == 0)).tolist()
    columns, found = -(-finer.imagewidth // finer.tilewidth), set()
    x_scale, y_scale = level.width / finer.imagewidth, level.height / finer.imagelength
    for row, column in (divmod(gap, columns) for gap in gaps):
        x0, x1 = (int(edge * finer.tilewidth * x_scale) for edge in (column, column + 1))
        y0, y1 = (int(edge * finer.tilelength * y_scale) for edge in (row, row + 1))
        # a pixel more on every side: coarser pixels are made of several
        across = range(max(0, x0 - 1) // level.block_width, min(level.columns - 1, (x1 + 1) // level.block_width) + 1)
        down = range(max(0, y0 - 1) // level.block_height, min(level.height - 1, y1 + 1) // level.block_height + 1)
        found.update(at_row * level.columns + at for at_row in down for at in across)
    return sorted(found)


def _jpeg_decoder(head: bytes) -> _Decode:
    def decode(content: memoryview, pixels: np.ndarray, reduce: int) -> np.ndarray:
        if content[:2] != _START:
            raise BlockError("not a JPEG")
        scale = {} if reduce == 1 else {"min_factor": reduce, "min_height": pixels.shape[0], "min_width": pixels.shape[1]}
        try:
            return simplejpeg.decode_jpeg(b"".join((head, content[2:])), buffer=pixels, strict=True, **scale)
        except ValueError as error:
            raise BlockError(str(error)) from error

    return decode


def _jpeg2000_decoder(colours: str) -> _Decode:
    def decode(content: memoryview, pixels: np.ndarray, reduce: int) -> np.ndarray:
        assert reduce == 1
        try:
            if colours == "rgb":
                return imagecodecs.jpeg2k_decode(bytes(content), out=pixels, numthreads=1)
            decoded = imagecodecs.jpeg2k_decode(bytes(content), numthreads=1)
        except (imagecodecs.Jpeg2kError, ValueError, RuntimeError) as error:
            raise BlockError(str(error)) from error
        if decoded.shape == pixels.shape:
            _rgb_from_ycbcr(decoded, pixels)
        return decoded

    return decode


_CHROMA = np.arange(256) - 128
_RED = np.floor(1.402 * _CHROMA + 0.5).astype(np.int16)
_BLUE = np.floor(1.772 * _CHROMA + 0.5).astype(np.int16)
_GREEN = np.floor(-0.34414 * _CHROMA[:, None] - 0.71414 * _CHROMA + 0.5).astype(np.int16)  # [cb, cr]


def _rgb_from_ycbcr(ycbcr: np.ndarray, rgb: np.ndarray) -> None:
    """JFIF's conversion, with the coefficients and the rounding of OpenSlide."""
    y, cb, cr = (ycbcr[..., channel] for channel in range(3))
    light = y.astype(np.int16)
    for channel, shift in enumerate((_RED[cr], _GREEN[cb, cr], _BLUE[cb])):
        rgb[..., channel] = np.clip(light + shift, 0, 255)

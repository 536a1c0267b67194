"""Tiles of JPEG and JPEG 2000 slides straight from their compressed blocks, several times faster than through OpenSlide.

- Pixels are those of `Slide.read_tile`, bit for bit. When a slide is opened a few tiles are compared; if one pixel differs, the
  slide is not read this way, and the reason is said. Damage that OpenSlide takes for pixels is no difference, but damage.
- Tiles are walked row by row and each block is decoded once: it is kept until the last tile that needs it, in bounded memory.
- Tiles over the rim of a level or on a block that the scanner left out are read by `Slide.read_tile`: what is there is its
  business. Blocks that break off are errors of the tiles that touch them, of those, too.
- On request JPEG is decoded at half size in the DCT for even reductions: half the work, not the exact area mean. It is another
  resampler, and named so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from wsimil.errors import SlideReadError
from wsimil.slides.blocks import BlockError, BlockLevel, BlocksUnknownError, open_blocks
from wsimil.slides.readers import DIRECT_KINDS
from wsimil.slides.resample import resample
from wsimil.slides.slide import RESAMPLER, Slide, _widened

__all__ = ["DCT_RESAMPLER", "DirectReader", "TileWalk", "open_direct"]

DCT_RESAMPLER = RESAMPLER.replace("level+", "level+dct/2+")
"""Name of the rule where even reductions begin in the DCT."""

_WINDOW_BYTES = 256 << 20
"""Of decoded blocks: a row of blocks across 300,000 px."""
_AHEAD_BYTES = 8 << 20
_CHECKED_TILES, _CHECK_AT_MOST = 3, 9
_DCT_TOLERANCE = 4.0
"""Mean difference from the area mean, grey levels, above which half-size decoding cannot be right; real slides have .1 to .9."""


def open_direct(
    slide: Slide, *, tile_level0_px: float, tile_px: int, dct_scaled: bool = False
) -> tuple[DirectReader, None] | tuple[None, str]:
    """A reader of tiles of this size, or the reason why the slide is not read this way.

    Args:
        dct_scaled: decode at half size where the reduction and the blocks are even.
    """
    if slide.reader not in DIRECT_KINDS:
        return None, f"{slide.reader} slides are not read directly"
    level, _ = slide._level_for(tile_level0_px / tile_px)
    dimensions = slide._reader.level_dimensions
    try:
        # of Aperio's slides OpenSlide leaves gaps in all levels where the finest has one
        gaps_spread, nth = slide.reader == "openslide:aperio", dimensions[:level].count(dimensions[level])
        blocks = open_blocks(slide.path, dimensions[level], nth=nth, gaps_spread=gaps_spread)
    except BlocksUnknownError as error:
        return None, str(error)
    except OSError as error:
        return None, f"cannot be opened again: {error.strerror}"
    exact = DirectReader(slide, blocks, tile_level0_px, tile_px)
    if reason := exact.self_check():
        return None, reason
    if not dct_scaled:
        return exact, None
    scaled = DirectReader(slide, blocks, tile_level0_px, tile_px, exact=exact)
    return (None, reason) if (reason := scaled.self_check()) else (scaled, None)


@dataclass(frozen=True)
class _Boxes:
    """Where tiles lie in the decoded level, pixels."""

    outer: np.ndarray  # (N, 4) int64, x0, y0, x1, y1: the pixels that are needed
    inner: np.ndarray | None  # (N, 4) float64, left, top, right, bottom in them, where they are resampled
    inside: np.ndarray  # (N,) bool: the level has all of them
    between: np.ndarray  # (N,) bool: they begin between two pixels of half size


class DirectReader:
    """Reads tiles of one size from one level of a slide. May be used by several threads; a `TileWalk` belongs to one.

    Args:
        exact: given, blocks are decoded at half size where that goes; it reads the tiles that would begin between two such pixels.

    Attributes:
        resampler: name of the rule that its pixels follow.
    """

    def __init__(
        self, slide: Slide, blocks: BlockLevel, tile_level0_px: float, tile_px: int, *, exact: DirectReader | None = None
    ) -> None:
        self.slide, self.blocks, self.exact = slide, blocks, exact
        self.tile_level0_px, self.tile_px = tile_level0_px, tile_px
        self.level, (self._per_x, self._per_y) = slide._level_for(tile_level0_px / tile_px)
        factors = tile_level0_px / self._per_x / tile_px, tile_level0_px / self._per_y / tile_px
        whole = max(1, round(factors[0]))
        self.whole = whole if all(abs(factor - whole) * tile_px < 1e-3 for factor in factors) else None
        even = self.whole is not None and not (self.whole | blocks.block_width | blocks.block_height) & 1
        self.reduce = 2 if exact is not None and even and blocks.codec == "jpeg" else 1  # in the decoder
        self.resampler = DCT_RESAMPLER if self.reduce == 2 else RESAMPLER
        self.block_shape = blocks.block_height // self.reduce, blocks.block_width // self.reduce, 3
        self._free: dict[tuple[int, ...], list[np.ndarray]] = {}

    def walk(self, coords_level0_px: np.ndarray) -> TileWalk:
        """Tiles with these top-left corners, (N, 2) whole numbers, to be read in this order; row by row is best."""
        return TileWalk(self, coords_level0_px)

    def self_check(self) -> str | None:
        """Compare a few tiles with the plain path: the last corner, and those with most content."""
        found = np.zeros((1, self.tile_px, self.tile_px, 3), np.uint8)
        compared, refused, why = 0, 0, ""
        for x, y in self._check_coords().tolist():
            try:
                expected = self.slide.read_tile(x, y, tile_level0_px=self.tile_level0_px, tile_px=self.tile_px)
            except SlideReadError:
                continue  # damaged: no tile to compare with
            if failures := self.walk(np.array([[x, y]])).read(found):
                # OpenSlide takes much damage for pixels: what is refused here and there only is damaged
                refused, why = refused + 1, f"tile at ({x}, {y}): {failures[0]}, and OpenSlide reads it"
                continue
            off = np.abs(found[0].astype(np.int16) - expected)
            if self.reduce == 1 and off.any():
                return f"tile at ({x}, {y}) differs from OpenSlide's by up to {off.max()} grey levels"
            if off.mean() > _DCT_TOLERANCE:
                return f"tile at ({x}, {y}) decoded at half size is {off.mean():.1f} grey levels off"
            compared += 1
            if compared == _CHECKED_TILES:
                break
        if refused >= max(1, compared):
            return why
        return None if compared else "none of the tiles compared with OpenSlide's can be read"

    def _check_coords(self) -> np.ndarray:
        """Corners (n, 2) of tiles to compare, more than are needed: some may be damaged."""
        blocks, rim = self.blocks, self.tile_level0_px
        largest = np.argsort(blocks.sizes, kind="stable")[: -_CHECK_AT_MOST - 1 : -1]
        x = (largest % blocks.columns + 0.5) * blocks.block_width * self._per_x - rim / 2
        y = (largest // blocks.columns + 0.5) * blocks.block_height * self._per_y - rim / 2
        coords = np.insert(np.stack([x, y], axis=1), 0, math.inf, axis=0)
        ends = np.floor([self.slide.width - rim, self.slide.height - rim])
        whole = np.clip(np.floor(coords.clip(max=1e12)), 0, np.maximum(ends, 0)).astype(np.int64)
        # half-size pixels are compared where the exact ones begin, too
        return whole if self.reduce == 1 else whole - whole % (self.reduce * np.rint([self._per_x, self._per_y]).astype(np.int64))

    def boxes(self, coords_level0_px: np.ndarray) -> _Boxes:
        """Where tiles lie, by the rule and the arithmetic of `Slide.read_box`."""
        corners = coords_level0_px.astype(np.float64)  # (N, 2)
        per = np.array([self._per_x, self._per_y])
        low, high = corners / per, (corners + self.tile_level0_px) / per
        size = np.array([self.blocks.width, self.blocks.height]) // self.reduce
        if self.whole is not None:
            start = np.floor(low + 0.5).astype(np.int64)
            first = start // self.reduce
            end = first + self.whole // self.reduce * self.tile_px
            inside, between = np.all((first >= 0) & (end <= size), axis=1), np.any(start % self.reduce, axis=1)
            return _Boxes(np.hstack([first, end]), None, inside & ~between, between)
        margin = math.ceil(max(self.tile_level0_px / side / self.tile_px for side in per) / 2) + 1
        rim = self.slide.width / self._per_x, self.slide.height / self._per_y
        sides = np.stack([low, high], axis=-1).tolist()  # tile, axis, end
        outer = [[_widened(start, stop, margin, rim[axis]) for axis, (start, stop) in enumerate(tile)] for tile in sides]
        first, end = np.moveaxis(np.array(outer, np.int64).reshape(-1, 2, 2), 2, 0)
        inner = np.hstack([np.maximum(low, first) - first, np.minimum(high, end) - first])
        inside = np.all((first >= 0) & (end <= size), axis=1)
        return _Boxes(np.hstack([first, end]), inner, inside, np.zeros_like(inside))

    def free_memory(self, shape: tuple[int, ...]) -> list[np.ndarray]:
        """Arrays of this shape that nobody uses, shared by walks: to fresh memory, writing takes a fifth of a decode longer."""
        return self._free.setdefault(shape, [])

    def where(self, block: int) -> str:
        """A block in words: level-0 pixels."""
        row, column = divmod(block, self.blocks.columns)
        x, y = column * self.blocks.block_width * self._per_x, row * self.blocks.block_height * self._per_y
        return f"block at ({x:.0f}, {y:.0f}), level {self.level}"


class TileWalk:
    """A walk over tiles in their order: each `read` gives the next ones.

    It holds the decoded blocks that tiles to come need. For one thread at a time; a slide may be divided among several walks.
    """

    def __init__(self, reader: DirectReader, coords_level0_px: np.ndarray) -> None:
        self._reader, self._blocks = reader, reader.blocks
        self._coords = np.asarray(coords_level0_px).reshape(-1, 2)
        self._next = 0
        boxes = reader.boxes(self._coords)
        self._outer, self._inner, self._direct = boxes.outer, boxes.inner, boxes.inside
        self._between = boxes.between
        self._exact = reader.exact.walk(self._coords[boxes.between]) if reader.exact is not None and boxes.between.any() else None
        # Where all tiles begin on whole pixels of the result, blocks are reduced as they come, while they are in the cache.
        factor, shape = (reader.whole or 1) // reader.reduce, reader.block_shape
        even = not (shape[0] % factor or shape[1] % factor or np.any(self._outer[self._direct] % factor))
        self._reduce_block, self._reduce_tile = (factor, 1) if even else (1, factor)
        self._outer = self._outer // self._reduce_block
        self._shape = shape[0] // self._reduce_block, shape[1] // self._reduce_block, 3
        self._full_block = np.empty(shape, np.uint8)
        self._scratch = np.empty(0, np.uint8)
        self._window: dict[int, np.ndarray | BlockError] = {}  # decoded blocks
        self._content: dict[int, bytes | memoryview | BlockError] = {}  # compressed ones
        self._evicted: set[int] = set()
        self._room = max(16, _WINDOW_BYTES // math.prod(self._shape))
        self._free = reader.free_memory(self._shape)
        self._plan()

    def _plan(self) -> None:
        """Which blocks each tile needs, in which order they are decoded, and when each is done with."""
        height, width, _ = self._shape
        tiles = np.flatnonzero(self._direct)
        first_column, first_row = self._outer[tiles, 0] // width, self._outer[tiles, 1] // height
        columns = (self._outer[tiles, 2] - 1) // width - first_column + 1
        counts = columns * ((self._outer[tiles, 3] - 1) // height - first_row + 1)
        nth = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        across = np.repeat(columns, counts)
        row, column = np.repeat(first_row, counts) + nth // across, np.repeat(first_column, counts) + nth % across
        needed = row * self._blocks.columns + column
        tile = np.repeat(tiles, counts)
        missing = self._blocks.sizes[needed] == 0
        self._direct[tile[missing]] = False
        needed, tile = needed[self._direct[tile]], tile[self._direct[tile]]
        block, first = np.unique(needed, return_index=True)
        self._order = block[np.argsort(first)].tolist()
        self._ahead = 0  # how many of them have been fetched
        last = len(needed) - 1 - np.unique(needed[::-1], return_index=True)[1]
        self._last = dict(zip(block.tolist(), tile[last].tolist(), strict=True))
        self._done: dict[int, list[int]] = {}
        for name, row in self._last.items():
            self._done.setdefault(row, []).append(name)

    def read(self, out: np.ndarray) -> dict[int, str]:
        """The next tiles into `out`, uint8 (n, tile_px, tile_px, 3); the rows that cannot be read, and why: they are zeros."""
        failures: dict[int, str] = {}
        first, reader = self._next, self._reader
        end = first + len(out)
        if end > len(self._coords) or out.shape[1:] != (reader.tile_px, reader.tile_px, 3) or out.dtype != np.uint8:
            left = len(self._coords) - first
            raise ValueError(f"out: {out.shape} {out.dtype} for the {left} tiles of {reader.tile_px} px that are left")
        self._next = end
        boxes, direct, between = (part[first:end].tolist() for part in (self._outer, self._direct, self._between))
        for row, (box, directly, at_full_size, pixels) in enumerate(zip(boxes, direct, between, out, strict=True), start=first):
            try:
                if directly:
                    self._fill(row, box, pixels)
                elif at_full_size and self._exact is not None:
                    for why in self._exact.read(pixels[None]).values():
                        failures[row] = why
                else:
                    self._try_blocks(box)
                    x, y = self._coords[row].tolist()
                    pixels[:] = reader.slide.read_tile(x, y, tile_level0_px=reader.tile_level0_px, tile_px=reader.tile_px)
            except SlideReadError as error:
                pixels[:] = 0
                failures[row] = str(error)
            for block in self._done.pop(row, ()):
                self._drop(block)
        return failures

    def _try_blocks(self, box: list[int]) -> None:
        """Decode what there is below a tile that `Slide.read_tile` reads: OpenSlide takes much damage for pixels."""
        blocks, (height, width, _) = self._blocks, self._shape
        rows = range(max(0, box[1] // height), min(len(blocks.sizes) // blocks.columns, (box[3] - 1) // height + 1))
        columns = range(max(0, box[0] // width), min(blocks.columns, (box[2] - 1) // width + 1))
        for block in (row * blocks.columns + column for row in rows for column in columns):
            if not blocks.sizes[block] or isinstance(self._window.get(block), np.ndarray):
                continue
            content = blocks.read([block])[block]
            try:
                if isinstance(content, BlockError):
                    raise content
                blocks.decode(content, self._full_block, reduce=self._reader.reduce)
            except BlockError as error:
                raise SlideReadError(f"{self._reader.where(block)}: {error}") from error

    def _fill(self, row: int, box: list[int], out: np.ndarray) -> None:
        if self._inner is not None:
            columns = self._picture(box[2] - box[0], box[3] - box[1])
            for pixels, top, bottom, left, right in self._pieces(box):
                cv2.transpose(pixels, dst=columns[left:right, top:bottom])
            resample(columns, tuple(self._inner[row].tolist()), self._reader.tile_px, out)
        elif self._reduce_tile > 1:
            picture = self._picture(box[3] - box[1], box[2] - box[0])
            self._copy(box, picture)
            _area_mean(picture, self._reduce_tile, out)
        elif not self._decode_into(row, box, out):
            self._copy(box, out)

    def _decode_into(self, row: int, box: list[int], out: np.ndarray) -> bool:
        """A tile that is a block, and nobody else's: without a copy."""
        height, width, _ = self._shape
        if out.shape[:2] != (height, width) or box[0] % width or box[1] % height:
            return False
        block = box[1] // height * self._blocks.columns + box[0] // width
        if self._last[block] != row or block in self._window:
            return False
        try:
            self._decode(block, out)
        except BlockError as error:
            raise SlideReadError(f"{self._reader.where(block)}: {error}") from error
        return True

    def _copy(self, box: list[int], out: np.ndarray) -> None:
        for pixels, top, bottom, left, right in self._pieces(box):
            out[top:bottom, left:right] = pixels

    def _picture(self, height: int, width: int) -> np.ndarray:
        """Scratch memory."""
        if self._scratch.size < height * width * 3:
            self._scratch = np.empty(height * width * 3, np.uint8)
        return self._scratch[: height * width * 3].reshape(height, width, 3)

    def _pieces(self, box: list[int]) -> Iterator[tuple[np.ndarray, int, int, int, int]]:
        """The blocks' parts of a box, and where in it they lie: pixels, top, bottom, left, right."""
        x0, y0, x1, y1 = box
        height, width, _ = self._shape
        for row in range(y0 // height, (y1 - 1) // height + 1):
            top, bottom = max(y0, row * height), min(y1, (row + 1) * height)
            for column in range(x0 // width, (x1 - 1) // width + 1):
                left, right = max(x0, column * width), min(x1, (column + 1) * width)
                pixels = self._block(row * self._blocks.columns + column, x0 // width)
                inside = pixels[top - row * height : bottom - row * height, left - column * width : right - column * width]
                yield inside, top - y0, bottom - y0, left - x0, right - x0

    def _block(self, block: int, first_column: int) -> np.ndarray:
        """The pixels of a block, for a tile that begins in `first_column`."""
        pixels = self._window.get(block)
        if pixels is None:
            if len(self._window) >= self._room:
                self._evict(first_column)
            memory = self._free.pop() if self._free else np.empty(self._shape, np.uint8)
            try:
                self._decode(block, memory)
                pixels = memory
            except BlockError as error:
                self._free.append(memory)
                pixels = error
            self._window[block] = pixels
        if isinstance(pixels, BlockError):
            raise SlideReadError(f"{self._reader.where(block)}: {pixels}")
        return pixels

    def _decode(self, block: int, pixels: np.ndarray) -> None:
        if block in self._evicted:
            content = self._blocks.read([block])[block]
        else:
            while block not in self._content:
                self._fetch()
            content = self._content.pop(block)
        if isinstance(content, BlockError):
            raise content
        decoded = pixels if self._reduce_block == 1 else self._full_block
        self._blocks.decode(content, decoded, reduce=self._reader.reduce)
        if self._reduce_block > 1:
            _area_mean(decoded, self._reduce_block, pixels)

    def _fetch(self) -> None:
        """The bytes of the blocks that come next."""
        start, total = self._ahead, 0
        while self._ahead < len(self._order) and (total == 0 or total < _AHEAD_BYTES):
            total += int(self._blocks.sizes[self._order[self._ahead]])
            self._ahead += 1
        self._content.update(self._blocks.read(self._order[start : self._ahead]))
        if self._reader.slide._on_read is not None:
            self._reader.slide._on_read()

    def _evict(self, first_column: int) -> None:
        """Give up a block where there is no room: of those left of the tile the newest, as it is needed last."""
        columns = self._blocks.columns
        held = reversed(self._window)
        block = next((block for block in held if block % columns < first_column), next(iter(self._window)))
        self._evicted.add(block)
        self._drop(block)

    def _drop(self, block: int) -> None:
        self._content.pop(block, None)
        pixels = self._window.pop(block, None)
        if isinstance(pixels, np.ndarray):
            self._free.append(pixels)


def _area_mean(pixels: np.ndarray, factor: int, out: np.ndarray) -> None:
    """Pillow's `reduce`."""
    if factor == 2:  # OpenCV's is the same, (a + b + c + d + 2) >> 2, and faster
        cv2.resize(pixels, out.shape[1::-1], dst=out, interpolation=cv2.INTER_AREA)
    else:
        out[:] = Image.fromarray(pixels).reduce(factor)

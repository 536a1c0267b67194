"""How pixels come out of a file: OpenSlide for slides, Pillow for plain images.

- Which reader opens a file follows from its suffix and content, never from what failed before; it is recorded in the bag.
- Levels whose size is no whole fraction of level 0 OpenSlide blends, by other amounts in other places: JPEG and JPEG 2000 of
  Aperio and plain TIFFs are decoded here instead, pixels as they are stored.
- A reader gives RGB on white: what the scanner did not fill is glass. But a block that is missing from a file whose writer stores
  every block is lost, and an error. Plain TIFFs are believed to have left it out if a coarser level is white or empty there.
- After a failed read OpenSlide's handle is spoiled for good, and with it the reads of other threads: a read that fails is tried
  once more on a handle of its own. So what can be read does not depend on its neighbours.
- OME's PhysicalSize is believed before the TIFF resolution, which many writers leave at 72 dots per inch.
"""

from __future__ import annotations

import math
import re
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import openslide
import tifffile
from PIL import Image, UnidentifiedImageError

from wsimil.errors import SlideReadError, SlideUnreadableError
from wsimil.files import IMAGE_SUFFIXES
from wsimil.slides.blocks import BlockError, BlockLevel, BlocksUnknownError, open_blocks

__all__ = ["DIRECT_KINDS", "Reader", "level_downsample", "open_reader"]


_STORE_EVERY_BLOCK = ("openslide:aperio", "openslide:generic-tiff", "openslide:trestle")
"""The other kinds rightly leave out what was not scanned."""

_SAVE_ANEW = "save it anew as RGB, for example with `vips tiffsave in.tif out.tif --tile --pyramid --compression jpeg`"

DIRECT_KINDS = ("openslide:aperio", "openslide:generic-tiff")
"""Formats whose blocks lie in the canvas as they lie in the file."""

_BLENDED_APART = 3.0
"""Mean difference, grey levels of 8 × 8 px means, between pixels and what OpenSlide blends of them: more is another picture."""

_PIECE_PX = 512
"""Largest side of the pieces that are read around damage."""

_GLASS, _UNFILLED = 220, 16
"""A pixel shows something if its darkest channel is below the one and its lightest above the other."""


class Reader(Protocol):
    """Pixels of one file, in levels from fine to coarse."""

    kind: str  # as recorded, e.g. "openslide:aperio"
    file_mpp: float | None  # what the file states
    mpp_key: str | None  # where it states it
    bounds: tuple[int, int, int, int] | None  # x, y, width, height of the scanned part, level-0 px
    level_dimensions: tuple[tuple[int, int], ...]  # (width, height)
    level_origins: tuple[tuple[float, float], ...]  # where pixel (0, 0) of each level lies, x, y in level-0 px

    def read(self, level: int, x: int, y: int, width: int, height: int, *, patch: bool = False) -> np.ndarray:
        """uint8 (height, width, 3) at a position in pixels of that level; white outside. Raises SlideReadError.

        With `patch`, a block that the file lacks or that is damaged is no error but filled from another level or its surroundings:
        for overviews.
        """
        ...

    def close(self) -> None: ...


def open_reader(path: Path) -> Reader:
    """The reader for a file.

    Raises:
        SlideUnreadableError: nothing opens it; the message says why.
    """
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a pipe would wait for whoever writes into it
            raise SlideUnreadableError("not a regular file (a pipe?)")
        with open(path, "rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as error:
        raise SlideUnreadableError("no such file") from error
    except (OSError, ValueError) as error:
        raise SlideUnreadableError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if empty:
        raise SlideUnreadableError("the file is empty")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageReader(path)
    try:
        return OpenSlideReader(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        if path.suffix.lower() in (".tif", ".tiff"):
            if reason := _beyond_a_plain_tiff(path):
                raise SlideUnreadableError(reason) from error
            return ImageReader(path)
        raise SlideUnreadableError("no reader knows this file: it is damaged, or not a slide") from error
    except openslide.OpenSlideError as error:
        raise SlideUnreadableError(f"OpenSlide cannot open it: {error}") from error


class OpenSlideReader:
    """A file that OpenSlide opens. Reads may come from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = openslide.OpenSlide(path)
        properties = self._slide.properties
        self.kind = f"openslide:{properties.get(openslide.PROPERTY_NAME_VENDOR, 'unknown')}"
        if self.kind == "openslide:generic-tiff" and (reason := _not_rgb(path)):
            self._slide.close()
            raise SlideUnreadableError(reason)
        self.file_mpp, self.mpp_key = _ome_mpp(properties.get("tiff.ImageDescription", ""), path.name)
        if self.file_mpp is None:
            x, y = properties.get(openslide.PROPERTY_NAME_MPP_X), properties.get(openslide.PROPERTY_NAME_MPP_Y)
            self.file_mpp = _mean_mpp(_positive(x), _positive(y), path.name)
            self.mpp_key = "openslide.mpp" if self.file_mpp else None
        self.bounds = _stated_bounds(properties)
        self.level_dimensions = tuple(self._slide.level_dimensions)
        # asked now: of a handle that a failed read has spoiled nothing can be asked any more
        self._downsamples = self._slide.level_downsamples
        self._block_px = [
            (
                int(properties.get(f"openslide.level[{level}].tile-width", width)),
                int(properties.get(f"openslide.level[{level}].tile-height", height)),
            )
            for level, (width, height) in enumerate(self.level_dimensions)
        ]
        self._offsets, self.level_origins = self._placement()
        self._own: list[BlockLevel | str | None] = [None] * len(self.level_dimensions)
        self._own[0] = "never blended"

    def read(self, level: int, x: int, y: int, width: int, height: int, *, patch: bool = False) -> np.ndarray:
        try:
            if (own := self._own_pixels(level, x, y, width, height)) is not None:
                return own
            region = self._region(level, x, y, width, height)
        except SlideReadError:
            if not patch:
                raise
            return self._read_around_damage(level, x, y, width, height)
        pixels, alpha = region.convert("RGB"), region.getchannel("A")
        if alpha.getextrema() == (255, 255):
            return np.asarray(pixels)
        # at the rim a pixel may be half covered: it is scanned or it is not, and takes no white
        clear = np.asarray(alpha) < 128
        on_white = np.array(pixels)
        on_white[clear] = 255
        if self.kind in _STORE_EVERY_BLOCK:
            lost = self._mend(on_white, clear, level, x, y)
            if lost.any() and not patch:
                row, column = np.argwhere(lost)[0].tolist()
                at = self._level0(level, x + column, y + row)
                raise SlideReadError(f"at ({at[0]}, {at[1]}), level {level}: the block is missing in the file")
        return on_white

    def _own_pixels(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray | None:
        """A coarser level's pixels as they are stored, where OpenSlide would blend neighbours; None where they cannot be had."""
        if self._own[level] is None:
            self._own[level] = self._blocks_of(level)
        blocks = self._own[level]
        if not isinstance(blocks, BlockLevel):
            return None
        right, bottom = min(x + width, blocks.width), min(y + height, blocks.height)
        pixels = np.full((height, width, 3), 255, np.uint8)
        left, top = max(0, x), max(0, y)
        if right <= left or bottom <= top:
            return pixels
        try:
            inside = blocks.region(left, top, right, bottom)
        except BlockError as error:
            at = self._level0(level, left, top)
            raise SlideReadError(f"{right - left}×{bottom - top} px at ({at[0]}, {at[1]}), level {level}: {error}") from error
        if inside is None:  # what a gap means OpenSlide's transparency tells
            return None
        pixels[top - y : bottom - y, left - x : right - x] = inside
        return pixels

    def _blocks_of(self, level: int) -> BlockLevel | str:
        """The blocks of a level that OpenSlide would blend, or why they are left to it."""
        size = self.level_dimensions[level]
        if self.kind not in DIRECT_KINDS or abs(self._downsamples[level] - round(self._downsamples[level])) < 1e-9:
            return "nothing to blend"
        try:
            nth = self.level_dimensions[:level].count(size)
            blocks = open_blocks(self._path, size, nth=nth, gaps_spread=self.kind == "openslide:aperio")
            fullest = int(np.argmax(blocks.sizes))
            x, y = fullest % blocks.columns * blocks.block_width, fullest // blocks.columns * blocks.block_height
            right, bottom = min(x + blocks.block_width, size[0]), min(y + blocks.block_height, size[1])
            own = blocks.region(x, y, right, bottom)
            if own is None:
                return "no block at all"
            blended = np.asarray(self._region(level, x, y, right - x, bottom - y).convert("RGB"))
        except (BlocksUnknownError, BlockError, SlideReadError, OSError) as error:
            return str(error)
        # blended they may be, of other colours or from another place they may not
        small = max(1, (right - x) // 8), max(1, (bottom - y) // 8)
        one, other = (cv2.resize(picture, small, interpolation=cv2.INTER_AREA).astype(float) for picture in (own, blended))
        return blocks if np.abs(one - other).mean() < _BLENDED_APART else "other pixels than OpenSlide's"

    def _read_around_damage(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Piece by piece; what cannot be read is as its nearest neighbour. Raises SlideReadError where nothing can be read."""
        pixels, known = np.full((height, width, 3), 255, np.uint8), np.ones((height, width), bool)
        across, down = (min(side, _PIECE_PX) for side in self._block_px[level])
        error = None
        for top in range(y // down * down, y + height, down):
            for left in range(x // across * across, x + width, across):
                right, bottom = min(left + across, x + width), min(top + down, y + height)
                x0, y0 = max(left, x), max(top, y)
                here = np.s_[y0 - y : bottom - y, x0 - x : right - x]
                try:
                    pixels[here] = self.read(level, x0, y0, right - x0, bottom - y0)
                except SlideReadError as failed:
                    known[here], error = False, failed
        if error is not None and not known.any():
            raise error
        return pixels if error is None else _nearest(pixels, known)

    def _region(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        origin = self._level0(level, x, y)
        try:
            return self._slide.read_region(origin, level, (width, height))
        except openslide.OpenSlideError:
            try:
                fresh = openslide.OpenSlide(self._path)
            except openslide.OpenSlideError as error:
                raise SlideUnreadableError(f"the file was open and can no longer be opened: {error}") from error
            try:
                region = fresh.read_region(origin, level, (width, height))
            except openslide.OpenSlideError as error:
                raise SlideReadError(f"{width}×{height} px at ({origin[0]}, {origin[1]}), level {level}: {error}") from error
            self._slide = fresh  # the old handle is not closed: a neighbour may still be in it; it goes with its last user
            return region

    def _level0(self, level: int, x: int, y: int) -> tuple[int, int]:
        """Where OpenSlide must be asked for a pixel of a level."""
        downsample = self._downsamples[level]  # OpenSlide's own, by which it finds the pixel of the level again
        if self.kind != "openslide:leica":  # fractions of a level's pixel are blended, so the nearest
            return round(x * downsample), round(y * downsample)
        # for Leica the distance from the scanned area is cut off, on either side of it towards the area
        origin = [
            (math.ceil if at >= offset else math.floor)(at * downsample)
            for at, offset in zip((x, y), self._offsets[level], strict=True)
        ]
        return origin[0], origin[1]

    def _placement(self) -> tuple[list[tuple[int, int]], tuple[tuple[float, float], ...]]:
        """Where the scanned area begins in each level (px of the level), and so each level's `level_origins`.

        OpenSlide lets Leica's area begin on a whole pixel of every level, cutting fractions off: each level lies elsewhere.
        """
        x, y = self.bounds[:2] if self.bounds and self.kind == "openslide:leica" else (0, 0)
        full_width, full_height = self.level_dimensions[0]
        offsets, origins = [], []
        for width, height in self.level_dimensions:
            per_x, per_y = level_downsample(full_width, width), level_downsample(full_height, height)
            offsets.append((int(x / per_x), int(y / per_y)))
            origins.append((x - int(x / per_x) * per_x, y - int(y / per_y) * per_y))
        return offsets, tuple(origins)

    def _mend(self, pixels: np.ndarray, clear: np.ndarray, level: int, x: int, y: int) -> np.ndarray:
        """Which pixels (h, w) are clear because the file lacks their block; `pixels` there are mended as well as can be."""
        width, height = self.level_dimensions[level]
        lost = np.zeros_like(clear)
        if self.kind == "openslide:aperio":  # its writers leave nothing out; OpenSlide clears the place in the coarser levels too
            rim = min(level, 1)  # of a coarser level the outermost pixels can be half covered
            inside = np.s_[max(0, rim - y) : max(0, height - rim - y), max(0, rim - x) : max(0, width - rim - x)]
            lost[inside] = clear[inside]
            if lost.any() and not clear.all():
                pixels[lost] = _nearest(pixels, ~clear)[lost]
            return lost
        across, down = self._block_px[level]
        rows, columns = clear.shape
        for top in range(max(0, y) // down * down, min(height, y + rows), down):
            for left in range(max(0, x) // across * across, min(width, x + columns), across):
                right, bottom = min(left + across, width), min(top + down, height)
                here = np.s_[max(0, top - y) : max(0, bottom - y), max(0, left - x) : max(0, right - x)]
                # pixels at a rim or beside a gap can be half covered: the middle of the block tells
                if not clear[here].any() or not self._is_clear(level, (left + right) // 2, (top + bottom) // 2):
                    continue
                if (seen := self._seen_elsewhere(level, left, top, right, bottom)) is not None:
                    block = cv2.resize(seen, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
                    block = block[max(0, y - top) : y + rows - top, max(0, x - left) : x + columns - left]
                    lost[here] = clear[here]
                    pixels[here][clear[here]] = block[clear[here]]
        return lost

    def _is_clear(self, level: int, x: int, y: int) -> bool:
        return np.asarray(self._region(level, x, y, 1, 1))[0, 0, 3] < 128

    def _seen_elsewhere(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray | None:
        """What the nearest level that has a place shows there, coarser ones first; None if that is nothing."""
        for other in [*range(level + 1, len(self.level_dimensions)), *([level - 1] if level else [])]:
            ratio = self._downsamples[level] / self._downsamples[other]
            # a pixel of margin: the neighbours' colour runs into the rim
            x0, x1 = _inner(left * ratio, right * ratio)
            y0, y1 = _inner(top * ratio, bottom * ratio)
            region = np.asarray(self._region(other, x0, y0, x1 - x0, y1 - y0))
            colors, there = region[..., :3], region[..., 3] >= 128
            if there.any():
                # black is what writers leave where they had nothing
                something = (colors.min(2) < _GLASS) & (colors.max(2) > _UNFILLED)
                return np.ascontiguousarray(colors) if something[there].mean() > 0.01 else None
        return None

    def close(self) -> None:
        self._slide.close()


class ImageReader:
    """A PNG, JPEG, WebP, BMP or flat TIFF, held in memory whole. Dots per inch say nothing about a microscope: ignored.

    Pixels are as stored: an EXIF orientation is not applied, but for TIFF, which Pillow turns. Pillow's limit against decompression
    bombs holds (179 megapixels).
    """

    bounds: tuple[int, int, int, int] | None = None

    def __init__(self, path: Path) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(path)
        except Image.DecompressionBombError as error:
            raise SlideUnreadableError(
                "too many pixels for a plain image (the limit is 179 million); convert it to a pyramidal TIFF, "
                "for example with `vips tiffsave in out.tiff --tile --pyramid --compression jpeg`"
            ) from error
        except UnidentifiedImageError as error:
            raise SlideUnreadableError("no reader knows this file: it is damaged, or not an image") from error
        except Exception as error:  # whatever a broken file makes Pillow trip over
            raise SlideUnreadableError(f"not an image that can be read: {error}") from error
        with image:
            bits = getattr(image, "tag_v2", {}).get(258, (8,))
            if image.mode.startswith(("I", "F")) or max(bits) > 8:
                raise SlideUnreadableError(f"pixels of mode {image.mode} (more than 8 bits a channel); convert it to 8-bit RGB")
            self.kind = f"image:{(image.format or 'unknown').lower()}"
            description = getattr(image, "tag_v2", {}).get(270, "")
            self.file_mpp, self.mpp_key = _ome_mpp(str(description), path.name)
            try:
                self._pixels = _on_white(image)
            except Exception as error:
                raise SlideUnreadableError(f"the image breaks off or is damaged: {error}") from error
        self.level_dimensions = ((self._pixels.shape[1], self._pixels.shape[0]),)
        self.level_origins = ((0.0, 0.0),)

    def read(self, level: int, x: int, y: int, width: int, height: int, *, patch: bool = False) -> np.ndarray:
        inside = self._pixels[max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)]
        if inside.shape[:2] == (height, width):
            return inside
        region = np.full((height, width, 3), 255, np.uint8)
        top, left = max(0, -y), max(0, -x)
        region[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        return region

    def close(self) -> None:
        pass


def level_downsample(full_px: int, level_px: int) -> float:
    """How many times smaller a level is: a whole number where that is true but for the odd last pixel."""
    whole = round(full_px / level_px)
    return float(whole) if abs(full_px / whole - level_px) < 1 else full_px / level_px


def _beyond_a_plain_tiff(path: Path) -> str | None:
    """Why a TIFF that OpenSlide does not open should not be held in memory as a picture either: it is a slide."""
    try:
        with tifffile.TiffFile(path) as tiff:
            tiled = [page for page in tiff.pages if isinstance(page, tifffile.TiffPage) and page.is_tiled]
            order = "its byte order is big-endian; " if tiff.byteorder == ">" else ""
    except Exception:  # Pillow's word on a broken file is as good
        return None
    if len({page.shape for page in tiled}) < 2:
        return None
    return f"a tiled pyramid that OpenSlide does not open ({order}{_SAVE_ANEW})"


def _not_rgb(path: Path) -> str | None:
    """Why the pixels of a plain tiled TIFF are no 8-bit picture: OpenSlide would show their upper bits, or one channel."""
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            bits = np.max(page.bitspersample) if isinstance(page, tifffile.TiffPage) else 8
            channels = re.search(r'SizeC\s*=\s*"(\d+)"', tiff.ome_metadata or "")
            alone = isinstance(page, tifffile.TiffPage) and page.samplesperpixel == 1
            turned = page.tags.valueof(274, 1) if isinstance(page, tifffile.TiffPage) and page.compression != 7 else 1
    except Exception:  # OpenSlide opens it
        return None
    if bits > 8:
        return f"{bits} bits a channel; convert it to 8-bit RGB"
    if turned != 1:  # OpenSlide turns each tile by itself
        return f"stored turned or mirrored (orientation {int(turned)}); {_SAVE_ANEW}"
    if alone and channels and int(channels[1]) > 1:
        return f"{channels[1]} channels, each a page of its own; {_SAVE_ANEW}"
    return None


def _on_white(image: Image.Image) -> np.ndarray:
    """uint8 RGB (height, width, 3), transparent parts white."""
    if not image.has_transparency_data:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))


def _ome_mpp(description: str, name: str) -> tuple[float | None, str | None]:
    """µm/px that an OME-XML description states for its first image."""
    pixels = re.search(r"<(?:\w+:)?Pixels\s[^>]*>", description)
    if pixels is None:
        return None, None
    attributes = dict(re.findall(r'(\w+)\s*=\s*"([^"]*)"', pixels[0]))

    def size_um(axis: str) -> float | None:
        unit = attributes.get(f"PhysicalSize{axis}Unit", "µm")
        # the micro sign comes in many spellings and broken encodings: whatever is no other unit is µm
        per_unit = {"nm": 1e-3, "mm": 1e3, "cm": 1e4, "pixel": None, "reference frame": None}.get(unit, 1.0)
        size = _positive(attributes.get(f"PhysicalSize{axis}"))
        return size * per_unit if size and per_unit else None

    mpp = _mean_mpp(size_um("X"), size_um("Y"), name)
    return mpp, "ome.PhysicalSize" if mpp else None


def _mean_mpp(x: float | None, y: float | None, name: str) -> float | None:
    if x and y and abs(x / y - 1) > 0.01:
        warnings.warn(f"{name}: pixels are not square, {x:g} by {y:g} µm; their mean is used", stacklevel=2)
    return (x + y) / 2 if x and y else x or y


def _nearest(pixels: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Every pixel's nearest known one."""
    _, labels = cv2.distanceTransformWithLabels((~known).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    nearest = labels.astype(np.intp)  # number of the nearest known pixel
    colors = np.zeros((nearest.max() + 1, 3), np.uint8)
    colors[nearest[known]] = pixels[known]
    return colors[nearest]


def _inner(low: float, high: float) -> tuple[int, int]:
    """Whole pixels well inside an interval, at least one."""
    first, last = math.ceil(low) + 1, math.floor(high) - 1
    middle = int((low + high) / 2)
    return (first, last) if last > first else (middle, middle + 1)


def _stated_bounds(properties: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    try:
        x, y, width, height = (int(properties[f"openslide.bounds-{name}"]) for name in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return None
    return x, y, width, height


def _positive(text: str | None) -> float | None:
    try:
        value = float(text) if text else 0.0
    except ValueError:
        return None
    return value if 0 < value < math.inf else None

"""How pixels come out of a file: OpenSlide for slides, Pillow for plain images.

- Which reader opens a file follows from its suffix and content, never from what failed before; it is recorded in the bag.
- A reader gives RGB on white: what the scanner did not fill is glass.
- After a failed read OpenSlide's handle is spoiled for good, and with it the reads of other threads: a read that fails is tried
  once more on a handle of its own. So what can be read does not depend on its neighbours.
- OME's PhysicalSize is believed before the TIFF resolution, which many writers leave at 72 dots per inch.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import openslide
from PIL import Image, UnidentifiedImageError

from wsimil.errors import SlideReadError, SlideUnreadableError
from wsimil.files import IMAGE_SUFFIXES

__all__ = ["Reader", "open_reader"]


class Reader(Protocol):
    """Pixels of one file, in levels from fine to coarse."""

    kind: str  # as recorded, e.g. "openslide:aperio"
    file_mpp: float | None  # what the file states
    mpp_key: str | None  # where it states it
    bounds: tuple[int, int, int, int] | None  # x, y, width, height of the scanned part, level-0 px
    level_dimensions: tuple[tuple[int, int], ...]  # (width, height)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """uint8 (height, width, 3) at a position in pixels of that level; white outside. Raises SlideReadError."""
        ...

    def close(self) -> None: ...


def open_reader(path: Path) -> Reader:
    """The reader for a file.

    Raises:
        SlideUnreadableError: nothing opens it; the message says why.
    """
    try:
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
        if path.suffix.lower() in (".tif", ".tiff"):  # a plain TIFF: neither tiled nor a pyramid
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
        self.file_mpp, self.mpp_key = _ome_mpp(properties.get("tiff.ImageDescription", ""), path.name)
        if self.file_mpp is None:
            x, y = properties.get(openslide.PROPERTY_NAME_MPP_X), properties.get(openslide.PROPERTY_NAME_MPP_Y)
            self.file_mpp = _mean_mpp(_positive(x), _positive(y), path.name)
            self.mpp_key = "openslide.mpp" if self.file_mpp else None
        self.bounds = _stated_bounds(properties)
        self.level_dimensions = tuple(self._slide.level_dimensions)
        self._downsamples = self._slide.level_downsamples

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        downsample = self._downsamples[level]  # OpenSlide's own, by which it finds the pixel of the level again
        # fractions of a level's pixel are blended, so the nearest; but for Leica they are cut off
        whole = math.ceil if self.kind == "openslide:leica" else round
        origin = (whole(x * downsample), whole(y * downsample))
        try:
            region = self._slide.read_region(origin, level, (width, height))
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
        if (alpha := region.getchannel("A")).getextrema() == (255, 255):
            return np.asarray(region.convert("RGB"))
        # at the rim a pixel may be half covered: it is scanned or it is not, and takes no white
        white = Image.new("RGB", region.size, "white")
        white.paste(region.convert("RGB"), mask=alpha.point([0] * 128 + [255] * 128))
        return np.asarray(white)

    def close(self) -> None:
        self._slide.close()


class ImageReader:
    """A PNG, JPEG, WebP, BMP or flat TIFF, held in memory whole. Dots per inch say nothing about a microscope: ignored.

    Pixels are as stored: an EXIF orientation is not applied. Pillow's limit against decompression bombs holds (179 megapixels).
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
            if image.mode.startswith(("I", "F")):
                raise SlideUnreadableError(f"pixels of mode {image.mode} (more than 8 bits a channel); convert it to 8-bit RGB")
            self.kind = f"image:{(image.format or 'unknown').lower()}"
            description = getattr(image, "tag_v2", {}).get(270, "")
            self.file_mpp, self.mpp_key = _ome_mpp(str(description), path.name)
            try:
                self._pixels = _on_white(image)
            except Exception as error:
                raise SlideUnreadableError(f"the image breaks off or is damaged: {error}") from error
        self.level_dimensions = ((self._pixels.shape[1], self._pixels.shape[0]),)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        inside = self._pixels[max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)]
        if inside.shape[:2] == (height, width):
            return inside
        region = np.full((height, width, 3), 255, np.uint8)
        top, left = max(0, -y), max(0, -x)
        region[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        return region

    def close(self) -> None:
        pass


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

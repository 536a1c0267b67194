"""Small pyramidal TIFF slides that OpenSlide opens, so that tests and the demo need no download.

- Three makers: `generic` (µm/px in the TIFF resolution tags), `aperio` (µm/px in the description) and `leica` (an SCN
  file: the scanned area lies inside a larger canvas, so OpenSlide reports bounds, as it does for MIRAX).
- Aperio JPEG keeps one set of tables for all tiles of a level, as real files do: no tile can be decoded on its own.
- `deflate`, `none` and `jpeg2000` give back the very pixels that went in; the two kinds of JPEG do not.
- Tiles that overhang the picture repeat its edge: a black filling would ring into the JPEG of the last rows.
- A file appears under its name only when it is whole.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import imagecodecs
import numpy as np
import tifffile

from wsimil.units import nominal_magnification

__all__ = ["Chroma", "Compression", "Vendor", "write_slide"]

Vendor = Literal["generic", "aperio", "leica"]
Compression = Literal["jpeg", "jpeg-rgb", "jpeg2000", "deflate", "none"]
Chroma = Literal["4:2:0", "4:2:2", "4:4:4"]

_SUBSAMPLING = {"4:2:0": (2, 2), "4:2:2": (2, 1), "4:4:4": (1, 1)}
_APERIO_JPEG2000_RGB = 33005
_LEICA_MARGIN_PX = 200
"""Empty canvas right of and below the scanned area of a leica slide."""


def write_slide(
    path: str | os.PathLike[str],
    rgb: np.ndarray,  # (H, W, 3) uint8
    *,
    mpp: float | None,
    vendor: Vendor = "generic",
    downsamples: Sequence[float] = (1, 4, 16),
    compression: Compression = "jpeg",
    chroma: Chroma = "4:2:0",
    quality: int = 80,
    tile_px: int = 256,
    bounds_offset_px: tuple[int, int] = (1000, 600),
) -> None:
    """Write `rgb` as a tiled pyramid; `mpp=None` leaves the scale out of the file.

    `downsamples` need not be whole numbers, but the first is 1. `quality` (1-100) is for both kinds of JPEG, `chroma`
    for `jpeg` alone; `jpeg-rgb` keeps the three colours whole; `jpeg2000` is lossless and for aperio only (33005).
    `bounds_offset_px` is where a leica slide's scanned area starts on its canvas. Aperio files state µm/px to four
    decimals, as real ones do.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"rgb: expected (H, W, 3) uint8, got {rgb.shape} {rgb.dtype}")
    if not downsamples or downsamples[0] != 1 or list(downsamples) != sorted(set(downsamples)):
        raise ValueError(f"downsamples: expected 1 and then larger numbers, got {tuple(downsamples)}")
    if vendor not in get_args(Vendor) or compression not in get_args(Compression) or chroma not in _SUBSAMPLING:
        raise ValueError(f"no such kind of slide: vendor {vendor!r}, compression {compression!r}, chroma {chroma!r}")
    if vendor == "leica" and mpp is None:
        raise ValueError("vendor leica: an SCN file cannot leave µm/px out; give mpp")
    if compression == "jpeg2000" and vendor != "aperio":
        raise ValueError(f"compression jpeg2000: OpenSlide reads it in aperio files only, not in {vendor}")

    levels = [_reduce(rgb, downsample) for downsample in downsamples]
    descriptions: list[str | None] = [None] * len(levels)
    if vendor == "aperio":
        descriptions = [_aperio_description(rgb, level, mpp, tile_px, quality) for level in levels]
    elif vendor == "leica":
        assert mpp is not None
        canvas_px = tuple(o + s + _LEICA_MARGIN_PX for o, s in zip(bounds_offset_px, rgb.shape[1::-1], strict=True))
        descriptions = [_leica_description(levels, mpp, bounds_offset_px, canvas_px), *descriptions]
        levels = [_leica_macro(rgb, bounds_offset_px, canvas_px), *levels]  # the overview comes first in the file

    options: dict[str, Any] = {"tile": (tile_px, tile_px), "photometric": "rgb", "metadata": None, "maxworkers": 1}
    jpeg: dict[str, Any] = {"level": quality, "outcolorspace": "rgb" if compression == "jpeg-rgb" else "ycbcr"}
    subsampling = _SUBSAMPLING[chroma] if compression == "jpeg" else (1, 1)
    if compression in ("jpeg", "jpeg-rgb"):
        options |= {"compression": "jpeg", "subsampling": subsampling, "compressionargs": dict(jpeg)}
    elif compression == "jpeg2000":
        options |= {"compression": _APERIO_JPEG2000_RGB, "compressionargs": {"level": 0, "reversible": True}}
    elif compression == "deflate":
        options |= {"compression": "deflate", "predictor": True}

    path = Path(path)
    unfinished = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with tifffile.TiffWriter(unfinished, bigtiff=vendor == "leica" or rgb.nbytes > 2**31) as tiff:
            for index, (level, description) in enumerate(zip(levels, descriptions, strict=True)):
                level_options = dict(options)
                overview = vendor == "leica" and index == 0
                if vendor != "aperio" and mpp is not None and not overview:
                    per_cm = 1e4 / mpp * level.shape[1] / rgb.shape[1]
                    level_options |= {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
                if vendor == "generic" and index:
                    level_options["subfiletype"] = 1  # a reduced version; OpenSlide skips pages that do not say so
                tiles: Iterator[np.ndarray] | Iterator[bytes] = _tiles(level, tile_px)
                if vendor == "aperio" and options.get("compression") == "jpeg":
                    encode = functools.partial(
                        imagecodecs.jpeg8_encode, colorspace="rgb", subsampling=subsampling, **jpeg
                    )
                    tiles, level_options["jpegtables"] = _share_tables([bytes(encode(tile)) for tile in tiles])
                tiff.write(tiles, shape=level.shape, dtype=np.uint8, description=description, **level_options)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _reduce(rgb: np.ndarray, downsample: float) -> np.ndarray:
    if downsample == 1:
        return rgb
    height, width = (max(1, round(side / downsample)) for side in rgb.shape[:2])
    return cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)


def _tiles(level: np.ndarray, tile_px: int) -> Iterator[np.ndarray]:
    for y in range(0, level.shape[0], tile_px):
        for x in range(0, level.shape[1], tile_px):
            tile = level[y : y + tile_px, x : x + tile_px]
            missing = [(0, tile_px - side) for side in tile.shape[:2]]
            yield np.pad(tile, [*missing, (0, 0)], mode="edge") if tile.shape[:2] != (tile_px, tile_px) else tile


def _share_tables(encoded: list[bytes]) -> tuple[Iterator[bytes], bytes]:
    """Take the quantisation and Huffman tables, equal in all tiles of one quality, out of each; return them once."""
    tiles: list[bytes] = []
    tables = b""
    for jpeg in encoded:
        kept, tables, at = jpeg[:2], b"", 2
        while (marker := jpeg[at : at + 2]) != b"\xff\xda":  # start of scan: the pixels follow
            end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
            if marker in (b"\xff\xdb", b"\xff\xc4"):
                tables += jpeg[at:end]
            else:
                kept += jpeg[at:end]
            at = end
        tiles.append(kept + jpeg[at:])
    return iter(tiles), b"\xff\xd8" + tables + b"\xff\xd9"


def _aperio_description(rgb: np.ndarray, level: np.ndarray, mpp: float | None, tile_px: int, quality: int) -> str:
    (height, width), (level_height, level_width) = rgb.shape[:2], level.shape[:2]
    reduced = "" if level is rgb else f" -> {level_width}x{level_height}"
    scale = "" if mpp is None else f"|AppMag = {nominal_magnification(mpp)}|MPP = {mpp:.4f}"
    return (
        f"Aperio Image Library v11.2.1\r\n{width}x{height} [0,0 {width}x{height}] ({tile_px}x{tile_px}){reduced}"
        f" JPEG/RGB Q={quality}{scale}"
    )


def _leica_macro(rgb: np.ndarray, offset_px: tuple[int, int], canvas_px: tuple[int, ...]) -> np.ndarray:
    reduction = max(1.0, max(canvas_px) / 512)
    small = _reduce(rgb, reduction)
    macro = np.full((*(round(side / reduction) + 1 for side in canvas_px[::-1]), 3), 255, np.uint8)
    x, y = (round(side / reduction) for side in offset_px)
    macro[y : y + small.shape[0], x : x + small.shape[1]] = small
    return macro


def _leica_description(
    levels: Sequence[np.ndarray], mpp: float, offset_px: tuple[int, int], canvas_px: tuple[int, ...]
) -> str:
    """Leica's XML, lengths in nm: image 0 is the overview of the whole canvas, image 1 the scanned area."""
    nm = mpp * 1000

    def size(pixels: Sequence[float]) -> str:
        return f'sizeX="{round(pixels[0] * nm)}" sizeY="{round(pixels[1] * nm)}"'

    def image(name: str, view: str, objective: int, pages: Sequence[tuple[int, tuple[int, int]]]) -> str:
        dimensions = "".join(
            f'<dimension sizeX="{width}" sizeY="{height}" r="{r}" ifd="{ifd}"/>'
            for r, (ifd, (width, height)) in enumerate(pages)
        )
        width, height = pages[0][1]
        return (
            f'<image name="{name}"><creationDate>2000-01-01T00:00:00Z</creationDate>'
            '<device model="synthetic" version="1"/>'
            f'<pixels sizeX="{width}" sizeY="{height}">{dimensions}</pixels><view {view}/>'
            f"<scanSettings><objectiveSettings><objective>{objective}</objective></objectiveSettings>"
            "<illuminationSettings><illuminationSource>brightfield</illuminationSource></illuminationSettings>"
            "</scanSettings></image>"
        )

    reduction = max(1.0, max(canvas_px) / 512)
    macro = round(canvas_px[0] / reduction) + 1, round(canvas_px[1] / reduction) + 1
    scanned = [(level.shape[1], level.shape[0]) for level in levels]
    # rounded up: a reader that divides by the size of a pixel, in nm as above, and cuts off finds the very pixel
    pixel_nm = max(round(side * nm) / side for side in scanned[0])
    offset_nm = [math.ceil(side * pixel_nm) for side in offset_px]
    offset = f'offsetX="{offset_nm[0]}" offsetY="{offset_nm[1]}"'
    return (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="synthetic" {size(canvas_px)}>'
        + image("overview", f'{size(canvas_px)} offsetX="0" offsetY="0"', 1, [(0, macro)])
        + image("scan", f"{size(scanned[0])} {offset}", nominal_magnification(mpp), list(enumerate(scanned, 1)))
        + "</collection></scn>"
    )

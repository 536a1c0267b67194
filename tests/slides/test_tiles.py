"""Tiles come in order and right to the bit; a tile that cannot be read is named and never passes for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from wsimil.slides.slide import Slide
from wsimil.slides.tiles import open_tiles
from wsimil.slides.tiling import Tiles, tile_grid
from wsimil.slides.write_tiff import write_slide

PX = 32  # of a tile, and of a block in the file: 20 × 20 of them


@pytest.fixture(scope="module")
def source() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20 * PX, 20 * PX, 3), dtype=np.uint8)


@pytest.fixture
def path(source: np.ndarray, tmp_path: Path) -> Path:
    write_slide(tmp_path / "s.tiff", source, mpp=0.5, downsamples=(1,), compression="deflate", tile_px=PX)
    return tmp_path / "s.tiff"


def damage(path: Path, blocks: list[int]) -> None:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        places = [(page.dataoffsets[block], page.databytecounts[block]) for block in blocks]
    with open(path, "r+b") as file:
        for offset, count in places:
            file.seek(offset)
            file.write(bytes(count))


def grid(slide: Slide) -> Tiles:
    return tile_grid(slide.bounds, tile_level0_px=PX, step_level0_px=PX)


def everything(path: Path) -> tuple[np.ndarray, dict[int, str]]:
    with Slide(path) as slide:
        coords = grid(slide).coords_level0_px
        pixels = np.full((len(coords), PX, PX, 3), 7, np.uint8)  # what an earlier slide left there
        return pixels, walk(slide, coords, pixels)


def walk(slide: Slide, coords: np.ndarray, pixels: np.ndarray, *, at_once: int = 64) -> dict[int, str]:
    reader, reason = open_tiles(slide, tile_level0_px=PX, tile_px=PX)
    assert reason is not None, "deflate is not read directly"
    tiles = reader.walk(coords)
    failures: dict[int, str] = {}
    for start in range(0, len(coords), at_once):
        failures |= tiles.read(pixels[start : start + at_once])
    return failures


def test_a_tile_fails_for_its_own_faults_only(path: Path, source: np.ndarray) -> None:
    """OpenSlide's handle is spoiled by any error: a reader that went on with it would lose every tile after a bad one."""
    damage(path, [17, 40, 41, 42, 43, 399])
    pixels, failures = everything(path)
    expected = source.reshape(20, PX, 20, PX, 3).swapaxes(1, 2).reshape(400, PX, PX, 3).copy()
    expected[[17, 40, 41, 42, 43, 399]] = 0
    assert (pixels == expected).all()
    assert failures.keys() == {17, 40, 41, 42, 43, 399}
    assert all("ZIPDecode" in reason and "\n" not in reason for reason in failures.values())


def test_the_order_of_tiles_changes_nothing_else(path: Path) -> None:
    order = np.random.default_rng(0).permutation(400)
    pixels = np.empty((400, PX, PX, 3), np.uint8)
    with Slide(path) as slide:
        assert walk(slide, grid(slide).coords_level0_px[order], pixels, at_once=7) == {}
    assert (pixels == everything(path)[0][order]).all()


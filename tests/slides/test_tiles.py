"""Tiles come in order, right to the bit, whatever the threads; a tile that cannot be read is marked and never passes for one."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from wsimil.errors import SlideUnreadableError
from wsimil.slides.slide import Slide
from wsimil.slides.tiles import TileBatch, read_tiles
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


def everything(path: Path, **options: int) -> tuple[np.ndarray, dict[int, str], list[TileBatch]]:
    with Slide(path) as slide:
        batches = list(read_tiles(slide, grid(slide), tile_px=PX, **options))
    failures = {row: reason for batch in batches for row, reason in batch.failures.items()}
    return np.concatenate([batch.pixels for batch in batches]), failures, batches


@pytest.mark.parametrize("workers", [1, 5])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_neither_threads_nor_batches_change_a_pixel(path: Path, source: np.ndarray, workers: int, batch_size: int) -> None:
    damage(path, [17, 399])
    pixels, failures, batches = everything(path, workers=workers, batch_size=batch_size)
    expected = source.reshape(20, PX, 20, PX, 3).swapaxes(1, 2).reshape(400, PX, PX, 3).copy()
    expected[[17, 399]] = 0
    assert pixels.dtype == np.uint8
    assert (pixels == expected).all()
    assert failures.keys() == {17, 399}
    assert [batch.first for batch in batches] == list(range(0, 400, batch_size))
    assert all(row in range(batch.first, batch.first + len(batch.pixels)) for batch in batches for row in batch.failures)


def test_a_tile_fails_for_its_own_faults_only(path: Path) -> None:
    """OpenSlide's handle is spoiled by any error: a reader that shares it would lose good tiles of other threads."""
    damage(path, [40, 41, 42, 43])
    for _ in range(3):
        assert everything(path, workers=8)[1].keys() == {40, 41, 42, 43}


def test_the_order_of_tiles_changes_nothing_else(path: Path) -> None:
    with Slide(path) as slide:
        tiles = grid(slide)
        order = np.random.default_rng(0).permutation(400)
        shuffled = Tiles(tiles.coords_level0_px[order], tiles.tissue[order], tiles.tile_level0_px)
        pixels = np.concatenate([batch.pixels for batch in read_tiles(slide, shuffled, tile_px=PX)])
    assert (pixels == everything(path)[0][order]).all()


def test_one_in_a_hundred_may_be_unreadable(path: Path) -> None:
    damage(path, [3, 77, 200, 399])
    pixels, failures, _ = everything(path)
    assert sorted(failures) == [3, 77, 200, 399]
    assert all("ZIPDecode" in reason and "\n" not in reason for reason in failures.values())
    assert not pixels[sorted(failures)].any()


def test_more_than_one_in_a_hundred_ends_the_slide_early(path: Path) -> None:
    damage(path, [0, 1, 2, 3, 4])
    with Slide(path) as slide:
        batches = read_tiles(slide, grid(slide), tile_px=PX, batch_size=16)
        with pytest.raises(SlideUnreadableError, match=r"5 of the first 16 tiles \(of 400\).*1%.*ZIPDecode"):
            next(batches)


def test_one_bad_tile_of_a_few_ends_the_slide(path: Path) -> None:
    damage(path, [5])
    with Slide(path) as slide:
        tiles = grid(slide)
        few = Tiles(tiles.coords_level0_px[:99], tiles.tissue[:99], tiles.tile_level0_px)
        with pytest.raises(SlideUnreadableError):
            list(read_tiles(slide, few, tile_px=PX))


def test_no_tiles_no_batches(path: Path) -> None:
    with Slide(path) as slide:
        none = Tiles(np.zeros((0, 2), np.int64), np.zeros(0, np.float32), float(PX))
        assert list(read_tiles(slide, none, tile_px=PX)) == []


def test_reading_ahead_is_bounded_and_ends_with_its_reader(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Slide(path) as slide:
        started = []
        read_tile = slide.read_tile

        def counted(x: int, y: int, *, tile_level0_px: float, tile_px: int) -> np.ndarray:
            started.append((x, y))
            return read_tile(x, y, tile_level0_px=tile_level0_px, tile_px=tile_px)

        monkeypatch.setattr(slide, "read_tile", counted)
        batches = read_tiles(slide, grid(slide), tile_px=PX, batch_size=10, workers=3)
        next(batches)
        time.sleep(0.3)  # time enough to read all, if they were asked for
        assert len(started) <= 10 + 2 * 10 + 3
        batches.close()  # as when the consumer raises
        assert len(started) <= 10 + 2 * 10 + 3
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("tiles")]

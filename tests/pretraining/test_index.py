"""What can be drawn: tissue cells of slides, or pictures, and a hash that changes with whatever draws depend on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import speckled
from PIL import Image

from wsimil.config import JobConfig, TileConfig
from wsimil.errors import UsageError, WsimilError
from wsimil.extraction.job import read_status
from wsimil.files import hash_of, mark_output
from wsimil.pretraining.index import index_slides, index_tiles
from wsimil.slides.write_tiff import write_slide

TILE = TileConfig(tile_px=64)
JOB = JobConfig(workers=2)


def test_cells_are_the_tiles_of_an_ordinary_job(slides: Path, tmp_path: Path) -> None:
    said: list[str] = []
    index = index_slides(slides, tmp_path / "job", tile=TILE, job=JOB, quiet=True, say=said.append)
    assert [slide.slide_id for slide in index.slides] == ["a", "b"]
    assert index.left_out == (("glass", "no tissue"),) and "glass (no tissue)" in said[0]
    assert {name: row.status for name, row in read_status(tmp_path / "job" / "status.csv").items()} == {
        "a": "done",
        "b": "done",
        "glass": "empty",
    }
    a, b = index.slides
    assert (a.mpp, a.cell_level0_px, a.width, a.height) == (0.5, 64, 600, 400)
    assert (b.mpp, b.cell_level0_px) == (pytest.approx(0.25), 128)
    assert len(a.cells_level0_px) == 9 * 6 and len(b.cells_level0_px) == 8 * 6 and index.n_cells == 102
    assert a.area == pytest.approx(54 * 0.032**2)  # mm²
    # read back, and the same; another shard of the run is no reason to lack slides
    again = index_slides(slides, tmp_path / "job", tile=TILE, job=JobConfig(workers=1, shard="1/3"), quiet=True)
    assert again.hash == index.hash and np.array_equal(again.slides[1].cells_level0_px, b.cells_level0_px)
    # only those of a fold: the others are not opened
    part = index_slides(slides, tmp_path / "part", tile=TILE, job=JOB, only={"b"}, quiet=True)
    assert [slide.slide_id for slide in part.slides] == ["b"] and part.hash != index.hash
    assert read_status(tmp_path / "part" / "status.csv").keys() == {"b"}
    with pytest.raises(UsageError, match="1 slides of the split are not there: c"):
        index_slides(slides, tmp_path / "part", tile=TILE, job=JOB, only={"b", "c"}, quiet=True)


def test_the_hash_is_of_the_files_and_the_tiling(slides: Path, tmp_path: Path) -> None:
    def hash_of_index(tile: TileConfig = TILE) -> str:
        return index_slides(slides, tmp_path / "job", tile=tile, job=JOB, only={"a"}, quiet=True).hash

    first = hash_of_index()
    assert hash_of_index(TileConfig(tile_px=64, min_tissue=0.6)) != first
    write_slide(slides / "a.tiff", speckled(600, 400, 5), mpp=0.5, compression="deflate", downsamples=(1, 4))
    assert hash_of_index() != first


def test_more_than_a_tenth_of_failed_slides_is_an_error_that_names_them(slides: Path, tmp_path: Path) -> None:
    for place in range(7):
        shutil.copy(slides / "a.tiff", slides / f"copy{place}.tiff")
    (slides / "broken.svs").write_bytes(b"not a slide")
    index = index_slides(slides, tmp_path / "job", tile=TILE, job=JOB, quiet=True)  # 1 of 11
    assert dict(index.left_out).keys() == {"broken", "glass"}
    (slides / "bad.svs").write_bytes(b"not a slide")
    with pytest.raises(WsimilError, match=r"2 of 12 slides failed.*bad \(.*broken \("):
        index_slides(slides, tmp_path / "job", tile=TILE, job=JOB, quiet=True)


def test_no_tissue_anywhere_is_an_error(slides: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tissue on any"):
        index_slides(slides / "glass.tiff", tmp_path / "job", tile=TILE, job=JOB, quiet=True)


def test_pictures_of_another_size_say_how_much_they_shrink(tmp_path: Path) -> None:
    def index_of(*sizes: tuple[int, int]):
        folder = tmp_path / hash_of(sizes)
        folder.mkdir()
        for number, size in enumerate(sizes):
            Image.new("RGB", size, "red").save(folder / f"{number:03d}.png")
        return index_tiles(folder, tile_px=32, mpp=0.5)

    assert index_of((32, 32), (40, 32)).shrunk == (1, 1)
    assert index_of((48, 64)).shrunk == (1.5, 1.5)
    assert index_of(*[(32, 32)] * 40, *[(64, 64)] * 40).shrunk == (1, 2)  # of many, some are asked
    assert index_of((16, 16), (64, 64)).shrunk == (0.5, 2)


def test_what_wsimil_wrote_is_no_tile(tmp_path: Path) -> None:
    for name in ("x/1.png", "run/views.png", "run/pictures/patches-0000001.jpg"):
        (tmp_path / "tiles" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "tiles" / name)
    mark_output(tmp_path / "tiles" / "run")
    assert [slide.pictures for slide in index_tiles(tmp_path / "tiles", tile_px=8, mpp=0.5).slides] == [("x/1.png",)]


def test_a_folder_of_pictures_is_an_index_of_groups(tmp_path: Path) -> None:
    for name in ("x/1.png", "x/2.jpg", "x/deep/3.png", "y/4.PNG", "5.png", ".hidden/6.png"):
        (tmp_path / "tiles" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "tiles" / name)
    (tmp_path / "tiles" / "x" / "groups.csv").write_text("no picture")
    index = index_tiles(tmp_path / "tiles", tile_px=32, mpp=0.5)
    assert {slide.slide_id: slide.pictures for slide in index.slides} == {
        "tiles": ("5.png",),
        "x": ("x/1.png", "x/2.jpg"),
        "x__deep": ("x/deep/3.png",),
        "y": ("y/4.PNG",),
    }
    assert [slide.area for slide in index.slides] == [1, 2, 1, 1] and index.n_cells == 5
    assert index_tiles(tmp_path / "tiles", tile_px=32, mpp=0.5).hash == index.hash
    part = index_tiles(tmp_path / "tiles", tile_px=32, mpp=0.5, only=["x", "y"])
    assert [slide.slide_id for slide in part.slides] == ["x", "y"] and part.hash != index.hash
    with pytest.raises(UsageError, match="not there: z"):
        index_tiles(tmp_path / "tiles", tile_px=32, mpp=0.5, only=["z"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no picture"):
        index_tiles(tmp_path / "empty", tile_px=32, mpp=0.5)
    Image.new("RGB", (90, 90), "red").save(tmp_path / "tiles" / "x" / "1.png")
    assert index_tiles(tmp_path / "tiles", tile_px=32, mpp=0.5).hash != index.hash

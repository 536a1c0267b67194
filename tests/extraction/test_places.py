"""Tiles that another program has placed: exactly those are read, whatever that program calls their size, or a row says why not."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import speckled

from wsimil.bags.bag import read_bag, read_patches
from wsimil.bags.places import read_places
from wsimil.config import JobConfig, TileConfig
from wsimil.errors import BagFormatError, ConfigError
from wsimil.extraction import extract_features, tile_slides
from wsimil.extraction.job import Row
from wsimil.slides.write_tiff import write_slide

PX, MPP = 64, 0.5
CORNERS = np.array([(517, 300), (40, 300), (104, 300), (40, 33), (301, 211)])  # contours begin anywhere; in no order


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    folder.mkdir()
    write_slide(folder / "a.tiff", speckled(900, 700, 1), mpp=MPP, compression="jpeg", downsamples=(1, 4))
    return folder


def write(folder: Path, coords: np.ndarray, about: dict[str, object], whole: dict[str, object] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / "a.h5", "w") as file:
        file["coords"] = coords
        file["coords"].attrs.update(about)
        file.attrs.update(whole or {})
    return folder


def tile(slides: Path, out: Path, coords: Path, **settings) -> tuple[Row, np.ndarray]:
    config = TileConfig(**{"mpp": MPP, "tile_px": PX, "coords": str(coords), **settings})
    (row,) = tile_slides(slides, out, config=config, job=JobConfig(workers=1), quiet=True)
    paths = list(out.glob("*/patches/a_patches.h5"))
    return row, read_patches(paths[0])[0] if paths else np.zeros((0, 2))


@pytest.mark.parametrize(
    ("coords", "about", "whole"),
    [
        (CORNERS, {"patch_size": PX, "patch_level": 0, "downsample": (1.0, 1.0)}, {}),
        (CORNERS, {"patch_size": PX // 4, "patch_level": 1, "downsample": (4.0, 4.0)}, {}),
        (CORNERS, {"patch_size": 256, "patch_size_level0": PX, "level0_magnification": 20, "target_magnification": 20}, {}),
        (np.hstack([CORNERS, np.full((5, 2), PX), np.zeros((5, 1), int)]), {}, {"patch_size": 256, "patch_size_level0": PX}),
    ],
    ids=["clam", "clam, level 1", "trident", "atlaspatch"],
)
def test_the_tiles_are_those_of_the_file_row_by_row(slides, tmp_path, coords, about, whole):
    row, found = tile(slides, tmp_path / "job", write(tmp_path / "patches", coords, about, whole))
    assert row.status == "done"
    np.testing.assert_array_equal(found, CORNERS[np.lexsort(CORNERS.T)])


def test_our_own_coordinates_give_the_bag_that_they_are_from(slides, tmp_path):
    one, job = TileConfig(mpp=MPP, tile_px=PX), JobConfig(workers=1)
    extract_features(slides, tmp_path / "one", tile=one, job=job, quiet=True)
    (patches,) = (tmp_path / "one").glob("*/patches")
    extract_features(slides, tmp_path / "two", tile=TileConfig(mpp=MPP, tile_px=PX, coords=str(patches)), job=job, quiet=True)
    bags = [read_bag(next((tmp_path / name).glob("*/features_texture/a.h5"))) for name in ("one", "two")]
    for name in ("features", "coords_level0_px"):
        np.testing.assert_array_equal(getattr(bags[0], name), getattr(bags[1], name))
    for name, values in bags[0].qc.items():
        np.testing.assert_array_equal(values, bags[1].qc[name])
    assert bags[0].attributes["recipe_hash"] != bags[1].attributes["recipe_hash"]


def test_tiles_beyond_the_edge_or_twice_are_left_out_and_counted(slides, tmp_path):
    coords = np.vstack([CORNERS, CORNERS[:1], [(900 - PX + 1, 0)], [(-1, 5)], [(900 - PX, 700 - PX)]])
    row, found = tile(slides, tmp_path / "job", write(tmp_path / "patches", coords, {"patch_size_level0": PX}))
    assert (row.n_tiles, len(found)) == (6, 6) and (900 - PX, 700 - PX) in set(map(tuple, found.tolist()))
    assert "3 of 9 tiles of a.h5 are left out" in (tmp_path / "job" / "logs" / "manifest.jsonl").read_text()


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"patch_size_level0": 65}, "seen at 0.5078 µm/px in 64 px, not at 0.5; pass --mpp 0.5078, or --tile-px 65"),
        ({"patch_size": 64}, "says nowhere how large a tile is"),
    ],
)
def test_tiles_of_another_scale_or_of_none_fail_and_say_what_to_do(slides, tmp_path, about, words):
    row, _ = tile(slides, tmp_path / "job", write(tmp_path / "patches", CORNERS, about))
    assert row.status == "failed" and words in row.reason


def test_what_the_error_says_works(slides, tmp_path):
    places = write(tmp_path / "patches", CORNERS, {"patch_size_level0": 65})
    assert tile(slides, tmp_path / "one", places, mpp=0.5078)[0].n_tiles == 5
    assert tile(slides, tmp_path / "two", places, tile_px=65)[0].n_tiles == 5


def test_coordinates_of_another_slide_or_none_are_a_failed_row(slides, tmp_path):
    row, _ = tile(slides, tmp_path / "one", write(tmp_path / "patches", CORNERS + 5000, {"patch_size_level0": PX}))
    assert row.status == "failed" and "of another slide?" in row.reason
    row, _ = tile(slides, tmp_path / "two", tmp_path / "later")
    assert row.status == "failed" and "no coordinates for it: expected" in row.reason
    write(tmp_path / "later", CORNERS, {"patch_size_level0": PX})
    assert tile(slides, tmp_path / "two", tmp_path / "later")[0].status == "done", "it is tried again without being asked"


def test_changed_coordinates_are_another_recipe(slides, tmp_path):
    places = write(tmp_path / "patches", CORNERS, {"patch_size_level0": PX})
    tile(slides, tmp_path / "job", places)
    row, found = tile(slides, tmp_path / "job", write(places, CORNERS[:2], {"patch_size_level0": PX}))
    assert row.status == "done" and len(found) == 2


def test_coordinates_that_are_no_level_0_pixels_are_refused(tmp_path):
    for wrong in (CORNERS * 0.25, CORNERS[:, :1]):
        with pytest.raises(BagFormatError, match="not whole level-0 pixels"):
            read_places(write(tmp_path / "patches", wrong, {"patch_size_level0": PX}) / "a.h5")
    with pytest.raises(ConfigError, match="both say where tiles are"):
        TileConfig(coords="a", roi="b")

"""What a map is on a canvas, against the plain way: one tile after the other, pixel by pixel."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from heatmaps.maps import random_map

from wsimil.errors import BagFormatError, UsageError
from wsimil.hdf5 import Dataset, write_hdf5
from wsimil.heatmaps import TileMap, read_tile_map


def one_by_one(tile_map: TileMap, size_px: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the tiles on each pixel, and where there is one."""
    width, height = size_px
    total, count = np.zeros((height, width)), np.zeros((height, width), int)
    per_x, per_y = tile_map.size_level0_px[0] / width, tile_map.size_level0_px[1] / height
    side = tile_map.tile_level0_px
    for (x, y), value in zip(tile_map.coords_level0_px.tolist(), tile_map.values.tolist(), strict=True):
        if x >= tile_map.size_level0_px[0] or y >= tile_map.size_level0_px[1] or x + side <= 0 or y + side <= 0:
            continue
        columns, rows = pixels(x, x + side, per_x, width), pixels(y, y + side, per_y, height)
        total[rows, columns] += value
        count[rows, columns] += 1
    return total / np.maximum(count, 1), count > 0


def pixels(low: float, high: float, per_px: float, end: int) -> slice:
    first = min(max(0, round(low / per_px)), end - 1)
    return slice(first, max(first + 1, min(round(high / per_px), end)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("side", "margin", "whole", "size_px"),
    [
        (100.0, 0.0, True, (300, 200)),
        (50.7, 0.0, True, (300, 200)),
        (506.617, 700.0, True, (151, 97)),  # over every edge, and beside the canvas
        (33.3, 60.0, False, (3000, 2000)),  # as fine as the slide
        (2.0, 5.0, True, (61, 40)),  # far below a pixel
        (0.4, 1.0, False, (7, 5)),
        (9000.0, 0.0, False, (64, 43)),  # one covers it all
    ],
)
def test_a_map_is_the_mean_of_its_tiles_on_every_pixel(
    seed: int, side: float, margin: float, whole: bool, size_px: tuple[int, int]
) -> None:
    tile_map = random_map(seed, n=150, side=side, size=(3000, 2000), margin=margin or max(0.0, side - 2000), whole=whole)
    values, covered = tile_map.raster(size_px)
    expected, expected_covered = one_by_one(tile_map, size_px)
    np.testing.assert_array_equal(covered, expected_covered)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert (values[~covered] == 0).all() and covered.any()


def test_a_regular_grid_without_overlap_shows_each_tile_as_it_is() -> None:
    """No sum leaves a trace in its neighbours: 10,000 tiles of very different values, each on its own pixels."""
    x, y = np.meshgrid(np.arange(100) * 224, np.arange(100) * 224)
    values = np.random.default_rng(0).lognormal(0, 6, 10_000).astype(np.float32)
    tile_map = replace(
        random_map(0, n=1, side=224.0, size=(22_400, 22_400)), values=values, coords_level0_px=np.stack([x.ravel(), y.ravel()], 1)
    )
    shown, covered = tile_map.raster((400, 400))
    assert covered.all()
    np.testing.assert_allclose(shown, values.reshape(100, 100).repeat(4, 0).repeat(4, 1), rtol=1e-4, atol=1e-15 * values.sum())


def test_no_tile_is_too_small_or_too_far_to_the_edge_to_be_seen() -> None:
    corners = np.array([[0, 0], [2999, 0], [0, 1999], [2999, 1999], [1500, 1000]])
    tile_map = replace(random_map(0, n=5, side=1.0, size=(3000, 2000)), coords_level0_px=corners)
    _, covered = tile_map.raster((30, 20))
    assert covered.sum() == 5 and covered[[0, 0, -1, -1], [0, -1, 0, -1]].all()


def test_a_tile_beside_the_canvas_is_not_drawn_on_its_edge() -> None:
    beside = np.array([[-100, 50], [3000, 50], [50, -100], [50, 2000]])
    tile_map = replace(random_map(0, n=4, side=100.0, size=(3000, 2000)), coords_level0_px=beside)
    assert not tile_map.raster((300, 200))[1].any()


def test_strips_cover_the_canvas_once_from_top_to_bottom() -> None:
    strips = list(random_map(1, n=40, side=80.0, size=(3000, 2000)).strips((300, 200)))
    edges = [(strip.top_px, strip.bottom_px) for strip in strips]
    assert edges[0][0] == 0 and edges[-1][1] == 200
    assert all(a[1] == b[0] for a, b in pairwise(edges)) and all(top < bottom for top, bottom in edges)
    assert all(strip.x_edges_px[0] == 0 and strip.x_edges_px[-1] == 300 for strip in strips)


def test_a_slide_none_of_whose_tiles_was_seen_is_an_empty_map() -> None:
    tile_map = random_map(0, n=0, side=100.0, size=(3000, 2000))
    values, covered = tile_map.raster((300, 200))
    assert not covered.any() and not values.any()


# ---------------------------------------------------------------- scores files


def scores_file(folder: Path, *, classes: list[str], contribution_kind: str = "exact", **tables: np.ndarray) -> Path:
    write_hdf5(
        folder / "s.h5",
        {"coords": Dataset(np.array([[0, 0], [100, 0], [200, 0]])), **{name: Dataset(table) for name, table in tables.items()}},
        {
            "format": "wsimil-scores",
            "slide_id": "s",
            "tile_level0_px": 100.0,
            "level0_width": 300,
            "level0_height": 100,
            "class_names": classes,
            "contribution_kind": contribution_kind,
        },
    )
    return folder / "s.h5"


def test_of_several_classes_the_map_speaks_for_the_one_asked_for(tmp_path: Path) -> None:
    path = scores_file(tmp_path, classes=["a", "b", "c"], contributions=np.arange(9, dtype=np.float32).reshape(3, 3))
    for column, name in enumerate("abc"):
        found = read_tile_map(path, class_name=name)
        assert found.class_name == name and found.values.tolist() == [column, column + 3, column + 6]


def test_of_two_classes_the_map_speaks_for_the_positive_one_whatever_was_predicted(tmp_path: Path) -> None:
    path = scores_file(tmp_path, classes=["tumour"], contributions=np.array([[1], [2], [3]], np.float32))
    found = read_tile_map(path, predicted="normal")
    assert found.class_name == "tumour" and found.values.tolist() == [1, 2, 3]


def test_attention_is_in_multiples_of_a_uniform_weight_of_the_tiles_that_were_seen(tmp_path: Path) -> None:
    heads = np.array([[0.75, 0.25], [np.nan, np.nan], [0.25, 0.75]], np.float32)
    found = read_tile_map(scores_file(tmp_path, classes=["tumour"], attention=heads))
    assert found.kind == "attention" and found.values.tolist() == [1, 1]
    assert found.coords_level0_px.tolist() == [[0, 0], [200, 0]], "a tile that was left out is not drawn"


@pytest.mark.parametrize(("contribution_kind", "kind"), [("exact", "contribution"), ("gradient", "tile_prob")])
def test_contributions_come_first_only_where_they_are_exact(tmp_path: Path, contribution_kind: str, kind: str) -> None:
    column = np.ones((3, 1), np.float32)
    tables = {"attention": column / 3, "tile_prob": column, "contributions": column}
    path = scores_file(tmp_path, classes=["tumour"], contribution_kind=contribution_kind, **tables)
    assert read_tile_map(path).kind == kind
    assert read_tile_map(path, "attention").kind == "attention"


def test_a_map_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = scores_file(tmp_path, classes=["tumour"], attention=np.ones((3, 1), np.float32) / 3)
    with pytest.raises(UsageError, match=r"s\.h5: no tile_prob in it \(it has attention\)"):
        read_tile_map(path, "tile_prob")
    write_hdf5(tmp_path / "t.h5", {"coords": Dataset(np.zeros((0, 2)))}, {"format": "wsimil-patches"})
    with pytest.raises(BagFormatError, match="wsimil predict"):
        read_tile_map(tmp_path / "t.h5")

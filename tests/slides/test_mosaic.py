"""The mosaic: every kind of tissue, in proportion, from all over the slide, rich in nuclei."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wsimil.slides.mosaic import _proportional, choose_mosaic, mosaic_of_slide, nuclear_ratio, rgb_histograms
from wsimil.slides.slide import Slide
from wsimil.slides.write_tiff import write_slide

PINK, BLUE, PALE = (226, 150, 190), (90, 60, 140), (240, 225, 235)
"""Eosin, haematoxylin, and hardly stained."""


def kinds(counts: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Descriptors, places and kind of tiles: each kind around a point of its own."""
    rng = np.random.default_rng(seed)
    kind = np.repeat(np.arange(len(counts)), counts)
    return 10 * np.eye(len(counts))[kind] + 0.1 * rng.normal(size=(len(kind), len(counts))), rng.random((len(kind), 2)), kind


def test_kinds_are_taken_in_proportion_and_rare_ones_too():
    descriptors, coords, kind = kinds((300, 150, 45, 5))
    found = choose_mosaic(descriptors, coords, most=50, clusters=4)
    assert np.bincount(kind[found.rows]).tolist() == [30, 15, 4, 1]
    assert len(found.rows) == 50 and (np.diff(found.rows) > 0).all()
    assert all(np.unique(found.cluster[kind[found.rows] == k]).size == 1 for k in range(4))


@pytest.mark.parametrize("most", [1, 3, 9, 10, 55, 199])
def test_the_mosaic_is_as_large_as_asked(most):
    sizes = np.array([100, 50, 20, 20, 5, 1, 1, 1, 2])
    counts = _proportional(sizes, most)
    assert counts.sum() == most and (counts <= sizes).all() and (counts >= 0).all()


def test_a_slide_of_few_tiles_is_its_own_mosaic():
    descriptors, coords, _ = kinds((5, 4))
    assert choose_mosaic(descriptors, coords, most=55).rows.tolist() == list(range(9))
    assert choose_mosaic(descriptors[:0], coords[:0]).rows.tolist() == []
    assert choose_mosaic(np.zeros((200, 3)), coords[[0] * 200], most=20).rows.size == 20  # all alike, all in one place


def test_tiles_of_a_kind_come_from_all_over_it():
    grid = np.stack(np.meshgrid(np.arange(20), np.arange(20)), -1).reshape(-1, 2).astype(float)
    found = choose_mosaic(np.zeros((400, 2)), grid, most=16, clusters=1)
    quarters = (grid[found.rows] >= 10) @ [1, 2]
    assert np.bincount(quarters, minlength=4).min() >= 3
    gaps = np.linalg.norm(grid[found.rows][:, None] - grid[found.rows], axis=-1)
    assert gaps[~np.eye(16, dtype=bool)].min() > 2


def test_the_poorer_half_in_nuclei_is_left_out_but_never_the_mosaic_itself():
    descriptors, coords, _ = kinds((100, 100))
    nuclear = np.linspace(0, 1, 200)
    assert choose_mosaic(descriptors, coords, most=30, nuclear=nuclear).rows.min() >= 100
    assert choose_mosaic(descriptors, coords, most=30, nuclear=nuclear, keep=0.2).rows.min() >= 160
    assert len(choose_mosaic(descriptors, coords, most=150, nuclear=nuclear, keep=0.2).rows) == 150


def test_the_same_tiles_give_the_same_mosaic_and_another_seed_may_not():
    descriptors, coords, _ = kinds((200, 200))
    first, again, other = (choose_mosaic(descriptors, coords, most=20, seed=seed).rows for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_histograms_count_every_pixel_once_per_channel():
    tiles = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    found = rgb_histograms(tiles)
    assert found.shape == (3, 24) and np.allclose(found.reshape(3, 3, 8).sum(-1), 1)
    assert found[1, 8 + 2] == pytest.approx(((tiles[1, ..., 1] >= 64) & (tiles[1, ..., 1] < 96)).mean())


def test_nuclei_are_blue_and_counted_by_area():
    tiles = np.full((3, 40, 40, 3), PINK, np.uint8)
    tiles[1, :20], tiles[2, :10], tiles[2, 10:] = BLUE, BLUE, PALE
    found, threshold = nuclear_ratio(tiles)
    assert found.tolist() == [0, 0.5, 0.25] and threshold > 0
    alone, _ = nuclear_ratio(tiles[:1], threshold=threshold)
    assert alone.tolist() == [0]  # by a threshold of its own, any tile has nuclei


def test_of_a_slide_the_cellular_tiles_are_taken(tmp_path: Path):
    picture = np.full((512, 1024, 3), PINK, np.uint8)
    rng = np.random.default_rng(0)
    for x, y in zip(rng.integers(512, 1012, 300), rng.integers(0, 500, 300), strict=True):
        picture[y : y + 8, x : x + 8] = BLUE  # nuclei, in the right half
    write_slide(tmp_path / "half.tiff", picture, mpp=0.5, compression="deflate", downsamples=(1, 4))
    coords = np.stack(np.meshgrid(np.arange(16), np.arange(8)), -1).reshape(-1, 2) * 64
    with Slide(tmp_path / "half.tiff") as slide:
        found = mosaic_of_slide(slide, coords, tile_level0_px=64.0, most=20)
    assert len(found.rows) == 20 and (coords[found.rows, 0] >= 512).all()
    assert found.nuclear[coords[:, 0] < 448].max() < found.nuclear[coords[:, 0] >= 512].mean()

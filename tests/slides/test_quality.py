"""Blur rises with every blurring and with nothing else; darkness counts what no stain explains."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest

from wsimil.slides.painting import paint_slide
from wsimil.slides.quality import DARK, NOISE, tile_quality

PX = 128


def cut(picture: np.ndarray) -> np.ndarray:
    """Whole tiles of a picture, (n, PX, PX, 3)."""
    rows, columns = (side // PX for side in picture.shape[:2])
    picture = picture[: rows * PX, : columns * PX]
    return picture.reshape(rows, PX, columns, PX, 3).swapaxes(1, 2).reshape(-1, PX, PX, 3).copy()


def blurred(tiles: np.ndarray, sigma: float) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(tile, (0, 0), sigma) for tile in tiles]) if sigma else tiles


def as_scanned(tiles: np.ndarray, sigma: float) -> np.ndarray:
    """Out of focus on the way to the sensor: its noise and the JPEG come after that, and stay sharp."""
    draw = np.random.default_rng(0)
    seen = blurred(tiles, sigma) + draw.normal(0, 1, tiles.shape)
    seen = np.clip(seen.round(), 0, 255).astype(np.uint8)
    return np.stack([cv2.imdecode(cv2.imencode(".jpg", tile, [cv2.IMWRITE_JPEG_QUALITY, 80])[1], 1) for tile in seen])


def blur(tiles: np.ndarray) -> np.ndarray:
    return tile_quality(tiles)["blur"]


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """Painted H&E at .5 µm/px, mostly tissue."""
    tiles = cut(paint_slide(600, 600, mpp=0.5, seed=5).rgb)
    return tiles[(tiles.min(-1) < 200).mean((1, 2)) > 0.5]


@pytest.fixture(scope="module")
def texture() -> np.ndarray:
    """Random blocks of 1, 2 and 4 pixels, without the noise floor of a picture."""
    draw = np.random.default_rng(1)
    coarse = [draw.integers(0, 256, (2, PX // side, PX // side, 3)).repeat(side, 1).repeat(side, 2) for side in (1, 2, 4)]
    return np.concatenate(coarse).astype(np.uint8)


def brute_force(tile: np.ndarray) -> float:
    """Crete's comparison as it is written down, every row and in floating point, with the noise floor and the prior."""
    values = []
    for grey in (tile[..., 1], tile[..., 1].T):
        grey = grey.astype(float)
        means = np.stack([grey[:, start : grey.shape[1] - 8 + start] for start in range(9)]).mean(0)
        near, far = np.abs(np.diff(grey[:, 4:-4])), np.abs(np.diff(means))
        near = np.maximum(near - NOISE, 0)
        lost = np.maximum(near - far, 0)
        values.append(1 - lost.sum() / (near.sum() + near.size * 4 / 9))
    return max(values)


@pytest.mark.parametrize("sigma", [0, 1, 2, 4])
def test_the_score_is_the_published_comparison(tissue, sigma):
    tiles = as_scanned(tissue, sigma)
    expected = np.array([brute_force(tile) for tile in tiles])
    assert np.abs(blur(tiles) - expected).max() < 0.03 and np.abs(blur(tiles) - expected).mean() < 0.006


def test_more_blur_is_always_more(tissue, texture):
    for tiles in (tissue, texture):
        scores = [blur(blurred(tiles, sigma)) for sigma in (0, 0.6, 1, 1.5, 2, 3, 4)]
        assert all((more > less).all() for less, more in pairwise(scores))
        assert (blur(blurred(tiles, 6)) == 1).all()  # nothing is left to lose


def test_noise_after_the_blur_does_not_hide_it(tissue):
    scores = [blur(as_scanned(tissue, sigma)) for sigma in (0.6, 1, 1.5, 2, 3, 4, 6)]
    assert all((more > less - 0.01).all() for less, more in pairwise(scores))
    assert scores[0].max() < 0.8 < scores[4].min() and scores[-1].min() > 0.97


@pytest.mark.parametrize("axis", [0, 1])
def test_a_smear_in_one_direction_is_blur(texture, axis):
    kernel = (1, 9) if axis == 0 else (9, 1)
    smeared = np.stack([cv2.blur(tile, kernel) for tile in texture])
    assert (blur(smeared) > 2 * blur(texture)).all()


def test_a_tile_on_its_side_is_as_sharp(tissue):
    np.testing.assert_allclose(blur(tissue.swapaxes(1, 2).copy()), blur(tissue), atol=0.03)


@pytest.mark.parametrize("grey", [0, 1, 128, 240, 255])
def test_a_tile_without_variation_has_nothing_sharp(grey):
    assert blur(np.full((1, PX, PX, 3), grey, np.uint8)) == [1]


def test_noisy_glass_is_not_sharp():
    assert blur(as_scanned(np.full((4, PX, PX, 3), 240, np.uint8), 1)).min() > 0.9


def test_brightness_is_not_blur(tissue):
    inside = np.clip(tissue, 20, 235)
    for shift in (-8, 8):
        shifted = (inside.astype(int) + shift).astype(np.uint8)
        np.testing.assert_array_equal(blur(shifted), blur(inside))
    dimmed = (tissue * 0.95).round().astype(np.uint8)
    np.testing.assert_allclose(blur(dimmed), blur(tissue), atol=0.03)


def test_batch_mates_and_order_change_nothing(tissue, texture):
    tiles = np.concatenate([tissue, texture, np.zeros((1, PX, PX, 3), np.uint8)])
    order = np.random.default_rng(2).permutation(len(tiles))
    together, shuffled = tile_quality(tiles), tile_quality(tiles[order])
    for name, scores in together.items():
        assert scores.dtype == np.float32 and scores.shape == (len(tiles),)
        np.testing.assert_array_equal(shuffled[name], scores[order])
        alone = [tile_quality(tiles[row : row + 1])[name][0] for row in range(len(tiles))]
        np.testing.assert_array_equal(scores, np.array(alone))


def test_memory_layout_changes_nothing_and_pixels_are_left_alone(tissue):
    padded = np.zeros((*tissue.shape[:2], 2 * PX, 3), np.uint8)
    padded[:, :, :PX] = tissue
    view, before = padded[:, :, :PX], padded.copy()
    for name, scores in tile_quality(view).items():
        np.testing.assert_array_equal(scores, tile_quality(tissue)[name])
    np.testing.assert_array_equal(padded, before)


@pytest.mark.parametrize("share", [0, 0.125, 0.5, 1])
def test_darkness_is_the_share_of_padding(tissue, share):
    bright = np.maximum(tissue, DARK)
    bright[:, : round(PX * share)] = 0
    assert tile_quality(bright)["darkness"].tolist() == [share] * len(bright)


def test_a_pixel_is_dark_only_if_no_channel_is_bright():
    tiles = np.full((5, 16, 16, 3), DARK - 1, np.uint8)
    for channel in range(3):
        tiles[channel, ..., channel] = DARK
    tiles[3, :4] = DARK
    assert tile_quality(tiles)["darkness"].tolist() == [0, 0, 0, 0.75, 1]


def test_ink_is_dark_and_stain_is_not(tissue):
    ink = np.random.default_rng(3).normal(24, 4, (1, PX, PX, 3)).clip(0, 255).astype(np.uint8)
    assert tile_quality(ink)["darkness"] > 0.95
    assert tile_quality(tissue)["darkness"].max() < 0.001


@pytest.mark.parametrize("px", [8, 9, 10, 11, 37, 225])
def test_every_tile_size_has_scores(px):
    tiles = np.random.default_rng(4).integers(0, 256, (2, px, px, 3)).astype(np.uint8)
    scores = tile_quality(tiles)
    assert np.isfinite(scores["darkness"]).all() and np.isfinite(scores["blur"]).all() == (px >= 10)
    if px >= 10:
        assert ((scores["blur"] >= 0) & (scores["blur"] <= 1)).all()


def test_no_tiles_have_no_scores():
    assert {name: scores.shape for name, scores in tile_quality(np.zeros((0, PX, PX, 3), np.uint8)).items()} == {
        "blur": (0,),
        "darkness": (0,),
    }


@pytest.mark.parametrize("tiles", [np.zeros((2, 16, 16, 3)), np.zeros((16, 16, 3), np.uint8), np.zeros((2, 16, 16, 4), np.uint8)])
def test_what_is_no_batch_of_tiles_is_refused(tiles):
    with pytest.raises(ValueError, match="expected uint8"):
        tile_quality(tiles)

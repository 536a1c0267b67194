"""Tiling is geometry: facts about scales and grids, no pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsimil.errors import ScaleError
from wsimil.slides.tiling import Rect, resolve_scale, tile_grid

mpps = st.floats(0.05, 20.0)


@given(slide_mpp=mpps, target_mpp=mpps)
def test_field_of_view_is_the_asked_one_within_half_a_percent(slide_mpp: float, target_mpp: float) -> None:
    scale = resolve_scale(slide_mpp, target_mpp, allow_upsampling=True)
    assert abs(scale.effective_mpp / target_mpp - 1) <= 0.005 + 1e-9 or (scale.factor == 1 and slide_mpp == scale.effective_mpp)
    assert scale.factor * slide_mpp == pytest.approx(scale.effective_mpp, rel=1e-9)


@pytest.mark.parametrize(
    ("slide_mpp", "factor", "effective"),
    [
        (0.5, 1, 0.5),
        (0.499, 1, 0.499),  # .2 % off: read as it is
        (0.25, 2, 0.5),
        (0.2527, 0.5 / 0.2527, 0.5),  # 1.1 % off: resampled
        (0.3412, 0.5 / 0.3412, 0.5),
        (0.4661, 0.5 / 0.4661, 0.5),
        (0.54, 0.5 / 0.54, 0.5),  # up to 10 % coarser is interpolated
        (0.1257, 0.5 / 0.1257, 0.5),
        (0.1252, 4, 0.5008),
    ],
)
def test_native_and_whole_factors_are_taken_when_close(slide_mpp: float, factor: float, effective: float) -> None:
    scale = resolve_scale(slide_mpp, 0.5)
    assert scale.factor == pytest.approx(factor, rel=1e-12)
    assert scale.effective_mpp == pytest.approx(effective, rel=1e-12)


def test_a_slide_more_than_ten_percent_too_coarse_is_refused() -> None:
    resolve_scale(0.55, 0.5)
    with pytest.raises(ScaleError, match="allow-upsampling"):
        resolve_scale(0.551, 0.5)
    assert resolve_scale(1.0, 0.5, allow_upsampling=True).factor == 0.5


@pytest.mark.parametrize("mpp", [0.049, 20.1, 352.8, 0.0, -1.0, float("nan")])
def test_an_insane_scale_is_refused_even_with_upsampling(mpp: float) -> None:
    with pytest.raises(ScaleError, match="outside"):
        resolve_scale(mpp, 0.5, allow_upsampling=True)


grids = st.fixed_dictionaries(
    {
        "x": st.integers(0, 500),
        "y": st.integers(0, 500),
        "width": st.integers(1, 4000),
        "height": st.integers(1, 4000),
        "tile": st.floats(20, 700),
        "overlap": st.floats(0, 0.9),
    }
)


@given(grids)
def test_tiles_never_overhang_and_never_drift(grid: dict) -> None:
    extent = Rect(grid["x"], grid["y"], grid["width"], grid["height"])
    step = grid["tile"] * (1 - grid["overlap"])
    coords = tile_grid(extent, tile_level0_px=grid["tile"], step_level0_px=step).coords_level0_px
    assert coords.dtype == np.int64
    for axis, (start, length) in enumerate(((extent.x, extent.width), (extent.y, extent.height))):
        positions = np.unique(coords[:, axis])
        if len(positions):
            assert positions[0] == start
            assert positions[-1] + grid["tile"] <= start + length + 1e-6
            exact = start + step * np.arange(len(positions))
            assert np.abs(positions - exact).max() < 1  # the last one as exactly placed as the first
            assert start + length - (exact[-1] + grid["tile"]) < step + 1e-6  # and no tile is missing at the end


def test_order_is_row_by_row() -> None:
    coords = tile_grid(Rect(0, 0, 300, 200), tile_level0_px=100, step_level0_px=100).coords_level0_px
    assert coords.tolist() == [[0, 0], [100, 0], [200, 0], [0, 100], [100, 100], [200, 100]]


def test_a_slide_smaller_than_a_tile_has_none() -> None:
    assert len(tile_grid(Rect(0, 0, 99, 400), tile_level0_px=100, step_level0_px=100).coords_level0_px) == 0


@given(seed=st.integers(0, 1000), tile=st.floats(5, 60))
def test_tissue_share_equals_counting_pixels(seed: int, tile: float) -> None:
    """Against a mask enlarged until every mask pixel is many pixels: the share is an area, not a vote."""
    rng = np.random.default_rng(seed)
    mask = rng.random((13, 17)) < 0.5
    width, height = 17 * 12, 13 * 12
    fine = mask.repeat(12, 0).repeat(12, 1)
    tile = round(tile)
    tiles = tile_grid(
        Rect(0, 0, width, height), tile_level0_px=tile, step_level0_px=tile, mask=mask, canvas=(width, height), min_tissue=0
    )
    counted = [fine[y : y + tile, x : x + tile].mean() for x, y in tiles.coords_level0_px]
    assert np.allclose(tiles.qc["tissue"], counted, atol=1e-5)


def test_min_tissue_keeps_exactly_the_tiles_that_hold_it() -> None:
    mask = np.zeros((10, 10), bool)
    mask[:, :5] = True
    everything = tile_grid(Rect(0, 0, 100, 100), tile_level0_px=20, step_level0_px=10, mask=mask, canvas=(100, 100), min_tissue=0)
    half = tile_grid(Rect(0, 0, 100, 100), tile_level0_px=20, step_level0_px=10, mask=mask, canvas=(100, 100), min_tissue=0.5)
    assert set(map(tuple, half.coords_level0_px)) == {
        tuple(xy) for xy, share in zip(everything.coords_level0_px, everything.qc["tissue"], strict=True) if share >= 0.5
    }
    assert half.coords_level0_px[:, 0].max() == 40

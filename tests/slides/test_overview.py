"""The picture that a person judges tiling by shows what was kept, what was not, and how large it is."""

from __future__ import annotations

import numpy as np
import pytest

from wsimil.slides.overview import draw_overview
from wsimil.slides.polygons import CLASS_COLORS
from wsimil.slides.tissue import TissueMask


def found_in(shape: tuple[int, int], mpp: float) -> TissueMask:
    mask, pen = np.zeros(shape, bool), np.zeros(shape, bool)
    mask[50:150, 50:250] = True
    pen[160:180, 20:380] = True
    return TissueMask(mask, pen, mpp, has_glass=True)


def test_overview_shows_outlines_and_tiles_and_leaves_the_picture_alone():
    rgb = np.full((300, 400, 3), 120, np.uint8)
    drawn = np.asarray(draw_overview(rgb, found_in((300, 400), 8.0), tiles_px=np.array([[100, 60, 20, 20]]), long_side_px=400))
    assert (rgb == 120).all()
    assert (drawn[80, 200] == 120).all() and (drawn[250, 200] > 150).all()  # what is left out is faded
    for name, (y, x) in {"Tissue": (100, 50), "Pen": (160, 200)}.items():
        assert (drawn[y, x] == CLASS_COLORS[name]).all()
    tile = drawn[60, 100]
    assert (tile != 120).any() and (drawn[60, 100:120] == tile).all() and (drawn[79, 100:120] == tile).all()
    assert (drawn[61:79, 101:119] == 120).all()


@pytest.mark.parametrize(("shape", "long_side"), [((125, 125), 1000), ((900, 6000), 1600), ((1, 3), 24), ((3000, 10), 1600)])
def test_pictures_of_any_size_become_about_one_size(shape, long_side):
    found = TissueMask(np.ones(shape, bool), np.zeros(shape, bool), 8.0, has_glass=False)
    drawn = draw_overview(np.full((*shape, 3), 200, np.uint8), found)
    assert max(drawn.width, drawn.height - 30) in (long_side, 480)  # the legend is 30 px high and at least 480 px wide


def test_the_scale_bar_is_as_long_as_it_says():
    rgb = np.full((300, 400, 3), 255, np.uint8)
    empty = np.zeros((300, 400), bool)
    drawn = np.asarray(draw_overview(rgb, TissueMask(empty, empty, 5.0, has_glass=True), long_side_px=800))  # 2 mm wide
    row = drawn[600 + 15]
    bar = np.flatnonzero((row == 0).all(axis=1))
    assert np.flatnonzero(np.diff(bar, append=900) > 1)[0] == 79  # .2 mm of 2.5 µm/px

"""The picture is the slide, and the colours on it are those of the map."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from conftest import speckled
from heatmaps.maps import random_map

from wsimil.heatmaps.colors import in_colors
from wsimil.heatmaps.picture import overlay


@pytest.mark.parametrize(("signed", "name"), [(True, "coolwarm"), (False, "inferno")])
def test_colours_are_those_of_matplotlib(signed: bool, name: str) -> None:
    share = np.linspace(0, 1, 10_001)
    expected = (matplotlib.colormaps[name](share)[:, :3] * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(in_colors(share, signed=signed), expected)


@pytest.mark.parametrize("kind", ["contribution", "attention", "tile_prob"])
def test_every_pixel_is_the_slide_under_the_colour_of_its_value(kind: str) -> None:
    picture = speckled(700, 300)
    tile_map = random_map(3, n=30, side=150.0, size=(1400, 600), kind=kind)
    values, covered = tile_map.raster((700, 300))
    share = tile_map.share(values)
    strength = (np.abs(2 * share - 1) if kind == "contribution" else share)[..., None]
    alpha = np.where(covered[..., None], 0.15 + 0.55 * strength**0.5, 0)
    expected = picture * (1 - alpha) + in_colors(share, signed=kind == "contribution") * alpha
    painted = np.asarray(overlay(picture, tile_map, "caption"))[:300]
    np.testing.assert_allclose(painted, expected, atol=0.51)
    np.testing.assert_array_equal(painted[~covered], picture[~covered])
    assert covered.any() and not covered.all()


def test_a_small_picture_has_room_for_its_legend() -> None:
    picture = speckled(40, 30)
    image = np.asarray(overlay(picture, random_map(0, n=3, side=10.0, size=(40, 30), kind="attention"), "a slide"))
    assert image.shape[1] == 640 and image.shape[0] > 30 + 40
    assert (image[:30, 40:] == 255).all()
    assert (image[30:] < 100).any()  # writing


def test_rows_are_painted_alike_however_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    picture, tile_map = speckled(500, 200), random_map(5, n=8, side=180.0, size=(500, 200))
    whole = np.asarray(overlay(picture, tile_map, "c"))
    monkeypatch.setattr("wsimil.heatmaps.picture._PX_AT_A_TIME", 1)
    np.testing.assert_array_equal(np.asarray(overlay(picture, tile_map, "c")), whole)


def test_a_map_of_one_value_has_a_scale() -> None:
    tile_map = replace(random_map(0, n=4, side=10.0, size=(40, 30)), values=np.zeros(4, np.float32))
    assert tile_map.scale == (-1.0, 1.0)
    assert np.isfinite(np.asarray(overlay(speckled(40, 30), tile_map, ""))).all()


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured in other units elsewhere")
def test_memory_beside_the_pictures_is_the_same_for_any_size() -> None:
    """Pillow keeps four bytes a pixel of the finished picture. Tiles as high as the slide would be the worst."""
    code = """
import resource
import numpy as np
from heatmaps.maps import random_map
from wsimil.heatmaps.picture import overlay

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

height, width = 2000, 20_000
tile_map = random_map(0, n=5, side=float(height), size=(width, height))
overlay(np.ones((60, 600, 3), np.uint8), tile_map, "warm")
picture = np.full((height, width, 3), 200, np.uint8)
before = peak()
image = overlay(picture, tile_map, "s")
image.save("/dev/null", "PNG", compress_level=1)
print((peak() - before) / (image.width * image.height))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert float(done.stdout) < 4.5

"""A planted object lands on its pixels: in the picture, in the polygons, with and without OpenSlide bounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import speckled
from PIL import Image

from wsimil.bags.bag import read_bag
from wsimil.config import HeatmapConfig, TileConfig
from wsimil.extraction import extract_features
from wsimil.files import read_json, write_text
from wsimil.hdf5 import Dataset, write_hdf5
from wsimil.heatmaps import draw_heatmaps, read_tile_map
from wsimil.slides.slide import Slide
from wsimil.slides.write_tiff import write_slide

OFFSET = (1000, 600)


def planted(width: int = 1600, height: int = 1200) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Tissue with one dark blue square, and where the square is: x, y, width, height."""
    rgb = speckled(width, height)
    rgb[..., 0] = rgb[..., 2]  # no redder than blue, so that red is the map's
    box = (900, 500, 200, 150)
    rgb[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = (40, 30, 120)
    return rgb, box


def darkness_scores(bag_path: Path, slide_path: Path, scores: Path) -> None:
    """A scores file whose contribution is the darkness of the tile itself: a model that cannot be wrong."""
    bag = read_bag(bag_path)
    side = float(bag.attributes["tile_level0_px"])
    with Slide(slide_path) as slide:
        dark = [255 - slide.read_tile(x, y, tile_level0_px=side, tile_px=32).mean() for x, y in bag.coords_level0_px.tolist()]
    contributions = (np.array(dark, np.float32) - np.median(dark))[:, None]
    kept = ("slide_id", "tile_level0_px", "level0_width", "level0_height", "bounds_x", "bounds_y")
    write_hdf5(
        scores / bag_path.name,
        {"coords": Dataset(bag.coords_level0_px), "contributions": Dataset(contributions)},
        {
            "format": "wsimil-scores",
            **{key: bag.attributes[key] for key in kept},
            "class_names": ["dark"],
            "contribution_kind": "exact",
        },
    )


@pytest.fixture(params=["generic", "leica"])
def drawn(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, tuple[int, int, int, int], tuple[int, int]]:
    """Output folder, scores folder, the planted box on the canvas, and the bounds offset."""
    rgb, (x, y, width, height) = planted()
    offset = OFFSET if request.param == "leica" else (0, 0)
    path = tmp_path / "slides" / ("s.scn" if request.param == "leica" else "s.tiff")
    path.parent.mkdir()
    options = {"bounds_offset_px": OFFSET} if request.param == "leica" else {}
    write_slide(
        path, rgb, mpp=0.5, vendor=request.param, compression="jpeg", chroma="4:4:4", quality=95, downsamples=(1, 4), **options
    )
    extraction = extract_features(path.parent, tmp_path / "job", tile=TileConfig(tile_px=50), quiet=True)
    darkness_scores(extraction.features_folder / "s.h5", path, tmp_path / "predictions" / "scores")
    write_text(
        tmp_path / "predictions" / "predictions.csv", "slide,slide_id,status,label,prob_dark,prediction\ns,s,done,dark,0.9,dark\n"
    )
    assert draw_heatmaps(tmp_path / "predictions", path.parent, tmp_path / "out", config=HeatmapConfig(), quiet=True) == []
    return tmp_path / "out", tmp_path / "predictions", (x + offset[0], y + offset[1], width, height), offset


def test_the_hottest_tile_lies_on_the_planted_object(drawn) -> None:
    _, predictions, (x, y, width, height), _ = drawn
    centre = read_tile_map(predictions / "scores" / "s.h5").hottest()
    assert x <= centre[0] <= x + width and y <= centre[1] <= y + height


def test_polygons_lie_on_the_object_in_qupaths_frame(drawn) -> None:
    """QuPath counts from the bounds: the hot tiles cover the square of the picture itself, whatever canvas lies around it."""
    out, _, _, offset = drawn
    content = read_json(out / "s.geojson")
    assert content["wsimil"]["origin_level0_px"] == list(offset)
    hot = [f for f in content["features"] if f["properties"]["measurements"]["contribution"] > 40]
    corners = np.array([corner for feature in hot for corner in feature["geometry"]["coordinates"][0]])
    np.testing.assert_allclose(corners.min(0), (900, 500), atol=1)
    np.testing.assert_allclose(corners.max(0), (1100, 650), atol=1)
    assert all(f["geometry"]["coordinates"][0][0] == f["geometry"]["coordinates"][0][-1] for f in hot)
    assert all(f["properties"]["objectType"] == "tile" and isinstance(f["properties"]["measurements"], dict) for f in hot)


def test_keeping_the_frame_leaves_the_files_own_coordinates(drawn, tmp_path: Path) -> None:
    _, predictions, (x, y, _, _), _ = drawn
    draw_heatmaps(
        predictions,
        tmp_path / "slides",
        tmp_path / "kept",
        config=HeatmapConfig(qupath_bounds="keep", format=("geojson",)),
        quiet=True,
    )
    features = read_json(tmp_path / "kept" / "s.geojson")["features"]
    hot = [f for f in features if f["properties"]["measurements"]["contribution"] > 40]
    corners = np.array([corner for feature in hot for corner in feature["geometry"]["coordinates"][0]])
    np.testing.assert_allclose(corners.min(0), (x, y), atol=1)


def test_the_picture_is_red_on_the_object_and_nowhere_else(drawn) -> None:
    out, predictions, (x, y, width, height), _ = drawn
    tile_map = read_tile_map(predictions / "scores" / "s.h5")
    picture = np.asarray(Image.open(out / "s.png").convert("RGB")).astype(int)
    per_px = max(tile_map.size_level0_px) / 1600
    red = (picture[..., 0] - picture[..., 2]) > 60
    rows, columns = np.nonzero(red[: round(tile_map.size_level0_px[1] / per_px)])
    assert np.allclose([columns.min(), rows.min()], np.array([x, y]) / per_px, atol=2)
    assert np.allclose([columns.max() + 1, rows.max() + 1], np.array([x + width, y + height]) / per_px, atol=2)


def test_overlapping_tiles_show_their_mean(tmp_path: Path) -> None:
    write_hdf5(
        tmp_path / "s.h5",
        {"coords": Dataset(np.array([[0, 0], [50, 0]])), "contributions": Dataset(np.array([[1.0], [3.0]], np.float32))},
        {
            "format": "wsimil-scores",
            "slide_id": "s",
            "tile_level0_px": 100.0,
            "level0_width": 150,
            "level0_height": 100,
            "class_names": ["c"],
            "contribution_kind": "exact",
        },
    )
    values, covered = read_tile_map(tmp_path / "s.h5").raster((150, 100))
    assert covered.all()
    assert (values[:, :50] == 1).all() and (values[:, 50:100] == 2).all() and (values[:, 100:] == 3).all()


def test_a_slide_that_is_not_there_is_named(tmp_path: Path, drawn) -> None:
    _, predictions, _, _ = drawn
    other = tmp_path / "elsewhere"
    other.mkdir()
    write_slide(other / "t.tiff", speckled(200, 200), mpp=0.5, downsamples=(1,))
    wrong = draw_heatmaps(predictions, other, tmp_path / "none", quiet=True)
    assert len(wrong) == 1 and wrong[0].startswith("s: ")

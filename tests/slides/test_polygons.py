"""Masks and polygons are the same thing written twice: nothing is lost between them, and every way to write an area is read."""

from __future__ import annotations

import gzip
import json
import uuid

import cv2
import numpy as np
import pytest
import shapely

from wsimil.errors import UsageError
from wsimil.slides.polygons import is_of_class, outlines, rasterize, read_rois, sort_rois, to_geojson


def blobs(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return cv2.GaussianBlur(rng.random((40, 60)), (0, 0), rng.uniform(0.3, 3)) > 0.5


@pytest.mark.parametrize("seed", range(12))
def test_outlines_bring_back_the_same_mask(seed):  # pixels that touch at corners, islands in holes, the picture's edge
    mask, size = blobs(seed), (60 * 37 + 11, 40 * 37 + 5)
    polygons = outlines(mask, size_level0_px=size)
    assert all(p.is_valid for p in polygons)
    assert sum(p.area for p in polygons) == pytest.approx(mask.mean() * size[0] * size[1])
    assert (rasterize(polygons, size_level0_px=size, shape=mask.shape) == mask).all()


def test_outlines_lie_on_pixel_edges():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 2] = True
    (polygon,) = outlines(mask, size_level0_px=(50, 40))
    assert polygon.bounds == (20, 10, 30, 30)
    assert outlines(np.zeros((4, 5), bool), size_level0_px=(50, 40)) == []


def test_a_pixel_is_inside_when_its_centre_is():
    inside = rasterize([shapely.box(14.9, -50, 35.1, 500)], size_level0_px=(50, 40), shape=(4, 5))
    assert inside.all(axis=0).tolist() == [False, True, True, True, False]
    inside = rasterize([shapely.box(15.1, 0, 34.9, 10)], size_level0_px=(50, 40), shape=(4, 5))
    assert inside[0].tolist() == [False, False, True, False, False] and not inside[1:].any()


def test_polygons_off_the_canvas_are_clipped():
    far = [shapely.box(1000, 1000, 2000, 2000), shapely.box(-30, -30, -10, 500)]
    assert not rasterize(far, size_level0_px=(50, 40), shape=(4, 5)).any()


def test_overlapping_polygons_add_up():
    boxes = [shapely.box(0, 0, 30, 40), shapely.box(10, 0, 50, 40)]
    assert rasterize(boxes, size_level0_px=(50, 40), shape=(4, 5)).all()


# ---------------------------------------------------------------- GeoJSON


@pytest.mark.parametrize("packed", [False, True])
def test_mask_survives_a_trip_through_qupath(tmp_path, packed):
    mask, size, origin = blobs(5), (6000, 4000), (1000, 600)
    regions = [("Tissue", p) for p in outlines(mask, size_level0_px=size)]
    text = json.dumps(to_geojson(regions, origin_level0_px=origin)).encode()
    path = tmp_path / ("s.geojson.gz" if packed else "s.geojson")
    path.write_bytes(gzip.compress(text) if packed else text)
    polygons = [polygon for _, polygon in read_rois(path, origin_level0_px=origin)]
    assert (rasterize(polygons, size_level0_px=size, shape=mask.shape) == mask).all()


def test_geojson_is_what_qupath_writes():
    square = shapely.box(1000, 600, 1010, 620)
    collection = to_geojson([("Tissue", square), (None, square)], origin_level0_px=(1000, 600))
    feature, unclassified = collection["features"]
    assert collection["type"] == "FeatureCollection" and feature["type"] == "Feature"
    assert shapely.geometry.shape(feature["geometry"]).bounds == (0, 0, 10, 20)  # QuPath counts from the bounds
    assert feature["properties"]["objectType"] == "annotation" and feature["properties"]["isLocked"] is False
    assert feature["properties"]["classification"]["name"] == "Tissue"
    assert len(feature["properties"]["classification"]["color"]) == 3
    assert "classification" not in unclassified["properties"]
    assert len({uuid.UUID(f["id"]) for f in collection["features"]}) == 2
    assert collection == to_geojson([("Tissue", square), (None, square)], origin_level0_px=(1000, 600))


SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
HOLE = [[2, 2], [4, 2], [4, 4], [2, 4], [2, 2]]


def feature(coordinates=None, kind="Polygon", **properties) -> dict:
    coordinates = [SQUARE] if coordinates is None else coordinates
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


def read(tmp_path, document):
    path = tmp_path / "rois.geojson"
    path.write_text(json.dumps(document))
    return read_rois(path)


@pytest.mark.parametrize(
    ("one", "area"),
    [
        (feature(), 100),
        (feature([SQUARE, HOLE]), 96),
        (feature([SQUARE[:-1]]), 100),  # not closed
        (feature([[[x, y, 0] for x, y in SQUARE]]), 100),  # with z
        (feature([[SQUARE], [[[x + 20, y] for x, y in SQUARE]]], "MultiPolygon"), 200),
        (feature([[[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]]), 50),  # crosses itself
        ({"type": "Feature", "geometry": feature()["geometry"]}, 100),  # no properties
        ({**feature(), "geometry": {"type": "GeometryCollection", "geometries": [feature()["geometry"]]}}, 100),
        (feature([5, 5], "Point"), 0),
        (feature([[0, 0], [5, 5]], "LineString"), 0),
        (feature([[[0, 0], [5, 5], [0, 0]]]), 0),  # flat
        ({**feature(), "geometry": None}, 0),
        (feature(objectType="detection"), 0),
        (feature(objectType="annotation", measurements={"Area": 3}), 100),
    ],
)
def test_every_way_to_write_an_area_is_read(tmp_path, one, area):
    for document in ({"type": "FeatureCollection", "features": [one]}, [one], one):
        assert sum(polygon.area for _, polygon in read(tmp_path, document)) == pytest.approx(area)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ({"name": "Tumor", "color": [200, 0, 0]}, "Tumor"),
        ({"name": "Tumor", "colorRGB": -3670016}, "Tumor"),
        ({"names": ["Tumor", "Positive"], "color": [1, 2, 3]}, "Tumor: Positive"),
        ("Tumor", "Tumor"),
        (None, None),
    ],
)
def test_every_way_to_write_a_class_is_read(tmp_path, written, name):
    assert [found for found, _ in read(tmp_path, [feature(classification=written)])] == [name]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b'"text"',
        b'{"type": "Topology"}',
        b'{"type": "FeatureCollection"}',
        b"[3]",
        b"\x1f\x8b broken gzip",
        gzip.compress(json.dumps([feature()]).encode(), mtime=0)[:-12],
        json.dumps([feature([[[0, 0], [1, 1]]])]).encode(),
        json.dumps([feature([[[0, 0], [1, "a"], [2, 2]]])]).encode(),
        json.dumps([feature([])]).encode(),
        json.dumps([{"type": "Feature", "geometry": {"type": "Polygon"}}]).encode(),
        b'[{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [NaN, 1], [2, 2]]]}}]',
    ],
)
def test_a_malformed_file_is_named(tmp_path, content):
    path = tmp_path / "bad.geojson"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"bad\.geojson"):
        read_rois(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.geojson"):
        read_rois(tmp_path / "nowhere.geojson")


# ---------------------------------------------------------------- regions of interest


LEFT, MIDDLE = shapely.box(0, 0, 30, 40), shapely.box(20, 0, 40, 40)


@pytest.mark.parametrize("name", ["exclude", "Ignore*", "Artefact", "ARTIFACT", "Pen", "Stroma: Ignore*"])
def test_excluded_classes_are_cut_out_whatever_else_is_included(name):
    for include in ((), ("tumor",), ("Stroma", "Tumor")):
        assert sort_rois([(name, MIDDLE), ("Tumor", LEFT)], include=include) == ([LEFT], [MIDDLE])


def test_without_a_choice_all_other_classes_and_none_are_kept():
    assert sort_rois([(None, LEFT), ("Ignored margin", MIDDLE)]) == ([LEFT, MIDDLE], [])
    assert sort_rois([("Necrosis", MIDDLE), ("Pen", LEFT)], exclude=("necrosis",)) == ([LEFT], [MIDDLE])


def test_of_a_choice_only_those_are_kept():
    rois = [(None, LEFT), ("Stroma", LEFT), ("Tumor: Positive", MIDDLE)]
    assert sort_rois(rois, include=("TUMOR",)) == ([MIDDLE], [])
    assert sort_rois(rois, include=("Tumour",)) == ([], [])


@pytest.mark.parametrize(
    ("name", "wanted", "same"),
    [
        ("Tumor*", "tumor", True),
        ("Tumor: Positive", "Tumor", True),
        ("Tumor: Positive", "positive", True),
        ("Tumor: Positive*", "tumor: positive", True),
        ("Tumor: Negative", "tumor: positive", False),
        ("Tumor", "Tumor: Positive", False),
        ("Tumor bed", "tumor", False),
        (None, "none", False),
    ],
)
def test_classes_are_compared_as_people_write_them(name, wanted, same):
    assert is_of_class(name, (wanted,)) is same

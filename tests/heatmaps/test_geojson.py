"""The text that QuPath reads, against the plain way: objects first, then JSON."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace

import numpy as np
import pytest
from heatmaps.maps import random_map

from wsimil.heatmaps import geojson
from wsimil.heatmaps.colors import in_colors
from wsimil.heatmaps.geojson import tiles_geojson


def parsed(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("kind", "side", "whole"), [("contribution", 50.7, True), ("attention", 64.0, False), ("tile_prob", 10.0, True)]
)
def test_every_tile_is_a_feature_with_its_place_colour_and_value(kind: str, side: float, whole: bool) -> None:
    tile_map = replace(random_map(2, n=300, side=side, size=(3000, 2000), kind=kind, whole=whole), slide_id='a "b" 100 %s ü')
    content = parsed(tiles_geojson(tile_map, origin=(100, 60)))
    assert content["type"] == "FeatureCollection" and len(content["features"]) == 300
    assert content["wsimil"]["slide_id"] == tile_map.slide_id and content["wsimil"]["origin_level0_px"] == [100, 60]
    for row, feature in enumerate(content["features"]):
        x, y = tile_map.coords_level0_px[row] - (100, 60)
        ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
        value = tile_map.values[row]
        np.testing.assert_allclose(feature["geometry"]["coordinates"], [ring], atol=0.0051)
        assert feature["geometry"]["coordinates"][0][0] == feature["geometry"]["coordinates"][0][-1]
        properties = feature["properties"]
        assert properties["measurements"] == {kind: pytest.approx(value, rel=1e-5)}
        assert properties["color"] == in_colors(tile_map.share(value), signed=kind == "contribution").tolist()
        assert properties["classification"]["name"] == ("not tumour" if kind == "contribution" and value <= 0 else "tumour")
        assert properties["objectType"] == "tile" and feature["type"] == "Feature"


def test_ids_are_proper_unlike_and_the_same_every_time() -> None:
    tile_map = random_map(2, n=500, side=50.0, size=(3000, 2000))
    ids = [feature["id"] for feature in parsed(tiles_geojson(tile_map))["features"]]
    assert ids == [str(uuid.uuid5(geojson._NAMESPACE, f"s/contribution/{row}")) for row in range(500)]
    other = [feature["id"] for feature in parsed(tiles_geojson(replace(tile_map, slide_id="t")))["features"]]
    assert len(set(ids + other)) == 1000


def test_values_of_a_large_bag_keep_their_digits() -> None:
    """A hundred thousand contributions to one logit are small each."""
    tile_map = random_map(2, n=3, side=50.0, size=(3000, 2000))
    tile_map = replace(tile_map, values=np.array([1.23456e-7, -3.5e-5, 2e9], np.float32))
    values = [feature["properties"]["measurements"]["contribution"] for feature in parsed(tiles_geojson(tile_map))["features"]]
    np.testing.assert_allclose(values, tile_map.values, rtol=1e-5)


def test_beyond_the_limit_the_hottest_are_kept_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geojson, "MAX_GEOJSON_TILES", 40)
    tile_map = random_map(2, n=500, side=50.0, size=(3000, 2000))
    content = parsed(tiles_geojson(tile_map))
    values = [feature["properties"]["measurements"]["contribution"] for feature in content["features"]]
    kept = tile_map.values[tile_map.values >= np.sort(tile_map.values)[-40]]
    np.testing.assert_allclose(values, kept, rtol=1e-5)
    assert content["wsimil"]["n_tiles"] == 500 and content["wsimil"]["n_written"] == 40


def test_no_tiles_are_an_empty_collection() -> None:
    assert parsed(tiles_geojson(random_map(0, n=0, side=50.0, size=(3000, 2000))))["features"] == []

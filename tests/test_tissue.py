"""Painted slides with a known truth: what is stained is found and nothing else is, at any glass, stain and scale."""

from __future__ import annotations

import gzip
import json
import uuid

import cv2
import numpy as np
import pytest
import shapely

from wsimil.errors import UsageError
from wsimil.slides.tissue import (
    draw_overview,
    find_tissue,
    outlines,
    rasterize,
    read_rois,
    roi_mask,
    tissue_mpp,
    to_geojson,
)

MPP = 8.0
SHAPE = (300, 400)  # h, w: 2.4 x 3.2 mm
HE, PALE_IHC = (0.06, 0.25, 0.10), (0.075, 0.06, 0.03)  # absorbances of red, green, blue light
DAB = (0.2, 0.4, 0.6)
PENS = {
    "green": (0.75, 0.2, 0.3),
    "blue": (0.65, 0.35, 0.1),
    "black": (1.1, 1.12, 1.1),
    "red": (0.08, 1.1, 1.05),
}
GLASSES = {"white": (243, 243, 243), "grey": (214, 214, 216), "yellow": (245, 240, 215), "pink": (244, 236, 241)}


def disc(x: float, y: float, radius: float, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def bare(glass: tuple[int, int, int] = GLASSES["white"], shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Glass with a scanner's noise, as transmitted light from 0 to 1."""
    noise = np.random.default_rng(0).normal(0, 0.8, (*shape, 3))
    return (np.array(glass) + noise) / 255


def stained(light: np.ndarray, where: np.ndarray, absorbance: tuple[float, ...], *, texture: float) -> np.ndarray:
    """The light that is left where a stain of that absorbance lies, uneven by a relative `texture`."""
    grain = cv2.GaussianBlur(np.random.default_rng(1).normal(size=where.shape), (0, 0), 1.5)
    amount = np.clip(1 + texture * grain / grain.std(), 0.1, None) * where
    return light * 10 ** (-amount[..., None] * np.array(absorbance))


def picture(light: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(light * 255), 0, 255).astype(np.uint8)


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


TISSUE = disc(150, 150, 90) | disc(290, 90, 40)


# ---------------------------------------------------------------- what is tissue


@pytest.mark.parametrize("glass", GLASSES)
@pytest.mark.parametrize("stain", [HE, PALE_IHC], ids=["H&E", "pale IHC"])
def test_tissue_is_found_on_any_glass_in_any_stain(glass, stain):
    light = stained(bare(GLASSES[glass]), TISSUE, stain, texture=0.3)
    if stain is PALE_IHC:  # Otsu between brown and blue would keep only the brown
        light = stained(light, disc(150, 120, 25) | disc(120, 180, 15), DAB, texture=0.3)
    found = find_tissue(picture(light), MPP)
    assert found.has_glass and agreement(found.mask, TISSUE) > 0.93
    assert not found.pen.any()


@pytest.mark.parametrize("glass", GLASSES)
def test_bare_glass_is_empty_despite_dust_and_a_smear(glass):
    light = bare(GLASSES[glass])
    for i, (x, y) in enumerate(np.random.default_rng(3).uniform(20, 280, (25, 2))):
        light = stained(light, disc(x, y, 1 + i % 4), (0.2, 0.2, 0.21), texture=0)  # grey, up to 64 µm across
    light = stained(light, disc(300, 220, 30), (0.1, 0.1, 0.1), texture=0.5)  # out-of-focus dirt
    light = stained(light, disc(80, 220, 40), (0.012, 0.02, 0.012), texture=0.4)  # smear of stain
    found = find_tissue(picture(light), MPP)
    assert not found.mask.any() and not found.pen.any() and found.has_glass


def test_bare_white_and_bare_black_are_empty():
    for level in (0, 255):
        assert not find_tissue(np.full((*SHAPE, 3), level, np.uint8), MPP).mask.any()


@pytest.mark.parametrize("glass", GLASSES)
def test_two_whites_are_both_background(glass):
    rgb = picture(stained(bare(GLASSES[glass]), TISSUE, HE, texture=0.3))
    rgb = np.pad(rgb, ((0, 200), (0, 300), (0, 0)), constant_values=255)  # never scanned; often most of a slide
    found = find_tissue(rgb, MPP).mask
    assert agreement(found, np.pad(TISSUE, ((0, 200), (0, 300)))) > 0.93


def test_pale_even_tissue_on_most_of_a_slide_is_not_taken_for_its_glass():
    tissue = np.ones(SHAPE, bool)
    tissue[:, 350:] = False
    found = find_tissue(picture(stained(bare(), tissue, PALE_IHC, texture=0.03)), MPP)
    assert agreement(found.mask, tissue) > 0.93


@pytest.mark.parametrize("margin_px", [1, 3, 30])
def test_black_padding_is_neither_tissue_nor_pen(margin_px):
    rgb = np.pad(picture(stained(bare(), TISSUE, HE, texture=0.3)), ((margin_px,) * 2, (margin_px,) * 2, (0, 0)))
    found = find_tissue(rgb, MPP)
    assert agreement(found.mask, np.pad(TISSUE, margin_px)) > 0.93 and not found.pen.any()


def test_black_padding_around_a_field_without_glass_is_cut_off():
    field = picture(stained(bare(), np.ones(SHAPE, bool), HE, texture=0.3))
    found = find_tissue(np.pad(field, ((40, 0), (0, 0), (0, 0))), MPP)
    assert not found.has_glass and not found.mask[:38].any() and found.mask[44:].all()


def test_shading_towards_an_edge_is_not_tissue():
    light = stained(bare(), TISSUE, HE, texture=0.3)
    light[260:] *= np.linspace(1, 0.6, 40)[:, None, None]
    assert agreement(find_tissue(picture(light), MPP).mask, TISSUE) > 0.93


def test_a_field_without_glass_is_all_tissue():
    light = stained(bare(), np.ones(SHAPE, bool), HE, texture=0.5)
    nuclei = np.random.default_rng(2).random(SHAPE) > 0.9
    light = stained(light, nuclei, (0.5, 0.55, 0.2), texture=0)  # Otsu alone would keep the nuclei
    found = find_tissue(picture(light), MPP)
    assert found.mask.all() and not found.has_glass


def test_lumens_and_fat_in_a_small_field_stay_tissue():
    shape = (125, 125)  # 250 µm at 2 µm/px
    lumens = disc(30, 30, 28, shape) | disc(90, 80, 30, shape) | disc(20, 105, 15, shape)  # 40 % of the field is empty
    light = stained(bare(shape=shape), ~lumens, HE, texture=0.3)
    assert find_tissue(picture(light), tissue_mpp(250, 250)).mask.all()


def test_lumens_that_a_crack_connects_are_not_glass():
    lumens = disc(150, 150, 15) | disc(210, 150, 15)  # .045 mm² each
    lumens[146:155, 150:210] = True
    found = find_tissue(picture(stained(bare(), ~lumens, HE, texture=0.3)), MPP)
    assert found.mask.all() and not found.has_glass


def test_a_hole_of_tissue_is_filled_up_to_the_size_of_glass():
    small, large = disc(110, 150, 8), disc(185, 150, 25)  # .013 and .126 mm²
    found = find_tissue(picture(stained(bare(), TISSUE & ~small & ~large, HE, texture=0.3)), MPP)
    assert found.mask[small].all() and found.mask[large].mean() < 0.1


def test_a_speck_of_stain_is_not_tissue():
    speck = disc(350, 250, 4)  # .003 mm²
    found = find_tissue(picture(stained(bare(), TISSUE | speck, HE, texture=0.2)), MPP)
    assert not found.mask[speck].any() and found.mask[TISSUE].mean() > 0.95


def test_scale_of_the_picture_changes_little():
    fine = stained(bare(shape=(600, 800)), cv2.resize(TISSUE.astype(np.uint8), (800, 600)) > 0, HE, texture=0.3)
    coarse = cv2.resize(fine, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    half = cv2.resize(find_tissue(picture(fine), MPP / 2).mask.astype(np.uint8), (400, 300)) > 0
    assert agreement(find_tissue(picture(coarse), MPP).mask, half) > 0.95


def test_pictures_scale_follows_from_the_slides_size_alone():
    assert tissue_mpp(20_000, 15_000) == 8
    assert tissue_mpp(1_000, 2_500) == 4
    assert tissue_mpp(250, 250) == 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (2, 3)])
def test_any_size_of_picture_works(shape):
    assert find_tissue(np.full((*shape, 3), 128, np.uint8), MPP).mask.shape == shape


def test_a_picture_that_is_not_rgb_is_refused():
    with pytest.raises(ValueError, match="uint8 RGB"):
        find_tissue(np.zeros((10, 10, 4), np.uint8), MPP)


# ---------------------------------------------------------------- pen


def stroke() -> np.ndarray:
    """.25 mm wide: across the glass, and into the smaller piece of tissue."""
    line = np.zeros(SHAPE, np.uint8)
    cv2.polylines(line, [np.array([[30, 20], [200, 30], [370, 40], [370, 250], [290, 90]])], False, 1, 31)
    return line.astype(bool)


@pytest.mark.parametrize("colour", PENS)
@pytest.mark.parametrize("strength", [1.0, 0.8])
def test_pen_on_glass_is_pen_and_not_tissue(colour, strength):
    ink = tuple(strength * a for a in PENS[colour])
    light = stained(stained(bare(), TISSUE, HE, texture=0.3), stroke(), ink, texture=0.05)
    found = find_tissue(picture(light), MPP)
    assert not (found.mask & stroke() & ~TISSUE).any()
    assert found.pen[stroke()].mean() > 0.9
    untouched = TISSUE & ~cv2.dilate(stroke().astype(np.uint8), np.ones((21, 21))).astype(bool)
    assert found.mask[untouched].mean() > 0.95 and not (found.mask & found.pen).any()


def test_pen_alone_leaves_nothing():
    for ink in PENS.values():
        assert not find_tissue(picture(stained(bare(), stroke(), ink, texture=0.05)), MPP).mask.any()


def test_blood_is_not_red_pen():
    light = stained(bare(), TISSUE, (0.08, 0.5, 0.45), texture=0.2)
    found = find_tissue(picture(light), MPP)
    assert not found.pen.any() and found.mask[TISSUE].mean() > 0.95


def test_a_blue_stain_is_kept_when_no_pen_is_looked_for():
    rgb = picture(stained(bare(), TISSUE, (0.5, 0.25, 0.1), texture=0.2))
    assert agreement(find_tissue(rgb, MPP, pen=False).mask, TISSUE) > 0.93


# ---------------------------------------------------------------- polygons


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
    rois = read_rois(path, origin_level0_px=origin)
    assert (roi_mask(rois, size_level0_px=size, shape=mask.shape) == mask).all()


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


def columns_left(rois, **options) -> list[bool]:
    left = roi_mask(rois, size_level0_px=(50, 40), shape=(4, 5), **options)
    return left.all(axis=0).tolist()


LEFT, MIDDLE = shapely.box(0, 0, 30, 40), shapely.box(20, 0, 40, 40)


@pytest.mark.parametrize("name", ["exclude", "Ignore*", "Artefact", "ARTIFACT", "Pen", "Stroma: Ignore*"])
def test_excluded_classes_are_cut_out_of_the_others(name):
    assert columns_left([(name, MIDDLE), ("Tumor", LEFT)]) == [True, True, False, False, False]


def test_exclusions_alone_are_cut_out_of_everything():
    assert columns_left([("ignore", MIDDLE)]) == [True, True, False, False, True]


def test_no_regions_leave_nothing():
    assert not any(columns_left([]))


def test_all_other_classes_and_none_are_kept():
    assert columns_left([(None, LEFT), ("Ignored margin", MIDDLE)]) == [True, True, True, True, False]
    left = columns_left([("Necrosis", MIDDLE), ("Tumor", LEFT)], exclude=("necrosis",))
    assert left == [True, True, False, False, False]


# ---------------------------------------------------------------- overview


def test_overview_shows_outlines_and_tiles_and_leaves_the_picture_alone():
    rgb = picture(stained(bare(), TISSUE, HE, texture=0.3))
    before, found = rgb.copy(), find_tissue(rgb, MPP)
    drawn = draw_overview(rgb, found, tiles_px=np.array([[350, 250, 20, 20]]))
    assert (rgb == before).all() and drawn.shape == rgb.shape
    assert (drawn[250, 350:370] == 0).all() and (drawn[269, 350:370] == 0).all()  # the tile's first and last row
    changed = (drawn != rgb).any(axis=2)
    assert changed[150, 50:70].any() and not changed[150, 100:200].any()

"""Tissue goes out as polygons and comes back through --roi: unedited it gives the same tiles, edited it gives what was drawn."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely

from wsimil.bags.bag import read_patches
from wsimil.config import JobConfig, TileConfig
from wsimil.errors import ConfigError
from wsimil.extraction import tile_slides
from wsimil.extraction.job import Row
from wsimil.extraction.tile import tile_recipe
from wsimil.slides.polygons import read_rois, to_geojson
from wsimil.slides.tiling import resolve_scale
from wsimil.slides.tissue import TISSUE_VERSION
from wsimil.slides.write_tiff import write_slide

MPP = 4.0
OFFSET = {"plain": (0, 0), "bounds": (301, 203), "ink": (0, 0), "blank": (0, 0)}


def painted(tissue: bool, ink: bool) -> np.ndarray:
    """2.4 x 3.2 mm: a piece of tissue and a blue line, half of it over the tissue."""
    rng = np.random.default_rng(0)
    absorbance = np.zeros((600, 800, 3))
    if tissue:
        grain = 1 + 0.3 * cv2.GaussianBlur(rng.normal(size=(600, 800)), (0, 0), 3)
        absorbance += cv2.circle(np.zeros((600, 800)), (300, 300), 200, 1, -1)[..., None] * grain[..., None] * (0.06, 0.25, 0.1)
    if ink:
        absorbance += cv2.line(np.zeros((600, 800)), (300, 250), (700, 150), 1, 50)[..., None] * (0.65, 0.35, 0.1)
    return np.clip(243 * 10**-absorbance + rng.normal(0, 0.8, (600, 800, 3)), 0, 255).astype(np.uint8)


def tile(slides: Path, out: Path, **settings) -> dict[str, Row]:
    config = TileConfig(mpp=MPP, tile_px=16, **settings)
    return {row.slide_id: row for row in tile_slides(slides, out, config=config, job=JobConfig(workers=1), quiet=True)}


def tiles_of(out: Path, slide_id: str):
    (path,) = out.glob(f"*/patches/{slide_id}_patches.h5")
    return read_patches(path)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    options = {"compression": "deflate", "downsamples": (1, 4), "mpp": MPP}
    write_slide(folder / "plain.tiff", painted(tissue=True, ink=True), **options)
    write_slide(folder / "bounds.scn", painted(tissue=True, ink=True), vendor="leica", bounds_offset_px=OFFSET["bounds"], **options)
    write_slide(folder / "ink.tiff", painted(tissue=False, ink=True), **options)
    write_slide(folder / "blank.tiff", painted(tissue=False, ink=False), **options)
    return folder


@pytest.fixture(scope="module")
def found(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job folder with what was found without polygons."""
    out = tmp_path_factory.mktemp("found")
    rows = tile(slides, out)
    assert {name: row.status for name, row in rows.items()} == {"plain": "done", "bounds": "done", "ink": "empty", "blank": "empty"}
    return out


def test_tissue_and_pen_are_published_where_they_are(found: Path) -> None:
    for slide_id in ("plain", "bounds"):  # both in QuPath's frame: the same drawing
        areas: dict[str | None, list[shapely.Polygon]] = {}
        for name, polygon in read_rois(found / "tissue" / f"{slide_id}.geojson"):
            areas.setdefault(name, []).append(polygon)
        tissue, pen = shapely.union_all(areas["Tissue"]), shapely.union_all(areas["Pen"])
        assert pen.contains(shapely.LineString([(310, 247), (690, 153)]).buffer(15))
        assert tissue.contains(shapely.Point(300, 400).buffer(80)) and tissue.intersection(pen).area < 1


def test_the_share_of_pen_is_noted_with_each_tile(found: Path) -> None:
    coords, qc, _ = tiles_of(found, "plain")
    assert set(qc) == {"tissue", "pen"}
    assert (qc["pen"] + qc["tissue"] <= 1 + 1e-5).all() and qc["pen"].max() > 0.2
    assert (qc["pen"][coords[:, 1] > 350] == 0).all()  # the line is above


def test_polygons_fed_back_unedited_give_the_same_tiles(slides: Path, found: Path, tmp_path: Path) -> None:
    rows = tile(slides, tmp_path, roi=str(found / "tissue"))
    assert {name: row.status for name, row in rows.items()} == {"plain": "done", "bounds": "done", "ink": "empty", "blank": "empty"}
    for slide_id in OFFSET:
        before, after = tiles_of(found, slide_id), tiles_of(tmp_path, slide_id)
        np.testing.assert_array_equal(before[0], after[0])
        assert before[1].keys() == after[1].keys()
        for name in before[1]:
            np.testing.assert_array_equal(before[1][name], after[1][name])
        again = (tmp_path / "tissue" / f"{slide_id}.geojson").read_bytes()
        assert again == (found / "tissue" / f"{slide_id}.geojson").read_bytes()


TUMOUR, NORMAL = shapely.box(160, 320, 256, 416), shapely.box(256, 320, 352, 416)


def draw(folder: Path, slide_id: str, *regions: tuple[str | None, shapely.Polygon]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{slide_id}.geojson").write_text(json.dumps(to_geojson(regions)))  # as QuPath: counted from the bounds


def test_only_the_chosen_class_is_tiled_and_a_slide_without_it_says_what_it_has(slides: Path, tmp_path: Path) -> None:
    for slide_id in ("plain", "bounds"):
        draw(tmp_path / "rois", slide_id, ("Tumor: Grade 3", TUMOUR), ("Normal", NORMAL), (None, shapely.box(0, 0, 800, 600)))
    draw(tmp_path / "rois", "ink", ("Normal", NORMAL), (None, NORMAL))
    rows = tile(slides, tmp_path / "job", roi=str(tmp_path / "rois"), roi_include=("tumor",))
    assert rows["plain"].n_tiles == rows["bounds"].n_tiles == 36
    for slide_id in ("plain", "bounds"):
        coords = tiles_of(tmp_path / "job", slide_id)[0] - OFFSET[slide_id]
        assert coords.min(axis=0).tolist() == [160, 320] and coords.max(axis=0).tolist() == [240, 400]
    assert rows["ink"].status == "empty"
    assert "no polygon of class tumor" in rows["ink"].reason and "Normal, no class" in rows["ink"].reason
    assert rows["blank"].status == "failed" and "expected" in rows["blank"].reason


def test_what_only_excludes_is_cut_out_of_what_was_found(slides: Path, found: Path, tmp_path: Path) -> None:
    for slide_id in OFFSET:
        draw(tmp_path / "rois", slide_id, ("Artefact", TUMOUR))
    rows = tile(slides, tmp_path / "job", roi=str(tmp_path / "rois"))
    assert rows["blank"].status == "empty"  # not all of its glass
    for slide_id in ("plain", "bounds"):
        left = set(map(tuple, tiles_of(tmp_path / "job", slide_id)[0] - OFFSET[slide_id]))
        before = set(map(tuple, tiles_of(found, slide_id)[0] - OFFSET[slide_id]))
        assert before - left == {xy for xy in before if TUMOUR.contains(shapely.box(xy[0], xy[1], xy[0] + 16, xy[1] + 16))}
        assert len(before - left) == 36 and left < before


def test_polygons_edited_in_place_are_never_written_over_and_a_broken_file_fails_alone(slides: Path, tmp_path: Path) -> None:
    for slide_id in OFFSET:
        draw(tmp_path / "tissue", slide_id, ("Tumor", TUMOUR))
    (tmp_path / "tissue" / "plain.geojson").write_text("{")
    before = {path.name: path.read_bytes() for path in (tmp_path / "tissue").iterdir()}
    rows = tile(slides, tmp_path, roi=str(tmp_path / "tissue"))
    assert rows["plain"].status == "failed" and "plain.geojson" in rows.pop("plain").reason
    assert {row.status for row in rows.values()} == {"done"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "tissue").iterdir()} == before


def test_the_recipe_knows_of_polygons_and_classes_only_where_they_are_used(tmp_path: Path) -> None:
    scale = resolve_scale(0.5, 0.5)
    draw(tmp_path, "s", ("Tumor", TUMOUR))
    draw(tmp_path, "t", ("Normal", TUMOUR))
    plain = tile_recipe(TileConfig(), scale, None)
    assert plain["tissue"] == TISSUE_VERSION and not {"pen", "roi", "roi_include", "roi_exclude"} & set(plain)
    assert tile_recipe(TileConfig(pen=False), scale, None) != plain
    assert tile_recipe(TileConfig(roi_exclude=("a",)), scale, None) == plain
    one = tile_recipe(TileConfig(roi=str(tmp_path)), scale, tmp_path / "s.geojson")
    assert one != tile_recipe(TileConfig(roi=str(tmp_path)), scale, tmp_path / "t.geojson")
    chosen = [TileConfig(roi=str(tmp_path), roi_include=names) for names in (("a", "B"), ("b", "A"), ("a",))]
    recipes = [tile_recipe(config, scale, tmp_path / "s.geojson") for config in chosen]
    assert recipes[0] == recipes[1] != recipes[2] and one not in recipes


def test_choices_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match="both name pen"):
        TileConfig(roi="rois", roi_include=("Pen",))
    with pytest.raises(ConfigError, match=r"tile\.roi is not"):
        TileConfig(roi_include=("Tumor",))

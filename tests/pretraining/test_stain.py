"""Pretraining on tiles of one stain: the colours that extraction will give, of every slide its own change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wsimil.bags.bag import read_header
from wsimil.config import ExtractConfig, JobConfig, PretrainConfig, Settings, TileConfig
from wsimil.encoders import load_encoder
from wsimil.errors import BagFormatError, UsageError, WsimilError
from wsimil.extraction import extract_features
from wsimil.extraction.job import Job
from wsimil.extraction.stains import measure_stains, read_stain, stain_file
from wsimil.files import read_json
from wsimil.pretraining import pretrain
from wsimil.pretraining.feed import MIN_SHOWN, TileFeed, shown
from wsimil.pretraining.index import TileIndex, index_slides, with_stains
from wsimil.pretraining.sampler import TileSampler
from wsimil.slides.cohort import find_slides
from wsimil.slides.painting import Stain, paint_slide
from wsimil.slides.slide import Slide
from wsimil.slides.stain import sample_rows, stain_normaliser
from wsimil.slides.write_tiff import write_slide

TILE, JOB = TileConfig(tile_px=64), JobConfig(workers=1)
STAINS = {
    "pink": Stain(haematoxylin=(1.1, 1.5, 0.75), eosin=(0.1, 1.2, 0.7)),
    "purple": Stain(haematoxylin=(1.5, 1.6, 0.6), eosin=(0.25, 0.8, 0.4)),
}


@pytest.fixture(scope="module")
def two_stains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tissue by two laboratories."""
    folder = tmp_path_factory.mktemp("two")
    for name, stain in STAINS.items():
        write_slide(folder / f"{name}.tiff", paint_slide(400, 400, mpp=0.5, seed=1, stain=stain).rgb, mpp=0.5)
    return folder


def indexed(slides: Path, out: Path, method: str | None = "macenko", tile: TileConfig = TILE) -> TileIndex:
    index = index_slides(slides, out, tile=tile, job=JOB, quiet=True)
    return index if method is None else with_stains(index, slides, out, stain_normaliser(method), tile=tile, job=JOB, quiet=True)


def grid_tiles(index: TileIndex, **more) -> dict[tuple[int, int, int], np.ndarray]:
    """Tiles as a run gets them, by slide and place."""
    sampler = TileSampler(index, seed=0, mpp_range=(0.5, 0.5), tile_px=64, per_slide_per_epoch=20)
    found = {}
    for batch in TileFeed(sampler, batch_size=20, steps=range(4), workers=1, **more):
        for number, slide, pixels in zip(batch.numbers, batch.slides, batch.pixels, strict=True):
            draw = sampler.draw(int(number))
            if draw.slide == slide:  # else it was nearly blank, and another one was taken
                found[int(slide), int(draw.x_level0_px), int(draw.y_level0_px)] = pixels.copy()
    return found


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_a_run_sees_each_slide_changed_as_a_whole(two_stains, tmp_path, no_processes, readers, method):
    index = indexed(two_stains, tmp_path / "index", method)
    assert index.hash != indexed(two_stains, tmp_path / "raw", None).hash
    seen = grid_tiles(index)
    for place, (slide, file) in enumerate(zip(index.slides, find_slides(two_stains), strict=True)):
        with Slide(file.path) as opened:
            own = [opened.read_tile(x, y, tile_level0_px=64, tile_px=64) for x, y in slide.cells_level0_px.tolist()]
        change = stain_normaliser(method).fit(np.stack(own)[sample_rows(len(own))])
        rows = {tuple(corner): row for row, corner in enumerate(slide.cells_level0_px.tolist()) if shown(own[row]) > MIN_SHOWN}
        tiles = {rows[x, y]: pixels for (at, x, y), pixels in seen.items() if at == place and (x, y) in rows}
        assert len(tiles) > 10
        for row, pixels in tiles.items():
            assert np.array_equal(pixels, change(own[row])) and not np.array_equal(pixels, own[row])


def test_the_stain_is_the_one_that_extraction_measures(two_stains, tmp_path):
    indexed(two_stains, tmp_path / "index")
    extract_features(
        two_stains, tmp_path / "job", tile=TILE, extract=ExtractConfig(stain="macenko", device="cpu"), job=JOB, quiet=True
    )
    for name in STAINS:
        said = read_json(stain_file(Job(tmp_path / "index"), TILE, name))
        [bag] = (tmp_path / "job").glob(f"*/features_*/{name}.h5")
        attributes = read_header(bag).attributes
        for part in ("stain_haematoxylin", "stain_eosin", "stain_strongest"):
            assert np.allclose(attributes[part], said[part], atol=0)


def test_the_cache_keeps_changed_tiles_apart_from_unchanged_ones(two_stains, tmp_path, no_processes, readers):
    changed, raw = indexed(two_stains, tmp_path / "index"), indexed(two_stains, tmp_path / "raw", None)
    cache = {"cache_gb": 0.01, "cache_folder": tmp_path / "cache"}
    first = [grid_tiles(index, **cache) for index in (raw, changed, changed)]
    for found, index in zip(first, (raw, changed, changed), strict=True):
        expected = grid_tiles(index)
        assert found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in found)


def test_a_stain_is_measured_once_and_a_changed_file_is_measured_again(two_stains, tmp_path, no_processes):
    normaliser = stain_normaliser("macenko")

    def statuses(method: str = "macenko", tile: TileConfig = TILE) -> list[str]:
        rows = measure_stains(two_stains, tmp_path / "job", stain_normaliser(method), tile=tile, job=JOB, quiet=True)
        return [row.status for row in rows]

    assert statuses() == ["done", "done"] and statuses() == ["skipped", "skipped"]
    path = stain_file(Job(tmp_path / "job"), TILE, "pink")
    before = read_stain(path, normaliser).measured
    path.write_text("{", encoding="utf-8")
    with pytest.raises(BagFormatError, match="no stain of a slide"):
        read_stain(path, normaliser)
    assert statuses() == ["done", "skipped"] and read_stain(path, normaliser).measured == before
    assert statuses("reinhard") == ["done", "done"]
    with pytest.raises(BagFormatError, match="measured by reinhard, not macenko"):
        read_stain(path, normaliser)


def test_slides_whose_stain_cannot_be_told_are_left_out_with_the_reason(tmp_path, monkeypatch):
    index = TileIndex(tuple(replace(_slide(name)) for name in "abcdefghijk"), "hash")

    def measured(slides, out, normaliser, *, tile, job, only, quiet):
        from wsimil.extraction.job import Row

        return [Row(name, name, "failed" if name in lost else "done", "there is one stain only", 5) for name in sorted(only)]

    monkeypatch.setattr("wsimil.pretraining.index.measure_stains", measured)
    monkeypatch.setattr("wsimil.pretraining.index.read_stain", lambda path, normaliser: _Change())
    lost, said = "c", []
    normaliser = stain_normaliser("macenko")
    kept = with_stains(index, tmp_path, tmp_path, normaliser, tile=TILE, job=JOB, say=said.append)
    assert [slide.slide_id for slide in kept.slides] == list("abdefghijk") and kept.left_out == (("c", "there is one stain only"),)
    assert "1 of 11 slides left out: c (there is one stain only)" in said[0]
    lost = "cd"
    with pytest.raises(WsimilError, match="2 of 11 slides have a stain that cannot be estimated, more than a tenth"):
        with_stains(index, tmp_path, tmp_path, normaliser, tile=TILE, job=JOB)


class _Change:
    measured = (1.0,)


def _slide(name: str):
    from wsimil.pretraining.index import IndexedSlide
    from wsimil.slides.cohort import SlideFile

    return IndexedSlide(name, SlideFile(Path(name), name, name), 0.5, np.zeros((5, 2), np.int64), 64.0, 400, 400)


def test_the_encoder_says_how_and_extraction_remarks_on_another_way(two_stains, tmp_path, no_processes, readers, monkeypatch):
    monkeypatch.setattr("wsimil.pretraining.process.TileFeed", TileFeed)
    options = ("global_px=32", "local_px=16", "local_views=1", "prototypes=32", "bottleneck=8", "hidden=16", "panel_tiles=12")
    config = PretrainConfig(
        method="dino", size="toy", arch="test_vit", init="scratch", steps=2, batch_size=4, device="cpu", stain="macenko",
        recipe_options=options, collapse="warn",
    )  # fmt: skip
    settings = Settings(tile=TILE, pretrain=config, job=JOB)
    said: list[str] = []
    pretrain(two_stains, tmp_path / "run", settings=settings, quiet=True, say=said.append)
    assert any("colours by macenko" in line for line in said)
    contract = load_encoder(str(tmp_path / "run")).contract
    assert contract.stain == "macenko" and contract.stain_remark("macenko") is None
    assert "was trained on colours by macenko and would see the slides' own colours; it asks for --stain macenko" in str(
        contract.stain_remark("none")
    )
    with pytest.raises(UsageError, match="stain: macenko there, None here"):
        pretrain(two_stains, tmp_path / "run", settings=replace(settings, pretrain=replace(config, stain="none")), quiet=True)


def test_tile_images_are_not_normalised(tmp_path):
    (tmp_path / "tiles").mkdir()
    settings = Settings(pretrain=PretrainConfig(stain="macenko", source="tiles"))
    with pytest.raises(UsageError, match="--stain macenko is for slides"):
        pretrain(tmp_path / "tiles", tmp_path / "run", settings=settings, quiet=True)
    assert not (tmp_path / "run").exists()


def test_an_unknown_stain_says_nothing():
    contract = load_encoder("random:test_vit").contract
    assert contract.stain == "" and contract.stain_remark("macenko") is None

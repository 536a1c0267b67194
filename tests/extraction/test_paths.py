"""Bags are the same, whichever way the pixels came: straight from the compressed blocks, or through OpenSlide."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import speckled

from wsimil.bags.bag import read_bag
from wsimil.config import ExtractConfig, JobConfig, TileConfig
from wsimil.extraction import extract_features
from wsimil.slides.direct import DCT_RESAMPLER
from wsimil.slides.slide import RESAMPLER
from wsimil.slides.write_tiff import write_slide

ONE = JobConfig(workers=1)  # a reader takes longer to start than these slides take
KINDS = {
    "420": {"compression": "jpeg"},
    "422": {"vendor": "aperio", "compression": "jpeg", "chroma": "4:2:2", "tile_px": 240},
    "rgb": {"compression": "jpeg-rgb", "tile_px": 240},
    "jpeg2000": {"vendor": "aperio", "compression": "jpeg2000"},
}

WRONG_BY_ONE = """
import importlib.machinery, sys

class Patch:  # wsimil must not be imported before its parent has said what it wants of it
    def find_spec(self, name, path=None, target=None):
        if name != "wsimil.slides.blocks":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            decode = module.BlockLevel.decode
            def off_by_one(self, content, pixels, **options):
                decode(self, content, pixels, **options)
                pixels ^= 1
            module.BlockLevel.decode = off_by_one
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Patch())
"""


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    for seed, (name, options) in enumerate(KINDS.items()):
        for mpp in (0.5, 0.25, 0.2527):
            grain = np.random.default_rng(seed).normal(0, 15, (520, 700, 3))
            pixels = np.clip(speckled(700, 520, seed) + grain, 0, 255).astype(np.uint8)
            write_slide(folder / f"{name}-{mpp}.svs", pixels, mpp=mpp, downsamples=(1,), **options)
    return folder


def remarks(job: Path) -> dict[str, list[str]]:
    lines = [json.loads(line) for line in (job / "logs" / "manifest.jsonl").read_text().splitlines()]
    found: dict[str, list[str]] = {}
    for line in lines:
        if line["event"] == "remark":
            found.setdefault(line["slide_id"], []).append(line["remark"])
    return found


def bags(job: Path) -> dict[str, Path]:
    return {path.stem: path for path in (job / "20x_64px_0px_overlap/features_texture").glob("*.h5")}


def test_both_ways_give_equal_bags_and_the_manifest_says_which_was_taken(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile, extract = TileConfig(tile_px=64), ExtractConfig(batch_size=1)  # batches of several slides differ in rounding
    extract_features(cohort, tmp_path / "direct", tile=tile, extract=extract, job=ONE, quiet=True)
    assert not remarks(tmp_path / "direct")

    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(WRONG_BY_ONE)
    monkeypatch.syspath_prepend(tmp_path / "hook")  # readers get it
    extract_features(cohort, tmp_path / "plain", tile=tile, extract=extract, job=ONE, quiet=True)
    said = remarks(tmp_path / "plain")
    assert said.keys() == bags(tmp_path / "plain").keys() == bags(tmp_path / "direct").keys() and len(said) == 12
    assert all("differs from OpenSlide's by up to" in lines[0] for lines in said.values())

    for slide_id, path in bags(tmp_path / "direct").items():
        one, other = read_bag(path), read_bag(bags(tmp_path / "plain")[slide_id])
        assert len(one.features) >= 15 and one.valid.all()
        np.testing.assert_array_equal(one.features, other.features, err_msg=slide_id)
        assert one.attributes["recipe_hash"] == other.attributes["recipe_hash"]
        assert one.attributes["resampler"] == RESAMPLER
        for name, values in one.qc.items():
            np.testing.assert_array_equal(values, other.qc[name], err_msg=f"{slide_id}: {name}")


def test_decoding_at_half_size_is_another_recipe_and_recorded(cohort: Path, tmp_path: Path) -> None:
    tile = TileConfig(tile_px=64)
    slide = cohort / "420-0.25.svs"
    extract_features(slide, tmp_path / "exact", tile=tile, job=ONE, quiet=True)
    extract_features(slide, tmp_path / "dct", tile=tile, extract=ExtractConfig(decode="dct"), job=ONE, quiet=True)
    exact, dct = (read_bag(bags(tmp_path / job)["420-0.25"]) for job in ("exact", "dct"))
    assert (exact.attributes["resampler"], dct.attributes["resampler"]) == (RESAMPLER, DCT_RESAMPLER)
    assert exact.attributes["recipe_hash"] != dct.attributes["recipe_hash"]
    difference = np.abs(exact.features.astype(float) - dct.features).max()
    assert 0 < difference < 0.5

    native = cohort / "420-0.5.svs"  # nothing to halve: decoded exactly, whatever was asked
    extract_features(native, tmp_path / "native", tile=tile, extract=ExtractConfig(decode="dct"), job=ONE, quiet=True)
    assert read_bag(bags(tmp_path / "native")["420-0.5"]).attributes["resampler"] == RESAMPLER

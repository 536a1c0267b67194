"""A filter leaves out exactly the tiles beyond its limits, on reading, and a slide left without tiles is an empty one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from wsimil.bags.bag import Bag, Geometry, read_bag, write_bag
from wsimil.bags.dataset import BagFolder
from wsimil.bags.filter import NO_FILTER, kept_tiles
from wsimil.config import FilterConfig
from wsimil.errors import BagFormatError, ConfigError, UsageError

GEOMETRY = Geometry(128, 256.0, 0, 5000, 5000, 0.25, 0.5, "slide")
SCORES = {
    "tissue": [0.9, 0.5, 1.0, 0.3, 0.8, np.nan],
    "pen": [0.0, 0.1, 0.3, 0.0, 1.0, 0.0],
    "blur": [0.2, 0.3, 0.9, 0.4, 0.5, np.nan],
    "darkness": [0.0, 0.7, 0.0, 0.1, 0.0, np.nan],
}
"""Of six tiles, the last of which could not be read."""


def make_bag(slide_id: str, scores: dict[str, list[float]] | None = None) -> Bag:
    scores = SCORES if scores is None else scores
    n_tiles = len(next(iter(scores.values()), [0] * 6))
    draw = np.random.default_rng(sum(map(ord, slide_id)))
    valid = np.arange(n_tiles) != 5
    stated = {"slide_id": slide_id, "encoder": "texture", "mpp": 0.25, "tile_level0_px": 256.0, "recipe_hash": "r"}
    return Bag(
        draw.normal(0, 1, (n_tiles, 3)).astype(np.float16) * valid[:, None],
        draw.integers(0, 5000, (n_tiles, 2)),
        valid,
        {name: np.array(values, np.float32) for name, values in scores.items()},
        stated,
    )


def write(folder: Path, bag: Bag) -> Path:
    path = folder / f"{bag.attributes['slide_id']}.h5"
    write_bag(path, bag, GEOMETRY)
    return path


def rows(**limits: float) -> list[int]:
    bag = make_bag("a")
    return np.flatnonzero(kept_tiles(bag.valid, bag.qc, FilterConfig(**limits), bag="a.h5")).tolist()


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"qc_tissue": 0.5}, [0, 1, 2, 4]),
        ({"qc_tissue": 0.51}, [0, 2, 4]),
        ({"qc_pen": 0.0}, [0, 3]),
        ({"qc_pen": 0.3}, [0, 1, 2, 3]),  # .3 is not representable: a score equal to the limit still meets it
        ({"qc_blur": 0.4}, [0, 1, 3]),
        ({"qc_darkness": 0.5}, [0, 2, 3, 4]),
        ({"qc_tissue": 0.5, "qc_blur": 0.4, "qc_pen": 0.05}, [0]),
        ({"qc_blur": 0.1}, []),
    ],
)
def test_the_rows_within_every_limit_are_kept(limits, kept):
    assert rows(**limits) == kept


@pytest.mark.parametrize("key", [setting.name for setting in fields(FilterConfig)])
def test_an_unknown_score_meets_no_limit(key):
    score = key.removeprefix("qc_")
    qc = {score: np.array([np.nan, 0.5], np.float32)}
    assert kept_tiles(np.ones(2, bool), qc, FilterConfig(**{key: 0.5}), bag="a.h5").tolist() == [False, True]
    assert kept_tiles(np.ones(2, bool), qc, NO_FILTER, bag="a.h5").tolist() == [True, True]


@pytest.mark.parametrize("key", [setting.name for setting in fields(FilterConfig)])
def test_a_limit_on_a_score_that_is_missing_names_bag_score_and_way_out(tmp_path, key):
    score = key.removeprefix("qc_")
    write(tmp_path, make_bag("a"))
    write(tmp_path, make_bag("b", {name: values for name, values in SCORES.items() if name != score}))
    bags = BagFolder(tmp_path, filter=FilterConfig(**{key: 0.5}))
    words = rf"b\.h5: no score `{score}` .*extract the slide again, or train without --qc-{score}"
    for use in (bags.n_valid, bags.kept, bags.load):
        use("a")
        with pytest.raises(UsageError, match=words):
            use("b")
    with pytest.raises(UsageError, match=words):
        _ = bags.filled


def test_bags_without_scores_need_none_without_a_filter(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as content:
        content["features"] = np.ones((4, 2), np.float32)
        content["coords"] = np.zeros((4, 2), int)
    bags = BagFolder(tmp_path, filter=FilterConfig())
    assert bags.filled == ["a"] and bags.kept("a").all() and len(bags.load("a").features) == 4
    with pytest.raises(UsageError, match="no scores at all"):
        BagFolder(tmp_path, filter=FilterConfig(qc_pen=0.5)).load("a")


def test_an_empty_bag_needs_no_scores(tmp_path):
    write(tmp_path, make_bag("a", {"tissue": []}))
    bags = BagFolder(tmp_path, filter=FilterConfig(qc_pen=0.5))
    assert bags.n_valid("a") == 0 and bags.kept("a").shape == (0,) and bags.load("a").features.shape == (0, 3)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_a_filtered_bag_is_the_bag_without_those_rows(tmp_path, cache_bytes):
    limits, features = FilterConfig(qc_blur=0.4, qc_tissue=0.4), tmp_path / "features_all"
    for slide_id in ("a", "b"):
        bag = make_bag(slide_id)
        write(features, bag)
        keep = [0, 1]
        rest = Bag(bag.features[keep], bag.coords_level0_px[keep], bag.valid[keep], {}, bag.attributes)
        write(tmp_path / "features_rest", rest)
    before = {path: path.read_bytes() for path in features.iterdir()}
    filtered = BagFolder(features, filter=limits, cache_bytes=cache_bytes)
    cut = BagFolder(tmp_path / "features_rest")
    for slide_id in ("a", "b", "a"):
        one, other = filtered.load(slide_id).checked(), cut.load(slide_id).checked()
        for part in ("features", "coords_um", "tile_um", "offsets"):
            assert torch.equal(getattr(one, part), getattr(other, part))
        assert filtered.n_valid(slide_id) == cut.n_valid(slide_id) == filtered.kept(slide_id).sum() == 2
        assert len(filtered.read(slide_id).features) == 6
    assert {path: path.read_bytes() for path in features.iterdir()} == before


def test_a_slide_left_without_tiles_is_not_filled(tmp_path):
    write(tmp_path, make_bag("a"))
    write(tmp_path, make_bag("b", SCORES | {"blur": [0.9] * 6}))
    bags = BagFolder(tmp_path, filter=FilterConfig(qc_blur=0.6))
    assert bags.slide_ids == ["a", "b"] and bags.filled == ["a"]
    assert bags.n_valid("b") == 0 and bags.load("b").features.shape == (0, 3)


def test_counting_reads_no_features(tmp_path, monkeypatch):
    write(tmp_path, make_bag("a"))
    monkeypatch.setattr("wsimil.hdf5.StoredRows.read_into", lambda *_: pytest.fail("the features were read"))
    assert BagFolder(tmp_path, filter=FilterConfig(qc_blur=0.4)).n_valid("a") == 3
    monkeypatch.setattr("wsimil.bags.bag.read_scores", lambda path: pytest.fail("the scores were read"))
    assert BagFolder(tmp_path).n_valid("a") == 5


def test_what_a_caller_does_to_the_rows_does_not_reach_the_bag(tmp_path):
    write(tmp_path, make_bag("a"))
    bags = BagFolder(tmp_path)
    bags.read("a")
    bags.kept("a")[:] = False
    assert bags.read("a").valid.sum() == 5


def test_scores_of_a_damaged_bag_are_refused(tmp_path):
    path = write(tmp_path, make_bag("a"))
    bags = BagFolder(tmp_path, filter=FilterConfig(qc_blur=0.4))
    with h5py.File(path, "r+") as content:
        content["valid"][0] = False
        del content["valid"].attrs["crc32"]  # as in a file of somebody else's
    for read in (read_bag, lambda path: bags.kept("a")):
        with pytest.raises(BagFormatError, match="n_invalid is 1, but 2"):
            read(path)


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_limit_out_of_range_is_refused(value):
    with pytest.raises(ConfigError, match=r"filter\.qc_pen is .*expected 0 to 1"):
        FilterConfig(qc_pen=value)

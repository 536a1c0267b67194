"""What a step holds is a function of (seed, epoch, slide): not of memory, pieces or threads."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_bags import write_cohort

from wsimil.bags.bag import Bag, Geometry, read_bag, write_bag
from wsimil.bags.dataset import BagFolder
from wsimil.batch import pack
from wsimil.training.items import LabelledSlides, Steps, TileStore


def slides_of(toy: Path, *, memory_bytes: int = 1 << 30, **options) -> LabelledSlides:
    bags = BagFolder(toy, cache_bytes=0)
    return LabelledSlides(TileStore(bags, memory_bytes=memory_bytes), bags.slide_ids, torch.arange(len(bags.slide_ids)), **options)


def contents(steps: Steps, epoch: int) -> list[list]:
    steps.set_epoch(epoch)
    return [[piece.bags.slide_ids, piece.targets.tolist(), piece.bags.features.tolist()] for step in steps for piece in step]


@pytest.mark.parametrize("sampled", [{}, {"tiles_per_bag": 15, "instance_dropout": 0.3, "seed": 4}])
def test_from_files_and_from_memory_the_same_comes(toy, sampled):
    runs = []
    for memory_bytes in (1 << 30, 5_000, 0):  # all, some and none of the slides held
        steps = Steps(slides_of(toy, memory_bytes=memory_bytes, **sampled), bags_per_step=3, limit=64, shuffle_seed=1)
        runs.append([contents(steps, epoch) for epoch in (0, 1, 0)])
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][0] == runs[0][2] != runs[0][1]


def test_what_is_held_is_what_the_folder_gives(toy):
    slides = slides_of(toy)
    for name in slides.slide_ids:
        stored, loaded = slides.store.bag(name), slides.store.bags.load(name)
        assert stored.features.dtype == torch.float16 and torch.equal(stored.features.float(), loaded.features)
        assert stored.coords_um is not None and loaded.coords_um is not None and torch.equal(stored.coords_um, loaded.coords_um)
        rows = np.array([3, 0, 7])
        picked = slides.store.bag(name, rows)
        assert torch.equal(picked.features, stored.features[rows]) and torch.equal(picked.checked().offsets, torch.tensor([0, 3]))


def test_no_file_is_read_after_all_are_held(toy, monkeypatch):
    slides = slides_of(toy)
    steps = Steps(slides, bags_per_step=4, shuffle_seed=0)
    list(steps)
    monkeypatch.setattr(slides.store.bags, "load", lambda *args, **kwargs: pytest.fail("a file was read"))
    list(steps)


def test_memory_is_not_exceeded(toy):
    slides = slides_of(toy, memory_bytes=5_000)
    list(Steps(slides, bags_per_step=4))
    held = sum(bag.features.nbytes + bag.coords_um.nbytes for bag in slides.store._held.values() if bag.coords_um is not None)
    assert 0 < held <= 5_000


def test_sampled_tiles_change_with_the_epoch_and_cover_the_slide(toy):
    slides = slides_of(toy, tiles_per_bag=15, seed=1)
    seen = [slides.rows(0, epoch) for epoch in range(30)]
    assert all(rows is not None and len(rows) == 15 == len(set(rows.tolist())) for rows in seen)
    assert len({tuple(rows) for rows in seen if rows is not None}) == 30
    assert set(np.concatenate([rows for rows in seen if rows is not None])) == set(range(slides.store.n_tiles(slides.slide_ids[0])))
    other = slides_of(toy, tiles_per_bag=15, seed=2)
    assert not np.array_equal(other.rows(0, 0), seen[0])
    assert not np.array_equal(slides.rows(1, 0), seen[0])


def test_a_bag_that_loses_all_its_tiles_keeps_one(toy):
    slides = slides_of(toy, tiles_per_bag=2, instance_dropout=0.999)
    assert all(len(rows) >= 1 for epoch in range(50) if (rows := slides.rows(0, epoch)) is not None)


def test_instance_dropout_leaves_out_its_share(toy):
    slides = slides_of(toy, instance_dropout=0.25)
    total = slides.store.n_tiles(slides.slide_ids[0])
    kept = [len(rows) / total for epoch in range(200) if (rows := slides.rows(0, epoch)) is not None]
    assert np.mean(kept) == pytest.approx(0.75, abs=0.03)


def test_pieces_are_the_step_cut_between_bags(toy):
    slides = slides_of(toy)
    indices = [5, 2, 9, 11, 0]
    (whole,) = slides.pieces(indices, 0, limit=None)
    cut = slides.pieces(indices, 0, limit=70)
    assert len(cut) > 2
    assert all(len(piece.bags.features) <= 70 or len(piece.bags) == 1 for piece in cut)
    assert torch.equal(pack([piece.bags for piece in cut]).features, whole.bags.features)
    assert torch.cat([piece.targets for piece in cut]).tolist() == whole.targets.tolist() == indices


def test_a_step_fills_its_budget_of_tiles_and_every_slide_comes_once(toy):
    slides = slides_of(toy)
    plan = Steps(slides, bags_per_step=99, tiles_per_step=100, shuffle_seed=0).plan(3)
    assert sorted(index for step in plan for index in step) == list(range(len(slides)))
    sizes = [[slides.n_tiles(index) for index in step] for step in plan]
    assert all(sum(step) <= 100 or len(step) == 1 for step in sizes)
    # the next slide would have been too many
    assert all(sum(step) + following[0] > 100 for step, following in pairwise(sizes))


@pytest.mark.parametrize("block", [1, 3, 4096])
@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
def test_moments_weigh_slides_alike(toy, monkeypatch, block, memory_bytes):
    monkeypatch.setattr("wsimil.training.items._BLOCK", block)
    slides = slides_of(toy, memory_bytes=memory_bytes)
    for names in (slides.slide_ids[:5], slides.slide_ids[3:]):
        parts = [slides.store.bags.load(name).features.double().numpy() for name in names]
        assert len({len(part) for part in parts}) > 1
        weights = np.concatenate([np.full(len(part), 1 / len(part)) for part in parts])
        expected = np.average(np.concatenate(parts), axis=0, weights=weights)
        spread = np.sqrt(np.average((np.concatenate(parts) - expected) ** 2, axis=0, weights=weights))
        mean, deviation = slides.store.moments(names)
        np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(deviation, spread, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "scale"), [(np.float16, 1.0), (np.float32, 1e20)])
def test_moments_keep_their_digits_far_from_zero(tmp_path, dtype, scale):
    rng, values = np.random.default_rng(0), {}
    for name, n_tiles in {"a": 3000, "b": 1500}.items():
        far = np.array([0, 1000, -30_000]) + [1, 2, 40] * rng.standard_normal((n_tiles, 3))
        far[0] = [60_000, -60_000, 60_000]  # and the first tile unlike all others
        values[name] = (scale * far).astype(dtype)
        bag = Bag(values[name], np.zeros((n_tiles, 2), int), np.ones(n_tiles, bool), attributes={"slide_id": name, "encoder": "e"})
        write_bag(tmp_path / f"features_e/{name}.h5", bag, Geometry(224, 224.0, 0, 20_000, 20_000, 0.5, 0.5, name))
    mean, deviation = slides_of(tmp_path).store.moments(["a", "b"])
    exact = [value.astype(np.float64) for value in values.values()]
    expected = np.mean([value.mean(0) for value in exact], 0)
    spread = np.sqrt(np.mean([np.mean((value - expected) ** 2, 0) for value in exact], 0))
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    np.testing.assert_allclose(deviation, spread, rtol=1e-5)


def test_a_feature_that_never_varies_becomes_zero(tmp_path):
    folder = write_cohort(tmp_path, n_slides=4)
    for path in folder.glob("features_toy/*.h5"):
        bag = read_bag(path)
        bag.features[:, 1] = 0.1
        write_bag(path, bag, Geometry(224, 224.0, 0, 20_000, 20_000, 0.5, 0.5, path.stem))
    slides = slides_of(folder)
    mean, deviation = slides.store.moments(slides.slide_ids)
    standardized = (slides.store.bag(slides.slide_ids[0]).features - mean) / deviation
    assert (standardized[:, 1] == 0).all() and standardized.isfinite().all() and standardized[:, 0].any()


def test_an_objective_may_order_the_slides(toy):
    steps = Steps(slides_of(toy), bags_per_step=2, shuffle_seed=0, order=lambda epoch: [epoch, 3, 3])
    assert steps.plan(7) == [[7, 3], [3]]

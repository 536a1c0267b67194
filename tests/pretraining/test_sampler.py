"""Which tile comes next: checked with numbers alone, no slide is opened."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wsimil.errors import UsageError
from wsimil.pretraining.index import IndexedSlide, TileIndex
from wsimil.pretraining.sampler import TileSampler, shuffled
from wsimil.slides.cohort import SlideFile
from wsimil.slides.tiling import Rect, tile_grid


def slide(name: str, *, mpp: float = 0.5, width: int = 4000, height: int = 3000, cell_px: float = 224.0) -> IndexedSlide:
    cells = tile_grid(Rect(0, 0, width, height), tile_level0_px=cell_px, step_level0_px=cell_px).coords_level0_px
    return IndexedSlide(name, SlideFile(Path(name), name, name), mpp, cells, cell_px, width, height)


def index_of(*slides: IndexedSlide) -> TileIndex:
    return TileIndex(slides, "hash")


SMALL_AND_LARGE = index_of(slide("small", width=2240, height=2240), slide("large", width=8960, height=8960))
RANGES = index_of(slide("native", mpp=0.5), slide("fine", mpp=0.25), slide("odd", mpp=0.347), slide("field", width=300, height=260))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 97, 1000])
def test_a_shuffle_loses_nothing_and_keys_differ(size: int) -> None:
    shuffles = [[shuffled(place, size, key) for place in range(size)] for key in (7, 8)]
    assert all(sorted(places) == list(range(size)) for places in shuffles)
    assert size < 8 or shuffles[0] != shuffles[1] != list(range(size))


def test_a_shuffle_forgets_where_a_place_was() -> None:
    size = 4096
    places = np.array([[shuffled(place, size, key) for place in range(size)] for key in range(8)])
    near = np.abs(np.diff(places, axis=1))
    assert abs(near.mean() / (size / 3) - 1) < 0.05  # of two places at random
    assert abs(np.mean([np.corrcoef(row, np.arange(size))[0, 1] for row in places])) < 0.03


def test_a_tile_is_a_function_of_seed_and_number_alone() -> None:
    def sampler(seed: int) -> TileSampler:
        return TileSampler(RANGES, seed=seed, mpp_range=(0.25, 1), tile_px=224)

    forwards = [sampler(3).draw(number) for number in range(300)]
    one = sampler(3)
    backwards = [one.draw(number) for number in reversed(range(300))]
    assert forwards == backwards[::-1]
    assert forwards != [sampler(4).draw(number) for number in range(300)]
    far = 10**15
    assert sampler(3).draw(far) == sampler(3).draw(far) != sampler(3).draw(far + 1)


@pytest.mark.parametrize("mpp_range", [(0.25, 1.0), (0.5, 0.5), (0.5, 2.0)])
def test_boxes_stay_on_the_slide_and_scales_in_the_range(mpp_range: tuple[float, float]) -> None:
    sampler = TileSampler(RANGES, seed=1, mpp_range=mpp_range, tile_px=224)
    for number in range(2000):
        draw = sampler.draw(number, number % 3)
        there, side = RANGES.slides[draw.slide], sampler.side_level0_px(draw)
        assert 0 <= draw.x_level0_px <= draw.x_level0_px + side <= there.width + 1e-3
        assert 0 <= draw.y_level0_px <= draw.y_level0_px + side <= there.height + 1e-3
        assert mpp_range[0] * 0.995 <= draw.mpp <= mpp_range[1] * 1.005
        assert draw.mpp >= there.mpp * 0.995  # no detail is asked for that the slide has not
        assert (draw.x_level0_px % 1, draw.y_level0_px % 1) == (0, 0)


def test_a_scale_that_is_nearly_the_scanners_is_the_scanners() -> None:
    cmu = slide("cmu", mpp=0.499)
    draw = TileSampler(index_of(cmu), seed=0, mpp_range=(0.5, 0.5), tile_px=224).draw(0)
    assert draw.mpp == 0.499


def test_scales_are_spread_evenly_in_octaves() -> None:
    sampler = TileSampler(index_of(slide("fine", mpp=0.25)), seed=0, mpp_range=(0.25, 1), tile_px=224)
    octaves = np.log2([sampler.draw(number).mpp / 0.25 for number in range(4000)])
    counts, _ = np.histogram(octaves, bins=8, range=(0, 2.0001))
    assert counts.min() > 400 and counts.max() < 600


@pytest.mark.parametrize(("power", "times"), [(0.0, 1), (0.5, 4), (1.0, 16)])
def test_a_slides_share_is_its_area_to_the_power(power: float, times: float) -> None:
    sampler = TileSampler(SMALL_AND_LARGE, seed=5, mpp_range=(0.5, 0.5), tile_px=224, area_power=power)
    assert sampler.epoch == 100 + 1600
    for epoch in range(2):
        numbers = range(epoch * sampler.epoch, (epoch + 1) * sampler.epoch)
        counts = Counter(sampler.draw(number).slide for number in numbers)
        assert abs(counts[0] - sampler.epoch / (1 + times)) <= 1  # exactly its share, to one draw
    again = Counter(sampler.draw(number, 1).slide for number in range(3400))
    assert abs(again[0] / 3400 - 1 / (1 + times)) < 0.03


def test_cells_come_round_in_turn() -> None:
    sampler = TileSampler(SMALL_AND_LARGE, seed=5, mpp_range=(0.5, 0.5), tile_px=224)
    draws = [sampler.draw(number) for number in range(sampler.epoch)]
    small, large = (Counter(draw.cell for draw in draws if draw.slide == place) for place in (0, 1))
    assert set(small) == set(range(100)) and max(small.values()) - min(small.values()) <= 1
    assert max(large.values()) == 1  # fewer draws than cells: none twice


def test_a_slide_whose_share_of_an_epoch_is_less_than_one_tile_is_not_lost() -> None:
    index = index_of(slide("speck", width=224, height=224), slide("large", width=2240, height=2240))
    sampler = TileSampler(index, seed=0, mpp_range=(0.5, 0.5), tile_px=224, area_power=1.5)
    epochs = Counter(number // sampler.epoch for number in range(200 * sampler.epoch) if sampler.draw(number).slide == 0)
    assert max(epochs.values()) == 1 and 8 <= len(epochs) <= 34  # a tenth of the epochs


def test_tiles_lie_anywhere_in_their_cells() -> None:
    sampler = TileSampler(SMALL_AND_LARGE, seed=2, mpp_range=(0.5, 0.5), tile_px=224)
    offsets = []
    for number in range(1500):
        draw = sampler.draw(number)
        there = SMALL_AND_LARGE.slides[draw.slide]
        cell = there.cells_level0_px[draw.cell]
        if cell.min() >= 224 and cell.max() <= there.width - 448:  # away from the rim, where boxes are pushed back
            offsets.append((draw.x_level0_px - cell[0], draw.y_level0_px - cell[1]))
    offsets = np.array(offsets)
    assert offsets.min() >= -112 and offsets.max() <= 112
    assert len(offsets) > 1000 and np.abs(offsets.mean(0)).max() < 6 and abs(offsets.std() - 224 / 12**0.5) < 4


def test_batches_mix_slides() -> None:
    index = index_of(*(slide(f"s{place:02d}", width=2240, height=2240) for place in range(40)))
    sampler = TileSampler(index, seed=0, mpp_range=(0.5, 0.5), tile_px=224)
    mixed = [len({sampler.draw(step * 64 + k).slide for k in range(64)}) for step in range(40)]
    assert min(mixed) >= 24 and 30 <= np.mean(mixed) <= 36  # 64 of 40 at random: 32


def test_the_published_epoch_has_the_same_number_of_cells_of_every_slide() -> None:
    sampler = TileSampler(SMALL_AND_LARGE, seed=0, mpp_range=(0.5, 0.5), tile_px=224, per_slide_per_epoch=256)
    assert sampler.epoch == 512
    epochs = [[sampler.draw(number) for number in range(start, start + 512)] for start in (0, 512)]
    for draws in epochs:
        assert Counter(draw.slide for draw in draws) == {0: 256, 1: 256}
        assert max(Counter(draw.cell for draw in draws if draw.slide == 1).values()) == 1
        for draw in draws:
            cell = SMALL_AND_LARGE.slides[draw.slide].cells_level0_px[draw.cell]
            assert (draw.x_level0_px, draw.y_level0_px) == tuple(cell)
    large = [{draw.cell for draw in draws if draw.slide == 1} for draws in epochs]
    assert large[0] != large[1]  # drawn anew


def test_distinct_tiles_come_again_in_another_order() -> None:
    fresh = TileSampler(SMALL_AND_LARGE, seed=9, mpp_range=(0.5, 1), tile_px=224)
    sampler = TileSampler(SMALL_AND_LARGE, seed=9, mpp_range=(0.5, 1), tile_px=224, distinct=50)
    boxes = [(draw.slide, draw.x_level0_px, draw.y_level0_px, draw.mpp) for draw in map(sampler.draw, range(150))]
    assert boxes[:50] == [(draw.slide, draw.x_level0_px, draw.y_level0_px, draw.mpp) for draw in map(fresh.draw, range(50))]
    assert sorted(boxes[50:100]) == sorted(boxes[:50]) == sorted(boxes[100:])
    assert boxes[50:100] != boxes[:50] and boxes[100:] != boxes[50:100]
    assert [sampler.draw(number).number for number in (49, 50, 149)] == [49, 50, 149]  # views may differ


def test_attempts_of_a_number_differ_and_so_do_their_slides() -> None:
    sampler = TileSampler(SMALL_AND_LARGE, seed=0, mpp_range=(0.5, 0.5), tile_px=224)
    attempts = [sampler.draw(17, attempt) for attempt in range(30)]
    assert len({(draw.slide, draw.x_level0_px, draw.y_level0_px) for draw in attempts}) == 30
    assert {draw.slide for draw in attempts} == {0, 1}


def test_a_slide_too_small_for_a_tile_is_left_out_and_named() -> None:
    index = index_of(slide("tiny", width=230, height=230, cell_px=64), slide("large"))
    sampler = TileSampler(index, seed=0, mpp_range=(1, 1), tile_px=224)
    assert sampler.left_out == ("tiny",)
    assert {sampler.draw(number, attempt).slide for number in range(300) for attempt in (0, 1)} == {1}
    with pytest.raises(UsageError, match="finer --mpp"):
        TileSampler(index_of(index.slides[0]), seed=0, mpp_range=(1, 1), tile_px=224)


@pytest.mark.parametrize("mpp_range", [(0.25, 1.0), (0.25, 0.4), (0.5, 0.5), (0.3, 40.0)])
def test_the_scales_that_are_drawn_are_known_before(mpp_range: tuple[float, float]) -> None:
    for slides in ([slide("coarse", mpp=0.5)], [slide("coarse", mpp=0.5), slide("mid", mpp=0.4)], RANGES.slides):
        sampler = TileSampler(index_of(*slides), seed=3, mpp_range=mpp_range, tile_px=224, area_power=0)
        drawn = [sampler.draw(number).mpp for number in range(2000)]
        finest, coarsest = sampler.drawn_mpp
        assert mpp_range[0] <= finest <= coarsest <= mpp_range[1]
        assert min(drawn) == pytest.approx(finest, rel=0.02) and max(drawn) == pytest.approx(coarsest, rel=0.02)


def test_tiles_of_a_mosaic_are_its_cells() -> None:
    mosaic = replace(SMALL_AND_LARGE, mosaic=True)
    plain, sampler = (TileSampler(one, seed=2, mpp_range=(0.5, 0.5), tile_px=224) for one in (SMALL_AND_LARGE, mosaic))
    for number in range(500):
        draw = sampler.draw(number, number % 3)
        cell = mosaic.slides[draw.slide].cells_level0_px[draw.cell]
        assert (draw.x_level0_px, draw.y_level0_px) == tuple(cell)
        assert (draw.slide, draw.cell) == (plain.draw(number, number % 3).slide, plain.draw(number, number % 3).cell)
    assert sampler.recipe() == {**plain.recipe(), "whole_cells": True}  # other runs are known by what they were


def test_the_recipe_names_whatever_a_draw_depends_on() -> None:
    one = {"seed": 0, "mpp_range": (0.5, 1), "tile_px": 224, "area_power": 0.5, "per_slide_per_epoch": 0, "distinct": 0}
    others = {"seed": 1, "mpp_range": (0.5, 0.9), "tile_px": 96, "area_power": 1.0, "per_slide_per_epoch": 8, "distinct": 5}
    recipe = TileSampler(RANGES, **one).recipe()
    for key, value in others.items():
        assert TileSampler(RANGES, **{**one, key: value}).recipe() != recipe
    assert TileSampler(TileIndex(RANGES.slides, "other"), **one).recipe() != recipe

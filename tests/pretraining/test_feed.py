"""Tiles as a run gets them: the right places, in the sampler's order, whatever readers, files and restarts do.

Most feeds here have `readers` that start no process and answer in an order of their own.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from wsimil.errors import SlideReadError, SlideUnreadableError, WsimilError
from wsimil.extraction.pool import ReaderPool
from wsimil.pretraining import feed as feed_module
from wsimil.pretraining.feed import TileBatch, TileFeed, shown
from wsimil.pretraining.index import IndexedSlide, TileIndex, index_tiles
from wsimil.pretraining.sampler import TileSampler
from wsimil.slides.cohort import find_slides
from wsimil.slides.direct import DirectReader
from wsimil.slides.slide import Slide
from wsimil.slides.tiling import tile_grid
from wsimil.slides.write_tiff import write_slide

pytestmark = pytest.mark.usefixtures("readers")

PX = 48
RISE = 200 / 1024  # grey levels of a coded slide per level-0 pixel


def indexed(folder: Path) -> TileIndex:
    """Slides of a folder, whole: without a look at their tissue, and without the processes that would take."""
    slides = []
    for file in find_slides(folder):
        with Slide(file.path) as slide:
            side = PX * 0.5 / slide.known_mpp()
            cells = tile_grid(slide.bounds, tile_level0_px=side, step_level0_px=side).coords_level0_px
            slides.append(IndexedSlide(file.slide_id, file, slide.known_mpp(), cells, side, slide.width, slide.height))
    return TileIndex(tuple(slides), "hash")


@pytest.fixture(scope="module")
def index(coded_slides: Path) -> TileIndex:
    return indexed(coded_slides)


def free(index: TileIndex, **changes: Any) -> TileSampler:
    return TileSampler(index, **{"seed": 3, "mpp_range": (0.25, 1.0), "tile_px": PX, **changes})


def batches(sampler: TileSampler, steps: range, *, batch_size: int = 8, workers: int = 1, **rest: Any) -> list[TileBatch]:
    return list(TileFeed(sampler, batch_size=batch_size, steps=steps, workers=workers, **rest))


def same(a: list[TileBatch], b: list[TileBatch]) -> bool:
    parts = ("step", "numbers", "slides", "pixels")
    return len(a) == len(b) and all(
        np.array_equal(getattr(x, part), getattr(y, part)) for x, y in zip(a, b, strict=True) for part in parts
    )


def test_a_tile_shows_the_place_and_the_scale_it_was_drawn_at(index: TileIndex) -> None:
    sampler = free(index)
    fit = np.arange(PX) + 0.5
    for batch in batches(sampler, range(12), workers=2):
        for number, slide, tile in zip(batch.numbers, batch.slides, batch.pixels, strict=True):
            draw = sampler.draw(int(number))
            there = index.slides[draw.slide]
            assert draw.slide == slide and abs(float(tile[..., 2].mean()) - (40 + 40 * slide)) < 1  # blue tells the slide
            for axis, corner in ((1, draw.x_level0_px), (0, draw.y_level0_px)):
                profile = tile[..., 1 - axis].mean(axis=1 - axis)
                rise, start = np.polyfit(fit, (profile - 20) / RISE, 1)  # level-0 pixels per pixel, and of the corner
                assert rise * there.mpp == pytest.approx(draw.mpp, rel=0.03)
                # half a grey level is 2.6 px, and a tile begins on a whole pixel of the level it is read from
                assert start == pytest.approx(corner, abs=4.5)


def test_tiles_are_those_of_the_slide_however_they_are_read(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(60, 220, (40, 40, 3), np.uint8).repeat(20, 0).repeat(20, 1)
    for name, mpp in (("native", 0.5), ("odd", 0.37)):
        write_slide(tmp_path / f"{name}.tiff", picture, mpp=mpp, vendor="aperio", downsamples=(1, 4))
    found = indexed(tmp_path)
    feed_module._steady.clear()
    for mpp_range in ((0.5, 0.5), (0.5, 1.0)):
        sampler = free(found, mpp_range=mpp_range)
        for batch in batches(sampler, range(32), workers=1):
            for number, tile in zip(batch.numbers, batch.pixels, strict=True):
                draw = sampler.draw(int(number))
                side = sampler.side_level0_px(draw)
                with Slide(found.slides[draw.slide].file.path) as slide:
                    expected = slide.read_box(draw.x_level0_px, draw.y_level0_px, side, side, size_px=(PX, PX))
                assert np.array_equal(tile, expected)
    assert [type(tiles) for tiles in feed_module._steady.values()] == [DirectReader] * 2  # of the one scale; it pays


def test_two_devices_see_together_what_one_sees_with_twice_the_batch(index: TileIndex) -> None:
    sampler = free(index)
    one = batches(sampler, range(10), batch_size=8, workers=2)
    two = [batches(sampler, range(10), batch_size=4, rank=rank, world=2) for rank in (0, 1)]
    for whole, first, second in zip(one, *two, strict=True):
        assert whole.numbers.tolist() == [*first.numbers, *second.numbers]
        assert np.array_equal(whole.pixels, np.concatenate([first.pixels, second.pixels]))


def test_neither_readers_nor_a_new_start_change_what_comes(index: TileIndex, readers: Any) -> None:
    whole = batches(free(index), range(40), workers=1)
    for seed, workers, start in ((1, 2, 0), (2, 5, 0), (3, 3, 11)):
        readers.seed = seed
        assert same(whole[start:], batches(free(index), range(start, 40), workers=workers))


def test_readers_in_processes_read_ahead_give_the_same_and_end_with_the_run(
    index: TileIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batches(free(index), range(16))
    pools: list[ReaderPool] = []
    monkeypatch.setattr(feed_module, "ReaderPool", lambda *a, **k: pools.append(ReaderPool(*a, **k)) or pools[-1])
    feed = TileFeed(free(index), batch_size=8, steps=range(1000), workers=2)
    iterator = iter(feed)
    real = [next(iterator)]
    time.sleep(2)
    before = feed.counts.waited_s
    real += [next(iterator) for _ in range(15)]
    assert feed.counts.waited_s - before < 0.2  # they were read meanwhile
    assert same(real, expected)
    processes = [reader._process for reader in pools[0]._readers]
    iterator.close()
    assert all(process.poll() is not None for process in processes)


def test_every_batch_mixes_slides(index: TileIndex) -> None:
    mixed = [len(set(batch.slides.tolist())) for batch in batches(free(index), range(16))]
    assert np.mean(mixed) > 3 and min(mixed) >= 2  # of four, in batches of eight


# ---------------------------------------------------------------- tiles of no use


def half_glass(folder: Path) -> Path:
    """A slide that is tissue on its left and glass on its right; and one that is all tissue."""
    rng = np.random.default_rng(0)
    picture = np.clip(np.array([190, 120, 170]) + rng.integers(-40, 40, (900, 1000, 3)), 0, 255).astype(np.uint8)
    write_slide(folder / "whole.tiff", picture, mpp=0.5, compression="deflate", downsamples=(1, 4))
    picture[:, 500:] = 245
    write_slide(folder / "half.tiff", picture, mpp=0.5, compression="deflate", downsamples=(1, 4))
    return folder


def test_tiles_that_show_nothing_are_drawn_again_and_counted(tmp_path: Path) -> None:
    found = indexed(half_glass(tmp_path))
    sampler = free(found, mpp_range=(0.5, 0.5))
    feed = TileFeed(sampler, batch_size=8, steps=range(10), workers=1)
    tiles = [tile for batch in feed for tile in batch.pixels]
    assert min(map(shown, tiles)) >= feed_module.MIN_SHOWN
    first = [sampler.draw(number) for number in range(80)]
    blank = sum(draw.slide == 0 and draw.x_level0_px > 500 for draw in first)
    assert feed.counts.rejected >= blank > 5
    assert feed.rejections.tolist() == [feed.counts.rejected, 0]
    assert (feed.counts.tiles, feed.counts.reads, feed.counts.kept_best) == (80, 80 + feed.counts.rejected, 0)
    kept = [k for k, draw in enumerate(first) if draw.slide == 1]
    assert all(np.array_equal(tiles[k], batches(sampler, range(k // 8, k // 8 + 1))[0].pixels[k % 8]) for k in kept[:3])


def test_where_nothing_is_good_the_best_of_eight_is_taken(tmp_path: Path) -> None:
    glass = np.full((600, 600, 3), 245, np.uint8)
    glass[::16, ::8] = 60  # a little of something
    glass[:60, :60] = 60
    write_slide(tmp_path / "glass.tiff", glass, mpp=0.5, compression="deflate", downsamples=(1,))
    found = indexed(tmp_path)
    feed = TileFeed(free(found, mpp_range=(0.5, 0.5)), batch_size=8, steps=range(2), workers=1)
    assert sum(len(batch.pixels) for batch in feed) == 16
    assert feed.counts.kept_best >= 12 and feed.counts.rejected >= 8 * feed.counts.kept_best


# ---------------------------------------------------------------- slides that break


@pytest.fixture
def many(tmp_path: Path) -> tuple[Path, TileIndex]:
    """Twelve small slides, indexed."""
    rng = np.random.default_rng(1)
    for place in range(12):
        picture = np.clip(np.array([190, 120, 170]) + rng.integers(-40, 40, (200, 200, 3)), 0, 255).astype(np.uint8)
        write_slide(tmp_path / f"s{place:02d}.tiff", picture, mpp=0.5, compression="deflate", downsamples=(1,))
    return tmp_path, indexed(tmp_path)


def test_a_slide_that_breaks_is_left_out_and_named(many: tuple[Path, TileIndex]) -> None:
    folder, found = many
    sampler = free(found, mpp_range=(0.5, 0.5))
    healthy = batches(sampler, range(16), workers=2)
    (folder / "s05.tiff").write_bytes(b"no slide any more")
    told: list[str] = []
    feed = TileFeed(sampler, batch_size=8, steps=range(16), workers=2, say=told.append)
    broken = list(feed)
    assert feed.quarantined.keys() == {"s05"} and feed.counts.quarantined == 1 and feed.out_from == {"s05": 0}
    assert len(told) == 1 and told[0].startswith("s05: left out from step 0")
    assert all(5 not in batch.slides for batch in broken)
    for whole, part in zip(healthy, broken, strict=True):  # the others are where they were
        others = whole.slides != 5
        assert np.array_equal(whole.pixels[others], part.pixels[others])
    again = batches(sampler, range(16), workers=1)
    assert same(broken, again)
    known = TileFeed(sampler, batch_size=8, steps=range(16), workers=1, quarantined=feed.quarantined)
    assert same(broken, list(known)) and known.counts.quarantined == 1


def test_a_run_that_goes_on_leaves_a_slide_out_from_where_it_did(many: tuple[Path, TileIndex]) -> None:
    _, found = many
    sampler = free(found, mpp_range=(0.5, 0.5))
    healthy = batches(sampler, range(24), workers=1)
    whole = TileFeed(sampler, batch_size=8, steps=range(24), workers=1, quarantined={"s05": "it broke"}, out_from={"s05": 2})
    seen = list(whole)
    assert same(seen[:16], healthy[:16]) and any(5 in batch.slides for batch in seen[:16])
    assert all(5 not in batch.slides for batch in seen[16:]) and whole.out_from == {"s05": 2}
    later = TileFeed(sampler, batch_size=8, steps=range(4, 24), workers=1, quarantined=whole.quarantined, out_from=whole.out_from)
    assert same(list(later), seen[4:])


def test_too_many_broken_slides_stop_the_run(many: tuple[Path, TileIndex]) -> None:
    folder, found = many
    for name in ("s05", "s07"):
        (folder / f"{name}.tiff").write_bytes(b"no slide any more")
    with pytest.raises(WsimilError, match=r"2 of 12 slides .* s0[57] .* s0[57]"):
        batches(free(found, mpp_range=(0.5, 0.5)), range(16), workers=2)


def hang_on_five(reading: Any, file: Any, boxes: np.ndarray, *how: Any) -> None:
    if file.slide_id == "s05":
        time.sleep(1000)
    feed_module.read_boxes(reading, file, boxes, *how)


def lack_corners_of_five(reading: Any, file: Any, boxes: np.ndarray, tile_px: int, one_scale: bool, stain: None) -> None:
    """Of one slide, the boxes at its left rim cannot be read."""
    tile = np.full((tile_px, tile_px, 3), 100, np.uint8)

    def read(place: int) -> np.ndarray:
        if file.slide_id == "s05" and boxes[place, 0] < 50:
            raise SlideReadError("lost")
        return tile

    feed_module._fill(reading, len(boxes), tile_px, feed_module._Walk(read, SlideReadError))


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Readers call a function of this file."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    call = feed_module._Work._call
    monkeypatch.setattr(feed_module._Work, "_call", lambda self, job: (f"test_feed:{name}", call(self, job)[1]))


def test_a_reader_that_hangs_costs_its_slide(many: tuple[Path, TileIndex], monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = many
    stand_in(monkeypatch, "hang_on_five")
    monkeypatch.setattr(feed_module, "ReaderPool", ReaderPool)
    feed = TileFeed(free(found, mpp_range=(0.5, 0.5)), batch_size=8, steps=range(4), workers=1, read_timeout=2)
    assert all(5 not in batch.slides for batch in feed)
    assert "did not come back" in feed.quarantined["s05"]


def test_a_slide_of_which_too_much_is_lost_is_left_out_from_the_next_window_on(
    many: tuple[Path, TileIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = many
    stand_in(monkeypatch, "lack_corners_of_five")
    sampler = free(found, mpp_range=(0.5, 0.5))
    runs = []
    for workers in (1, 3):
        feed = TileFeed(sampler, batch_size=16, steps=range(24), workers=workers)
        runs.append([batch.slides.tolist() for batch in feed])
        assert "tiles cannot be read" in feed.quarantined["s05"] and feed.counts.unreadable >= 3
    assert runs[0] == runs[1]
    seen = [step for step, slides in enumerate(runs[0]) if 5 in slides]
    assert 0 < max(seen) < 16 and all(5 not in slides for slides in runs[0][16:])


def break_at_a_box(reading: Any, file: Any, boxes: np.ndarray, *how: Any) -> None:
    if any(tuple(box[:2]) in feed_module._broken_boxes for box in boxes.tolist()) and file.slide_id == "s05":  # type: ignore
        raise SlideUnreadableError("it broke")
    feed_module.read_boxes(reading, file, boxes, *how)


def test_a_slide_is_left_out_from_the_window_on_in_which_it_broke(
    many: tuple[Path, TileIndex], monkeypatch: pytest.MonkeyPatch, readers: Any
) -> None:
    _, found = many
    sampler = free(found, mpp_range=(0.5, 0.5))
    healthy = batches(sampler, range(24))
    of_five = [draw for draw in map(sampler.draw, range(64, 192)) if draw.slide == 5]  # in the second window and the third
    assert of_five[0].number < 128 < of_five[-1].number
    monkeypatch.setattr(feed_module, "_broken_boxes", {(d.x_level0_px, d.y_level0_px) for d in of_five}, raising=False)
    stand_in(monkeypatch, "break_at_a_box")
    for seed, workers in ((0, 1), (1, 3), (2, 6), (3, 6)):  # whichever window is found out first
        readers.seed = seed
        broken = batches(sampler, range(24), workers=workers)
        assert same(healthy[:8], broken[:8]) and any(5 in batch.slides for batch in broken[:8])
        assert all(5 not in batch.slides for batch in broken[8:])
        for whole, part in zip(healthy[8:], broken[8:], strict=True):
            others = whole.slides != 5
            assert np.array_equal(whole.pixels[others], part.pixels[others])


# ---------------------------------------------------------------- pictures


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two folders of pictures that tell their number: plain squares, one larger and one oblong."""
    for group, count in (("a", 20), ("b", 12)):
        (tmp_path / "tiles" / group).mkdir(parents=True)
        for place in range(count):
            shape = {3: (96, 96), 4: (48, 80)}.get(place, (48, 48))
            picture = np.full((*shape, 3), (place * 8, 100, {"a": 50, "b": 200}[group]), np.uint8)
            if place == 4:
                picture[:, :16] = picture[:, 64:] = 255  # beyond the square in the middle
            Image.fromarray(picture).save(tmp_path / "tiles" / group / f"{place:02d}.png")
    return tmp_path / "tiles"


def test_pictures_come_round_and_are_not_judged(pictures: Path) -> None:
    Image.new("RGB", (48, 48), "white").save(pictures / "a" / "20.png")  # somebody chose it
    found = index_tiles(pictures, tile_px=PX, mpp=0.5)
    sampler = free(found, area_power=1)
    feed = TileFeed(sampler, batch_size=11, steps=range(3), workers=2)
    tiles = np.concatenate([batch.pixels for batch in feed])
    assert len(tiles) == sampler.epoch == 33 and feed.counts.reads == 33
    assert (tiles.min((1, 2)) == tiles.max((1, 2))).all()
    colours = {tuple(tile[0, 0].tolist()) for tile in tiles}
    assert len(colours) == 33 and (255, 255, 255) in colours


def test_a_damaged_picture_is_drawn_again_and_costs_no_group(pictures: Path) -> None:
    (pictures / "a" / "07.png").write_bytes(b"\x89PNG nothing")
    found = index_tiles(pictures, tile_px=PX, mpp=0.5)
    feed = TileFeed(free(found), batch_size=8, steps=range(12), workers=1)
    colours = {tuple(tile[0, 0].tolist()) for batch in feed for tile in batch.pixels}
    assert (56, 100, 50) not in colours and len(colours) == 31
    assert feed.counts.unreadable >= 1 and not feed.quarantined


def test_pictures_that_nobody_can_read_are_an_error_with_the_first_reason(tmp_path: Path, readers) -> None:
    (tmp_path / "deep").mkdir()
    for number in range(4):
        cv2.imwrite(str(tmp_path / "deep" / f"{number}.png"), np.full((PX, PX), 30_000, np.uint16))
    with pytest.raises(WsimilError, match=r"the last one on deep \(.*16.*\); is the folder still there"):
        list(TileFeed(free(index_tiles(tmp_path, tile_px=PX, mpp=0.5)), batch_size=4, steps=range(1), workers=1))


def test_a_folder_that_is_gone_is_an_error(pictures: Path) -> None:
    found = index_tiles(pictures, tile_px=PX, mpp=0.5)
    pictures.rename(pictures.with_name("moved"))
    with pytest.raises(WsimilError, match="still there"):
        batches(free(found), range(2))


# ---------------------------------------------------------------- the cache


def test_a_cache_changes_nothing_but_the_reads(index: TileIndex, tmp_path: Path) -> None:
    sampler = free(index, distinct=60)
    plain = batches(sampler, range(60))
    room = 40 * (PX * PX * 3 + 16) / 1e9
    feed = TileFeed(sampler, batch_size=8, steps=range(60), workers=2, cache_gb=room, cache_folder=tmp_path)
    assert same(plain, list(feed))
    assert (
        feed.counts.cached >= 180 and feed.counts.cached + feed.counts.reads == 480
    )  # 40 of 60 are kept; three windows look ahead
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= room * 1e9
    again = TileFeed(sampler, batch_size=8, steps=range(60), workers=1, cache_gb=room, cache_folder=tmp_path)
    assert same(plain, list(again)) and again.counts.cached == 320


def test_a_damaged_cache_is_read_anew(index: TileIndex, tmp_path: Path) -> None:
    sampler = free(index, distinct=16)
    plain = batches(sampler, range(4))
    arguments = {"cache_gb": 1.0, "cache_folder": tmp_path}
    batches(sampler, range(4), **arguments)
    (file,) = tmp_path.glob("tiles-*.raw")
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content[: len(content) // 2])
    feed = TileFeed(sampler, batch_size=8, steps=range(4), workers=1, **arguments)
    assert same(plain, list(feed)) and feed.counts.cached > 0 and feed.counts.reads > 0


def test_the_cache_of_another_recipe_is_removed(index: TileIndex, tmp_path: Path) -> None:
    for seed in (1, 2):
        batches(free(index, seed=seed), range(1), cache_gb=1.0, cache_folder=tmp_path)
    assert len(list(tmp_path.glob("tiles-*.raw"))) == 1

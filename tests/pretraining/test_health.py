"""Numbers that tell a collapsed encoder from a healthy one, and the alarm that goes by them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wsimil.pretraining.feed import TileBatch
from wsimil.pretraining.health import MEANINGS, Alarm, Panel, correlation, feature_numbers, rank_me, same_slide_share, spread
from wsimil.pretraining.health_page import health_page
from wsimil.pretraining.pictures import neighbour_sheet, patch_sheet, spread_out, view_sheet

RNG = np.random.default_rng(0)
ROUND = RNG.normal(size=(600, 32)).astype(np.float32)
CONSTANT = np.tile(RNG.normal(size=(1, 32)).astype(np.float32), (600, 1)) + 1e-6 * ROUND
FLAT = (ROUND[:, :2] @ RNG.normal(size=(2, 32))).astype(np.float32)  # two directions


# ---------------------------------------------------------------- numbers


def test_spread_is_one_for_features_in_all_directions_and_zero_for_a_constant() -> None:
    assert spread(ROUND) == pytest.approx(1, abs=0.02) and spread(1000 * ROUND) == pytest.approx(spread(ROUND))
    assert spread(CONSTANT) < 1e-4


def test_rank_counts_directions() -> None:
    assert rank_me(ROUND) > 30 and 1.5 < rank_me(FLAT) < 2.1 and rank_me(CONSTANT) == pytest.approx(1, abs=0.01)
    assert rank_me(5 * ROUND) == pytest.approx(rank_me(ROUND))


def test_correlation_is_of_different_features() -> None:
    assert correlation(ROUND) < 0.1
    assert correlation(np.repeat(ROUND[:, :1], 32, 1)) == pytest.approx(1)
    assert correlation(np.zeros((50, 4), np.float32)) == pytest.approx(1)


def test_neighbours_of_the_same_slide_are_counted_without_the_tile_itself() -> None:
    slides = np.repeat(np.arange(6), 100)
    share, chance = same_slide_share(ROUND, slides)
    assert chance == pytest.approx(99 / 599) and abs(share - chance) < 0.05
    stained = ROUND + 10 * np.eye(32, dtype=np.float32)[slides]
    assert same_slide_share(stained, slides)[0] == 1.0
    # pairs: the five nearest of a tile hold its one partner and never the tile itself
    pairs = np.repeat(np.arange(300), 2)
    twins = np.repeat(ROUND[:300], 2, 0)
    assert same_slide_share(twins, pairs)[0] == pytest.approx(1 / 5)


def test_every_number_of_features_has_a_meaning() -> None:
    assert set(feature_numbers(ROUND, np.zeros(600, int))) <= set(MEANINGS)


# ---------------------------------------------------------------- alarm


def alarm(**settings) -> Alarm:
    return Alarm(**{"dim": 32, "n_tiles": 600, "warm_up_steps": 100, "total": 1000, "uniform_loss": math.log(4096), **settings})


def numbers(features: np.ndarray, **more: float) -> dict[str, float]:
    return {**feature_numbers(features, np.arange(len(features)) % 7), "entropy": 0.4, "mean_entropy": 0.9, **more}


def test_a_healthy_encoder_raises_nothing() -> None:
    watch = alarm()
    for step in range(0, 1000, 50):
        watch.watch_loss(step, 8.3178 - 0.004 * step)
        assert watch.judge(step, numbers(ROUND)) == [] and watch.warnings == 0


def test_a_constant_encoder_is_warned_about_once_then_stopped() -> None:
    watch = alarm()
    assert watch.judge(100, numbers(ROUND)) == []
    assert len(watch.judge(150, numbers(CONSTANT, mean_entropy=0.01, entropy=0.01))) >= 2 and watch.warnings == 1
    assert watch.judge(200, numbers(CONSTANT)) and watch.warnings == 2


@pytest.mark.parametrize("lost", ["features", "answers"])
def test_a_constant_encoder_is_noticed_by_few_tiles_too(lost: str) -> None:
    """The default panel may be smaller than twice the width of the network."""
    watch = alarm(dim=384, n_tiles=700)
    seen = {"entropy": 0.35, "mean_entropy": 0.36, "spread": 0.05, "rank": 1.0}
    seen |= {"mean_entropy": 0.9} if lost == "features" else {"mean_entropy": 0.355, "rank": 20.0}
    assert len(watch.judge(200, seen)) == 2
    assert alarm(dim=384, n_tiles=700).judge(200, seen | {"spread": 0.6, "rank": 20.0}) == []


def test_a_handful_of_tiles_that_are_alike_is_no_collapse() -> None:
    assert alarm(dim=64, n_tiles=8).judge(200, {"entropy": 0.35, "mean_entropy": 0.9, "spread": 0.056, "rank": 1.9}) == []


def test_a_teacher_that_says_nothing_is_noticed_by_entropy_and_loss() -> None:
    watch = alarm()
    for step in range(0, 400, 10):
        watch.watch_loss(step, 8.3178)  # ln 4096, what people post when they are stuck
    signs = watch.judge(400, numbers(ROUND, entropy=0.999, mean_entropy=0.999))
    assert len(signs) == 2 and "8.3178" in " ".join(signs)


def test_a_loss_that_leaves_the_plateau_starts_the_count_again() -> None:
    watch = alarm()
    for step in range(0, 390, 10):
        watch.watch_loss(step, 8.3178)
    watch.watch_loss(390, 7.9)
    watch.watch_loss(400, 8.3178)
    assert watch.signs(410, numbers(ROUND)) == []


def test_one_sign_alone_is_no_warning_and_a_good_panel_between_clears() -> None:
    watch = alarm()
    assert watch.judge(150, numbers(ROUND, entropy=0.999)) == [] and watch.warnings == 0
    watch.judge(200, numbers(CONSTANT))
    watch.judge(250, numbers(ROUND))
    assert watch.judge(300, numbers(CONSTANT)) and watch.warnings == 1


def test_in_warm_up_features_do_not_count() -> None:
    assert alarm().judge(99, numbers(CONSTANT)) == []


def test_a_rank_that_halves_is_a_sign_where_there_are_tiles_enough() -> None:
    few, enough = alarm(n_tiles=63), alarm(n_tiles=64)
    for watch, expected in ((few, 0), (enough, 1)):
        watch.judge(100, {"rank": 30.0, "spread": 1.0})
        assert len(watch.signs(200, {"rank": 14.0, "spread": 1.0})) == expected


def test_numbers_that_are_none_are_an_alarm_at_any_time() -> None:
    assert alarm().judge(5, numbers(ROUND, spread=float("nan")))


def test_alarm_goes_on_where_it_stopped() -> None:
    watch, again = alarm(), alarm()
    watch.judge(150, numbers(CONSTANT))
    again.load(watch.state())
    again.judge(200, numbers(CONSTANT))
    assert again.warnings == 2


# ---------------------------------------------------------------- panel and pictures


class Tokens(nn.Module):
    """Mean colour of each of 4 × 4 patches, and zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.9)

    def encode_tokens(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        patches = nn.functional.adaptive_avg_pool2d(self.drop(images), 4).flatten(2).transpose(1, 2)  # (B, 16, 3)
        return torch.cat([patches, torch.zeros_like(patches)], 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.encode_tokens(images).mean(1)


def batches(px: int = 32):
    for step in range(3):
        pixels = np.random.default_rng(step).integers(0, 255, (4, px, px, 3), dtype=np.uint8)
        yield TileBatch(step, np.arange(4), np.array([0, 0, 1, 2]), pixels)


def panel(px: int = 32, count: int = 10) -> Panel:
    return Panel.read(batches(), count=count, px=px, mean=(0.5,) * 3, std=(0.25,) * 3)


def test_panel_holds_tiles_as_they_came_or_made_smaller() -> None:
    assert np.array_equal(panel().tiles[:4].numpy(), next(batches()).pixels) and len(panel().tiles) == len(panel().slides) == 10
    small = panel(px=16)
    assert small.tiles.shape == (10, 16, 16, 3)
    assert abs(float(small.tiles.float().mean()) - float(panel().tiles.float().mean())) < 1


def test_features_are_those_of_eval_mode_and_the_mode_comes_back() -> None:
    model = Tokens().train()
    one, other = (panel().features(model, lambda net, images: net(images), "cpu", at_once=size) for size in (3, 64))
    assert np.allclose(one, other) and one.shape == (10, 6) and model.training


def test_pictures_have_a_place_for_every_tile() -> None:
    patches = patch_sheet(panel(), Tokens(), "cpu", tiles=6)
    assert patches.size == (3 * 32 + 2 * 4, 4 * 32 + 3 * 4)
    neighbours = neighbour_sheet(panel(), np.random.default_rng(0).normal(size=(10, 6)), tiles=4, neighbours=3)
    assert neighbours.size == (4 * 32 + 3 * 4, 4 * 32 + 3 * 4)
    views = view_sheet([torch.zeros(5, 3, 16, 16), torch.zeros(5, 3, 8, 8)], mean=(0.5,) * 3, std=(0.2,) * 3, tiles=2)
    assert views.size == (16 + 4 + 8, 2 * 16 + 4) and views.getpixel((3, 3)) == (128, 128, 128)


def test_patches_of_one_tissue_have_one_colour() -> None:
    left = np.zeros((32, 32, 3), np.uint8)
    left[:, 16:] = (200, 60, 120)
    tiles = torch.from_numpy(np.stack([left, left[:, ::-1].copy()]))
    sheet = np.asarray(patch_sheet(Panel(tiles, np.arange(2), (0.5,) * 3, (0.25,) * 3), Tokens(), "cpu", tiles=2))
    first, second = sheet[36:68, :32], sheet[36 + 72 : 68 + 72, :32]
    assert (first[:, 4] == first[:, 4][0]).all() and not np.array_equal(first[4, 4], first[4, 28])
    assert np.array_equal(first[4, 4], second[4, 28]) and np.array_equal(first[4, 28], second[4, 4])


def test_tiles_for_pictures_come_from_many_slides() -> None:
    slides = np.array([0] * 50 + [1] * 3 + [2] * 2)
    assert set(slides[spread_out(slides, 3)]) == {0, 1, 2} and len(spread_out(slides, 20)) == 20


def test_page_escapes_names_and_shows_warnings(tmp_path) -> None:
    rows = [{"step": 0, "spread": "0.9", "signs": ""}, {"step": 5, "spread": "0.1", "signs": "a < b"}]
    page = health_page("<run>", rows, [("5", tmp_path / "patches-0000005.jpg")])
    assert "<run>" not in page and "&lt;run&gt;" in page and "a &lt; b" in page
    assert "pictures/patches-0000005.jpg" in page and MEANINGS["spread"] in page

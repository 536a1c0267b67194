"""Views: what they depend on, where they are cut, what the stain step does, and that both ways of cutting agree."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from wsimil.errors import ConfigError
from wsimil.pretraining import views
from wsimil.pretraining.views import DINO_VIEWS, MAE_VIEWS, SELF_VIT_MIL_VIEWS, ViewRecipe, mae_images, make_views

SMALL = replace(DINO_VIEWS, global_px=32, local_px=16, n_local=3)
PLAIN = replace(
    SMALL, hed_sigma=0.0, jitter_p=0.0, grey_p=0.0, blur_p=(0.0, 0.0, 0.0), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)  # fmt: skip
"""Crops and turns alone, in 0-1."""

NUMBERS = np.array([5, 17, 2**40, 3])


def tissue(n_tiles: int = 4, side: int = 64, seed: int = 0) -> np.ndarray:
    """(n, side, side, 3): blotches from haematoxylin to eosin."""
    rng = np.random.default_rng(seed)
    share = np.stack([cv2.resize(rng.random((6, 6)), (side, side), interpolation=cv2.INTER_CUBIC) for _ in range(n_tiles)])
    pixels = np.array([90, 60, 140]) + share.clip(0, 1)[..., None] * np.array([140, 90, 80])
    return pixels.clip(0, 255).astype(np.uint8)


def everything(made) -> list[torch.Tensor]:
    return [*made.globals_, *made.locals_]


# what a view depends on


@pytest.mark.parametrize("recipe", [SMALL, replace(SELF_VIT_MIL_VIEWS, global_px=32, local_px=16, n_local=2)])
def test_a_view_depends_on_its_tile_and_its_number_alone(recipe):
    pixels = tissue()
    together = everything(make_views(pixels, NUMBERS, seed=1, recipe=recipe))
    order = [2, 0, 3, 1]
    shuffled = everything(make_views(pixels[order], NUMBERS[order], seed=1, recipe=recipe))
    alone = everything(make_views(pixels[2:3], NUMBERS[2:3], seed=1, recipe=recipe))
    for whole, mixed, single in zip(together, shuffled, alone, strict=True):
        torch.testing.assert_close(whole[order], mixed)
        torch.testing.assert_close(whole[2:3], single)


def test_seed_number_and_view_each_change_it():
    pixels = np.repeat(tissue(1), 2, 0)
    one = make_views(pixels, np.array([1, 2]), seed=0, recipe=SMALL)
    other = make_views(pixels, np.array([1, 2]), seed=1, recipe=SMALL)
    for a, b in zip(everything(one), everything(other), strict=True):
        assert not torch.equal(a[0], a[1])
        assert not torch.equal(a, b)
    assert not torch.equal(*one.globals_)


def test_views_stay_what_they_are_when_others_follow():
    few, many = (make_views(tissue(), NUMBERS, seed=3, recipe=replace(SMALL, n_local=n)) for n in (1, 4))
    for a, b in zip(everything(few), everything(many)[:3], strict=True):
        assert torch.equal(a, b)


def test_nothing_is_drawn_from_the_shared_random_state():
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    make_views(tissue(), NUMBERS, seed=0, recipe=SMALL)
    mae_images(tissue(), NUMBERS, seed=0, recipe=replace(MAE_VIEWS, global_px=32))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_sizes_and_number_are_the_recipes():
    made = make_views(tissue(), NUMBERS, seed=0, recipe=SMALL)
    assert [tuple(view.shape) for view in made.globals_] == [(4, 3, 32, 32)] * 2
    assert [tuple(view.shape) for view in made.locals_] == [(4, 3, 16, 16)] * 3
    assert len(made) == 4
    assert all(view.dtype == torch.float32 and view.isfinite().all() for view in everything(made))


# where they are cut


def boxes(scale: tuple[float, float], *, height: int = 224, width: int = 224, n: int = 4000) -> np.ndarray:
    return views._boxes(np.random.default_rng(0).random((n, 32)), scale, height, width)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (96, 224)])
@pytest.mark.parametrize("scale", [(0.05, 0.32), (0.32, 1.0), (1.0, 1.0)])
def test_boxes_lie_in_the_tile_and_have_the_asked_area(scale, height, width):
    x, y, w, h = boxes(scale, height=height, width=width).T
    assert min(x.min(), y.min()) >= 0
    assert (x + w).max() <= width
    assert (y + h).max() <= height
    share = w * h / (height * width)
    fits = (w < width) & (h < height)
    assert scale[0] * 0.96 <= share[fits].min() if fits.any() else True
    assert share.max() <= scale[1] * 1.04
    if height == width:
        assert share.mean() == pytest.approx(sum(scale) / 2, rel=0.02)
        assert (w / h).min() > 0.73
        assert (w / h).max() < 1.37


def test_boxes_reach_every_edge_of_the_tile():
    x, y, w, h = boxes((0.05, 0.32)).T
    assert min(x.min(), y.min()) == 0
    assert (x + w).max() == (y + h).max() == 224


def test_a_pixel_of_the_view_is_the_place_it_was_cut_from():
    """Colour codes the place: red is x, green is y. Every view then says where it lies, and how it is turned."""
    ramp = np.zeros((1, 200, 200, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200), np.arange(200)[:, None]
    numbers = np.arange(40)
    made = make_views(np.repeat(ramp, 40, 0), numbers, seed=0, recipe=PLAIN)
    random = views._random(numbers, 0, 5)
    seen = set()
    for place, view in enumerate(everything(made)):
        scale = PLAIN.global_scale if place < 2 else PLAIN.local_scale
        for tile, (x, y, w, h) in enumerate(views._boxes(random[:, place], scale, 200, 200)):
            red, green = (view[tile, :2] * 255).numpy()
            flip_x, flip_y, turn = (bool(value) for value in random[tile, place, [4, 5, 6]] < 0.5)
            seen.add((flip_x, flip_y, turn))
            red, green = (red.T, green.T) if turn else (red, green)
            red, green = (red[:, ::-1] if flip_x else red), (green[::-1] if flip_y else green)
            px = len(red)
            # the border is averaged over half a window
            across = (np.arange(px) + 0.5) * w / px + x - 0.5
            down = (np.arange(px) + 0.5) * h / px + y - 0.5
            assert np.abs(red - across)[:, 2:-2].max() <= 1.01
            assert np.abs(green - down[:, None])[2:-2].max() <= 1.01
    assert len(seen) == 8


def test_without_turns_only_the_mirror_image_is_left():
    ramp = np.zeros((1, 64, 64, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = 3 * np.arange(64), 3 * np.arange(64)[:, None]
    recipe = replace(PLAIN, all_turns=False)
    (first, _) = make_views(np.repeat(ramp, 64, 0), np.arange(64), seed=0, recipe=recipe).globals_
    along_x, along_y = first[:, 0, 16, -1] - first[:, 0, 16, 0], first[:, 1, -1, 16] - first[:, 1, 0, 16]
    assert (along_y > 0).all()
    assert 16 < int((along_x > 0).sum()) < 48


@pytest.mark.parametrize("px", [16, 40, 96])
def test_crops_one_by_one_and_by_matrix_are_the_same(px):
    rng = np.random.default_rng(1)
    tiles = torch.from_numpy(rng.integers(0, 256, (6, 3, 80, 70), dtype=np.uint8))
    random = rng.random((6, 32))
    cut, turns = views._boxes(random, (0.05, 1.0), 80, 70), random[:, [4, 5, 6]] < 0.5
    one_by_one, by_matrix = views._crops_one_by_one(tiles, cut, turns, px), views._crops_by_matrix(tiles, cut, turns, px)
    assert (one_by_one - by_matrix).abs().max() < 1.1 / 255


def test_reduced_views_have_no_aliases():
    """A one-pixel chessboard, far below half its size, is even grey, not a pattern."""
    board = np.indices((128, 128)).sum(0) % 2 * 255
    pixels = np.repeat(board[..., None], 3, 2)[None].astype(np.uint8)
    (view, _) = make_views(pixels, np.array([0]), seed=0, recipe=replace(PLAIN, global_px=24, global_scale=(1.0, 1.0))).globals_
    assert (view[..., 2:-2, 2:-2] - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("recipe", [SMALL, replace(SELF_VIT_MIL_VIEWS, global_px=32, local_px=16, n_local=3)])
def test_no_step_leaves_the_device(recipe):
    """On torch's device without storage a tensor that stayed on the CPU is an error."""
    made = make_views(tissue(), NUMBERS, seed=0, recipe=replace(recipe, solarise_p=1.0, grey_p=0.9), device="meta")
    assert {view.device.type for view in everything(made)} == {"meta"}
    assert [tuple(view.shape) for view in everything(made)] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 3


# stain and colour


def rgb(n: int = 4, px: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, px, px, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.05


def test_no_stain_change_is_the_identity():
    recipe = replace(PLAIN, hed_sigma=1e-9)
    random = np.random.default_rng(0).random((4, 32))
    torch.testing.assert_close(views._recoloured(rgb(), random, recipe, 0), rgb(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(views._recoloured(rgb(), random, PLAIN, 0), rgb())


def test_the_stain_change_is_that_of_amounts_of_stain():
    """Into amounts with logarithms to base 1e6, factor and shift, and back; written the long way."""
    random = np.random.default_rng(0).random((4, 32))
    found = views._recoloured(rgb(), random, replace(PLAIN, hed_sigma=0.06), 0)
    from scipy.special import ndtri

    normal = 0.06 * ndtri(random[:, 16:22])
    vectors = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    pixels = rgb().permute(0, 2, 3, 1).numpy().astype(float)
    amounts = np.log(pixels) / np.log(1e-6) @ np.linalg.inv(vectors)
    amounts = amounts * (1 + normal[:, None, None, :3]) + normal[:, None, None, 3:]
    expected = np.exp(np.log(1e-6) * amounts @ vectors).clip(0, 1)
    np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    assert np.abs(expected - pixels).max() > 0.1


def test_each_view_of_a_tile_has_a_stain_of_its_own():
    even = np.full((1, 64, 64, 3), (180, 120, 170), np.uint8)
    made = make_views(even, np.array([4]), seed=0, recipe=replace(PLAIN, hed_sigma=0.06))
    colours = {tuple(np.round(view[0, :, 4, 4].numpy(), 3)) for view in everything(made)}
    assert len(colours) == 5


def test_black_pixels_stay_dark_and_finite():
    black = np.zeros((4, 32, 32, 3), np.uint8)
    made = make_views(black, NUMBERS, seed=0, recipe=replace(PLAIN, hed_sigma=0.06, jitter_p=1.0))
    assert all(view.isfinite().all() for view in everything(made))


def test_colour_jitter_is_brightness_contrast_saturation_in_this_order():
    random = np.random.default_rng(2).random((4, 32))
    found = views._recoloured(rgb(), random, replace(PLAIN, jitter_p=1.0, jitter=(0.4, 0.3, 0.2)), 0)
    weights = torch.tensor([0.299, 0.587, 0.114])
    for tile, picture in enumerate(rgb()):
        bright, contrast, saturate = (1 + (2 * random[tile, 8 + n] - 1) * strength for n, strength in enumerate((0.4, 0.3, 0.2)))
        picture = picture * bright
        picture = picture * contrast + (1 - contrast) * (picture.mean((1, 2)) @ weights)
        grey = torch.einsum("c,cyx->yx", weights, picture)
        picture = picture * saturate + (1 - saturate) * grey
        torch.testing.assert_close(found[tile], picture.clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_published_colour_jitter_stays_within_0_and_1_after_each_step():
    """torchvision's functions end in a clamp each; light tissue made brighter is white, and stays so when contrast falls."""
    random = np.random.default_rng(2).random((4, 32))
    light = 0.5 + rgb() / 2
    found = views._recoloured(light.clone(), random, replace(PLAIN, jitter_p=1.0, jitter=(0.4, 0.4, 0.2), clamped=True), 0)
    weights = torch.tensor([0.299, 0.587, 0.114])
    lost = 0
    for tile, picture in enumerate(light):
        bright, contrast, saturate = (1 + (2 * random[tile, 8 + n] - 1) * strength for n, strength in enumerate((0.4, 0.4, 0.2)))
        lost += int((picture * bright > 1).sum())
        picture = (picture * bright).clamp(0, 1)
        picture = (picture * contrast + (1 - contrast) * (picture.mean((1, 2)) @ weights)).clamp(0, 1)
        picture = picture * saturate + (1 - saturate) * torch.einsum("c,cyx->yx", weights, picture)
        torch.testing.assert_close(found[tile], picture.clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert lost and SELF_VIT_MIL_VIEWS.clamped and not DINO_VIEWS.clamped


@pytest.mark.parametrize(("name", "column", "share"), [("jitter_p", 7, 0.8), ("grey_p", 12, 0.1)])
def test_chances_are_those_of_the_recipe(name, column, share):
    n = 2000
    random = np.random.default_rng(0).random((n, 32))
    given = torch.rand(n, 3, 2, 2)
    found = views._recoloured(given.clone(), random, replace(PLAIN, **{name: share}), 0)
    changed = (found - given).abs().amax((1, 2, 3)) > 1e-6
    assert torch.equal(changed, torch.from_numpy(random[:, column] < share))
    assert float(changed.float().mean()) == pytest.approx(share, abs=0.03)


def test_grey_views_have_one_channel_three_times():
    found = views._recoloured(rgb(), np.zeros((4, 32)), replace(PLAIN, grey_p=0.5), 0)
    torch.testing.assert_close(found[:, 0], found[:, 1])
    torch.testing.assert_close(found[:, 0], torch.einsum("c,bcyx->byx", torch.tensor([0.299, 0.587, 0.114]), rgb()))


def test_hue_is_turned_as_in_hsv():
    turns = torch.tensor([-0.1, 0.0, 0.07, 0.4])
    found = views._hue_turned(rgb(), turns)
    for tile, turn in enumerate(turns.tolist()):
        for y, x in ((0, 0), (3, 5), (7, 1)):
            hue, saturation, value = colorsys.rgb_to_hsv(*rgb()[tile, :, y, x].tolist())
            expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
            np.testing.assert_allclose(found[tile, :, y, x].numpy(), expected, atol=1e-5)
    grey = torch.full((1, 3, 2, 2), 0.4)
    torch.testing.assert_close(views._hue_turned(grey, turns[:1]), grey)


def test_blur_is_a_gaussian_of_each_views_own_width():
    sigmas = torch.tensor([0.3, 1.0, 1.8])
    found = views._blurred(rgb(3, 24), sigmas, 6)
    for tile, sigma in enumerate(sigmas.tolist()):
        picture = rgb(3, 24)[tile].permute(1, 2, 0).numpy()
        expected = cv2.GaussianBlur(picture, (13, 13), sigma, borderType=cv2.BORDER_REFLECT_101)
        np.testing.assert_allclose(found[tile].permute(1, 2, 0).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("place", "share"), [(0, 0.5), (1, 0.1), (2, 0.3), (4, 0.3)])
def test_the_first_view_is_blurred_more_often_than_the_second(place, share):
    random = np.random.default_rng(0).random((1000, 32))
    given = torch.rand(1000, 3, 8, 8)
    found = views._recoloured(given.clone(), random, replace(PLAIN, blur_p=(0.5, 0.1, 0.3), blur_sigma_px=(1.0, 1.8)), place)
    changed = (found - given).abs().amax((1, 2, 3)) > 1e-4
    assert float(changed.float().mean()) == pytest.approx(share, abs=0.05)


def test_only_global_views_after_the_first_are_solarised():
    recipe = replace(PLAIN, solarise_p=1.0)
    random = np.random.default_rng(0).random((4, 32))
    for place in (0, 2, 3):
        torch.testing.assert_close(views._recoloured(rgb(), random, recipe, place), rgb())
    torch.testing.assert_close(views._recoloured(rgb(), random, recipe, 1), torch.where(rgb() < 0.5, rgb(), 1 - rgb()))


def test_histology_views_turn_no_hue_and_solarise_nothing_and_the_published_do():
    assert DINO_VIEWS.hue == DINO_VIEWS.solarise_p == MAE_VIEWS.hue == MAE_VIEWS.solarise_p == 0
    assert (SELF_VIT_MIL_VIEWS.hue, SELF_VIT_MIL_VIEWS.solarise_p, SELF_VIT_MIL_VIEWS.hed_sigma) == (0.1, 0.2, 0)


def test_normalisation_comes_last():
    plain = make_views(tissue(), NUMBERS, seed=0, recipe=PLAIN)
    scaled = make_views(tissue(), NUMBERS, seed=0, recipe=replace(PLAIN, mean=(0.7, 0.5, 0.6), std=(0.2, 0.3, 0.4)))
    mean, std = torch.tensor([0.7, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    for a, b in zip(everything(plain), everything(scaled), strict=True):
        torch.testing.assert_close((a - mean) / std, b)


# masked images


def test_masks_follow_from_the_number_and_are_spread_evenly():
    recipe = replace(MAE_VIEWS, global_px=64)
    made = mae_images(tissue(side=80), NUMBERS, seed=0, recipe=recipe)
    again = mae_images(tissue(side=80)[1:2], NUMBERS[1:2], seed=0, recipe=recipe)
    assert made.images.shape == (4, 3, 64, 64)
    assert made.scores.shape == (4, 16)
    assert torch.equal(made.scores[1:2], again.scores)
    torch.testing.assert_close(made.images[1:2], again.images)
    assert len({tuple(row.tolist()) for row in made.scores}) == 4
    many = mae_images(tissue(1, 20).repeat(600, 0), np.arange(600), seed=0, recipe=recipe).scores
    seen_first = many.argsort(1)[:, :4].flatten().bincount(minlength=16)
    assert seen_first.min() > 100  # of 150 on average


def test_what_is_no_tile_is_refused():
    with pytest.raises(ConfigError, match=r"uint8 \(4, 3, 64, 64\)"):
        make_views(tissue().transpose(0, 3, 1, 2), NUMBERS, seed=0, recipe=SMALL)
    with pytest.raises(ConfigError, match="local_scale"):
        ViewRecipe(local_scale=(0.4, 0.2))


def test_tiles_of_any_shape_are_cut_without_being_stretched():
    wide = np.zeros((1, 60, 120, 3), np.uint8)
    cv2.circle(wide[0], (60, 30), 20, (255, 255, 255), -1)
    random = np.full((1, 32), 0.5)
    random[0, 1] = 0  # of the shapes that fit the narrowest: a square
    box = views._boxes(random, (0.5, 0.5), 60, 120)
    x, _, w, h = box[0]
    assert w == h == 60
    crop = views._crops_one_by_one(torch.from_numpy(wide).permute(0, 3, 1, 2), box, np.zeros((1, 3), bool), 60)
    torch.testing.assert_close(crop[0, 0], torch.from_numpy(wide[0, :, x : x + w, 0]).float() / 255)

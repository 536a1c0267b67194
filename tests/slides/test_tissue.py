"""Painted slides with a known truth: what is stained is found and nothing else is, at any glass, stain and scale."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from wsimil.slides.tissue import find_tissue, tissue_mpp

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


def test_dark_dust_with_coloured_fringes_and_the_rim_of_a_bubble_are_not_tissue():
    light = bare()
    for x, y in np.random.default_rng(5).uniform(30, 270, (20, 2)):
        light = stained(light, disc(x, y, 5), (0.5, 0.5, 0.52), texture=0)  # 80 µm across
        light = stained(light, disc(x + 3, y, 3), (0.0, 0.06, 0.12), texture=0)  # out of focus, one side is yellow …
        light = stained(light, disc(x - 3, y, 3), (0.12, 0.06, 0.0), texture=0)  # … and the other is blue
    light = stained(light, disc(340, 200, 40) & ~disc(340, 200, 34), (0.45, 0.45, 0.46), texture=0.1)
    assert not find_tissue(picture(light), MPP).mask.any()


def test_very_pale_tissue_is_found():
    light = stained(bare(), TISSUE, tuple(0.1 * a for a in HE), texture=0.3)  # 1 to 6 grey levels below the glass
    assert agreement(find_tissue(picture(light), MPP).mask, TISSUE) > 0.93


@pytest.mark.parametrize("surface", [(150, 140, 128), (90, 90, 92), (200, 198, 190)], ids=["beige", "dark", "pale"])
def test_what_lies_beside_the_glass_is_not_tissue(surface):
    light = stained(bare(), TISSUE, HE, texture=0.3)
    light[:, 350:] = (np.array(surface) + np.random.default_rng(6).normal(0, 2, (*SHAPE, 3)))[:, 350:] / 255
    assert agreement(find_tissue(picture(light), MPP).mask, TISSUE) > 0.93


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
    assert found.mask[small].all() and found.mask[large].mean() < 0.12  # a rim of one pixel, which the blur smears


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


def test_the_number_of_threads_changes_nothing():
    light = stained(stained(bare(), TISSUE, HE, texture=0.3), stroke(), PENS["blue"], texture=0.2)
    threads = cv2.getNumThreads()
    try:
        masks = []
        for n in (1, 2, 5):
            cv2.setNumThreads(n)
            found = find_tissue(picture(light), MPP)
            masks.append(np.stack([found.mask, found.pen]))
    finally:
        cv2.setNumThreads(threads)
    assert masks[0].any(axis=(1, 2)).all() and (masks[0] == masks[1]).all() and (masks[0] == masks[2]).all()


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


def test_blue_pen_drawn_over_tissue_is_pen_to_its_pale_end():
    """A stroke that runs dry over H&E: at the end it takes little more red light than green, as dense nuclei do."""
    mark = np.zeros(SHAPE, bool)
    mark[140:165, 90:200] = True
    strength = np.interp(np.arange(SHAPE[1]), [90, 200], [1.4, 0.5])
    ink = strength[None, :, None] * np.array((1.0, 0.68, 0.22)) * mark[..., None]
    light = stained(bare(), disc(150, 150, 120), HE, texture=0.1) * 10**-ink
    found = find_tissue(picture(light), MPP)
    assert found.pen[mark].mean() > 0.97 and not found.mask[150:155, 90:190].any()
    far = disc(150, 150, 115) & ~cv2.dilate(mark.astype(np.uint8), np.ones((25, 25))).astype(bool)
    assert found.mask[far].all()


def test_densely_packed_nuclei_are_not_blue_pen():
    light = stained(bare(), TISSUE, (0.5, 0.54, 0.22), texture=0.25)
    found = find_tissue(picture(light), MPP)
    assert not found.pen.any() and found.mask[TISSUE].all()


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

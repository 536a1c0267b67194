"""One look for all slides: what stain normalisation changes, and what it must leave alone."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from wsimil.errors import SlideError, UsageError
from wsimil.slides.painting import Scanner, Stain, paint_slide
from wsimil.slides.stain import SAMPLE_TILES, StainTarget, sample_rows, stain_normaliser

METHODS = ["macenko", "reinhard"]
PINK = Stain(haematoxylin=(1.1, 1.5, 0.75), eosin=(0.1, 1.2, 0.7))
PURPLE = Stain(haematoxylin=(1.5, 1.6, 0.6), eosin=(0.25, 0.8, 0.4))


def painted(stain: Stain, **scanner) -> np.ndarray:
    rgb = paint_slide(500, 500, mpp=0.5, seed=1, stain=stain, scanner=Scanner(**scanner)).rgb
    side = rgb.shape[0] // 4
    return np.stack([rgb[y : y + side, x : x + side] for y in range(0, 4 * side, side) for x in range(0, 4 * side, side)])


@pytest.fixture(scope="module")
def pink() -> np.ndarray:
    return painted(PINK)


@pytest.fixture(scope="module")
def purple() -> np.ndarray:
    """The same tissue, stained by another laboratory and seen by another scanner."""
    return painted(PURPLE, glass=(236, 238, 232), contrast=0.8)


def target_of(tiles: np.ndarray) -> StainTarget:
    return StainTarget(tiles.reshape(-1, 3))


def distance(one: np.ndarray, other: np.ndarray, tissue: np.ndarray) -> float:
    """Between the mean colours of the tissue, in grey levels."""
    return float(np.linalg.norm(one[tissue].mean(0) - other[tissue].mean(0)))


@pytest.mark.parametrize("method", METHODS)
def test_a_slide_that_is_the_target_keeps_its_colours(method, pink):
    same = stain_normaliser(method, target_of(pink)).fit(pink)(pink)
    change = np.abs(same.astype(int) - pink)
    assert same.shape == pink.shape and same.dtype == np.uint8
    assert change.mean() < 2.5 and np.percentile(change, 99) <= 8  # noise of the sensor lies outside the plane of two stains


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("to", ["published", "each other"])
def test_two_laboratories_come_closer(method, to, pink, purple):
    tissue = pink.mean(-1) < 200
    normaliser = stain_normaliser(method, target_of(pink) if to == "each other" else None)
    before = distance(pink, purple, tissue)
    after = distance(normaliser.fit(pink)(pink), normaliser.fit(purple)(purple), tissue)
    assert before > 25 and after < 0.6 * before


@pytest.mark.parametrize("method", METHODS)
def test_the_tissue_can_still_be_told_apart(method, pink, purple):
    """Normalising must not be flattening: dark nuclei stay dark beside pale stroma."""
    changed = stain_normaliser(method, target_of(pink)).fit(purple)(purple)
    rank = np.corrcoef(changed.mean(-1).ravel(), purple.mean(-1).ravel())[0, 1]
    assert rank > 0.95 and changed.std() > 0.5 * pink.std()


@pytest.mark.parametrize("method", METHODS)
def test_white_stays_white(method, pink, purple):
    normaliser = stain_normaliser(method)
    for slide in (pink, purple):
        for level in (240, 255):
            glass = np.full((1, 8, 8, 3), level, np.uint8)
            assert np.abs(normaliser.fit(slide)(glass).astype(int) - glass).max() <= 16


def test_pale_tissue_gets_no_white_rim(pink):
    """Reinhard's stretch makes it brighter than the glass beside it, unless it is held back."""
    faint = (240 - 0.25 * (240.0 - pink)).clip(0, 255).astype(np.uint8)  # a slide of little contrast, to be stretched fourfold
    changed = stain_normaliser("reinhard", target_of(pink)).fit(faint)(faint)
    assert (changed <= np.maximum(faint, 240)).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_tile_depends_on_its_slide_but_not_on_its_batch(method, pink):
    stain = stain_normaliser(method).fit(pink)
    whole = stain(pink)
    assert all(np.array_equal(stain(pink[row : row + 1])[0], whole[row]) for row in (0, 7, 15))
    assert np.array_equal(stain(pink[3]), whole[3])
    assert np.array_equal(stain(pink[::-1])[::-1], whole)
    pale = pink[:1].copy()
    pale[:, :100] = 245  # on its own its stain would be another
    assert np.array_equal(stain(pale)[0, 100:], whole[0, 100:])


@pytest.mark.parametrize("method", METHODS)
def test_the_same_sample_gives_the_same_pixels_in_another_process(method, pink):
    normaliser = stain_normaliser(method)
    sent = pickle.loads(pickle.dumps(normaliser))
    stain = pickle.loads(pickle.dumps(sent.fit(pink)))
    assert np.array_equal(stain(pink), normaliser.fit(pink)(pink))
    assert stain_normaliser(method, target_of(pink)).recipe() == stain_normaliser(method, target_of(pink.copy())).recipe()


@pytest.mark.parametrize("method", METHODS)
def test_unreadable_tiles_do_not_count(method, pink):
    """They come as zeros; nothing is blacker, so they would be every percentile."""
    sample = pink[:8]
    with_black = np.concatenate([sample, np.zeros_like(pink[:4])])
    stain, other = stain_normaliser(method).fit(sample), stain_normaliser(method).fit(with_black)
    assert json.dumps(stain.attributes()) == json.dumps(other.attributes())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", [0, 245])
def test_a_slide_without_tissue_is_refused(method, level):
    with pytest.raises(SlideError, match=r"0 of .* pixels are stained.*--stain none"):
        stain_normaliser(method).fit(np.full((4, 64, 64, 3), level, np.uint8))


def test_one_stain_is_not_taken_for_two():
    amounts = np.random.default_rng(0).uniform(0.3, 1.0, (4, 64, 64, 1))
    eosin = (240 * np.exp(-amounts * (0.3, 1.02, 0.6))).astype(np.uint8)
    with pytest.raises(SlideError, match="one stain only"):
        stain_normaliser("macenko").fit(eosin)


def test_another_dye_is_not_taken_for_eosin():
    """DAB is brown: it absorbs blue most. Brown made pink would be a result, and wrong."""
    rng = np.random.default_rng(0)
    blue, brown = (rng.uniform(0.3, 1.2, (4, 64, 64, 1)) for _ in range(2))
    tiles = (240 * np.exp(-blue * (0.65, 0.70, 0.29) - brown * (0.27, 0.57, 0.78))).astype(np.uint8)
    with pytest.raises(SlideError, match="not haematoxylin and eosin"):
        stain_normaliser("macenko").fit(tiles)


def test_planted_stain_vectors_are_found():
    rng = np.random.default_rng(0)
    stains = np.array([[0.65, 0.70, 0.29], [0.20, 0.85, 0.49]])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    amounts = rng.uniform(0, 1.5, (1, 256, 256, 2)) * rng.integers(0, 2, (1, 256, 256, 2))  # pure pixels of each are among them
    tiles = (240 * np.exp(-amounts @ stains)).round().astype(np.uint8)
    found = stain_normaliser("macenko").fit(tiles).attributes()
    for name, stain in zip(("stain_haematoxylin", "stain_eosin"), stains, strict=True):
        assert np.degrees(np.arccos(np.clip(np.dot(found[name], stain), -1, 1))) < 2
    assert found["stain_strongest"] == pytest.approx([1.5, 1.5], abs=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_is_json_and_changes_with_the_target(method, pink):
    recipe = stain_normaliser(method).recipe()
    assert json.loads(json.dumps(recipe)) == recipe
    assert recipe != stain_normaliser(method, target_of(pink)).recipe()
    assert recipe != stain_normaliser(METHODS[1 - METHODS.index(method)]).recipe()


@pytest.mark.parametrize("method", METHODS)
def test_a_target_image_is_its_pixels_wherever_it_lies(method, pink, tmp_path):
    for name in ("one.png", "other.png"):
        Image.fromarray(pink[5]).save(tmp_path / name)
    recipes = [stain_normaliser(method, StainTarget.of_image(tmp_path / name)).recipe() for name in ("one.png", "other.png")]
    assert recipes[0] == recipes[1] == stain_normaliser(method, target_of(pink[5])).recipe()


def test_a_target_that_cannot_serve_is_said(tmp_path):
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    with pytest.raises(UsageError, match=r"text\.png.*expected a PNG or JPEG"):
        StainTarget.of_image(tmp_path / "text.png")
    Image.new("RGB", (100, 100), (244, 243, 245)).save(tmp_path / "glass.png")
    with pytest.raises(UsageError, match=r"glass\.png.*mostly tissue"):
        stain_normaliser("macenko", StainTarget.of_image(tmp_path / "glass.png"))


def test_an_unknown_method_is_refused():
    with pytest.raises(UsageError, match="'vahadane'; expected macenko or reinhard"):
        stain_normaliser("vahadane")  # type: ignore[arg-type]


def test_floats_are_refused(pink):
    stain = stain_normaliser("macenko").fit(pink)
    with pytest.raises(ValueError, match="uint8"):
        stain(pink / 255)


@pytest.mark.parametrize("n_tiles", [0, 1, 5, SAMPLE_TILES, 1000])
def test_the_sample_spans_the_slide(n_tiles):
    rows = sample_rows(n_tiles)
    assert len(rows) == len(set(rows.tolist())) == min(n_tiles, SAMPLE_TILES)
    assert n_tiles == 0 or (rows[0] == 0 and (rows[-1] == n_tiles - 1))


def test_reading_processes_need_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, wsimil.slides.stain; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "False"

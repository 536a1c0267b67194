"""A slide gives the pixels of the place asked for, at the scale asked for, whatever its pyramid; or says in one line why not."""

from __future__ import annotations

import builtins
import os
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from wsimil.errors import SlideError, SlideReadError, SlideScaleUnknownError, SlideUnreadableError
from wsimil.slides import slide as slide_module
from wsimil.slides.direct import DirectReader
from wsimil.slides.slide import Slide
from wsimil.slides.tiles import open_tiles
from wsimil.slides.tiling import resolve_scale, tile_grid
from wsimil.slides.write_tiff import write_slide

KINDS = {
    "generic": {"vendor": "generic", "compression": "deflate"},
    "aperio-jpeg": {"vendor": "aperio", "compression": "jpeg"},
    "aperio-jpeg2000": {"vendor": "aperio", "compression": "jpeg2000"},
    "leica": {"vendor": "leica", "compression": "deflate", "bounds_offset_px": (301, 203)},
}


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def area_mean(pixels: np.ndarray, factor: int) -> np.ndarray:
    height, width = (side // factor for side in pixels.shape[:2])
    return pixels[: height * factor, : width * factor].reshape(height, factor, width, factor, 3).mean((1, 3))


def apart(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(float) - b).max())


# ---- pixels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_native_tiles_are_the_readers_pixels_bit_for_bit(kind: str, tmp_path: Path) -> None:
    path, source = tmp_path / "s.svs", noise(700, 500)
    write_slide(path, source, mpp=0.5, downsamples=(1,), **KINDS[kind])
    with Slide(path) as slide, openslide.OpenSlide(path) as reference:
        x0, y0 = slide.bounds.x, slide.bounds.y
        for x, y in [(0, 0), (37, 211), (256, 256), (476, 276)]:
            tile = slide.read_tile(x0 + x, y0 + y, tile_level0_px=224.0, tile_px=224)
            assert tile.dtype == np.uint8
            assert apart(tile, np.asarray(reference.read_region((x0 + x, y0 + y), 0, (224, 224)).convert("RGB"))) == 0
            if kind != "aperio-jpeg":
                assert apart(tile, source[y : y + 224, x : x + 224]) == 0


@pytest.mark.parametrize("factor", [2, 3, 4, 7])
def test_whole_factors_are_the_area_mean(factor: int, tmp_path: Path) -> None:
    path, source = tmp_path / "s.tiff", noise(600, 400)
    write_slide(path, source, mpp=0.25, downsamples=(1,), compression="deflate")
    with Slide(path) as slide:
        for x, y in [(0, 0), (13, 5), (600 - 50 * factor, 400 - 50 * factor)]:
            tile = slide.read_tile(x, y, tile_level0_px=50.0 * factor, tile_px=50)
            assert apart(tile, area_mean(source[y : y + 50 * factor, x : x + 50 * factor], factor)) < 0.6  # Pillow rounds at .44


def test_a_coarser_level_stands_in_for_the_area_mean(tmp_path: Path) -> None:
    path, source = tmp_path / "s.tiff", noise(1024, 512)
    write_slide(path, source, mpp=0.25, downsamples=(1, 4), compression="deflate")
    with Slide(path) as slide:
        assert apart(slide.read_tile(64, 32, tile_level0_px=256.0, tile_px=64), area_mean(source[32:288, 64:320], 4)) <= 1
        assert apart(slide.read_tile(64, 32, tile_level0_px=256.0, tile_px=32), area_mean(source[32:288, 64:320], 8)) <= 1


def test_a_tile_between_the_pixels_of_its_level_stays_sharp(tmp_path: Path) -> None:
    path, source = tmp_path / "s.tiff", noise(1024, 512)
    write_slide(path, source, mpp=0.25, downsamples=(1, 4), compression="deflate")
    with Slide(path) as slide:
        # 66 is half a pixel off: the nearest pixels as they are, not the mean of neighbours
        assert apart(slide.read_tile(65, 66, tile_level0_px=256.0, tile_px=64), area_mean(source[68:324, 64:320], 4)) <= 1


@pytest.mark.parametrize(("vendor", "compression"), [("aperio", "jpeg"), ("aperio", "jpeg2000"), ("generic", "jpeg")])
def test_a_level_of_odd_size_gives_its_own_pixels_everywhere(vendor: str, compression: str, tmp_path: Path) -> None:
    """OpenSlide would blend them, by another amount for each place."""
    source = cv2.GaussianBlur(noise(1151, 823), (0, 0), 1.2)
    write_slide(tmp_path / "s.svs", source, mpp=0.25, vendor=vendor, downsamples=(1, 2.0035), tile_px=128, compression=compression)
    with tifffile.TiffFile(tmp_path / "s.svs") as tiff:
        stored = [page for page in tiff.pages if page.is_tiled][1].asarray()
    blended = 0.0
    with Slide(tmp_path / "s.svs") as slide, openslide.OpenSlide(tmp_path / "s.svs") as reference:
        per = reference.level_downsamples[1]
        for x, y in [(0, 0), (37, 211), (256, 128), (400, 300), (stored.shape[1] - 100, stored.shape[0] - 100)]:
            tile = slide._read_level(1, x, y, x + 100, y + 100, False)
            assert apart(tile, stored[y : y + 100, x : x + 100]) <= (0 if compression == "jpeg2000" else 1)
            theirs = reference.read_region((round(x * per), round(y * per)), 1, (100, 100)).convert("RGB")
            blended = max(blended, apart(tile, np.asarray(theirs)))
        assert blended > 5  # or there was nothing to mend
        over = slide._read_level(1, -30, -20, 40, 50, False)
        assert over[:20].min() == over[:, :30].min() == 255
        assert apart(over[20:, 30:], slide._read_level(1, 0, 0, 40, 50, False)) == 0
        direct, reason = open_tiles(slide, tile_level0_px=100 * 2.0035, tile_px=100)
        assert reason is None and isinstance(direct, DirectReader) and direct.level == 1


def test_a_damaged_block_of_a_level_of_odd_size_is_an_error(tmp_path: Path) -> None:
    write_slide(tmp_path / "s.svs", noise(1151, 823), mpp=0.25, vendor="aperio", downsamples=(1, 2.0035), tile_px=128)
    with tifffile.TiffFile(tmp_path / "s.svs") as tiff:
        page = [page for page in tiff.pages if page.is_tiled][1]
        offset, count = page.dataoffsets[0], page.databytecounts[0]
    content = bytearray((tmp_path / "s.svs").read_bytes())
    content[offset + count // 2 : offset + count] = bytes(count - count // 2)
    (tmp_path / "s.svs").write_bytes(content)
    with Slide(tmp_path / "s.svs") as slide:
        slide._read_level(1, 200, 200, 300, 300, False)
        with pytest.raises(SlideReadError, match=r"at \(0, 0\), level 1"):
            slide._read_level(1, 0, 0, 100, 100, False)


def test_a_fractional_factor_keeps_the_sharpness_of_the_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "s.tiff"
    write_slide(path, cv2.GaussianBlur(noise(600, 600), (0, 0), 1.0), mpp=0.25, downsamples=(1,), compression="deflate")
    with Slide(path) as slide:
        sharpness = [
            cv2.Laplacian(slide.read_tile(5, 5, tile_level0_px=256 * factor, tile_px=256).astype(float), cv2.CV_64F).std()
            for factor in (1.98, 2.0, 2.02)
        ]
    assert min(sharpness) > 0.85 * max(sharpness)  # a triangle filter: .73


@pytest.mark.parametrize("factor", [1.07, 1.984, 3.7, 0.926])
def test_tiles_are_cut_from_one_picture(factor: float, tmp_path: Path) -> None:
    path = tmp_path / "s.tiff"
    write_slide(path, noise(500, 500), mpp=0.25, downsamples=(1,), compression="deflate")
    side = 100  # level-0 px where both factors and pixels are whole
    px = round(side / factor)
    with Slide(path) as slide:
        whole = slide.read_box(100, 100, 2 * side, 2 * side, size_px=(2 * px, 2 * px))
        tiles = [[slide.read_box(x, y, side, side, size_px=(px, px)) for x in (100, 200)] for y in (100, 200)]
    assert apart(np.vstack([np.hstack(row) for row in tiles]), whole) <= 1


def test_outside_the_slide_is_white(tmp_path: Path) -> None:
    path = tmp_path / "s.tiff"
    write_slide(path, np.full((300, 400, 3), 40, np.uint8), mpp=0.5, downsamples=(1, 4), compression="deflate")
    Image.fromarray(np.full((300, 400, 3), 40, np.uint8)).save(tmp_path / "s.png")
    for name in ("s.tiff", "s.png"):
        with Slide(tmp_path / name) as slide:
            for factor in (1, 2, 4):
                tile = slide.read_tile(-100, 100, tile_level0_px=400.0, tile_px=400 // factor)
                expected = np.full_like(tile, 255)
                expected[: 200 // factor, 100 // factor :] = 40
                assert apart(tile, expected) == 0
            assert slide.read_tile(5000, -3000, tile_level0_px=100.0, tile_px=64).min() == 255


@pytest.mark.parametrize("drops", [True, False])
def test_nothing_white_runs_into_the_edges_of_a_slide(drops: bool, tmp_path: Path) -> None:
    path, source = tmp_path / "s.tiff", np.full((403, 707, 3), 40, np.uint8)
    if drops:  # the coarser level ends .75 of a pixel before the slide does
        cropped_pyramid(path, source, (1, 4))
    else:
        write_slide(path, source, mpp=0.25, downsamples=(1, 4), compression="deflate")
    with Slide(path) as slide:
        for size in [(707, 403), (176, 100), (177, 101), (171, 99), (50, 30), (9, 7), (1, 1)]:
            assert apart(slide.overview(size), np.full((size[1], size[0], 3), 40)) == 0
        assert slide.read_tile(707 - 64, 403 - 64, tile_level0_px=64.0, tile_px=16).max() == 40
        assert slide.read_tile(707 - 66, 403 - 66, tile_level0_px=66.0, tile_px=16).max() == 40


# ---- positions ----------------------------------------------------------------------------------------------------------

PERIOD = 400  # of a wave that climbs and falls by one grey level a pixel


def wave(at: np.ndarray) -> np.ndarray:
    return 25 + np.abs(at % PERIOD - PERIOD / 2)


def waves(width: int, height: int) -> np.ndarray:
    """Red tells x and green tells y; dithered, so that rounding says nothing about the position."""
    pixels = np.full((height, width, 3), 100.0)
    pixels[..., 0] = wave(np.arange(width) + 0.5)
    pixels[..., 1] = wave(np.arange(height) + 0.5)[:, None]
    return (pixels + np.random.default_rng(0).random(pixels.shape)).astype(np.uint8)


def displacement(tile: np.ndarray, start: tuple[int, int], factor: float) -> tuple[float, float]:
    """How far right of and below its place a tile was read, in its pixels."""
    found = []
    for profile, begin in ((tile[..., 0].mean(0), start[0]), (tile[..., 1].mean(1), start[1])):
        at = begin + (np.arange(len(profile)) + 0.5) * factor
        phase = at % PERIOD
        straight = np.minimum(np.abs(phase - PERIOD / 2), np.minimum(phase, PERIOD - phase)) > 2.5 * factor
        found.append(float(((profile - wave(at)) * np.where(phase > PERIOD / 2, 1, -1))[straight].mean() / factor))
    return found[0], found[1]


def cropped_pyramid(path: Path, source: np.ndarray, factors: tuple[int, ...]) -> None:
    """As scanners write it: pixels that do not fill one of the next level are dropped, nothing is stretched."""
    with tifffile.TiffWriter(path) as tiff:
        for factor in factors:
            level = (area_mean(source, factor) + 0.5).astype(np.uint8)
            tiff.write(level, tile=(256, 256), photometric="rgb", subfiletype=int(factor > 1), metadata=None, compression="deflate")


@pytest.mark.parametrize(
    ("vendor", "downsamples"),
    [("generic", (1, 4, 16)), ("generic", (1, 2.3, 7.7)), ("leica", (1, 4, 16)), ("cropped", (1, 2, 4, 8))],
)
def test_every_level_shows_the_same_place(vendor: str, downsamples: tuple[float, ...], tmp_path: Path) -> None:
    path = tmp_path / "s.tiff"
    width, height = (2203, 1403) if vendor == "cropped" else (2208, 1408)
    if vendor == "cropped":
        cropped_pyramid(path, waves(width, height), (1, 2, 4, 8))
    else:
        where = {"bounds_offset_px": (1008, 608)}
        write_slide(path, waves(width, height), mpp=0.25, vendor=vendor, downsamples=downsamples, compression="deflate", **where)
    with Slide(path) as slide:
        for factor in (0.926, 1, 1.07, 1.984, 2, 2.2, 3, 3.9, 4, 4.1, 7.7, 8, 16):
            side = 64 * factor
            right, bottom = int(width - side), int(height - side)
            for x, y in [(right, bottom), (int(right * 0.37), int(bottom * 0.43)), (right - 3, 0)]:
                if factor == int(factor):  # these start on a pixel of their level: see the next test
                    x, y = x // 16 * 16, y // 16 * 16
                tile = slide.read_tile(slide.bounds.x + x, slide.bounds.y + y, tile_level0_px=side, tile_px=64)
                # OpenSlide finds pixels of a level by whole level-0 pixels
                assert np.abs(displacement(tile, (x, y), factor)).max() < 0.35, (factor, x, y)


def test_a_whole_factor_is_off_by_half_a_pixel_at_most(tmp_path: Path) -> None:
    path = tmp_path / "s.tiff"
    write_slide(path, waves(1600, 800), mpp=0.25, downsamples=(1, 4), compression="deflate")
    with Slide(path) as slide:
        for x in range(1001, 1009):
            tile = slide.read_tile(x, x - 900, tile_level0_px=512.0, tile_px=128)
            assert np.abs(displacement(tile, (x, x - 900), 4)).max() < 0.52


def test_a_dropped_pixel_does_not_stretch_a_level(tmp_path: Path) -> None:
    """A level of 1000 × 10 px from 4003 × 43: OpenSlide calls it 4.15 times smaller and is 36 px off at the far end."""
    cropped_pyramid(tmp_path / "s.tiff", waves(4003, 43), (1, 4))
    with Slide(tmp_path / "s.tiff") as slide:
        for x in (0, 2000, 3800):
            tile = slide.read_box(x, 0, 200, 40, size_px=(50, 10))
            assert abs(displacement(tile, (x, 0), 4.0)[0]) < 0.25


@pytest.mark.parametrize("downsamples", [(1, 4, 16), (1, 1.5, 3.3)])
@pytest.mark.parametrize("slide_mpp", [0.2271, 0.2520, 0.3412, 0.4661, 0.499, 0.5400])
def test_planted_dots_land_where_geometry_says(slide_mpp: float, downsamples: tuple[float, ...], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    side = 900
    dots = np.array([(x, y) for x in range(40, side - 20, 97) for y in range(40, side - 20, 97)]) + rng.integers(-20, 20, (81, 2))
    source = np.full((side, side, 3), 250, np.uint8)
    for x, y in dots:
        source[y - 3 : y + 4, x - 3 : x + 4] = 10
    write_slide(tmp_path / "s.tiff", source, mpp=slide_mpp, downsamples=downsamples, compression="deflate")
    with Slide(tmp_path / "s.tiff") as slide:
        scale = resolve_scale(slide.known_mpp(), 0.5)
        tile_level0_px = 128 * scale.factor
        grid = tile_grid(slide.bounds, tile_level0_px=tile_level0_px, step_level0_px=tile_level0_px)
        found = 0
        for x, y in grid.coords_level0_px:
            dark = 250.0 - slide.read_tile(x, y, tile_level0_px=tile_level0_px, tile_px=128)[..., 0]
            for dot in (dots + 0.5 - (x, y)) / scale.factor:
                column, row = np.floor(dot).astype(int)
                if 10 <= column < 118 and 10 <= row < 118:
                    window = dark[row - 8 : row + 9, column - 8 : column + 9]
                    at = np.arange(-8, 9) + 0.5
                    centre = np.array([(window.sum(0) * at).sum(), (window.sum(1) * at).sum()]) / window.sum() + (column, row)
                    assert np.abs(centre - dot).max() < 0.4
                    found += 1
    assert found > 20


# ---- the whole slide ----------------------------------------------------------------------------------------------------


def test_a_thumbnail_is_the_area_average(tmp_path: Path) -> None:
    source = cv2.GaussianBlur(noise(960, 640), (0, 0), 6)
    write_slide(tmp_path / "s.tiff", source, mpp=0.25, downsamples=(1, 4), compression="deflate")
    with Slide(tmp_path / "s.tiff") as slide:
        thumbnail = slide.thumbnail(2.0)
        assert apart(thumbnail, area_mean(source, 8)) <= 1.5
        assert slide.thumbnail(0.1).shape == (640, 960, 3)
        odd = slide.thumbnail(2.7)  # 89 × 59 px
    # the filter reaches a little further than the area
    expected = cv2.resize(source, (odd.shape[1], odd.shape[0]), interpolation=cv2.INTER_AREA)
    assert np.abs(odd.astype(float) - expected).mean() < 1.5
    assert abs(odd.mean() - source.mean()) < 0.5


@pytest.mark.parametrize("size", [(960, 640), (480, 320), (301, 199), (240, 160), (89, 59), (17, 11), (1, 1)])
def test_blocks_join_without_seams_and_stay_small(size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = noise(960, 640)
    write_slide(tmp_path / "s.tiff", source, mpp=0.25, downsamples=(1, 4), compression="deflate")
    with Slide(tmp_path / "s.tiff") as slide:
        at_once = slide.overview(size)
        largest = [0]
        read = slide._reader.read

        def watched(level: int, x: int, y: int, width: int, height: int, *, patch: bool) -> np.ndarray:
            largest[0] = max(largest[0], width, height)
            return read(level, x, y, width, height, patch=patch)

        monkeypatch.setattr(slide._reader, "read", watched)
        monkeypatch.setattr(slide_module, "_BLOCK_PX", 64)
        in_blocks = slide.overview(size)
    assert np.abs(in_blocks.astype(float) - at_once).max() <= 1
    assert largest[0] <= 64 * 2.2


# ---- µm/px and bounds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_table_beats_file_beats_option(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "s.svs"
    write_slide(path, noise(100, 100), mpp=0.252, downsamples=(1,), **KINDS[kind])
    for arguments, mpp, source in [
        ({}, 0.252, "openslide.mpp"),
        ({"fallback_mpp": 0.4}, 0.252, "openslide.mpp"),
        ({"mpp": 0.3, "fallback_mpp": 0.4}, 0.3, "table"),
    ]:
        with Slide(path, **arguments) as slide:
            assert slide.known_mpp() == pytest.approx(mpp, rel=1e-4)
            assert slide.mpp_source == source
            assert slide.reader == f"openslide:{KINDS[kind]['vendor'].replace('generic', 'generic-tiff')}"


def test_an_unknown_scale_is_never_guessed(tmp_path: Path) -> None:
    write_slide(tmp_path / "s.svs", noise(300, 300), mpp=None, vendor="aperio", downsamples=(1,))
    with Slide(tmp_path / "s.svs", fallback_mpp=0.4) as slide:
        assert (slide.known_mpp(), slide.mpp_source) == (0.4, "option")
    with Slide(tmp_path / "s.svs") as slide, pytest.raises(SlideScaleUnknownError, match="--slide-mpp"):
        slide.known_mpp()


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_dots_per_inch_say_nothing(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"s.{suffix}"
    Image.fromarray(noise(100, 80)).save(path, dpi=(50_800, 50_800))  # would be .5 µm/px
    with Slide(path) as slide:
        assert (slide.mpp, slide.mpp_source) == (None, None)


def ome(attributes: str) -> str:
    start = '<?xml version="1.0" encoding="UTF-8"?><OME><Image ID="Image:0">'
    return f'{start}<Pixels ID="Pixels:0" SizeX="300" {attributes} SizeY="300"/></Image></OME>'


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize(
    ("attributes", "mpp"),
    [
        ('PhysicalSizeX="0.25" PhysicalSizeY="0.25"', 0.25),
        ('PhysicalSizeYUnit="µm" PhysicalSizeY="0.25" PhysicalSizeXUnit="µm" PhysicalSizeX="0.25"', 0.25),
        ('PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="250" PhysicalSizeYUnit="nm"', 0.25),
        ('PhysicalSizeX="0.00025" PhysicalSizeXUnit="mm" PhysicalSizeY="0.00025" PhysicalSizeYUnit="mm"', 0.25),
    ],
)
def test_ome_states_the_scale_before_the_tiff_tags(tiled: bool, attributes: str, mpp: float, tmp_path: Path) -> None:
    tiles = {"tile": (256, 256)} if tiled else {}
    tifffile.imwrite(
        tmp_path / "s.ome.tiff", noise(300, 300), photometric="rgb", description=ome(attributes).encode(), metadata=None,
        resolution=(72, 72), resolutionunit="INCH", **tiles,
    )  # fmt: skip
    with Slide(tmp_path / "s.ome.tiff") as slide:
        assert (slide.known_mpp(), slide.mpp_source) == (pytest.approx(mpp), "ome.PhysicalSize")


def test_pixels_that_are_not_square_are_named_and_averaged(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "wide.tiff", noise(300, 300), photometric="rgb", tile=(256, 256), metadata=None,
        resolution=(1e4 / 0.5, 1e4 / 0.4), resolutionunit="CENTIMETER",
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"wide.tiff: pixels are not square, 0.5 by 0.4"):
        slide = Slide(tmp_path / "wide.tiff")
    assert slide.known_mpp() == pytest.approx(0.45, rel=1e-4)


def test_the_scanned_part_of_a_canvas_is_found(tmp_path: Path) -> None:
    write_slide(tmp_path / "s.scn", noise(600, 400), mpp=0.25, vendor="leica", bounds_offset_px=(333, 77))
    write_slide(tmp_path / "s.tiff", noise(600, 400), mpp=0.25)
    with Slide(tmp_path / "s.scn") as slide:
        assert (slide.bounds.x, slide.bounds.y, slide.bounds.width, slide.bounds.height) == (333, 77, 600, 400)
        assert slide.width > 933
    with Slide(tmp_path / "s.tiff") as slide:
        assert (slide.bounds.x, slide.bounds.y, slide.bounds.width, slide.bounds.height) == (0, 0, 600, 400)


@pytest.mark.parametrize(
    ("stated", "bounds"),
    [((-10, 20, 60, 500), (0, 20, 50, 60)), ((200, 0, 10, 10), (0, 0, 100, 80)), ((5, 6, 0, 0), (0, 0, 100, 80))],
)
def test_bounds_that_cannot_be_are_cut_or_dropped(
    stated: tuple[int, ...], bounds: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(noise(100, 80)).save(tmp_path / "s.png")
    reader = slide_module.open_reader(tmp_path / "s.png")
    reader.bounds = stated  # type: ignore[assignment]
    monkeypatch.setattr(slide_module, "open_reader", lambda path: reader)
    found = Slide(tmp_path / "s.png").bounds
    assert (found.x, found.y, found.width, found.height) == bounds


# ---- plain images -------------------------------------------------------------------------------------------------------


def left_black_right_clear() -> Image.Image:
    pixels = np.zeros((8, 16, 4), np.uint8)
    pixels[:, :8, 3] = 255
    return Image.fromarray(pixels)


def with_clear_colour(mode: str) -> Image.Image:
    return Image.fromarray(np.repeat(np.array([[0] * 8 + [90] * 8], np.uint8), 8, 0)).convert(mode)


@pytest.mark.parametrize(
    ("name", "image", "options"),
    [
        ("rgba.png", left_black_right_clear(), {}),
        ("rgba.webp", left_black_right_clear(), {"lossless": True}),
        ("rgba.tif", left_black_right_clear(), {}),
        ("la.png", left_black_right_clear().convert("LA"), {}),
        ("palette.png", left_black_right_clear().quantize(4), {}),
        ("colour.png", with_clear_colour("RGB"), {"transparency": (90, 90, 90)}),
        ("grey.png", with_clear_colour("L"), {"transparency": 90}),
        ("bilevel.png", with_clear_colour("L").point(lambda value: value * 3).convert("1"), {}),
        ("l.bmp", with_clear_colour("L").point(lambda value: 255 if value else 0), {}),
        ("cmyk.tif", with_clear_colour("L").point(lambda value: 255 if value else 0).convert("RGB").convert("CMYK"), {}),
    ],
)
def test_every_kind_of_plain_image_is_rgb_on_white(name: str, image: Image.Image, options: dict, tmp_path: Path) -> None:
    image.save(tmp_path / name, **options)
    with Slide(tmp_path / name, fallback_mpp=0.5) as slide:
        pixels = slide.read_tile(0, 0, tile_level0_px=8.0, tile_px=8), slide.read_tile(8, 0, tile_level0_px=8.0, tile_px=8)
        assert slide.reader.startswith("image:")
    assert pixels[0].max() == 0
    assert pixels[1].min() == 255


def test_pixels_are_as_stored_whatever_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(noise(60, 40)).save(tmp_path / "s.jpg", exif=exif)
    with Slide(tmp_path / "s.jpg") as slide:
        assert (slide.width, slide.height) == (60, 40)


# ---- what cannot be read ------------------------------------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(SlideError) as caught, Slide(path) as slide:
        slide.overview((5, 5))
    assert isinstance(caught.value, SlideUnreadableError)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["svs", "tiff", "png", "jpg", "dcm", "mrxs", "vms", "ndpi", "czi"])
def test_what_is_no_slide_is_refused_in_one_line(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"text.{suffix}").write_text("not found: see other\n")
    (tmp_path / f"empty.{suffix}").touch()
    (tmp_path / f"folder.{suffix}").mkdir()
    (tmp_path / f"link.{suffix}").symlink_to(tmp_path / "gone")
    assert "no reader" in refused(tmp_path / f"text.{suffix}") or suffix in ("mrxs", "vms")
    assert "empty" in refused(tmp_path / f"empty.{suffix}")
    assert "directory" in refused(tmp_path / f"folder.{suffix}")
    assert "no such file" in refused(tmp_path / f"link.{suffix}")
    assert "no such file" in refused(tmp_path / f"missing.{suffix}")
    refused(tmp_path / f"nul\0.{suffix}")


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.svs").touch()

    def denied(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(builtins, "open", denied)  # a test may run as root, whom no mode stops
    message = ""
    try:
        Slide(tmp_path / "s.svs")
    except SlideUnreadableError as error:
        message = str(error)
    monkeypatch.undo()
    assert message == "cannot be read: Permission denied"


@pytest.mark.parametrize("suffix", ["svs", "png", "tiff", "dcm"])
def test_a_pipe_is_refused_and_not_waited_for(suffix: str, tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes in this file system")
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    (tmp_path / f"link.{suffix}").symlink_to(tmp_path / f"pipe.{suffix}")
    for name in (f"pipe.{suffix}", f"link.{suffix}"):
        assert "not a regular file" in refused(tmp_path / name)  # opening it would wait for ever


@pytest.mark.parametrize("name", ["s.png", "s.jpg", "s.webp", "s.bmp", "flat.tif", "s.svs", "s.tiff"])
def test_a_file_cut_in_half_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name in ("s.svs", "s.tiff"):
        write_slide(path, noise(600, 600), mpp=0.5, vendor="aperio" if name == "s.svs" else "generic")
    else:
        Image.fromarray(noise(200, 150)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_eight_bits_are_refused_not_clipped(mode: str, tmp_path: Path) -> None:
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(np.full((50, 50), 3000, kind)).save(tmp_path / "s.tif")
    assert "8-bit" in refused(tmp_path / "s.tif")


def test_a_tiled_tiff_of_more_than_eight_bits_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "s.tif", noise(512, 512).astype(np.uint16) << 4, tile=(256, 256), photometric="rgb")
    with pytest.raises(SlideUnreadableError, match="16 bits a channel"):
        Slide(tmp_path / "s.tif")


def test_a_flat_tiff_of_more_than_eight_bits_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "s.tif", noise(64, 64).astype(np.uint16) << 4, photometric="rgb")
    assert "more than 8 bits" in refused(tmp_path / "s.tif")


def test_a_tiled_tiff_that_is_stored_turned_is_refused(tmp_path: Path) -> None:
    pixels = noise(512, 512)
    for orientation, compression in ((1, "deflate"), (3, "deflate"), (2, None)):
        options = {"tile": (256, 256), "photometric": "rgb", "compression": compression, "metadata": None}
        tifffile.imwrite(tmp_path / "s.tif", pixels, **options, extratags=[(274, 3, 1, orientation, True)])
        if orientation == 1:
            with Slide(tmp_path / "s.tif", mpp=0.5) as slide:
                assert np.array_equal(slide.read_tile(0, 0, tile_level0_px=512, tile_px=512), pixels)
        else:
            with pytest.raises(SlideUnreadableError, match=f"orientation {orientation}"):
                Slide(tmp_path / "s.tif")


def test_channels_in_pages_of_their_own_are_refused(tmp_path: Path) -> None:
    channels = np.moveaxis(noise(512, 512), 2, 0)
    tifffile.imwrite(tmp_path / "s.ome.tif", channels, tile=(256, 256), photometric="minisblack", metadata={"axes": "CYX"})
    with pytest.raises(SlideUnreadableError, match="3 channels, each a page of its own"):
        Slide(tmp_path / "s.ome.tif")


def test_a_pyramid_of_a_byte_order_that_openslide_does_not_open_is_no_plain_image(tmp_path: Path) -> None:
    source = noise(1024, 768)
    with tifffile.TiffWriter(tmp_path / "s.tif", byteorder=">") as writer:
        for step in (1, 4):
            writer.write(source[::step, ::step], tile=(256, 256), photometric="rgb", subfiletype=int(step > 1), metadata=None)
    try:
        with Slide(tmp_path / "s.tif") as slide:  # an OpenSlide that can
            assert slide.reader == "openslide:generic-tiff"
    except SlideUnreadableError as error:
        assert "byte order is big-endian" in str(error) and "vips" in str(error)


def test_an_image_of_absurd_size_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.fromarray(noise(50, 50)).save(tmp_path / "s.png")
    content = bytearray((tmp_path / "s.png").read_bytes())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "s.png").write_bytes(content)
    assert "pyramidal TIFF" in refused(tmp_path / "s.png")


def test_a_name_that_is_not_utf8_opens(tmp_path: Path) -> None:
    write_slide(tmp_path / "s.svs", noise(300, 300), mpp=0.5, vendor="aperio", downsamples=(1,))
    try:
        os.rename(os.fsencode(tmp_path / "s.svs"), os.fsencode(tmp_path) + b"/caf\xe9.svs")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with Slide(next(tmp_path.iterdir())) as slide:
        assert slide.read_tile(0, 0, tile_level0_px=64.0, tile_px=64).shape == (64, 64, 3)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A slide of 3 × 3 blocks whose middle one is no JPEG."""
    path = tmp_path / "damaged.svs"
    write_slide(path, noise(768, 768), mpp=0.5, vendor="aperio", downsamples=(1,))
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        offset, count = page.dataoffsets[4], page.databytecounts[4]
    content = bytearray(path.read_bytes())
    content[offset : offset + count] = bytes(count)
    (tmp_path / "whole.svs").write_bytes(path.read_bytes())
    path.write_bytes(content)
    return path


def test_after_a_damaged_block_the_others_read_right(damaged: Path) -> None:
    with Slide(damaged) as slide, Slide(damaged.with_name("whole.svs")) as whole:
        for _ in range(3):
            with pytest.raises(SlideReadError, match=r"at \(300, 300\)"):
                slide.read_tile(300, 300, tile_level0_px=100.0, tile_px=100)
            for x, y in [(0, 0), (512, 256), (500, 500)]:
                good = {"tile_level0_px": 200.0, "tile_px": 200}
                if (x, y) == (500, 500):
                    with pytest.raises(SlideReadError):
                        slide.read_tile(x, y, **good)
                else:
                    assert apart(slide.read_tile(x, y, **good), whole.read_tile(x, y, **good)) == 0


def test_one_error_costs_one_new_handle(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Slide(damaged) as slide:
        with pytest.raises(SlideReadError):
            slide.read_tile(300, 300, tile_level0_px=100.0, tile_px=100)
        opened = []
        monkeypatch.setattr(openslide, "OpenSlide", lambda path, opens=openslide.OpenSlide: opened.append(path) or opens(path))
        for _ in range(5):
            slide.read_tile(0, 0, tile_level0_px=100.0, tile_px=100)
        assert len(opened) == 1


def test_read_errors_leave_no_files_open(damaged: Path) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("open files cannot be counted here")
    with Slide(damaged) as slide:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(30):
            with pytest.raises(SlideReadError):
                slide.read_tile(300, 300, tile_level0_px=100.0, tile_px=100)
            slide.read_tile(0, 0, tile_level0_px=100.0, tile_px=100)
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_slide_that_vanishes_after_an_error_ends_as_unreadable(damaged: Path) -> None:
    with Slide(damaged) as slide:
        damaged.unlink()
        with pytest.raises(SlideUnreadableError, match="no longer"):
            slide.read_tile(300, 300, tile_level0_px=100.0, tile_px=100)


def lose_block(path: Path, *, level: int, block: int) -> None:
    """As if the writer had never stored that block: its byte count becomes zero."""
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[level].tags["TileByteCounts"]
        width = {3: 2, 4: 4, 16: 8}[tag.dtype]
        at = tag.valueoffset + width * block
    content = bytearray(path.read_bytes())
    content[at : at + width] = bytes(width)
    path.write_bytes(content)


BLOCK_PX = 128


def slide_with_background(
    path: Path, vendor: str, *, downsamples: tuple[int, ...] = (1, 4), glass: int = 255, compression: str = "jpeg"
) -> None:
    """6 × 4 blocks, the right half of them bare."""
    source = np.full((4 * BLOCK_PX, 6 * BLOCK_PX, 3), glass, np.uint8)
    tissue = cv2.GaussianBlur(noise(3 * BLOCK_PX, 4 * BLOCK_PX), (0, 0), 2) // 2 + np.array([90, 40, 80], np.uint8)
    source[:, : 3 * BLOCK_PX] = tissue
    write_slide(path, source, mpp=0.5, vendor=vendor, downsamples=downsamples, tile_px=BLOCK_PX, compression=compression)


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "deflate"])
@pytest.mark.parametrize("vendor", ["aperio", "generic"])
def test_a_lost_block_is_an_error_and_its_neighbours_read_on(vendor: str, compression: str, tmp_path: Path) -> None:
    if (vendor, compression) in (("generic", "jpeg2000"), ("aperio", "deflate")):
        pytest.skip("no such files")
    slide_with_background(tmp_path / "whole.svs", vendor, compression=compression)
    slide_with_background(tmp_path / "s.svs", vendor, compression=compression)
    lose_block(tmp_path / "s.svs", level=0, block=7)  # the second of the second row
    with Slide(tmp_path / "s.svs") as slide, Slide(tmp_path / "whole.svs") as whole:
        for row in range(4):
            for column in range(6):
                place = {"x": column * BLOCK_PX, "y": row * BLOCK_PX, "tile_level0_px": float(BLOCK_PX), "tile_px": BLOCK_PX}
                if (row, column) == (1, 1):
                    with pytest.raises(SlideReadError, match=r"at \(128, 128\), level 0: the block is missing"):
                        slide.read_tile(**place)
                else:
                    assert apart(slide.read_tile(**place), whole.read_tile(**place)) == 0
        for x, y in [(255, 255), (1, 1), (20, 20)]:  # one pixel of it is enough, whole factor or not
            for tile_px in (128, 64, 90):
                with pytest.raises(SlideReadError, match="missing"):
                    slide.read_tile(x, y, tile_level0_px=128.0, tile_px=tile_px)
        picture = slide.overview((192, 128))  # OpenSlide clears the place in all of Aperio's levels
        assert picture[:, :96].max() < 250
        if vendor == "generic":
            assert apart(picture, whole.overview((192, 128))) == 0


def test_background_that_a_writer_left_out_is_white(tmp_path: Path) -> None:
    slide_with_background(tmp_path / "s.tiff", "generic")
    for block in (3, 4, 5, 9, 10, 11, 15, 23):  # right up to the tissue
        lose_block(tmp_path / "s.tiff", level=0, block=block)
    with Slide(tmp_path / "s.tiff") as slide:
        for x in (3, 4, 5):
            assert slide.read_tile(x * BLOCK_PX, 0, tile_level0_px=128.0, tile_px=128).min() == 255
        tile = slide.read_tile(3 * BLOCK_PX - 64, 64, tile_level0_px=128.0, tile_px=128)
        assert tile[:, 64:].min() == 255
        assert tile[:, :56].max() < 250
        # where the writer left it out of all levels, nothing is missing either
        lose_block(tmp_path / "s.tiff", level=1, block=1)
    with Slide(tmp_path / "s.tiff") as slide:
        assert slide.read_tile(4 * BLOCK_PX, 0, tile_level0_px=128.0, tile_px=128).min() == 255
        assert slide.overview((192, 128))[:32, 140:].min() == 255


def test_a_plain_tiff_without_a_witness_keeps_its_white(tmp_path: Path) -> None:
    """Where no level has the place, Aperio's file is damaged; a plain TIFF's writer may have left out what was bare."""
    for vendor in ("aperio", "generic"):
        slide_with_background(tmp_path / f"{vendor}.svs", vendor, downsamples=(1,))
        lose_block(tmp_path / f"{vendor}.svs", level=0, block=0)
    with Slide(tmp_path / "generic.svs") as slide:
        assert slide.read_tile(0, 0, tile_level0_px=128.0, tile_px=128).min() == 255
    with Slide(tmp_path / "aperio.svs") as slide, pytest.raises(SlideReadError, match="missing"):
        slide.read_tile(0, 0, tile_level0_px=128.0, tile_px=128)


@pytest.mark.parametrize("vendor", ["aperio", "generic"])
def test_lost_blocks_do_not_pass_for_glass_in_an_overview(vendor: str, tmp_path: Path) -> None:
    """Tissue is looked for there: tiles over a hole must be tried, and fail, rather than never exist."""
    slide_with_background(tmp_path / "s.tiff", vendor, downsamples=(1, 4) if vendor == "generic" else (1, 2))
    lose_block(tmp_path / "s.tiff", level=1 if vendor == "generic" else 0, block=7 if vendor == "aperio" else 0)
    with Slide(tmp_path / "s.tiff") as slide:
        picture = slide.overview((192, 128))
        assert picture[:, :95].max() < 250
        assert picture[:, 140:].min() > 250  # and glass stays glass
        with pytest.raises(SlideReadError, match="missing"):
            slide.read_box(0, 0, 400, 400, size_px=(100, 100))


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("vendor", ["aperio", "generic"])
def test_a_damaged_block_does_not_keep_a_slide_from_its_overview(vendor: str, level: int, tmp_path: Path) -> None:
    slide_with_background(tmp_path / "s.tiff", vendor, downsamples=(1, 2))
    with Slide(tmp_path / "s.tiff") as slide:
        whole = slide.overview((384, 256) if level else (768, 512))
    with tifffile.TiffFile(tmp_path / "s.tiff") as tiff:
        page = [page for page in tiff.pages if page.is_tiled][level]
        across = -(-page.imagewidth // BLOCK_PX)
        offset, count = page.dataoffsets[across + 1], page.databytecounts[across + 1]
    content = bytearray((tmp_path / "s.tiff").read_bytes())
    content[offset : offset + count] = bytes(count)
    (tmp_path / "s.tiff").write_bytes(content)
    with Slide(tmp_path / "s.tiff") as slide:
        picture = slide.overview((384, 256) if level else (768, 512))
        spoilt = np.zeros(picture.shape[:2], bool)
        spoilt[BLOCK_PX : 2 * BLOCK_PX, BLOCK_PX : 2 * BLOCK_PX] = True
        assert np.array_equal(picture[~spoilt], whole[~spoilt])
        inside = spoilt & (np.arange(picture.shape[1]) < picture.shape[1] // 2 - 8)
        assert picture[inside].max() < 250  # no glass: tiles there are tried


def test_an_overview_of_nothing_but_damage_is_an_error(tmp_path: Path) -> None:
    write_slide(tmp_path / "s.svs", noise(500, 400), mpp=0.5, vendor="aperio", downsamples=(1,))
    with tifffile.TiffFile(tmp_path / "s.svs") as tiff:
        places = list(zip(tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts, strict=True))
    content = bytearray((tmp_path / "s.svs").read_bytes())
    for offset, count in places:
        content[offset : offset + count] = bytes(count)
    (tmp_path / "s.svs").write_bytes(content)
    with Slide(tmp_path / "s.svs") as slide, pytest.raises(SlideReadError):
        slide.overview((100, 80))


def test_a_black_filling_is_no_witness(tmp_path: Path) -> None:
    slide_with_background(tmp_path / "s.tiff", "generic", glass=0, compression="deflate")
    lose_block(tmp_path / "s.tiff", level=0, block=10)
    with Slide(tmp_path / "s.tiff") as slide:
        assert slide.read_tile(4 * BLOCK_PX, BLOCK_PX, tile_level0_px=128.0, tile_px=128).min() == 255


def test_what_a_scanner_did_not_scan_is_white(tmp_path: Path) -> None:
    """Around the area of a Leica slide the canvas is clear: no block was ever there."""
    write_slide(tmp_path / "s.scn", noise(600, 400), mpp=0.5, vendor="leica", bounds_offset_px=(301, 203), downsamples=(1, 4))
    with Slide(tmp_path / "s.scn") as slide:
        tile = slide.read_tile(201, 153, tile_level0_px=200.0, tile_px=200)
        assert tile[:50].min() == tile[:, :100].min() == 255
        assert tile[50:, 100:].std() > 10


def test_whole_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for lost blocks costs a normal tile nothing, and an overhanging one no second read."""
    slide_with_background(tmp_path / "s.svs", "aperio")
    reads = []
    with Slide(tmp_path / "s.svs", on_read=lambda: reads.append("asked")) as slide:
        region = slide._reader._region  # type: ignore[attr-defined]
        monkeypatch.setattr(slide._reader, "_region", lambda *place: reads.append("read") or region(*place))
        slide.read_tile(100, 100, tile_level0_px=128.0, tile_px=128)
        slide.read_tile(700, 450, tile_level0_px=128.0, tile_px=128)
        assert reads == ["read", "asked"] * 2


def test_every_read_is_a_sign_of_life(damaged: Path) -> None:
    signs = []
    with Slide(damaged, on_read=lambda: signs.append(1)) as slide:
        slide.read_tile(0, 0, tile_level0_px=100.0, tile_px=100)
        slide.read_tile(0, 0, tile_level0_px=100.0, tile_px=47)
        assert len(signs) == 2
        with pytest.raises(SlideReadError):
            slide.read_tile(300, 300, tile_level0_px=100.0, tile_px=100)
        assert len(signs) == 3
        slide.overview((100, 100))
        assert len(signs) == 4


def test_opening_is_silent(tmp_path: Path) -> None:
    write_slide(tmp_path / "s.svs", noise(300, 300), mpp=0.5, vendor="aperio")
    Image.fromarray(noise(50, 50)).save(tmp_path / "s.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("s.svs", "s.png"):
            with Slide(tmp_path / name, fallback_mpp=0.5) as slide:
                slide.thumbnail(4.0)

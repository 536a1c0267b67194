"""Tiles read straight from compressed blocks are those of `Slide.read_tile`, bit for bit; what cannot be so is not read so."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from wsimil.errors import SlideReadError
from wsimil.slides import blocks as blocks_module
from wsimil.slides import direct
from wsimil.slides.blocks import BlockLevel
from wsimil.slides.direct import DCT_RESAMPLER, DirectReader, open_direct
from wsimil.slides.resample import resample
from wsimil.slides.slide import RESAMPLER, Slide
from wsimil.slides.tiling import Rect, tile_grid
from wsimil.slides.write_tiff import write_slide

KINDS = {
    "4:2:0": {"chroma": "4:2:0"},
    "4:2:2, shared tables": {"vendor": "aperio", "chroma": "4:2:2", "tile_px": 240},
    "4:4:4": {"chroma": "4:4:4", "tile_px": 240},
    "rgb": {"compression": "jpeg-rgb", "tile_px": 240},
    "rgb, shared tables": {"vendor": "aperio", "compression": "jpeg-rgb"},
    "jpeg2000": {"vendor": "aperio", "compression": "jpeg2000"},
}
GEOMETRIES = {"native": (100.0, 100), "half": (200.0, 100), "third": (300.0, 100), "quarter": (200.0, 50), "1.979": (158.3, 80)}
WIDTH, HEIGHT = 1003, 777


def colours(width: int, height: int, *, smooth: float = 2.0, seed: int = 0) -> np.ndarray:
    """Blobs of strong colour: chroma that wrong upsampling or a wrong colour space would spoil."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    return np.clip(cv2.GaussianBlur(noise, (0, 0), smooth) * 150 * smooth + 128, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("slides")
    source = colours(WIDTH, HEIGHT)
    paths = {}
    for number, (kind, options) in enumerate(KINDS.items()):
        paths[kind] = folder / f"{number}.svs"
        write_slide(paths[kind], source, mpp=0.25, downsamples=(1,), **options)
    return paths


def opened(slide: Slide, tile_level0_px: float, tile_px: int, *, dct_scaled: bool = False) -> DirectReader:
    reader, reason = open_direct(slide, tile_level0_px=tile_level0_px, tile_px=tile_px, dct_scaled=dct_scaled)
    assert reader is not None, reason
    return reader


def read(reader: DirectReader, coords: np.ndarray, *, at_once: int = 1000) -> tuple[np.ndarray, dict[int, str]]:
    out = np.full((len(coords), reader.tile_px, reader.tile_px, 3), 99, np.uint8)
    failures: dict[int, str] = {}
    walk = reader.walk(coords)
    for first in range(0, len(coords), at_once):
        failures |= walk.read(out[first : first + at_once])
    return out, failures


def plain(slide: Slide, reader: DirectReader, coords: np.ndarray) -> np.ndarray:
    tiles = [slide.read_tile(x, y, tile_level0_px=reader.tile_level0_px, tile_px=reader.tile_px) for x, y in coords.tolist()]
    return np.stack(tiles)


def in_rows(coords: np.ndarray) -> np.ndarray:
    return coords[np.lexsort((coords[:, 0], coords[:, 1]))]


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    decoded: list[int] = []
    decode = BlockLevel.decode

    def counted(self: BlockLevel, content: bytes, pixels: np.ndarray, **options: int) -> None:
        decoded.append(len(content))
        decode(self, content, pixels, **options)

    monkeypatch.setattr(BlockLevel, "decode", counted)
    return decoded


# ---- pixels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_those_of_the_plain_path_bit_for_bit(slides: dict[str, Path], kind: str, geometry: str) -> None:
    side, px = GEOMETRIES[geometry]
    rng = np.random.default_rng(list(GEOMETRIES).index(geometry))
    with Slide(slides[kind]) as slide:
        reader = opened(slide, side, px)
        # anywhere, overlapping, over every edge, and one quite outside
        coords = rng.integers((-60, -60), (WIDTH + 40 - int(side), HEIGHT + 40 - int(side)), (24, 2))
        coords = in_rows(np.vstack([coords, [[0, 0], [2 * WIDTH, 10], [WIDTH - int(side) - 1, HEIGHT - int(side) - 1]]]))
        found, failures = read(reader, coords, at_once=5)
        assert not failures
        assert np.array_equal(found, plain(slide, reader, coords))
    assert (found.reshape(len(found), -1).std(1) > 5).sum() > 20  # not an empty comparison


def test_every_colour_of_jpeg2000_is_openslides(tmp_path: Path) -> None:
    cb, cr = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    ycbcr = np.stack([np.full_like(cb, 128), cb, cr], -1).astype(np.uint8)
    block = imagecodecs.jpeg2k_encode(ycbcr, level=0, codecformat="j2k", colorspace="SYCC", mct=False, reversible=True)
    assert (imagecodecs.jpeg2k_decode(block) == ycbcr).all()
    path, description = tmp_path / "s.svs", "Aperio Image Library v11\n256x256 [0,0 256x256] (256x256) J2K/YUV16 Q=70|MPP = 0.5"
    with tifffile.TiffWriter(path) as writer:
        writer.write(
            iter([block]),
            shape=(256, 256, 3),
            dtype=np.uint8,
            tile=(256, 256),
            photometric="rgb",
            compression="jpeg",
            description=description,
            metadata=None,
        )
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(33003)
    with Slide(path) as slide:
        reader = opened(slide, 256.0, 256)
        assert reader.blocks.codec == "jpeg2000"
        coords = np.array([[0, 0]])
        assert np.array_equal(read(reader, coords)[0], plain(slide, reader, coords))


def without_hints(jpeg: bytes) -> bytes:
    """An RGB JPEG as Aperio's scanners write it: no marker says so, and components are numbered as those of YCbCr are."""
    kept, at = bytearray(jpeg[:2]), 2
    while at < len(jpeg):
        marker, end = jpeg[at + 1], at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        segment = bytearray(jpeg[at:end])
        if marker == 0xC0:  # the frame
            segment[10::3] = b"\x01\x02\x03"
        elif marker == 0xDA:  # the scan: pixels follow
            segment[5:11:2] = b"\x01\x02\x03"
            return bytes(kept + segment) + jpeg[end:]
        if marker not in (0xE0, 0xEE):
            kept += segment
        at = end
    raise AssertionError("no scan")


def test_rgb_that_only_the_tiff_states(tmp_path: Path) -> None:
    source = colours(512, 512)
    encoded = [
        without_hints(imagecodecs.jpeg8_encode(source[y : y + 256, x : x + 256], level=90, colorspace="rgb", outcolorspace="rgb"))
        for y in (0, 256)
        for x in (0, 256)
    ]
    options = {"shape": source.shape, "dtype": np.uint8, "tile": (256, 256), "compression": "jpeg", "metadata": None}
    options |= {"compressionargs": {"outcolorspace": "rgb"}}  # or tifffile takes it for YCbCr
    tifffile.imwrite(tmp_path / "s.svs", iter(encoded), photometric="rgb", subsampling=(1, 1), description="Aperio", **options)
    with Slide(tmp_path / "s.svs") as slide:
        reader = opened(slide, 300.0, 300)
        coords = np.array([[0, 0], [100, 150]])
        found, _ = read(reader, coords)
        assert np.array_equal(found, plain(slide, reader, coords))
        assert np.abs(found[1].astype(int) - source[150:450, 100:400]).mean() < 10


@pytest.mark.parametrize("level_px", [(1, 4), (1, 2, 4)])
@pytest.mark.parametrize("factor", [4, 8, 5.3])
def test_coarser_levels_are_used_as_the_plain_path_uses_them(tmp_path: Path, level_px: tuple[int, ...], factor: float) -> None:
    write_slide(tmp_path / "s.tiff", colours(1600, 1200), mpp=0.25, downsamples=level_px, tile_px=64)
    with Slide(tmp_path / "s.tiff") as slide:
        reader = opened(slide, 40 * factor, 40)
        assert reader.level == len(level_px) - 1
        coords = in_rows(np.random.default_rng(0).integers(0, (1600 - 320, 1200 - 320), (30, 2)))
        found, failures = read(reader, coords)
        assert not failures and np.array_equal(found, plain(slide, reader, coords))


@pytest.mark.parametrize("aligned", [True, False])
def test_tiles_on_the_grid_of_the_blocks_and_off_it(slides: dict[str, Path], aligned: bool) -> None:
    with Slide(slides["4:2:0"]) as slide:
        reader = opened(slide, 256.0, 256)
        coords = tile_grid(Rect(0 if aligned else 31, 0, 900, 700), tile_level0_px=256, step_level0_px=256).coords_level0_px
        found, _ = read(reader, coords)
        assert np.array_equal(found, plain(slide, reader, coords))


@pytest.mark.parametrize(("kind", "factor"), [("4:2:0", 2), ("4:2:0", 4), ("4:4:4", 3), ("jpeg2000", 2)])
def test_blocks_reduced_as_they_come_make_the_same_tiles(slides: dict[str, Path], kind: str, factor: int) -> None:
    with Slide(slides[kind]) as slide:
        reader = opened(slide, 60.0 * factor, 60)
        for shift, reduced in ((0, factor), (1, 1)):  # on whole pixels of the result; between them
            coords = in_rows(factor * np.random.default_rng(0).integers(0, (120, 80), (20, 2)) + shift)
            assert reader.walk(coords)._reduce_block == reduced
            assert np.array_equal(read(reader, coords)[0], plain(slide, reader, coords))


@pytest.mark.parametrize(("side", "size"), [(506.53, 256), (237.3, 256), (331.7, 150), (300.0, 77), (20.0, 7), (980.0, 33)])
def test_resampling_is_pillows(side: float, size: int) -> None:
    rng = np.random.default_rng(0)
    for start in (0.0, 2.25, 3.0):
        length = int(start + side) + 3
        image = rng.integers(0, 256, (length, length, 3), dtype=np.uint8)
        image[:20] = 255  # where weights that add up to too much would run over
        box = (start, min(start + 1, length - side), start + side, min(start + 1, length - side) + side)
        method = Image.Resampling.HAMMING if side >= size else Image.Resampling.BILINEAR
        found = np.empty((size, size, 3), np.uint8)
        resample(cv2.transpose(image), box, size, found)
        assert np.array_equal(found, np.asarray(Image.fromarray(image).resize((size, size), method, box=box)))


# ---- work ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "px", "step"), [(100.0, 100, 100), (100.0, 100, 61), (200.0, 100, 200), (158.3, 80, 158.3)])
def test_each_block_is_decoded_once(
    slides: dict[str, Path], monkeypatch: pytest.MonkeyPatch, side: float, px: int, step: float
) -> None:
    with Slide(slides["4:2:0"]) as slide:
        reader = opened(slide, side, px)
        decoded = count_decodes(monkeypatch)
        coords = tile_grid(Rect(3, 3, 990, 760), tile_level0_px=side, step_level0_px=step).coords_level0_px
        walk = reader.walk(coords)
        for first in range(0, len(coords), 3):
            walk.read(np.empty((min(3, len(coords) - first), px, px, 3), np.uint8))
    margin = 0 if side == px or side == 2 * px else 3
    touched = {
        (row, column)
        for x, y in coords.tolist()
        for row in range((y - margin) // 256, int(y + side - 1e-6 + margin) // 256 + 1)
        for column in range((x - margin) // 256, int(x + side - 1e-6 + margin) // 256 + 1)
    }
    assert len(decoded) == len([block for block in touched if min(block) >= 0]) > 10
    assert not walk._window and not walk._content  # nothing outlives its last tile


def test_blocks_that_no_tile_needs_are_left_alone(slides: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with Slide(slides["4:2:0"]) as slide:
        reader = opened(slide, 100.0, 100)
        decoded = count_decodes(monkeypatch)
        read(reader, np.array([[300, 20], [330, 120], [20, 600]]))
    assert len(decoded) == 2


def test_memory_is_bounded_and_pixels_do_not_depend_on_it(slides: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = slides["4:2:0"].with_name("small-blocks.tiff")
    write_slide(path, colours(1024, 400), mpp=0.25, downsamples=(1,), tile_px=32)
    with Slide(path) as slide:
        reader = opened(slide, 50.0, 50)
        coords = tile_grid(Rect(0, 0, 1024, 400), tile_level0_px=50, step_level0_px=50).coords_level0_px
        expected, _ = read(reader, coords)
        monkeypatch.setattr(direct, "_WINDOW_BYTES", 20 * 32 * 32 * 3)
        monkeypatch.setattr(direct, "_AHEAD_BYTES", 2000)
        decoded = count_decodes(monkeypatch)
        walk = reader.walk(coords)
        for row in range(len(coords)):
            tile = np.empty((1, 50, 50, 3), np.uint8)
            assert not walk.read(tile)
            assert len(walk._window) <= 20
            assert np.array_equal(tile[0], expected[row])
    n_blocks = 32 * 13
    assert n_blocks < len(decoded) < 1.35 * n_blocks  # some twice; giving up those that come next would make it 1.43


def test_any_order_gives_the_same_tiles(slides: dict[str, Path]) -> None:
    with Slide(slides["4:4:4"]) as slide:
        reader = opened(slide, 100.0, 100)
        coords = np.random.default_rng(1).integers(0, (900, 650), (40, 2))
        assert np.array_equal(read(reader, coords)[0], plain(slide, reader, coords))


def test_neighbouring_blocks_are_fetched_together(slides: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with Slide(slides["4:2:0"]) as slide:
        reader = opened(slide, 256.0, 256)
        reads: list[int] = []
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda file, size, at: reads.append(size) or pread(file, size, at))
        coords = tile_grid(Rect(0, 0, WIDTH, HEIGHT), tile_level0_px=256, step_level0_px=256).coords_level0_px
        read(reader, coords)
        assert len(reads) == 1
        # a limit on the size of a read, and a gap too wide to read over
        reads.clear()
        monkeypatch.setattr(blocks_module, "_MAX_READ", 40_000)
        found = reader.blocks.read(range(12))
        assert len(reads) > 3 and max(reads) <= 40_000
        monkeypatch.setattr(blocks_module, "_MAX_GAP", 0)
        assert reader.blocks.read([0, 5])[5] == found[5]


# ---- damage -------------------------------------------------------------------------------------------------------------


def damage(path: Path, change: str, block: int) -> None:
    """Spoil one block of a file."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        offset, size = page.dataoffsets[block], page.databytecounts[block]
        counts = page.tags["TileByteCounts"]
    with open(path, "r+b") as file:
        if change == "left out":
            width = counts.valuebytecount // counts.count
            file.seek(counts.valueoffset + block * width)
            file.write(bytes(width))
            return
        kept = 0 if change == "zeros" else size // 2
        rubbish = np.random.default_rng(0).bytes(size // 3) if change == "noise" else bytes(size - kept)
        file.seek(offset + kept)
        file.write(rubbish)


@pytest.mark.parametrize("change", ["breaks off", "noise", "zeros"])
@pytest.mark.parametrize("kind", ["4:2:0", "4:2:2, shared tables"])
def test_a_damaged_block_is_an_error_of_the_tiles_that_touch_it(
    slides: dict[str, Path], tmp_path: Path, kind: str, change: str
) -> None:
    path = tmp_path / "s.svs"
    path.write_bytes(slides[kind].read_bytes())
    with Slide(slides[kind]) as whole, Slide(path) as slide:
        blocks = opened(whole, 100.0, 100).blocks
        side, block = blocks.block_width, int(np.argmin(blocks.sizes[: blocks.columns - 1]))  # the check looks at large ones
        damage(path, change, block)
        reader = opened(slide, 100.0, 100)
        coords = tile_grid(Rect(0, 0, WIDTH, HEIGHT), tile_level0_px=100, step_level0_px=100).coords_level0_px
        found, failures = read(reader, coords, at_once=7)
        touch = (coords[:, 0] < (block + 1) * side) & (coords[:, 0] + 100 > block * side) & (coords[:, 1] < side)
        assert sorted(failures) == np.flatnonzero(touch).tolist()
        assert not found[touch].any()
        assert all(f"({block * side}, 0), level 0" in reason for reason in failures.values())
        assert np.array_equal(found[~touch], plain(whole, reader, coords[~touch]))


def garble(path: Path, blocks: list[int]) -> None:
    """Damage that OpenSlide reads without a word: rubbish in the middle of a block, without markers."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        places = [page.dataoffsets[block] + page.databytecounts[block] // 2 for block in blocks]
    with open(path, "r+b") as file:
        for number, place in enumerate(places):
            file.seek(place)
            file.write(np.random.default_rng(number).integers(0, 255, 100, np.uint8).tobytes())


def test_damage_in_the_tiles_that_are_compared_is_damage_all_the_same(slides: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "s.svs"
    path.write_bytes(slides["4:2:0"].read_bytes())
    with Slide(path) as slide:
        largest = np.argsort(opened(slide, 256.0, 256).blocks.sizes)[-2:].tolist()
    garble(path, largest)
    with Slide(path) as slide:
        reader = opened(slide, 256.0, 256)
        coords = np.array([[256 * (block % 4), 256 * (block // 4)] for block in range(16)])
        for block in largest:
            x, y = coords[block].tolist()
            slide.read_tile(x, y, tile_level0_px=256.0, tile_px=256)  # for OpenSlide these are pixels
        # tiles over the rim, which `Slide` reads, too
        assert sorted(read(reader, coords)[1]) == sorted(largest)


@pytest.mark.parametrize("block", [3, 15])
def test_damage_is_noticed_below_a_tile_over_the_rim(slides: dict[str, Path], tmp_path: Path, block: int) -> None:
    path = tmp_path / "s.svs"
    path.write_bytes(slides["4:2:0"].read_bytes())
    garble(path, [block])
    with Slide(path) as slide:
        reader = opened(slide, 200.0, 200)
        over = np.array([[900, 600 * (block // 15)], [900, 300]])
        found, failures = read(reader, over)
        assert list(failures) == [0] and f"block at (768, {block // 4 * 256})" in failures[0]
        assert not found[0].any() and np.array_equal(found[1:], plain(slide, reader, over[1:]))


@pytest.mark.parametrize("lost", [2, 6])
def test_a_coarser_level_over_a_gap_is_for_the_plain_path_to_read(tmp_path: Path, lost: int) -> None:
    """Of Aperio's slides OpenSlide leaves gaps in all levels where the finest has one, and blends at their rims."""
    path = tmp_path / "s.svs"
    write_slide(path, colours(1024, 1024), mpp=0.25, vendor="aperio", downsamples=(1, 4), tile_px=128)
    damage(path, "left out", 8 * lost + 3)
    with Slide(path) as slide:
        reader = opened(slide, 4 * 32.0, 32)
        assert reader.level == 1
        coords = tile_grid(Rect(0, 0, 1024, 1024), tile_level0_px=128, step_level0_px=101).coords_level0_px
        found, failures = read(reader, coords)
        assert failures
        for row, (x, y) in enumerate(coords.tolist()):
            if row in failures:
                with pytest.raises(SlideReadError):
                    slide.read_tile(x, y, tile_level0_px=128.0, tile_px=32)
            else:
                assert np.array_equal(found[row], slide.read_tile(x, y, tile_level0_px=128.0, tile_px=32))


def test_what_a_missing_block_means_is_for_the_plain_path_to_say(slides: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "s.svs"
    path.write_bytes(slides["4:2:0"].read_bytes())
    damage(path, "left out", 6)
    asked: list[tuple[int, int]] = []
    with Slide(path) as slide:
        reader = opened(slide, 100.0, 100)
        said = np.full((100, 100, 3), 77, np.uint8)
        slide.read_tile = lambda x, y, **_: asked.append((x, y)) or said  # type: ignore[method-assign]
        coords = np.array([[0, 0], [500, 300], [600, 400], [120, 600]])
        found, failures = read(reader, coords)
    assert asked == [(500, 300), (600, 400)] and not failures
    assert (found[1:3] == 77).all() and found[0].std() > 5


def test_a_file_that_was_cut_off_fails_at_its_end_only(slides: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "s.svs"
    path.write_bytes(slides["4:2:0"].read_bytes())
    with Slide(path) as slide:
        reader = opened(slide, 256.0, 256)
        coords = tile_grid(Rect(0, 0, WIDTH, HEIGHT), tile_level0_px=256, step_level0_px=256).coords_level0_px
        os.truncate(path, int(reader.blocks.offsets[8]) + 100)
        _, failures = read(reader, coords)
        assert sorted(failures) == [6, 7, 8]  # 3 tiles in a row, 4 blocks
        assert "ends" in failures[8]


# ---- half size in the DCT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["4:2:0", "4:2:2, shared tables", "rgb"])
@pytest.mark.parametrize(("side", "px"), [(200.0, 100), (400.0, 100)])
def test_dct_scaling_is_near_the_area_mean_and_in_its_place(tmp_path: Path, kind: str, side: float, px: int) -> None:
    source = 64 + colours(WIDTH, HEIGHT, smooth=4.0) // 2
    write_slide(tmp_path / "s.svs", source, mpp=0.25, downsamples=(1,), quality=95, **KINDS[kind])
    with Slide(tmp_path / "s.svs") as slide:
        exact, scaled = opened(slide, side, px), opened(slide, side, px, dct_scaled=True)
        assert (exact.resampler, scaled.resampler) == (RESAMPLER, DCT_RESAMPLER) and RESAMPLER != DCT_RESAMPLER
        assert (exact.reduce, scaled.reduce) == (1, 2)
        coords = in_rows(2 * np.random.default_rng(0).integers(0, (290, 180), (20, 2)))
        wanted, found = (read(reader, coords)[0].astype(float) for reader in (exact, scaled))
        near = np.abs(found - wanted).mean()
        assert 0 < near < 2
        for axis in (1, 2):  # a pixel off would be far worse
            assert np.abs(np.roll(found, 1, axis) - wanted).mean() > 3 * near


@pytest.mark.parametrize("at_once", [1000, 3])
def test_tiles_between_two_half_size_pixels_are_read_at_full_size(tmp_path: Path, at_once: int) -> None:
    """Corners that another program chose can be odd: half a pixel off would be worse than slow."""
    write_slide(tmp_path / "s.svs", 64 + colours(WIDTH, HEIGHT, smooth=4.0) // 2, mpp=0.25, downsamples=(1,), quality=95)
    with Slide(tmp_path / "s.svs") as slide:
        exact, scaled = opened(slide, 200.0, 100), opened(slide, 200.0, 100, dct_scaled=True)
        coords = in_rows(np.random.default_rng(0).integers(0, (790, 570), (40, 2)))
        odd = (coords % 2).any(1)
        assert 20 < odd.sum() < 37
        wanted, found = read(exact, coords)[0], read(scaled, coords, at_once=at_once)[0]
        assert np.array_equal(found[odd], wanted[odd])
        assert all(not np.array_equal(one, other) for one, other in zip(found[~odd], wanted[~odd], strict=True))
        assert np.array_equal(found[~odd], read(scaled, coords[~odd])[0])


@pytest.mark.parametrize(("kind", "side"), [("4:2:0", 100.0), ("4:2:0", 300.0), ("4:2:0", 198.0), ("jpeg2000", 200.0)])
def test_dct_scaling_is_for_even_reductions_of_jpeg(slides: dict[str, Path], kind: str, side: float) -> None:
    with Slide(slides[kind]) as slide:
        reader = opened(slide, side, 100, dct_scaled=True)
        assert reader.reduce == 1
        coords = np.array([[10, 20], [301, 203]])
        assert np.array_equal(read(reader, coords)[0], plain(slide, reader, coords))


# ---- when not to ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vendor": "leica", "compression": "jpeg"}, "leica"),
        ({"compression": "deflate"}, "compression"),
    ],
)
def test_other_files_are_left_to_the_plain_path_with_a_reason(tmp_path: Path, options: dict, words: str) -> None:
    write_slide(tmp_path / "s.tiff", colours(300, 300), mpp=0.5, downsamples=(1,), **options)
    with Slide(tmp_path / "s.tiff") as slide:
        reader, reason = open_direct(slide, tile_level0_px=100.0, tile_px=100)
        assert reader is None and words in (reason or "")


def test_plain_images_are_left_to_the_plain_path(tmp_path: Path) -> None:
    Image.fromarray(colours(300, 300)).save(tmp_path / "s.png")
    with Slide(tmp_path / "s.png") as slide:
        reader, reason = open_direct(slide, tile_level0_px=100.0, tile_px=100)
        assert reader is None and "image:png" in (reason or "")


def test_one_grey_level_of_difference_is_noticed_at_opening(slides: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    decode = BlockLevel.decode

    def off_by_one(self: BlockLevel, content: bytes, pixels: np.ndarray, **options: int) -> None:
        decode(self, content, pixels, **options)
        pixels[17, 23, 1] ^= 1

    monkeypatch.setattr(BlockLevel, "decode", off_by_one)
    with Slide(slides["4:2:0"]) as slide:
        reader, reason = open_direct(slide, tile_level0_px=300.0, tile_px=300)
        assert reader is None and "by up to 1 grey" in (reason or "")


def test_wrong_colours_are_noticed_at_opening(slides: dict[str, Path], tmp_path: Path) -> None:
    """A file whose tags say RGB where its JPEGs are YCbCr: OpenSlide and this reader may differ, but never unseen."""
    path = tmp_path / "s.svs"
    path.write_bytes(slides["4:2:0"].read_bytes())
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["PhotometricInterpretation"].overwrite(2)
    with Slide(path) as slide:
        reader, reason = open_direct(slide, tile_level0_px=100.0, tile_px=100)
        coords = np.array([[10, 10], [300, 300]])
        assert reason or np.array_equal(read(reader, coords)[0], plain(slide, reader, coords))


def test_no_more_tiles_than_there_are(slides: dict[str, Path]) -> None:
    with Slide(slides["4:2:0"]) as slide:
        walk = opened(slide, 100.0, 100).walk(np.array([[0, 0], [100, 0]]))
        with pytest.raises(ValueError, match="2 tiles of 100 px"):
            walk.read(np.empty((3, 100, 100, 3), np.uint8))
        assert not opened(slide, 100.0, 100).walk(np.empty((0, 2), np.int64)).read(np.empty((0, 100, 100, 3), np.uint8))

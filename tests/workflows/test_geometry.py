"""What is planted on a slide is found where it was planted, and as large, in every file that the stages write.

Black box: slides of six scanners' µm/px go through `extract_features` and `draw_heatmaps`; only files and pixels are looked at.
Positions are continuous, a pixel's centre at half; QuPath's frame is that of the scanned picture, without the canvas around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from wsimil.config import ExtractConfig, HeatmapConfig, TileConfig
from wsimil.extraction import extract_features
from wsimil.files import read_json, write_json, write_text
from wsimil.hdf5 import Dataset, open_hdf5, write_hdf5
from wsimil.heatmaps import draw_heatmaps
from wsimil.slides.slide import Slide
from wsimil.slides.tiling import Rect, resolve_scale, tile_grid
from wsimil.slides.write_tiff import write_slide

TARGET_MPP = 0.5
SCANNERS_MPP = (0.2271, 0.2520, 0.3412, 0.4661, 0.499, 0.5400)
KINDS = {
    "aperio": {"vendor": "aperio", "downsamples": (1, 4, 16)},
    "generic": {"vendor": "generic", "downsamples": (1, 2, 4)},
    "leica": {"vendor": "leica", "downsamples": (1, 4, 16), "bounds_offset_px": (1000, 600)},
    "leica-odd": {"vendor": "leica", "downsamples": (1, 2, 4), "bounds_offset_px": (333, 77)},
}
WIDTH, HEIGHT = 1808, 1312
RADIUS = 9.0  # of the discs, level-0 px
SHOWN = (235, 222, 230)  # what they lie on


def planted_discs() -> np.ndarray:
    """(N, 2) centres in the scanned picture: an uneven lattice, so that no other disc passes for a displaced one."""
    lattice = np.array([(x, y) for y in range(40, HEIGHT - 30, 64) for x in range(40, WIDTH - 30, 64)], float)
    return lattice + np.random.default_rng(0).uniform(-12, 12, lattice.shape)


DISCS = planted_discs()


def picture() -> np.ndarray:
    rgb = np.full((HEIGHT, WIDTH, 3), SHOWN, np.float32)
    reach = int(RADIUS) + 3
    for x, y in DISCS:
        left, top = int(x) - reach, int(y) - reach
        columns, rows = np.arange(left, left + 2 * reach) + 0.5, np.arange(top, top + 2 * reach) + 0.5
        distance = np.hypot(columns - x, (rows - y)[:, None])
        covered = np.clip(RADIUS + 0.5 - distance, 0, 1)[..., None]
        window = rgb[top : top + 2 * reach, left : left + 2 * reach]
        window[:] = window * (1 - covered) + np.array((50, 30, 90)) * covered
    return rgb.round().astype(np.uint8)


def centroid(pixels: np.ndarray, at: np.ndarray, reach: float) -> np.ndarray | None:
    """Where a disc really is, (x, y); None if it is not wholly in the pixels."""
    low, high = np.floor(at - reach).astype(int), np.ceil(at + reach).astype(int)
    if (low < 0).any() or (high > pixels.shape[1::-1]).any():
        return None
    window = pixels[low[1] : high[1], low[0] : high[0]].astype(float).mean(2)
    dark = np.clip(np.median(np.concatenate([window[0], window[-1], window[:, 0], window[:, -1]])) - window - 8, 0, None)
    assert dark.max() > 40, f"no disc near {at}"
    columns, rows = np.arange(low[0], high[0]) + 0.5, np.arange(low[1], high[1]) + 0.5
    return np.array([(dark.sum(0) * columns).sum(), (dark.sum(1) * rows).sum()]) / dark.sum()


@dataclass(frozen=True)
class Bagged:
    """A slide and what its files say; everything in level-0 pixels of the canvas."""

    slide: Path
    bag: Path
    mpp: float  # as written into the slide
    offset: tuple[int, int]  # of the scanned picture on the canvas
    coords: np.ndarray
    attributes: dict
    coords_attributes: dict

    @property
    def factor(self) -> float:
        return self.attributes["tile_level0_px"] / self.attributes["tile_px"]

    def tiles(self):
        """(row, pixels, discs wholly inside as (centre on the canvas, centre found in the tile's pixels))."""
        tile_px, side = int(self.attributes["tile_px"]), float(self.attributes["tile_level0_px"])
        on_canvas = DISCS + self.offset
        with Slide(self.slide) as slide:
            # a dozen of them, the first and the last among them
            for row in np.unique(np.linspace(0, len(self.coords) - 1, 12).astype(int)).tolist():
                x, y = self.coords[row].tolist()
                pixels = slide.read_tile(x, y, tile_level0_px=side, tile_px=tile_px)
                inside = on_canvas[((on_canvas > (x, y)) & (on_canvas < (x + side, y + side))).all(1)]
                found = [(disc, centroid(pixels, (disc - (x, y)) / self.factor, (RADIUS + 4) / self.factor)) for disc in inside]
                yield row, pixels, [(disc, centre) for disc, centre in found if centre is not None]


# every scanner once without bounds and once with them; of these, a slide of each kind is tiled with overlap too
PLAIN = [f"{kind}_{mpp:g}" for kind, mpp in zip(["aperio", "generic"] * 3, SCANNERS_MPP, strict=True)]
BOUNDED = [f"{kind}_{mpp:g}" for kind, mpp in zip(["leica-odd", "leica"] * 3, SCANNERS_MPP, strict=True)]
NAMES = [*PLAIN, *BOUNDED]
DRAWN = [PLAIN[0], PLAIN[3], BOUNDED[1], BOUNDED[4]]
CASES = [*((name, 224, 0) for name in NAMES), *((name, 160, 53) for name in DRAWN)]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
drawn_cases = pytest.mark.parametrize(
    "case", CASES[-len(DRAWN) :] + [(name, 224, 0) for name in (PLAIN[2], BOUNDED[5])], ids=lambda case: "-".join(map(str, case))
)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rgb = tmp_path_factory.mktemp("slides"), picture()
    for name in NAMES:
        kind, mpp = name.rsplit("_", 1)
        suffix = {"aperio": "svs", "generic": "tiff"}.get(kind, "scn")
        write_slide(folder / f"{name}.{suffix}", rgb, mpp=float(mpp), chroma="4:4:4", quality=92, **KINDS[kind])
    return folder


@pytest.fixture(scope="module")
def bags(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], Bagged]:
    job = tmp_path_factory.mktemp("job")
    paths = {path.stem: path for path in slides.iterdir()}
    for tile_px, overlap_px in {case[1:] for case in CASES}:
        table = job / f"{tile_px}.csv"
        write_text(
            table, "slide,slide_id\n" + "".join(f"{paths[n]},{n}\n" for n, *geometry in CASES if geometry == [tile_px, overlap_px])
        )
        config = TileConfig(mpp=TARGET_MPP, tile_px=tile_px, overlap_px=overlap_px, tissue="none")
        extract_features(table, job, tile=config, extract=ExtractConfig(device="cpu"), quiet=True)
    found = {}
    for name, tile_px, overlap_px in CASES:
        bag = next(job.glob(f"*_{tile_px}px_{overlap_px}px_overlap/features_*/{name}.h5"))
        kind, mpp = name.rsplit("_", 1)
        with open_hdf5(bag) as file:
            found[name, tile_px, overlap_px] = Bagged(
                paths[name], bag, float(mpp), KINDS[kind].get("bounds_offset_px", (0, 0)),
                file["coords"][:], dict(file.attrs), dict(file["coords"].attrs),
            )  # fmt: skip
    return found


# ---- field of view ------------------------------------------------------------------------------------------------------


@every_case
def test_the_field_of_view_that_a_bag_states_is_the_asked_one(case, bags) -> None:
    bag = bags[case]
    asked_um = bag.attributes["tile_px"] * TARGET_MPP
    assert bag.attributes["mpp"] == pytest.approx(bag.mpp, rel=1e-4)
    assert bag.attributes["tile_level0_px"] * bag.attributes["mpp"] == pytest.approx(asked_um, rel=0.005)
    assert bag.attributes["tile_px"] * bag.attributes["effective_mpp"] == pytest.approx(
        bag.attributes["tile_level0_px"] * bag.attributes["mpp"], rel=1e-9
    )


@every_case
def test_a_ruler_on_the_glass_measures_as_long_in_the_tile(case, bags) -> None:
    """By the µm/px written into the slide and the one asked for, nothing in between."""
    errors = []
    for _, pixels, discs in bags[case].tiles():
        true, found = (np.array([disc[i] for disc in discs]) for i in (0, 1))
        if len(discs) > 1:
            apart = np.linalg.norm(found[:, None] - found, axis=-1)
            a, b = np.unravel_index(apart.argmax(), apart.shape)
            if apart[a, b] > 0.3 * len(pixels):
                errors.append(apart[a, b] * TARGET_MPP / (np.linalg.norm(true[a] - true[b]) * bags[case].mpp) - 1)
    assert errors
    assert abs(np.mean(errors)) < 0.005
    assert np.abs(errors).max() < 0.008  # of a single pair: a centre is found to a tenth of a pixel


# ---- positions ----------------------------------------------------------------------------------------------------------


@every_case
def test_discs_lie_in_the_tiles_where_they_were_planted(case, bags) -> None:
    bag, off = bags[case], []
    for row, _, discs in bag.tiles():
        off += [found * bag.factor + bag.coords[row] - true for true, found in discs]
    assert len(off) > 15
    assert np.abs(off).max() < 1, np.abs(off).max(0)  # level-0 px
    assert np.abs(np.mean(off, 0)).max() < 0.3


@every_case
def test_coordinates_are_those_of_an_exact_grid(case, bags) -> None:
    bag = bags[case]
    tile_px, overlap_px = int(bag.attributes["tile_px"]), int(bag.attributes["overlap_px"])
    step, side = (tile_px - overlap_px) * bag.factor, tile_px * bag.factor
    assert bag.attributes["tile_level0_px"] == side
    assert bag.coords_attributes["patch_size_level0"] == round(side)
    assert (bag.coords_attributes["patch_size"], bag.coords_attributes["overlap"]) == (tile_px, overlap_px)
    assert (bag.attributes["bounds_x"], bag.attributes["bounds_y"]) == bag.offset
    for axis, length in enumerate((WIDTH, HEIGHT)):
        positions = np.unique(bag.coords[:, axis]) - bag.offset[axis]
        assert len(positions) == int((length - side) / step) + 1
        assert np.abs(positions - step * np.arange(len(positions))).max() <= 0.5
        assert positions.max() + side <= length


@given(
    slide_mpp=st.floats(0.2, 0.6),
    target_mpp=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    tile_px=st.integers(8, 1024),
    overlap=st.floats(0, 0.9),
    start=st.tuples(st.integers(0, 9999), st.integers(0, 9999)),
    size=st.tuples(st.integers(1, 150_000), st.integers(1, 20_000)),
)
@example(slide_mpp=0.20000000000000004, target_mpp=0.25, tile_px=9, overlap=0.5, start=(4, 0), size=(30, 12))
def test_no_scanner_and_no_tile_size_drifts(slide_mpp, target_mpp, tile_px, overlap, start, size) -> None:
    scale = resolve_scale(slide_mpp, target_mpp, allow_upsampling=True)
    side = tile_px * scale.factor
    assert side * slide_mpp == pytest.approx(tile_px * target_mpp, rel=0.005)
    assert tile_px * scale.effective_mpp == pytest.approx(side * slide_mpp, rel=1e-12)
    step = (tile_px - int(overlap * tile_px)) * scale.factor
    if size[0] * size[1] / step**2 > 20_000:
        return
    coords = tile_grid(Rect(*start, *size), tile_level0_px=side, step_level0_px=step).coords_level0_px
    for axis in (0, 1):
        positions = np.unique(coords[:, axis]) - start[axis]
        if len(positions):
            off = positions - step * np.arange(len(positions))
            half = 0.5 + 1e-9  # an exact half is a little more or less in floating point
            assert np.abs(off[:-1]).max(initial=0) <= half
            assert -1 < off[-1] <= half  # the last gives way by less than a pixel where it would overhang
            assert positions[-1] + side <= size[axis] + 1e-6


# ---- pictures and polygons ----------------------------------------------------------------------------------------------


def score(bag: Bagged, folder: Path, hot: list[int]) -> None:
    """As `predict` leaves it: the hot tiles speak for the class, the others are neutral."""
    contributions = np.zeros((len(bag.coords), 1), np.float32)
    contributions[hot] = 1
    kept = ("slide_id", "tile_level0_px", "level0_width", "level0_height", "bounds_x", "bounds_y")
    write_hdf5(
        folder / "scores" / bag.bag.name,
        {"coords": Dataset(bag.coords), "contributions": Dataset(contributions)},
        {
            "format": "wsimil-scores",
            **{key: bag.attributes[key] for key in kept},
            "class_names": ["dark"],
            "contribution_kind": "exact",
        },
    )
    name = bag.slide.stem
    write_text(folder / "predictions.csv", f"slide,slide_id,status,label,prob_dark,prediction\n{name},{name},done,dark,0.9,dark\n")


def drawn_picture(bag: Bagged, folder: Path, max_side_px: int, hot: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(h, w, 3) without the legend, and (x, y) level-0 px to one of its pixels."""
    score(bag, folder, hot)
    config = HeatmapConfig(format=("png",), max_side_px=max_side_px)
    assert draw_heatmaps(folder, bag.slide, folder / "out", config=config, quiet=True) == []
    canvas = np.array([bag.attributes["level0_width"], bag.attributes["level0_height"]])
    width, height = np.round(canvas / max(1, canvas.max() / max_side_px)).astype(int)
    pixels = np.asarray(Image.open(folder / "out" / f"{bag.slide.stem}.png").convert("RGB")).astype(int)
    return pixels[:height, :width], canvas / (width, height)


@drawn_cases
def test_the_picture_shows_discs_and_the_last_tile_in_their_places(case, bags, tmp_path: Path) -> None:
    max_side_px = 1600 if CASES.index(case) % 2 else 700
    bag, last = bags[case], len(bags[case].coords) - 1  # at the far corner, where drift would show most
    side = bag.attributes["tile_level0_px"]
    drawn, per_px = drawn_picture(bag, tmp_path / "hot", max_side_px, [last])
    own = drawn[..., 0] - drawn[..., 2]
    own = own > np.quantile(own, 0.999) * 0.75  # where it overlaps others it is paler
    rows, columns = np.nonzero(own)
    assert np.abs(np.array([columns.max() + 1, rows.max() + 1]) - (bag.coords[last] + side) / per_px).max() < 1
    if bag.attributes["overlap_px"] == 0:
        assert np.abs(np.array([columns.min(), rows.min()]) - bag.coords[last] / per_px).max() < 1
    drawn, per_px = drawn_picture(bag, tmp_path / "neutral", max_side_px, [])
    reach = RADIUS / per_px.min() + 2
    low, high = bag.coords.min(0) / per_px + reach, (bag.coords.max(0) + side) / per_px - reach
    places = (DISCS + bag.offset) / per_px
    off = [centroid(drawn, disc, reach) - disc for disc in places if (disc > low + 1).all() and (disc < high - 1).all()]
    assert len(off) > 60
    assert np.abs(off).max() < 1  # px of the picture
    assert np.abs(np.mean(off, 0)).max() < 0.5


@pytest.mark.parametrize("frame", ["auto", "keep"])
@drawn_cases
def test_polygons_of_tiles_carry_their_discs_in_qupaths_frame(case, frame: str, bags, tmp_path: Path) -> None:
    """What a tile's pixels show at p lies at corner + p · factor of its polygon: the place in the picture that was scanned."""
    bag = bags[case]
    score(bag, tmp_path, [0])
    config = HeatmapConfig(format=("geojson",), qupath_bounds=frame)  # type: ignore[arg-type]
    draw_heatmaps(tmp_path, bag.slide, tmp_path / "out", config=config, quiet=True)
    content = read_json(tmp_path / "out" / f"{case[0]}.geojson")
    origin = np.array(bag.offset) if frame == "keep" else np.zeros(2)
    rings = [np.array(feature["geometry"]["coordinates"][0]) for feature in content["features"]]
    assert len(rings) == len(bag.coords)
    off = []
    for row, pixels, discs in bag.tiles():
        corner, across = rings[row][0], rings[row][2] - rings[row][0]
        assert np.abs(across - bag.attributes["tile_level0_px"]).max() <= 0.02
        off += [corner + found * across / len(pixels) - (true - bag.offset + origin) for true, found in discs]
    assert np.abs(off).max() < 1  # level-0 px
    assert content["wsimil"]["origin_level0_px"] == [int(side) for side in np.array(bag.offset) - origin]


@pytest.mark.parametrize(("kind", "mpp"), [("aperio", 0.3412), ("generic", 0.4661), ("leica", 0.4661), ("leica-odd", 0.3412)])
def test_a_region_drawn_in_qupath_takes_the_tile_under_it(kind: str, mpp: float, slides: Path, tmp_path: Path) -> None:
    """Polygons come in and go out in QuPath's frame: the tissue file shows the region where it was drawn."""
    slide = next(slides.glob(f"{kind}_{mpp:g}.*"))
    side = 96 * TARGET_MPP / mpp
    column, row = 9, 6
    low, high = np.array([column, row]) * side, np.array([column + 1, row + 1]) * side
    ring = [[low[0], low[1]], [high[0], low[1]], [high[0], high[1]], [low[0], high[1]], [low[0], low[1]]]
    polygon = {"type": "Polygon", "coordinates": [ring]}
    region = {"type": "Feature", "geometry": polygon, "properties": {"objectType": "annotation"}}
    write_json(tmp_path / "roi" / f"{slide.stem}.geojson", {"type": "FeatureCollection", "features": [region]})
    config = TileConfig(mpp=TARGET_MPP, tile_px=96, min_tissue=0.8, roi=str(tmp_path / "roi"))
    extract_features(slide, tmp_path / "job", tile=config, extract=ExtractConfig(device="cpu"), quiet=True)
    with open_hdf5(next((tmp_path / "job").glob("*/features_*/*.h5"))) as file:
        coords, attributes = file["coords"][:], dict(file.attrs)
    assert len(coords) == 1
    assert np.abs(coords[0] - KINDS[kind].get("bounds_offset_px", (0, 0)) - low).max() <= 0.5
    out = read_json(tmp_path / "job" / "tissue" / f"{slide.stem}.geojson")
    corners = np.array(out["features"][0]["geometry"]["coordinates"][0])
    mask_px = 4 / attributes["mpp"]  # the tissue mask's grid is no coarser than 4 µm here
    assert np.abs(corners.min(0) - low).max() <= mask_px
    assert np.abs(corners.max(0) - high).max() <= mask_px


@pytest.mark.parametrize("kind", ["generic", "leica-odd"])
def test_tissue_is_outlined_where_it_lies(kind: str, tmp_path: Path) -> None:
    x, y, width, height = 1010, 730, 500, 380
    rgb = np.full((1400, 2000, 3), 243, np.uint8)
    stain = np.random.default_rng(0).integers(-30, 30, (height, width, 1))
    rgb[y : y + height, x : x + width] = np.clip(np.array([190, 120, 170]) + stain, 0, 255)
    write_slide(tmp_path / f"s.{'tiff' if kind == 'generic' else 'scn'}", rgb, mpp=0.4661, **KINDS[kind])
    slide = next(tmp_path.glob("s.*"))
    extract_features(slide, tmp_path / "job", tile=TileConfig(tile_px=96), extract=ExtractConfig(device="cpu"), quiet=True)
    features = read_json(tmp_path / "job" / "tissue" / "s.geojson")["features"]
    corners = np.array(features[0]["geometry"]["coordinates"][0])
    assert len(features) == 1
    low, high = corners.min(0), corners.max(0)
    beyond_um = 0.4661 * np.array([x - low[0], y - low[1], high[0] - x - width, high[1] - y - height])
    assert np.abs(beyond_um).max() < 20  # the mask judges averages of 8 µm and reaches beyond the rim, as far on every side
    assert np.abs(low + high - (2 * x + width, 2 * y + height)).max() / 2 * 0.4661 < 2  # a pixel of the mask


# ---- holes --------------------------------------------------------------------------------------------------------------


def write_with_lost_blocks(path: Path, vendor: str, blocks: tuple[int, ...]) -> None:
    """20 × 12 blocks of 64 px of tissue, of which the writer lost some: their byte counts are zero."""
    path.parent.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(-40, 40, (768 // 8, 1280 // 8, 3)).repeat(8, 0).repeat(8, 1)
    rgb = np.clip(np.array([190, 120, 170]) + noise, 0, 255).astype(np.uint8)
    write_slide(path, rgb, mpp=TARGET_MPP, vendor=vendor, tile_px=64, downsamples=(1, 4))  # type: ignore[arg-type]
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[0].tags["TileByteCounts"]
        width, start = {3: 2, 4: 4, 16: 8}[tag.dtype], tag.valueoffset
    content = bytearray(path.read_bytes())
    for block in blocks:
        content[start + width * block : start + width * (block + 1)] = bytes(width)
    path.write_bytes(content)


def test_tiles_over_lost_blocks_are_invalid_and_too_many_fail_the_slide(tmp_path: Path) -> None:
    for vendor in ("aperio", "generic"):
        write_with_lost_blocks(tmp_path / "slides" / f"{vendor}_whole.tiff", vendor, ())
        write_with_lost_blocks(tmp_path / "slides" / f"{vendor}_two.tiff", vendor, (25, 113))
        write_with_lost_blocks(tmp_path / "slides" / f"{vendor}_three.tiff", vendor, (25, 113, 150))  # of 240: 1.25 %
    done = extract_features(
        tmp_path / "slides", tmp_path / "job", tile=TileConfig(tile_px=64), extract=ExtractConfig(device="cpu"), quiet=True
    )
    rows = {row.slide_id: row for row in done.rows}
    for vendor in ("aperio", "generic"):
        assert (rows[f"{vendor}_two"].status, rows[f"{vendor}_two"].n_tiles) == ("done", 240)
        assert "2 tiles cannot be read" in rows[f"{vendor}_two"].reason
        assert "at (320, 64), level 0: the block is missing" in rows[f"{vendor}_two"].reason
        assert rows[f"{vendor}_three"].status == "failed"
        assert "missing" in rows[f"{vendor}_three"].reason
        bags = {}
        for name in ("whole", "two"):
            with open_hdf5(next((tmp_path / "job").glob(f"*/features_*/{vendor}_{name}.h5"))) as file:
                bags[name] = file["features"][:], file["valid"][:].astype(bool), file["coords"][:]
        features, valid, coords = bags["two"]
        assert coords[~valid].tolist() == [[5 * 64, 64], [13 * 64, 5 * 64]]
        assert not features[~valid].any()
        assert np.array_equal(features[valid], bags["whole"][0][valid])

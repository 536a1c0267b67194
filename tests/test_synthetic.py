"""Painted slides: what is planted is there, files say what was asked for, only the tumour tells the label."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter, defaultdict

import cv2
import numpy as np
import openslide
import pytest
import tifffile

from wsimil.errors import UsageError
from wsimil.slides.synthetic import (
    SITES,
    Lesion,
    Scanner,
    Stain,
    outlines_geojson,
    paint_slide,
    plan_cohort,
    write_cohort,
)
from wsimil.slides.write_tiff import write_slide

LESION = Lesion(260, 190, 80)
SIZE_UM = (520, 380)


def from_centre(lesion: Lesion, shape: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.hypot(x - lesion.x_um, y - lesion.y_um)


def at_1_um(rgb: np.ndarray) -> np.ndarray:
    return cv2.resize(rgb, SIZE_UM, interpolation=cv2.INTER_AREA).astype(float)


@pytest.fixture(scope="module")
def tumour_slide():
    return paint_slide(*SIZE_UM, mpp=0.5, seed=3, lesions=[LESION])


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Smooth colours, an uneven size, and one sharp red square at x 300-360, y 200-260."""
    rng = np.random.default_rng(0)
    rgb = cv2.resize(rng.integers(90, 200, (9, 13, 3), dtype=np.uint8), (701, 517), interpolation=cv2.INTER_CUBIC)
    rgb[200:260, 300:360] = (250, 10, 20)
    return rgb


def scanned(slide: openslide.OpenSlide) -> np.ndarray:
    """Level 0 without the empty canvas around it."""
    x, y = (int(slide.properties.get(f"openslide.bounds-{axis}", 0)) for axis in "xy")
    width, height = (
        int(slide.properties.get(f"openslide.bounds-{side}", whole))
        for side, whole in zip(("width", "height"), slide.dimensions, strict=True)
    )
    return np.asarray(slide.read_region((x, y), 0, (width, height)))[..., :3]


# ---------------------------------------------------------------- painting


def test_the_tumour_lies_where_it_was_planted(tumour_slide):
    distance = from_centre(LESION, tumour_slide.tumour.shape)
    assert tumour_slide.tumour[distance < 0.84 * LESION.radius_um].all()
    assert not tumour_slide.tumour[distance > 1.16 * LESION.radius_um].any()
    assert tumour_slide.tissue[tumour_slide.tumour].all()
    red = at_1_um(tumour_slide.rgb)[..., 0]  # nuclei take red away, pink fibres do not
    stroma = tumour_slide.tissue & (distance > 1.2 * LESION.radius_um)
    assert red[tumour_slide.tumour].mean() < red[stroma].mean() - 20


def test_a_tumour_changes_nothing_outside_its_border(tumour_slide):
    without = paint_slide(*SIZE_UM, mpp=0.5, seed=3)
    outside = cv2.dilate(tumour_slide.tumour.astype(np.uint8), np.ones((31, 31))) == 0  # nuclei reach over the border
    assert outside.mean() > 0.5 and not without.tumour.any()
    outside_px = outside.repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(tumour_slide.rgb[outside_px], without.rgb[outside_px])


def test_glass_is_bright_and_tissue_is_stained(tumour_slide):
    # nuclei on the rim reach over it
    bare = cv2.erode((~tumour_slide.tissue).astype(np.uint8), np.ones((21, 21))) > 0
    rgb = at_1_um(tumour_slide.rgb)
    assert bare.any() and rgb[bare].min() > 225
    assert np.median(rgb[tumour_slide.tissue][:, 1]) < 200


def test_one_seed_is_the_same_tissue_at_every_scale(tumour_slide):
    finer = paint_slide(*SIZE_UM, mpp=0.25, seed=3, lesions=[LESION])
    assert finer.rgb.shape == (1520, 2080, 3)
    np.testing.assert_array_equal(finer.tumour, tumour_slide.tumour)
    a, b = (cv2.GaussianBlur(at_1_um(slide.rgb), (0, 0), 1) for slide in (finer, tumour_slide))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.98


def test_painting_repeats_itself_and_seeds_differ():
    first, again, other = (paint_slide(150, 100, mpp=0.5, seed=seed).rgb for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.3


@pytest.mark.parametrize("pen", ["green", "blue", "black"])
def test_a_pen_line_darkens_a_part_and_leaves_the_rest(pen):
    plain, marked = (paint_slide(400, 300, mpp=1.0, seed=5, pen=p).rgb.astype(int) for p in (None, pen))
    ink = (np.abs(marked - plain) > 12).any(-1)
    assert 0.01 < ink.mean() < 0.25
    assert (marked[ink] <= plain[ink] + 12).all()


def test_an_unknown_pen_is_refused():
    with pytest.raises(ValueError, match="red"):
        paint_slide(100, 100, mpp=1.0, seed=0, pen="red")  # pyright: ignore[reportArgumentType]


def test_stain_and_scanner_change_the_colour_and_not_the_tissue():
    strong = paint_slide(200, 150, mpp=1.0, seed=2, stain=Stain((2.0, 2.4, 1.2), (0.3, 1.6, 0.9)))
    bluish = paint_slide(200, 150, mpp=1.0, seed=2, scanner=Scanner(glass=(225, 235, 250), blur_um=1.5))
    plain = paint_slide(200, 150, mpp=1.0, seed=2)
    np.testing.assert_array_equal(strong.tissue, plain.tissue)
    assert strong.rgb[plain.tissue].mean() < plain.rgb[plain.tissue].mean() - 10
    assert bluish.rgb[:4, :4].mean((0, 1)) == pytest.approx((225, 235, 250), abs=6)


def test_tiny_slides_can_be_painted():
    assert paint_slide(20, 13, mpp=0.5, seed=0, lesions=[Lesion(10, 6, 4)], pen="blue").rgb.shape == (26, 40, 3)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize(
    ("vendor", "compression"),
    [
        *((vendor, compression) for vendor in ("generic", "aperio", "leica") for compression in ("deflate", "none")),
        ("aperio", "jpeg2000"),
    ],
)
def test_lossless_slides_give_the_same_pixels_back(tmp_path, picture, vendor, compression):
    write_slide(tmp_path / "a.tiff", picture, mpp=0.5, vendor=vendor, compression=compression, downsamples=(1, 3))
    with openslide.OpenSlide(tmp_path / "a.tiff") as slide:
        np.testing.assert_array_equal(scanned(slide), picture)


@pytest.mark.parametrize("vendor", ["generic", "aperio", "leica"])
@pytest.mark.parametrize(
    ("compression", "chroma", "subsampling"),
    [("jpeg", "4:2:0", 34), ("jpeg", "4:2:2", 33), ("jpeg", "4:4:4", 17), ("jpeg-rgb", "4:2:0", 17)],
)
def test_jpeg_slides_come_close_and_have_the_chroma_asked_for(
    tmp_path, picture, vendor, compression, chroma, subsampling
):
    path = tmp_path / "a.tiff"
    write_slide(path, picture, mpp=0.5, vendor=vendor, compression=compression, chroma=chroma, quality=90)
    with openslide.OpenSlide(path) as slide:
        assert np.abs(scanned(slide).astype(int) - picture).mean() < 2
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[1 if vendor == "leica" else 0]
        assert isinstance(page, tifffile.TiffPage)
        assert page.photometric == (
            tifffile.PHOTOMETRIC.RGB if compression == "jpeg-rgb" else tifffile.PHOTOMETRIC.YCBCR
        )
        assert ("JPEGTables" in page.tags) == (vendor == "aperio")
        tiff.filehandle.seek(page.dataoffsets[0])
        tile = tiff.filehandle.read(page.databytecounts[0])
    frame = tile.index(b"\xff\xc0")  # start of frame: the first component's sampling factors, 4 bits each
    assert tile[frame + 11] == subsampling


@pytest.mark.parametrize(("vendor", "name"), [("generic", "generic-tiff"), ("aperio", "aperio"), ("leica", "leica")])
@pytest.mark.parametrize("mpp", [0.499, 0.2527, 0.35])
def test_openslide_reads_maker_and_scale_back(tmp_path, picture, vendor, name, mpp):
    write_slide(tmp_path / "a.tiff", picture, mpp=mpp, vendor=vendor)
    with openslide.OpenSlide(tmp_path / "a.tiff") as slide:
        assert slide.properties["openslide.vendor"] == name
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(mpp, rel=1e-5)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(mpp, rel=1e-5)


@pytest.mark.parametrize("vendor", ["generic", "aperio"])
def test_a_slide_without_scale_states_none(tmp_path, picture, vendor):
    write_slide(tmp_path / "a.tiff", picture, mpp=None, vendor=vendor)
    with openslide.OpenSlide(tmp_path / "a.tiff") as slide:
        assert "openslide.mpp-x" not in slide.properties
        assert "openslide.objective-power" not in slide.properties


def test_a_leica_slide_has_bounds_inside_a_larger_canvas(tmp_path, picture):
    write_slide(tmp_path / "a.scn", picture, mpp=0.5, vendor="leica", bounds_offset_px=(930, 410))
    with openslide.OpenSlide(tmp_path / "a.scn") as slide:
        bounds = [int(slide.properties[f"openslide.bounds-{side}"]) for side in ("x", "y", "width", "height")]
        assert bounds == [930, 410, 701, 517]
        assert slide.dimensions[0] > 930 + 701 and slide.dimensions[1] > 410 + 517
        corner = np.asarray(slide.read_region((930 + 300, 410 + 200), 0, (60, 60)))
    assert corner[2:-2, 2:-2, 0].min() > 200 and corner[2:-2, 2:-2, 1].max() < 60


@pytest.mark.parametrize("vendor", ["generic", "aperio", "leica"])
def test_downsamples_need_not_be_whole_numbers(tmp_path, picture, vendor):
    path, asked = tmp_path / "a.tiff", (1, 2.7, 6.3)
    write_slide(path, picture, mpp=0.5, vendor=vendor, compression="deflate", downsamples=asked)
    with openslide.OpenSlide(path) as slide:
        assert slide.level_downsamples == pytest.approx(asked, rel=0.01)
        x, y = (int(slide.properties.get(f"openslide.bounds-{axis}", 0)) for axis in "xy")
        square = round(60 / 2.7)
        patch = np.asarray(slide.read_region((x + 300, y + 200), 1, (square, square)))[1:-1, 1:-1]
    assert patch[..., 0].min() > 180 and patch[..., 1].max() < 80


def test_tiles_past_the_edge_do_not_ring_into_the_picture(tmp_path):
    bright = np.full((300, 270, 3), 240, np.uint8)
    write_slide(tmp_path / "a.tiff", bright, mpp=0.5, quality=50)
    with openslide.OpenSlide(tmp_path / "a.tiff") as slide:
        assert np.abs(scanned(slide).astype(int) - 240).max() <= 1


def test_an_interrupted_write_leaves_no_file(tmp_path, picture, monkeypatch):
    write, calls = tifffile.TiffWriter.write, []

    def breaks_at_the_second_level(self, *args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("disk full")
        return write(self, *args, **options)

    monkeypatch.setattr(tifffile.TiffWriter, "write", breaks_at_the_second_level)
    with pytest.raises(OSError, match="disk full"):
        write_slide(tmp_path / "a.tiff", picture, mpp=0.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"downsamples": (2, 4)}, "downsamples"),
        ({"downsamples": (1, 4, 4)}, "downsamples"),
        ({"vendor": "leica", "mpp": None}, "leica"),
        ({"compression": "jpeg2000"}, "aperio"),
        ({"compression": "webp"}, "webp"),
    ],
)
def test_what_cannot_be_written_is_refused_before_writing(tmp_path, picture, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        write_slide(tmp_path / "a.tiff", picture, **{"mpp": 0.5, **options})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the cohort


def test_site_pen_and_slides_per_patient_do_not_tell_the_label():
    plan = plan_cohort(24, seed=0, width_um=400, height_um=300)
    by_label = {label: [slide for slide in plan if slide.label == label] for label in ("tumour", "normal")}
    for seen in (
        lambda slides: Counter((slide.site, slide.pen) for slide in slides),
        lambda slides: sorted(Counter(slide.patient for slide in slides).values()),
    ):
        assert seen(by_label["tumour"]) == seen(by_label["normal"])
    assert Counter(slide.site for slide in plan) == {"A": 12, "B": 12}
    assert Counter(slide.pen is None for slide in plan) == {True: 16, False: 8}


def test_a_patient_has_one_label_and_some_have_two_slides():
    plan = plan_cohort(24, seed=0, width_um=400, height_um=300)
    labels = defaultdict(set)
    for slide in plan:
        labels[slide.patient].add(slide.label)
    assert all(len(of_patient) == 1 for of_patient in labels.values())
    assert Counter(Counter(slide.patient for slide in plan).values()) == {1: 8, 2: 8}
    assert [slide.label for slide in plan] != sorted(slide.label for slide in plan)  # names do not tell it either


def test_only_tumour_slides_have_lesions_and_those_lie_on_the_slide():
    plan = plan_cohort(24, seed=1, width_um=400, height_um=300)
    assert all(bool(slide.lesions) == (slide.label == "tumour") for slide in plan)
    assert len({len(slide.lesions) for slide in plan}) > 2
    for lesion in (lesion for slide in plan for lesion in slide.lesions):
        assert 30 <= lesion.radius_um <= 90 and 0 <= lesion.x_um < 400 and 0 <= lesion.y_um < 300


def test_cohorts_repeat_themselves_and_seeds_differ():
    small = {"width_um": 200, "height_um": 150}
    assert plan_cohort(4, seed=0, **small) == plan_cohort(4, seed=0, **small) != plan_cohort(4, seed=1, **small)


SMALL = {"n_slides": 4, "width_um": 300, "height_um": 220}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, **SMALL, workers=1)
    return folder


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_do_not_depend_on_the_number_of_workers(cohort, tmp_path):
    write_cohort(tmp_path, **SMALL, workers=2)
    assert contents(tmp_path) == contents(cohort)


def test_a_killed_run_goes_on_and_leaves_no_scraps(cohort, tmp_path):
    done = {path: data for path, data in contents(cohort).items() if "toy-02" not in path}
    for path, data in done.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    (tmp_path / "slides" / ".toy-02.tiff.tmp-1").write_bytes(b"half")
    untouched = (tmp_path / "slides" / "toy-01.tiff").stat().st_mtime_ns
    write_cohort(tmp_path, **SMALL, workers=1)
    assert contents(tmp_path) == contents(cohort)
    assert (tmp_path / "slides" / "toy-01.tiff").stat().st_mtime_ns == untouched


def test_a_folder_with_another_cohort_is_refused(cohort):
    before = contents(cohort)
    with pytest.raises(UsageError, match="another cohort"):
        write_cohort(cohort, **SMALL, seed=1, workers=1)
    assert contents(cohort) == before


def test_tables_slides_and_truth_agree(cohort):
    with open(cohort / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["slide", "patient", "site", "label"]
    assert {f"{row['slide']}.tiff" for row in rows} == {path.name for path in (cohort / "slides").iterdir()}
    with open(cohort / "truth" / "lesions.csv", newline="") as file:
        lesions = list(csv.DictReader(file))
    for row in rows:
        with openslide.OpenSlide(cohort / "slides" / f"{row['slide']}.tiff") as slide:
            mpp = float(slide.properties["openslide.mpp-x"])
        assert mpp == pytest.approx(SITES[row["site"]][0], rel=1e-6)
        truth = json.loads((cohort / "truth" / f"{row['slide']}.geojson").read_text())
        assert bool(truth["features"]) == (row["label"] == "tumour")
        corners = [np.array(feature["geometry"]["coordinates"][0]) * mpp for feature in truth["features"]]
        for x, y, radius in (
            [float(lesion[key]) for key in ("x_um", "y_um", "radius_um")]
            for lesion in lesions
            if lesion["slide"] == row["slide"]
        ):  # every lesion has a border point about its radius away
            distance = np.concatenate([np.hypot(*(outline - (x, y)).T) for outline in corners])
            assert (np.abs(distance / radius - 1) < 0.16).any()


def test_outlines_enclose_the_tumour_in_level_0_px(tumour_slide):
    (feature,) = outlines_geojson(tumour_slide)["features"]
    (ring,) = feature["geometry"]["coordinates"]
    assert ring[0] == ring[-1]
    filled = np.zeros(tumour_slide.rgb.shape[:2], np.uint8)
    cv2.fillPoly(filled, [np.round(ring).astype(np.int32)], 1)
    wanted = cv2.resize(tumour_slide.tumour.astype(np.uint8), filled.shape[::-1], interpolation=cv2.INTER_NEAREST)
    assert (filled & wanted).sum() / (filled | wanted).sum() > 0.97


def test_painting_needs_no_torch():
    code = "import sys, wsimil.slides.synthetic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

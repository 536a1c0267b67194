"""A planted object lands on its pixels: in the picture, in the polygons, with and without OpenSlide bounds.

Many slides are drawn side by side, and what happens to one is no matter of the others.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import speckled
from heatmaps.maps import write_scores
from PIL import Image

from wsimil.bags.bag import read_bag
from wsimil.cli import main
from wsimil.config import HeatmapConfig, JobConfig, TileConfig
from wsimil.errors import UsageError, WsimilError
from wsimil.extraction import extract_features
from wsimil.files import mark_output, read_json, write_text
from wsimil.hdf5 import Dataset, write_hdf5
from wsimil.heatmaps import draw_heatmaps, read_tile_map
from wsimil.slides.cohort import find_slides
from wsimil.slides.slide import Slide
from wsimil.slides.write_tiff import write_slide

OFFSET = (1000, 600)


def planted(width: int = 1600, height: int = 1200) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Tissue with one dark blue square, and where the square is: x, y, width, height."""
    rgb = speckled(width, height)
    rgb[..., 0] = rgb[..., 2]  # no redder than blue, so that red is the map's
    box = (900, 500, 200, 150)
    rgb[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = (40, 30, 120)
    return rgb, box


def darkness_scores(bag_path: Path, slide_path: Path, scores: Path) -> None:
    """A scores file whose contribution is the darkness of the tile itself: a model that cannot be wrong."""
    bag = read_bag(bag_path)
    side = float(bag.attributes["tile_level0_px"])
    with Slide(slide_path) as slide:
        dark = [255 - slide.read_tile(x, y, tile_level0_px=side, tile_px=32).mean() for x, y in bag.coords_level0_px.tolist()]
    contributions = (np.array(dark, np.float32) - np.median(dark))[:, None]
    kept = ("slide_id", "tile_level0_px", "level0_width", "level0_height", "bounds_x", "bounds_y")
    write_hdf5(
        scores / bag_path.name,
        {"coords": Dataset(bag.coords_level0_px), "contributions": Dataset(contributions)},
        {
            "format": "wsimil-scores",
            **{key: bag.attributes[key] for key in kept},
            "class_names": ["dark"],
            "contribution_kind": "exact",
        },
    )


@pytest.fixture(scope="module", params=["generic", "leica"])
def drawn(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, tuple[int, int, int, int], tuple[int, int]]:
    """Output folder, predictions folder, the planted box on the canvas, and the bounds offset."""
    tmp_path = tmp_path_factory.mktemp(request.param)
    rgb, (x, y, width, height) = planted()
    offset = OFFSET if request.param == "leica" else (0, 0)
    path = tmp_path / "slides" / ("s.scn" if request.param == "leica" else "s.tiff")
    path.parent.mkdir()
    options = {"bounds_offset_px": OFFSET} if request.param == "leica" else {}
    write_slide(
        path, rgb, mpp=0.5, vendor=request.param, compression="jpeg", chroma="4:4:4", quality=95, downsamples=(1, 4), **options
    )
    extract_features(path.parent, tmp_path / "job", tile=TileConfig(tile_px=50), quiet=True)
    darkness_scores(next((tmp_path / "job").glob("*/features_*/s.h5")), path, tmp_path / "predictions" / "scores")
    write_text(
        tmp_path / "predictions" / "predictions.csv", "slide,slide_id,status,label,prob_dark,prediction\ns,s,done,dark,0.9,dark\n"
    )
    assert draw_heatmaps(tmp_path / "predictions", path.parent, tmp_path / "out", config=HeatmapConfig(), quiet=True) == []
    return tmp_path / "out", tmp_path / "predictions", (x + offset[0], y + offset[1], width, height), offset


def test_the_hottest_tile_lies_on_the_planted_object(drawn) -> None:
    _, predictions, (x, y, width, height), _ = drawn
    centre = read_tile_map(predictions / "scores" / "s.h5").hottest()
    assert x <= centre[0] <= x + width and y <= centre[1] <= y + height


def test_polygons_lie_on_the_object_in_qupaths_frame(drawn) -> None:
    """QuPath counts from the bounds: the hot tiles cover the square of the picture itself, whatever canvas lies around it."""
    out, _, _, offset = drawn
    content = read_json(out / "s.geojson")
    assert content["wsimil"]["origin_level0_px"] == list(offset)
    hot = [f for f in content["features"] if f["properties"]["measurements"]["contribution"] > 40]
    corners = np.array([corner for feature in hot for corner in feature["geometry"]["coordinates"][0]])
    np.testing.assert_allclose(corners.min(0), (900, 500), atol=1)
    np.testing.assert_allclose(corners.max(0), (1100, 650), atol=1)
    assert all(f["geometry"]["coordinates"][0][0] == f["geometry"]["coordinates"][0][-1] for f in hot)
    assert all(f["properties"]["objectType"] == "tile" and isinstance(f["properties"]["measurements"], dict) for f in hot)


def test_keeping_the_frame_leaves_the_files_own_coordinates(drawn, tmp_path: Path) -> None:
    _, predictions, (x, y, _, _), _ = drawn
    draw_heatmaps(
        predictions,
        predictions.parent / "slides",
        tmp_path / "kept",
        config=HeatmapConfig(qupath_bounds="keep", format=("geojson",)),
        quiet=True,
    )
    features = read_json(tmp_path / "kept" / "s.geojson")["features"]
    hot = [f for f in features if f["properties"]["measurements"]["contribution"] > 40]
    corners = np.array([corner for feature in hot for corner in feature["geometry"]["coordinates"][0]])
    np.testing.assert_allclose(corners.min(0), (x, y), atol=1)


def test_the_picture_is_red_on_the_object_and_nowhere_else(drawn) -> None:
    out, predictions, (x, y, width, height), _ = drawn
    tile_map = read_tile_map(predictions / "scores" / "s.h5")
    picture = np.asarray(Image.open(out / "s.png").convert("RGB")).astype(int)
    per_px = max(tile_map.size_level0_px) / 1600
    red = (picture[..., 0] - picture[..., 2]) > 60
    rows, columns = np.nonzero(red[: round(tile_map.size_level0_px[1] / per_px)])
    assert np.allclose([columns.min(), rows.min()], np.array([x, y]) / per_px, atol=2)
    assert np.allclose([columns.max() + 1, rows.max() + 1], np.array([x + width, y + height]) / per_px, atol=2)


# ---------------------------------------------------------------- many slides


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """A folder with slides and predictions of them; none was ever extracted."""
    return make_cohort(tmp_path, [f"s{number}" for number in range(5)])


def make_cohort(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (folder / "slides").mkdir(exist_ok=True)
        size = (700 + 50 * (number % 3), 500)
        write_slide(folder / "slides" / f"{name}.tiff", speckled(*size, number), mpp=0.5, compression="deflate", downsamples=(1,))
        write_scores(folder / "predictions" / "scores" / f"{name}.h5", size)
    rows = "".join(f"{name},{name},done,tumour,0.9,tumour\n" for name in names)
    write_text(folder / "predictions" / "predictions.csv", "slide,slide_id,status,label,prob_tumour,prediction\n" + rows)
    return folder


def draw(cohort: Path, out: str = "out", *, config: HeatmapConfig | None = None, **job: object) -> list[str]:
    return draw_heatmaps(cohort / "predictions", cohort / "slides", cohort / out, config=config, job=JobConfig(**job), quiet=True)  # type: ignore[arg-type]


def maps(folder: Path) -> dict[str, bytes]:
    """All that a run left, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".wsimil-output", ".drawn")}


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsimil.heatmaps.draw._IN_READER", "heatmaps.broken_readers:draw_or_break")


def test_how_many_draw_changes_no_byte(cohort: Path) -> None:
    assert draw(cohort, "one", workers=1) == draw(cohort, "three", workers=3) == []
    assert maps(cohort / "one") == maps(cohort / "three")
    assert sorted(maps(cohort / "one")) == sorted(f"s{number}.{suffix}" for number in range(5) for suffix in ("geojson", "png"))


def test_what_was_drawn_from_the_same_is_left_and_all_else_is_drawn_again(cohort: Path) -> None:
    out = cohort / "out"

    def drawn_again(*, config: HeatmapConfig | None = None) -> set[str]:
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
        assert draw(cohort, config=config) == []
        return {path.stem for path in out.glob("*.png") if path.stat().st_mtime_ns != before.get(path.name)}

    assert drawn_again() == {f"s{number}" for number in range(5)}
    as_drawn = maps(out)
    assert drawn_again() == set() and maps(out) == as_drawn
    (out / "s0.png").unlink()
    (out / "s1.geojson").write_bytes(b"cut off")
    (out / ".drawn" / "s2.json").write_bytes(b"{")
    assert drawn_again() == {"s0", "s1", "s2"} and maps(out) == as_drawn
    table = cohort / "predictions" / "predictions.csv"
    table.write_text(table.read_text().replace("s3,s3,done,tumour,0.9", "s3,s3,done,tumour,0.8"))
    write_scores(cohort / "predictions" / "scores" / "s4.h5", (750, 500), values=np.linspace(-1, 1, 35))
    assert drawn_again() == {"s3", "s4"}
    write_slide(cohort / "slides" / "s0.tiff", speckled(700, 500, 9), mpp=0.5, compression="deflate", downsamples=(1,))
    assert drawn_again() == {"s0"}
    assert drawn_again(config=HeatmapConfig(max_side_px=100)) == {f"s{number}" for number in range(5)}


def test_shards_draw_every_slide_once(cohort: Path) -> None:
    for shard in ("1/2", "2/2"):
        assert draw(cohort, shard[0], shard=shard, config=HeatmapConfig(format=("geojson",))) == []
    one, two = maps(cohort / "1"), maps(cohort / "2")
    assert not one.keys() & two.keys() and len(one) + len(two) == 5


def test_slides_that_cannot_be_drawn_are_lines_and_the_others_are_drawn(cohort: Path) -> None:
    (cohort / "slides" / "s0.tiff").unlink()
    (cohort / "slides" / "s1.tiff").write_bytes(b"no slide")
    write_slide(cohort / "slides" / "s2.tiff", speckled(300, 300), mpp=0.5, downsamples=(1,))
    (cohort / "predictions" / "scores" / "s3.h5").write_bytes(b"no scores")
    said: list[str] = []
    wrong = draw_heatmaps(cohort / "predictions", cohort / "slides", cohort / "out", quiet=True, say=said.append)
    assert wrong == said and [line.split(": ")[0] for line in wrong] == ["s0", "s1", "s2", "s3"]
    for line, words in zip(wrong, ("not among the 4 slides", "", "another version of the slide", "s3.h5"), strict=True):
        assert words in line and "\n" not in line
    assert sorted(maps(cohort / "out")) == ["s4.geojson", "s4.png"]


def test_no_map_is_written_over_a_slide_or_a_file_of_somebody_else(tmp_path: Path) -> None:
    cohort = make_cohort(tmp_path, ["s0", "s1"])
    annotation = cohort / "mine" / "s1.geojson"
    write_text(annotation, "{}")
    with pytest.raises(UsageError, match=r"mine/s1\.geojson is there already, and wsimil has not written"):
        draw(cohort, "mine")
    assert annotation.read_text() == "{}" and not (cohort / "mine" / ".wsimil-output").exists()
    picture = cohort / "slides" / "s0.png"
    with Slide(cohort / "slides" / "s0.tiff") as slide:
        Image.fromarray(slide.overview((slide.width, slide.height))).save(picture)
    (cohort / "slides" / "s0.tiff").unlink()
    content = picture.read_bytes()
    mark_output(cohort / "slides")  # even where it wrote before
    with pytest.raises(UsageError, match=r"s0\.png is a slide"):
        draw(cohort, "slides")
    assert picture.read_bytes() == content
    assert draw(cohort, "new") == [] and draw(cohort, "new") == []  # its own maps are drawn anew


def test_another_file_of_the_same_size_is_not_drawn_on(tmp_path: Path) -> None:
    cohort = make_cohort(tmp_path, ["s0"])
    scores = cohort / "predictions" / "scores" / "s0.h5"
    [file] = find_slides(cohort / "slides")
    with h5py.File(scores, "r+") as content:
        content.attrs["slide_fingerprint"] = file.fingerprint()
    assert draw(cohort) == []
    with h5py.File(scores, "r+") as content:
        content.attrs["slide_fingerprint"] = "0" * 64
    (line,) = draw(cohort, config=HeatmapConfig(format=("geojson",)))
    assert "another version of the slide than the one that was predicted" in line


def test_a_slide_that_hangs_or_crashes_a_library_is_a_line(tmp_path: Path, breaking: None) -> None:
    cohort = make_cohort(tmp_path, ["a", "b_crashes", "c_hangs", "d_trips", "e"])
    mark_output(cohort / "out")  # there was an earlier run
    for name in ("b_crashes", "c_hangs", "d_trips"):
        write_text(cohort / "out" / f"{name}.png", "another model's")
    wrong = dict(line.split(": ", 1) for line in draw(cohort, workers=2, read_timeout=4.0))
    assert list(wrong) == ["b_crashes", "c_hangs", "d_trips"]
    assert "SIGSEGV" in wrong["b_crashes"] and "4 s" in wrong["c_hangs"]
    log = cohort / "out" / "logs" / "d_trips.log"
    assert wrong["d_trips"] == f"ZeroDivisionError: in a library (see {log})" and "in slide" in log.read_text()
    shutil.rmtree(log.parent)
    assert sorted(maps(cohort / "out")) == ["a.geojson", "a.png", "e.geojson", "e.png"], "no old map, no half of a new one"


def test_a_full_disk_ends_the_run_with_one_line(tmp_path: Path, breaking: None) -> None:
    cohort = make_cohort(tmp_path, ["a_fills", "b", "c"])
    with pytest.raises(WsimilError, match=r"out: No space left on device: .* make room") as stopped:
        draw(cohort, workers=1)
    assert "\n" not in str(stopped.value)
    assert set(maps(cohort / "out")) <= {"b.png", "b.geojson"}


def test_predictions_without_scores_are_wrong_usage(cohort: Path) -> None:
    shutil.rmtree(cohort / "predictions" / "scores")
    with pytest.raises(UsageError, match="wsimil predict"):
        draw(cohort)


def test_the_command_says_every_reason_and_ends_with_1(cohort: Path, capsys: pytest.CaptureFixture) -> None:
    (cohort / "slides" / "s1.tiff").write_bytes(b"no slide")
    (cohort / "slides" / "s3.tiff").unlink()
    argv = ["heatmap", str(cohort / "predictions"), "--slides", str(cohort / "slides"), "--out", str(cohort / "out")]
    assert main([*argv, "--workers", "1", "--read-timeout", "30", "--shard", "1/1"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert sum(line.startswith("s1: ") for line in lines) == sum(line.startswith("s3: ") for line in lines) == 1
    assert lines[-1].startswith("2 failed: s1, s3 ")


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ctrl_c_ends_readers_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    cohort = make_cohort(tmp_path, ["a", "b_hangs", "c"])
    code = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
from wsimil.cli import main
from wsimil.heatmaps import draw
draw._IN_READER = "heatmaps.broken_readers:draw_or_break"
sys.exit(main(["heatmap", *sys.argv[1:]]))
"""
    options = [str(cohort / "predictions"), "--slides", str(cohort / "slides"), "--out", str(cohort / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    with subprocess.Popen([sys.executable, "-c", code, *options], stderr=subprocess.PIPE, text=True, env=environment) as run:
        deadline = time.monotonic() + 60
        while not (half := list((cohort / "out").glob(".b_hangs.tmp-*"))) and time.monotonic() < deadline:
            time.sleep(0.05)
        reader = re.search(r"-(\d+)-\d+\.png$", half[0].name)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=200)
    assert run.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert reader is not None and not Path("/proc", reader[1]).exists()
    assert {Path(name).suffix for name in maps(cohort / "out")} <= {".png", ".geojson"}
    assert not any(name.startswith(".") for name in maps(cohort / "out"))


def test_readers_that_draw_start_light() -> None:
    code = "import sys, wsimil.heatmaps.draw; print(*[name for name in ('torch', 'pandas', 'matplotlib') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []

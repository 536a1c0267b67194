"""A folder of slides becomes a folder of bags, whatever happens on the way."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import speckled

from wsimil.bags.bag import read_bag, read_header
from wsimil.config import ExtractConfig, TileConfig
from wsimil.encoders import load_encoder
from wsimil.errors import UsageError
from wsimil.extraction import extract_features
from wsimil.slides.slide import Slide
from wsimil.slides.write_tiff import write_slide

TILE = TileConfig(tile_px=64)
FOLDER = "20x_64px_0px_overlap/features_texture"


def statuses(job: Path) -> dict[str, tuple[str, str]]:
    with open(job / "status.csv", newline="") as handle:
        return {row["slide_id"]: (row["status"], row["reason"]) for row in csv.DictReader(handle)}


def test_every_slide_is_a_row_and_every_row_says_why(slides: Path, tmp_path: Path) -> None:
    (slides / "broken.svs").write_bytes(b"not a slide")
    write_slide(slides / "unknown.tiff", speckled(300, 300), mpp=None, compression="deflate", downsamples=(1,))
    extraction = extract_features(slides, tmp_path / "job", tile=TILE, quiet=True)
    rows = statuses(tmp_path / "job")
    assert {name: status for name, (status, _) in rows.items()} == {
        "a": "done",
        "b": "done",
        "glass": "empty",
        "broken": "failed",
        "unknown": "failed",
    }
    assert "--slide-mpp" in rows["unknown"][1]
    assert "no tissue" in rows["glass"][1]
    assert [row.slide_id for row in extraction.failed] == ["broken", "unknown"]


def test_a_bag_holds_what_the_encoder_says_of_each_tile(slides: Path, tmp_path: Path) -> None:
    extract_features(slides, tmp_path / "job", tile=TILE, quiet=True)
    encoder = load_encoder("texture")
    for name, mpp, side in (("a", 0.5, 64), ("b", 0.25, 128)):
        bag = read_bag(tmp_path / "job" / FOLDER / f"{name}.h5")
        assert bag.attributes["mpp"] == pytest.approx(mpp)
        assert bag.attributes["effective_mpp"] == pytest.approx(0.5)
        assert bag.attributes["tile_level0_px"] == side
        with Slide(slides / f"{name}.tiff") as slide:
            for row in (0, len(bag.features) // 2, len(bag.features) - 1):
                x, y = bag.coords_level0_px[row].tolist()
                tile = slide.read_tile(x, y, tile_level0_px=side, tile_px=64)
                with torch.inference_mode():
                    expected = encoder(torch.from_numpy(tile[None].copy()))[0].numpy()
                np.testing.assert_allclose(bag.features[row], expected, atol=2e-3)


def test_an_empty_slide_has_an_empty_bag(slides: Path, tmp_path: Path) -> None:
    extract_features(slides, tmp_path / "job", tile=TILE, quiet=True)
    assert read_bag(tmp_path / "job" / FOLDER / "glass.h5").features.shape == (0, 136)


def test_batch_size_and_workers_change_nothing(slides: Path, tmp_path: Path) -> None:
    for name, config in (("one", ExtractConfig(batch_size=7, workers=1)), ("two", ExtractConfig(batch_size=64, workers=4))):
        extract_features(slides, tmp_path / name, tile=TILE, extract=config, quiet=True)
    one, two = (read_bag(tmp_path / name / FOLDER / "b.h5") for name in ("one", "two"))
    np.testing.assert_array_equal(one.coords_level0_px, two.coords_level0_px)
    np.testing.assert_allclose(one.features, two.features, atol=1e-3)
    assert one.attributes["recipe_hash"] == two.attributes["recipe_hash"]


def test_a_second_run_skips_what_is_done_and_touches_nothing(slides: Path, tmp_path: Path) -> None:
    extract_features(slides, tmp_path / "job", tile=TILE, quiet=True)
    bags = sorted((tmp_path / "job" / FOLDER).glob("*.h5"))
    before = [path.stat().st_mtime_ns for path in bags]
    extract_features(slides, tmp_path / "job", tile=TILE, quiet=True)
    assert {status for status, _ in statuses(tmp_path / "job").values()} == {"skipped"}
    assert [path.stat().st_mtime_ns for path in bags] == before


def test_a_bag_of_another_recipe_is_kept_unless_told(slides: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    extract_features(slides, job, tile=TILE, quiet=True)
    other = TileConfig(tile_px=64, min_tissue=0.9)
    extract_features(slides, job, tile=other, quiet=True)
    assert all(status == "failed" and "--overwrite-stale" in reason for status, reason in statuses(job).values())
    extract_features(slides, job, tile=other, extract=ExtractConfig(overwrite_stale=True), quiet=True)
    assert {status for status, _ in statuses(job).values()} == {"done", "empty"}


def test_a_changed_slide_file_is_noticed(slides: Path, tmp_path: Path) -> None:
    extract_features(slides, tmp_path / "job", tile=TILE, quiet=True)
    write_slide(slides / "a.tiff", speckled(600, 400, 9), mpp=0.5, compression="deflate", downsamples=(1, 4))
    extract_features(slides, tmp_path / "job", tile=TILE, quiet=True)
    rows = statuses(tmp_path / "job")
    assert rows["a"][0] == "failed" and "another version of the slide" in rows["a"][1]
    assert rows["b"][0] == "skipped"


def test_a_damaged_bag_is_made_again(slides: Path, tmp_path: Path) -> None:
    extract_features(slides, tmp_path / "job", tile=TILE, quiet=True)
    path = tmp_path / "job" / FOLDER / "a.h5"
    whole = read_bag(path).features
    path.write_bytes(path.read_bytes()[:5000])
    extract_features(slides, tmp_path / "job", tile=TILE, quiet=True)
    assert statuses(tmp_path / "job")["a"][0] == "done"
    np.testing.assert_array_equal(read_bag(path).features, whole)


def test_a_failed_slide_is_tried_again_when_it_changes_or_when_asked(slides: Path, tmp_path: Path) -> None:
    (slides / "c.svs").write_bytes(b"broken")
    job = tmp_path / "job"
    extract_features(slides, job, tile=TILE, quiet=True)
    extract_features(slides, job, tile=TILE, quiet=True)
    assert "--retry-failed" in statuses(job)["c"][1]
    extract_features(slides, job, tile=TILE, extract=ExtractConfig(retry_failed=True), quiet=True)
    assert "--retry-failed" not in statuses(job)["c"][1]
    write_slide(slides / "c.svs", speckled(300, 300), mpp=0.5, compression="deflate", downsamples=(1,))
    extract_features(slides, job, tile=TILE, quiet=True)
    assert statuses(job)["c"][0] == "done"


def test_shards_share_the_slides_without_gap_or_overlap(slides: Path, tmp_path: Path) -> None:
    done = []
    for shard in ("1/2", "2/2"):
        extraction = extract_features(slides, tmp_path / "job", tile=TILE, extract=ExtractConfig(shard=shard), quiet=True)
        done.append({row.slide_id for row in extraction.rows})
    assert done[0] | done[1] == {"a", "b", "glass"} and not done[0] & done[1]
    assert {status for status, _ in statuses(tmp_path / "job").values()} == {"done", "empty"}


def test_output_inside_the_slide_folder_is_not_taken_for_slides(slides: Path) -> None:
    for _ in range(2):
        extract_features(slides, slides / "job", tile=TILE, quiet=True)
        assert set(statuses(slides / "job")) == {"a", "b", "glass"}


def test_two_slides_of_one_id_are_refused_before_any_work(slides: Path, tmp_path: Path) -> None:
    (slides / "a.svs").write_bytes((slides / "a.tiff").read_bytes())
    with pytest.raises(UsageError, match="slide_id"):
        extract_features(slides, tmp_path / "job", tile=TILE, quiet=True)
    assert not (tmp_path / "job").exists()


def test_no_encoder_no_work(slides: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        extract_features(slides, tmp_path / "job", tile=TILE, extract=ExtractConfig(encoder="no-such-encoder"), quiet=True)
    assert not (tmp_path / "job").exists()


def test_killed_in_the_middle_of_a_slide_it_resumes_and_accepts_no_partial_file(tmp_path: Path) -> None:
    """A real SIGKILL while the second slide is being read; the rerun equals an undisturbed run."""
    slides = tmp_path / "slides"
    slides.mkdir()
    for number in range(3):
        write_slide(slides / f"s{number}.tiff", speckled(2600, 2600, number), mpp=0.5, compression="deflate", downsamples=(1, 4))
    job = tmp_path / "job"
    command = [sys.executable, "-m", "wsimil", "extract", str(slides), "--out", str(job), "--tile-px", "64", "--quiet"]
    process = subprocess.Popen(command)
    folder = job / FOLDER
    deadline = time.monotonic() + 120
    # the next slide's coordinates are there, its bag is not: the process is inside it
    while not (job / "20x_64px_0px_overlap/patches/s1_patches.h5").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path.stem for path in folder.glob("*.h5") if not path.name.startswith(".")}
    assert finished == {"s0"}
    before = (folder / "s0.h5").stat().st_mtime_ns

    assert subprocess.run(command, check=False).returncode == 0
    assert {name: status for name, (status, _) in statuses(job).items()} == {"s0": "skipped", "s1": "done", "s2": "done"}
    assert (folder / "s0.h5").stat().st_mtime_ns == before
    assert not list(job.rglob(".*.tmp-*")), "leftovers of the killed run are swept"
    extract_features(slides, tmp_path / "calm", tile=TILE, quiet=True)
    for number in range(3):
        disturbed, calm = (read_bag(root / FOLDER / f"s{number}.h5") for root in (job, tmp_path / "calm"))
        assert read_header(folder / f"s{number}.h5").attributes["complete"] == 1
        np.testing.assert_array_equal(disturbed.features, calm.features)
        np.testing.assert_array_equal(disturbed.coords_level0_px, calm.coords_level0_px)

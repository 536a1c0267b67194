"""A folder of slides becomes a folder of bags, whatever happens on the way."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import speckled, write_three

from wsimil.bags.bag import read_bag, read_header, read_patches
from wsimil.cli import main
from wsimil.config import ExtractConfig, JobConfig, TileConfig
from wsimil.encoders import load_encoder
from wsimil.encoders.texture import TextureEncoder
from wsimil.errors import UsageError
from wsimil.extraction import extract_features, tile_slides
from wsimil.slides.painting import Scanner, paint_slide
from wsimil.slides.slide import Slide
from wsimil.slides.write_tiff import write_slide

TILE = TileConfig(tile_px=64)
ONE = JobConfig(workers=1)  # a reader takes longer to start than these slides take
FOLDER = "20x_64px_0px_overlap/features_texture"


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job folder of the three slides of `slides`."""
    root = tmp_path_factory.mktemp("extracted")
    extract_features(write_three(root / "slides"), root / "job", tile=TILE, job=ONE, quiet=True)
    return root / "job"


@pytest.fixture
def job(extracted: Path, tmp_path: Path) -> Path:
    """A copy of it, to do anything with."""
    return shutil.copytree(extracted, tmp_path / "job")


def statuses(job: Path) -> dict[str, tuple[str, str]]:
    with open(job / "status.csv", newline="") as handle:
        return {row["slide_id"]: (row["status"], row["reason"]) for row in csv.DictReader(handle)}


def test_every_slide_is_a_row_and_every_row_says_why(slides: Path, tmp_path: Path) -> None:
    (slides / "broken.svs").write_bytes(b"not a slide")
    write_slide(slides / "unknown.tiff", speckled(300, 300), mpp=None, compression="deflate", downsamples=(1,))
    extraction = extract_features(slides, tmp_path / "job", tile=TILE, job=ONE, quiet=True)
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


def test_a_bag_holds_what_the_encoder_says_of_each_tile(slides: Path, extracted: Path) -> None:
    encoder = load_encoder("texture")
    for name, mpp, side in (("a", 0.5, 64), ("b", 0.25, 128)):
        bag = read_bag(extracted / FOLDER / f"{name}.h5")
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


def test_an_empty_slide_has_an_empty_bag(extracted: Path) -> None:
    assert read_bag(extracted / FOLDER / "glass.h5").features.shape == (0, 136)


def test_batch_size_and_workers_change_nothing(slides: Path, tmp_path: Path) -> None:
    for name, batch_size, workers in (("one", 7, 1), ("two", 64, 4)):
        config, job = ExtractConfig(batch_size=batch_size), JobConfig(workers=workers)
        extract_features(slides, tmp_path / name, tile=TILE, extract=config, job=job, quiet=True)
    one, two = (read_bag(tmp_path / name / FOLDER / "b.h5") for name in ("one", "two"))
    np.testing.assert_array_equal(one.coords_level0_px, two.coords_level0_px)
    np.testing.assert_allclose(one.features, two.features, atol=1e-3)
    assert one.attributes["recipe_hash"] == two.attributes["recipe_hash"]


def damage(path: Path, blocks: list[int]) -> None:
    """Zero the compressed bytes of blocks of the finest level."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        places = [(page.dataoffsets[block], page.databytecounts[block]) for block in blocks]
    with open(path, "r+b") as file:
        for offset, count in places:
            file.seek(offset)
            file.write(bytes(count))


def checkered(folder: Path) -> Path:
    """A slide of 20 × 20 tiles, each a block of the file."""
    folder.mkdir()
    write_slide(folder / "s.tiff", speckled(1280, 1280), mpp=0.5, compression="deflate", downsamples=(1, 4), tile_px=64)
    return folder / "s.tiff"


def test_tiles_that_cannot_be_read_are_marked_and_named(tmp_path: Path) -> None:
    path, job = checkered(tmp_path / "slides"), tmp_path / "job"
    damage(path, [3, 77, 200, 399])
    extract_features(path.parent, job, tile=TileConfig(tile_px=64, tissue="none"), job=ONE, quiet=True)
    status, reason = statuses(job)["s"]
    assert status == "done" and reason.startswith("4 tiles cannot be read") and "ZIPDecode" in reason
    bag = read_bag(job / FOLDER / "s.h5")
    assert np.flatnonzero(~bag.valid).tolist() == [3, 77, 200, 399] and bag.attributes["n_invalid"] == 4
    assert not bag.features[~bag.valid].any() and bag.features[bag.valid].any(axis=1).all()
    assert np.isnan(bag.qc["blur"][~bag.valid]).all() and np.isfinite(bag.qc["blur"][bag.valid]).all()
    log = (job / "logs" / "s.log").read_text()
    assert all(f"tile {row} at " in log for row in (3, 77, 200, 399))


def test_more_than_one_in_a_hundred_unreadable_tiles_fail_the_slide(tmp_path: Path) -> None:
    path, job = checkered(tmp_path / "slides"), tmp_path / "job"
    damage(path, [0, 1, 2, 3, 4])
    extract_features(path.parent, job, tile=TileConfig(tile_px=64, tissue="none"), job=ONE, quiet=True)
    status, reason = statuses(job)["s"]
    assert status == "failed" and "5 of 400 tiles cannot be read, more than 1%" in reason and "ZIPDecode" in reason
    assert not (job / FOLDER / "s.h5").exists()
    extract_features(path.parent, job, tile=TileConfig(tile_px=64, tissue="none"), job=ONE, quiet=True)
    assert "--retry-failed" in statuses(job)["s"][1], "it is the slide's own fault and remembered"


def test_several_encoders_share_a_pass_and_give_what_each_gives_alone(slides: Path, tmp_path: Path) -> None:
    names = ("texture", "random:test_vit:3")
    both = extract_features(slides, tmp_path / "both", tile=TILE, extract=ExtractConfig(encoder=names), job=ONE, quiet=True)
    for name, folder in zip(names, both.features_folders, strict=True):
        alone = extract_features(slides, tmp_path / "alone", tile=TILE, extract=ExtractConfig(encoder=(name,)), job=ONE, quiet=True)
        for slide_id in ("a", "b", "glass"):
            one, other = read_bag(folder / f"{slide_id}.h5"), read_bag(alone.features_folders[0] / f"{slide_id}.h5")
            np.testing.assert_array_equal(one.coords_level0_px, other.coords_level0_px)
            np.testing.assert_allclose(one.features, other.features, atol=2e-3, rtol=2e-3)
            assert one.attributes["recipe_hash"] == other.attributes["recipe_hash"]


def test_a_missing_bag_of_one_encoder_is_made_and_the_others_are_left(slides: Path, tmp_path: Path) -> None:
    config = ExtractConfig(encoder=("texture", "random:test_vit:3"))
    texture, vit = extract_features(slides, tmp_path / "job", tile=TILE, extract=config, job=ONE, quiet=True).features_folders
    before = (texture / "a.h5").stat().st_mtime_ns
    (vit / "a.h5").unlink()
    extract_features(slides, tmp_path / "job", tile=TILE, extract=config, job=ONE, quiet=True)
    assert (vit / "a.h5").exists() and (texture / "a.h5").stat().st_mtime_ns == before
    assert {name: status for name, (status, _) in statuses(tmp_path / "job").items()} == {
        "a": "done",
        "b": "skipped",
        "glass": "skipped",
    }


def test_the_manifest_tells_runs_slides_and_counts(slides: Path, tmp_path: Path) -> None:
    for _ in range(2):
        extract_features(slides, tmp_path / "job", tile=TILE, job=ONE, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "job/logs/manifest.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["event"] != "remark"]
    assert [line["event"] for line in lines] == ["start", *["slide"] * 3, "end"] * 2
    assert len({line["run"] for line in lines}) == 2
    assert lines[4]["counts"] == {"done": 2, "empty": 1, "failed": 0, "skipped": 0} and lines[9]["counts"]["skipped"] == 3
    assert lines[0]["packages"]["wsimil"] and lines[0]["request"]["tile"]["tile_px"] == 64


def test_a_second_run_skips_what_is_done_and_touches_nothing(slides: Path, job: Path) -> None:
    bags = sorted((job / FOLDER).glob("*.h5"))
    before = [path.stat().st_mtime_ns for path in bags]
    extract_features(slides, job, tile=TILE, job=ONE, quiet=True)
    assert {status for status, _ in statuses(job).values()} == {"skipped"}
    assert [path.stat().st_mtime_ns for path in bags] == before


def test_a_bag_of_another_recipe_is_kept_unless_told(slides: Path, job: Path) -> None:
    other = TileConfig(tile_px=64, min_tissue=0.9)
    extract_features(slides, job, tile=other, job=ONE, quiet=True)
    assert all(status == "failed" and "--overwrite-stale" in reason for status, reason in statuses(job).values())
    extract_features(slides, job, tile=other, extract=ExtractConfig(overwrite_stale=True), job=ONE, quiet=True)
    assert {status for status, _ in statuses(job).values()} == {"done", "empty"}


def test_patches_are_not_replaced_below_a_bag_that_was_made_of_them(slides: Path, job: Path) -> None:
    patches = {path: path.read_bytes() for path in job.rglob("*_patches.h5")}
    other = TileConfig(tile_px=64, min_tissue=0.9)
    rows = {row.slide_id: row for row in tile_slides(slides, job, config=other, job=ONE, quiet=True)}
    refused = [row for row in rows.values() if row.status == "failed"]
    assert refused and all("features_texture/" in row.reason and "--overwrite-stale" in row.reason for row in refused)
    assert {path: path.read_bytes() for path in patches} == patches
    again = extract_features(slides, job, tile=other, extract=ExtractConfig(overwrite_stale=True), job=ONE, quiet=True)
    assert not again.failed
    for row in again.rows:
        assert np.array_equal(
            read_bag(job / FOLDER / f"{row.slide_id}.h5").coords_level0_px,
            read_patches(job / f"20x_64px_0px_overlap/patches/{row.slide_id}_patches.h5")[0],
        )


def test_pictures_that_somebody_removed_come_back(slides: Path, job: Path) -> None:
    bags = {path: path.read_bytes() for path in job.rglob("features_*/*.h5")}
    pictures = {path: path.read_bytes() for folder in ("overviews", "tissue") for path in (job / folder).iterdir()}
    for path in pictures:
        path.unlink()
    assert not [row for row in tile_slides(slides, job, config=TILE, job=ONE, quiet=True) if row.status == "failed"]
    assert {path: path.read_bytes() for path in pictures} == pictures
    assert {path: path.read_bytes() for path in bags} == bags


def test_an_id_too_long_for_a_file_name_is_a_row(slides: Path, tmp_path: Path) -> None:
    deep = slides / ("d" * 120) / ("e" * 120) / "f.tiff"
    deep.parent.mkdir(parents=True)
    shutil.copy(next(slides.glob("*.tiff")), deep)
    rows = tile_slides(slides, tmp_path / "job", config=TILE, job=ONE, quiet=True)
    (failed,) = [row for row in rows if row.status == "failed"]
    assert "slide_id column" in failed.reason and len(rows) == 4
    assert len(statuses(tmp_path / "job")) == 4


def test_a_file_where_the_job_folder_should_be(slides: Path, tmp_path: Path) -> None:
    (tmp_path / "job").touch()
    for out in (tmp_path / "job", tmp_path / "job/below"):
        assert main(["tile", str(slides), "--out", str(out), "--tile-px", "64", "--quiet"]) == 2


def test_a_changed_slide_file_is_noticed(slides: Path, job: Path) -> None:
    write_slide(slides / "a.tiff", speckled(600, 400, 9), mpp=0.5, compression="deflate", downsamples=(1, 4))
    extract_features(slides, job, tile=TILE, job=ONE, quiet=True)
    rows = statuses(job)
    assert rows["a"][0] == "failed" and "another version of the slide" in rows["a"][1]
    assert rows["b"][0] == "skipped"


def test_a_damaged_bag_is_made_again(slides: Path, job: Path) -> None:
    path = job / FOLDER / "a.h5"
    whole = read_bag(path).features
    path.write_bytes(path.read_bytes()[:5000])
    extract_features(slides, job, tile=TILE, job=ONE, quiet=True)
    assert statuses(job)["a"][0] == "done"
    np.testing.assert_array_equal(read_bag(path).features, whole)


def test_a_failed_slide_is_tried_again_when_it_changes_or_when_asked(slides: Path, tmp_path: Path) -> None:
    (slides / "c.svs").write_bytes(b"broken")
    job = tmp_path / "job"
    extract_features(slides, job, tile=TILE, job=ONE, quiet=True)
    extract_features(slides, job, tile=TILE, job=ONE, quiet=True)
    assert "--retry-failed" in statuses(job)["c"][1]
    extract_features(slides, job, tile=TILE, job=JobConfig(retry_failed=True), quiet=True)
    assert "--retry-failed" not in statuses(job)["c"][1]
    write_slide(slides / "c.svs", speckled(300, 300), mpp=0.5, compression="deflate", downsamples=(1,))
    extract_features(slides, job, tile=TILE, job=ONE, quiet=True)
    assert statuses(job)["c"][0] == "done"


def test_shards_share_the_slides_without_gap_or_overlap(slides: Path, tmp_path: Path) -> None:
    done = []
    for shard in ("1/2", "2/2"):
        extraction = extract_features(slides, tmp_path / "job", tile=TILE, job=JobConfig(shard=shard), quiet=True)
        done.append({row.slide_id for row in extraction.rows})
    assert done[0] | done[1] == {"a", "b", "glass"} and not done[0] & done[1]
    assert {status for status, _ in statuses(tmp_path / "job").values()} == {"done", "empty"}


def test_output_inside_the_slide_folder_is_not_taken_for_slides(slides: Path) -> None:
    for _ in range(2):
        extract_features(slides, slides / "job", tile=TILE, job=ONE, quiet=True)
        assert set(statuses(slides / "job")) == {"a", "b", "glass"}


def test_two_slides_of_one_id_are_refused_before_any_work(slides: Path, tmp_path: Path) -> None:
    (slides / "a.svs").write_bytes((slides / "a.tiff").read_bytes())
    with pytest.raises(UsageError, match="slide_id"):
        extract_features(slides, tmp_path / "job", tile=TILE, job=ONE, quiet=True)
    assert not (tmp_path / "job").exists()


def test_no_encoder_no_work(slides: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        extract_features(
            slides, tmp_path / "job", tile=TILE, extract=ExtractConfig(encoder=("no-such-encoder",)), job=ONE, quiet=True
        )
    assert not (tmp_path / "job").exists()


def test_killed_in_the_middle_of_a_slide_it_resumes_and_accepts_no_partial_file(tmp_path: Path) -> None:
    """A real SIGKILL when the first bag appears; the rerun equals an undisturbed run."""
    slides = tmp_path / "slides"
    slides.mkdir()
    names = [f"s{number}" for number in range(4)]
    for number, name in enumerate(names):
        write_slide(slides / f"{name}.tiff", speckled(1700, 1700, number), mpp=0.5, compression="deflate", downsamples=(1, 4))
    job = tmp_path / "job"
    command = [sys.executable, "-m", "wsimil", "extract", str(slides), "--out", str(job), "--tile-px", "64", "--quiet"]
    process = subprocess.Popen([*command, "--workers", "1"])
    folder = job / FOLDER
    deadline = time.monotonic() + 120
    while not list(folder.glob("s*.h5")):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.stem: path.stat().st_mtime_ns for path in folder.glob("s*.h5")}
    assert 0 < len(before) < len(names), "it was killed in the middle"

    assert main(command[3:]) == 0
    assert {name: status for name, (status, _) in statuses(job).items()} == {
        name: "skipped" if name in before else "done" for name in names
    }
    assert all((folder / f"{name}.h5").stat().st_mtime_ns == time_ns for name, time_ns in before.items())
    assert not list(job.rglob(".*.tmp-*")), "leftovers of the killed run are swept"
    extract_features(slides, tmp_path / "calm", tile=TILE, job=ONE, quiet=True)
    for name in names:
        disturbed, calm = (read_bag(root / FOLDER / f"{name}.h5") for root in (job, tmp_path / "calm"))
        assert read_header(folder / f"{name}.h5").attributes["complete"] == 1
        np.testing.assert_array_equal(disturbed.features, calm.features)
        np.testing.assert_array_equal(disturbed.coords_level0_px, calm.coords_level0_px)


def test_stain_normalisation_is_of_the_recipe_and_brings_slides_together(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    for name, seed in (("a", 1), ("b", 1)):
        scanner = Scanner() if name == "a" else Scanner(contrast=1.2, glass=(225, 235, 228))
        painted = paint_slide(900, 700, mpp=0.5, seed=seed, scanner=scanner)
        write_slide(slides / f"{name}.tiff", painted.rgb, mpp=0.5, compression="deflate", downsamples=(1,))
    bags = {}
    for stain in ("none", "macenko", "reinhard"):
        job = tmp_path / stain
        extract_features(slides, job, tile=TILE, extract=ExtractConfig(stain=stain), job=ONE, quiet=True)
        bags[stain] = [read_bag(job / FOLDER / f"{name}.h5") for name in ("a", "b")]
    assert len({bag.attributes["recipe_hash"] for (bag, _) in bags.values()}) == 3

    def apart(stain: str) -> float:
        a, b = (bag.features.astype(float).mean(0) for bag in bags[stain])
        return float(np.abs(a - b).mean())

    assert apart("macenko") < apart("none") and apart("reinhard") < apart("none")


def test_a_batch_too_large_for_the_gpu_is_encoded_in_halves(
    slides: Path, tmp_path: Path, extracted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, sizes = TextureEncoder.forward, []

    def small(self: TextureEncoder, tiles: torch.Tensor) -> torch.Tensor:
        sizes.append(len(tiles))
        if len(tiles) > 13:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(self, tiles)

    monkeypatch.setattr(TextureEncoder, "forward", small)
    extraction = extract_features(slides, tmp_path / "halves", tile=TILE, job=ONE, quiet=True)
    assert not extraction.failed and sizes[:3] == [64, 32, 16] and sum(size > 13 for size in sizes) == 3, sizes
    for name in ("a", "b"):
        whole, halves = (read_bag(root / FOLDER / f"{name}.h5") for root in (extracted, tmp_path / "halves"))
        np.testing.assert_allclose(halves.features, whole.features, atol=1e-2)
        assert halves.valid.all()

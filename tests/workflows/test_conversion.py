"""Bags change layouts without changing values; what cannot be converted is a row with a reason, what is done is not done again."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from foreign_bags import MPP, SIDE, SIZE, WRITERS, one_bag, write_clam, write_slideflow, write_stamp, write_torchmil
from toy_bags import write_cohort

from wsimil.bags.bag import Bag, Geometry, read_bag, write_bag
from wsimil.bags.dataset import BagFolder
from wsimil.cli import main
from wsimil.config import ConvertConfig
from wsimil.conversion import WRITERS as LAYOUTS_WRITTEN
from wsimil.conversion import convert_bags
from wsimil.errors import BagFormatError, SlideScaleUnknownError, UsageError
from wsimil.heatmaps.tile_map import TileMap
from wsimil.slides.write_tiff import write_slide


def ours(folder: Path, *, dtype: type = np.float16, **changes: object) -> Path:
    """One bag of ours at an awkward scale, with rows that are not valid."""
    draw = np.random.default_rng(0)
    attributes: dict[str, object] = {"slide_id": "b__a", "encoder": "uni", "encoder_sha256": "ab", "slide_fingerprint": "f"}
    attributes |= {"mpp": 0.2527, "mpp_source": "aperio.MPP", "tile_px": 224, "tile_level0_px": 443.2133, "overlap_px": 0}
    attributes |= {"target_mpp": 0.5, "effective_mpp": 0.5, "level0_width": 180_000, "level0_height": 90_000, "encoder_mpp": 0.5}
    attributes |= {"encoder_mean": [0.1, 0.2, 0.3]} | changes
    corners = np.array([91_234, 3]) + np.floor(443.2133 * np.stack(np.divmod(np.arange(60), 9), 1) + 0.5)
    bag = Bag(draw.normal(size=(60, 5)).astype(dtype), corners.astype(np.int64), np.arange(60) % 7 > 0, {}, attributes)
    write_bag(folder / "features_uni" / "b__a.h5", bag, Geometry(224, 443.2133, 0, 180_000, 90_000, 0.2527, 0.5, "b__a"))
    return folder


def the_only(folder: Path) -> Bag:
    (path,) = folder.glob("features_*/*.h5")
    return read_bag(path)


def test_two_bags_of_one_slide_are_not_written_onto_one_file(tmp_path):
    job = ours(tmp_path / "job")
    shutil.copy(job / "features_uni" / "b__a.h5", job / "features_uni" / "copy.h5")
    first, second = convert_bags(job, tmp_path / "clam", config=ConvertConfig(to="clam"), quiet=True)
    assert (first.status, second.status) == ("done", "failed")
    assert "b__a.h5 and copy.h5 are both of slide b__a" in second.reason


@pytest.mark.parametrize("slide_id", ["../../evil", "/tmp/evil", "a\\b", ".hidden", "a\nb"])
def test_an_id_that_is_a_path_is_refused(tmp_path, slide_id):
    job = ours(tmp_path / "job", slide_id=slide_id)
    with pytest.raises(BagFormatError, match="cannot be a file name"):
        BagFolder(job)
    for to in LAYOUTS_WRITTEN:
        (row,) = convert_bags(job, tmp_path / "deep" / "er" / to, config=ConvertConfig(to=to), quiet=True)
        assert row.status == "failed" and "cannot be a file name" in row.reason
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("to", LAYOUTS_WRITTEN)
def test_there_and_back_nothing_changes(tmp_path, to, dtype):
    first = the_only(ours(tmp_path / "job", dtype=dtype))
    (row,) = convert_bags(tmp_path / "job", tmp_path / to, config=ConvertConfig(to=to), quiet=True)
    assert row.status == "done"
    convert_bags(tmp_path / to, tmp_path / "back", quiet=True)
    back = the_only(tmp_path / "back")
    kept = first.valid if to != "wsimil" else slice(None)
    assert np.array_equal(back.features, first.features[kept])
    assert back.features.dtype == (dtype if to in ("wsimil", "stamp") else np.float32)
    assert np.array_equal(back.coords_level0_px, first.coords_level0_px[kept])
    said = {name: value for name, value in back.attributes.items() if name not in ("n_invalid", "source_layout")}
    assert said == {name: value for name, value in first.attributes.items() if name != "n_invalid"}


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_becomes_ours(tmp_path, layout):
    for slide_id in "ab":
        WRITERS[layout](tmp_path / "theirs", slide_id)
    config = ConvertConfig(slide_mpp=MPP, encoder=None if layout == "atlaspatch" else "uni_v2")
    said: list[str] = []
    rows = convert_bags(tmp_path / "theirs", tmp_path / "job", config=config, quiet=True, say=said.append)
    assert [(row.slide_id, row.status, row.n_tiles) for row in rows] == [("a", "done", 40), ("b", "done", 40)], rows
    for slide_id in "ab":
        features, coords = one_bag(slide_id, dtype=np.float16 if layout == "stamp" else np.float32)
        bag = read_bag(tmp_path / "job" / "features_uni_v2" / f"{slide_id}.h5")
        assert np.array_equal(bag.features, features) and bag.features.dtype == features.dtype
        assert np.array_equal(bag.coords_level0_px, coords) and bag.coords_level0_px.dtype == np.int64
        assert (bag.attributes["mpp"], bag.attributes["tile_level0_px"], bag.attributes["encoder"]) == (MPP, SIDE, "uni_v2")
    inferred = layout in ("torchmil",)
    assert any("taken to be" in line for line in said) == inferred


# ---------------------------------------------------------------- what others' readers look for


def test_clam_finds_what_it_looks_for(tmp_path):
    bag = the_only(ours(tmp_path / "job"))
    convert_bags(tmp_path / "job", tmp_path / "clam", config=ConvertConfig(to="clam"), quiet=True)
    tensor = torch.load(tmp_path / "clam" / "pt_files" / "b__a.pt", weights_only=True)
    with h5py.File(tmp_path / "clam" / "h5_files" / "b__a.h5") as content:
        assert (content["features"].dtype, content["coords"].dtype) == (np.float32, np.int32)
        assert np.array_equal(content["features"][:], tensor.numpy()) and np.array_equal(tensor.numpy(), bag.features[bag.valid])
    with h5py.File(tmp_path / "clam" / "patches" / "b__a.h5") as content:
        stated = dict(content["coords"].attrs)
    assert (stated["patch_size"], stated["patch_level"], list(stated["level_dim"])) == (443, 0, [180_000, 90_000])


def test_stamp_finds_what_it_looks_for(tmp_path):
    bag = the_only(ours(tmp_path / "job"))
    convert_bags(tmp_path / "job", tmp_path / "stamp", config=ConvertConfig(to="stamp"), quiet=True)
    with h5py.File(tmp_path / "stamp" / "b__a.h5") as content:
        assert content["feats"].dtype == np.float16 and content["coords"].dtype == np.float32
        np.testing.assert_allclose(content["coords"][:], bag.coords_level0_px[bag.valid] * 0.2527, atol=0.01)
        stated = dict(content.attrs)
    assert stated["unit"] == "um" and stated["feat_type"] == "tile" and stated["tile_size_px"] == 224
    assert stated["tile_size_um"] == pytest.approx(112, rel=1e-4) and stated["extractor"] == "uni"
    assert "encoder" not in stated  # STAMP takes files that have it for features of whole slides


def test_torchmil_gets_neighbours_at_distance_one(tmp_path):
    bag = the_only(ours(tmp_path / "job"))
    convert_bags(tmp_path / "job", tmp_path / "t", config=ConvertConfig(to="torchmil"), quiet=True)
    grid = np.load(tmp_path / "t" / "coords" / "b__a.npy")
    expected = np.stack(np.divmod(np.arange(60), 9), 1)[bag.valid]
    assert np.array_equal(grid, expected - expected.min(0))
    assert np.load(tmp_path / "t" / "features" / "b__a.npy").dtype == np.float32


def test_rows_that_are_not_valid_are_left_out_and_counted(tmp_path):
    said: list[str] = []
    ours(tmp_path / "job")
    rows = convert_bags(tmp_path / "job", tmp_path / "c", config=ConvertConfig(to="clam"), quiet=True, say=said.append)
    assert "9 tiles that are not valid are left out" in rows[0].reason and any("9 tiles" in line for line in said)


# ---------------------------------------------------------------- what is not known


def test_micrometres_need_the_slides_scale_and_slides_say_it(tmp_path):
    for slide_id in "ab":
        write_stamp(tmp_path / "stamp", slide_id)
    rows = convert_bags(tmp_path / "stamp", tmp_path / "job", quiet=True)
    assert {row.status for row in rows} == {"failed"} and all("--slide-mpp or --slides" in row.reason for row in rows)
    assert not list((tmp_path / "job").glob("features_*"))
    (tmp_path / "slides").mkdir()
    for slide_id, mpp in (("a", 0.25), ("b", 0.5)):
        write_slide(tmp_path / "slides" / f"{slide_id}.tiff", np.full((64, 64, 3), 200, np.uint8), mpp=mpp, compression="deflate")
    rows = convert_bags(tmp_path / "stamp", tmp_path / "job", slides=tmp_path / "slides", quiet=True)
    assert [row.status for row in rows] == ["done", "done"]
    for slide_id, mpp in (("a", 0.25), ("b", 0.5)):
        bag = read_bag(tmp_path / "job" / "features_uni_v2" / f"{slide_id}.h5")
        assert bag.attributes["mpp"] == pytest.approx(mpp)
        assert np.array_equal(bag.coords_level0_px, np.rint(one_bag(slide_id)[1] * MPP / mpp))


def test_a_grid_of_unknown_width_is_refused_and_a_number_mends_it(tmp_path):
    write_torchmil(tmp_path / "t", "a", grid=True)
    (row,) = convert_bags(tmp_path / "t", tmp_path / "job", quiet=True)
    assert row.status == "failed" and "--tile-level0-px" in row.reason
    (row,) = convert_bags(tmp_path / "t", tmp_path / "job", config=ConvertConfig(tile_level0_px=SIDE), quiet=True)
    assert row.status == "done" and "where it begins" in row.reason
    coords = one_bag("a")[1]
    assert np.array_equal(the_only(tmp_path / "job").coords_level0_px, coords - coords.min(0))


def test_features_without_coordinates_are_converted_and_stay_without(tmp_path):
    write_slideflow(tmp_path / "s", "a")
    (tmp_path / "s" / "a.index.npz").unlink()
    (row,) = convert_bags(tmp_path / "s", tmp_path / "job", config=ConvertConfig(slide_mpp=MPP, tile_level0_px=SIDE), quiet=True)
    assert row.status == "done" and "heatmaps are not possible" in row.reason
    assert BagFolder(tmp_path / "job").load("a").coords_um is None
    statuses = {}
    for to in ("clam", "torchmil", "stamp"):
        (row,) = convert_bags(tmp_path / "job", tmp_path / to, config=ConvertConfig(to=to), quiet=True)
        statuses[to] = row.status
        if row.status == "done":
            (again,) = convert_bags(tmp_path / "job", tmp_path / to, config=ConvertConfig(to=to), quiet=True)
            assert again.status == "skipped" and "positions are not known" in row.reason
    assert statuses == {"clam": "done", "torchmil": "done", "stamp": "failed"}
    for to in ("clam", "torchmil"):
        np.testing.assert_array_equal(BagFolder(tmp_path / to).load("a").features, one_bag("a")[0])
    assert not (tmp_path / "clam" / "h5_files").exists() and not (tmp_path / "torchmil" / "coords").exists()


@pytest.mark.parametrize("to", LAYOUTS_WRITTEN)
def test_micrometres_are_never_passed_off_as_pixels(tmp_path, to):
    write_stamp(tmp_path / "theirs", "a")
    (row,) = convert_bags(tmp_path / "theirs", tmp_path / to, config=ConvertConfig(to=to), quiet=True)
    assert row.status == "failed" and not [path for path in (tmp_path / to).rglob("a*")]


def test_stamp_is_not_written_without_a_scale(tmp_path):
    write_clam(tmp_path / "clam", "a")
    (row,) = convert_bags(tmp_path / "clam", tmp_path / "stamp", config=ConvertConfig(to="stamp"), quiet=True)
    assert row.status == "failed" and "mpp" in row.reason and not list((tmp_path / "stamp").glob("*.h5"))


# ---------------------------------------------------------------- running


def test_a_bad_file_is_a_row_and_the_others_are_done(tmp_path, capsys):
    for slide_id in "abc":
        write_clam(tmp_path / "clam", slide_id)
    (tmp_path / "clam" / "h5_files" / "b.h5").write_bytes(b"no")
    assert main(["convert", str(tmp_path / "clam"), "--out", str(tmp_path / "job"), "--quiet"]) == 1
    assert "1 failed: b (reasons:" in capsys.readouterr().err.splitlines()[-1]
    with open(tmp_path / "job" / "convert.csv", newline="") as handle:
        rows = {row["slide_id"]: row for row in csv.DictReader(handle)}
    assert [rows[name]["status"] for name in "abc"] == ["done", "failed", "done"] and "b.h5" in rows["b"]["reason"]
    write_clam(tmp_path / "clam", "b")
    assert main(["convert", str(tmp_path / "clam"), "--out", str(tmp_path / "job"), "--quiet", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert counts == {"done": 1, "empty": 0, "failed": 0, "skipped": 2}


def test_the_command_says_why_and_what_is_odd(tmp_path, capsys):
    for slide_id in "abc":
        write_clam(tmp_path / "clam", slide_id)
    assert main(["convert", str(tmp_path / "clam"), "--out", str(tmp_path / "stamp"), "--to", "stamp", "--quiet"]) == 1
    why, last = capsys.readouterr().err.splitlines()[-2:]
    assert why.startswith("  3 × STAMP wants") and "--slide-mpp" in why and last.startswith("3 failed: a, b, c (reasons:")
    with h5py.File(tmp_path / "clam" / "h5_files" / "b.h5", "r+") as file:
        features = file["features"][:]
        features[2, 1] = np.nan
        del file["features"]
        file["features"] = np.tile(features, 2)
    assert main(["convert", str(tmp_path / "clam"), "--out", str(tmp_path / "job")]) == 0
    said = capsys.readouterr().err
    assert "1 of 3 bags: NaN or infinity in features" in said and "features of several widths" in said


def test_what_changed_or_is_gone_is_done_again(tmp_path):
    def statuses(**settings: float) -> str:
        rows = convert_bags(tmp_path / "clam", tmp_path / "job", config=ConvertConfig(**settings), quiet=True)
        return " ".join(row.status for row in rows)

    for slide_id in "ab":
        write_clam(tmp_path / "clam", slide_id)
    assert [statuses(), statuses()] == ["done done", "skipped skipped"]
    (tmp_path / "job" / "features_unknown" / "a.h5").unlink()
    assert statuses() == "done skipped"
    with h5py.File(tmp_path / "clam" / "h5_files" / "b.h5", "r+") as content:
        content["features"][0] = 9
    assert statuses() == "skipped done"
    assert [statuses(slide_mpp=0.25), statuses(slide_mpp=0.25)] == ["done done", "skipped skipped"]


def test_an_interrupted_conversion_leaves_whole_files_and_goes_on(tmp_path, monkeypatch):
    write_cohort(tmp_path / "toy", n_slides=5)
    clam = LAYOUTS_WRITTEN["clam"]
    written: list[str] = []

    class Interrupted:
        name, files = clam.name, staticmethod(clam.files)

        def write(self, out: Path, bag: Bag) -> list[str]:
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(str(bag.attributes["slide_id"]))
            return clam.write(out, bag)

    monkeypatch.setitem(LAYOUTS_WRITTEN, "clam", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        convert_bags(tmp_path / "toy", tmp_path / "c", config=ConvertConfig(to="clam"), quiet=True)
    monkeypatch.undo()
    rows = convert_bags(tmp_path / "toy", tmp_path / "c", config=ConvertConfig(to="clam"), quiet=True)
    assert [row.status for row in rows] == ["skipped"] * 2 + ["done"] * 3


def test_bags_are_never_written_over_themselves(tmp_path):
    write_clam(tmp_path / "clam", "a")
    for out in (tmp_path / "clam", tmp_path / "clam" / "h5_files"):
        with pytest.raises(UsageError, match="the bags lie there themselves"):
            convert_bags(tmp_path / "clam", out, config=ConvertConfig(to="clam"), quiet=True)
    with pytest.raises(UsageError, match="no bag of layout slideflow"):
        convert_bags(tmp_path / "clam", tmp_path / "x", config=ConvertConfig(layout="slideflow"), quiet=True)


# ---------------------------------------------------------------- working on them directly


def test_a_map_takes_from_the_slide_only_what_it_does_not_know():
    def tile_map(unit: str, size: tuple[int, int], bounds: tuple[int, int] | None = (0, 0)) -> TileMap:
        return TileMap("s", np.ones(2, np.float32), np.array([[0, 64], [32, 96]]), 32.0, "attention", "", size, bounds, unit)

    known = tile_map("px", SIZE)
    assert known.complete and known.on(None, (5, 5), (7, 7)) is known
    assert tile_map("px", (0, 0)).on(None, SIZE, (7, 7)).size_level0_px == SIZE
    assert tile_map("px", (0, 0)).on(None, SIZE, (7, 7)).bounds == (0, 0)
    # the corner of what was scanned: QuPath counts from there
    assert not tile_map("px", SIZE, None).complete and tile_map("px", SIZE, None).on(None, SIZE, (1003, 607)).bounds == (1003, 607)
    placed = tile_map("um", (0, 0), None).on(0.5, SIZE, (10, 20))
    assert placed.bounds == (10, 20)
    assert (placed.tile_level0_px, placed.size_level0_px, placed.coords_level0_px.tolist()) == (64, SIZE, [[0, 128], [64, 192]])
    with pytest.raises(SlideScaleUnknownError, match="no µm/px"):
        tile_map("um", (0, 0)).on(None, SIZE, (0, 0))


def test_from_a_foreign_folder_to_heatmaps(tmp_path, capsys):
    """What a user of STAMP types: their folder, their labels, maps on the slides."""
    (tmp_path / "slides").mkdir()
    names = [f"s{number:02}" for number in range(8)]
    for number, name in enumerate(names):
        write_stamp(tmp_path / "stamp", name)
        with h5py.File(tmp_path / "stamp" / f"{name}.h5", "r+") as content:
            content["feats"][:5, 0] += 12 * (number % 2)
            content["coords"][:] = np.stack(np.divmod(np.arange(40), 8), 1) * np.float32(SIDE * MPP)
    pixels = np.random.default_rng(0).integers(100, 200, (260, 260, 3)).astype(np.uint8)
    write_slide(tmp_path / "slides" / "s01.tiff", pixels, mpp=4.0, compression="deflate")
    (tmp_path / "labels.csv").write_text("\n".join(["slide,label", *(f"{name},{int(name[1:]) % 2}" for name in names)]) + "\n")
    run = ["--epochs", "1", "--folds", "2", "--aggregator", "gated_abmil", "--device", "cpu"]
    bags, out = str(tmp_path / "stamp"), tmp_path
    assert main(["train", bags, "--labels", str(tmp_path / "labels.csv"), "--out", str(out / "run"), *run]) == 0
    assert "8 of 8 bags: positions are in µm" in capsys.readouterr().err
    assert main(["predict", bags, "--model", str(out / "run"), "--out", str(out / "p"), "--device", "cpu", "--quiet"]) == 0
    slides = ["--slides", str(tmp_path / "slides")]
    argv = ["heatmap", str(out / "p"), *slides, "--out", str(out / "h"), "--format", "geojson", "--quiet"]
    assert main(argv) == 1  # seven of the slides are not there
    tiles = json.loads((out / "h" / "s01.geojson").read_text())["features"]
    corners = [point for tile in tiles for point in tile["geometry"]["coordinates"][0]]
    # 5 x 8 tiles of 128 µm on a slide of 4 µm/px
    assert np.max(corners, axis=0).tolist() == [5 * 32, 8 * 32] and np.min(corners) == 0

"""Every kind of damage is a finding that names the file and a way out; a good folder of any layout has none."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from foreign_bags import ENCODER, WRITERS, write_atlaspatch, write_clam, write_stamp, write_torchmil, write_trident
from toy_bags import write_cohort

from wsimil.bags.bag import Geometry, read_bag, write_bag
from wsimil.cli import main
from wsimil.errors import UsageError
from wsimil.validation import validate_bags


def found(folder: Path) -> list[tuple[str, str]]:
    return [(Path(item.file).name, item.what) for item in validate_bags(folder, quiet=True).findings]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_cohort(tmp_path, n_slides=4) / "features_toy"


def rewrite(path: Path, **changes: object) -> None:
    """The bag anew, with other parts or attributes."""
    bag = read_bag(path)
    parts = {name: changes.pop(name, getattr(bag, name)) for name in ("features", "coords_level0_px", "valid")}
    attributes = {**bag.attributes, **changes}
    geometry = Geometry(224, 224.0, 0, 20_000, 20_000, 0.5, 0.5, path.stem)
    write_bag(path, type(bag)(**parts, qc=bag.qc, attributes=attributes), geometry)


@pytest.mark.parametrize("layout", WRITERS)
def test_a_good_folder_of_any_layout_has_no_findings(tmp_path, layout):
    for slide_id in "abc":
        WRITERS[layout](tmp_path, slide_id)
    report = validate_bags(tmp_path, quiet=True)
    assert not report.findings, report.text()
    assert (report.n_bags, report.n_tiles) == (3, 120)
    assert report.layouts == [layout]


def test_a_good_folder_of_ours_has_no_findings(toy):
    report = validate_bags(toy.parent, quiet=True)
    assert not report.findings and report.n_bags == 4
    assert "4 bags of layout wsimil" in report.text() and "nothing wrong" in report.text()
    assert validate_bags(toy / "s01.h5", quiet=True).n_bags == 1


def test_bags_without_a_usable_tile_are_counted_and_no_fault(toy):
    rewrite(toy / "s01.h5", valid=np.zeros(len(read_bag(toy / "s01.h5").valid), bool))
    report = validate_bags(toy, quiet=True)
    assert not report.findings and report.n_empty == 1
    assert "4 bags (1 without a usable tile) of layout wsimil" in report.text()


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "not a whole HDF5 file"),
        (lambda path: path.write_text("slide,label\n"), "not a whole HDF5 file"),
        (lambda path: path.write_bytes(b""), "not a whole HDF5 file"),
    ],
)
def test_a_broken_file_is_found(toy, damage, words):
    damage(toy / "s01.h5")
    ((name, what),) = found(toy)
    assert name == "s01.h5" and words in what


def test_a_file_that_was_never_finished_is_found(toy):
    with h5py.File(toy / "s01.h5", "r+") as content:
        content.attrs["complete"] = 0
    assert found(toy) == [("s01.h5", "the writer did not finish it")]


def test_a_value_that_changed_on_the_disk_is_found(toy):
    with h5py.File(toy / "s01.h5", "r+") as content:
        content["features"][2, 3] = 7
    ((name, what),) = found(toy)
    assert name == "s01.h5" and "changed since they were written" in what


def test_features_and_coordinates_of_different_length_are_found(tmp_path):
    for slide_id in "ab":
        write_clam(tmp_path, slide_id, patches=False)
    with h5py.File(tmp_path / "h5_files" / "a.h5", "r+") as content:
        content["coords"].resize(39, axis=0)
    assert found(tmp_path) == [("a.h5", "40 rows of features, but 39 coordinates")]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, "NaN or infinity in 2 of"),
        (np.inf, "NaN or infinity"),
        (0, "2 of .* all zeros"),
        (-3e38, "values up to 3e\\+38 in 2 of"),
    ],
)
def test_rows_without_meaning_are_counted(toy, value, words):
    features = read_bag(toy / "s01.h5").features.astype(np.float32)
    features[[3, 7]] = value
    rewrite(toy / "s01.h5", features=features)
    ((name, what),) = found(toy)
    assert name == "s01.h5" and re.search(words, what)


def test_rows_that_are_known_to_be_invalid_are_no_finding(toy):
    bag = read_bag(toy / "s01.h5")
    features, valid = bag.features.copy(), bag.valid.copy()
    features[[3, 7]], valid[[3, 7]] = 0, False
    rewrite(toy / "s01.h5", features=features, valid=valid)
    assert not found(toy)


def test_a_batch_written_twice_is_found(toy):
    features = read_bag(toy / "s01.h5").features.copy()
    half = len(features) // 2
    features[half : 2 * half] = features[:half]
    rewrite(toy / "s01.h5", features=features)
    ((_, what),) = found(toy)
    assert "are copies of others" in what


def test_features_are_found_under_another_name(toy):
    shutil.copy(toy / "s01.h5", toy / "s99.h5")
    what = dict(found(toy))
    assert set(what) == {"s99.h5"}
    rewrite(toy / "s99.h5", slide_id="s99", slide_fingerprint="another scan")
    assert found(toy) == [("s99.h5", "equal in every feature as s01.h5")]


def test_two_bags_of_one_scan_are_found(toy):
    rewrite(toy / "s03.h5", slide_fingerprint=read_bag(toy / "s01.h5").attributes["slide_fingerprint"])
    assert found(toy) == [("s03.h5", "of the same slide (file) as s01.h5")]


# ---------------------------------------------------------------- what bags of a folder share


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": "toy2"}, "encoder is toy2, of 3 others it is toy"),
        ({"encoder_sha256": "f" * 64}, "weights of the encoder is ffffffff"),
        ({"effective_mpp": 1.0}, "seen at 1 µm/px, the others at 0.5"),
    ],
)
def test_the_odd_one_out_is_named(toy, changes, words):
    for path in toy.glob("*.h5"):
        rewrite(path, effective_mpp=0.5)
    rewrite(toy / "s02.h5", **changes)
    findings = found(toy)
    assert {name for name, _ in findings} == {"s02.h5"} and any(words in what for _, what in findings), findings


def test_widths_that_differ_are_named(toy):
    rewrite(toy / "s02.h5", features=read_bag(toy / "s02.h5").features[:, :5].copy())
    assert found(toy) == [("s02.h5", "width of the features is 5, of 3 others it is 12")]


# ---------------------------------------------------------------- scale and place


def test_a_side_that_does_not_follow_from_the_scale_is_found(toy):
    rewrite(toy / "s01.h5", tile_px=224, target_mpp=0.5)
    assert not found(toy)
    rewrite(toy / "s01.h5", tile_px=224, target_mpp=0.25)
    ((_, what),) = found(toy)
    assert what == "tiles of 224 level-0 px are seen at 0.5 µm/px, but 0.25 was asked for"


def test_tridents_side_is_held_against_its_magnifications(tmp_path):
    for slide_id in "ab":
        write_trident(tmp_path, slide_id)
    path = tmp_path / "20x_256px_0px_overlap" / f"features_{ENCODER}" / "a.h5"
    with h5py.File(path, "r+") as content:
        content["coords"].attrs["patch_size_level0"] = 256  # as if level 0 were the target
    whats = [what for _, what in found(tmp_path)]
    assert "256 px at 20x of a slide of 40x are 512 level-0 px, not 256" in whats
    assert "tiles are 512 px apart, but said to be 256 px wide" in whats


def test_rounding_of_the_side_at_level_0_is_no_finding(tmp_path):
    write_trident(tmp_path, "a")
    path = tmp_path / "20x_256px_0px_overlap" / f"features_{ENCODER}" / "a.h5"
    with h5py.File(path, "r+") as content:  # a scanner of 43x, in whole numbers
        content["coords"].attrs.update({"patch_size_level0": 256 * 43 // 20, "level0_magnification": 43})
        content["coords"][:] = np.floor(content["coords"][:] * (550.4 / 512))
    assert not found(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"), [("10x_256px_0px_overlap", "magnification is 20"), ("20x_512px_0px_overlap", "tile_px is 256")]
)
def test_a_folder_of_another_name_is_found(tmp_path, name, words):
    write_trident(tmp_path, "a")
    (tmp_path / "20x_256px_0px_overlap").rename(tmp_path / name)
    ((_, what),) = found(tmp_path)
    assert words in what and name in what


def test_an_encoder_in_the_folder_of_another_is_found(tmp_path):
    write_trident(tmp_path, "a")
    job = tmp_path / "20x_256px_0px_overlap"
    (job / f"features_{ENCODER}").rename(job / "features_conch")
    assert found(tmp_path) == [("a.h5", "encoder is uni_v2, but the folder is features_conch")]


def test_pixels_in_the_place_of_stamps_micrometres_are_found(tmp_path):
    write_stamp(tmp_path, "a")
    write_stamp(tmp_path, "b")
    with h5py.File(tmp_path / "b.h5", "r+") as content:
        content["coords"][:] = content["coords"][:] * 2  # 128 µm are 256 px
    ((name, what),) = found(tmp_path)
    assert name == "b.h5" and what == "tiles are 256 µm apart, but said to be 128 µm wide: the coordinates look like pixels, not µm"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: torch.save(torch.load(path)[:-1], path), "holds (39, 6), b.h5 (40, 6)"),
        (lambda path: torch.save(torch.load(path) * 2, path), "other features than in b.h5"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), ""),
        (lambda path: path.unlink(), "not there, though b.h5 is"),
    ],
)
def test_a_tensor_of_clam_that_is_not_its_hdf5_file_is_found(tmp_path, damage, words):
    write_clam(tmp_path, "a")
    write_clam(tmp_path, "b")
    damage(tmp_path / "pt_files" / "b.pt")
    ((name, what),) = found(tmp_path)
    assert name == "b.pt" and words in what and str(tmp_path) not in what


def test_a_grid_divided_twice_is_found(tmp_path):
    write_torchmil(tmp_path, "a")
    write_torchmil(tmp_path, "b", grid=True)
    np.save(tmp_path / "coords" / "b.npy", np.load(tmp_path / "coords" / "b.npy") // 512)
    ((name, what),) = found(tmp_path)
    assert name == "b.npy" and what == "39 of 40 tiles share a place with another"


@pytest.mark.parametrize(
    ("row", "words"), [((-1, 5), "below 0"), ((25_000, 5), "1 of 40 tiles lie beyond the slide of 20000 x 16000")]
)
def test_tiles_that_lie_nowhere_are_found(tmp_path, row, words):
    write_atlaspatch(tmp_path, "a")
    with h5py.File(tmp_path / "patches" / "a.h5", "r+") as content:
        content["coords"][0, :2] = row
    assert any(words in what for _, what in found(tmp_path))


# ---------------------------------------------------------------- the command


def test_findings_end_with_1_and_are_json_for_a_script(toy, capsys):
    assert main(["validate", str(toy), "--quiet"]) == 0
    (toy / "s01.h5").write_bytes(b"no")
    capsys.readouterr()
    assert main(["validate", str(toy), "--quiet", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    (finding,) = content["findings"]
    assert finding["file"].endswith("s01.h5") and "delete it and extract again" in finding["do"] and content["n_bags"] == 4


def test_every_encoder_of_a_job_is_looked_at(toy):
    shutil.copytree(toy, toy.parent / "features_toy2")
    report = validate_bags(toy.parent, quiet=True)
    assert report.n_bags == 8 and not report.findings  # the name begins alike


def test_nothing_to_look_at_is_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match="no features_"):
        validate_bags(tmp_path, quiet=True)
    with pytest.raises(UsageError, match="no such folder"):
        validate_bags(tmp_path / "x", quiet=True)

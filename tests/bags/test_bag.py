"""A bag comes back bit by bit, TRIDENT's readers and files get along with it, and a damaged one is never read."""

from __future__ import annotations

import random
from pathlib import Path

import h5py
import numpy as np
import pytest

from wsimil.bags.bag import (
    FORMAT_VERSION,
    Bag,
    Geometry,
    read_bag,
    read_header,
    read_patches,
    stored_features,
    write_bag,
    write_patches,
)
from wsimil.errors import BagFormatError

GEOMETRY = Geometry(
    tile_px=224,
    tile_level0_px=448.6,
    overlap_px=16,
    level0_width=9000,
    level0_height=7000,
    slide_mpp=0.2527,
    target_mpp=0.5,
    name="slide",
)


def make_bag(n_tiles: int = 40, dim: int = 6) -> Bag:
    draw = np.random.default_rng(0)
    valid = np.ones(n_tiles, bool)
    valid[3:5] = False
    return Bag(
        features=draw.normal(size=(n_tiles, dim)).astype(np.float16),
        coords_level0_px=draw.integers(0, 1 << 40, (n_tiles, 2)),
        valid=valid,
        qc={"tissue": draw.random(n_tiles, np.float32), "pen": draw.random(n_tiles, np.float32)},
        attributes={
            "slide_id": "a__b",
            "encoder": "texture",
            "encoder_sha256": "ab",
            "encoder_mean": (0.1, 0.2, 0.3),
            "encoder_mpp": None,
            "effective_mpp": 0.5 + 1e-16,
            "tile_level0_px": 448.6,
        },
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_bag(tmp_path / "slide.h5", make_bag(), GEOMETRY)
    return tmp_path / "slide.h5"


def same(one: Bag, other: Bag) -> bool:
    pairs = [
        (one.features, other.features),
        (one.coords_level0_px, other.coords_level0_px),
        (one.valid, other.valid),
        *((one.qc[name], other.qc[name]) for name in one.qc),
    ]
    return one.qc.keys() == other.qc.keys() and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def edit(path: Path):
    return h5py.File(path, "r+")


def test_a_bag_comes_back_bit_by_bit(file):
    written, read = make_bag(), read_bag(file)
    assert same(written, read)
    expected = {**written.attributes, "encoder_mean": [0.1, 0.2, 0.3], "format": "wsimil-bag"}
    expected |= {"format_version": FORMAT_VERSION, "complete": 1, "n_invalid": 2}
    del expected["encoder_mpp"]
    assert read.attributes == expected
    header = read_header(file)
    assert (header.slide_id, header.n_tiles, header.dim, header.encoder) == ("a__b", 40, 6, ("texture", "ab"))
    assert header.attributes == read.attributes


def test_a_header_gives_the_features_without_reading_the_rest_again(file, monkeypatch):
    header, expected = read_header(file), make_bag().features
    monkeypatch.setattr("wsimil.bags.bag.open_hdf5", None)
    out, picked = np.empty((40, 6), np.float16), np.empty((3, 6), np.float16)
    header.features.read_into(out)
    header.features.read_rows(np.array([39, 0, 7]), picked)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(picked, expected[[39, 0, 7]])


def test_a_bag_written_anew_is_not_mixed_with_the_old(file):
    header = read_header(file)
    write_bag(file, make_bag(39), GEOMETRY)
    with pytest.raises(BagFormatError, match=r"slide\.h5: the file changed"):
        header.features.read_into(np.empty((40, 6), np.float16))


def test_writing_what_was_read_changes_nothing(file):
    first = read_bag(file)
    write_bag(file, first, GEOMETRY)
    assert same(first, read_bag(file)) and read_bag(file).attributes == first.attributes


def test_a_slide_without_tissue_is_a_bag(tmp_path):
    empty = Bag(np.zeros((0, 6), np.float16), np.zeros((0, 2), np.int64), np.zeros(0, bool), {"tissue": np.zeros(0)})
    write_bag(tmp_path / "slide.h5", empty, GEOMETRY)
    read = read_bag(tmp_path / "slide.h5")
    assert (read.features.shape, read.coords_level0_px.shape, read.valid.shape) == ((0, 6), (0, 2), (0,))
    header = read_header(tmp_path / "slide.h5")
    assert header.dim == 6
    header.features.read_into(np.empty((0, 6), np.float16))


@pytest.mark.parametrize(
    ("value", "asked", "stored"),
    [(65504, "fp16", np.float16), (-65505, "fp16", np.float32), (np.inf, "fp16", np.float32), (1, "fp32", np.float32)],
)
def test_features_that_overflow_half_precision_are_kept_wide(value, asked, stored):
    features = stored_features(np.array([[0.0, value]]), asked)
    assert features.dtype == stored and features[0, 1] == np.float32(value)
    assert stored_features(np.zeros((0, 3)), "fp16").dtype == np.float16


def test_parts_that_do_not_fit_are_not_written(tmp_path):
    bag = make_bag()
    wrong = Bag(bag.features, bag.coords_level0_px[:-1], bag.valid)
    with pytest.raises(BagFormatError, match=r"coords has shape \(39, 2\), expected \(40, 2\)"):
        write_bag(tmp_path / "slide.h5", wrong, GEOMETRY)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- TRIDENT


def test_tridents_readers_find_what_they_look_for(file, tmp_path):
    write_patches(tmp_path / "slide_patches.h5", np.ones((2, 2)), {"tissue": np.ones(2)}, GEOMETRY, {})
    for path in (file, tmp_path / "slide_patches.h5"):
        with h5py.File(path) as content:
            attributes = dict(content["coords"].attrs)
            assert content["coords"].dtype == np.int64
        del attributes["crc32"]
        assert attributes == {
            "patch_size": 224,
            "patch_size_level0": 449,
            "level0_magnification": 40,
            "target_magnification": 20,
            "overlap": 16,
            "name": "slide",
            "savetodir": "",
            "level0_width": 9000,
            "level0_height": 7000,
        }
        assert isinstance(attributes["patch_size_level0"], np.integer)  # some readers refuse a float
    with h5py.File(file) as content:
        stated = dict(content["features"].attrs)
        del stated["crc32"]
        assert stated == {"name": "slide", "savetodir": "", "encoder": "texture"}
        assert content["features"].chunks is None and content["features"].compression is None


def write_like_trident(path: Path, features: np.ndarray, *, encoder: str = "uni_v1", **stated: object) -> None:
    """No root attributes, chunks of one row, attributes on the datasets, None as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coords = np.arange(2 * len(features)).reshape(-1, 2)
    attributes = {"patch_size": 256, "patch_size_level0": 512, "overlap": 0, "name": "x", "savetodir": "None"}
    with h5py.File(path, "w") as content:
        for name, values in (("features", features), ("coords", coords)):
            shape = values.shape
            dataset = content.create_dataset(
                name, shape, values.dtype, maxshape=(None, *shape[1:]), chunks=(1, *shape[1:])
            )
            dataset[:] = values
        content["coords"].attrs.update(attributes | stated)
        content["features"].attrs.update({"name": "x", "encoder": encoder})


def test_tridents_bags_are_read(tmp_path):
    features = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    path = tmp_path / "features_other" / "TCGA-01.h5"
    write_like_trident(path, features, level0_width=9000, level0_height="None")
    bag, header = read_bag(path), read_header(path)
    np.testing.assert_array_equal(bag.features, features)
    picked = np.empty((2, 5), np.float32)
    header.features.read_rows(np.array([6, 2]), picked)
    np.testing.assert_array_equal(picked, features[[6, 2]])
    assert bag.features.dtype == np.float32 and bag.valid.all() and not bag.qc
    assert (header.slide_id, header.encoder) == ("TCGA-01", ("uni_v1", ""))
    assert bag.attributes == {
        "slide_id": "TCGA-01",
        "encoder": "uni_v1",
        "tile_px": 256,
        "tile_level0_px": 512.0,
        "overlap_px": 0,
        "level0_width": 9000,
        "n_invalid": 0,
    }


@pytest.mark.parametrize(("folder", "encoder"), [("features_conch_v15", "conch_v15"), ("bags", "unknown")])
def test_a_bag_that_does_not_know_its_encoder_is_named_by_its_folder(tmp_path, folder, encoder):
    write_like_trident(tmp_path / folder / "a.h5", np.ones((2, 3), np.float32), encoder="None")
    assert read_header(tmp_path / folder / "a.h5").encoder == (encoder, "")


def test_an_empty_bag_of_tridents_is_read(tmp_path):
    write_like_trident(tmp_path / "a.h5", np.ones((0, 3), np.float32))
    assert read_bag(tmp_path / "a.h5").features.shape == (0, 3)


def test_rows_that_a_foreign_bag_marks_are_counted(tmp_path):
    write_like_trident(tmp_path / "a.h5", np.ones((4, 3), np.float32))
    with edit(tmp_path / "a.h5") as content:
        content["valid"] = np.array([1, 0, 1, 0])
    assert read_header(tmp_path / "a.h5").attributes["n_invalid"] == 2
    assert read_bag(tmp_path / "a.h5").valid.tolist() == [True, False, True, False]


# ---------------------------------------------------------------- damage


def spoil(path: Path, name: str, values: object) -> None:
    with edit(path) as content:
        if name in content:
            del content[name]
        if values is not None:
            content[name] = values


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("features", None, "no dataset `features`"),
        ("coords", None, "no dataset `coords`"),
        ("valid", None, "no dataset `valid`"),
        ("features", np.ones(40, np.float16), r"expected \(40, D\)"),
        ("features", np.ones((40, 6, 1), np.float16), r"shape \(40, 6, 1\)"),
        ("features", np.ones((39, 6), np.float16), r"shape \(40, 2\), expected \(39, 2\)"),
        ("features", np.float16(1), "shape"),
        ("features", np.ones((40, 6), int), "int64"),
        ("features", np.full((40, 6), "text", "S4"), "S4"),
        ("coords", np.ones((41, 2), int), r"expected \(40, 2\)"),
        ("coords", np.ones((40, 5), int), r"expected \(40, 2\)"),
        ("valid", np.ones(39, bool), r"expected \(40,\)"),
        ("valid", np.ones(40, bool), "n_invalid is 2, but 0 rows"),
        ("qc/tissue", np.ones(41, np.float32), "qc/tissue"),
    ],
)
def test_parts_that_are_missing_or_do_not_fit_are_named(file, name, values, words):
    spoil(file, name, values)
    with pytest.raises(BagFormatError, match=rf"(?s)slide\.h5: .*{words}"):
        read_bag(file)


def test_a_group_in_the_place_of_a_dataset_is_named(file):
    spoil(file, "features", None)
    spoil(file, "features/inner", np.ones(3))
    with pytest.raises(BagFormatError, match=r"slide\.h5: features is a group"):
        read_bag(file)


@pytest.mark.parametrize("complete", [None, 0])
def test_a_bag_that_was_not_finished_is_refused(file, complete):
    with edit(file) as content:
        del content.attrs["complete"]
        if complete is not None:
            content.attrs["complete"] = complete
    for read in (read_header, read_bag):
        with pytest.raises(BagFormatError, match=r"slide\.h5: the writer did not finish it"):
            read(file)


def test_a_newer_format_is_refused(file):
    with edit(file) as content:
        content.attrs["format_version"] = FORMAT_VERSION + 1
    with pytest.raises(BagFormatError, match="upgrade"):
        read_header(file)


def test_values_that_were_never_written_are_not_zeros(file, tmp_path):
    write_like_trident(tmp_path / "foreign.h5", np.ones((4, 3), np.float32))
    with edit(tmp_path / "foreign.h5") as content:
        content["features"].resize(6, axis=0)
        content["coords"].resize(6, axis=0)
    with pytest.raises(BagFormatError, match="features is not wholly in the file"):
        read_bag(tmp_path / "foreign.h5")


def test_a_claim_of_more_than_any_memory_is_refused(file):
    with edit(file) as content:
        del content["features"], content["coords"]
        content.create_dataset("features", (10**13, 6), np.float16)
        content.create_dataset("coords", (10**13, 2), np.int64)
    with pytest.raises(BagFormatError, match="features is not wholly in the file"):
        read_bag(file)


def test_a_truncated_bag_is_never_read(file):
    content = file.read_bytes()
    for length in range(0, len(content), len(content) // 60):
        file.write_bytes(content[:length])
        with pytest.raises(BagFormatError, match=r"slide\.h5"):
            read_bag(file)


def test_a_flipped_bit_never_changes_rows_or_what_a_bag_says(file):
    content, expected = file.read_bytes(), read_bag(file)
    draw = random.Random(1)
    refused = 0
    for _ in range(100):
        mutant = bytearray(content)
        mutant[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(mutant)
        try:
            bag = read_bag(file)
        except BagFormatError as error:
            assert str(file) in str(error)
            refused += 1
        else:
            assert bag.attributes == expected.attributes
            assert bag.features.shape == expected.features.shape
            assert len(bag.coords_level0_px) == len(bag.valid) == len(bag.features)
    assert refused > 20


# ---------------------------------------------------------------- coordinates alone


def test_patches_come_back(tmp_path):
    path = tmp_path / "slide_patches.h5"
    coords = np.array([[1, 2], [3, 4], [5, 6]])
    qc = {"tissue": np.array([0.5, 0.75, 1], np.float32), "pen": np.array([0, 0.25, 0], np.float32)}
    write_patches(path, coords, qc, GEOMETRY, {"recipe_hash": "r"})
    read_coords, read_qc, attributes = read_patches(path)
    np.testing.assert_array_equal(read_coords, coords)
    assert read_qc.keys() == qc.keys()
    for name, values in qc.items():
        np.testing.assert_array_equal(read_qc[name], values)
    assert attributes["recipe_hash"] == "r"
    spoil(path, "qc/tissue", np.ones(2, np.float32))
    with pytest.raises(BagFormatError, match=r"slide_patches\.h5: qc/tissue"):
        read_patches(path)


def test_a_bag_is_no_patches_file_and_the_reverse(file, tmp_path):
    with pytest.raises(BagFormatError, match="no patches file"):
        read_patches(file)
    write_patches(tmp_path / "slide_patches.h5", np.ones((2, 2)), {"tissue": np.ones(2)}, GEOMETRY, {})
    with pytest.raises(BagFormatError, match="no dataset `features`"):
        read_bag(tmp_path / "slide_patches.h5")

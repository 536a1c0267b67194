"""Bags of other programs are found, read in place and mean what their writers meant; what they do not say is said to be missing."""

from __future__ import annotations

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from foreign_bags import (
    ENCODER,
    MPP,
    SIDE,
    SIZE,
    TILE_PX,
    WRITERS,
    one_bag,
    write_atlaspatch,
    write_clam,
    write_slide2vec,
    write_slideflow,
    write_stamp,
    write_torchmil,
    write_trident,
)

from wsimil.bags.dataset import BagFolder
from wsimil.bags.interop import LAYOUTS, Known, find_foreign
from wsimil.bags.interop.layout import spacing_of
from wsimil.config import FilterConfig
from wsimil.errors import BagFormatError, EncoderMismatchError, UsageError

FOREIGN = [layout for layout in WRITERS if layout != "trident"]  # TRIDENT's HDF5 bags are read as ours
SAYS_MPP = {"atlaspatch", "slide2vec", "slideflow"}
SAYS_ENCODER = set(WRITERS) - {"clam", "torchmil"}


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_is_found_and_read_in_place(tmp_path, layout):
    for slide_id in "ab":
        WRITERS[layout](tmp_path, slide_id)
    found = find_foreign(tmp_path)
    assert (found[0].name if found else "trident") == layout
    bags = BagFolder(tmp_path)
    assert bags.slide_ids == ["a", "b"] and bags.encoder == (ENCODER if layout in SAYS_ENCODER else "unknown", "")
    for slide_id in "ab":
        features, coords = one_bag(slide_id, dtype=np.float16 if layout == "stamp" else np.float32)
        bag = bags.read(slide_id)
        assert bag.features.dtype == features.dtype and np.array_equal(bag.features, features)
        np.testing.assert_array_equal(bag.coords_level0_px, coords * MPP if layout == "stamp" else coords)
        batch = bags.load(slide_id).checked()
        np.testing.assert_array_equal(batch.features.numpy(), features.astype(np.float32))
        if layout in SAYS_MPP | {"stamp"}:
            np.testing.assert_allclose(batch.coords_um.numpy(), (coords + SIDE / 2) * MPP, rtol=1e-6)
            assert batch.tile_um.tolist() == [SIDE * MPP]
        else:
            assert batch.coords_um is None
    assert any("µm" in remark for remark in bags.remarks) == (layout not in SAYS_MPP)


@pytest.mark.parametrize("layout", FOREIGN)
def test_rows_of_a_foreign_bag_are_those_of_the_whole(tmp_path, layout):
    WRITERS[layout](tmp_path, "a")
    bags, rows = BagFolder(tmp_path, cache_bytes=0), np.array([5, 0, 39, 5])
    assert torch.equal(bags.load("a", rows=rows).features, bags.load("a").features[rows])
    copy = pickle.loads(pickle.dumps(bags))  # as a worker gets it
    assert torch.equal(copy.load("a").features, bags.load("a").features)


@pytest.mark.parametrize("layout", FOREIGN)
def test_what_the_user_knows_fills_in_and_never_overrules(tmp_path, layout):
    WRITERS[layout](tmp_path, "a")
    found, mine = LAYOUTS[layout], ENCODER if layout == "atlaspatch" else "mine"  # there it chooses among several
    header = found.header(found.find(tmp_path)["a"], "a", Known(slide_mpp=0.5, tile_level0_px=100.0, encoder=mine))
    stated = header.attributes
    asked_for = 0.5 if layout not in {"atlaspatch", "slide2vec"} else MPP
    assert stated["mpp"] == asked_for
    assert header.encoder[0] == (ENCODER if layout in SAYS_ENCODER else "mine")
    if layout in {"clam", "atlaspatch", "slide2vec"}:
        assert stated["tile_level0_px"] == SIDE
    if layout == "stamp":  # a tile of 128 µm on a slide of .5 µm/px
        assert stated["tile_level0_px"] == SIDE * MPP / 0.5 and stated["mpp_source"] == "option"
        np.testing.assert_array_equal(header.coords(), np.rint(one_bag("a")[1] * MPP / 0.5))


def test_a_table_of_slides_goes_before_one_number_for_all():
    known = Known(slide_mpp=0.5, mpp_by_slide={"a": 0.25})
    assert (known.mpp_of("a"), known.mpp_of("b")) == (0.25, 0.5)


def test_a_folder_of_ours_is_not_foreign(tmp_path):
    from toy_bags import write_cohort

    write_cohort(tmp_path, n_slides=2)
    assert find_foreign(tmp_path) is None and find_foreign(tmp_path / "features_toy") is None
    write_trident(tmp_path / "t", "a")
    assert find_foreign(tmp_path / "t" / "20x_256px_0px_overlap") is None


# ---------------------------------------------------------------- CLAM


def test_a_tile_of_clam_is_as_large_as_its_level_makes_it(tmp_path):
    write_clam(tmp_path / "feats", "a", patches=False)
    write_clam(tmp_path, "a")
    for start in (tmp_path, tmp_path / "h5_files", tmp_path / "feats"):  # the folder of coordinates may lie beside
        assert BagFolder(start).headers["a"].attributes["tile_level0_px"] == SIDE


def test_without_coordinates_files_the_distance_of_tiles_is_their_side(tmp_path):
    write_clam(tmp_path, "a", patches=False)
    bags = BagFolder(tmp_path)
    assert bags.headers["a"].attributes["tile_level0_px"] == SIDE
    assert any("512 px wide" in remark for remark in bags.remarks)


def test_tensors_alone_have_the_coordinates_of_their_patches(tmp_path):
    write_clam(tmp_path, "a")
    (tmp_path / "h5_files" / "a.h5").unlink()
    np.testing.assert_array_equal(BagFolder(tmp_path).read("a").coords_level0_px, one_bag("a")[1])
    (tmp_path / "patches" / "a.h5").unlink()
    bags = BagFolder(tmp_path)
    assert (bags.read("a").coords_level0_px == -1).all() and bags.load("a").coords_um is None
    assert any("neither h5_files nor patches" in remark for remark in bags.remarks)


def test_features_and_patches_of_two_runs_are_not_mixed(tmp_path):
    write_clam(tmp_path, "a")
    with h5py.File(tmp_path / "patches" / "a.h5", "r+") as content:
        content["coords"][3] = 7
    with pytest.raises(BagFormatError, match=r"a\.h5: other coordinates"):
        BagFolder(tmp_path)


@pytest.mark.parametrize(("content", "words"), [({"features": torch.ones(2, 3)}, "holds a dict"), (torch.ones(3), r"\(3,\)")])
def test_a_tensor_file_that_is_no_bag_says_what_it_is(tmp_path, content, words):
    (tmp_path / "pt_files").mkdir()
    torch.save(content, tmp_path / "pt_files" / "a.pt")
    with pytest.raises(BagFormatError, match=words):
        BagFolder(tmp_path)


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("sprung"),))


@pytest.mark.parametrize("suffix", ["pt", "npy", "npz"])
def test_code_in_a_file_is_never_run(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    if suffix == "pt":
        write_slideflow(tmp_path, "a")
        torch.save(Trap(), tmp_path / "a.pt")
    elif suffix == "npy":
        write_torchmil(tmp_path, "a")
        np.save(tmp_path / "features" / "a.npy", np.array([Trap()]), allow_pickle=True)
    else:
        write_slideflow(tmp_path, "a")
        np.savez(tmp_path / "a.index.npz", arr_0=np.array([Trap()]))
    with pytest.raises(BagFormatError, match=r"a\."):
        BagFolder(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("layout", FOREIGN)
def test_a_file_cut_short_is_named(tmp_path, layout):
    WRITERS[layout](tmp_path, "a")
    path = LAYOUTS[layout].find(tmp_path)["a"]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    write = WRITERS[layout]
    write(tmp_path, "b")  # by which the folder is known
    with pytest.raises(BagFormatError, match=path.name):
        BagFolder(tmp_path)


@pytest.mark.parametrize("layout", ["slide2vec", "slideflow", "torchmil"])
def test_a_file_replaced_after_opening_is_refused(tmp_path, layout):
    WRITERS[layout](tmp_path, "a")
    bags = BagFolder(tmp_path, cache_bytes=0)
    path = bags.headers["a"].path
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BagFormatError, match="changed"):
        bags.load("a")


# ---------------------------------------------------------------- STAMP


def test_the_generations_of_stamp_agree(tmp_path):
    write_stamp(tmp_path / "new", "a")
    write_stamp(tmp_path / "v2", "a", tile_size_um=None, tile_size=SIDE * MPP)
    write_stamp(tmp_path / "old", "a", tile_size_um=None, tile_size_px=None, unit=None, feat_type=None)
    with h5py.File(tmp_path / "old" / "a.h5", "r+") as content:  # 224 units are 256 µm
        content["coords"][:] = np.rint(one_bag("a")[1] / SIDE) * 224
    new, old = BagFolder(tmp_path / "new"), BagFolder(tmp_path / "old")
    assert torch.equal(BagFolder(tmp_path / "v2").load("a").coords_um, new.load("a").coords_um)
    assert old.load("a").tile_um.tolist() == [256.0] and old.headers["a"].attributes["tile_px"] == 224
    np.testing.assert_allclose(old.load("a").coords_um.numpy(), np.rint(one_bag("a")[1] / SIDE) * 256 + 128)


def test_stamp_without_a_unit_is_refused(tmp_path):
    write_stamp(tmp_path, "a", tile_size_um=None, unit=None)
    with pytest.raises(BagFormatError, match="unit of its coordinates"):
        BagFolder(tmp_path)


def test_features_of_whole_slides_are_no_bags(tmp_path):
    write_stamp(tmp_path, "a", feat_type="slide")
    with pytest.raises(BagFormatError, match="features of a slide"):
        BagFolder(tmp_path)


def test_slides_in_folders_of_stamp_keep_apart(tmp_path):
    for name in ("one/a", "two/a"):
        write_stamp(tmp_path, name)
    assert BagFolder(tmp_path).slide_ids == ["one__a", "two__a"]


def test_encoders_of_stamp_are_not_mixed(tmp_path):
    write_stamp(tmp_path, "a")
    write_stamp(tmp_path, "b", extractor="conch")
    with pytest.raises(EncoderMismatchError, match="conch"):
        BagFolder(tmp_path)


# ---------------------------------------------------------------- AtlasPatch, slide2vec, slideflow, torchmil, TRIDENT


def test_of_several_encoders_in_a_file_one_is_asked_for(tmp_path):
    write_atlaspatch(tmp_path, "a", (ENCODER, "conch"))
    with pytest.raises(UsageError, match=r"conch, uni_v2.*--encoder"):
        BagFolder(tmp_path)
    layout = LAYOUTS["atlaspatch"]
    assert layout.header(layout.find(tmp_path)["a"], "a", Known(encoder="conch")).encoder == ("conch", "")
    with pytest.raises(BagFormatError, match="no features of dino"):
        layout.header(layout.find(tmp_path)["a"], "a", Known(encoder="dino"))


@pytest.mark.parametrize("suffix", ["pt", "npz"])
def test_tissue_of_hs2p_can_be_filtered_by(tmp_path, suffix):
    write_slide2vec(tmp_path, "a", suffix)
    assert BagFolder(tmp_path, filter=FilterConfig(qc_tissue=0.5)).n_valid("a") == 20
    attributes = BagFolder(tmp_path).headers["a"].attributes
    assert (attributes["level0_width"], attributes["level0_height"], attributes["effective_mpp"]) == (*SIZE, 0.5)


def test_rows_that_slide2vec_numbers_find_their_tiles(tmp_path):
    write_slide2vec(tmp_path, "a", "npz")
    features, coords = one_bag("a")
    order = np.random.default_rng(0).permutation(len(features))
    np.savez(tmp_path / "tile_embeddings" / "a.npz", features=features[order], tile_index=order)
    bag = BagFolder(tmp_path).read("a")
    np.testing.assert_array_equal(bag.coords_level0_px, coords[order])
    np.testing.assert_array_equal(bag.qc["tissue"], np.linspace(0, 1, 40, dtype=np.float32)[order])


def test_a_sidecar_without_features_is_a_slide_not_finished(tmp_path):
    write_slide2vec(tmp_path, "a")
    (tmp_path / "tile_embeddings" / "a.pt").unlink()
    with pytest.raises(BagFormatError, match="the features are not"):
        BagFolder(tmp_path)


@pytest.mark.parametrize("mpp", [None, MPP])
def test_centres_of_slideflow_become_corners(tmp_path, mpp):
    write_slideflow(tmp_path, "a")
    layout = LAYOUTS["slideflow"]
    header = layout.header(tmp_path / "a.pt", "a", Known(slide_mpp=mpp))
    np.testing.assert_array_equal(header.coords(), one_bag("a")[1])
    assert header.attributes["mpp"] == MPP and header.attributes["effective_mpp"] == 0.5
    assert bool(header.remarks) == (mpp is None)  # the distance of tiles stood in


@pytest.mark.parametrize("suffix", ["npy", "h5"])
@pytest.mark.parametrize("grid", [False, True])
def test_torchmils_coordinates_are_told_apart(tmp_path, suffix, grid):
    write_torchmil(tmp_path, "a", grid=grid, suffix=suffix)
    header, coords = BagFolder(tmp_path).headers["a"], one_bag("a")[1]
    assert header.attributes.get("coords_unit", "px") == ("tile" if grid else "px")
    np.testing.assert_array_equal(header.coords(), (coords - coords.min(0)) // SIDE if grid else coords)
    layout = LAYOUTS["torchmil"]
    known = layout.header(header.path, "a", Known(slide_mpp=MPP, tile_level0_px=SIDE))
    np.testing.assert_array_equal(known.coords(), coords - coords.min(0) if grid else coords)
    assert BagFolder(tmp_path).load("a").coords_um is None


@pytest.mark.parametrize("suffix", ["h5", "pt"])
def test_trident_is_read_whether_it_saved_datasets_or_tensors(tmp_path, suffix):
    write_trident(tmp_path, "a", suffix)
    job = tmp_path / "20x_256px_0px_overlap"
    assert BagFolder(tmp_path).slide_ids == BagFolder(job).slide_ids == ["a"]
    bags = BagFolder(job / f"features_{ENCODER}")
    np.testing.assert_array_equal(bags.read("a").features, one_bag("a")[0])
    np.testing.assert_array_equal(bags.read("a").coords_level0_px, one_bag("a")[1])
    assert bags.encoder == (ENCODER, "")
    attributes = bags.headers["a"].attributes
    assert (attributes["tile_px"], attributes["tile_level0_px"], attributes["level0_width"]) == (TILE_PX, SIDE, SIZE[0])


# ---------------------------------------------------------------- the distance of tiles


def test_contours_that_begin_anywhere_do_not_hide_the_distance_of_tiles():
    grids = [one_bag(name, 60)[1] + shift for name, shift in (("a", 0), ("b", 30_001), ("c", 61_003))]
    assert spacing_of(np.concatenate(grids)) == SIDE
    assert spacing_of(np.array([[0, 0], [10, 10]])) is None and spacing_of(np.zeros((0, 2), int)) is None


def test_places_that_are_not_known_are_no_positions_whatever_else_is_known(tmp_path):
    write_clam(tmp_path / "clam", "a")
    for part in ("h5_files", "patches"):
        (tmp_path / "clam" / part / "a.h5").unlink()
    layout = LAYOUTS["clam"]
    header = layout.header(layout.find(tmp_path / "clam")["a"], "a", Known(slide_mpp=MPP, tile_level0_px=SIDE))
    assert header.attributes["mpp"] == MPP and header.attributes["tile_level0_px"] == SIDE
    bags = BagFolder(tmp_path / "clam")
    bags.headers["a"] = header
    assert bags.load("a").coords_um is None

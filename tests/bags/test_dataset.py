"""A folder of bags is of one encoder and one scale, and a model sees valid tiles only."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from wsimil.bags.bag import Bag, Geometry, write_bag
from wsimil.bags.dataset import BagFolder, find_features_folder
from wsimil.errors import BagFormatError, EncoderMismatchError, UsageError

GEOMETRY = Geometry(128, 256.0, 0, 5000, 5000, 0.25, 0.5, "slide")
DIM = 4


def make_bag(slide_id: str, n_tiles: int, *, dim: int = DIM, invalid: int = 0, **attributes: object) -> Bag:
    draw = np.random.default_rng(sum(map(ord, slide_id)))
    valid = np.arange(n_tiles) >= invalid
    features = draw.normal(n_tiles, 1 + n_tiles, (n_tiles, dim)).astype(np.float16)
    features[~valid] = 1000  # would be seen if it came through
    coords = draw.integers(0, 5000, (n_tiles, 2))
    stated = {"slide_id": slide_id, "encoder": "texture", "encoder_sha256": "a" * 64, "effective_mpp": 0.5, "mpp": 0.25}
    stated |= {"tile_level0_px": 256.0, "slide_fingerprint": "f", "recipe_hash": "r"}
    return Bag(features, coords, valid, {}, stated | attributes)


def write(folder: Path, bag: Bag, name: str | None = None) -> Path:
    path = folder / f"{name or bag.attributes['slide_id']}.h5"
    write_bag(path, bag, GEOMETRY)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "20x_128px_0px_overlap" / "features_texture"
    for slide_id, n_tiles, invalid in (("a", 5, 0), ("b", 7, 2), ("c", 0, 0), ("d", 3, 3)):
        write(folder, make_bag(slide_id, n_tiles, invalid=invalid))
    return folder


def test_bags_are_found_from_every_folder_above(folder):
    for start in (folder, folder.parent, folder.parent.parent):
        assert find_features_folder(start) == folder
        assert BagFolder(start).slide_ids == ["a", "b", "c", "d"]


def test_bags_of_others_need_no_name_for_their_folder(folder):
    assert find_features_folder(folder.rename(folder.parent.parent / "uni")).name == "uni"


def test_several_folders_of_bags_are_listed(folder):
    write(folder.parent / "features_uni", make_bag("a", 2))
    with pytest.raises(UsageError, match=r"features_texture, .*features_uni"):
        BagFolder(folder.parent.parent)


@pytest.mark.parametrize("start", ["absent", "empty", "features_empty"])
def test_no_bag_is_an_error_that_names_the_folder(tmp_path, start):
    if start != "absent":
        (tmp_path / start).mkdir()
    with pytest.raises(UsageError, match=start):
        BagFolder(tmp_path / start)


def test_what_other_writers_left_is_passed_over(folder):
    (folder / ".e.tmp-host-1-2.h5").write_bytes(b"half")
    (folder / "._a.h5").write_bytes(b"macOS")
    (folder / "notes.txt").write_text("")
    assert BagFolder(folder).slide_ids == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": "uni"}, "uni"),
        ({"encoder_sha256": "b" * 64}, "bbbbbbbb"),
        ({"dim": DIM + 1}, "5 wide"),
        ({"effective_mpp": 0.25}, r"0\.25"),
    ],
)
def test_bags_that_do_not_belong_together_name_two_slides(folder, changes, words):
    write(folder, make_bag("e", 4, **changes))
    with pytest.raises(EncoderMismatchError, match=rf"(?s)\ba .*e .*{words}"):
        BagFolder(folder)


def test_scales_that_differ_by_rounding_belong_together(folder):
    write(folder, make_bag("e", 4, effective_mpp=0.5055))
    assert "e" in BagFolder(folder).slide_ids


def test_two_bags_of_one_slide_are_named(folder):
    write(folder, make_bag("a", 4), "copy")
    with pytest.raises(BagFormatError, match=r"a\.h5 and copy\.h5 are both of slide a"):
        BagFolder(folder)


def test_a_damaged_bag_is_named(folder):
    path = folder / "b.h5"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BagFormatError, match=r"b\.h5"):
        BagFolder(folder)


def test_all_damaged_bags_are_named_at_once(folder):
    for name in "abd":
        (folder / f"{name}.h5").write_bytes(b"no bag")
    with pytest.raises(BagFormatError, match=r"a\.h5: not a whole.*2 more bags cannot be read: b, d; `wsimil validate`"):
        BagFolder(folder)
    bags = BagFolder(folder, leave_damaged=True)
    assert bags.slide_ids == ["c"] and list(bags.damaged) == ["a", "b", "d"]


def test_a_bag_damaged_after_opening_is_named(folder):
    bags = BagFolder(folder)
    (folder / "b.h5").write_bytes(b"")
    with pytest.raises(BagFormatError, match=r"b\.h5"):
        bags.load("b")


def test_only_slides_with_a_usable_tile_are_filled(folder):
    bags = BagFolder(folder)
    assert bags.filled == ["a", "b"]
    assert [bags.n_valid(name) for name in bags.slide_ids] == [5, 5, 0, 0]


def test_rows_that_are_not_valid_never_reach_a_model(folder):
    bags, stored = BagFolder(folder), make_bag("b", 7, invalid=2)
    batch = bags.load("b").checked()
    assert batch.features.dtype == torch.float32 and batch.slide_ids == ("b",)
    np.testing.assert_array_equal(batch.features.numpy(), stored.features[2:].astype(np.float32))
    np.testing.assert_allclose(batch.coords_um.numpy(), (stored.coords_level0_px[2:] + 128) * 0.25)
    assert batch.tile_um.tolist() == [64.0]
    assert len(bags.load("c").features) == len(bags.load("d").features) == 0
    assert bags.load("c").features.shape == (0, DIM)


def test_without_a_scale_there_are_no_positions(folder):
    write(folder, make_bag("e", 4, mpp=None))
    batch = BagFolder(folder).load("e")
    assert batch.coords_um is None and batch.tile_um is None


@pytest.mark.parametrize("cache_bytes", [0, 150, 1 << 30])
def test_the_cache_does_not_change_results(folder, cache_bytes):
    bags, fresh = BagFolder(folder, cache_bytes=cache_bytes), BagFolder(folder, cache_bytes=0)
    for slide_id in [*bags.slide_ids, *reversed(bags.slide_ids)]:
        assert torch.equal(bags.load(slide_id).features, fresh.load(slide_id).features)
    assert sum(bag.features.nbytes + bag.coords_level0_px.nbytes for bag in bags._cache.values()) <= cache_bytes
    assert ("a" in bags._cache) == (cache_bytes >= 120)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_rows_of_a_slide_are_those_of_the_whole(folder, cache_bytes):
    bags, rows = BagFolder(folder, cache_bytes=cache_bytes), np.array([4, 0, 0, 2])
    for warm in (False, True):
        some, whole = bags.load("b", rows=rows).checked(), bags.load("b")
        assert torch.equal(some.features, whole.features[rows]), warm
        assert torch.equal(some.coords_um, whole.coords_um[rows]), warm
    assert len(bags.load("b", rows=rows[:0]).features) == 0
    with pytest.raises(IndexError):
        bags.load("b", rows=np.array([5]))  # 7 stored, 5 usable


def test_rows_are_read_without_the_rest(folder, monkeypatch):
    bags = BagFolder(folder)
    bags.kept("b")
    monkeypatch.setattr("wsimil.hdf5.StoredRows.read_into", None)
    monkeypatch.setattr("wsimil.hdf5.StoredRows.read_checked", None)
    assert len(bags.load("b", rows=np.array([1])).features) == 1


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_a_bag_is_checked_once(folder, monkeypatch, cache_bytes):
    bags = BagFolder(folder, cache_bytes=cache_bytes)
    first = {slide_id: bags.load(slide_id) for slide_id in "abcd"}
    monkeypatch.setattr("wsimil.hdf5.h5py.File", None)
    for slide_id, batch in first.items():
        assert torch.equal(bags.load(slide_id).features, batch.features)
        assert torch.equal(bags.load(slide_id).coords_um, batch.coords_um)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_a_value_that_changed_on_the_disk_is_found(folder, cache_bytes):
    bags = BagFolder(folder, cache_bytes=cache_bytes)
    header = bags.headers["b"]
    with open(header.path, "r+b") as content:
        content.seek(header.features.offset + 2 * DIM * 3)
        content.write(b"\x01")
    for found in (bags, BagFolder(folder, cache_bytes=cache_bytes)):  # known by its time, and by its checksum
        with pytest.raises(BagFormatError, match=r"b\.h5"):
            found.load("b")


@pytest.mark.parametrize("loaded", [True, False])
def test_a_bag_written_anew_is_refused_not_mixed(folder, loaded):
    bags = BagFolder(folder, cache_bytes=0)
    if loaded:
        bags.load("b")
    write(folder, make_bag("b", 7, invalid=1))
    for rows in (None, np.array([0])):
        with pytest.raises(BagFormatError, match=r"b\.h5: the file changed"):
            bags.load("b", rows=rows)


@pytest.mark.parametrize("cache_bytes", [0, 200, 1 << 30])
def test_threads_may_share_a_folder(folder, cache_bytes):
    bags, expected = BagFolder(folder, cache_bytes=cache_bytes), BagFolder(folder)
    tasks = [("a", None), ("b", None), ("b", np.array([3, 1])), ("c", None), ("d", None), ("a", np.array([4]))] * 20

    def load(task: tuple[str, np.ndarray | None]) -> bool:
        return torch.equal(bags.load(task[0], rows=task[1]).features, expected.load(task[0], rows=task[1]).features)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(load, tasks))


def _sum_of(bags: BagFolder, slide_id: str) -> float:
    return float(bags.load(slide_id).features.sum())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_worker_reads_the_same(folder):
    bags = BagFolder(folder)
    bags.load("a")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.starmap(_sum_of, [(bags, name) for name in "ab"])
    assert found == [_sum_of(bags, name) for name in "ab"]


def test_a_copy_for_another_process_holds_no_bags(folder):
    write(folder, make_bag("e", 5000))
    bags = BagFolder(folder, cache_bytes=200_000)
    bags.load("e")
    assert "e" in bags._cache
    sent = pickle.dumps(bags)
    assert len(sent) < 40_000
    copy = pickle.loads(sent)
    assert torch.equal(copy.load("e").features, bags.load("e").features)
    assert "e" in copy._cache


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f2", ">f4"])
def test_every_kind_of_float_is_loaded(folder, dtype):
    bag = make_bag("e", 6, invalid=1)
    write(folder, replace(bag, features=bag.features.astype(dtype)))
    expected = bag.features[1:].astype(np.float32)
    for half in (False, True):
        features = BagFolder(folder).load("e", half=half).features
        assert features.dtype == (torch.float16 if half and dtype == np.float16 else torch.float32)
        np.testing.assert_array_equal(features.float().numpy(), expected)


def test_rows_read_from_the_header_are_those_that_load_gives(folder):
    bags = BagFolder(folder)
    keep, header = np.flatnonzero(bags.kept("b")), bags.headers["b"]
    out = np.empty((len(keep), DIM), header.features.dtype)
    header.features.read_rows(keep, out)
    np.testing.assert_array_equal(out.astype(np.float32), bags.load("b").features.numpy())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_model_that_writes_into_its_batch_does_not_reach_the_cache(folder, dtype, half):
    bag = make_bag("e", 4)
    write(folder, replace(bag, features=bag.features.astype(dtype)))
    bags = BagFolder(folder)
    before = bags.load("e", half=half).features.clone()
    bags.load("e", half=half).features.zero_()
    assert torch.equal(bags.load("e", half=half).features, before)


def test_features_that_are_no_numbers_are_named(folder):
    bag = make_bag("e", 6, invalid=1)
    bag.features[4, 2] = np.nan
    write(folder, bag)
    with pytest.raises(BagFormatError, match=r"e\.h5: the features of tile 4 are NaN or infinite"):
        BagFolder(folder).load("e")
    bag.valid[4] = False
    write(folder, bag)
    assert len(BagFolder(folder).load("e").features) == 4


def test_tiles_that_are_no_numbers_are_named_each_time_they_are_loaded(folder):
    bag = make_bag("e", 6, invalid=1)
    bag.features[4, 1] = np.nan
    write(folder, bag)
    bags = BagFolder(folder)
    for rows in (None, np.array([3]), None, np.array([0, 3, 1])):
        with pytest.raises(BagFormatError, match="tile 4 are"):
            bags.load("e", rows=rows)
    assert len(bags.load("e", rows=np.array([2])).features) == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("one", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("other", [1, np.inf, -np.inf])
def test_no_number_hides_behind_another(folder, one, other, dtype):
    bag = make_bag("e", 3_000)
    bag.features[2_002, 0], bag.features[2_005, 1] = one, other
    write(folder, replace(bag, features=bag.features.astype(dtype)))
    with pytest.raises(BagFormatError, match="tile 2002 are"):
        BagFolder(folder).load("e")


def test_what_float32_cannot_hold_is_no_number(folder):
    bag = make_bag("e", 6)
    features = bag.features.astype(np.float64)
    features[3, 1] = 1e300
    write(folder, replace(bag, features=features))
    with pytest.raises(BagFormatError, match="tile 3 are"):
        BagFolder(folder).load("e")


@pytest.mark.parametrize(("dtype", "large"), [(np.float16, 65_504), (np.float16, -65_504), (np.float32, 3e38)])
def test_large_numbers_are_numbers(folder, dtype, large):
    bag = make_bag("e", 6)
    write(folder, replace(bag, features=np.full((6, DIM), large, dtype)))  # their sum is beyond their type
    assert (BagFolder(folder).load("e").features == large).all()


def test_a_fingerprint_changes_with_what_the_bag_was_made_of(folder):
    before = BagFolder(folder).fingerprint("a")
    for changes in ({"recipe_hash": "other"}, {"slide_fingerprint": "other"}, {"invalid": 2}):
        write(folder, make_bag("a", 5, **changes))
        assert BagFolder(folder).fingerprint("a") != before
    write(folder, make_bag("a", 5, wsimil_version="other"))
    assert BagFolder(folder).fingerprint("a") == before


def test_a_foreign_bag_is_known_by_its_content(tmp_path):
    seen = set()
    for value in (1, 2):
        with h5py.File(tmp_path / "a.h5", "w") as content:
            content["features"] = np.full((3, 2), value, np.float32)
            content["coords"] = np.zeros((3, 2), int)
        seen.add(BagFolder(tmp_path).fingerprint("a"))
    assert len(seen) == 2


def test_a_foreign_bag_that_was_written_again_in_its_middle_is_another(tmp_path):
    features = np.random.default_rng(0).normal(size=(2000, 384)).astype(np.float32)
    fingerprints = set()
    for filled in (False, True):
        with h5py.File(tmp_path / "a.h5", "w") as content:
            rows = content.create_dataset("features", data=features)
            content["coords"] = np.zeros((len(features), 2), int)
            if not filled:
                rows[900:1100] = 0
        fingerprints.add(BagFolder(tmp_path).fingerprint("a"))
    assert len(fingerprints) == 2


def test_tensors_beside_bags_are_not_passed_over_in_silence(folder):
    for name in ("a", "new"):
        (folder / f"{name}.pt").touch()
    assert BagFolder(folder).remarks == ["1 *.pt files beside the *.h5 bags are passed over: put them into a folder of their own"]

"""A file of ours appears whole, comes back as it was, and says so when it is damaged."""

from __future__ import annotations

import errno
import io
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from wsimil import hdf5
from wsimil.errors import BagFormatError, UsageError
from wsimil.hdf5 import Dataset, StoredRows, is_whole, open_hdf5, read_array, read_attributes, stored_rows, write_hdf5

ATTRIBUTES = {
    "text": "µm/px",
    "empty": "",
    "number": 0.1,
    "count": 3,
    "flag": True,
    "pair": (0.485, 0.456),
    "names": ["normal", "tumour µ"],
    "absent": None,
    "long": "recipe " * 20_000,  # attributes of old HDF5 files end at 64 KB
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "slide.h5"
    datasets = {
        "odd": Dataset(np.zeros(3, bool)),
        "features": Dataset(np.arange(300, dtype=np.float16).reshape(100, 3), {"name": "slide", "encoder": None}),
        "qc/tissue": Dataset(np.linspace(0, 1, 7, dtype=np.float32)),
        "nothing": Dataset(np.zeros((0, 3), np.float16)),
    }
    write_hdf5(path, datasets, ATTRIBUTES)
    return path


def test_attributes_come_back_as_plain_values(file):
    expected = {**ATTRIBUTES, "pair": [0.485, 0.456], "complete": 1}
    del expected["absent"]
    found = read_attributes(file)
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}


def test_text_at_the_root_is_where_the_checksums_reach(file):
    with h5py.File(file) as content:
        kinds = [h5py.check_string_dtype(content.attrs.get_id(name).dtype) for name in ("text", "empty", "names")]
    assert all(kind is not None and kind.length is not None for kind in kinds)


def test_attributes_of_datasets_are_text_for_anybodys_h5py(file):
    with h5py.File(file) as content:
        assert content["features"].attrs["name"] == "slide"


def test_a_value_that_changed_is_refused(file):
    with h5py.File(file, "r+") as content:
        content["features"][0, 0] += 1
    with open_hdf5(file) as content:
        read_array(content["qc/tissue"])
        with pytest.raises(BagFormatError, match=r"features changed since .*checksum"):
            read_array(content["features"])


@pytest.mark.parametrize("array", [np.zeros((0, 3)), np.float32(1), np.arange(12).reshape(3, 4).T, np.ones(2, bool)])
def test_every_kind_of_array_carries_its_checksum(tmp_path, array):
    write_hdf5(tmp_path / "a.h5", {"a": Dataset(np.asarray(array))}, {})
    with open_hdf5(tmp_path / "a.h5") as content:
        assert "crc32" in content["a"].attrs
        np.testing.assert_array_equal(read_array(content["a"]), array)


@pytest.mark.parametrize("name", ["features", "qc/tissue"])
def test_datasets_can_be_memory_mapped(file, name):
    with h5py.File(file) as content:
        dataset = content[name]
        assert dataset.chunks is None and dataset.compression is None
        offset, stored = dataset.id.get_offset(), dataset[()]
    assert offset % 8 == 0
    np.testing.assert_array_equal(np.memmap(file, stored.dtype, "r", offset, stored.shape), stored)


def test_every_byte_a_shape_promises_must_be_there(file, tmp_path):
    with open_hdf5(file) as content:
        assert all(is_whole(content[name]) for name in ("features", "qc/tissue", "nothing"))
    with h5py.File(tmp_path / "gaps.h5", "w") as content:
        content.create_dataset("whole", data=np.ones((5, 4)), chunks=(2, 3), compression="gzip")
        content.create_dataset("gaps", shape=(5, 4), dtype="f4", chunks=(1, 4))[:3] = 1
        content.create_dataset("none", shape=(10**12, 4), dtype="f4")
    with open_hdf5(tmp_path / "gaps.h5") as content:
        assert [is_whole(content[name]) for name in ("whole", "gaps", "none")] == [True, False, False]


def test_a_truncated_file_is_never_read(file):
    content = file.read_bytes()
    lengths = {0, 1, 7, 8, 9, len(content) // 2, len(content) - 1, *range(0, len(content), len(content) // 150)}
    for length in sorted(lengths):
        file.write_bytes(content[:length])
        with pytest.raises(BagFormatError, match=r"slide\.h5"), open_hdf5(file):
            pass


def test_a_flipped_bit_outside_the_data_is_seen_or_changes_nothing(tmp_path):
    """HDF5 does not check text of free length: reading it from such files has hung and crashed the library."""
    file = tmp_path / "slide.h5"
    attributes = {f"attribute_{number}": (f"text {number}", number / 7)[number % 2] for number in range(12)}
    write_hdf5(file, {"coords": Dataset(np.arange(8).reshape(4, 2))}, attributes)
    content = file.read_bytes()
    draw = random.Random(0)

    def everything() -> tuple:
        with open_hdf5(file) as opened:
            return hdf5.plain_attributes(opened), opened["coords"].shape, opened["coords"].dtype

    expected = everything()
    outcomes = []
    for _ in range(150):
        mutant = bytearray(content)
        mutant[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(mutant)
        try:
            outcomes.append(everything() == expected)
        except BagFormatError as error:
            assert str(file) in str(error)
            outcomes.append(None)
    assert False not in outcomes and None in outcomes and True in outcomes


@pytest.mark.parametrize("content", [b"", b"slide,label\na,b\n" * 100, b"\x89HDF\r\n\x1a\n" + bytes(500)])
def test_what_is_no_hdf5_is_named(tmp_path, content):
    path = tmp_path / "other.h5"
    path.write_bytes(content)
    with pytest.raises(BagFormatError, match=r"other\.h5: not a whole HDF5 file"):
        read_attributes(path)


@pytest.mark.parametrize("trouble", [KeyError("x"), AttributeError("x"), OverflowError("x"), RuntimeError("x")])
def test_whatever_h5py_trips_over_later_names_the_file(file, trouble):
    with pytest.raises(BagFormatError, match=r"slide\.h5: broken inside"), open_hdf5(file):
        raise trouble


def test_lack_of_memory_is_not_called_damage(file):
    with pytest.raises(BagFormatError, match="memory") as error, open_hdf5(file):
        raise MemoryError
    assert "delete" not in str(error.value)


def test_errors_on_purpose_pass_through(file):
    with pytest.raises(UsageError, match="mine"), open_hdf5(file):
        raise UsageError("mine")


def test_a_missing_file_is_not_damage(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.h5"), open_hdf5(tmp_path / "absent.h5"):
        pass
    with pytest.raises(IsADirectoryError), open_hdf5(tmp_path):
        pass


def test_a_file_that_may_not_be_read_is_not_damage(file, monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Unable to synchronously open file (…)")

    monkeypatch.setattr(hdf5.h5py, "File", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied.*slide\.h5"), open_hdf5(file):
        pass


def test_a_folder_that_cannot_be_written_names_the_path(tmp_path, monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Unable to synchronously create file (…)")

    monkeypatch.setattr(hdf5.h5py, "File", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied.*slide\.h5"):
        write_hdf5(tmp_path / "slide.h5", {}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="no limit on file sizes there")
def test_a_full_disk_names_the_path_and_leaves_nothing(tmp_path):
    code = f"""
import resource, signal, numpy
from wsimil.hdf5 import Dataset, write_hdf5
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    write_hdf5({str(tmp_path / "slide.h5")!r}, {{"features": Dataset(numpy.ones((100_000, 2)))}}, {{}})
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "slide.h5" in done.stdout and "large" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_a_killed_writer_leaves_no_visible_file(tmp_path):
    code = f"""
import os, numpy
from wsimil.hdf5 import Dataset, write_hdf5
class Deadly(dict):
    def items(self):
        yield "features", Dataset(numpy.ones((1000, 20)))
        os.kill(os.getpid(), 9)
write_hdf5({str(tmp_path / "slide.h5")!r}, Deadly(), {{}})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith(".")


# ---------------------------------------------------------------- rows past HDF5

ROWS = np.random.default_rng(0).normal(size=(70, 5)).astype(np.float32)
PICKED = np.array([69, 3, 3, 0, 41])


def locate(path: Path, name: str = "features") -> StoredRows:
    with open_hdf5(path) as file:
        return stored_rows(file[name])


def store_odd_float(file: h5py.File) -> None:
    """A float with an exponent that numpy has no name for: h5py gives float64, the file has 4 bytes."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_ebias(100)
    h5py.Dataset(h5py.h5d.create(file.id, b"features", kind, h5py.h5s.create_simple(ROWS.shape)))[...] = ROWS


def store_compact(file: h5py.File) -> None:
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.COMPACT)
    space, kind = h5py.h5s.create_simple(ROWS.shape), h5py.h5t.IEEE_F32LE
    h5py.Dataset(h5py.h5d.create(file.id, b"features", kind, space, plan))[...] = ROWS


LAYOUTS = {
    "half": lambda file: file.create_dataset("features", data=ROWS.astype(np.float16)),
    "single": lambda file: file.create_dataset("features", data=ROWS),
    "in a group": lambda file: file.create_dataset("a/features", data=ROWS),
    "big-endian": lambda file: file.create_dataset("features", data=ROWS.astype(">f4")),
    "a row a chunk": lambda file: file.create_dataset("features", data=ROWS, chunks=(1, 5), maxshape=(None, 5)),
    "compressed": lambda file: file.create_dataset("features", data=ROWS, chunks=(32, 5), compression="gzip"),
    "compact": store_compact,
    "odd float": store_odd_float,
    "elsewhere": lambda file: file.create_dataset("features", data=ROWS, external=[("raw.bin", 0, h5py.h5f.UNLIMITED)]),
}


@pytest.mark.parametrize("userblock", [0, 512])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_those_that_hdf5_reads(tmp_path, monkeypatch, layout, userblock):
    monkeypatch.chdir(tmp_path)  # external files are looked for from here
    name = "a/features" if layout == "in a group" else "features"
    with h5py.File("a.h5", "w", userblock_size=userblock) as file:
        file["before"] = np.arange(userblock + 100)
        LAYOUTS[layout](file)
    with h5py.File("a.h5") as file:
        expected = file[name][()]
    rows = locate(Path("a.h5"), name)
    assert (rows.offset is not None) == (layout in ("half", "single", "in a group", "big-endian"))
    whole, picked = np.empty(rows.shape, rows.dtype), np.empty((len(PICKED), 5), rows.dtype)
    rows.read_into(whole)
    rows.read_rows(PICKED, picked)
    assert whole.dtype == expected.dtype
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(picked, expected[PICKED])


@pytest.mark.parametrize("userblock", [0, 512])
def test_no_rows_are_read_of_an_empty_dataset(tmp_path, userblock):
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=userblock) as file:
        file.create_dataset("features", (0, 5), np.float16)
    rows = locate(tmp_path / "a.h5")
    assert rows.offset is None and rows.shape == (0, 5)
    rows.read_into(np.empty((0, 5), np.float16))
    rows.read_rows(np.array([], int), np.empty((0, 5), np.float16))
    with pytest.raises(IndexError, match=r"a\.h5"):
        rows.read_rows(np.array([0]), np.empty((1, 5), np.float16))


def test_our_files_are_read_without_hdf5(file, monkeypatch):
    rows = locate(file)
    monkeypatch.setattr(hdf5.h5py, "File", None)
    out, picked = np.empty((100, 3), np.float16), np.empty((2, 3), np.float16)
    rows.read_into(out)
    rows.read_rows(np.array([99, 1]), picked)
    np.testing.assert_array_equal(out, np.arange(300).reshape(100, 3))
    np.testing.assert_array_equal(picked, out[[99, 1]])


def test_a_system_that_reads_little_at_a_time_is_asked_again(file, monkeypatch):
    class Slow(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:7])

    rows, out = locate(file), np.empty((100, 3), np.float16)
    monkeypatch.setattr(hdf5, "open", lambda path, mode, buffering: Slow(path, mode), raising=False)
    rows.read_into(out)
    np.testing.assert_array_equal(out, np.arange(300).reshape(100, 3))


@pytest.mark.parametrize("chunks", [None, (1, 3)])
@pytest.mark.parametrize("change", ["shorter", "longer", "other", "gone"])
def test_a_file_that_changed_since_it_was_checked_is_refused(tmp_path, chunks, change):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=np.ones((50, 3), np.float16), chunks=chunks)
    rows, content = locate(path), path.read_bytes()
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes({"shorter": content[:-1], "longer": content + b"x", "other": content}[change])
        os.utime(path, ns=(0, rows.stamp[1] + (change == "other")))
    # what ends early HDF5 itself refuses, where it is HDF5 that reads
    words = {"gone": r"a\.h5", "shorter": r"a\.h5: (the file changed|not a whole)"}.get(change, r"a\.h5: the file changed")
    expected = FileNotFoundError if change == "gone" else BagFormatError
    with pytest.raises(expected, match=words):
        rows.read_into(np.empty((50, 3), np.float16))
    with pytest.raises(expected, match=words):
        rows.read_rows(np.array([3]), np.empty((1, 3), np.float16))


def test_a_file_that_ends_while_it_is_read_is_refused(file, monkeypatch):
    class Ending(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:7]) if self.tell() < rows.offset + 50 else 0

    rows = locate(file)
    monkeypatch.setattr(hdf5, "open", lambda path, mode, buffering: Ending(path, mode), raising=False)
    with pytest.raises(BagFormatError, match=r"slide\.h5: the file changed"):
        rows.read_into(np.empty((100, 3), np.float16))


@pytest.mark.parametrize("wrong", [[-1], [0, 100], [2, -101]])
def test_rows_that_are_not_there_are_an_error(file, wrong):
    with pytest.raises(IndexError, match=r"slide\.h5: rows -?\d+ to -?\d+ asked for; it has 0 to 99"):
        locate(file).read_rows(np.array(wrong), np.empty((len(wrong), 3), np.float16))


@pytest.mark.parametrize(
    "out",
    [
        np.empty((99, 3), np.float16),
        np.empty((100, 3), np.float32),
        np.empty((3, 100), np.float16).T,
        np.empty((100, 6), np.float16)[:, ::2],
    ],
    ids=["shape", "type", "order", "gaps"],
)
def test_memory_that_does_not_fit_is_an_error_not_garbage(file, out):
    with pytest.raises(ValueError, match=r"slide\.h5: features goes into \(100, 3\) of float16"):
        locate(file).read_into(out)
    with pytest.raises(ValueError, match=r"slide\.h5"):
        locate(file).read_rows(np.arange(100), out)


@pytest.mark.parametrize("chunks", [None, (7, 16)])
def test_threads_do_not_disturb_one_another(tmp_path, chunks):
    values = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", data=values, chunks=chunks)
    rows = locate(tmp_path / "a.h5")

    def read(seed: int) -> bool:
        picked = np.random.default_rng(seed).integers(0, 3000, 200)
        whole, some = np.empty_like(values), np.empty((200, 16), np.float16)
        rows.read_into(whole)
        rows.read_rows(picked, some)
        return np.array_equal(whole, values) and np.array_equal(some, values[picked])

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(read, range(40)))

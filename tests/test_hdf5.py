"""A file of ours appears whole, comes back as it was, and says so when it is damaged."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from wsimil import hdf5
from wsimil.errors import BagFormatError, UsageError
from wsimil.hdf5 import Dataset, is_whole, open_hdf5, read_attributes, write_hdf5

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
        assert dict(content["features"].attrs) == {"name": "slide"}


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

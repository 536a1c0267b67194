"""Slides never share an id, and a file appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsimil import files
from wsimil.files import (
    atomic_path,
    file_sha256,
    fingerprint,
    hash_of,
    read_json,
    slide_id_from_path,
    slide_name,
    sweep_temporary_files,
    write_json,
    write_text,
)

MEGABYTE = 1 << 20

# dense in the characters that the escape is made of, so that a collision would be found
letters = st.text('aµ1"{:,', max_size=3)
parts = st.text(st.sampled_from("_%25Fa \n"), min_size=1, max_size=5)
paths = st.lists(parts, min_size=1, max_size=4).map(lambda names: PurePosixPath(*names))


@settings(max_examples=300, deadline=None)
@given(paths, paths)
def test_different_paths_never_share_an_id(one, other):
    assert (slide_id_from_path(one) == slide_id_from_path(other)) == (one == other)


@settings(max_examples=300, deadline=None)
@given(paths)
def test_an_id_is_a_single_file_name_that_ends_in_the_slides_name(path):
    slide_id = slide_id_from_path(path)
    assert "/" not in slide_id
    assert slide_name(slide_id) == path.name


def test_no_two_short_paths_share_an_id():
    def names(length: int) -> list[str]:
        return [""] if length == 0 else [name + letter for name in names(length - 1) for letter in "_%a/"]

    every = {PurePosixPath(name.strip("/")) for length in range(1, 7) for name in names(length) if name.strip("/")}
    assert len({slide_id_from_path(path) for path in every}) == len(every)


@pytest.mark.parametrize(
    ("path", "slide_id"),
    [
        ("CMU-1", "CMU-1"),
        ("centre 1/CMU-1", "centre 1__CMU-1"),
        ("a_b/c_d", "a_b__c_d"),
        ("a__b", "a_%5Fb"),
        ("a/b", "a__b"),
        ("a_/b", "a%5F__b"),
        ("a/_b", "a__%5Fb"),
        ("100%", "100%25"),
    ],
)
def test_ids_read_like_paths(path, slide_id):
    assert slide_id_from_path(PurePosixPath(path)) == slide_id


def everything_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_written_file_is_there_and_nothing_else(tmp_path):
    with atomic_path(tmp_path / "new" / "bag.h5") as temporary:
        assert temporary.parent == tmp_path / "new"  # same folder: a rename, not a copy
        assert temporary.suffix == ".h5" and temporary.name.startswith(".")
        temporary.write_bytes(b"whole")
        assert not (tmp_path / "new" / "bag.h5").exists()
    assert everything_in(tmp_path / "new") == ["bag.h5"]
    assert (tmp_path / "new" / "bag.h5").read_bytes() == b"whole"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path, failure):
    with pytest.raises(failure), atomic_path(tmp_path / "bag.h5") as temporary:
        temporary.write_bytes(b"hal")
        raise failure
    assert everything_in(tmp_path) == []


def test_a_failure_leaves_the_former_file(tmp_path):
    target = tmp_path / "table.csv"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert target.read_text() == "old" and everything_in(tmp_path) == ["table.csv"]
    write_text(target, "new")
    assert target.read_text() == "new"


def test_a_failed_sync_is_not_success(tmp_path, monkeypatch):
    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "table.csv", "new")
    assert everything_in(tmp_path) == []


def test_two_writers_of_one_file_keep_apart(tmp_path):
    with atomic_path(tmp_path / "a.txt") as first, atomic_path(tmp_path / "a.txt") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a.txt").read_text() == "first"  # the later to finish
    assert everything_in(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("stem", [250 * "x", 80 * "切"], ids=["latin", "chinese"])
def test_the_longest_names_can_be_written(tmp_path, stem):
    write_text(tmp_path / f"{stem}.h5", "whole")  # 253 and 243 bytes of the 255 that a file name may have
    assert everything_in(tmp_path) == [f"{stem}.h5"]


def test_sweeping_takes_what_dead_runs_left_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    with atomic_path(tmp_path / "bag.h5") as living:
        living.write_text("in progress")
        host = living.name.removeprefix(".bag.tmp-").removesuffix(".h5").rsplit("-", 2)[0]
        left = tmp_path / f".bag.tmp-{host}-{dead.pid}-123.h5"
        others = [tmp_path / name for name in (f".bag.tmp-{host}x-{dead.pid}-123.h5", ".hidden", "bag.tmp-1.h5")]
        for path in (left, *others):
            path.write_text("")
        sweep_temporary_files(tmp_path)
        assert living.exists() and all(path.exists() for path in others)
        if Path("/proc/self").exists():
            assert not left.exists()


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(letters, st.none() | st.integers() | letters | st.dictionaries(letters, letters)))
def test_hashes_know_values_not_the_order_of_keys(value):
    def backwards(item):
        return {key: backwards(item[key]) for key in reversed(item)} if isinstance(item, dict) else item

    assert hash_of(value) == hash_of(backwards(value)) == hash_of(json.loads(json.dumps(value)))
    assert hash_of(value) != hash_of([value])


def test_json_comes_back_and_never_holds_a_nan(tmp_path):
    value = {"µm/px": 0.25, "classes": ["a", "b"], "none": None}
    write_json(tmp_path / "model.json", value)
    assert read_json(tmp_path / "model.json") == value
    assert list(read_json(tmp_path / "model.json")) == list(value)
    with pytest.raises(ValueError):
        write_json(tmp_path / "model.json", {"auc": float("nan")})
    assert read_json(tmp_path / "model.json") == value


@pytest.mark.parametrize("size", [0, 10, MEGABYTE, 2 * MEGABYTE + 7])
def test_file_hashes_are_those_of_sha256sum(tmp_path, size):
    content = os.urandom(size)
    (tmp_path / "weights").write_bytes(content)
    assert file_sha256(tmp_path / "weights") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("size", [1, MEGABYTE - 1, MEGABYTE + 1, 2 * MEGABYTE, 5 * MEGABYTE])
@pytest.mark.parametrize("end", ["first", "last", "longer"])
def test_fingerprint_changes_with_the_ends_of_the_file_and_its_length(tmp_path, size, end):
    slide = tmp_path / "slide.svs"
    content = bytearray(size)
    slide.write_bytes(content)
    before = fingerprint([slide])
    assert fingerprint([slide]) == before
    if end == "longer":
        content.append(0)
    else:
        content[0 if end == "first" else -1] ^= 1
    slide.write_bytes(content)
    assert fingerprint([slide]) != before


def test_fingerprint_does_not_read_the_middle(tmp_path):
    slide = tmp_path / "slide.svs"
    content = bytearray(5 * MEGABYTE)
    slide.write_bytes(content)
    before = fingerprint([slide])
    content[2 * MEGABYTE] ^= 1
    slide.write_bytes(content)
    assert fingerprint([slide]) == before  # the price of being cheap on files of gigabytes


def test_fingerprint_of_many_files_does_not_depend_on_the_order_they_are_given(tmp_path):
    slides = [tmp_path / name for name in ("1.dcm", "2.dcm")]
    for slide, content in zip(slides, (b"ab", b"c"), strict=True):
        slide.write_bytes(content)
    whole = fingerprint(slides)
    assert fingerprint(reversed(slides)) == whole
    assert fingerprint(slides[:1]) != whole
    for slide, content in zip(slides, (b"a", b"bc"), strict=True):  # the same bytes, cut elsewhere
        slide.write_bytes(content)
    assert fingerprint(slides) != whole


def test_fingerprint_moves_with_the_slide(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "slide.svs").write_bytes(b"same")
    assert fingerprint([tmp_path / "here" / "slide.svs"]) == fingerprint([tmp_path / "there" / "slide.svs"])

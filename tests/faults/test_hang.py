"""Slides that break and slides that never answer: each is a row with a reason, and the others are done."""

from __future__ import annotations

import os
import random
import re
import signal
import struct
from pathlib import Path

import pytest
from conftest import speckled
from faults.runs import FEATURES, Run, assert_same_bag, bags_of, extract, leftovers, rows_of, send, wait_for

from wsimil.slides.write_tiff import write_slide

HEALTHY = ("a", "m", "z")
"""First, between and last: a neighbour before, after or both."""

READ_TIMEOUT_S = 3
TIME = rf"{READ_TIMEOUT_S}(\.0)? s"
NOT_A_FILE = r"pipe|fifo|not a regular file|no (regular )?file"


def _healthy(folder: Path) -> Path:
    folder.mkdir()
    for number, name in enumerate(HEALTHY):
        write_slide(folder / f"{name}.tiff", speckled(400, 300, number), mpp=0.5, compression="deflate", downsamples=(1, 4))
    return folder


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job folder of the healthy slides alone."""
    root = tmp_path_factory.mktemp("healthy")
    ending = extract(_healthy(root / "slides"), root / "job")
    assert ending.code == 0, ending.said
    return root / "job"


def _assert_healthy_done(job: Path, healthy: Path) -> None:
    rows = rows_of(job)
    for name in HEALTHY:
        assert rows[name]["status"] == "done", rows[name]
        assert_same_bag(bags_of(job)[name], bags_of(healthy)[name])
    assert bags_of(job).keys() == set(HEALTHY)
    assert leftovers(job) == []


def test_broken_slides_are_rows_that_name_the_fault(healthy: Path, tmp_path: Path) -> None:
    slides = _healthy(tmp_path / "slides")
    for compression in ("deflate", "jpeg"):
        write_slide(tmp_path / "whole.tiff", speckled(1200, 900, 7), mpp=0.5, compression=compression, downsamples=(1, 4))
        whole = (tmp_path / "whole.tiff").read_bytes()
        for name, size in (("half", len(whole) // 2), ("tenth", len(whole) // 10), ("scrap", 100)):
            (slides / f"{compression}-{name}.tiff").write_bytes(whole[:size])
    (slides / "empty.svs").touch()
    (slides / "garbage.svs").write_bytes(random.Random(1).randbytes(5000))
    (slides / "garbage-tiff.tif").write_bytes(b"II*\0" + random.Random(2).randbytes(5000))
    (slides / "text.png").write_text("no picture")
    (slides / "folder.mrxs").mkdir()
    (slides / "nowhere.ndpi").symlink_to(tmp_path / "no such file")
    job = tmp_path / "job"
    ending = extract(slides, job)
    rows = rows_of(job)
    assert ending.code == 1, ending.said
    assert "Traceback" not in ending.err
    broken = {slide_id: row for slide_id, row in rows.items() if slide_id not in HEALTHY}
    assert broken.keys() == {
        *(f"{compression}-{name}" for compression in ("deflate", "jpeg") for name in ("half", "tenth", "scrap")),
        *("empty", "nowhere", "garbage", "garbage-tiff", "text"),
    }
    for slide_id, row in broken.items():
        assert row["status"] == "failed", row
        assert re.search("empty|damaged|cannot|no such file|breaks off", row["reason"]), f"{slide_id}: {row['reason']}"
    assert "empty" in broken["empty"]["reason"] and "no such file" in broken["nowhere"]["reason"]
    _assert_healthy_done(job, healthy)


def _dicom(path: Path) -> None:
    """As much of a DICOM slide as makes OpenSlide look at the other files of its folder."""

    def element(tag: tuple[int, int], form: bytes, value: bytes) -> bytes:
        value += (b"\0" if form == b"UI" else b" ") * (len(value) % 2)
        return struct.pack("<HH2sH", *tag, form, len(value)) + value

    slide_class, explicit = b"1.2.840.10008.5.1.4.1.1.77.1.6", b"1.2.840.10008.1.2.1"
    meta = b"".join(element(tag, b"UI", uid) for tag, uid in (((2, 2), slide_class), ((2, 3), b"1.2.3"), ((2, 16), explicit)))
    length = element((2, 0), b"UL", struct.pack("<I", len(meta)))
    data = element((8, 0x16), b"UI", slide_class) + element((0x20, 0xE), b"UI", b"1.2.3.4")
    path.write_bytes(bytes(128) + b"DICM" + length + meta + data)


def test_slides_that_never_answer_are_given_up(healthy: Path, tmp_path: Path) -> None:
    slides = _healthy(tmp_path / "slides")
    for name in ("pipe-s.svs", "pipe-d.dcm", "pipe-p.png", "pipe-t.tiff"):
        os.mkfifo(slides / name)
    for name in ("mirax", "n-mirax"):
        (slides / f"{name}.mrxs").write_bytes(b"a MIRAX slide is named by this file")
        (slides / name).mkdir()
        os.mkfifo(slides / name / "Slidedat.ini")  # OpenSlide reads the folder, and waits here for a writer
    (slides / "series").mkdir()
    _dicom(slides / "series" / "1.dcm")
    os.mkfifo(slides / "series" / "2.dcm")
    job = tmp_path / "job"
    with Run(slides, job, "--read-timeout", str(READ_TIMEOUT_S)) as run:
        ending = run.ending(within_s=90)
        assert run.left_behind() == {}
    rows = rows_of(job)
    assert ending.code == 1, ending.said
    assert "Traceback" not in ending.err
    for name in ("mirax", "n-mirax"):
        assert rows[name]["status"] == "failed" and re.search(TIME, rows[name]["reason"]), rows[name]
    others = [row for slide_id, row in rows.items() if slide_id.startswith(("pipe", "series"))]
    assert len(others) >= 5, rows
    for row in others:
        assert row["status"] == "failed" and row["reason"], row
    for name in ("pipe-s", "pipe-p", "pipe-t"):
        assert re.search(f"{TIME}|{NOT_A_FILE}", rows[name]["reason"]), rows[name]
    _assert_healthy_done(job, healthy)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_reader_process_that_is_lost_costs_at_most_its_slide(
    cohort: Path, calm: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Killed by the kernel's memory guard, or stuck in a system call: the run replaces it."""
    job = tmp_path / "job"
    with Run(cohort, job, "--read-timeout", "6", "--workers", "2") as run:
        assert wait_for(lambda: run.ended or (len(bags_of(job)) >= 2 and run.readers()), 120)
        assert not run.ended, "it ended before a reader process could be caught"
        victims = run.readers()
        assert victims, run.alive()
        send(victims[0], number)
        ending = run.ending(within_s=120)
        assert run.left_behind() == {}
    rows = rows_of(job)
    failed = {slide_id: row["reason"] for slide_id, row in rows.items() if row["status"] == "failed"}
    assert ending.code == (1 if failed else 0), ending.said
    assert "Traceback" not in ending.err
    assert len(failed) <= 1 and all(failed.values()), failed
    assert rows.keys() == bags_of(calm).keys()
    assert {path.stem for path in (job / FEATURES).glob("*.h5")} == rows.keys() - failed.keys()
    for slide_id, path in bags_of(job).items():
        assert_same_bag(path, bags_of(calm)[slide_id])
    assert leftovers(job) == []

"""Disks that are full or read-only: said in one line, nothing half written, and the same command goes on once there is room."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from faults.runs import (
    Ending,
    Run,
    assert_bags_right,
    assert_finished,
    bags_of,
    extract,
    leftovers,
    rows_of,
    statuses_of,
)
from faults.small_disk import SmallDisk

FULL = r"(?i)no space left|disk.*full"
READ_ONLY = r"(?i)read-only|permission denied|cannot be written"
LINES = 3
"""What a person reads: the fault, and the line that every run ends with. Not a page."""


def _size_of(job: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in job.rglob("*") if path.is_file())


def _assert_said(ending: Ending, fault: str, folder: Path) -> None:
    assert ending.code in (1, 2), ending.said
    assert "Traceback" not in ending.err, ending.said
    assert re.search(fault, ending.err), ending.said
    assert str(folder) in ending.err, ending.said


def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(cohort: Path, calm: Path, tmp_path: Path) -> None:
    with SmallDisk(tmp_path / "disk", int(0.6 * _size_of(calm))) as disk:
        job = disk.folder / "job"
        ending = extract(cohort, disk.inside / "job", prefix=disk.prefix, within_s=120)
        _assert_said(ending, FULL, disk.inside)
        assert ending.code == 1, ending.said
        assert len(bags_of(job)) < len(bags_of(calm)), "the disk was not full"
        assert bags_of(job), "the disk was full from the start"
        assert_bags_right(job, calm)
        disk.free()
        ending = extract(cohort, disk.inside / "job", prefix=disk.prefix, within_s=100)  # no claim of the dead run holds it up
        assert ending.code == 0, ending.said
        assert_finished(job, calm)


_WRITE_BAGS = """
import os, sys
from pathlib import Path
import numpy as np
from wsimil.hdf5 import Dataset, write_hdf5

folder = Path(sys.argv[1])
features = Dataset(np.zeros((100, 136), np.float16), {"encoder": "texture"})
parts = {"features": features, "coords": Dataset(np.zeros((100, 2), np.int64)), "valid": Dataset(np.ones(100, bool))}
for free_kib in range(0, 68, 4):
    with open(folder / "filling", "ab", buffering=0) as filling:
        try:
            while True:
                filling.write(bytes(4096))
        except OSError:
            filling.truncate(filling.tell() - free_kib * 1024)
    try:
        write_hdf5(folder / "bag.h5", parts, {"slide_id": "s", "note": "x" * 200})
        print("written")
        (folder / "bag.h5").unlink()
    except OSError as error:
        print(error.errno, error.filename, [path.name for path in folder.iterdir()])
    sys.stdout.flush()
"""


def test_wherever_in_a_bag_the_disk_ends_it_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """HDF5 itself can crash when a part of a file cannot be written on closing: the process has to survive each of them."""
    with SmallDisk(tmp_path / "disk", 400 << 10) as disk:
        command = [*disk.prefix, sys.executable, "-c", _WRITE_BAGS, str(disk.inside)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    said = ended.stdout.splitlines()
    assert ended.returncode == 0, f"exit {ended.returncode} after {said}\n{ended.stderr}"
    assert ended.stderr == ""
    assert said[-1] == "written", "there never was room enough: this proved nothing"
    assert set(said) == {"written", f"{errno.ENOSPC} {disk.inside / 'bag.h5'} ['filling']"}


def test_a_disk_without_one_free_byte_harms_nothing_that_is_there(cohort: Path, calm: Path, tmp_path: Path) -> None:
    """Nothing is left to do but the status table and the manifest: writing these is what fails."""
    with SmallDisk(tmp_path / "disk", 2 * _size_of(calm)) as disk:
        job = disk.folder / "job"
        shutil.copytree(calm, job)
        before = (job / "status.csv").read_bytes(), (job / "logs" / "manifest.jsonl").read_bytes()
        disk.fill()
        ending = extract(cohort, disk.inside / "job", prefix=disk.prefix, within_s=120)
        _assert_said(ending, FULL, disk.inside)
        assert_bags_right(job, calm)
        assert bags_of(job).keys() == bags_of(calm).keys()
        assert statuses_of(job).keys() == statuses_of(calm).keys(), "the status table lost rows"
        assert (job / "logs" / "manifest.jsonl").read_bytes()[: len(before[1])] == before[1]
        disk.free()
        ending = extract(cohort, disk.inside / "job", prefix=disk.prefix, within_s=100)
        assert ending.code == 0, ending.said
        assert_finished(job, calm)


def test_a_read_only_disk_is_said_in_a_line(cohort: Path, calm: Path, tmp_path: Path) -> None:
    """A new job folder, one with nothing left to do, and one with a slide to go."""
    with SmallDisk(tmp_path / "disk", 3 * _size_of(calm)) as disk:
        for name in ("finished", "begun"):
            shutil.copytree(calm, disk.folder / name)
        next(iter(bags_of(disk.folder / "begun").values())).unlink()
        before = sorted(str(path) for path in disk.folder.rglob("*"))
        disk.remount("ro")
        jobs = {name: disk.inside / name for name in ("new", "finished", "begun")}
        with ExitStack() as stack:
            runs = {name: stack.enter_context(Run(cohort, job, prefix=disk.prefix)) for name, job in jobs.items()}
            endings = {name: run.ending(within_s=120) for name, run in runs.items()}
        for name, ending in endings.items():
            _assert_said(ending, READ_ONLY, jobs[name])
            assert len(ending.err.splitlines()) <= LINES, f"{name}: {ending.said}"
        assert sorted(str(path) for path in disk.folder.rglob("*")) == before


def test_a_read_only_slide_folder_is_all_right(cohort: Path, calm: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    with SmallDisk(tmp_path / "disk", 2 * _size_of(cohort)) as disk:
        for slide in cohort.iterdir():
            shutil.copy(slide, disk.folder)
        disk.remount("ro")
        ending = extract(disk.inside, job, prefix=disk.prefix)
    assert ending.code == 0, ending.said
    assert leftovers(job) == []
    assert {row["status"] for row in rows_of(job).values()} == {"done"}
    assert_finished(job, calm)


def test_a_place_that_may_not_be_written_to_is_said_in_a_line(cohort: Path, tmp_path: Path) -> None:
    """What permissions forbid; root may do anything but make folders in /proc."""
    tmp_path.chmod(0o555)
    place = Path("/proc") if os.geteuid() == 0 else tmp_path
    try:
        ending = extract(cohort, place / "wsimil-job", within_s=120)
    finally:
        tmp_path.chmod(0o755)
    _assert_said(ending, f"{READ_ONLY}|no such file", place / "wsimil-job")
    assert len(ending.err.splitlines()) <= LINES, ending.said

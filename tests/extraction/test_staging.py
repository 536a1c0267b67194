"""Copies on a fast disk: the same slides from nearer, within the cap, and nothing left or lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from wsimil.bags.bag import read_bag
from wsimil.config import JobConfig, TileConfig
from wsimil.errors import UsageError
from wsimil.extraction import extract_features
from wsimil.extraction import staging as module
from wsimil.extraction.desk import Desk
from wsimil.extraction.job import Row
from wsimil.extraction.staging import AHEAD, FOLDER_NAME, StagedDesk, StagingFolder
from wsimil.files import machine
from wsimil.slides.cohort import SlideFile, find_slides

FEATURES = "20x_64px_0px_overlap/features_texture"


class ListDesk(Desk):
    """Slides from a list, and what became of them."""

    def __init__(self, files: list[SlideFile]) -> None:
        self.files = deque(files)
        self.remarks: list[tuple[str, str, bool]] = []
        self.rows: list[Row] = []

    @property
    def over(self) -> bool:
        return not self.files

    def next(self) -> SlideFile | None:
        return self.files.popleft() if self.files else None

    def wait(self) -> None:
        time.sleep(0.01)

    def remark(self, slide_id: str, text: str, *, loud: bool = True) -> None:
        self.remarks.append((slide_id, text, loud))

    def count(self, n_tiles: int) -> None:
        pass

    def finish(self, row: Row) -> None:
        self.rows.append(row)


def files_of_size(folder: Path, n: int, size: int = 1000) -> list[SlideFile]:
    folder.mkdir(exist_ok=True)
    for number in range(n):
        (folder / f"s{number}.svs").write_bytes(bytes([number]) * size)
    return find_slides(folder)


def taken(desk: StagedDesk) -> SlideFile:
    """The next slide, as a run with nothing in work would get it."""
    deadline = time.monotonic() + 20
    while (file := desk.next()) is None:
        assert time.monotonic() < deadline, "no slide came"
        desk.wait()
    return file


def row_of(file: SlideFile, status: str = "done") -> Row:
    return Row(file.name, file.slide_id, status)


def everything(slide: SlideFile) -> bool:
    return True


def copies_in(folder: Path) -> list[Path]:
    return [path for path in (folder / FOLDER_NAME).rglob("*") if path.suffix in (".svs", ".tiff")]


def test_a_run_on_copies_makes_the_same_bags_and_leaves_nothing(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[Path, int]] = []
    reserve = StagingFolder.reserve
    monkeypatch.setattr(StagingFolder, "reserve", lambda self, sizes: (made.append(sizes), reserve(self, sizes))[1])
    before = {path: path.read_bytes() for path in slides.iterdir()}
    tile, staging = TileConfig(tile_px=64), JobConfig(workers=2, stage_to=str(tmp_path / "fast"), stage_gb=1)
    extract_features(slides, tmp_path / "plain", tile=tile, job=JobConfig(workers=2), quiet=True)
    extraction = extract_features(slides, tmp_path / "job", tile=tile, job=staging, quiet=True)
    assert [row.status for row in extraction.rows] == ["done", "done", "empty"]
    assert sorted(map(str, (name for sizes in made for name in sizes))) == ["a.tiff", "b.tiff", "glass.tiff"]
    for name in ("a", "b", "glass"):
        one, other = (read_bag(tmp_path / job / FEATURES / f"{name}.h5") for job in ("plain", "job"))
        np.testing.assert_array_equal(one.features, other.features)
        assert one.attributes == other.attributes
    assert not list((tmp_path / "fast" / FOLDER_NAME).glob("run-*"))
    assert {path: path.read_bytes() for path in slides.iterdir()} == before
    made.clear()
    extract_features(slides, tmp_path / "job", tile=tile, job=staging, quiet=True)
    assert not made, "what is done is not copied again"


def test_messages_name_the_original(slides: Path, tmp_path: Path) -> None:
    damaged = (slides / "a.tiff").read_bytes()
    (slides / "a.tiff").write_bytes(damaged[:200] + bytes(len(damaged) - 200))
    config = JobConfig(workers=1, stage_to=str(tmp_path / "fast"))
    (row,) = extract_features(slides / "a.tiff", tmp_path / "job", tile=TileConfig(tile_px=64), job=config, quiet=True).rows
    assert row.status == "failed" and FOLDER_NAME not in row.reason and str(slides / "a.tiff") in row.reason
    memory = (tmp_path / "job" / "logs" / "failed" / "a.json").read_text()
    assert FOLDER_NAME not in memory


def test_a_copy_has_the_content_the_name_and_the_fingerprint_of_its_slide(tmp_path: Path) -> None:
    source = tmp_path / "slides"
    (source / "m").mkdir(parents=True)
    (source / "m.mrxs").write_bytes(b"index")
    for name in ("Slidedat.ini", "Data0000.dat"):
        (source / "m" / name).write_bytes(name.encode() * 100)
    (source / "h.vms").write_text("ImageFile=h_1.jpg\nImageFile(1,0)=h_2.jpg\n")
    for name in ("h_1.jpg", "h_2.jpg"):
        (source / name).write_bytes(name.encode())
    files = find_slides(source)
    assert [file.slide_id for file in files] == ["h", "m"]
    with StagingFolder(tmp_path / "fast", limit_bytes=10**6) as folder:
        desk = StagedDesk(ListDesk(files), folder, everything, patience_s=10)
        for _ in files:
            file = taken(desk)
            original = next(original for original in files if original.slide_id == file.slide_id)
            assert file.copy is not None and FOLDER_NAME in file.copy.parts and file.path == original.path
            assert file.fingerprint() == original.fingerprint() and file.name == original.name
            assert {path.name: path.read_bytes() for path in file.files()} == {
                path.name: path.read_bytes() for path in original.files()
            }
            assert len(file.files()) == 3


def test_copies_stay_below_the_cap_and_all_slides_come(tmp_path: Path) -> None:
    files = files_of_size(tmp_path / "slides", 9)
    inner = ListDesk(files)
    with StagingFolder(tmp_path / "fast", limit_bytes=3100 + 200) as folder:
        desk = StagedDesk(inner, folder, everything, patience_s=10)
        in_work: deque[SlideFile] = deque()
        while not desk.over:
            in_work.append(taken(desk))
            assert in_work[-1].copy is not None
            assert sum(path.stat().st_size for path in copies_in(tmp_path / "fast")) <= 3000
            if len(in_work) == 2:
                desk.finish(row_of(in_work.popleft()))
    assert not copies_in(tmp_path / "fast")
    assert len(inner.rows) == 8 and not inner.remarks


def test_a_few_slides_are_copied_ahead_and_not_all(tmp_path: Path) -> None:
    inner = ListDesk(files_of_size(tmp_path / "slides", AHEAD + 5))
    with StagingFolder(tmp_path / "fast", limit_bytes=10**6) as folder:
        desk = StagedDesk(inner, folder, everything, patience_s=10)
        first = taken(desk)
        desk.next()
        while len(copies_in(tmp_path / "fast")) < AHEAD + 1:
            time.sleep(0.01)
        assert first.copy is not None and len(inner.files) <= 5


def test_what_is_larger_than_the_cap_is_read_where_it_lies(tmp_path: Path) -> None:
    inner = ListDesk(files_of_size(tmp_path / "slides", 2))
    with StagingFolder(tmp_path / "fast", limit_bytes=900) as folder:
        desk = StagedDesk(inner, folder, everything, patience_s=10)
        assert [taken(desk).copy, taken(desk).copy] == [None, None]
    assert all("--stage-gb" in text for _, text, _ in inner.remarks) and len(inner.remarks) == 2


def test_a_full_disk_is_left_alone_and_said_once_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=min(1 << 30, usage.total // 20) + 500))
    inner = ListDesk(files_of_size(tmp_path / "slides", 3))
    with StagingFolder(tmp_path / "fast", limit_bytes=10**6) as folder:
        desk = StagedDesk(inner, folder, everything, patience_s=10)
        assert [taken(desk).copy for _ in range(3)] == [None] * 3
    assert [loud for _, _, loud in inner.remarks] == [True, False, False] and "no room on the disk" in inner.remarks[0][1]


def test_a_disk_that_fills_up_in_the_middle_leaves_no_half_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module._Copy, "_copy", full)
    inner = ListDesk(files_of_size(tmp_path / "slides", 1))
    with StagingFolder(tmp_path / "fast", limit_bytes=10**6) as folder:
        assert taken(StagedDesk(inner, folder, everything, patience_s=10)).copy is None
        assert not copies_in(tmp_path / "fast")
    assert os.strerror(errno.ENOSPC) in inner.remarks[0][1]


def test_a_copy_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = threading.Event()
    monkeypatch.setattr(module._Copy, "_copy", lambda self, source, target: hang.wait(20))
    inner = ListDesk(files_of_size(tmp_path / "slides", 1))
    try:
        with StagingFolder(tmp_path / "fast", limit_bytes=10**6) as folder:
            file = taken(StagedDesk(inner, folder, everything, patience_s=0.2))
            assert file.copy is None and "no progress for 0.2 s" in inner.remarks[0][1]
    finally:
        hang.set()


def test_a_slide_that_changes_while_it_is_copied_is_not_taken_for_a_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = module._Copy._copy

    def grows(self: module._Copy, source: Path, target: Path) -> None:
        copy(self, source, target)
        with open(source, "ab") as file:
            file.write(b"more")

    monkeypatch.setattr(module._Copy, "_copy", grows)
    inner = ListDesk(files_of_size(tmp_path / "slides", 1))
    with StagingFolder(tmp_path / "fast", limit_bytes=10**6) as folder:
        assert taken(StagedDesk(inner, folder, everything, patience_s=10)).copy is None
    assert "changed while" in inner.remarks[0][1]


def test_runs_share_the_cap_and_none_waits_long_for_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDLE_S", 0.5)
    files = files_of_size(tmp_path / "slides", 4)
    one, other = ListDesk(files[:2]), ListDesk(files[2:])
    with (
        StagingFolder(tmp_path / "fast", limit_bytes=2300) as first,
        StagingFolder(tmp_path / "fast", limit_bytes=2300) as second,
    ):
        desk = StagedDesk(one, first, everything, patience_s=10)
        held = [taken(desk), taken(desk)]
        assert all(file.copy is not None and file.copy.exists() for file in held), "and the other run's start has not swept them"
        beside = StagedDesk(other, second, everything, patience_s=10)
        assert taken(beside).copy is None and "other runs" in other.remarks[0][1]
        desk.finish(row_of(held[0]))
        assert taken(beside).copy is not None


def killed_run(folder: Path) -> subprocess.Popen:
    code = (
        "import sys, time; from pathlib import Path; from wsimil.extraction.staging import StagingFolder\n"
        f"folder = StagingFolder(Path({str(folder)!r}), limit_bytes=10**6)\n"
        "print(folder.reserve({Path('s.svs'): 1000}), flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_what_a_killed_run_left_is_removed_by_the_next_and_a_living_runs_is_not(tmp_path: Path) -> None:
    living, dead = killed_run(tmp_path), killed_run(tmp_path)
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert len(copies_in(tmp_path)) == 2
        with StagingFolder(tmp_path, limit_bytes=10**6):
            (left,) = copies_in(tmp_path)
            assert f"-{living.pid}-" in str(left)
    finally:
        living.kill()
        living.wait()


def test_another_machines_run_counts_as_dead_only_after_an_hour_of_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "machine", lambda: "elsewhere/boot")
    with StagingFolder(tmp_path, limit_bytes=10**6) as folder:
        folder.reserve({Path("s.svs"): 1000})
        assert folder._lock is not None
        folder._lock.close()  # as it looks from a machine that does not see the other's locks
        monkeypatch.setattr(module, "machine", machine)
        with StagingFolder(tmp_path, limit_bytes=10**6):
            assert len(copies_in(tmp_path)) == 1
        hours_ago = time.time() - 2 * 3600
        os.utime(folder._folder, (hours_ago, hours_ago))
        with StagingFolder(tmp_path, limit_bytes=10**6):
            assert not copies_in(tmp_path)


def test_what_is_not_ours_is_never_touched(tmp_path: Path) -> None:
    theirs = tmp_path / FOLDER_NAME / "run-of-mine"
    theirs.mkdir(parents=True)
    (theirs / "slide.svs").write_bytes(b"precious")
    with pytest.raises(UsageError, match="not made by wsimil"):
        StagingFolder(tmp_path, limit_bytes=10**6)
    (tmp_path / FOLDER_NAME / ".wsimil-output").touch()  # even beside ours
    (tmp_path / "beside.svs").write_bytes(b"precious")
    with StagingFolder(tmp_path, limit_bytes=10**6) as folder:
        desk = StagedDesk(ListDesk(files_of_size(tmp_path / "slides", 1)), folder, everything, patience_s=10)
        desk.finish(row_of(taken(desk)))
    assert (theirs / "slide.svs").read_bytes() == (tmp_path / "beside.svs").read_bytes() == b"precious"


def test_the_bytes_of_a_finished_slide_are_free_although_a_reader_has_it_open(tmp_path: Path) -> None:
    with StagingFolder(tmp_path / "fast", limit_bytes=10**6) as folder:
        desk = StagedDesk(ListDesk(files_of_size(tmp_path / "slides", 1)), folder, everything, patience_s=10)
        file = taken(desk)
        assert file.copy is not None
        with open(file.copy, "rb") as reader:
            desk.finish(row_of(file))
            assert os.fstat(reader.fileno()).st_size == 0


def test_without_locks_slides_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_locked", lambda folder: None)
    inner = ListDesk(files_of_size(tmp_path / "slides", 1))
    with StagingFolder(tmp_path / "fast", limit_bytes=10**6) as folder:
        assert taken(StagedDesk(inner, folder, everything, patience_s=10)).copy is None
    assert "without locks" in inner.remarks[0][1] and not list((tmp_path / "fast" / FOLDER_NAME).glob("run-*"))

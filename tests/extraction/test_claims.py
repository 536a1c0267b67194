"""Runs keep out of each other's way; a dead run keeps nobody waiting."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from wsimil.extraction import claims as module
from wsimil.extraction.claims import Claims


def claim_of_another_process(folder: Path, *, alive: bool) -> subprocess.Popen:
    code = (
        "import sys, time; from pathlib import Path; from wsimil.extraction.claims import Claims\n"
        f"assert Claims(Path({str(folder)!r})).take('s'); print('taken', flush=True); time.sleep({60 if alive else 0})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    if not alive:
        process.wait()
    return process


def test_one_slide_one_run(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims") as one, Claims(tmp_path / "claims") as other:
        assert one.take("s") and not other.take("s") and other.take("t")
        one.release("s")
        assert other.take("s")
    assert not (tmp_path / "claims").exists(), "nothing is left"


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    runs = [Claims(tmp_path / "claims") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for number in range(50):
            assert sum(pool.map(lambda run, slide=f"s{number}": run.take(slide), runs)) == 1
    for run in runs:
        run.close()


def test_a_living_process_keeps_its_claim_and_a_dead_one_loses_it(tmp_path: Path) -> None:
    process = claim_of_another_process(tmp_path / "claims", alive=True)
    try:
        with Claims(tmp_path / "claims") as mine:
            assert not mine.take("s") and str(process.pid) in mine.holder("s")
            process.kill()
            process.wait()
            assert mine.take("s")
    finally:
        process.kill()
        process.wait()


def test_of_many_who_find_a_dead_claim_one_gets_it(tmp_path: Path) -> None:
    for _ in range(5):
        claim_of_another_process(tmp_path / "claims", alive=False)
        runs = [Claims(tmp_path / "claims") for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(lambda run: run.take("s"), runs)) == 1
        for run in runs:
            run.close()


def test_a_claim_of_another_machine_is_taken_over_when_it_is_no_longer_refreshed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "claims" / "s.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"machine": "elsewhere/boot", "pid": os.getpid(), "process_start": "1", "token": "x"}))
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with Claims(tmp_path / "claims") as mine:
        assert not mine.take("s"), "its clock may be wrong: only this run's own counts"
        now += module.TTL_S - 1
        assert not mine.take("s")
        os.utime(path)
        now += 2
        assert not mine.take("s"), "it was refreshed"
        now += module.TTL_S + 1
        assert mine.take("s")


@pytest.mark.parametrize(("content", "after_s"), [(b"", 2), (b"no claim", module.TTL_S)], ids=["empty", "torn"])
def test_a_claim_that_is_no_claim_does_not_hold_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, after_s: float
) -> None:
    """An empty one's writer was killed within a moment."""
    path = tmp_path / "claims" / "s.json"
    path.parent.mkdir()
    path.write_bytes(content)
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with Claims(tmp_path / "claims") as mine:
        assert not mine.take("s")
        now += after_s - 1
        assert not mine.take("s")
        now += 2
        assert mine.take("s")


def test_a_claim_that_cannot_be_written_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "full")

    with Claims(tmp_path / "claims") as mine:
        with monkeypatch.context() as patch:
            patch.setattr(module.os, "write", full)
            with pytest.raises(OSError, match="full"):
                mine.take("s")
        assert mine.take("s")

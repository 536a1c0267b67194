"""Runs of `wsimil extract` as real processes, and what they leave behind.

- Every run carries a mark in its environment that its children inherit: whoever still has it later was left behind.
- Output is read by threads that nobody waits for long: an orphan that holds a pipe open must not stop the test that looks for it.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pytest

import wsimil
from wsimil.bags.bag import Bag, read_bag

FEATURES = "20x_64px_0px_overlap/features_texture"
PATCHES = "20x_64px_0px_overlap/patches"
PATIENCE_S = 240
"""When a run that should have ended counts as hanging; a loaded machine is slow, a hang is for ever."""

_MARK = "WSIMIL_TEST_RUN"


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return f"exit {self.code}\n{self.out}\n{self.err}"


class Run:
    """A run of `wsimil extract`; leaving the `with` block kills whatever is left of it.

    Args:
        prefix: command that executes the run, such as one that enters a namespace.
    """

    def __init__(self, slides: Path, job: Path, *options: str, prefix: Sequence[str] = ()) -> None:
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        name, value = self._mark.split("=")
        source = str(Path(wsimil.__file__).parent.parent)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source, name: value}
        command = [sys.executable, "-m", "wsimil", "extract", str(slides), "--out", str(job), "--tile-px", "64", "--quiet"]
        self.process = subprocess.Popen(
            [*prefix, *command, *options],
            env=environment,
            cwd=tempfile.gettempdir(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._texts: list[list[bytes]] = [[], []]
        pipes = zip((self.process.stdout, self.process.stderr), self._texts, strict=True)
        self._listeners = [threading.Thread(target=_collect, args=pair, daemon=True) for pair in pipes]
        for listener in self._listeners:
            listener.start()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.alive():
            send(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self._said()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def ending(self, within_s: float = PATIENCE_S) -> Ending:
        """Wait for the end; a run that does not come to one fails the test."""
        try:
            code = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {within_s} s: {self.alive()}\n{self._said()}")
        return Ending(code, *self._said())

    def sigkill(self) -> None:
        """Kill the run itself, not its children: they have to notice."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def alive(self) -> dict[int, str]:
        """Command lines of the processes of this run by process id, zombies left out."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if self._mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:  # it ended, or it is somebody else's
                continue
        return found

    def left_behind(self, within_s: float = 15) -> dict[int, str]:
        """Processes that outlive the run by `within_s`."""
        wait_for(lambda: not self.alive(), within_s)
        return self.alive()

    def readers(self) -> list[int]:
        """Reader processes, the one that has worked longest first: it is certainly past its start-up."""
        found = [pid for pid, line in self.alive().items() if pid != self.process.pid and "wsimil" in line]
        return sorted(found, key=_cpu_ticks, reverse=True)

    def _said(self) -> list[str]:
        for listener in self._listeners:
            listener.join(2 if self.ended else 0)
        return [b"".join(text).decode(errors="replace") for text in self._texts]


def _collect(pipe: IO[bytes], text: list[bytes]) -> None:
    while block := os.read(pipe.fileno(), 1 << 16):
        text.append(block)


def _cpu_ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def extract(slides: Path, job: Path, *options: str, prefix: Sequence[str] = (), within_s: float = PATIENCE_S) -> Ending:
    """A run to its end; nothing of it may outlive it."""
    with Run(slides, job, *options, prefix=prefix) as run:
        ending = run.ending(within_s)
        assert run.left_behind() == {}
    return ending


def wait_for(happened: Callable[[], object], within_s: float) -> bool:
    """Look until something has happened; false when it did not."""
    deadline = time.monotonic() + within_s
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def send(pid: int, number: signal.Signals) -> None:
    """A signal to a process of a run that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# ---------------------------------------------------------------- what is in a job folder


def bags_of(job: Path) -> dict[str, Path]:
    """Bags under their final names, by slide id."""
    return {path.stem: path for path in sorted((job / FEATURES).glob("*.h5")) if not path.name.startswith(".")}


def rows_of(job: Path) -> dict[str, dict[str, str]]:
    """Rows of status.csv by slide id; a slide with two rows fails the test."""
    with open(job / "status.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    ids = [row["slide_id"] for row in rows]
    assert len(ids) == len(set(ids)), f"status.csv has slides twice: {ids}"
    return dict(zip(ids, rows, strict=True))


def statuses_of(job: Path) -> dict[str, str]:
    return {slide_id: row["status"] for slide_id, row in rows_of(job).items()}


def manifest_of(job: Path) -> list[dict]:
    path = job / "logs" / "manifest.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def temporary_files(job: Path) -> list[str]:
    return sorted(str(path.relative_to(job)) for path in job.rglob("*") if ".tmp-" in path.name)


def claims_of(job: Path) -> list[str]:
    return sorted(str(path.relative_to(job)) for path in (job / "claims").rglob("*"))


def leftovers(job: Path) -> list[str]:
    """What does not belong in a job folder at rest."""
    return [*temporary_files(job), *claims_of(job)]


def assert_same_bag(path: Path, expected: Path) -> None:
    """Complete, and equal to what an undisturbed run made."""
    found, wanted = read_bag(path), read_bag(expected)
    assert_equal(found, wanted, path.name)


def assert_equal(found: Bag, wanted: Bag, name: str) -> None:
    np.testing.assert_array_equal(found.features, wanted.features, err_msg=name)
    np.testing.assert_array_equal(found.coords_level0_px, wanted.coords_level0_px, err_msg=name)
    np.testing.assert_array_equal(found.valid, wanted.valid, err_msg=name)
    for key in ("slide_id", "recipe_hash", "slide_fingerprint", "n_invalid"):
        assert found.attributes[key] == wanted.attributes[key], f"{name}: {key}"


def assert_bags_right(job: Path, calm: Path) -> None:
    """Every bag that is there; not all need be."""
    wanted = bags_of(calm)
    for slide_id, path in bags_of(job).items():
        assert_same_bag(path, wanted[slide_id])


def assert_finished(job: Path, calm: Path, *, swept: bool = True) -> None:
    """The state an undisturbed run leaves: all bags, all rows, no claims; and no temporary files where they were swept."""
    assert bags_of(job).keys() == bags_of(calm).keys()
    assert_bags_right(job, calm)
    assert set(statuses_of(job).values()) <= {"done", "skipped"}, rows_of(job)
    assert statuses_of(job).keys() == statuses_of(calm).keys()
    assert claims_of(job) == []
    assert not swept or temporary_files(job) == []

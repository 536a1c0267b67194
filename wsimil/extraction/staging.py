"""Copies of slides on a fast disk, made ahead of the readers: `--stage-to FOLDER --stage-gb 200`.

- A slide stays what it is: id, name, fingerprint and messages are those of the original; only its bytes come from nearer.
- Everything lies in `FOLDER/wsimil-staging/`, a folder of each run for itself. Nothing else is ever touched there or elsewhere.
- A run holds a lock on its folder as long as it lives, so the folder of a killed run is known by its free lock, and removed by the
  next run that stages there.
- The cap counts for all runs of the folder together: a copy has its full size from its first byte on.
- Whatever goes wrong with a copy (disk full, network, no locks) is a remark, and the slide is read where it lies.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from wsimil.config import JobConfig
from wsimil.errors import UsageError
from wsimil.extraction.desk import Desk
from wsimil.extraction.job import Row
from wsimil.files import OUTPUT_MARK, folder_lock, machine, mark_output
from wsimil.slides.cohort import SlideFile

__all__ = ["AHEAD", "FOLDER_NAME", "StagedDesk", "StagingFolder", "staged"]

FOLDER_NAME = "wsimil-staging"
AHEAD = 4
"""Slides that are being copied, or lie ready, beside those that are being read."""

_CHUNK = 8 << 20
_LOOK_AGAIN_S = 1.0
_IDLE_S = 2.0
"""How long a run does nothing but wait for other runs to make room."""
_SIGN_OF_LIFE_S = 60.0
_DEAD_AFTER_S = 3600.0
"""A run of another machine is dead when its lock is free and it has not touched it for so long: some network disks keep locks of
other machines from us."""
_KEPT_FREE = 1 << 30
"""Bytes of the disk left to others, or a twentieth of it where that is less."""


class NoCopy(Exception):
    """Why a slide is read where it lies."""


@contextmanager
def staged(desk: Desk, reads_much: Callable[[SlideFile], bool], config: JobConfig) -> Iterator[Desk]:
    """A desk before `desk` that hands out copies, if that was asked for.

    Raises:
        UsageError: the folder cannot be used, or something of that name is not ours.
    """
    if config.stage_to is None:
        yield desk
        return
    with StagingFolder(Path(config.stage_to), limit_bytes=int(config.stage_gb * 1e9)) as folder:
        nearer = StagedDesk(desk, folder, reads_much, patience_s=config.read_timeout)
        try:
            yield nearer
        finally:
            nearer.close()


class StagingFolder:
    """One run's copies in a folder that runs share."""

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self.root = folder / FOLDER_NAME
        self._limit = limit_bytes
        try:
            if self.root.exists() and not (self.root / OUTPUT_MARK).exists() and any(self.root.iterdir()):
                raise UsageError(f"{self.root} was not made by wsimil; choose another --stage-to")
            mark_output(self.root)
            with folder_lock(self.root):
                self._sweep()
                self._folder = self.root / f"run-{machine().split('/')[0]}-{os.getpid()}-{secrets.token_hex(4)}"
                self._folder.mkdir()
                (self._folder / "machine").write_text(machine())
                self._lock: IO | None = _locked(self._folder)
        except OSError as error:
            raise UsageError(f"{self.root}: {error.strerror or error}: slides cannot be copied there; see --stage-to") from error
        self._stop = threading.Event()
        if self._lock is not None:
            threading.Thread(target=self._refresh, name="staging", daemon=True).start()
        self._number = 0

    def _sweep(self) -> None:
        """Remove what dead runs have left."""
        for folder in self.root.glob("run-*"):
            with contextlib.suppress(OSError):  # somebody else is faster, or it is not for us to remove
                if not (folder / "machine").exists():
                    folder.rmdir()  # killed at its first step; what has content and no mark is not ours
                elif (lock := _locked(folder)) is not None:
                    with lock:
                        if (folder / "machine").read_text() == machine() or self._age_s(folder) > _DEAD_AFTER_S:
                            shutil.rmtree(folder, ignore_errors=True)

    def _age_s(self, folder: Path) -> float:
        """How long a run has given no sign of life, by the clock of the disk."""
        (self.root / OUTPUT_MARK).touch()
        return (self.root / OUTPUT_MARK).stat().st_mtime - folder.stat().st_mtime

    def _refresh(self) -> None:
        while not self._stop.wait(_SIGN_OF_LIFE_S):
            with contextlib.suppress(OSError):
                os.utime(self._folder)

    def reserve(self, sizes: dict[Path, int]) -> Path | None:
        """A folder with empty files of these names and sizes; None while other copies take up the room.

        Raises:
            NoCopy: there will never be room.
        """
        if self._lock is None:
            raise NoCopy(f"{self.root} is on a disk without locks")
        total = sum(sizes.values())
        if total > self._limit:
            raise NoCopy(f"its {total / 1e9:.1f} GB are more than --stage-gb")
        with folder_lock(self.root):
            disk, (promised, written) = shutil.disk_usage(self.root), _bytes_in(self.root)
            if total > disk.free - max(0, promised - written) - min(_KEPT_FREE, disk.total // 20):
                raise NoCopy(f"no room on the disk of {self.root}")
            if total + promised > self._limit:
                return None
            self._number += 1
            target = self._folder / str(self._number)
            for name, size in sizes.items():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                with open(target / name, "xb") as file:
                    file.truncate(size)
        return target

    def remove(self, target: Path, *, still_read: bool = False) -> None:
        """Delete one slide's copy.

        Args:
            still_read: a reader may be in the middle of it. Otherwise its bytes are given up although readers keep files open.
        """
        for path in [] if still_read else target.rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_file():
                    os.truncate(path, 0)
        shutil.rmtree(target, ignore_errors=True)

    def close(self) -> None:
        """Delete all copies of this run."""
        self._stop.set()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> StagingFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _locked(folder: Path) -> IO | None:
    """A handle that holds the lock of a run's folder until it is closed; None where somebody has it, or there are no locks."""
    handle = open(folder / "lock", "a")  # noqa: SIM115 (the caller keeps it)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except (ImportError, OSError):
        handle.close()
        return None


def _bytes_in(folder: Path) -> tuple[int, int]:
    """Sizes of all files, and what of it is on the disk already."""
    promised = written = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # removed this moment
                stat = os.stat(os.path.join(inside, name))
                promised += stat.st_size
                written += min(stat.st_size, 512 * getattr(stat, "st_blocks", 0))
    return promised, written


class _Copy:
    """A slide on its way to the staging folder, in a thread of its own: a disk that hangs must not stop the run."""

    def __init__(self, file: SlideFile, folder: StagingFolder, changed: threading.Condition) -> None:
        self.file = file
        self.heard = time.monotonic()
        self.state = "copying"  # or: waiting (for room), done
        self.why_not = ""
        self.given_up = ""  # set from outside: stop, for this reason
        self.target: Path | None = None
        self._folder, self._changed = folder, changed
        threading.Thread(target=self._run, name=f"copy {file.slide_id}", daemon=True).start()

    def _run(self) -> None:
        try:
            copy = self._make()
        except (OSError, NoCopy) as error:
            copy, self.why_not = None, getattr(error, "strerror", None) or str(error)
        except Exception as error:  # a thread that ends in silence would leave the run waiting
            copy, self.why_not = None, f"{type(error).__name__}: {error}"
        with self._changed:
            if copy is None or self.given_up:
                self._drop()
            else:
                self.file = replace(self.file, copy=copy)
            self.state = "done"
            self._changed.notify_all()

    def _make(self) -> Path:
        source = self.file.path.parent
        before = {path.relative_to(source): path.stat() for path in self.file.files()}
        sizes = {name: stat.st_size for name, stat in before.items()}
        while (target := self._folder.reserve(sizes)) is None:
            self._wait_for_room()
        with self._changed:
            self.state, self.target = "copying", target
        for name in before:
            self._copy(source / name, target / name)
        for name, stat in before.items():
            now = (source / name).stat()
            if (now.st_size, now.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
                raise NoCopy("it changed while it was copied")
        return target / self.file.path.name

    def _copy(self, source: Path, target: Path) -> None:
        with open(source, "rb") as original, open(target, "r+b") as copy:
            while chunk := original.read(_CHUNK):
                copy.write(chunk)
                self.heard = time.monotonic()
                if self.given_up:
                    raise NoCopy(self.given_up)

    def _wait_for_room(self) -> None:
        with self._changed:
            self.state = "waiting"
            self._changed.notify_all()
            if not self.given_up:
                self._changed.wait(_LOOK_AGAIN_S)
            self.heard = time.monotonic()
            if self.given_up:
                raise NoCopy(self.given_up)

    def _drop(self) -> None:
        if self.target is not None:
            self._folder.remove(self.target)
            self.target = None

    def give_up(self, reason: str) -> None:
        self.given_up = reason


class StagedDesk(Desk):
    """Hands out slides of another desk once their copies are there.

    Args:
        reads_much: whether a slide is worth a copy.
        patience_s: a copy that makes no progress for so long is given up.
    """

    def __init__(self, desk: Desk, folder: StagingFolder, reads_much: Callable[[SlideFile], bool], *, patience_s: float) -> None:
        self._desk, self._folder, self._reads_much, self._patience_s = desk, folder, reads_much, patience_s
        self._changed = threading.Condition()
        self._copies: deque[_Copy] = deque()  # on their way or ready
        self._targets: dict[str, Path] = {}  # slides that are being read
        self._idle_since: float | None = None
        self._told: set[str] = set()

    @property
    def over(self) -> bool:
        return not self._copies and self._desk.over

    def next(self) -> SlideFile | None:
        while len(self._copies) < AHEAD and (file := self._desk.next()) is not None:
            if not self._reads_much(file):
                return file
            self._copies.append(_Copy(file, self._folder, self._changed))
        with self._changed:
            for copy in self._copies:
                if copy.state == "copying" and time.monotonic() - copy.heard > self._patience_s:
                    copy.give_up(f"copying it made no progress for {self._patience_s:g} s")
                    copy.why_not, copy.state = copy.given_up, "done"  # its thread may hang for ever: it tidies up if it wakes
            ready = next((copy for copy in self._copies if copy.state == "done"), None)
        if ready is None:
            return None
        self._copies.remove(ready)
        self._idle_since = None
        if ready.why_not:
            self._desk.remark(ready.file.slide_id, f"read where it lies: {ready.why_not}", loud=ready.why_not not in self._told)
            self._told.add(ready.why_not)
            return replace(ready.file, copy=None)
        assert ready.target is not None
        self._targets[ready.file.slide_id] = ready.target
        return ready.file

    def wait(self) -> None:
        if not self._copies:
            self._desk.wait()
            return
        with self._changed:
            states = {copy.state for copy in self._copies}
            if states == {"waiting"}:  # nothing of this run will make room
                self._idle_since = self._idle_since or time.monotonic()
                if time.monotonic() - self._idle_since > _IDLE_S:
                    self._copies[0].give_up("other runs take up --stage-gb")
                self._changed.notify_all()
            if "done" not in states:
                self._changed.wait(min(_LOOK_AGAIN_S, _IDLE_S))

    def remark(self, slide_id: str, text: str, *, loud: bool = True) -> None:
        self._desk.remark(slide_id, text, loud=loud)

    def count(self, n_tiles: int) -> None:
        self._desk.count(n_tiles)

    def finish(self, row: Row) -> None:
        if (target := self._targets.pop(row.slide_id, None)) is not None:
            self._folder.remove(target, still_read=row.status == "failed")
            with self._changed:
                self._changed.notify_all()  # there is room
        self._desk.finish(row)

    def close(self) -> None:
        """Stop copying."""
        for copy in self._copies:
            copy.give_up("the run has ended")
        with self._changed:
            self._changed.notify_all()

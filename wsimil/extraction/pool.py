"""Reader processes seen from the run: calls go out, pixels and results come back, and none of them can stop the run.

- A reader that gives no sign of life for `timeout` seconds is killed and replaced; its slide fails. So does the slide on which a
  reader crashes.
- Readers live across slides. Pixels travel through shared memory of a fixed size, whatever the size of a slide.
- A reader that waits for the run to empty its memory is not stuck.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from wsimil import errors
from wsimil.errors import SlideError, SlideStuckError, SlideUnreadableError, WsimilError

__all__ = ["Call", "Done", "Failed", "Filled", "ReaderCrash", "ReaderPool", "Remark", "reader_count"]

_SLOTS = 3
_SLOT_BYTES = 8 << 20
_START_TRIES = 3
"""A reader that is killed before it is ready is started again so often, on average."""

_START_UP_S = 600.0
"""Patience with a Python that starts from a slow network folder."""


@dataclass(frozen=True)
class Call:
    """A function `module:name` that a reader calls as `function(reading, *arguments)`; `key` says for whom."""

    key: Hashable
    function: str
    arguments: tuple


@dataclass(frozen=True)
class Done:
    """A call returned."""

    call: Call
    value: Any


@dataclass(frozen=True)
class Failed:
    """A call ended with an error."""

    call: Call
    error: Exception


@dataclass(frozen=True)
class Filled:
    """Pixels of a call that goes on. They stay in place until `ReaderPool.release`."""

    call: Call
    content: Any
    memory: np.ndarray  # uint8, flat
    reader: Any
    slot: int


@dataclass(frozen=True)
class Remark:
    """Something a person should know about the slide of a call."""

    call: Call
    text: str
    loud: bool = True  # false: for the manifest only


class ReaderCrash(Exception):
    """An error in a reader that nobody foresaw. `errno` is the system's, if it came from there."""

    def __init__(self, reason: str, trace: str, errno: int | None = None) -> None:
        super().__init__(reason)
        self.trace, self.errno = trace, errno


def reader_count(workers: int) -> int:
    """As asked, or one per core that this process may use, at most 16."""
    if workers:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores)


class ReaderPool:
    """`count` reader processes.

    Args:
        timeout: seconds without a sign of life.
        tile_bytes: size of a tile; the shared memory holds at least one in each slot.

    Attributes:
        lost: readers that had to be replaced.
    """

    def __init__(self, count: int, *, timeout: float, tile_bytes: int = 1) -> None:
        self._timeout, self.lost = timeout, 0
        self._slot_bytes = max(tile_bytes, _SLOT_BYTES // tile_bytes * tile_bytes)
        self._inbox: queue.SimpleQueue[tuple[_Reader, tuple]] = queue.SimpleQueue()
        self._readers = [self._start() for _ in range(count)]

    def _start(self) -> _Reader:
        return _Reader(self._slot_bytes, self._inbox)

    @property
    def has_idle(self) -> bool:
        return bool(self.idle)

    @property
    def busy(self) -> bool:
        return any(reader.call is not None for reader in self._readers)

    @property
    def idle(self) -> list[int]:
        """Places of the readers that have nothing to do."""
        return [place for place, reader in enumerate(self._readers) if reader.call is None]

    def start(self, call: Call, place: int | None = None) -> None:
        """Give a call to an idle reader: the one at a place, which may have the slide open, or any."""
        self._readers[self.idle[0] if place is None else place].start(call)

    def release(self, filled: Filled) -> None:
        """Give the memory of `filled` back to its reader."""
        filled.reader.give_slot(filled.slot)

    def next(self, wait_s: float) -> Done | Failed | Filled | Remark | None:
        """The next thing that a reader says; None when there is nothing within `wait_s`.

        Raises:
            WsimilError: readers cannot be started here.
        """
        deadline = time.monotonic() + wait_s
        while True:
            for reader in list(self._readers):
                if failed := self._stuck(reader):
                    return failed
            left = deadline - time.monotonic()
            try:
                reader, message = self._inbox.get(timeout=max(0.0, min(left, 0.25)))
            except queue.Empty:
                if left <= 0:
                    return None
                continue
            if reader in self._readers and (event := self._understand(reader, message)):
                return event

    def _understand(self, reader: _Reader, message: tuple) -> Done | Failed | Filled | Remark | None:
        kind, *content = message
        reader.heard = time.monotonic()
        if kind == "ready":
            reader.ready = True
            return None
        if kind == "gone":
            return self._gone(reader)
        call = reader.call
        if call is None or kind == "alive":
            return None
        if kind in ("remark", "note"):
            return Remark(call, content[0], loud=kind == "remark")
        if kind == "filled":
            slot, word = content
            reader.free_slots -= 1
            start = slot * self._slot_bytes
            return Filled(call, word, reader.memory[start : start + self._slot_bytes], reader, slot)
        reader.call = None
        if kind == "done":
            return Done(call, content[0])
        if kind == "slide error":
            return Failed(call, getattr(errors, content[0], SlideError)(content[1]))
        name, text, errno, trace = content
        return Failed(call, ReaderCrash(text if errno else f"{name}: {text}", trace, errno))

    def _stuck(self, reader: _Reader) -> Failed | None:
        silent = time.monotonic() - reader.heard
        if not reader.ready:
            if silent > _START_UP_S:
                raise WsimilError(f"a process that reads slides did not start within {_START_UP_S:.0f} s")
            return None
        if reader.call is None or reader.free_slots == 0 or silent <= self._timeout:
            return None
        call = reader.call
        self._replace(reader)
        reason = f"a read did not come back within {self._timeout:g} s (a network folder that hangs, a pipe, a damaged file?)"
        return Failed(call, SlideStuckError(f"{reason}; --read-timeout sets the patience"))

    def _gone(self, reader: _Reader) -> Failed | None:
        code, printed = reader.end()
        if not reader.ready and code < 0 and self.lost < _START_TRIES * len(self._readers):
            self._replace(reader).take_over(reader)  # killed from outside: what it was asked, another is
            return None
        if not reader.ready:
            raise WsimilError(f"a process that reads slides could not start (exit {code}): {printed[-2000:].strip()}")
        call = reader.call
        self._replace(reader)
        if call is None:
            return None
        if code == -signal.SIGKILL:
            return Failed(call, SlideStuckError("its reader was killed from outside (out of memory?); run again to try again"))
        name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return Failed(call, SlideUnreadableError(f"a library crashed on it ({name}): the file is damaged"))

    def _replace(self, reader: _Reader) -> _Reader:
        self.lost += 1
        reader.kill()
        new = self._readers[self._readers.index(reader)] = self._start()
        return new

    def close(self) -> None:
        """End all readers, whatever they do."""
        for reader in self._readers:
            reader.kill()
        self._readers = []

    def __enter__(self) -> ReaderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Reader:
    """One process, its shared memory and the thread that listens to it."""

    def __init__(self, slot_bytes: int, inbox: queue.SimpleQueue) -> None:
        self.call: Call | None = None
        self.ready, self.heard = False, time.monotonic()
        self.free_slots = _SLOTS
        handle = _shared_file(slot_bytes * _SLOTS)
        self.memory = np.frombuffer(mmap.mmap(handle, slot_bytes * _SLOTS), np.uint8)
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        command = [sys.executable, "-m", "wsimil.extraction.reader", str(handle), str(slot_bytes)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._printed,
                pass_fds=(handle,),
                env=environment,
            )
        finally:
            os.close(handle)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._calls, self._results = self._process.stdin, self._process.stdout
        threading.Thread(target=self._listen, args=(inbox,), daemon=True).start()
        for slot in range(_SLOTS):
            self._say("slot", slot)

    def start(self, call: Call) -> None:
        self.call, self.heard = call, time.monotonic()
        self._say("call", (call.function, call.arguments))

    def take_over(self, other: _Reader) -> None:
        """Start the call of a reader that has not begun."""
        if other.call is not None:
            self.start(other.call)

    def give_slot(self, slot: int) -> None:
        self.free_slots += 1
        self.heard = time.monotonic()
        self._say("slot", slot)

    def _say(self, kind: str, content: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone: the listener says so
            pickle.dump((kind, content), self._calls, protocol=pickle.HIGHEST_PROTOCOL)
            self._calls.flush()

    def _listen(self, inbox: queue.SimpleQueue) -> None:
        try:
            while True:
                inbox.put((self, pickle.load(self._results)))
        except Exception:  # the end of the stream, or half a message of a process that was killed
            inbox.put((self, ("gone",)))

    def end(self) -> tuple[int, str]:
        """Exit status and what was printed by a process that has closed its output."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = -signal.SIGKILL
        self._printed.seek(0)
        return code, self._printed.read().decode(errors="replace")

    def kill(self) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # inside the kernel, on a network folder that hangs
            self._process.wait(2)
        with contextlib.suppress(OSError):
            self._calls.close()
        self._printed.close()


def _shared_file(size: int) -> int:
    """A file without a name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("wsimil")
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    os.ftruncate(handle, size)
    return handle

"""Readers that hang, crash or die cost a slide, never the run. The calls here stand in for what damaged files do to libraries."""

from __future__ import annotations

import ctypes
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsimil.errors import SlideStuckError, SlideUnreadableError, StaleBagError, WsimilError
from wsimil.extraction.pool import Call, Done, Failed, Filled, ReaderCrash, ReaderPool, Remark

# ---------------------------------------------------------------- what readers are told to do: they import this file by its name


def echo(reading: Any, value: Any) -> Any:
    return value


def hang(reading: Any) -> None:
    time.sleep(1000)


def be_slow(reading: Any, signs: int) -> str:
    for _ in range(signs):
        time.sleep(0.6)
        reading.alive()
    return "at last"


def crash(reading: Any) -> None:
    ctypes.string_at(0)


def die(reading: Any) -> None:
    os.kill(os.getpid(), 9)


def refuse(reading: Any) -> None:
    raise StaleBagError("made from another recipe")


def trip(reading: Any) -> None:
    raise ZeroDivisionError("in a library")


def run_out_of_space(reading: Any) -> None:
    raise OSError(28, "No space left on device", "job/x.h5")


def babble(reading: Any) -> int:
    print("a library prints")
    os.write(1, b"and so does C")
    warnings.warn("pixels are not square", stacklevel=1)
    return os.getpid()


def fill(reading: Any, pieces: int) -> None:
    for number in range(pieces):
        slot, memory = reading.slot(16)
        memory[:] = number % 251
        reading.filled(slot, number)


# ---------------------------------------------------------------- facts


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def call(name: str, *arguments: Any) -> Call:
    return Call("s", f"test_pool:{name}", arguments)


def outcome(pool: ReaderPool, wanted: Call) -> Done | Failed:
    pool.start(wanted)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        event = pool.next(1.0)
        if isinstance(event, Done | Failed):
            return event
    raise AssertionError("the pool did not answer")


@pytest.fixture
def pool() -> Any:
    with ReaderPool(1, timeout=3.0, tile_bytes=768) as pool:
        yield pool


def test_a_call_is_answered_by_the_same_process_every_time(pool: ReaderPool) -> None:
    first, second = outcome(pool, call("babble")), outcome(pool, call("babble"))
    assert isinstance(first, Done) and isinstance(second, Done) and first.value == second.value != os.getpid()
    assert outcome(pool, call("echo", {"a": (1, "µ")})) == Done(call("echo", {"a": (1, "µ")}), {"a": (1, "µ")})


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("hang", SlideStuckError, "did not come back within 3 s"),
        ("crash", SlideUnreadableError, "SIGSEGV"),
        ("die", SlideStuckError, "killed from outside"),
        ("refuse", StaleBagError, "another recipe"),
        ("trip", ReaderCrash, "ZeroDivisionError: in a library"),
        ("run_out_of_space", ReaderCrash, "No space left"),
    ],
)
def test_what_goes_wrong_is_told_and_the_next_call_is_answered(
    pool: ReaderPool, name: str, kind: type[Exception], words: str
) -> None:
    failed = outcome(pool, call(name))
    assert isinstance(failed, Failed) and type(failed.error) is kind and words in str(failed.error)
    if isinstance(failed.error, ReaderCrash):
        assert f"in {name}" in failed.error.trace
        assert failed.error.errno == (28 if name == "run_out_of_space" else None)
    assert isinstance(outcome(pool, call("echo", 1)), Done)


def test_slow_is_not_stuck(pool: ReaderPool) -> None:
    """Longer than the patience in all, but with signs of life."""
    assert outcome(pool, call("be_slow", 8)) == Done(call("be_slow", 8), "at last")


def test_a_reader_that_waits_for_the_run_is_not_stuck_and_loses_nothing(pool: ReaderPool) -> None:
    pool.start(call("fill", 20))
    seen = []
    while not isinstance(event := pool.next(30.0), Done):
        assert isinstance(event, Filled), event
        if len(seen) == 5:
            time.sleep(4.0)  # longer than the patience: the run is busy encoding
        count = len(event.memory) // 768 * 768
        assert (event.memory[:count] == event.content % 251).all(), "memory is not written to before it is given back"
        seen.append(event.content)
        pool.release(event)
    assert seen == list(range(20))


def test_warnings_are_remarks_about_the_slide(pool: ReaderPool) -> None:
    pool.start(call("babble"))
    events = []
    while not events or not isinstance(events[-1], Done):
        events.append(pool.next(30.0))
    assert events[0] == Remark(call("babble"), "pixels are not square")


def test_closing_ends_every_reader_even_one_that_hangs() -> None:
    with ReaderPool(2, timeout=100.0) as pool:
        pids = []
        for _ in range(2):
            done = outcome(pool, call("babble"))
            assert isinstance(done, Done)
            pids.append(done.value)
        pool.start(call("hang"))
        time.sleep(0.2)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_python_that_cannot_start_readers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with ReaderPool(1, timeout=1.0) as pool, pytest.raises(WsimilError, match="could not start"):
        pool.start(call("echo", 1))
        while True:
            pool.next(1.0)


def test_a_reader_killed_before_it_is_ready_is_started_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kills, python = tmp_path / "kills", sys.executable
    script = tmp_path / "python"  # the first two of it die on their way
    script.write_text(f'#!/bin/sh\necho >> {kills}\n[ $(wc -l < {kills}) -gt 2 ] || kill -9 $$\nexec {python} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with ReaderPool(1, timeout=30.0) as pool:
        done = outcome(pool, call("echo", 7))
        assert isinstance(done, Done) and done.value == 7 and pool.lost == 2


def test_one_that_is_always_killed_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with ReaderPool(1, timeout=30.0) as pool, pytest.raises(WsimilError, match="could not start"):
        outcome(pool, call("echo", 7))


def test_memory_holds_at_least_one_tile_however_large() -> None:
    with ReaderPool(1, timeout=30.0, tile_bytes=2648 * 2648 * 3) as pool:
        pool.start(Call("s", "test_pool:fill_large", ()))
        event = pool.next(30.0)
        assert isinstance(event, Filled) and event.content == (1, 2648, 2648, 3)
        assert isinstance(event.memory, np.ndarray)


def fill_large(reading: Any) -> None:
    slot, memory = reading.slot(2648)  # 20 MB and a little
    reading.filled(slot, memory.shape)

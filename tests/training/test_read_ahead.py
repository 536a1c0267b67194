"""Reading ahead: the same items in the same order, by a thread only where that pays."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from wsimil.training.read_ahead import read_ahead

MAIN = threading.get_ident()


@pytest.fixture
def reading(monkeypatch) -> Callable[[float, float], Callable[[int], tuple[int, bool]]]:
    """Makes reads that take and work so long, by clocks of their own; they give their item, and whether no thread read it."""
    now = SimpleNamespace(wall=0.0, worked=0.0)
    clocks = SimpleNamespace(perf_counter=lambda: now.wall, thread_time=lambda: now.worked)
    monkeypatch.setattr("wsimil.training.read_ahead.time", clocks)

    def make(took_s: float, worked_s: float) -> Callable[[int], tuple[int, bool]]:
        def read(item: int) -> tuple[int, bool]:
            now.wall += took_s
            now.worked += worked_s
            return item, threading.get_ident() == MAIN

        return read

    return make


def test_a_disk_that_makes_us_wait_is_read_by_a_thread_from_then_on(reading):
    assert list(read_ahead(reading(0.1, 0.01), range(4))) == [(0, True), (1, False), (2, False), (3, False)]


@pytest.mark.parametrize(("took_s", "worked_s"), [(0.1, 0.09), (1e-5, 1e-6)])
def test_reading_that_is_work_or_nothing_stays_where_it_is(reading, took_s, worked_s):
    assert list(read_ahead(reading(took_s, worked_s), range(3))) == [(0, True), (1, True), (2, True)]


def test_always_means_from_the_second_on(reading):
    assert list(read_ahead(reading(0.1, 0.1), range(3), always=True)) == [(0, True), (1, False), (2, False)]


def test_one_item_ahead_and_no_further():
    seen = [threading.Event() for _ in range(5)]
    reads = read_ahead(lambda item: seen[item].set(), range(5), always=True)
    next(reads)
    assert seen[1].wait(30) and not seen[2].wait(0.1)
    next(reads)
    assert seen[2].wait(30) and not seen[3].wait(0.1)


@pytest.mark.parametrize("always", [False, True])
def test_what_cannot_be_read_is_told_in_its_place(always):
    def read(item: int) -> int:
        if item == 2:
            raise OSError("gone")
        return item

    reads = read_ahead(read, range(4), always=always)
    assert [next(reads), next(reads)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(reads)


def test_nothing_to_read():
    assert list(read_ahead(str, [])) == []

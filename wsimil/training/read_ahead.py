"""Reading what comes next while work is done on what came before, where that pays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from typing import TypeVar

__all__ = ["read_ahead"]

Item = TypeVar("Item")
Found = TypeVar("Found")


def read_ahead(read: Callable[[Item], Found], items: Iterable[Item], *, always: bool = False) -> Iterator[Found]:
    """read(item) for each in order; once the disk has made us wait, a thread reads the next one meanwhile.

    Where files come out of memory, the thread would but take a processor from arithmetic, all of whose threads then wait for the
    one that shares its core. Reads never overlap.

    Args:
        always: do not wait for the disk to be slow: the work is done elsewhere, as on a GPU.
    """
    wanted = list(items)
    with ThreadPoolExecutor(1, "wsimil-read") as thread:
        waiting: Future[Found] | None = None
        for item, following in zip_longest(wanted, wanted[1:]):
            if waiting is not None:
                found = waiting.result()
            else:
                began, worked = time.perf_counter(), time.thread_time()
                found = read(item)
                always = always or _has_waited(time.perf_counter() - began, time.thread_time() - worked)
            waiting = thread.submit(read, following) if always and following is not None else None
            yield found


def _has_waited(took_s: float, worked_s: float) -> bool:
    return took_s - worked_s > max(1e-3, 2 * worked_s)

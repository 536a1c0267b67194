"""Memory used again: never while somebody still looks at it."""

from __future__ import annotations

import _thread
import gc
import operator
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from wsimil.memory import ReusedMemory


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_returns_when_nothing_refers_to_it():
    allocate = ReusedMemory()
    array = allocate((1000, 8), np.float16)
    assert array.shape == (1000, 8) and array.dtype == np.float16 and array.flags.writeable
    place = address(array)
    del array
    gc.collect()
    assert address(allocate((900, 8), np.float16)) == place  # smaller: the same place will do


def test_a_view_or_a_tensor_keeps_its_memory():
    allocate = ReusedMemory()
    array = allocate((1000, 8), np.float32)
    array[:] = 3
    view, tensor = array[10:20].T, torch.from_numpy(array)[5:].view(-1)
    del array
    gc.collect()
    others = [allocate((1000, 8), np.float32) for _ in range(3)]
    for other in others:
        other[:] = 7
    assert (view == 3).all() and (tensor == 3).all()
    del view
    gc.collect()
    allocate((1000, 8), np.float32)[:] = 8
    assert (tensor == 3).all()


def test_what_is_too_small_makes_room():
    allocate = ReusedMemory()
    for size in range(1, 200):
        allocate((size,), np.float32)[:] = size
        gc.collect()
    assert len(allocate._free) + len(allocate._returned) == 1
    assert allocate((0, 4), np.float32).shape == (0, 4)


def test_large_blocks_are_not_kept():
    allocate = ReusedMemory(most=1000)
    large, small = allocate((1001,), np.uint8), allocate((1000,), np.uint8)
    del large, small
    gc.collect()
    assert [len(block) for _, block in allocate._lent.values()] == [1000] and len(allocate._returned) == 1


def test_ctrl_c_is_not_lost_while_memory_is_given_back():
    """It comes in C, as in a step on the way back, and so does the end of the array: what runs first in Python hears it."""
    allocate = ReusedMemory()
    held = [allocate((1000,), np.float32)]
    calls = [_thread.interrupt_main, held.clear]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may be deaf to it
    try:
        with pytest.raises(KeyboardInterrupt):
            list(map(operator.methodcaller("__call__"), calls))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not held and len(allocate._returned) == 1


def test_threads_may_share_one():
    allocate = ReusedMemory()

    def take(number: int) -> bool:
        kept = [allocate((size,), np.int32) for size in range(1, 40)]
        for array in kept:
            array[:] = number
        return all((array == number).all() for array in kept)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(take, range(200)))

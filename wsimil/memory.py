"""Memory that is used again: where the same is needed at every step, fresh pages cost more than what is done with them."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque

import numpy as np
from numpy.typing import DTypeLike

__all__ = ["ReusedMemory"]


class ReusedMemory:
    """Allocates like `np.empty`; memory returns here once nothing refers to the array, be it through a view or a tensor.

    Threads may share one.

    Args:
        most: bytes of a block that is kept for another time; None: any.
    """

    def __init__(self, *, most: int | None = None) -> None:
        self._free: list[memoryview] = []
        self._lent: dict[int, tuple[weakref.ref, memoryview]] = {}  # by id of the reference: arrays have no hash
        self._returned: deque[weakref.ref] = deque()  # may come at any moment, also while the lock is held
        self._lock = threading.Lock()
        self._most = math.inf if most is None else most

    def __call__(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if n_bytes > self._most:
            return np.empty(shape, dtype)
        with self._lock:
            block = self._taken(n_bytes)
        # over a memoryview: every view of this array, and every tensor, holds the array itself and not what lies below
        array = np.frombuffer(block, np.uint8, n_bytes)
        # no function of Python's, as `weakref.finalize` is one: Ctrl-C that comes while memory is given back would be lost in it
        reference = weakref.ref(array, self._returned.append)
        self._lent[id(reference)] = reference, block
        return array.view(dtype).reshape(shape)

    def _taken(self, n_bytes: int) -> memoryview:
        """The smallest free block that is large enough, or a new one in the place of the largest that is not."""
        while self._returned:
            self._free.append(self._lent.pop(id(self._returned.popleft()))[1])
        self._free.sort(key=len)
        for index, block in enumerate(self._free):
            if len(block) >= n_bytes:
                return self._free.pop(index)
        if self._free:
            self._free.pop()
        return np.empty(max(1, n_bytes), np.uint8).data

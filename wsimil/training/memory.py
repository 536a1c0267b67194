"""Memory that is used again: where bags come from files in every epoch, the system's fresh pages cost more than reading."""

from __future__ import annotations

import math
import weakref

import numpy as np
from numpy.typing import DTypeLike

__all__ = ["ReusedMemory"]


class ReusedMemory:
    """Allocates like `np.empty`; memory returns here once nothing refers to the array, be it through a view or a tensor."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []

    def __call__(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        block = self._taken(n_bytes)
        # over a memoryview: every view of this array, and every tensor, holds the array itself and not what lies below
        array = np.frombuffer(block, np.uint8, n_bytes)
        weakref.finalize(array, self._free.append, block).atexit = False
        return array.view(dtype).reshape(shape)

    def _taken(self, n_bytes: int) -> memoryview:
        """The smallest free block that is large enough, or a new one in the place of the largest that is not."""
        self._free.sort(key=len)
        for index, block in enumerate(self._free):
            if len(block) >= n_bytes:
                return self._free.pop(index)
        if self._free:
            self._free.pop()
        return np.empty(max(1, n_bytes), np.uint8).data

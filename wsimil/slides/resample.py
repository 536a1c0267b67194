"""Resampling a box of pixels: what Pillow's `resize` gives, bit for bit, in less time.

- Pillow is the rule (`Slide.read_box`); this is its arithmetic again: weights in 1 / 2^22, columns first, rounded to a byte in
  between. A test holds the two together.
- A filter that reaches over four or five pixels is a sparse matrix: rows of the picture are added up whole, in 32-bit integers.
"""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np
import scipy.sparse

__all__ = ["resample"]

_PRECISION_BITS = 22
# Pillow has these two as 32-bit floats
_HAMMING = float(np.float32(0.54)), float(np.float32(0.46))


def resample(columns: np.ndarray, box: tuple[float, float, float, float], side_px: int, out: np.ndarray) -> None:
    """Resample a box (left, top, right, bottom) of a picture to a square, into `out`, uint8 (side_px, side_px, 3).

    Hamming's filter where no side is enlarged, else linear interpolation.

    Args:
        columns: the picture, uint8 (width, height, 3): x comes first.
    """
    left, top, right, bottom = box
    enlarges = min(right - left, bottom - top) < side_px
    narrow = _weigh(_weights(len(columns), left, right, side_px, enlarges), columns)  # (side_px, height, 3)
    rows = cv2.transpose(narrow)
    out[:] = _weigh(_weights(len(rows), top, bottom, side_px, enlarges), rows)


def _weigh(weights: scipy.sparse.csr_matrix, lines: np.ndarray) -> np.ndarray:
    """uint8 weighted sums of lines (rows or columns) of a picture."""
    count, *shape = lines.shape
    sums = weights @ lines.reshape(count, -1).astype(np.uint32)
    sums += np.uint32(1 << 23)  # half
    rounded = np.empty(sums.shape, np.uint8)  # weights add up to 2^24, so this is no overflow
    np.right_shift(sums, 24, out=rounded, casting="unsafe")
    return rounded.reshape(len(sums), *shape)


@lru_cache(maxsize=64)
def _weights(length: int, low: float, high: float, size: int, enlarges: bool) -> scipy.sparse.csr_matrix:
    """(size, length) uint32: the share of each line in each line of the result, in 1 / 2^24."""
    begin, stop = np.float32(low), np.float32(high)  # Pillow keeps a box in 32-bit floats
    step = float(stop - begin) / size
    support = max(step, 1.0)
    centre = float(begin) + (np.arange(size) + 0.5) * step
    first = np.maximum((centre - support + 0.5).astype(int), 0)
    end = np.minimum((centre + support + 0.5).astype(int), length)
    line = first[:, None] + np.arange((end - first).max())  # (size, taps)
    weights = _filter((line - centre[:, None] + 0.5) * (1 / support), enlarges)
    weights[line >= end[:, None]] = 0
    weights /= weights.cumsum(1)[:, -1:]  # in Pillow's order: the last bit counts
    whole = (weights * (1 << _PRECISION_BITS) + 0.5).astype(np.uint32) << (24 - _PRECISION_BITS)
    used = whole > 0
    starts = np.append(0, used.sum(1).cumsum())
    return scipy.sparse.csr_matrix((whole[used], line[used], starts), shape=(size, length))


def _filter(x: np.ndarray, linear: bool) -> np.ndarray:
    x = np.abs(x)
    if linear:
        return np.maximum(1 - x, 0)
    angle = np.where(x == 0, 1, x * math.pi)
    value = np.sin(angle) / angle * (_HAMMING[0] + _HAMMING[1] * np.cos(angle))
    return np.where(x == 0, 1, np.where(x < 1, value, 0))

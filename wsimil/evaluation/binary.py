"""What is either so or not: numpy would take the text "0", and a missing value, for true."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["as_bool"]


def as_bool(values: ArrayLike, name: str) -> np.ndarray:
    """Booleans, from booleans or the numbers 0 and 1.

    Raises:
        ValueError: anything else, such as text, NaN or class 2.
    """
    array = np.asarray(values)
    if array.dtype == object:  # columns of a table with True and False, or with something missing
        good = np.array([not isinstance(value, str) and value in (0, 1) for value in array.ravel()], bool)
    else:
        good = np.isin(array.ravel(), (0, 1)) if array.dtype.kind in "buif" else np.zeros(array.size, bool)
    if not good.all():
        wrong = array.ravel()[~good].tolist()[0]
        raise ValueError(f"{name} holds {wrong!r}; expected True and False, or the numbers 1 and 0")
    return array.astype(bool)

"""Slides and cohorts that tests share; painted or made here, nothing downloaded."""

from __future__ import annotations

import os
from pathlib import Path

# a worker per core already: threads of theirs would wait for each other in busy loops, ten times as long as the work takes
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402 (numbers of threads are read when these are imported)
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from wsimil.slides.write_tiff import write_slide  # noqa: E402

settings.register_profile("suite", max_examples=20, deadline=None)  # a machine under load is slow, not wrong
settings.load_profile("suite")


def speckled(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A field without glass: tissue-coloured noise in blocks, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(-40, 40, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
    return np.clip(np.array([190, 120, 170]) + coarse, 0, 255).astype(np.uint8)


def write_three(folder: Path) -> Path:
    """Three small slides: whole tissue at .5 and at .25 µm/px, and bare glass."""
    folder.mkdir()
    write_slide(folder / "a.tiff", speckled(600, 400, 1), mpp=0.5, compression="deflate", downsamples=(1, 4))
    write_slide(folder / "b.tiff", speckled(1024, 768, 2), mpp=0.25, compression="deflate", downsamples=(1, 4))
    glass = np.full((700, 700, 3), 240, np.uint8)
    write_slide(folder / "glass.tiff", glass, mpp=0.5, compression="deflate", downsamples=(1, 4))
    return folder


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    return write_three(tmp_path / "slides")

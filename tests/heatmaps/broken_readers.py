"""Readers that do to some slides what damaged files and full disks do, and draw the others; light to import, as readers are."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsimil.config import HeatmapConfig
from wsimil.files import atomic_path
from wsimil.heatmaps.draw import draw_in_reader
from wsimil.slides.cohort import SlideFile


def draw_or_break(reading: Any, scores: Path, file: SlideFile, row: Mapping[str, Any], out: Path, config: HeatmapConfig) -> bool:
    breaking: Any = Breaking(reading, out)
    return draw_in_reader(breaking, scores, file, row, out, config)


@dataclass
class Breaking:
    """What happens when a slide is opened is its name."""

    reading: Any
    out: Path

    def alive(self) -> None:
        self.reading.alive()

    def slide(self, file: SlideFile, mpp: float | None) -> Any:
        if "hangs" in file.slide_id:
            with atomic_path(self.out / f"{file.slide_id}.png") as temporary:
                temporary.write_bytes(b"half a picture")
                time.sleep(1000)
        if "crashes" in file.slide_id:
            ctypes.string_at(0)
        if "trips" in file.slide_id:
            raise ZeroDivisionError("in a\nlibrary")
        if "fills" in file.slide_id:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.out / "x.png"))
        return self.reading.slide(file, mpp)

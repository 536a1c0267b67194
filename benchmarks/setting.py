"""What the benchmarks share: slides made on the spot, and where and with what they ran."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import simplejpeg
import tifffile

from wsimil.slides.painting import paint_slide

__all__ = ["machine", "make_slide"]

QUALITY = 95  # paint compresses better than tissue: this gives the 15 KB a block of scanners


def machine(*packages: str) -> str:
    """Processor, cores, system and the versions of packages, on one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), model)
    libraries = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}; {libraries}"


def make_slide(folder: Path, *, block_px: int, chroma: str, side_px: int, downsamples: tuple[int, ...] = (1,)) -> Path:
    """A JPEG slide in Aperio's manner: blocks cut from one painting at random places, turned at random."""
    path = folder / f"bench-{side_px}-{block_px}-{chroma}-{len(downsamples)}.svs"
    if path.exists():
        return path
    picture = paint_slide(1024, 1024, mpp=0.25, seed=3).rgb  # (4096, 4096, 3)
    rng = np.random.default_rng(0)

    def blocks(count: int) -> Iterator[bytes]:
        for _ in range(count):
            x, y = rng.integers(400, 3696 - block_px, 2)
            block = np.rot90(picture[y : y + block_px, x : x + block_px], int(rng.integers(4)))
            yield simplejpeg.encode_jpeg(np.ascontiguousarray(block), quality=QUALITY, colorsubsampling=chroma)

    unfinished = path.with_suffix(".tmp")
    with tifffile.TiffWriter(unfinished, bigtiff=True) as tiff:
        for downsample in downsamples:
            side = side_px // downsample
            tiff.write(
                blocks((-(-side // block_px)) ** 2),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(block_px, block_px),
                photometric="rgb",
                compression="jpeg",
                subsampling={"420": (2, 2), "422": (2, 1), "444": (1, 1)}[chroma],
                description=f"Aperio Image Library v11.2.1\r\n{side_px}x{side_px} ({block_px}x{block_px}) JPEG|MPP = 0.2500",
                metadata=None,
            )
    unfinished.rename(path)
    return path

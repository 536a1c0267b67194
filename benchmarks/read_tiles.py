"""Reading tiles on one core: wsimil's two ways side by side with what a user would pick instead.

    python benchmarks/read_tiles.py --folder /tmp/slides --table read_tiles.md

- Slides are made here (painted tissue, 20,480 px a side, some 15 KB a block) and kept in the folder; no download.
- Times are CPU seconds of the process, all libraries held to one thread, the file in the page cache; every round runs every way
  once, in turns, and the table has medians of rounds. Ratios travel to other machines, rates do not.
- The first way is that of TRIDENT and CLAM: `read_region` and `convert("RGB")` for each tile, and a resize where one is due.
- The floor is the decoding of the blocks that the tiles need, each once, from memory, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import openslide
from setting import machine, make_slide

from wsimil.slides.blocks import BlockError
from wsimil.slides.direct import DirectReader, open_direct
from wsimil.slides.slide import Slide
from wsimil.slides.tiling import resolve_scale

PACKAGES = ("openslide-bin", "simplejpeg", "opencv-python-headless", "pillow", "numpy")
BATCH = 32
OPENSLIDE, PLAIN, DIRECT, DCT = "OpenSlide per tile", "wsimil, plain path", "wsimil, direct", "wsimil, direct, DCT-scaled"
FLOOR, DCT_FLOOR = "floor: decode the blocks", "floor: decode the blocks DCT-scaled"


@dataclass(frozen=True)
class Case:
    title: str
    block_px: int
    chroma: str
    slide_mpp: float
    tile_px: int
    columns: int  # of tiles
    rows: int

    @property
    def tile_level0_px(self) -> float:
        target = 0.5
        return self.tile_px * resolve_scale(self.slide_mpp, target).factor


CASES = (
    Case("224 px native, 256-px blocks 4:2:0", 256, "420", 0.5, 224, 48, 8),
    Case("256 px native on the grid of the blocks, 4:2:0", 256, "420", 0.5, 256, 48, 8),
    Case("256 px native, 240-px blocks 4:2:2", 240, "422", 0.5, 256, 48, 8),
    Case("256 px for .5 of .499 µm/px (read as it is), 240-px blocks 4:2:2", 240, "422", 0.499, 256, 48, 8),
    Case("40x → 20x, 256 px, 256-px blocks 4:2:0", 256, "420", 0.25, 256, 24, 4),
    Case("40x → 20x, 224 px, 256-px blocks 4:2:0", 256, "420", 0.25, 224, 24, 4),
    Case("40x → 20x, 256 px, 240-px blocks 4:2:2", 240, "422", 0.25, 256, 24, 4),
    Case("256 px for .5 of .2527 µm/px (factor 1.979), 256-px blocks 4:2:0", 256, "420", 0.2527, 256, 24, 4),
)


def ways(path: Path, slide: Slide, case: Case, coords: np.ndarray) -> dict[str, Callable[[], object]]:
    """What is timed: each reads all tiles of the case once."""
    side, px = case.tile_level0_px, case.tile_px
    reference = openslide.OpenSlide(path)
    region = (round(side), round(side))
    corners = coords.tolist()

    def openslide_per_tile() -> None:
        for x, y in corners:
            tile = reference.read_region((x, y), 0, region).convert("RGB")
            if region != (px, px):
                tile.resize((px, px))

    def plain() -> None:
        for x, y in corners:
            slide.read_tile(x, y, tile_level0_px=side, tile_px=px)

    found: dict[str, Callable[[], object]] = {OPENSLIDE: openslide_per_tile, **others(path, corners, region, px), PLAIN: plain}
    memory = np.empty((BATCH, px, px, 3), np.uint8)
    for name, floor, scaled in ((DIRECT, FLOOR, False), (DCT, DCT_FLOOR, True)):
        reader, reason = open_direct(slide, tile_level0_px=side, tile_px=px, dct_scaled=scaled)
        if reader is None:
            raise SystemExit(f"{case.title}: not read directly: {reason}")
        if scaled and reader.reduce == 1:
            continue
        found[name] = direct(reader, coords, memory)
        found[floor] = decoding(reader, coords)
    return found


def direct(reader: DirectReader, coords: np.ndarray, memory: np.ndarray) -> Callable[[], object]:
    def read() -> None:
        walk = reader.walk(coords)
        for first in range(0, len(coords), len(memory)):
            failures = walk.read(memory[: len(coords) - first])
            assert not failures, failures

    return read


def decoding(reader: DirectReader, coords: np.ndarray) -> Callable[[], object]:
    walk = reader.walk(coords)
    content = [bytes(block) for block in reader.blocks.read(walk._order).values() if not isinstance(block, BlockError)]
    pixels = np.empty(reader.block_shape, np.uint8)

    def decode() -> None:
        for block in content:
            reader.blocks.decode(block, pixels, reduce=reader.reduce)

    return decode


def others(path: Path, corners: list, region: tuple[int, int], px: int) -> dict[str, Callable[[], object]]:
    """Other readers, where they are installed."""
    found: dict[str, Callable[[], object]] = {}

    def shrink(tile: np.ndarray) -> np.ndarray:
        return tile if region == (px, px) else cv2.resize(tile, (px, px), interpolation=cv2.INTER_AREA)

    def installed(module: str) -> bool:
        try:
            import_module(module)
        except Exception:
            return False
        return True

    if installed("tiffslide"):
        tiffslide = import_module("tiffslide").TiffSlide(path)
        found["tiffslide"] = lambda: [shrink(tiffslide.read_region((x, y), 0, region, as_array=True)) for x, y in corners]
    if installed("pyvips"):
        vips = import_module("pyvips")
        # a region keeps what it has decoded, as a careful user of it would
        loaded = vips.Region.new(vips.Image.tiffload(str(path)))
        shape = (*region[::-1], 3)
        found["pyvips, region"] = lambda: [
            shrink(np.frombuffer(loaded.fetch(x, y, *region), np.uint8).reshape(shape)) for x, y in corners
        ]
    if installed("cucim"):
        image = import_module("cucim").CuImage(str(path))
        found["cuCIM per tile"] = lambda: [shrink(np.asarray(image.read_region((x, y), region, 0))) for x, y in corners]
    return found


def measure(named: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for turn in range(rounds + 1):
        for name, run in named.items():
            start = time.process_time()
            run()
            if turn:  # the first warms caches
                seconds[name].append(time.process_time() - start)
    return seconds


def table(case: Case, seconds: dict[str, list[float]], *, n_tiles: int, n_blocks: int) -> str:
    lines = [
        f"### {case.title}",
        "",
        f"{n_tiles} tiles of {case.tile_level0_px:.1f} level-0 px on {n_blocks} blocks",
        "",
        "| way | tiles/s | × OpenSlide | of its floor | spread of rounds |",
        "|---|---|---|---|---|",
    ]
    median = {name: statistics.median(times) for name, times in seconds.items()}
    floors = {DIRECT: FLOOR, DCT: DCT_FLOOR}
    for name, times in seconds.items():
        # ratios within a round: what else the machine does falls on both
        faster = statistics.median(a / b for a, b in zip(seconds[OPENSLIDE], times, strict=True))
        reached = ""
        if name in floors:
            reached = f"{statistics.median(a / b for a, b in zip(seconds[floors[name]], times, strict=True)):.2f}"
        spread = (max(times) - min(times)) / median[name]
        lines.append(f"| {name} | {n_tiles / median[name]:,.0f} | {faster:.1f} | {reached} | {spread:.0%} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where slides are made and kept (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side-px", type=int, default=20_480)
    parser.add_argument("--only", default="", help="cases whose title contains this")
    parser.add_argument("--table", type=Path, help="where the Markdown table goes, besides the terminal")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    os.environ["VIPS_CONCURRENCY"] = "1"  # read when pyvips is imported, below
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        parts = [machine(*PACKAGES) + f"\n\nOne core, medians of {options.rounds} interleaved rounds of CPU time.\n"]
        print(parts[0])
        for case in CASES:
            if options.only not in case.title:
                continue
            path = make_slide(folder, block_px=case.block_px, chroma=case.chroma, side_px=options.side_px)
            with Slide(path, mpp=case.slide_mpp) as slide:
                # not on the grid of the blocks, but where the case says so
                origin = 0 if case.tile_px == case.block_px else 100
                xs = np.floor(origin + np.arange(case.columns) * case.tile_level0_px + 0.5)
                ys = np.floor(origin + np.arange(case.rows) * case.tile_level0_px + 0.5)
                coords = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2).astype(np.int64)
                named = ways(path, slide, case, coords)
                reader, _ = open_direct(slide, tile_level0_px=case.tile_level0_px, tile_px=case.tile_px)
                assert reader is not None
                n_blocks = len(reader.walk(coords)._order)
                parts.append(table(case, measure(named, rounds=options.rounds), n_tiles=len(coords), n_blocks=n_blocks))
            print(parts[-1], flush=True)
        if options.table:
            options.table.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()

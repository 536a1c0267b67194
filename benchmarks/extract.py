"""From slides to features: wsimil beside what a user would pick instead, on all cores of the machine.

    python benchmarks/extract.py loader encoder cohort memory --folder /tmp/slides --table extract.md

loader    Tiles as uint8 (wsimil) or as normalised tensors (TRIDENT, CLAM) in the main process, wall time. The first way is theirs:
          `read_region` for each tile and PIL transforms in a DataLoader with a worker a core. Workers of all ways are up before
          the clock starts. wsimil's readers also score every tile for blur and darkness. Threads are measured beside processes.
          The floor is the decoding of the blocks that the tiles need, from memory, on all cores at once, and nothing else.
encoder   `wsimil extract` with ViT-S/16 from tiles that are found already, against the model alone on tiles that lie in memory.
cohort    Fifty small slides against one large slide of as many tiles, with the built-in encoder: what is lost between slides.
memory    Peak memory of extracting from a slide of 100,000 px a side, mostly glass; all processes together, shared pages once.

Slides are made here and kept in the folder; nothing is downloaded. Rounds are interleaved; ratios travel to other machines,
rates do not.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import simplejpeg
import tifffile
import torch
from setting import QUALITY, machine, make_slide
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from wsimil.config import ExtractConfig, JobConfig, TileConfig
from wsimil.encoders import load_encoder
from wsimil.extraction import extract_features, tile_slides
from wsimil.extraction.extract import sections
from wsimil.extraction.pool import Call, Failed, Filled, ReaderPool
from wsimil.slides.cohort import find_slides
from wsimil.slides.direct import DirectReader
from wsimil.slides.painting import paint_slide
from wsimil.slides.quality import tile_quality
from wsimil.slides.slide import Slide
from wsimil.slides.tiles import open_tiles
from wsimil.slides.tiling import resolve_scale

PACKAGES = ("openslide-bin", "simplejpeg", "opencv-python-headless", "pillow", "torch", "timm", "numpy")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BATCH = 64


# ---------------------------------------------------------------- loader


@dataclass(frozen=True)
class Case:
    title: str
    block_px: int
    chroma: str
    slide_mpp: float
    tile_px: int
    per_side: int  # tiles

    @property
    def tile_level0_px(self) -> float:
        return self.tile_px * resolve_scale(self.slide_mpp, 0.5).factor


CASES = (
    Case("224 px native, 256-px blocks 4:2:0", 256, "420", 0.5, 224, 64),
    Case("256 px for .5 of .499 µm/px (read as it is), 240-px blocks 4:2:2", 240, "422", 0.499, 256, 56),
    Case("40x → 20x, 256 px, 256-px blocks 4:2:0", 256, "420", 0.25, 256, 32),
    Case("256 px for .5 of .2527 µm/px (factor 1.979), 256-px blocks 4:2:0", 256, "420", 0.2527, 256, 32),
)

THEIRS = "OpenSlide, PIL transforms, DataLoader"
FLOOR, DCT_FLOOR = "floor: decode the blocks", "floor: decode the blocks DCT-scaled"


class _OpenSlideTiles(Dataset):
    """Tiles as TRIDENT and CLAM read them; `transform` is None for bare uint8."""

    def __init__(self, path: Path, coords: np.ndarray, side: int, px: int, transform: Callable | None) -> None:
        self.path, self.coords, self.side, self.px, self.transform = path, coords.tolist(), side, px, transform
        self.slide: Any = None

    def __len__(self) -> int:
        return len(self.coords)

    def __getitem__(self, index: int) -> Any:
        if self.slide is None:  # in the worker
            self.slide = self.open()
        x, y = self.coords[index]
        tile = self.slide.read_region((x, y), 0, (self.side, self.side)).convert("RGB")
        if self.transform is not None:
            return self.transform(tile)
        return np.array(tile if self.side == self.px else tile.resize((self.px, self.px)))

    def open(self) -> Any:
        return openslide.OpenSlide(self.path)


class _TiffSlideTiles(_OpenSlideTiles):
    def open(self) -> Any:
        return import_module("tiffslide").TiffSlide(self.path)


class _CucimTiles(_OpenSlideTiles):
    def open(self) -> Any:
        return import_module("cucim").CuImage(str(self.path))

    def __getitem__(self, index: int) -> Any:
        if self.slide is None:
            self.slide = self.open()
        tile = np.asarray(self.slide.read_region(tuple(self.coords[index]), (self.side, self.side), 0))
        return tile if self.side == self.px else cv2.resize(tile, (self.px, self.px), interpolation=cv2.INTER_AREA)


def data_loader(tiles: Dataset) -> Callable[[], int]:
    loader = DataLoader(tiles, BATCH, num_workers=CORES, persistent_workers=True)
    return lambda: sum(len(batch) for batch in loader)


class _Readers:
    """wsimil's reader processes, as a run uses them."""

    def __init__(self, path: Path, case: Case, coords: np.ndarray, *, dct_scaled: bool) -> None:
        file = replace(find_slides(path)[0], mpp=case.slide_mpp)
        self.pool = ReaderPool(CORES, timeout=120, tile_bytes=case.tile_px**2 * 3)
        self.batch = np.empty((BATCH, case.tile_px, case.tile_px, 3), np.uint8)
        self.calls = [
            Call(
                start,
                "wsimil.extraction.pixels:read_pixels",
                (file, None, coords[start:end], start, case.tile_level0_px, case.tile_px, dct_scaled, None),
            )
            for start, end in sections(coords, CORES)
        ]

    def __call__(self) -> int:
        waiting, n_tiles, filled = list(reversed(self.calls)), 0, 0
        while waiting or self.pool.busy:
            while waiting and self.pool.has_idle:
                self.pool.start(waiting.pop())
            event = self.pool.next(1.0)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Filled):
                count, shape = event.content.count, self.batch.shape[1:]
                tiles = event.memory[: count * self.batch[0].size].reshape(count, *shape)
                taken = 0
                while taken < count:  # into batches, as a run does it
                    some = min(count - taken, BATCH - filled)
                    self.batch[filled : filled + some] = tiles[taken : taken + some]
                    taken, filled = taken + some, (filled + some) % BATCH
                self.pool.release(event)
                n_tiles += count
        return n_tiles


def threads(path: Path, case: Case, coords: np.ndarray) -> Callable[[], int]:
    """The same reading and scoring by threads of the main process, which only counts."""
    slide = Slide(path, mpp=case.slide_mpp)
    reader, reason = open_tiles(slide, tile_level0_px=case.tile_level0_px, tile_px=case.tile_px)
    assert reason is None, reason
    local = threading.local()

    def read(span: tuple[int, int]) -> int:
        if not hasattr(local, "batch"):
            local.batch = np.empty((BATCH, case.tile_px, case.tile_px, 3), np.uint8)
        walk = reader.walk(coords[span[0] : span[1]])
        for start in range(*span, BATCH):
            tiles = local.batch[: span[1] - start]
            assert not walk.read(tiles)
            tile_quality(tiles)
        return span[1] - span[0]

    pool = ThreadPoolExecutor(CORES)
    return lambda: sum(pool.map(read, sections(coords, CORES)))


def decoding(path: Path, case: Case, coords: np.ndarray, *, dct_scaled: bool) -> Callable[[], int]:
    """Every core decodes the blocks of its share of the tiles, each once; the decoder lets other threads run."""
    slide = Slide(path, mpp=case.slide_mpp)
    reader, reason = open_tiles(slide, tile_level0_px=case.tile_level0_px, tile_px=case.tile_px, dct_scaled=dct_scaled)
    assert isinstance(reader, DirectReader), reason
    blocks = reader.blocks
    spans = np.array_split(np.arange(len(coords)), CORES)
    shares = [list(blocks.read(reader.walk(coords[span])._order).values()) for span in spans]

    def decode(share: list) -> None:
        pixels = np.empty(reader.block_shape, np.uint8)
        for block in share:
            blocks.decode(block, pixels, reduce=reader.reduce)

    pool = ThreadPoolExecutor(CORES)

    def run() -> int:
        list(pool.map(decode, shares))
        return len(coords)

    return run


def loader(folder: Path, rounds: int) -> Iterator[str]:
    for case in CASES:
        path = make_slide(folder, block_px=case.block_px, chroma=case.chroma, side_px=20_480)
        edges = np.floor(100 + np.arange(case.per_side) * case.tile_level0_px + 0.5).astype(np.int64)
        coords = np.stack(np.meshgrid(edges, edges), axis=-1).reshape(-1, 2)
        side, px = round(case.tile_level0_px), case.tile_px
        theirs = v2.Compose(
            [
                v2.Resize((px, px)),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        some = coords[: len(coords) // 4]  # they are slow
        named: dict[str, tuple[Callable[[], int], int]] = {
            THEIRS: (data_loader(_OpenSlideTiles(path, some, side, px, theirs)), len(some)),
            "OpenSlide, uint8, DataLoader": (data_loader(_OpenSlideTiles(path, some, side, px, None)), len(some)),
        }
        for module, tiles in (("tiffslide", _TiffSlideTiles), ("cucim", _CucimTiles)):
            if _installed(module):
                named[f"{module}, uint8, DataLoader"] = data_loader(tiles(path, some, side, px, None)), len(some)
        named["wsimil, threads"] = threads(path, case, coords), len(coords)
        readers, floors = [], {"wsimil, threads": FLOOR}
        for name, floor, scaled in (("wsimil, processes", FLOOR, False), ("wsimil, processes, DCT-scaled", DCT_FLOOR, True)):
            if scaled and case.slide_mpp != 0.25:
                continue
            readers.append(_Readers(path, case, coords, dct_scaled=scaled))
            named |= {name: (readers[-1], len(coords)), floor: (decoding(path, case, coords, dct_scaled=scaled), len(coords))}
            floors[name] = floor
        rates = {name: [] for name in named}
        for turn in range(rounds + 1):
            for name, (run, n_tiles) in named.items():
                start = time.perf_counter()
                assert run() == n_tiles
                if turn:
                    rates[name].append(n_tiles / (time.perf_counter() - start))
        for one in readers:
            one.pool.close()
        yield f"### Loader: {case.title}\n\n{CORES} cores.\n\n" + _table(rates, "tiles/s", THEIRS, floors)


def _installed(module: str) -> bool:
    try:
        import_module(module)
    except Exception:
        return False
    return True


# ---------------------------------------------------------------- encoder


def encoder(folder: Path, rounds: int) -> Iterator[str]:
    name = "random:vit_small_patch16_224"
    path = make_slide(folder, block_px=256, chroma="420", side_px=4_096, downsamples=(1, 4, 16))
    tile, job, n_tiles = TileConfig(tile_px=224, tissue="none", mpp=0.25), JobConfig(), 0
    alone = "ViT-S/16 alone, tiles in memory"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")  # emulated, it is slower than fp32
    for dtype in ("fp32", "bf16") if fast_bf16 else ("fp32",):
        config = ExtractConfig(encoder=(name,), dtype=dtype, batch_size=32, device="cpu")
        rates: dict[str, list[float]] = {alone: [], "wsimil extract, whole run": [], "wsimil extract, first to last tile": []}
        model = load_encoder(name, dtype=dtype)
        for _ in range(rounds):
            out = folder / "encoder-job"
            shutil.rmtree(out, ignore_errors=True)
            tile_slides(path, out, config=tile, job=job, quiet=True)
            watch = _Watch()
            start = time.perf_counter()
            with watch:
                extraction = extract_features(path, out, tile=tile, extract=config, job=job, quiet=True)
            whole = time.perf_counter() - start
            n_tiles = extraction.rows[0].n_tiles
            assert extraction.rows[0].status == "done" and n_tiles > 300, extraction.rows
            rates["wsimil extract, whole run"].append(n_tiles / whole)
            rates["wsimil extract, first to last tile"].append((n_tiles - watch.first_count) / watch.seconds)
            tiles = torch.randint(0, 256, (32, 224, 224, 3), dtype=torch.uint8)
            with torch.inference_mode():
                model(tiles)
                start = time.perf_counter()
                for _ in range(n_tiles // 32):
                    model(tiles)
                rates[alone].append(n_tiles // 32 * 32 / (time.perf_counter() - start))
        yield f"### Encoder: ViT-S/16 in {dtype}, {n_tiles:,} tiles, batches of 32\n\n{CORES} cores.\n\n" + _table(
            rates, "tiles/s", alone
        )


class _Watch:
    """When the first batch went through an encoder, and when the last."""

    def __enter__(self) -> _Watch:
        from wsimil.extraction.extract import _ExtractStage

        self._stage, self._encode = _ExtractStage, _ExtractStage._encode
        self.times: list[tuple[float, int]] = []

        def encode(stage: Any, *arguments: Any) -> Any:
            result = self._encode(stage, *arguments)
            self.times.append((time.perf_counter(), stage._filled))
            return result

        self._stage._encode = encode
        return self

    def __exit__(self, *_: object) -> None:
        self._stage._encode = self._encode

    @property
    def first_count(self) -> int:
        return self.times[0][1]

    @property
    def seconds(self) -> float:
        return self.times[-1][0] - self.times[0][0]


# ---------------------------------------------------------------- cohort


def cohort(folder: Path, rounds: int) -> Iterator[str]:
    large = make_slide(folder, block_px=256, chroma="420", side_px=14_336, downsamples=(1, 4, 16))
    small = folder / "cohort"
    small.mkdir(exist_ok=True)
    for number in range(50):
        source = make_slide(folder, block_px=256, chroma="420", side_px=2_048, downsamples=(1, 4))
        if not (small / f"s{number:02}.svs").exists():
            shutil.copy(source, small / f"s{number:02}.svs")
    tile = TileConfig(tile_px=224, tissue="none", mpp=0.25)
    first = "one large slide, tiles found before"
    ways = {
        (f"{name}, {words}"): (slides, before)
        for before, words in ((True, "tiles found before"), (False, "tiling included"))
        for name, slides in (("one large slide", large), ("fifty small slides", small))
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    slides_per_s, n_tiles = [], {}
    for _ in range(rounds):
        for name, (slides, before) in ways.items():
            out = folder / "cohort-job"
            shutil.rmtree(out, ignore_errors=True)
            if before:
                tile_slides(slides, out, config=tile, quiet=True)
            start = time.perf_counter()
            extraction = extract_features(slides, out, tile=tile, extract=ExtractConfig(device="cpu"), quiet=True)
            seconds = time.perf_counter() - start
            assert not extraction.failed
            n_tiles[slides] = sum(row.n_tiles for row in extraction.rows)
            rates[name].append(n_tiles[slides] / seconds)
            if slides is small and not before:
                slides_per_s.append(len(extraction.rows) / seconds)
    yield (
        f"### Cohort: whole runs with the built-in encoder, start included\n\n{n_tiles[large]:,} tiles of one slide, "
        f"{n_tiles[small]:,} of fifty; {statistics.median(slides_per_s):.1f} slides/s with tiling.\n\n"
        + _table(rates, "tiles/s", first)
    )


# ---------------------------------------------------------------- memory


def memory(folder: Path, rounds: int) -> Iterator[str]:
    path = _mostly_glass(folder, side_px=100_000)
    peaks = []
    for _ in range(min(rounds, 2)):
        out = folder / "memory-job"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "wsimil", "extract", str(path), "--out", str(out), "--tile-px", "256", "--quiet"]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peak = 0
        while run.poll() is None:
            peak = max(peak, _memory_of(run.pid))
            time.sleep(0.1)
        assert run.returncode == 0
        peaks.append(peak / 1e9)
    [bag] = (folder / "memory-job").rglob("features_*/*.h5")
    from wsimil.bags.bag import read_header

    yield (
        f"### Memory: a slide of 100,000 × 100,000 px, {path.stat().st_size / 1e6:,.0f} MB, {read_header(bag).n_tiles:,} tiles\n\n"
        f"Peak of all {CORES + 1} processes together: " + ", ".join(f"{peak:.2f} GB" for peak in peaks) + "\n"
    )


def _memory_of(pid: int) -> int:
    """Bytes of a process and its children; pages that they share count once."""
    total = 0
    for process in itertools.chain([pid], _children(pid)):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return []


def _mostly_glass(folder: Path, *, side_px: int) -> Path:
    """Tissue in a tenth of the slide, five levels, all of blocks that are made once."""
    path = folder / f"glass-{side_px}.svs"
    if path.exists():
        return path
    picture = paint_slide(1024, 1024, mpp=0.25, seed=3).rgb
    glass = np.full((256, 256, 3), 242, np.uint8)
    unfinished = path.with_suffix(".tmp")
    with tifffile.TiffWriter(unfinished, bigtiff=True) as tiff:
        for index, downsample in enumerate((1, 4, 16, 64)):
            side = side_px // downsample
            per_side = -(-side // 256)
            shrunk = cv2.resize(picture, None, fx=1 / downsample, fy=1 / downsample, interpolation=cv2.INTER_AREA)
            tissue = [np.resize(shrunk[y : y + 256, x : x + 256], (256, 256, 3)) for y in (0, 512) for x in (0, 512, 1024)]
            kinds = [simplejpeg.encode_jpeg(np.ascontiguousarray(one), quality=QUALITY) for one in (glass, *tissue) if one.size]

            def block(number: int, per_side: int = per_side, kinds: list = kinds) -> bytes:
                row, column = divmod(number, per_side)
                inside = 0.3 < row / per_side < 0.62 and 0.3 < column / per_side < 0.62
                return kinds[1 + number % (len(kinds) - 1)] if inside else kinds[0]

            description = f"Aperio Image Library v11.2.1\r\n{side_px}x{side_px} (256x256) JPEG|MPP = 0.2500"
            tiff.write(
                (block(number) for number in range(per_side * per_side)),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                subsampling=(1, 1),
                description=description if index == 0 else f"Aperio\r\n{side_px}x{side_px} -> {side}x{side} JPEG",
                metadata=None,
            )
    unfinished.rename(path)
    return path


# ---------------------------------------------------------------- the table


def _table(rates: dict[str, list[float]], unit: str, first: str, floors: dict[str, str] | None = None) -> str:
    """Medians of rounds and of their ratios; `floors` names the floor of a way."""

    def times(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True))

    column = " of its floor |" if floors else ""
    lines = [f"| way | {unit} | × the first |{column} spread of rounds |", "|---|---|---|" + "---|" * (2 if floors else 1)]
    for name, values in rates.items():
        ratio, median = times(name, first), statistics.median(values)
        spread = (max(values) - min(values)) / median
        share = "" if not floors else f" {times(name, floors[name]):.2f} |" if name in floors else " |"
        lines.append(
            f"| {name} | {median:,.{0 if median >= 100 else 1}f} | {ratio:.{1 if ratio >= 2 else 2}f} |{share} {spread:.0%} |"
        )
    return "\n".join([*lines, ""])


PARTS = {"loader": loader, "encoder": encoder, "cohort": cohort, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"what to measure: {', '.join(PARTS)}; default: all")
    parser.add_argument("--folder", type=Path, help="where slides are made and kept (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", type=Path, help="where the Markdown table goes, besides the terminal")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}; known: {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        said = [machine(*PACKAGES) + f"\n\nWall time, medians of {options.rounds} interleaved rounds.\n"]
        print(said[0])
        for name in options.parts or PARTS:
            for part in PARTS[name](folder, options.rounds):
                said.append(part)
                print(part, flush=True)
        if options.table:
            options.table.write_text("\n".join(said), encoding="utf-8")


if __name__ == "__main__":
    main()

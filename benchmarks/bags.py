"""Reading bags on one core: wsimil's files side by side with TRIDENT's and CLAM's.

    OMP_NUM_THREADS=1 python benchmarks/bags.py --folder /tmp/bags --table bags.md

- Files are made here, of the same random values, as each program lays them out: TRIDENT's datasets in chunks of one row
  (float32, and float16 for encoders that give it), CLAM's in chunks of 32 rows appended batch by batch, and its `.pt`; ours
  in one piece, float16.
- Times are CPU seconds of the process, the files in the page cache; every round runs every way, in turns, and the table has
  medians of rounds. The last table is of the clock, the files dropped from the page cache before each reading.
- Files lie in the page cache as they do when they come from the disk. Just written, a bag lies there in larger pieces, and
  rows are picked from it several times as fast (Linux with large folios): that has its own line.
- "× TRIDENT" is against the fastest way to read its float32 file: rows picked by HDF5, or the whole bag and then rows.
- The floor is the copying of the same bytes from memory to memory, into memory that was used before.
- What ours gives is what is stored, float16. A float32 batch is what a model gets: widened, in memory of its own, with positions;
  its floor is that widening from memory. Checked anew means that the folder is opened and checksums are compared each time.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from setting import machine

from wsimil.bags.bag import Bag, Geometry, read_header, write_bag
from wsimil.bags.dataset import BagFolder

PACKAGES = ("h5py", "numpy", "torch")
SIZES = ((8_000, 384), (8_000, 1024), (30_000, 1536))
"""Tiles and features: slides of CAMELYON16 at 20x, with a ViT-S, a ViT-L and a giant one."""

ROWS = (512, 4096)
LEAST_SECONDS = 0.02
"""A way that is done sooner is run several times a round: the clock is coarse."""

FLOOR, WIDE_FLOOR = "floor: copy in memory", "floor of float32: widen in memory"
BATCH = "wsimil, float32 batch"
TRIDENT = "TRIDENT's file, float32"
TRIDENT_WHOLE = f"{TRIDENT}, whole, then rows"
Way = Callable[[], object]


@dataclass(frozen=True)
class Files:
    """One bag in every layout."""

    features: np.ndarray  # (N, D) float16
    trident: dict[str, Path]  # by type of number
    clam_h5: Path
    clam_pt: Path
    ours: Path
    just_written: Path  # ours again

    @property
    def all(self) -> list[Path]:
        return [*self.trident.values(), self.clam_h5, self.clam_pt, self.ours]

    def drop(self) -> None:
        """Out of the page cache, where the system can be asked to."""
        for path in self.all:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_files(folder: Path, n_tiles: int, dim: int) -> Files:
    folder = folder / f"{n_tiles}x{dim}"
    ours = folder / "features_bench"
    ours.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((n_tiles, dim), dtype=np.float32).astype(np.float16)
    coords = rng.integers(0, 90_000, (n_tiles, 2))
    names = {name: folder / f"trident-{name}.h5" for name in ("float32", "float16")}
    just_written = folder / "just_written" / "slide.h5"
    just_written.parent.mkdir(exist_ok=True)
    files = Files(features, names, folder / "clam.h5", folder / "clam.pt", ours / "slide.h5", just_written)
    stated = {"slide_id": "slide", "encoder": "bench", "mpp": 0.25, "tile_level0_px": 448.0}
    bag = Bag(features, coords, np.ones(n_tiles, bool), {"tissue": np.ones(n_tiles, np.float32)}, stated)
    for path in (files.ours, just_written):
        write_bag(path, bag, Geometry(224, 448.0, 0, 90_000, 90_000, 0.25, 0.5, "slide"))
    if files.clam_pt.exists():  # the last to be made
        return files
    for name, path in files.trident.items():
        append(path, {"features": features.astype(name), "coords": coords}, rows_per_chunk=1, rows_at_a_time=n_tiles)
    wide = features.astype(np.float32)
    append(files.clam_h5, {"features": wide, "coords": coords.astype(np.int32)}, rows_per_chunk=32, rows_at_a_time=256)
    unfinished = files.clam_pt.with_suffix(".tmp")
    torch.save(torch.from_numpy(wide), unfinished)
    unfinished.rename(files.clam_pt)
    return files


def open_h5(path: Path, mode: Literal["r", "w", "a"] = "r") -> Any:
    return h5py.File(path, mode)


def append(path: Path, parts: dict[str, np.ndarray], *, rows_per_chunk: int, rows_at_a_time: int) -> None:
    with open_h5(path, "w") as file:
        for name, values in parts.items():
            width = values.shape[1:]
            file.create_dataset(name, (0, *width), values.dtype, maxshape=(None, *width), chunks=(rows_per_chunk, *width))
    n_rows = len(next(iter(parts.values())))
    for first in range(0, n_rows, rows_at_a_time):
        with open_h5(path, "a") as file:  # opened anew for each batch, as its writer does
            for name, values in parts.items():
                batch = values[first : first + rows_at_a_time]
                file[name].resize(first + len(batch), axis=0)
                file[name][first:] = batch


def read_h5(path: Path, rows: np.ndarray | None = None) -> np.ndarray:
    with open_h5(path) as file:
        return file["features"][:] if rows is None else file["features"][rows]


def whole_bag(files: Files) -> dict[str, Way]:
    reused, bags = np.empty_like(files.features), folders(files)
    stored = bags["from its file"].headers["slide"].features
    return {
        TRIDENT: lambda: read_h5(files.trident["float32"]),
        "TRIDENT's file, float16": lambda: read_h5(files.trident["float16"]),
        "CLAM's h5": lambda: read_h5(files.clam_h5),
        "CLAM's .pt": lambda: torch.load(files.clam_pt),
        FLOOR: lambda: into(lambda out: np.copyto(out, files.features), reused),
        "wsimil, into reused memory": lambda: into(stored.read_into, reused),
        "wsimil, into fresh memory": stored.read,
        WIDE_FLOOR: lambda: torch.from_numpy(np.empty(files.features.shape, np.float32)).copy_(torch.from_numpy(files.features)),
        **{f"{BATCH} {name}": load(folder) for name, folder in bags.items()},
        f"{BATCH}, checked anew": lambda: BagFolder(files.ours.parent, cache_bytes=0).load("slide").features,
    }


def random_rows(files: Files, n_rows: int) -> dict[str, Way]:
    bags = folders(files)
    n_tiles, dim = files.features.shape
    rows = pick(n_tiles, n_rows)
    rising = np.sort(rows)  # h5py takes no others
    reused = np.empty((n_rows, dim), np.float16)
    stored, fresh = bags["from its file"].headers["slide"].features, read_header(files.just_written).features
    return {
        TRIDENT: lambda: read_h5(files.trident["float32"], rising),
        TRIDENT_WHOLE: lambda: read_h5(files.trident["float32"])[rows],
        "TRIDENT's file, float16": lambda: read_h5(files.trident["float16"], rising),
        "CLAM's h5": lambda: read_h5(files.clam_h5, rising),
        "CLAM's .pt, whole, then rows": lambda: torch.load(files.clam_pt)[rows],
        "CLAM's .pt, mapped": lambda: torch.load(files.clam_pt, mmap=True)[rows],
        FLOOR: lambda: files.features.take(rows, axis=0, out=reused, mode="clip"),
        "wsimil, into reused memory": lambda: into(lambda out: stored.read_rows(rows, out), reused),
        "wsimil, into reused memory, just written": lambda: into(lambda out: fresh.read_rows(rows, out), reused),
        "wsimil, into fresh memory": lambda: stored.read(rows),
        WIDE_FLOOR: lambda: torch.from_numpy(np.empty((n_rows, dim), np.float32)).copy_(torch.from_numpy(files.features[rows])),
        **{f"{BATCH} {name}": load(folder, rows) for name, folder in bags.items()},
    }


def pick(n_tiles: int, n_rows: int) -> np.ndarray:
    return np.random.default_rng(1).choice(n_tiles, n_rows, replace=False)


def into(read: Callable[[np.ndarray], None], out: np.ndarray) -> np.ndarray:
    read(out)
    return out


def folders(files: Files) -> dict[str, BagFolder]:
    """As training holds them: each bag seen once."""
    found = {"from its file": BagFolder(files.ours.parent, cache_bytes=0), "from the cache": BagFolder(files.ours.parent)}
    for folder in found.values():
        folder.load("slide")
    return found


def load(folder: BagFolder, rows: np.ndarray | None = None) -> Way:
    return lambda: folder.load("slide", rows=rows).features


def check(named: dict[str, Way], expected: np.ndarray) -> None:
    """All ways give the same rows, in their own order or rising."""
    total = expected.astype(np.float64).sum(0)
    for name, read in named.items():
        found = np.asarray(read())
        if found.shape != expected.shape or not np.allclose(found.astype(np.float64).sum(0), total):
            raise SystemExit(f"{name}: gives other rows")


def measure(named: dict[str, Way], *, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of one run of each way, in each round."""
    times: dict[str, int] = {}
    for name, run in named.items():
        run()
        start = time.process_time()
        run()
        times[name] = math.ceil(LEAST_SECONDS / max(time.process_time() - start, 1e-5))
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(rounds):
        for name, run in named.items():
            run()  # a virtual machine lends out memory that lay idle, and is slow to bring it back
            start = time.process_time()
            for _ in range(times[name]):
                run()
            seconds[name].append((time.process_time() - start) / times[name])
    return seconds


def measure_cold(named: dict[str, Way], files: Files, *, rounds: int) -> dict[str, list[float]]:
    """Seconds of the clock, the files out of the page cache."""
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(rounds):
        for name, run in named.items():
            files.drop()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def table(title: str, seconds: dict[str, list[float]]) -> str:
    lines = [f"### {title}", "", "| way | ms | × TRIDENT | of the floor | spread of rounds |", "|---|---|---|---|---|"]
    trident = min((seconds[name] for name in (TRIDENT, TRIDENT_WHOLE) if name in seconds), key=statistics.median)
    for name, times in seconds.items():
        # ratios within a round: what else the machine does falls on both
        faster = statistics.median(a / b for a, b in zip(trident, times, strict=True))
        reached = ""
        floor = WIDE_FLOOR if name.startswith(BATCH) else FLOOR
        if name.startswith("wsimil") and floor in seconds:
            reached = f"{statistics.median(a / b for a, b in zip(seconds[floor], times, strict=True)):.2f}"
        spread = (max(times) - min(times)) / statistics.median(times)
        milliseconds = f"{statistics.median(times) * 1e3:,.3g}" if max(times) < 1 else f"{statistics.median(times) * 1e3:,.0f}"
        lines.append(f"| {name} | {milliseconds} | {faster:,.{1 if faster < 10 else 0}f} | {reached} | {spread:.0%} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where bags are made and kept (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="sizes that contain this, of " + ", ".join(f"{n}x{d}" for n, d in SIZES))
    parser.add_argument("--table", type=Path, help="where the Markdown table goes, besides the terminal")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        parts = [machine(*PACKAGES) + f"\n\nOne core, medians of {options.rounds} interleaved rounds.\n"]
        print(parts[0])

        def add(part: str) -> None:
            parts.append(part)
            print(part, flush=True)

        for n_tiles, dim in SIZES:
            if options.only not in f"{n_tiles}x{dim}":
                continue
            files = make_files(options.folder or Path(temporary), n_tiles, dim)
            size = f"{n_tiles:,} × {dim}"
            files.drop()
            for path in files.all:
                path.read_bytes()
            ways = whole_bag(files)
            check(ways, files.features)
            add(table(f"{size}, the whole bag", measure(ways, rounds=options.rounds)))
            for n_rows in ROWS:
                some = random_rows(files, n_rows)
                check(some, files.features[pick(n_tiles, n_rows)])
                add(table(f"{size}, {n_rows} random rows", measure(some, rounds=options.rounds)))
            if hasattr(os, "posix_fadvise"):
                cold = {name: way for name, way in ways.items() if "floor" not in name and "cache" not in name}
                add(table(f"{size}, the whole bag, not in the page cache", measure_cold(cold, files, rounds=options.rounds)))
        if options.table:
            options.table.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()

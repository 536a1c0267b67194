"""An epoch of attention MIL: wsimil side by side with the loop that CLAM runs and with torchmil.

    python benchmarks/train.py --folder /tmp/bench-train --table train.md

- Bags are made here: random features, sizes log-normal with a median of 8,000 tiles as in CAMELYON16 at 20x. One bag lies on the
  disk three times: as wsimil writes it (float16, in one piece), as CLAM does (HDF5, float32, chunks of 32 rows), as torchmil
  reads it (`.npy`, float32).
- All train the same model: Linear D → 256, ReLU, dropout .25, gated attention 128, one output; the loop and torchmil with a step
  per bag, torchmil also with 4 padded bags a step, wsimil with 4 bags a step and features standardised, which the others do not.
- Times are of the clock (or of the processor: `--clock cpu`), for the training slides of one epoch; validation is in none of
  them. Every round runs every way, in turns; the table has medians of rounds and of their ratios.
- "Cold": their own files were dropped from the page cache before the epoch; the cold ways of wsimil are compared with the cold
  loop. The first epoch has everything in it that comes once: the check of each bag, and the pass for mean and deviation.
- The floor is the matrix products of the same arithmetic, forward and backward, on features that are in memory already: in
  float32, and in bfloat16 where the processor has instructions for it.
- The second table is 25 models as one program against one after the other; the third the memory of a step on one huge bag.
- torchmil takes part where it is installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import torch
from setting import machine
from torch import Tensor, nn

from wsimil.aggregators import AGGREGATORS, Standardized, make_aggregator
from wsimil.bags.bag import Bag, Geometry, write_bag
from wsimil.bags.dataset import BagFolder
from wsimil.batch import BagBatch
from wsimil.config import TrainConfig
from wsimil.objectives import SlideLabel
from wsimil.task import Task
from wsimil.training.dropout import quicken_dropout
from wsimil.training.items import LabelledSlides, TileStore
from wsimil.training.loop import fit, resolve_precision
from wsimil.training.stacked import Member, fit_stacked

DIMS = (384, 1024)
MEDIAN_TILES, SPREAD, MOST_TILES = 8_000, 0.6, 60_000
HIDDEN, ATTENTION, DROPOUT, BAGS_PER_STEP = 256, 128, 0.25, 4
TASK = Task("binary", ("normal", "tumour"))

LOOP = "one bag at a time, CLAM's h5, fp32"
ALL_PAIRS = ("abmilx", "wikg", "transformer", "transformer_alibi")
"""Each tile meets each: hours for a huge bag on a CPU, so their memory is measured where `--memory-of` asks for it."""
MEASURED = ("plain", *(name for name in AGGREGATORS if name not in ALL_PAIRS))
LOOP_COLD, LOOP_MEMORY = "the same loop, cold", "the same loop, features in memory"
FIRST, DISK_COLD = "wsimil, first epoch and what comes before it, cold", "wsimil, from files each epoch, cold"
DISK, MEMORY = "wsimil, from files each epoch", "wsimil, later epochs"
FLOOR, FLOOR_BF16 = "floor: matrix products, fp32", "floor: matrix products, bf16"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]
Way = Callable[[], float]
"""Runs an epoch and says how long it took."""


@dataclass(frozen=True)
class Files:
    """The bags of a case in every layout."""

    sizes: list[int]
    ours: Path  # features_bench
    clam: list[Path]
    numpy: list[Path]


def drop(paths: Sequence[Path]) -> None:
    """Out of the page cache. Raises SystemExit: they lie in memory, as in a tmpfs."""
    if not any([_drop(path) for path in paths]):
        raise SystemExit(f"{paths[0].parent} stays in memory, so nothing can be read cold: give a --folder on a disk")


def _drop(path: Path) -> bool:
    """Whether it worked, judged by the middle of the file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(file.fileno(), [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        return False


def make_files(folder: Path, *, n_slides: int, dim: int, median: int) -> Files:
    folder = folder / f"{n_slides}x{median}x{dim}"
    rng = np.random.default_rng(0)
    sizes = np.clip(median * np.exp(SPREAD * rng.standard_normal(n_slides)), 64, MOST_TILES).astype(int).tolist()
    files = Files(
        sizes,
        folder / "features_bench",
        [folder / f"clam-{index}.h5" for index in range(n_slides)],
        [folder / f"numpy-{index}.npy" for index in range(n_slides)],
    )
    if (folder / "complete").exists():
        return files
    folder.mkdir(parents=True, exist_ok=True)
    for index, size in enumerate(sizes):
        features = rng.standard_normal((size, dim), np.float32).astype(np.float16)
        coords = 224 * np.stack(np.divmod(np.arange(size), 200), 1)
        name = f"s{index:03}"
        attributes = {"slide_id": name, "encoder": "bench", "encoder_sha256": "0" * 64, "recipe_hash": "r"}
        geometry = Geometry(224, 224.0, 0, 100_000, 100_000, 0.5, 0.5, name)
        write_bag(files.ours / f"{name}.h5", Bag(features, coords, np.ones(size, bool), attributes=attributes), geometry)
        wide = features.astype(np.float32)
        with h5py.File(files.clam[index], "w") as file:
            stored = file.create_dataset("features", (0, dim), np.float32, maxshape=(None, dim), chunks=(32, dim))
            for start in range(0, size, 256):  # batch by batch, as it extracts
                stored.resize(min(size, start + 256), 0)
                stored[start:] = wide[start : start + 256]
        np.save(files.numpy[index], wide)
    (folder / "complete").touch()
    return files


class PlainModel(nn.Module):
    """The model as a user would write it for one bag (N, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(dim, HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT))
        self.feature = nn.Sequential(nn.Linear(HIDDEN, ATTENTION), nn.Tanh())
        self.gate = nn.Sequential(nn.Linear(HIDDEN, ATTENTION), nn.Sigmoid())
        self.score, self.classify = nn.Linear(ATTENTION, 1), nn.Linear(HIDDEN, 1)

    def forward(self, features: Tensor) -> Tensor:
        tiles = self.project(features)
        attention = self.score(self.feature(tiles) * self.gate(tiles)).softmax(0)
        return self.classify(attention.T @ tiles)  # (1, 1)


def plain_loop(files: Files, dim: int, *, held: list[Tensor] | None = None, cold: bool = False) -> Way:
    """CLAM's way: read a bag, a step, the next bag."""
    torch.manual_seed(0)
    model = PlainModel(dim).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-5)
    loss_of = nn.BCEWithLogitsLoss()

    def epoch() -> float:
        if cold:
            drop(files.clam)
        start, running = clock(), 0.0
        for index in np.random.default_rng(0).permutation(len(files.sizes)).tolist():
            if held is None:
                with h5py.File(files.clam[index], "r") as file:
                    features = torch.from_numpy(file["features"][:])  # type: ignore[index]
            else:
                features = held[index]
            loss = loss_of(model(features), torch.full((1, 1), float(index % 2)))
            running += loss.item()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        return clock() - start

    return epoch


def torchmil(files: Files, dim: int, *, bags_per_step: int) -> Way:
    from torch.utils.data import DataLoader
    from torchmil.data.collate import collate_fn  # type: ignore[import-not-found]
    from torchmil.models import ABMIL as TheirABMIL  # type: ignore[import-not-found]

    class Bags(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files.sizes)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"X": torch.from_numpy(np.load(files.numpy[index])), "Y": torch.tensor(float(index % 2))}

    torch.manual_seed(0)
    project = nn.Sequential(nn.Linear(dim, HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT))
    model = TheirABMIL((dim,), att_dim=ATTENTION, gated=True, feat_ext=project).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)

    def epoch() -> float:
        start = clock()
        for batch in DataLoader(Bags(), bags_per_step, shuffle=True, collate_fn=collate_fn):
            _, losses = model.compute_loss(batch["Y"], batch["X"], batch["mask"])
            optimiser.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimiser.step()
        return clock() - start

    return epoch


class ClockedLabels(SlideLabel):
    """Notes when an epoch begins and when its last step is done; before it begins these files are dropped."""

    started = ended = 0.0
    dropped: Sequence[Path] = ()

    def on_epoch_start(self, epoch: int, infer: Callable) -> None:
        if self.dropped:
            drop(self.dropped)
        self.started = clock()

    def after_step(self) -> None:
        self.ended = clock()


def slides_of(store: TileStore, names: list[str]) -> LabelledSlides:
    return LabelledSlides(store, names, torch.arange(len(names)) % 2.0)


def fresh_model(dim: int, seed: int = 0, aggregator: str = "gated_abmil") -> Standardized:
    torch.manual_seed(seed)
    own = {"attention": ATTENTION} if aggregator == "gated_abmil" else {}
    inner = make_aggregator(aggregator, dim, 1, hidden=HIDDEN, dropout=DROPOUT, **own)
    return Standardized(inner, torch.full((dim,), 0.1), torch.full((dim,), 1.1))


def ours(
    files: Files,
    dim: int,
    *,
    memory_bytes: int = 1 << 40,
    first: bool = False,
    cold: bool = False,
    precision: str = "auto",
    bags: int = BAGS_PER_STEP,
) -> Way:
    """The loop of `wsimil train`: its second epoch; or its first with a new store, and what comes before it."""
    stores: list[TileStore] = []
    paths = list(files.ours.glob("*.h5"))

    def epoch() -> float:
        if first or not stores:
            stores[:] = [TileStore(BagFolder(files.ours, cache_bytes=0), memory_bytes=memory_bytes)]
        names = stores[0].bags.slide_ids
        smallest = names[int(np.argmin(files.sizes))]
        objective, before = ClockedLabels(TASK), 0.0
        if first:
            drop(paths)
            start = clock()
            stores[0].moments(names)
            before = clock() - start
        elif cold:
            objective.dropped = paths
        config = TrainConfig(epochs=1 if first else 2, bags_per_step=bags, precision=precision)
        with tempfile.TemporaryDirectory() as run:
            fit(Path(run), fresh_model(dim), objective, slides_of(stores[0], names), slides_of(stores[0], [smallest]), config)
        return before + objective.ended - objective.started

    return epoch


def floor(files: Files, dim: int, dtype: torch.dtype) -> Way:
    """The matrix products of an epoch: projection and gate, forward; both weights' gradients and the gate's input's, backward."""
    most = max(files.sizes)
    x, h, gh = (torch.randn(most, width).to(dtype) for width in (dim, HIDDEN, HIDDEN))
    g = torch.randn(most, 2 * ATTENTION).to(dtype)
    w, v = torch.randn(dim, HIDDEN).to(dtype), torch.randn(HIDDEN, 2 * ATTENTION).to(dtype)

    def epoch() -> float:
        start = clock()
        for size in files.sizes:
            for first in range(0, size, 1024):  # pieces: whichever is faster is the floor, and they are
                rows = slice(first, min(size, first + 1024))
                for left, right in ((x[rows], w), (h[rows], v), (g[rows].T, h[rows]), (g[rows], v.T), (x[rows].T, gh[rows])):
                    left @ right
        return clock() - start

    return epoch


def measure(named: dict[str, Way], *, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for turn in range(rounds + 1):
        for name, epoch in named.items():
            took = epoch()
            if turn:  # the first warms caches
                seconds[name].append(took)
    return seconds


def ratio(one: list[float], other: list[float]) -> float:
    """How many times as long `one` takes, within rounds: what else the machine does falls on both."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def epochs_table(files: Files, dim: int, *, rounds: int) -> str:
    named: dict[str, Way] = {LOOP: plain_loop(files, dim), LOOP_COLD: plain_loop(files, dim, cold=True)}
    n_bytes = 4 * dim * sum(files.sizes)
    if n_bytes < 6e9:
        held = [torch.from_numpy(np.load(path)) for path in files.numpy]
        named[LOOP_MEMORY] = plain_loop(files, dim, held=held)
    if find_spec("torchmil") and find_spec("tensordict"):
        named["torchmil, one bag a step"] = torchmil(files, dim, bags_per_step=1)
        named[f"torchmil, {BAGS_PER_STEP} padded bags a step"] = torchmil(files, dim, bags_per_step=BAGS_PER_STEP)
    named |= {
        FIRST: ours(files, dim, first=True),
        DISK_COLD: ours(files, dim, memory_bytes=0, cold=True),
        DISK: ours(files, dim, memory_bytes=0),
        MEMORY: ours(files, dim),
        FLOOR: floor(files, dim, torch.float32),
    }
    chosen = resolve_precision("auto", "cpu")
    if chosen == "bf16":
        named |= {
            f"{MEMORY}, fp32": ours(files, dim, precision="fp32"),
            FLOOR_BF16: floor(files, dim, torch.bfloat16),
        }
    seconds = measure(named, rounds=rounds)
    bound = seconds[FLOOR_BF16 if chosen == "bf16" else FLOOR]
    lines = [
        f"### {len(files.sizes)} bags of {statistics.median(files.sizes):,.0f} tiles (median) × {dim}, wsimil in {chosen}",
        "",
        "| way | s an epoch | tiles/s | × the loop | of its floor | spread of rounds |",
        "|---|---|---|---|---|---|",
    ]
    for name, times in seconds.items():
        median = statistics.median(times)
        reached = f"{ratio(bound if not name.endswith('fp32') else seconds[FLOOR], times):.2f}" if name.startswith("wsimil") else ""
        spread = (max(times) - min(times)) / median
        rate = sum(files.sizes) / median
        faster = ratio(seconds[LOOP_COLD if name in (FIRST, DISK_COLD) else LOOP], times)
        lines.append(f"| {name} | {median:.2f} | {rate:,.0f} | {faster:.2f} | {reached} | {spread:.0%} |")
    if not find_spec("torchmil"):
        lines.append("\ntorchmil is not installed here.")
    return "\n".join([*lines, ""])


def stacking(files: Files, dim: int, *, n_models: int) -> dict[str, Way]:
    """Whole runs of one epoch, of all models."""
    config = TrainConfig(epochs=1, bags_per_step=BAGS_PER_STEP, hidden=HIDDEN)
    store = TileStore(BagFolder(files.ours, cache_bytes=0), memory_bytes=1 << 40)
    names = store.bags.slide_ids
    sides = {"train": names[1:], "val": names[:1]}
    targets = {side: torch.arange(len(members)) % 2.0 for side, members in sides.items()}

    def one_by_one() -> float:
        start = clock()
        for seed in range(n_models):
            with tempfile.TemporaryDirectory() as run:
                slides = [slides_of(store, members) for members in sides.values()]
                fit(Path(run), fresh_model(dim, seed), SlideLabel(TASK), *slides, config)
        return clock() - start

    def together() -> float:
        start = clock()
        members = [Member(fresh_model(dim, seed), TASK, sides, targets, dict.fromkeys(sides)) for seed in range(n_models)]
        fit_stacked(members, store, config)
        return clock() - start

    return {"alone": one_by_one, "stacked": together}


def stacked_table(folder: Path, *, n_models: int, n_slides: int, dim: int, rounds: int) -> str:
    lines = [
        f"### {n_models} models (folds × seeds) × {dim}: one program against one after the other, whole runs of one epoch",
        "",
        "| bags | one after the other, s | one program, s | × | spread of rounds |",
        "|---|---|---|---|---|",
    ]
    for size in (500, MEDIAN_TILES):
        files = make_files(folder, n_slides=n_slides, dim=dim, median=size)
        seconds = measure(stacking(files, dim, n_models=n_models), rounds=rounds)
        alone, stacked = (statistics.median(times) for times in seconds.values())
        faster = ratio(seconds["alone"], seconds["stacked"])
        spread = max((max(times) - min(times)) / statistics.median(times) for times in seconds.values())
        lines.append(f"| {n_slides} of {size:,} tiles (median) | {alone:.2f} | {stacked:.2f} | {faster:.2f} | {spread:.0%} |")
    return "\n".join([*lines, ""])


def memory_table(n_tiles: int, dim: int) -> str:
    lines = [
        f"### One training step on a bag of {n_tiles:,} tiles × {dim}: memory beyond the features as they are held, MB",
        "",
        "| way | held | beyond |",
        "|---|---|---|",
    ]
    for name in MEASURED:
        command = [sys.executable, __file__, "--memory-of", name, "--tiles", str(n_tiles), "--dim", str(dim)]
        held, beyond = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        lines.append(f"| {'the loop, fp32' if name == 'plain' else f'wsimil, fp32, {name}'} | {held} | {beyond} |")
    return "\n".join([*lines, ""])


def on_a_grid(features: torch.Tensor) -> BagBatch:
    """One bag whose tiles lie side by side, for aggregators that ask where they are."""
    place, across = torch.arange(len(features)), int(len(features) ** 0.5)
    coords_um = torch.stack([place % across, place // across], 1) * 112.0
    return BagBatch(features, torch.tensor([0, len(features)]), coords_um, torch.tensor([112.0]))


def memory_of(way: str, n_tiles: int, dim: int) -> None:
    """In a process of its own: MB of the features, and how far a step goes beyond what was there before."""
    features = torch.empty(n_tiles, dim, dtype=torch.float32 if way == "plain" else torch.float16).fill_(0.5)
    if way == "plain":
        loss = nn.BCEWithLogitsLoss()(PlainModel(dim).train()(features[:64]), torch.ones(1, 1))  # libraries set up their own
        model = PlainModel(dim).train()
    else:
        model = fresh_model(dim, aggregator=way).train()
        quicken_dropout(model)
        loss = model(on_a_grid(features[:600])).logits.sum()  # enough rows for what is compiled
    loss.backward()
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark from here on (Linux)
    before = status("VmRSS")
    out = model(features) if way == "plain" else model(on_a_grid(features)).logits
    out.sum().backward()
    print(round(features.nbytes / 1e6), round((status("VmHWM") - before) * 1024 / 1e6))


def status(name: str) -> int:
    """kB, as the system counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where bags are made and kept (default: a temporary folder)")
    parser.add_argument("--slides", type=int, default=40, help="bags of a case")
    parser.add_argument("--stack-slides", type=int, default=8, help="bags that the stacked models share")
    parser.add_argument("--models", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: for a busy machine, with --threads 1; cold is not cold"
    )
    parser.add_argument("--dim", type=int, help="features: only this wide")
    parser.add_argument("--only", choices=("epochs", "stacked", "memory"), help="one of the tables")
    parser.add_argument("--tiles", type=int, default=200_000, help="of the huge bag")
    parser.add_argument("--memory-of", choices=(*MEASURED, *ALL_PAIRS), help="MB held, and MB beyond, of one way")
    parser.add_argument("--table", type=Path, help="where the Markdown table goes, besides the terminal")
    options = parser.parse_args()
    global clock
    clock = CLOCKS[options.clock]
    torch.set_num_threads(options.threads)
    dims = (options.dim,) if options.dim else DIMS
    if options.memory_of:
        memory_of(options.memory_of, options.tiles, dims[-1])
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        has = "with" if resolve_precision("auto", "cpu") == "bf16" else "without"
        parts = [
            f"{machine('torch', 'lightning', 'h5py', 'numpy')}; {torch.backends.cpu.get_cpu_capability()}, {has} instructions for "
            f"bf16\n\n{options.threads} threads, medians of {options.rounds} interleaved rounds of {options.clock} time.\n"
        ]
        print(parts[0], flush=True)

        def show(part: str) -> None:
            parts.append(part)
            print(part, flush=True)

        for dim in dims:
            if options.only in (None, "epochs"):
                files = make_files(folder, n_slides=options.slides, dim=dim, median=MEDIAN_TILES)
                show(epochs_table(files, dim, rounds=options.rounds))
        if options.only in (None, "stacked"):
            slides = options.stack_slides
            show(stacked_table(folder, n_models=options.models, n_slides=slides, dim=dims[0], rounds=min(3, options.rounds)))
        if options.only in (None, "memory"):
            show(memory_table(options.tiles, dims[-1]))
        if options.table:
            options.table.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()

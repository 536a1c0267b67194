"""What 1,000, 10,000 and 100,000 slides cost, and what they wait for first: a small model over measured rates.

    python benchmarks/capacity.py                                  print the tables
    python benchmarks/capacity.py --doc docs/capacity.md           write them into the page
    python benchmarks/capacity.py --tiles 25000 --slide-gb 2.5     for other slides
    python benchmarks/capacity.py --measure                        also take the costs of bookkeeping here

A run reads, encodes and moves bytes at the same time, so it takes as long as the slowest of the three. Every input is a constant
below: `measured` ones carry the table they come from, `assumed` ones say so, in the page too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# measured, on two cores of the machine of benchmarks/results/README.md
READ_RATES = {  # tiles/s of one core: half of what two gave
    "40x file seen at 20x, 256 px, exact": 976 / 2,
    "the same, --decode dct": 1310 / 2,
    "20x file as it is, 224 px": 4557 / 2,
    "factor 1.979 (.2527 µm/px), 256 px": 448 / 2,
}  # results/extract-loader.md
SMALL_SLIDE_CORE_S = 0.07  # results/README.md: overview, tissue and files of a small slide
CPU_VIT_S_TILES_S = 11.1  # results/extract-encoder.md: ViT-S/16, fp32, both cores
CPU_TEXTURE_TILES_S = 491  # results/extract-cohort.md: the built-in encoder, tiling included, both cores
COLD_BAG_GB_S = 8000 * 1024 * 2 / 13.4e-3 / 1e9  # results/bags.md: a bag of 8,000 × 1,024 not in the page cache, local disk
PEAK_GB_TWO_READERS = 1.44  # results/extract-cohort.md: all processes, slide of 100,000 × 100,000 px, built-in encoder

# assumed: no GPU, no network disk and no third core was at hand
SLIDE_CORE_S = 1.0  # overview and tissue of a real slide
READ_IN_PLACE = 0.8  # share of a file's bytes that lie in blocks with tissue
GB_PER_READER = 0.2
GB_PER_WORKER = 1.5  # beside its readers and the encoder's weights
SMALL_FILES_MB = 0.4  # overview and tissue polygons; up to .5 on the slides tried
FILES_PER_SLIDE = 4  # bag, patches, tissue, overview: this one is a fact
TILE_BYTES = 2 * 8 + 1 + 4 * 4  # coordinates, valid, four scores: a fact, too


@dataclass(frozen=True)
class Encoder:
    """`gflop` per tile of 224 px; `tflop_s` is what one H100 is assumed to reach in bf16."""

    name: str
    dim: int
    gflop: float
    tflop_s: float
    weights_gb: float

    @property
    def gpu_tiles_s(self) -> float:
        return self.tflop_s * 1000 / self.gflop


ENCODERS = (
    Encoder("ViT-S/16", 384, 9.2, 120, 0.1),
    Encoder("ViT-L/16", 1024, 123, 300, 1.2),
    Encoder("ViT-g/14", 1536, 583, 300, 4.5),
)


@dataclass(frozen=True)
class Machine:
    name: str
    nodes: int
    cores: int  # of a node
    gpus: int  # of a node
    node_gb_s: float  # from where slides lie to a node
    storage_gb_s: float  # of the storage as a whole


MACHINES = (
    Machine("16 cores, 1 GPU, slides on its NVMe", 1, 16, 1, 2.0, 2.0),
    Machine("128 cores, 8 GPUs, network disk 25 Gbit/s", 1, 128, 8, 3.0, 3.0),
    Machine("8 such nodes, storage 20 GB/s", 8, 128, 8, 3.0, 20.0),
)
COHORTS = (1_000, 10_000, 100_000)


@dataclass(frozen=True)
class Slide:
    tiles: int
    gb: float
    read_rate: float  # tiles/s of one core


def seconds(machine: Machine, encoder: Encoder, slide: Slide) -> dict[str, float]:
    """What a slide takes of each resource of the whole machine; the largest is what a run waits for."""
    n_cores, n_gpus = machine.nodes * machine.cores, machine.nodes * machine.gpus
    return {
        "cores": (slide.tiles / slide.read_rate + SLIDE_CORE_S) / n_cores,
        "GPU": slide.tiles / encoder.gpu_tiles_s / n_gpus,
        "network" if machine.node_gb_s > 2 else "disk": READ_IN_PLACE
        * slide.gb
        / min(machine.storage_gb_s, machine.nodes * machine.node_gb_s),
    }


def duration(total_s: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if total_s >= 1.5 * size:
            return f"{total_s / size:.3g} {unit}" if total_s < 100 * size else f"{total_s / size:,.0f} {unit}"
    return f"{total_s:.0f} s"


def size(gb: float) -> str:
    return f"{gb / 1000:.3g} TB" if gb >= 1000 else f"{gb:.3g} GB"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def time_table(slide: Slide) -> str:
    rows = []
    for machine in MACHINES:
        for encoder in ENCODERS:
            taken = seconds(machine, encoder, slide)
            first, *rest = sorted(taken, key=lambda name: -taken[name])
            others = ", ".join(f"{name} {taken[name] / taken[first]:.0%}" for name in rest)
            rows.append(
                [machine.name, encoder.name]
                + [duration(n * taken[first]) for n in COHORTS]
                + [f"{slide.tiles / taken[first]:,.0f}", f"**{first}** (busy beside it: {others})"]
            )
    return table(["machine", "encoder", *(f"{n:,} slides" for n in COHORTS), "tiles/s", "waits for"], rows)


def cpu_table(slide: Slide) -> str:
    rows = [
        [name, f"{rate:,.4g}", *(duration(n * slide.tiles / rate) for n in COHORTS[:2])]
        for name, rate in (("built-in `texture`", CPU_TEXTURE_TILES_S), ("ViT-S/16, fp32", CPU_VIT_S_TILES_S))
    ]
    return table(["two cores, no GPU (measured rates)", "tiles/s", *(f"{n:,} slides" for n in COHORTS[:2])], rows)


def bag_gb(slide: Slide, dim: int) -> float:
    return slide.tiles * (2 * dim + TILE_BYTES) / 1e9


def space_table(slide: Slide) -> str:
    rows = [["slides", *(size(n * slide.gb) for n in COHORTS)]]
    for encoder in ENCODERS:
        rows.append([f"bags, {encoder.name} ({encoder.dim} × fp16)", *(size(n * bag_gb(slide, encoder.dim)) for n in COHORTS)])
    small = SMALL_FILES_MB / 1000 + slide.tiles * TILE_BYTES / 1e9
    rows += [
        ["overviews, polygons, coordinates", *(size(n * small) for n in COHORTS)],
        ["files", *(f"{n * FILES_PER_SLIDE:,}" for n in COHORTS)],
        ["read over the network, in place", *(size(n * slide.gb * READ_IN_PLACE) for n in COHORTS)],
        ["read over the network, `--stage-to`", *(size(n * slide.gb) for n in COHORTS)],
        ["a second run over what is done (2 MB of each slide)", *(size(n * 0.002) for n in COHORTS)],
    ]
    return table(["", *(f"{n:,} slides" for n in COHORTS)], rows)


def memory_table(slide: Slide) -> str:
    rows = []
    for encoder in ENCODERS:
        worker = GB_PER_WORKER + 16 * GB_PER_READER + encoder.weights_gb + 3 * slide.tiles * encoder.dim * 4 / 1e9
        training = [size(n * slide.tiles * encoder.dim * 2 / 1e9) for n in COHORTS]
        epoch = [duration(n * slide.tiles * encoder.dim * 2 / 1e9 / COLD_BAG_GB_S) for n in COHORTS]
        pairs = [f"{gb}, {time_s}" for gb, time_s in zip(training, epoch, strict=True)]
        rows.append([encoder.name, f"{worker:.1f} GB", *pairs])
    header = ["encoder", "extraction, a worker of 16 readers", *(f"features of {n:,}; a cold pass" for n in COHORTS)]
    return table(header, rows)


def input_table(slide: Slide) -> str:
    rows = [
        ["tiles of a slide", f"{slide.tiles:,} of 256 px at .5 µm/px ({slide.tiles * 0.128**2:.0f} mm² of tissue)", "assumed"],
        ["size of a slide", f"{slide.gb:g} GB, {READ_IN_PLACE:.0%} of it in blocks with tissue", "assumed"],
        ["a core reads", f"{slide.read_rate:.0f} tiles/s", "measured on two cores; more cores: assumed to add up"],
        ["overview, tissue, files", f"{SLIDE_CORE_S:g} s of a core ({SMALL_SLIDE_CORE_S:g} s measured on small slides)", "assumed"],
        *(
            [
                f"a GPU encodes, {encoder.name}",
                f"{encoder.gpu_tiles_s:,.0f} tiles/s",
                f"assumed: H100 at {encoder.tflop_s:g} TFLOP/s",
            ]
            for encoder in ENCODERS
        ),
        ["a cold bag is read at", f"{COLD_BAG_GB_S:.1f} GB/s", "measured, local disk"],
        [
            "memory",
            f"{GB_PER_WORKER:g} GB a worker, {GB_PER_READER:g} GB a reader",
            f"assumed; {PEAK_GB_TWO_READERS} GB measured with two readers",
        ],
    ]
    return table(["", "value", "known how"], rows)


def rates_table() -> str:
    box = MACHINES[1]
    per_gpu = box.cores / box.gpus
    rows = [
        [name, f"{rate:,.0f}", *(f"{encoder.gpu_tiles_s / rate:.1f}" for encoder in ENCODERS)] for name, rate in READ_RATES.items()
    ]
    header = ["reading", "tiles/s of a core", *(f"cores to feed a GPU, {encoder.name}" for encoder in ENCODERS)]
    return table(header, rows) + f"\n\nThe 8-GPU box above has {per_gpu:.0f} cores for each GPU."


def bookkeeping() -> str:
    """Costs in the run's own process that grow with the number of slides; CPU time of this machine."""
    from wsimil.extraction.job import Books, Job, Row
    from wsimil.slides.cohort import find_slides

    count, rows = 20_000, []
    with tempfile.TemporaryDirectory() as folder:
        books = Books(Job(Path(folder, "job")), stage="extract", request={}, n_slides=count, shard=(1, 1))
        slides = Path(folder, "slides")
        slides.mkdir()
        for number in range(count):
            (slides / f"s{number:06}.svs").touch()

        def took(what: str, action) -> None:
            started = time.process_time()
            action()
            rows.append([what, f"{(time.process_time() - started) / count * 1e6:.0f}"])

        took("finding slides in a folder", lambda: find_slides(slides))
        took("a row and a manifest line", lambda: [books.add(Row(f"s{n:06}.svs", f"s{n:06}", "done")) for n in range(count)])
        took("writing status.csv once", books.close)
    return table(["", "µs of CPU a slide"], rows)


def page(slide: Slide) -> str:
    parts = (
        ("What goes in", input_table(slide)),
        ("Time of `wsimil extract`", time_table(slide)),
        ("", cpu_table(slide)),
        ("Cores for a GPU", rates_table()),
        ("Disk, files, network", space_table(slide)),
        ("Memory", memory_table(slide)),
    )
    return "\n\n".join((f"### {title}\n\n" if title else "") + text for title, text in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, default=10_000)
    parser.add_argument("--slide-gb", type=float, default=1.0)
    parser.add_argument("--read-rate", type=float, default=next(iter(READ_RATES.values())), help="tiles/s of a core")
    parser.add_argument("--doc", type=Path, help="page whose part between the two marks is replaced")
    parser.add_argument("--measure", action="store_true")
    arguments = parser.parse_args()
    text = page(Slide(arguments.tiles, arguments.slide_gb, arguments.read_rate))
    if arguments.doc:
        before, begin, rest = arguments.doc.read_text(encoding="utf-8").partition("<!-- capacity.py -->\n")
        _, end, after = rest.partition("<!-- end -->")
        arguments.doc.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")
    else:
        print(text)
    if arguments.measure:
        print("\n" + bookkeeping())


if __name__ == "__main__":
    main()

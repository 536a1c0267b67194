"""Pretraining straight from slides against the same steps on batches that are ready in memory.

    python benchmarks/pretrain.py lab toy --folder /tmp/slides --table pretrain.md

- Slides are made here: JPEG in Aperio's manner at .25 µm/px, 20,480 px, 12,288 px and 8,192 px a side. Tiles are 224 px at
  .5 µm/px, drawn where the sampler says; the files lie in the page cache.
- All ways take the steps of one `Loop` of `wsimil pretrain`: student and teacher, heads, loss, backward, AdamW, moving average.
  "In memory" is given views that were made before. The second way makes the views of each step of tiles that lie in memory. The
  third is the run itself: reader processes, no tile cache, views made in the step.
- Readers work ahead. So a round is whole windows of them, and before it they are left to fill up what they may hold: what is read
  while the clock runs is what the steps take, or the table says how much it was.
- Two clocks: of the wall; and of the processors, this process and its readers together, as if one core did all: for a busy machine.
  The second leaves nothing to the readers' own cores, so its share is the least that is to be expected.
- Every round runs every way, in turns; the share is the median of the rounds' own. Logs, panels and checkpoints are in none.
- Weights are random and slides are painted: speed is the same, quality is not looked at.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from setting import machine, make_slide

from wsimil.config import JobConfig, PretrainConfig, TileConfig
from wsimil.pretraining.feed import WINDOW_STEPS, TileFeed
from wsimil.pretraining.index import TileIndex, index_slides
from wsimil.pretraining.loop import Loop
from wsimil.pretraining.methods import METHODS, network_of, normalised, view_recipe
from wsimil.pretraining.presets import resolve_recipe
from wsimil.pretraining.process import Plan, new_loop

PACKAGES = ("torch", "timm", "lightning", "simplejpeg", "opencv-python-headless", "numpy")
TILE = TileConfig(mpp=0.5, tile_px=224, tissue="none")
SIDES_PX = (20_480, 12_288, 8_192)
PRECISION: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}

MEMORY, VIEWS, OURS = "views in memory", "tiles in memory, views made in the step", "wsimil pretrain, from slides"


def index_of(folder: Path) -> TileIndex:
    slides = folder / "pretrain-slides"
    slides.mkdir(parents=True, exist_ok=True)
    for side_px in SIDES_PX:
        make_slide(slides, block_px=256, chroma="420", side_px=side_px, downsamples=(1, 4, 16))
    return index_slides(slides, folder / "pretrain-index", tile=TILE, job=JobConfig(), quiet=True)


def plan_of(index: TileIndex, size: str, options: argparse.Namespace) -> Plan:
    config = PretrainConfig(
        method=options.method,
        size=size,
        init="scratch",
        steps=1_000_000,  # the schedules stay where they begin
        batch_size=options.batch_size if size != "toy" else None,
        device=options.device,
        precision=options.precision,
    )
    recipe = resolve_recipe(config, n_slides=len(index.slides))
    recipe = normalised(recipe, network_of(recipe, seed=0))
    if config.precision == "auto" and options.device == "cpu":
        recipe = replace(recipe, precision="fp32")
    job = JobConfig(workers=options.workers)
    return Plan(Path("unused"), "benchmark", recipe, config, TILE, job, index, {}, quiet=True)


def settle(feed: TileFeed) -> None:
    """Wait until the readers hold all that they may."""
    seen = -1
    while seen != feed.counts.reads:
        seen = feed.counts.reads
        time.sleep(1.5)


def table_of(plan: Plan, options: argparse.Namespace) -> str:
    recipe, method = plan.recipe, METHODS[plan.recipe.method]
    device = torch.device(plan.config.device)
    fabric = Fabric(accelerator="cuda" if device.type == "cuda" else "cpu", devices=1, precision=PRECISION[recipe.precision])
    fabric.launch()
    loop, views = new_loop(fabric, plan), view_recipe(recipe)
    steps = options.windows * WINDOW_STEPS
    feed = TileFeed(plan.sampler(), batch_size=recipe.batch_size, steps=range(100_000), workers=plan.job.workers)

    def to_views(batch: Any) -> Any:
        return method.views(batch, seed=0, recipe=views, device=fabric.device)

    batches = iter(feed)
    try:
        tiles = [next(batches) for _ in range(WINDOW_STEPS)]
        for _ in range(2 * WINDOW_STEPS):  # each reader knows each slide
            next(batches)
        ready = [to_views(batch) for batch in tiles]
        ways: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
            MEMORY: (cycle(ready).__next__, lambda made: made),
            VIEWS: (cycle(tiles).__next__, to_views),
            OURS: (batches.__next__, to_views),
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}  # wall, processors
        read, waited = [], []
        timed(loop, *ways[MEMORY], 2)  # memory is asked for, kernels are chosen
        for turn in range(options.rounds):
            for name in list(ways)[:: -1 if turn % 2 else 1]:
                settle(feed)
                counts = feed.counts.reads, feed.counts.waited_s
                busy = processor_seconds()
                took = timed(loop, *ways[name], steps)
                seconds[name].append((took, processor_seconds() - busy))
                if name == OURS:
                    read.append((feed.counts.reads - counts[0]) / (steps * recipe.batch_size))
                    waited.append((feed.counts.waited_s - counts[1]) / took)
    finally:
        batches.close()  # type: ignore[attr-defined]
    images = [f"{recipe.global_views}×{recipe.global_px}"]
    if recipe.local_views:
        images.append(f"{recipe.local_views}×{recipe.local_px}")
    lines = [
        f"### {recipe.method}, preset {plan.config.size}: {recipe.arch}{f' of {recipe.depth} blocks' if recipe.depth else ''}, "
        f"{' + '.join(images)} px, batches of {recipe.batch_size}, {recipe.precision}",
        "",
        f"{options.rounds} rounds of {steps} steps each way. Read while the clock ran: {statistics.median(read):.2f} tiles per "
        f"tile taken; the step waited for tiles {statistics.median(waited):.1%} of its time.",
        "",
        "| way | clock | steps/s | tiles/s | share of in memory | shares of the rounds | spread of rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for place, clock in enumerate(("wall", "processors")):
        for name, both in seconds.items():
            times, memory = [one[place] for one in both], [one[place] for one in seconds[MEMORY]]
            median = statistics.median(times)
            shares = [a / b for a, b in zip(memory, times, strict=True)]
            between = "" if name == MEMORY else f"{min(shares):.2f} to {max(shares):.2f}"
            spread = (max(times) - min(times)) / median
            lines.append(
                f"| {name} | {clock} | {steps / median:.3g} | {steps * recipe.batch_size / median:.3g} "
                f"| {statistics.median(shares):.2f} | {between} | {spread:.0%} |"
            )
    return "\n".join([*lines, ""])


def processor_seconds() -> float:
    """Of this process and its readers (Linux)."""
    own = Path("/proc") / str(os.getpid())
    children = [child for thread in (own / "task").iterdir() for child in (thread / "children").read_text().split()]
    fields = [(Path("/proc") / name / "stat").read_text().rpartition(")")[2].split() for name in (own.name, *children)]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


def timed(loop: Loop, next_part: Callable[[], Any], make: Callable[[Any], Any], steps: int) -> float:
    """Seconds of so many steps."""
    if loop.fabric.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        loop.advance([next_part()], make)
    if loop.fabric.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", metavar="size", help="presets: lab, toy, multi, self-vit-mil; default: lab toy")
    parser.add_argument("--method", choices=("dino", "mae"), default="dino")
    parser.add_argument("--folder", type=Path, help="where slides are made and kept (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=1, help=f"of {WINDOW_STEPS} steps, in a round")
    parser.add_argument("--batch-size", type=int, default=4, help="of presets other than toy")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the network")
    parser.add_argument("--workers", type=int, default=0, help="readers; 0: one per core")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    parser.add_argument("--table", type=Path, help="where the Markdown table goes, besides the terminal")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        index = index_of(folder)
        readers = options.workers or os.cpu_count()
        threads = f"{options.threads} thread{'s' if options.threads > 1 else ''} of the CPU"
        device = torch.cuda.get_device_name() if options.device.startswith("cuda") else threads
        said = [f"{machine(*PACKAGES)}\n\nNetwork on {device}, {readers} readers, no tile cache; medians of interleaved rounds.\n"]
        print(said[0], flush=True)
        for size in options.sizes or ("lab", "toy"):
            said.append(table_of(plan_of(index, size, options), options))
            print(said[-1], flush=True)
            if options.table:
                options.table.write_text("\n".join(said), encoding="utf-8")


if __name__ == "__main__":
    main()

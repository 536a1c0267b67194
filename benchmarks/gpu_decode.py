"""Would a GPU decode the blocks of JPEG slides faster, and to the same pixels? Needs a CUDA device (docs/decisions/0014).

    python benchmarks/gpu_decode.py --folder /tmp/slides --table gpu_decode.md

- Blocks of slides made here lie in memory. The first way is wsimil's: libjpeg-turbo on every core, then the pixels go to the GPU
  from pinned memory. The second is nvJPEG as torchvision gives it, in batches; the pixels are on the GPU then.
- Wall time, after a round that warms; the ways take turns. Ratios travel to other machines, rates do not.
- Pixels are compared as well: a bag must not depend on the device that it was made on.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from extract import CORES
from setting import machine, make_slide
from torchvision.io import ImageReadMode, decode_jpeg

from wsimil.slides.blocks import BlockLevel, open_blocks

BATCH, N_BLOCKS, SIDE_PX = 256, 2048, 12_288


def on_cores(level: BlockLevel, contents: list[bytes], device: torch.device, pool: ThreadPoolExecutor) -> torch.Tensor:
    """Pixels uint8 (n, height, width, 3) on the device."""
    pixels = torch.empty((len(contents), level.block_height, level.block_width, 3), dtype=torch.uint8)
    pixels = pixels.pin_memory() if device.type == "cuda" else pixels
    memory = pixels.numpy()
    list(pool.map(level.decode, contents, memory))
    return pixels.to(device, non_blocking=True)


def by_torchvision(contents: list[bytes], device: torch.device) -> torch.Tensor:
    """Pixels uint8 (n, height, width, 3) on the device."""
    encoded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    decoded = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    assert isinstance(decoded, list)
    return torch.stack(decoded).movedim(1, -1)


def compared(path: Path, size: tuple[int, int], device: torch.device, rounds: int) -> str:
    level = open_blocks(path, size)
    contents = [bytes(content) for content in level.read(range(N_BLOCKS)).values() if not isinstance(content, Exception)]
    batches = [contents[start : start + BATCH] for start in range(0, len(contents), BATCH)]
    seconds: dict[str, list[float]] = {"libjpeg-turbo, all cores": [], "torchvision (nvJPEG on a GPU)": []}
    with ThreadPoolExecutor(CORES) as pool:
        ways = (lambda batch: on_cores(level, batch, device, pool), lambda batch: by_torchvision(batch, device))
        apart = (ways[0](batches[0]).int() - ways[1](batches[0]).int()).abs()
        for turn in range(rounds + 1):
            for way, times in zip(ways, seconds.values(), strict=True):
                start = time.perf_counter()
                for batch in batches:
                    way(batch)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn:
                    times.append(time.perf_counter() - start)
    lines = ["| way | blocks/s | × the first |", "|---|---|---|"]
    first = next(iter(seconds.values()))
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(first, times, strict=True))
        lines.append(f"| {name} | {len(contents) / statistics.median(times):,.0f} | {ratio:.2f} |")
    differing = (apart > 0).float().mean().item()
    return "\n".join(
        [*lines, "", f"Pixels: {differing:.1%} of the values differ, by {apart.max().item()} grey levels at most.", ""]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where slides are made and kept (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda", help="cpu: to see that the two ways agree where nothing is decoded on a GPU")
    parser.add_argument("--table", type=Path, help="where the Markdown table goes, besides the terminal")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu runs both ways without one, which says nothing of a GPU")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU used"
    said = [f"{machine('torch', 'torchvision', 'simplejpeg')}; {name}\n\nWall time, medians of {options.rounds} rounds.\n"]
    print(said[0])
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for chroma in ("420", "422", "444"):
            path = make_slide(folder, block_px=256, chroma=chroma, side_px=SIDE_PX)
            said.append(f"### Blocks of 256 px, chroma {chroma}\n\n" + compared(path, (SIDE_PX, SIDE_PX), device, options.rounds))
            print(said[-1], flush=True)
    if options.table:
        options.table.write_text("\n".join(said), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Drawing the map of one large slide: wsimil's way side by side with the loop that users write, and with all else that a map costs.

    python benchmarks/heatmaps.py --folder /tmp/slides --table heatmaps.md

- The slide is made here (painted tissue in Aperio's manner, with a pyramid) and kept in the folder; no download. Its 100,000 tiles
  of 224 px cover it with half a tile of overlap; their scores are random numbers.
- The loop is CLAM's recipe, written anew: tile by tile the score is added to a float canvas and one to a count, the sum is divided
  by the count, the whole canvas is coloured and blended with the slide. It has no legend, its colours are cv2's.
- Times are CPU seconds of the process, all libraries held to one thread, the file in the page cache; every round runs every step
  once, in turns, and the table has medians of rounds. Ratios travel to other machines, seconds do not.
- Beside it stands the work that a map has in common with others: the picture of the slide, PNG, GeoJSON.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import tifffile
from PIL import Image
from setting import machine

from wsimil.heatmaps.colors import in_colors
from wsimil.heatmaps.draw import _Z_RLE
from wsimil.heatmaps.geojson import tiles_geojson
from wsimil.heatmaps.picture import overlay
from wsimil.heatmaps.tile_map import TileMap
from wsimil.slides.painting import paint_slide
from wsimil.slides.slide import Slide

PACKAGES = ("openslide-bin", "opencv-python-headless", "pillow", "numpy")
BLOCK_PX, TILE_PX = 256, 224
OURS, LOOP = "wsimil: map and legend onto the picture", "the loop: map onto the picture"
OVERVIEW, PNG, PLAIN_PNG = "picture of the slide, read", "PNG", "PNG at Pillow's defaults"
GEOJSON, PLAIN_GEOJSON = "GeoJSON", "GeoJSON through objects and json.dumps"
WHOLE = (OVERVIEW, OURS, PNG, GEOJSON)


def make_slide(folder: Path, side_px: int) -> Path:
    """A JPEG slide with levels 4 and 16 times smaller: blocks cut from one painting at random places."""
    path = folder / f"bench-heatmap-{side_px}.svs"
    if path.exists():
        return path
    picture = paint_slide(1024, 1024, mpp=0.25, seed=3).rgb  # (4096, 4096, 3)
    unfinished = path.with_suffix(".tmp")
    description = f"Aperio Image Library v11.2.1\r\n{side_px}x{side_px} ({BLOCK_PX}x{BLOCK_PX}) JPEG|MPP = 0.5000"
    with tifffile.TiffWriter(unfinished, bigtiff=True) as tiff:
        for downsample in (1, 4, 16):
            level = np.ascontiguousarray(np.asarray(Image.fromarray(picture).reduce(downsample)))
            side = side_px // downsample
            tiff.write(
                blocks(level, (side // BLOCK_PX) ** 2),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(BLOCK_PX, BLOCK_PX),
                photometric="rgb",
                compression="jpeg",
                subsampling=(2, 2),
                description=description,
                metadata=None,
            )
    unfinished.rename(path)
    return path


def blocks(picture: np.ndarray, count: int) -> Iterator[bytes]:
    """JPEG blocks; a hundred different ones, for making a gigapixel takes long enough."""
    rng = np.random.default_rng(0)
    different = []
    for _ in range(100):
        x, y = rng.integers(0, np.array(picture.shape[1::-1]) - BLOCK_PX, endpoint=True)
        block = np.ascontiguousarray(picture[y : y + BLOCK_PX, x : x + BLOCK_PX])
        different.append(simplejpeg.encode_jpeg(block, quality=90, colorsubsampling="420"))
    for number in range(count):
        yield different[(number * 37) % 100]


def make_map(side_px: int, n_tiles: int) -> TileMap:
    """Tiles of a square grid over the whole slide; each overlaps its neighbours."""
    per_side = round(n_tiles**0.5)
    edges = np.floor(np.linspace(0, side_px - TILE_PX, per_side)).astype(np.int64)
    coords = np.stack(np.meshgrid(edges, edges), axis=-1).reshape(-1, 2)
    values = np.random.default_rng(0).normal(size=len(coords)).astype(np.float32)
    return TileMap("bench", values, coords, float(TILE_PX), "contribution", "tumour", (side_px, side_px), (0, 0))


def the_loop(picture: np.ndarray, tile_map: TileMap) -> np.ndarray:
    """What users write: tile by tile onto a canvas of floats, then colours and a blend of all of it."""
    height, width = picture.shape[:2]
    scale = np.array([width, height]) / tile_map.size_level0_px
    low, high = tile_map.scale
    shares = (np.clip(tile_map.values, low, high) - low) / (high - low)
    total, count = np.zeros((height, width)), np.zeros((height, width))
    side = np.ceil(tile_map.tile_level0_px * scale).astype(int)
    for (x, y), share in zip((tile_map.coords_level0_px * scale).astype(int), shares, strict=True):
        total[y : y + side[1], x : x + side[0]] += share
        count[y : y + side[1], x : x + side[0]] += 1
    covered = count > 0
    total[covered] /= count[covered]
    colours = cv2.applyColorMap((total * 255).astype(np.uint8), cv2.COLORMAP_JET)[..., ::-1]
    blended = cv2.addWeighted(picture, 0.6, np.ascontiguousarray(colours), 0.4, 0)
    return np.where(covered[..., None], blended, picture)


def through_objects(tile_map: TileMap) -> str:
    """The same tiles as `tiles_geojson` writes, a dictionary each; without its identities, the dearest part of it."""
    rows = np.sort(np.argsort(-tile_map.values, kind="stable")[:20_000])
    side = tile_map.tile_level0_px
    values = tile_map.values[rows]
    colours = in_colors(tile_map.share(values), signed=True).tolist()
    features = []
    for (x, y), value, colour in zip(tile_map.coords_level0_px[rows].tolist(), values.tolist(), colours, strict=True):
        name = "tumour" if value > 0 else "not tumour"
        features.append(
            {
                "type": "Feature",
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [[[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]],
                },
                "properties": {
                    "objectType": "tile",
                    "color": colour,
                    "classification": {"name": name, "color": [200, 40, 40]},
                    "measurements": {"contribution": round(value, 6)},
                },
            }
        )
    return json.dumps({"type": "FeatureCollection", "features": features})


def steps(path: Path, tile_map: TileMap, size_px: tuple[int, int]) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """What is timed, and how many bytes the files have."""
    with Slide(path) as slide:
        picture = slide.overview(size_px)
    painted = overlay(picture, tile_map, "bench")

    def overview() -> None:
        with Slide(path) as slide:
            slide.overview(size_px)

    def png(**options: int) -> bytes:
        file = io.BytesIO()
        painted.save(file, "PNG", **options)
        return file.getvalue()

    fast = {"compress_level": 1, "compress_type": _Z_RLE}
    sizes = {PNG: len(png(**fast)), PLAIN_PNG: len(png()), GEOJSON: len(tiles_geojson(tile_map))}
    return {
        OVERVIEW: overview,
        OURS: lambda: overlay(picture, tile_map, "bench"),
        LOOP: lambda: the_loop(picture, tile_map),
        PNG: lambda: png(**fast),
        PLAIN_PNG: png,
        GEOJSON: lambda: tiles_geojson(tile_map),
        PLAIN_GEOJSON: lambda: through_objects(tile_map),
    }, sizes


def measure(named: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for turn in range(rounds + 1):
        for name, run in named.items():
            start = time.process_time()
            run()
            if turn:  # the first warms caches
                seconds[name].append(time.process_time() - start)
    return seconds


def table(title: str, seconds: dict[str, list[float]], sizes: dict[str, int]) -> str:
    lines = [f"### {title}", "", "| step | ms | of wsimil's whole | MB | spread of rounds |", "|---|---|---|---|---|"]
    whole = sum(statistics.median(seconds[name]) for name in WHOLE)
    for name, times in seconds.items():
        median = statistics.median(times)
        share = f"{median / whole:.0%}" if name in WHOLE else ""
        size = f"{sizes[name] / 1e6:.1f}" if name in sizes else ""
        lines.append(f"| {name} | {median * 1e3:,.0f} | {share} | {size} | {(max(times) - min(times)) / median:.0%} |")
    # ratios within a round: what else the machine does falls on both
    ratios = [
        (what, statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)))
        for what, slow, fast in (("drawing", LOOP, OURS), ("PNG", PLAIN_PNG, PNG), ("GeoJSON", PLAIN_GEOJSON, GEOJSON))
    ]
    said = ", ".join(f"{what} {ratio:.1f}" for what, ratio in ratios)
    return "\n".join([*lines, "", f"wsimil's whole: {whole:.2f} s. The plain way takes times as long: {said}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the slide is made and kept (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiles", type=int, default=100_000)
    parser.add_argument("--max-side-px", type=int, nargs="+", default=[1600, 6000], help="longer side of the picture")
    parser.add_argument("--table", type=Path, help="where the Markdown table goes, besides the terminal")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    side_px = round(options.tiles**0.5) * TILE_PX // 2 // (16 * BLOCK_PX) * (16 * BLOCK_PX)
    tile_map = make_map(side_px, options.tiles)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        path = make_slide(folder, side_px)
        parts = [machine(*PACKAGES) + f"\n\nOne core, medians of {options.rounds} interleaved rounds of CPU time.\n"]
        print(parts[0])
        for side in options.max_side_px:
            named, sizes = steps(path, tile_map, (side, side))
            title = f"{len(tile_map.values):,} tiles of {TILE_PX} px on {side_px:,} × {side_px:,} px, picture {side} × {side} px"
            parts.append(table(title, measure(named, rounds=options.rounds), sizes))
            print(parts[-1], flush=True)
        if options.table:
            options.table.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()

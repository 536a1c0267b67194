"""Tile scores back on the slide: a picture to look at and polygons for QuPath.

- One model of the raster: every tile is a square in level-0 pixels; where tiles overlap, their mean.
- The map is the signed contribution to the predicted class where the model has exact ones (0 is neutral, red speaks for it,
  blue against), else attention as multiples of a uniform weight. The raw scores stay in `scores/`.
- QuPath's origin is OpenSlide's bounds offset, so that is subtracted in GeoJSON (`--qupath-bounds keep` leaves it).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from wsimil.config import HeatmapConfig
from wsimil.errors import BagFormatError, SlideError, UsageError, WsimilError
from wsimil.evaluation.table import read_predictions
from wsimil.files import atomic_path, mark_output, write_text
from wsimil.hdf5 import open_hdf5, read_attributes
from wsimil.progress import progress
from wsimil.slides.cohort import SlideFile, find_slides
from wsimil.slides.slide import Slide

__all__ = ["TileMap", "draw_heatmaps", "read_tile_map"]

MAX_GEOJSON_TILES = 20_000
"""QuPath grows slow beyond; the hottest are kept, and the picture shows them all."""

_NAMESPACE = uuid.UUID("6c1b4e0a-5b1c-5f6e-8d3e-2f2f0f1f7a11")  # any constant: the same tile gets the same id


@dataclass(frozen=True)
class TileMap:
    """One number per tile of a slide, and where the tiles are."""

    slide_id: str
    values: np.ndarray  # (N,) float32, finite
    coords_level0_px: np.ndarray  # (N, 2)
    tile_level0_px: float
    kind: str  # contribution, attention, tile_prob
    class_name: str  # what the values speak for
    size_level0_px: tuple[int, int]
    bounds: tuple[int, int]  # x, y

    @property
    def signed(self) -> bool:
        return self.kind == "contribution"

    def scale(self) -> tuple[float, float]:
        """Values at the two ends of the colours: robust against a single tile, the same rule for every slide."""
        if self.kind == "tile_prob":
            return 0.0, 1.0
        top = float(np.quantile(np.abs(self.values), 0.99)) if len(self.values) else 0.0
        if self.signed:
            return -(top or 1.0), top or 1.0
        return 0.0, max(top, 2.0)  # a map without a preference stays pale

    def colors(self) -> np.ndarray:
        """(N, 3) uint8."""
        low, high = self.scale()
        cmap = colormaps["coolwarm" if self.signed else "inferno"]
        return (cmap(np.clip((self.values - low) / (high - low), 0, 1))[:, :3] * 255).round().astype(np.uint8)

    def hottest(self) -> np.ndarray:
        """(2,) centre of the tile with the highest value, level-0 px."""
        return self.coords_level0_px[int(self.values.argmax())] + self.tile_level0_px / 2

    def raster(self, size_px: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """values (h, w), mean over the tiles on each pixel, and covered (h, w) bool, on the canvas resampled to `size_px`."""
        width, height = size_px
        per_px = np.array(self.size_level0_px) / size_px
        low = np.round(self.coords_level0_px / per_px).astype(int)
        high = np.maximum(np.round((self.coords_level0_px + self.tile_level0_px) / per_px).astype(int), low + 1)
        total, count = np.zeros((height, width), np.float32), np.zeros((height, width), np.uint16)
        for (x0, y0), (x1, y1), value in zip(low.tolist(), high.tolist(), self.values.tolist(), strict=True):
            total[y0:y1, x0:x1] += value
            count[y0:y1, x0:x1] += 1
        return total / np.maximum(count, 1), count > 0


def read_tile_map(scores: Path, kind: str = "auto", *, class_name: str | None = None) -> TileMap:
    """The map of a scores file.

    Args:
        kind: attention, contribution, tile_prob, or auto.
        class_name: which class the map speaks for; default the only or last one.

    Raises:
        BagFormatError: no scores file.
        UsageError: the file has no such map.
    """
    attributes = read_attributes(scores)
    if attributes.get("format") != "wsimil-scores" or not attributes.get("complete"):
        raise BagFormatError(f"{scores}: no finished scores file; `wsimil predict` makes one")
    datasets = {"attention": "attention", "contribution": "contributions", "tile_prob": "tile_prob"}
    with open_hdf5(scores) as file:
        present = {name: dataset for name, dataset in datasets.items() if dataset in file}
        if kind == "auto":
            order = ["contribution", "tile_prob", "attention"]
            if attributes.get("contribution_kind") != "exact":
                order = ["tile_prob", "attention", "contribution"]
            kind = next((name for name in order if name in present), "contribution")
        if kind not in present:
            raise UsageError(f"{scores}: no {kind} in it (it has {', '.join(present) or 'no map'})")
        table = file[present[kind]][:]
        coords = file["coords"][:]
    names = [str(name) for name in attributes.get("class_names", [])]
    column = names.index(class_name) if class_name in names else -1
    if kind == "attention":
        values = table.mean(1) * np.isfinite(table).all(1).sum()
    else:
        values = table[:, column]
        if class_name is not None and len(names) == 1 and class_name != names[0] and kind == "contribution":
            class_name = names[0]  # one output: the map speaks for the positive class, whatever was predicted
    valid = np.isfinite(values)
    return TileMap(
        slide_id=str(attributes["slide_id"]),
        values=values[valid].astype(np.float32),
        coords_level0_px=coords[valid],
        tile_level0_px=float(attributes["tile_level0_px"]),
        kind=kind,
        class_name=names[column] if names and kind != "attention" else "attention",
        size_level0_px=(int(attributes["level0_width"]), int(attributes["level0_height"])),
        bounds=(int(attributes.get("bounds_x", 0)), int(attributes.get("bounds_y", 0))),
    )


def draw_heatmaps(
    predictions: str | Path,
    slides: str | Path,
    out: str | Path,
    *,
    config: HeatmapConfig | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> list[str]:
    """Write `<slide_id>.png` and `<slide_id>.geojson` for every slide that has tile scores.

    Args:
        predictions: folder with `predictions.csv` and `scores/`.
        slides: where the slides are: folder, slide or CSV.
        out: where to write.

    Returns:
        What went wrong, a line per slide: the slide is not there, or is not the one that was predicted.
    """
    config = config or HeatmapConfig()
    predictions, out = Path(predictions), Path(out)
    table = read_predictions(predictions / "predictions.csv")
    rows: dict[str, dict[str, Any]] = {row["slide_id"]: row for row in table.to_dict("records")}
    scores = sorted(path for path in (predictions / "scores").glob("*.h5") if not path.name.startswith("."))
    if not scores:
        raise UsageError(f"{predictions}: no scores/*.h5 in it; `wsimil predict` makes them")
    files = {file.slide_id: file for file in find_slides(slides)}
    mark_output(out)
    wrong: list[str] = []
    for path in progress(scores, "heatmap", unit="slide", quiet=quiet):
        slide_id = path.stem
        try:
            if slide_id not in files:
                raise SlideError(f"not among the {len(files)} slides of {slides}")
            _draw_one(path, files[slide_id], rows.get(slide_id, {}), out, config)
        except WsimilError as error:
            wrong.append(f"{slide_id}: {error}")
    return wrong


def _draw_one(scores: Path, file: SlideFile, row: dict[str, Any], out: Path, config: HeatmapConfig) -> None:
    predicted = str(row["prediction"]) if "prediction" in row else None
    tile_map = read_tile_map(scores, config.map, class_name=predicted)
    if "png" in config.format:
        with Slide(file.path) as slide:
            if (slide.width, slide.height) != tile_map.size_level0_px:
                raise SlideError(
                    f"{slide.width}×{slide.height} px, but the scores are of {'×'.join(map(str, tile_map.size_level0_px))} px: "
                    "another version of the slide"
                )
            factor = max(1.0, max(slide.width, slide.height) / config.max_side_px)
            picture = slide.overview((max(1, round(slide.width / factor)), max(1, round(slide.height / factor))))
        with atomic_path(out / f"{tile_map.slide_id}.png") as temporary:
            overlay(picture, tile_map, _caption(tile_map, row)).save(temporary, compress_level=3)
    if "geojson" in config.format:
        origin = tile_map.bounds if config.qupath_bounds == "auto" else (0, 0)
        content = tiles_geojson(tile_map, origin=origin)
        write_text(out / f"{tile_map.slide_id}.geojson", json.dumps(content, separators=(",", ":")))


def _caption(tile_map: TileMap, row: dict[str, Any]) -> str:
    if row.get("status") != "done" or not {"value", "prediction"} & set(row):
        return tile_map.slide_id
    if "value" in row:
        return f"{tile_map.slide_id}   predicted {row['value']:.3g}" + (f"   true {row['label']}" if str(row["label"]) else "")
    probability = float(row[f"prob_{row['prediction']}"])
    label = f"   true: {row['label']}" if str(row["label"]) else ""
    return f"{tile_map.slide_id}   predicted: {row['prediction']} ({probability:.2f}){label}"


def overlay(picture: np.ndarray, tile_map: TileMap, caption: str) -> Image.Image:
    """The slide with the map on it, a caption and the scale of the colours.

    A tile is coloured the more strongly, the further its value is from neutral: tissue stays visible where the map says little.
    """
    height, width = picture.shape[:2]
    values, covered = tile_map.raster((width, height))
    low, high = tile_map.scale()
    cmap = colormaps["coolwarm" if tile_map.signed else "inferno"]
    share = np.clip((values - low) / (high - low), 0, 1)
    strength = np.abs(share - 0.5) * 2 if tile_map.signed else share
    alpha = np.where(covered, 0.15 + 0.55 * np.sqrt(strength), 0)[..., None].astype(np.float32)
    painted = picture * (1 - alpha) + cmap(share)[..., :3].astype(np.float32) * 255 * alpha
    return _with_legend(Image.fromarray(painted.round().astype(np.uint8)), tile_map, caption)


def _with_legend(image: Image.Image, tile_map: TileMap, caption: str) -> Image.Image:
    width = max(image.width, 640)
    size = max(13, width // 70)
    font = ImageFont.load_default(size)
    strip = round(size * 4.6)
    canvas = Image.new("RGB", (width, image.height + strip), "white")
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    margin, top = size, image.height + size * 0.7
    draw.text((margin, top), caption, fill="black", font=font)
    bar_width, bar_height, bar_top = round(width * 0.3), round(size * 0.9), round(top + size * 1.7)
    cmap = colormaps["coolwarm" if tile_map.signed else "inferno"]
    colors = (cmap(np.linspace(0, 1, bar_width))[:, :3] * 255).astype(np.uint8)
    canvas.paste(Image.fromarray(np.repeat(colors[None], bar_height, 0)), (margin, bar_top))
    low, high = tile_map.scale()
    meaning = {
        "contribution": f"contribution to {tile_map.class_name} (logit)",
        "attention": "attention, multiples of a uniform weight",
        "tile_prob": f"tile probability of {tile_map.class_name}",
    }[tile_map.kind]
    draw.text((margin + bar_width + size, bar_top - size * 0.15), f"{low:.2g} to {high:.2g}: {meaning}", fill="black", font=font)
    return canvas


def tiles_geojson(tile_map: TileMap, *, origin: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """QuPath tile objects, `origin` (level-0 px) subtracted; beyond 20,000 only the hottest."""
    order = np.argsort(-tile_map.values, kind="stable")[:MAX_GEOJSON_TILES]
    colors = tile_map.colors()
    side = tile_map.tile_level0_px
    features = []
    for row in np.sort(order).tolist():
        x, y = (tile_map.coords_level0_px[row] - np.array(origin)).tolist()
        value = float(tile_map.values[row])
        ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
        color = colors[row].tolist()
        for_class = value > 0 if tile_map.signed else True
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(_NAMESPACE, f"{tile_map.slide_id}/{tile_map.kind}/{row}")),
                "geometry": {"type": "Polygon", "coordinates": [[[round(a, 2), round(b, 2)] for a, b in ring]]},
                "properties": {
                    "objectType": "tile",
                    "color": color,
                    "classification": {
                        "name": tile_map.class_name if for_class else f"not {tile_map.class_name}",
                        "color": [200, 40, 40] if for_class else [60, 90, 200],
                    },
                    "measurements": {tile_map.kind: round(value, 6)},
                    "isLocked": True,
                },
            }
        )
    return {
        "type": "FeatureCollection",
        "wsimil": {
            "slide_id": tile_map.slide_id,
            "map": tile_map.kind,
            "frame": "level-0 pixels, origin subtracted",
            "origin_level0_px": list(origin),
            "n_tiles": len(tile_map.values),
            "n_written": len(features),
        },
        "features": features,
    }

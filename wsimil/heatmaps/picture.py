"""The slide with its map painted on, a caption and the scale of the colours.

- A tile is coloured the more strongly, the further its value is from neutral: tissue stays visible where the map says little.
- Painted a few rows at a time: beside the slide's picture and the finished one, memory does not grow with their size.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wsimil.heatmaps.colors import in_colors
from wsimil.heatmaps.tile_map import Strip, TileMap

__all__ = ["overlay"]

_PX_AT_A_TIME = 1 << 18


def overlay(picture: np.ndarray, tile_map: TileMap, caption: str) -> Image.Image:
    """The picture of the whole slide, uint8 (h, w, 3), with the map on it and a legend below."""
    height, width = picture.shape[:2]
    image = Image.new("RGB", (max(width, 640), height + round(_text_px(width) * 4.6)), "white")
    rows = max(1, _PX_AT_A_TIME // width)
    for strip in tile_map.strips((width, height)):
        kept, paint = _layer(strip, tile_map)
        for top in range(strip.top_px, strip.bottom_px, rows):
            here = picture[top : min(top + rows, strip.bottom_px)]
            painted = np.rint(here * kept + paint).astype(np.uint8) if strip.covered.any() else here
            image.paste(Image.fromarray(painted), (0, top))
    _draw_legend(image, height, tile_map, caption)
    return image


def _layer(strip: Strip, tile_map: TileMap) -> tuple[np.ndarray, np.ndarray]:
    """By what a row of pixels is multiplied, (w, 1), and what is added to it, (w, 3); float32."""
    share = tile_map.share(strip.values)
    strength = np.abs(share - 0.5) * 2 if tile_map.signed else share
    alpha = np.where(strip.covered, 0.15 + 0.55 * np.sqrt(strength), 0)[:, None].astype(np.float32)  # (C, 1)
    columns = np.diff(strip.x_edges_px)
    return (1 - alpha).repeat(columns, 0), (in_colors(share, signed=tile_map.signed) * alpha).repeat(columns, 0)


def _text_px(width: int) -> int:
    return max(13, max(width, 640) // 70)


def _draw_legend(image: Image.Image, top: int, tile_map: TileMap, caption: str) -> None:
    size = _text_px(image.width)
    font = ImageFont.load_default(size)
    draw = ImageDraw.Draw(image)
    margin = size
    draw.text((margin, top + size * 0.7), caption, fill="black", font=font)
    bar_width, bar_height, bar_top = round(image.width * 0.3), round(size * 0.9), round(top + size * 2.4)
    colors = in_colors(np.linspace(0, 1, bar_width), signed=tile_map.signed)
    image.paste(Image.fromarray(np.repeat(colors[None], bar_height, 0)), (margin, bar_top))
    low, high = tile_map.scale
    meaning = {
        "contribution": f"contribution to {tile_map.class_name} ({tile_map.contribution_unit})",
        "attention": "attention, multiples of a uniform weight",
        "tile_prob": f"tile probability of {tile_map.class_name}",
    }[tile_map.kind]
    draw.text((margin + bar_width + size, bar_top - size * 0.15), f"{low:.2g} to {high:.2g}: {meaning}", fill="black", font=font)

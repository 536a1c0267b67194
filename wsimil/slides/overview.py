"""The picture that a person judges tiling by: tissue and pen outlined, the kept tiles, a scale bar and what the colours mean.

- What is left out is faded, so that what is kept stands out even where the outline is thin.
- Small fields are enlarged and large slides reduced to about the same size: the lines are as thin on all of them.
"""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wsimil.slides.polygons import CLASS_COLORS
from wsimil.slides.tissue import TissueMask

__all__ = ["draw_overview"]

_TILE_COLOR = (40, 60, 160)
_FADED = 0.55
"""How far what is left out is moved towards white."""


def draw_overview(
    rgb: np.ndarray,
    found: TissueMask,
    *,
    tiles_px: np.ndarray | None = None,  # (N, 4) x, y, width, height in pixels of `rgb`
    long_side_px: int = 1600,
) -> Image.Image:
    """The picture of a slide with outlines, tiles and, below it, a legend."""
    h, w = rgb.shape[:2]
    factor = long_side_px / max(h, w)
    factor = factor if factor <= 1 else max(1, min(int(factor), 8))  # pixels stay square and as sharp as they are
    size = (max(1, round(w * factor)), max(1, round(h * factor)))
    drawn = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST)
    kept = _enlarged(found.mask, size)
    drawn[~kept] += ((255 - drawn[~kept]) * _FADED).astype(np.uint8)
    boxes = np.zeros((0, 4)) if tiles_px is None else tiles_px * ([size[0] / w, size[1] / h] * 2)
    for left, top, right, bottom in np.rint(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])).astype(int).tolist():
        cv2.rectangle(drawn, (left, top), (right - 1, bottom - 1), _TILE_COLOR, 1)
    for mask, name in ((kept, "Tissue"), (_enlarged(found.pen, size), "Pen")):
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(drawn, contours, -1, CLASS_COLORS[name], 2)
    return _with_legend(Image.fromarray(drawn), found, len(boxes), found.mpp * w / size[0])


def _enlarged(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool)


def _with_legend(image: Image.Image, found: TissueMask, n_tiles: int, mpp: float) -> Image.Image:
    """A scale bar of about a fifth of the width and one line of text below the picture."""
    text_px = 15
    font = ImageFont.load_default(text_px)
    canvas = Image.new("RGB", (max(image.width, 480), image.height + 2 * text_px), "white")
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    x, middle = text_px // 2, image.height + text_px
    bar_um = _round_length(image.width * mpp / 5)
    draw.rectangle((x, middle - 2, x + round(bar_um / mpp) - 1, middle + 1), fill="black")
    x += round(bar_um / mpp) + text_px // 2
    entries: list[tuple[str, tuple[int, int, int] | None]] = [
        (f"{bar_um / 1000:g} mm", None),
        (f"tissue {found.mask.mean():.0%}", CLASS_COLORS["Tissue"]),
    ]
    if found.pen.any():
        entries.append((f"pen {found.pen.mean():.1%}", CLASS_COLORS["Pen"]))
    entries.append((f"{n_tiles:,} tiles", _TILE_COLOR))
    for text, color in entries:
        if color:
            draw.rectangle((x, middle - 5, x + 10, middle + 5), outline=color, width=2)
            x += text_px
        draw.text((x, middle), text, fill="black", font=font, anchor="lm")
        x += round(draw.textlength(text, font=font)) + text_px
    return canvas


def _round_length(um: float) -> float:
    """The largest of 1, 2, 5, 10, 20, 50 … that is not longer."""
    power = 10 ** np.floor(np.log10(um))
    return float(power * max(step for step in (1, 2, 5) if step * power <= um * (1 + 1e-9)))

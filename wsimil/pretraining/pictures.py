"""Pictures that a person judges a run by: what the network is shown, what its patch tokens tell apart, what it finds alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from wsimil.pretraining.health import Panel

__all__ = ["neighbour_sheet", "patch_sheet", "view_sheet"]

_GAP_PX = 4


def view_sheet(views: Sequence[Tensor], *, mean: tuple[float, ...], std: tuple[float, ...], tiles: int = 8) -> Image.Image:
    """A line per tile: its views, as the network sees them, side by side. Each of `views` is (B, 3, px, px), normalised."""
    shift, scale = (np.asarray(values, np.float32).reshape(3, 1, 1) for values in (mean, std))
    rows = []
    for number in range(min(tiles, len(views[0]))):
        pictures = [view[number].float().cpu().numpy() * scale + shift for view in views]
        rows.append([(picture.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0) for picture in pictures])
    return _grid(rows)


@torch.no_grad()
def patch_sheet(panel: Panel, model: nn.Module, device: Any, *, tiles: int = 16) -> Image.Image:
    """Tiles, and below each its patch tokens: three principal components over all of these tiles as red, green and blue.

    Same colour, same kind of tissue to the network: borders of tissue should show, the pattern of the patches' places should not.
    """
    rows = spread_out(panel.slides, tiles)
    was_training = model.training
    model.eval()
    tokens = model.encode_tokens(panel.images(rows, device)).float()  # type: ignore[operator]  # (n, patches, D)
    model.train(was_training)
    n, patches, dim = tokens.shape
    side = round(patches**0.5)
    flat = tokens.reshape(-1, dim).cpu()
    flat = flat - flat.mean(0)
    directions = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)  # largest first
    directions = directions * directions.sum(0).sign().where(directions.sum(0) != 0, torch.ones(3))  # a sign that stays
    parts = (flat @ directions).numpy()
    low, high = np.percentile(parts, (2, 98), axis=0)
    colours = ((parts - low) / np.maximum(high - low, 1e-9)).clip(0, 1).reshape(n, side, side, 3)
    px = panel.tiles.shape[1]
    pictures = [np.asarray(panel.tiles[row]) for row in rows]
    maps = [
        np.asarray(Image.fromarray((colour * 255).astype(np.uint8)).resize((px, px), Image.Resampling.NEAREST))
        for colour in colours
    ]
    half = (n + 1) // 2
    return _grid([pictures[:half], maps[:half], pictures[half:], maps[half:]])


def neighbour_sheet(panel: Panel, features: np.ndarray, *, tiles: int = 10, neighbours: int = 6) -> Image.Image:
    """A line per tile: the tile, then those the network finds most alike, nearest first."""
    units = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    rows = []
    for row in spread_out(panel.slides, tiles):
        alike = units @ units[row]
        alike[row] = -np.inf
        nearest = np.argsort(-alike, kind="stable")[:neighbours]
        rows.append([np.asarray(panel.tiles[row]), *(np.asarray(panel.tiles[one]) for one in nearest)])
    return _grid(rows)


def spread_out(slides: np.ndarray, count: int) -> np.ndarray:
    """Rows of so many tiles, from as many slides as there are, the same every time."""
    turns: dict[int, int] = {}
    keys = []
    for row, slide in enumerate(slides.tolist()):
        keys.append((turns.get(slide, 0), slide, row))
        turns[slide] = turns.get(slide, 0) + 1
    return np.array([row for _, _, row in sorted(keys)[:count]], dtype=np.int64)


def _grid(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Pictures in lines, each line as high as its highest picture."""
    rows = [row for row in rows if len(row)]
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    width = max(sum(picture.shape[1] + _GAP_PX for picture in row) for row in rows) - _GAP_PX
    sheet = Image.new("RGB", (width, sum(heights) + _GAP_PX * (len(rows) - 1)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for picture in row:
            sheet.paste(Image.fromarray(np.ascontiguousarray(picture)), (left, top))
            left += picture.shape[1] + _GAP_PX
        top += height + _GAP_PX
    return sheet

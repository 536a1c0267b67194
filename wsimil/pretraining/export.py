"""The encoder of a run, as `extract --encoder RUN` takes it: weights under timm's names, and a contract that says how it sees.

- What is exported is what is evaluated: the teacher where there is one, pooled as the panel pools it.
- An export is read back at once and must give the same vectors of the same tiles, or there is none.
- `how_trained` says from which slides, by id and by content: a study whose test slides are among them is told so.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsimil.config import TileConfig
from wsimil.encoders import EncoderContract, load_encoder, save_encoder
from wsimil.errors import WsimilError
from wsimil.pretraining.health import Panel
from wsimil.pretraining.methods import METHODS, pool
from wsimil.pretraining.presets import Recipe

__all__ = ["export_encoder", "seen_scales"]

_CHECKED_TILES = 2
_TOLERANCE = 1e-4


def seen_scales(recipe: Recipe, tile: TileConfig, mpp_range: tuple[float, float]) -> tuple[float, float]:
    """µm/px of whole tiles as the network sees them, finest and coarsest: some presets read them larger than its input."""
    factor = tile.tile_px / recipe.global_px
    return mpp_range[0] * factor, mpp_range[1] * factor


def export_encoder(
    folder: Path,
    model: Any,
    recipe: Recipe,
    *,
    name: str,
    scales: tuple[float, float],
    how_trained: Mapping[str, Any],
    panel: Panel,
) -> None:
    """Write `backbone.safetensors` and `encoder.json`, and check them; `model` is a trainable network of ours.

    Raises:
        WsimilError: what was written does not give the vectors that the network in memory gives.
    """
    pooling = METHODS[recipe.method].pooling
    finest, coarsest = (float(f"{scale:.4g}") for scale in scales)
    contract = EncoderContract(
        name=name,
        architecture=model.architecture,
        dim=model.embed_dim,
        tile_px=recipe.global_px,
        mpp=finest if finest == coarsest else None,
        # a range is stated by steps that leave no scale in it far from a stated one
        trained_mpps=() if finest == coarsest else tuple(_between(finest, coarsest)),
        mean=recipe.mean[:3],  # type: ignore[arg-type]
        std=recipe.std[:3],  # type: ignore[arg-type]
        pooling=pooling,
    )
    save_encoder(folder, model.network, contract, model_args=model.model_args, how_trained=how_trained)
    rows = slice(0, _CHECKED_TILES)
    device = torch.device("cpu")  # a GPU rounds otherwise, most of all in convolutions
    with torch.no_grad():
        expected = pool(deepcopy(model).to(device).eval(), panel.images(rows, device), pooling).float().numpy()
    found = load_encoder(str(folder))(panel.tiles[rows]).numpy()
    apart = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-9))
    if not apart <= _TOLERANCE:
        raise WsimilError(f"{folder}: the encoder read back gives other vectors than the one in memory ({apart:.1e} apart)")


def _between(finest: float, coarsest: float) -> list[float]:
    count = max(2, int(np.ceil(np.log(coarsest / finest) / np.log(1.25))) + 1)
    return [float(f"{scale:.4g}") for scale in np.geomspace(finest, coarsest, count)]

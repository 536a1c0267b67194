"""A tiny ViT that every loading test shares, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_vit import ARCHITECTURE, TINY
from torch import Tensor, nn

from wsimil.encoders.contract import EncoderContract
from wsimil.encoders.networks import build_network


@pytest.fixture
def tiny() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network(ARCHITECTURE, TINY)
        for parameter in network.parameters():  # every parameter counts: as initialised, biases are zero and classes tiny
            nn.init.normal_(parameter, std=0.2)
    return network.requires_grad_(False)


@pytest.fixture
def contract() -> EncoderContract:
    return EncoderContract("mine", ARCHITECTURE, 24, tile_px=32, mpp=0.5, mean=(0.7, 0.5, 0.6), std=(0.2, 0.3, 0.2), pooling="cls")


@pytest.fixture
def tiles() -> Tensor:
    return torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path, tiny: nn.Module) -> Path:
    """An encoder folder as a user would write it by hand."""
    folder = tmp_path / "mine"
    folder.mkdir()
    save_file(tiny.state_dict(), folder / "weights.safetensors")
    description = {"architecture": ARCHITECTURE, "model_args": TINY, "pooling": "cls", "mpp": 0.5}
    (folder / "encoder.json").write_text(json.dumps(description), encoding="utf-8")
    return folder

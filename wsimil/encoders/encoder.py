"""The one call that extraction makes: uint8 tiles in, float32 vectors out.

- Tiles arrive as they were read, (B, S, S, 3) RGB; resizing and normalising belong to the encoder and are in its contract.
- A vector depends on its tile alone, not on its batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.encoders.contract import EncoderContract
from wsimil.errors import EncoderError

__all__ = ["Encoder", "check_tiles", "prepare_tiles"]


class Encoder(nn.Module, ABC):
    """uint8 (B, S, S, 3) RGB on any device → float32 (B, D) on the encoder's."""

    def __init__(self, contract: EncoderContract) -> None:
        super().__init__()
        self.contract = contract

    @abstractmethod
    def forward(self, tiles: Tensor) -> Tensor:
        raise NotImplementedError


def check_tiles(tiles: Tensor) -> None:
    """Refuse what would be encoded wrongly in silence: floats, channels first, tiles that are not square.

    Raises:
        EncoderError: shape or type is not uint8 (B, S, S, 3).
    """
    square = tiles.ndim == 4 and tiles.shape[1] == tiles.shape[2] and tiles.shape[3] == 3
    if not square or tiles.dtype != torch.uint8 or tiles.shape[1] < 2:
        raise EncoderError(f"tiles are {tiles.dtype} {tuple(tiles.shape)}; an encoder takes torch.uint8 (B, S, S, 3), RGB, square")


def prepare_tiles(tiles: Tensor, contract: EncoderContract, device: torch.device) -> Tensor:
    """uint8 (B, S, S, 3) → float32 (B, 3, px, px) as the network was trained to see it."""
    check_tiles(tiles)
    # channels first before the copy to float: a quarter of the bytes to move
    images = tiles.to(device).permute(0, 3, 1, 2).contiguous().float() / 255  # (B, 3, S, S)
    px = contract.tile_px or tiles.shape[1]
    if tiles.shape[1] != px and len(tiles):
        images = F.interpolate(images, size=(px, px), mode=contract.interpolation, antialias=True, align_corners=False)
        images = images.clamp(0, 1)  # bicubic overshoots; no camera does
    mean = torch.tensor(contract.mean, device=device).view(3, 1, 1)
    std = torch.tensor(contract.std, device=device).view(3, 1, 1)
    return (images - mean) / std

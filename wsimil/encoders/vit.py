"""A network as an encoder: tiles resized and normalised as it was trained, tokens pooled by the rule of its contract.

- Low precision is autocast, not cast weights: norms and the residual sum stay float32, so fp16 does not overflow in them.
- Register tokens are never part of a mean.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from wsimil.encoders.contract import EncoderContract, Pooling
from wsimil.encoders.encoder import Encoder, check_tiles, prepare_tiles
from wsimil.errors import EncoderError

__all__ = ["NetworkEncoder", "embedding_dim", "pool_tokens"]

_LAST_BLOCKS = 4
_TOKEN_POOLINGS = ("cls", "mean", "cls+mean", "self-vit-mil")


class NetworkEncoder(Encoder):
    """uint8 (B, S, S, 3) → float32 (B, D) through a network."""

    def __init__(self, contract: EncoderContract, network: nn.Module, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(contract)
        self.network = network
        self.dtype = dtype

    def forward(self, tiles: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        if not len(tiles):
            check_tiles(tiles)
            return torch.zeros(0, self.contract.dim, device=device)
        images = prepare_tiles(tiles, self.contract, device)  # (B, 3, px, px)
        exact = self.dtype == torch.float32
        with torch.autocast(device.type, self.dtype, enabled=not exact), _full_float32(device, exact):
            return pool_tokens(self.network, images, self.contract.pooling).float()  # (B, D)


def _full_float32(device: torch.device, asked: bool) -> AbstractContextManager[None]:
    """On a GPU convolutions would take TF32 for float32: off by some thousandths."""
    if not (asked and device.type == "cuda"):
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False)


def pool_tokens(network: nn.Module, images: Tensor, pooling: Pooling) -> Tensor:
    """Normalised images (B, 3, px, px) → (B, D) by one of the rules of `Pooling`."""
    if pooling == "model":
        return network(images)
    if pooling == "layer3":
        (stage,) = network.forward_intermediates(images, indices=[3], stop_early=True, intermediates_only=True)  # type: ignore[operator]
        return stage.mean((2, 3))
    if pooling == "self-vit-mil":
        blocks = network.forward_intermediates(  # type: ignore[operator]
            images, indices=_LAST_BLOCKS, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        return torch.cat([*(prefix[:, 0] for _, prefix in blocks), blocks[-1][0].mean(1)], 1)  # (B, 5 × width)
    tokens = network.forward_features(images)  # type: ignore[operator]  # (B, prefix + patches, width)
    mean = tokens[:, network.num_prefix_tokens :].mean(1)  # type: ignore[misc]
    return {"cls": tokens[:, 0], "mean": mean, "cls+mean": torch.cat([tokens[:, 0], mean], 1)}[pooling]


def embedding_dim(name: str, network: nn.Module, pooling: Pooling) -> int:
    """Length of the vector that `pooling` makes of this network's tokens.

    Raises:
        EncoderError: the network has not what the rule pools.
    """
    way_out = "say another pooling in its encoder.json, or use the default embedding"
    if pooling in _TOKEN_POOLINGS:
        prefix = getattr(network, "num_prefix_tokens", None)
        if prefix is None or not hasattr(network, "forward_intermediates"):
            raise EncoderError(f"encoder {name}: {type(network).__name__} has no patch tokens for pooling {pooling!r}; {way_out}")
        if pooling != "mean" and getattr(network, "cls_token", None) is None:
            raise EncoderError(f"encoder {name}: {type(network).__name__} has no class token for pooling {pooling!r}; {way_out}")
        depth = len(getattr(network, "blocks", range(_LAST_BLOCKS)))  # type: ignore[arg-type]
        if pooling == "self-vit-mil" and depth < _LAST_BLOCKS:
            raise EncoderError(f"encoder {name}: pooling {pooling!r} joins the last {_LAST_BLOCKS} blocks of {depth}; {way_out}")
    width = int(network.num_features)  # type: ignore[arg-type]
    if pooling == "layer3":
        stages = getattr(network, "feature_info", [])
        if len(stages) < 4 or not hasattr(network, "layer3"):
            raise EncoderError(f"encoder {name}: pooling 'layer3' is for ResNets, this is a {type(network).__name__}; {way_out}")
        return int(stages[3]["num_chs"])
    if pooling == "model" and getattr(network, "global_pool", None) == "":
        raise EncoderError(
            f"encoder {name}: the network gives tokens, not one vector; "
            'put "pooling": "cls", "mean" or "cls+mean" in an encoder.json'
        )
    return width * {"cls+mean": 2, "self-vit-mil": _LAST_BLOCKS + 1}.get(pooling, 1)

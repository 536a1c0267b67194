"""A ViT to be trained: timm's network by name, its start, and how fast each of its layers moves.

- It is timm's network unchanged, so what is trained is loaded again under timm's names, by us or by anybody.
- Any crop size divisible by the patch: the position embedding is resampled to it from that of `tile_px`.
- A start is an encoder's name (or a file); weights that do not fill the network exactly are an error, never random.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsimil.encoders.contract import EncoderContract
from wsimil.encoders.load import load_encoder
from wsimil.encoders.networks import build_network
from wsimil.encoders.resolve import resolve
from wsimil.encoders.weights import network_with_weights, read_weights
from wsimil.errors import EncoderError
from wsimil.files import file_sha256

__all__ = ["TrainableViT", "param_groups", "start_name", "trainable_vit"]

_NEEDED = ("cls_token", "patch_embed", "_pos_embed", "norm_pre", "blocks", "norm", "num_prefix_tokens")


class TrainableViT(nn.Module):
    """Normalised images (B, 3, height, width) → class token after the final norm (B, D); `encode_tokens` gives patch tokens.

    Attributes:
        network: timm's; its state dict is what is exported.
        architecture, model_args: build the network again (`save_encoder` takes them).
        embed_dim, patch_px: D, and the side of a patch.
        start: contract of the encoder whose weights it began with; None where they were random.
    """

    def __init__(
        self, network: nn.Module, *, architecture: str, model_args: dict[str, Any], start: EncoderContract | None = None
    ) -> None:
        super().__init__()
        missing = [name for name in _NEEDED if getattr(network, name, None) is None]
        if missing or not hasattr(network.patch_embed, "patch_size"):
            raise EncoderError(
                f"architecture {architecture}: {type(network).__name__} is not a ViT with a class token "
                f"({', '.join(missing) or 'patch_size'} missing); for example vit_small_patch16_224"
            )
        self.network: Any = network
        self.architecture, self.model_args, self.start = architecture, model_args, start
        self.embed_dim = int(self.network.num_features)
        self.patch_px = int(self.network.patch_embed.patch_size[0])

    def forward(self, images: Tensor) -> Tensor:
        return self.network.forward_features(images)[:, 0]  # (B, D)

    def encode_tokens(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """See `EncodesTokens`: patch tokens after the final norm; the network sees the class token and the kept patches alone."""
        network = self.network
        prefix = network.num_prefix_tokens
        tokens = network._pos_embed(network.patch_embed(images))  # (B, prefix + patches, D), each with its own position
        if keep is not None:
            kept = keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
            tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, kept)], 1)  # (B, prefix + M, D)
        tokens = network.norm(network.blocks(network.norm_pre(tokens)))
        return tokens[:, prefix:]


def trainable_vit(
    architecture: str,
    *,
    init: str | None,
    tile_px: int,
    drop_path: float = 0.0,
    depth: int | None = None,
    patch_px: int | None = None,
    seed: int = 0,
) -> TrainableViT:
    """The ViT of that timm name, in float32 and eval mode, every parameter trainable.

    Args:
        init: None, "none" or "scratch" is random, from `seed`; "imagenet" is timm's own weights of the architecture; else any
            encoder name (`resolve.py`), or a file of weights for the architecture.
        tile_px: side of the whole tiles; position embeddings are kept for it.
        drop_path: share of the residual branches left out in training, growing linearly to this at the last block.
        depth: number of blocks, where it is not the architecture's own.
        patch_px: side of a patch, likewise; weights have to be of such patches.

    Raises:
        EncoderError: timm does not know the architecture, it is no ViT with a class token, or `init` is of another one.
        EncoderWeightsError: the weights of `init` cannot be had or do not fit.
    """
    own = {"img_size": tile_px, "dynamic_img_size": True, "global_pool": "token"}
    own |= {name: value for name, value in (("depth", depth), ("patch_size", patch_px)) if value is not None}
    plain, left_out = architecture.partition(".")[0], {"drop_path_rate": drop_path}
    if init in (None, "none", "scratch"):
        model_args, start = own, None
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had happened
            torch.manual_seed(seed)
            network = build_network(plain, model_args | left_out)
    else:
        name = start_name(architecture, str(init))
        request = resolve(name)
        if name.startswith(f"{plain}=") and request.file is not None:  # of a network of any depth
            start, weights = (
                replace(request.entry.contract, sha256=file_sha256(request.file), local=True),
                read_weights(request.file),
            )
        else:
            encoder = load_encoder(name)
            start, weights = encoder.contract, encoder.get_submodule("network").state_dict()
        if start.architecture != plain:
            raise EncoderError(f"init {init} is a {start.architecture}, to be trained is {plain}; say --arch {start.architecture}")
        model_args = dict(request.entry.model_args) | own
        network = network_with_weights(plain, model_args | left_out, weights, where=f"init {init}")
        start = replace(start, name=str(init))
    vit = TrainableViT(network, architecture=plain, model_args=model_args, start=start)
    return vit.requires_grad_(True)


def start_name(architecture: str, init: str) -> str:
    """The encoder name that `init` stands for."""
    if init == "imagenet":
        return architecture
    path = Path(init).expanduser()
    described = path.with_suffix(".json").exists() or any((path.parent / name).exists() for name in ("encoder.json", "config.json"))
    bare = path.is_file() and not described
    return f"{architecture.partition('.')[0]}={init}" if bare else init


_NOT_DECAYED = ("cls_token", "reg_token", "mask_token", "pos_embed", "dist_token")


def param_groups(
    model: nn.Module, *, weight_decay: float, layer_decay: float = 1.0, patch_embed_lr: float = 0.2
) -> list[dict[str, Any]]:
    """Parameters that ask for a gradient, grouped by how they are to move.

    Every group has, besides `params`: `lr_scale`, to be multiplied into the learning rate; `decays`, whether weight decay (and a
    schedule of it) is meant for it; and `weight_decay`, 0 where it is not. Norms, biases, layer scales, tokens and positions do
    not decay.

    Args:
        model: a `TrainableViT`; of anything else (a head) every layer has the scale 1.
        layer_decay: block i of L moves layer_decay ** (L - i) times as fast; what lies before the blocks like a block before them.
        patch_embed_lr: further factor of the patch embedding, when its network came with weights.
    """
    depth = len(model.network.blocks) if isinstance(model, TrainableViT) else None
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and name.rpartition(".")[2] not in _NOT_DECAYED
        scale = 1.0 if depth is None else layer_decay ** _layers_above(name, depth)
        if depth is not None and ".patch_embed." in name:
            scale *= patch_embed_lr
        group = {"params": [], "lr_scale": scale, "decays": decays, "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((scale, decays), group)["params"].append(parameter)
    return list(groups.values())


def _layers_above(name: str, depth: int) -> int:
    """Layers between a parameter of a `TrainableViT` and its output.

    >>> [_layers_above(name, 12) for name in ("network.norm.weight", "network.blocks.11.mlp.fc1.bias", "network.cls_token")]
    [0, 1, 13]
    """
    block = re.match(r"network\.blocks\.(\d+)\.", name)
    if block:
        return depth - int(block.group(1))
    early = name.startswith(("network.patch_embed.", "network.norm_pre.")) or name.rpartition(".")[2] in _NOT_DECAYED
    return depth + 1 if early else 0

"""A network without patches to be trained, DenseNet-121 for one: timm's, unchanged, and its start.

The vector is what the network itself pools; so it is exported with pooling `model`, and loaded again under timm's names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from wsimil.encoders.contract import EncoderContract
from wsimil.encoders.load import load_encoder
from wsimil.encoders.networks import build_network
from wsimil.encoders.resolve import resolve
from wsimil.encoders.trainable import start_name
from wsimil.encoders.vit import NetworkEncoder
from wsimil.errors import EncoderError

__all__ = ["TrainableCNN", "trainable_cnn"]

_TRIED_PX = 128


class TrainableCNN(nn.Module):
    """Normalised images (B, 3, height, width) → (B, D), pooled by the network.

    Attributes:
        network: timm's; its state dict is what is exported.
        architecture, model_args: build the network again (`save_encoder` takes them).
        embed_dim: D.
        start: contract of the encoder whose weights it began with; None where they were random.
    """

    def __init__(
        self, network: nn.Module, *, architecture: str, model_args: dict[str, Any], start: EncoderContract | None = None
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.architecture, self.model_args, self.start = architecture, model_args, start
        self.embed_dim = int(self.network.num_features)
        if not _makes_maps(self.network, self.embed_dim):
            raise EncoderError(
                f"architecture {architecture}: {type(network).__name__} makes no map of {self.embed_dim} channels of images of any "
                "size; take a convolutional network, for example densenet121 or resnet50"
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def encode_tokens(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """The places of the last map, row by row, as if they were patches (B, h × w, D): for pictures. None can be hidden."""
        if keep is not None:
            raise EncoderError(f"architecture {self.architecture}: patches of a convolutional network cannot be hidden; take a ViT")
        return self.network.forward_features(images).flatten(2).transpose(1, 2)


@torch.no_grad()
def _makes_maps(network: Any, dim: int) -> bool:
    """Whether an image of a size that nobody told it becomes (1, D, h, w), and that (1, D)."""
    image = torch.zeros(1, 3, _TRIED_PX, _TRIED_PX)
    was_training = network.training
    try:
        network.eval()
        maps, vector = network.forward_features(image), network(image)
        return maps.ndim == 4 and maps.shape[1] == dim and vector.shape == (1, dim)
    except (AssertionError, RuntimeError, ValueError):  # made for another size
        return False
    finally:
        network.train(was_training)


def trainable_cnn(architecture: str, *, init: str | None, seed: int = 0) -> TrainableCNN:
    """The network of that timm name, in float32 and eval mode, every parameter trainable; `init` as for `trainable_vit`.

    Raises:
        EncoderError: timm does not know the architecture, it is a ViT or the like, or `init` is of another one.
        EncoderWeightsError: the weights of `init` cannot be had or do not fit.
    """
    plain = architecture.partition(".")[0]
    if init in (None, "none", "scratch"):
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had happened
            torch.manual_seed(seed)
            network = build_network(plain, {})
        return TrainableCNN(network, architecture=plain, model_args={}).requires_grad_(True)
    name = start_name(architecture, str(init))
    encoder = load_encoder(name)
    start = encoder.contract
    if not isinstance(encoder, NetworkEncoder) or start.architecture != plain:
        raise EncoderError(f"init {init} is a {start.architecture}, to be trained is {plain}; say --arch {start.architecture}")
    model_args = dict(resolve(name).entry.model_args)
    start = replace(start, name=str(init))
    return TrainableCNN(encoder.network, architecture=plain, model_args=model_args, start=start).requires_grad_(True)

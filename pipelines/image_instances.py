"""Attention-based MIL whose instances are small images: the convolutional networks of Ilse 2018 (arXiv 1802.04712) in front of it.

Images travel as the rows of a bag: side × side × channels values from 0 to 1, channels last.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from wsimil.aggregators import AGGREGATORS, AggregatorEntry
from wsimil.aggregators.abmil import ABMIL
from wsimil.batch import Aggregator, BagBatch, BagOutput

__all__ = ["ImageABMIL", "register_image_aggregators"]


class ImageABMIL(Aggregator):
    """Convolutions, then attention.

    Args:
        side_px, channels: of an image.
        augment: turn and mirror training images at random.
    """

    contribution_kind = "exact"

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        *,
        side_px: int,
        channels: int,
        hidden: int = 500,
        dropout: float = 0.0,
        gated: bool = False,
        augment: bool = True,
    ) -> None:
        super().__init__()
        if dim != side_px * side_px * channels:
            raise ValueError(f"rows of {dim} values are no images of {side_px} × {side_px} × {channels}")
        self.dim, self.n_outputs = dim, n_outputs
        self.side_px, self.channels, self.augment = side_px, channels, augment
        first, second = ((20, 5), (50, 5)) if channels == 1 else ((36, 4), (48, 3))  # the paper's tables 8 and 10
        convolve = nn.Sequential(  # pooled before the ReLU: the same values from a quarter of the work
            nn.Conv2d(channels, first[0], first[1]), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(first[0], second[0], second[1]), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.convolve = convolve.to(memory_format=torch.channels_last)
        with torch.no_grad():
            width = self.convolve(torch.zeros(1, channels, side_px, side_px)).shape[1]
        layers = [nn.Linear(width, 512), nn.ReLU(), nn.Dropout(dropout)] if channels == 3 else []
        self.reduce = nn.Sequential(*layers)
        self.inner = ABMIL(512 if layers else width, n_outputs, hidden=hidden, dropout=dropout, gated=gated)

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        images = bags.features.unflatten(1, (self.side_px, self.side_px, self.channels)).permute(0, 3, 1, 2)
        if self.training and self.augment:
            images = turned(images)
        return self.inner(replace(bags, features=self.reduce(self.convolve(images))), explain=explain)


def turned(images: Tensor) -> Tensor:
    """Each image in one of its eight positions, at random."""
    images = images.clone()
    draws = torch.rand(3, len(images)) < 0.5
    for flipped, draw in zip(
        (lambda one: one.flip(3), lambda one: one.flip(2), lambda one: one.transpose(2, 3)), draws, strict=True
    ):
        images[draw] = flipped(images[draw])
    return images


def register_image_aggregators() -> None:
    """Make them known to `train` and `predict`, in this process."""
    AGGREGATORS["image_abmil"] = AggregatorEntry(ImageABMIL, "convolutions and attention", "Ilse 2018, arXiv 1802.04712")

"""Dropout whose coins are bytes: on a CPU torch draws a number per value one after the other, a third of a step's time.

- Eight coins from one 64-bit draw; the chance is rounded to 1/256 and the rest scaled to match, so that the mean stays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ByteDropout", "quicken_dropout"]


class ByteDropout(nn.Dropout):
    """Zeroes values with chance round(256 p) / 256 in training, from torch's own CPU generator."""

    def forward(self, values: Tensor) -> Tensor:
        dropped = round(256 * self.p)
        if not self.training or not dropped:
            return values
        draws = torch.empty(-(-values.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        keep = draws.view(torch.uint8)[: values.numel()].view(values.shape) >= dropped
        # the scale goes into the mask: one product there and one back
        return values * keep.to(values.dtype).mul_(256 / (256 - dropped))


def quicken_dropout(model: nn.Module) -> None:
    """Swap every `nn.Dropout` in a model on the CPU; weights and their names stay."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout and round(256 * child.p) < 256:
                setattr(module, name, ByteDropout(child.p).train(child.training))

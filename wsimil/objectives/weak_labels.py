"""A tile encoder from slide labels: every tile inherits the diagnosis of its slide, and a network learns to name it.

KimiaNet: Riasatian et al. 2021 (arXiv 2101.07903), DenseNet-121 on tiles of high cellularity.

- Many tiles are labelled wrongly this way; the paper's remedy is which tiles are shown (`slides/mosaic.py`), not another loss.
- What is learned names hospitals too (Dehkharghanian 2023): `wsimil probe` has a site probe, and should be asked.
- Configurations I to IV train the last one, two, three or all four dense blocks. What is frozen keeps its running statistics:
  a frozen block whose batch norm goes on counting would drift away from the weights around it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.batch import Objective
from wsimil.errors import ConfigError

__all__ = ["LabelledTiles", "WeakLabels"]

_BLOCK = re.compile(r"(^|\.)denseblock(\d+)$")


@dataclass(frozen=True)
class LabelledTiles:
    """Normalised images of B tiles and the class of each one's slide; -1 where the slide has no label."""

    images: Tensor  # (B, 3, px, px)
    targets: Tensor  # (B,) int64

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> LabelledTiles:
        return LabelledTiles(self.images.to(device), self.targets.to(device))


class WeakLabels(Objective):
    """Cross-entropy of a linear classifier on the encoder's vector, over tiles of labelled slides.

    The model gives (B, dim) for images (B, 3, px, px). The classifier belongs to the objective: the kept encoder is without it.

    Args:
        dim: width of the model's vector.
        classes: names, in the order of the targets.
        trained_blocks: dense blocks that train, from the last: 1 to 4 are the paper's configurations I to IV; 4 trains everything
            and works with any network that gives a vector.

    Attributes:
        monitor: loss, accuracy (of the tiles) and chance (the largest share of a class in the batch), of the last batch.
    """

    per_bag = False

    def __init__(self, dim: int, classes: Sequence[str], *, trained_blocks: int = 4) -> None:
        super().__init__()
        if len(classes) < 2:
            raise ConfigError(f"weak labels of {len(classes)} class: there is nothing to tell apart; expected two classes or more")
        if trained_blocks not in (1, 2, 3, 4):
            raise ConfigError(f"trained_blocks is {trained_blocks}; expected 1 to 4, the configurations I to IV")
        self.classes, self.trained_blocks = tuple(classes), trained_blocks
        self.classify = nn.Linear(dim, len(classes))
        self.monitor: dict[str, Tensor] = {}
        self._frozen: tuple[nn.Module, ...] = ()  # in a tuple: they are the model's, not this objective's

    def prepare(self, model: nn.Module) -> None:
        """Freeze what lies before the trained blocks. Raises ConfigError where the model has no dense blocks to count."""
        if self.trained_blocks == 4:
            return
        blocks = {name: int(match[2]) for name, _ in model.named_modules() if (match := _BLOCK.search(name))}
        if sorted(blocks.values()) != [1, 2, 3, 4]:
            raise ConfigError(
                f"trained_blocks is {self.trained_blocks}, but {type(model).__name__} has not DenseNet's four dense blocks; "
                "use a DenseNet, or 4 to train everything"
            )
        first = next(name for name, number in blocks.items() if number == 5 - self.trained_blocks)
        stage = first.rpartition(".")[0]
        frozen = []
        for name, part in model.get_submodule(stage).named_children():  # in the order of the forward pass
            if f"{stage}.{name}".lstrip(".") == first:
                break
            frozen.append(part.requires_grad_(False).eval())
        self._frozen = tuple(frozen)

    def losses(self, model: nn.Module, batch: LabelledTiles, progress: float) -> dict[str, Tensor]:
        for part in self._frozen:  # the loop puts the whole model into training mode
            part.eval()
        logits = self.classify(model(batch.images)).float()  # (B, C)
        known = batch.targets >= 0
        count = known.sum().clamp_min(1)
        loss = F.cross_entropy(logits, batch.targets, ignore_index=-1, reduction="sum") / count
        with torch.no_grad():
            right = ((logits.argmax(1) == batch.targets) & known).sum() / count
            shares = torch.bincount(batch.targets[known], minlength=len(self.classes)) / count
            self.monitor = {"loss": loss.detach(), "accuracy": right, "chance": shares.max()}
        return {"tile": loss}

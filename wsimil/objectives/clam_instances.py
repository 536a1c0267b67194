"""CLAM's instance loss: the tiles a class attends to most are its evidence, those it attends to least are not.

Lu, Williamson, Chen et al. 2021 (arXiv 2004.09666). A linear judge for each class tells evidence from the rest. The loss is
.7 × the slide's + .3 × the tiles'.

- Of the true class the k most attended tiles are labelled 1 and the k least 0. With `subtyping` the classes exclude one another:
  the most attended tiles of every other class are labelled 0 by its judge, and the loss is averaged over the classes.
- Of a slide whose label is probabilities the likeliest class is taken for the true one (of equals the first).
- A bag of fewer than k tiles gives all it has: k' = min(k, N). The authors' code stops with an error there.
- Which tiles are chosen follows the attention and passes no gradient; the judged embeddings do.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.batch import BagOutput, LabelledBags
from wsimil.config import Range
from wsimil.errors import ConfigError
from wsimil.objectives.slide_label import SlideLabel
from wsimil.objectives.wrapping import Wrapping

__all__ = ["ClamInstances", "smooth_top1_svm"]


def smooth_top1_svm(scores: Tensor, labels: Tensor, *, temperature: float = 1.0, margin: float = 1.0) -> Tensor:
    """τ log Σ_j exp((s_j + α [j ≠ y] - s_y) / τ), mean over the rows of (M, C): a smooth hinge (Berrada 2018, arXiv 1802.07595)."""
    true = F.one_hot(labels, scores.shape[1]).to(scores.dtype)
    gaps = scores + margin * (1 - true) - (scores * true).sum(1, keepdim=True)  # (M, C)
    return temperature * (gaps / temperature).logsumexp(1).mean()


class ClamInstances(Wrapping):
    """Slide labels, and tiles judged as evidence for them.

    Needs a model that gives `attention_logits` (one column, or one for each output) and `tile_embedding`.

    Args:
        slide_label: the loss of the slides; its task is binary or multi-class.
        hidden: width H of the tile embedding.
        k: tiles taken from each end of the attention.
        share: of the tiles' loss in the whole.
        subtyping: whether the other classes' most attended tiles are labelled too.
        loss: "cross_entropy" or "svm" (the smooth top-1 SVM).
    """

    def __init__(
        self,
        slide_label: SlideLabel,
        hidden: int,
        *,
        k: int = 8,
        share: Annotated[float, Range(0, 1)] = 0.3,
        subtyping: bool = False,
        loss: str = "cross_entropy",
    ) -> None:
        super().__init__(slide_label)
        task = slide_label.task
        if task.kind not in ("binary", "multiclass"):
            raise ConfigError(
                f"clam_instances needs one class for each slide, and the task is {task.kind}: leave it out of --objective"
            )
        if loss not in ("cross_entropy", "svm"):
            raise ConfigError(f"loss is {loss!r}; expected cross_entropy or svm")
        self.k, self.share, self.subtyping, self.hidden = k, share, subtyping, hidden
        self.judges = nn.ModuleList(nn.Linear(hidden, 2) for _ in task.classes)
        self.loss = F.cross_entropy if loss == "cross_entropy" else smooth_top1_svm

    @property
    def slide_label(self) -> SlideLabel:
        assert isinstance(self.inner, SlideLabel)
        return self.inner

    def losses(self, model: nn.Module, batch: LabelledBags, progress: float) -> dict[str, Tensor]:
        if not model.training:  # predictions do not ask the judges
            return self.slide_label.losses(model, batch, progress)
        output = model(batch.bags)
        several = output.attention_logits is not None and output.attention_logits.shape[1] > 1
        if several and not getattr(model, "attends_per_output", False):
            raise ConfigError(
                "clam_instances takes a column of attention for a class, and this model's columns are heads or branches: take a "
                "model with one attention, or one for each output, such as clam_sb or clam_mb"
            )
        tile_losses = self.tile_losses(output, batch)  # (B,)
        tile_loss = (tile_losses if batch.weights is None else tile_losses * batch.weights).mean()
        slide = self.slide_label.losses_of(output, batch)
        return {name: (1 - self.share) * loss for name, loss in slide.items()} | {"tiles": self.share * tile_loss}

    def tile_losses(self, output: BagOutput, batch: LabelledBags) -> Tensor:
        """(B,) loss of the judged tiles of each bag."""
        attention, tiles = output.attention_logits, output.tile_embedding
        if attention is None or tiles is None or attention.shape[1] not in (1, output.logits.shape[1]):
            raise ConfigError(
                "clam_instances needs a model with one attention, or one for each output, and tile embeddings, such as clam_sb"
            )
        if tiles.shape[1] != self.hidden:
            raise ConfigError(
                f"clam_instances judges tiles of {self.hidden} numbers (hidden), and this model's embeddings have "
                f"{tiles.shape[1]}: take a model that embeds tiles, such as clam_sb, or hidden {tiles.shape[1]}"
            )
        per_bag = []
        classes = self.slide_label.task.likeliest(batch.targets).tolist()
        for true, (start, end) in zip(classes, pairwise(batch.bags.bounds), strict=True):
            bag = [self._judge(index, index == true, attention[start:end], tiles[start:end]) for index in self._asked(true)]
            per_bag.append(torch.stack(bag).mean())
        return torch.stack(per_bag)

    def _asked(self, true: int) -> list[int]:
        """Classes whose judges see a slide."""
        return list(range(len(self.judges))) if self.subtyping else [true]

    def _judge(self, index: int, is_true: bool, attention: Tensor, tiles: Tensor) -> Tensor:
        """Loss of class `index` on one bag: attention (N, K), tiles (N, H)."""
        column = attention[:, index if attention.shape[1] > 1 else 0]
        k = min(self.k, len(tiles))
        chosen = column.topk(k).indices
        labels = torch.full_like(chosen, int(is_true))
        if is_true:
            chosen = torch.cat([chosen, column.topk(k, largest=False).indices])
            labels = torch.cat([labels, torch.zeros_like(labels)])
        return self.loss(self.judges[index](tiles[chosen]), labels)

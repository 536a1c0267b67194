"""Masked hard instances: a teacher hides the tiles it finds easiest, the student learns from what is left.

Tang et al. 2023 (MHIM-MIL, arXiv 2307.15254). The teacher is a moving average of the student and ranks the tiles of each bag by
its attention; of the highest some are hidden, their share falling to nothing along half a cosine, and if asked for the lowest and
a random part of all. The student learns the labels, and that its embedding of the bag is the teacher's, which sees all tiles.

- Around any other objective, over any model with `attention_logits`; several heads are ranked by the mean of their attention.
- At least one tile of a bag stays. Nothing is hidden outside of training: validation is the plain loss.
- What is hidden depends on seed, step and slide alone, not on the other slides of the batch.
- The authors start from a teacher trained before. Ours starts as the student does, and its momentum rises with the steps
  up to the given one: else it would stay near its random start for longer than most trainings last.
- The authors' teacher drops out as the student does, which leaves what is hidden half to chance while it is young. Ours does not.
- Not here: what the later version adds (MHIM-v2): recycling of hidden tiles, ranking by class activation, a rising momentum.
"""

from __future__ import annotations

import copy
import math
import zlib
from dataclasses import replace
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor, nn

from wsimil.batch import BagBatch, BagOutput, LabelledBags, Objective, offsets_of
from wsimil.config import Range
from wsimil.errors import ConfigError
from wsimil.objectives.wrapping import Wrapping, listening

__all__ = ["MaskedHardInstances", "hide"]


def hide(attention: Tensor, ratio: float, *, among: float = 1.0, largest: bool = True, generator: torch.Generator) -> Tensor:
    """Rows of about ratio · N tiles of one bag's attention (N,): of the ⌈ratio / among · N⌉ = k highest, ⌈among · k⌉ at random.

    Where ratio > among, k is N and a part `ratio` of them is taken. Not `largest`: of the k lowest.
    """
    share, part = (ratio / among, among) if ratio <= among else (1.0, ratio)
    chosen = attention.topk(math.ceil(len(attention) * share), largest=largest).indices
    if part < 1:
        order = torch.randperm(len(chosen), generator=generator).to(chosen.device)
        chosen = chosen[order[: math.ceil(len(chosen) * part)]]
    return chosen


class MaskedHardInstances(Wrapping):
    """The losses of `inner` on bags without their easiest tiles, and `consistency`: agreement with a teacher who sees all.

    Args:
        inner: any objective that calls the model; its output is listened to.
        high: share of the tiles hidden at the start, from those with the highest attention.
        among: these are a random part `among` of a correspondingly larger share of highest tiles; 1 takes the very highest.
        low: share of the tiles hidden, those with the lowest attention.
        random: share of the tiles hidden at random, whatever their attention.
        consistency: weight of the agreement with the teacher.
        temperature: of the teacher's embedding, taken as a distribution over its dimensions; the student's is 1.
        momentum: of the moving average; in its first steps (1 + step) / (10 + step), where that is less.
        seed: of what is hidden.
    """

    step: Tensor

    def __init__(
        self,
        inner: Objective,
        *,
        high: float = 0.03,
        among: float = 0.5,
        low: float = 0.0,
        random: float = 0.0,
        consistency: Annotated[float, Range(0)] = 0.1,
        temperature: float = 0.1,
        momentum: float = 0.9999,
        seed: int = 0,
    ) -> None:
        super().__init__(inner)
        for name, value in (("high", high), ("among", among), ("low", low), ("random", random), ("momentum", momentum)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} = {value}; expected a number between 0 and 1")
        if not among or temperature <= 0:
            raise ConfigError(f"among = {among} and temperature = {temperature} must be positive")
        self.high, self.among, self.low, self.random = high, among, low, random
        self.consistency, self.temperature, self.momentum, self.seed = consistency, temperature, momentum, seed
        self.register_buffer("step", torch.tensor(0))
        self.teacher: nn.Module = nn.Identity()
        self.student: tuple[nn.Module, ...] = ()  # a tuple: the model is not the objective's state

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.student = (model,)

    def losses(self, model: nn.Module, batch: LabelledBags, progress: float) -> dict[str, Tensor]:
        if not model.training:
            return self.inner.losses(model, batch, progress)
        taught = self._taught(batch.bags)
        seen = replace(batch, bags=_rows(batch.bags, self.kept(taught, batch.bags, progress)))
        with listening(model) as heard:
            losses = self.inner.losses(model, seen, progress)
        if not self.consistency:
            return losses
        return losses | {"consistency": self.consistency * self._disagreement(heard[0][1], taught, batch.weights)}

    @torch.no_grad()
    def _taught(self, bags: BagBatch) -> BagOutput:
        taught = self.teacher.eval()(bags)
        if taught.attention_logits is None or (self.consistency and taught.bag_embedding is None):
            lacks = "attention" if taught.attention_logits is None else "bag embedding (consistency=0 does without)"
            raise ConfigError(
                f"mhim hides tiles by attention and compares bag embeddings, and the aggregator gives no {lacks}; gated_abmil does"
            )
        return taught

    def kept(self, taught: BagOutput, bags: BagBatch, progress: float) -> Tensor:
        """(ΣN,) bool of the tiles that the student sees."""
        assert taught.attention_logits is not None
        kept = torch.ones(len(bags.features), dtype=torch.bool, device=bags.features.device)
        ratio = self.high * (1 + math.cos(math.pi * progress)) / 2
        for index, (start, end) in enumerate(pairwise(bags.bounds)):
            name = bags.slide_ids[index] if bags.slide_ids else str(index)
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {int(self.step)} {name}".encode()))
            attention = taught.attention_logits[start:end].float().softmax(0).mean(1)  # (N,)
            seen = kept[start:end]
            if self.random:
                seen[hide(attention, self.random, among=self.random, largest=False, generator=generator)] = False
            seen[hide(attention, self.low, largest=False, generator=generator)] = False
            seen[hide(attention, ratio, among=self.among, generator=generator)] = False
            seen |= ~seen.any() & torch.zeros_like(seen).scatter(0, attention.argmin(0, keepdim=True), True)  # one stays
        return kept

    def _disagreement(self, output: BagOutput, taught: BagOutput, weights: Tensor | None) -> Tensor:
        """Cross-entropy of the student's bag embedding to the teacher's, both as distributions over their dimensions."""
        assert output.bag_embedding is not None and taught.bag_embedding is not None
        # at least float32: the softmax of a sharpened embedding is not for half precision
        mine, its = (
            part.to(torch.promote_types(part.dtype, torch.float32)) for part in (output.bag_embedding, taught.bag_embedding)
        )
        agreement = ((its / self.temperature).softmax(-1) * mine.log_softmax(-1)).sum(-1)  # (B,) or (B, C)
        per_bag = -agreement.reshape(len(agreement), -1).mean(1)
        return (per_bag if weights is None else per_bag * weights).mean()

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        step = int(self.step)
        momentum = min(self.momentum, (1 + step) / (10 + step))
        (student,) = self.student
        for mean, value in zip(self.teacher.parameters(), student.parameters(), strict=True):
            mean.lerp_(value, 1 - momentum)
        for copied, value in zip(self.teacher.buffers(), student.buffers(), strict=True):
            copied.copy_(value)
        self.step += 1


def _rows(bags: BagBatch, kept: Tensor) -> BagBatch:
    """The bags with some of their tiles (ΣN,) bool, in order."""
    sizes = torch.zeros_like(bags.sizes).index_add(0, bags.bag_index, kept.to(bags.offsets.dtype))
    return replace(
        bags,
        features=bags.features[kept],
        offsets=offsets_of(sizes.tolist(), kept.device),
        coords_um=None if bags.coords_um is None else bags.coords_um[kept],
    )

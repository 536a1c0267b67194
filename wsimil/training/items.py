"""Slides as training items: where their features wait, which tiles of them are seen, in which steps they come.

- Features stay in memory as they are stored, whole cohort if it fits: after the first epoch no file is touched.
- Which slides a step holds, and which of their tiles, is a function of (seed, epoch, slide) alone: not of memory or threads.
- A step is cut into pieces of whole bags, whose losses add up to the step's: on a CPU a piece stays near the cache, and memory
  is that of a piece. An objective that compares bags gets the step in one piece.
"""

from __future__ import annotations

import copy
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wsimil.aggregators.fused import joined
from wsimil.bags.dataset import BagFolder
from wsimil.batch import BagBatch, LabelledBags, offsets_of, pack
from wsimil.memory import ReusedMemory
from wsimil.training.ranks import ALONE, Ranks
from wsimil.training.read_ahead import read_ahead

__all__ = ["LabelledSlides", "Steps", "TileStore", "free_bytes", "piece_tiles"]

_BLOCK = 1024
"""Rows that are looked at together, in the processor's cache."""

_STEP_BYTES = 48_000
"""Of a tile in a training step, about: the transformer needs 22,000 forward for tiles × 1024, and as much again on the way back."""


def free_bytes(device: str = "cpu") -> int:
    """Memory that features may take: half of what is free, so that work and other programs keep the rest."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # what an encoder left behind is free, and does not look so
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = 8 << 30
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:  # a container may have less than the machine
            free = min(free, int(Path("/sys/fs/cgroup", limit).read_text()) - int(Path("/sys/fs/cgroup", used).read_text()))
        except (OSError, ValueError):
            continue
    return max(0, free) // 2


def piece_tiles(device: str) -> int:
    """Tiles after which a piece is full: what a CPU's cache likes, or what a GPU's free memory holds, whatever the aggregator."""
    if device.startswith("cuda"):
        return min(262_144, max(8192, free_bytes(device) // _STEP_BYTES))
    return 8192 if device == "cpu" else 65_536


class TileStore:
    """Bags by slide, features as stored: from memory as far as `memory_bytes` go, from the files beyond.

    Args:
        bags: where they come from; its own cache is not needed.
        memory_bytes: features kept, at most.
        device: where they are kept.
    """

    def __init__(self, bags: BagFolder, *, memory_bytes: int, device: str = "cpu") -> None:
        self.bags, self.device, self._left = bags, device, memory_bytes
        self._held: dict[str, BagBatch] = {}
        self._memory = ReusedMemory()  # of what is not held
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._one_at_a_time = threading.Lock()  # a step may be read ahead while an objective looks at all slides

    def n_tiles(self, slide_id: str) -> int:
        return self.bags.n_valid(slide_id)

    def n_bytes(self, slide_id: str) -> int:
        header = self.bags.headers[slide_id]
        return self.n_tiles(slide_id) * (header.dim * header.features.dtype.itemsize + 8)

    def keeps(self, slide_ids: Iterable[str]) -> bool:
        """Whether all of these are, or will be, served from memory."""
        return sum(self.n_bytes(slide_id) for slide_id in slide_ids if slide_id not in self._held) <= self._left

    def bag(self, slide_id: str, rows: np.ndarray | None = None) -> BagBatch:
        """The usable tiles of a slide, or those in `rows`; features in half precision where the file has it."""
        with self._one_at_a_time:
            held = self._held.get(slide_id)
            if held is None and (size := self.n_bytes(slide_id)) <= self._left:
                held = self._held[slide_id] = self.bags.load(slide_id, half=True).to(self.device)
                self._left -= size
            if held is None:
                return self.bags.load(slide_id, rows=rows, half=True, allocate=self._memory).to(self.device)
        if rows is None:
            return held
        index = torch.from_numpy(rows).to(held.features.device)
        coords_um = None if held.coords_um is None else held.coords_um[index]
        offsets = offsets_of([len(rows)], index.device)
        return BagBatch(held.features[index], offsets, coords_um, held.tile_um, held.slide_ids)

    def moments(self, slide_ids: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Mean and deviation (D,) of the features over all tiles of these slides, each slide weighing the same."""
        slide_ids = list(slide_ids)
        new = [slide_id for slide_id in dict.fromkeys(slide_ids) if slide_id not in self._sums]
        for slide_id, bag in zip(new, read_ahead(self.bag, new), strict=True):
            self._sums[slide_id] = _mean_and_square(bag.features)
        sums = [self._sums[slide_id] for slide_id in slide_ids]
        mean = torch.stack([mean for mean, _ in sums]).mean(0)
        square = torch.stack([square for _, square in sums]).mean(0)
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        # a feature that never varied carries nothing: leave it at zero instead of blowing up its noise
        deviation[deviation < 1e-6 * (1 + mean.abs())] = torch.inf
        return mean.float(), deviation.float()


def _mean_and_square(features: Tensor) -> tuple[Tensor, Tensor]:
    """Of each column of (N, D), in float64 on the CPU."""
    on_gpu = features.device.type == "cuda"  # where they lie: 40 GB are not to come back for it
    place, rows = features.device if on_gpu else torch.device("cpu"), 64 * _BLOCK if on_gpu else _BLOCK
    half = features.dtype in (torch.float16, torch.bfloat16)
    # float32 holds what lies near the mean of numbers in half precision; wider ones may go beyond it
    kind = torch.float32 if half else torch.float64
    near = features[:_BLOCK].to(place, kind).mean(0)
    total = torch.zeros(2, features.shape[1], dtype=torch.float64, device=place)
    for block in features.split(rows):  # a slide that is widened whole would be four times its file
        wide = block.to(place, kind)
        wide = wide.sub_(near) if wide is not block else wide - near
        total += torch.stack([wide.sum(0), wide.square_().sum(0)])
    off, square = total / len(features)
    mean = near + off
    return mean.cpu(), (square - off.square() + mean.square()).cpu()


class LabelledSlides:
    """Slides of one side of a fold, with what is known of them.

    Args:
        store: their features.
        slide_ids: which.
        targets, weights: (n, …) and (n,), of the slides in this order.
        tiles_per_bag: tiles drawn from each slide, others in every epoch; 0: all.
        instance_dropout: chance of a tile to be left out of an epoch.
        seed: of that choice.
    """

    def __init__(
        self,
        store: TileStore,
        slide_ids: Sequence[str],
        targets: Tensor,
        weights: Tensor | None = None,
        *,
        tiles_per_bag: int = 0,
        instance_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.store, self.slide_ids, self.targets, self.weights = store, list(slide_ids), targets, weights
        self.tiles_per_bag, self.instance_dropout, self.seed = tiles_per_bag, instance_dropout, seed

    def __len__(self) -> int:
        return len(self.slide_ids)

    def n_tiles(self, index: int) -> int:
        """Tiles that a slide gives to a step, about: without instance dropout."""
        return min(self.tiles_per_bag or 1 << 62, self.store.n_tiles(self.slide_ids[index]))

    def rows(self, index: int, epoch: int) -> np.ndarray | None:
        """Tiles of a slide that this epoch sees, in the order of the file; None: all. At least one."""
        name = self.slide_ids[index]
        total = self.store.n_tiles(name)
        wanted = self.n_tiles(index)
        if wanted == total and not self.instance_dropout:
            return None
        rng = np.random.default_rng((self.seed, epoch, zlib.crc32(name.encode())))
        rows = np.sort(rng.choice(total, wanted, replace=False, shuffle=False)) if wanted < total else np.arange(total)
        kept = rows[rng.random(len(rows)) >= self.instance_dropout]
        return kept if len(kept) else rows[:1]

    def pieces(self, indices: Sequence[int], epoch: int, *, limit: int | None) -> tuple[LabelledBags, ...]:
        """These slides as batches of whole bags, each of at most `limit` tiles or one bag; None: all in one."""
        groups: list[list[int]] = []
        room = 0
        bags = [self.store.bag(self.slide_ids[index], self.rows(index, epoch)) for index in indices]
        for place, bag in enumerate(bags):
            if not groups or (limit is not None and len(bag.features) > room):
                groups.append([])
                room = limit or 0
            groups[-1].append(place)
            room -= len(bag.features)
        chosen = [[indices[place] for place in group] for group in groups]
        packed = [bags[group[0]] if len(group) == 1 else pack([bags[place] for place in group], join=joined) for group in groups]
        return tuple(
            LabelledBags(bag, self.targets[rows], None if self.weights is None else self.weights[rows])
            for bag, rows in zip(packed, chosen, strict=True)
        )


class Steps:
    """The steps of an epoch, each a tuple of pieces; where reading files takes time, a thread prepares the next step meanwhile.

    It has no length: with `tiles_per_step` epochs differ in the number of steps.

    Args:
        slides: what is stepped through.
        bags_per_step: slides in a step, when `tiles_per_step` is 0.
        tiles_per_step: a step takes slides until the next would exceed so many tiles.
        limit: of the pieces.
        shuffle_seed: another order every epoch, from this seed; None: always the order given.
        order: an objective's wish for an epoch's order, if it has one.
        ranks: who share the steps; only this one's bags come, of some steps perhaps none.
        on_gpu: the work is done there, so processors have time to read ahead.
    """

    def __init__(
        self,
        slides: LabelledSlides,
        *,
        bags_per_step: int,
        tiles_per_step: int = 0,
        limit: int | None = None,
        shuffle_seed: int | None = None,
        order: Callable[[int], Iterable[int] | None] = lambda epoch: None,
        ranks: Ranks = ALONE,
        on_gpu: bool = False,
    ) -> None:
        self.slides, self.bags_per_step, self.tiles_per_step, self.limit = slides, bags_per_step, tiles_per_step, limit
        self.shuffle_seed, self.order, self.ranks, self.epoch = shuffle_seed, order, ranks, 0
        self.on_gpu = on_gpu
        self.sampler, self.batch_sampler = self, None  # Lightning tells the epoch to a loader's sampler

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def every(self) -> Steps:
        """Each slide once, in the order given, on all ranks; of tiles that are drawn those of the first epoch: always the same."""
        steps = copy.copy(self)
        steps.ranks, steps.shuffle_seed, steps.order, steps.epoch = ALONE, None, lambda epoch: None, 0
        return steps

    def plan(self, epoch: int) -> list[list[int]]:
        """Which slides each step of an epoch holds."""
        wished = self.order(epoch)
        if wished is not None:
            order = list(wished)
        elif self.shuffle_seed is None:
            order = list(range(len(self.slides)))
        else:
            order = np.random.default_rng((self.shuffle_seed, epoch)).permutation(len(self.slides)).tolist()
        if not self.tiles_per_step:
            return [order[start : start + self.bags_per_step] for start in range(0, len(order), self.bags_per_step)]
        steps: list[list[int]] = []
        room = 0
        for index in order:
            size = self.slides.n_tiles(index)
            if not steps or size > room:
                steps.append([])
                room = self.tiles_per_step
            steps[-1].append(index)
            room -= size
        return steps

    def __iter__(self) -> Iterator[tuple[LabelledBags, ...]]:
        plan, epoch = self.plan(self.epoch), self.epoch

        def prepare(step: list[int]) -> tuple[LabelledBags, ...]:
            mine = self.ranks.share([self.slides.n_tiles(index) for index in step])
            return self.slides.pieces([step[place] for place in mine], epoch, limit=self.limit)

        yield from read_ahead(prepare, plan, always=self.on_gpu and self.slides.store.device == "cpu")

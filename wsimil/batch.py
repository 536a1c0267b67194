"""What passes between bags, aggregators and objectives: packed bags in, one output record out.

- Bags of a batch lie one after the other, `offsets` says where each begins: no padding, so no padding can be forgotten.
- An aggregator sees bags and never a label; what needs a label is an objective.
- Protocols at the end say what an objective may ask of a model, so that objectives import no model.

Letters for shapes: wsimil/units.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from wsimil.errors import AggregatorInputError

__all__ = [
    "Aggregator",
    "BagBatch",
    "BagOutput",
    "EncodesTokens",
    "ExtraLogits",
    "LabelledBags",
    "Objective",
    "offsets_of",
    "pack",
]

_KNOWN = "_wsimil_bounds"
"""Under this name a tensor of offsets holds its own numbers: wherever it goes with other features, they go with it."""


@dataclass(frozen=True)
class BagBatch:
    """B bags, packed. Every bag holds at least one instance: `checked` makes sure.

    `offsets` are not to be changed in place: their numbers are read off the device once.
    """

    features: Tensor  # (ΣN, D)
    offsets: Tensor  # (B + 1,) int64, on the device of the features
    coords_um: Tensor | None = None  # (ΣN, 2) centre of each tile on the slide, µm
    tile_um: Tensor | None = None  # (B,) side of a tile, µm
    slide_ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def bounds(self) -> list[int]:
        """The offsets as numbers: a GPU that is asked for them in every layer waits every time."""
        known = getattr(self.offsets, _KNOWN, None)
        if known is None:
            known = self.offsets.tolist()
            setattr(self.offsets, _KNOWN, known)
        return known

    @property
    def lengths(self) -> list[int]:
        """Instances in each bag, as numbers."""
        return [end - start for start, end in pairwise(self.bounds)]

    @property
    def sizes(self) -> Tensor:
        """(B,) instances in each bag."""
        return self.offsets.diff()

    @property
    def bag_index(self) -> Tensor:
        """(ΣN,) the bag each instance belongs to."""
        bags = torch.arange(len(self), device=self.offsets.device)
        return torch.repeat_interleave(bags, self.sizes, output_size=len(self.features))

    def checked(self) -> BagBatch:
        """Itself, if aggregators can use it; an `AggregatorInputError` that names the bag otherwise."""
        if self.features.ndim != 2:
            raise AggregatorInputError(f"features have shape {tuple(self.features.shape)}; expected (ΣN, D)")
        first, last = self.bounds[0], self.bounds[-1]
        if first != 0 or last != len(self.features):
            raise AggregatorInputError(
                f"offsets run from {first} to {last}; expected 0 to {len(self.features)}, the number of instances"
            )
        for name, part, expected in (
            ("coords_um", self.coords_um, (len(self.features), 2)),
            ("tile_um", self.tile_um, (len(self),)),
        ):
            if part is not None and tuple(part.shape) != expected:
                raise AggregatorInputError(f"{name} has shape {tuple(part.shape)}; expected {expected}")
        if self.slide_ids and len(self.slide_ids) != len(self):
            raise AggregatorInputError(f"{len(self.slide_ids)} slide_ids for {len(self)} bags")
        if not len(self):
            raise AggregatorInputError("a batch of no bags; leave it out")
        lengths = self.lengths
        if min(lengths) < 1:
            bag = lengths.index(min(lengths))
            name = self.slide_ids[bag] if self.slide_ids else f"bag {bag}"
            raise AggregatorInputError(f"{name}: the bag is empty; leave slides without tiles out of the batch")
        return self

    def bag(self, index: int) -> BagBatch:
        """One bag as a batch of its own."""
        rows = slice(self.bounds[index], self.bounds[index + 1])
        return BagBatch(
            features=self.features[rows],
            offsets=offsets_of([rows.stop - rows.start], self.offsets.device),
            coords_um=None if self.coords_um is None else self.coords_um[rows],
            tile_um=None if self.tile_um is None else self.tile_um[index : index + 1],
            slide_ids=self.slide_ids[index : index + 1],
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> BagBatch:
        """Move to a device; `dtype` is that of the features (coordinates stay float32 or finer)."""
        return replace(
            self,
            features=self.features.to(device).to(dtype or self.features.dtype),  # half as much to send, where it is widened
            offsets=offsets_of(self.lengths, device),
            coords_um=None if self.coords_um is None else self.coords_um.to(device),
            tile_um=None if self.tile_um is None else self.tile_um.to(device),
        )


def offsets_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Offsets (B + 1,) of bags of so many instances."""
    bounds = [0, *accumulate(lengths)]
    offsets = torch.tensor(bounds, device=device)
    setattr(offsets, _KNOWN, bounds)
    return offsets


def pack(bags: Sequence[BagBatch], *, join: Callable[[list[Tensor]], Tensor] = torch.cat) -> BagBatch:
    """Join batches one after the other, the features with `join`. Coordinates travel only if every bag has them."""
    if not bags:
        raise AggregatorInputError("no bag to pack")
    widths = {bag.features.shape[1] for bag in bags}
    if len(widths) > 1:
        raise AggregatorInputError(f"bags of different feature width {sorted(widths)}; they come from different encoders")
    coords_um = [bag.coords_um for bag in bags if bag.coords_um is not None]
    tile_um = [bag.tile_um for bag in bags if bag.tile_um is not None]
    return BagBatch(
        features=join([bag.features for bag in bags]),
        offsets=offsets_of([length for bag in bags for length in bag.lengths], bags[0].offsets.device),
        coords_um=torch.cat(coords_um) if len(coords_um) == len(bags) else None,
        tile_um=torch.cat(tile_um) if len(tile_um) == len(bags) else None,
        slide_ids=tuple(name for bag in bags for name in bag.slide_ids),
    )


@dataclass(frozen=True)
class ExtraLogits:
    """Further logits that the task's loss applies to, beside the bag's: DSMIL's top instance, DTFD's pseudo-bags."""

    name: str
    logits: Tensor  # (M, C)
    bag_index: Tensor  # (M,) the bag whose label each row answers to
    weight: float = 1.0


@dataclass(frozen=True)
class BagOutput:
    """What an aggregator says about a batch; parts that it has no notion of are None."""

    logits: Tensor  # (B, C); binary is C = 1
    bag_embedding: Tensor | None = None  # (B, H), or (B, C, H) where there is one per class
    attention_logits: Tensor | None = None  # (ΣN, K) before softmax
    tile_logits: Tensor | None = None  # (ΣN, C) where tiles are scored themselves
    tile_embedding: Tensor | None = None  # (ΣN, H)
    contributions: Tensor | None = None  # (ΣN, C) signed, when asked with explain=True
    extra_logits: tuple[ExtraLogits, ...] = ()
    penalties: dict[str, Tensor] = field(default_factory=dict)  # label-free scalars, added to the loss


class Aggregator(nn.Module):
    """bag → logits. Subclasses are final: they implement `forward` and share behaviour by composition.

    Attributes:
        dim: width D of the features it takes.
        n_outputs: C.
        needs_coords: whether `coords_um` must be there.
        contribution_kind: how `contributions` come about: "exact", "leave-one-out" or "gradient"; None where there are none.
        first_layer: name of the one `FirstLayer` that reads the features, if there is one: a shift and scale of the features can
            then be folded into it.
        attends_per_output: whether column c of `attention_logits` is the attention of output c.
        shares_rows: whether nearly all of its work on a CPU is shared out among threads row by row (`aggregators.fused`).
    """

    dim: int
    n_outputs: int
    needs_coords: bool = False
    contribution_kind: str | None = None
    first_layer: str | None = None
    attends_per_output: bool = False
    shares_rows: bool = False

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        raise NotImplementedError  # abstract: every aggregator states its own forward

    def check(self, bags: BagBatch) -> BagBatch:
        """The batch, if this aggregator can use it; an `AggregatorInputError` otherwise."""
        bags.checked()
        name = type(getattr(self, "inner", self)).__name__  # of a wrapper, what is in it
        if bags.features.shape[1] != self.dim:
            raise AggregatorInputError(
                f"features are {bags.features.shape[1]} wide, {name} takes {self.dim}; "
                "the bags come from another encoder than the model's"
            )
        if self.needs_coords:
            places, sides = bags.coords_um, bags.tile_um
            if places is None or sides is None:
                raise AggregatorInputError(
                    f"{name} needs the position of each tile, and these bags carry none (coords_um, tile_um)"
                )
            if not bool(places.isfinite().all() & sides.isfinite().all() & (sides > 0).all()):
                raise AggregatorInputError(f"{name} needs finite coords_um, and a tile_um above 0 for every bag")
        return bags

    def read(self, bags: BagBatch) -> BagBatch:
        """The batch, checked, with features in the type of the weights: bags are stored in half precision.

        For an aggregator without a `first_layer`, which reads any type.
        """
        dtype = next(self.parameters()).dtype
        return self.check(bags) if bags.features.dtype == dtype else replace(self.check(bags), features=bags.features.to(dtype))


@dataclass(frozen=True)
class LabelledBags:
    """A training batch of slides: bags and what is known of each."""

    bags: BagBatch
    targets: Tensor  # (B, …) as the task encodes them
    weights: Tensor | None = None  # (B,) of the slides in the loss

    def to(self, device: torch.device | str) -> LabelledBags:
        return LabelledBags(
            self.bags.to(device),
            self.targets.to(device),
            None if self.weights is None else self.weights.to(device),
        )


class Objective(nn.Module):
    """What is minimised. All its state lives in buffers and sub-modules, so it resumes with the checkpoint.

    Only `losses` must be written. Techniques wrap one another: an objective may hold another and hands every hook on to it.
    A reference to the model's own layers is kept outside the module tree (in a tuple): the model is not the objective's state.

    Attributes:
        per_bag: its loss is the mean over bags of what each bag gives alone; the loop may then walk a batch in pieces.
    """

    per_bag: bool = False

    def prepare(self, model: nn.Module) -> None:
        """Once, before the optimiser is made: add heads, swap layers, freeze."""

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser: by default all that ask for a gradient, the objective's own included."""
        parameters = [*model.parameters(), *self.parameters()]
        return [{"params": [parameter for parameter in parameters if parameter.requires_grad]}]

    def sampler(self, epoch: int) -> Iterable[int] | None:
        """Order of the training items of an epoch; None leaves it to the loop."""
        return None

    def on_epoch_start(self, epoch: int, infer: Callable[[], Iterable[tuple[Any, Any]]]) -> None:
        """Before each epoch; `infer()` runs the model, in eval mode, over every training item once and yields (batch, output)."""

    def on_validation_start(self, infer: Callable[[], Iterable[tuple[Any, Any]]]) -> None:
        """Before each validation; `infer()` runs the model whose weights would be kept over every training item once."""

    def losses(self, model: nn.Module, batch: Any, progress: float) -> dict[str, Tensor]:
        """Named losses of a batch, their weights applied: the loop minimises their sum. `progress` runs from 0 to 1."""
        raise NotImplementedError  # abstract: the one method every objective states

    def after_backward(self) -> None:
        """Between the gradient and the step: project or mask gradients."""

    def after_step(self) -> None:
        """After the optimiser's step: move an EMA teacher, renormalise."""

    def kept_model(self, model: nn.Module) -> nn.Module:
        """Whose weights are kept at the end of an epoch: the model's own, or those of an average; the state dict fits the model."""
        return model


@runtime_checkable
class EncodesTokens(Protocol):
    """A ViT as masked-image objectives see it."""

    def encode_tokens(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """images (B, 3, height, width), keep (B, M) indices of visible patches → patch tokens (B, M or all, D).

        Patches are counted row by row; class and register tokens are not among them.
        """
        ...

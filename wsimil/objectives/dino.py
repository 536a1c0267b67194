"""DINO: a student learns to say of a crop what its own slowly moving average, the teacher, says of another crop.

Caron et al. 2021 (arXiv 2104.14294); Sinkhorn centring and KoLeo as in DINOv2 (arXiv 2304.07193).

- The parts are pure functions; the objective keeps the teacher, both heads and the centre, so that a checkpoint holds them.
- Teacher and student are equal at step 0, heads included; the teacher is in eval mode, has no gradient and is what is kept.
- Centre and Sinkhorn sums run over all processes: two with B tiles each learn what one with 2B learns.
- Whatever is compared or normalised is computed in float32, whatever the precision of the products.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.batch import Objective
from wsimil.errors import ConfigError

__all__ = ["DinoHead", "DinoObjective", "MultiCrop", "center_update", "dino_loss", "ema_", "kde", "koleo", "sinkhorn"]


@dataclass(frozen=True)
class MultiCrop:
    """Crops of B tiles, normalised: every crop of a tile shows another part of it, in another stain."""

    globals_: tuple[Tensor, ...]  # each (B, 3, g, g); student and teacher see them
    locals_: tuple[Tensor, ...] = ()  # each (B, 3, l, l); the student alone

    def __len__(self) -> int:
        return len(self.globals_[0])

    def to(self, device: torch.device | str) -> MultiCrop:
        return MultiCrop(tuple(view.to(device) for view in self.globals_), tuple(view.to(device) for view in self.locals_))


def dino_loss(student_logits: Tensor, teacher_probs: Tensor, *, student_temp: float = 0.1) -> Tensor:
    """Mean cross-entropy over all pairs of a teacher's view and another view of the student's, and over tiles.

    Args:
        student_logits: (V, B, K); the first G views are those of the teacher, in its order.
        teacher_probs: (G, B, K), rows sum to 1.
    """
    n_views, n_global = len(student_logits), len(teacher_probs)
    log_probs = (student_logits.float() / student_temp).log_softmax(-1)  # (V, B, K)
    # Σ over pairs of -p·log q is a product of two sums; pairs of a view with itself are taken off again
    of_pairs = -(teacher_probs.sum(0) * log_probs.sum(0)).sum(-1)  # (B,)
    of_itself = -(teacher_probs * log_probs[:n_global]).sum((0, 2))  # (B,)
    return (of_pairs - of_itself).mean() / (n_global * n_views - n_global)


def center_update(center: Tensor, batch_mean: Tensor, momentum: float) -> Tensor:
    """(K,), (K,) → (K,): the running mean of the teacher's logits."""
    return momentum * center + (1 - momentum) * batch_mean


@torch.no_grad()
def sinkhorn(logits: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """(N, K) → probabilities (N, K): rows sum to 1 and, over the tiles of all processes, prototypes are used about equally.

    Sums are taken of logarithms: a prototype that nobody is near gets a small share, not 0/0.
    """
    log_q = logits.float() / temp
    for _ in range(iterations):
        log_q = log_q - _logsumexp_over_processes(log_q)
        log_q = log_q.log_softmax(1)
    return log_q.exp()


def _logsumexp_over_processes(values: Tensor) -> Tensor:
    """(N, K) → (K,), over the rows of all processes."""
    most = values.amax(0)
    _all_reduce(most, "max")
    total = (values - most).exp().sum(0)
    _all_reduce(total, "sum")
    return most + total.log()


def _all_reduce(values: Tensor, how: Literal["sum", "max"]) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)


def koleo(x: Tensor) -> Tensor:
    """(N, D) → -mean log distance to the nearest neighbour on the sphere: less when features spread (Sablayrolles et al. 2019).

    The distance is √(d² + 1e-8): at a duplicate the gradient is 0, elsewhere it is KoLeo's.
    """
    x = F.normalize(x.float(), dim=1)
    with torch.no_grad():
        cosine = x @ x.T
        nearest = cosine.fill_diagonal_(-2).argmax(1)
    return -0.5 * ((x - x[nearest]).square().sum(1) + 1e-8).log().mean()


def kde(x: Tensor, concentration: float = 10.0) -> Tensor:
    """(N, D) → mean log density, in units of κ, of the others at every feature on the sphere: less when features spread.

    A von Mises-Fisher kernel of concentration κ, self left out. It is added to a loss with a positive weight: minimising it pushes
    features apart. 0 when all are equal, whatever N.
    """
    x = F.normalize(x.float(), dim=1)
    cosine = concentration * (x @ x.T - 1)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return cosine.masked_fill(itself, -math.inf).logsumexp(1).mean() - math.log(len(x) - 1)


@torch.no_grad()
def ema_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher ← m teacher + (1 - m) student, in place; buffers are copied."""
    for mean, weight in zip(teacher.parameters(), student.parameters(), strict=True):
        mean.lerp_(weight.to(mean.dtype), 1 - momentum)
    for kept, buffer in zip(teacher.buffers(), student.buffers(), strict=True):
        kept.copy_(buffer)


class DinoHead(nn.Module):
    """(N, dim) → logits (N, prototypes): three layers to a bottleneck on the sphere, then the cosine to every prototype."""

    def __init__(self, dim: int, *, prototypes: int, bottleneck: int, hidden: int, norm_last_layer: bool = True) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.trunc_normal_(self.prototypes, std=bottleneck**-0.5)
        self.length = None if norm_last_layer else nn.Parameter(torch.ones(prototypes, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.mlp(x).float(), dim=1)
        prototypes = F.normalize(self.prototypes.float(), dim=1)
        return F.linear(x, prototypes if self.length is None else self.length * prototypes)

    def last_layer(self) -> Iterable[nn.Parameter]:
        return (self.prototypes,) if self.length is None else (self.prototypes, self.length)


class DinoObjective(Objective):
    """Self-distillation without labels: `losses` takes a `MultiCrop`, the model gives one vector (N, dim) for crops of any size.

    Shares and schedules are of the run's progress. `monitor` holds what the last batch said (floats on the device): `entropy` of a
    tile's teacher probabilities over ln K, `mean_entropy` of their mean over ln K, `kl` of the student from the teacher in nats,
    and `loss`. Both entropies near 1: everything is said of every tile; both near 0: the same one thing of all.

    Args:
        dim: width of the model's vector.
        prototypes, bottleneck, hidden: K, and the widths of the head.
        centring: "ema" takes a running mean of the teacher's logits off them; "sinkhorn" evens the use of prototypes in the batch.
        teacher_temp: from, to, and the share of the run that the linear way takes.
        momentum: of the teacher's average, from, to, along half a cosine over the run.
        freeze_last: share of the run in which the prototypes stand still.
        spread, spread_weight: a further loss on the student's vectors of each global view, that pushes tiles apart.
        norm_last_layer: prototypes have length 1; else the length is learned.
    """

    teacher: nn.Module
    center: Tensor

    def __init__(
        self,
        dim: int,
        *,
        prototypes: int = 65536,
        bottleneck: int = 256,
        hidden: int = 2048,
        centring: Literal["ema", "sinkhorn"] = "ema",
        center_momentum: float = 0.9,
        teacher_temp: tuple[float, float, float] = (0.04, 0.04, 0.0),
        student_temp: float = 0.1,
        momentum: tuple[float, float] = (0.996, 1.0),
        freeze_last: float = 0.01,
        spread: Literal["none", "kde", "koleo"] = "none",
        spread_weight: float = 0.0,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        if centring not in ("ema", "sinkhorn") or spread not in ("none", "kde", "koleo"):
            raise ConfigError(f"centring {centring!r}, spread {spread!r}; expected ema or sinkhorn, and none, kde or koleo")
        self.centring, self.center_momentum = centring, center_momentum
        self.teacher_temp, self.student_temp, self.momentum = teacher_temp, student_temp, momentum
        self.freeze_last, self.spread, self.spread_weight = freeze_last, spread, spread_weight
        self.head = DinoHead(dim, prototypes=prototypes, bottleneck=bottleneck, hidden=hidden, norm_last_layer=norm_last_layer)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False).eval()
        self.register_buffer("center", torch.zeros(prototypes))
        self.monitor: dict[str, Tensor] = {}
        self.progress = 0.0
        self.seen: tuple[Tensor, int] | None = None  # sum of the teacher's logits since the last step, and their number
        # a tuple, not a module: the model is not the objective's state
        self.model: tuple[nn.Module, ...] = ()

    def prepare(self, model: nn.Module) -> None:
        self.model = (model,)
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DinoObjective:
        super().train(mode)
        self.teacher_head.eval()
        if self.model:
            self.teacher.eval()
        return self

    def losses(self, model: nn.Module, batch: MultiCrop, progress: float) -> dict[str, Tensor]:
        self.progress = progress
        n_global, n_tiles = len(batch.globals_), len(batch)
        with torch.no_grad():
            teacher_logits = self.teacher_head(self.teacher(torch.cat(batch.globals_))).float()  # (G B, K)
            teacher_probs = self._teacher_probs(teacher_logits).unflatten(0, (n_global, n_tiles))
        vectors = model(torch.cat(batch.globals_))  # (G B, dim)
        logits = [self.head(vectors)]
        # crops of one size go through the model together, another size is another call
        logits += [self.head(model(torch.cat(batch.locals_)))] if batch.locals_ else []
        student_logits = torch.cat(logits).unflatten(0, (-1, n_tiles))  # (V, B, K)
        loss = dino_loss(student_logits, teacher_probs, student_temp=self.student_temp)
        self._watch(teacher_probs, loss)
        losses = {"dino": loss}
        if self.spread != "none" and self.spread_weight and n_tiles > 1:
            measure = kde if self.spread == "kde" else koleo
            with torch.autocast(vectors.device.type, enabled=False):
                spread = torch.stack([measure(view) for view in vectors.chunk(n_global)]).mean()
            losses[self.spread] = self.spread_weight * spread
        return losses

    def _teacher_probs(self, logits: Tensor) -> Tensor:
        """(G B, K) → probabilities of the same shape."""
        start, end, share = self.teacher_temp
        temp = end if self.progress >= share else start + (end - start) * self.progress / share
        if self.centring == "sinkhorn":
            return sinkhorn(logits, temp)
        if self.training:
            total, count = self.seen or (torch.zeros_like(self.center), 0)
            self.seen = total + logits.sum(0), count + len(logits)
        return ((logits - self.center) / temp).softmax(-1)

    @torch.no_grad()
    def _watch(self, teacher_probs: Tensor, loss: Tensor) -> None:
        entropy = _entropy(teacher_probs).mean()
        of_all = math.log(teacher_probs.shape[-1])
        self.monitor = {
            "entropy": entropy / of_all,
            "mean_entropy": _entropy(teacher_probs.mean((0, 1))) / of_all,
            "kl": loss.detach() - entropy,
            "loss": loss.detach(),
        }

    def after_backward(self) -> None:
        if self.progress < self.freeze_last:
            for parameter in self.head.last_layer():
                parameter.grad = None  # a gradient of zero would still let weight decay and momentum move it

    @torch.no_grad()
    def after_step(self) -> None:
        (model,) = self.model
        start, end = self.momentum
        momentum = end - (end - start) * (1 + math.cos(math.pi * min(1.0, self.progress))) / 2
        ema_(self.teacher, model, momentum)
        ema_(self.teacher_head, self.head, momentum)
        if self.seen is not None:
            total, count = self.seen
            sums = torch.cat([total, total.new_tensor([float(count)])])
            _all_reduce(sums, "sum")
            self.center.copy_(center_update(self.center, sums[:-1] / sums[-1], self.center_momentum))
            self.seen = None

    def kept_model(self, model: nn.Module) -> nn.Module:
        return self.teacher


def _entropy(probs: Tensor) -> Tensor:
    """(…, K) → (…), nats."""
    return torch.special.entr(probs).sum(-1)

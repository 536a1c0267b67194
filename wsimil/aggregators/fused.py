"""The attention network on a CPU, forward and back, in few walks over the rows: what torch does between products costs as much.

- What `AttentionScore` on top of Linear, ReLU, Dropout computes, in the same types; scores are kept in float32.
- Rows are shared out among threads of one processor each, in an order that depends on the number of threads alone. A thread goes
  on to the next product while another is at its walk, where torch would wait for all after every step.
- The centred features and the gate's input are not kept for the way back; memory is used again (`ReusedMemory`).
- Where it does not apply (`applies`), and where numba cannot be had, the same is computed step by step by torch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wsimil.memory import ReusedMemory

__all__ = ["applies", "embed_and_score", "joined", "sharing_rows", "weighted_sum"]

_FROM = 512
"""Rows that it is worth while for."""

_ROWS = 4096
"""Of a thread at a time, at most: they stay in the cache, and steps are few."""

_FEW = 16_384
"""Rows up to which a weighted sum is not worth waking another thread."""

_STORED = {torch.float32: torch.float32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

_memory, _scratch = ReusedMemory(most=128 << 20), ReusedMemory()

T = TypeVar("T")


@cache
def _kernels() -> ModuleType | None:
    try:
        from wsimil.aggregators import kernels
    except ImportError:  # numba is not there for every new Python at once
        return None
    return kernels


def applies(tiles: Tensor, *weights: Tensor | None) -> bool:
    """Whether the functions of this module take these: rows on the CPU, float32 weights, nobody who records or transforms steps."""
    if tiles.device.type != "cpu" or len(tiles) < _FROM or tiles.dtype not in _STORED or not tiles.is_contiguous():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if any(weight is not None and weight.dtype != torch.float32 for weight in weights) or _dtype() is None:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # type: ignore[attr-defined]
    if any(wrapped(part) for part in (tiles, *weights) if part is not None):
        return False
    return _kernels() is not None


def _dtype() -> torch.dtype | None:
    """Of products: float32, or what autocast asks for; None if that is neither float32 nor bfloat16."""
    asked = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    return asked if asked in (torch.float32, torch.bfloat16) else None


# memory


def _fresh(shape: tuple[int, ...], dtype: torch.dtype, memory: ReusedMemory = _memory) -> Tensor:
    if dtype == torch.float32:
        return torch.from_numpy(memory(shape, np.float32))
    return torch.from_numpy(memory(shape, np.int16)).view(dtype)


def _numbers(values: Tensor) -> np.ndarray:
    """The memory of a tensor, in the type that tells `kernels` what it holds."""
    bits = values.detach().view(_STORED[values.dtype]).numpy()
    return bits.view(np.uint16) if values.dtype == torch.bfloat16 else bits


# threads


class _Workers:
    """Threads that each compute on one processor."""

    def __init__(self, count: int) -> None:
        self.count, before = count, torch.get_num_threads()
        met = threading.Barrier(count + 1)
        self._pool = ThreadPoolExecutor(count, "wsimil-rows")
        for _ in range(count):
            self._pool.submit(self._begin, met)
        met.wait()
        torch.set_num_threads(before)  # the last word counts for threads to come, and for MKL

    def _begin(self, met: threading.Barrier) -> None:
        torch.get_num_threads()  # or it is set at the first product, to everybody's
        torch.set_num_threads(1)
        met.wait()

    def begun(self, work: Callable[[list[slice]], T], shares: Sequence[list[slice]]) -> list[Future[T]]:
        return [self._pool.submit(work, share) for share in shares]

    def results(self, begun: list[Future[T]]) -> list[T]:
        wait(begun)  # all of them, also if one fails: they write to memory that is used again
        return [one.result() for one in begun]


_workers: _Workers | None = None
_one_at_a_time = threading.Lock()
_threads = 0
"""Among which rows are shared out; 0: as many as torch has."""


@contextmanager
def sharing_rows() -> Iterator[None]:
    """Inside, torch has one thread, and the functions of this module have all that it had.

    For work where little is left beside them: after every step that torch itself takes in threads, those stay awake for
    milliseconds and are in the way.
    """
    global _threads
    before, _threads = (torch.get_num_threads(), _threads), _threads or torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        _threads = before[1]


def _forget() -> None:
    global _workers, _one_at_a_time
    _workers, _one_at_a_time = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # its threads are the parent's


def _share(spans: Sequence[tuple[int, int]], work: Callable[[list[slice]], T], *, alone: bool = False) -> list[T]:
    """work(pieces) for each thread, of all rows in `spans` in pieces of at most `_ROWS`; a piece lies within one span."""
    global _workers
    threads = 1 if alone else _threads or torch.get_num_threads()
    pieces: list[slice] = []
    for start, end in spans:
        count = -(-(end - start) // _ROWS)
        if len(spans) == 1:
            count = -(-count // threads) * threads  # as much for each
        bounds = [start + (end - start) * place // count for place in range(count + 1)]
        pieces += [slice(first, last) for first, last in pairwise(bounds) if last > first]
    shares = [pieces[place::threads] for place in range(min(threads, len(pieces)))]
    mode = torch.is_inference_mode_enabled()

    def quietly(mine: list[slice]) -> T:
        with torch.inference_mode(mode), torch.no_grad():
            return work(mine)

    if len(shares) == 1:
        return [quietly(pieces)]
    with _one_at_a_time:
        if _workers is None or _workers.count != threads:
            _workers = _Workers(threads)
        if torch.get_num_threads() > 1:
            return _workers.results(_workers.begun(quietly, shares))
        others = _workers.begun(quietly, shares[1:])  # the first is this thread's own
        try:
            own = quietly(shares[0])
        finally:
            rest = _workers.results(others)
        return [own, *rest]


def joined(parts: list[Tensor]) -> Tensor:
    """torch.cat of rows; inside of `sharing_rows` the threads copy, to memory that is used again."""
    first = parts[0]
    if not _threads or any(part.dtype != first.dtype or part.device.type != "cpu" for part in parts) or first.dtype not in _STORED:
        return torch.cat(parts)
    bounds = [0, *accumulate(map(len, parts))]
    found = _fresh((bounds[-1], first.shape[1]), first.dtype)
    into, starts = _numbers(found), np.array(bounds[:-1])
    numbers = list(map(_numbers, parts))

    def work(pieces: list[slice]) -> None:
        for rows in pieces:
            part = np.searchsorted(starts, rows.start, "right") - 1
            into[rows] = numbers[part][rows.start - bounds[part] : rows.stop - bounds[part]]

    _share(list(pairwise(bounds)), work)
    return found


# the network


def embed_and_score(
    features: Tensor,
    centre: Tensor | None,
    embed: tuple[Tensor, Tensor | None],
    attend: tuple[Tensor, Tensor | None],
    score: tuple[Tensor, Tensor | None],
    *,
    gated: bool,
    drop: tuple[float, float] = (0.0, 0.0),
) -> tuple[Tensor, Tensor]:
    """Embeddings h = dropout(ReLU(W (x - centre) + b)) and their scores, (ΣN, H) and (ΣN, K).

    Args:
        features: (ΣN, D), of any type that bags are stored in; no gradient goes there.
        centre: (D,).
        embed: W (H, D), b (H,).
        attend: V and U (2L, H) below one another and their biases (2L,), or V (L, H) alone without the gate.
        score: w (K, L), c (K,): w · (tanh(V h) ⊙ σ(U h)) + c.
        gated: whether U is there.
        drop: chances of h, and of tanh and σ, to be dropped.
    """
    centre = torch.zeros(features.shape[1]) if centre is None else centre
    seeds = torch.randint(2**62, (2,)).tolist() if any(drop) else (0, 0)
    return _EmbedAndScore.apply(features, centre, *embed, *attend, *score, gated, drop, seeds, _dtype())  # type: ignore[return-value]


def _coins(chance: float) -> tuple[Any, Any]:
    """What a coin of 16 bits must reach, and what the rest is multiplied by."""
    limit = round(chance * 2**16)
    return np.uint32(limit), np.float32(2**16 / (2**16 - limit) if limit < 2**16 else 0)


class _EmbedAndScore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        centre: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        attend: Tensor,
        attend_bias: Tensor | None,
        score: Tensor,
        score_bias: Tensor | None,
        gated: bool,
        drop: tuple[float, float],
        seeds: tuple[int, int],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        kernels = _kernels()
        assert kernels is not None
        (limit, scale), (gate_limit, gate_scale) = _coins(drop[0]), _coins(drop[1])
        (n, dim), hidden, width = features.shape, len(weight), len(attend)
        # what is dropped is zero and the rest larger: so are the weights before a ReLU
        into, within = (weight * float(scale)).to(dtype).T, attend.to(dtype).T
        into_bias = None if bias is None else (bias * float(scale)).to(dtype)
        within_bias = np.zeros(width, np.float32) if attend_bias is None else _numbers(attend_bias)
        tiles, gates = _fresh((n, hidden), dtype), _fresh((n, width), dtype)
        scores = torch.zeros(n, len(score)) if score_bias is None else score_bias.repeat(n, 1)
        x, h, z, e = map(_numbers, (features, tiles, gates, scores))
        mean, w = _numbers(centre.float()), _numbers(score.contiguous())
        activate = kernels.gate if gated else kernels.squash

        def work(pieces: list[slice]) -> None:
            centred = _fresh((_longest(pieces), dim), dtype, _scratch)
            c = _numbers(centred)
            for rows in pieces:
                count = rows.stop - rows.start
                kernels.centre(x[rows], mean, c[:count])
                if into_bias is None:
                    torch.mm(centred[:count], into, out=tiles[rows])
                else:  # it is added within the product: after it, a second rounding would lean to one side
                    torch.addmm(into_bias, centred[:count], into, out=tiles[rows])
                kernels.rectify(h[rows], rows.start, limit, seeds[0])
                torch.mm(tiles[rows], within, out=gates[rows])
                activate(z[rows], within_bias, w, e[rows], rows.start, gate_limit, gate_scale, seeds[1])

        _share([(0, n)], work)
        ctx.save_for_backward(features, centre, attend, score, tiles, gates)
        ctx.settings = gated, float(scale), gate_limit, gate_scale, seeds[1], dtype
        ctx.biases = bias is not None, attend_bias is not None, score_bias is not None
        return tiles, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kernels = _kernels()
        assert kernels is not None
        features, centre, attend, score, tiles, gates = ctx.saved_tensors
        gated, scale, limit, gate_scale, seed, dtype = ctx.settings
        (n, dim), hidden, width = features.shape, tiles.shape[1], gates.shape[1]
        out = attend.to(dtype)
        x, h, z = map(_numbers, (features, tiles, gates))
        owed, of_scores = (_numbers(part.contiguous()) for part in gradients)
        mean, w = _numbers(centre.float()), _numbers(score.contiguous())
        go_back = kernels.gate_back if gated else kernels.squash_back

        def work(pieces: list[slice]) -> list[Tensor]:
            shapes = (hidden, dim), (hidden,), tuple(attend.shape), (width,), tuple(score.shape)
            found = [_fresh(shape, torch.float32, _scratch).zero_() for shape in shapes]
            of_weight, _, of_attend, _, _ = found
            _, of_bias, _, of_attend_bias, of_score = map(_numbers, found)
            buffers = [_fresh((_longest(pieces), wide), dtype, _scratch) for wide in (dim, width, hidden)]
            numbers = list(map(_numbers, buffers))
            for rows in pieces:
                count = rows.stop - rows.start
                centred, of_gates, of_tiles = (buffer[:count] for buffer in buffers)
                c, of_z, of_h = (part[:count] for part in numbers)
                go_back(z[rows], w, of_scores[rows], rows.start, limit, gate_scale, seed, of_z, of_score, of_attend_bias)
                of_attend += of_gates.T @ tiles[rows]
                torch.mm(of_gates, out, out=of_tiles)
                kernels.rectify_back(of_h, owed[rows], h[rows], of_bias)
                kernels.centre(x[rows], mean, c)
                of_weight += of_tiles.T @ centred
            return found

        sums, *others = _share([(0, n)], work)
        for other in others:
            for total, part in zip(sums, other, strict=True):
                total += part
        of_weight, of_bias, of_attend, of_attend_bias, of_score = sums
        has_bias, has_attend_bias, has_score_bias = ctx.biases
        return (
            None,
            None,
            of_weight if scale == 1 else of_weight.mul_(scale),
            of_bias.mul_(scale) if has_bias else None,
            of_attend,
            of_attend_bias if has_attend_bias else None,
            of_score,
            gradients[1].sum(0) if has_score_bias else None,
            None,
            None,
            None,
            None,
        )


def _longest(pieces: Sequence[slice]) -> int:
    return max(rows.stop - rows.start for rows in pieces)


# the bag


def weighted_sum(weights: Tensor, values: Tensor, bounds: Sequence[int]) -> Tensor:
    """weights (ΣN, K) float32, values (ΣN, H) float32 or bfloat16, `bounds` of B bags → (B, K, H) float32: Σ_i w_ik v_i."""
    return _WeightedSum.apply(weights, values, tuple(bounds))  # type: ignore[return-value]


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor, bounds: tuple[int, ...]) -> Tensor:
        kernels = _kernels()
        assert kernels is not None
        weights = weights.contiguous()
        spans = list(pairwise(bounds))
        w, v = _numbers(weights), _numbers(values)
        shape = weights.shape[1], values.shape[1]

        def work(pieces: list[slice]) -> list[tuple[int, np.ndarray]]:
            found = []
            for rows in pieces:  # each by itself: one sum over a hundred thousand loses digits
                part = np.zeros(shape, np.float32)
                kernels.weighted_sum(w[rows], v[rows], part)
                found.append((rows.start, part))
            return found

        shares = _share(spans, work, alone=len(values) <= _FEW)
        parts = sorted((part for mine in shares for part in mine), key=lambda part: part[0])
        bags = np.searchsorted([start for start, _ in parts], bounds[:-1])
        sums = np.add.reduceat(np.stack([part for _, part in parts]), bags, axis=0, dtype=np.float64)
        ctx.save_for_backward(weights, values)
        ctx.spans = spans
        return torch.from_numpy(sums.astype(np.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kernels = _kernels()
        assert kernels is not None
        weights, values = ctx.saved_tensors
        of_weights, of_values = torch.empty_like(weights), _fresh(tuple(values.shape), values.dtype)
        w, v, of_w, of_v = map(_numbers, (weights, values, of_weights, of_values))
        owed = _numbers(gradients[0].contiguous())
        starts = np.array([start for start, _ in ctx.spans])

        def work(pieces: list[slice]) -> None:
            for rows in pieces:
                bag = np.searchsorted(starts, rows.start, "right") - 1
                kernels.weighted_sum_back(w[rows], v[rows], owed[bag], of_w[rows], of_v[rows])

        _share(ctx.spans, work, alone=len(values) <= _FEW)
        return of_weights, of_values, None

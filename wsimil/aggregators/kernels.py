"""What lies between the matrix products of an attention network on a CPU, each part in one walk over the rows, compiled by numba.

- Arrays hold numbers as they are stored, and the type says what they are: float32, uint16 (bfloat16), int16 (float16). Sums are
  taken in float32.
- Coins of dropout are a hash of (seed, place): the way back tosses the same ones again, and nothing is kept. `limit` is the chance
  in 1/65,536; 0: no dropout.
- A row is read and written by its own call alone: several threads may take rows of the same arrays.
"""

from __future__ import annotations

import platform

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.extending import intrinsic, overload

__all__ = [
    "centre",
    "gate",
    "gate_back",
    "half_by_hand",
    "rectify",
    "rectify_back",
    "squash",
    "squash_back",
    "weighted_sum",
    "weighted_sum_back",
]

_OPTIONS = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz", "arcp", "afn"}, "error_model": "numpy"}

f32, u16, u32, i32 = np.float32, np.uint16, np.uint32, np.int32


def _compiled(function):
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # nowhere to keep it: some seconds' work in every process
        return numba.njit(**_OPTIONS)(function)


def _wide(stored):
    """The number that is stored, in float32."""
    raise NotImplementedError


@intrinsic
def _half_by_the_processor(typing_context, stored):
    def emitted(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), emitted


_KNOWS_HALVES = platform.machine().lower() in ("aarch64", "arm64") or get_host_cpu_features().get("f16c", False)


@numba.njit(inline="always", **_OPTIONS)
def half_by_hand(stored):
    """The float32 of a float16, from its bits."""
    bits = u32(u16(stored))
    # the exponent's bias differs by 112; so multiplied, numbers below the normal ones come out right as well
    size = u32(u32(bits & u32(0x7FFF)) << u32(13)).view(np.float32) * f32(2.0**112)
    beyond = u32(0x7F800000) if u32(bits & u32(0x7C00)) == u32(0x7C00) else u32(0)  # infinite, or not a number
    return u32(u32(f32(size).view(np.uint32) | beyond) | u32(u32(bits & u32(0x8000)) << u32(16))).view(np.float32)


@overload(_wide)
def _(stored):
    if stored == types.uint16:
        return lambda stored: u32(u32(stored) << u32(16)).view(np.float32)
    if stored == types.int16:
        read = _half_by_the_processor if _KNOWS_HALVES else half_by_hand
        return lambda stored: read(stored)  # pyright: ignore[reportCallIssue]
    return lambda stored: stored


def _stored(value, like):
    """A float32 as `like` is stored: itself, or rounded to the nearest bfloat16, of two the even one."""
    raise NotImplementedError


@overload(_stored)
def _(value, like):
    if like == types.uint16:

        def rounded(value, like):
            bits = f32(value).view(np.uint32)
            up = u32(u32(0x7FFF) + u32(u32(bits >> u32(16)) & u32(1)))
            quiet = u32(0x7FC00000)  # rounding would carry a NaN over into a number
            return u16(u32((u32(bits + up) if u32(bits & u32(0x7FFFFFFF)) <= u32(0x7F800000) else quiet) >> u32(16)))

        return rounded
    return (lambda value, like: f32(value)) if like == types.float32 else None  # nothing here writes float16


@numba.njit(inline="always", **_OPTIONS)
def _exp(x):
    """e^x, to 1e-7 of it; 2^±126 beyond those."""
    power = min(max(f32(x * f32(1.4426950408889634)), f32(-126.0)), f32(126.0))
    whole = np.floor(power + f32(0.5))
    part = f32(power - whole)  # -0.5 to 0.5: 2^part by its series, minimax
    found = f32(1.5403530393381610e-4)
    found = found * part + f32(1.3333558146428443e-3)
    found = found * part + f32(9.6181291076284770e-3)
    found = found * part + f32(5.5504108664821580e-2)
    found = found * part + f32(2.4022650695910072e-1)
    found = found * part + f32(6.9314718055994531e-1)
    found = found * part + f32(1.0)
    return f32(found * i32(i32(i32(whole) + i32(127)) << i32(23)).view(np.float32))


@numba.njit(inline="always", **_OPTIONS)
def _tanh(x):
    """Near zero by its series: there 1 - e^-2x has lost its digits."""
    square = f32(x * x)
    series = x * (f32(1.0) + square * (f32(-1.0 / 3.0) + square * (f32(2.0 / 15.0) + square * f32(-17.0 / 315.0))))
    falls = _exp(f32(-2.0) * x)
    return f32(series) if square < f32(0.01) else f32((f32(1.0) - falls) / (f32(1.0) + falls))


@numba.njit(inline="always", **_OPTIONS)
def _sigmoid(x):
    return f32(f32(1.0) / (f32(1.0) + _exp(-x)))


@numba.njit(inline="always", **_OPTIONS)
def _coin(place, seed):
    """32 bits that depend on the place in an array and on both halves of the seed: Mueller's mix, the second half let in within."""
    bits = u32(u32(place) ^ u32(seed & 0xFFFFFFFF))
    bits = u32(u32(bits ^ u32(bits >> u32(16))) * u32(0x7FEB352D))
    bits = u32(u32(bits ^ u32(bits >> u32(15))) + u32(seed >> 32))
    bits = u32(bits * u32(0x846CA68B))
    return u32(bits ^ u32(bits >> u32(16)))


@_compiled
def centre(features, mean, found):
    """features (N, D) - mean (D,) → found (N, D)."""
    for i in range(features.shape[0]):
        for j in range(features.shape[1]):
            found[i, j] = _stored(_wide(features[i, j]) - mean[j], found[i, j])


@_compiled
def rectify(tiles, first, limit, seed):
    """ReLU and dropout of tiles (N, H), in place: zero where the coin is below `limit`. `first` is the row that tiles begin at.

    What is not a number stays so.
    """
    width = tiles.shape[1]
    half = (width + 1) // 2
    coins = np.empty(half, np.uint32)  # of 32 bits: two coins each
    for i in range(tiles.shape[0]):
        if limit:
            place = u32(u32(first + i) * u32(half))
            for j in range(half):
                coins[j] = _coin(u32(place + u32(j)), seed)
            left, right = tiles[i, :half], tiles[i, half:]
            for j in range(half):
                kept = ~(_wide(left[j]) <= f32(0.0)) & (u32(coins[j] & u32(0xFFFF)) >= limit)
                left[j] = left[j] if kept else _stored(f32(0.0), left[j])
            for j in range(width - half):
                kept = ~(_wide(right[j]) <= f32(0.0)) & (u32(coins[j] >> u32(16)) >= limit)
                right[j] = right[j] if kept else _stored(f32(0.0), right[j])
        else:
            for j in range(width):
                tiles[i, j] = _stored(f32(0.0), tiles[i, j]) if _wide(tiles[i, j]) <= f32(0.0) else tiles[i, j]


@_compiled
def rectify_back(gradient, more, tiles, bias):
    """(gradient + more) (N, H) → gradient, of what `rectify` made tiles of; its sum over rows is added to bias (H,)."""
    zero = f32(0.0)
    for i in range(tiles.shape[0]):
        for j in range(tiles.shape[1]):
            value = f32(_wide(gradient[i, j]) + _wide(more[i, j]))
            value = value if _wide(tiles[i, j]) != zero else zero
            gradient[i, j] = _stored(value, gradient[i, j])
            bias[j] += value


@numba.njit(inline="always", **_OPTIONS)
def _score(row, weight, scores, i):
    """weight (K, L) · row (L,) is added to row i of scores (N, K)."""
    for k in range(weight.shape[0]):
        score = f32(0.0)
        for j in range(weight.shape[1]):
            score += row[j] * weight[k, j]
        scores[i, k] += score


@numba.njit(inline="always", **_OPTIONS)
def _owe(gradient, i, weight, row):
    """What row i of the scores' gradient (N, K) owes to each number before `weight` (K, L) → row (L,)."""
    row[:] = f32(0.0)
    for k in range(weight.shape[0]):
        owed = gradient[i, k]
        for j in range(weight.shape[1]):
            row[j] += owed * weight[k, j]


@numba.njit(inline="always", **_OPTIONS)
def _charge(gradient, i, row, of_weight):
    """What row i of the scores' gradient (N, K) owes to the weight that met row (L,) is added to of_weight (K, L)."""
    for k in range(of_weight.shape[0]):
        owed = gradient[i, k]
        for j in range(of_weight.shape[1]):
            of_weight[k, j] += owed * row[j]


@_compiled
def gate(before, bias, weight, scores, first, limit, scale, seed):
    """before (N, 2L) + bias (2L,) → tanh of the first half and sigmoid of the second, in place.

    Their product · weight (K, L) is added to scores (N, K).
    With a `limit` both halves are dropped, each by coins of their own, for the scores alone; what stays is multiplied by `scale`.
    """
    half = weight.shape[1]
    row = np.empty(half, np.float32)
    for i in range(before.shape[0]):
        left, right = before[i, :half], before[i, half:]
        for j in range(half):
            row[j] = _tanh(f32(_wide(left[j]) + bias[j]))
            left[j] = _stored(row[j], left[j])
        for j in range(half):
            sigmoid = _sigmoid(f32(_wide(right[j]) + bias[half + j]))
            right[j] = _stored(sigmoid, right[j])
            row[j] *= sigmoid
        if limit:
            place = u32(u32(first + i) * u32(half))
            for j in range(half):
                coins = _coin(u32(place + u32(j)), seed)
                stays = (u32(coins & u32(0xFFFF)) >= limit) & (u32(coins >> u32(16)) >= limit)
                row[j] = row[j] * scale * scale if stays else f32(0.0)
        _score(row, weight, scores, i)


@_compiled
def gate_back(after, weight, gradient, first, limit, scale, seed, found, of_weight, of_bias):
    """after (N, 2L), as `gate` left it, and the scores' gradient (N, K) → found (N, 2L), the gradient before the gate.

    What falls to weight and bias is added to of_weight (K, L) and of_bias (2L,).
    """
    half = weight.shape[1]
    row, kept = np.empty(half, np.float32), np.ones(half, np.float32)
    one, other = f32(1.0), f32(0.0)
    for i in range(after.shape[0]):
        _owe(gradient, i, weight, row)
        if limit:
            place = u32(u32(first + i) * u32(half))
            for j in range(half):
                coins = _coin(u32(place + u32(j)), seed)
                stays = (u32(coins & u32(0xFFFF)) >= limit) & (u32(coins >> u32(16)) >= limit)
                kept[j] = scale * scale if stays else other
                row[j] *= kept[j]
        for j in range(half):
            tanh, sigmoid = _wide(after[i, j]), _wide(after[i, half + j])
            found[i, j] = _stored(f32(row[j] * sigmoid * (one - tanh * tanh)), found[i, j])
            found[i, half + j] = _stored(f32(row[j] * tanh * sigmoid * (one - sigmoid)), found[i, j])
            row[j] = tanh * sigmoid * kept[j]
        for j in range(2 * half):
            of_bias[j] += _wide(found[i, j])
        _charge(gradient, i, row, of_weight)


@_compiled
def squash(before, bias, weight, scores, first, limit, scale, seed):
    """`gate` without the gate: before (N, L) + bias (L,) → its tanh."""
    width = weight.shape[1]
    row = np.empty(width, np.float32)
    for i in range(before.shape[0]):
        place = u32(u32(first + i) * u32(width))
        for j in range(width):
            row[j] = _tanh(f32(_wide(before[i, j]) + bias[j]))
            before[i, j] = _stored(row[j], before[i, j])
        if limit:
            for j in range(width):
                stays = u32(_coin(u32(place + u32(j)), seed) >> u32(16)) >= limit
                row[j] = row[j] * scale if stays else f32(0.0)
        _score(row, weight, scores, i)


@_compiled
def squash_back(after, weight, gradient, first, limit, scale, seed, found, of_weight, of_bias):
    """`gate_back` without the gate."""
    width = weight.shape[1]
    row, kept = np.empty(width, np.float32), np.ones(width, np.float32)
    one, other = f32(1.0), f32(0.0)
    for i in range(after.shape[0]):
        place = u32(u32(first + i) * u32(width))
        _owe(gradient, i, weight, row)
        if limit:
            for j in range(width):
                stays = u32(_coin(u32(place + u32(j)), seed) >> u32(16)) >= limit
                kept[j] = scale if stays else other
                row[j] *= kept[j]
        for j in range(width):
            tanh = _wide(after[i, j])
            found[i, j] = _stored(f32(row[j] * (one - tanh * tanh)), found[i, j])
            row[j] = tanh * kept[j]
        for j in range(width):
            of_bias[j] += _wide(found[i, j])
        _charge(gradient, i, row, of_weight)


@_compiled
def weighted_sum(weights, values, found):
    """weights (N, K), values (N, H): Σ_i w_ik v_i is added to found (K, H)."""
    for i in range(values.shape[0]):
        for k in range(weights.shape[1]):
            weight = weights[i, k]
            for j in range(values.shape[1]):
                found[k, j] += weight * _wide(values[i, j])


@_compiled
def weighted_sum_back(weights, values, gradient, of_weights, of_values):
    """The sum's gradient (K, H) → of_weights (N, K), of_values (N, H)."""
    width = values.shape[1]
    row = np.empty(width, np.float32)
    for i in range(values.shape[0]):
        row[:] = f32(0.0)
        for k in range(weights.shape[1]):
            weight, owed = weights[i, k], f32(0.0)
            for j in range(width):
                owed += gradient[k, j] * _wide(values[i, j])
            of_weights[i, k] = owed
            for j in range(width):
                row[j] += weight * gradient[k, j]
        for j in range(width):
            of_values[i, j] = _stored(row[j], of_values[i, j])

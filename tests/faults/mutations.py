"""Damage as disks, networks and other programs do it: seeded, and it says which bytes it touched."""

from __future__ import annotations

import random
from collections.abc import Callable

__all__ = ["MUTATIONS", "mutate"]

Change = tuple[bytes, set[int]]
"""The damaged file, and the positions of the original that it does not hold any more."""


def _flip(data: bytes, positions: list[int], rng: random.Random) -> Change:
    changed = bytearray(data)
    for position in positions:
        changed[position] ^= 1 << rng.randrange(8)
    return bytes(changed), set(positions)


def _head(data: bytes, rng: random.Random) -> Change:
    return _flip(data, [rng.randrange(min(len(data), 512)) for _ in range(rng.choice((1, 2, 8)))], rng)


def _tail(data: bytes, rng: random.Random) -> Change:
    """Many writers keep their tables at the end."""
    size = min(len(data), 2048)
    return _flip(data, [len(data) - 1 - rng.randrange(size) for _ in range(rng.choice((1, 4)))], rng)


def _anywhere(data: bytes, rng: random.Random) -> Change:
    return _flip(data, [rng.randrange(len(data)) for _ in range(rng.choice((1, 4, 32)))], rng)


def _truncated(data: bytes, rng: random.Random) -> Change:
    size = rng.randrange(len(data))
    return data[:size], set(range(size, len(data)))


def _replaced(data: bytes, start: int, new: bytes) -> Change:
    changed = data[:start] + new[: len(data) - start] + data[start + len(new) :]
    return changed, {start + offset for offset in range(min(len(new), len(data) - start)) if data[start + offset] != new[offset]}


def _zeroed(data: bytes, rng: random.Random) -> Change:
    return _replaced(data, rng.randrange(len(data)), bytes(rng.choice((1, 16, 512, 4096))))


def _repeated(data: bytes, rng: random.Random) -> Change:
    """A block written over another."""
    size = rng.choice((16, 512, 4096))
    source = rng.randrange(len(data))
    return _replaced(data, rng.randrange(len(data)), data[source : source + size])


def _inserted(data: bytes, rng: random.Random) -> Change:
    """A block that is there twice: everything behind it has moved."""
    size, start = rng.choice((1, 16, 512)), rng.randrange(len(data))
    return data[: start + size] + data[start:], set(range(start, len(data)))


def _noise(data: bytes, rng: random.Random) -> Change:
    return _replaced(data, rng.randrange(min(len(data), 1024)), rng.randbytes(rng.choice((4, 64, 256))))


MUTATIONS: dict[str, Callable[[bytes, random.Random], Change]] = {
    "head": _head,
    "tail": _tail,
    "anywhere": _anywhere,
    "truncated": _truncated,
    "zeroed": _zeroed,
    "repeated": _repeated,
    "inserted": _inserted,
    "noise": _noise,
}


def mutate(data: bytes, number: int) -> tuple[str, bytes, set[int]]:
    """Damage number `number`: its kind, the damaged file, positions of the original that are lost."""
    kind = list(MUTATIONS)[number % len(MUTATIONS)]
    changed, lost = MUTATIONS[kind](data, random.Random(number))
    return kind, changed, lost

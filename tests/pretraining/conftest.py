"""Slides whose pixels say where they are, and readers that need no process."""

from __future__ import annotations

import mmap
import random
from collections import deque
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsimil.errors import SlideError
from wsimil.extraction.pool import Call, Done, Failed, Filled
from wsimil.extraction.reader import Reading
from wsimil.slides.write_tiff import write_slide

RISE = 200 / 1024
"""Grey levels per level-0 pixel."""


def coded(width: int, height: int, *, blue: int = 60) -> np.ndarray:
    """A picture of up to 1024 px: red tells x, green tells y, from 20 to 220."""
    picture = np.empty((height, width, 3), np.float64)
    picture[..., 0] = 20 + RISE * (np.arange(width) + 0.5)[None, :]
    picture[..., 1] = 20 + RISE * (np.arange(height) + 0.5)[:, None]
    picture[..., 2] = blue
    return np.round(picture).astype(np.uint8)


@pytest.fixture(scope="session")
def coded_slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four slides: .5, .25 and .347 µm/px, a pyramid each, one without; all tissue."""
    folder = tmp_path_factory.mktemp("coded")
    for place, (name, mpp, downsamples) in enumerate(
        [("a", 0.5, (1, 2, 4)), ("b", 0.25, (1, 4)), ("c", 0.347, (1, 2, 4)), ("d", 0.5, (1,))]
    ):
        write_slide(
            folder / f"{name}.tiff",
            coded(1000 - 40 * place, 900, blue=40 + 40 * place),
            mpp=mpp,
            compression="deflate",
            downsamples=downsamples,
        )
    return folder


class OwnPool:
    """`ReaderPool` without processes: calls are carried out when somebody asks for news, and news come in a shuffled order."""

    seed = 0

    def __init__(self, count: int, *, timeout: float, tile_bytes: int) -> None:
        self._slot_bytes = 5 * tile_bytes  # a call comes in pieces
        self._shuffle = random.Random(self.seed)
        self._calls: list[Call | None] = [None] * count
        self._news: list[deque] = [deque() for _ in range(count)]
        self._readings = [Reading(mmap.mmap(-1, self._slot_bytes), self._slot_bytes, None) for _ in range(count)]
        for reading in self._readings:
            reading._slots.put(0)

    @property
    def idle(self) -> list[int]:
        return [place for place, call in enumerate(self._calls) if call is None]

    @property
    def busy(self) -> bool:
        return any(call is not None for call in self._calls)

    def start(self, call: Call, place: int) -> None:
        reading, news = self._readings[place], self._news[place]

        def send(kind: str, *content: Any) -> None:
            if kind == "filled":
                slot, word = content
                news.append(Filled(call, word, np.frombuffer(reading._memory[:], np.uint8), None, slot))
                reading._slots.put(slot)

        reading._send, self._calls[place] = send, call
        module, name = call.function.split(":")
        try:
            news.append(Done(call, getattr(import_module(module), name)(reading, *call.arguments)))
        except SlideError as error:
            reading.forget_slides()
            news.append(Failed(call, error))

    def next(self, wait_s: float) -> Done | Failed | Filled:
        place = self._shuffle.choice([place for place, news in enumerate(self._news) if news])
        event = self._news[place].popleft()
        if isinstance(event, Done | Failed):
            self._calls[place] = None
        return event

    def release(self, filled: Filled) -> None: ...

    def __enter__(self) -> OwnPool:
        return self

    def __exit__(self, *_: object) -> None:
        for reading in self._readings:
            reading.forget_slides()


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> type[OwnPool]:
    """Readers of a feed without a process of their own; their `seed` says in which order they answer."""
    monkeypatch.setattr("wsimil.pretraining.feed.ReaderPool", OwnPool)
    monkeypatch.setattr(OwnPool, "seed", 0)
    return OwnPool


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that are carried out here, one slide after the other."""

    def run_here(job, files, stage, *, config, tile_bytes=1, quiet=False):
        rows = []
        for file in files:
            function, arguments = stage.first_call(file)
            module, name = function.split(":")
            reading = Reading(mmap.mmap(-1, 1), 1, lambda *word: None)
            rows.append(stage.begin(file, getattr(import_module(module), name)(reading, *arguments)))
            reading.forget_slides()
        return rows

    for module in ("tile", "mosaic", "stains"):
        monkeypatch.setattr(f"wsimil.extraction.{module}.run_slides", run_here)

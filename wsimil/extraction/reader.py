"""A process that reads slides: what a damaged file can crash or hang is here, and not in the run.

- Started as `python -m wsimil.extraction.reader`, never forked and never by importing the user's script again.
- Calls come in on stdin, results go out on stdout, pixels lie in memory shared with the run; what a library prints is kept apart.
- Every finished read is a sign of life: a process that is silent for too long is replaced by the run.
- No torch is imported: a reader starts in a second and stays small.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import OrderedDict
from importlib import import_module
from typing import Any

import cv2
import numpy as np

from wsimil.errors import SlideError
from wsimil.slides.cohort import SlideFile
from wsimil.slides.slide import Slide
from wsimil.slides.tiles import TileReader, open_tiles

__all__ = ["Reading"]

_SIGN_EVERY = 0.5
_OPEN_SLIDES = 2


class Reading:
    """What a call may use: slides that stay open between calls, shared memory for pixels, a voice."""

    def __init__(self, memory: mmap.mmap, slot_bytes: int, send) -> None:
        self._memory, self._slot_bytes, self._send = memory, slot_bytes, send
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._slides: OrderedDict[tuple, Slide] = OrderedDict()
        self._tiles: tuple[tuple, TileReader] | None = None
        self._last_sign = 0.0

    def alive(self) -> None:
        """A sign of life, sent at most twice a second."""
        if (now := time.monotonic()) - self._last_sign > _SIGN_EVERY:
            self._last_sign = now
            self._send("alive")

    def slide(self, file: SlideFile, fallback_mpp: float | None, *, open_slides: int = _OPEN_SLIDES) -> Slide:
        """The slide, open. It is closed when `open_slides` others have been asked for since, or when a call failed."""
        try:
            stat = os.stat(file.here)
            key = (file.here, file.mpp, fallback_mpp, stat.st_size, stat.st_mtime_ns)
        except OSError:
            key = (file.here, file.mpp, fallback_mpp)  # opening it says what is wrong
        if key not in self._slides:
            self._slides[key] = Slide(file.here, mpp=file.mpp, fallback_mpp=fallback_mpp, on_read=self.alive)
        self._slides.move_to_end(key)
        while len(self._slides) > open_slides:
            self._slides.popitem(last=False)[1].close()
        return self._slides[key]

    def tiles(self, slide: Slide, *, tile_level0_px: float, tile_px: int, dct_scaled: bool) -> TileReader:
        """The reader of a slide's tiles, kept as long as the slide is open. Where it is not the direct one, a remark says why."""
        key = (slide, tile_level0_px, tile_px, dct_scaled)
        if self._tiles is None or self._tiles[0] != key:
            reader, reason = open_tiles(slide, tile_level0_px=tile_level0_px, tile_px=tile_px, dct_scaled=dct_scaled)
            if reason is not None:
                self._send("note", f"read through OpenSlide or Pillow: {reason}")
            self._tiles = key, reader
        return self._tiles[1]

    def forget_slides(self) -> None:
        self._tiles = None
        while self._slides:
            self._slides.popitem()[1].close()

    def slot(self, tile_px: int) -> tuple[int, np.ndarray]:
        """A free piece of the shared memory as uint8 (n, tile_px, tile_px, 3); waits until the run has emptied one."""
        number, tile_bytes = self._slots.get(), tile_px * tile_px * 3
        count = self._slot_bytes // tile_bytes
        flat = np.frombuffer(self._memory, np.uint8, count * tile_bytes, offset=number * self._slot_bytes)
        return number, flat.reshape(count, tile_px, tile_px, 3)

    def filled(self, slot: int, content: Any) -> None:
        """Hand a slot to the run, with word of what lies in it."""
        self._send("filled", slot, content)


def main() -> None:
    """Serve calls until stdin ends."""
    memory_handle, slot_bytes = int(sys.argv[1]), int(sys.argv[2])
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries must not run into the results
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run; it ends its readers itself
    _die_with_parent()
    cv2.setNumThreads(1)
    lock = threading.Lock()

    def send(*message: Any) -> None:
        with lock:
            pickle.dump(message, results, protocol=pickle.HIGHEST_PROTOCOL)
            results.flush()

    reading = Reading(mmap.mmap(memory_handle, 0), slot_bytes, send)
    calls: queue.SimpleQueue[tuple[str, tuple]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(calls, reading._slots), daemon=True).start()
    warnings.showwarning = lambda message, *_, **__: send("remark", str(message))
    warnings.simplefilter("always", UserWarning)
    for module in ("wsimil.extraction.tile", "wsimil.extraction.pixels"):
        import_module(module)  # before the first call, whose time is watched
    send("ready")
    while True:
        function, arguments = calls.get()
        module, name = function.split(":")
        try:
            send("done", getattr(import_module(module), name)(reading, *arguments))
        except SlideError as error:
            reading.forget_slides()
            send("slide error", type(error).__name__, str(error))
        except BaseException as error:
            reading.forget_slides()
            code = error.errno if isinstance(error, OSError) else None
            send("error", type(error).__name__, str(error), code, traceback.format_exc())


def _listen(calls: queue.SimpleQueue, slots: queue.SimpleQueue) -> None:
    """Sort what the run says; when it says no more, it is gone: end at once, in whatever read the main thread may hang."""
    try:
        while True:
            kind, content = pickle.load(sys.stdin.buffer)
            (calls if kind == "call" else slots).put(content)
    except BaseException:
        os._exit(0)


def _die_with_parent() -> None:
    """On Linux the kernel ends a reader whose run was killed, even inside a read that holds the interpreter."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(0)


if __name__ == "__main__":
    main()

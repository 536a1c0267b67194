"""Tiles for a training run, read while it computes: which tile stands where is the sampler's word, not the readers'.

- Tile k of rank r at step s has the number (s · world + r) · B + k. Two ranks together see what one sees with twice the batch.
- Steps are read in windows of eight: in a window a slide is opened once and its tiles are read side by side, yet every batch mixes
  slides. A slide goes to the same reader each time, which may have it open still.
- A tile that is nearly blank or cannot be read is replaced by the next attempt of its number, at most eight; then the best one seen
  is taken. All are counted.
- A slide on which a reader hangs or crashes, or of which too much cannot be read, is left out from that window on, whatever else
  was under way: what a run sees does not depend on which reader was faster. More than a tenth of the slides is an error.
- With a tile cache a run sees what it sees without.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Hashable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from wsimil.errors import SlideError, SlideReadError, WsimilError
from wsimil.extraction.pool import Call, Done, Failed, Filled, ReaderPool, Remark, reader_count
from wsimil.pretraining.cache import TileCache
from wsimil.pretraining.index import MAX_FAILED
from wsimil.pretraining.sampler import Draw, TileSampler
from wsimil.slides.cohort import SlideFile
from wsimil.slides.slide import Slide
from wsimil.slides.stain import SlideStain
from wsimil.slides.tiles import MAX_INVALID, TileReader, TileWalk, open_tiles

if TYPE_CHECKING:
    from wsimil.extraction.reader import Reading

__all__ = ["MIN_SHOWN", "FeedCounts", "TileBatch", "TileFeed", "shown"]

WINDOW_STEPS = 8
MAX_READS = 8
"""Of one number, before the best of them is taken."""
MIN_SHOWN = 0.25
"""Least share of a tile that shows something. Cells hold half tissue or more already; this is for boxes that reach beyond them."""

_GLASS, _UNFILLED = 220, 16
"""A pixel shows something if its darkest channel is below the one and its lightest above the other. Glass that is greyer or
yellower than that passes for tissue: the mask has decided before, and no scanner's glass may cost it its slides."""

_OPEN_SLIDES = 16
_CALL_TILES = 64
_WORTH_IT_TILES = 40
"""From its JPEG blocks a tile takes about two thirds of the time; the comparison at the beginning takes that of ten."""
_WINDOWS = 3  # in memory: one that the run takes from, two in work
_MIN_UNREADABLE = 3
_MAX_ATTEMPTS = 64


# ---------------------------------------------------------------- in a reader


@dataclass(frozen=True)
class BoxPixels:
    """Word of a piece of memory: consecutive boxes of a call."""

    first: int
    shown: np.ndarray  # (n,) float32; -1 where the box could not be read
    reason: str = ""  # of the first that could not


def read_boxes(
    reading: Reading,
    file: SlideFile,
    boxes_level0_px: np.ndarray,
    tile_px: int,
    one_scale: bool,
    stain: SlideStain | None,
) -> None:
    """Fill memory with boxes of a slide: (n, 3), x, y and side; `one_scale`: all that are ever asked for have one side."""
    slide = reading.slide(file, None, open_slides=_OPEN_SLIDES)
    tiles = _steady_tiles(slide, boxes_level0_px[0, 2], tile_px, len(boxes_level0_px)) if one_scale else None

    def read(place: int) -> np.ndarray:
        x, y, side = boxes_level0_px[place].tolist()
        return slide.read_box(x, y, side, side, size_px=(tile_px, tile_px))

    walk = _Walk(read, SlideReadError) if tiles is None else tiles.walk(boxes_level0_px[:, :2].astype(np.int64))
    _fill(reading, len(boxes_level0_px), tile_px, walk, stain)


def read_pictures(reading: Reading, folder: Path, names: list[str], tile_px: int) -> None:
    """Fill memory with pictures: of each the largest square in its middle."""

    def read(place: int) -> np.ndarray:
        picture = reading.slide(SlideFile(folder / names[place], names[place], names[place]), None)
        side = min(picture.width, picture.height)
        x, y = (picture.width - side) // 2, (picture.height - side) // 2
        return picture.read_box(x, y, side, side, size_px=(tile_px, tile_px))

    _fill(reading, len(names), tile_px, _Walk(read, SlideError))


_steady: OrderedDict[tuple[Slide, float, int], TileReader | int] = OrderedDict()
"""Of a reader: slides, and how they are read; a number: tiles that came from one so far."""


def _steady_tiles(slide: Slide, side_level0_px: float, tile_px: int, n: int) -> TileReader | None:
    """The fastest way to read a slide at one scale, once it has been open for long enough to pay for its beginning."""
    key = slide, side_level0_px, tile_px
    found = _steady.pop(key, 0)
    if isinstance(found, int):
        found = found + n if found < _WORTH_IT_TILES else open_tiles(slide, tile_level0_px=side_level0_px, tile_px=tile_px)[0]
    _steady[key] = found
    while len(_steady) > _OPEN_SLIDES:
        _steady.popitem(last=False)
    return None if isinstance(found, int) else found


class _Walk:
    """One tile after the other, as a `TileWalk`."""

    def __init__(self, read_one: Callable[[int], np.ndarray], error: type[SlideError]) -> None:
        self._read_one, self._error, self._next = read_one, error, 0

    def read(self, out: np.ndarray) -> dict[int, str]:
        failures = {}
        for tile in out:
            try:
                tile[:] = self._read_one(self._next)
            except self._error as reason:
                failures[self._next] = str(reason)
            self._next += 1
        return failures


def _fill(reading: Reading, n: int, tile_px: int, walk: TileWalk, stain: SlideStain | None = None) -> None:
    done = 0
    while done < n:
        slot, memory = reading.slot(tile_px)
        pixels = memory[: n - done]
        failures = walk.read(pixels)
        share = [-1.0 if done + row in failures else shown(tile) for row, tile in enumerate(pixels)]
        if stain is not None:
            pixels[:] = stain(pixels)
        reading.filled(slot, BoxPixels(done, np.array(share, np.float32), next(iter(failures.values()), "")))
        done += len(pixels)


def shown(tile: np.ndarray) -> float:
    """Share of a tile, uint8 (h, w, 3), that is neither glass nor empty."""
    small = cv2.resize(tile, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)  # noise is no tissue
    return float(np.mean((small.min(-1) < _GLASS) & (small.max(-1) > _UNFILLED)))


# ---------------------------------------------------------------- in the run


@dataclass(frozen=True)
class TileBatch:
    """The tiles of one step on one device."""

    step: int
    numbers: np.ndarray  # (B,) int64
    slides: np.ndarray  # (B,) int64, index into `TileIndex.slides`
    pixels: np.ndarray  # uint8 (B, tile_px, tile_px, 3)


@dataclass
class FeedCounts:
    """What a feed came to so far."""

    tiles: int = 0  # handed out
    reads: int = 0  # from files
    cached: int = 0  # taken from the cache instead
    rejected: int = 0  # nearly blank, and read again elsewhere
    unreadable: int = 0  # places that a file lacks
    kept_best: int = 0  # numbers that found nothing better in eight reads
    quarantined: int = 0  # slides
    waited_s: float = 0.0  # by the run, for tiles


@dataclass(eq=False)
class _Window:
    """Steps that are read together."""

    place: int  # step // WINDOW_STEPS
    steps: list[int]
    numbers: np.ndarray  # (n,)
    pixels: np.ndarray  # (n, tile_px, tile_px, 3)
    draws: list[Draw]  # (n,) the attempt under way, or the one that is taken
    done: np.ndarray  # (n,) bool
    best: np.ndarray  # (n,) float32, share shown by what lies in `pixels`; -1: nothing does
    slides: np.ndarray  # (n,) int64, where that is from
    reads: np.ndarray  # (n,) int64, attempts that were read
    again: list[int] = field(default_factory=list)  # rows to read
    calls: int = 0  # under way or queued
    seen: dict[int, dict[tuple[int, int], bool]] = field(default_factory=dict)  # slide → row and attempt → whether it was readable


@dataclass(frozen=True)
class _Job:
    """A call and what it is for."""

    window: _Window
    slide: int
    rows: list[int]
    draws: list[Draw]


class TileFeed:
    """Iterate over it once: a `TileBatch` for each step.

    Args:
        batch_size: tiles of one device in one step.
        steps: to go through; those of a run that goes on begin where it stopped.
        rank, world: which device this is, of how many.
        workers: processes that read; 0: one per CPU core, at most 16.
        read_timeout: seconds without a finished read after which a reader counts as stuck.
        cache_gb: tiles kept on disk once they are read, 10^9 bytes; of use where the sampler shows them again: `distinct` tiles,
            the cells of `per_slide_per_epoch`, pictures.
        cache_folder: where they are kept, a folder of ours: tiles of other recipes in it are removed.
        quarantined: ids of slides to leave out, and why, as a run knew them that goes on.
        out_from: id → the window that they are left out from; from the beginning where it is not said.
        say: receives a line for every slide that is left out.

    Attributes:
        counts: what has happened so far.
        quarantined, out_from: id → why, and from which window on, of slides that are left out.
        rejections: (slides,) tiles of each that were nearly blank or unreadable.
    """

    def __init__(
        self,
        sampler: TileSampler,
        *,
        batch_size: int,
        steps: range,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        read_timeout: float = 120.0,
        cache_gb: float = 0.0,
        cache_folder: str | Path | None = None,
        quarantined: Mapping[str, str] | None = None,
        out_from: Mapping[str, int] | None = None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.sampler, self.steps = sampler, steps
        self.quarantined, self.out_from = dict(quarantined or {}), dict(out_from or {})
        self.counts = FeedCounts(quarantined=len(self.quarantined))
        self.rejections = np.zeros(len(sampler.index.slides), np.int64)
        self._slides = sampler.index.slides
        self._batch_size, self._rank, self._world, self._say = batch_size, rank, world, say
        self._readers, self._timeout = reader_count(workers), read_timeout
        self._cache_gb, self._cache_folder = cache_gb, cache_folder

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Generator[TileBatch, None, None]:
        tile_bytes = self.sampler.tile_px**2 * 3
        with ReaderPool(self._readers, timeout=self._timeout, tile_bytes=tile_bytes) as pool:
            cache = self._open_cache()
            work = _Work(self, pool, cache)
            work.start()
            try:
                for _ in self.steps:
                    began = time.monotonic()
                    batch = work.take()
                    self.counts.waited_s += time.monotonic() - began
                    self.counts.tiles += len(batch.numbers)
                    yield batch
            finally:
                work.stop()
                if cache is not None:
                    cache.close()

    def _open_cache(self) -> TileCache | None:
        if self._cache_gb <= 0 or self._cache_folder is None:
            return None
        side = self.sampler.tile_px
        return TileCache(self._cache_folder, self.sampler.recipe(), tile_px=side, gb=self._cache_gb, say=self._say)

    def numbers_of(self, step: int) -> np.ndarray:
        """(B,) the tiles of a step."""
        return (step * self._world + self._rank) * self._batch_size + np.arange(self._batch_size)


class _Work(threading.Thread):
    """Keeps the readers busy, in a thread: the run takes what is ready."""

    def __init__(self, feed: TileFeed, pool: ReaderPool, cache: TileCache | None) -> None:
        super().__init__(daemon=True, name="wsimil-tiles")
        self._feed, self._pool, self._cache = feed, pool, cache
        self._sampler, self._slides = feed.sampler, feed._slides
        known = {slide.slide_id: place for place, slide in enumerate(self._slides)}
        # slide → the window it is left out from
        self._out = {known[name]: feed.out_from.get(name, -1) for name in feed.quarantined if name in known}
        self._reads, self._unreadable = np.zeros((2, len(self._slides)), np.int64)
        self._reasons: dict[int, str] = {}  # slide → why its first tile that could not be read could not
        self._to_come = deque(_windows_of(feed.steps))
        self._open: deque[_Window] = deque()
        self._queues: list[deque[Hashable]] = [deque() for _ in range(feed._readers)]  # of jobs, per reader
        self._jobs: dict[Hashable, _Job] = {}
        self._names = count()
        self._scratch = np.empty((feed.sampler.tile_px, feed.sampler.tile_px, 3), np.uint8)
        self._ready: deque[TileBatch] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._stopped = False

    # -------------------------------- from the run's thread

    def take(self) -> TileBatch:
        """The next batch, as soon as it is there."""
        with self._changed:
            while not self._ready and self._error is None:
                self._changed.wait()
            if self._error is not None and not self._ready:
                raise self._error
            batch = self._ready.popleft()
            self._changed.notify_all()
            return batch

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self.join()

    # -------------------------------- in the thread

    def run(self) -> None:
        try:
            while not self._stopped and (self._to_come or self._open):
                self._turn()
        except BaseException as error:  # the run's thread raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _turn(self) -> None:
        while self._to_come and self._room():
            self._begin(self._to_come.popleft())
        self._feed_readers()
        if self._pool.busy:
            event = self._pool.next(0.2)
            if event is not None:
                self._take(event)
        elif not self._open:  # the run has more than it can use
            with self._changed:
                if not self._stopped and not self._room():
                    self._changed.wait(1.0)
        while self._open and self._open[0].done.all():
            self._finish(self._open.popleft())

    def _room(self) -> bool:
        waiting = -(-len(self._ready) // WINDOW_STEPS)
        return len(self._open) + waiting < _WINDOWS

    def _begin(self, steps: list[int]) -> None:
        numbers = np.concatenate([self._feed.numbers_of(step) for step in steps])
        n, side = len(numbers), self._sampler.tile_px
        window = _Window(
            steps[0] // WINDOW_STEPS,
            steps,
            numbers,
            pixels=np.empty((n, side, side, 3), np.uint8),
            draws=[],
            done=np.zeros(n, bool),
            best=np.full(n, -1, np.float32),
            slides=np.full(n, -1, np.int64),
            reads=np.zeros(n, np.int64),
        )
        self._open.append(window)
        window.draws = [self._draw(window, int(number), 0) for number in numbers]
        window.again = list(range(n))
        self._queue(window)

    def _draw(self, window: _Window, number: int, attempt: int) -> Draw:
        """This attempt, or the first one after it on a slide that is not left out."""
        for later in range(attempt, _MAX_ATTEMPTS):
            draw = self._sampler.draw(number, later)
            if not self._left_out(draw.slide, window):
                return draw
        raise WsimilError(f"tile {number}: {_MAX_ATTEMPTS} draws fell on slides that are left out: {self._names_out()}")

    def _left_out(self, slide: int, window: _Window) -> bool:
        return slide in self._out and self._out[slide] <= window.place

    def _from_cache(self, window: _Window, row: int) -> bool:
        draw = window.draws[row]
        key = None if self._cache is None else self._sampler.cache_key(draw)
        if self._cache is None or key is None:
            return False
        share = self._cache.read(key, self._scratch)
        if share is not None:
            self._feed.counts.cached += 1
            self._judge(window, row, draw, self._scratch, share)
        return share is not None

    def _queue(self, window: _Window) -> None:
        """Calls for all rows that have to be read, slide by slide."""
        by_slide: dict[int, list[int]] = {}
        while window.again:
            row = window.again.pop()
            if not self._from_cache(window, row):
                by_slide.setdefault(window.draws[row].slide, []).append(row)
        for slide, rows in by_slide.items():
            rows.sort(key=lambda row: (window.draws[row].y_level0_px, window.draws[row].x_level0_px))  # neighbours share blocks
            for first in range(0, len(rows), _CALL_TILES):
                part = rows[first : first + _CALL_TILES]
                name = next(self._names)
                self._jobs[name] = _Job(window, slide, part, [window.draws[row] for row in part])
                # pictures are files of their own; a slide is open where it was read before
                place = name if self._slides[slide].pictures else slide
                queue = self._queues[place % len(self._queues)]
                (queue.appendleft if window is self._open[0] else queue.append)(name)  # what the run waits for comes first
                window.calls += 1

    def _feed_readers(self) -> None:
        for place in self._pool.idle:
            name = self._next_job(place)
            if name is None:
                return
            self._pool.start(Call(name, *self._call(self._jobs[name])), place)

    def _next_job(self, place: int) -> Hashable | None:
        """Of a reader: one of its own slides, or what others are behind with."""
        while queue := self._queues[place] or max(self._queues, key=len):
            name = queue.popleft()
            job = self._jobs[name]
            if not self._left_out(job.slide, job.window):
                return name
            self._end(name)  # it was drawn anew
        return None

    def _end(self, name: Hashable) -> None:
        """A call is over, or never began."""
        window = self._jobs.pop(name).window
        window.calls -= 1
        if window.calls == 0 and window.again:
            self._queue(window)

    def _call(self, job: _Job) -> tuple[str, tuple]:
        slide, side = self._slides[job.slide], self._sampler.tile_px
        if slide.pictures:
            names = [slide.pictures[draw.cell] for draw in job.draws]
            return f"{__name__}:read_pictures", (slide.file.path, names, side)
        boxes = [(draw.x_level0_px, draw.y_level0_px, self._sampler.side_level0_px(draw)) for draw in job.draws]
        finest, coarsest = self._sampler.mpp_range
        return f"{__name__}:read_boxes", (slide.file, np.array(boxes), side, finest == coarsest, slide.stain)

    def _take(self, event: Done | Failed | Filled | Remark) -> None:
        job = self._jobs[event.call.key]
        if isinstance(event, Filled):
            try:
                self._pixels(job, event.content, event.memory)
            finally:
                self._pool.release(event)
        elif isinstance(event, Done | Failed):
            if isinstance(event, Failed):
                self._failed(job, event.error)
            self._end(event.call.key)

    def _pixels(self, job: _Job, content: BoxPixels, memory: np.ndarray) -> None:
        side = self._sampler.tile_px
        if content.reason:
            self._reasons.setdefault(job.slide, content.reason)
        tiles = memory[: len(content.shown) * side * side * 3].reshape(-1, side, side, 3)
        for place, (tile, share) in enumerate(zip(tiles, content.shown.tolist(), strict=True), start=content.first):
            draw = job.draws[place]
            self._feed.counts.reads += 1
            if self._cache is not None and share >= 0 and (key := self._sampler.cache_key(draw)) is not None:
                self._cache.write(key, tile, share)
            self._judge(job.window, job.rows[place], draw, tile, share)

    def _judge(self, window: _Window, row: int, draw: Draw, tile: np.ndarray | None, share: float) -> None:
        """A tile is there, and shows so much; a share below 0: it could not be read."""
        if draw is not window.draws[row] or window.done[row]:  # of a draw that was given up
            return
        counts, slide = self._feed.counts, self._slides[draw.slide]
        window.reads[row] += 1
        window.seen.setdefault(draw.slide, {})[row, draw.attempt] = share >= 0
        if tile is not None and share > window.best[row]:
            window.pixels[row], window.best[row], window.slides[row] = tile, share, draw.slide
        window.done[row] = share >= (0 if slide.pictures else MIN_SHOWN)  # pictures were chosen by somebody
        if window.done[row]:
            return
        counts.unreadable += share < 0
        counts.rejected += share >= 0
        self._feed.rejections[draw.slide] += 1
        if window.reads[row] < MAX_READS:
            window.draws[row] = self._draw(window, draw.number, draw.attempt + 1)
            window.again.append(row)
        elif window.best[row] < 0:
            raise WsimilError(
                f"tile {draw.number}: none of {MAX_READS} draws could be read, the last one on {slide.slide_id} "
                f"({' '.join(self._reasons.get(draw.slide, 'no reason given').split())}); is the folder still there?"
            )
        else:
            counts.kept_best += 1
            window.done[row] = True

    def _failed(self, job: _Job, error: Exception) -> None:
        """A call broke off."""
        if self._left_out(job.slide, job.window):
            return
        if not self._slides[job.slide].pictures:
            self._leave_out(job.slide, job.window.place, str(error))
        else:  # one picture among others, and nobody says which
            self._reasons.setdefault(job.slide, str(error))
            for row, draw in zip(job.rows, job.draws, strict=True):
                self._judge(job.window, row, draw, None, -1.0)

    def _leave_out(self, slide: int, place: int, reason: str) -> None:
        """Without this slide from a window on: what was drawn of it there is drawn anew."""
        feed, name = self._feed, self._slides[slide].slide_id
        if slide not in self._out:
            feed.quarantined[name] = " ".join(reason.split())
            feed.counts.quarantined = len(feed.quarantined)
            feed._say(f"{name}: left out from step {place * WINDOW_STEPS}: {feed.quarantined[name]}")
        self._out[slide] = feed.out_from[name] = min(place, self._out.get(slide, place))
        if len(self._out) > MAX_FAILED * len(self._slides):
            raise WsimilError(
                f"{len(self._out)} of {len(self._slides)} slides could not be read any more, more than a tenth: {self._names_out()}"
            )
        for window in self._open:
            if not self._left_out(slide, window):
                continue
            for row, number in enumerate(window.numbers.tolist()):
                tried = range(window.draws[row].attempt + 1)
                if slide == window.slides[row] or any(self._sampler.draw(number, attempt).slide == slide for attempt in tried):
                    window.done[row], window.best[row], window.slides[row], window.reads[row] = False, -1, -1, 0
                    window.draws[row] = self._draw(window, number, 0)
                    if row not in window.again:
                        window.again.append(row)
            if window.calls == 0 and window.again:
                self._queue(window)

    def _names_out(self) -> str:
        return ", ".join(f"{name} ({reason})" for name, reason in list(self._feed.quarantined.items())[:5])

    def _finish(self, window: _Window) -> None:
        size = self._feed._batch_size
        with self._changed:
            for place, step in enumerate(window.steps):
                rows = slice(place * size, (place + 1) * size)
                self._ready.append(TileBatch(step, window.numbers[rows], window.slides[rows], window.pixels[rows]))
            self._changed.notify_all()
        for slide, seen in window.seen.items():
            self._reads[slide] += len(seen)
            self._unreadable[slide] += sum(not readable for readable in seen.values())
            lost = self._unreadable[slide]
            if not self._slides[slide].pictures and lost >= _MIN_UNREADABLE and lost > MAX_INVALID * self._reads[slide]:
                self._leave_out(slide, window.place + 1, f"{lost} of {self._reads[slide]} tiles cannot be read")


def _windows_of(steps: range) -> list[list[int]]:
    """Steps by window; windows begin at multiples of their length, wherever a run begins."""
    windows: list[list[int]] = []
    for step in steps:
        if not windows or windows[-1][0] // WINDOW_STEPS != step // WINDOW_STEPS:
            windows.append([])
        windows[-1].append(step)
    return windows

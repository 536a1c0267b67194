"""A run over many slides: readers are kept busy, rows are kept, and nothing that happens to one slide stops the others.

- A stage says what readers do for a slide and what becomes of the pixels; the order of work is decided here, once for all stages.
- The next slides are prepared while pixels of the last ones are still on their way: nothing waits between slides.
- Where slides come from is not known here: a desk hands them out.
"""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from wsimil.config import JobConfig
from wsimil.errors import SlideError, SlideStuckError, StaleBagError, WsimilError
from wsimil.extraction.claims import Claims
from wsimil.extraction.desk import BookedDesk, Desk, no_more_room
from wsimil.extraction.job import Books, Job, Row
from wsimil.extraction.pool import Call, Done, Failed, Filled, ReaderCrash, ReaderPool, Remark, reader_count
from wsimil.extraction.staging import staged
from wsimil.files import write_text
from wsimil.progress import progress
from wsimil.slides.cohort import SlideFile

__all__ = ["Stage", "run_slides", "work_here"]


class Stage(ABC):
    """What is done with slides. Methods are called in the run's own process; calls are carried out by readers.

    A stage that reads no pixels is done with a slide when `begin` returns its row, and leaves the rest as it is.
    """

    name: str
    request: Mapping[str, Any]
    """The settings that results depend on: a failure is remembered for them and the slide's content."""
    device: str = "cpu"
    """What it was asked to compute on: auto, cpu, cuda …"""
    readers: int = 1
    """How many processes read for it."""

    @abstractmethod
    def first_call(self, file: SlideFile) -> tuple[str, tuple]:
        """Function `module:name` and arguments with which a slide begins."""

    @abstractmethod
    def begin(self, file: SlideFile, value: Any) -> Row | Sequence[tuple[str, tuple]]:
        """What the first call returned → the finished slide, or the calls that read its pixels."""

    def pixels(self, file: SlideFile, content: Any, memory: np.ndarray) -> int:
        """A reader has filled `memory`, which is used again when this returns. Returns the number of tiles in it."""
        raise NotImplementedError

    def flush(self) -> None:  # noqa: B027
        """No more pixels will come for now: finish what is there."""

    def ready(self) -> Sequence[SlideFile]:
        """Slides of which everything is there, since this was last asked."""
        return ()

    def end(self, file: SlideFile) -> Row:
        """Write what was made of a slide that is ready."""
        raise NotImplementedError

    def drop(self, file: SlideFile) -> None:  # noqa: B027
        """The slide failed: forget it."""

    def remember(self, file: SlideFile, error: SlideError) -> None:  # noqa: B027
        """The slide failed by its own fault, after its first call."""

    def reads_much(self, file: SlideFile) -> bool:
        """Whether most of the file may be read: only then is it worth a copy on a faster disk."""
        return False


@dataclass
class _Started:
    """A slide in work."""

    file: SlideFile
    started: float
    begun: bool = False
    remarks: list[str] = field(default_factory=list)


def run_slides(
    job: Job, slides: list[SlideFile], stage: Stage, *, config: JobConfig, tile_bytes: int = 1, quiet: bool = False
) -> list[Row]:
    """Take every slide of the shard through a stage, whatever happens to single slides; rows in the order of the slides.

    Args:
        tile_bytes: size of one tile, for the shared memory.

    Raises:
        WsimilError: readers cannot be started, or the folder can hold no more.
        OSError: the folder cannot be written to.
        KeyboardInterrupt: after the status was written.
    """
    try:
        return _run_slides(job, slides, stage, config, tile_bytes, quiet)
    except OSError as error:
        raise (no_more_room(job, error) or error) from error


def _run_slides(job: Job, slides: list[SlideFile], stage: Stage, config: JobConfig, tile_bytes: int, quiet: bool) -> list[Row]:
    shard = config.shard_of()
    mine = [slide for position, slide in enumerate(slides) if position % shard[1] == shard[0] - 1]
    books = Books(job, stage=stage.name, request=stage.request, n_slides=len(mine), shard=shard)
    books.leave_to_others([slide for position, slide in enumerate(slides) if position % shard[1] != shard[0] - 1], shard)
    bar = progress(mine, stage.name, unit="slide", quiet=quiet)
    try:
        with Claims(job.claims) as claims:
            desk = BookedDesk(job, mine, claims, books, bar, partial(_say, bar, quiet))
            if config.engine == "ray":
                from wsimil.extraction.ray_engine import work_on_ray  # late: it needs this module

                work_on_ray(desk, job, stage, config, tile_bytes=tile_bytes)
            else:
                work_here(desk, job, stage, config, count=min(reader_count(config.workers), 4 * len(mine)), tile_bytes=tile_bytes)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong first is what is told
            books.close()
        raise
    finally:
        bar.close()
    books.close()
    return [desk.rows[slide.slide_id] for slide in mine]


def work_here(desk: Desk, job: Job, stage: Stage, config: JobConfig, *, count: int, tile_bytes: int) -> None:
    """Work on the slides of a desk with `count` readers on this machine until it is over."""
    stage.readers = count
    with (
        staged(desk, stage.reads_much, config) as nearer,
        ReaderPool(count, timeout=config.read_timeout, tile_bytes=tile_bytes) as pool,
    ):
        _Work(job, stage, nearer, pool).work()
        if pool.lost:  # what they were writing
            job.sweep()


def _say(bar: Any, quiet: bool, text: str) -> None:
    if not quiet and sys.stderr.isatty():
        bar.write(text, file=sys.stderr)
    elif not quiet:
        print(text, file=sys.stderr, flush=True)


class _Work:
    """Slides of a desk through the readers of this machine and a stage."""

    def __init__(self, job: Job, stage: Stage, desk: Desk, pool: ReaderPool) -> None:
        self._job, self._stage, self._desk, self._pool = job, stage, desk, pool
        self._reading: deque[Call] = deque()  # pixels to read, in the order of the slides
        self._open: dict[str, _Started] = {}

    def work(self) -> None:
        while self._open or not self._desk.over:
            self._feed()
            if self._pool.busy:
                event = self._pool.next(1.0)
                if event is not None:
                    self._take(event)
            elif self._open:  # everything is read; what is missing lies in a batch that no more pixels will fill
                self._stage.flush()
            elif not self._desk.over:
                self._desk.wait()
            for file in self._stage.ready():
                slide = self._open[file.slide_id]
                self._guarded(slide, lambda slide=slide: self._finish(self._stage.end(slide.file)))

    def _feed(self) -> None:
        """Give idle readers work: pixels of slides in work first, then the next slide."""
        while self._pool.has_idle:
            if self._reading:
                self._pool.start(self._reading.popleft())
            elif (file := self._desk.next()) is not None:
                self._open[file.slide_id] = _Started(file, time.monotonic())
                self._pool.start(Call(file.slide_id, *self._stage.first_call(file)))
            else:
                break

    def _take(self, event: Done | Failed | Filled | Remark) -> None:
        slide = self._open.get(str(event.call.key))
        if slide is None:  # of a slide that has failed meanwhile
            if isinstance(event, Filled):
                self._pool.release(event)
            return
        self._guarded(slide, lambda: self._understand(slide, event))

    def _understand(self, slide: _Started, event: Done | Failed | Filled | Remark) -> None:
        if isinstance(event, Remark):
            if event.text not in slide.remarks:
                slide.remarks.append(event.text)
                self._desk.remark(slide.file.slide_id, event.text, loud=event.loud)
        elif isinstance(event, Filled):
            try:
                n_tiles = self._stage.pixels(slide.file, event.content, event.memory)
            finally:
                self._pool.release(event)
            self._desk.count(n_tiles)
        elif isinstance(event, Failed):
            raise event.error
        else:
            self._returned(slide, event.value)

    def _guarded(self, slide: _Started, step: Callable[[], None]) -> None:
        """What goes wrong with a slide is the end of that slide alone."""
        try:
            step()
        except SlideError as error:
            if slide.begun and not isinstance(error, StaleBagError | SlideStuckError):
                self._stage.remember(slide.file, error)
            self._fail(slide, str(error))
        except WsimilError:
            raise  # no slide's fault
        except Exception as error:  # one slide must not end the run, whatever a library throws
            self._unforeseen(slide, error)

    def _returned(self, slide: _Started, value: Any) -> None:
        if slide.begun:
            return
        slide.begun = True
        result = self._stage.begin(slide.file, value)
        if isinstance(result, Row):
            self._finish(result)
        else:
            self._reading.extend(Call(slide.file.slide_id, *call) for call in result)

    def _unforeseen(self, slide: _Started, error: Exception) -> None:
        if (stop := no_more_room(self._job, error)) is not None:
            raise stop from error
        reason = str(error) if isinstance(error, OSError | ReaderCrash) else f"{type(error).__name__}: {error}"
        trace = error.trace if isinstance(error, ReaderCrash) else "".join(traceback.format_exception(error))
        try:
            write_text(self._job.log(slide.file.slide_id), f"{slide.file.slide_id} ({slide.file.path})\n{trace}")
            reason += f" (see logs/{slide.file.slide_id}.log)"
        except OSError:
            pass  # the row still says what happened
        self._fail(slide, reason)

    def _fail(self, slide: _Started, reason: str) -> None:
        file = slide.file
        self._reading = deque(call for call in self._reading if call.key != file.slide_id)
        self._stage.drop(file)
        self._finish(Row(file.name, file.slide_id, "failed", " ".join(file.with_its_path(reason).split())))

    def _finish(self, row: Row) -> None:
        started = self._open[row.slide_id].started
        row = Row(row.slide, row.slide_id, row.status, row.reason, row.n_tiles, time.monotonic() - started)
        self._desk.finish(row)
        del self._open[row.slide_id]

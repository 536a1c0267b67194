"""Where a run gets its slides from and leaves what became of them: claims, books and the progress view stand behind a desk.

- A slide that another run has claimed is left to it and looked at again at the end.
- Desks can stand before one another: copies on a fast disk (`staging`) and workers elsewhere (`ray_engine`) are made that way.
- A folder that can hold no more (disk full, read-only) stops the run at once: the hours after it would be lost.
"""

from __future__ import annotations

import errno
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from wsimil.errors import WsimilError
from wsimil.extraction.claims import TTL_S, Claims
from wsimil.extraction.job import Books, Job, Row
from wsimil.slides.cohort import SlideFile

__all__ = ["NO_MORE_SPACE", "BookedDesk", "Desk", "no_more_room"]

_MOST_BYTES = 255 - len("_patches.h5")
"""Of an id: file systems end names at 255 bytes."""

NO_MORE_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_LOOK_AGAIN_S = 1.0


class Desk(ABC):
    """Where slides come from, and where what became of them goes."""

    @property
    @abstractmethod
    def over(self) -> bool:
        """No slide will come any more."""

    @abstractmethod
    def next(self) -> SlideFile | None:
        """A slide to work on; None while there is none. Each one is given back by `finish`."""

    @abstractmethod
    def wait(self) -> None:
        """Nothing is in work: wait a moment for a slide."""

    @abstractmethod
    def remark(self, slide_id: str, text: str, *, loud: bool = True) -> None:
        """Something a person should know about a slide."""

    @abstractmethod
    def count(self, n_tiles: int) -> None:
        """So many more tiles have been read."""

    @abstractmethod
    def finish(self, row: Row) -> None:
        """A slide is finished."""


class BookedDesk(Desk):
    """The desk of a run on a job folder: slides that no other run has claimed, rows into the books, the progress bar."""

    def __init__(
        self, job: Job, slides: Sequence[SlideFile], claims: Claims, books: Books, bar: Any, say: Callable[[str], None]
    ) -> None:
        self._job, self._claims, self._books, self._bar = job, claims, books, bar
        self.say = say
        self._waiting = deque(slides)
        self._elsewhere: deque[SlideFile] = deque()  # claimed by other runs
        self._told = False
        self._n_tiles, self._since = 0, time.monotonic()
        self.rows: dict[str, Row] = {}

    @property
    def over(self) -> bool:
        return not self._waiting and not self._elsewhere

    @property
    def n_waiting(self) -> int:
        """Slides that nobody has begun, as far as is known."""
        return len(self._waiting)

    def sort(self, key: Callable[[SlideFile], Any]) -> None:
        """Hand out slides in this order."""
        self._waiting = deque(sorted(self._waiting, key=key))

    def next(self) -> SlideFile | None:
        while self._waiting:
            file = self._waiting.popleft()
            if len(os.fsencode(file.slide_id)) > _MOST_BYTES:
                why = f"its id has more than the {_MOST_BYTES} bytes of a file name; give a slide table with a slide_id column"
                self.finish(Row(file.name, file.slide_id, "failed", why))
                continue
            if self._claims.take(file.slide_id):
                return file
            self._elsewhere.append(file)
        return None

    def wait(self) -> None:
        if not self._elsewhere:
            return
        if not self._told:
            first = self._elsewhere[0].slide_id
            self.say(
                f"{len(self._elsewhere)} slides are in work by {self._claims.holder(first)}; waiting for it "
                f"(a run that died elsewhere is noticed after {TTL_S:.0f} s)"
            )
            self._told = True
        time.sleep(_LOOK_AGAIN_S)
        self._waiting, self._elsewhere = self._elsewhere, deque()

    def remark(self, slide_id: str, text: str, *, loud: bool = True) -> None:
        self._books.remark(slide_id, text)
        if loud:
            self.say(f"{slide_id}: {text}")

    def count(self, n_tiles: int) -> None:
        self._n_tiles += n_tiles
        rate = self._n_tiles / (time.monotonic() - self._since)
        self._bar.set_postfix_str(f"{self._n_tiles:,} tiles, {rate:.0f} tiles/s", refresh=False)
        self._bar.update(0)  # within one large slide, too

    def finish(self, row: Row) -> None:
        try:
            self._books.add(row)
        except OSError as error:  # no slide's fault
            raise no_more_room(self._job, error) or WsimilError(f"{self._job.folder}: cannot be written to: {error}") from error
        self.rows[row.slide_id] = row
        self._claims.release(row.slide_id)
        if row.status == "failed":
            self.say(f"{row.slide_id}: failed: {row.reason}")
        self._bar.update()


def no_more_room(job: Job, error: BaseException) -> WsimilError | None:
    """The end of a run whose folder can hold no more; None for any other error."""
    code = getattr(error, "errno", None)
    if code not in NO_MORE_SPACE:
        return None
    way_out = (
        "choose another --out" if code == errno.EROFS else "make room and run the same command again: it goes on where it stopped"
    )
    return WsimilError(f"{job.folder}: {os.strerror(code)}: nothing more can be written there; {way_out}")

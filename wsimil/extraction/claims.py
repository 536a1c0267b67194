"""Who works on which slide: runs on one folder keep out of each other's way.

- A claim is a small file made with O_EXCL; its age is refreshed while its run lives, and it goes when the slide is finished.
- A claim of a dead process of this machine is taken over at once, any other when it has not been refreshed for `TTL_S`, by this
  run's own clock: clocks of two machines need not agree.
- Nothing depends on it but time: files appear atomically, so a slide that is done twice is the same slide.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from wsimil.files import folder_lock, machine, process_start

__all__ = ["TTL_S", "Claims"]

TTL_S = 120.0
_REFRESH_S = 20.0
_EMPTY_TTL_S = 2.0
"""A claim is written a moment after it is made: an empty one's run was killed in between."""

_LIVE: set[str] = set()
"""Tokens of this process's claims: runs in two threads of one process keep apart, too."""


class Claims:
    """The claims of one run on the slides of a job folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mine: dict[str, tuple[Path, str]] = {}  # slide id → claim, its token
        self._seen: dict[str, tuple[Any, float]] = {}  # slide id → (what its claim looked like, since when)
        self._stop = threading.Event()
        self._refresher: threading.Thread | None = None
        me = {"machine": machine(), "pid": os.getpid(), "process_start": process_start(os.getpid())}
        jobs = {key.lower(): os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID") if key in os.environ}
        self._me = {**me, **jobs}

    def take(self, slide_id: str) -> bool:
        """Claim a slide; False while another living run has it."""
        path = self._folder / f"{slide_id}.json"
        if token := self._create(path):
            self._keep(slide_id, path, token)
            return True
        if not self._abandoned(slide_id, path):
            return False
        with folder_lock(self._folder.parent / "logs"):
            # another run may have been faster: only what was judged is removed
            if not self._abandoned(slide_id, path):
                return False
            path.unlink(missing_ok=True)
            token = self._create(path)
        if token:
            self._keep(slide_id, path, token)
        return token is not None

    def holder(self, slide_id: str) -> str:
        """Who has a slide, for a message."""
        try:
            claim = _understood((self._folder / f"{slide_id}.json").read_bytes())
        except OSError:
            claim = {}
        return f"process {claim.get('pid', '?')} on {str(claim.get('machine', '?')).split('/')[0]}"

    def release(self, slide_id: str) -> None:
        if slide_id in self._mine:
            path, token = self._mine.pop(slide_id)
            _LIVE.discard(token)
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release all."""
        self._stop.set()
        for slide_id in list(self._mine):
            self.release(slide_id)
        with contextlib.suppress(OSError):  # not made yet, or another run is at work
            self._folder.rmdir()

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _create(self, path: Path) -> str | None:
        """The token of a new claim; None where there is one."""
        token = secrets.token_hex(8)
        content = json.dumps({**self._me, "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "token": token})
        for _ in range(2):
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return None
            except FileNotFoundError:  # the last of the others has tidied up
                self._folder.mkdir(parents=True, exist_ok=True)
                continue
            _LIVE.add(token)  # before anybody can read it
            try:
                os.write(handle, content.encode())
            except BaseException:
                _LIVE.discard(token)
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(handle)
            return token
        return None

    def _keep(self, slide_id: str, path: Path, token: str) -> None:
        self._mine[slide_id] = path, token
        self._seen.pop(slide_id, None)
        if self._refresher is None:
            self._refresher = threading.Thread(target=self._refresh, name="claims", daemon=True)
            self._refresher.start()

    def _refresh(self) -> None:
        while not self._stop.wait(_REFRESH_S):
            for path, _ in list(self._mine.values()):
                with contextlib.suppress(OSError):  # released this moment, or the network is away: the slide's own write tells
                    os.utime(path)

    def _abandoned(self, slide_id: str, path: Path) -> bool:
        """Whether the run that holds a claim is gone."""
        try:
            looks = (path.stat().st_mtime_ns, path.read_bytes())
        except OSError:
            return False  # released this moment: the next try gets it
        claim = _understood(looks[1])
        if claim.get("machine") == self._me["machine"]:
            pid = int(claim.get("pid", 0))
            if process_start(pid) != claim.get("process_start"):
                return True
            if pid == os.getpid() and claim.get("token") not in _LIVE:
                return True  # this process, in a run that ended without tidying up
        before, since = self._seen.get(slide_id, (None, 0.0))
        if before != looks:
            self._seen[slide_id] = (looks, time.monotonic())
            return False
        return time.monotonic() - since > (TTL_S if looks[1] else _EMPTY_TTL_S)


def _understood(content: bytes) -> dict[str, Any]:
    try:
        claim = json.loads(content)
    except ValueError:
        return {}
    return claim if isinstance(claim, dict) else {}

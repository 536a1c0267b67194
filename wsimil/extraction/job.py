"""A job folder: where each file of a slide lies, and the books of its runs.

- One row per slide in `status.csv`, rewritten whole and atomically; rows of other runs and of slides that are not in this run stay.
- A slide that fails is a row with a reason; its traceback is in `logs/<slide_id>.log` when the reason was not foreseen.
- A slide that failed by its own fault is not tried again while neither it nor the request changes, unless asked.
- `logs/manifest.jsonl` gains a line per run and per slide and is never rewritten.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsimil.errors import CompanionError, SlideError, StaleBagError
from wsimil.files import atomic_path, folder_lock, hash_of, machine, mark_output, read_json, sweep_temporary_files, write_json
from wsimil.slides.cohort import SlideFile
from wsimil.units import nominal_magnification

if TYPE_CHECKING:
    from wsimil.bags.dataset import BagFolder

__all__ = ["Books", "Job", "Row", "failure_key", "read_status", "slides_of_job"]

_WRITE_EVERY_S = 2.0
_WRITE_SHARE = 0.05
"""Most of a run's time that goes into its status: a hundred thousand rows take seconds to read and write."""
_PACKAGES = ("wsimil", "torch", "timm", "openslide-python", "openslide-bin", "tifffile", "imagecodecs", "h5py", "numpy")


@dataclass(frozen=True)
class Row:
    """What became of a slide: a line of `status.csv`."""

    slide: str
    slide_id: str
    status: str  # done, empty, failed, skipped
    reason: str = ""
    n_tiles: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """Paths of a job folder; see docs/files.md."""

    folder: Path

    def geometry_folder(self, mpp: float, tile_px: int, overlap_px: int) -> Path:
        return self.folder / f"{nominal_magnification(mpp)}x_{tile_px}px_{overlap_px}px_overlap"

    def tissue(self, slide_id: str) -> Path:
        return self.folder / "tissue" / f"{slide_id}.geojson"

    def overview(self, slide_id: str) -> Path:
        return self.folder / "overviews" / f"{slide_id}.jpg"

    def log(self, slide_id: str) -> Path:
        return self.folder / "logs" / f"{slide_id}.log"

    def failure(self, slide_id: str) -> Path:
        return self.folder / "logs" / "failed" / f"{slide_id}.json"

    @property
    def claims(self) -> Path:
        return self.folder / "claims"

    @property
    def status(self) -> Path:
        return self.folder / "status.csv"

    @property
    def manifest(self) -> Path:
        return self.folder / "logs" / "manifest.jsonl"

    def sweep(self) -> None:
        """Remove the unfinished files of processes that are gone."""
        for folder in {path.parent for path in self.folder.rglob(".*.tmp-*")}:
            sweep_temporary_files(folder)

    def remembered_failure(self, slide_id: str, key: str) -> str | None:
        """Why a slide failed in an earlier run, if neither it nor the request has changed since."""
        try:
            memory = read_json(self.failure(slide_id))
            return str(memory["reason"]) if memory["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def remember_failure(self, slide_id: str, key: str, reason: str) -> None:
        write_json(self.failure(slide_id), {"key": key, "reason": reason})

    @contextmanager
    def attempt(self, file: SlideFile, request: Mapping[str, Any], *, retry_failed: bool) -> Iterator[str]:
        """Yields the slide's fingerprint; a slide that fails inside by its own fault is remembered, and refused the next time.

        Raises:
            SlideError: it failed before, and neither it nor the request has changed since.
        """
        try:
            slide_fingerprint = file.fingerprint()
        except OSError:
            slide_fingerprint = ""  # missing, or not to be read: opening it says so better
        key = failure_key(request, file, slide_fingerprint)
        if slide_fingerprint and not retry_failed and (reason := self.remembered_failure(file.slide_id, key)):
            raise SlideError(f"{reason} (as before; --retry-failed tries again)")
        try:
            yield slide_fingerprint
        except SlideError as error:
            if slide_fingerprint and not isinstance(error, StaleBagError | CompanionError):
                self.remember_failure(file.slide_id, key, file.with_its_path(str(error)))
            raise
        self.failure(file.slide_id).unlink(missing_ok=True)


def failure_key(request: Mapping[str, Any], file: SlideFile, slide_fingerprint: str) -> str:
    """For which settings and which content a failure is remembered."""
    return hash_of({"request": request, "mpp": file.mpp, "slide": slide_fingerprint})


def read_status(path: Path) -> dict[str, Row]:
    """Rows of a `status.csv` by slide id; none where there is no file, or none that can be read: the next run writes it anew."""
    try:
        with open(path, newline="", encoding="utf-8") as handle:
            return {
                row["slide_id"]: Row(
                    row["slide"], row["slide_id"], row["status"], row["reason"], int(row["n_tiles"]), float(row["seconds"])
                )
                for row in csv.DictReader(handle)
            }
    except (FileNotFoundError, KeyError, TypeError, ValueError, csv.Error):
        return {}


def slides_of_job(bags: BagFolder) -> dict[str, Row]:
    """Rows of the job folder that a folder of bags lies in; none for bags that lie elsewhere."""
    for folder in (Path(os.path.abspath(bags.folder)), bags.folder.resolve()):  # as it is called, and where a link leads
        if rows := read_status(folder.parent.parent / "status.csv"):
            return rows
    return {}


class Books:
    """What one run writes about itself into a job folder: status rows and manifest lines, beside those of other runs.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, job: Job, *, stage: str, request: Mapping[str, Any], n_slides: int, shard: tuple[int, int]) -> None:
        self._job, self._stage = job, stage
        self._run = f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"
        self._rows: dict[str, Row] = {}
        self._last_write = self._started = time.monotonic()
        self._write_took = 0.0
        for folder in (job.folder, job.folder / "overviews"):
            mark_output(folder)
        job.sweep()
        self._before = read_status(job.status)
        self._line(
            "start",
            {"request": dict(request), "n_slides": n_slides, "shard": f"{shard[0]}/{shard[1]}"}
            | {"machine": machine(), "pid": os.getpid(), "python": platform.python_version(), "packages": _versions()},
        )

    def add(self, row: Row) -> None:
        """A slide of this run is finished."""
        self._rows[row.slide_id] = row
        self._line("slide", asdict(row))
        if time.monotonic() - self._last_write > max(_WRITE_EVERY_S, self._write_took / _WRITE_SHARE):
            self._write()

    def leave_to_others(self, files: list[SlideFile], shard: tuple[int, int]) -> None:
        """Slides of other shards are rows too, until their own run says more."""
        for file in files:
            if file.slide_id not in self._before:
                reason = f"another shard's (this is {shard[0]}/{shard[1]})"
                self._rows[file.slide_id] = Row(file.name, file.slide_id, "skipped", reason)

    def remark(self, slide_id: str, text: str) -> None:
        """Something about a slide that did not keep it from being done."""
        self._line("remark", {"slide_id": slide_id, "remark": text})

    def close(self) -> None:
        """Write what is not written yet."""
        counts = {
            status: sum(row.status == status for row in self._rows.values()) for status in ("done", "empty", "failed", "skipped")
        }
        self._line("end", {"counts": counts, "seconds": round(time.monotonic() - self._started, 2)})
        self._write()

    def _line(self, event: str, content: dict[str, Any]) -> None:
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "run": self._run, "event": event, "stage": self._stage, **content}
        with folder_lock(self._job.manifest.parent), open(self._job.manifest, "ab+") as handle:
            torn = handle.seek(0, os.SEEK_END) and handle.seek(-1, os.SEEK_END) >= 0 and handle.read(1) != b"\n"
            handle.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")  # a full disk may have cut the last one

    def _write(self) -> None:
        started = time.monotonic()
        with folder_lock(self._job.status.parent / "logs"):
            rows = read_status(self._job.status)
            for slide_id, row in self._rows.items():
                there = rows.get(slide_id)
                # what another run did meanwhile says more than that there was nothing left to do
                if row.status == "skipped" and there is not None and there != self._before.get(slide_id):
                    continue
                rows[slide_id] = row
            with atomic_path(self._job.status) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
                writer = csv.DictWriter(handle, list(Row.__dataclass_fields__))
                writer.writeheader()
                for slide_id in sorted(rows):
                    writer.writerow(asdict(rows[slide_id]) | {"seconds": f"{rows[slide_id].seconds:.2f}"})
        self._last_write = time.monotonic()
        self._write_took = self._last_write - started


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions

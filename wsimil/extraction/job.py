"""A job folder: where each file of a slide lies, what became of each slide, and a run over many slides.

- One row per slide in `status.csv`, rewritten whole and atomically; rows of slides that are not in this run stay.
- A slide that fails is a row with a reason; its traceback is in `logs/<slide_id>.log` when the reason was not foreseen.
- A slide that failed by its own fault is not tried again while neither it nor the request changes, unless asked.
- `logs/manifest.jsonl` gains a line per slide and run and is never rewritten.
"""

from __future__ import annotations

import csv
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from wsimil.bags.dataset import BagFolder
from wsimil.errors import SlideError, StaleBagError
from wsimil.files import atomic_path, hash_of, mark_output, read_json, sweep_temporary_files, write_json, write_text
from wsimil.progress import progress
from wsimil.slides.cohort import SlideFile
from wsimil.units import nominal_magnification

__all__ = ["Job", "Row", "read_status", "run_slides", "slides_of_job"]

STATUSES = ("done", "empty", "failed", "skipped")


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
    def status(self) -> Path:
        return self.folder / "status.csv"

    @property
    def manifest(self) -> Path:
        return self.folder / "logs" / "manifest.jsonl"


def read_status(path: Path) -> dict[str, Row]:
    """Rows of a `status.csv` by slide id; none where there is no file."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as handle:
        return {
            row["slide_id"]: Row(
                row["slide"], row["slide_id"], row["status"], row["reason"], int(row["n_tiles"] or 0), float(row["seconds"] or 0)
            )
            for row in csv.DictReader(handle)
        }


def slides_of_job(bags: BagFolder) -> dict[str, Row]:
    """Rows of the job folder that a folder of bags lies in; none for bags that lie elsewhere."""
    return read_status(bags.folder.parent.parent / "status.csv")


def _write_status(path: Path, rows: dict[str, Row]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(Row.__dataclass_fields__))
        writer.writeheader()
        for slide_id in sorted(rows):
            writer.writerow(asdict(rows[slide_id]) | {"seconds": f"{rows[slide_id].seconds:.2f}"})


def run_slides(
    job: Job,
    slides: list[SlideFile],
    work: Callable[[SlideFile], Row],
    *,
    stage: str,
    request: dict,
    shard: tuple[int, int] = (1, 1),
    retry_failed: bool = False,
    quiet: bool = False,
) -> list[Row]:
    """Do `work` for every slide of the shard, whatever happens to single slides; rows in the order of the slides.

    Args:
        work: one slide → its row; raises SlideError where the slide is at fault.
        stage: what is done, for progress and manifest.
        request: the settings that results depend on: a failure is remembered for this request and this slide file.
        shard: (i, n), 1-based; slides of other shards are rows `skipped`.

    Raises:
        KeyboardInterrupt: after the status was written.
    """
    for folder in (job.folder, job.folder / "overviews"):
        mark_output(folder)
    for folder in _folders_with_leftovers(job.folder):
        sweep_temporary_files(folder)
    statuses = read_status(job.status)
    rows: list[Row] = []
    mine = [slide for position, slide in enumerate(slides) if position % shard[1] == shard[0] - 1]
    mine_ids = {slide.slide_id for slide in mine}
    for slide in slides:
        if slide.slide_id not in mine_ids and slide.slide_id not in statuses:
            statuses[slide.slide_id] = Row(
                slide.name, slide.slide_id, "skipped", f"another shard's (this is {shard[0]}/{shard[1]})"
            )
    last_write = 0.0
    n_tiles, started = 0, time.monotonic()
    bar = progress(mine, stage, unit="slide", quiet=quiet)
    try:
        for slide in bar:
            row = _one(job, slide, work, request, retry_failed)
            rows.append(row)
            statuses[slide.slide_id] = row
            _log(job, stage, row)
            if row.status == "failed" and not quiet:
                bar.write(f"{slide.slide_id}: failed: {row.reason}", file=sys.stderr)
            n_tiles += row.n_tiles if row.status == "done" else 0
            if n_tiles:
                bar.set_postfix_str(f"{n_tiles / (time.monotonic() - started):.0f} tiles/s", refresh=False)
            if time.monotonic() - last_write > 2:
                _write_status(job.status, statuses)
                last_write = time.monotonic()
    finally:
        bar.close()
        _write_status(job.status, statuses)
    return rows


def _one(job: Job, slide: SlideFile, work: Callable[[SlideFile], Row], request: dict, retry_failed: bool) -> Row:
    started = time.monotonic()

    def failed(reason: str) -> Row:
        return Row(slide.name, slide.slide_id, "failed", " ".join(reason.split()), 0, time.monotonic() - started)

    key = ""
    try:
        key = hash_of({"request": request, "mpp": slide.mpp, "slide": slide.fingerprint()})
        if not retry_failed and (reason := _remembered(job, slide.slide_id, key)):
            return failed(f"{reason} (as before; --retry-failed tries again)")
    except OSError:
        pass  # the file is missing or cannot be read: opening it says so better
    try:
        row = work(slide)
        job.failure(slide.slide_id).unlink(missing_ok=True)
        return row
    except SlideError as error:
        if key and not isinstance(error, StaleBagError):
            write_json(job.failure(slide.slide_id), {"key": key, "reason": str(error)})
        return failed(str(error))
    except Exception as error:  # one slide must not end the run, whatever a library throws
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
        try:
            write_text(job.log(slide.slide_id), f"{slide.slide_id} ({slide.path})\n{traceback.format_exc()}")
            reason += f" (see logs/{slide.slide_id}.log)"
        except OSError:
            pass  # a full disk: the row still says what happened
        return failed(reason)


def _remembered(job: Job, slide_id: str, key: str) -> str | None:
    try:
        memory = read_json(job.failure(slide_id))
    except (OSError, ValueError):
        return None
    return memory["reason"] if memory.get("key") == key else None


def _log(job: Job, stage: str, row: Row) -> None:
    job.manifest.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "stage": stage, **asdict(row)})
    with open(job.manifest, "a", encoding="utf-8") as handle:  # one write of one line: safe beside another run
        handle.write(line + "\n")


def _folders_with_leftovers(folder: Path) -> Iterable[Path]:
    return {path.parent for path in folder.rglob(".*.tmp-*")}

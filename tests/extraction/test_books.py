"""What a run writes about itself costs little, however many slides there are."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from wsimil.extraction import job as module
from wsimil.extraction.job import Books, Job, Row, read_status


def test_a_status_that_is_slow_to_write_is_written_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[float] = []

    def slow(path: Path) -> dict[str, Row]:
        written.append(time.monotonic())
        time.sleep(0.02)
        return read_status(path)

    books = Books(Job(tmp_path / "job"), stage="extract", request={}, n_slides=200, shard=(1, 1))
    monkeypatch.setattr(module, "read_status", slow)
    monkeypatch.setattr(module, "_WRITE_EVERY_S", 0.0)
    for number in range(200):
        books.add(Row(f"s{number}.svs", f"s{number}", "done"))
    assert len(written) < 20
    books.close()
    assert len(read_status(tmp_path / "job" / "status.csv")) == 200

"""Power cuts: a run that is killed at any moment leaves nothing wrong, and the next one goes on."""

from __future__ import annotations

import random
import time
from pathlib import Path

from faults.runs import Run, assert_bags_right, assert_finished, bags_of, extract, wait_for

KILLS = 10


def _look(job: Path) -> set[tuple[str, int]]:
    """Names and times of everything in a folder: changes as soon as a run does anything."""
    found = set()
    for path in job.rglob("*"):
        try:
            found.add((str(path), path.stat().st_mtime_ns))
        except OSError:
            continue
    return found


def test_ten_sigkills_leave_what_a_calm_run_leaves(cohort: Path, calm: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    job = tmp_path / "job"
    caught, grew = 0, 0
    for kill in range(KILLS):
        before, had = _look(job), bags_of(job).keys()
        moments = {  # from when on, and for how long at most, a kill may come
            "start": (lambda: True, 6.0),
            "first change": (lambda before=before: _look(job) != before, 2.0),  # readers start, slides are opened and tiled
            "first bag": (lambda had=had: bags_of(job).keys() > had, 0.4),  # encoding and writing
        }
        happened, at_most_s = moments[("first bag", "first change", "first bag", "start")[kill % 4]]
        with Run(cohort, job) as run:
            wait_for(lambda run=run, happened=happened: run.ended or happened(), 120)
            time.sleep(rng.uniform(0, at_most_s))
            caught += not run.ended
            run.sigkill()
            assert run.left_behind() == {}, f"kill {kill}: its children live on"
        assert_bags_right(job, calm)
        grew += bags_of(job).keys() > had
    assert caught >= KILLS // 2, "most runs ended before they were killed: the cohort is too small for this test"
    assert grew >= 3, "hardly a run got as far as a bag: this proved nothing"
    ending = extract(cohort, job)
    assert ending.code == 0, ending.said
    assert_finished(job, calm)

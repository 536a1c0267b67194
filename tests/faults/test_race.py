"""Several runs on one job folder: they share the slides, and the dead hold nothing."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from faults.runs import Run, assert_bags_right, assert_finished, bags_of, manifest_of, wait_for


def _times_done(job: Path) -> Counter[str]:
    return Counter(line["slide_id"] for line in manifest_of(job) if line.get("status") == "done")


@pytest.mark.parametrize("n_runs", [2, 8])
def test_racing_runs_do_each_slide_once(cohort: Path, calm: Path, tmp_path: Path, n_runs: int) -> None:
    job = tmp_path / "job"
    with ExitStack() as stack:
        runs = [stack.enter_context(Run(cohort, job, "--workers", "1")) for _ in range(n_runs)]
        endings = [run.ending() for run in runs]
        assert [run.left_behind() for run in runs] == [{}] * n_runs
    assert [ending.code for ending in endings] == [0] * n_runs, "\n".join(ending.said for ending in endings)
    done = _times_done(job)
    assert done == Counter(bags_of(calm).keys())
    assert_finished(job, calm)


def test_the_survivor_takes_over_from_the_killed(cohort: Path, calm: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    with Run(cohort, job) as victim, Run(cohort, job) as survivor:
        assert wait_for(lambda: victim.ended or survivor.ended or len(bags_of(job)) >= 3, 120)
        assert not victim.ended
        victim.sigkill()
        assert not survivor.ended
        assert_bags_right(job, calm)
        ending = survivor.ending()
        assert victim.left_behind() == survivor.left_behind() == {}
    assert ending.code == 0, ending.said
    done = _times_done(job)
    assert set(done.values()) == {1}, done
    assert_finished(job, calm, swept=False)  # what the dead was writing goes when the next run begins

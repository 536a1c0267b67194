"""A cohort small enough to extract in seconds, and what an undisturbed run makes of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import speckled

from wsimil.slides.write_tiff import write_slide

pytest.register_assert_rewrite("faults.runs")

from faults.runs import extract, rows_of  # noqa: E402 (its assertions say what was found only if it is imported after the line above)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if sys.platform != "linux":
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="looks for processes in /proc"))


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighteen slides without glass, a few hundred tiles each."""
    folder = tmp_path_factory.mktemp("cohort")
    for number in range(18):
        width, height = 900 + 50 * (number % 7), 700 + 60 * (number % 4)
        kind = ("deflate", "jpeg")[number % 2]
        write_slide(folder / f"s{number:02}.tiff", speckled(width, height, number), mpp=0.5, compression=kind, downsamples=(1, 4))
    return folder


@pytest.fixture(scope="session")
def calm(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job folder of one run that nothing disturbed."""
    job = tmp_path_factory.mktemp("calm") / "job"
    ending = extract(cohort, job)
    assert ending.code == 0, ending.said
    assert {row["status"] for row in rows_of(job).values()} == {"done"}
    return job

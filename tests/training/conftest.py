"""The small cohort that tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_bags import write_cohort


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("toy"))

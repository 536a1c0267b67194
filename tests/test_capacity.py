"""The capacity page says what its script computes."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_page_holds_the_tables_of_the_script() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "capacity.py"))
    tables = script["page"](script["Slide"](10_000, 1.0, next(iter(script["READ_RATES"].values()))))
    page = (ROOT / "docs" / "capacity.md").read_text(encoding="utf-8")
    assert tables in page, "python benchmarks/capacity.py --doc docs/capacity.md"


def test_a_run_waits_for_what_takes_longest() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "capacity.py"))
    machine = script["Machine"]("", nodes=2, cores=10, gpus=1, node_gb_s=3.0, storage_gb_s=1.0)
    encoder = script["Encoder"]("", dim=1, gflop=1.0, tflop_s=1.0, weights_gb=0.0)
    taken = script["seconds"](machine, encoder, script["Slide"](tiles=1900, gb=1.0, read_rate=100.0))
    assert taken == {"cores": 20 / 20, "GPU": 1900 / 1000 / 2, "network": 0.8}

"""The list of aggregators: what it says is true of the models, and the page in docs says the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wsimil.aggregators import AGGREGATORS, make_aggregator
from wsimil.aggregators.listing import aggregator_rows, aggregator_table, describe_aggregators
from wsimil.cli import main
from wsimil.training.goals import OBJECTIVES
from wsimil.training.listing import describe_objectives, objective_rows, objective_table

PAGE = Path(__file__).parents[2] / "docs" / "aggregators.md"
ROWS = {row["name"]: row for row in aggregator_rows()}


def test_every_line_of_the_registry_is_listed():
    assert list(ROWS) == list(AGGREGATORS)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_listed_options_are_taken_and_are_the_defaults(name):
    model = make_aggregator(name, 8, 2, hidden=64, **ROWS[name]["options"])
    assert (model.contribution_kind, model.needs_coords) == (ROWS[name]["contributions"], ROWS[name]["needs_coords"])
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in make_aggregator(name, 8, 2, hidden=64).state_dict().items()
    }


@pytest.mark.parametrize("name", AGGREGATORS)
def test_parity_is_one_of_the_words(name):
    word, _, why = ROWS[name]["parity"].partition(", ")
    assert word in ("verified", "own", "untested") or (word.startswith("approximate") and why)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_page_has_every_aggregator_with_its_parity(name):
    (line,) = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |")]
    assert f"| {ROWS[name]['parity']} |" in line and f"| {ROWS[name]['contributions']} |" in line
    assert ("needs coordinates" in line) == ROWS[name]["needs_coords"]


def test_the_table_of_the_page_is_the_generated_one():
    page = PAGE.read_text(encoding="utf-8")
    assert aggregator_table() in page, "paste into docs/aggregators.md what wsimil.aggregators.listing.aggregator_table() gives"


def test_the_page_has_the_generated_table_of_objectives():
    page = PAGE.read_text(encoding="utf-8")
    assert objective_table() in page, "paste into docs/aggregators.md what wsimil.training.listing.objective_table() gives"
    assert [row["name"] for row in objective_rows()] == list(OBJECTIVES)


def test_the_command_lists_them_for_people_and_for_programs(capsys):
    assert main(["aggregators"]) == 0
    shown = capsys.readouterr().out
    assert shown == f"{describe_aggregators()}\n\n{describe_objectives()}\n"
    for name, row in ROWS.items():
        assert f"\n{name} " in shown and row["paper"] in shown and f"parity {row['parity']}" in shown
    assert "attention=128 gated=true" in shown and "need places" in shown
    assert main(["aggregators", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [*ROWS.values(), *objective_rows()]

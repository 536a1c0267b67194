"""The unit tests of the MIL assumption: cues lie where they are said to, and who keeps it is told from who does not."""

from __future__ import annotations

import sys

import mil_assumptions as pipeline
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score


@pytest.mark.parametrize("assumption", ["single concept", "multiple concepts"])
def test_the_poison_is_in_negative_bags_of_training_and_positive_ones_of_the_test(assumption):
    for training in (True, False):
        drawn = pipeline.draw_bags(pipeline.ASSUMPTIONS[assumption], 20, training=training, seed=0)
        poisoned = [bool((drawn.bags.bag(index).features.mean(1) < -9).any()) for index in range(20)]
        assert poisoned == [bool(target) != training for target in drawn.targets]


def test_positive_bags_hold_both_concepts_and_negative_ones_never_do():
    for assumption in ("multiple concepts", "false frequency"):
        for training in (True, False):
            drawn = pipeline.draw_bags(pipeline.ASSUMPTIONS[assumption], 40, training=training, seed=0)
            for index, target in enumerate(drawn.targets):
                features = drawn.bags.bag(index).features
                held = sum(int(((features - center).abs().amax(1) < 1).any()) for center in (2, 3))
                assert held == (2 if target else 1)


def test_the_frequency_of_a_concept_turns_round():
    for training, order in ((True, 1), (False, -1)):
        drawn = pipeline.draw_bags(pipeline.ASSUMPTIONS["false frequency"], 20, training=training, seed=0)
        counts = torch.stack([(drawn.bags.bag(index).features.mean(1) > 1.5).sum() for index in range(20)])
        positive = drawn.targets.bool()
        assert (order * (counts[positive].min() - counts[~positive].max())) > 0


def test_a_maximum_keeps_the_assumption_and_a_mean_breaks_it(monkeypatch):
    monkeypatch.setattr(pipeline, "ASSUMPTIONS", {"single concept": pipeline.single_concept})
    (maximum,) = pipeline.examine("instance_max", steps=200, n_bags=100)
    (mean,) = pipeline.examine("mean_pool", steps=100, n_bags=100)
    assert verdict_of(maximum) == "kept" and maximum["auc_test"] > 0.65
    assert verdict_of(mean) == "broken" and mean["auc_train"] > 0.95


def verdict_of(row: dict) -> str:
    return pipeline.verdict(row["auc_train"], row["auc_test"], n_bags=100)


def test_what_a_coin_could_do_is_neither_kept_nor_broken():
    rng = np.random.default_rng(0)
    areas = [float(roc_auc_score([0, 1] * 100, rng.random(200))) for _ in range(400)]
    said = [pipeline.verdict(0.9, area) for area in areas]
    assert 0.92 < said.count("chance") / len(said) < 0.98  # two standard errors
    assert [pipeline.verdict(0.9, area) for area in (0.1, 0.95)] == ["broken", "kept"]


def test_the_table_has_a_line_for_each_aggregator_and_what_is_there_is_not_done_again(monkeypatch, tmp_path):
    out, table = tmp_path / "rows.csv", tmp_path / "table.md"
    models = ["--aggregators", "mean_pool", "instance_max"]
    given = ["mil_assumptions.py", *models, "--out", str(out), "--table", str(table), "--steps"]
    monkeypatch.setattr(sys, "argv", [*given, "1"])
    pipeline.main()
    text = table.read_text()
    lines = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert lines == ["aggregator", "---", "mean_pool", "instance_max"]
    assert "`python pipelines/mil_assumptions.py --out rows.csv --aggregators mean_pool instance_max --steps 1`" in text
    assert len(pd.read_csv(out)) == 6
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "examine", lambda *_, **__: pytest.fail("done already"))
        pipeline.main()
    assert table.read_text().splitlines()[4:] == text.splitlines()[4:]
    monkeypatch.setattr(sys, "argv", [*given, "2"])
    pipeline.main()
    assert len(pd.read_csv(out)) == 12, "other steps are another trial"

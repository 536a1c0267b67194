"""Soups: short trainings begin alike, the best by validation are averaged, and the training proper begins there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from wsimil.config import Settings, SplitConfig, TrainConfig
from wsimil.errors import ConfigError, UsageError
from wsimil.training import load_model, train
from wsimil.training import run as runs
from wsimil.training.loop import Fitted
from wsimil.training.soup import mixed

SOUP = TrainConfig(epochs=3, hidden=8, fold="0", device="cpu", precision="fp32", soup=4, soup_epochs=2, soup_kept=2, dropout=0.5)


def trained(toy, out, config=SOUP):
    said: list[str] = []
    (folder,) = train(toy, toy / "labels.csv", out, settings=Settings(train=config, split=SplitConfig(folds=2)), say=said.append)
    return folder, said


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(one, two, **tolerance):
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, **tolerance)


@pytest.fixture
def fits(monkeypatch):
    """(run folder, weights at its beginning, what came out) of every training."""
    recorded = []

    def fit(folder, model, *arguments, **options):
        begun = {name: value.clone() for name, value in model.state_dict().items()}
        recorded.append((folder, begun, done := runs_fit(folder, model, *arguments, **options)))
        return done

    runs_fit = runs.fit
    monkeypatch.setattr(runs, "fit", fit)
    return recorded


def test_short_trainings_begin_alike_and_the_training_begins_at_the_mean_of_the_best(toy, tmp_path, fits):
    folder, said = trained(toy, tmp_path)
    *short, (proper, begun, done) = fits
    assert proper == folder and len(short) == 4 and len(done.history) == 3
    for _, state, one in short:
        assert_equal(short[0][1], state)
        assert [row["epoch"] for row in one.history] == [0, 1] and one.best_epoch == 1
    states = [one.best_state for _, _, one in short]
    losses = [sum(row["val_loss"] for row in one.history) for _, _, one in short]
    assert len({sum(value.double().abs().sum().item() for value in state.values()) for state in states}) == 4
    first, second = sorted(range(4), key=losses.__getitem__)[:2]
    assert_equal({name: (states[first][name] + states[second][name]) / 2 for name in begun}, begun)
    content = load_model(folder).content
    assert content["soup"]["kept"] == [first, second] and content["soup"]["val_loss"] == pytest.approx([one / 2 for one in losses])
    assert "begun at the mean of 2 of 4 short trainings" in said[-1] and not (folder / "soup").exists()


def test_a_soup_of_trainings_that_learn_nothing_changes_nothing(toy, tmp_path):
    still = replace(SOUP, lr=1e-12, weight_decay=0.0)
    souped, _ = trained(toy, tmp_path / "soup", still)
    plain, _ = trained(toy, tmp_path / "plain", replace(still, soup=0))
    assert_equal(weights(plain), weights(souped))


@pytest.mark.parametrize("killed_in", [2, 4])
def test_a_soup_that_was_killed_goes_on(toy, tmp_path, monkeypatch, killed_in):
    whole, _ = trained(toy, tmp_path / "whole")
    fit, calls = runs.fit, []

    def dies(*arguments, **options):
        calls.append(arguments[0])
        if len(calls) == killed_in + 1:
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    monkeypatch.setattr(runs, "fit", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(toy, tmp_path / "killed")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*/soup/*/last.ckpt")}
    assert len(kept) == killed_in
    monkeypatch.setattr(runs, "fit", fit)
    again, _ = trained(toy, tmp_path / "killed")
    assert_equal(weights(whole), weights(again), rtol=0, atol=0)


def test_weights_are_averaged_and_counters_are_not():
    states = [{"weight": torch.full((2,), value), "count": torch.tensor(int(value))} for value in (1.0, 2.0, 6.0)]
    losses = [[0.5, 0.3], [0.9, 0.1], [0.2, 0.2]]  # the second ends best, the third is best throughout
    history = [[{"epoch": at, "train_loss": 0.0, "val_loss": loss} for at, loss in enumerate(own)] for own in losses]
    soup = mixed([Fitted(state, 1, own) for state, own in zip(states, history, strict=True)], 2)
    assert soup.kept == [2, 0] and soup.val_loss == [0.4, 0.5, 0.2]
    assert soup.state["weight"].tolist() == [3.5, 3.5] and soup.state["count"].item() == 6


def test_what_makes_no_soup_is_refused(toy, tmp_path):
    for wrong in ({"soup": 1}, {"soup": -1}, {"soup_kept": 5}, {"soup_epochs": 4}, {"soup_epochs": 0}):
        with pytest.raises(ConfigError, match=f"train.{next(iter(wrong))} is"):
            replace(SOUP, **wrong)
    with pytest.raises(UsageError, match="--stack on: soup"):
        trained(toy, tmp_path, replace(SOUP, stack="on", seeds=2))

"""Objectives that wrap another, in the loop itself: what is kept is theirs to say, and a kill changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_bags import DIM

from wsimil.aggregators import Standardized, make_aggregator
from wsimil.bags.dataset import BagFolder
from wsimil.batch import Objective
from wsimil.config import TrainConfig
from wsimil.objectives import AttentionEntropy, AveragedWeights, SlideLabel
from wsimil.objectives.risk_bank import RiskBank
from wsimil.task import Task
from wsimil.training.goals import build_objective
from wsimil.training.items import LabelledSlides, TileStore
from wsimil.training.loop import Fitted, Loop, fit

TASK = Task("binary", ("neg", "pos"))


def fitted(toy: Path, folder: Path, objective: Objective, epochs: int = 4) -> tuple[Fitted, nn.Module]:
    folder.mkdir(exist_ok=True)
    store = TileStore(BagFolder(toy, cache_bytes=0), memory_bytes=1 << 30)
    names = store.bags.slide_ids
    targets = torch.tensor([float(name[1:]) % 2 for name in names])
    torch.manual_seed(0)
    model = Standardized(make_aggregator("gated_abmil", DIM, 1, hidden=8, dropout=0.25), *store.moments(names[:16]))
    sides = [LabelledSlides(store, names[part], targets[part]) for part in (slice(16), slice(16, None))]
    return fit(folder, model, objective, *sides, TrainConfig(epochs=epochs, patience=epochs, precision="fp32")), model


def wrapped() -> Objective:
    return AttentionEntropy(AveragedWeights(SlideLabel(TASK)))


def test_the_weights_that_are_kept_are_the_average(toy, tmp_path, monkeypatch):
    plain, _ = fitted(toy, tmp_path / "plain", SlideLabel(TASK), epochs=1)
    objective = AveragedWeights(SlideLabel(TASK))
    averaged, model = fitted(toy, tmp_path / "averaged", objective, epochs=1)
    assert averaged.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"])  # the same steps
    assert averaged.history[0]["val_loss"] != plain.history[0]["val_loss"]
    kept = objective.kept_model(model).state_dict()
    assert kept.keys() == averaged.best_state.keys() == plain.best_state.keys()
    for name, values in averaged.best_state.items():
        assert torch.equal(values, kept[name].cpu())
    assert not torch.equal(averaged.best_state["inner.classify.weight"], plain.best_state["inner.classify.weight"])


def test_a_killed_run_goes_on_to_the_same_average(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("wsimil.training.loop._LastCheckpoint.on_train_epoch_end", save_now)
    whole, _ = fitted(toy, tmp_path / "whole", wrapped())

    def stop(self: Loop) -> None:
        if self.current_epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "on_train_epoch_start", stop)
        fitted(toy, tmp_path / "cut", wrapped())
    resumed, _ = fitted(toy, tmp_path / "cut", wrapped())
    assert resumed.history == whole.history
    for name, values in whole.best_state.items():
        assert torch.equal(resumed.best_state[name], values)


@pytest.mark.parametrize("kind", ["slide_label", "averaged_weights"])
@pytest.mark.parametrize("sampling", ["shuffle", "risk_set"])
def test_a_cox_validation_loss_is_a_function_of_the_weights_it_judges(toy, tmp_path, kind, sampling):
    store = TileStore(BagFolder(toy, cache_bytes=0), memory_bytes=1 << 30)
    names = store.bags.slide_ids
    rng = np.random.default_rng(0)
    targets = torch.from_numpy(np.stack([rng.exponential(size=len(names)), rng.random(len(names)) < 0.6], 1)).float()
    labels = [f"{time}{'' if event else '+'}" for time, event in targets.tolist()]
    config = TrainConfig(epochs=3, patience=3, precision="fp32", keep_epochs=True, sampling=sampling, lr=1e-2)
    objective = build_objective(replace(config, objective=kind), Task("survival", criterion="cox"), labels[:16])
    ours, theirs = slice(16), slice(16, None)
    model = make_aggregator("gated_abmil", DIM, 1, hidden=8, dropout=0.5)
    sides = [LabelledSlides(store, names[part], targets[part], tiles_per_bag=2 if part == ours else 0) for part in (ours, theirs)]
    (tmp_path / "epochs").mkdir()
    found = fit(tmp_path, model, objective, *sides, config)
    judge = RiskBank().eval()
    for row in found.history:
        model.load_state_dict(load_file(tmp_path / "epochs" / f"{int(row['epoch'])}.safetensors"))
        with torch.inference_mode():
            model.eval()
            seen = [store.bag(name, sides[0].rows(place, 0)) for place, name in enumerate(names[ours])]
            risk = torch.cat([model(bag).logits[:, 0] for bag in seen])
            judge.refer_to(risk, targets[ours])
            new = torch.cat([model(store.bag(name)).logits[:, 0] for name in names[theirs]])
            assert row["val_loss"] == pytest.approx(float(judge.loss(new, targets[theirs], names[theirs])), rel=1e-5)


def save_now(self, trainer, pl_module) -> None:
    trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("name", "kind"), [("attention_entropy", AttentionEntropy), ("averaged_weights", AveragedWeights)])
def test_they_are_asked_for_by_name(name, kind):
    assert isinstance(build_objective(TrainConfig(objective=name), TASK, ["neg", "pos"]), kind)

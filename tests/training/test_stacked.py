"""Models stacked are the models trained one after the other on the same batches, to the last digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wsimil.aggregators import Standardized, make_aggregator, packed
from wsimil.bags.dataset import BagFolder
from wsimil.config import Settings, SplitConfig, TrainConfig
from wsimil.errors import UsageError
from wsimil.objectives import SlideLabel
from wsimil.task import Task
from wsimil.training import load_model, train
from wsimil.training.items import LabelledSlides, Steps, TileStore
from wsimil.training.loop import learning_rate
from wsimil.training.run import _are_stacked
from wsimil.training.stacked import STACKABLE, Member, fit_stacked, unstackable

M = 3
CONFIG = TrainConfig(epochs=3, hidden=8, dropout=0.0, bags_per_step=3, patience=9, clip_norm=0.05, lr=0.02)
TASK = Task("binary", ("neg", "pos"))


@pytest.fixture
def store(toy: Path) -> TileStore:
    return TileStore(BagFolder(toy, cache_bytes=0), memory_bytes=1 << 30)


def members_of(store: TileStore, aggregator: str, task: Task = TASK) -> list[Member]:
    """Three models, each with slides of its own; all leave out some, and every class weighs differently for each."""
    names, found = store.bags.slide_ids, []
    for index in range(M):
        ids = {"train": names[4 * index : 4 * index + 14], "val": names[(4 * index + 14) % 24 : (4 * index + 14) % 24 + 5]}
        values = {side: torch.tensor([float(name[1:]) for name in members]) for side, members in ids.items()}
        targets = {side: value % 2 for side, value in values.items()}
        if task.kind == "multiclass":
            targets = {side: (value % 3).long() for side, value in values.items()}
        elif task.kind == "regression":
            task = replace(task, center=float(index), scale=1.0 + index)
            targets = {side: (value - task.center) / task.scale for side, value in values.items()}
        weights: dict[str, Tensor | None] = {side: 0.5 + index * (value % 2) for side, value in values.items()}
        torch.manual_seed(index)
        inner = make_aggregator(aggregator, store.bags.dim, task.n_outputs, hidden=8, dropout=0.0)
        found.append(Member(Standardized(inner, *store.moments(ids["train"])).double(), task, ids, targets, weights))
    return found


def trained_alone(member: Member, members: list[Member], store: TileStore, config: TrainConfig) -> tuple[Standardized, list[float]]:
    """The plain loop of one model over the stack's batches, cut down to its own slides."""
    union = sorted({name for one in members for name in one.ids["train"]})
    slides = LabelledSlides(store, union, torch.arange(len(union)))
    alone = sum(len(one.ids["train"]) for one in members) / len(members)
    steps = Steps(slides, bags_per_step=round(config.bags_per_step * len(union) / alone), shuffle_seed=config.seed)
    total, taken = sum(len(steps.plan(epoch)) for epoch in range(config.epochs)), 0
    model, objective = member.model, SlideLabel(member.task)
    own = {side: LabelledSlides(store, member.ids[side], member.targets[side], member.weights[side]) for side in ("train", "val")}
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    losses = []
    for epoch in range(config.epochs):
        for step in steps.plan(epoch):
            mine = [member.ids["train"].index(union[index]) for index in step if union[index] in member.ids["train"]]
            if mine:
                optimiser.param_groups[0]["lr"] = learning_rate(config, taken, total)
                optimiser.zero_grad()
                (piece,) = own["train"].pieces(mine, epoch, limit=None)
                torch.stack(list(objective.losses(model, piece, 0.0).values())).sum().backward()
                if config.clip_norm:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
                optimiser.step()
            taken += 1
        with torch.no_grad():
            (piece,) = own["val"].pieces(range(len(own["val"])), 0, limit=None)
            losses.append(float(torch.stack(list(objective.losses(model, piece, 0.0).values())).sum()))
    return model, losses


@pytest.mark.parametrize("aggregator", STACKABLE)
def test_a_stack_equals_its_models_trained_alone(store, aggregator):
    last = replace(CONFIG, patience=99)
    stacked = fit_stacked(members_of(store, aggregator), store, last)
    for index in range(M):
        members = members_of(store, aggregator)
        alone, losses = trained_alone(members[index], members, store, last)
        assert [row["val_loss"] for row in stacked[index].history] == pytest.approx(losses, abs=1e-8)
        if stacked[index].best_epoch == last.epochs - 1:
            for name, value in alone.state_dict().items():
                torch.testing.assert_close(stacked[index].best_state[name], value, rtol=0, atol=1e-8)


def test_bags_of_very_many_tiles_are_stacked_as_well(store, monkeypatch):
    few = fit_stacked(members_of(store, "gated_abmil"), store, CONFIG)
    monkeypatch.setattr(packed, "_RECOMPUTED_FROM", 8)
    monkeypatch.setattr(packed, "_ROWS_OF_A_THREAD", 4)
    many = fit_stacked(members_of(store, "gated_abmil"), store, CONFIG)
    for one, other in zip(few, many, strict=True):
        assert [row["val_loss"] for row in one.history] == pytest.approx([row["val_loss"] for row in other.history], abs=1e-8)


@pytest.mark.parametrize("task", [Task("multiclass", ("a", "b", "c")), Task("regression")], ids=lambda task: task.kind)
def test_other_tasks_are_stacked_as_well(store, task):
    stacked = fit_stacked(members_of(store, "gated_abmil", task), store, CONFIG)
    members = members_of(store, "gated_abmil", task)
    _, losses = trained_alone(members[1], members, store, CONFIG)
    assert [row["val_loss"] for row in stacked[1].history] == pytest.approx(losses, abs=1e-8)


def test_weights_of_the_best_epoch_are_kept_and_each_model_stops_by_itself(store):
    config = replace(CONFIG, epochs=12, patience=2, lr=0.3, clip_norm=0.0)
    stacked = fit_stacked(members_of(store, "abmil"), store, config)
    assert len({len(one.history) for one in stacked}) > 1  # else this shows nothing
    for one, member in zip(stacked, members_of(store, "abmil"), strict=True):
        losses = [row["val_loss"] for row in one.history]
        assert one.best_epoch == losses.index(min(losses))
        assert len(losses) == min(config.epochs, one.best_epoch + 1 + config.patience)
        member.model.load_state_dict(one.best_state)
        val = LabelledSlides(store, member.ids["val"], member.targets["val"], member.weights["val"])
        (piece,) = val.pieces(range(len(val)), 0, limit=None)
        assert float(SlideLabel(TASK).losses(member.model, piece, 0.0)["bag"].detach()) == pytest.approx(min(losses), abs=1e-8)


def test_the_last_weights_are_kept_where_that_was_asked(store):
    config = replace(CONFIG, epochs=6, patience=2, lr=0.3, clip_norm=0.0, select="last")
    stacked = fit_stacked(members_of(store, "abmil"), store, config)
    assert [one.best_epoch for one in stacked] == [5, 5, 5]
    members = members_of(store, "abmil")
    alone, _ = trained_alone(members[0], members, store, config)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(stacked[0].best_state[name], value, rtol=0, atol=1e-8)


def test_slides_of_other_folds_change_nothing(store):
    """Another member's slides may hold anything: what is not counted has no gradient."""
    honest = fit_stacked(members_of(store, "gated_abmil"), store, CONFIG)
    members = members_of(store, "gated_abmil")
    own = {*members[0].ids["train"], *members[0].ids["val"]}
    for name in set(store._held) - own:
        store._held[name] = replace(store._held[name], features=store._held[name].features * -3 + 50)
    changed = fit_stacked(members, store, CONFIG)
    for name, value in honest[0].best_state.items():
        torch.testing.assert_close(changed[0].best_state[name], value, rtol=0, atol=1e-10)
    assert any(not torch.equal(changed[2].best_state[name], value) for name, value in honest[2].best_state.items())


def test_a_killed_stack_goes_on_to_the_same_weights(store, tmp_path, monkeypatch):
    config = replace(CONFIG, dropout=0.25, epochs=4)

    def members() -> list[Member]:
        found = members_of(store, "gated_abmil")
        for member in found:
            member.model.inner.project[2].p = 0.25  # type: ignore[index]
        return found

    def run(path: Path | None) -> list:
        torch.manual_seed(5)
        return fit_stacked(members(), store, config, checkpoint=path, key="k")

    calm = run(None)
    path = tmp_path / "stack.ckpt"
    monkeypatch.setattr("wsimil.training.stacked.time.monotonic", iter(range(0, 10_000, 10)).__next__)  # a state every epoch
    validate, epochs = "wsimil.training.stacked._Stack.validate", []
    from wsimil.training.stacked import _Stack

    original = _Stack.validate

    def killed(self, steps, epoch):
        epochs.append(epoch)
        if epochs == [0, 1, 2]:
            raise KeyboardInterrupt
        original(self, steps, epoch)

    monkeypatch.setattr(validate, killed)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    torch.manual_seed(99)  # what the process draws elsewhere does not matter
    resumed = fit_stacked(members(), store, config, checkpoint=path, key="k")
    assert epochs == [0, 1, 2, 2, 3]
    for one, other in zip(calm, resumed, strict=True):
        assert one.history == other.history
        assert all(torch.equal(value, other.best_state[name]) for name, value in one.best_state.items())


def test_stacked_runs_are_ordinary_runs(toy, tmp_path):
    settings = Settings(split=SplitConfig(folds=3), train=TrainConfig(epochs=4, hidden=8, seeds=2, stack="on"))
    said: list[str] = []
    runs = train(toy, toy / "labels.csv", tmp_path / "run", settings=settings, say=said.append)
    assert len(runs) == 6 and len({path.name for path in runs}) == 6
    for run in runs:
        trained = load_model(run)
        assert trained.temperature > 0 and trained.threshold is not None
        assert trained.content["stack"] == 6
        assert len((run / "metrics.csv").read_text().splitlines()) == 1 + trained.content["epochs"]
    weights = {(run / "model.safetensors").read_bytes() for run in runs}
    assert len(weights) == 6
    assert not (tmp_path / "run" / "stack.ckpt").exists()
    again = said[:]
    said.clear()
    train(toy, toy / "labels.csv", tmp_path / "run", settings=settings, say=said.append)
    assert sum("already trained" in line for line in said) == 6 and not any("already" in line for line in again)


@pytest.mark.parametrize(
    "changes",
    [{"aggregator": "transmil"}, {"objective": "clam_instances"}, {"sampling": "balanced"}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_cannot_be_stacked_says_why(toy, tmp_path, changes):
    config = TrainConfig(epochs=1, stack="on", **changes)
    with pytest.raises(UsageError, match=f"--stack on: .*{next(iter(changes.values()))}"):
        train(toy, toy / "labels.csv", tmp_path, settings=Settings(split=SplitConfig(folds=2), train=config))


def test_where_a_stack_would_be_worth_it_the_reason_against_is_said(monkeypatch):
    """On a GPU, with several models: elsewhere nobody expects a stack."""
    plans: Any = [SimpleNamespace(task=TASK, ids={"train": ["a", "b"]})] * 3
    bags: Any = SimpleNamespace(n_valid={"a": 100, "b": 100_000}.get)
    monkeypatch.setattr("wsimil.training.run.free_bytes", lambda device: 2 * 10**9)
    too_large = "models are trained one after the other: 3 in a stack need about 5 GB for the largest bag"
    for aggregator, device, some, changes, stacked, expected in (
        ("gated_abmil", "cuda:0", plans, {"hidden": 64}, True, []),
        ("gated_abmil", "cuda:0", plans, {"hidden": 512}, False, [too_large]),
        ("gated_abmil", "cuda:0", plans, {"hidden": 512, "tiles_per_bag": 1000}, True, []),
        ("gated_abmil", "cuda:0", plans, {"hidden": 512, "stack": "on"}, True, []),
        ("transmil", "cuda:0", plans, {}, False, ["models are trained one after the other: transmil is none of abmil, "]),
        ("transmil", "cuda:0", plans[:1], {}, False, []),
        ("transmil", "cpu", plans, {}, False, []),
    ):
        said: list[str] = []
        config = TrainConfig(aggregator=aggregator, **changes)
        assert _are_stacked(some, bags, config, device, said.append) == stacked
        assert [line[: len(text)] for line, text in zip(said, expected, strict=True)] == expected


@pytest.mark.parametrize("changes", [{"bags_per_step": 4}, {"tiles_per_step": 160}], ids=["bags", "tiles"])
def test_a_stack_takes_as_many_steps_as_its_models_alone(toy, tmp_path, monkeypatch, changes):
    """Among slides of all folds a step has to reach further, in tiles as in bags, to hold as many that are a model's own."""
    plan, taken = Steps.plan, []

    def counted(self: Steps, epoch: int) -> list[list[int]]:
        found = plan(self, epoch)
        taken.append((self.shuffle_seed is None, len(found)))
        return found

    monkeypatch.setattr(Steps, "plan", counted)
    n_steps = {}
    for stack in ("on", "off"):
        taken.clear()
        config = TrainConfig(epochs=1, hidden=8, device="cpu", stack=stack, **changes)
        train(toy, toy / "labels.csv", tmp_path / stack, settings=Settings(split=SplitConfig(folds=5), train=config))
        n_steps[stack] = [count for validation, count in taken if not validation]
    alone = sum(n_steps["off"]) / len(n_steps["off"])
    assert max(abs(count - alone) for count in n_steps["on"]) <= 1  # a larger step wastes less of its budget of tiles


def test_folds_with_losses_of_their_own_are_not_stacked():
    weighed = [Task("multilabel", ("a", "b"), positive_weights=(1.0, weight)) for weight in (2.0, 3.0)]
    assert "losses of their own" in str(unstackable(TrainConfig(), weighed))
    assert unstackable(TrainConfig(), [Task("regression", center=1.0), Task("regression", center=2.0)]) is None
    assert "compares slides" in str(unstackable(TrainConfig(), [Task("survival", criterion="cox")]))

"""The loop: pieces change nothing, arithmetic is as asked, options arrive, and test slides do not."""

from __future__ import annotations

import inspect
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toy_bags import DIM, write_cohort

from wsimil.aggregators import Standardized, fused, make_aggregator, packed
from wsimil.bags.bag import read_bag
from wsimil.bags.dataset import BagFolder
from wsimil.batch import BagBatch
from wsimil.config import Settings, SplitConfig, TrainConfig
from wsimil.errors import ConfigError, SplitsError
from wsimil.files import read_json, write_json
from wsimil.hdf5 import Dataset, read_attributes, write_hdf5
from wsimil.objectives import AttentionEntropy, AveragedWeights, ClamInstances, SlideLabel
from wsimil.prediction import predict
from wsimil.settings import read_settings
from wsimil.task import Task
from wsimil.training import load_model, train
from wsimil.training.dropout import ByteDropout, quicken_dropout
from wsimil.training.goals import build_objective
from wsimil.training.items import LabelledSlides, Steps, TileStore
from wsimil.training.loop import Fitted, _LastCheckpoint, fit, learning_rate, resolve_precision

TASK = Task("binary", ("neg", "pos"))


def fitted(toy: Path, folder: Path, config: TrainConfig) -> Fitted:
    folder.mkdir(exist_ok=True)
    if config.precision == "auto":  # where the processor has bf16, its digits would hide what is compared
        config = replace(config, precision="fp32")
    store = TileStore(BagFolder(toy, cache_bytes=0), memory_bytes=1 << 30)
    names = store.bags.slide_ids
    targets = torch.tensor([float(name[1:]) % 2 for name in names])
    torch.manual_seed(0)
    inner = make_aggregator("gated_abmil", DIM, 1, hidden=8, dropout=config.dropout)
    model = Standardized(inner, *store.moments(names[:16]))
    sides = [LabelledSlides(store, names[part], targets[part]) for part in (slice(16), slice(16, None))]
    return fit(folder, model, SlideLabel(TASK), *sides, config)


def test_a_step_in_pieces_is_the_step(toy, tmp_path, monkeypatch):
    config = TrainConfig(epochs=3, dropout=0.0, clip_norm=0.1)
    whole = fitted(toy, tmp_path / "whole", config)
    for limit in (1, 90):
        monkeypatch.setattr("wsimil.training.loop.piece_tiles", lambda device, limit=limit: limit)
        cut = fitted(toy, tmp_path / f"cut{limit}", config)
        for row, other in zip(whole.history, cut.history, strict=True):
            assert row == pytest.approx(other, rel=1e-5)
        for name, value in whole.best_state.items():
            if name == "inner.attend.score.bias":
                continue  # cancels in the softmax: its gradient is rounding, which Adam makes steps of
            torch.testing.assert_close(cut.best_state[name], value, rtol=1e-4, atol=1e-5)


def test_the_learning_rate_rises_then_falls_to_its_end():
    config = TrainConfig(lr=2e-4, min_lr=5e-6, warm_up=0.1)
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(2e-5) and max(rates) == rates[9] == pytest.approx(2e-4)
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[100] == pytest.approx(5e-6)
    assert rates[55] == pytest.approx((2e-4 + 5e-6) / 2)  # half-way down the cosine
    assert learning_rate(TrainConfig(lr=2e-4, warm_up=0.0), 0, 100) == 2e-4


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_the_optimiser_is_the_one_asked_for(toy, tmp_path, optimizer, betas):
    """Against torch's own on the same steps."""
    asked = {"epochs": 1, "dropout": 0.0, "bags_per_step": 1, "warm_up": 0.0, "select": "last"}
    config = TrainConfig(**asked, optimizer=optimizer, betas=betas, weight_decay=0.1, lr=1e-2, min_lr=1e-2)
    ours = fitted(toy, tmp_path / "ours", config)

    store = TileStore(BagFolder(toy, cache_bytes=0), memory_bytes=1 << 30)
    names = store.bags.slide_ids
    slides = LabelledSlides(store, names[:16], torch.tensor([float(name[1:]) % 2 for name in names[:16]]))
    torch.manual_seed(0)
    model = Standardized(make_aggregator("gated_abmil", DIM, 1, hidden=8, dropout=0.0), *store.moments(names[:16]))
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.Adam
    reference = kind(model.parameters(), lr=1e-2, betas=betas, weight_decay=0.1)
    for step in Steps(slides, bags_per_step=1, shuffle_seed=config.seed).plan(0):
        reference.zero_grad()
        (piece,) = slides.pieces(step, 0, limit=None)
        torch.stack(list(SlideLabel(TASK).losses(model, piece, 0.0).values())).sum().backward()
        reference.step()
    for name, value in model.state_dict().items():
        if name != "inner.attend.score.bias":
            torch.testing.assert_close(ours.best_state[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"epochs": 40, "patience": 2, "lr": 0.03}, {"epochs": 3}], ids=["patience", "epochs"])
def test_a_run_killed_after_its_last_epoch_trains_no_further(toy, tmp_path, monkeypatch, changes):
    config = TrainConfig(hidden=8, **changes)
    monkeypatch.setattr("wsimil.training.loop._LastCheckpoint", partial(_LastCheckpoint, every_seconds=0.0))
    calm = fitted(toy, tmp_path / "run", config)
    again = fitted(toy, tmp_path / "run", config)
    assert again.history == calm.history and again.best_epoch == calm.best_epoch and len(calm.history) < 40
    assert all(torch.equal(value, again.best_state[name]) for name, value in calm.best_state.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_goes_on_with_the_same_coins_where_rows_are_walked(toy, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(fused, "_FROM", 1)
    monkeypatch.setattr("wsimil.training.loop._LastCheckpoint", partial(_LastCheckpoint, every_seconds=0.0))
    config = TrainConfig(epochs=4, dropout=0.5, select="last", precision=precision)
    calm = fitted(toy, tmp_path / "calm", config)

    def killed(self, epoch, infer):
        if epoch == 2:
            raise KeyboardInterrupt

    heard = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SlideLabel, "on_epoch_start", killed)
        fitted(toy, tmp_path / "killed", config)
    assert signal.getsignal(signal.SIGINT) is heard  # the next Ctrl-C, too
    again = fitted(toy, tmp_path / "killed", config)
    assert again.history == calm.history
    assert all(torch.equal(value, again.best_state[name]) for name, value in calm.best_state.items())


def test_epochs_are_all_kept_when_the_run_is_killed_while_they_are_moved(toy, tmp_path, monkeypatch):
    config = TrainConfig(epochs=3, hidden=8, keep_epochs=True, fold="0")
    settings = Settings(train=config, split=SplitConfig(folds=2))
    replace, moved = os.replace, []

    def killed(source, target):
        if Path(source).stem.isdigit():  # not a temporary file
            if moved:
                raise KeyboardInterrupt
            moved.append(source)
        replace(source, target)

    monkeypatch.setattr("wsimil.training.record.os.replace", killed)
    monkeypatch.setattr("wsimil.training.loop._LastCheckpoint", partial(_LastCheckpoint, every_seconds=0.0))
    with pytest.raises(KeyboardInterrupt):
        train(toy, toy / "labels.csv", tmp_path, settings=settings, quiet=True)
    monkeypatch.setattr("wsimil.training.record.os.replace", replace)
    train(toy, toy / "labels.csv", tmp_path, settings=settings, quiet=True)
    for epoch in ("000", "001", "002"):
        load_model(tmp_path / "epochs" / epoch / "fold0-seed0")


def test_every_epoch_that_is_kept_is_a_run(toy, tmp_path):
    config = TrainConfig(epochs=3, hidden=8, keep_epochs=True)
    settings = Settings(train=config, split=SplitConfig(folds=2))
    folders = train(toy, toy / "labels.csv", tmp_path / "run", settings=settings, quiet=True)
    epochs = sorted(path.name for path in (tmp_path / "run/epochs").iterdir())
    assert epochs == ["000", "001", "002"]
    for folder in folders:
        best = load_model(folder)
        assert not (folder / "epochs").exists()
        again = load_model(tmp_path / "run/epochs" / f"{best.content['best_epoch']:03d}" / folder.name)
        for name, value in best.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[name])
        assert (again.threshold, again.temperature) == (0.5, 1.0)
    rows = predict(toy, tmp_path / "run/epochs/001", tmp_path / "predictions", quiet=True)
    assert set(rows["split"]) == {"test"} and rows["slide_id"].is_unique


def test_clipping_shortens_steps(toy, tmp_path):
    free, held = (fitted(toy, tmp_path / str(clip), TrainConfig(epochs=2, dropout=0.0, clip_norm=clip)) for clip in (0.0, 1e-9))
    moved = [one.history[-1]["val_loss"] for one in (free, held)]
    assert moved[0] != moved[1]


def test_bf16_learns_the_same_within_its_digits(toy, tmp_path):
    configs = [TrainConfig(epochs=4, dropout=0.0, precision=precision) for precision in ("fp32", "bf16")]
    fine, coarse = (fitted(toy, tmp_path / config.precision, config) for config in configs)
    assert fine.history != coarse.history
    assert [row["val_loss"] for row in coarse.history] == pytest.approx([row["val_loss"] for row in fine.history], abs=0.02)
    assert all(value.dtype == torch.float32 for value in coarse.best_state.values())


def test_emulated_bf16_is_not_chosen(monkeypatch):
    for instructions, chosen in (({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda instructions=instructions: instructions, raising=False)
        assert resolve_precision("auto", "cpu") == chosen
    assert resolve_precision("bf16", "cpu") == "bf16" and resolve_precision("auto", "mps") == "fp32"


# ---------------------------------------------------------------- large bags


IN_PIECES = ["abmil", "gated_abmil", "additive", "clam_mb", "dtfd", "acmil", "mean_pool"]


@pytest.mark.parametrize("aggregator", IN_PIECES)
def test_recomputed_pieces_give_the_same_gradients_from_less_memory(aggregator, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    bags = BagBatch(torch.randn(4000, DIM, generator=generator), torch.tensor([0, 1500, 4000]))
    monkeypatch.setattr(fused, "_FROM", 1 << 60)  # which keeps little in any case
    monkeypatch.setattr(packed, "_ROWS_OF_A_THREAD", 500 // torch.get_num_threads())  # the same pieces in both

    def run() -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        model = make_aggregator(aggregator, DIM, 1, hidden=32)
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(bags).logits.sum()
        loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], sum(kept.values())

    plain, much = run()
    monkeypatch.setattr(packed, "_RECOMPUTED_FROM", 2000)
    again, little = run()
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # dropout too: its coins are tossed alike
    assert little < much / 3


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("aggregator", IN_PIECES)
def test_what_is_recomputed_behind_a_standardisation_is_computed_with_its_weights(aggregator, half, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = 3 * torch.randn(4000, DIM, generator=generator) + 5
    bags = BagBatch(features, torch.tensor([0, 1500, 4000]))
    mean, deviation = features.mean(0), features.std(0)
    monkeypatch.setattr(packed, "_RECOMPUTED_FROM", 2000)
    model = make_aggregator(aggregator, DIM, 1, hidden=32, dropout=0.0)

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    own = {name: id(parameter) for name, parameter in model.named_parameters()}
    torch.manual_seed(0)  # of what some aggregators draw in training
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = Standardized(model, mean, deviation).train()(bags).logits.float().sum()
    folded = gradients(loss)
    assert own == {name: id(parameter) for name, parameter in model.named_parameters()}
    torch.manual_seed(0)
    plain = gradients(model(replace(bags, features=(features - mean) / deviation)).logits.sum())
    for one, other in zip(folded, plain, strict=True):
        if half:
            assert (one - other).norm() <= 0.02 * other.norm() + 1e-3
        else:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_byte_dropout_keeps_the_mean_and_drops_its_share(p):
    torch.manual_seed(0)
    values = torch.ones(1000, 333, requires_grad=True)
    dropped = ByteDropout(p).train()(values)
    assert float((dropped == 0).float().mean()) == pytest.approx(p, abs=0.004)
    assert float(dropped.detach().mean()) == pytest.approx(1, abs=0.01)
    dropped.sum().backward()
    assert values.grad is not None and torch.equal(values.grad, dropped.detach())  # the same tiles on the way back
    columns = (dropped == 0).float()
    assert float(columns.mean(0).std()) < 0.03 and float(columns.mean(1).std()) < 0.05  # no row or column is favoured
    assert torch.equal(ByteDropout(p).eval()(values), values)


def test_quick_dropout_leaves_weights_and_their_names(toy):
    model = make_aggregator("gated_abmil", DIM, 1, dropout=0.25)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quicken_dropout(model)
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }
    kinds = [type(module) for module in model.modules()]
    assert ByteDropout in kinds and nn.Dropout not in [type(module) for module in model.modules() if getattr(module, "p", 0)]


# ---------------------------------------------------------------- options and objectives


def test_an_aggregators_own_options_reach_it_and_come_back(toy, tmp_path):
    config = TrainConfig(epochs=1, hidden=8, fold="0", aggregator="gated_abmil", aggregator_options=("attention=5", "gated=false"))
    (run,) = train(toy, toy / "labels.csv", tmp_path, settings=Settings(split=SplitConfig(folds=2), train=config))
    assert read_json(run / "model.json")["aggregator_options"] == {"attention": 5, "gated": False}
    attend = load_model(run).model.inner.attend  # type: ignore[union-attr]
    assert attend.feature.weight.shape == (5, 8) and attend.gate is None


def test_a_model_of_options_that_are_refused_today_can_still_be_read(toy, tmp_path):
    config = TrainConfig(epochs=1, hidden=8, fold="0", aggregator="sm_abmil", aggregator_options=("steps=0",))
    settings = Settings(split=SplitConfig(folds=2), train=config)
    (run,) = train(toy, toy / "labels.csv", tmp_path, settings=settings)
    write_json(run / "model.json", read_json(run / "model.json") | {"aggregator_options": {"steps": -1}})
    assert load_model(run).content["aggregator_options"] == {"steps": -1}


def test_options_are_read_from_flags_and_yaml_alike(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {aggregator_options: {attention: 5, gated: false}, stack: on}")
    from_file = read_settings(["train"], tmp_path / "config.yaml").train
    typed = read_settings(["train"], overrides={"--aggregator-options": ["attention=5", "gated=False"], "stack": "on"}).train
    assert from_file.options_of("aggregator_options") == typed.options_of("aggregator_options") == {"attention": 5, "gated": False}
    assert from_file.stack == typed.stack == "on"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("attention",), "name=value"),
        (("hidden=3",), "--hidden 3"),
        (("atention=3",), "atention"),
        (("attention=0",), "aggregator gated_abmil: attention is 0; expected at least 1"),
        (("gated=maybe",), "aggregator gated_abmil: gated is 'maybe'; expected true or false"),
    ],
)
def test_wrong_options_are_named(toy, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        config = TrainConfig(epochs=1, fold="0", aggregator_options=options)
        train(toy, toy / "labels.csv", tmp_path, settings=Settings(split=SplitConfig(folds=2), train=config))


def test_an_aggregator_meets_the_objective_of_its_paper():
    labels = ["neg", "pos"] * 4
    clam = build_objective(TrainConfig(aggregator="clam_sb", objective_options=("k=3",)), TASK, labels)
    assert isinstance(clam, ClamInstances) and clam.k == 3
    plain = TrainConfig(aggregator="clam_sb", objective="slide_label")
    assert isinstance(build_objective(plain, TASK, labels), SlideLabel)
    assert isinstance(build_objective(TrainConfig(aggregator="clam_sb"), Task("regression"), ["1", "2"]), SlideLabel)
    with pytest.raises(ConfigError, match="clam_instances"):
        build_objective(TrainConfig(objective="clam_instance"), TASK, labels)


def test_objectives_are_joined_each_around_those_before_it():
    config = TrainConfig(aggregator="clam_sb", objective="auto+attention_entropy+averaged_weights", hidden=8)
    config = replace(config, objective_options=("k=3", "weight=0.2", "decay=0.5", "extra_weight=0.7"))
    outer: Any = build_objective(config, TASK, ["neg", "pos"])
    assert [type(one) for one in (outer, outer.inner, outer.inner.inner)] == [AveragedWeights, AttentionEntropy, ClamInstances]
    assert (outer.decay, outer.inner.weight, outer.inner.inner.k) == (0.5, 0.2, 3)
    assert outer.inner.inner.slide_label.extra_weight == 0.7
    for objective, said in {
        "averaged_weights+clam_instances": "stands first",
        "mhim+mhim": "twice",
        "auto+averaged_weight": "did you mean averaged_weights",
    }.items():
        with pytest.raises(ConfigError, match=said):
            build_objective(replace(config, objective=objective), TASK, ["neg", "pos"])
    with pytest.raises(ConfigError, match=r"no option decays.*did you mean decay"):
        build_objective(replace(config, objective_options=("decays=0.5",)), TASK, ["neg", "pos"])
    with pytest.raises(ConfigError, match="no option own_sets"):
        build_objective(replace(config, objective_options=("own_sets=true",)), TASK, ["neg", "pos"])


def test_balanced_sampling_takes_the_place_of_weights(toy, tmp_path):
    settings = Settings(split=SplitConfig(folds=2), train=TrainConfig(epochs=1, hidden=8, fold="0", sampling="balanced"))
    (run,) = train(toy, toy / "labels.csv", tmp_path, settings=settings)
    assert load_model(run).content["config"]["sampling"] == "balanced"
    order = build_objective(TrainConfig(sampling="balanced"), TASK, ["neg"] * 9 + ["pos"]).sampler(0)
    assert sorted(np.array(list(order or ())) == 9) == [False] * 5 + [True] * 5


# ---------------------------------------------------------------- nothing from the test slides


def test_no_argument_leads_from_test_slides_to_the_loop():
    expected = ["run", "model", "objective", "train", "val", "config", "device", "ranks", "key", "epochs"]
    assert [*inspect.signature(fit).parameters] == expected


@pytest.mark.parametrize("stack", ["off", "on"])
def test_features_of_test_slides_do_not_matter(tmp_path, stack):
    """Other features in every test slide of fold 0 leave its weights, epoch and threshold as they were."""
    write_cohort(tmp_path)
    config = TrainConfig(epochs=3, hidden=8, fold="0", seeds=2, stack=stack)
    settings = Settings(split=SplitConfig(folds=3), train=config)
    honest = train(tmp_path, tmp_path / "labels.csv", tmp_path / "honest", settings=settings)
    splits = np.loadtxt(tmp_path / "honest" / "splits.csv", dtype=str, delimiter=",", skiprows=1)
    tested = splits[(splits[:, 0] == "0") & (splits[:, -1] == "test")][:, 1]
    assert len(tested) == 8
    for name in tested:
        path = tmp_path / "features_toy" / f"{name}.h5"
        bag = read_bag(path)
        parts = {"features": -bag.features[::-1], "coords": bag.coords_level0_px, "valid": bag.valid}
        write_hdf5(path, {key: Dataset(value) for key, value in parts.items()}, read_attributes(path))
    changed = train(
        tmp_path, tmp_path / "labels.csv", tmp_path / "changed", splits=tmp_path / "honest" / "splits.csv", settings=settings
    )
    for one, other in zip(honest, changed, strict=True):
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
        assert read_json(one / "model.json")["threshold"] == read_json(other / "model.json")["threshold"]


def test_one_slide_under_two_names_is_refused_on_two_sides(tmp_path):
    write_cohort(tmp_path)
    folder = tmp_path / "features_toy"
    attributes = read_attributes(folder / "s04.h5") | {"slide_id": "s04-again"}
    bag = read_bag(folder / "s04.h5")
    parts = {"features": bag.features, "coords": bag.coords_level0_px, "valid": bag.valid}
    write_hdf5(folder / "s04-again.h5", {key: Dataset(value) for key, value in parts.items()}, attributes)
    labels = tmp_path / "labels.csv"
    text = labels.read_text() + "s04-again,neg\n"
    labels.write_text(text)
    settings = Settings(split=SplitConfig(folds=3), train=TrainConfig(epochs=1, hidden=8))
    with pytest.raises(SplitsError, match=r"s04 and s04-again have the same features|s04-again and s04 have the same features"):
        train(tmp_path, labels, tmp_path / "run", settings=settings)
    assert not (tmp_path / "run").exists()
    # of one patient they are always on one side
    rows = [line.split(",") for line in text.splitlines()[1:]]
    labels.write_text("slide,patient,label\n" + "\n".join(f"{slide},{slide[:3]},{label}" for slide, label in rows))
    assert len(train(tmp_path, labels, tmp_path / "run", settings=settings)) == 3
    shutil.rmtree(tmp_path / "run")

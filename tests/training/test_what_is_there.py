"""What a folder holds before a training: the user's own tables, finished models, and what killed or damaged runs left."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import pandas as pd
import pytest
import torch

from wsimil.cli import main
from wsimil.config import Settings, SplitConfig, TrainConfig
from wsimil.errors import BagFormatError, UsageError, WsimilError
from wsimil.files import atomic_path
from wsimil.prediction import predict
from wsimil.training import train

QUICK = TrainConfig(epochs=1, hidden=8, device="cpu", stack="off")


def trained(toy: Path, out: Path, *, labels: Path | None = None, splits: Path | None = None, **changes) -> list[str]:
    """What is said."""
    said: list[str] = []
    settings = Settings(train=replace(QUICK, **changes), split=SplitConfig(folds=2))
    train(toy, labels or toy / "labels.csv", out, splits=splits, settings=settings, say=said.append)
    return said


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- the user's tables


def test_a_table_that_was_given_is_not_written_over(toy, tmp_path):
    """Its other columns would be gone."""
    for name in ("labels", "splits"):
        (tmp_path / name).mkdir()
    own = pd.read_csv(toy / "labels.csv").assign(age=50)
    own.to_csv(tmp_path / "labels" / "labels.csv", index=False)
    with pytest.raises(UsageError, match=r"labels/labels\.csv: the table that was given .* another --out"):
        trained(toy, tmp_path / "labels", labels=tmp_path / "labels" / "labels.csv")
    sides = ["train"] * 12 + ["val"] * 6 + ["test"] * 6
    splits = pd.DataFrame({"fold": 0, "slide_id": own["slide"], "patient": own["slide"], "split": sides, "scanner": "X"})
    splits.to_csv(tmp_path / "splits" / "splits.csv", index=False)
    with pytest.raises(UsageError, match=r"splits/splits\.csv: the table that was given"):
        trained(toy, tmp_path / "splits", splits=tmp_path / "splits" / "splits.csv")
    assert pd.read_csv(tmp_path / "labels" / "labels.csv").equals(own)
    assert pd.read_csv(tmp_path / "splits" / "splits.csv").equals(splits)
    assert len(list(tmp_path.rglob("*.*"))) == 2


def test_a_runs_own_tables_may_be_given_to_it(toy, tmp_path):
    trained(toy, tmp_path)
    before = contents(tmp_path)
    said = trained(toy, tmp_path, labels=tmp_path / "labels.csv", splits=tmp_path / "splits.csv")
    assert sum("already trained" in line for line in said) == 2 and contents(tmp_path) == before


def test_folds_are_not_written_over_the_labels_they_are_of(toy, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text((toy / "labels.csv").read_text())
    assert main(["split", str(table), "--out", str(table)]) == 2
    assert "table.csv: the table that was given would be written over" in capsys.readouterr().err
    assert table.read_text() == (toy / "labels.csv").read_text()
    assert main(["split", str(table), "--out", str(tmp_path / "splits.csv")]) == 0


# ---------------------------------------------------------------- a finished run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "fold 0"),
        ({"aggregator_options": ("layers=3",)}, "layers"),
        ({"objective": "clam"}, "objective"),
        ({"stack": "on", "aggregator": "transmil"}, "--stack on"),
        (
            {"objective": "auto+mhim", "aggregator": "max_pool"},
            r"--objective auto\+mhim with --aggregator max_pool: .*no attention",
        ),
        ({"objective": "auto+attention_entropy", "aggregator": "max_pool"}, "nothing to spread"),
        ({"objective": "clam_instances", "aggregator": "acmil"}, "heads or branches"),
        ({"objective_options": ("extra_weight=5",)}, "extra_weight is of further outputs"),
        ({"device": "gpu"}, "--device gpu: expected auto, cpu"),
        ({"device": "cpu:1"}, "--device cpu:1: expected auto, cpu"),
        ({"device": "cuda:99"}, "--device cuda:99: torch finds"),
    ],
    ids=["splits", "aggregator", "objective", "stack", "mhim", "entropy", "clam", "extras", "gpu", "number", "cuda"],
)
def test_a_training_that_is_refused_leaves_a_finished_run_as_it_was(toy, tmp_path, changes, said):
    run = tmp_path / "run"
    trained(toy, run)
    before = contents(run)
    splits = None
    if not changes:  # folds whose training slides are of one class
        names = pd.read_csv(toy / "labels.csv")["slide"]
        sides = ["train" if number % 2 else "val" if number < 12 else "test" for number in range(len(names))]
        splits = tmp_path / "splits.csv"
        pd.DataFrame({"fold": 0, "slide_id": names, "patient": names, "split": sides}).to_csv(splits, index=False)
    with pytest.raises(WsimilError, match=said):
        trained(toy, run, splits=splits, **changes)
    assert contents(run) == before
    assert len(predict(toy, run, tmp_path / "out", quiet=True)) == 24


@pytest.mark.parametrize("kept", [None, 0, 20, -1], ids=["gone", "empty", "header", "end"])
def test_a_model_whose_weights_are_cut_off_is_trained_again(toy, tmp_path, kept):
    trained(toy, tmp_path)
    weights = tmp_path / "fold1-seed0" / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink() if kept is None else weights.write_bytes(whole[:kept])
    said = trained(toy, tmp_path)
    assert "fold0-seed0: already trained" in said[-2] and said[-1].startswith("fold1-seed0: epoch 0 of 1")
    assert weights.read_bytes() == whole


# ---------------------------------------------------------------- what a killed run left


def killed_file(path: Path) -> Path:
    """What a process that was killed while writing `path` leaves: half of it, under a temporary name."""
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        raise KeyboardInterrupt
    path = temporary.with_name(temporary.name.replace(f"-{os.getpid()}-", "-999999999-"))
    path.write_bytes(b"half")
    return path


def test_half_written_epochs_are_no_epochs_and_are_cleared_away(toy, tmp_path):
    folder = tmp_path / "fold0-seed0"
    left = [killed_file(folder / name) for name in ("epochs/0.safetensors", "last.ckpt")] + [killed_file(tmp_path / "stack.ckpt")]
    elsewhere = folder / "epochs" / ".1.tmp-other-host-7-7.safetensors"
    elsewhere.write_bytes(b"half")
    trained(toy, tmp_path, fold="0", epochs=2, keep_epochs=True)
    assert not any(path.exists() for path in left) and not (folder / "epochs").exists()
    assert sorted(path.name for path in (tmp_path / "epochs").iterdir()) == ["000", "001"]
    assert "already trained" in trained(toy, tmp_path, fold="0", epochs=2, keep_epochs=True)[-1]


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(toy, tmp_path, monkeypatch):
    """Two trainings into one folder: the first writes its last.ckpt after the second has begun, and both are killed."""
    plain = {"fold": "0", "epochs": 3, "keep_epochs": True}
    trained(toy, tmp_path / "calm", **plain)
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("wsimil.training.run.finish", interrupt)
        trained(toy, run, lr=0.5, **plain)
    left = contents(run)
    assert "fold0-seed0/last.ckpt" in left and "fold0-seed0/epochs/2.safetensors" in left
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("wsimil.training.run.fit", interrupt)
        trained(toy, run, **plain)
    for name in ("last.ckpt", "epochs/0.safetensors", "epochs/1.safetensors", "epochs/2.safetensors"):
        (run / "fold0-seed0" / name).parent.mkdir(exist_ok=True)
        (run / "fold0-seed0" / name).write_bytes(left[f"fold0-seed0/{name}"])
    trained(toy, run, **plain)
    for name in ("fold0-seed0/model.safetensors", *(f"epochs/00{epoch}/fold0-seed0/model.safetensors" for epoch in range(3))):
        assert (run / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()


def interrupt(*_, **__) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kept", [0, 1000])
@pytest.mark.parametrize(("stack", "name"), [("off", "fold0-seed0/last.ckpt"), ("on", "stack.ckpt")])
def test_a_damaged_checkpoint_is_named_and_may_be_deleted(toy, tmp_path, monkeypatch, stack, name, kept):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("wsimil.training.run.finish", interrupt)
        trained(toy, tmp_path, stack=stack)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept])
    with pytest.raises(UsageError, match=f"{name}: damaged .* delete it"):
        trained(toy, tmp_path, stack=stack)
    (tmp_path / name).unlink()
    assert sum("epoch 0 of 1" in line for line in trained(toy, tmp_path, stack=stack)) == 2


@pytest.mark.parametrize("stack", ["off", "on"])
def test_ctrl_c_is_said_as_other_commands_say_it(toy, tmp_path, monkeypatch, capsys, stack):
    where = "wsimil.training.loop.Loop.training_step" if stack == "off" else "wsimil.training.stacked._Stack.step"
    command = ["train", str(toy), "--labels", str(toy / "labels.csv"), "--out", str(tmp_path), "--stack", stack, "--device", "cpu"]
    monkeypatch.setattr(where, interrupt)
    assert main([*command, "--epochs", "2"]) == 130
    assert capsys.readouterr().err.endswith("wsimil train: interrupted; the same command goes on where it stopped\n")


def test_a_step_that_is_too_large_for_the_memory_is_said_with_ways_out(toy, tmp_path, monkeypatch):
    def too_large(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has …")

    monkeypatch.setattr("wsimil.training.loop.Loop.training_step", too_large)
    with pytest.raises(UsageError, match=r"memory of cpu does not suffice .*gated_abmil \(CUDA out of memory\): --tiles-per-bag"):
        trained(toy, tmp_path)


def test_bags_that_do_not_say_where_tiles_lie_are_named_before_any_work(toy, tmp_path):
    folder = tmp_path / "job"
    shutil.copytree(toy, folder)
    for name in ("s03", "s10"):
        with h5py.File(folder / "features_toy" / f"{name}.h5", "a") as file:
            del file.attrs["mpp"]
    run = tmp_path / "run"
    trained(folder, run)
    before = contents(run)
    with pytest.raises(UsageError, match=r"--aggregator sm_abmil needs the place of each tile, and 2 bags .*: s03, s10; convert"):
        trained(folder, run, aggregator="sm_abmil")
    assert contents(run) == before


def test_a_damaged_bag_takes_no_part_and_a_run_that_had_it_whole_is_kept(toy, tmp_path):
    folder, run = tmp_path / "job", tmp_path / "run"
    shutil.copytree(toy, folder)
    bag = folder / "features_toy" / "s05.h5"
    whole = bag.read_bytes()
    bag.write_bytes(whole[: len(whole) // 2])
    said = trained(folder, run)
    assert len([line for line in said if line.startswith("s05: its bag cannot be read, so it takes no part: ")]) == 1
    splits = pd.read_csv(run / "splits.csv")
    assert splits["slide_id"].nunique() == 23 and "s05" not in set(splits["slide_id"])
    before = contents(run)
    trained(folder, run)
    assert contents(run) == before

    (tmp_path / "whole").mkdir()
    bag.write_bytes(whole)
    trained(folder, tmp_path / "whole")
    before = contents(tmp_path / "whole")
    bag.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BagFormatError, match=r"s05\.h5.*; .*whole has been trained with it \(s05\): extract again"):
        trained(folder, tmp_path / "whole")
    assert contents(tmp_path / "whole") == before


def test_one_process_trains_a_model_at_a_time(toy, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    trained(toy, tmp_path, fold="1")
    before = contents(tmp_path / "fold1-seed0")
    (tmp_path / "fold0-seed0").mkdir()
    with open(tmp_path / "fold0-seed0" / "key.txt", "w") as handle:  # as another process holds it
        fcntl.flock(handle, fcntl.LOCK_EX)
        tables = {name: (tmp_path / name).read_bytes() for name in ("splits.csv", "labels.csv", "config.yaml")}
        with pytest.raises(UsageError, match="fold0-seed0 is being trained by another process; wait for it"):
            trained(toy, tmp_path, hidden=16)
        assert tables == {name: (tmp_path / name).read_bytes() for name in tables}
        trained(toy, tmp_path, fold="1")  # folds are trained side by side
    trained(toy, tmp_path)
    assert contents(tmp_path / "fold1-seed0") == before and (tmp_path / "fold0-seed0" / "model.json").exists()

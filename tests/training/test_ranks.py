"""Several processes share a step: its gradient is that of one process with the same bags, however unevenly they are dealt."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest
import torch
from rank_work import BAGS, DEALT, mean_loss, share_and_die, weights

from wsimil.bags.dataset import BagFolder
from wsimil.cli import main
from wsimil.config import Settings, SplitConfig, TrainConfig
from wsimil.errors import BagFormatError, UsageError, WsimilError
from wsimil.files import read_json
from wsimil.training import load_model, train
from wsimil.training.items import LabelledSlides, Steps, TileStore
from wsimil.training.loop import Loop
from wsimil.training.ranks import Ranks, _cause, _Failure, devices_of, run_ranks


def test_every_bag_has_one_rank_and_ranks_are_about_as_busy():
    sizes = [90, 10, 20, 30, 40, 50, 5]
    shares = [Ranks(rank, 3).share(sizes) for rank in range(3)]
    assert sorted(place for share in shares for place in share) == list(range(len(sizes)))
    assert [sum(sizes[place] for place in share) for share in shares] == [90, 80, 75]
    assert Ranks().share(sizes) == list(range(len(sizes)))
    assert Ranks(2, 3).share([7]) == []


def test_steps_of_all_ranks_together_are_the_steps(toy):
    bags = BagFolder(toy, cache_bytes=0)
    slides = LabelledSlides(TileStore(bags, memory_bytes=1 << 30), bags.slide_ids, torch.arange(len(bags.slide_ids)))

    def seen(ranks: Ranks) -> list[list[int]]:
        return contents(Steps(slides, bags_per_step=7, limit=64, shuffle_seed=1, ranks=ranks))

    def contents(steps: Steps) -> list[list[int]]:
        return [[int(target) for piece in step for target in piece.targets] for step in steps]

    alone, one, other = seen(Ranks()), seen(Ranks(0, 2)), seen(Ranks(1, 2))
    assert [len(step) for step in alone] == [7, 7, 7, 3]
    for whole, first, second in zip(alone, one, other, strict=True):
        assert sorted(whole) == sorted(first + second) and first and second


# ---------------------------------------------------------------- what the processes do


def test_a_shared_gradient_is_that_of_all_bags_at_once_and_a_rank_that_is_killed_ends_all():
    found = []
    with pytest.raises(WsimilError, match="process 2 of 2 was ended by SIGKILL"):
        found.extend(run_ranks(["cpu", "cpu"], share_and_die))
    parameters = weights()
    loss = mean_loss(parameters, list(range(BAGS)))
    loss.backward()
    assert len(found) == len(DEALT)
    for together, mean, first, second, third in found:
        assert together == pytest.approx(loss.item(), rel=1e-12) and mean == 2.0
        torch.testing.assert_close(torch.tensor(first, dtype=torch.float64), parameters[0].grad, rtol=1e-12, atol=0)
        assert second == pytest.approx([3 / BAGS] * 3) and third is None


def test_of_the_errors_of_two_ranks_the_one_that_came_first_is_raised():
    """The other only lost its neighbour."""

    class Ended:
        exitcode = 0

        def join(self, timeout: float) -> None: ...

    pipes, its = zip(*(multiprocessing.Pipe(duplex=False) for _ in range(2)), strict=True)
    lost, ours = _Failure(None, "connection closed by peer"), _Failure(BagFormatError("s07.h5 is damaged"), "")
    its[1].send(ours)
    for one in its:
        one.close()
    assert isinstance(error := _cause(lost, pipes, [Ended(), Ended()]), BagFormatError) and str(error) == "s07.h5 is damaged"
    assert "connection closed" in str(_cause(lost, pipes, [Ended(), Ended()]))


def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert devices_of("cuda", 2) == ["cuda:0", "cuda:1"] and devices_of("cpu", 2) == ["cpu", "cpu"]
    with pytest.raises(UsageError, match="there are 2 GPUs"):
        devices_of("cuda", 3)
    with pytest.raises(UsageError, match="--device cuda:1"):
        devices_of("cuda:1", 2)


# ---------------------------------------------------------------- training


def settings_of(**changes) -> Settings:
    # a last step of one bag, which one of two processes has none of; CLAM's judges: weights that not every step reaches
    plain = TrainConfig(
        aggregator="clam_sb", epochs=4, hidden=8, dropout=0.0, bags_per_step=4, clip_norm=0.1, device="cpu", precision="fp32"
    )  # fmt: skip
    return Settings(split=SplitConfig(folds=2, val_fraction=0.25), train=replace(plain, **changes))


def test_two_processes_end_in_the_weights_of_one(toy, tmp_path, monkeypatch, capsys):
    """Fold 0 from its start, fold 1 from where one process was killed."""
    soup = {"soup": 2, "soup_epochs": 1, "soup_kept": 1}
    alone = train(toy, toy / "labels.csv", tmp_path / "alone", settings=settings_of(**soup))
    n_train = read_json(alone[0] / "model.json")["n_train"]
    assert n_train % 4 == 1

    def killed(self: Loop) -> None:
        if self.current_epoch == 2:
            raise KeyboardInterrupt

    def save_now(self, trainer, pl_module) -> None:
        trainer.save_checkpoint(self.path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("wsimil.training.loop._LastCheckpoint.on_train_epoch_end", save_now)
        patch.setattr(Loop, "on_train_epoch_start", killed)
        train(toy, toy / "labels.csv", tmp_path / "shared", settings=settings_of(fold="1", **soup))
    assert (tmp_path / "shared" / "fold1-seed0" / "last.ckpt").exists()

    command = ["train", str(toy), "--labels", str(toy / "labels.csv"), "--out", str(tmp_path / "shared"), "--devices", "2"]
    command += ["--device", "cpu", "--folds", "2", "--val-fraction", "0.25", "--aggregator", "clam_sb", "--epochs", "4"]
    command += ["--hidden", "8", "--dropout", "0", "--clip-norm", "0.1", "--precision", "fp32"]
    command += ["--soup", "2", "--soup-epochs", "1", "--soup-kept", "1"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.out == f"2 models in {tmp_path / 'shared'}\n" and printed.err.count("of 4, validation loss") == 2
    for one in alone:
        other = tmp_path / "shared" / one.name
        rows = [[float(number) for number in line.split(",")] for line in (one / "metrics.csv").read_text().splitlines()[1:]]
        shared = [[float(number) for number in line.split(",")] for line in (other / "metrics.csv").read_text().splitlines()[1:]]
        assert len(rows) == 4 and shared == [pytest.approx(row, rel=1e-5) for row in rows]
        expected, found = load_model(one), load_model(other)
        assert found.content["config"]["devices"] == 2 and found.threshold == pytest.approx(expected.threshold, rel=1e-4)
        for name, value in expected.model.state_dict().items():
            if not name.endswith("attend.score.bias"):  # cancels in the softmax: its gradient is rounding
                torch.testing.assert_close(found.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert main(command) == 0
    assert capsys.readouterr().err.count("already trained") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"stack": "on"}, "--stack on: a stack trains on one device"), ({"device": "mps"}, "--device mps")],
)
def test_what_cannot_be_shared_says_why(toy, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        train(toy, toy / "labels.csv", tmp_path, settings=settings_of(devices=2, **changes))


def test_a_loss_that_compares_slides_is_not_shared(toy, tmp_path):
    rows = [line.split(",")[0] for line in (toy / "labels.csv").read_text().splitlines()[1:]]
    table = ["slide,months,died", *(f"{name},{index + 1},1" for index, name in enumerate(rows))]
    (tmp_path / "labels.csv").write_text("\n".join(table))
    command = ["train", str(toy), "--labels", str(tmp_path / "labels.csv"), "--out", str(tmp_path / "run"), "--folds", "2"]
    assert main([*command, "--time", "months", "--event", "died", "--loss", "cox", "--devices", "2", "--device", "cpu"]) == 2

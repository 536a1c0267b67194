"""What each side of a fold is for: training slides teach, validation slides choose, test slides do neither.

Everything here is asked of `train` itself, from the files it leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from toy_bags import write_cohort

from wsimil.bags.bag import read_bag
from wsimil.bags.dataset import BagFolder
from wsimil.config import Settings, TrainConfig
from wsimil.errors import LabelsError, SplitsError
from wsimil.evaluation.calibration import calibrate
from wsimil.hdf5 import Dataset, read_attributes, write_hdf5
from wsimil.training import TrainedModel, load_model, train

PLAIN = TrainConfig(epochs=2, hidden=8, dropout=0.0, bags_per_step=4, device="cpu", precision="fp32", stack="off", patience=99)
SIDES = {"train": range(14), "val": range(14, 20), "test": range(20, 24)}
"""Numbers of the slides; even ones are negative."""

stacked_or_not = pytest.mark.parametrize("stack", ["off", "on"])


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Bags, labels.csv and splits.csv of one fold."""
    write_cohort(tmp_path)
    rows = [f"0,s{number:02},s{number:02},,{side}" for side, numbers in SIDES.items() for number in numbers]
    (tmp_path / "splits.csv").write_text("\n".join(["fold,slide_id,patient,site,split", *rows]))
    return tmp_path


def relabel(cohort: Path, label: Callable[[int], int]) -> None:
    names = ("neg", "pos")
    rows = [f"s{number:02},{names[label(number)]}" for number in range(24)]
    (cohort / "labels.csv").write_text("\n".join(["slide,label", *rows]))


def change(cohort: Path, number: int, features: np.ndarray | None = None, **attributes) -> None:
    """Write a bag again with other features or further attributes."""
    path = cohort / "features_toy" / f"s{number:02}.h5"
    bag, own = read_bag(path), read_attributes(path)
    parts = {"features": bag.features if features is None else features, "coords": bag.coords_level0_px, "valid": bag.valid}
    write_hdf5(path, {key: Dataset(value) for key, value in parts.items()}, own | attributes)


def fitted(cohort: Path, name: str = "run", **changes) -> list[Path]:
    settings = Settings(train=replace(PLAIN, **changes))
    return train(cohort, cohort / "labels.csv", cohort / name, splits=cohort / "splits.csv", settings=settings)


def judged(cohort: Path, trained: TrainedModel, side: str) -> tuple[Tensor, Tensor]:
    """Logits and targets (n,) of a side: every slide with all its tiles."""
    bags = BagFolder(cohort)
    with torch.inference_mode():
        logits = [trained.model(bags.load(f"s{number:02}")).logits[0, 0] for number in SIDES[side]]
    table = pd.read_csv(cohort / "labels.csv").set_index("slide")["label"]
    return torch.stack(logits), torch.tensor([float(table[f"s{number:02}"] == "pos") for number in SIDES[side]])


def threshold(trained: TrainedModel, logits: Tensor, targets: Tensor) -> float | None:
    return calibrate(trained.task, logits[:, None], targets)[1]


@stacked_or_not
def test_the_epoch_is_chosen_by_the_loss_of_the_validation_slides(cohort, stack):
    """Of which the labels are turned round: what is learned makes it worse from epoch to epoch."""
    relabel(cohort, lambda number: (number + (number in SIDES["val"])) % 2)
    runs = fitted(cohort, epochs=6, lr=0.01, seeds=2, stack=stack)
    for run in runs:
        table = pd.read_csv(run / "metrics.csv")
        best = int(table["val_loss"].argmin())
        trained = load_model(run)
        assert best != table["train_loss"].argmin()  # else this shows nothing
        assert trained.content["best_epoch"] == best and trained.content["val_loss"] == table["val_loss"][best]


@stacked_or_not
@pytest.mark.parametrize("sampled", [{"tiles_per_bag": 2}, {"instance_dropout": 0.9}], ids=["drawn", "dropped"])
def test_validation_slides_are_judged_by_all_their_tiles(cohort, sampled, stack):
    for run in fitted(cohort, epochs=3, seeds=2, balance=False, stack=stack, **sampled):
        trained = load_model(run)
        logits, targets = judged(cohort, trained, "val")
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        assert trained.content["val_loss"] == pytest.approx(float(loss), rel=1e-4)
        assert trained.threshold == pytest.approx(threshold(trained, logits, targets), rel=1e-4)


@stacked_or_not
def test_validation_slides_teach_nothing(cohort, stack):
    """Neither their features (in means and deviations) nor their labels (in weights of classes) reach the last weights."""
    relabel(cohort, lambda number: int(number % 4 == 1))
    how = {"select": "last", "seeds": 2, "stack": stack}
    honest = fitted(cohort, "honest", **how)
    relabel(cohort, lambda number: int(number % 4 == 1 or number in (14, 15, 16)))
    relabelled = fitted(cohort, "relabelled", **how)
    for number in SIDES["val"]:
        change(cohort, number, 9 - 2 * read_bag(cohort / "features_toy" / f"s{number:02}.h5").features)
    changed = fitted(cohort, "changed", **how)
    for one, *others in zip(honest, relabelled, changed, strict=True):
        for other in others:
            assert load_model(one).content["val_loss"] != load_model(other).content["val_loss"]
            assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_classes_weigh_in_validation_as_in_training(cohort):
    relabel(cohort, lambda number: int(number % 4 == 1 or number in (14, 15, 16)))
    (run,) = fitted(cohort)
    trained = load_model(run)
    logits, targets = judged(cohort, trained, "val")
    share = sum(number % 4 == 1 for number in SIDES["train"]) / len(SIDES["train"])
    weights = torch.where(targets == 1, 0.5 / share, 0.5 / (1 - share))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, weights)
    assert trained.content["val_loss"] == pytest.approx(float(loss), rel=1e-4)


@stacked_or_not
def test_the_threshold_is_that_of_the_validation_slides(cohort, stack):
    relabel(cohort, lambda number: (number + (number in SIDES["val"])) % 2)
    for run in fitted(cohort, epochs=6, lr=0.01, seeds=2, select="last", stack=stack):
        trained = load_model(run)
        found = {side: threshold(trained, *judged(cohort, trained, side)) for side in ("train", "val")}
        assert trained.threshold == pytest.approx(found["val"], rel=1e-4)
        assert trained.threshold != pytest.approx(found["train"], rel=1e-2)  # else this shows nothing


# ---------------------------------------------------------------- splits that are given


def test_one_slide_under_two_names_is_refused_on_two_sides_of_given_splits(cohort):
    whole = read_bag(cohort / "features_toy" / "s04.h5")
    path = cohort / "features_toy" / "s20.h5"  # of the test
    parts = {"features": whole.features, "coords": whole.coords_level0_px, "valid": whole.valid}
    write_hdf5(path, {key: Dataset(value) for key, value in parts.items()}, read_attributes(path))
    with pytest.raises(SplitsError, match="s04 and s20 have the same features"):
        fitted(cohort)
    assert not (cohort / "run").exists()


def test_tiles_in_another_order_are_the_same_slide(cohort):
    """Column by column, as other programs write them."""
    whole = read_bag(cohort / "features_toy" / "s04.h5")
    order = np.random.default_rng(0).permutation(len(whole.features))
    path = cohort / "features_toy" / "s20.h5"
    parts = {"features": whole.features[order].astype(np.float32), "coords": whole.coords_level0_px[order], "valid": whole.valid}
    write_hdf5(path, {key: Dataset(value) for key, value in parts.items()}, read_attributes(path))
    with pytest.raises(SplitsError, match="s04 and s20 have the same features"):
        fitted(cohort)


@pytest.mark.parametrize(("one", "other"), [("Pat1", "PAT1"), ("7", "007"), ("7", "7.0"), ("p-7", "p–7")])
def test_patients_that_only_the_splits_name_are_spelled_alike(cohort, one, other):
    rows = [line.split(",") for line in (cohort / "splits.csv").read_text().splitlines()]
    for row in rows:
        row[2] = {"s00": one, "s23": other}.get(row[1], row[2])  # train and test
    (cohort / "splits.csv").write_text("\n".join(map(",".join, rows)))
    with pytest.raises(LabelsError, match="look like one patient"):
        fitted(cohort)


def test_slides_that_are_patients_of_their_own_may_be_spelled_as_they_are(cohort):
    for number, name in ((2, "Case_a"), (22, "case_A")):
        change(cohort, number, slide_id=name)
        (cohort / "features_toy" / f"s{number:02}.h5").rename(cohort / "features_toy" / f"{name}.h5")
        for table in ("labels.csv", "splits.csv"):
            (cohort / table).write_text((cohort / table).read_text().replace(f"s{number:02}", name))
    (run,) = fitted(cohort)
    train(cohort, cohort / "labels.csv", cohort / "run", splits=cohort / "run" / "splits.csv", settings=Settings(train=PLAIN))
    assert load_model(run).content["n_train"] == 14


def test_given_splits_that_part_a_patient_of_the_label_table_are_refused(cohort):
    """CLAM's name no patients: the label table does."""
    columns = {side: pd.Series([f"s{number:02}" for number in numbers]) for side, numbers in SIDES.items()}
    pd.DataFrame(columns).to_csv(cohort / "splits_0.csv")
    table = pd.read_csv(cohort / "labels.csv")
    settings = Settings(train=PLAIN)
    for of_two, refused in ((("s00", "s02"), False), (("s00", "s22"), True)):  # both in train; train and test
        patients = table["slide"].where(~table["slide"].isin(of_two), "Q")
        table.assign(patient=patients).to_csv(cohort / "labels.csv", index=False)
        arguments = (cohort, cohort / "labels.csv", cohort / "run")
        if refused:
            with pytest.raises(SplitsError, match="patient Q is on two sides of fold 0"):
                train(*arguments, splits=cohort / "splits_0.csv", settings=settings)
        else:
            (run,) = train(*arguments, splits=cohort / "splits_0.csv", settings=settings)
            assert load_model(run).content["n_train"] == 14


def test_an_encoder_that_saw_a_test_slide_trains_no_model_that_is_tested_on_it(cohort):
    change(cohort, 3, encoder_saw_slide=True)
    (run,) = fitted(cohort)  # a training slide may be seen
    assert run.exists()
    change(cohort, 21, encoder_saw_slide=True)
    with pytest.raises(SplitsError, match="fold 0: the encoder was pretrained on 1 of 4 test slides, s21"):
        fitted(cohort, "other")
    assert not (cohort / "other").exists()
    change(cohort, 21, encoder_transductive=True)  # it was said
    assert fitted(cohort, "said")

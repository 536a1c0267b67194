"""The main job, end to end, on a painted cohort whose truth is known."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from wsimil.bags.bag import read_bag
from wsimil.bags.dataset import BagFolder
from wsimil.cli import main
from wsimil.config import FilterConfig, HeatmapConfig, JobConfig, Settings, SplitConfig, TileConfig, TrainConfig
from wsimil.demo import hottest_tiles
from wsimil.errors import EncoderMismatchError, UsageError
from wsimil.files import read_json
from wsimil.hdf5 import Dataset, open_hdf5, read_attributes, write_hdf5
from wsimil.prediction import predict
from wsimil.slides.synthetic import write_cohort
from wsimil.study import Study, _not_predicted, run_study
from wsimil.training import load_model, train

SETTINGS = Settings(
    tile=TileConfig(tile_px=128),
    split=SplitConfig(folds=3),
    train=TrainConfig(epochs=30, hidden=64, bags_per_step=2),
    heatmap=HeatmapConfig(max_side_px=500),
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, n_slides=24, seed=3, width_um=1000, height_um=800, workers=1)
    return folder


@pytest.fixture(scope="module")
def study(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return run_study(cohort / "slides", cohort / "labels.csv", tmp_path_factory.mktemp("study"), settings=SETTINGS, quiet=True)


def test_held_out_slides_are_told_apart_and_the_hottest_tile_is_on_the_tumour(cohort: Path, study: Study) -> None:
    assert study.metrics["pooled"]["metrics"]["auroc"]["value"] >= 0.9
    hottest = hottest_tiles(study.folder / "predictions", study.predictions, cohort / "truth")
    assert len(hottest) == 12
    assert sum(tile.on_tumour for tile in hottest) >= 10
    assert np.mean([tile.tumour_share for tile in hottest]) < 0.6  # so it is no matter of chance


def test_every_slide_has_a_prediction_by_the_fold_that_never_saw_it(study: Study) -> None:
    splits = pd.read_csv(study.folder / "splits.csv", dtype=str)
    tests = splits[splits["split"] == "test"].set_index("slide_id")["fold"]
    table = study.predictions
    assert sorted(table["slide_id"]) == sorted(tests.index) and (table["status"] == "done").all()
    assert dict(zip(table["slide_id"], table["fold"].astype(str), strict=True)) == tests.to_dict()


def test_no_patient_is_on_two_sides(study: Study) -> None:
    splits = pd.read_csv(study.folder / "splits.csv", dtype=str)
    assert splits.groupby(["fold", "patient"])["split"].nunique().max() == 1
    assert splits[splits["split"] == "test"]["slide_id"].value_counts().max() == 1


def test_a_study_leaves_what_a_person_opens(study: Study) -> None:
    names = study.predictions["slide_id"]
    for name in names:
        assert (study.folder / "heatmaps" / f"{name}.png").stat().st_size > 10_000
        assert read_json(study.folder / "heatmaps" / f"{name}.geojson")["features"]
    page = (study.folder / "report.html").read_text()
    assert all(f"heatmaps/{name}.png" in page for name in names)


def test_tile_scores_are_the_prediction_taken_apart(study: Study) -> None:
    """Contributions of a slide sum to its logit, attention to one: prediction and map are one forward pass."""
    row = study.predictions.iloc[0]
    model = load_model(study.folder / "runs" / "gated_abmil" / f"fold{row['fold']}-seed0")
    path = study.folder / "predictions" / "scores" / f"{row['slide_id']}.h5"
    with open_hdf5(path) as file:
        attention, contributions = file["attention"][:], file["contributions"][:]
        coords = file["coords"][:]
    bags = BagFolder(study.folder / "bags")
    np.testing.assert_array_equal(coords, bags.read(row["slide_id"]).coords_level0_px)
    assert attention.sum() == pytest.approx(1, abs=1e-4)
    logit = float(contributions.sum()) / model.temperature
    assert 1 / (1 + np.exp(-logit)) == pytest.approx(float(row["prob_tumour"]), abs=1e-4)


def test_run_again_nothing_is_done_again(cohort: Path, study: Study) -> None:
    def stamps() -> dict[str, int]:
        kept = [
            path
            for path in study.folder.rglob("*")
            if path.suffix in (".h5", ".png", ".safetensors") or path.name == "predictions.csv"
        ]
        return {str(path): path.stat().st_mtime_ns for path in kept}

    before = stamps()
    run_study(cohort / "slides", cohort / "labels.csv", study.folder, settings=SETTINGS, quiet=True)
    assert stamps() == before


def test_only_what_changed_is_done_again(cohort: Path, study: Study, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "study"
    shutil.copytree(study.folder, copy)
    bags = {path: path.stat().st_mtime_ns for path in copy.rglob("features_*/*.h5")}
    models = {path: path.read_bytes() for path in copy.rglob("model.safetensors")}
    changed = replace(SETTINGS, train=replace(SETTINGS.train, epochs=3))
    run_study(cohort / "slides", cohort / "labels.csv", copy, settings=changed, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in bags} == bags
    assert all(path.read_bytes() != content for path, content in models.items())


def test_another_filter_redoes_all_but_the_bags(cohort: Path, study: Study, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "study"
    shutil.copytree(study.folder, copy)
    bags = {path: path.read_bytes() for path in copy.rglob("features_*/*.h5")}
    changed = replace(SETTINGS, filter=FilterConfig(qc_tissue=0.9))
    said: list[str] = []
    run_study(cohort / "slides", cohort / "labels.csv", copy, settings=changed, quiet=True, say=said.append)
    assert {path: path.read_bytes() for path in bags} == bags
    assert not any("unchanged" in line for line in said)
    name = study.predictions.iloc[0]["slide_id"]
    with open_hdf5(copy / "predictions" / "scores" / f"{name}.h5") as file:
        seen = np.isfinite(file["attention"][:]).all(1)
    kept = BagFolder(copy / "bags").read(name).qc["tissue"] >= np.float32(0.9)
    np.testing.assert_array_equal(seen, kept)
    assert kept.any() and not kept.all()


def test_slides_that_could_not_be_drawn_are_tried_again_and_named_every_time(
    cohort: Path, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    copy = tmp_path / "study"
    shutil.copytree(study.folder, copy)
    changed = replace(SETTINGS, heatmap=HeatmapConfig(max_side_px=200), job=JobConfig(read_timeout=77, shard="1/1"))
    jobs: list[JobConfig] = []
    monkeypatch.setattr("wsimil.study.draw_heatmaps", lambda *_, job, **__: jobs.append(job) or ["a: a read did not come back"])
    for _ in range(2):
        again = run_study(cohort / "slides", cohort / "labels.csv", copy, settings=changed, quiet=True)
        assert again.failed == ["a: a read did not come back"]
    assert jobs == [JobConfig(read_timeout=77)] * 2  # all slides that have bags, whatever the shard


def test_a_new_slide_is_predicted_by_all_folds_together(study: Study, tmp_path: Path) -> None:
    bags = BagFolder(study.folder / "bags")
    old = study.predictions.iloc[0]["slide_id"]
    bag = read_bag(bags.headers[old].path)
    folder = tmp_path / "features_texture"
    write_hdf5(
        folder / "new.h5",
        {"features": Dataset(bag.features), "coords": Dataset(bag.coords_level0_px), "valid": Dataset(bag.valid)},
        {**read_attributes(bags.headers[old].path), "slide_id": "new", "slide_fingerprint": "another"},
    )
    table = predict(folder, study.folder / "runs" / "gated_abmil", tmp_path / "out", quiet=True)
    assert table["fold"].tolist() == ["ensemble"] and table["split"].tolist() == ["new"]


def test_bags_of_another_encoder_are_refused(study: Study, tmp_path: Path) -> None:
    bags = BagFolder(study.folder / "bags")
    header = next(iter(bags.headers.values()))
    bag = read_bag(header.path)
    folder = tmp_path / "features_other"
    write_hdf5(
        folder / "x.h5",
        {"features": Dataset(bag.features), "coords": Dataset(bag.coords_level0_px), "valid": Dataset(bag.valid)},
        {**read_attributes(header.path), "encoder": "other", "encoder_sha256": "1" * 64},
    )
    with pytest.raises(EncoderMismatchError, match="other"):
        predict(folder, study.folder / "runs" / "gated_abmil", tmp_path / "out", quiet=True)


def test_splits_that_changed_under_a_model_are_refused(study: Study, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(study.folder / "runs" / "gated_abmil", run)
    splits = pd.read_csv(run / "splits.csv", dtype=str)
    swapped = splits["split"].map({"test": "train", "train": "test", "val": "val"})
    splits.assign(split=swapped).to_csv(run / "splits.csv", index=False)
    with pytest.raises(UsageError, match="splits"):
        predict(study.folder / "bags", run, tmp_path / "out", quiet=True)


def test_test_labels_do_not_reach_training(cohort: Path, study: Study, tmp_path: Path) -> None:
    """Turning over the label of every test slide of a fold leaves that fold's weights, threshold and epoch as they were."""
    run = study.folder / "runs" / "gated_abmil"
    splits = pd.read_csv(run / "splits.csv", dtype=str)
    tested = set(splits[(splits["fold"] == "0") & (splits["split"] == "test")]["slide_id"])
    labels = pd.read_csv(cohort / "labels.csv", dtype=str)
    other = {"normal": "tumour", "tumour": "normal"}
    labels["label"] = [
        other[label] if slide in tested else label for slide, label in zip(labels["slide"], labels["label"], strict=True)
    ]
    labels.to_csv(tmp_path / "labels.csv", index=False)
    one_fold = replace(SETTINGS, train=replace(SETTINGS.train, fold="0"))
    train(
        study.folder / "bags", tmp_path / "labels.csv", tmp_path / "run", splits=run / "splits.csv", settings=one_fold, quiet=True
    )
    honest, turned = (root / "fold0-seed0" for root in (run, tmp_path / "run"))
    assert (honest / "model.safetensors").read_bytes() == (turned / "model.safetensors").read_bytes()
    for key in ("threshold", "temperature", "best_epoch"):
        assert read_json(honest / "model.json")[key] == read_json(turned / "model.json")[key]


def test_training_killed_between_epochs_ends_in_the_same_weights(study: Study, tmp_path: Path) -> None:
    """A real SIGKILL after the first checkpoint."""
    labels = study.folder / "runs" / "gated_abmil" / "labels.csv"
    command = [sys.executable, "-m", "wsimil", "train", str(study.folder / "bags"), "--labels", str(labels), "--quiet"]
    command += [
        "--splits",
        str(study.folder / "splits.csv"),
        "--fold",
        "0",
        "--epochs",
        "30",
        "--hidden",
        "64",
        "--bags-per-step",
        "2",
    ]
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, "--out", str(killed)])
    deadline = time.monotonic() + 120
    while not (killed / "fold0-seed0" / "last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "fold0-seed0" / "model.json").exists()
    assert main([*command[3:], "--out", str(killed)]) == 0
    calm = study.folder / "runs" / "gated_abmil" / "fold0-seed0"
    assert (killed / "fold0-seed0" / "model.safetensors").read_bytes() == (calm / "model.safetensors").read_bytes()
    assert (
        json.loads((killed / "fold0-seed0" / "model.json").read_text())["threshold"] == read_json(calm / "model.json")["threshold"]
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aggregator": "abmill"}, "did you mean abmil"),
        ({"objective": "clam"}, "objective 'clam' is unknown"),
        ({"aggregator_options": ("layers=3",)}, "layers"),
        ({"loss": "cox"}, "not for a binary task"),
    ],
)
def test_wrong_settings_are_said_before_any_slide_is_read(cohort, tmp_path, changes, said):
    settings = replace(SETTINGS, train=replace(SETTINGS.train, **changes))
    with pytest.raises(UsageError, match=said):
        run_study(cohort / "slides", cohort / "labels.csv", tmp_path / "out", settings=settings, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_missing_table_is_said_before_any_slide_is_read(cohort, tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        run_study(cohort / "slides", tmp_path / "none.csv", tmp_path / "out", settings=SETTINGS, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_study_follows_its_slides_and_its_files(cohort, study, tmp_path):
    out = tmp_path / "study"
    shutil.copytree(study.folder, out)

    def again(slides) -> tuple[Study, list[str]]:
        said: list[str] = []
        return run_study(slides, cohort / "labels.csv", out, settings=SETTINGS, quiet=True, say=said.append), said

    names = sorted(study.predictions["slide_id"])
    (out / "heatmaps" / f"{names[0]}.png").unlink()
    (out / "predictions" / "scores" / f"{names[1]}.h5").unlink()
    _, said = again(cohort / "slides")
    assert (out / "heatmaps" / f"{names[0]}.png").exists() and (out / "predictions" / "scores" / f"{names[1]}.h5").exists()
    assert "evaluate: unchanged" in said
    # a slide that was withdrawn: its bag is there, and nothing learns from it or speaks of it
    table = tmp_path / "slides.csv"
    files = sorted(path for path in (cohort / "slides").iterdir() if path.suffix != ".csv" and not path.name.startswith("."))
    kept = [path for path in files if not path.name.startswith(names[5])]
    assert len(kept) == len(files) - 1
    table.write_text("slide,slide_id\n" + "".join(f"{path},{path.name.partition('.')[0]}\n" for path in kept))
    left, said = again(table)
    assert any(line.startswith("1 bags in ") for line in said)
    assert names[5] not in set(left.predictions["slide_id"]) and len(left.predictions) == len(names) - 1
    assert names[5] not in (out / "splits.csv").read_text() and not (out / "predictions" / "scores" / f"{names[5]}.h5").exists()


def test_a_slide_that_failed_in_predict_is_named_once(tmp_path: Path) -> None:
    rows = "a,done,\nb,failed,holds NaN\nb,failed,holds NaN\nc,failed,no tissue\n"
    (tmp_path / "predictions.csv").write_text(f"slide_id,status,reason\n{rows}")
    assert _not_predicted(tmp_path / "predictions.csv", {"c"}) == ["b: holds NaN"]

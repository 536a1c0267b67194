"""Training records its filter, and prediction applies that one and no other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from wsimil.bags.bag import Bag, Geometry, read_bag, write_bag
from wsimil.cli import main
from wsimil.config import FilterConfig, PredictConfig, Settings, SplitConfig, TrainConfig
from wsimil.errors import UsageError
from wsimil.evaluation import write_evaluation
from wsimil.evaluation.table import read_predictions
from wsimil.files import read_json
from wsimil.hdf5 import open_hdf5
from wsimil.heatmaps import read_tile_map
from wsimil.prediction import predict
from wsimil.training import load_model, train

GEOMETRY = Geometry(128, 128.0, 0, 5000, 5000, 0.5, 0.5, "slide")
SHARP = FilterConfig(qc_blur=0.5)
SETTINGS = Settings(filter=SHARP, split=SplitConfig(folds=2), train=TrainConfig(epochs=2, hidden=8, bags_per_step=4, device="cpu"))
ALL_BLURRED = "s11"


def make_bag(slide_id: str, *, positive: bool, blurred: bool = False) -> Bag:
    """Twelve tiles; every third is blurred (or all are), and says the opposite of the label a hundred times louder."""
    draw = np.random.default_rng(sum(map(ord, slide_id)))
    blur = np.where((np.arange(12) % 3 == 1) | blurred, 0.8, 0.2).astype(np.float32)
    sign = 1 if positive else -1
    features = draw.normal(0, 1, (12, 4)) + np.where(blur > 0.5, -100 * sign, sign)[:, None]
    valid = np.arange(12) != 3
    stated = {"slide_id": slide_id, "encoder": "texture", "encoder_sha256": "a" * 64, "mpp": 0.5, "tile_level0_px": 128.0}
    stated |= {"recipe_hash": "r", "level0_width": 5000, "level0_height": 5000}
    coords = draw.integers(0, 4000, (12, 2))
    return Bag((features * valid[:, None]).astype(np.float16), coords, valid, {"blur": blur}, stated)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filtered")
    rows = []
    for index in range(12):
        name, positive = f"s{index:02}", index % 2 == 1
        write_bag(folder / "bags" / f"{name}.h5", make_bag(name, positive=positive, blurred=name == ALL_BLURRED), GEOMETRY)
        rows.append({"slide": name, "patient": name, "label": "yes" if positive else "no"})
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def run(cohort: Path) -> Path:
    train(cohort / "bags", cohort / "labels.csv", cohort / "run", settings=SETTINGS, quiet=True)
    return cohort / "run"


@pytest.fixture(scope="module")
def predictions(cohort: Path, run: Path) -> Path:
    predict(cohort / "bags", run, cohort / "predictions", quiet=True)
    return cohort / "predictions"


def test_the_filter_stands_in_model_and_settings(run: Path) -> None:
    for fold in ("fold0-seed0", "fold1-seed0"):
        assert load_model(run / fold).filter == SHARP
        assert read_json(run / fold / "model.json")["filter"] == vars(SHARP)
        assert "qc_blur: 0.5" in (run / fold / "config.yaml").read_text()


def test_a_filtered_run_is_a_run_on_bags_without_those_tiles(cohort: Path, run: Path, tmp_path: Path) -> None:
    """Weights, calibration and predictions are the same as if the tiles had never been extracted."""
    for path in (cohort / "bags").glob("*.h5"):
        bag = read_bag(path)
        keep = bag.qc["blur"] <= 0.5
        cut = Bag(bag.features[keep], bag.coords_level0_px[keep], bag.valid[keep], {}, bag.attributes)
        write_bag(tmp_path / "bags" / path.name, cut, GEOMETRY)
    plain = replace(SETTINGS, filter=FilterConfig())
    train(tmp_path / "bags", cohort / "labels.csv", tmp_path / "run", settings=plain, quiet=True)
    assert (tmp_path / "run" / "splits.csv").read_bytes() == (run / "splits.csv").read_bytes()
    for fold in ("fold0-seed0", "fold1-seed0"):
        one, other = (root / fold / "model.safetensors" for root in (run, tmp_path / "run"))
        assert one.read_bytes() == other.read_bytes()
    filtered = predict(cohort / "bags", run, tmp_path / "a", quiet=True)
    pd.testing.assert_frame_equal(filtered, predict(tmp_path / "bags", tmp_path / "run", tmp_path / "b", quiet=True))


def test_rows_that_the_model_did_not_see_are_nan(cohort: Path, predictions: Path) -> None:
    bag = read_bag(cohort / "bags" / "s00.h5")
    keep = bag.valid & (bag.qc["blur"] <= 0.5)
    assert 0 < keep.sum() < bag.valid.sum()
    with open_hdf5(predictions / "scores" / "s00.h5") as file:
        np.testing.assert_array_equal(file["coords"][:], bag.coords_level0_px)
        for name in ("attention", "contributions"):
            np.testing.assert_array_equal(np.isfinite(file[name][:]).all(1), keep)
            np.testing.assert_array_equal(np.isnan(file[name][:]).all(1), ~keep)
        assert file["attention"][:][keep].sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(read_tile_map(predictions / "scores" / "s00.h5").coords_level0_px, bag.coords_level0_px[keep])


def test_a_slide_whose_tiles_are_all_filtered_out_is_an_empty_row(predictions: Path) -> None:
    table = read_predictions(predictions / "predictions.csv").set_index("slide_id")
    assert table["status"].value_counts().to_dict() == {"done": 11, "empty": 1}
    assert table.loc[ALL_BLURRED, "status"] == "empty" and not (predictions / "scores" / f"{ALL_BLURRED}.h5").exists()
    assert table.loc[ALL_BLURRED, "label"] == "yes"


def test_metrics_state_the_slides_left_without_tiles(predictions: Path, tmp_path: Path) -> None:
    metrics = write_evaluation(tmp_path, read_predictions(predictions / "predictions.csv"), n_bootstrap=20)
    assert (metrics["n_slides"], metrics["n_evaluated"], metrics["n_empty"]) == (12, 11, 1)


def test_a_patient_is_predicted_from_the_slides_that_have_tiles(cohort: Path, run: Path, tmp_path: Path) -> None:
    table = predict(cohort / "bags", run, tmp_path / "out", config=PredictConfig(bag="patient"), quiet=True)
    assert table["status"].value_counts().to_dict() == {"done": 11, "empty": 1}


def test_another_filter_is_another_run(cohort: Path, run: Path, tmp_path: Path) -> None:
    def lines(filter: FilterConfig) -> list[str]:
        said: list[str] = []
        settings = replace(SETTINGS, filter=filter)
        train(cohort / "bags", cohort / "labels.csv", tmp_path, splits=run / "splits.csv", settings=settings, say=said.append)
        return said

    first = lines(SHARP)
    assert not any("already" in line for line in first) and "filter: 77 of 144 tiles are kept; none of s11" in first
    assert sum("already trained" in line for line in lines(SHARP)) == 2
    # nothing has a blur of .5 to .6: the same tiles, but the model must carry the new limit
    assert not any("already" in line for line in lines(FilterConfig(qc_blur=0.6)))
    assert load_model(tmp_path / "fold0-seed0").filter.qc_blur == 0.6


def edited(run: Path, out: Path, filter: dict | None, fold: str) -> Path:
    """A copy of a run, one model's filter changed; None removes it, as an older wsimil would have written it."""
    import shutil

    shutil.copytree(run, out)
    path = out / fold / "model.json"
    content = json.loads(path.read_text())
    del content["filter"]
    path.write_text(json.dumps(content if filter is None else content | {"filter": filter}))
    return out


def test_a_model_without_a_filter_sees_every_valid_tile(cohort: Path, run: Path, tmp_path: Path) -> None:
    copy = edited(edited(run, tmp_path / "one", None, "fold0-seed0"), tmp_path / "run", None, "fold1-seed0")
    table = predict(cohort / "bags", copy, tmp_path / "out", quiet=True)
    assert (table["status"] == "done").all()
    with open_hdf5(tmp_path / "out" / "scores" / "s00.h5") as file:
        assert np.isfinite(file["attention"][:]).all(1).sum() == 11


def test_models_of_different_filters_are_refused(cohort: Path, run: Path, tmp_path: Path) -> None:
    copy = edited(run, tmp_path / "run", {"qc_blur": 0.3}, "fold1-seed0")
    with pytest.raises(UsageError, match=r"fold1-seed0 learned from other tiles than fold0-seed0 .*qc_blur 0\.3.*qc_blur 0\.5"):
        predict(cohort / "bags", copy, tmp_path / "out", quiet=True)


def test_a_filter_of_a_newer_wsimil_is_refused(run: Path, tmp_path: Path) -> None:
    copy = edited(run, tmp_path / "run", {"qc_folds": 0.3}, "fold1-seed0")
    with pytest.raises(UsageError, match=r"qc_folds.*upgrade"):
        load_model(copy / "fold1-seed0")


def test_bags_without_the_score_cannot_be_predicted(cohort: Path, run: Path, tmp_path: Path) -> None:
    bag = make_bag("new", positive=True)
    write_bag(tmp_path / "bags" / "new.h5", replace(bag, qc={}), GEOMETRY)
    predict(cohort / "bags", run, tmp_path / "out", quiet=True)
    before = (tmp_path / "out" / "predictions.csv").read_bytes()
    with pytest.raises(UsageError, match=r"new\.h5: no score `blur`"):
        predict(tmp_path / "bags", run, tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == before


def test_the_command_takes_the_limits(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["train", str(cohort / "bags"), "--labels", str(cohort / "labels.csv"), "--out", str(tmp_path / "run")]
    command += ["--folds", "2", "--epochs", "1", "--hidden", "8", "--device", "cpu", "--qc-blur", "0.5"]
    assert main(command) == 0
    assert "filter: 77 of 144 tiles are kept" in capsys.readouterr().err
    assert load_model(tmp_path / "run" / "fold0-seed0").filter == SHARP
    assert main([*command, "--qc-pen", "0.5"]) == 2
    assert "no score `pen`" in capsys.readouterr().err

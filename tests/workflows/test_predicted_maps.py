"""From predictions to maps: the class a map speaks for, also of pooled slides and of several labels; how often a bag is read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from wsimil.bags.bag import Bag, Geometry, write_bag
from wsimil.bags.dataset import BagFolder
from wsimil.cli import main
from wsimil.config import LabelsConfig, PredictConfig, Settings, SplitConfig, TrainConfig
from wsimil.evaluation.table import read_predictions
from wsimil.hdf5 import StoredRows, read_attributes
from wsimil.heatmaps.draw import _caption, _likeliest
from wsimil.heatmaps.tile_map import read_tile_map
from wsimil.prediction import predict
from wsimil.training import train

N_SLIDES = 18
GEOMETRY = Geometry(128, 128.0, 0, 5000, 5000, 0.5, 0.5, "slide")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bags whose features say one of three classes; two slides a patient; empty files where the slides would be."""
    folder = tmp_path_factory.mktemp("predicted_maps")
    (folder / "slides").mkdir()
    classes, labels = [], []
    for index in range(N_SLIDES):
        name, kind = f"s{index:02}", index // 2 % 3
        draw = np.random.default_rng(index)
        stated = {"slide_id": name, "encoder": "texture", "encoder_sha256": "a" * 64, "mpp": 0.5, "tile_level0_px": 128.0}
        stated |= {"recipe_hash": "r", "level0_width": 5000, "level0_height": 5000, "bounds_x": 0, "bounds_y": 0}
        features = draw.normal(0, 0.3, (6, 4)) + 3 * np.eye(4)[kind]
        bag = Bag(features.astype(np.float16), draw.integers(0, 4000, (6, 2)), np.ones(6, bool), {}, stated)
        write_bag(folder / "bags" / f"{name}.h5", bag, GEOMETRY)
        (folder / "slides" / f"{name}.tiff").touch()
        classes.append(f"{name},p{index // 2},{'abc'[kind]}")
        labels.append(f"{name},p{index // 2},{int(kind == 0)},{int(kind == 1)}")
    (folder / "classes.csv").write_text("\n".join(["slide,patient,label", *classes]))
    (folder / "labels.csv").write_text("\n".join(["slide,patient,ER,HER2", *labels]))
    return folder


def predicted(cohort: Path, out: Path, table: str, labels: LabelsConfig, bag: str) -> Path:
    training = TrainConfig(aggregator="mean_pool", epochs=6, lr=0.1, hidden=8, dropout=0, device="cpu", fold="0")
    settings = Settings(labels=labels, split=SplitConfig(folds=3, val_fraction=0.5), train=training)
    train(cohort / "bags", cohort / table, out / "run", settings=settings, quiet=True)
    predict(cohort / "bags", out / "run", out, config=PredictConfig(bag=bag), quiet=True)  # type: ignore[arg-type]
    return out


def drawn_for(predictions: Path, cohort: Path, out: Path, *options: str) -> dict[str, str]:
    """Slide → the class its polygons speak for."""
    command = ["heatmap", str(predictions), "--slides", str(cohort / "slides"), "--out", str(out), "--format", "geojson"]
    assert main([*command, "--workers", "1", "--quiet", *options]) == 0
    names = {}
    for path in out.glob("*.geojson"):
        features = json.loads(path.read_text())["features"]
        (names[path.stem],) = {one["properties"]["classification"]["name"].removeprefix("not ") for one in features}
    return names


def test_pooled_slides_have_the_prediction_of_their_patient(cohort, tmp_path):
    out = predicted(cohort, tmp_path, "classes.csv", LabelsConfig(), "patient")
    rows = {row["slide_id"]: row for row in read_predictions(out / "predictions.csv").to_dict("records")}
    spoken_for = drawn_for(out, cohort, tmp_path / "maps")
    said = {f"s{index:02}": rows[f"p{index // 2}"]["prediction"] for index in range(N_SLIDES) if f"p{index // 2}" in rows}
    assert spoken_for == said and len(set(said.values())) == 3
    slide_id = min(said)
    path = out / "scores" / f"{slide_id}.h5"
    row = rows[read_attributes(path)["bag"]]
    assert _caption(read_tile_map(path), row).startswith(f"{slide_id}   patient {row['slide_id']} predicted: {row['prediction']} (")


def test_a_map_of_several_labels_speaks_for_the_likeliest_or_the_one_asked_for(cohort, tmp_path, capsys):
    out = predicted(cohort, tmp_path, "labels.csv", LabelsConfig(target=("ER", "HER2")), "slide")
    table = read_predictions(out / "predictions.csv").set_index("slide_id", drop=False)
    likeliest = {name: "ER" if table.at[name, "prob_ER"] > table.at[name, "prob_HER2"] else "HER2" for name in table["slide_id"]}
    assert drawn_for(out, cohort, tmp_path / "likeliest") == likeliest and set(likeliest.values()) == {"ER", "HER2"}
    assert set(drawn_for(out, cohort, tmp_path / "er", "--class", "ER").values()) == {"ER"}
    row = table.loc[next(name for name, label in likeliest.items() if label == "ER")].to_dict()
    path = out / "scores" / f"{row['slide_id']}.h5"
    tile_map = read_tile_map(path, class_name="ER")
    assert f"map: ER ({row['prob_ER']:.2f})" in _caption(tile_map, row) and _likeliest(row) == "ER"
    capsys.readouterr()
    command = ["heatmap", str(out), "--slides", str(cohort / "slides"), "--out", str(tmp_path / "none"), "--workers", "1"]
    assert main([*command, "--class-name", "PR"]) == 1
    assert "no map of 'PR' in it (it has ER, HER2)" in capsys.readouterr().err


def test_features_are_read_once_for_a_prediction(cohort, tmp_path, monkeypatch):
    """Also where no bag fits into memory."""
    read: Counter[str] = Counter()
    whole = StoredRows.read_checked

    def counted(rows: StoredRows) -> np.ndarray:
        read[f"{rows.path.stem} {rows.name}"] += 1
        return whole(rows)

    out = predicted(cohort, tmp_path, "classes.csv", LabelsConfig(), "slide")
    monkeypatch.setattr(StoredRows, "read_checked", counted)
    monkeypatch.setattr(BagFolder, "_fits", lambda self, header: False)
    for _ in range(2):  # the second time everything is there
        table = predict(cohort / "bags", out / "run", tmp_path / "again", quiet=True)
        features = {name: times for name, times in read.items() if name.endswith("features")}
        assert len(features) == len(table) and set(features.values()) == {1}

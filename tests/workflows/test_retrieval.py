"""Search: the distance by hand, neighbours that may not count, and the table that comes of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist

from wsimil.bags.bag import Bag, Geometry, write_bag
from wsimil.bags.dataset import BagFolder
from wsimil.cli import main
from wsimil.config import SearchConfig
from wsimil.errors import LabelsError, UsageError
from wsimil.hdf5 import Dataset, write_hdf5
from wsimil.retrieval import distances, evaluate_search, majority, median_of_minimum, mosaics, search


def write_cohort(folder: Path, *, signal: float, patient_signal: float = 0.0, n_patients: int = 12, n_tiles: int = 30) -> Path:
    """Two slides of each patient; what is alike: the class, and the patient. Sites are the same for both classes."""
    rng = np.random.default_rng(0)
    rows = []
    for patient in range(n_patients):
        label = patient % 2
        own = patient_signal * rng.normal(size=8)
        for number in range(2):
            name = f"p{patient:02}-{number}"
            features = rng.normal(size=(n_tiles, 8)) + own + signal * label
            coords = rng.integers(0, 10_000, (n_tiles, 2))
            bag = Bag(features.astype(np.float32), coords, np.ones(n_tiles, bool), {}, {"slide_id": name, "encoder": "toy"})
            write_bag(folder / "features_toy" / f"{name}.h5", bag, Geometry(224, 224.0, 0, 10_000, 10_000, 0.5, 0.5, name))
            rows.append({"slide": name, "patient": f"p{patient:02}", "site": "AB"[patient // 2 % 2], "label": ["x", "y"][label]})
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    return folder


def test_the_distance_is_the_median_of_the_minima_and_asks_in_one_direction():
    query, other = np.array([[0.0], [1.0], [5.0]], np.float32), np.array([[0.5], [9.0]], np.float32)
    assert median_of_minimum(query, other) == pytest.approx(0.5)  # of .5, .5, 4
    assert median_of_minimum(other, query) == pytest.approx((0.5 + 4) / 2)


def test_many_distances_at_once_are_those_by_hand():
    rng = np.random.default_rng(0)
    slides = [(100 + rng.normal(size=(size, 6))).astype(np.float32) for size in (1, 7, 20, 3)]
    expected = [[np.median(cdist(one, other).min(1)) for other in slides] for one in slides]
    np.testing.assert_allclose(distances(slides, slides), expected, atol=2e-3)


def test_three_vote_and_the_nearest_breaks_ties():
    assert majority([1, 2, 2]) == 2 and majority([1, 2, 3]) == 1 and majority([2, 1]) == 2 and majority([0]) == 0


def test_a_mosaic_is_thinned_to_the_tiles_asked_for(tmp_path):
    folder = BagFolder(write_cohort(tmp_path, signal=1, n_patients=2))
    name, rows = "p00-0", np.arange(5, 25)
    parts = {"rows": Dataset(rows), "coords": Dataset(folder.headers[name].coords()[rows])}
    write_hdf5(tmp_path / "mosaics" / f"{name}.h5", parts, {"format": "wsimil-mosaic", "format_version": 1, "slide_id": name})
    features = folder.load(name).features.numpy()
    for tiles, expected in ((50, rows), (20, rows), (5, [5, 9, 13, 17, 21]), (1, [5]), (0, np.arange(30))):
        (found,) = mosaics(folder, [name], SearchConfig(tiles=tiles), quiet=True).values()
        assert np.array_equal(found, features[expected])


def test_a_mosaic_is_of_tiles_not_of_rows(tmp_path):
    folder = BagFolder(write_cohort(tmp_path, signal=1, n_patients=2))
    name, attributes = "p00-0", {"format": "wsimil-mosaic", "format_version": 1}
    features, coords = folder.load(name).features.numpy(), folder.headers[name].coords()

    def found(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        parts = {"rows": Dataset(rows), "coords": Dataset(places)}
        write_hdf5(tmp_path / "mosaics" / f"{name}.h5", parts, attributes)
        return mosaics(folder, [name], SearchConfig(tiles=4), quiet=True)[name]

    # the same tiles in other rows: chosen when the slide had a tile more
    assert np.array_equal(found(np.array([3, 9, 12, 31]), coords[[2, 8, 11, 29]]), features[[2, 8, 11, 29]])
    # tiles that the bag lacks: the mosaic is of other tiles, and the bag's own are chosen anew
    chosen = found(np.array([3, 9, 12, 20]), coords[[3, 9, 12, 20]] + 7)
    assert len(chosen) == 4 and not np.array_equal(chosen, features[[3, 9, 12, 20]])
    (tmp_path / "mosaics" / f"{name}.h5").unlink()
    assert np.array_equal(mosaics(folder, [name], SearchConfig(tiles=4), quiet=True)[name], chosen)


def test_what_is_alike_is_found_and_the_vote_is_right(tmp_path):
    bags = write_cohort(tmp_path, signal=3)
    found = evaluate_search(bags, bags / "labels.csv", quiet=True)
    content = found.content
    assert content["n_queries"] == 24 and content["majority"]["accuracy"] == content["nearest"]["f1"] == 1
    assert {name: one["n"] for name, one in content["by_class"].items()} == {"x": 12, "y": 12}
    assert content["chance"]["accuracy"] < 0.65 and "3 nearest" in found.text()


def test_a_query_never_meets_its_own_patient(tmp_path):
    bags = write_cohort(tmp_path, signal=0, patient_signal=5)
    found = evaluate_search(bags, bags / "labels.csv", quiet=True)
    for place in (1, 2, 3):
        assert not (found.rows[f"nearest_{place}"].str[:3] == found.rows["patient"]).any()
    assert found.content["majority"]["accuracy"] < 0.9  # the patient's other slide would make it 1


def test_apart_by_site_a_query_meets_other_sites_only(tmp_path):
    bags = write_cohort(tmp_path, signal=1)
    found = evaluate_search(bags, bags / "labels.csv", config=SearchConfig(apart="site"), quiet=True)
    site = dict(zip(found.rows["slide_id"], found.rows["site"], strict=True))
    assert all(site[name] != one for name, one in zip(found.rows["nearest_1"], found.rows["site"], strict=True))
    assert found.content["same_site"] == 0 and evaluate_search(bags, bags / "labels.csv", quiet=True).content["same_site"] > 0


def test_the_command_searches_and_evaluates(tmp_path, capsys):
    bags = write_cohort(tmp_path, signal=3)
    assert main(["search", str(bags), "--query", "p00-0", "--labels", str(bags / "labels.csv"), "--json", "--quiet"]) == 0
    ranked = json.loads(capsys.readouterr().out)
    assert len(ranked) == 23 and ranked[0]["label"] == "x" and ranked[0]["distance"] <= ranked[1]["distance"]
    assert main(["search", str(bags), "--labels", str(bags / "labels.csv"), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "search.json").read_text())["majority"]["accuracy"] == 1
    assert len(pd.read_csv(tmp_path / "out" / "search.csv")) == 24
    assert main(["search", str(bags), "--quiet"]) == 2 and "--query" in capsys.readouterr().err


def test_fewer_tiles_find_the_same_slides(tmp_path):
    bags = write_cohort(tmp_path, signal=3)
    all_tiles, some = (search(bags, "p01-1", config=SearchConfig(tiles=tiles), quiet=True) for tiles in (0, 10))
    labels = pd.read_csv(bags / "labels.csv").set_index("slide")["label"]
    for table in (all_tiles, some):
        assert set(labels[table["slide_id"][:11]]) == {"y"}
    assert not np.allclose(all_tiles["distance"], some["distance"])


def test_what_cannot_be_searched_is_named(tmp_path):
    bags = write_cohort(tmp_path, signal=1)
    with pytest.raises(UsageError, match="no bag of slide 'p99'"):
        search(bags, "p99", quiet=True)
    labels = pd.read_csv(bags / "labels.csv")
    labels.assign(label="x").to_csv(bags / "one.csv", index=False)
    with pytest.raises(LabelsError, match="1 class"):
        evaluate_search(bags, bags / "one.csv", quiet=True)
    labels.assign(patient="all").to_csv(bags / "alone.csv", index=False)
    with pytest.raises(LabelsError, match="no slide of another patient"):
        evaluate_search(bags, bags / "alone.csv", quiet=True)

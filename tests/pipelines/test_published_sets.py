"""Studies on published sets read their files and fill their tables: on a handful of made-up rows in the same layout."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import classic_mil
import colon_nuclei
import h5py
import leak_demo
import numpy as np
import pandas as pd
import pytest
import tcga_regions
from PIL import Image

from wsimil.config import Settings, SplitConfig, TrainConfig


def table_of(monkeypatch: pytest.MonkeyPatch, pipeline, tmp_path: Path, *arguments: str) -> list[dict[str, str]]:
    """Run a study; the rows of its table."""
    given = [f"{pipeline.__name__}.py", *arguments, "--out", str(tmp_path / "out"), "--table", str(tmp_path / "table.md")]
    monkeypatch.setattr(sys, "argv", given)
    pipeline.main()
    return rows_of(tmp_path / "table.md")


def rows_of(path: Path) -> list[dict[str, str]]:
    lines = [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def quick(monkeypatch: pytest.MonkeyPatch, pipeline, *, folds: int) -> None:
    """The study's own settings, but for how long and how wide."""
    settings = pipeline.SETTINGS
    train = replace(settings.train, epochs=1, hidden=4, device="cpu")
    monkeypatch.setattr(pipeline, "SETTINGS", replace(settings, train=train, split=replace(settings.split, folds=folds)))
    monkeypatch.setattr(pipeline, "FOLDS", folds)


def test_noise_labels_give_a_nested_row_and_a_peeking_row_that_is_higher(monkeypatch, tmp_path):
    def short(**settings) -> TrainConfig:
        return TrainConfig(**settings | {"epochs": 1, "device": "cpu"})

    monkeypatch.setattr(leak_demo, "TrainConfig", short)
    monkeypatch.setattr(leak_demo, "Settings", partial(Settings, split=SplitConfig(folds=2)))
    monkeypatch.setattr(leak_demo, "N_SLIDES", 24)
    rows = table_of(monkeypatch, leak_demo, tmp_path, "--cohorts", "2", "--candidates", "2")
    assert [row["choice"].split(":")[0] for row in rows] == ["nested", "peeking"]
    nested, peeking = (float(row["AUROC, mean [95 % interval]"].split()[0]) for row in rows)
    assert 0 <= nested < peeking <= 1
    assert {row["covers .5"] for row in rows} <= {"yes", "no"}


def test_classic_sets_have_a_row_for_each_aggregator(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    bag = np.repeat(np.arange(18), 4)
    label = (np.arange(18) % 2).astype(np.int64)
    np.savez(tmp_path / "musk1.npz", X=rng.normal(label[bag][:, None], 1, (72, 5)), bag=bag, bag_label=label)
    quick(monkeypatch, classic_mil, folds=2)
    rows = table_of(monkeypatch, classic_mil, tmp_path, str(tmp_path), "--sets", "musk1", "--repeats", "1")
    assert [(row["set"], row["aggregator"]) for row in rows] == [("musk1", "abmil"), ("musk1", "gated_abmil")]
    for row in rows:
        for rule in ("last epoch, threshold .5", "epoch and threshold by validation"):
            assert 0 <= float(row[rule].split()[0]) <= 1


def test_bags_of_digits_are_positive_where_there_is_a_nine_and_half_of_them_are():
    digits = np.arange(200) % 10
    images = np.broadcast_to(digits[:, None, None], (200, 2, 2)).astype(np.uint8)
    bags, labels = classic_mil.draw_bags(images, digits, 20, np.random.default_rng(0))
    assert sum(labels) == 10 and [int((bag == np.float32(9 / 255)).any()) for bag in bags] == labels


def write_nuclei(folder: Path, n_images: int) -> None:
    """Every other image has epithelial nuclei, which are dark."""
    (folder / "images").mkdir()
    rng, rows = np.random.default_rng(0), []
    for image in range(n_images):
        pixels = rng.integers(200, 255, (500, 500, 3), np.uint8)
        for nucleus in range(4):
            x, y = rng.integers(20, 480, 2).tolist()
            epithelial = image % 2 == 1 and nucleus < 2
            pixels[y - 13 : y + 14, x - 13 : x + 14] //= 4 if epithelial else 2
            rows.append((f"img{image}.bmp", x, y, "epithelial" if epithelial else "inflammatory"))
        Image.fromarray(pixels).save(folder / "images" / f"img{image}.png")
    pd.DataFrame(rows, columns=["image", "x", "y", "class"]).to_csv(folder / "nuclei.csv", index=False)


def test_colon_nuclei_are_cut_out_and_ranked_in_every_positive_image(monkeypatch, tmp_path):
    write_nuclei(tmp_path, 12)
    quick(monkeypatch, colon_nuclei, folds=2)
    arguments = (str(tmp_path), "--models", "gated", "--repeats", "1", "--epochs", "1")
    (row,) = table_of(monkeypatch, colon_nuclei, tmp_path, *arguments)
    assert row["model"] == "gated attention" and 0 <= float(row["accuracy"].split()[0]) <= 1
    each = pd.read_csv(tmp_path / "out" / "gated.csv")
    assert sorted(each["slide"]) == sorted(f"img{image}" for image in range(12))
    assert each["auroc_attention"].notna().tolist() == (each["truth"] == 1).tolist()
    # repeats that are known are not run again
    monkeypatch.setattr(colon_nuclei, "cross_validate", lambda *_, **__: pytest.fail("known already"))
    (again,) = table_of(monkeypatch, colon_nuclei, tmp_path, *arguments, "--known", str(tmp_path / "out"))
    assert again == row


def write_regions(folder: Path, name: str, subtypes: tuple[str, ...], n_slides: int) -> None:
    """A slide for each patient, three patients for each site; every feature tells the subtype."""
    rng = np.random.default_rng(0)
    codes = [subtypes[slide % 2] for slide in range(n_slides)]
    counts = rng.integers(2, 5, n_slides)
    features = rng.normal(size=(counts.sum(), 6)).astype(np.float32)
    features += 3 * np.repeat(np.arange(n_slides) % 2, counts)[:, None].astype(np.float32)
    columns = {
        "slide_id": [f"TCGA-{slide:02}.svs" for slide in range(n_slides)],
        "case_id": [f"P{slide:02}" for slide in range(n_slides)],
        "site": [f"H{slide // 3}" for slide in range(n_slides)],
        "oncotree_code": codes,
    }
    with h5py.File(folder / f"{name}_hipt4k.h5", "w") as file:
        file["offsets"], file["features"] = np.concatenate([[0], np.cumsum(counts)]), features
        for key, values in columns.items():
            file[key] = np.array(values, dtype="S")
    clinic = {"survival_months": rng.uniform(1, 60, n_slides), "censorship": np.arange(n_slides) % 2}
    pd.DataFrame({"slide_id": columns["slide_id"], **clinic}).to_csv(folder / f"{name}_subset.csv", index=False)


def test_regions_have_rows_by_patient_by_site_and_for_survival(monkeypatch, tmp_path):
    cohort, (name, subtypes) = next(iter(tcga_regions.COHORTS.items()))
    write_regions(tmp_path, name, subtypes, 24)
    monkeypatch.setattr(tcga_regions, "COHORTS", {cohort: (name, subtypes)})
    monkeypatch.setattr(tcga_regions, "AGGREGATORS", ("mean_pool",))
    monkeypatch.setattr(tcga_regions, "FOLDS", 2)
    monkeypatch.setattr(tcga_regions, "TRAIN", replace(tcga_regions.TRAIN, epochs=1, hidden=4, device="cpu"))
    rows = table_of(monkeypatch, tcga_regions, tmp_path, str(tmp_path), "--repeats", "2")
    assert [(row["task"], row["folds by"]) for row in rows] == [
        (f"{cohort} subtype", "patient"),
        (f"{cohort} subtype", "site"),
        (f"{cohort} survival", "patient"),
    ]
    for row in rows:
        assert 0 <= float(row["mean_pool"].split()[0]) <= 1
    plain = [row[tcga_regions.BASELINE] for row in rows]
    assert all(float(value.split()[0]) > 0.9 for value in plain[:2])


def test_cox_regression_on_means_ranks_those_it_was_not_fitted_on(tmp_path):
    rng, names = np.random.default_rng(0), [f"s{number:03}" for number in range(120)]
    means = {name: rng.normal(size=4).astype(np.float32) for name in names}
    months = [rng.exponential(np.exp(-1.5 * means[name][0])) for name in names]
    table = pd.DataFrame({"slide": names, "survival_months": months, "event": 1.0})
    sides = [("test", "val", "train", "train")[(number + shift) % 4] for shift in (0, 1) for number in range(120)]
    splits = pd.DataFrame({"fold": np.repeat([0, 1], 120), "slide_id": names * 2, "patient": names * 2, "site": "", "split": sides})
    splits.to_csv(tmp_path / "splits.csv", index=False)
    found = tcga_regions.cox_regression([tmp_path], means, table)
    assert len(found) == 2 and min(found) > 0.7

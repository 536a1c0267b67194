"""The published system from raw slides to heatmaps, at its smallest: two folds, each with an encoder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import self_vit_mil

from wsimil.bags.dataset import BagFolder
from wsimil.bags.splits import read_splits
from wsimil.config import SECTIONS
from wsimil.settings import read_settings
from wsimil.slides.synthetic import write_cohort

SMALLEST = """
tile: {tile_px: 64, min_tissue: 0.75}
pretrain:
  {method: dino, size: toy, arch: test_vit, steps: 2, batch_size: 4, device: cpu,
   recipe_options: {depth: 0, global_px: 32, local_px: 32, panel_tiles: 8, panel_every: 1}}
extract: {embedding: self-vit-mil}
job: {workers: 1}
split: {folds: 2, val_fraction: 0.4}
train:
  {aggregator: dsmil, aggregator_options: {nonlinear_query: false, value_projection: true}, hidden: 8, epochs: 2, optimizer: adam,
   betas: [0.5, 0.9], objective: slide_label, objective_options: {bag_weight: 0.5, extra_weight: 0.5}, keep_epochs: true}
evaluate: {bootstrap: 50}
heatmap: {max_side_px: 100}
"""


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, n_slides=12, width_um=300, height_um=250, workers=1)
    return folder


def test_every_fold_has_an_encoder_that_never_saw_its_test_slides(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(SMALLEST)
    settings = read_settings(SECTIONS, tmp_path / "config.yaml")
    out = tmp_path / "out"
    studies = self_vit_mil.run_folds(cohort / "slides", cohort / "labels.csv", out, settings, quiet=True)
    assert [study.folder.name for study in studies] == ["fold0", "fold1"] and not any(study.failed for study in studies)
    weights = {(study.folder / "encoder" / "backbone.safetensors").read_bytes() for study in studies}
    assert len(weights) == 2
    tested: list[str] = []
    for fold, study in enumerate(studies):
        splits = read_splits(study.folder / "splits.csv")
        assert set(splits["fold"]) == {fold}
        (features,) = (study.folder / "bags").glob("*/features_*")
        bags = BagFolder(features)
        assert bags.dim == 5 * 64
        saw = {name for name in bags.slide_ids if "encoder_saw_slide" in bags.headers[name].attributes}
        assert saw <= set(splits.loc[splits["split"] == "train", "slide_id"]) and saw
        tested += study.predictions.query("split == 'test'")["slide_id"].tolist()
        assert list((study.folder / "heatmaps").glob("*.png"))
    assert sorted(tested) == sorted(path.stem for path in (cohort / "slides").glob("*.tiff"))
    assert "auroc" in self_vit_mil.pooled(studies, out, settings)["pooled"]["metrics"]

    replayed = self_vit_mil.published_selection(studies[0], "dsmil")
    assert sorted(replayed["epoch"]) == ["000", "001"] and replayed["merit"].is_monotonic_decreasing

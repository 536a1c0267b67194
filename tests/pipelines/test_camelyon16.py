"""CAMELYON16's tables, and that the config says what was published."""

from __future__ import annotations

from pathlib import Path

import pytest
from camelyon16 import slide_table

from wsimil.config import SECTIONS
from wsimil.pretraining.presets import resolve_recipe
from wsimil.settings import read_settings

CONFIG = Path(__file__).parents[2] / "configs" / "self_vit_mil" / "camelyon16.yaml"


def slides(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def test_labels_come_from_names_and_from_the_reference_whatever_the_layout(tmp_path: Path) -> None:
    slides(tmp_path, "training/normal/normal_001.tif", "training/tumor/Tumor_002.tif")
    slides(tmp_path, "testing/images/test_001.tif", "images/test_002.tif")
    slides(tmp_path, "masks/tumor_002.tif", "training/notes.tif")
    (tmp_path / "testing" / "reference.csv").write_text("test_001,Tumor,IDC,Macro\ntest_002.tif,Normal,None,None\n")
    table = slide_table(tmp_path).set_index("patient")
    assert table["label"].to_dict() == {"normal_001": "normal", "tumor_002": "tumor", "test_001": "tumor", "test_002": "normal"}
    assert table["split"].to_dict() == {"normal_001": "train", "tumor_002": "train", "test_001": "test", "test_002": "test"}
    assert table.loc["test_002", "slide"] == "images/test_002.tif"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/normal_001.tif", "b/normal_001.tif"], "there twice"),
        (["test_001.tif"], "no reference.csv"),
        (["other.tif"], "no normal_"),
    ],
)
def test_what_would_give_wrong_labels_stops(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        slide_table(slides(tmp_path, *names))


def test_the_config_is_the_published_system() -> None:
    """Numbers of Self-ViT-MIL's code (Gul 2022), as the literature notes of this project list them."""
    settings = read_settings(SECTIONS, CONFIG)
    recipe = resolve_recipe(settings.pretrain, n_slides=216)
    assert (recipe.arch, recipe.drop_path, recipe.init) == ("vit_small_patch16_224", 0.1, "scratch")
    assert (recipe.hidden, recipe.bottleneck, recipe.prototypes, recipe.norm_last_layer) == (2048, 256, 65536, True)
    assert (recipe.global_views, recipe.global_px, recipe.global_scale) == (2, 224, (0.4, 1.0))
    assert (recipe.local_views, recipe.local_px, recipe.local_scale) == (8, 96, (0.05, 0.4))
    assert (recipe.augmentation, recipe.mean, recipe.std) == ("published", (0.6223, 0.4763, 0.6009), (0.2012, 0.2190, 0.1722))
    assert (recipe.teacher_temp, recipe.student_temp, recipe.centring) == ((0.04, 0.04, 0.0), 0.1, "ema")
    assert (recipe.momentum, recipe.spread) == ((0.996, 1.0), "none")
    assert recipe.peak_lr == pytest.approx(5e-4 * 64 / 256) and recipe.min_lr == 1e-6
    assert (recipe.batch_size, recipe.weight_decay, recipe.clip_norm, recipe.precision) == (64, (0.04, 0.4), 3.0, "fp16")
    assert (recipe.warm_up, recipe.freeze_last) == (10 / 100, 1 / 100)
    assert recipe.steps == pytest.approx(100 * 1024 * 216 / 64, rel=0.01)

    assert (settings.tile.mpp, settings.tile.tile_px, settings.tile.overlap_px, settings.tile.min_tissue) == (0.5, 224, 0, 0.75)
    assert (settings.extract.embedding, settings.extract.stain) == ("self-vit-mil", "macenko")
    train = settings.train
    assert (train.aggregator, train.hidden, train.bags_per_step) == ("dsmil", 128, 1)
    assert train.options_of("aggregator_options") == {"nonlinear_query": False, "value_projection": True}
    assert train.options_of("objective_options") == {"bag_weight": 0.5, "extra_weight": 0.5}
    assert (train.optimizer, train.betas, train.lr, train.weight_decay) == ("adam", (0.5, 0.9), 2e-4, 5e-3)
    assert (train.min_lr, train.epochs, train.patience) == (5e-6, 200, 200)

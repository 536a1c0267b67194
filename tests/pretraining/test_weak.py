"""Pretraining on slide labels: whose tiles are drawn, with which class, and that an encoder comes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from wsimil.config import JobConfig, LabelsConfig, PretrainConfig, Settings, TileConfig
from wsimil.encoders import load_encoder
from wsimil.errors import EncoderError, LabelsError, UsageError
from wsimil.extraction.job import Job
from wsimil.extraction.mosaic import mosaic_file, mosaic_slides, read_mosaic
from wsimil.files import read_json
from wsimil.pretraining.feed import TileBatch
from wsimil.pretraining.health import Alarm
from wsimil.pretraining.index import index_slides, index_tiles
from wsimil.pretraining.labels import with_labels, with_mosaics
from wsimil.pretraining.run import pretrain
from wsimil.settings import read_settings


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """Six slides as folders of tile pictures; s5 has no label."""
    rng = np.random.default_rng(0)
    for slide in range(6):
        folder = tmp_path / "tiles" / f"s{slide}"
        folder.mkdir(parents=True)
        for number in range(4):
            grain = rng.integers(-60, 60, (32, 32, 3)) if slide % 2 else rng.integers(-60, 60, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
            Image.fromarray(np.clip(150 + grain, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    table = pd.DataFrame({"slide": [f"s{slide}" for slide in range(6)], "label": ["b", "a", "b", "a", "b", ""]})
    table.to_csv(tmp_path / "labels.csv", index=False)
    return tmp_path / "tiles"


def table_of(**labels: str) -> pd.DataFrame:
    return pd.DataFrame({"slide": list(labels), "label": list(labels.values())})


def test_only_labelled_slides_are_drawn_from_and_each_tile_has_the_class_of_its_slide(tiles):
    index = index_tiles(tiles, tile_px=32, mpp=0.5)
    said: list[str] = []
    labelled, classes = with_labels(index, table_of(s0="b", s1="a", s4="b", held_out="c"), say=said.append)
    assert [slide.slide_id for slide in labelled.slides] == ["s0", "s1", "s4"] and labelled.hash != index.hash
    assert (classes.classes, classes.targets) == (("a", "b"), (1, 0, 1))
    assert said == ["labels: 1 a, 2 b; 3 slides without a label are left out"]
    batch = TileBatch(0, np.arange(4), np.array([2, 1, 0, 1]), np.zeros((4, 32, 32, 3), np.uint8))
    assert classes.labelled(batch).targets.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (table_of(s0="a", s1="a"), "of 1 class"),
        (table_of(nobody="a"), "0 of 6 slides"),
        (pd.DataFrame({"slide": ["s0", "s0", "s1"], "label": ["a", "b", "b"]}), "two things of s0"),
    ],
)
def test_labels_that_cannot_be_learned_from_are_refused(tiles, labels, said):
    with pytest.raises(LabelsError, match=said):
        with_labels(index_tiles(tiles, tile_px=32, mpp=0.5), labels)


def test_an_encoder_without_classifier_comes_of_it(tiles, tmp_path, readers):
    config = PretrainConfig(
        method="weak", size="toy", arch="resnet10t", source="tiles", steps=2, batch_size=4, device="cpu",
        recipe_options=("panel_tiles=8", "global_px=32", "panel_every=1"),
    )  # fmt: skip
    settings = Settings(tile=TileConfig(tile_px=32), job=JobConfig(workers=1), pretrain=config)
    done = pretrain(tiles, tmp_path / "run", labels=tmp_path / "labels.csv", settings=settings, quiet=True)
    assert done.step == 2  # type: ignore[union-attr]
    encoder = load_encoder(str(tmp_path / "run"))
    assert (encoder.contract.architecture, encoder.contract.dim, encoder.contract.pooling) == ("resnet10t", 512, "model")
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    assert not torch.allclose(encoder(pixels + 200), load_encoder("random:resnet10t")(pixels + 200))
    log = pd.read_csv(tmp_path / "run" / "log.csv")
    assert {"loss_tile", "accuracy", "chance"} <= set(log.columns)
    relabelled = pd.read_csv(tmp_path / "labels.csv").assign(label=["a", "b", "b", "a", "b", ""])
    relabelled.to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(UsageError, match="labels"):  # other labels are another run
        pretrain(tiles, tmp_path / "run", labels=tmp_path / "other.csv", settings=settings, quiet=True)


def test_an_encoder_of_few_directions_is_kept_as_classes_need_no_more(tiles, tmp_path, readers, monkeypatch):
    monkeypatch.setattr(Alarm, "judge", lambda self, step, numbers: ["the features have lost their spread"])
    config = PretrainConfig(
        method="weak", size="toy", arch="resnet10t", source="tiles", steps=2, batch_size=4, device="cpu",
        recipe_options=("panel_tiles=8", "global_px=32", "panel_every=1"),
    )  # fmt: skip
    settings = Settings(tile=TileConfig(tile_px=32), job=JobConfig(workers=1), pretrain=config)
    pretrain(tiles, tmp_path / "run", labels=tmp_path / "labels.csv", settings=settings, quiet=True)
    assert load_encoder(str(tmp_path / "run")).contract.dim == 512
    assert read_json(tmp_path / "run" / "finished.json")["exported_step"] == 2


def test_labels_belong_to_the_method_that_learns_from_them(tiles, tmp_path):
    settings = Settings(pretrain=PretrainConfig(method="weak", source="tiles"))
    with pytest.raises(UsageError, match="pass --labels"):
        pretrain(tiles, tmp_path / "run", settings=settings, quiet=True)
    with pytest.raises(UsageError, match="learns without labels"):
        pretrain(tiles, tmp_path / "run", labels=tmp_path / "labels.csv", settings=Settings(), quiet=True)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LabelsConfig(target=("age",)), "'age' looks like regression"),
        (LabelsConfig(target=("facts",)), "'facts' looks like multilabel"),
        (LabelsConfig(target=("label", "age")), "--target label age"),
        (LabelsConfig(task="survival", time="age", event="dead"), "--task survival"),
        *((LabelsConfig(target=("age",), task=task), f"--task {task}") for task in ("regression", "proportion", "multilabel")),
    ],
)
def test_numbers_are_no_classes(tiles, tmp_path, config, said):
    table = pd.read_csv(tmp_path / "labels.csv")
    table = table.assign(age=[40.5, 41.25, 50.5, 61.75, 62.5, 70.5], facts=["p;q", "p", "q", "p;q", "r", "q"], dead=[0, 1] * 3)
    table.to_csv(tmp_path / "more.csv", index=False)
    asked = PretrainConfig(method="weak", size="toy", device="cpu")
    settings = Settings(tile=TileConfig(tile_px=32), labels=config, pretrain=asked)
    with pytest.raises(UsageError, match=said):
        pretrain(tiles, tmp_path / "run", labels=tmp_path / "more.csv", settings=settings, quiet=True)
    assert not (tmp_path / "run").exists()


def test_its_config_says_which_column_was_learned(tiles, tmp_path, readers):
    pd.read_csv(tmp_path / "labels.csv").assign(other=["x", "y", "y", "x", "x", "y"]).to_csv(tmp_path / "two.csv", index=False)
    config = PretrainConfig(
        method="weak", size="toy", arch="resnet10t", source="tiles", steps=1, batch_size=4, device="cpu",
        recipe_options=("panel_tiles=8", "global_px=32", "panel_every=1"),
    )  # fmt: skip
    asked = Settings(tile=TileConfig(tile_px=32), job=JobConfig(workers=1), labels=LabelsConfig(target=("other",)), pretrain=config)
    pretrain(tiles, tmp_path / "run", labels=tmp_path / "two.csv", settings=asked, quiet=True)
    again = read_settings(("tile", "job", "labels", "pretrain"), tmp_path / "run" / "config.yaml")  # as the command reads it
    assert again.labels == asked.labels
    said: list[str] = []
    pretrain(tiles, tmp_path / "run", labels=tmp_path / "two.csv", settings=again, quiet=True, say=said.append)
    assert any("already pretrained" in line for line in said)


def test_a_mosaic_is_part_of_the_slide_and_made_once(slides, tmp_path, no_processes):
    tile, job = TileConfig(tile_px=64), JobConfig(workers=1)
    index = index_slides(slides, tmp_path / "job", tile=tile, job=job, quiet=True)
    few = with_mosaics(index, slides, tmp_path / "job", most=10, tile=tile, job=job, quiet=True)
    assert [len(slide.cells_level0_px) for slide in few.slides] == [10, 10] and few.hash != index.hash
    for slide, whole in zip(few.slides, index.slides, strict=True):
        cells = {tuple(cell) for cell in whole.cells_level0_px.tolist()}
        assert {tuple(cell) for cell in slide.cells_level0_px.tolist()} < cells
        assert few.mosaic and not index.mosaic
        rows = read_mosaic(mosaic_file(Job(tmp_path / "job"), tile, slide.slide_id))
        assert np.array_equal(whole.cells_level0_px[rows], slide.cells_level0_px)
    again = mosaic_slides(slides, tmp_path / "job", most=10, tile=tile, job=job, only={"a", "b"}, quiet=True)
    assert [(row.status, row.n_tiles) for row in again] == [("skipped", 10), ("skipped", 10)]
    more = mosaic_slides(slides, tmp_path / "job", most=12, tile=tile, job=job, only={"a"}, quiet=True)
    assert [(row.status, row.n_tiles) for row in more] == [("done", 12)]


def test_patches_of_a_convolutional_network_cannot_be_hidden():
    from wsimil.encoders.trainable_cnn import trainable_cnn

    model = trainable_cnn("resnet10t", init=None, seed=3)
    assert torch.equal(model(torch.ones(1, 3, 64, 64)), trainable_cnn("resnet10t", init="none", seed=3)(torch.ones(1, 3, 64, 64)))
    assert model.encode_tokens(torch.ones(1, 3, 64, 64)).shape == (1, 4, 512)
    with pytest.raises(EncoderError, match="hidden"):
        model.encode_tokens(torch.ones(1, 3, 64, 64), torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("arch", ["test_vit", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_vit_is_refused_before_any_slide(tiles: Path, tmp_path: Path, arch: str) -> None:
    config = PretrainConfig(method="weak", size="toy", arch=arch, steps=1, batch_size=4, device="cpu")
    with pytest.raises(EncoderError, match=f"{arch}: .* take a convolutional network"):
        asked = Settings(tile=TileConfig(tile_px=32), pretrain=config)
        pretrain(tiles, tmp_path / "run", labels=tmp_path / "labels.csv", settings=asked, quiet=True)
    assert not (tmp_path / "run").exists()

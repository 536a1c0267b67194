"""What an encoder saw while it was pretrained travels with its features: a test slide among it is refused, or said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from wsimil.bags.dataset import BagFolder
from wsimil.config import ExtractConfig, JobConfig, PretrainConfig, Settings, TileConfig
from wsimil.encoders import load_encoder
from wsimil.errors import SplitsError
from wsimil.extraction import extract_features
from wsimil.files import read_json, write_json
from wsimil.pretraining import pretrain
from wsimil.training.cohort import check_not_seen

TILE = TileConfig(mpp=0.5, tile_px=64)
SETTINGS = Settings(
    tile=TILE,
    job=JobConfig(workers=1),
    pretrain=PretrainConfig(
        method="mae", size="toy", arch="test_vit", steps=2, batch_size=4, device="cpu",
        recipe_options=("global_px=32", "decoder_dim=16", "panel_tiles=8", "panel_every=1"),
    ),
)  # fmt: skip


def splits(*rows: tuple[int, str, str]) -> pd.DataFrame:
    return pd.DataFrame([{"fold": fold, "slide_id": name, "patient": name, "site": "", "split": side} for fold, name, side in rows])


def test_an_encoder_of_training_slides_is_told_from_one_that_saw_the_test(slides: Path, tmp_path: Path, readers) -> None:
    first, second = (
        [(0, "a", "train"), (0, "glass", "val"), (0, "b", "test")],
        [(1, "b", "train"), (1, "glass", "val"), (1, "a", "test")],
    )
    table = splits(*first, *second)
    table.to_csv(tmp_path / "splits.csv", index=False)
    fold = replace(SETTINGS, pretrain=replace(SETTINGS.pretrain, fold="0"))
    pretrain(slides, tmp_path / "own", splits=tmp_path / "splits.csv", settings=fold, quiet=True)
    contract = load_encoder(str(tmp_path / "own")).contract
    assert len(contract.seen_slides) == 1 and not contract.transductive and contract.mpp == 1.0
    job = extract_features(
        slides, tmp_path / "job", tile=TILE, extract=ExtractConfig(encoder=(str(tmp_path / "own"),)), job=SETTINGS.job, quiet=True
    )
    bags = BagFolder(job.features_folders[0])
    assert bags.headers["a"].attributes["encoder_saw_slide"] and "encoder_saw_slide" not in bags.headers["b"].attributes
    check_not_seen(bags, table, [0])
    with pytest.raises(SplitsError, match=r"fold 1: .* 1 of 1 test slides, a for one.*--transductive"):
        check_not_seen(bags, table, [0, 1])

    # the same weights, had the user said that test slides are among them
    description = read_json(tmp_path / "own" / "encoder.json")
    description["how_trained"]["transductive"] = True
    write_json(tmp_path / "own" / "encoder.json", description)
    again = extract_features(
        slides, tmp_path / "again", tile=TILE, extract=ExtractConfig(encoder=(str(tmp_path / "own"),)), job=SETTINGS.job, quiet=True
    )
    bags = BagFolder(again.features_folders[0])
    check_not_seen(bags, table, [0, 1])
    assert any("1 of" in remark and "transductive" in remark for remark in bags.remarks)


def test_encoders_of_others_are_taken_on_trust() -> None:
    bags = SimpleNamespace(headers={"a": SimpleNamespace(attributes={})})
    check_not_seen(bags, splits((0, "a", "test"), (0, "absent", "test")), [0])  # type: ignore[arg-type]

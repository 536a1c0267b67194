"""What an encoder saw while it was pretrained travels with its features: a test slide among it is refused, or said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from wsimil.bags.dataset import BagFolder
from wsimil.config import ExtractConfig, JobConfig, PretrainConfig, Settings, TileConfig
from wsimil.encoders import load_encoder
from wsimil.errors import SplitsError, UsageError
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


FOLDS = splits(
    (0, "a", "train"), (0, "glass", "val"), (0, "b", "test"), (1, "b", "train"), (1, "glass", "val"), (1, "a", "test")
)  # fmt: skip


def test_an_encoder_of_training_slides_is_told_from_one_that_saw_the_test(slides: Path, tmp_path: Path, readers) -> None:
    table = FOLDS
    table.to_csv(tmp_path / "splits.csv", index=False)
    fold = replace(SETTINGS, pretrain=replace(SETTINGS.pretrain, fold="0"))
    pretrain(slides, tmp_path / "own", splits=tmp_path / "splits.csv", settings=fold, quiet=True)
    index = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "own").rglob("*"))
    for name, value in (("min_tissue", 0.6), ("mpp", 0.6)):
        other = replace(fold, tile=replace(TILE, **{name: value}))
        with pytest.raises(UsageError, match=rf"tile\.{name}: 0\.5 there, 0\.6 here"):
            pretrain(slides, tmp_path / "own", splits=tmp_path / "splits.csv", settings=other, quiet=True)
    assert index == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "own").rglob("*"))  # nothing was tiled anew
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


def test_what_the_start_has_seen_is_not_forgotten(slides: Path, tmp_path: Path, readers) -> None:
    table = tmp_path / "splits.csv"
    FOLDS.to_csv(table, index=False)

    def run(name: str, **more) -> Path:
        asked = replace(SETTINGS, pretrain=replace(SETTINGS.pretrain, **more))
        return pretrain(slides, tmp_path / name, splits=table, settings=asked, quiet=True).folder

    first = str(run("first", fold="0"))
    with pytest.raises(SplitsError, match=r"--init .*first: .* 1 of 2 validation and test slides, a for one.*--transductive"):
        run("other", fold="1", init=first)
    assert not (tmp_path / "other").exists()
    assert load_encoder(str(run("same", fold="0", init=first))).contract.seen == load_encoder(first).contract.seen
    both = load_encoder(str(run("knowingly", transductive=True, init=first))).contract
    assert both.transductive and {name for name, _ in both.seen} == {"a", "b"}

    # all slides were seen, and one more by the start: the test slides among them are known by their content, whatever their names
    description = read_json(Path(first) / "encoder.json")
    description["how_trained"] |= {"slides": {"b": "another slide's", "x": "", **description["how_trained"]["slides"]}}
    description["how_trained"]["transductive"] = True
    write_json(Path(first) / "encoder.json", description)
    onward = replace(SETTINGS, pretrain=replace(SETTINGS.pretrain, init=first))
    second = pretrain(slides, tmp_path / "second", settings=onward, quiet=True)
    contract = load_encoder(str(second.folder)).contract
    own = dict(both.seen)
    assert set(contract.seen) == {("a", own["a"]), ("b", own["b"]), ("b", "another slide's"), ("x", "")} and contract.transductive


def test_tile_folders_are_known_by_name(slides: Path, tmp_path: Path, readers) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "tiles" / name).mkdir(parents=True)
        for number in range(4):
            picture = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "tiles" / name / f"{number}.png")
    table = FOLDS
    table.to_csv(tmp_path / "splits.csv", index=False)
    own = replace(SETTINGS, pretrain=replace(SETTINGS.pretrain, fold="0"))
    encoder = pretrain(tmp_path / "tiles", tmp_path / "own", splits=tmp_path / "splits.csv", settings=own, quiet=True).folder
    other = replace(SETTINGS, pretrain=replace(SETTINGS.pretrain, fold="1", init=str(encoder)))
    for source in (tmp_path / "tiles", slides):
        with pytest.raises(SplitsError, match="a for one"):
            pretrain(source, tmp_path / "other", splits=tmp_path / "splits.csv", settings=other, quiet=True)

    def bags_of(name: str) -> BagFolder:
        extract = ExtractConfig(encoder=(str(encoder),))
        return BagFolder(
            extract_features(slides, tmp_path / name, tile=TILE, extract=extract, job=SETTINGS.job, quiet=True).features_folders[0]
        )

    bags = bags_of("job")
    check_not_seen(bags, table, [0])
    with pytest.raises(SplitsError, match=r"fold 1: .* a for one"):
        check_not_seen(bags, table, [1])
    description = read_json(encoder / "encoder.json")
    description["how_trained"]["transductive"] = True
    write_json(encoder / "encoder.json", description)
    bags = bags_of("again")
    check_not_seen(bags, table, [1])
    assert any("transductive" in remark for remark in bags.remarks)


def test_encoders_of_others_are_taken_on_trust() -> None:
    bags = SimpleNamespace(headers={"a": SimpleNamespace(attributes={})})
    check_not_seen(bags, splits((0, "a", "test"), (0, "absent", "test")), [0])  # type: ignore[arg-type]

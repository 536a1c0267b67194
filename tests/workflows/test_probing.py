"""`wsimil probe` from image files to its table: which tile is whose, what is compared with what."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from wsimil import probing
from wsimil.cli import main
from wsimil.config import ProbeConfig
from wsimil.encoders import load_encoder, load_random_twin, save_encoder
from wsimil.encoders.contract import EncoderContract
from wsimil.encoders.networks import build_network
from wsimil.errors import LabelsError
from wsimil.probing import encode_tiles, probe, read_labelled_tiles

TINY = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}


def write_tiles(folder: Path, *, n_groups: int = 12, per_group: int = 3, px: int = 32) -> Path:
    """Two classes that differ in texture, two sites that differ in brightness, in sub-folders; and their table."""
    rng = np.random.default_rng(0)
    rows = []
    for group in range(n_groups):
        label, site = ("coarse", "fine")[group % 2], ("A", "B")[group // 2 % 2]
        for number in range(per_group):
            step = 8 if label == "coarse" else 1
            grain = rng.integers(-60, 60, (px // step, px // step)).repeat(step, 0).repeat(step, 1)
            tile = np.clip(150 + grain + (30 if site == "B" else 0), 0, 255).astype(np.uint8)
            path = folder / label / f"s{group}-{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.stack([tile] * 3, axis=-1)).save(path)
            rows.append({"tile": f"{label}/{path.name}", "label": label, "group": f"s{group}", "site": site})
    pd.DataFrame(rows).to_csv(folder / "tiles.csv", index=False)
    return folder


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    return write_tiles(tmp_path / "tiles")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """An encoder folder as pretraining leaves one."""
    network = build_network("vit_tiny_patch16_224", TINY)
    contract = EncoderContract("mine", "vit_tiny_patch16_224", 24, tile_px=32, mean=(0.5,) * 3, std=(0.3,) * 3, pooling="cls")
    return save_encoder(tmp_path / "mine", network, contract, model_args=TINY)


def test_the_command_prints_a_table_and_writes_what_it_found(tiles, trained, tmp_path, capsys):
    argv = ["probe", str(tiles), "--labels", str(tiles / "tiles.csv"), "--encoder", "texture", str(trained), "--device", "cpu"]
    assert main([*argv, "--out", str(tmp_path / "out"), "--seeds", "2", "--folds", "3", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "36 tiles of 2 classes, 12 groups" in text and "chance: 0.500" in text and "site probe: 2 sites" in text
    content = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert list(content["encoders"]) == ["texture", str(trained), "random:vit_tiny_patch16_224:0"]
    found = {(one["question"], one["encoder"], one["probe"]): one for one in content["results"]}
    assert found["label", "texture", "logistic"]["balanced_accuracy"] > 0.95
    assert found["site", "texture", "logistic"]["balanced_accuracy"] > 0.9
    assert content["site"]["balanced_accuracy_from_labels"] == pytest.approx(0.5)
    mine, twin = (found["label", name, "20-NN"] for name in (str(trained), "random:vit_tiny_patch16_224:0"))
    assert mine["above_twin"] == pytest.approx(mine["balanced_accuracy"] - twin["balanced_accuracy"])
    assert mine["above_twin_low"] <= mine["above_twin"] <= mine["above_twin_high"]
    assert found["label", "texture", "20-NN"]["above_twin"] is None
    table = pd.read_csv(tmp_path / "out" / "probe.csv")
    assert len(table) == len(content["results"]) == 3 * 3 + 3 * 2


def test_a_twin_is_the_same_network_untrained(trained):
    mine, twin = load_encoder(str(trained)), load_random_twin(str(trained))
    assert twin is not None
    same, other = mine.contract.recipe(), twin.contract.recipe()
    assert same.pop("sha256") != other.pop("sha256") and same == other
    shapes = [{name: value.shape for name, value in encoder.state_dict().items()} for encoder in (mine, twin)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 20  # two blocks, as it was trained, not timm's twelve
    assert load_random_twin("texture") is None and load_random_twin("random:resnet10t") is None


def test_without_a_table_sub_folders_are_classes_and_the_user_hears_of_missing_groups(tiles):
    remarks: list[str] = []
    report = probe(tiles, config=ProbeConfig(seeds=1), quiet=True, say=remarks.append)
    assert report.content["tiles"]["classes"] == {"coarse": 18, "fine": 18} and not report.content["tiles"]["grouped"]
    assert any("too good" in remark for remark in remarks) and "no groups" in report.text()


def test_vectors_stay_with_their_files_whatever_the_batch_and_the_sizes(tiles):
    Image.new("RGB", (48, 48), "red").save(tiles / "coarse" / "s0-1.png")  # one of another size, in the middle of a batch
    files = sorted(tiles.rglob("*.png"))[:9]
    encoder = load_encoder("texture")
    (one,), (four,) = (encode_tiles(files, [encoder], batch_size=size, quiet=True)[0] for size in (1, 4))
    np.testing.assert_allclose(one, four, atol=1e-5)
    (alone,), _ = encode_tiles([files[5]], [encoder], quiet=True)
    np.testing.assert_allclose(one[5], alone[0], atol=1e-5)


def test_a_tile_is_found_by_path_or_by_a_name_that_occurs_once(tiles):
    table = pd.read_csv(tiles / "tiles.csv")
    names = table.assign(tile=[Path(tile).name for tile in table["tile"]])
    names.to_csv(tiles / "names.csv", index=False)
    by_path, by_name = (read_labelled_tiles(tiles, tiles / file, ProbeConfig())[0] for file in ("tiles.csv", "names.csv"))
    assert by_path.equals(by_name) and len(by_path) == 36
    Image.new("RGB", (32, 32)).save(tiles / "fine" / "s0-0.png")
    with pytest.raises(LabelsError, match=r"coarse/s0-0.png and fine/s0-0.png"):
        read_labelled_tiles(tiles, tiles / "names.csv", ProbeConfig())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.rename(columns={"tile": "picture"}), "names the tiles"),
        (lambda table: table.rename(columns={"label": "lable"}), "did you mean"),
        (lambda table: table.assign(tile=["nowhere.png", *table["tile"][1:]]), "no tile nowhere.png"),
        (lambda table: pd.concat([table, table[:1]]), "twice"),
        (lambda table: table.assign(group=["", *table["group"][1:]]), "has no group"),
    ],
)
def test_a_table_that_cannot_be_matched_names_the_row(tiles, change, said):
    change(pd.read_csv(tiles / "tiles.csv")).to_csv(tiles / "wrong.csv", index=False)
    with pytest.raises(LabelsError, match=said):
        read_labelled_tiles(tiles, tiles / "wrong.csv", ProbeConfig())


def test_a_column_asked_for_by_name_has_to_be_there(tiles):
    with pytest.raises(LabelsError, match="slide"):
        read_labelled_tiles(tiles, tiles / "tiles.csv", ProbeConfig(group="slide"))


def test_tiles_that_are_no_squares_or_no_images_are_left_out_by_name(tiles):
    whole = probe(tiles, config=ProbeConfig(seeds=1), quiet=True)
    Image.new("RGB", (32, 30)).save(tiles / "fine" / "flat.png")
    Image.new("RGB", (1, 1)).save(tiles / "coarse" / "s0-1b.png")
    (tiles / "fine" / "broken.png").write_bytes(b"no image")
    said: list[str] = []
    report = probe(tiles, config=ProbeConfig(seeds=1, batch_size=8), quiet=True, say=said.append)
    (left_out,) = (remark for remark in said if "left out" in remark)
    assert "3 of 39 tiles" in left_out and all(name in left_out for name in ("flat.png", "s0-1b.png", "broken.png"))
    assert report.content["tiles"] == whole.content["tiles"]
    pd.testing.assert_frame_equal(report.rows, whole.rows, rtol=0.02)
    for number in range(2):
        (tiles / "fine" / f"broken{number}.png").write_bytes(b"")
    with pytest.raises(LabelsError, match=r"5 of 41 tiles cannot be had, more than a tenth: .*s0-1b\.png"):
        probe(tiles, config=ProbeConfig(seeds=1), quiet=True)


def test_a_smaller_set_is_made_of_whole_groups_of_every_class(tiles):
    table, _ = read_labelled_tiles(tiles, tiles / "tiles.csv", ProbeConfig())
    some = probing._some_groups(table, 20)
    assert len(some) == 18 and set(some["label"].value_counts()) == {9}
    assert (some["group"].value_counts() == 3).all()


def test_a_class_that_gives_the_site_away_is_said():
    table = pd.DataFrame({"label": ["a"] * 4 + ["b"] * 4, "site": ["A", "A", "A", "B", "B", "B", "B", "C"]})
    # a says A and finds all three of it, b says C and finds its one; B is never named
    assert probing._known_from_labels(table) == pytest.approx((1 + 1 + 0) / 3)


def test_a_site_of_one_group_is_left_out_and_said(tiles):
    table = pd.read_csv(tiles / "tiles.csv")
    table.loc[table["group"] == "s0", "site"] = "C"
    table.to_csv(tiles / "tiles.csv", index=False)
    remarks: list[str] = []
    report = probe(tiles, tiles / "tiles.csv", config=ProbeConfig(seeds=1), quiet=True, say=remarks.append)
    assert (report.content["site"]["n_sites"], report.content["site"]["n_tiles"]) == (2, 33)
    assert any("left out: C" in remark for remark in remarks)

"""A run from tiles to an encoder: killed and resumed, split, stopped when it collapses, exported and read back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wsimil.cli import main
from wsimil.config import JobConfig, PretrainConfig, Settings, TileConfig
from wsimil.encoders import load_encoder, load_random_twin
from wsimil.errors import SplitsError, UsageError, WsimilError
from wsimil.files import hash_of, read_json, write_json
from wsimil.pretraining import Forecast, Pretrained, pretrain
from wsimil.pretraining.process import read_table
from wsimil.slides.write_tiff import write_slide

TINY = (
    "global_px=32",
    "local_px=16",
    "local_views=1",
    "prototypes=32",
    "bottleneck=8",
    "hidden=16",
    "panel_tiles=12",
    "panel_every=0.5",
)
SPLITS = "fold,slide_id,patient,site,split\n"


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three groups of 32-px images; in each, stripes of its own width."""
    folder = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    for group, width in (("a", 2), ("b", 4), ("c", 8)):
        (folder / group).mkdir()
        for number in range(8):
            shade = np.where(np.arange(32) // width % 2, 200, 90) + rng.integers(-20, 20, (32, 32))
            picture = np.clip(np.stack([shade, 0.6 * shade, 0.9 * shade], 2), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / group / f"{number}.png")
    return folder


def settings(method: str = "dino", *, steps: int = 8, options: tuple[str, ...] = (), **more) -> Settings:
    config = PretrainConfig(
        **{
            "method": method, "size": "toy", "arch": "test_vit", "init": "scratch", "steps": steps, "batch_size": 4,
            "device": "cpu", "recipe_options": (*TINY, *options), **more,
        }
    )  # fmt: skip
    return Settings(tile=TileConfig(tile_px=32), pretrain=config)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "backbone.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    """A signal to this process after so many steps, as a scheduler sends it."""
    from wsimil.pretraining.loop import Loop

    advance = Loop.advance

    def advance_and_signal(self, *arguments):
        record = advance(self, *arguments)
        if self.step == step:
            os.kill(os.getpid(), number)
        return record

    monkeypatch.setattr(Loop, "advance", advance_and_signal)


@pytest.fixture(scope="module")
def finished(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, with readers in processes."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    done = pretrain(tiles, out, settings=replace(settings(), job=JobConfig(workers=2)), quiet=True)
    assert isinstance(done, Pretrained) and done.step == 8 and not done.remark
    return out


def test_a_run_leaves_an_encoder_a_log_and_a_panel(finished: Path) -> None:
    there = set(os.listdir(finished))
    assert {"backbone.safetensors", "encoder.json", "config.yaml", "log.csv", "health.csv", "health.html"} <= there
    assert [int(row["step"]) for row in read_table(finished / "health.csv")] == [0, 4, 8]
    assert [int(row["step"]) for row in read_table(finished / "log.csv")] == list(range(1, 9))
    assert sorted(path.name for path in (finished / "pictures").glob("patches-*")) == [f"patches-000000{n}.jpg" for n in (0, 4, 8)]
    trained = read_json(finished / "encoder.json")["how_trained"]
    assert trained["step"] == 8 and trained["slides"].keys() == {"a", "b", "c"} and trained["transductive"] is False


def test_a_finished_run_is_kept(tiles: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsimil.pretraining.run.launch", lambda *_: pytest.fail("trained again"))
    assert pretrain(tiles, finished, settings=settings(), quiet=True).step == 8


def test_its_config_gives_the_same_run(tiles: Path, finished: Path, tmp_path: Path, readers, capsys) -> None:
    arguments = ["--out", str(tmp_path / "again"), "--config", str(finished / "config.yaml"), "--quiet"]
    assert main(["pretrain", str(tiles), *arguments]) == 0
    assert str(tmp_path / "again") in capsys.readouterr().out
    assert same(weights(finished), weights(tmp_path / "again"))


def test_killed_and_resumed_it_ends_in_the_same_weights(
    tiles: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readers
) -> None:
    """The undisturbed run was read by two processes; the parts by four and by one that answer in their own order."""
    at = 5
    with monkeypatch.context() as patched:
        stop_at(at, patched)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiles, tmp_path / "run", settings=replace(settings(), job=JobConfig(workers=4)), quiet=True)
    assert (tmp_path / "run" / "last.ckpt").exists()
    readers.seed = 7
    said: list[str] = []
    pretrain(tiles, tmp_path / "run", settings=replace(settings(), job=JobConfig(workers=1)), quiet=True, say=said.append)
    assert f"going on at step {at} of 8" in said
    assert same(weights(finished), weights(tmp_path / "run"))
    columns = ("step", "loss", "grad_norm", "entropy")
    for table in ("log.csv", "health.csv"):
        straight, again = (
            [[row.get(name) for name in columns] for row in read_table(folder / table)] for folder in (finished, tmp_path / "run")
        )
        assert straight == again


def test_lines_of_the_log_are_those_of_a_run_that_never_stopped(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readers
) -> None:
    asked = settings(steps=200)  # a line every four steps
    pretrain(tiles, tmp_path / "straight", settings=asked, quiet=True)
    for at in (7, 58):
        with monkeypatch.context() as patched:
            stop_at(at, patched)
            with pytest.raises(KeyboardInterrupt):
                pretrain(tiles, tmp_path / "run", settings=asked, quiet=True)
    pretrain(tiles, tmp_path / "run", settings=asked, quiet=True)
    columns = ("step", "loss", "loss_dino", "grad_norm", "entropy", "lr", "weight_decay")
    straight, again = (
        [[row[name] for name in columns] for row in read_table(tmp_path / run / "log.csv")] for run in ("straight", "run")
    )
    assert straight == again and len(straight) == 50


def test_one_run_goes_on_with_no_other_settings(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readers) -> None:
    with monkeypatch.context() as patched:
        stop_at(2, patched)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiles, tmp_path, settings=settings(), quiet=True)
    before = (tmp_path / "config.yaml").read_text()
    for changed, said in (
        (settings(lr=0.5), r"lr: 0\.0005 there, 0\.5 here"),
        (settings(seed=1), r"tiles\.seed: 0 there, 1 here"),
        (settings(options=("prototypes=64",)), "prototypes: 32 there, 64 here"),
        (settings(accumulate=2), "accumulate: 1 there, 2 here"),
    ):
        with pytest.raises(UsageError, match=said):
            pretrain(tiles, tmp_path, settings=changed, quiet=True)
    Image.new("RGB", (32, 32), "red").save(tiles / "a" / "new.png")
    try:
        with pytest.raises(UsageError, match=r"tiles\.index"):
            pretrain(tiles, tmp_path, settings=settings(), quiet=True)
    finally:
        (tiles / "a" / "new.png").unlink()
    assert (tmp_path / "config.yaml").read_text() == before


def test_other_weights_under_the_name_of_the_start_are_another_run(tiles: Path, finished: Path, tmp_path: Path, readers) -> None:
    start = tmp_path / "start"
    shutil.copytree(finished, start)
    asked = settings(steps=2, init=str(start))
    pretrain(tiles, tmp_path / "run", settings=asked, quiet=True)
    said: list[str] = []
    pretrain(tiles, tmp_path / "run", settings=asked, quiet=True, say=said.append)
    assert any("already pretrained" in line for line in said)
    pretrain(tiles, tmp_path / "new", settings=settings(steps=2, seed=1), quiet=True)
    for name in ("backbone.safetensors", "encoder.json"):
        shutil.copy(tmp_path / "new" / name, start / name)
    with pytest.raises(UsageError, match=r"init_sha256: [0-9a-f]+ there, [0-9a-f]+ here"):
        pretrain(tiles, tmp_path / "run", settings=asked, quiet=True)


def test_a_run_of_an_earlier_version_is_known_again_and_goes_on(
    tiles: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readers
) -> None:
    """Its notes name neither the parts of a step nor the content of the start."""

    def aged(identity: dict) -> dict:
        return {name: value for name, value in identity.items() if name not in ("accumulate", "init_sha256")}

    for done in (True, False):
        folder = tmp_path / f"{done}"
        shutil.copytree(finished, folder)
        if not done:
            for name in ("finished.json", "last.ckpt"):
                (folder / name).unlink()
            with monkeypatch.context() as patched:
                stop_at(3, patched)
                with pytest.raises(KeyboardInterrupt):
                    pretrain(tiles, folder, settings=settings(), quiet=True)
        content = torch.load(folder / "last.ckpt", weights_only=True)
        content |= {"identity": aged(content["identity"]), "key": hash_of(aged(content["identity"]))}
        del content["devices"]
        torch.save(content, folder / "last.ckpt")
        write_json(folder / "run.json", content["identity"])
        if done:
            write_json(folder / "finished.json", {**read_json(folder / "finished.json"), "key": content["key"]})
        said: list[str] = []
        assert pretrain(tiles, folder, settings=settings(), quiet=True, say=said.append).step == 8
        assert any(("already pretrained" if done else "going on at step 3") in line for line in said)
        assert same(weights(folder), weights(finished))


# ---------------------------------------------------------------- what may be seen


def test_a_folder_that_is_not_there_is_said_before_weights_that_are_not(tmp_path):
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        pretrain(tmp_path / "nowhere", tmp_path / "out", quiet=True)  # the default begins with ImageNet's weights
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("local_px=50",), "local_px=48 or 64"),
        (("local_px=8",), "local_px=16"),
        (("global_px=100",), "global_px=96 or 112"),
    ],
)
def test_views_are_whole_patches_of_the_network(tiles: Path, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=f"patches of test_vit, 16 px each.*{said}"):
        pretrain(tiles, tmp_path / "run", settings=settings(options=options), quiet=True)
    assert not (tmp_path / "run").exists()


def test_one_patch_cannot_be_hidden_in_part_and_seeds_have_an_end(tiles: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"views of 16 px are one patch of test_vit.*global_px=32"):
        pretrain(tiles, tmp_path / "run", settings=settings("mae", options=("global_px=16", "decoder_dim=16")), quiet=True)
    with pytest.raises(UsageError, match=r"--seed 9223372036854775808 .* less than 2\^63"):
        pretrain(tiles, tmp_path / "run", settings=settings(seed=2**63), quiet=True)
    assert not (tmp_path / "run").exists()


def test_tile_images_of_another_size_are_seen_at_another_scale(tmp_path: Path, readers) -> None:
    (tmp_path / "tiles" / "a").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(60, 200, (48, 48, 3), np.uint8)).save(tmp_path / "tiles" / "a" / f"{number}.png")
    said: list[str] = []
    run = pretrain(tmp_path / "tiles", tmp_path / "run", settings=settings("mae", steps=2), quiet=True, say=said.append)
    described = read_json(run.folder / "encoder.json")
    assert described["mpp"] == 0.75 and described["how_trained"]["mpp"] == [0.75, 0.75]
    assert sum("tile images of 48 px are made 32 px wide, which makes them 0.75 µm/px" in line for line in said) == 1
    Image.new("RGB", (32, 32), "red").save(tmp_path / "tiles" / "a" / "x.png")
    run = pretrain(tmp_path / "tiles", tmp_path / "mixed", settings=settings("mae", steps=2), quiet=True)
    described = read_json(run.folder / "encoder.json")
    assert described["mpp"] is None and (described["trained_mpps"][0], described["trained_mpps"][-1]) == (0.5, 0.75)


def test_a_run_inside_the_folder_of_its_tiles_is_no_tile(tiles: Path, tmp_path: Path, readers) -> None:
    shutil.copytree(tiles, tmp_path / "tiles")
    asked, said = settings(steps=2), []
    pretrain(tmp_path / "tiles", tmp_path / "tiles" / "run", settings=asked, quiet=True)
    pretrain(tmp_path / "tiles", tmp_path / "tiles" / "run", settings=asked, quiet=True, say=said.append)
    assert any("already pretrained" in line for line in said)


def test_thumbnails_beside_slides_do_not_make_them_tiles(tiles: Path, coded_slides: Path, tmp_path: Path) -> None:
    from wsimil.pretraining.run import _holds_tiles

    for place in range(3):  # whatever the order of the folders
        folder = tmp_path / f"{place}"
        for sub in ("a", "b", "c"):
            (folder / sub).mkdir(parents=True)
        for number in range(20):
            shutil.copy(tiles / "a" / "0.png", folder / "abc"[place] / f"{number}.png")
        asked = PretrainConfig(), TileConfig(tile_px=32), lambda message: None
        assert _holds_tiles(folder, *asked)
        shutil.copy(coded_slides / "a.tiff", folder / "abc"[place - 1] / "a.tiff")
        assert not _holds_tiles(folder, *asked)


SLIDES = TileConfig(tile_px=32, tissue="none")


def test_an_encoder_names_the_scales_and_the_slides_that_were_drawn(
    coded_slides: Path, tmp_path: Path, readers, no_processes, short_timings
) -> None:
    shutil.copytree(coded_slides, tmp_path / "slides")
    for name in "bc":
        (tmp_path / "slides" / f"{name}.tiff").unlink()
    asked = replace(settings("mae", steps=2, mpp_range="0.25-1"), tile=SLIDES)
    run = pretrain(tmp_path / "slides", tmp_path / "run", settings=asked, quiet=True)
    described = read_json(run.folder / "encoder.json")
    assert (described["trained_mpps"][0], described["trained_mpps"][-1]) == (0.5, 1.0)  # the slides' own is .5
    assert described["how_trained"]["mpp"] == [0.5, 1.0]
    assert pretrain(tmp_path / "slides", tmp_path / "run", settings=asked, dry_run=True, quiet=True).mpp == (0.5, 1.0)
    picture = np.random.default_rng(0).integers(60, 200, (60, 60, 3), np.uint8)
    write_slide(tmp_path / "slides" / "small.tiff", picture, mpp=0.5, compression="deflate")
    said: list[str] = []
    asked = replace(settings("mae", steps=2, mpp_range="1.1-2"), tile=SLIDES)
    run = pretrain(tmp_path / "slides", tmp_path / "coarse", settings=asked, quiet=True, say=said.append)
    trained = read_json(run.folder / "encoder.json")["how_trained"]
    assert trained["slides"].keys() == {"a", "d"} and trained["n_slides"] == 2
    assert "1 of 3 slides left out: smaller than a tile of 32 px at 1.1 µm/px: small" in said


@pytest.mark.parametrize("side", ["val", "test"])
def test_a_training_slide_is_no_copy_of_one_that_is_held_out(coded_slides: Path, tmp_path: Path, side: str) -> None:
    (tmp_path / "slides").mkdir()
    for name, source in (("t1", "a"), ("t2", "b"), ("held", "b")):
        shutil.copy(coded_slides / f"{source}.tiff", tmp_path / "slides" / f"{name}.tiff")
    splits = tmp_path / "splits.csv"
    other = {"val": "test", "test": "val"}[side]
    splits.write_text(SPLITS + f"0,t1,p1,,train\n0,t2,p2,,train\n0,held,p3,,{side}\n0,absent,p4,,{other}\n")
    asked = replace(settings(), tile=SLIDES)
    with pytest.raises(SplitsError, match="t2 is a training slide and held is held out, and both are the same file"):
        pretrain(tmp_path / "slides", tmp_path / "run", splits=splits, settings=asked, quiet=True)


def test_only_training_slides_of_the_fold_are_seen(tiles: Path, tmp_path: Path, readers) -> None:
    splits = tmp_path / "splits.csv"
    splits.write_text(SPLITS + "0,a,p1,,train\n0,b,p2,,val\n0,c,p3,,test\n1,a,p1,,test\n1,b,p2,,val\n1,c,p3,,train\n")
    said: list[str] = []
    run = pretrain(tiles, tmp_path / "run", splits=splits, settings=settings(steps=2, fold="1"), quiet=True, say=said.append)
    trained = read_json(run.folder / "encoder.json")["how_trained"]
    assert list(trained["slides"]) == ["c"] and trained["fold"] == 1 and trained["splits_hash"]
    assert any("1 validation, 1 test" in line for line in said)


def test_every_fold_needs_an_encoder_of_its_own(tiles: Path, tmp_path: Path) -> None:
    splits = tmp_path / "splits.csv"
    splits.write_text(SPLITS + "0,a,p1,,train\n0,b,p2,,val\n0,c,p3,,test\n1,c,p3,,train\n1,b,p2,,val\n1,a,p1,,test\n")
    with pytest.raises(SplitsError, match="--fold 0"):
        pretrain(tiles, tmp_path / "run", splits=splits, settings=settings(), quiet=True)
    with pytest.raises(UsageError, match="folds 0, 1"):
        pretrain(tiles, tmp_path / "run", splits=splits, settings=settings(fold="7"), quiet=True)
    with pytest.raises(UsageError, match="--splits"):
        pretrain(tiles, tmp_path / "run", settings=settings(fold="0"), quiet=True)


def test_slides_that_the_splits_do_not_name_stay_out(tiles: Path, tmp_path: Path, readers) -> None:
    splits = tmp_path / "splits.csv"
    splits.write_text(SPLITS + "0,a,p1,,train\n0,b,p2,,val\n")
    said: list[str] = []
    run = pretrain(tiles, tmp_path / "run", splits=splits, settings=settings(steps=2), quiet=True, say=said.append)
    assert list(read_json(run.folder / "encoder.json")["how_trained"]["slides"]) == ["a"]
    assert any("do not name" in line for line in said)


def test_labels_of_test_slides_are_never_learned(tiles: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="would learn those of the test slides"):
        pretrain(tiles, tmp_path / "run", settings=settings(method="weak", transductive=True), quiet=True)


def test_transductive_is_written_down(tiles: Path, tmp_path: Path, readers) -> None:
    splits = tmp_path / "splits.csv"
    splits.write_text(SPLITS + "0,a,p1,,train\n0,b,p2,,val\n0,c,p3,,test\n")
    run = pretrain(tiles, tmp_path / "run", splits=splits, settings=settings(steps=2, transductive=True), quiet=True)
    trained = read_json(run.folder / "encoder.json")["how_trained"]
    assert trained["transductive"] is True and trained["slides"].keys() == {"a", "b", "c"}


# ---------------------------------------------------------------- collapse


def test_a_run_made_to_collapse_stops_and_keeps_what_was_good(tiles: Path, tmp_path: Path, readers) -> None:
    """A learning rate of 30 with a teacher that is the student: in a few steps all tiles are one to it."""
    options = (
        "momentum=[0.0, 0.0]",
        "clip_norm=0",
        "centring=ema",
        "spread=none",
        "panel_every=0.1",
        "panel_tiles=24",
        "warm_up=0.2",
    )
    asked = settings(steps=40, lr=30.0, options=options)
    with pytest.raises(WsimilError, match=r"collapsed by step .*What helps: halve --lr") as raised:
        pretrain(tiles, tmp_path, settings=asked, quiet=True)
    panels = read_table(tmp_path / "health.csv")
    assert int(panels[-1]["step"]) < 40 and panels[-1]["signs"] and panels[-2]["signs"]
    kept = int(str(raised.value).split("encoder of step ")[1].split()[0])
    assert read_json(tmp_path / "encoder.json")["how_trained"]["step"] == kept < int(panels[-2]["step"])


def test_asked_only_to_warn_it_goes_on(tiles: Path, tmp_path: Path, readers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsimil.pretraining.health.Alarm.signs", lambda self, step, numbers: ["one", "two"] if step > 4 else [])
    said: list[str] = []
    options = ("panel_every=0.25",)
    done = pretrain(tiles, tmp_path, settings=settings(collapse="warn", options=options), quiet=True, say=said.append)
    assert sum("WARNING" in line for line in said) == 2
    assert done.step == 4 and "the encoder of step 4 is kept" in done.remark


@pytest.mark.parametrize(("collapse", "every"), [("warn", 0.5), ("stop", 1.0)])
def test_a_run_that_never_had_an_encoder_has_not_succeeded(
    collapse: str, every: float, tiles: Path, tmp_path: Path, readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsimil.pretraining.health.Alarm.signs", lambda self, step, numbers: ["one", "two"] if step else [])
    for _ in range(2):  # and not when it is asked again, either
        with pytest.raises(WsimilError, match=r"no encoder was kept: every panel raised a warning.*What helps: halve --lr"):
            pretrain(tiles, tmp_path, settings=settings(collapse=collapse, options=(f"panel_every={every}",)), quiet=True)
    assert not (tmp_path / "finished.json").exists() and not (tmp_path / "encoder.json").exists()


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("method", ["dino", "mae"])
def test_the_exported_encoder_is_the_one_that_was_trained(method: str, tiles: Path, tmp_path: Path, readers) -> None:
    run = pretrain(tiles, tmp_path / "run", settings=settings(method, options=("decoder_dim=16",)), quiet=True)
    encoder = load_encoder(str(run.folder))
    contract = encoder.contract
    assert contract.tile_px == 32 and contract.mpp == 0.5 and contract.dim == 64
    assert contract.pooling == {"dino": "cls", "mae": "mean"}[method]
    state = torch.load(run.folder / "last.ckpt", weights_only=True)["loop"]
    source, prefix = (state["objective"], "teacher.network.") if method == "dino" else (state["model"], "network.")
    exported = weights(run.folder)
    assert all(torch.equal(value, source[prefix + name]) for name, value in exported.items())
    wide = load_encoder(str(run.folder), embedding="self-vit-mil")
    tile = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    assert wide(tile).shape == (2, 5 * 64) and encoder(tile).shape == (2, 64)


def test_the_patches_of_a_recipe_come_back_with_the_encoder(tiles: Path, tmp_path: Path, readers) -> None:
    asked = settings("mae", steps=2, options=("decoder_dim=16", "patch_px=8"))
    run = pretrain(tiles, tmp_path / "run", settings=asked, quiet=True)
    described = read_json(run.folder / "encoder.json")
    assert run.recipe.patch_px == 8 and described["model_args"]["patch_size"] == described["how_trained"]["recipe"]["patch_px"] == 8
    for encoder in (load_encoder(str(run.folder)), load_random_twin(str(run.folder))):
        assert encoder.network.patch_embed.patch_size == (8, 8) and encoder.network.pos_embed.shape[1] == 1 + (32 // 8) ** 2
    painted = torch.load(run.folder / "last.ckpt", weights_only=True)["loop"]["objective"]["paint.weight"]
    assert len(painted) == 8 * 8 * 3


def test_tiles_read_larger_than_the_input_are_said_as_the_network_sees_them() -> None:
    from wsimil.pretraining.export import _between, seen_scales
    from wsimil.pretraining.presets import preset

    toy = preset("dino", "toy")  # 224 px made 96
    assert seen_scales(toy, TileConfig(mpp=0.5, tile_px=224), (0.5, 0.5)) == pytest.approx((0.5 * 224 / 96,) * 2)
    steps = _between(0.25, 1.0)
    assert steps[0] == 0.25 and steps[-1] == 1.0 and all(b / a <= 1.25 for a, b in pairwise(steps))


def test_an_export_that_reads_back_otherwise_is_no_export(tiles: Path, tmp_path: Path, readers, monkeypatch) -> None:
    from wsimil.pretraining import export

    real = export.load_encoder

    def another(name: str):
        encoder = real(name)
        with torch.no_grad():
            encoder.network.norm.weight.add_(0.1)
        return encoder

    monkeypatch.setattr(export, "load_encoder", another)
    with pytest.raises(WsimilError, match="other vectors"):
        pretrain(tiles, tmp_path, settings=settings(steps=2), quiet=True)


# ---------------------------------------------------------------- forecast, hours, devices


@pytest.fixture
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsimil.pretraining.forecast._TIMED_S", 0.2)


def test_a_dry_run_measures_and_trains_nothing(tiles: Path, tmp_path: Path, readers, short_timings, capsys) -> None:
    done = pretrain(tiles, tmp_path, settings=settings(steps=100), dry_run=True, quiet=True)
    assert isinstance(done, Forecast) and (done.slides, done.cells, done.steps, done.tiles) == (3, 24, 100, 400)
    assert done.read_tiles_per_s > 0 and done.hours == pytest.approx(100 * done.step_s / 3600) and 0 <= done.waiting <= 1
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.size == (32 + 4 + 32 + 4 + 16, 4 * 32 + 3 * 4)  # two global views and a local one of four tiles
    assert not (tmp_path / "encoder.json").exists() and not (tmp_path / "last.ckpt").exists()


def test_hours_become_steps_once(tiles: Path, tmp_path: Path, readers, short_timings) -> None:
    asked = settings()
    asked = Settings(tile=asked.tile, pretrain=PretrainConfig(**{**vars(asked.pretrain), "steps": None, "hours": 1 / 3600}))
    done = pretrain(tiles, tmp_path, settings=asked, quiet=True)
    memory = json.loads((tmp_path / "hours.json").read_text())
    assert done.recipe.steps == memory["steps"] >= 1
    again = pretrain(tiles, tmp_path, settings=asked, quiet=True)
    assert again.recipe.steps == done.recipe.steps


def test_small_slides_are_no_tiles_where_it_is_said(tmp_path: Path, tiles: Path) -> None:
    said: list[str] = []
    asked = settings(source="slides")
    with pytest.raises(WsimilError):  # fields of 32 px without µm/px are slides that fail
        pretrain(tiles, tmp_path, settings=asked, quiet=True, say=said.append)
    assert not any("tile images" in line for line in said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_step_is_heard_and_the_run_is_finished(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    from wsimil.pretraining.process import _Process

    counted = _Process._counted

    def count_and_signal(self):
        os.kill(os.getpid(), number)
        return counted(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Process, "_counted", count_and_signal)
        pretrain(tiles, tmp_path, settings=settings(), quiet=True)
    monkeypatch.setattr("wsimil.pretraining.run.launch", lambda *_: pytest.fail("trained again"))
    assert pretrain(tiles, tmp_path, settings=settings(), quiet=True).step == 8


def test_a_later_signal_interrupts_at_once_and_the_same_notice_twice_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from wsimil.pretraining import process

    _asked_to_stop = process._asked_to_stop
    with _asked_to_stop() as asked:
        for _ in range(2):  # from the scheduler, and from the process that started this one
            os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
    monkeypatch.setattr(process, "_SAME_NOTICE_S", -1.0)
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _asked_to_stop() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_processes_learn_what_one_learns_with_twice_the_batch(
    tiles: Path, tmp_path: Path, readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tiles, and sums over both: losses differ by the order of additions only. As a single task of a SLURM job, too."""
    options = ("spread=none", "centring=sinkhorn")
    one = pretrain(tiles, tmp_path / "one", settings=settings(steps=4, options=options), quiet=True)
    asked = replace(settings(steps=4, options=options, devices=2), job=JobConfig(workers=2))
    for name in ("NTASKS=1", "JOB_NAME=pretrain", "JOB_ID=1", "PROCID=0", "LOCALID=0", "NODEID=0"):
        monkeypatch.setenv(*f"SLURM_{name}".split("="))
    both = pretrain(tiles, tmp_path / "two", settings=asked, quiet=True)
    assert both.step == one.step == 4
    losses = [[float(row["loss"]) for row in read_table(run.folder / "log.csv")] for run in (one, both)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    left, right = weights(one.folder), weights(both.folder)
    assert all(torch.allclose(left[name], right[name], atol=2e-3) for name in left)


def test_the_command_forecasts_as_json(tiles: Path, tmp_path: Path, readers, short_timings, capsys) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "pretrain: {arch: test_vit, batch_size: 4, device: cpu, steps: 6, recipe_options: {global_px: 32, local_px: 16}}\n"
    )
    arguments = ["--out", str(tmp_path / "run"), "--size", "toy", "--tile-px", "32", "--config", str(config)]
    assert main(["pretrain", str(tiles), *arguments, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["steps"] == 6 and said["tiles"] == 24 and said["step_s"] > 0
    assert main(["pretrain", str(tiles), *arguments, "--dry-run", "--quiet"]) == 0
    assert "6 steps (24 tiles)" in capsys.readouterr().out


def test_steps_that_fp16_leaves_out_do_not_look_like_lost_weights() -> None:
    from types import SimpleNamespace

    from wsimil.pretraining.process import _Process

    def mean(norms: list[float], scaler: object) -> float:
        process = SimpleNamespace(fabric=SimpleNamespace(strategy=SimpleNamespace(precision=SimpleNamespace(scaler=scaler))))
        return _Process._mean_norm(process, torch.tensor(norms)).item()  # type: ignore[arg-type]

    assert mean([1.0, torch.inf, 3.0, torch.nan], object()) == 2.0 and mean([torch.inf], object()) == 0.0
    assert mean([1.0, torch.inf], None) == torch.inf  # without one an overflow is no part of the plan

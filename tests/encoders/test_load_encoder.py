"""What a user may write for an encoder, what comes of it, and what an error then says."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import replace

import pytest
import timm
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from tiny_vit import ARCHITECTURE, TINY

from wsimil.encoders import ENCODERS, describe_encoder, encoder_contract, encoder_rows, hub, load_encoder, save_encoder
from wsimil.encoders.contract import EncoderContract
from wsimil.encoders.vit import NetworkEncoder
from wsimil.errors import EncoderError, EncoderWeightsError


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """No test asks the hub, and none sees the cache of the machine it runs on."""
    monkeypatch.setattr(hub, "_unreachable", lambda: "no connection")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))


COMMIT = "c0ffee" + 34 * "0"


def put_into_cache(tmp_path, hub_id: str, commit: str = COMMIT, **files) -> None:
    """Files as the hub's client leaves them after a download."""
    repository = tmp_path / "hub-cache" / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for source in files.values():
        shutil.copy(source, snapshot / source.name)


# random weights


def test_random_weights_depend_on_the_seed_alone(tiles):
    torch.manual_seed(1)
    first = load_encoder("random:resnet10t")
    torch.manual_seed(2)
    again = load_encoder("random:resnet10t:0")
    other = load_encoder("random:resnet10t:1")
    assert torch.equal(first(tiles), again(tiles))
    assert first.contract.sha256 == again.contract.sha256 != other.contract.sha256
    assert first.contract.folder_name == "features_random_resnet10t"
    assert other.contract.folder_name == "features_random_resnet10t_1"


def test_random_weights_leave_the_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_encoder("random:resnet10t")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["random:", "random:nothing", "random:resnet10t:x", "random:resnet10t:-1"])
def test_random_needs_a_timm_name_and_a_whole_number(name):
    with pytest.raises(EncoderError, match=name):
        load_encoder(name)


# local weights


def test_a_folder_is_an_encoder(folder, tiny, tiles):
    encoder = load_encoder(str(folder))
    sha256 = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    assert encoder.contract.sha256 == sha256
    assert encoder.contract.folder_name == f"features_mine-{sha256[:8]}"
    assert (encoder.contract.dim, encoder.contract.tile_px, encoder.contract.mpp) == (24, 32, 0.5)
    torch.testing.assert_close(encoder(tiles), NetworkEncoder(encoder.contract, tiny)(tiles))


def test_an_encoder_is_frozen_and_in_eval_mode(folder):
    encoder = load_encoder(str(folder))
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())


def test_folder_file_and_named_file_are_the_same_encoder(folder, tiles):
    file = folder / "weights.safetensors"
    one, other = load_encoder(str(folder)), load_encoder(str(file))
    assert one.contract == other.contract
    assert torch.equal(one(tiles), other(tiles))


def test_a_lone_file_is_described_by_its_namesake(tmp_path, tiny, tiles, folder):
    torch.save({"state_dict": {f"module.{key}": value for key, value in tiny.state_dict().items()}}, tmp_path / "epoch 9.pth")
    shutil.copy(folder / "encoder.json", tmp_path / "epoch 9.json")
    encoder = load_encoder(str(tmp_path / "epoch 9.pth"))
    assert encoder.contract.folder_name.startswith("features_epoch_9-")
    torch.testing.assert_close(encoder(tiles), load_encoder(str(folder))(tiles))


def test_a_lone_file_without_description_says_how_to_describe_it(tmp_path, tiny):
    save_file(tiny.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(EncoderError, match=r"weights\.json or encoder\.json or config\.json.*uni2-h="):
        load_encoder(str(tmp_path / "weights.safetensors"))


def test_a_folder_as_timm_saves_it_is_an_encoder(tmp_path, tiles):
    model = timm.create_model("resnet10t", num_classes=0)
    timm.models.save_for_hf(model, str(tmp_path / "saved"), model_config={"model_args": {"stem_width": 32}})
    encoder = load_encoder(str(tmp_path / "saved"))
    assert encoder.contract.name == "saved"
    assert encoder.contract.mean == model.pretrained_cfg["mean"]
    assert encoder.contract.tile_px == model.pretrained_cfg["input_size"][1]
    torch.testing.assert_close(encoder(tiles), NetworkEncoder(encoder.contract, model.eval())(tiles))


@pytest.mark.parametrize("separate", [False, True])
def test_name_equals_path_is_the_named_contract_with_these_weights(tmp_path, tiles, separate):
    model = timm.create_model("resnet10t", num_classes=3).eval()
    (tmp_path / "down=loaded").mkdir()
    torch.save(model.state_dict(), tmp_path / "down=loaded" / "pytorch_model.bin")
    path = tmp_path / "down=loaded" / ("pytorch_model.bin" if separate else "")
    encoder = load_encoder(f"resnet10t={path}")
    assert encoder.contract.folder_name == f"features_resnet10t-{encoder.contract.sha256[:8]}"
    model.reset_classifier(0)
    torch.testing.assert_close(encoder(tiles), NetworkEncoder(encoder.contract, model)(tiles))


def test_registry_name_equals_path_fits_its_own_network(tmp_path, tiny):
    save_file(tiny.state_dict(), tmp_path / "uni.safetensors")
    with pytest.raises(EncoderWeightsError, match=r"encoder lunit-vits16: .*uni\.safetensors"):
        load_encoder(f"lunit-vits16={tmp_path / 'uni.safetensors'}")


def test_a_transformers_folder_asks_for_its_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}', encoding="utf-8")
    with pytest.raises(EncoderError, match="phikon-v2=FOLDER"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["./weights.pt", "no/such/folder", "weights.safetensors", "uni2-h=nowhere", "resnet10t=nowhere.pt"]
)
def test_a_path_that_is_not_there_is_said(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EncoderWeightsError, match=r"no (such )?file or folder"):
        load_encoder(name)


def test_two_weights_files_are_not_guessed_between(folder):
    shutil.copy(folder / "weights.safetensors", folder / "other.safetensors")
    with pytest.raises(EncoderWeightsError, match=r"2 weights files: other\.safetensors, weights\.safetensors"):
        load_encoder(str(folder))


def describe(folder, **changes) -> None:
    facts = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    (folder / "encoder.json").write_text(json.dumps(facts | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_size": 32}, "unknown key 'tile_size'; did you mean tile_px"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"interpolation": "nearest"}, "interpolation is 'nearest'"),
        ({"mean": [0.5, 0.5]}, "mean has 2 numbers"),
        ({"std": [0, 1, 1]}, "positive"),
        ({"dim": 25}, "says 25 numbers per tile, the network gives 24"),
        ({"tile_px": 48}, "says 48 px, the network takes 32 px only"),
        ({"architecture": "vit_tiny"}, "architecture 'vit_tiny'"),
        ({"model_args": {"embed_dimension": 24}}, "cannot be built"),
        ({"model_args": [1]}, r"encoder\.json"),
        ({"format_version": 2}, "newer"),
        ({"architecture": None}, "architecture"),
    ],
)
def test_a_wrong_description_is_refused(folder, changes, message):
    describe(folder, **changes)
    with pytest.raises(EncoderError, match=message):
        load_encoder(str(folder))


def test_a_description_that_is_not_json_is_refused(folder):
    (folder / "encoder.json").write_text("architecture: vit", encoding="utf-8")
    with pytest.raises(EncoderError, match=r"encoder\.json cannot be read as JSON"):
        load_encoder(str(folder))


def test_weights_other_than_those_described_are_refused(folder):
    describe(folder, sha256="0" * 64)
    with pytest.raises(EncoderWeightsError, match="damaged or not the one described"):
        load_encoder(str(folder))


# saving


def test_a_saved_encoder_gives_the_same_vectors(tmp_path, tiny, contract, tiles):
    facts = replace(contract, trained_mpps=(0.25, 0.5), interpolation="bilinear", licence="mine")
    save_encoder(tmp_path / "run" / "encoder", tiny, facts, model_args=TINY, how_trained={"method": "dino", "steps": 3})
    encoder = load_encoder(str(tmp_path / "run" / "encoder"))
    assert replace(encoder.contract, sha256="", local=False) == facts
    assert torch.equal(encoder(tiles), NetworkEncoder(facts, tiny)(tiles))
    assert sorted(file.name for file in (tmp_path / "run" / "encoder").iterdir()) == ["backbone.safetensors", "encoder.json"]
    described = json.loads((tmp_path / "run" / "encoder" / "encoder.json").read_text(encoding="utf-8"))
    assert described["how_trained"] == {"method": "dino", "steps": 3}
    assert load_file(tmp_path / "run" / "encoder" / "backbone.safetensors").keys() == tiny.state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "arguments"),
    [
        ({"dim": 48}, TINY),
        ({}, TINY | {"depth": 6}),
        ({"tile_px": 224}, {key: value for key, value in TINY.items() if key != "img_size"}),
        ({"pooling": "layer3", "dim": 24}, TINY),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, tiny, contract, changes, arguments):
    with pytest.raises(EncoderError, match="encoder mine"):
        save_encoder(tmp_path / "encoder", tiny, replace(contract, **changes), model_args=arguments)
    assert not (tmp_path / "encoder").exists()


# the embedding of Self-ViT-MIL


def test_the_embedding_is_in_the_contract(folder, tiles):
    plain, other = load_encoder(str(folder)), load_encoder(str(folder), embedding="self-vit-mil")
    assert other(tiles).shape == (3, other.contract.dim) == (3, 5 * 24)
    assert other.contract.folder_name == f"features_mine_self-vit-mil-{plain.contract.sha256[:8]}"
    assert other.contract.recipe() != plain.contract.recipe()


def test_an_encoder_without_tokens_refuses_the_embedding():
    for name in ("texture", "random:resnet10t"):
        with pytest.raises(EncoderError, match="self-vit-mil"):
            load_encoder(name, embedding="self-vit-mil")


# names


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("textur", "texture"), ("unii2-h", "uni2-h"), ("virchov2", "virchow2"), ("vit_smal_patch16_224", "vit_small_patch16_224")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, nearest):
    with pytest.raises(EncoderError, match=rf"'{name}' is unknown; did you mean {nearest}\?"):
        load_encoder(name)


@pytest.mark.parametrize("options", [{"dtype": "fp8"}, {"embedding": "cls"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(EncoderError, match=next(iter(options.values()))):
        load_encoder("texture", **options)


# the hub


@pytest.mark.parametrize("name", ["uni2-h", "UNI_v2", "hf-hub:MahmoodLab/UNI2-h", "hf_hub:mahmoodlab/uni2-h"])
def test_gated_weights_that_are_not_here_say_how_to_get_them(name):
    started = time.monotonic()
    with pytest.raises(EncoderWeightsError) as caught:
        load_encoder(name)
    said = str(caught.value)
    for part in (
        "encoder uni2-h",
        "https://huggingface.co/MahmoodLab/UNI2-h",
        "no connection",
        "gated",
        "HF_TOKEN",
        "uni2-h=FOLDER",
    ):
        assert part in said
    assert time.monotonic() - started < 5


def test_timm_weights_that_are_not_here_are_never_random():
    with pytest.raises(EncoderWeightsError, match=r"timm/vit_small_patch16_224\.dino.*vit_small_patch16_224\.dino=FOLDER"):
        load_encoder("vit_small_patch16_224.dino")
    with pytest.raises(EncoderWeightsError, match="random:vit_giant_patch14_224"):
        load_encoder("vit_giant_patch14_224")  # timm has no weights for it


def test_offline_mode_is_said(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EncoderWeightsError, match="HF_HUB_OFFLINE is set"):
        hub.fetch("x", "no-such-organisation/no-such-model", ["model.safetensors"])


def test_a_hub_that_cannot_be_reached_is_noticed_at_once(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    assert "127.0.0.1" in (hub._unreachable() or "")
    assert time.monotonic() - started < hub._PROBE_SECONDS + 1


def test_cached_weights_need_no_network(tmp_path, tiles):
    model = timm.create_model("resnet10t", num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    hub_id = timm.models.get_pretrained_cfg("resnet10t").hf_hub_id
    put_into_cache(tmp_path, hub_id, weights=tmp_path / "model.safetensors")
    encoder = load_encoder("resnet10t")
    assert encoder.contract.folder_name == "features_resnet10t"
    assert encoder.contract.revision == COMMIT  # the bags say which weights made them
    torch.testing.assert_close(encoder(tiles), NetworkEncoder(encoder.contract, model)(tiles))
    assert "hub-cache" in describe_encoder("resnet10t")


@pytest.fixture
def two_commits(tmp_path) -> tuple[str, str]:
    """One repository in the cache at two commits with different weights; main is the second."""
    hub_id = timm.models.get_pretrained_cfg("resnet10t").hf_hub_id
    old, new = 40 * "a", 40 * "b"
    for seed, commit in enumerate((old, new)):
        torch.manual_seed(seed)
        save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), tmp_path / "model.safetensors")
        put_into_cache(tmp_path, hub_id, commit, weights=tmp_path / "model.safetensors")
    return old, new


def test_a_revision_that_is_asked_for_is_the_one_that_is_used(two_commits):
    old, new = two_commits
    main, asked = load_encoder("resnet10t"), load_encoder(f"resnet10t@{old}")
    assert (main.contract.revision, asked.contract.revision) == (new, old)
    assert main.contract.recipe() != asked.contract.recipe()  # other weights
    assert asked.contract.folder_name == f"features_resnet10t_{old}" != main.contract.folder_name
    with pytest.raises(EncoderWeightsError, match=r"(?s)resnet10t@.*--revision ccc.*--encoder resnet10t=FOLDER"):
        load_encoder("resnet10t@" + 40 * "c")  # never another one in its place


def test_a_registry_name_takes_a_revision():
    commit = 40 * "1"
    for name in (f"uni2-h@{commit}", f"UNI_v2@{commit}", f"hf-hub:MahmoodLab/UNI2-h@{commit}"):
        with pytest.raises(EncoderWeightsError, match=f"uni2-h@{commit}"):
            load_encoder(name)
    with pytest.raises(EncoderError, match=r"did you mean uni2-h\?"):
        load_encoder("uni2h@main")


def test_weights_in_the_cache_are_used_though_the_registry_pins_another_commit(tmp_path):
    """Who has the weights and no network must not be told to download a commit that changed the README."""
    entry = ENCODERS["lunit-vits8"]
    assert entry.revision not in (None, COMMIT)
    (tmp_path / "model.safetensors").touch()
    put_into_cache(tmp_path, entry.hub_id, weights=tmp_path / "model.safetensors")
    assert f"weights: here, commit {COMMIT}" in describe_encoder("lunit-vits8")
    put_into_cache(tmp_path, entry.hub_id, entry.revision, weights=tmp_path / "model.safetensors")
    assert f"weights: here: {tmp_path}" in describe_encoder("lunit-vits8")  # the pinned one comes first


def test_the_cache_of_another_spelling_is_found(tmp_path):
    """Other programs ask for MahmoodLab/uni, which is the same repository and another folder."""
    (tmp_path / "pytorch_model.bin").touch()
    put_into_cache(tmp_path, "MahmoodLab/uni", weights=tmp_path / "pytorch_model.bin")
    assert "models--MahmoodLab--uni" in describe_encoder("uni")
    assert next(row for row in encoder_rows() if row["name"] == "uni")["available"]


def test_a_commit_is_known_for_files_of_the_cache_only(tmp_path):
    assert hub.commit_of(tmp_path / "snapshots" / COMMIT / "model.safetensors") == COMMIT
    assert hub.commit_of(tmp_path / "model.safetensors") == hub.commit_of(tmp_path / "snapshots" / "mine" / "a.pt") == ""


def test_the_download_command_names_a_file_only_where_it_is_sure():
    gigapath, uni = describe_encoder("gigapath"), describe_encoder("uni2-h")
    revision = ENCODERS["gigapath"].revision
    assert (
        f"hf download prov-gigapath/prov-gigapath pytorch_model.bin --revision {revision}" in gigapath
    )  # its repository holds more
    assert "hf download MahmoodLab/UNI2-h --revision" in uni


def test_a_model_of_the_hub_is_built_from_its_own_description(tmp_path, tiny, tiles):
    description = {
        "architecture": ARCHITECTURE,
        "num_features": 24,
        "model_args": TINY,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"},
    }
    (tmp_path / "config.json").write_text(json.dumps(description), encoding="utf-8")
    save_file(tiny.state_dict(), tmp_path / "model.safetensors")
    put_into_cache(tmp_path, "org/model", config=tmp_path / "config.json", weights=tmp_path / "model.safetensors")
    encoder = load_encoder("hf-hub:org/model")
    contract = encoder.contract
    assert (contract.mean, contract.std, contract.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    assert (contract.tile_px, contract.dim, contract.folder_name) == (32, 24, "features_hf-hub_org_model")
    torch.testing.assert_close(encoder(tiles), NetworkEncoder(contract, tiny)(tiles))


class Refusal(errors.GatedRepoError):
    def __init__(self) -> None:
        Exception.__init__(self, "gated")


class NotThere(errors.EntryNotFoundError):
    def __init__(self) -> None:
        Exception.__init__(self, "no such file")


def test_a_missing_file_is_looked_for_under_its_other_name(monkeypatch, tmp_path):
    asked = []

    def download(hub_id, file, **options):
        asked.append((hub_id, file, options["revision"]))
        if file == "model.safetensors":
            raise NotThere
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "_unreachable", lambda: None)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    found = hub.fetch("x", "org/model", ["model.safetensors", "pytorch_model.bin"], revision="v2")
    assert found == tmp_path / "pytorch_model.bin"
    assert asked == [("org/model", "model.safetensors", "v2"), ("org/model", "pytorch_model.bin", "v2")]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (Refusal(), "access must be granted.*gated"),
        (NotThere(), "has no model.safetensors or pytorch_model.bin"),
        (errors.LocalEntryNotFoundError("connection lost"), "download failed.*connection lost"),
        (TimeoutError("timed out"), "download failed.*timed out"),
        (OSError(28, "No space left on device"), "No space left"),
        (RuntimeError("data processing error: CAS service"), "download failed.*CAS service"),
    ],
)
def test_a_failed_download_says_why(monkeypatch, failure, message):
    def download(hub_id, file, **options):
        raise failure

    monkeypatch.setattr(hub, "_unreachable", lambda: None)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(EncoderWeightsError, match=rf"(?s)encoder mine: .*{message}"):
        hub.fetch("mine", "org/model", ["model.safetensors", "pytorch_model.bin"])


# descriptions


def test_the_contract_is_known_without_weights():
    contract = encoder_contract("hibou-b")
    assert (contract.dim, contract.sha256, contract.gated) == (768, "", True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mpp": float("nan")}, {"mpp": 0.0}, {"mpp": -0.5}, {"mpp": float("inf")}, {"trained_mpps": (0.5, float("nan"))},
        {"trained_mpps": (0.5, 0.0)}, {"std": (0.2, float("nan"), 0.2)}, {"std": (float("nan"), 0.2, 0.2)},
        {"std": (0.2, 0.2, float("inf"))}, {"mean": (0.5, 0.5, float("nan"))},
    ],
)  # fmt: skip
def test_numbers_of_a_contract_are_finite(wrong):
    with pytest.raises(ValueError, match=rf"encoder one: .*{next(iter(wrong))} .*expected"):
        EncoderContract("one", ARCHITECTURE, 24, **wrong)


def test_an_input_that_is_no_whole_number_of_patches_is_refused_with_one_that_is(tmp_path):
    facts = {"architecture": ARCHITECTURE, "model_args": {**TINY, "dynamic_img_size": True}, "tile_px": 40}
    save_file(timm.create_model(ARCHITECTURE, num_classes=0, **TINY).state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "encoder.json").write_text(json.dumps(facts))
    with pytest.raises(EncoderError, match=r"says 40 px, .* 16 px each; a tile_px of 32 would be"):
        encoder_contract(str(tmp_path))
    (tmp_path / "encoder.json").write_text(json.dumps({**facts, "tile_px": 48}))
    assert load_encoder(str(tmp_path)).contract.tile_px == 48


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("texture", ["136 numbers", "none needed"]),
        ("phikon", ["768 numbers", "not on this machine", "phikon=FOLDER", "0.5 µm/px"]),
        ("random:resnet10t:4", ["random, seed 4"]),
    ],
)
def test_the_doctor_says_what_is_missing(name, parts):
    said = describe_encoder(name)
    assert all(part in said for part in parts)


def test_the_doctor_finds_local_weights(folder):
    assert str(folder / "weights.safetensors") in describe_encoder(str(folder))

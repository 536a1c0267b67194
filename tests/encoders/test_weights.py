"""Weights of every layout: read without running code, and either all of them are loaded or none."""

from __future__ import annotations

import os
import pickle
import re
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from tiny_vit import ARCHITECTURE, TINY
from torch import Tensor

from wsimil.encoders.networks import build_network
from wsimil.encoders.weights import network_with_weights, read_weights, state_sha256
from wsimil.errors import EncoderWeightsError


def loaded(state, arguments=TINY, architecture=ARCHITECTURE):
    return network_with_weights(architecture, arguments, state, where="these weights")


def assert_same_weights(network, other) -> None:
    assert state_sha256(network.state_dict()) == state_sha256(other.state_dict())


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "save", [lambda value, file: torch.save(value, file), lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2))]
)
def test_pickled_code_is_not_run(tmp_path, save):
    file, trace = tmp_path / "weights.pt", tmp_path / "code-was-run"
    save({"model": {"weight": torch.zeros(2)}, "extra": Malicious(trace)}, file)
    with pytest.raises(EncoderWeightsError, match=r"weights\.pt.*safetensors"):
        read_weights(file)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_a_cut_off_file_is_an_error_that_names_it(tmp_path, folder, tiny, name):
    file = tmp_path / name
    if name.endswith(".pt"):
        torch.save(tiny.state_dict(), file)
    else:
        file.write_bytes((folder / "weights.safetensors").read_bytes())
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(EncoderWeightsError, match=re.escape(name)):
        read_weights(file)


def test_a_file_without_tensors_is_an_error(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(EncoderWeightsError, match="holds no tensors"):
        read_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("prefix", ["", "module.", "teacher.backbone.", "encoder.", "model.visual.trunk."])
def test_prefixes_are_removed_if_all_under_them_fits(tiny, prefix):
    state = {prefix + key: value for key, value in tiny.state_dict().items()}
    beside = {"optimizer.step": torch.ones(1), "projector.weight": torch.ones(3)} if prefix else {}
    assert_same_weights(loaded(state | beside), tiny)


def test_blocks_in_chunks_are_put_in_a_row(tiny):
    """As DINOv2's training code saves them: blocks.<chunk>.<block>, counted through."""
    chunked = {
        re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}.", key): value
        for key, value in tiny.state_dict().items()
    }
    assert chunked.keys() != tiny.state_dict().keys()
    assert_same_weights(loaded({f"backbone.{key}": value for key, value in chunked.items()}), tiny)


def test_the_teacher_of_a_dino_checkpoint_is_taken(tmp_path, tiny):
    student = {f"module.backbone.{key}": torch.zeros_like(value) for key, value in tiny.state_dict().items()}
    teacher = {f"backbone.{key}": value for key, value in tiny.state_dict().items()} | {"head.last_layer.weight": torch.ones(4)}
    torch.save({"student": student, "teacher": teacher, "epoch": 7, "args": Namespace(lr=1.0)}, tmp_path / "checkpoint.pth")
    assert_same_weights(loaded(read_weights(tmp_path / "checkpoint.pth")), tiny)


def test_the_teacher_of_a_flat_checkpoint_is_taken(tiny):
    state = {f"student.{key}": torch.zeros_like(value) for key, value in tiny.state_dict().items()}
    state |= {f"teacher.{key}": value for key, value in tiny.state_dict().items()}
    assert_same_weights(loaded(state), tiny)


def test_the_averaged_weights_are_taken_as_timm_takes_them(tmp_path, tiny):
    last = {key: torch.zeros_like(value) for key, value in tiny.state_dict().items()}
    torch.save({"arch": "vit", "state_dict": last, "state_dict_ema": tiny.state_dict()}, tmp_path / "checkpoint.pth.tar")
    assert_same_weights(loaded(read_weights(tmp_path / "checkpoint.pth.tar")), tiny)


def test_loose_tensors_beside_a_network_do_not_hide_it(tmp_path, tiny):
    torch.save({"model": tiny.state_dict(), "rng": torch.zeros(5), "temperature": torch.ones(())}, tmp_path / "checkpoint.pth")
    assert_same_weights(loaded(read_weights(tmp_path / "checkpoint.pth")), tiny)


@pytest.mark.parametrize(
    "architecture", ["efficientnet_b0", "mobilenetv3_small_050", "mnasnet_small", "ghostnet_050", "convnext_atto"]
)
def test_stages_and_their_blocks_are_no_chunks(architecture):
    network = build_network(architecture, {})
    assert_same_weights(loaded(network.state_dict(), {}, architecture), network)


def test_files_that_did_not_count_their_batches_are_loaded():
    network = build_network("resnet10t", {})
    state = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert len(state) < len(network.state_dict())
    assert_same_weights(loaded(state, {}, "resnet10t"), network)


def test_the_decoder_of_a_masked_autoencoder_is_left_out(tiny):
    decoder = {
        "decoder_embed.weight": torch.ones(8, 24),
        "decoder_blocks.0.norm1.weight": torch.ones(8),
        "decoder_pred.bias": torch.ones(3),
    }
    assert_same_weights(
        loaded(tiny.state_dict() | decoder | {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 5, 8)}), tiny
    )


def test_a_classifier_is_left_out(tiny):
    classifier = {"head.weight": torch.ones(10, 24), "head.bias": torch.ones(10)}
    assert_same_weights(loaded(tiny.state_dict() | classifier), tiny)


def test_half_precision_weights_are_used_in_full(tiny):
    network = loaded({key: value.half() for key, value in tiny.state_dict().items()})
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}


def test_missing_and_unexpected_weights_are_named(tiny):
    state = dict(tiny.state_dict())
    state["blocks.0.attn.rotary"] = torch.zeros(1)
    del state["blocks.3.norm2.weight"]
    with pytest.raises(
        EncoderWeightsError, match=r"these weights.*missing blocks\.3\.norm2\.weight; unexpected blocks\.0\.attn\.rotary"
    ):
        loaded(state)


@pytest.mark.parametrize("change", [{"embed_dim": 36}, {"patch_size": 8}])
def test_weights_of_another_shape_are_refused(tiny, change):
    with pytest.raises(EncoderWeightsError, match=r"patch_embed\.proj\.weight .*, expected"):
        loaded(
            {key: value for key, value in tiny.state_dict().items() if key != "pos_embed"} | _fitting_positions(change),
            TINY | change,
        )


def _fitting_positions(change) -> dict[str, Tensor]:
    return {"pos_embed": build_network(ARCHITECTURE, TINY | change).state_dict()["pos_embed"]}


def test_weights_of_another_network_are_refused(tiny):
    with pytest.raises(EncoderWeightsError, match="these weights"):
        loaded(build_network("resnet18", {}).state_dict())


def test_position_embeddings_of_another_input_size_are_resampled(tiny):
    network = loaded(tiny.state_dict(), TINY | {"img_size": 64})
    assert network.state_dict()["pos_embed"].shape == (1, 17, 24)


DINOV2 = TINY | {
    "reg_tokens": 4,
    "no_embed_class": True,
    "init_values": 1e-5,
    "mlp_layer": "swiglu",
    "act_layer": "silu",
    "mlp_ratio": 4,
}


def transformers_state(registers: bool, dim: int = 24, depth: int = 5) -> dict[str, Tensor]:
    """Random weights under the names of transformers' Dinov2Model, two patches a side."""
    random = torch.Generator().manual_seed(3)

    def weights(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) * 0.2

    state = {
        "embeddings.cls_token": weights(1, 1, dim),
        "embeddings.mask_token": weights(1, dim),
        "embeddings.position_embeddings": weights(1, 5, dim),
        "embeddings.patch_embeddings.projection.weight": weights(dim, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": weights(dim),
        "layernorm.weight": weights(dim),
        "layernorm.bias": weights(dim),
    }
    if registers:
        state["embeddings.register_tokens"] = weights(1, 4, dim)
    mlp = ("mlp.weights_in", "mlp.weights_out", 2 * dim) if registers else ("mlp.fc1", "mlp.fc2", 4 * dim)
    for layer in range(depth):
        name = f"encoder.layer.{layer}"
        linears = {f"attention.attention.{part}": (dim, dim) for part in ("query", "key", "value")}
        linears |= {"attention.output.dense": (dim, dim), mlp[0]: (4 * dim, dim), mlp[1]: (dim, mlp[2])}
        for part, shape in linears.items():
            state |= {f"{name}.{part}.weight": weights(*shape), f"{name}.{part}.bias": weights(shape[0])}
        for part in ("norm1", "norm2"):
            state |= {f"{name}.{part}.weight": weights(dim), f"{name}.{part}.bias": weights(dim)}
        state |= {f"{name}.layer_scale{part}.lambda1": weights(dim) for part in (1, 2)}
    return state


def transformers_tokens(state: dict[str, Tensor], images: Tensor, heads: int = 3) -> Tensor:
    """What transformers computes from them, written down from its definition."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    projection = "embeddings.patch_embeddings.projection"
    patches = F.conv2d(images, state[f"{projection}.weight"], state[f"{projection}.bias"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([state["embeddings.cls_token"].expand(len(images), -1, -1), patches], 1) + state["embeddings.position_embeddings"]
    if "embeddings.register_tokens" in state:
        x = torch.cat([x[:, :1], state["embeddings.register_tokens"].expand(len(images), -1, -1), x[:, 1:]], 1)
    for layer in range(5):
        name = f"encoder.layer.{layer}"
        y = norm(f"{name}.norm1", x)
        split = [linear(f"{name}.attention.attention.{part}", y).unflatten(-1, (heads, -1)) for part in ("query", "key", "value")]
        query, key, value = (part.transpose(1, 2) for part in split)
        attended = F.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1) @ value
        attended = linear(f"{name}.attention.output.dense", attended.transpose(1, 2).flatten(2))
        x = x + attended * state[f"{name}.layer_scale1.lambda1"]
        y = norm(f"{name}.norm2", x)
        if f"{name}.mlp.weights_in.weight" in state:
            gate, up = linear(f"{name}.mlp.weights_in", y).chunk(2, -1)
            y = linear(f"{name}.mlp.weights_out", F.silu(gate) * up)
        else:
            y = linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", y)))
        x = x + y * state[f"{name}.layer_scale2.lambda1"]
    return norm("layernorm", x)


@pytest.mark.parametrize("prefix", ["", "dinov2."])
@pytest.mark.parametrize("registers", [False, True])
def test_transformers_weights_compute_the_same_here(registers, prefix):
    state = transformers_state(registers)
    arguments = DINOV2 if registers else TINY | {"init_values": 1e-5}
    network = loaded({prefix + key: value for key, value in state.items()}, arguments)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(network.forward_features(images), transformers_tokens(state, images), atol=1e-4, rtol=1e-4)


def test_ctranspath_weights_as_published_fit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network("ctranspath", {})
    published = {}
    for key, value in network.state_dict().items():  # timm 0.5 kept the patch merging with the stage before
        key = re.sub(r"layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", key)
        published[key] = value
    published |= {
        "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
        "head.weight": torch.zeros(5, 768),
        "head.bias": torch.zeros(5),
    }
    again = loaded(published, {}, "ctranspath")
    assert_same_weights(again, network)
    tables = dict(network.named_buffers())
    assert all(torch.equal(table, tables[name]) for name, table in again.named_buffers())  # those that no file holds, too


def test_the_identity_of_weights_sees_names_types_and_bytes():
    state = {"a": torch.zeros(2), "b": torch.ones(2)}
    same = {"b": torch.ones(2), "a": torch.zeros(2)}
    assert state_sha256(state) == state_sha256(same)
    others = [
        {"a": torch.ones(2), "b": torch.zeros(2)},
        {"a": torch.zeros(2), "b": torch.ones(1, 2)},
        {"a": torch.zeros(2).half(), "b": torch.ones(2)},
    ]
    assert len({state_sha256(other) for other in [state, *others]}) == 4

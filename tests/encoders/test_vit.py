"""A network as an encoder: what it is shown, how its tokens are pooled, and that precision does not change the meaning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.encoders import EncoderContract, load_encoder
from wsimil.encoders.networks import _QueryPool, build_network
from wsimil.encoders.vit import NetworkEncoder, embedding_dim, pool_tokens
from wsimil.errors import EncoderError


class Camera(nn.Module):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return images.mean((2, 3))


def seen_by_network(tiles: Tensor, **facts) -> Tensor:
    camera = Camera()
    NetworkEncoder(EncoderContract("camera", "camera", 3, **facts), camera)(tiles)
    return camera.seen


def test_channels_stay_red_green_blue_and_are_normalised():
    tiles = torch.tensor([255, 51, 0], dtype=torch.uint8).expand(1, 8, 8, 3)
    seen = seen_by_network(tiles, tile_px=8, mean=(0.5, 0.1, 0.0), std=(0.5, 0.1, 0.25))
    torch.testing.assert_close(seen[0, :, 3, 5], torch.tensor([1.0, 1.0, 0.0]))


def test_rows_stay_rows():
    tiles = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    tiles[0, 2] = 255
    assert (seen_by_network(tiles, tile_px=8)[0, :, 2] == 1).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_other_tile_sizes_are_resized_without_aliasing(interpolation):
    stripes = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 200
    seen = seen_by_network(stripes, tile_px=16, interpolation=interpolation)
    assert seen.shape == (1, 3, 16, 16)
    # picking every fourth column would show the stripes as all black or all bright
    torch.testing.assert_close(seen[..., 2:-2], torch.full_like(seen[..., 2:-2], 100 / 255), atol=0.02, rtol=0)


def test_resizing_invents_no_light():
    edge = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    edge[:, :, 8:] = 255
    seen = seen_by_network(edge, tile_px=40, interpolation="bicubic")
    assert seen.min() >= 0 and seen.max() <= 1


@pytest.mark.parametrize(
    "tiles",
    [
        torch.zeros(2, 32, 32, 3),
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 32, 16, 3, dtype=torch.uint8),
        torch.zeros(32, 32, 3, dtype=torch.uint8),
        torch.zeros(2, 32, 32, 4, dtype=torch.uint8),
    ],
)
def test_tiles_that_would_be_encoded_wrongly_are_refused(tiny, contract, tiles):
    for encoder in (load_encoder("texture"), NetworkEncoder(contract, tiny)):
        with pytest.raises(EncoderError, match=r"uint8 \(B, S, S, 3\)"):
            encoder(tiles)


REGISTERS = {"img_size": 32, "embed_dim": 24, "depth": 5, "num_heads": 3, "reg_tokens": 4, "no_embed_class": True}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_registers_are_in_no_mean(images):
    network = build_network("vit_tiny_patch16_224", REGISTERS)
    tokens = network.forward_features(images)  # (2, 1 + 4 + 4, 24)
    patches = tokens[:, 5:].mean(1)
    assert torch.equal(pool_tokens(network, images, "mean"), patches)
    assert torch.equal(pool_tokens(network, images, "cls+mean"), torch.cat([tokens[:, 0], patches], 1))
    assert embedding_dim("x", network, "cls+mean") == 48


@pytest.mark.parametrize("registers", [False, True])
def test_self_vit_mil_is_four_class_tokens_and_the_mean_patch(images, registers):
    extra = {"reg_tokens": 4, "no_embed_class": True} if registers else {}
    network = build_network("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 6, "num_heads": 3, **extra})
    outputs: list[Tensor] = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    network.forward_features(images)
    last = [network.norm(output) for output in outputs[-4:]]
    expected = torch.cat([*(tokens[:, 0] for tokens in last), last[-1][:, 1 + 4 * registers :].mean(1)], 1)
    vector = pool_tokens(network, images, "self-vit-mil")
    assert vector.shape == (2, embedding_dim("x", network, "self-vit-mil")) == (2, 120)
    torch.testing.assert_close(vector, expected)


def test_resnet_is_cut_after_its_third_stage(images):
    network = build_network("resnet50", {})
    stage: list[Tensor] = []
    network.layer3.register_forward_hook(lambda module, arguments, output: stage.append(output))
    vector = pool_tokens(network, images, "layer3")
    torch.testing.assert_close(vector, stage[0].mean((2, 3)))
    assert embedding_dim("x", network, "layer3") == vector.shape[1] == 1024


@pytest.mark.parametrize(
    ("architecture", "arguments", "pooling"),
    [
        ("resnet18", {}, "self-vit-mil"),
        ("vit_tiny_patch16_224", {"depth": 3}, "self-vit-mil"),
        ("resnet18", {}, "cls"),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "cls"),
        ("vit_tiny_patch16_224", {}, "layer3"),
        ("vit_tiny_patch16_224", {"global_pool": ""}, "model"),
    ],
)
def test_a_pooling_the_network_cannot_give_is_refused(architecture, arguments, pooling):
    with torch.device("meta"):
        network = build_network(architecture, arguments)
    with pytest.raises(EncoderError, match="mine"):
        embedding_dim("mine", network, pooling)


def test_one_query_attends_like_plain_attention():
    pool = _QueryPool(12, 8, heads=2)
    tokens = torch.randn(3, 5, 12)
    query = pool.to_q(pool.ln_q(pool.query)).expand(3, 1, 8)
    key, value = pool.to_kv(pool.ln_k(tokens)).chunk(2, -1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        attention = F.softmax(query[..., part] @ key[..., part].transpose(1, 2) / 4**0.5, -1)
        heads.append(attention @ value[..., part])
    torch.testing.assert_close(pool(tokens), pool.to_out(torch.cat(heads, -1))[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gives_float32_close_to_the_full_one(tiny, contract, tiles, dtype):
    full = NetworkEncoder(contract, tiny)(tiles)
    low = NetworkEncoder(contract, tiny, dtype=dtype)(tiles)
    assert low.dtype == full.dtype == torch.float32
    assert not torch.equal(low, full)
    assert (low - full).norm() < 0.05 * full.norm()


def test_batch_mates_change_nothing(tiny, contract, tiles):
    encoder = NetworkEncoder(contract, tiny)
    torch.testing.assert_close(encoder(tiles)[1:2], encoder(tiles[1:2]), atol=1e-5, rtol=1e-5)


def test_no_tiles_give_no_vectors(tiny, contract):
    assert NetworkEncoder(replace(contract, tile_px=64), tiny)(torch.zeros(0, 32, 32, 3, dtype=torch.uint8)).shape == (0, 24)

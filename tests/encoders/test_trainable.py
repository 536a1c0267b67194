"""A ViT to be trained: any crop size, hidden patches, its start, and how its layers are grouped."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_vit import ARCHITECTURE, TINY

from wsimil.batch import EncodesTokens
from wsimil.encoders import load_encoder, save_encoder
from wsimil.encoders.networks import build_network
from wsimil.encoders.trainable import TrainableViT, param_groups, trainable_vit
from wsimil.errors import EncoderError, EncoderWeightsError


def small(**options) -> TrainableViT:
    return trainable_vit(ARCHITECTURE, **{"init": None, "tile_px": 64, "depth": 2} | options)


@pytest.fixture
def vit() -> TrainableViT:
    return small()


def test_crops_of_any_size_give_one_vector(vit):
    for px in (32, 64, 96):
        assert vit(torch.randn(2, 3, px, px)).shape == (2, vit.embed_dim)
    assert isinstance(vit, EncodesTokens)


def test_the_vector_is_timms_class_token_after_the_final_norm(vit):
    images = torch.randn(2, 3, 64, 64)
    tokens = vit.network.forward_features(images)
    torch.testing.assert_close(vit(images), tokens[:, 0])
    torch.testing.assert_close(vit.encode_tokens(images), tokens[:, vit.network.num_prefix_tokens :])


@pytest.mark.parametrize("registers", [0, 2])
def test_keeping_every_patch_is_the_whole_network(registers):
    model_args = {**TINY, "dynamic_img_size": True, "reg_tokens": registers}
    vit = TrainableViT(build_network(ARCHITECTURE, model_args), architecture=ARCHITECTURE, model_args=model_args)
    images = torch.randn(2, 3, 64, 64)
    n_patches = (64 // vit.patch_px) ** 2
    everything = torch.arange(n_patches).expand(2, -1)
    torch.testing.assert_close(vit.encode_tokens(images, everything), vit.network.forward_features(images)[:, 1 + registers :])


def test_what_is_not_kept_is_not_seen_and_what_is_keeps_its_place(vit):
    images = torch.randn(1, 3, 64, 64)
    keep = torch.tensor([[5, 2, 9]])
    tokens = vit.encode_tokens(images, keep)
    assert tokens.shape == (1, 3, vit.embed_dim)
    across = 64 // vit.patch_px
    hidden = torch.ones(across**2, dtype=torch.bool)
    hidden[keep[0]] = False
    spoiled = images.clone()
    for patch in hidden.nonzero().flatten().tolist():
        row, column = divmod(patch, across)
        spoiled[..., row * vit.patch_px : (row + 1) * vit.patch_px, column * vit.patch_px : (column + 1) * vit.patch_px] = 9
    torch.testing.assert_close(vit.encode_tokens(spoiled, keep), tokens)
    torch.testing.assert_close(vit.encode_tokens(images, keep.flip(1)), tokens.flip(1), rtol=1e-4, atol=1e-5)
    moved = vit.encode_tokens(images.roll(vit.patch_px, 3), (keep + 1))  # the same patches, one place to the right
    assert not torch.allclose(moved, tokens, atol=1e-3)


def test_a_random_start_follows_from_its_seed_alone():
    torch.manual_seed(1)
    first, other = (small(init="none", seed=seed) for seed in (3, 4))
    state = torch.get_rng_state()
    again = small(seed=3)
    assert torch.equal(state, torch.get_rng_state())
    for name, values in first.state_dict().items():
        assert torch.equal(values, again.state_dict()[name])
    assert not torch.equal(first.network.blocks[0].attn.qkv.weight, other.network.blocks[0].attn.qkv.weight)
    assert first.start is None
    assert all(parameter.requires_grad for parameter in first.parameters())


def test_blocks_are_left_out_in_training_only():
    vit = small(drop_path=0.9)
    images = torch.randn(8, 3, 64, 64)
    assert torch.equal(vit(images), vit(images))
    vit.train()
    assert not torch.equal(vit(images), vit(images))


def test_depth_is_the_asked_one():
    vit = small(depth=3)
    assert len(vit.network.blocks) == 3
    assert vit.model_args["depth"] == 3


def test_patches_are_the_asked_ones(tmp_path):
    fine = small(patch_px=8)
    assert fine.patch_px == fine.model_args["patch_size"] == 8 and "patch_size" not in small().model_args
    assert fine.encode_tokens(torch.randn(1, 3, 64, 64)).shape[1] == 64
    save_file(small().network.state_dict(), tmp_path / "coarse.safetensors")
    with pytest.raises(EncoderWeightsError, match=r"patch_embed\.proj\.weight"):
        small(init=str(tmp_path / "coarse.safetensors"), patch_px=8)


def test_a_saved_encoder_is_a_start_and_a_trained_one_can_be_saved(tmp_path, tiny, contract, tiles):
    """Out as an encoder folder, in as a start, out again: the same vectors."""
    save_encoder(tmp_path / "first", tiny, contract, model_args=TINY)
    vit = trainable_vit(ARCHITECTURE, init=str(tmp_path / "first"), tile_px=32)
    assert vit.start is not None
    assert vit.start.mean == contract.mean
    encoder = load_encoder(str(tmp_path / "first"))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit.eval()(images), tiny.eval()(images))
    save_encoder(tmp_path / "second", vit.network, contract, model_args=vit.model_args)
    torch.testing.assert_close(load_encoder(str(tmp_path / "second"))(tiles), encoder(tiles))


def test_positions_of_a_start_are_resampled_to_the_tile(tmp_path, tiny, contract):
    save_encoder(tmp_path / "first", tiny, contract, model_args=TINY)
    vit = trainable_vit(ARCHITECTURE, init=str(tmp_path / "first"), tile_px=64)
    assert vit.network.pos_embed.shape[1] == 1 + (64 // 16) ** 2
    torch.testing.assert_close(vit.network.blocks[0].attn.qkv.weight, tiny.blocks[0].attn.qkv.weight)


def test_a_bare_file_of_weights_is_for_the_architecture(tmp_path):
    first = small(seed=5)
    save_file(first.network.state_dict(), tmp_path / "weights.safetensors")
    again = small(init=str(tmp_path / "weights.safetensors"))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(again(images), first(images))


def test_a_start_of_another_architecture_is_refused(tmp_path, tiny, contract):
    save_encoder(tmp_path / "first", tiny, contract, model_args=TINY)
    with pytest.raises(EncoderError, match=f"is a {ARCHITECTURE}, to be trained is vit_small_patch16_224"):
        trainable_vit("vit_small_patch16_224", init=str(tmp_path / "first"), tile_px=32)


def test_a_start_with_other_blocks_is_refused(tmp_path, tiny, contract):
    save_encoder(tmp_path / "first", tiny, contract, model_args=TINY)
    with pytest.raises(EncoderWeightsError, match=r"blocks\.2"):
        trainable_vit(ARCHITECTURE, init=str(tmp_path / "first"), tile_px=32, depth=2)


def test_weights_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(EncoderWeightsError, match="no such file"):
        small(init=str(tmp_path / "nothing.pth"))


def test_what_is_no_vit_is_refused():
    with pytest.raises(EncoderError, match="resnet10t"):
        trainable_vit("resnet10t", init=None, tile_px=64)


# groups


def test_every_parameter_is_in_one_group(vit):
    groups = param_groups(vit, weight_decay=0.1, layer_decay=0.7)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in vit.parameters())


def test_lower_layers_move_less_and_only_weights_decay(vit):
    depth = len(vit.network.blocks)
    names = {id(parameter): name.removeprefix("network.") for name, parameter in vit.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr_scale"], group["decays"], group["weight_decay"])
        for group in param_groups(vit, weight_decay=0.1, layer_decay=0.5, patch_embed_lr=0.2)
        for parameter in group["params"]
    }
    assert found["norm.weight"] == (1, False, 0.0)
    assert found[f"blocks.{depth - 1}.attn.qkv.weight"] == (0.5, True, 0.1)
    assert found[f"blocks.{depth - 1}.attn.qkv.bias"] == (0.5, False, 0.0)
    assert found["blocks.0.norm1.weight"] == (0.5**depth, False, 0.0)
    assert found["cls_token"] == (0.5 ** (depth + 1), False, 0.0)
    assert found["pos_embed"] == (0.5 ** (depth + 1), False, 0.0)
    assert found["patch_embed.proj.weight"] == (0.2 * 0.5 ** (depth + 1), True, 0.1)


def test_a_head_has_no_layers_to_slow_and_frozen_parameters_stay_out():
    head = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).requires_grad_(False))
    groups = param_groups(head, weight_decay=0.1, layer_decay=0.5)
    assert {group["lr_scale"] for group in groups} == {1.0}
    assert sum(len(group["params"]) for group in groups) == 2


def test_an_optimiser_takes_the_groups_as_they_are(vit):
    optimiser = torch.optim.AdamW(param_groups(vit, weight_decay=0.1, layer_decay=0.7), lr=1e-3)
    vit(torch.randn(2, 3, 64, 64)).sum().backward()
    optimiser.step()
    assert json.dumps([{k: v for k, v in group.items() if k != "params"} for group in optimiser.param_groups])

"""What KimiaNet's encoder is compared with can be loaded, so that a fold does not fail after its training."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import kimianet as pipeline
import pytest
import torch
from safetensors.torch import save_file

from wsimil.encoders import load_encoder, save_encoder
from wsimil.encoders.networks import build_network
from wsimil.encoders.trainable_cnn import trainable_cnn
from wsimil.encoders.vit import NetworkEncoder


def test_a_bare_file_of_weights_is_a_start_and_a_line_of_the_table(tmp_path: Path) -> None:
    file = tmp_path / "bare.safetensors"
    save_file(build_network("resnet10t", {}).state_dict(), file)
    compared = pipeline.beside(Namespace(size="toy", arch="resnet10t", init=str(file)))
    assert list(compared) == [f"where it began ({file})", "random weights"]
    vectors = [load_encoder(name).contract.dim for name in compared.values()]
    assert vectors == [trainable_cnn("resnet10t", init=str(file)).embed_dim] * 2


def test_what_it_is_compared_with_sees_tiles_of_the_same_size(tmp_path: Path) -> None:
    trained = load_encoder("random:resnet10t")
    contract = replace(trained.contract, name="trained", tile_px=96, local=False, sha256="")
    save_encoder(tmp_path / "encoder", trained.network, contract)
    other = load_encoder(str(pipeline.seen_alike("random:resnet10t:1", tmp_path / "encoder", tmp_path / "beside0")))
    tiles = torch.randint(0, 255, (2, 96, 96, 3), dtype=torch.uint8)
    assert other.contract.tile_px == 96 and trained.contract.tile_px != 96
    plain = replace(load_encoder("random:resnet10t:1").contract, tile_px=96)
    expected = NetworkEncoder(plain, load_encoder("random:resnet10t:1").network)(tiles)
    torch.testing.assert_close(other(tiles), expected)


@pytest.mark.parametrize(
    ("size", "init", "began"),
    [("lab", None, "densenet121"), ("toy", "imagenet", "densenet121"), ("toy", None, None), ("lab", "scratch", None)],
)
def test_a_start_from_random_weights_is_no_line_of_its_own(size: str, init: str | None, began: str | None) -> None:
    compared = pipeline.beside(Namespace(size=size, arch="densenet121", init=init))
    assert [name for name in compared.values() if not name.startswith("random:")] == [began] * (began is not None)

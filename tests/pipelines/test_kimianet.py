"""What KimiaNet's encoder is compared with can be loaded, so that a fold does not fail after its training."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import kimianet as pipeline
import pytest
from safetensors.torch import save_file

from wsimil.encoders import load_encoder
from wsimil.encoders.networks import build_network
from wsimil.encoders.trainable_cnn import trainable_cnn


def test_a_bare_file_of_weights_is_a_start_and_a_line_of_the_table(tmp_path: Path) -> None:
    file = tmp_path / "bare.safetensors"
    save_file(build_network("resnet10t", {}).state_dict(), file)
    compared = pipeline.beside(Namespace(size="toy", arch="resnet10t", init=str(file)))
    assert list(compared) == [f"where it began ({file})", "random weights"]
    vectors = [load_encoder(name).contract.dim for name in compared.values()]
    assert vectors == [trainable_cnn("resnet10t", init=str(file)).embed_dim] * 2


@pytest.mark.parametrize(
    ("size", "init", "began"),
    [("lab", None, "densenet121"), ("toy", "imagenet", "densenet121"), ("toy", None, None), ("lab", "scratch", None)],
)
def test_a_start_from_random_weights_is_no_line_of_its_own(size: str, init: str | None, began: str | None) -> None:
    compared = pipeline.beside(Namespace(size=size, arch="densenet121", init=init))
    assert [name for name in compared.values() if not name.startswith("random:")] == [began] * (began is not None)

"""The transformer: torch's own numbers, distances on the glass, and what is left out of the last layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.aggregators import transformer
from wsimil.aggregators.transformer import EncoderLayer, TransformerMIL
from wsimil.batch import BagBatch
from wsimil.errors import AggregatorInputError, ConfigError

DIM, H, K = 6, 16, 4
SIZES = (1, 2, 7, 50)


def make(**options) -> TransformerMIL:
    torch.manual_seed(0)
    return TransformerMIL(DIM, 3, hidden=H, heads=K, ffn=24, **options).double().eval()


def batch_of(*sizes: int) -> BagBatch:
    generator = torch.Generator().manual_seed(0)
    n = sum(sizes)
    coords_um = 5_000 * torch.rand(n, 2, generator=generator, dtype=torch.float64) + 20_000
    features = torch.randn(n, DIM, generator=generator, dtype=torch.float64)
    return BagBatch(features, torch.tensor([0, *sizes]).cumsum(0), coords_um, torch.full((len(sizes),), 112.0))


def torch_encoder(model: TransformerMIL) -> nn.TransformerEncoder:
    """torch's encoder with the weights of `model`."""
    layer = nn.TransformerEncoderLayer(H, K, 24, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, len(model.layers) + 1, norm=nn.LayerNorm(H), enable_nested_tensor=False)
    for theirs, ours in zip(encoder.layers, [*model.layers, model.last_layer], strict=True):
        assert isinstance(theirs, nn.TransformerEncoderLayer) and isinstance(ours, EncoderLayer)
        renamed = {
            "self_attn.in_proj_weight": "to_qkv.weight",
            "self_attn.in_proj_bias": "to_qkv.bias",
            **{f"self_attn.out_proj.{kind}": f"out.0.{kind}" for kind in ("weight", "bias")},
            **{f"linear{one}.{kind}": f"ffn.{place}.{kind}" for one, place in ((1, 0), (2, 3)) for kind in ("weight", "bias")},
            **{f"norm{one}.{kind}": f"norm{one}.{kind}" for one in (1, 2) for kind in ("weight", "bias")},
        }
        theirs.load_state_dict({name: ours.state_dict()[own] for name, own in renamed.items()})
    assert encoder.norm is not None
    encoder.norm.load_state_dict(model.norm.state_dict())
    return encoder.double().eval()


def mask_by_hand(coords_um: Tensor, alibi_um: float) -> Tensor:
    """(K, 1 + N, 1 + N): minus slope times distance."""
    apart = F.pad((coords_um.unsqueeze(1) - coords_um.unsqueeze(0)).square().sum(2).sqrt(), (1, 0, 1, 0))
    slopes = torch.tensor([2.0 ** (-8 * k / K) for k in range(1, K + 1)]).double()
    return -slopes[:, None, None] * apart / alibi_um


@pytest.mark.parametrize(("layers", "alibi_um"), [(1, None), (2, None), (3, None), (2, 256.0), (3, 256.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_the_numbers_are_those_of_torch(layers, alibi_um, dtype, tolerance):
    model, batch = make(layers=layers, alibi_um=alibi_um), batch_of(*SIZES)
    encoder = torch_encoder(model)
    expected = []
    for index in range(len(batch)):
        bag = batch.bag(index)
        tokens = torch.cat([model.class_token, model.project(bag.features)]).unsqueeze(0)
        if alibi_um is None:
            expected.append(encoder(tokens)[0, 0])
        else:
            assert bag.coords_um is not None and encoder.norm is not None
            *before, last = encoder.layers
            for layer in before:
                tokens = layer(tokens, src_mask=mask_by_hand(bag.coords_um, alibi_um))
            expected.append(encoder.norm(last(tokens))[0, 0])  # the class token is at distance zero of all
    logits = model.classify(torch.stack(expected)).to(dtype)
    found = model.to(dtype)(batch.to("cpu", dtype)).logits
    torch.testing.assert_close(found, logits, rtol=tolerance, atol=tolerance)


def test_attention_logits_are_those_of_the_class_token_in_the_last_layer():
    model, batch = make(layers=1), batch_of(50)
    tokens = torch.cat([model.class_token, model.project(batch.features)]).unsqueeze(0)
    layer = torch_encoder(model).layers[0]
    assert isinstance(layer, nn.TransformerEncoderLayer)
    normed = layer.norm1(tokens)
    weights = layer.self_attn(normed, normed, normed, average_attn_weights=False)[1][0, :, 0, 1:].T  # (N, K)
    scores = model(batch).attention_logits
    torch.testing.assert_close(scores.softmax(0), weights / weights.sum(0), rtol=0, atol=1e-10)


@pytest.mark.parametrize("alibi_um", [None, 256.0])
def test_masks_in_pieces_change_neither_numbers_nor_gradients(alibi_um, monkeypatch):
    model, batch = make(alibi_um=alibi_um).train(), batch_of(*SIZES)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def logits_and_gradient() -> tuple[Tensor, Tensor]:
        logits = model(batch).logits
        return logits, torch.autograd.grad(logits.square().sum(), model.get_parameter("project.0.weight"))[0]

    whole = logits_and_gradient()
    monkeypatch.setattr(transformer, "MASK_ELEMENTS", 3 * K * 51)  # three queries at a time
    for one, other in zip(logits_and_gradient(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_distances_count_and_where_the_slide_begins_does_not():
    model, batch = make(alibi_um=256.0), batch_of(30)
    assert batch.coords_um is not None
    before = model(batch).logits
    torch.testing.assert_close(model(replace(batch, coords_um=batch.coords_um + 777)).logits, before, rtol=0, atol=1e-9)
    assert not torch.allclose(model(replace(batch, coords_um=batch.coords_um * 2)).logits, before, atol=1e-6)
    with pytest.raises(AggregatorInputError, match="needs the position"):
        model(replace(batch, coords_um=None))


def test_without_distances_places_are_not_looked_at():
    model, batch = make(), batch_of(30)
    assert torch.equal(model(replace(batch, coords_um=None, tile_um=None)).logits, model(batch).logits)


@pytest.mark.parametrize("alibi_um", [None, 256.0])
def test_contributions_sum_to_the_slope_of_the_logit_along_the_embedding(alibi_um):
    model, batch = make(alibi_um=alibi_um), batch_of(20)
    with torch.inference_mode():
        contributions = model(batch, explain=True).contributions

    def logits(scale: float) -> Tensor:
        with torch.no_grad():
            return model.classify(model._read(model.project(batch.features) * scale, batch)[0])[0]

    slope = (logits(1 + 1e-5) - logits(1 - 1e-5)) / 2e-5
    torch.testing.assert_close(contributions.sum(0), slope, rtol=0, atol=1e-7)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="hidden 20 is not a multiple of the 8 heads"):
        TransformerMIL(DIM, 2, hidden=20)
    with pytest.raises(ConfigError, match="0 layers"):
        make(layers=0)

"""The query decoder: numbers of torch's own, queries that belong to labels, contributions that are shares of what is read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from wsimil.aggregators.packed import segment_softmax
from wsimil.aggregators.query_decoder import QueryDecoder
from wsimil.batch import BagBatch
from wsimil.errors import ConfigError


def make_bags(*sizes: int) -> BagBatch:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(sum(sizes), 6, generator=generator, dtype=torch.float64)
    return BagBatch(features, torch.tensor([0, *sizes]).cumsum(0))


def make_model(n_outputs: int = 3, **options) -> QueryDecoder:
    torch.manual_seed(0)
    model = QueryDecoder(6, n_outputs, hidden=8, heads=2, **options).double().eval()
    with torch.no_grad():
        model.queries.mul_(50)  # far apart, as after training
    return model


def test_the_numbers_are_those_of_torchs_decoder():
    model, bags = make_model(), make_bags(1, 9)
    layer = nn.TransformerDecoderLayer(8, 2, 32, activation="gelu", batch_first=True, norm_first=True, dropout=0.0)
    reference = nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(8)).double().eval()
    for ours, theirs in zip(model.layers, reference.layers, strict=True):
        for reading, attention in ((ours.talk, theirs.self_attn), (ours.read, theirs.multihead_attn)):
            biases = [reading.query.bias, reading.key.bias, torch.zeros(8)]
            attention.in_proj_weight.data = torch.cat([part.weight for part in (reading.query, reading.key, reading.value)])
            attention.in_proj_bias.data = torch.cat(biases)
            attention.out_proj.load_state_dict(reading.mix.state_dict())
        for mine, its in (
            (ours.norm_self, theirs.norm1),
            (ours.norm_cross, theirs.norm2),
            (ours.norm_feed, theirs.norm3),
            (ours.feed[0], theirs.linear1),
            (ours.feed[3], theirs.linear2),
        ):
            its.load_state_dict(mine.state_dict())
    reference.norm.load_state_dict(model.norm.state_dict())
    expected = [reference(model.queries[None], tiles[None]) for tiles in model.project(bags.features).split([1, 9])]
    torch.testing.assert_close(model(bags).bag_embedding, torch.cat(expected), rtol=0, atol=1e-10)


def test_a_query_goes_with_its_label():
    model, bags = make_model(), make_bags(4, 9)
    before = model(bags, explain=True)
    order = [2, 0, 1]
    for parameter in (model.queries, model.classify.weight, model.classify.bias):
        parameter.data = parameter.data[order]
    after = model(bags, explain=True)
    for name in ("logits", "attention_logits", "contributions"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name)[:, order], rtol=0, atol=1e-10)


def test_the_attention_of_a_label_is_the_mean_over_heads():
    model, bags = make_model(layers=1), make_bags(9)
    tiles, layer = model.project(bags.features), model.layers[0]
    normed = layer.norm_self(model.queries)
    queries = layer.norm_cross(model.queries + layer.talk(normed, normed)[0])
    query, key = layer.read.query(queries).reshape(3, 2, 4), layer.read.key(tiles).reshape(9, 2, 4)
    by_hand = torch.stack([(query[:, head] @ key[:, head].T / 2).softmax(1) for head in range(2)]).mean(0)  # (C, N)
    scores = model(bags).attention_logits
    assert scores is not None
    torch.testing.assert_close(scores.exp(), by_hand.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(segment_softmax(scores, bags), by_hand.T, rtol=0, atol=1e-12)


def test_contributions_are_what_a_logit_loses_as_the_words_of_a_tile_fade():
    model, bags = make_model(), make_bags(9, 5)
    contributions = model(bags, explain=True).contributions
    embedded = replace(bags, features=model.project(bags.features))
    volume = torch.ones(14, 1, dtype=torch.float64, requires_grad=True)
    for layer in model.layers:
        parts = iter(volume.split([9, 5]))
        layer.read.value.register_forward_hook(lambda module, given, said, parts=parts: said * next(parts))
    logits = model.read_logits(embedded)  # attention held
    slopes = [torch.autograd.grad(logits[:, label].sum(), volume, retain_graph=True)[0] for label in range(3)]
    torch.testing.assert_close(contributions, torch.cat(slopes, 1), rtol=0, atol=1e-10)


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="hidden = 20 is not a multiple of heads = 8"):
        QueryDecoder(6, 1, hidden=20)

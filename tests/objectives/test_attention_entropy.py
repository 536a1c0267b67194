"""Entropy of attention: how much there is at most, what is rewarded when, and that any objective may be inside."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wsimil.aggregators.abmil import ABMIL
from wsimil.aggregators.clam import CLAM
from wsimil.aggregators.mean_pool import MeanPool
from wsimil.batch import BagBatch, LabelledBags
from wsimil.errors import ConfigError
from wsimil.objectives import AttentionEntropy, ClamInstances, MaskedHardInstances, SlideLabel
from wsimil.objectives.attention_entropy import attention_entropy
from wsimil.task import Task

GOLDEN = Path(__file__).parents[1] / "aggregators" / "golden" / "aem.npz"
BINARY = Task("binary", ("no", "yes"))
SIZES = (1, 4, 20)


def batch_of(*sizes: int) -> LabelledBags:
    features = torch.randn(sum(sizes), 6, generator=torch.Generator().manual_seed(0))
    return LabelledBags(BagBatch(features, torch.tensor([0, *sizes]).cumsum(0)), torch.arange(len(sizes)).float() % 2)


def model_of(kind: type[nn.Module] = ABMIL) -> nn.Module:
    torch.manual_seed(0)
    return kind(6, 1, hidden=16, dropout=0.0)


def test_uniform_attention_has_the_most_entropy_and_that_is_log_n():
    bags = batch_of(*SIZES).bags
    most = sum(math.log(size) for size in SIZES) / len(SIZES)
    assert attention_entropy(torch.full((25, 3), 7.0), bags).item() == pytest.approx(most)
    scores = torch.randn(25, 1, generator=torch.Generator().manual_seed(0))
    assert 0 < attention_entropy(scores, bags) < most
    assert attention_entropy(scores * 1e6, bags).item() == pytest.approx(0, abs=1e-6)
    assert attention_entropy(torch.where(scores > 0, 0.0, -1e9), bags).isfinite()  # tiles that ACMIL hides


def test_the_entropy_is_the_authors():
    golden = np.load(GOLDEN)
    cases = {name.partition("/")[0] for name in golden}
    assert len(cases) == 4
    for case in cases:
        attention = torch.as_tensor(golden[f"{case}/attention"])  # (K, N)
        found = attention_entropy(attention.T, batch_of(attention.shape[1]).bags)
        assert -found.item() == pytest.approx(float(golden[f"{case}/div_loss"]), rel=1e-12, abs=1e-15)


def test_columns_count_alike_and_so_do_bags():
    bags = batch_of(4, 20).bags
    scores = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    each = [
        attention_entropy(part[:, column : column + 1], batch_of(len(part)).bags)
        for part in scores.split([4, 20])
        for column in (0, 1)
    ]
    torch.testing.assert_close(attention_entropy(scores, bags), torch.stack(each).mean())


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_the_reward_fades_along_half_a_cosine(progress, share):
    model, batch = model_of().train(), batch_of(*SIZES)
    losses = AttentionEntropy(SlideLabel(BINARY), weight=0.3).losses(model, batch, progress)
    entropy = attention_entropy(model(batch.bags).attention_logits, batch.bags)
    torch.testing.assert_close(losses["entropy"], -0.3 * share * entropy)
    torch.testing.assert_close(losses["bag"], SlideLabel(BINARY).losses(model, batch, progress)["bag"])


def test_validation_losses_know_no_reward_and_no_listener_stays():
    model, batch = model_of().eval(), batch_of(*SIZES)
    assert AttentionEntropy(SlideLabel(BINARY)).losses(model, batch, 0.0).keys() == {"bag"}
    AttentionEntropy(SlideLabel(BINARY)).losses(model.train(), batch, 0.0)
    assert not model._forward_hooks


def test_minimising_it_spreads_attention():
    class NoLabel(SlideLabel):
        def losses(self, model: nn.Module, batch: LabelledBags, progress: float) -> dict[str, Tensor]:
            return {"nothing": 0 * model(batch.bags).logits.sum()}

    model, batch = model_of().train(), batch_of(20)
    objective = AttentionEntropy(NoLabel(BINARY))
    optimiser = torch.optim.Adam(objective.param_groups(model), lr=0.02)
    before = attention_entropy(model(batch.bags).attention_logits, batch.bags)
    for _ in range(60):
        optimiser.zero_grad()
        torch.stack(list(objective.losses(model, batch, 0.0).values())).sum().backward()
        optimiser.step()
    after = attention_entropy(model(batch.bags).attention_logits, batch.bags)
    assert before < after and after > 0.999 * math.log(20)


def test_any_objective_may_be_inside():
    torch.manual_seed(0)
    model = CLAM(6, 1, hidden=16)
    objective = AttentionEntropy(ClamInstances(SlideLabel(BINARY), 16))
    objective.prepare(model)
    assert objective.losses(model.train(), batch_of(20, 30), 0.0).keys() == {"bag", "tiles", "entropy"}
    optimised = {id(parameter) for group in objective.param_groups(model) for parameter in group["params"]}
    assert optimised == {id(parameter) for parameter in (*model.parameters(), *objective.parameters())}


def test_a_model_without_attention_is_refused():
    with pytest.raises(ConfigError, match="MeanPool gives no attention_logits"):
        AttentionEntropy(SlideLabel(BINARY)).losses(model_of(MeanPool).train(), batch_of(3), 0.0)


def test_around_hidden_tiles_it_is_the_entropy_of_those_that_were_seen():
    def entropy(*, hidden_first: bool) -> float:
        model, batch, inner = model_of().train(), batch_of(10, 50), SlideLabel(BINARY)
        hide = {"high": 0.3, "low": 0.3}
        objective = (
            AttentionEntropy(MaskedHardInstances(inner, **hide))
            if hidden_first
            else MaskedHardInstances(AttentionEntropy(inner), **hide)
        )
        objective.prepare(model)
        return objective.train().losses(model, batch, 0.0)["entropy"].item()

    assert entropy(hidden_first=True) == pytest.approx(entropy(hidden_first=False), abs=1e-6)

"""The attention network in few walks over the rows: it is what torch computes step by step, whoever shares the work."""

from __future__ import annotations

import os
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import Tensor

from wsimil.aggregators import Standardized, fused, kernels, make_aggregator
from wsimil.aggregators.packed import segment_softmax, segment_weighted_sum
from wsimil.batch import BagBatch, BagOutput, offsets_of
from wsimil.training.dropout import quicken_dropout

DIM, SIZES = 24, [700, 3, 1900, 1]

MODELS = [
    ("abmil", {}),
    ("gated_abmil", {}),
    ("gated_abmil", {"heads": 3, "attention_bias": False}),
    ("gated_abmil", {"hidden": 33, "attention": 7}),
    ("clam_sb", {}),
    ("clam_mb", {}),
    ("additive", {}),
    ("acmil", {"mask_rate": 0.0}),
    ("dtfd", {"n_pseudo": 1}),
]


def bags(sizes: list[int] = SIZES, dtype: torch.dtype = torch.float16, seed: int = 0) -> BagBatch:
    features = torch.randn(sum(sizes), DIM, generator=torch.Generator().manual_seed(seed)) + 0.3
    return BagBatch(features.to(dtype), offsets_of(sizes))


def model(name: str, *, seed: int = 3, **options) -> Standardized:
    torch.manual_seed(seed)
    inner = make_aggregator(name, DIM, 2, **({"dropout": 0.0} | options))
    return Standardized(inner, torch.full((DIM,), 0.3), torch.linspace(0.8, 1.2, DIM))


def loss_of(output: BagOutput) -> Tensor:
    extra = sum(part.logits.float().square().sum() for part in output.extra_logits)
    assert output.attention_logits is not None
    return output.logits.float().square().sum() + extra + output.attention_logits.float().sin().mean()


def learned(network: Standardized, batch: BagBatch, *, bf16: bool = False, seed: int = 5) -> tuple[BagOutput, dict[str, Tensor]]:
    network.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = network.train()(batch)
        loss = loss_of(output)
    loss.backward()
    return output, {name: part.grad.clone() for name, part in network.named_parameters() if part.grad is not None}


@pytest.fixture
def step_by_step(monkeypatch):
    """Turns the module off."""
    return lambda: monkeypatch.setattr(fused, "_FROM", 1 << 60)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() - other.detach().double()).norm() / other.detach().double().norm().clamp(min=1e-2))


def is_fused(output: BagOutput) -> bool:
    return "EmbedAndScore" in type(output.tile_embedding.grad_fn).__name__


@pytest.mark.parametrize("features", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "options"), MODELS, ids=lambda part: str(part))
def test_it_is_what_torch_computes(name, options, features, step_by_step):
    network, batch = model(name, **options), bags(dtype=features)
    output, gradients = learned(network, batch)
    assert is_fused(output)
    step_by_step()
    expected, expected_gradients = learned(network, batch)
    assert not is_fused(expected)
    for part in ("logits", "attention_logits", "tile_embedding"):
        assert distance(getattr(output, part), getattr(expected, part)) < 2e-6, part
    assert gradients.keys() == expected_gradients.keys()
    for part, gradient in gradients.items():
        assert distance(gradient, expected_gradients[part]) < 3e-5, part


@pytest.mark.parametrize(("name", "options"), MODELS, ids=lambda part: str(part))
def test_in_bfloat16_it_is_no_farther_from_the_truth(name, options, monkeypatch):
    """Over several models: in one, a rounding here or there decides."""
    ours, theirs = defaultdict(list), defaultdict(list)  # distances from float64, by part
    for seed in range(6):
        network, batch = model(name, seed=seed, **options), bags()
        output, gradients = learned(network, batch, bf16=True)
        assert is_fused(output) and output.tile_embedding.dtype == torch.bfloat16
        with monkeypatch.context() as patch:
            patch.setattr(fused, "_FROM", 1 << 60)
            plain, plain_gradients = learned(network, batch, bf16=True)
            truth, true_gradients = learned(network.double(), bags(dtype=torch.float64))
        assert not is_fused(plain)
        for found, one in ((ours, gradients | {"logits": output.logits}), (theirs, plain_gradients | {"logits": plain.logits})):
            for part, true in (true_gradients | {"logits": truth.logits}).items():
                found[part].append(distance(one[part], true))
    for part, distances in ours.items():
        assert np.square(distances).mean() ** 0.5 < 1.3 * np.square(theirs[part]).mean() ** 0.5 + 1e-3, part


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_who_shares_the_work_changes_nothing(threads):
    network, batch, before = model("clam_sb", dropout=0.25), bags(), torch.get_num_threads()
    expected, expected_gradients = learned(network, batch)
    torch.set_num_threads(threads)
    try:
        output, gradients = learned(network, batch)
        again, gradients_again = learned(network, batch)
        with fused.sharing_rows():
            assert torch.get_num_threads() == 1
            shared, shared_gradients = learned(network, batch)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(output.logits, again.logits) and torch.equal(output.logits, shared.logits)
    assert distance(output.logits, expected.logits) < 1e-6
    for part, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[part]) and torch.equal(gradient, shared_gradients[part])
        assert distance(gradient, expected_gradients[part]) < 1e-5


@pytest.mark.parametrize(("name", "bf16"), [("clam_sb", False), ("clam_mb", False), ("abmil", False), ("gated_abmil", False)])
def test_the_way_back_tosses_the_same_coins(name, bf16):
    """Along a direction the loss changes by what the gradient says, with dropout on."""
    network, batch = model(name, dropout=0.4), bags([900])
    _, gradients = learned(network, batch)
    directions = {part: torch.randn_like(gradient) for part, gradient in gradients.items()}
    parameters = dict(network.named_parameters())

    def moved(step: float) -> float:
        with torch.no_grad():
            for part, direction in directions.items():
                parameters[part] += step * direction
            torch.manual_seed(5)
            found = float(loss_of(network(batch)).double())
            for part, direction in directions.items():
                parameters[part] -= step * direction
        return found

    expected = sum(float((gradients[part] * direction).sum()) for part, direction in directions.items())
    assert (moved(2e-4) - moved(-2e-4)) / 4e-4 == pytest.approx(expected, rel=0.03, abs=0.02)
    assert moved(0) != float(loss_of(network.eval()(batch)).detach())


@pytest.mark.parametrize("chance", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("hidden", [64, 65])
def test_dropout_drops_as_often_as_asked_and_keeps_the_mean(chance, hidden):
    features, weight = torch.ones(4000, DIM), torch.full((hidden, DIM), 1 / DIM)
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        attend, score = (torch.zeros(8, hidden), None), (torch.zeros(1, 4), None)
        tiles, _ = fused.embed_and_score(features, None, (weight, None), attend, score, gated=True, drop=(chance, 0.0))
        assert set(tiles.unique().tolist()) == {0.0, tiles.max().item()}
        assert tiles.max().item() == pytest.approx(1 / (1 - chance), rel=1e-3)
        found.append((tiles == 0).float())
        error = (chance * (1 - chance)) ** 0.5
        assert abs(found[-1].mean() - chance) < 5 * error / (4000 * hidden) ** 0.5
        assert (found[-1].mean(0) - chance).abs().max() < 5 * error / 4000**0.5  # no column is spared
        assert (found[-1].mean(1) - chance).abs().max() < 6 * error / hidden**0.5
        centred = found[-1] - found[-1].mean()
        for near in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):  # nor do neighbours hold together
            assert abs(near.mean()) < 5 * error**2 / near.numel() ** 0.5
    both = (found[0] - chance) * (found[1] - chance)
    assert abs(both.mean()) < 5 * chance * (1 - chance) / both.numel() ** 0.5


def test_all_dropped_is_zero():
    network = model("gated_abmil", dropout=1.0)
    output, gradients = learned(network, bags())
    assert is_fused(output) and not output.tile_embedding.any()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_every_half_precision_number_is_read_and_rounded_as_torch_does():
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)[:, None]
    for stored in (every, every.view(torch.bfloat16), every.float()):
        for mean in (0.0, 0.3):
            centre, expected = torch.tensor([mean]), stored.float() - mean
            for dtype in (torch.float32, torch.bfloat16):
                found = torch.empty(65536, 1, dtype=dtype)
                kernels.centre(fused._numbers(stored), centre.numpy(), fused._numbers(found))
                assert torch.equal(found.isnan(), expected.isnan())
                assert torch.equal(found.nan_to_num(0, 1e38, -1e38), expected.to(dtype).nan_to_num(0, 1e38, -1e38))


def test_halves_are_read_the_same_where_the_processor_does_not_know_them():
    bits = np.arange(65536).astype(np.uint16)
    found = np.array([kernels.half_by_hand(bit) for bit in bits.view(np.int16)])
    np.testing.assert_array_equal(found, bits.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_none_does_not_become_one(bad):
    batch = bags()
    batch.features[5, 2] = bad
    for bf16 in (False, True):
        output, _ = learned(model("gated_abmil"), batch, bf16=bf16)
        assert is_fused(output) and output.logits[0].isnan().all()
        assert output.logits[1:].isfinite().all()


def test_a_sum_over_very_many_keeps_its_digits():
    sizes = [200_000, 1, 40_000]
    values = torch.randn(sum(sizes), 16).abs()
    weights = segment_softmax(torch.randn(sum(sizes), 2), BagBatch(values, offsets_of(sizes)))
    batch = BagBatch(values, offsets_of(sizes))
    found = segment_weighted_sum(weights, values, batch)
    exact = segment_weighted_sum(weights.double(), values.double(), batch)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", [1, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_weighted_sum_and_its_gradients(columns, dtype, step_by_step):
    batch = bags()
    weights = torch.rand(sum(SIZES), columns, requires_grad=True)
    values = torch.randn(sum(SIZES), 11).to(dtype).requires_grad_()
    owed = torch.randn(len(SIZES), columns, 11)
    found = segment_weighted_sum(weights, values, batch)
    gradients = torch.autograd.grad((found * owed).sum(), (weights, values))
    step_by_step()
    expected = segment_weighted_sum(weights, values, batch)
    expected_gradients = torch.autograd.grad((expected * owed).sum(), (weights, values))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if one.dtype == torch.float32 else 1e-2, atol=1e-5)


def test_what_was_given_out_is_not_written_to_again():
    network = model("gated_abmil")
    kept = [learned(network, bags(seed=seed))[0] for seed in range(4)]
    copies = [(one.tile_embedding.clone(), one.attention_logits.clone()) for one in kept]
    for seed in range(4, 8):
        learned(network, bags(seed=seed))
    for one, (tiles, scores) in zip(kept, copies, strict=True):
        assert torch.equal(one.tile_embedding, tiles) and torch.equal(one.attention_logits, scores)


def test_two_ways_forward_before_two_ways_back():
    """As with a teacher and a student, or two views of a bag."""
    network = model("gated_abmil", dropout=0.25)
    alone = [learned(network, bags(seed=seed))[1] for seed in (0, 1)]
    losses = []
    for seed in (0, 1):
        torch.manual_seed(5)
        losses.append(loss_of(network(bags(seed=seed))))
    network.zero_grad()
    (losses[0] + losses[1]).backward()
    for name, part in network.named_parameters():
        if part.grad is not None:
            torch.testing.assert_close(part.grad, alone[0][name] + alone[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_prediction_is_the_same(quiet, step_by_step):
    network = model("clam_mb").eval()
    with quiet():
        found = network(bags(), explain=True)
        step_by_step()
        expected = network(bags(), explain=True)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.contributions, expected.contributions, rtol=1e-4, atol=1e-7)


def test_without_numba_torch_does_it(monkeypatch):
    network = model("gated_abmil")
    output, gradients = learned(network, bags())
    monkeypatch.setattr(fused, "_kernels", lambda: None)
    other, other_gradients = learned(network, bags())
    assert is_fused(output) and not is_fused(other)
    torch.testing.assert_close(output.logits, other.logits)
    assert gradients.keys() == other_gradients.keys()


def test_what_it_does_not_take_goes_the_other_way():
    network = model("gated_abmil")
    seen = []
    assert is_fused(network(bags()))
    assert not is_fused(network(bags([100])))  # few
    assert not is_fused(model("gated_abmil").double()(bags(dtype=torch.float64)))
    transposed = BagBatch(torch.randn(DIM, 2000).T, offsets_of([2000]))
    assert not is_fused(network(transposed))
    asking = bags(dtype=torch.float32)
    asking.features.requires_grad_()
    network(asking).logits.sum().backward()
    assert asking.features.grad.abs().sum() > 0
    hook = network.inner.attend.gate.register_forward_hook(lambda *_: seen.append(1))
    assert not is_fused(network(bags())) and seen
    hook.remove()
    assert is_fused(network(bags()))


class Doubled(torch.nn.Linear):
    def forward(self, values: Tensor) -> Tensor:
        return 2 * super().forward(values)


@pytest.mark.parametrize("place", ["project.0", "project.1", "attend.feature", "attend.score"])
def test_another_layer_in_the_place_of_one_is_used(place):
    network = model("gated_abmil").eval()
    before = network(bags()).attention_logits
    old = network.inner.get_submodule(place)
    new = Doubled(old.in_features, old.out_features) if isinstance(old, torch.nn.Linear) else torch.nn.Sigmoid()
    if isinstance(old, torch.nn.Linear):
        new.load_state_dict(old.state_dict())
    if place == "project.0":
        network = network.inner
        before = network(bags()).attention_logits
    (network if place == "project.0" else network.inner).set_submodule(place, new)
    batch = bags(dtype=torch.float32) if place == "project.0" else bags()
    after = network(batch)
    assert not is_fused(after) and not torch.allclose(after.attention_logits, before)


def test_a_layer_with_a_parametrization_is_used():
    network = model("gated_abmil").eval()
    before = network(bags()).attention_logits
    torch.nn.utils.parametrizations.weight_norm(network.inner.attend.feature)
    with torch.no_grad():
        network.inner.attend.feature.parametrizations.weight.original0.mul_(3)
    after = network(bags()).attention_logits
    assert not torch.allclose(after, before)


def test_weights_under_a_transform_of_torch_go_the_other_way():
    network = model("gated_abmil").inner.eval()
    weights = dict(network.named_parameters())
    stacked, batch = {name: torch.stack([value, 2 * value]) for name, value in weights.items()}, bags(dtype=torch.float32)

    def one(own):
        return torch.func.functional_call(network, own, (batch,)).logits

    found = torch.func.vmap(one)(stacked)
    torch.testing.assert_close(found[0], network(batch).logits)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_who_records_the_steps_sees_them():
    network = model("gated_abmil").inner.eval().requires_grad_(False)

    def logits(features: Tensor) -> Tensor:
        return network(BagBatch(features, offsets_of([1000]))).logits

    traced = torch.jit.trace(logits, torch.randn(1000, DIM), check_trace=False)
    other = torch.randn(1000, DIM)
    torch.testing.assert_close(traced(other), logits(other))


def test_the_number_of_threads_comes_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), fused.sharing_rows(), fused.sharing_rows():
        raise ZeroDivisionError
    assert torch.get_num_threads() == before and fused._threads == 0


def test_an_error_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(fused, "_threads", 2)
    began = []

    def work(pieces: list[slice]) -> None:
        began.append(pieces)
        if pieces[0].start:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fused._share([(0, 10_000)], work)
    assert len(began) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_bags_joined_are_the_bags_one_after_the_other(dtype):
    parts = [torch.randn(rows, 5).to(dtype) for rows in (700, 1, 9000)]
    expected = torch.cat(parts)
    assert torch.equal(fused.joined(parts), expected)
    with fused.sharing_rows():
        assert torch.equal(fused.joined(parts), expected)
        assert torch.equal(fused.joined([part.T.contiguous().T for part in parts]), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(fused, "_threads", 2)
    fused._share([(0, 10_000)], len)
    child = os.fork()
    if child == 0:
        os._exit(0 if sum(fused._share([(0, 10_000)], len)) == 4 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_dropout_of_training_is_understood():
    network = model("gated_abmil", dropout=0.25)
    quicken_dropout(network)
    output, _ = learned(network, bags())
    assert is_fused(output) and (output.tile_embedding == 0).float().mean() > 0.4


@pytest.mark.parametrize("name", ["gated_abmil", "clam_sb", "acmil"])
def test_it_keeps_embeddings_and_gates_for_the_way_back_and_no_more(name):
    network, rows, kept = model(name, hidden=64, attention=16, dropout=0.25), 20_000, {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = bags([rows])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(batch)
    kept.pop(batch.features.untyped_storage().data_ptr())
    assert sum(kept.values()) < rows * 4 * (64 + 2 * 16 + 40) + 100_000

"""MAE: patches there and back, what is hidden and what counts, and that it learns."""

from __future__ import annotations

import pytest
import torch
from objective_tenants import TinyViT
from torch import Tensor, nn

from wsimil.errors import ConfigError
from wsimil.objectives.mae import MaeObjective, MaskedImages, _Block, _distances, _positions, mae_loss, patchify, unpatchify


def test_patches_are_row_by_row_and_come_back():
    images = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).view(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[1, 4], images[1, :, 4:8, 4:8].permute(1, 2, 0).flatten())  # second row, second column
    assert torch.equal(unpatchify(patches, 4, width=12), images)


def test_what_is_said_of_visible_patches_counts_nothing():
    target, mask = torch.randn(2, 6, 12), torch.tensor([[1, 0, 1, 0, 1, 1], [0, 0, 0, 1, 1, 1]])
    pred = torch.randn(2, 6, 12, requires_grad=True)
    loss = mae_loss(pred, target, mask)
    loss.backward()
    by_hand = [(pred[b, n] - target[b, n]).square().mean() for b in range(2) for n in range(6) if mask[b, n]]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())
    assert torch.equal(pred.grad.abs().sum(-1) > 0, mask.bool())
    other = torch.where(mask.bool().unsqueeze(-1), pred, pred + 100)
    torch.testing.assert_close(mae_loss(other, target, mask), loss)


@pytest.mark.parametrize(("ratio", "hidden"), [(0.75, 12), (0.5, 8), (0.6, 10)])
def test_exactly_that_share_is_hidden_and_the_smallest_scores_are_seen(ratio, hidden):
    objective = MaeObjective(24, patch_px=8, decoder_dim=32, mask_ratio=ratio)
    scores = torch.rand(5, 16)
    mask, keep = objective.hide(scores)
    assert mask.sum(1).tolist() == [hidden] * 5
    for row in range(5):
        assert sorted(mask[row].nonzero().flatten().tolist() + keep[row].tolist()) == list(range(16))
        assert scores[row][keep[row]].max() < scores[row][mask[row]].min()
        assert keep[row].tolist() == sorted(keep[row].tolist())


def make(**options) -> tuple[TinyViT, MaeObjective]:
    torch.manual_seed(0)
    return TinyViT(), MaeObjective(24, **{"patch_px": 8, "decoder_dim": 32, "pixel_std": (1.0, 1.0, 1.0)} | options)


def batch(seed: int) -> MaskedImages:
    """Ramps of grey: what is hidden follows from what is seen."""
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * torch.pi * torch.rand(16, 1, 1, generator=generator)
    across = torch.linspace(-1, 1, 32)
    grey = angle.cos() * across + angle.sin() * across.unsqueeze(1)
    return MaskedImages(grey.unsqueeze(1).repeat(1, 3, 1, 1), torch.rand(16, 16, generator=generator))


def test_hidden_pixels_do_not_reach_the_network():
    model, objective = make()
    given = batch(0)
    mask, keep = objective.hide(given.scores)
    spoiled = torch.where(mask.unsqueeze(-1), 9.0, patchify(given.images, 8))
    with torch.no_grad():
        before = objective.predict(model, given.images, keep)
        after = objective.predict(model, unpatchify(spoiled, 8, width=32), keep)
    torch.testing.assert_close(before, after)


def test_patches_are_painted_where_they_are():
    """Tokens go back to their own places: another order of the kept patches changes nothing."""
    model, objective = make()
    given = batch(0)
    mask, keep = objective.hide(given.scores)
    with torch.no_grad():
        before = objective.predict(model, given.images, keep)
        after = objective.predict(model, given.images, keep.flip(1))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)
    one, other = before[0][mask[0]][:2]  # both hidden: their places alone tell them apart
    assert not torch.allclose(one, other, atol=1e-3)


def test_what_is_hidden_begins_as_the_mean_of_what_is_seen():
    """Without a block that mixes patches, a change of what is seen still reaches what is hidden, everywhere alike."""
    model, objective = make(decoder_blocks=0)
    given = batch(0)
    mask, keep = objective.hide(given.scores)
    with torch.no_grad():
        before, after = (objective.predict(model, images, keep) for images in (given.images, given.images + 1))
        tokens = objective.embed(model.encode_tokens(given.images, keep))
        hidden = objective.hidden_token + tokens.mean(1, keepdim=True) + _positions(4, 4, 32, torch.device("cpu"))
    assert (before - after)[mask].abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(before[mask], objective.paint(objective.norm(hidden))[mask])


@pytest.mark.parametrize("dim", [24, 96])  # one head, three heads
def test_the_decoder_looks_near_first(dim):
    torch.manual_seed(0)
    block, distances = _Block(dim), _distances(6, 6, torch.device("cpu"))
    assert distances[0, 1] == 1 and distances[0, 7] == pytest.approx(2**0.5) and distances[5, 30] == pytest.approx(50**0.5)
    tokens = torch.randn(8, 36, dim)
    other = tokens.clone()
    other[:, 0] += torch.randn(8, dim)
    with torch.no_grad():
        change = (block(tokens, distances) - block(other, distances)).abs().mean((0, 2))
    beside, across = change[1], change[35]
    assert beside > 10 * across


def test_bare_glass_does_not_count():
    model, objective = make(norm_pix=False, skip_std=0.02)
    images = torch.randn(4, 3, 32, 32)
    images[:, :, :16] = 1 + 0.005 * torch.randn(4, 3, 16, 32)
    scores = torch.rand(4, 16)
    mask, keep = objective.hide(scores)
    loss = objective.losses(model, MaskedImages(images, scores), 0.0)["mae"]
    tissue = mask & (torch.arange(16) >= 8)
    expected = mae_loss(objective.predict(model, images, keep), patchify(images, 8), tissue)
    torch.testing.assert_close(loss, expected)
    assert float(objective.monitor["glass"]) == pytest.approx(1 - int(tissue.sum()) / int(mask.sum()))


def test_glass_is_judged_before_normalisation():
    """The same noise, divided by a small deviation or not, is the same glass."""
    noise = 0.01 * torch.randn(4, 3, 32, 32)
    readings = []
    for std in (1.0, 0.2):
        model, objective = make(pixel_std=(std, std, std))
        objective.losses(model, MaskedImages(noise / std, torch.rand(4, 16)), 0.0)
        readings.append(float(objective.monitor["glass"]))
    assert readings == [1.0, 1.0]


@pytest.mark.parametrize(("mean", "std"), [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
def test_glass_of_any_tint_is_glass_and_faint_tissue_is_not(mean, std):
    """A patch of one colour is flat however its channels were normalised; one channel that varies is tissue."""
    images = torch.ones(4, 3, 32, 32) + 0.005 * torch.randn(4, 3, 32, 32)
    images[2:] = torch.tensor([0.93, 0.90, 0.84]).view(3, 1, 1)  # yellowish, evenly so
    images[1, 1] += 0.03 * torch.randn(32, 32)
    normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    model, objective = make(skip_std=0.02, pixel_std=std)
    objective.losses(model, MaskedImages(normalised, torch.rand(4, 16)), 0.0)
    assert float(objective.monitor["glass"]) == 0.75


def test_nothing_but_glass_gives_a_loss_of_zero():
    model, objective = make()
    loss = objective.losses(model, torch.zeros(2, 3, 32, 32), 0.0)["mae"]
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_norm_pix_paints_each_patch_at_unit_deviation():
    model, objective = make()

    def loss_at(scale: float) -> Tensor:
        given = batch(0)
        with torch.no_grad():  # the network sees the same, the target alone is scaled
            objective.predict = lambda *_: torch.zeros(16, 16, 192)  # type: ignore[method-assign]
            return objective.losses(model, MaskedImages(scale * given.images, given.scores), 0.0)["mae"]

    torch.testing.assert_close(loss_at(1.0), loss_at(3.0), rtol=1e-3, atol=0)
    assert float(loss_at(1.0)) == pytest.approx(191 / 192, rel=1e-2)


def test_it_learns_to_paint_what_follows_from_what_it_sees():
    """Every tile has one grey of its own."""
    model, objective = make(norm_pix=False, skip_std=0.0)
    optimiser = torch.optim.AdamW(objective.param_groups(model), lr=3e-3)
    losses = []
    for _ in range(60):
        images = torch.randn(16, 1, 1, 1).expand(-1, 3, 32, 32)
        optimiser.zero_grad()
        loss = objective.losses(model, images, 0.0)["mae"]
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5]) / 10


def test_low_precision_products_change_the_loss_little():
    model, objective = make()
    exact = objective.losses(model, batch(0), 0.0)["mae"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective.losses(model, batch(0), 0.0)["mae"]
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0.0)


def test_the_same_scores_give_the_same_loss():
    model, objective = make()
    first, again = (objective.losses(model, batch(0), 0.0)["mae"] for _ in range(2))
    assert torch.equal(first, again)


def test_a_model_without_tokens_and_scores_of_another_grid_are_refused():
    model, objective = make()
    with pytest.raises(ConfigError, match="Linear has no encode_tokens"):
        objective.losses(nn.Linear(3, 3), batch(0), 0.0)
    with pytest.raises(ConfigError, match=r"\(16, 9\) patches"):
        objective.losses(model, MaskedImages(batch(0).images, torch.rand(16, 9)), 0.0)

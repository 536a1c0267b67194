"""Cox over a few slides at a time, with the others remembered, is Cox over all of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from wsimil.batch import BagBatch, BagOutput, ExtraLogits, LabelledBags
from wsimil.losses import cox_loss
from wsimil.objectives import SlideLabel
from wsimil.objectives.risk_bank import RiskBank
from wsimil.objectives.samplers import balanced_order, risk_set_order
from wsimil.task import Task

N, PER_STEP = 24, 4
COX = Task("survival", criterion="cox")


def cohort(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Risks (N,), targets (N, 2) with ties of time, and names."""
    rng = np.random.default_rng(seed)
    risk = torch.from_numpy(rng.normal(size=N)).float()
    targets = torch.from_numpy(np.stack([rng.integers(1, 12, N), rng.uniform(size=N) < 0.6], 1)).float()
    return risk, targets, [f"slide-{index}" for index in range(N)]


def filled(risk: torch.Tensor, targets: torch.Tensor, names: list[str]) -> RiskBank:
    bank = RiskBank(capacity=64)
    for start in range(0, N, PER_STEP):
        bank.remember(risk[start : start + PER_STEP], targets[start : start + PER_STEP], names[start : start + PER_STEP])
    return bank


def test_with_everybody_in_the_bank_a_step_is_the_whole_cohort():
    risk, targets, names = cohort()
    bank, whole = filled(risk, targets, names), cox_loss(risk, targets[:, 0], targets[:, 1])
    for start in range(0, N, PER_STEP):
        rows = slice(start, start + PER_STEP)
        torch.testing.assert_close(bank.loss(risk[rows], targets[rows], names[rows]), whole)


def test_the_mean_gradient_of_an_epoch_is_that_of_the_whole():
    risk, targets, names = cohort()
    bank, leaf = filled(risk, targets, names), risk.clone().requires_grad_()
    cox_loss(leaf, targets[:, 0], targets[:, 1]).backward()
    whole, leaf.grad = leaf.grad, None
    for start in range(0, N, PER_STEP):
        rows = slice(start, start + PER_STEP)
        (bank.loss(leaf[rows], targets[rows], names[rows]) * PER_STEP / N).backward()
    torch.testing.assert_close(leaf.grad, whole)


def test_an_empty_bank_is_the_batch_alone():
    risk, targets, names = cohort()
    torch.testing.assert_close(RiskBank().loss(risk, targets, names), cox_loss(risk, targets[:, 0], targets[:, 1]))


def test_a_slide_seen_again_replaces_what_was_known_of_it():
    risk, targets, names = cohort()
    bank = filled(risk + 3, targets, names)
    bank.remember(risk[:8], targets[:8], names[:8])
    assert int(bank.n_seen) == N and len(bank.ids[bank.ids >= 0].unique()) == N
    mixed = torch.cat([risk[:8], risk[8:] + 3])
    torch.testing.assert_close(bank.loss(risk[:1], targets[:1], names[:1]), cox_loss(mixed, targets[:, 0], targets[:, 1]))


def test_a_slide_drawn_twice_has_one_entry():
    risk, targets, names = cohort()
    bank = RiskBank(capacity=8)
    bank.remember(risk[[0, 1, 0]], targets[[0, 1, 0]], [names[0], names[1], names[0]])
    assert int(bank.n_seen) == 2 and (bank.ids >= 0).sum() == 2


def test_the_oldest_newcomer_makes_room():
    risk, targets, names = cohort()
    bank = RiskBank(capacity=10)
    for start in range(0, N, 2):
        bank.remember(risk[start : start + 2], targets[start : start + 2], names[start : start + 2])
    last = cox_loss(risk[-10:], targets[-10:, 0], targets[-10:, 1])
    torch.testing.assert_close(bank.loss(risk[-2:], targets[-2:], names[-2:]), last)


def likelihood(risk: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The negative log partial likelihood, summed over events."""
    return cox_loss(risk.double(), targets[:, 0].double(), targets[:, 1].double()) * targets[:, 1].sum()


def test_a_slide_of_validation_is_judged_by_what_its_joining_costs_the_training_slides():
    risk, targets, _ = cohort()
    bank = RiskBank().eval()
    bank.refer_to(risk, targets)
    new, new_targets, names = cohort(seed=1)
    new_targets[0, 0], new_targets[1, 0] = 0.5, 99  # before the first and after the last of the others
    alone = [bank.loss(new[[row]], new_targets[[row]], [names[row]]) for row in range(N)]
    for row in range(N):
        joined = likelihood(torch.cat([risk, new[[row]]]), torch.cat([targets, new_targets[[row]]]))
        torch.testing.assert_close(alone[row], (joined - likelihood(risk, targets)) / targets[:, 1].double().mean())
    torch.testing.assert_close(bank.loss(new, new_targets, names), torch.stack(alone).mean())  # nor does it depend on batch mates
    censored = new_targets[:, 1] == 0
    assert any(float(loss) > 0 for loss, one in zip(alone, censored, strict=True) if one)  # they are judged, too


def test_a_validation_loss_knows_nothing_of_what_training_saw_last():
    risk, targets, names = cohort()
    bank = filled(risk + torch.randn(N), targets, names).eval()
    bank.refer_to(risk + 7, targets)
    fresh = RiskBank().eval()
    fresh.refer_to(risk, targets)
    new, new_targets, new_names = cohort(seed=1)
    before = copy.deepcopy(bank.state_dict())
    expected = fresh.loss(new, new_targets, new_names)
    torch.testing.assert_close(bank.loss(new + 7, new_targets, new_names), expected)  # and nothing of an origin of log-hazards
    bank.remember(new, new_targets, new_names)
    assert all(torch.equal(value, before[key]) for key, value in bank.state_dict().items())


class Fixed(nn.Module):
    """A model that says what it is told, with two pseudo-bags per slide."""

    def __init__(self, risk: torch.Tensor, *, pseudo: bool) -> None:
        super().__init__()
        self.risk, self.pseudo = nn.Parameter(risk.unsqueeze(1)), pseudo

    def forward(self, bags: BagBatch) -> BagOutput:
        rows = torch.arange(len(bags)).repeat(2)
        extra = (ExtraLogits("pseudo", self.risk[rows], rows),) if self.pseudo else ()
        return BagOutput(self.risk, extra_logits=extra)


def batch_of(targets: torch.Tensor, names: list[str]) -> LabelledBags:
    return LabelledBags(BagBatch(torch.zeros(len(names), 2), torch.arange(len(names) + 1), slide_ids=tuple(names)), targets)


def test_pseudo_bags_of_a_slide_stand_for_one_slide_at_risk():
    risk, targets, names = cohort()
    losses = SlideLabel(COX).losses(Fixed(risk, pseudo=True), batch_of(targets, names), 0.0)
    torch.testing.assert_close(losses["pseudo"], losses["bag"])


def test_pseudo_bags_count_in_validation_as_in_training():
    risk, targets, names = cohort()
    objective = SlideLabel(COX)
    batch = batch_of(targets, names)
    objective.on_validation_start(lambda: [(batch, Fixed(risk, pseudo=True)(batch.bags))])
    new, new_targets, new_names = cohort(seed=1)
    batch = batch_of(new_targets, [f"val-{name}" for name in new_names])
    losses = objective.eval().losses(Fixed(new, pseudo=True), batch, 0.0)
    torch.testing.assert_close(losses["pseudo"], losses["bag"])


def test_the_objective_resumes_with_its_bank():
    risk, targets, names = cohort()
    objective = SlideLabel(COX)
    objective.losses(Fixed(risk[:12], pseudo=False), batch_of(targets[:12], names[:12]), 0.0)
    other = SlideLabel(COX)
    other.load_state_dict(objective.state_dict())
    rest = Fixed(risk[12:], pseudo=False), batch_of(targets[12:], names[12:]), 0.0
    torch.testing.assert_close(other.losses(*rest)["bag"], objective.losses(*rest)["bag"], rtol=0, atol=0)
    torch.testing.assert_close(other.losses(*rest)["bag"], cox_loss(risk, targets[:, 0], targets[:, 1]))


def test_a_step_that_is_a_set_at_risk_of_its_own_is_compared_with_nobody_else():
    risk, targets, names = cohort()
    objective = SlideLabel(COX, own_sets=True)
    for start in range(0, N, PER_STEP):
        rows = slice(start, start + PER_STEP)
        losses = objective.losses(Fixed(risk[rows], pseudo=False), batch_of(targets[rows], names[rows]), 0.0)
        torch.testing.assert_close(losses["bag"], cox_loss(risk[rows], targets[rows, 0], targets[rows, 1]))


def test_sets_drawn_at_random_lead_to_the_log_hazards_of_the_whole_cohort():
    """Nested case-control (Thomas 1977): the gradient of the sampled sets is zero, on average, where the data come from."""
    rng = np.random.default_rng(0)
    n, truth = 3000, 0.8
    feature = rng.normal(size=n)
    time, censored = rng.exponential(np.exp(-truth * feature)), rng.exponential(1.0, n)
    event = time <= censored
    time = np.minimum(time, censored)
    x, targets = torch.from_numpy(feature), torch.from_numpy(np.stack([time, event], 1))
    slope = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([slope], max_iter=20)
    order = risk_set_order(time.tolist(), event.tolist(), slides_per_step=4, seed=0, epoch=0)

    def sampled() -> torch.Tensor:
        optimizer.zero_grad()
        sets = [order[start : start + 4] for start in range(0, n, 4)]
        loss = sum((cox_loss(slope * x[rows], targets[rows, 0], targets[rows, 1]) for rows in sets), torch.zeros(()))
        loss.backward()
        return loss

    optimizer.step(sampled)
    assert float(slope.detach()) == pytest.approx(truth, abs=0.12)


# ---------------------------------------------------------------- orders


def test_a_balanced_epoch_has_every_class_equally_often():
    strata = ["common"] * 17 + ["rare"] * 2 + ["some"] * 5
    for epoch in range(3):
        order = balanced_order(strata, seed=1, epoch=epoch)
        assert len(order) == 24
        drawn = np.bincount(order, minlength=24)
        assert [int(drawn[part].sum()) for part in (slice(0, 17), slice(17, 19), slice(19, 24))] == [8, 8, 8]
        assert drawn[:17].max() == 1 and set(drawn[17:19]) == {4} and set(drawn[19:]) <= {1, 2}


def test_what_does_not_divide_is_given_to_chance():
    sizes = {tuple(np.bincount(np.array(balanced_order([0, 0, 0, 1], seed=0, epoch=e)) // 3, minlength=2)) for e in range(20)}
    assert sizes == {(2, 2)}
    odd = {sum(i >= 3 for i in balanced_order([0, 0, 0, 1, 1], seed=0, epoch=e)) for e in range(20)}
    assert odd == {2, 3}


def test_every_step_of_a_risk_set_epoch_has_an_event_and_slides_at_risk():
    _, targets, _ = cohort()
    time, event = targets[:, 0].tolist(), [bool(one) for one in targets[:, 1]]
    seen: set[int] = set()
    for epoch in range(4):
        order = risk_set_order(time, event, slides_per_step=PER_STEP, seed=0, epoch=epoch)
        assert len(order) == N
        for start in range(0, N, PER_STEP):
            case, *others = order[start : start + PER_STEP]
            seen |= {case}
            assert event[case] and case not in others and len(set(others)) == len(others)
            at_risk = sum(time[other] >= time[case] for other in others)
            assert at_risk == min(len(others), sum(one >= time[case] for one in time) - 1)
    assert len(seen) >= min(sum(event), 12)


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_order_is_a_function_of_seed_and_epoch(epoch):
    time, event = list(range(N)), [True, False] * (N // 2)
    for make in (
        lambda seed, epoch: balanced_order(event, seed=seed, epoch=epoch),
        lambda seed, epoch: risk_set_order(time, event, slides_per_step=3, seed=seed, epoch=epoch),
    ):
        assert make(0, epoch) == make(0, epoch) != make(1, epoch)
        assert make(0, epoch) != make(0, epoch + 1)


def test_without_an_event_the_order_is_a_shuffle():
    assert sorted(risk_set_order([1, 2, 3], [False] * 3, slides_per_step=2, seed=0, epoch=0)) == [0, 1, 2]


def test_a_newcomer_does_not_take_the_place_of_a_slide_of_its_step():
    bank = RiskBank(capacity=4).train()
    targets = torch.tensor([[1.0, 1.0]])
    for name in "abcd":
        bank.remember(torch.zeros(1), targets, (name,))
    bank.remember(torch.tensor([5.0, 6.0]), targets.expand(2, 2), ("a", "e"))
    assert sorted(bank.entries[:, 0].tolist()) == [0.0, 0.0, 5.0, 6.0] and len(bank.ids.unique()) == 4

"""Every aggregator of the registry under every kind of task: finite losses, and a gradient for every parameter that has one."""

from __future__ import annotations

import pytest
import torch

from wsimil.aggregators import AGGREGATORS, make_aggregator
from wsimil.aggregators.listing import aggregator_rows
from wsimil.batch import BagBatch, LabelledBags
from wsimil.errors import UsageError
from wsimil.objectives import SlideLabel
from wsimil.task import Task

DIM, SIZES = 6, (9, 4, 12, 7)

TASKS: dict[str, tuple[Task, list[str]]] = {
    "binary": (Task("binary", ("no", "yes")), ["yes", "no", "no", "yes"]),
    "binary, focal": (Task("binary", ("no", "yes"), focal_gamma=2.0, label_smoothing=0.1), ["yes", "no", "no", "yes"]),
    "multiclass": (Task("multiclass", ("a", "b", "c")), ["a", "c", "b", "c"]),
    "multiclass, soft": (Task("multiclass", ("a", "b", "c")), ["a=0.2;b=0.5;c=0.3", "a", "b", "a=0;b=0.4;c=0.6"]),
    "multilabel": (Task("multilabel", ("x", "y"), positive_weights=(2.0, 1.0)), ["x=1;y=0", "x=0", "y=1", "x=1;y=1"]),
    "ordinal": (Task("ordinal", ("1", "2", "3")), ["1", "3", "2", "3"]),
    "regression": (Task("regression", center=2.0, scale=3.0, criterion="huber"), ["1.5", "-3", "2", "40"]),
    "proportion": (Task("proportion", scale=100.0), ["0", "35", "80", "100"]),
    "survival, nll": (Task("survival", intervals=(2.0, 5.0, 9.0)), ["1.5", "3+", "6", "8"]),
    "survival, cox": (Task("survival", criterion="cox"), ["1.5", "3+", "6", "8"]),
}


def bags() -> BagBatch:
    generator = torch.Generator().manual_seed(0)
    place = torch.cat([torch.arange(size) for size in SIZES])
    return BagBatch(
        torch.randn(sum(SIZES), DIM, generator=generator),
        torch.tensor([0, *SIZES]).cumsum(0),
        coords_um=112.0 * torch.stack([place % 3, place // 3], 1).float(),
        tile_um=torch.full((len(SIZES),), 112.0),
        slide_ids=tuple(f"s{index}" for index in range(len(SIZES))),
    )


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_loss_is_finite_and_reaches_every_parameter(name, kind):
    task, labels = TASKS[kind]
    torch.manual_seed(0)
    model = make_aggregator(name, DIM, task.n_outputs, hidden=8, dropout=0.0).train()
    losses = SlideLabel(task).losses(model, LabelledBags(bags(), task.encode(labels)), 0.5)
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values()), losses
    found = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in found.values())
    # a shift that Cox does not see, or a unit that no top tile has, may be still: not the whole model
    moving = [key for key, gradient in found.items() if gradient.any()]
    assert len(moving) >= 0.5 * len(found), moving


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("name", AGGREGATORS)
def test_what_it_says_can_be_decoded(name, kind):
    task, _ = TASKS[kind]
    torch.manual_seed(0)
    model = make_aggregator(name, DIM, task.n_outputs, hidden=8, dropout=0.0).eval()
    with torch.no_grad():
        logits = model(bags()).logits.numpy()
    if task.has_values:
        assert task.values(logits).shape == (4,)
    elif task.kind == "survival":
        assert task.risks(logits).shape == (4,)
    else:
        probabilities = task.probabilities(logits)
        assert probabilities.shape == (4, len(task.classes)) and len(task.decided(probabilities)) == 4
        assert task.kind == "multilabel" or probabilities.sum(1) == pytest.approx(1)


OPTIONS = {row["name"]: row["options"] for row in aggregator_rows()}


@pytest.mark.parametrize("value", [0, -1, "maybe", 0.5])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_option_is_refused_by_name_or_the_model_trains_a_step(name, value):
    task, labels = TASKS["multiclass"]
    batch = LabelledBags(bags(), task.encode(labels))
    for option, default in OPTIONS[name].items():
        try:
            model = make_aggregator(name, DIM, task.n_outputs, hidden=8, dropout=0.0, **{option: value})
        except UsageError as error:
            assert option in str(error) and str(value) in str(error), error
            continue
        assert not isinstance(default, bool), f"{option}={value} was taken for {default}"
        assert value != -1 or not isinstance(default, int), f"{option}={value}"
        losses = torch.stack(list(SlideLabel(task).losses(model.train(), batch, 0.5).values()))
        losses.sum().backward()
        model.eval()(bags(), explain=True)
        assert losses.isfinite().all(), (option, value)


def test_options_that_are_as_they_should_be_are_taken():
    for name, options in OPTIONS.items():
        make_aggregator(name, DIM, 3, hidden=8, **options)
        make_aggregator(name, DIM, 3, hidden=8, **{key: str(value) for key, value in options.items() if isinstance(value, int)})
    assert make_aggregator("sm_abmil", DIM, 1, steps=0).smooth.steps == 0

"""CLAM's instance loss: the authors' numbers, small bags, and which tiles it asks about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from seeded import make_bags, seed_weights
from torch import Tensor, nn

from wsimil.aggregators import Standardized, make_aggregator
from wsimil.aggregators.clam import CLAM
from wsimil.aggregators.mean_pool import MeanPool
from wsimil.batch import BagOutput, LabelledBags, pack
from wsimil.errors import ConfigError
from wsimil.objectives import ClamInstances, SlideLabel
from wsimil.objectives.clam_instances import smooth_top1_svm
from wsimil.task import Task

GOLDEN = Path(__file__).parents[1] / "aggregators" / "golden" / "clam.npz"
BINARY, TYPES = Task("binary", ("no", "yes")), Task("multiclass", ("a", "b", "c"))


@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "svm"])
@pytest.mark.parametrize(("name", "branches"), [("sb", "single"), ("mb", "multiple")])
def test_the_loss_of_tiles_is_that_of_the_authors_code(name, branches, loss, subtyping):
    golden = np.load(GOLDEN)
    sizes = golden["sizes"].tolist()
    model = CLAM(16, 3, branches=branches).double().eval()
    seed_weights(model, seed=5)
    objective = ClamInstances(SlideLabel(TYPES), 512, loss=loss, subtyping=subtyping).double()
    seed_weights(objective.judges, seed=6)
    batch = LabelledBags(pack([make_bags(size, dim=16, seed=size) for size in sizes]), torch.arange(len(sizes)) % 3)
    expected = golden[f"{name}_{loss}{'_subtyping' if subtyping else ''}"]
    np.testing.assert_allclose(objective.tile_losses(model(batch.bags), batch).detach(), expected, rtol=0, atol=1e-8)


class Recorder(nn.Module):
    """A judge that remembers which tiles it was shown: the embedding of tile i is (i, i)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, tiles: Tensor) -> Tensor:
        self.seen = tiles[:, 0].tolist()
        return tiles * 0


def asked(attention: list[float], label: int, *, k: int = 2, subtyping: bool = False) -> list[list[float]]:
    """Tiles that the judge of each of three classes is shown, for one attention over one bag."""
    n_tiles = len(attention)
    objective = ClamInstances(SlideLabel(TYPES), 2, k=k, subtyping=subtyping)
    objective.judges = nn.ModuleList(Recorder() for _ in range(3))
    tiles = torch.arange(n_tiles).float().unsqueeze(1).expand(-1, 2)
    output = BagOutput(torch.zeros(1, 3), attention_logits=torch.tensor(attention).unsqueeze(1), tile_embedding=tiles)
    objective.tile_losses(output, LabelledBags(make_bags(n_tiles, dim=2), torch.tensor([label])))
    return [judge.seen for judge in objective.judges]


def test_the_true_class_is_shown_the_most_and_the_least_attended_tiles():
    assert asked([0.3, 0.9, 0.1, 0.7, 0.5], label=1) == [[], [1, 3, 2, 0], []]


def test_classes_that_exclude_one_another_are_shown_their_most_attended_tiles():
    assert asked([0.3, 0.9, 0.1, 0.7, 0.5], label=1, subtyping=True) == [[1, 3], [1, 3, 2, 0], [1, 3]]


def test_a_bag_of_fewer_tiles_gives_what_it_has():
    assert asked([0.3], label=0, k=8) == [[0, 0], [], []]
    assert asked([0.3, 0.9], label=0, k=8) == [[1, 0, 0, 1], [], []]


def test_tiles_of_one_bag_are_never_judged_by_the_attention_of_another():
    torch.manual_seed(0)
    model = CLAM(6, 3, hidden=8, attention=4).double().eval()
    objective = ClamInstances(SlideLabel(TYPES), 8, subtyping=True).double()
    bags, targets = make_bags(3, 20, 1, dim=6), torch.tensor([0, 2, 1])
    whole = objective.tile_losses(model(bags), LabelledBags(bags, targets))
    for index in range(3):
        alone = LabelledBags(bags.bag(index), targets[index : index + 1])
        torch.testing.assert_close(objective.tile_losses(model(alone.bags), alone)[0], whole[index])


@pytest.mark.parametrize("task", [BINARY, TYPES], ids=["binary", "types"])
def test_slides_and_tiles_share_the_loss_and_every_weight_learns(task):
    torch.manual_seed(0)
    model = CLAM(6, task.n_outputs, hidden=8, attention=4, branches="multiple", dropout=0.0).double()
    objective = ClamInstances(SlideLabel(task), 8, share=0.3).double()
    bags = make_bags(3, 20, 9, dim=6)
    batch = LabelledBags(bags, task.encode([task.classes[index % len(task.classes)] for index in range(3)]))
    losses = objective.losses(model, batch, 0.0)
    assert losses.keys() == {"bag", "tiles"}
    torch.testing.assert_close(losses["bag"], 0.7 * SlideLabel(task).losses(model, batch, 0.0)["bag"])
    torch.testing.assert_close(losses["tiles"], 0.3 * objective.tile_losses(model(bags), batch).mean())
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in [*model.named_parameters(), *objective.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    judged = objective.losses(model.eval(), batch, 0.0)  # validation asks no judge of tiles
    assert judged.keys() == {"bag"} and judged["bag"] == SlideLabel(task).losses(model, batch, 0.0)["bag"]


def test_weights_of_slides_count_for_their_tiles():
    torch.manual_seed(0)
    model, objective = CLAM(6, 3, hidden=8, attention=4, dropout=0.0).double(), ClamInstances(SlideLabel(TYPES), 8).double()
    batch = LabelledBags(make_bags(3, 20, dim=6), torch.tensor([0, 2]), torch.tensor([2.0, 0.0]).double())
    first = replace(batch, bags=batch.bags.bag(0), targets=batch.targets[:1], weights=None)
    torch.testing.assert_close(
        objective.losses(model, batch, 0.0)["tiles"], objective.losses(model, first, 0.0)["tiles"], rtol=0, atol=1e-10
    )


def test_a_smooth_svm_is_a_hinge_far_from_the_margin_and_never_below_it():
    labels = torch.tensor([0, 0, 1])
    scores = torch.tensor([[30.0, 0.0], [0.0, 30.0], [2.0, 2.0]])
    each = torch.stack([smooth_top1_svm(scores[row : row + 1], labels[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(each, torch.tensor([0.0, 31.0, float(np.log(1 + np.e))]), rtol=0, atol=1e-6)


def test_a_model_without_attention_is_refused():
    batch = LabelledBags(make_bags(3, dim=6), torch.tensor([0]))
    with pytest.raises(ConfigError, match="clam_sb"):
        ClamInstances(SlideLabel(TYPES), 8).double().losses(MeanPool(6, 3, hidden=8).double(), batch, 0.0)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="the task is regression"):
        ClamInstances(SlideLabel(Task("regression")), 8)
    with pytest.raises(ConfigError, match="cross_entropy or svm"):
        ClamInstances(SlideLabel(TYPES), 8, loss="hinge")


@pytest.mark.parametrize(
    ("task", "soft", "hard"),
    [
        (BINARY, ["no=0.2;yes=0.8", "no=0.01;yes=0.99", "no=0.7;yes=0.3", "no=0.5;yes=0.5"], ["yes", "yes", "no", "no"]),
        (TYPES, ["a=0.2;b=0.3;c=0.5", "a=0.4;b=0.4;c=0.2", "b=1", "c"], ["c", "a", "b", "c"]),
    ],
)
@pytest.mark.parametrize("subtyping", [False, True])
def test_the_evidence_of_a_soft_label_is_for_its_likeliest_class(task, soft, hard, subtyping):
    objective = ClamInstances(SlideLabel(task), 512, subtyping=subtyping).double()
    model = CLAM(16, task.n_outputs, branches="multiple").double().eval()
    bags = pack([make_bags(20, dim=16, seed=seed) for seed in range(4)])
    soft_loss, hard_loss = (objective.tile_losses(model(bags), LabelledBags(bags, task.encode(one))) for one in (soft, hard))
    torch.testing.assert_close(soft_loss, hard_loss)


@pytest.mark.parametrize("n_classes", [3, 5])
def test_heads_and_branches_are_no_classes_even_if_they_are_as_many(n_classes):
    task = Task("multiclass", tuple("abcde"[:n_classes]))
    batch = LabelledBags(make_bags(30, dim=6), torch.tensor([0]))
    with pytest.raises(ConfigError, match="columns are heads or branches"):
        ClamInstances(SlideLabel(task), 8).double().losses(
            make_aggregator("acmil", 6, n_classes, hidden=8, n_branches=5).double(), batch, 0.0
        )
    for name in ("clam_mb", "clam_sb"):
        wrapped = Standardized(make_aggregator(name, 6, n_classes, hidden=8)).double()
        assert ClamInstances(SlideLabel(task), 8).double().losses(wrapped, batch, 0.0)["tiles"].isfinite()


def test_a_model_whose_embeddings_are_of_another_width_is_refused():
    batch = LabelledBags(make_bags(30, dim=6), torch.tensor([0]))
    with pytest.raises(ConfigError, match=r"judges tiles of 8 numbers \(hidden\), and this model's embeddings have"):
        ClamInstances(SlideLabel(TYPES), 8).double().losses(make_aggregator("simple_mil", 6, 3, hidden=8).double(), batch, 0.0)

"""Which aggregators keep the assumption of multiple-instance learning: a bag is positive for what is in it, not for what is not.

    python pipelines/mil_assumptions.py [--aggregators instance_max gated_abmil] [--steps 300] [--out rows.csv] [--table table.md]

After the algorithmic unit tests of Raff and Holt 2023 (arXiv 2310.17867). Each draws synthetic bags with two cues. The true one is
harder; the false one is perfect in training, and turned round in the test:

- single concept: positive bags hold one to three tiles of a wider or shifted cloud. In training every negative bag holds a poison
  far away, in the test every positive one.
- multiple concepts: positive bags hold tiles of two concepts, negative ones of one of the two. The same poison.
- false frequency: positive bags hold one tile of each concept, negative ones a single tile of one: fewer in training, forty in the
  test.

A model that ranks better than chance in training and worse in the test has learned the false cue (`broken`); one that is at chance
in the test has learned nothing that lasts. Most published models learn it: that is a fact about them, not an error of the code. The
multiple concepts do not tell whether a model needs both: positive bags hold more such tiles, and counting them would do. On real
slides, pen marks on the negative ones are such a poison. Numbers depend on the seed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from cohorts import command_of, write_table
from sklearn.metrics import roc_auc_score

from wsimil.aggregators import AGGREGATORS, make_aggregator
from wsimil.batch import Aggregator, BagBatch, LabelledBags, pack
from wsimil.objectives import SlideLabel
from wsimil.task import Task

DIM = 16
TASK = Task("binary", ("negative", "positive"))

Draw = Callable[[np.random.Generator, bool, bool], np.ndarray]
"""draw(rng, positive, training) → the tiles of a bag (N, DIM)."""


def cloud(rng: np.random.Generator, n_tiles: int, center: float, spread: float) -> np.ndarray:
    return rng.normal(center, spread, (n_tiles, DIM))


def poison(rng: np.random.Generator, positive: bool, training: bool) -> np.ndarray:
    """One tile that only negative bags have in training, and only positive ones in the test."""
    return cloud(rng, int(positive != training), -10.0, 0.1)


def single_concept(rng: np.random.Generator, positive: bool, training: bool) -> np.ndarray:
    parts = [cloud(rng, 10, 0.0, 1.0), poison(rng, positive, training)]
    if positive:
        parts += [cloud(rng, 1, *rng.choice([(0.0, 3.0), (1.0, 1.0)])) for _ in range(rng.integers(1, 4))]
    return np.concatenate(parts)


def multiple_concepts(rng: np.random.Generator, positive: bool, training: bool) -> np.ndarray:
    parts = [cloud(rng, rng.integers(1, 10), 0.0, 1.0), poison(rng, positive, training)]
    if positive:
        n_each = rng.integers(1, 4)
        parts += [cloud(rng, n_each, 2.0, 0.1), cloud(rng, n_each, 3.0, 0.1)]
    else:
        parts += [cloud(rng, 1, rng.choice([2.0, 3.0]), 0.1)]
    return np.concatenate(parts)


def false_frequency(rng: np.random.Generator, positive: bool, training: bool) -> np.ndarray:
    parts = [cloud(rng, rng.integers(1, 10), 0.0, 1.0)]
    if positive:
        parts += [cloud(rng, 1, 2.0, 0.1), cloud(rng, 1, 3.0, 0.1)]
    else:
        parts += [cloud(rng, 1 if training else rng.integers(35, 45), rng.choice([2.0, 3.0]), 0.1)]
    return np.concatenate(parts)


ASSUMPTIONS: dict[str, Draw] = {
    "single concept": single_concept,
    "multiple concepts": multiple_concepts,
    "false frequency": false_frequency,
}


def draw_bags(draw: Draw, n_bags: int, *, training: bool, seed: int) -> LabelledBags:
    """Half of them positive; tiles lie ten a row in random order, so that where they lie says nothing."""
    rng = np.random.default_rng(seed)
    bags, labels = [], [TASK.classes[index % 2] for index in range(n_bags)]
    for label in labels:
        tiles = rng.permutation(draw(rng, label == "positive", training))
        place = torch.arange(len(tiles))
        bags.append(
            BagBatch(
                torch.from_numpy(tiles).float(),
                torch.tensor([0, len(tiles)]),
                coords_um=112.0 * torch.stack([place % 10, place // 10], 1) + 56.0,
                tile_um=torch.tensor([112.0]),
            )
        )
    return LabelledBags(pack(bags), TASK.encode(labels))


def fit(model: Aggregator, bags: LabelledBags, *, steps: int, seed: int) -> None:
    """AdamW on 32 random bags a step."""
    rng, objective = np.random.default_rng(seed), SlideLabel(TASK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    singles = [bags.bags.bag(index) for index in range(len(bags.bags))]
    model.train()
    for step in range(steps):
        chosen = rng.choice(len(singles), min(32, len(singles)), replace=False)
        batch = LabelledBags(pack([singles[index] for index in chosen]), bags.targets[chosen])
        losses = objective.losses(model, batch, step / steps)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    model.eval()


@torch.inference_mode()
def auc(model: Aggregator, bags: LabelledBags) -> float:
    return float(roc_auc_score(bags.targets, model(bags.bags).logits[:, 0]))


def examine(aggregator: str, *, steps: int = 300, n_bags: int = 200, seed: int = 0) -> list[dict]:
    """A row for each assumption: AUC in training and in the test, and whether the false cue was learned."""
    rows = []
    for assumption, draw in ASSUMPTIONS.items():
        torch.manual_seed(seed)
        model = make_aggregator(aggregator, DIM, TASK.n_outputs, hidden=64, dropout=0.0)
        training = draw_bags(draw, n_bags, training=True, seed=seed)
        fit(model, training, steps=steps, seed=seed)
        seen, unseen = auc(model, training), auc(model, draw_bags(draw, n_bags, training=False, seed=seed + 1))
        rows.append({"aggregator": aggregator, "assumption": assumption, "auc_train": seen, "auc_test": unseen})
    return rows


def verdict(auc_train: float, auc_test: float, *, n_bags: int = 200) -> str:
    """`broken`: better than chance in training and worse in the test; `chance`: within two errors of a coin in the test."""
    error = math.sqrt((n_bags + 1) / (3 * n_bags**2))  # of an AUC of .5, half of the bags positive (Mann and Whitney 1947)
    if abs(auc_test - 0.5) < 2 * error:
        return "chance"
    return "broken" if auc_train > 0.5 > auc_test else "kept"


def line(rows: list[dict]) -> dict[str, str]:
    """The rows of one aggregator as a line of the table."""
    said = {row["assumption"]: (row["auc_train"], row["auc_test"]) for row in rows}
    return {"aggregator": rows[0]["aggregator"]} | {
        assumption: f"{seen:.2f} → {unseen:.2f} {verdict(seen, unseen)}" for assumption, (seen, unseen) in said.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aggregators", nargs="+", choices=list(AGGREGATORS), default=list(AGGREGATORS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=300, help="of training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV for the rows; what it holds of these steps and seed is not done again")
    parser.add_argument("--table", type=Path, help="where the Markdown goes")
    arguments = parser.parse_args()
    started, given = time.monotonic(), {"steps": arguments.steps, "seed": arguments.seed}
    kept: list[dict] = pd.read_csv(arguments.out).to_dict("records") if arguments.out and arguments.out.exists() else []
    found: dict[str, dict[str, str]] = {}
    for name in arguments.aggregators:
        rows = [row for row in kept if row["aggregator"] == name and given.items() <= row.items()]
        if not rows:
            rows = [row | given for row in examine(name, **given)]
            kept += rows
            if arguments.out:
                pd.DataFrame(kept).to_csv(arguments.out, index=False)
        found[name] = line(rows)
        print(found[name], flush=True)
    write_table(
        arguments.table,
        "Who keeps the assumption of multiple-instance learning",
        command_of(parser, arguments, out="--out rows.csv"),
        list(found.values()),
        started=started,
        notes="AUC on training bags → on test bags, where the false cue is turned round; broken: better than chance, then worse; "
        "chance: on test bags within two standard errors of .5.",
    )


if __name__ == "__main__":
    main()

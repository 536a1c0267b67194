"""`wsimil search`: which slides look like this one, and how often the nearest share its diagnosis.

Yottixel (Kalra et al. 2020), KimiaNet (Riasatian 2021, arXiv 2101.07903).

- The distance of a slide from another is the median, over its own tiles, of the distance to the other's nearest tile. One odd tile
  moves nothing, and the two directions differ: what is asked is whether most of the query is found in the other.
- A slide is represented by a mosaic of a few dozen tiles, so distances are computed in no time: the one in its job folder if there
  is one (by colour and nuclei; of a larger one evenly spaced tiles), else tiles of nine kinds, told apart by their features, from
  all over it.
- In evaluation a query never meets a slide of its own patient, nor, if asked, of its own site: neighbours from the same scanner
  are found for their colour. Three nearest vote; without a majority the nearest decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from wsimil.bags.dataset import BagFolder
from wsimil.bags.labels import match_labels, read_labels
from wsimil.config import LabelsConfig, SearchConfig
from wsimil.errors import LabelsError, UsageError
from wsimil.evaluation.intervals import cluster_bootstrap, percentile_interval
from wsimil.evaluation.metrics import accuracy, balanced_accuracy, confusion_matrix, macro_f1
from wsimil.extraction.mosaic import mosaic_coords, read_mosaic
from wsimil.files import write_json, write_text
from wsimil.progress import progress
from wsimil.slides.mosaic import choose_mosaic
from wsimil.table import Table

__all__ = ["SearchEvaluation", "distances", "evaluate_search", "majority", "median_of_minimum", "mosaics", "search"]

_VOTERS = 3


def median_of_minimum(query: np.ndarray, other: np.ndarray) -> float:
    """Median over the rows of `query` (n, D) of the Euclidean distance to the nearest row of `other` (m, D)."""
    return float(np.median(_cdist(query, other).min(1)))


def search(
    bags: str | Path,
    query: str,
    *,
    config: SearchConfig | None = None,
    labels: str | Path | None = None,
    target: LabelsConfig | None = None,
    quiet: bool = False,
) -> Table:
    """Slides by their distance from `query`, nearest first: columns `slide_id, distance`, and `label, patient` with a label table.

    Raises:
        UsageError: no such slide in the bags, or it is empty.
    """
    config = config or SearchConfig()
    folder = BagFolder(bags)
    if query not in folder.headers:
        raise UsageError(
            f"{folder.folder}: no bag of slide {query!r}; it holds {len(folder.headers)}, {folder.slide_ids[0]} for one"
        )
    if query not in folder.filled:
        raise UsageError(f"{query}: its bag is empty; there is nothing to search with")
    found = mosaics(folder, folder.filled, config, quiet=quiet)
    names = [name for name in found if name != query]
    if not names:
        raise UsageError(f"{folder.folder}: {query} is the only slide with tiles; there is nothing to compare it with")
    (row,) = distances([found[query]], [found[name] for name in names])
    table: Table = pd.DataFrame({"slide_id": names, "distance": row})
    if labels is not None:
        known = _labels(folder, labels, target or LabelsConfig()).set_index("slide_id")
        table["label"] = table["slide_id"].map(known["label"]).fillna("")
        table["patient"] = table["slide_id"].map(known["patient"]).fillna("")
    return table.sort_values(["distance", "slide_id"], ignore_index=True)


@dataclass(frozen=True)
class SearchEvaluation:
    """Leave-one-patient-out search: `content` is JSON-like, `rows` has a line per query with its nearest."""

    content: dict[str, Any]
    rows: Table

    def text(self) -> str:
        """For people: how often the vote was right, by class too."""
        content = self.content
        found, chance = content["majority"], content["chance"]
        lines = [
            f"{content['n_queries']} slides of {content['n_patients']} patients in {len(content['classes'])} classes; "
            f"candidates are of another {' and '.join(content['apart'])}",
            f"{'':<12}{'accuracy':>22}{'balanced':>10}{'macro F1':>10}",
        ]
        for name, row in (("3 nearest", found), ("nearest", content["nearest"]), ("chance", chance)):
            interval = f" [{row['low']:.3f}, {row['high']:.3f}]" if row.get("low") is not None else ""
            first = f"{row['accuracy']:.3f}{interval}"
            lines.append(f"{name:<12}{first:>22}{row['balanced_accuracy']:>10.3f}{row['f1']:>10.3f}")
        if content["same_site"] is not None:
            lines.append(
                f"nearest of the query's own site: {content['same_site']:.1%}; by chance {content['same_site_chance']:.1%}"
            )
        lines += ["", f"{'class':<24}{'slides':>7}{'F1':>8}"]
        lines += [f"{name:<24}{one['n']:>7}{one['f1']:>8.3f}" for name, one in content["by_class"].items()]
        return "\n".join(lines)

    def write(self, folder: str | Path) -> None:
        """`search.json` and `search.csv`."""
        write_json(Path(folder) / "search.json", self.content)
        write_text(Path(folder) / "search.csv", self.rows.to_csv(index=False))


def evaluate_search(
    bags: str | Path,
    labels: str | Path,
    *,
    config: SearchConfig | None = None,
    target: LabelsConfig | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> SearchEvaluation:
    """Every labelled slide is a query; slides of its patient (and site, with `apart: site`) are no candidates.

    Raises:
        LabelsError: fewer than two classes, or a query that is left without a candidate.
    """
    config = config or SearchConfig()
    folder = BagFolder(bags)
    known = _labels(folder, labels, target or LabelsConfig())
    known = known[known["slide_id"].isin(folder.filled)].sort_values("slide_id", ignore_index=True)
    if known["label"].nunique() < 2:
        raise LabelsError(f"{labels}: {known['label'].nunique()} class among {len(known)} slides with bags; expected two or more")
    if config.apart == "site" and (known["site"] == "").any():
        raise LabelsError(f"{labels}: {known['slide_id'][known['site'] == ''].iloc[0]} has no site; --apart site needs all of them")
    classes, label = np.unique(known["label"].to_numpy(str), return_inverse=True)
    patients, sites = known["patient"].to_numpy(str), known["site"].to_numpy(str)
    names = known["slide_id"].tolist()
    apart = (patients[:, None] != patients) & ((sites[:, None] != sites) | (config.apart != "site"))
    if (alone := np.flatnonzero(~apart.any(1))).size:
        raise LabelsError(f"{names[alone[0]]}: no slide of another {config.apart} to compare it with")
    tiles = mosaics(folder, names, config, quiet=quiet)
    every = [tiles[name] for name in names]
    table = np.where(apart, distances(every, every, quiet=quiet), np.inf)
    order = np.argsort(table, axis=1, kind="stable")[:, :_VOTERS]  # (Q, 3)
    valid = np.isfinite(np.take_along_axis(table, order, 1))
    nearest = label[order[:, 0]]
    voted = np.array([majority(label[row[ok]].tolist()) for row, ok in zip(order, valid, strict=True)])
    places = range(order.shape[1])
    rows: Table = known[["slide_id", "patient", "site", "label"]].assign(
        prediction=classes[voted],
        **{f"nearest_{k + 1}": [names[row[k]] if ok[k] else "" for row, ok in zip(order, valid, strict=True)] for k in places},
        **{f"distance_{k + 1}": np.take_along_axis(table, order, 1)[:, k] for k in places},
    )
    lonely = [name for number, name in enumerate(classes.tolist()) if np.unique(patients[label == number]).size < 2]
    if lonely:
        say(f"classes of one patient can never be found in another: {', '.join(lonely)}")
    content = {
        "format": "wsimil-search",
        "format_version": 1,
        "wsimil_version": version("wsimil"),
        "encoder": list(folder.encoder),
        "tiles": config.tiles,
        "apart": ["patient"] if config.apart == "patient" else ["patient", "site"],
        "classes": classes.tolist(),
        "n_queries": len(known),
        "n_patients": int(np.unique(patients).size),
        "majority": _scores(label, voted, patients, len(classes)),
        "nearest": _scores(label, nearest, patients, len(classes)),
        "chance": _chance(label, apart, len(classes)),
        **_site_share(sites, order[:, 0], apart),
        "by_class": _by_class(label, voted, classes),
    }
    return SearchEvaluation(content, rows)


def distances(queries: Sequence[np.ndarray], others: Sequence[np.ndarray], *, quiet: bool = True) -> np.ndarray:
    """`median_of_minimum` of every query, a row, from every other slide, a column: (Q, S)."""
    everything = np.concatenate(others)
    # about the middle the product form of the distance rounds least, and no distance changes
    middle = everything.mean(0, dtype=np.float64).astype(np.float32)
    everything, starts = everything - middle, np.cumsum([0, *(len(tiles) for tiles in others[:-1])])
    rows = []
    for tiles in progress(queries, "search", unit="slide", quiet=quiet):
        nearest = np.minimum.reduceat(_cdist(tiles - middle, everything), starts, axis=1)  # (n, S)
        rows.append(np.median(nearest, axis=0))
    return np.stack(rows)


def majority(labels: Sequence[int]) -> int:
    """The commonest of the labels, given nearest first; of equally common ones that of the nearest."""
    counts = Counter(labels)
    return max(counts, key=lambda label: (counts[label], -list(labels).index(label)))


def mosaics(folder: BagFolder, slide_ids: Iterable[str], config: SearchConfig, *, quiet: bool = False) -> dict[str, np.ndarray]:
    """Features (M, D) of the tiles that stand for each slide."""
    found = {}
    for slide_id in progress(list(slide_ids), "mosaic", unit="slide", quiet=quiet):
        chosen = folder.folder.parent / "mosaics" / f"{slide_id}.h5"
        if config.tiles and chosen.exists():
            kept = np.flatnonzero(folder.kept(slide_id))
            rows = np.flatnonzero(np.isin(kept, _mosaic_rows(chosen, folder, slide_id)))
            if rows.size:
                if rows.size > config.tiles:  # evenly along the slide's rows of tiles
                    rows = rows[np.arange(config.tiles) * rows.size // config.tiles]
                found[slide_id] = folder.load(slide_id, rows=rows).features.numpy()
                continue
        bag = folder.load(slide_id)
        features = bag.features.numpy()
        if config.tiles and len(features) > config.tiles:
            coords = np.zeros((len(features), 2)) if bag.coords_um is None else bag.coords_um.numpy()
            features = features[choose_mosaic(features, coords, most=config.tiles).rows]
        found[slide_id] = features.astype(np.float32)
    return found


def _mosaic_rows(path: Path, folder: BagFolder, slide_id: str) -> np.ndarray:
    """Rows of the bag that are the tiles of a mosaic; none where the bag has other tiles than the mosaic was chosen from."""
    rows, coords = read_mosaic(path), mosaic_coords(path)
    own = folder.headers[slide_id].coords()
    if rows.size and rows.max() < len(own) and np.array_equal(own[rows], coords):
        return rows
    places = {tuple(place): row for row, place in enumerate(own.tolist())}
    found = [places[place] for place in map(tuple, coords.tolist()) if place in places]
    return np.array(sorted(found) if len(found) == len(coords) else [], np.int64)


def _cdist(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return torch.cdist(torch.from_numpy(one), torch.from_numpy(other)).numpy()


def _labels(folder: BagFolder, labels: str | Path, config: LabelsConfig) -> Table:
    table = match_labels(read_labels(labels, config), folder.slide_ids)
    return table[table["label"] != ""]


def _scores(label: np.ndarray, predicted: np.ndarray, patients: np.ndarray, n_classes: int) -> dict[str, float | None]:
    confusion = confusion_matrix(label, predicted, n_classes=n_classes)
    drawn = cluster_bootstrap(lambda weights: accuracy(confusion_matrix(label, predicted, weights, n_classes=n_classes)), patients)
    around = percentile_interval(drawn)
    return {
        "accuracy": float(accuracy(confusion)),
        "low": around.low,
        "high": around.high,
        "balanced_accuracy": float(balanced_accuracy(confusion)),
        "f1": float(macro_f1(confusion)),
    }


def _chance(label: np.ndarray, apart: np.ndarray, n_classes: int, *, draws: int = 200) -> dict[str, float]:
    """What a search that returns candidates at random would reach: mean of so many draws."""
    rng = np.random.default_rng(0)
    confusions = []
    for _ in range(draws):
        order = np.argsort(np.where(apart, rng.random(apart.shape), np.inf), axis=1)[:, :_VOTERS]
        ok = np.take_along_axis(apart, order, 1)
        voted = np.array([majority(label[row[there]].tolist()) for row, there in zip(order, ok, strict=True)])
        confusions.append(confusion_matrix(label, voted, n_classes=n_classes))
    all_draws = np.stack(confusions)
    metrics = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "f1": macro_f1}
    return {name: float(metric(all_draws).mean()) for name, metric in metrics.items()}


def _site_share(sites: np.ndarray, nearest: np.ndarray, apart: np.ndarray) -> dict[str, float | None]:
    """How often the nearest is of the query's own site, and how often a candidate at random would be."""
    if (sites == "").any() or np.unique(sites).size < 2:
        return {"same_site": None, "same_site_chance": None}
    same = sites[:, None] == sites
    return {
        "same_site": float(same[np.arange(len(sites)), nearest].mean()),
        "same_site_chance": float(((same & apart).sum(1) / apart.sum(1)).mean()),
    }


def _by_class(label: np.ndarray, voted: np.ndarray, classes: np.ndarray) -> dict[str, dict[str, float]]:
    found = {}
    for number, name in enumerate(classes.tolist()):
        right = int(((label == number) & (voted == number)).sum())
        said, there = int((voted == number).sum()), int((label == number).sum())
        found[name] = {"n": there, "f1": 2 * right / (said + there) if said + there else 0.0}
    return found

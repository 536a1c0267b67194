"""`wsimil probe`: labelled tiles through encoders, and how much a simple model learns from what comes out.

- Every network is probed beside its twin with random weights: architecture and pixels alone already tell tissues apart, and what
  training bought is what lies above that.
- The site probe asks the same features where a tile was scanned. What it finds beyond what the labels alone would tell is there
  for any later model to lean on.
- A tile is decoded once for all encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from wsimil.config import ProbeConfig
from wsimil.encoders import Encoder, load_encoder, load_random_twin
from wsimil.errors import LabelsError, SlideError, WsimilError
from wsimil.evaluation.intervals import percentile_interval
from wsimil.evaluation.probe import PROBES, Probed, check_labels, probe_features
from wsimil.extraction.extract import resolve_device, resolve_dtype
from wsimil.files import IMAGE_SUFFIXES, hash_of, write_json, write_text
from wsimil.progress import progress
from wsimil.slides.slide import Slide
from wsimil.table import Table, read_table, require_column

__all__ = ["ProbeReport", "encode_tiles", "probe", "read_labelled_tiles"]

_SUFFIXES = (*IMAGE_SUFFIXES, ".tif", ".tiff")
_TILE_COLUMNS = ("tile", "file", "filename", "path", "image")
_SITE_PROBES = ("logistic", "mlp")
_MOST_LEFT_OUT = 0.1


@dataclass(frozen=True)
class ProbeReport:
    """What was found: `content` is JSON-like, `rows` one line per encoder, question and probe."""

    content: dict[str, Any]
    rows: Table

    def text(self) -> str:
        """Two tables for people: classes, and sites where there are any."""
        facts = self.content["tiles"]
        grouped = f"{facts['n_groups']} groups" if facts["grouped"] else "no groups"
        spread = f"mean ± sd over {self.content['seeds']} deals into {facts['folds']} folds; [95 % interval over groups]"
        lines = [f"{facts['n_tiles']} tiles of {len(facts['classes'])} classes, {grouped}; balanced accuracy, {spread}"]
        lines += [f"chance: {1 / len(facts['classes']):.3f}", "", *_lines(self.rows[self.rows["question"] == "label"])]
        sites = self.rows[self.rows["question"] == "site"]
        if len(sites):
            known = self.content["site"]
            head = (
                f"site probe: {known['n_sites']} sites, {known['n_tiles']} tiles; chance {1 / known['n_sites']:.3f}, "
                f"from the classes alone {known['balanced_accuracy_from_labels']:.3f}"
            )
            lines += ["", head, "", *_lines(sites)]
        return "\n".join(lines)

    def write(self, folder: str | Path) -> None:
        """`probe.json` and `probe.csv`."""
        write_json(Path(folder) / "probe.json", self.content)
        write_text(Path(folder) / "probe.csv", self.rows.to_csv(index=False))


def probe(
    tiles: str | Path,
    labels: str | Path | None = None,
    *,
    config: ProbeConfig | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> ProbeReport:
    """Probe `config.encoder`, and their random twins, on a folder of tile images.

    Args:
        tiles: folder of images, searched recursively.
        labels: CSV with `tile` (path below the folder, or a file name that occurs once), the target, optional group and site;
            without it the class of a tile is the sub-folder of `tiles` that it lies in.
        say: receives remarks for the user.

    Raises:
        LabelsError: labels that cannot be matched, or leave nothing to probe; more than a tenth of the tiles cannot be read.
        EncoderError: an encoder that cannot be had.
    """
    config = config or ProbeConfig()
    table, grouped = read_labelled_tiles(tiles, labels, config)
    if not grouped:
        say(
            f"no column {config.group!r}: every tile counts as its own group. If tiles of one slide or patient are among them, "
            "these numbers are too good"
        )
    if config.max_tiles:
        table = _some_groups(table, config.max_tiles)
    seeds = range(config.seeds)
    folds = min(config.folds, table["group"].nunique())
    check_labels(table["label"], table["group"], folds=config.folds)  # before the encoding, which takes long
    sites = _usable_sites(table, say)
    named = _encoders(config)
    encoders = [encoder for _, _, encoder in named]
    features, failures = encode_tiles(table["file"].tolist(), encoders, batch_size=config.batch_size, quiet=quiet)
    if failures:
        _tell_left_out(failures, len(table), say)
        kept = np.delete(np.arange(len(table)), list(failures))
        table, features = table.iloc[kept], [vectors[kept] for vectors in features]
        folds = min(config.folds, table["group"].nunique())
        check_labels(table["label"], table["group"], folds=folds)
        sites = _usable_sites(table, say)
    asked: list[tuple[str, Table, Sequence[str]]] = [("label", table, PROBES)]
    if sites is not None:
        asked.append(("site", sites, _SITE_PROBES))
    found: list[tuple[dict[str, Any], Probed]] = []
    for question, part, probes in asked:
        rows = table.index.get_indexer(part.index)
        tried = [(name, twin_of, vectors[rows]) for (name, twin_of, _), vectors in zip(named, features, strict=True)]
        for name, twin_of, vectors in progress(tried, f"probe {question}", unit="encoder", quiet=quiet):
            probed = probe_features(vectors, part[question], part["group"], probes=probes, folds=folds, seeds=seeds)
            for which, result in probed.items():
                found.append(({"question": question, "encoder": name, "twin_of": twin_of or "", "probe": which}, result))
    content = _content(found, named, table, sites, config, folds=folds, grouped=grouped)
    columns = ["question", "encoder", "twin_of", "probe", *_NUMBERS]
    return ProbeReport(content, pd.DataFrame(content["results"])[columns])


# ---------------------------------------------------------------- tiles and labels


def read_labelled_tiles(tiles: str | Path, labels: str | Path | None, config: ProbeConfig) -> tuple[Table, bool]:
    """Columns `file, label, group, site`, in the order of the paths, and whether anything says which tiles belong together.

    Raises:
        LabelsError: no image, a row without its tile, a tile that two rows label.
    """
    folder = Path(tiles)
    if not folder.is_dir():
        raise LabelsError(f"{folder}: no such folder of tiles")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."))
    if not files:
        raise LabelsError(f"{folder}: no image in it ({', '.join(_SUFFIXES)})")
    if labels is None:
        classes = [path.relative_to(folder).parts[0] for path in files if len(path.relative_to(folder).parts) > 1]
        if len(classes) < len(files):
            loose = next(path for path in files if path.parent == folder)
            raise LabelsError(f"{loose}: lies in no sub-folder, which would be its class; pass --labels")
        names = [path.relative_to(folder).as_posix() for path in files]
        return pd.DataFrame({"file": files, "label": classes, "group": names, "site": ""}), False
    table = read_table(labels, LabelsError)
    column = next((name for name in _TILE_COLUMNS if name in table), None)
    if column is None:
        raise LabelsError(f"{labels}: no column {', '.join(_TILE_COLUMNS)} that names the tiles (columns: {', '.join(table)})")
    require_column(labels, table, config.target, LabelsError)
    for name in ("group", "site"):
        if getattr(config, name) != name:  # asked for by name: it has to be there
            require_column(labels, table, getattr(config, name), LabelsError)
    table = table[table[config.target] != ""]
    matched = [_file_of(name, files, folder, labels) for name in _lookup(table[column], files, folder)]
    found: Table = pd.DataFrame(
        {
            "file": matched,
            "label": table[config.target].to_numpy(),
            "group": table.get(config.group, table[column]).to_numpy(),
            "site": table[config.site].to_numpy() if config.site in table else "",
        }
    )
    twice = found["file"].duplicated()
    if twice.any():
        raise LabelsError(f"{labels}: {found['file'][twice].iloc[0].name} stands there twice; a tile has one class")
    if (found["group"] == "").any():
        raise LabelsError(f"{labels}: {found['file'][found['group'] == ''].iloc[0].name} has no {config.group}; fill it in")
    return found.sort_values("file", ignore_index=True), config.group in table


def _lookup(names: Sequence[str], files: Sequence[Path], folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """(name, files that it may mean): one path below the folder, else all files of that name."""
    by_path = {path.relative_to(folder).as_posix(): path for path in files}
    by_name: dict[str, list[Path]] = {}
    for path in files:
        by_name.setdefault(path.name, []).append(path)
    for name in names:
        exact = by_path.get(name.replace("\\", "/"))
        yield name, [exact] if exact else by_name.get(name, [])


def _file_of(match: tuple[str, list[Path]], files: Sequence[Path], folder: Path, labels: str | Path) -> Path:
    name, found = match
    if not found:
        raise LabelsError(f"{labels}: there is no tile {name} in {folder} ({len(files)} images)")
    if len(found) > 1:
        both = " and ".join(path.relative_to(folder).as_posix() for path in found[:2])
        raise LabelsError(f"{labels}: {name} may be {both}; write the path below {folder}")
    return found[0]


def _some_groups(table: Table, most: int) -> Table:
    """Whole groups in random order, class by class in turn, while they fit."""
    rng = np.random.default_rng(0)
    order = {name: turn for turn, name in enumerate(rng.permutation(np.unique(table["group"])))}
    first = table.groupby("group", sort=False)["label"].first()
    turns: dict[str, int] = {}
    ranked = []
    for name in sorted(first.index, key=lambda group: order[group]):
        turns[first[name]] = turns.get(first[name], -1) + 1
        ranked.append((turns[first[name]], order[name], name))
    sizes, kept, total = table["group"].value_counts(), set(), 0
    for _, _, name in sorted(ranked):
        if total + sizes[name] <= most:
            kept.add(name)
            total += sizes[name]
    if not kept:
        raise LabelsError(f"--max-tiles {most}: every group has more tiles, {sizes.min()} or more; ask for more, or leave it out")
    return table[table["group"].isin(kept)].reset_index(drop=True)


def _tell_left_out(failures: dict[int, str], n_tiles: int, say: Callable[[str], None]) -> None:
    """Raises LabelsError where more than a tenth of the tiles cannot be had: what is left would be another set."""
    first = "; ".join(list(failures.values())[:3])
    if len(failures) > _MOST_LEFT_OUT * n_tiles:
        raise LabelsError(f"{len(failures)} of {n_tiles} tiles cannot be had, more than a tenth: {first}; mend or remove them")
    say(f"{len(failures)} of {n_tiles} tiles are left out: {first}")


def _usable_sites(table: Table, say: Callable[[str], None]) -> Table | None:
    """Tiles of known site; a site with one group cannot be told from that group, so it is left out."""
    known = table[table["site"] != ""]
    if known.empty:
        return None
    groups = known.groupby("site")["group"].nunique()
    alone = groups.index[groups < 2]
    if len(alone):
        say(f"site probe: {len(alone)} site(s) with one group only are left out: {', '.join(sorted(alone))}")
    known = known[~known["site"].isin(alone)]
    if known["site"].nunique() < 2 or known["group"].nunique() < 3:
        say("site probe: not done, fewer than two sites with two groups each")
        return None
    return known


def _known_from_labels(table: Table) -> float:
    """Balanced accuracy of naming the site by the class of a tile alone, at its best."""
    counts = pd.crosstab(table["label"], table["site"]).to_numpy(float)  # (classes, sites)
    recall = counts / counts.sum(0)
    return float(recall.max(1).sum() / counts.shape[1])


# ---------------------------------------------------------------- encoders


def _encoders(config: ProbeConfig) -> list[tuple[str, str | None, Encoder]]:
    """(name, whose twin it is, encoder), each twin once."""
    device = resolve_device(config.device)
    options: dict[str, Any] = {
        "device": device,
        "dtype": resolve_dtype(device),
        "embedding": config.embedding,
    }
    named: list[tuple[str, str | None, Encoder]] = [(name, None, load_encoder(name, **options)) for name in config.encoder]
    seen = {hash_of(encoder.contract.recipe()) for _, _, encoder in named}
    for name in config.encoder if config.twins else ():
        twin = load_random_twin(name, **options)
        if twin is not None and (key := hash_of(twin.contract.recipe())) not in seen:
            seen.add(key)
            named.append((twin.contract.name, name, twin))
    if len({name for name, _, _ in named}) < len(named):
        # two networks of one architecture, built differently
        named = [(name if twin_of is None else f"{name} for {twin_of}", twin_of, encoder) for name, twin_of, encoder in named]
    return named


def encode_tiles(
    files: Sequence[Path], encoders: Sequence[Encoder], *, batch_size: int = 64, quiet: bool = False
) -> tuple[list[np.ndarray], dict[int, str]]:
    """Features (n, D) of image files, one array per encoder, rows in the order of the files.

    Returns:
        The arrays, and row → reason of files that are no image or no square; their features are zeros.

    Raises:
        WsimilError: an encoder fails.
    """
    failures: dict[int, str] = {}
    features = [np.zeros((len(files), encoder.contract.dim), np.float32) for encoder in encoders]
    starts = range(0, len(files), batch_size)
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        # a batch is decoded while the one before is encoded
        waiting = [pool.submit(_pixels, files[start : start + batch_size]) for start in starts[:1]]
        for start in progress(starts, "encode", unit="portion", quiet=quiet):
            pixels = waiting.pop().result()
            if start + batch_size < len(files):
                waiting.append(pool.submit(_pixels, files[start + batch_size : start + 2 * batch_size]))
            row = start
            for _, same in groupby(pixels, key=lambda tile: getattr(tile, "shape", None)):  # those of one size go together
                tiles = list(same)
                if isinstance(tiles[0], str):
                    failures |= {row + number: str(why) for number, why in enumerate(tiles)}
                    row += len(tiles)
                    continue
                batch = torch.from_numpy(np.stack(tiles))
                for encoder, vectors in zip(encoders, features, strict=True):
                    try:
                        vectors[row : row + len(batch)] = encoder(batch).cpu().numpy()
                    except (RuntimeError, MemoryError) as error:
                        raise WsimilError(
                            f"encoder {encoder.contract.name} failed on {len(batch)} tiles of {batch.shape[1]} px: {error}; "
                            "if memory ran out, try a smaller --batch-size"
                        ) from error
                row += len(batch)
    return features, failures


def _pixels(files: Sequence[Path]) -> list[np.ndarray | str]:
    """Each file's pixels, or why there are none."""
    tiles: list[np.ndarray | str] = []
    for path in files:
        try:
            with Slide(path) as picture:  # by the rules of slides: transparent is white, 16 bits are refused
                tile = picture.read_box(0, 0, picture.width, picture.height, size_px=(picture.width, picture.height))
        except SlideError as error:
            tiles.append(f"tile {path}: {error}")
            continue
        height, width = tile.shape[:2]
        fits = height == width and width > 1
        tiles.append(tile if fits else f"tile {path}: {width} × {height} px; encoders take square tiles")
    return tiles


# ---------------------------------------------------------------- numbers


_METRICS = ("balanced_accuracy", "f1", "auroc", "accuracy")
_NUMBERS = [
    *(f"{metric}{suffix}" for metric in _METRICS for suffix in ("", "_sd")),
    "low", "high", "above_twin", "above_twin_low", "above_twin_high",
]  # fmt: skip


def _content(
    found: list[tuple[dict[str, Any], Probed]],
    named: list[tuple[str, str | None, Encoder]],
    table: Table,
    sites: Table | None,
    config: ProbeConfig,
    *,
    folds: int,
    grouped: bool,
) -> dict[str, Any]:
    resampled = [probed.resampled() for _, probed in found]
    twins = _twins(named)
    place = {(facts["question"], facts["encoder"], facts["probe"]): row for row, (facts, _) in enumerate(found)}
    site = None
    if sites is not None:
        site = {
            "n_sites": int(sites["site"].nunique()),
            "n_tiles": len(sites),
            "balanced_accuracy_from_labels": _known_from_labels(sites),
        }
    results = []
    for row, (facts, probed) in enumerate(found):
        scores, around = probed.scores(), percentile_interval(resampled[row])
        numbers: dict[str, float | None] = {f"{metric}{suffix}": None for metric in _METRICS for suffix in ("", "_sd")}
        for metric, values in scores.items():
            numbers[metric] = _finite(values.mean())
            numbers[f"{metric}_sd"] = _finite(values.std(ddof=1)) if len(values) > 1 else None
        above: list[float | None] = [None, None, None]
        twin = place.get((facts["question"], twins.get(facts["encoder"], ""), facts["probe"]))
        if twin is not None:
            difference = scores["balanced_accuracy"].mean() - found[twin][1].scores()["balanced_accuracy"].mean()
            paired = percentile_interval(resampled[row] - resampled[twin])
            above = [float(difference), _finite(paired.low), _finite(paired.high)]
        ends = dict(zip(_NUMBERS[-5:], [_finite(around.low), _finite(around.high), *above], strict=True))
        by_seed = {f"{metric}_by_seed": [_finite(value) for value in values] for metric, values in scores.items()}
        results.append({**facts, **numbers, **ends, **by_seed})
    return {
        "format": "wsimil-probe",
        "format_version": 1,
        "wsimil_version": version("wsimil"),
        "seeds": config.seeds,
        "tiles": {
            "n_tiles": len(table),
            "classes": {name: int(count) for name, count in sorted(table["label"].value_counts().items())},
            "n_groups": int(table["group"].nunique()),
            "grouped": grouped,
            "folds": folds,
            "max_tiles": config.max_tiles,
        },
        "site": site,
        "encoders": {name: {"twin_of": twin_of, **encoder.contract.recipe()} for name, twin_of, encoder in named},
        "results": results,
    }


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None  # an AUROC of a class that nobody has is no number, and JSON has no NaN


def _twins(named: list[tuple[str, str | None, Encoder]]) -> dict[str, str]:
    """Encoder → its random twin: the one of the same recipe but for the weights."""

    def but_for_weights(encoder: Encoder) -> str:
        return hash_of({**encoder.contract.recipe(), "sha256": ""})

    random = {but_for_weights(encoder): name for name, _, encoder in named if name.startswith("random:")}
    return {
        name: random[but_for_weights(encoder)]
        for name, _, encoder in named
        if not name.startswith("random:") and but_for_weights(encoder) in random
    }


def _lines(rows: Table) -> list[str]:
    """A line per encoder: what each probe reads, F1 and AUROC of the linear one, and what lies above random weights."""
    probes = list(dict.fromkeys(rows["probe"]))
    compared = [which for which in probes if rows.loc[rows["probe"] == which, "above_twin"].notna().any()]
    cells = [["encoder", *probes, "macro F1", "AUROC", *(f"above random twin, {which}" for which in compared)]]
    for name in dict.fromkeys(rows["encoder"]):
        of = rows[rows["encoder"] == name].set_index("probe")
        linear = of.loc["logistic"]
        cells.append(
            [
                name,
                *(_with_interval(of.loc[which]) if which in of.index else "" for which in probes),
                *(f"{linear[metric]:.3f}" for metric in ("f1", "auroc")),
                *(_above(of.loc[which]) if which in of.index else "" for which in compared),
            ]
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _with_interval(row: Any) -> str:
    spread = f" ± {row['balanced_accuracy_sd']:.3f}" if pd.notna(row["balanced_accuracy_sd"]) else ""
    return f"{row['balanced_accuracy']:.3f}{spread} [{row['low']:.3f}, {row['high']:.3f}]"


def _above(row: Any) -> str:
    if pd.isna(row["above_twin"]):
        return ""
    return f"{row['above_twin']:+.3f} [{row['above_twin_low']:+.3f}, {row['above_twin_high']:+.3f}]"

"""A whole study as one command: which stages are stale, and what is done again.

- Every stage reads files and writes files; what it depends on is hashed, and a stage runs when that hash or its output is gone.
- Extraction and training keep their own books slide by slide and run by run, so they are always asked and cost little.
- `study.yaml` holds the resolved settings: the study can be made again from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from wsimil.aggregators import check_aggregator
from wsimil.bags.dataset import BagFolder
from wsimil.bags.labels import infer_task, match_labels, match_slides, read_labels
from wsimil.bags.splits import COLUMNS, read_splits, refuse_to_lose, splits_hash, write_splits
from wsimil.config import STUDY_SECTIONS, Settings
from wsimil.errors import UsageError, WsimilError
from wsimil.evaluation import write_evaluation
from wsimil.evaluation.table import read_predictions
from wsimil.extraction import extract_features
from wsimil.extraction.extract import resolve_device
from wsimil.extraction.job import read_status
from wsimil.files import file_sha256, hash_of, mark_output, read_json, write_json
from wsimil.heatmaps import draw_heatmaps
from wsimil.prediction import predict
from wsimil.report import write_report
from wsimil.settings import as_mapping, save_settings
from wsimil.slides.cohort import find_slides
from wsimil.training import prepare_cohort, train
from wsimil.training.goals import try_together

__all__ = ["Study", "run_study"]


@dataclass(frozen=True)
class Study:
    """What a study came to."""

    folder: Path
    metrics: dict[str, Any]
    failed: list[str]  # a line per slide that failed somewhere

    @property
    def predictions(self) -> pd.DataFrame:
        return read_predictions(self.folder / "predictions" / "predictions.csv")


def run_study(
    slides: str | Path,
    labels: str | Path,
    out: str | Path,
    *,
    splits: str | Path | None = None,
    settings: Settings | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Study:
    """tile → extract → split → train → predict → evaluate → heatmap → report; stages whose inputs are unchanged are kept.

    Args:
        slides: folder of slides, one slide, or CSV.
        labels: table with `slide`, the target column, optional `patient` and `site`.
        out: the study's folder.
        splits: folds to use; made by patient if not given.
    """
    settings, out = settings or Settings(), Path(out)
    if len(settings.extract.encoder) != 1:
        raise UsageError(
            f"a study has one encoder, not {len(settings.extract.encoder)}; `wsimil extract` makes bags of several at once"
        )
    ids = {file.slide_id for file in find_slides(slides)}
    _check_request(ids, labels, out / "bags", splits, settings)
    mark_output(out)
    save_settings(out / "study.yaml", settings, STUDY_SECTIONS)
    books = _Books(out / "logs" / "stages.json", say)

    say("extract: slides to bags")
    extraction = extract_features(
        slides, out / "bags", tile=settings.tile, extract=settings.extract, job=settings.job, quiet=quiet, say=say
    )
    failed = [f"{row.slide_id}: {row.reason}" for row in extraction.failed]
    bags = extraction.features_folders[0]
    if not bags.exists():
        raise WsimilError(f"no slide gave a bag; {out / 'bags' / 'status.csv'} says why")

    folder = BagFolder(bags, filter=settings.filter, only=ids)
    if gone := len(list(bags.glob("*.h5"))) - len(folder.slide_ids):
        say(f"{gone} bags in {bags} are of slides that are not in {slides} any more: left out")
    cohort = prepare_cohort(folder, labels, splits=splits, labels_config=settings.labels, split_config=settings.split)
    refuse_to_lose(out / "splits.csv", cohort.splits[COLUMNS], splits)
    write_splits(out / "splits.csv", cohort.splits)

    say("train: one model per fold and seed")
    run = out / "runs" / settings.train.aggregator
    train(bags, labels, run, splits=out / "splits.csv", settings=settings, quiet=quiet, say=say)
    models = {path.parent.name: file_sha256(path) for path in sorted(run.glob("fold*-seed*/model.safetensors"))}

    # test and new slides count here: a bag made anew is predicted anew
    content = [folder.fingerprint(slide_id) for slide_id in folder.slide_ids]
    predictions = out / "predictions"
    books.stage(
        "predict",
        [
            content,
            failed,
            models,
            splits_hash(cohort.splits),
            file_sha256(run / "labels.csv"),
            as_mapping(settings, ["filter", "predict"]),
        ],
        predictions / "predictions.csv",
        lambda: predict(bags, run, predictions, config=settings.predict, only=ids, quiet=quiet, say=say),
    )
    table_hash = file_sha256(predictions / "predictions.csv")
    failed.extend(_not_predicted(predictions / "predictions.csv", {line.partition(": ")[0] for line in failed}))
    task = cohort.task
    books.stage(
        "evaluate",
        [table_hash, as_mapping(settings, ["evaluate"])],
        out / "evaluation" / "metrics.json",
        lambda: write_evaluation(
            out / "evaluation",
            read_predictions(predictions / "predictions.csv"),
            kind=task.kind,
            classes=task.classes or None,
            positive=task.classes[-1] if task.kind == "binary" else None,
            n_bootstrap=settings.evaluate.bootstrap,
            seed=settings.evaluate.seed,
        ),
    )

    not_drawn: list[str] = []

    def heatmaps() -> None:
        job = replace(settings.job, shard=None)  # bags of other shards were predicted as well
        not_drawn.extend(
            draw_heatmaps(predictions, slides, out / "heatmaps", config=settings.heatmap, job=job, quiet=quiet, say=say)
        )

    books.stage(
        "heatmap",
        [table_hash, content, models, as_mapping(settings, ["filter", "heatmap"]), str(Path(slides).resolve())],
        out / "heatmaps",
        heatmaps,
    )
    if not_drawn:
        books.forget("heatmap")
        failed.extend(not_drawn)
    metrics = read_json(out / "evaluation" / "metrics.json")
    write_report(out)
    return Study(out, metrics, failed)


def _check_request(ids: set[str], labels: str | Path, job: Path, splits: str | Path | None, settings: Settings) -> None:
    """What can be wrong with labels, splits and settings, before slides are read for hours. Raises UsageError."""
    known = ids | set(read_status(job / "status.csv"))
    split, config = settings.split, settings.train
    table = match_labels(read_labels(labels, settings.labels, group=split.group, site=split.site, test=split.test), known)
    given = [label for label in table["label"] if label]
    task = infer_task(given, settings.labels).fitted(given, config)
    check_aggregator(config.aggregator, config.options_of("aggregator_options"))
    resolve_device(config.device)
    try_together(config, task, given)
    if splits is not None:
        folds = read_splits(splits)
        match_slides(folds["slide_id"], known)
        if config.fold != "all" and int(config.fold) not in set(folds["fold"]):
            raise UsageError(f"--fold {config.fold}: the splits have folds {', '.join(map(str, sorted(set(folds['fold']))))}")


def _not_predicted(predictions: Path, known: set[str]) -> list[str]:
    """A line for each slide that has a bag, and failed when it was predicted."""
    rows: Any = pd.read_csv(predictions, dtype=str, keep_default_na=False).drop_duplicates("slide_id")
    rows = rows[(rows["status"] == "failed") & ~rows["slide_id"].isin(known)].to_dict("records")
    return [f"{row['slide_id']}: {row.get('reason', 'not predicted')}" for row in rows]


def _listing(output: Path) -> str:
    """Which files there are: a stage whose files were taken away is done again."""
    folder = output if output.is_dir() else output.parent
    return hash_of(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))


class _Books:
    """Which stage was done from which inputs."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        try:
            self.keys: dict[str, str] = read_json(path)
        except (OSError, ValueError):
            self.keys = {}

    def stage(self, name: str, inputs: Any, output: Path, work: Callable[[], Any]) -> None:
        key = hash_of(inputs)
        parts = f"{name}.files"
        if self.keys.get(name) == key and output.exists() and self.keys.get(parts, "") in ("", _listing(output)):
            self.say(f"{name}: unchanged")
            return
        started = time.monotonic()
        self.forget(name)  # half-done work must not look done
        self.say(f"{name} …")
        work()
        self.keys |= {name: key, parts: _listing(output)}
        write_json(self.path, self.keys)
        self.say(f"{name}: {time.monotonic() - started:.0f} s")

    def forget(self, name: str) -> None:
        """The next run does this stage again."""
        self.keys.pop(name, None)
        write_json(self.path, self.keys)

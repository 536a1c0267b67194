"""From models and bags to predictions and tile scores, out of one forward pass.

- A slide of the cohort is predicted only by the folds where it is in test, a row of each; a new slide by the mean of all folds.
- A slide of the cohort is known by the fingerprint of its content, too: in another folder or renamed, it is no new slide.
- Slides of a patient that are one bag have one label: what is said of any of them, or an error where that is two things.
- Slides without tiles, and slides that failed, have a row that says so: no slide is lost on the way to the metrics. A bag that
  cannot be read is such a slide; the others are predicted.
- A slide that the encoder was pretrained on is marked in its row, so that whoever has only the table knows.
- A model without the splits and labels of its run is a model of new slides alone.
- Bags of another encoder than the model's are refused; tiles are filtered as the model's were, never otherwise.
- A scores file holds the logits it came with, and a hash of the models and bags: an interrupted prediction goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from wsimil.aggregators.packed import segment_softmax
from wsimil.bags.bag import BagHeader, describe_encoder
from wsimil.bags.dataset import BagFolder, are_other_slides
from wsimil.bags.filter import NO_FILTER
from wsimil.bags.splits import COLUMNS, read_splits, splits_hash
from wsimil.batch import BagBatch, BagOutput, pack
from wsimil.config import FilterConfig, PredictConfig, Settings
from wsimil.errors import AggregatorInputError, BagFormatError, EncoderMismatchError, LabelsError, UsageError, WsimilError, some_of
from wsimil.evaluation.table import ENSEMBLE, SEEN
from wsimil.extraction.extract import resolve_device
from wsimil.extraction.job import Row, slides_of_job
from wsimil.files import atomic_path, hash_of, make_output_folder, sweep_temporary_files
from wsimil.hdf5 import Dataset, read_attributes, write_hdf5
from wsimil.progress import progress
from wsimil.settings import save_settings
from wsimil.table import Table, require_column
from wsimil.task import Task, agreed, survival_of
from wsimil.training import TrainedModel, load_model
from wsimil.training.cohort import labels_hash
from wsimil.training.model import differences

__all__ = ["predict"]


def predict(
    bags: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    config: PredictConfig | None = None,
    only: Collection[str] | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> pd.DataFrame:
    """Write `predictions.csv` and `scores/<slide_id>.h5` for every slide that has a bag; `only` these if given.

    Args:
        bags: job folder or `features_*` folder.
        model: folder of a run (all its folds and seeds), or one `fold<k>-seed<s>` folder.
        out: where to write.

    Returns:
        The rows of `predictions.csv`; `time`, `event` and labels that are values are numbers.

    Raises:
        UsageError: no finished model, models and splits that do not belong together, or something else lies in `out`.
        LabelsError: slides of one patient, to be predicted as one bag, with different labels.
        EncoderMismatchError: the bags are another encoder's, or of another width.
    """
    config = config or PredictConfig()
    run = _read_run(Path(model), say)
    bag_folder = BagFolder(bags, filter=run.filter, only=only, cache_bytes=0, leave_damaged=True)  # every slide is read once
    for remark in bag_folder.remarks:
        say(remark)
    _check_encoder(bag_folder, run)
    _check_out(Path(out))
    run = _with_twins(run, bag_folder, say)
    if run.filter != NO_FILTER:
        say(f"tiles are filtered as the model's were: {_described(run.filter)}")
    device = resolve_device(config.device)
    for trained in run.models:
        trained.model.to(device)
    statuses = slides_of_job(bag_folder)
    rows: list[dict] = []
    groups = _groups(bag_folder, run, config, say)
    chosen = {name: run.models_for(slide_ids[0]) for name, slide_ids in groups.items()}
    tested = [name for name in groups if any(chosen[name].values())]
    pooled = [name for name in tested if len(groups[name]) > 1]
    if pooled and any(trained.model.needs_coords for trained in run.models):
        raise UsageError(
            f"--bag patient pools slides ({some_of(pooled)}), which have no common frame, and "
            f"{run.models[0].content['aggregator']} needs the position of each tile: predict with --bag slide"
        )
    described = {name: run.describe(groups[name], statuses) for name in tested}  # what is wrong there is said before the work
    _check_filter(bag_folder, [slide_id for name in tested for slide_id in groups[name]])
    make_output_folder(Path(out) / "scores")
    sweep_temporary_files(Path(out) / "scores")
    (Path(out) / "predictions.csv").unlink(missing_ok=True)  # half-done work must not look done
    n_left = 0
    for name in progress(tested, "predict", unit=config.bag, quiet=quiet):
        slide_ids, by_fold = groups[name], {fold: models for fold, models in chosen[name].items() if models}
        row = described[name]
        if config.bag == "patient":
            row["slide_id"] = name
        if any(bag_folder.headers[slide_id].attributes.get("encoder_saw_slide") for slide_id in slide_ids):
            row[SEEN] = "1"
        models = [model for own in by_fold.values() for model in own]
        said: list[np.ndarray] = []
        ending = {"status": "empty"}
        try:
            filled = [slide_id for slide_id in slide_ids if bag_folder.n_valid(slide_id) > 0]
            if filled:
                key = _key(bag_folder, filled, models, name=name)
                kept = _kept_logits(Path(out), filled, key)
                n_left += kept is not None
                said = kept or _predict_one(bag_folder, filled, models, run.task, device, Path(out), say, name=name, key=key)
                ending = {"status": "done"}
        except (BagFormatError, AggregatorInputError) as error:
            ending = _failed(error)
            say(f"{_in_utf8(name)}: failed: {ending['reason']}")
        logits = iter(said)  # fold by fold, as the models
        for fold, own in by_fold.items():
            columns = _decoded([next(logits) for _ in own], own) if said else {}
            rows.append(row | columns | _side_of(fold) | ending)
    if n_left:
        say(f"{n_left} of {len(tested)} {config.bag}s were predicted before by the same models; left as they are")
    if len(tested) < len(groups):
        folds = ", ".join(map(str, run.folds_without_model))
        why = f"; the splits have test slides in fold {folds}, of which there is no finished model here" if folds else ""
        say(f"{len(groups) - len(tested)} {config.bag}s are in no test fold of this model, so they are not predicted{why}")
    tested_too = {name: reason for name, reason in bag_folder.damaged.items() if any(run.models_for(name).values())}
    for name, reason in tested_too.items():
        say(f"{_in_utf8(name)}: failed: {_failed(reason)['reason']}")
    absent = {name: row.reason for name, row in statuses.items() if row.status == "failed"} | tested_too
    for name in absent.keys() - bag_folder.headers.keys():
        row = run.describe([name], statuses) | _failed(absent[name])
        rows += [row | _side_of(fold) for fold in run.models_for(name) or [""]]
    rows += _without_bag(bag_folder, run, statuses, say) if only is None else []
    written = {slide_id for row in rows if row["status"] == "done" for slide_id in groups.get(row["slide_id"], [])}
    for path in (Path(out) / "scores").glob("*.h5"):
        if path.stem not in written and _is_ours(path):  # of an earlier prediction of other slides
            path.unlink()
    columns = _columns(run.task) + [column for column in ("group", SEEN, "reason") if any(column in row for row in rows)]
    written_as = [{key: _in_utf8(value) if isinstance(value, str) else value for key, value in row.items()} for row in rows]
    table = pd.DataFrame(written_as, columns=columns).sort_values("slide_id", ignore_index=True, kind="stable")
    save_settings(Path(out) / "config.yaml", Settings(predict=config), ["predict"])
    with atomic_path(Path(out) / "predictions.csv") as temporary:
        table.to_csv(temporary, index=False)  # every digit that is there: rounded, confident predictions would be ties
    numbers = ["label"] if run.task.has_values else ["time", "event"] if run.task.kind == "survival" else []
    return table.assign(**{name: pd.to_numeric(table[name]) for name in numbers})


def _check_filter(bags: BagFolder, slide_ids: list[str]) -> None:
    """Raises UsageError if the filter asks for a score that a bag lacks. What is damaged is a row of the table later."""
    for slide_id in slide_ids if bags.filter != NO_FILTER else ():
        with suppress(BagFormatError):
            bags.kept(slide_id)


def _without_bag(bags: BagFolder, run: _Run, statuses: dict[str, Row], say: Callable[[str], None]) -> list[dict]:
    """Failed rows of the run's test slides that have neither a bag here nor a row that says why."""
    folds = {model.fold for model in run.models}
    sides: list[dict[str, Any]] = run.splits.to_dict("records")
    tested = [(row["slide_id"], row["fold"]) for row in sides if row["split"] == "test" and row["fold"] in folds]
    here = set(bags.headers) | set(bags.damaged) | set(run.twins.values())
    said = {name for name, row in statuses.items() if row.status == "failed"} | here
    absent = [(name, fold) for name, fold in tested if name not in said]
    if not absent or not any(name in here for name, _ in tested):  # bags of another cohort
        return []
    names = sorted({name for name, _ in absent})
    say(
        f"{len(names)} test slides of the model have no bag in {bags.folder}, so they are not predicted "
        f"(status failed): {some_of(names)}"
    )
    failed = _failed(f"no bag in {bags.folder}")
    return [run.describe([name], statuses) | _side_of(str(fold)) | failed for name, fold in absent]


def _failed(reason: object) -> dict[str, str]:
    return {"status": "failed", "reason": _in_utf8(" ".join(str(reason).split()))}


def _in_utf8(text: str) -> str:
    """Names of files may hold bytes that are no text: those are written as `\\udce9`."""
    return text.encode(errors="backslashreplace").decode()


def _is_ours(scores: Path) -> bool:
    try:
        return read_attributes(scores).get("format") == "wsimil-scores"
    except (WsimilError, OSError):
        return False


def _side_of(fold: str) -> dict[str, str]:
    return {"fold": fold, "split": "new" if fold == ENSEMBLE else "test"}


def _columns(task: Task) -> list[str]:
    head = ["slide", "slide_id", "patient", "fold", "split", "status", "label"]
    if task.has_values:
        return [*head, "value"]
    if task.kind == "survival":
        return [*head, "time", "event", "risk", *(f"surv_{at:g}" for at in task.horizons)]
    grades = ["value"] if task.kind == "ordinal" else []
    return [*head, *(f"prob_{name}" for name in task.classes), *grades, "prediction", "threshold"]


@dataclass(frozen=True)
class _Run:
    """The models of a run and the cohort they were trained on."""

    models: list[TrainedModel]
    splits: pd.DataFrame
    labels: Table  # by slide_id
    twins: dict[str, str] = field(default_factory=dict)  # slide → the slide of the cohort that it is under another id

    @property
    def task(self) -> Task:
        return self.models[0].task

    @property
    def filter(self) -> FilterConfig:
        return self.models[0].filter

    @property
    def folds_without_model(self) -> list[int]:
        tested = set(self.splits.loc[self.splits["split"] == "test", "fold"])
        return sorted(tested - {model.fold for model in self.models})

    def models_for(self, slide_id: str) -> dict[str, list[TrainedModel]]:
        """Fold → its models, of the folds that a slide is in test in; of a new slide `ensemble` → all."""
        mine, labels = self.splits[self.splits["slide_id"] == slide_id], self.labels
        if mine.empty and slide_id in labels.index:  # an empty or failed slide of a patient (or group) who was trained on
            units = labels["group" if "group" in labels else "patient"]
            others = units.index[units == units[slide_id]]
            mine = self.splits[self.splits["slide_id"].isin(others)]
        if mine.empty:
            return {ENSEMBLE: self.models}
        folds = sorted(set(mine.loc[mine["split"] == "test", "fold"].tolist()))
        return {str(fold): [model for model in self.models if model.fold == fold] for fold in folds}

    def describe(self, slide_ids: list[str], statuses: dict[str, Row]) -> dict[str, str]:
        """What the table says of a slide, or of the slides of a patient.

        Raises:
            LabelsError: the labels of the patient's slides contradict each other.
        """
        known: Any = self.labels.loc[[slide_id for slide_id in slide_ids if slide_id in self.labels.index]]
        given = known["slide"].to_dict()
        names = [given.get(name) or (statuses[name].slide if name in statuses else name) for name in slide_ids]
        patient = next(iter(known["patient"]), slide_ids[0])
        try:
            label = agreed(known["label"])
        except LabelsError as error:
            raise LabelsError(f"patient {patient}: {error} of its slides; one bag per patient has one label") from error
        row = {"slide": ";".join(names), "slide_id": slide_ids[0], "patient": patient, "label": self.task.hard_label(label)}
        if "group" in self.labels:  # of a new slide nothing is known: it is its own
            row["group"] = str(self.labels["group"].get(slide_ids[0], ""))
        if self.task.kind == "survival" and label:
            row |= {"time": label.removesuffix("+"), "event": str(int(survival_of(label)[1]))}
        return row


def _read_run(folder: Path, say: Callable[[str], None]) -> _Run:
    alone = (folder / "model.json").exists()
    folders = [folder.resolve()] if alone else sorted(path.parent for path in folder.glob("fold*-seed*/model.json"))
    if not folders:
        raise UsageError(f"{folder}: no finished model in it; `wsimil train` makes one")
    models = [load_model(path) for path in folders]
    root = _run_of(folder) if alone else folder
    _check_one_recipe(root, models)
    for model in models:
        if _meaning(model.task) != _meaning(models[0].task):
            raise UsageError(
                f"{model.folder.name} solves another task than {models[0].folder.name}, or in other units or at other times; keep "
                "runs in folders of their own, and train again what learned from labels of before"
            )
        if model.filter != models[0].filter:
            raise UsageError(
                f"{model.folder.name} learned from other tiles than {models[0].folder.name} (filter {_described(model.filter)}; "
                f"{_described(models[0].filter)}); train both with one filter, or keep runs in folders of their own"
            )
    missing = [table for table in ("splits.csv", "labels.csv") if not (root / table).exists()]
    if len(missing) == 2:
        say(
            f"{root} has no splits.csv and labels.csv: every slide is taken for a new one; "
            "what is said of slides that the model was trained on is no result"
        )
        nobody = pd.DataFrame(columns=["slide_id", "slide", "patient", "label"], dtype=str)
        return _Run(models, pd.DataFrame(columns=COLUMNS), nobody.set_index("slide_id"))
    if missing:
        raise UsageError(
            f"{root / missing[0]}: no such file, and without it the slides that the models learned from are not known; "
            "copy the whole folder of the run, or train again"
        )
    splits = read_splits(root / "splits.csv")
    expected = splits_hash(splits)
    for model in models:
        if model.splits_hash != expected:
            raise UsageError(
                f"{model.folder.name} was trained on other splits than {root / 'splits.csv'}; its test slides cannot be told "
                f"from its training slides: train it again, or delete {model.folder} if its fold or seed is no longer wanted"
            )
    labels = _read_labels(root / "labels.csv")
    for model in models:
        if model.content.get("labels_hash", "") not in ("", labels_hash(splits, labels, model.fold)):
            raise UsageError(
                f"{model.folder.name} learned other labels than those in {root / 'labels.csv'}: train it again, or delete "
                f"{model.folder} if its fold or seed is no longer wanted"
            )
    return _Run(models, splits, labels.set_index("slide_id"))


def _read_labels(path: Path) -> pd.DataFrame:
    try:
        labels = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not a table that can be read ({error}); copy it from the run again, or train again") from error
    for column in ("slide_id", "slide", "patient", "label"):
        require_column(path, labels, column, UsageError)
    return labels


def _meaning(task: Task) -> tuple:
    """What the columns of a prediction are of; what is fitted to a fold's labels is no part of it."""
    return task.kind, task.classes, task.horizons, task.scale if task.kind == "proportion" else None


def _run_of(fold: Path) -> Path:
    """The run that a fold is of: where its folder lies, or else where the link to it stands."""
    places = [fold.resolve().parent, fold.absolute().parent]
    return next((place for place in places if (place / "splits.csv").exists() or (place / "labels.csv").exists()), places[0])


def _check_one_recipe(root: Path, models: list[TrainedModel]) -> None:
    """Raises UsageError if the models are of different aggregators or settings: their mean would be nobody's prediction."""
    kinds: dict[str, list[TrainedModel]] = defaultdict(list)
    for model in models:
        kinds[hash_of(model.recipe)].append(model)
    if len(kinds) > 1:
        groups = list(kinds.values())
        said = differences([group[0].recipe for group in groups])
        named = [f"{', '.join(model.folder.name for model in group)} ({text})" for group, text in zip(groups, said, strict=True)]
        raise UsageError(
            f"{root} has models of different settings, which are not averaged: {'; '.join(named)}; "
            "train one kind into another --out, or delete its folders"
        )


def _described(limits: FilterConfig) -> str:
    return ", ".join(f"{key} {limit:g}" for key, limit in vars(limits).items())


def _check_encoder(bags: BagFolder, run: _Run) -> None:
    for model in run.models:
        if model.encoder != bags.encoder:
            raise EncoderMismatchError(
                f"{bags.folder} was made by {describe_encoder(bags.encoder)}, {model.folder.name} learned from "
                f"{describe_encoder(model.encoder)}; extract with the model's encoder"
            )
        if model.content["dim"] != bags.dim:
            raise EncoderMismatchError(
                f"the bags of {bags.folder} are {bags.dim} wide, those that {model.folder.name} learned from "
                f"{model.content['dim']}; extract with the model's encoder"
            )
        learned = model.content.get("effective_mpp")
        seen = next(iter(bags.headers.values())).attributes.get("effective_mpp")
        if learned and seen and abs(float(seen) / learned - 1) > 0.02:
            raise EncoderMismatchError(
                f"{bags.folder} is seen at {float(seen):.3g} µm/px, {model.folder.name} learned at {learned:.3g}; "
                "extract at the model's scale"
            )


def _with_twins(run: _Run, bags: BagFolder, say: Callable[[str], None]) -> _Run:
    """The run with the sides and labels of its own slides under the ids that they have here."""
    if "slide_fingerprint" not in run.labels:  # of an older run
        return run
    dealt = run.labels[run.labels.index.isin(run.splits["slide_id"])]
    contents: dict[str, str] = dealt["slide_fingerprint"].to_dict()
    own = {content: slide_id for slide_id, content in contents.items() if content}
    stated = {name: bags.content(name) for name in bags.headers}
    others = [name for name, content in stated.items() if are_other_slides(content, contents.get(name, ""))]
    if others:
        raise UsageError(
            f"{len(others)} slides of {bags.folder} have the ids of slides that the model was trained or tested on, but are other "
            f"files (slide_fingerprint): {some_of(others)}; labels and folds would be those of other slides: rename them, or train "
            "again if these are the same slides, scanned or written anew"
        )
    twins = {name: own[content] for name, content in stated.items() if content in own and name not in contents}
    if not twins:
        return run
    named = some_of([f"{name} is {twin}" for name, twin in sorted(twins.items())])
    say(f"{len(twins)} slides are the model's own under another id, and are predicted as those: {named}")
    labels = run.labels.loc[list(twins.values())].set_axis(pd.Index(twins, name="slide_id")).assign(slide="")
    sides = run.splits.merge(pd.DataFrame({"slide_id": list(twins.values()), "here": list(twins)}), on="slide_id")
    sides = sides.assign(slide_id=sides["here"])[list(run.splits)]
    known = run.labels.drop(index=list(twins), errors="ignore")  # labelled under both names, and in the folds under one
    return replace(run, labels=pd.concat([known, labels]), splits=pd.concat([run.splits, sides]), twins=twins)


def _check_out(out: Path) -> None:
    """Raises UsageError where the settings of something else, as of a run, would be replaced."""
    config = out / "config.yaml"
    if config.is_file() and not config.read_bytes().startswith(b"predict:"):
        raise UsageError(
            f"{config} is not of predictions, but of a run or of something else, and would be replaced; take another --out"
        )


def _groups(bags: BagFolder, run: _Run, config: PredictConfig, say: Callable[[str], None]) -> dict[str, list[str]]:
    if config.bag == "slide":
        return {slide_id: [slide_id] for slide_id in bags.slide_ids}
    groups: dict[str, list[str]] = defaultdict(list)
    known = [slide_id for slide_id in bags.slide_ids if slide_id in run.labels.index]
    for slide_id in known:
        groups[str(run.labels.loc[slide_id, "patient"])].append(slide_id)
    new = {slide_id: [slide_id] for slide_id in bags.slide_ids if slide_id not in run.labels.index}
    if new:
        say(f"{len(new)} slides are not in the model's labels, so whose they are is not known: each is a bag of its own")
    if both := sorted(new.keys() & groups.keys()):
        raise UsageError(
            f"{both[0]} is a new slide and a patient of the model's ({some_of(groups[both[0]])}); with --bag patient both would be "
            "one row: rename the slide, or predict with --bag slide"
        )
    return groups | new


def _predict_one(
    bags: BagFolder,
    slide_ids: list[str],
    models: list[TrainedModel],
    task: Task,
    device: str,
    out: Path,
    say: Callable[[str], None],
    *,
    name: str,
    key: str,
) -> list[np.ndarray]:
    """Predict slides as one bag of this name; write their tile scores, the mean over models; return each model's logits (1, C).

    Raises:
        BagFormatError: a bag that cannot be read, or whose name cannot be written.
        OSError: the scores cannot be written.
    """
    batch = _one_bag([_loaded(bags, slide_id) for slide_id in slide_ids])
    try:
        outputs = _outputs(batch, models, device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        say(f"{name}: {len(batch.features)} tiles are too many for the memory of {device}; predicted on the CPU")
        outputs = _outputs(batch, models, "cpu")
    scores = _tile_scores(outputs, models, batch, task)
    logits = [output.logits.float().numpy() for output in outputs]
    said = {"bag": name, "prediction_key": key, "logits": np.concatenate(logits)}  # (models, C)
    start = 0
    for slide_id in slide_ids:
        keep = bags.kept(slide_id)
        rows = slice(start, start + int(keep.sum()))
        mine = {score: values[rows] for score, values in scores.items()}
        _write_scores(out / "scores" / f"{slide_id}.h5", bags.headers[slide_id], keep, mine, models, said)
        start = rows.stop
    return logits


def _outputs(batch: BagBatch, models: list[TrainedModel], device: str) -> list[BagOutput]:
    """What each model says, on the CPU: many models' outputs for a large bag would fill a GPU."""
    batch, outputs = batch.to(device), []
    for model in models:
        model.model.to(device)  # in inference mode a move would leave weights that know no gradients, which explaining needs
    with torch.inference_mode():
        for model in models:
            said = model.model(batch, explain=True)
            wanted = said.attention_logits, said.tile_logits, said.contributions
            attention, tiles, contributions = (None if part is None else part.cpu() for part in wanted)
            outputs.append(BagOutput(said.logits.cpu(), attention_logits=attention, tile_logits=tiles, contributions=contributions))
    return outputs


def _loaded(bags: BagFolder, slide_id: str) -> BagBatch:
    try:
        return bags.load(slide_id, half=True)
    except OSError as error:  # the slide's, as a damaged file is; not that of where scores are written
        raise BagFormatError(f"{bags.headers[slide_id].path}: cannot be read ({error.strerror or error})") from error


def _key(bags: BagFolder, slide_ids: list[str], models: list[TrainedModel], *, name: str) -> str:
    """Of all that a prediction comes from."""
    seen = [[slide_id, bags.fingerprint(slide_id), bags.n_valid(slide_id)] for slide_id in slide_ids]
    return hash_of([version("wsimil"), name, seen, [[model.folder.name, model.weights_sha256, model.content] for model in models]])


def _kept_logits(out: Path, slide_ids: list[str], key: str) -> list[np.ndarray] | None:
    """What each model said, (1, C), if the scores of all these slides are there and of this key."""
    logits: list[list[float]] = []
    for slide_id in slide_ids:
        try:
            attributes = read_attributes(out / "scores" / f"{slide_id}.h5")
        except (WsimilError, OSError):
            return None
        if attributes.get("prediction_key") != key:
            return None
        logits = attributes["logits"]
    return [np.array([one], np.float32) for one in logits]


def _decoded(logits: list[np.ndarray], models: list[TrainedModel]) -> dict:
    """Columns of a prediction, as the mean over models of what each says; logits (1, C) of each."""
    task = models[0].task
    said = [(model.task, one) for model, one in zip(models, logits, strict=True)]
    if task.has_values:
        return {"value": float(np.mean([own.values(one)[0] for own, one in said]))}
    if task.kind == "survival":
        chances = np.mean([own.survival(one)[0] for own, one in said], axis=0)
        columns = {f"surv_{at:g}": float(chance) for at, chance in zip(task.horizons, chances, strict=True)}
        return {"risk": float(np.mean([own.risks(one)[0] for own, one in said])), **columns}
    each = [task.probabilities(one, model.temperature)[0] for model, one in zip(models, logits, strict=True)]
    probabilities = np.mean(each, axis=0)
    columns = {f"prob_{name}": float(value) for name, value in zip(task.classes, probabilities, strict=True)}
    threshold = 0.5
    if task.kind == "binary":
        threshold = float(np.mean([0.5 if model.threshold is None else model.threshold for model in models]))
    if task.kind in ("binary", "multilabel"):
        columns["threshold"] = threshold
    if task.kind == "ordinal":
        columns["value"] = float(probabilities @ np.arange(len(probabilities)))  # mean grade, the lowest is 0
    return columns | {"prediction": task.decided(probabilities[None], threshold)[0]}


def _one_bag(bags: list[BagBatch]) -> BagBatch:
    """Slides pooled: one bag. Positions are dropped when there are several, for slides have no common frame."""
    if len(bags) == 1:
        return bags[0]
    packed = pack(bags)
    return replace(
        packed,
        offsets=torch.tensor([0, len(packed.features)]),
        coords_um=None,
        tile_um=None,
        slide_ids=("+".join(packed.slide_ids),),
    )


def _tile_scores(outputs: list[BagOutput], models: list[TrainedModel], batch: BagBatch, task: Task) -> dict[str, np.ndarray]:
    """What the models say of each tile, averaged over models: each (n usable, ·) float32."""
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    for output, model in zip(outputs, models, strict=True):
        if output.attention_logits is not None:
            parts["attention"].append(segment_softmax(output.attention_logits, batch).numpy())
        if output.tile_logits is not None:
            logits = output.tile_logits.float().numpy()
            if task.has_values:
                parts["tile_value"].append(model.task.values(logits)[:, None])
            elif task.kind == "survival":
                parts["tile_value"].append(model.task.risks(logits)[:, None])
            else:
                parts["tile_prob"].append(task.map_columns(task.output_probabilities(logits)))
        if output.contributions is not None:
            unit = model.task.scale if task.kind in ("regression", "survival") else 1.0  # folds have scales of their own
            parts["contributions"].append(unit * task.map_columns(output.contributions.float().numpy()))
    return {name: np.mean(values, axis=0).astype(np.float32) for name, values in parts.items()}


def _write_scores(
    path: Path, header: BagHeader, keep: np.ndarray, scores: dict[str, np.ndarray], models: list[TrainedModel], said: dict[str, Any]
) -> None:
    """Scores on the rows of the stored bag; rows that the models did not see (not valid, or filtered out) are NaN.

    Args:
        said: of the whole prediction: `bag`, the id of its row (of the slide, or of the patient whose slides were pooled), and
            what lets the next call leave it as it is.
    """
    datasets = {"coords": Dataset(header.coords())}
    for name, values in scores.items():
        full = np.full((len(keep), values.shape[1]), np.nan, np.float32)
        full[keep] = values
        datasets[name] = Dataset(full)
    kept = ("slide_id", "slide_fingerprint", "mpp", "tile_level0_px", "tile_px", "overlap_px", "level0_width", "level0_height")
    aggregator = models[0].model
    write_hdf5(
        path,
        datasets,
        {
            "format": "wsimil-scores",
            "format_version": 1,
            **{name: header.attributes.get(name) for name in (*kept, "bounds_x", "bounds_y", "coords_unit")},
            **said,
            "model_hash": hash_of(sorted(model.weights_sha256 for model in models)),
            "models": [model.folder.name for model in models],
            "class_names": list(models[0].task.output_names),
            "contribution_kind": aggregator.contribution_kind,
            "contribution_unit": models[0].task.contribution_unit,
            "map_kind": "contributions" if "contributions" in scores else "attention",
        },
    )

"""The command line: parse, call the library, report. No logic of its own.

- A command per stage, in flow order; its options are the keys of its configuration sections, so YAML and flags cannot drift apart.
- Results go to stdout, progress and remarks to stderr.
- Exit status: 0 everything done, 1 something failed (named on the last line), 2 wrong usage, 130 interrupted.
- Nothing heavy is imported before a command runs: `wsimil --help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import re
import signal
import sys
import threading
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from wsimil.config import SECTIONS, STUDY_SECTIONS, Settings, normalise_key
from wsimil.errors import UsageError, WsimilError
from wsimil.settings import nearest, read_settings, to_yaml

__all__ = ["main"]

_NAMES, _REASONS, _REASON_LENGTH = 20, 3, 300
"""How much a run says at its end of what failed; the book has the rest."""


@dataclass(frozen=True)
class Command:
    """One sub-command.

    `arguments` are (flags, argparse keywords) beside the options that come from `sections`; `without` are keys of them that this
    command has no use for: no options here, and passed over in a YAML file, which may serve every stage.
    """

    summary: str
    example: str
    run: Callable[[argparse.Namespace, Settings, Callable[[str], None]], int]
    arguments: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()
    sections: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"wsimil {version('wsimil')}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        print(f"wsimil: unknown command {name}{nearest(name, COMMANDS)} (wsimil --help lists them)", file=sys.stderr)
        return 2
    command, arguments = COMMANDS[name], argparse.Namespace()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # a cluster's notice: tidy up as for Ctrl-C
    try:
        arguments, settings = _parse(name, command, argv[1:])
        if arguments.print_config:
            print(to_yaml(settings, command.sections), end="")
            return 0
        say = _silence if arguments.quiet else lambda message: print(message, file=sys.stderr, flush=True)
        return command.run(arguments, settings, say)
    except UsageError as error:
        print(f"wsimil {name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (WsimilError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in _FULL:
            error.filename = getattr(arguments, "out", None)
        print(f"wsimil {name}: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "begins anew" if name in _BEGIN_ANEW else "goes on where it stopped"
        print(f"\nwsimil {name}: interrupted; the same command {again}", file=sys.stderr)
        return 130


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Writing into an open file ends so, and names no file: the folder of the command has to do."""

_BEGIN_ANEW = ("evaluate", "report", "probe", "search", "split")
"""Commands that keep no books of what is done."""


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _silence(message: str) -> None:
    pass


# ---------------------------------------------------------------- parsing


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help shows the options)")


def _parse(name: str, command: Command, argv: list[str]) -> tuple[argparse.Namespace, Settings]:
    parser = _parser(name, command)
    known, unknown = parser.parse_known_args([_normalised(argument) for argument in argv])
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        mistyped = next((word for word in unknown if word.startswith("-")), unknown[0])
        kind = "option" if mistyped.startswith("-") else "argument"
        raise UsageError(f"unknown {kind} {mistyped.split('=')[0]}{nearest(mistyped.split('=')[0], flags)}")
    overrides = {
        key.removeprefix("set:"): value for key, value in vars(known).items() if key.startswith("set:") and value is not None
    }
    return known, read_settings(command.sections, Path(known.config) if known.config else None, overrides)


def _normalised(argument: str) -> str:
    """`--tile_px=3` → `--tile-px=3`; values are left alone."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return f"--{normalise_key(flag).replace('_', '-')}{equals}{value}"


def _parser(name: str, command: Command) -> _Parser:
    parser = _Parser(
        prog=f"wsimil {name}",
        usage=None,
        description=f"{command.summary}\n\nexample:\n  {command.example}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
        allow_abbrev=False,
    )
    for flags, keywords in command.arguments:
        parser.add_argument(*flags, **keywords)
    parser.add_argument("--quiet", action="store_true", help="no progress and no remarks")
    parser.add_argument("--config", metavar="FILE", help="YAML with the keys below, by section")
    parser.add_argument("--print-config", action="store_true", help="show the resolved settings and stop")
    shown: set[str] = set()
    for section in command.sections:
        kind = SECTIONS[section]
        group = parser.add_argument_group(section, (kind.__doc__ or "").splitlines()[0] + f" In YAML: {section}: {{…}}.")
        hints = typing.get_type_hints(kind)
        for setting in dataclasses.fields(kind):
            if f"{section}.{setting.name}" in command.without:
                continue
            flag = setting.name.replace("_", "-")
            keywords = _keywords(setting, hints[setting.name])
            if setting.name not in shown:
                group.add_argument(f"--{flag}", dest=f"set:{setting.name}", **keywords)
                shown.add(setting.name)
            group.add_argument(
                f"--{section}.{flag}", dest=f"set:{section}.{setting.name}", **{**keywords, "help": argparse.SUPPRESS}
            )
    return parser


def _keywords(setting: dataclasses.Field, hint: Any) -> dict[str, Any]:
    default = setting.default
    if isinstance(default, tuple):
        shown = " ".join(map(str, default))
    else:
        shown = "" if default is None or default is False else str(default)
    meaning = setting.metadata["help"].replace("%", "%%") + (f" (default: {shown})" if shown and default is not True else "")
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction, "default": None, "help": meaning + (" (default: yes)" if default else "")}
    choices = [
        choice
        for part in (hint, *typing.get_args(hint))
        if typing.get_origin(part) is typing.Literal
        for choice in typing.get_args(part)
    ]
    metavar = "|".join(choices) if choices else setting.name.split("_")[-1].upper()
    return {"default": None, "metavar": metavar, "help": meaning, **({"nargs": "+"} if isinstance(default, tuple) else {})}


def _overview() -> str:
    lines = [
        "wsimil: from folders of whole-slide images to predictions and heatmaps.",
        "",
        "  wsimil demo                                            a toy cohort through every stage",
        "  wsimil run SLIDES --labels labels.csv --out study/     the same with your slides",
        "",
        "commands, in the order of the work:",
        *(f"  {name:<13}{command.summary}" for name, command in COMMANDS.items()),
        "",
        "wsimil COMMAND --help shows an example and every option.",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------- commands


def _demo(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.demo import run_demo

    return run_demo(Path(arguments.out), quiet=arguments.quiet, say=say)


def _run(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.study import run_study

    study = run_study(
        arguments.slides,
        arguments.labels,
        arguments.out,
        splits=arguments.splits,
        settings=settings,
        quiet=arguments.quiet,
        say=say,
    )
    if arguments.json:
        print(json.dumps({"out": str(study.folder), "metrics": study.metrics, "failed": study.failed}))
    else:
        print(_headline(study.metrics))
        print(f"report: {study.folder / 'report.html'}")
    return _ending(study.failed)


def _tile(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.extraction import tile_slides

    rows = tile_slides(arguments.slides, arguments.out, config=settings.tile, job=settings.job, quiet=arguments.quiet)
    return _slides_ending(rows, arguments)


def _extract(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.extraction import extract_features

    extraction = extract_features(
        arguments.slides,
        arguments.out,
        tile=settings.tile,
        extract=settings.extract,
        job=settings.job,
        quiet=arguments.quiet,
        say=say,
    )
    return _slides_ending(extraction.rows, arguments, f"bags: {', '.join(map(str, extraction.features_folders))}")


def _pretrain(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.pretraining import Forecast, pretrain

    done = pretrain(
        arguments.slides,
        arguments.out,
        splits=arguments.splits,
        labels=arguments.labels,
        settings=settings,
        dry_run=arguments.dry_run,
        quiet=arguments.quiet,
        say=say,
    )
    if isinstance(done, Forecast):
        views = Path(arguments.out) / "views.png"
        print(json.dumps(dataclasses.asdict(done)) if arguments.json else f"{done.text()}\nviews: {views}")
        return 0
    if arguments.json:
        print(json.dumps({"out": str(done.folder), "step": done.step, "steps": done.recipe.steps, "remark": done.remark}))
    else:
        print(f"encoder: {done.folder} (for --encoder); health: {done.folder / 'health.html'}")
        print(done.remark, end="\n" if done.remark else "")
    return 0


def _probe(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.probing import probe

    report = probe(arguments.tiles, arguments.labels, config=settings.probe, quiet=arguments.quiet, say=say)
    if arguments.out:
        report.write(arguments.out)
    print(json.dumps(report.content) if arguments.json else report.text())
    return 0


def _search(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.retrieval import evaluate_search, search

    if arguments.query:
        how = {"config": settings.search, "labels": arguments.labels, "target": settings.labels, "quiet": arguments.quiet}
        table = search(arguments.bags, arguments.query, **how)
        if arguments.out:
            table.to_csv(Path(arguments.out), index=False)
        print(table.to_json(orient="records") if arguments.json else table.head(10).to_string(index=False))
        return 0
    if not arguments.labels:
        raise UsageError("pass --query SLIDE to search, or --labels CSV to evaluate the search of every slide")
    evaluation = evaluate_search(
        arguments.bags, arguments.labels, config=settings.search, target=settings.labels, quiet=arguments.quiet, say=say
    )
    if arguments.out:
        evaluation.write(arguments.out)
    print(json.dumps(evaluation.content) if arguments.json else evaluation.text())
    return 0


def _split(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.bags.labels import infer_task, read_labels, slide_ids_of
    from wsimil.bags.splits import COLUMNS, make_splits, refuse_to_lose, splits_hash, write_splits

    split = settings.split
    labels = read_labels(arguments.labels, settings.labels, group=split.group, site=split.site, test=split.test)
    labels = slide_ids_of(labels)
    splits = make_splits(labels, infer_task(labels["label"], settings.labels), settings.split)
    refuse_to_lose(Path(arguments.out), splits[COLUMNS], arguments.labels)
    write_splits(Path(arguments.out), splits)
    counts = splits.groupby(["fold", "split"]).size().unstack()
    print(counts[["train", "val", "test"]].to_string())
    print(f"{arguments.out}: {splits['patient'].nunique()} patients, hash {splits_hash(splits)[:12]}")
    return 0


def _train(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.training import train

    runs = train(
        arguments.bags, arguments.labels, arguments.out, splits=arguments.splits, settings=settings, quiet=arguments.quiet, say=say
    )
    print(f"{len(runs)} models in {arguments.out}")
    return 0


def _predict(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.prediction import predict

    table = predict(arguments.bags, arguments.model, arguments.out, config=settings.predict, quiet=arguments.quiet, say=say)
    counts = ", ".join(f"{count} {status}" for status, count in table["status"].value_counts().items())
    path = Path(arguments.out) / "predictions.csv"
    print(f"{path}: {counts}")
    failed = table.query("status == 'failed'").drop_duplicates("slide_id")  # a slide has a row for each fold
    return _ending([f"{row['slide_id']}: {row['reason']}" for row in failed.to_dict("records")], status=path)


def _evaluate(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.bags.labels import labels_of_rows, read_labels
    from wsimil.evaluation import read_predictions, write_evaluation
    from wsimil.evaluation.table import labels_of_predictions

    path = Path(arguments.predictions)
    predictions = read_predictions(path / "predictions.csv" if path.is_dir() else path)
    labels = None
    if settings.split.group != "patient" and not arguments.labels and "group" not in predictions:
        raise UsageError(
            f"--group {settings.split.group}: predictions have no such column; pass the table that has it with --labels"
        )
    if arguments.labels:
        names = labels_of_predictions(predictions)  # none where they are not of several labels
        config = settings.labels
        if names and config.task == "auto":
            config = dataclasses.replace(config, task="multilabel")
        table = read_labels(arguments.labels, config, group=settings.split.group, named_only=True, names=names)
        labels, others = labels_of_rows(table, predictions)
        labels = labels[labels["label"] != ""]
        if others:
            say(f"{others} rows of {arguments.labels} are of slides that were not predicted")
    metrics = write_evaluation(
        arguments.out,
        predictions,
        labels=labels,
        kind=None if settings.labels.task == "auto" else settings.labels.task,
        positive=settings.labels.positive,
        n_bootstrap=settings.evaluate.bootstrap,
        seed=settings.evaluate.seed,
    )
    print(json.dumps(metrics) if arguments.json else _headline(metrics))
    return 0


def _heatmap(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.heatmaps import draw_heatmaps

    wrong = draw_heatmaps(
        arguments.predictions,
        arguments.slides,
        arguments.out,
        config=settings.heatmap,
        job=settings.job,
        quiet=arguments.quiet,
        say=say,
    )
    print(f"heatmaps: {arguments.out}")
    return _ending(wrong)


def _report(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.report import write_report

    print(write_report(arguments.study))
    return 0


def _convert(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.conversion import convert_bags

    rows = convert_bags(
        arguments.bags, arguments.out, config=settings.convert, slides=arguments.slides, quiet=arguments.quiet, say=say
    )
    return _slides_ending(rows, arguments, f"bags: {arguments.out}", book="convert.csv")


def _validate(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.validation import validate_bags

    report = validate_bags(arguments.path, quiet=arguments.quiet)
    print(json.dumps(report.content) if arguments.json else report.text())
    return int(bool(report.findings))


def _encoders(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.encoders import describe_encoders, encoder_rows

    print(json.dumps(encoder_rows()) if arguments.json else describe_encoders(), flush=True)
    return 0


def _aggregators(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.aggregators.listing import aggregator_rows, describe_aggregators
    from wsimil.training.listing import describe_objectives, objective_rows

    rows = [*aggregator_rows(), *objective_rows()]
    print(json.dumps(rows) if arguments.json else f"{describe_aggregators()}\n\n{describe_objectives()}", flush=True)
    return 0


def _doctor(arguments: argparse.Namespace, settings: Settings, say: Callable[[str], None]) -> int:
    from wsimil.doctor import examine

    print(examine(arguments.encoder))
    return 0


def _slides_ending(rows: list, arguments: argparse.Namespace, where: str = "", *, book: str = "status.csv") -> int:
    counts = {status: sum(row.status == status for row in rows) for status in ("done", "empty", "failed", "skipped")}
    if arguments.json:
        print(json.dumps({"counts": counts, "slides": [dataclasses.asdict(row) for row in rows]}))
    else:
        print(f"{len(rows)} slides: {', '.join(f'{count} {status}' for status, count in counts.items() if count)}")
        print(where or f"tiles: {arguments.out}")
    return _ending([f"{row.slide_id}: {row.reason}" for row in rows if row.status == "failed"], status=Path(arguments.out) / book)


def _ending(failed: list[str], *, status: Path | None = None) -> int:
    """Exit status; what failed is named on the last line.

    Args:
        failed: lines `name: reason`.
        status: the book that has all reasons; the most frequent ones are said, too.
    """
    if not failed:
        return 0
    names = [line.split(": ")[0] for line in failed]
    whys = [line.split(": ", 1)[-1] for line in failed]
    if status is None:
        shown = ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "")
        print(f"{len(failed)} failed: {shown} ({whys[0]}{' …' if len(failed) > 1 else ''})", file=sys.stderr)
        return 1
    reasons = Counter(_without_name(why, name) for why, name in zip(whys, names, strict=True))
    for reason, count in reasons.most_common(_REASONS):
        print(f"  {count} × {reason[:_REASON_LENGTH]}", file=sys.stderr)
    shown = ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "")
    print(f"{len(failed)} failed: {shown} (reasons: {status})", file=sys.stderr)
    return 1


def _without_name(reason: str, name: str) -> str:
    """What is said of one slide, as it would be said of another: without its id or file in front."""
    return re.sub(rf"^\S*{re.escape(name)}\S*: ", "", reason)


def _headline(metrics: dict[str, Any]) -> str:
    """The number that people ask for first."""
    pooled = metrics.get("pooled", {}).get("metrics", {})
    titles = {"auroc": "AUROC", "spearman": "Spearman", "harrell_c": "C-index"}
    if metrics.get("kind") == "ordinal":
        titles = {"quadratic_kappa": "quadratic kappa", **titles}
    for name, title in titles.items():
        entry = pooled.get(name)
        if entry and entry.get("value") is not None:
            interval = f" (95 % interval {entry['low']:.3f} to {entry['high']:.3f})" if entry.get("low") is not None else ""
            return f"{title} {entry['value']:.3f}{interval}, {metrics['n_evaluated']} of {metrics['n_slides']} slides"
    return f"no metric could be computed for {metrics['n_evaluated']} evaluated slides; metrics.json says why"


_SLIDES = (("slides",), {"metavar": "SLIDES", "help": "folder (searched recursively), one slide, or CSV with a `slide` column"})
_BAGS = (("bags",), {"metavar": "BAGS", "help": "job folder, features_* folder, or another program's bags (docs/files.md)"})
_PREDICTIONS = (("predictions",), {"metavar": "PREDICTIONS", "help": "folder with predictions.csv"})
_LABELS = (
    ("--labels",),
    {"required": True, "metavar": "CSV", "help": "table with `slide`, the target, optional `patient`, `site`"},
)
_SPLITS = (("--splits",), {"metavar": "CSV", "help": "folds to use; made by patient if not given"})
_JSON = (("--json",), {"action": "store_true", "help": "result as JSON on stdout"})


def _out(default: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    return ("--out",), {"required": True, "metavar": "PATH", "help": f"where to write, for example {default}"}


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "a toy cohort through every stage: slides, bags, models, predictions, heatmaps",
        "wsimil demo --out wsimil-demo",
        _demo,
        ((("--out",), {"default": "wsimil-demo", "metavar": "PATH", "help": "where to write (default: wsimil-demo)"}),),
    ),
    "run": Command(
        "your slides and labels through every stage; run again, only what changed is done",
        "wsimil run slides/ --labels labels.csv --out study/ --encoder uni2-h --folds 5",
        _run,
        (_SLIDES, _LABELS, _out("study/"), _SPLITS, _JSON),
        STUDY_SECTIONS,
    ),
    "tile": Command(
        "where the tissue is and where tiles go",
        "wsimil tile slides/ --out job/ --mpp 0.5 --tile-px 224",
        _tile,
        (_SLIDES, _out("job/"), _JSON),
        ("tile", "job"),
    ),
    "extract": Command(
        "slides to bags of features, resumable",
        "wsimil extract slides/ --out job/ --encoder uni2-h --mpp 0.5 --tile-px 224",
        _extract,
        (_SLIDES, _out("job/"), _JSON),
        ("tile", "extract", "job"),
    ),
    "pretrain": Command(
        "slides to an encoder of your own, without labels (DINO, MAE)",
        "wsimil pretrain slides/ --out encoder/ --method dino --size lab --splits splits.csv --fold 0",
        _pretrain,
        (
            (("slides",), {"metavar": "SLIDES", "help": "folder, slide or CSV as for tile; or a folder of tile images"}),
            _out("encoder/"),
            (("--splits",), {"metavar": "CSV", "help": "folds: only the fold's training slides are used (else all slides)"}),
            (("--labels",), {"metavar": "CSV", "help": "with --method weak: table with `slide` and the target"}),
            (("--dry-run",), {"action": "store_true", "help": "measure, forecast time and waiting, draw views.png, and stop"}),
            _JSON,
        ),
        ("tile", "job", "labels", "pretrain"),
        ("job.shard", "job.stage_to", "job.stage_gb"),  # a run takes all of its slides, and reads them where they are
    ),
    "probe": Command(
        "what an encoder's features say about labelled tiles, and about the site",
        "wsimil probe tiles/ --labels tiles.csv --encoder uni2-h --out probe/",
        _probe,
        (
            (("tiles",), {"metavar": "TILES", "help": "folder of tile images; without --labels its sub-folders are the classes"}),
            (("--labels",), {"metavar": "CSV", "help": "table with `tile` (path or name), the target, optional `group`, `site`"}),
            (("--out",), {"metavar": "PATH", "help": "where to write probe.json and probe.csv"}),
            _JSON,
        ),
        ("probe",),
    ),
    "search": Command(
        "slides that look like one; with labels and no query: how often the nearest share the diagnosis",
        "wsimil search job/ --labels labels.csv --query slide-17",
        _search,
        (
            _BAGS,
            (("--query",), {"metavar": "SLIDE", "help": "id of the slide to search with"}),
            (("--labels",), {"metavar": "CSV", "help": "table with `slide`, the target, optional `patient`, `site`"}),
            (("--out",), {"metavar": "PATH", "help": "where to write: a CSV with --query, else a folder"}),
            _JSON,
        ),
        ("labels", "search"),
    ),
    "split": Command(
        "folds that keep patients apart",
        "wsimil split labels.csv --out splits.csv --folds 5",
        _split,
        (
            (("labels",), {"metavar": "LABELS", "help": "table with `slide`, the target, optional `patient`, `site`"}),
            _out("splits.csv"),
        ),
        ("labels", "split"),
    ),
    "train": Command(
        "bags and labels to models, one per fold and seed",
        "wsimil train job/ --labels labels.csv --out runs/abmil --aggregator gated_abmil",
        _train,
        (_BAGS, _LABELS, _out("runs/abmil"), _SPLITS),
        ("filter", "labels", "split", "train"),
    ),
    "predict": Command(
        "models and bags to predictions and tile scores",
        "wsimil predict job/ --model runs/abmil --out predictions/",
        _predict,
        (
            _BAGS,
            (("--model",), {"required": True, "metavar": "RUN", "help": "folder of a run, or of one of its folds"}),
            _out("predictions/"),
        ),
        ("predict",),
    ),
    "evaluate": Command(
        "predictions to metrics with intervals, and plots",
        "wsimil evaluate predictions/ --labels labels.csv --out evaluation/",
        _evaluate,
        (
            _PREDICTIONS,
            (("--labels",), {"metavar": "CSV", "help": "labels, where the predictions do not carry them or others count"}),
            _out("evaluation/"),
            _JSON,
        ),
        ("labels", "split", "evaluate"),
        # predictions are made: of the folds only --group counts
        ("labels.order", *(f"split.{name}" for name in ("folds", "seed", "site", "test", "val_fraction"))),
    ),
    "heatmap": Command(
        "tile scores to pictures and QuPath polygons",
        "wsimil heatmap predictions/ --slides slides/ --out heatmaps/ --format png geojson",
        _heatmap,
        (
            _PREDICTIONS,
            (("--slides",), {"required": True, "metavar": "SLIDES", "help": "where the slides are: folder, slide or CSV"}),
            _out("heatmaps/"),
            (("--class",), {"dest": "set:class_name", "metavar": "NAME", "help": "short for --class-name"}),
        ),
        ("heatmap", "job"),
    ),
    "report": Command(
        "one page about a study",
        "wsimil report study/",
        _report,
        ((("study",), {"metavar": "STUDY", "help": "folder of `wsimil run`"}),),
    ),
    "convert": Command(
        "bags of other programs to ours, and ours to theirs",
        "wsimil convert clam_features/ --out job/ --slide-mpp 0.25",
        _convert,
        (
            (("bags",), {"metavar": "BAGS", "help": "folder of bags of any layout that docs/files.md lists"}),
            _out("job/"),
            (("--slides",), {"metavar": "SLIDES", "help": "slides, or a table of them, that say the µm/px the bags do not"}),
            _JSON,
        ),
        ("convert",),
    ),
    "validate": Command(
        "what is wrong with a folder of bags, and what to do",
        "wsimil validate job/",
        _validate,
        ((("path",), {"metavar": "BAGS", "help": "folder of bags of any layout"}), _JSON),
    ),
    "encoders": Command("encoders that --encoder knows by name", "wsimil encoders", _encoders, (_JSON,)),
    "aggregators": Command("aggregators and objectives that `train` knows", "wsimil aggregators", _aggregators, (_JSON,)),
    "doctor": Command(
        "what this installation has, and what is missing for an encoder",
        "wsimil doctor --encoder uni2-h",
        _doctor,
        ((("--encoder",), {"metavar": "NAME", "help": "say what this encoder needs and how to get it"}),),
    ),
}

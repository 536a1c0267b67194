"""Maps of many slides, drawn side by side by the processes that also read slides for extraction.

- A slide that cannot be drawn, hangs for `--read-timeout` seconds or crashes a library is a line with a reason, and keeps no map of
  an earlier run: that could be another model's. The others are drawn.
- Slides that were pooled have the prediction of their patient.
- How many draw at a time changes no byte of what is written.
- A slide whose maps were drawn from the same scores, slide and settings is left as it is: an interrupted run goes on.
- A folder that can hold no more ends the run.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsimil.config import HeatmapConfig, JobConfig
from wsimil.errors import SlideError, UsageError, WsimilError
from wsimil.extraction.desk import NO_MORE_SPACE
from wsimil.extraction.pool import Call, Done, Failed, ReaderCrash, ReaderPool, reader_count
from wsimil.files import (
    OUTPUT_MARK,
    atomic_path,
    file_sha256,
    hash_of,
    mark_output,
    read_json,
    sweep_temporary_files,
    write_json,
    write_text,
)
from wsimil.hdf5 import read_attributes
from wsimil.heatmaps.geojson import tiles_geojson
from wsimil.heatmaps.picture import overlay
from wsimil.heatmaps.tile_map import TileMap, read_tile_map
from wsimil.progress import progress
from wsimil.slides.cohort import SlideFile, find_slides
from wsimil.slides.slide import Slide
from wsimil.units import rounded

if TYPE_CHECKING:
    from wsimil.extraction.reader import Reading

__all__ = ["draw_heatmaps"]

_IN_READER = "wsimil.heatmaps.draw:draw_in_reader"
_BOOKS = ".drawn"
"""Folder in the output: for each slide, what its maps were drawn from."""
_Z_RLE = 3
"""zlib's strategy for filtered pictures: a tenth smaller and nearly twice as fast as its default on slides."""


def draw_heatmaps(
    predictions: str | Path,
    slides: str | Path,
    out: str | Path,
    *,
    config: HeatmapConfig | None = None,
    job: JobConfig | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> list[str]:
    """Write `<slide_id>.png` and `<slide_id>.geojson` for every slide (of the shard) that has tile scores.

    Args:
        predictions: folder with `predictions.csv` and `scores/`.
        slides: where the slides are: folder, slide or CSV.
        out: where to write.
        say: is told what went wrong, too.

    Returns:
        What went wrong, a line per slide: it is not there, is not the one that was predicted, or cannot be read.

    Raises:
        UsageError: no predictions, no scores or no slides.
        WsimilError: readers cannot be started, or the folder can hold no more.
    """
    # pandas: not for the readers, who pass through this module
    from wsimil.evaluation.table import mean_over_folds, read_predictions

    config, job = config or HeatmapConfig(), job or JobConfig()
    predictions, out = Path(predictions), Path(out)
    table = mean_over_folds(read_predictions(predictions / "predictions.csv"))  # as the tile scores are
    rows: dict[str, dict[str, Any]] = {row["slide_id"]: row for row in table.to_dict("records")}
    scores = sorted(path for path in (predictions / "scores").glob("*.h5") if not path.name.startswith("."))
    if not scores:
        raise UsageError(f"{predictions}: no scores/*.h5 in it; `wsimil predict` makes them")
    number, n_shards = job.shard_of()
    scores = scores[number - 1 :: n_shards]
    files = {file.slide_id: file for file in find_slides(slides)}
    _check_not_in_the_way(out, [f"{path.stem}.{suffix}" for path in scores for suffix in config.format], files)
    mark_output(out)
    wrong = {path.stem: f"not among the {len(files)} slides of {slides}" for path in scores if path.stem not in files}
    calls = deque(
        Call(path.stem, _IN_READER, (path, files[path.stem], _row_of(path, rows), out, config))
        for path in scores
        if path.stem in files
    )
    count = min(reader_count(job.workers), -(-len(calls) // 2))  # starting one takes as long as drawing two
    bar = progress(scores, "heatmap", unit="slide", quiet=quiet)
    bar.update(len(wrong))
    n_left = 0
    try:
        with ReaderPool(count, timeout=job.read_timeout) as pool:
            while calls or pool.busy:
                while calls and pool.has_idle:
                    pool.start(calls.popleft())
                event = pool.next(1.0)
                if isinstance(event, Failed):
                    wrong[str(event.call.key)] = _reason(event.error, str(event.call.key), out)
                n_left += isinstance(event, Done) and not event.value
                bar.update(isinstance(event, Done | Failed))
    finally:
        bar.close()
        sweep_temporary_files(out)  # of readers that were ended in the middle of a file
    if n_left:
        say(f"{n_left} of {len(scores)} slides were drawn before from the same scores; left as they are")
    lines = [f"{path.stem}: {wrong[path.stem]}" for path in scores if path.stem in wrong]
    for line in lines:
        say(line)
    return lines


def _check_not_in_the_way(out: Path, names: list[str], files: Mapping[str, SlideFile]) -> None:
    """Raises UsageError where a map would be written over a slide, or over a file that is none of ours."""
    there = [out / name for name in names if (out / name).exists()]
    slides = {os.path.realpath(file.path) for file in files.values()} if there else set()
    for path in there:
        if os.path.realpath(path) in slides:
            raise UsageError(f"{path} is a slide, and its map would be written over it; take another --out")
        if not (out / OUTPUT_MARK).exists():
            raise UsageError(f"{path} is there already, and wsimil has not written into {out} before; take another --out")


def _row_of(scores: Path, rows: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The prediction that these tile scores belong to; nothing where it cannot be told."""
    try:
        return rows.get(str(read_attributes(scores).get("bag", scores.stem)), {})
    except (WsimilError, OSError):  # whoever draws it will say so
        return {}


def _reason(error: Exception, slide_id: str, out: Path) -> str:
    """Why a slide was not drawn, on one line.

    Raises:
        WsimilError: no other will be either.
    """
    reason = " ".join(str(error).split())
    if not isinstance(error, ReaderCrash):
        return reason
    if error.errno in NO_MORE_SPACE:
        raise WsimilError(
            f"{out}: {os.strerror(error.errno)}: nothing more can be written there; make room or choose another --out, "
            "and run the same command again"
        )
    log = out / "logs" / f"{slide_id}.log"
    write_text(log, error.trace)
    return f"{reason} (see {log})"


def draw_in_reader(
    reading: Reading, scores: Path, file: SlideFile, row: Mapping[str, Any], out: Path, config: HeatmapConfig
) -> bool:
    """One slide of `draw_heatmaps`, in a process of its own; False: it was drawn before.

    `row` is the slide's in the predictions, if it has one.
    """
    try:
        book, maps = out / _BOOKS / f"{file.slide_id}.json", [out / f"{file.slide_id}.{suffix}" for suffix in config.format]
        key = _key(scores, file, row, config)
        if _is_drawn(book, key, maps):
            return False
        for path in (book, *maps):
            path.unlink(missing_ok=True)
        tile_map = read_tile_map(scores, config.map, class_name=config.class_name, predicted=_likeliest(row))
        _check_same_file(file, tile_map)
        if not tile_map.complete:  # of another program's bags
            slide = reading.slide(file, None)
            bounds = (slide.bounds.x, slide.bounds.y)
            tile_map = tile_map.on(slide.mpp, (slide.width, slide.height), bounds)
        if "png" in config.format:
            picture = _picture(reading.slide(file, None), tile_map, config.max_side_px)
            reading.alive()
            with atomic_path(out / f"{file.slide_id}.png") as temporary:
                image = overlay(picture, tile_map, _caption(tile_map, row, asked=config.class_name is not None))
                image.save(temporary, compress_level=1, compress_type=_Z_RLE)
            reading.alive()
        if "geojson" in config.format:
            origin = (tile_map.bounds or (0, 0)) if config.qupath_bounds == "auto" else (0, 0)
            write_text(out / f"{file.slide_id}.geojson", tiles_geojson(tile_map, origin=origin))
        write_json(book, {"key": key, "bytes": _sizes(maps)})
        return True
    except SlideError:
        raise
    except WsimilError as error:  # a scores file is as much a matter of the slide as its pixels are
        raise SlideError(str(error)) from error


def _key(scores: Path, file: SlideFile, row: Mapping[str, Any], config: HeatmapConfig) -> str:
    """Of everything that maps are drawn from."""
    try:
        content = [file_sha256(scores), file.fingerprint()]
    except OSError:  # opening them says so better
        content = []
    caption = {name: str(value) for name, value in row.items()}
    return hash_of([version("wsimil"), *content, caption, asdict(config)])


def _is_drawn(book: Path, key: str, maps: list[Path]) -> bool:
    try:
        return read_json(book) == {"key": key, "bytes": _sizes(maps)}
    except (OSError, ValueError):
        return False


def _sizes(maps: list[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in maps}


def _check_same_file(file: SlideFile, tile_map: TileMap) -> None:
    if not tile_map.slide_fingerprint:
        return  # of another program's bags
    try:
        content = file.fingerprint()
    except OSError:
        return  # opening it says so better
    if content != tile_map.slide_fingerprint:
        raise SlideError("another version of the slide than the one that was predicted; make its bag and its prediction anew")


def _picture(slide: Slide, tile_map: TileMap, max_side_px: int) -> np.ndarray:
    if (slide.width, slide.height) != tile_map.size_level0_px:
        raise SlideError(
            f"{slide.width}×{slide.height} px, but the scores are of {'×'.join(map(str, tile_map.size_level0_px))} px: "
            "another version of the slide"
        )
    factor = max(1.0, max(slide.width, slide.height) / max_side_px)
    return slide.overview((max(1, round(slide.width / factor)), max(1, round(slide.height / factor))))


def _likeliest(row: Mapping[str, Any]) -> str | None:
    """The predicted class; of several labels the one with the highest probability."""
    if "prediction" not in row:
        return None
    chances = {name.removeprefix("prob_"): float(value) for name, value in row.items() if name.startswith("prob_")}
    predicted = str(row["prediction"])
    return predicted if predicted in chances or not chances else max(chances, key=lambda name: chances[name])


def _caption(tile_map: TileMap, row: Mapping[str, Any], *, asked: bool = False) -> str:
    """What is predicted and true; of several labels, or when a class was asked for, also whose map it is."""
    if row.get("status") != "done":
        return tile_map.slide_id
    true, pooled = str(row.get("label", "")), row["slide_id"] != tile_map.slide_id
    whose = f"{tile_map.slide_id}   " + (f"patient {row['slide_id']} " if pooled else "")
    if "prediction" in row:
        probability = row.get(f"prob_{row['prediction']}")  # several labels have none of their own
        said = f"predicted: {row['prediction']}" + ("" if probability is None else f" ({float(probability):.2f})")
        chance = row.get(f"prob_{tile_map.class_name}") if asked or probability is None else None
        said += "" if chance is None else f"   map: {tile_map.class_name} ({float(chance):.2f})"
        return f"{whose}{said}" + (f"   true: {true}" if true else "")
    for column, said in (("value", "predicted"), ("risk", "risk")):
        if column in row:
            return f"{whose}{said} {rounded(float(row[column]))}" + (f"   true {true}" if true else "")
    return tile_map.slide_id

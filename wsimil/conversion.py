"""Bags of one layout written as another, slide by slide.

- A bag that cannot be read or written is a row with a reason; the others are converted.
- What is there already, of the same source and the same request, is not written again: an interrupted conversion goes on.
- Features keep their values exactly, and their type where the layout has it. Rows that are not valid go into our layout only.
- What bags do not say of their slides, the slides themselves may (`slides`): STAMP's micrometres need each slide's µm/px.
- `convert.csv` is the book: a row per slide, with what had to be assumed.
"""

from __future__ import annotations

import csv
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from wsimil.bags.bag import Bag, BagHeader
from wsimil.bags.interop import LAYOUTS, find_foreign
from wsimil.bags.interop.clam import Clam
from wsimil.bags.interop.layout import Known, Layout, Writer
from wsimil.bags.interop.stamp import Stamp
from wsimil.bags.interop.torchmil import TorchMIL
from wsimil.bags.interop.wsimil import Wsimil
from wsimil.config import ConvertConfig
from wsimil.errors import BagFormatError, SlideError, UsageError
from wsimil.files import atomic_path, fingerprint, hash_of, mark_output, slide_name, sweep_temporary_files
from wsimil.progress import progress
from wsimil.slides.cohort import find_slides
from wsimil.slides.slide import Slide

__all__ = ["WRITERS", "Converted", "convert_bags", "find_bags", "read_foreign"]

WRITERS: dict[str, Writer] = {writer.name: writer for writer in (Wsimil(), Clam(), Stamp(), TorchMIL())}
"""Layouts that bags are written in."""

_WRITE_EVERY_S = 2.0


@dataclass(frozen=True)
class Converted:
    """What became of a bag: a line of `convert.csv`."""

    slide_id: str
    status: str  # done, empty, skipped, failed
    reason: str = ""
    n_tiles: int = 0
    key: str = ""  # hash of the source and the request


def find_bags(folder: str | Path, layout: str = "auto") -> tuple[Layout, dict[str, Path]]:
    """The layout of a folder and its bags by slide id.

    Raises:
        UsageError: no such folder, or no bag in it.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of bags")
    if layout == "auto":
        if found := find_foreign(folder):
            return found
        layout = "wsimil"
    asked = LAYOUTS.get(layout)
    paths = asked.find(folder) if asked else {}
    if asked is None or (layout == "trident" and not paths):  # TRIDENT's HDF5 bags are read as ours
        asked = Wsimil()
        paths = asked.find(folder)
    if not paths:
        raise UsageError(f"{folder}: no bag of layout {layout} in it")
    return asked, paths


def read_foreign(header: BagHeader) -> Bag:
    """The whole bag. Raises BagFormatError if its parts do not fit."""
    valid, qc = header.scores()
    return Bag(header.features.read_checked(), header.coords(), valid, qc, {**header.attributes, "slide_id": header.slide_id})


def convert_bags(
    source: str | Path,
    out: str | Path,
    *,
    config: ConvertConfig | None = None,
    slides: str | Path | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> list[Converted]:
    """Write every bag of a folder in another layout.

    Args:
        source: folder of bags, of any layout that `find_bags` knows.
        out: where to write; not the folder of the source.
        slides: the slides, or a table of them, whose µm/px stands in where bags do not say it; before `config.slide_mpp`.

    Raises:
        UsageError: no bags, or `out` is where they lie.
    """
    config, source, out = config or ConvertConfig(), Path(source), Path(out)
    layout, paths = find_bags(source, config.layout)
    writer = WRITERS[config.to]
    if out.absolute() in {source.absolute(), *(path.parent for path in paths.values())}:
        raise UsageError(f"{out}: the bags lie there themselves; give another --out")
    by_slide = {} if slides is None else _mpp_by_slide(slides, paths, say)
    known = Known(config.slide_mpp, by_slide, config.tile_level0_px, config.encoder)
    say(f"{len(paths)} bags, {layout.name} to {writer.name}")
    mark_output(out)
    for folder in {path.parent for path in out.rglob(".*.tmp-*")}:
        sweep_temporary_files(folder)
    before, rows, written = _read_book(out / "convert.csv"), {}, time.monotonic()
    names: dict[str, Path] = {}
    remarks: Counter[str] = Counter()
    widths: Counter[int] = Counter()
    try:
        for slide_id, path in progress(list(paths.items()), "convert", unit="bag", quiet=quiet):
            key = _key(path, slide_id, config, known)
            rows[slide_id] = _convert_one(
                layout, writer, path, slide_id, known, out, before.get(slide_id), key, remarks, widths, names
            )
            if time.monotonic() - written > _WRITE_EVERY_S:
                _write_book(out / "convert.csv", before | rows)
                written = time.monotonic()
    finally:
        _write_book(out / "convert.csv", before | rows)
    for text, count in remarks.items():
        say(f"{count} of {len(paths)} bags: {text}")
    if len(widths) > 1:
        parts = ", ".join(f"{dim} in {count}" for dim, count in widths.most_common())
        say(f"features of several widths ({parts} bags): of several encoders, so not to be trained on together")
    return list(rows.values())


def _mpp_by_slide(slides: str | Path, wanted: Iterable[str], say: Callable[[str], None]) -> dict[str, float]:
    """µm/px of the slides that bags are of, by the bags' ids: a slide is known by its id, or by its file name."""
    files = {file.slide_id: file for file in find_slides(slides)}
    names = Counter(slide_name(slide_id) for slide_id in files)
    files |= {slide_name(slide_id): file for slide_id, file in files.items() if names[slide_name(slide_id)] == 1}
    found = {}
    for slide_id in wanted:
        if slide_id not in files:
            say(f"{slide_id}: not among the slides of {slides}")
            continue
        try:
            with Slide(files[slide_id].path, mpp=files[slide_id].mpp) as slide:
                found[slide_id] = slide.known_mpp()
        except SlideError as error:
            say(f"{slide_id}: {error}")
    return found


def _convert_one(
    layout: Layout,
    writer: Writer,
    path: Path,
    slide_id: str,
    known: Known,
    out: Path,
    before: Converted | None,
    key: str,
    remarks: Counter[str],
    widths: Counter[int],
    names: dict[str, Path],
) -> Converted:
    try:
        header = layout.header(path, slide_id, known)
        other = names.setdefault(header.slide_id, path)
        if other != path:
            raise BagFormatError(f"{other.name} and {path.name} are both of slide {header.slide_id}; remove one")
        there = all(file.is_file() for file in writer.files(out, {**header.attributes, "slide_id": header.slide_id}))
        if before is not None and before.key == key and before.status != "failed" and there:
            return replace(before, status="skipped")
        _check_pixels(header)
        bag = read_foreign(header)
        if layout.name != "wsimil":
            bag = replace(bag, attributes={**bag.attributes, "source_layout": layout.name})
        said = [*header.remarks, *writer.write(out, bag)]
        widths[header.dim] += 1
        if not np.isfinite(bag.features[bag.valid]).all():
            said.append("NaN or infinity in features, kept as they are; `wsimil validate` says where")
        if writer.name != "wsimil" and (left_out := int((~bag.valid).sum())):
            said.append(f"{left_out} tiles that are not valid are left out")
    except (BagFormatError, OSError) as error:
        return Converted(slide_id, "failed", " ".join(str(error).split()), 0, key)
    remarks.update(said)
    n_tiles = len(bag.features)
    return Converted(slide_id, "done" if n_tiles else "empty", "; ".join(said), n_tiles, key)


def _check_pixels(header: BagHeader) -> None:
    """Raises BagFormatError where positions are known, but not in pixels of the slide, which every layout is about."""
    ways_out = {
        "um": "positions are in µm, and the slide's µm/px is not known; pass --slide-mpp or --slides",
        "tile": "positions are places on a grid, and its width is not known; pass --tile-level0-px",
    }
    if reason := ways_out.get(str(header.attributes.get("coords_unit"))):
        raise BagFormatError(f"{header.slide_id}: {reason}")


def _key(path: Path, slide_id: str, config: ConvertConfig, known: Known) -> str:
    try:
        content = fingerprint([path])
    except OSError:
        content = ""  # reading it says so better
    return hash_of([content, asdict(config), known.mpp_of(slide_id)])


def _read_book(path: Path) -> dict[str, Converted]:
    try:
        with open(path, newline="", encoding="utf-8") as handle:
            rows = [Converted(**{**row, "n_tiles": int(row["n_tiles"])}) for row in csv.DictReader(handle)]
    except (FileNotFoundError, TypeError, ValueError, KeyError, csv.Error):
        return {}
    return {row.slide_id: row for row in rows}


def _write_book(path: Path, rows: dict[str, Any]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(Converted.__dataclass_fields__))
        writer.writeheader()
        for slide_id in sorted(rows):
            writer.writerow(asdict(rows[slide_id]))

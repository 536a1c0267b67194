"""What is wrong with a folder of bags, of any layout, before days are spent on training from it.

- Every file is read whole: what is cut off, never finished or changed since it was written is found now, not at night.
- Every finding names a file, what is wrong with it and what to do. Nothing is changed.
- A number is held against the others that say the same thing: side of a tile against µm/px and scale asked for, distance of tiles
  against their side, the folder's name against the file. A tenth of a percent is rounding; 2 % is a mistake.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsimil.bags.bag import BagHeader
from wsimil.bags.interop import find_foreign
from wsimil.bags.interop.layout import Known, Layout, rows_of_file, spacing_of
from wsimil.conversion import find_bags
from wsimil.errors import BagFormatError, UsageError
from wsimil.progress import progress
from wsimil.units import nominal_magnification

__all__ = ["Finding", "Report", "validate_bags"]

_TOLERANCE = 0.02
_MANY = 0.2
"""Share of equal rows in one bag above which they are no blank tiles any more."""

_ENOUGH = 20
"""Tiles from which the distance between them says something."""

_HALF_MOST = 65504.0
"""The largest number of half precision, in which encoders run and features are kept."""

_BLOCK = 4096


@dataclass(frozen=True)
class Finding:
    """Something that is wrong."""

    file: str
    what: str
    do: str


@dataclass(frozen=True)
class Report:
    """What was looked at, and what was found."""

    path: str
    layouts: list[str]  # none where no file could be read
    n_bags: int
    n_tiles: int
    n_empty: int  # bags without a usable tile: no fault where a slide has no tissue, but nothing can be said of it
    findings: list[Finding]

    @property
    def content(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        lines = [f"{item.file}: {item.what}\n    {item.do}" for item in self.findings]
        count, bags = len(self.findings), f"{self.n_bags} bag{'s' * (self.n_bags > 1)}"
        found = f"{count} finding{'s' * (count > 1)}" if count else "nothing wrong"
        layouts, empty = ", ".join(self.layouts) or "unknown", f" ({self.n_empty} without a usable tile)" if self.n_empty else ""
        return "\n".join([*lines, f"{self.path}: {bags}{empty} of layout {layouts}, {self.n_tiles} tiles: {found}"])


def validate_bags(path: str | Path, *, quiet: bool = False) -> Report:
    """Look at every bag of a folder (or at one file), whatever its layout.

    Raises:
        UsageError: no bags there.
    """
    path = Path(path)
    findings: list[Finding] = []
    layouts: set[str] = set()
    n_bags = n_tiles = n_empty = 0
    for layout, files in _folders(path):
        seen: list[tuple[BagHeader, Hashable]] = []
        for slide_id, file in progress(list(files.items()), "validate", unit="bag", quiet=quiet):
            n_bags += 1
            try:
                header = layout.header(file, slide_id, Known())
                content, wrong = _one(header, layout)
            except (BagFormatError, UsageError, OSError) as error:
                what, _, do = str(error).removeprefix(f"{file}: ").rpartition("; ")
                findings.append(Finding(str(file), what or do, do if what else "make the file again, or remove it"))
                continue
            n_tiles, n_empty = n_tiles + header.n_tiles, n_empty + (not header.scores()[0].any())
            findings += wrong
            seen.append((header, content))
            ours = header.attributes.get("format") == "wsimil-bag"
            layouts.add("trident" if layout.name == "wsimil" and not ours else layout.name)
        findings += _together(seen)
    return Report(str(path), sorted(layouts), n_bags, n_tiles, n_empty, findings)


def _folders(path: Path) -> list[tuple[Layout, dict[str, Path]]]:
    """Every folder of bags at `path`; a job may hold several, one per encoder."""
    if path.is_file():
        for folder in (path.parent, path.parent.parent):  # AtlasPatch's and CLAM's files lie one deeper
            layout, files = find_bags(folder)
            if one := {slide_id: file for slide_id, file in files.items() if file == path.absolute()}:
                return [(layout, one)]
        raise UsageError(f"{path}: no bag of any layout")
    if path.is_dir() and not path.name.startswith("features_") and find_foreign(path) is None:
        inside = sorted(folder for folder in [*path.glob("features_*"), *path.glob("*/features_*")] if folder.is_dir())
        if inside:
            return [find_bags(folder) for folder in inside if any(folder.iterdir())]
    return [find_bags(path)]


def _one(header: BagHeader, layout: Layout) -> tuple[Hashable, list[Finding]]:
    """A bag by itself: what its features are known by, and what is wrong."""
    findings: list[Finding] = []

    def say(what: str, do: str) -> None:
        findings.append(Finding(str(header.path), what, do))

    valid, _ = header.scores()
    features = header.features.read_checked()
    stored: Any = np.ascontiguousarray(features).reshape(-1).view(np.uint8)
    content = (features.shape, zlib.crc32(stored))
    _check_features(features, valid, say)
    if layout.name == "clam" and header.path.suffix == ".h5":
        findings += _check_tensor(header.path, features)
    coords = header.coords_level0_px.read_checked()
    _check_coords(header, coords, layout, say)
    _check_scale(header, coords, layout, say)
    _check_names(header, say)
    return content, findings


def _check_features(features: np.ndarray, valid: np.ndarray, say: Any) -> None:
    wrong, empty, large = np.zeros((3, len(features)), bool)
    largest = 0.0
    for start in range(0, len(features), _BLOCK):
        block = slice(start, start + _BLOCK)
        most = np.abs(features[block]).max(1, initial=0)  # NaN where one is
        wrong[block], empty[block] = ~np.isfinite(most), most == 0
        large[block] = np.isfinite(most) & (most > _HALF_MOST)
        largest = max(largest, most[large[block] & valid[block]].max(initial=0))
    if count := int((wrong & valid).sum()):
        first = np.flatnonzero(wrong & valid)[0]
        say(f"NaN or infinity in {count} of {len(features)} rows, the first is {first}", "extract again, in fp32")
    if largest > _HALF_MOST:
        what = f"values up to {largest:.3g} in {int((large & valid).sum())} of {len(features)} rows"
        say(what, "extract again: no encoder gives such numbers, and one of them spoils the mean of all tiles in training")
    if count := int((empty & valid).sum()):
        say(f"{count} of {len(features)} rows are all zeros", "extract again: they were never filled, or tiles could not be read")
    rest = np.ascontiguousarray(features[valid & ~empty])
    rows = rest.view(np.dtype((np.void, rest.dtype.itemsize * rest.shape[1]))).ravel() if rest.size else rest[:0, 0]
    twice = len(rows) - len(np.unique(rows))
    if twice > _MANY * len(rows):
        say(f"{twice} of {len(rows)} rows are copies of others", "extract again: batches were written twice, or tiles are blank")


def _check_tensor(path: Path, features: np.ndarray) -> list[Finding]:
    """CLAM's features are there twice: we read `h5_files`, CLAM trains from `pt_files`."""
    copy = path.parent.parent / "pt_files" / f"{path.stem}.pt"
    if not copy.is_file() and not any(copy.parent.glob("*.pt")):
        return []  # never made, or not kept
    if not copy.is_file():
        what, do = f"not there, though {path.name} is", "CLAM trains from it: extract again, or `wsimil convert --to clam`"
        return [Finding(str(copy), what, do)]
    try:
        tensor = rows_of_file(copy).read()
    except BagFormatError as error:
        what = str(error).removeprefix(f"{copy}: ")
        return [Finding(str(copy), what, "extract again, or `wsimil convert --to clam`, which makes it of h5_files")]
    if tensor.shape != features.shape:
        what = f"holds {tensor.shape}, {path.name} {features.shape}"
    elif not np.array_equal(tensor, features, equal_nan=True):
        what = f"other features than in {path.name}"
    else:
        return []
    return [Finding(str(copy), what, "not of one run: extract the slide again")]


def _check_coords(header: BagHeader, coords: np.ndarray, layout: Layout, say: Any) -> None:
    stated = header.attributes
    if stated.get("coords_unit") == "none" or not len(coords):
        return
    if not np.isfinite(coords).all():
        say("coordinates that are no numbers", "extract again")
        return
    shared = len(coords) - len(np.unique(coords, axis=0))
    if shared and layout.name == "torchmil":
        what = f"{shared} of {len(coords)} tiles share a place with another"
        say(what, "grid coordinates were divided by the side of a tile once more: write them from level-0 pixels again")
    elif shared:
        say(f"{shared} of {len(coords)} tiles are at the place of another", "extract again: tiles were written twice")
    if (coords < 0).any():
        say("coordinates below 0", "extract again: they are not level-0 pixels, or count from another corner")
    size = np.array([stated.get("level0_width") or 0, stated.get("level0_height") or 0])
    if size.all() and stated.get("coords_unit") is None and (coords >= size).any():
        beyond = int((coords >= size).any(1).sum())
        what = f"{beyond} of {len(coords)} tiles lie beyond the slide of {size[0]} x {size[1]} px"
        say(what, "extract again: coordinates are not level-0 pixels, or of another slide")


def _check_scale(header: BagHeader, coords: np.ndarray, layout: Layout, say: Any) -> None:
    stated = header.attributes
    side, tile_px, mpp = (stated.get(name) for name in ("tile_level0_px", "tile_px", "mpp"))
    known = side and tile_px and stated.get("coords_unit") is None
    native, wanted = (stated.get(f"{name}_magnification") for name in ("level0", "target"))
    if known and mpp and (target := stated.get("target_mpp")):
        seen = mpp * side / tile_px
        if abs(seen / target - 1) > _TOLERANCE:
            say(
                f"tiles of {side:g} level-0 px are seen at {seen:.3g} µm/px, but {target:.3g} was asked for",
                "extract again: the slide's µm/px was taken for another",
            )
    elif known and native and wanted:
        expected = tile_px * native / wanted
        if abs(side / expected - 1) > _TOLERANCE and side != int(expected):
            say(
                f"{tile_px} px at {wanted:g}x of a slide of {native:g}x are {expected:g} level-0 px, not {side:g}",
                "extract again: the side at level 0 does not follow from the magnifications",
            )
    if not side or len(coords) < _ENOUGH or stated.get("coords_unit") in ("none", "tile"):
        return
    apart = spacing_of(np.rint(coords))
    overlap = stated.get("overlap_px")
    if apart is None:
        return
    expected = side * (1 - overlap / tile_px) if overlap is not None and tile_px else side
    sure = layout.name in ("wsimil", "trident", "stamp", "atlaspatch") and (overlap is not None or layout.name == "stamp")
    ratio = apart / expected
    # a stride of one's own is no mistake, half or twice the side is one: pixels of another level
    off = abs(ratio - 1) if sure else min(abs(ratio - factor) / factor for factor in (0.25, 0.5, 2, 4))
    if (sure and off > _TOLERANCE and abs(apart - expected) > 1.5) or (not sure and off < _TOLERANCE / 2):
        unit = "µm" if stated.get("coords_unit") == "um" else "px"
        pixels = layout.name == "stamp" and tile_px and abs(apart / tile_px - 1) < _TOLERANCE
        say(
            f"tiles are {apart} {unit} apart, but said to be {side:g} {unit} wide"
            + (": the coordinates look like pixels, not µm" if pixels else ""),
            "state the side at level 0 (`wsimil convert --tile-level0-px`), or extract again",
        )


def _check_names(header: BagHeader, say: Any) -> None:
    stated, folder = header.attributes, header.path.absolute().parent
    if found := re.fullmatch(r"(\d+)x_(\d+)px_(\d+)px_overlap", folder.parent.name):
        named = dict(zip(("magnification", "tile_px", "overlap_px"), map(int, found.groups()), strict=True))
        target = stated.get("target_mpp")
        magnification = nominal_magnification(target) if target else stated.get("target_magnification")
        said = {"magnification": magnification, "tile_px": stated.get("tile_px"), "overlap_px": stated.get("overlap_px")}
        for name, value in named.items():
            if said[name] is not None and int(said[name]) != value:
                say(f"{name} is {said[name]}, but the folder is {folder.parent.name}", "move the file to the folder it is of")
    encoder = re.sub(r"\W+", "", str(stated.get("encoder", ""))).lower()
    if folder.name.startswith("features_") and encoder not in ("", "unknown"):
        named_after = re.sub(r"\W+", "", folder.name.removeprefix("features_")).lower()
        if not named_after.startswith(encoder) and not encoder.startswith(named_after):
            say(f"encoder is {stated['encoder']}, but the folder is {folder.name}", "move the file to the folder of its encoder")


def _together(seen: list[tuple[BagHeader, Hashable]]) -> list[Finding]:
    """Bags of one folder held against each other."""
    findings = []
    for name, of in (
        ("encoder", lambda header: header.encoder[0]),
        ("weights of the encoder", lambda header: header.encoder[1][:8]),
        ("width of the features", lambda header: header.dim),
        ("side of a tile (px)", lambda header: header.attributes.get("tile_px")),
    ):
        values = Counter(value for header, _ in seen if (value := of(header)) not in (None, "", "unknown"))
        if len(values) < 2:
            continue
        usual = values.most_common(1)[0][0]
        findings += [
            Finding(
                str(header.path),
                f"{name} is {of(header)}, of {values[usual]} others it is {usual}",
                "keep bags of one encoder and scale in a folder: move this one, or extract it again",
            )
            for header, _ in seen
            if of(header) not in (None, "", "unknown", usual)
        ]
    scales = [float(header.attributes.get("effective_mpp") or np.nan) for header, _ in seen]
    usual = float(np.nanmedian(scales)) if np.isfinite(scales).any() else np.nan
    findings += [
        Finding(str(header.path), f"seen at {scale:.3g} µm/px, the others at {usual:.3g}", "extract it again, at their scale")
        for (header, _), scale in zip(seen, scales, strict=True)
        if abs(scale / usual - 1) > _TOLERANCE
    ]
    groups: dict[tuple[str, Hashable], list[BagHeader]] = defaultdict(list)
    for header, content in seen:
        groups["of the same slide (id)", header.slide_id].append(header)
        if header.n_tiles:
            groups["equal in every feature", content].append(header)
        if fingerprint := header.attributes.get("slide_fingerprint"):
            groups["of the same slide (file)", fingerprint].append(header)
    for (how, _), headers in groups.items():
        findings += [
            Finding(
                str(other.path),
                f"{how} as {headers[0].path.name}",
                "one slide under two names leaks from training to test: keep one, or give both the same patient",
            )
            for other in headers[1:]
        ]
    return findings

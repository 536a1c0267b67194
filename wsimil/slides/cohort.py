"""Which slides there are, and what each is called: a folder, one file, or a table.

- Ids come from paths below the given folder, so slides of equal name in two folders stay apart.
- Two equal ids are an error before any work.
- A DICOM series is one slide, whatever the number of its files; companions of multi-file slides are not slides.
- Links to folders are followed, each folder once; a link to what is below the given folder anyway is passed over.
- What cannot be listed or opened is a slide too: it ends as a failed row with a reason, not in silence.
- Only regular files are looked into: reading from a pipe that bears a slide's name would wait for ever.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from wsimil.errors import UsageError
from wsimil.files import IMAGE_SUFFIXES, OUTPUT_MARK, SLIDE_SUFFIXES, fingerprint, is_file_name, slide_id_from_path, strip_suffix
from wsimil.settings import nearest
from wsimil.table import Cells, read_cells

__all__ = ["SlideFile", "find_slides"]


@dataclass(frozen=True)
class SlideFile:
    """A slide on disk, not opened."""

    path: Path
    slide_id: str
    name: str  # as people know it: the path below the given folder
    mpp: float | None = None  # from a slide table
    copy: Path | None = None  # the same files on a faster disk

    @property
    def here(self) -> Path:
        """Where it is read from."""
        return self.copy or self.path

    def with_its_path(self, text: str) -> str:
        """What was said about the copy, said about the slide."""
        return text.replace(str(self.copy), str(self.path)) if self.copy else text

    def files(self) -> list[Path]:
        """Every file whose bytes make the slide."""
        return _files_of(self.here)

    def fingerprint(self) -> str:
        """Identity of the content: every file of a multi-file slide counts."""
        return fingerprint(self.files())


def find_slides(slides: str | Path) -> list[SlideFile]:
    """All slides below a folder (recursively), a single slide, or those of a table (`slide`, optional `slide_id`, `mpp`).

    A table is a .csv or .tsv, separated by commas, semicolons or tabs; paths in it are relative to its folder. Tables made
    for TRIDENT and AtlasPatch (`wsi`) and for hs2p (`image_path`, `sample_id`, `spacing_at_level_0`) are read as they are.
    Hidden files and folders are passed over.

    Raises:
        UsageError: nothing there, an unusable table, or two slides of one id.
    """
    slides = Path(slides)
    if os.path.isdir(slides):  # unlike Path.is_dir, false where nothing may be seen
        found = _in_folder(slides)
    elif not os.path.isfile(slides):
        raise UsageError(f"{slides}: no such folder, slide or table")
    elif slides.suffix.lower() in (".csv", ".tsv"):
        found = _in_table(slides)
    else:
        found = [_slide_file(slides, PurePosixPath(slides.name))]
    if not found:
        raise UsageError(f"{slides}: no slide in it (looked for {' '.join(SLIDE_SUFFIXES)})")
    by_id: dict[str, SlideFile] = {}
    for slide in found:
        if slide.slide_id in by_id:
            raise UsageError(
                f"{by_id[slide.slide_id].path} and {slide.path} would both be {slide.slide_id}; "
                "give a slide table (CSV) with a slide_id column"
            )
        by_id[slide.slide_id] = slide
    return sorted(found, key=lambda slide: slide.slide_id)


def _slide_file(path: Path, name: PurePosixPath) -> SlideFile:
    """A slide named by its path below the given folder."""
    slide_id = slide_id_from_path(name.with_name(strip_suffix(name.name)))
    return SlideFile(path, _printable(slide_id), _printable(str(name)))


def _printable(text: str) -> str:
    """Control characters and bytes that are not UTF-8 as %XX: ids and names are written into files and lines."""
    return re.sub(r"[\x00-\x1f\x7f\udc80-\udcff]", lambda found: f"%{ord(found[0]) & 0xFF:02X}", text)


def _in_folder(root: Path) -> list[SlideFile]:
    found: list[SlideFile] = []
    seen: set[str] = set()
    real_root = os.path.realpath(root)

    def unlisted(error: OSError) -> None:
        if not error.filename or Path(error.filename) == root:
            raise UsageError(f"{root}: cannot be listed: {error.strerror}") from error
        folder = Path(error.filename)
        found.append(_slide_file(folder, PurePosixPath(folder.relative_to(root).as_posix())))

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=unlisted):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up
            subfolders.clear()
            continue
        seen.add(real)
        if OUTPUT_MARK in files and Path(folder) != root:
            subfolders.clear()
            # pictures are ours there; slides of other kinds are not: somebody's --out was the folder of their slides
            files = [name for name in files if not name.lower().endswith(IMAGE_SUFFIXES)]
        subfolders[:] = sorted(name for name in subfolders if not (name.startswith(".") or _linked_inside(folder, name, real_root)))
        names = sorted(
            name
            for name in files
            if name.lower().endswith(SLIDE_SUFFIXES) and not (name.startswith(".") or _linked_slide_inside(folder, name, real_root))
        )
        tiles = {part for name in names if _is_vms(name) for part in _parts_of_vms(Path(folder, name), names)}
        dicom = [name for name in names if name.lower().endswith(".dcm")]
        below = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for name in names:
            if name not in tiles and not name.lower().endswith(".dcm"):
                found.append(_slide_file(Path(folder, name), below / name))
        series = _dicom_series(Path(folder), dicom)
        # a folder that holds one series and nothing else is the slide
        alone = len(series) == 1 and len(names) == len(dicom) and not subfolders and below.name != ""
        for first, *_ in series:
            found.append(_slide_file(Path(folder, first), below if alone else below / first))
    return found


def _linked_inside(folder: str, name: str, real_root: str) -> bool:
    path = os.path.join(folder, name)
    return os.path.islink(path) and os.path.join(os.path.realpath(path), "").startswith(os.path.join(real_root, ""))


def _linked_slide_inside(folder: str, name: str, real_root: str) -> bool:
    """Whether a slide is a link to one that is found below the folder anyway."""
    if not _linked_inside(folder, name, real_root):
        return False
    real = os.path.realpath(os.path.join(folder, name))
    shown = os.path.relpath(real, real_root).split(os.sep)
    return os.path.isfile(real) and real.lower().endswith(SLIDE_SUFFIXES) and not any(part.startswith(".") for part in shown)


_OTHER_TABLES = {
    "wsi": {"slide_id": "slide_id", "mpp": "mpp"},
    "image_path": {"slide_id": "sample_id", "mpp": "spacing_at_level_0"},
}
"""Where other people's tables have the slide: their column → their names of our other columns. Ours win over theirs."""


def _in_table(table: Path) -> list[SlideFile]:
    cells = read_cells(table, UsageError)
    slide = next((column for column in ("slide", *_OTHER_TABLES) if column in cells.columns), None)
    if slide is None:
        raise UsageError(f"{table}: no column `slide`{nearest('slide', cells.columns)} (columns: {', '.join(cells.columns)})")
    theirs = _OTHER_TABLES.get(slide, {})
    found = []
    for line, row in cells.rows.items():
        entry = row[slide]
        slide_id, mpp = (row.get(column) or row.get(theirs.get(column, column), "") for column in ("slide_id", "mpp"))
        if not entry:
            raise UsageError(f"{table}, line {line}: the slide is empty")
        if slide_id and not is_file_name(slide_id):
            raise UsageError(f"{table}, line {line}: slide_id {slide_id!r} cannot be a file name")
        path = table.parent / entry  # an absolute entry stays as it is
        name = Path(entry).name if Path(entry).is_absolute() or ".." in Path(entry).parts else Path(entry).as_posix()
        named = _slide_file(path, PurePosixPath(name))
        path = min(_dicom_files(path), default=path)  # a folder is a DICOM series
        found.append(SlideFile(path, slide_id or named.slide_id, _printable(entry), _number(mpp, cells, f"{table}, line {line}")))
    return found


def _number(text: str, cells: Cells, where: str) -> float | None:
    if cells.separator != ",":
        text = re.sub(r"^(\d*),(\d+)$", r"\1.\2", text)  # as spreadsheets write it in much of the world
    try:
        mpp = float(text.replace("_", "?")) if text else None
    except ValueError:
        raise UsageError(f"{where}: mpp is {text!r}; expected µm/px as a number") from None
    if mpp is not None and not 0 < mpp < math.inf:
        raise UsageError(f"{where}: mpp is {text}; expected µm/px above 0, or nothing where it is not known")
    return mpp


def _files_of(path: Path) -> list[Path]:
    """Every file whose bytes make the slide."""
    if path.suffix.lower() == ".mrxs":
        return [path, *(file for file in path.with_suffix("").glob("*") if file.is_file())]
    if _is_vms(path.name):
        return [path, *(path.parent / name for name in _parts_of_vms(path, os.listdir(path.parent)))]
    if path.suffix.lower() == ".dcm":
        uid = _series_uid(path)
        return [file for file in _dicom_files(path.parent) if file == path or (uid and _series_uid(file) == uid)]
    return [path]


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _is_vms(name: str) -> bool:
    return name.lower().endswith((".vms", ".vmu"))


def _parts_of_vms(path: Path, names: list[str]) -> list[str]:
    """Those of the names that Hamamatsu's index mentions: its tiles are JPEG files beside it."""
    if not _is_regular(path):
        return []
    try:
        index = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return []
    mentioned = {value.strip() for value in re.findall(r"=(.*)", index)}
    return [name for name in names if name in mentioned]


def _dicom_files(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*") if file.suffix.lower() == ".dcm"]


def _dicom_series(folder: Path, names: list[str]) -> list[list[str]]:
    """Files of a folder by the series they say they belong to; a file that does not say stands for itself."""
    series: dict[str, list[str]] = defaultdict(list)
    for name in names:
        series[_series_uid(folder / name) or name].append(name)
    return list(series.values())


_LONG_FORMS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_ITEM, _END_OF_ITEM, _END_OF_SEQUENCE = b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0"


def _series_uid(path: Path) -> str | None:
    """SeriesInstanceUID (0020,000E) from the head of a DICOM file, explicit VR little endian as slides are written.

    Not through OpenSlide: that looks into every file of the folder for each file that it opens.
    """
    if not _is_regular(path):
        return None
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 18)
    except OSError:
        return None
    if head[128:132] != b"DICM":
        return None
    at, depth = 132, 0
    while at + 8 <= len(head):
        tag, form = head[at : at + 4], head[at + 4 : at + 6]
        if tag in (_ITEM, _END_OF_ITEM, _END_OF_SEQUENCE) or form in _LONG_FORMS:
            at += 8 if tag[:2] == b"\xfe\xff" else 12
            length = int.from_bytes(head[at - 4 : at], "little")
            if length == 0xFFFFFFFF:  # up to an end mark: walk through it
                depth += 1
                length = 0
            depth -= tag in (_END_OF_ITEM, _END_OF_SEQUENCE)
        else:
            at += 8
            length = int.from_bytes(head[at - 2 : at], "little")
        if depth == 0 and tag == b"\x20\x00\x0e\x00" and form == b"UI":
            return head[at : at + length].rstrip(b"\0 ").decode("ascii", "replace") or None
        at += length
    return None

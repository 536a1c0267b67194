"""How a slide is named, and how a file appears: whole or not at all.

- `slide_id` is injective: two different paths never share an id, so nested slides of equal name never overwrite each other.
- A file is written under a temporary name in its own folder, flushed to the disk and renamed: a reader never meets half of one.
- Temporary names start with a dot and carry host and process, so two runs on one folder keep out of each other's way.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from wsimil.errors import UsageError

__all__ = [
    "OUTPUT_MARK",
    "SLIDE_SUFFIXES",
    "atomic_path",
    "file_sha256",
    "fingerprint",
    "folder_lock",
    "hash_of",
    "locked",
    "machine",
    "mark_output",
    "process_start",
    "read_json",
    "slide_id_from_path",
    "slide_name",
    "strip_suffix",
    "sweep_temporary_files",
    "write_json",
    "write_text",
]

OPENSLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".bif", ".svslide", ".dcm", ".czi")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SLIDE_SUFFIXES = (".ome.tif", ".ome.tiff", *OPENSLIDE_SUFFIXES, *IMAGE_SUFFIXES)

_EDGE = 1 << 20


def strip_suffix(name: str) -> str:
    """A file name without the suffix of a slide, if it has one; other dots stay (`TCGA-AA.01.svs` → `TCGA-AA.01`)."""
    lower = name.lower()
    for suffix in SLIDE_SUFFIXES:  # compound ones come first
        if lower.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def slide_id_from_path(path: PurePosixPath) -> str:
    """Id of a slide from its path below the given folder, suffix already removed.

    `/` becomes `__`. An underscore that could be mistaken for part of a separator is written `%5F`, and `%` is `%25`.

    >>> slide_id_from_path(PurePosixPath("batch 1/A_1"))
    'batch 1__A_1'
    >>> slide_id_from_path(PurePosixPath("a__b"))
    'a_%5Fb'
    """
    parts = []
    for position, part in enumerate(path.parts):
        part = part.replace("%", "%25")
        part = re.sub(r"(?<=_)_", "%5F", part)
        if position > 0:
            part = re.sub(r"^_", "%5F", part)
        if position < len(path.parts) - 1:
            part = re.sub(r"_$", "%5F", part)
        parts.append(part)
    return "__".join(parts)


def slide_name(slide_id: str) -> str:
    """The file name (no folder, no suffix) inside a slide id: what a label table usually holds."""
    return slide_id.split("__")[-1].replace("%5F", "_").replace("%25", "%")


OUTPUT_MARK = ".wsimil-output"


def is_file_name(text: str) -> bool:
    """Whether a slide's id can be a file's name, and of no file elsewhere: no slash, no control character, no leading dot."""
    return not (text.startswith(".") or re.search(r"[/\\\x00-\x1f\x7f]", text))


def mark_output(folder: Path) -> None:
    """Make `folder` and mark it as written by wsimil: the search for slides passes over it, wherever it lies.

    Raises:
        UsageError: a file is in the way.
    """
    make_output_folder(folder)
    (folder / OUTPUT_MARK).touch()


def make_output_folder(folder: Path) -> None:
    """Make `folder`, and those above it. Raises UsageError: a file is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{folder}: a file of this name (or of a folder above it) is in the way; take another --out") from error


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it is synced and renamed to `path`, else removed.

    The suffix is kept, for writers that look at it. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the stem is cut: together with the rest of the name it must stay below the 255 bytes that a file system allows
    temporary = path.parent / f".{path.stem[:40]}.tmp-{_host_name()}-{os.getpid()}-{time.monotonic_ns()}{path.suffix}"
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sweep_temporary_files(folder: Path) -> None:
    """Remove what killed runs of this machine left in `folder`; files of living processes and of other hosts stay."""
    host = _host_name()
    for leftover in folder.glob(f".*.tmp-{host}-*"):
        match = re.search(r"\.tmp-" + re.escape(host) + r"-(\d+)-\d+", leftover.name)
        if match and process_start(int(match[1])) is None and process_start(os.getpid()) is not None:
            leftover.unlink(missing_ok=True)


@functools.cache
def machine() -> str:
    """Where a process id means something: host name, boot and, in containers, the space of process ids."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # no Linux: the name has to do
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(parts)


def _host_name() -> str:
    """`machine` as a short part of a file name."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:30]
    return f"{host}-{hashlib.sha256(machine().encode()).hexdigest()[:8]}"


def process_start(pid: int) -> str | None:
    """When a process of this machine started, as an opaque text; None if there is no such process.

    Together with the id it names a process for good: ids are used again.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        state, *fields = stat.rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (OSError, IndexError):
        pass
    if os.path.isdir("/proc/self"):
        return None
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return None
    return "running"


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """One process at a time in here, where the file system knows locks; where it does not, nobody waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as handle:
        locked(handle)
        yield


def locked(handle: IO, *, wait: bool = True) -> bool:
    """Whether the lock of an open file is ours until it is closed; where there are no locks, it is everybody's."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def _sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):  # a folder cannot be opened on some systems; the rename still holds
        return
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # a network folder may refuse fsync on a directory; a file that cannot be synced is a fault
            raise
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically, UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON atomically, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def hash_of(value: Any) -> str:
    """SHA-256 of a JSON-like value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a whole file, as `sha256sum` prints it."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(handle)


def _digest(handle: Any) -> str:
    digest = hashlib.sha256()
    while block := handle.read(_EDGE):
        digest.update(block)
    return digest.hexdigest()


def fingerprint(files: Iterable[Path]) -> str:
    """Identity of a slide's content, cheap on files of gigabytes: size, first and last MB of each of its files."""
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        if not file.is_file():  # opening a pipe would wait for whoever writes into it
            raise OSError(errno.EINVAL, "not a regular file", str(file))
        digest.update(f"{size}:".encode())
        with open(file, "rb") as handle:
            digest.update(handle.read(_EDGE))
            handle.seek(max(0, size - _EDGE))
            digest.update(handle.read(_EDGE))
    return digest.hexdigest()



"""What this installation has: versions, devices, readers, room, encoders that work here, and what one of them still needs.

- Facts that people paste into a question come first; what is wrong is said beside the fact, with the way out.
- Nothing is downloaded and no network is asked.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from wsimil.encoders import describe_encoder, encoder_rows
from wsimil.encoders.hub import cache_folder

__all__ = ["examine"]

_PACKAGES = ("wsimil", "torch", "timm", "lightning", "openslide-python", "tifffile", "h5py", "numpy", "huggingface-hub")
_GB = 1e9
_LITTLE_SHARED_GB = 1.0  # what containers are given by default is 0.064


def examine(encoder: str | None = None) -> str:
    """A page of facts; with `encoder`, what that encoder needs and how to get it.

    Raises:
        EncoderError: the name of the encoder cannot be understood; the nearest known one is said.
    """
    asked = [] if encoder is None else ["", describe_encoder(encoder)]  # first: a wrong name needs no page
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [_package(name) for name in _PACKAGES]
    lines += ["", *_devices(), *_readers(), *_room()]
    return "\n".join([*lines, *(asked or _encoders())])


def _package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name}: not installed by pip"


def _devices() -> list[str]:
    lines = [f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            lines.append(f"GPU {index}: {facts.name}, {facts.total_memory / _GB:.0f} GB, CUDA {torch.version.cuda}")
    elif torch.backends.mps.is_available():
        lines.append("GPU: Apple (mps)")
    else:
        built = "this torch is built without CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda} finds none"
        lines.append(f"GPU: none that torch can use ({built}); extraction and training run on the CPU")
    return lines


def _readers() -> list[str]:
    try:
        from wsimil.slides import readers
    except (ImportError, OSError) as error:
        return [f"slides: OpenSlide cannot be loaded ({error}); `pip install openslide-bin` brings its library"]
    return [f"slides: OpenSlide {readers.openslide.__library_version__}; plain images by Pillow"]


def _room() -> list[str]:
    lines = [_place("temporary files", Path(tempfile.gettempdir()), "TMPDIR")]
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / _GB
        few = "" if free >= _LITTLE_SHARED_GB else "; little: in a container start it with --shm-size=8g, else pass fewer --workers"
        lines.append(f"shared memory: {free:.1f} GB free{few}")
    return [*lines, _place("weights cache", cache_folder(), "HF_HOME")]


def _place(what: str, folder: Path, variable: str) -> str:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        return f"{what}: {folder} cannot be written; set {variable} to a folder that can"
    return f"{what}: {folder}, {shutil.disk_usage(there).free / _GB:.0f} GB free"


def _encoders() -> list[str]:
    rows = encoder_rows()
    here = [row["name"] for row in rows if row["available"]]
    return [
        "",
        f"encoders that work here without network: {', '.join(here)} ({len(rows) - len(here)} more can be had: `wsimil encoders`)",
        "`wsimil doctor --encoder NAME` says what one needs and how to get it",
    ]

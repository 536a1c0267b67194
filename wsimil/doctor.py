"""What this installation has: versions, devices, readers, and what an encoder still needs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from wsimil.encoders import describe_encoder

__all__ = ["examine"]

_PACKAGES = ("wsimil", "torch", "timm", "lightning", "openslide-python", "openslide-bin", "h5py", "numpy", "huggingface-hub")


def examine(encoder: str | None = None) -> str:
    """A page of facts; with `encoder`, also what that encoder needs and how to get it."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for package in _PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package}: not installed by pip")
    lines.append(f"CPU threads for torch: {torch.get_num_threads()}")
    if torch.cuda.is_available():
        lines += [f"GPU {index}: {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    else:
        lines.append("GPU: none that torch can use; extraction and training run on the CPU")
    if encoder is not None:
        lines += ["", describe_encoder(encoder)]
    return "\n".join(lines)

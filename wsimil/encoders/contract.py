"""What an encoder asks of its tiles and what it gives back: the facts that travel into every bag.

- No torch here, so encoders are listed in an instant.
- `recipe()` holds what decides the numbers of a vector; `folder_name` what a person reads in a job folder.
- `mpp` is the µm/px of the tiles as its authors cut them; `trained_mpps` holds all of them where there were several.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, log
from typing import Any, Literal

__all__ = ["FINGERPRINT_START", "IMAGENET_MEAN", "IMAGENET_STD", "EncoderContract", "Interpolation", "Pooling", "safe_name"]

Pooling = Literal["cls", "mean", "cls+mean", "model", "layer3", "self-vit-mil"]
"""How the tokens of a tile become one vector.

cls           class token after the final norm
mean          mean of the patch tokens after the final norm (no class, no register tokens)
cls+mean      both, concatenated
model         whatever the network itself pools
layer3        mean of the third stage's map (the truncated ResNet-50 of CLAM)
self-vit-mil  class tokens of the last four blocks after the final norm, then the mean patch token: 5 × width (arXiv 2210.09021)
"""

Interpolation = Literal["bilinear", "bicubic"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FINGERPRINT_START = 16
"""So many characters of a slide's fingerprint are kept: enough to know it by."""

_SCALE_TOLERANCE = 1.25
"""Farther than this factor from the trained scale is worth a remark; authors themselves cut 256 px and feed 224."""


@dataclass(frozen=True)
class EncoderContract:
    """Facts about one encoder. `sha256` is empty until weights are known."""

    name: str
    architecture: str
    dim: int  # numbers per tile; 0: not known before the network is built
    tile_px: int | None = None  # side of the network's input; None: takes any and resizes nothing
    mpp: float | None = None  # µm/px of the training tiles; None: not known, or not pathology
    trained_mpps: tuple[float, ...] = ()
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    interpolation: Interpolation = "bicubic"
    pooling: Pooling = "model"
    sha256: str = ""
    local: bool = False  # weights from a file the user named: the folder name then says which
    licence: str = ""
    gated: bool = False
    source: str = ""
    revision: str = ""  # the hub's commit that the weights at hand came from; empty: not from the hub, or not known
    note: str = ""
    seen: tuple[tuple[str, str], ...] = ()  # slides it was trained on: id, and the start of the fingerprint ("" of tile folders)
    transductive: bool = False  # trained on slides that are tested, knowingly
    stain: str = ""  # how the colours of its training tiles were made alike: none, macenko, reinhard; empty: not known

    def __post_init__(self) -> None:
        if self.dim < 0 or (self.tile_px is not None and self.tile_px < 1) or min(self.std) <= 0:
            raise ValueError(
                f"encoder {self.name}: dim {self.dim}, tile_px {self.tile_px}, std {self.std}; expected positive numbers"
            )
        if not all(isfinite(value) for value in (*self.mean, *self.std)):
            raise ValueError(f"encoder {self.name}: mean {self.mean}, std {self.std}; expected finite numbers")
        if not all(isfinite(mpp) and mpp > 0 for mpp in (*self.trained_mpps, *(() if self.mpp is None else (self.mpp,)))):
            raise ValueError(
                f"encoder {self.name}: mpp {self.mpp}, trained_mpps {self.trained_mpps}; expected finite µm/px above 0, or none"
            )

    @cached_property
    def seen_slides(self) -> frozenset[str]:
        """Starts of the fingerprints of the slides it was trained on."""
        return frozenset(content for _, content in self.seen if content)

    @cached_property
    def _seen_by_name(self) -> tuple[frozenset[str], frozenset[str]]:
        """Ids of the slides it was trained on: those that are known by nothing else, and all."""
        return frozenset(name for name, content in self.seen if not content), frozenset(name for name, _ in self.seen)

    def saw(self, slide_id: str, fingerprint: str = "") -> bool:
        """Whether it was trained on this slide: by content, and by id where either side has no fingerprint."""
        nameless, everything = self._seen_by_name
        if not fingerprint:
            return slide_id in everything
        return fingerprint[:FINGERPRINT_START] in self.seen_slides or slide_id in nameless

    @property
    def folder_name(self) -> str:
        """`features_<name>`, `_self-vit-mil` where that embedding was asked for, `-<first 8 of sha256>` for local weights."""
        embedding = "_self-vit-mil" if self.pooling == "self-vit-mil" else ""
        weights = f"-{self.sha256[:8]}" if self.local else ""
        return f"features_{safe_name(self.name)}{embedding}{weights}"

    def recipe(self) -> dict[str, Any]:
        """What decides the vectors, JSON-like: equal recipes of equal tiles give equal features. Names and paths are not in it."""
        return {
            "architecture": self.architecture,
            "sha256": self.sha256,
            "dim": self.dim,
            "tile_px": self.tile_px,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "pooling": self.pooling,
        }

    def stain_remark(self, stain: str) -> str | None:
        """A sentence if its training tiles had their colours from elsewhere than tiles normalised by `stain` have."""
        if not self.stain or self.stain == stain:
            return None
        trained, given = ("the slides' own colours" if one == "none" else f"colours by {one}" for one in (self.stain, stain))
        return f"encoder {self.name} was trained on {trained} and would see {given}; it asks for --stain {self.stain}"

    def scale_remark(self, *, mpp: float, tile_px: int) -> str | None:
        """A sentence if the network would see tissue at a scale it was not trained at; tiles of `tile_px` pixels at `mpp` µm/px."""
        scales = self.trained_mpps or ((self.mpp,) if self.mpp else ())
        seen = mpp * tile_px / self.tile_px if self.tile_px else mpp
        if not scales or any(1 / _SCALE_TOLERANCE <= seen / scale <= _SCALE_TOLERANCE for scale in scales):
            return None
        *others, last = (f"{scale:g}" for scale in scales)
        trained = f"{', '.join(others)} and {last}" if others else last
        resized = f" ({tile_px} px at {mpp:g} µm/px, resized to {self.tile_px} px)" if self.tile_px not in (None, tile_px) else ""
        nearest = min(scales, key=lambda scale: abs(log(mpp / scale)))
        way_out = f"; it asks for --mpp {nearest:g}" + (f" --tile-px {self.tile_px}" if self.tile_px else "")
        return f"encoder {self.name} was trained at {trained} µm/px and would see {seen:.3g} µm/px{resized}{way_out}"


def safe_name(name: str) -> str:
    """A name as part of a folder name: letters, digits, `.`, `-` and `_`; anything else becomes `_`.

    >>> safe_name("hf-hub:org/model"), safe_name("random:vit_tiny_patch16_224:7")
    ('hf-hub_org_model', 'random_vit_tiny_patch16_224_7')
    """
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("._") or "encoder"

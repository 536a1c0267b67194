"""Stain normalisation: all slides given the colours of one target, by Macenko's or Reinhard's method.

- Estimated once per slide, from a sample of its tiles, and the same for all of them: on a single pale tile both methods fail, and
  differences between tiles of one slide are what is to be looked at.
- After that a pixel's new colour depends on its old one alone: no tile, batch or worker changes another's result.
- Only tissue is measured. A slide without enough of it, or without two stains, is refused with the reason, never guessed.
- numpy and OpenCV only: this runs in the processes that read tiles. Why no library: docs/decisions/0006-stain-normalisation.md.

Macenko et al., ISBI 2009: stain vectors are the extremes, within the plane of the two main directions, of the tissue's optical
densities; amounts are matched at their 99th percentile. Reinhard et al., IEEE CG&A 2001: mean and deviation in the lαβ space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
from PIL import Image

from wsimil.errors import SlideError, UsageError

__all__ = ["SAMPLE_TILES", "SlideStain", "StainMethod", "StainNormaliser", "StainTarget", "sample_rows", "stain_normaliser"]

StainMethod = Literal["macenko", "reinhard"]

VERSION = 1
"""Count up with any change that changes a pixel."""

SAMPLE_TILES = 64
"""Tiles of a slide that its stain is estimated from; fewer only if it has fewer."""

_MAX_PIXELS = 1_000_000
_MIN_PIXELS = 2_000
_LIGHT = 240.0  # the light that passes empty glass, as in the published Macenko references
_FAINT = 0.15  # optical density below which a pixel is glass
_BLACK = 2.5  # and above which it is pen, dust or a tile that could not be read
_MIN_ANGLE = 4.0  # degrees between the two stain vectors; those of the reference are 22 apart
_OD = -np.log((np.arange(256, dtype=np.float32) + 1) / _LIGHT)

_MACENKO_REFERENCE = (0.5626, 0.7201, 0.4062, 0.2159, 0.8012, 0.5581, 1.9705, 1.0308)
"""Haematoxylin and eosin as optical density (R G B each) and their strongest amounts; published with the staining-normalization
code of M. Veta (github.com/mitkovetta/staining-normalization) and used by most implementations since."""

_REINHARD_REFERENCE = (8.74108109, -0.12440419, 0.0444982, 0.6135447, 0.10989545, 0.0286032)
"""Means and deviations of l, α, β in tissue of TCGA-A2-A3XS-DX1 (Amgad et al. 2019), the standard in HistomicsTK's examples."""

_RGB_TO_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
_LMS_TO_LAB = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ np.array([[1.0, 1, 1], [1, 1, -2], [1, -1, 0]])


@dataclass(frozen=True)
class StainTarget:
    """What slides are made to look like: published values, or those of an image's tissue."""

    pixels: np.ndarray | None = None  # uint8 (N, 3); None: the published values
    name: str = "published"  # for messages; not part of the recipe

    @staticmethod
    def of_image(path: str | Path) -> StainTarget:
        """The look of an image file: a well-stained field, mostly tissue, at about the magnification of the tiles.

        Raises:
            UsageError: it is no image.
        """
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(f"stain target {path}: not an image that can be read ({error}); expected a PNG or JPEG") from error
        return StainTarget(pixels, str(path))


class SlideStain(ABC):
    """How the colours of one slide change: uint8 (n, h, w, 3) or (h, w, 3) → the same shape.

    Attributes:
        measured: the slide's own stain; `StainNormaliser.of` makes the same change of it again.
    """

    measured: tuple[float, ...]

    @abstractmethod
    def _tile(self, tile: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    @abstractmethod
    def attributes(self) -> dict[str, Any]:
        """What was measured on the slide, JSON-like, for the provenance in its files."""
        raise NotImplementedError

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        if tiles.dtype != np.uint8 or tiles.ndim not in (3, 4) or tiles.shape[-1] != 3:
            raise ValueError(f"tiles are {tiles.dtype} {tiles.shape}; expected uint8 (n, h, w, 3) or (h, w, 3)")
        if tiles.ndim == 3:
            return self._tile(tiles)
        result = np.empty_like(tiles)
        for row, tile in enumerate(tiles):  # one at a time: its floats stay in the processor's cache
            result[row] = self._tile(tile)
        return result


@dataclass(frozen=True)
class StainNormaliser:
    """A method and its target; `fit` makes of it what one slide needs. Small, and can be sent to another process."""

    method: StainMethod
    target: tuple[float, ...]

    def fit(self, tiles: np.ndarray) -> SlideStain:
        """Measure a slide on a sample of its tiles, uint8 (n, h, w, 3); see `sample_rows`.

        Raises:
            SlideError: its stain cannot be estimated; it says why and what to do.
        """
        try:
            measured = _measure(self.method, tiles)
        except _NoStainError as error:
            raise SlideError(
                f"its stain cannot be estimated from {len(tiles)} tiles: {error}; run it with --stain none, or set it aside"
            ) from error
        return self.of(measured)

    def of(self, measured: tuple[float, ...]) -> SlideStain:
        """The change for a slide that was measured before."""
        return (_MacenkoStain if self.method == "macenko" else _ReinhardStain)(measured, self.target)

    def recipe(self) -> dict[str, Any]:
        """What decides the new colours, besides the slide: part of every recipe hash."""
        return {
            "method": self.method,
            "version": VERSION,
            "sample_tiles": SAMPLE_TILES,
            "target": [round(value, 6) for value in self.target],
        }


def stain_normaliser(method: StainMethod, target: StainTarget | None = None) -> StainNormaliser:
    """The normaliser to `target` (None: the published values).

    Raises:
        UsageError: the method is unknown, or the stain of the target image cannot be estimated.
    """
    if method not in get_args(StainMethod):
        raise UsageError(f"stain method is {method!r}; expected {' or '.join(get_args(StainMethod))}")
    if target is None or target.pixels is None:
        return StainNormaliser(method, _MACENKO_REFERENCE if method == "macenko" else _REINHARD_REFERENCE)
    try:
        return StainNormaliser(method, _measure(method, target.pixels))
    except _NoStainError as error:
        raise UsageError(f"stain target {target.name}: {error}; choose a field that is mostly tissue") from error


def sample_rows(n_tiles: int) -> np.ndarray:
    """Which tiles of a slide its stain is estimated from: `SAMPLE_TILES` of them, evenly spaced in the slide's own order."""
    return np.unique(np.linspace(0, n_tiles - 1, min(n_tiles, SAMPLE_TILES)).round().astype(np.intp)) if n_tiles else np.arange(0)


# ---------------------------------------------------------------- measuring


class _NoStainError(Exception):
    """Why a set of pixels does not tell its stain."""


def _measure(method: StainMethod, tiles: np.ndarray) -> tuple[float, ...]:
    if tiles.dtype != np.uint8 or tiles.shape[-1:] != (3,):
        raise ValueError(f"tiles are {tiles.dtype} {tiles.shape}; expected uint8 (…, 3)")
    pixels = tiles.reshape(-1, 3)
    pixels = pixels[:: max(1, -(-len(pixels) // _MAX_PIXELS))]  # every k-th: the same pixels on every machine
    density = _OD[pixels]  # (N, 3)
    mean = density.mean(1)
    # Macenko's own rule leaves out a pixel if any channel is faint; lαβ needs the pale pink too, whose red is faint always
    stained = (density > _FAINT).all(1) if method == "macenko" else mean > _FAINT
    stained &= mean < _BLACK
    count = int(stained.sum())
    if count < _MIN_PIXELS:
        raise _NoStainError(f"{count} of {len(pixels)} pixels are stained, at least {_MIN_PIXELS} are needed")
    return _macenko(density[stained].astype(np.float64)) if method == "macenko" else _reinhard(pixels[stained])


def _macenko(density: np.ndarray) -> tuple[float, ...]:
    """Optical densities (N, 3) → haematoxylin (3), eosin (3), strongest amounts (2)."""
    _, directions = np.linalg.eigh(np.cov(density.T))
    plane = directions[:, [2, 1]]  # (3, 2), the main direction first
    plane *= np.where(plane.sum(0) < 0, -1, 1)  # the solver's sign is arbitrary; densities lie around the positive main direction
    angle = np.arctan2(*(density @ plane).T[::-1])
    low, high = np.percentile(angle, [1, 99])
    first, second = (plane @ [np.cos(phi), np.sin(phi)] for phi in (low, high))
    apart = float(np.degrees(high - low))
    if apart < _MIN_ANGLE:
        raise _NoStainError(f"there is one stain only: all its colours lie within {apart:.1f}°")
    haematoxylin, eosin = (first, second) if first[0] > second[0] else (second, first)  # eosin lets red pass
    for stain in (haematoxylin, eosin):
        if not (stain[1] > stain[2] and stain[1] > 0):
            raise _NoStainError(
                f"not haematoxylin and eosin: a stain absorbs {'R {:.2f} G {:.2f} B {:.2f}'.format(*stain)} (pen, or another dye?)"
            )
    amounts = density @ np.linalg.pinv(np.stack([haematoxylin, eosin]))  # (N, 2)
    strongest = np.percentile(amounts, 99, axis=0)
    if strongest.min() < 0.05:
        raise _NoStainError(f"there is one stain only: the strongest amounts are {strongest[0]:.2f} and {strongest[1]:.2f}")
    return (*haematoxylin.tolist(), *eosin.tolist(), *strongest.tolist())


def _reinhard(pixels: np.ndarray) -> tuple[float, ...]:
    """RGB (N, 3) → means (3) and deviations (3) in lαβ."""
    lab = np.log((pixels + 1.0) @ _RGB_TO_LMS.T) @ _LMS_TO_LAB.T
    mean, deviation = lab.mean(0), lab.std(0)
    if deviation.min() < 1e-3:
        raise _NoStainError("all its colours are one")
    return (*mean.tolist(), *deviation.tolist())


# ---------------------------------------------------------------- changing


class _MacenkoStain(SlideStain):
    """Densities → amounts of the slide's two stains → densities of the target's: one matrix."""

    def __init__(self, slide: tuple[float, ...], target: tuple[float, ...]) -> None:
        self.measured = slide
        (own, own_strongest), (wanted, wanted_strongest) = (
            (np.reshape(values[:6], (2, 3)), np.array(values[6:])) for values in (slide, target)
        )
        amounts_to_density = (wanted * (wanted_strongest / own_strongest)[:, None]).T  # (3, 2)
        # OpenCV exponentiates; the sign and the logarithm of the light are put into the matrix' fourth column
        matrix = -amounts_to_density @ np.linalg.pinv(own).T
        self._matrix = np.column_stack([matrix, np.full(3, np.log(_LIGHT))]).astype(np.float32)  # (3, 4)

    def _tile(self, tile: np.ndarray) -> np.ndarray:
        light = cv2.exp(cv2.transform(cv2.LUT(tile, _OD), self._matrix))
        return _to_uint8(light)

    def attributes(self) -> dict[str, Any]:
        values = [round(value, 4) for value in self.measured]
        return {"stain_haematoxylin": values[:3], "stain_eosin": values[3:6], "stain_strongest": values[6:]}


class _ReinhardStain(SlideStain):
    """lαβ shifted and stretched; glass has no stain and keeps its colour, what is nearly glass is changed in part."""

    def __init__(self, slide: tuple[float, ...], target: tuple[float, ...]) -> None:
        self.measured = slide
        mean, deviation, wanted_mean, wanted_deviation = (
            np.array(values) for values in (slide[:3], slide[3:], target[:3], target[3:])
        )
        back = np.linalg.inv(_LMS_TO_LAB)
        stretch = back @ np.diag(wanted_deviation / deviation) @ _LMS_TO_LAB
        shift = back @ (wanted_mean - wanted_deviation / deviation * mean)
        plus_one = _RGB_TO_LMS.sum(1)  # pixels are counted from 1, so that black has a logarithm
        self._into = np.column_stack([_RGB_TO_LMS, plus_one]).astype(np.float32)
        self._change = np.column_stack([stretch, shift]).astype(np.float32)
        self._out = np.column_stack([np.linalg.inv(_RGB_TO_LMS), np.full(3, -1.0)]).astype(np.float32)

    def _tile(self, tile: np.ndarray) -> np.ndarray:
        pixels = tile.astype(np.float32)
        changed = cv2.transform(cv2.exp(cv2.transform(cv2.log(cv2.transform(pixels, self._into)), self._change)), self._out)
        density = cv2.transform(cv2.LUT(tile, _OD), np.full((1, 3), 1 / 3, np.float32))  # (h, w)
        stained = np.clip(density / _FAINT, 0, 1)[..., None]
        # a stretch would make pale tissue brighter than the glass beside it: a white rim round every vessel
        np.minimum(changed, np.maximum(pixels, _LIGHT), out=changed)
        return _to_uint8(pixels + stained * (changed - pixels))

    def attributes(self) -> dict[str, Any]:
        values = [round(value, 4) for value in self.measured]
        return {"stain_mean": values[:3], "stain_std": values[3:]}


def _to_uint8(light: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(light, out=light), 0, 255, out=light).astype(np.uint8)

"""How good the pixels of a tile are: two scores per tile, cheap enough to be taken of every tile that is read.

- Blur after Crete et al. 2007 (The blur effect: perception and estimation with a new no-reference perceptual blur metric):
  what a further strong blur takes from the differences of neighbouring pixels; of a tile that is blurred already, little.
- Two additions keep noise from passing for sharpness: differences that sensors and JPEG make by themselves do not count, and
  a tile with hardly any others is called blurred, not judged by the few it has.
- Darkness is the share of pixels that are darker than stain gets in any channel.
- Integer arithmetic on one tile at a time: the same score on every machine, whatever the batch.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np

__all__ = ["DARK", "QUALITY_VERSION", "tile_quality"]

QUALITY_VERSION = "1"
"""Part of the recipe of a bag: count it up with any change that changes a score."""

DARK = 40
"""A pixel is dark if its brightest channel is below this: stain lets some colour through. Of 1,800 H&E tiles (skin, colon, lung,
head and neck; the darkest are crowded nuclei and keratin) 99 in 100 have less than 2 % of such pixels, and none more than 5;
the cores of nearly black ink dots on a prostate (all below 70) consist of them by 79 %, padding wholly. Green and blue strokes
are not dark: the tissue mask tells those by colour. At 50, stain reaches 12 %."""

NOISE = 2
"""Grey levels: a difference of neighbours counts by what it has above this. Sensor noise and JPEG make 1 to 3 of their own;
without this a field far out of focus would look sharper than one a little out of focus."""

_TAPS = 9
"""Width of the mean that a tile is compared with: Crete's."""

_PRIOR = _TAPS // 2
"""Added for every pixel, in ninths of a grey level: as if each had half a level of difference that no blur takes away. Tissue
has 3 to 10 of its own, glass .1, which so ends near 1."""

_STEP = 3
"""Every third row is looked at, which is within .02 of all (.002 on average). Not every second: rows would keep their place
in JPEG's blocks of eight, and miss or count all the edges between blocks."""


def tile_quality(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of tiles, uint8 (n, px, px, 3) at tile scale: `blur` and `darkness`, (n,) float32 each, 0 to 1.

    blur: 0 sharp, 1 nothing sharp in it; NaN for tiles below 10 px. A finer scale shows the same focus as more blur, so a
    limit on it belongs to one scale.
    darkness: share of dark pixels.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(f"tiles are {pixels.dtype} {pixels.shape}; expected uint8 (n, px, px, 3)")
    blur, darkness = np.empty((2, len(pixels)), np.float32)
    for row, tile in enumerate(pixels):
        green = cv2.extractChannel(tile, 1)  # of all channels the one that both dyes take light from
        blur[row] = _blur(green)
        darkness[row] = _dark(green) and _dark(cv2.max(cv2.max(cv2.extractChannel(tile, 0), green), cv2.extractChannel(tile, 2)))
    return {"blur": blur, "darkness": darkness}


def _dark(grey: np.ndarray) -> float:
    """Share of dark pixels. Where green has none, no other channel need be looked at."""
    return 1 - cv2.countNonZero(cv2.threshold(grey, DARK - 1, 255, cv2.THRESH_BINARY)[1]) / grey.size


def _blur(grey: np.ndarray) -> float:
    """Share of the differences between neighbours that a mean over `_TAPS` pixels leaves; of the axis where it is more.

    Nothing has to be blurred for that: two neighbouring means differ by the pixel that enters less the one that leaves, over
    `_TAPS`. So nine times the difference of neighbours is compared with the difference of the pixels around them. What is cut
    off at 255 is no loss: the other is the smaller one there.
    """
    if min(grey.shape) <= _TAPS:
        return float("nan")
    here, columns, rows = grey[4:-5:_STEP, 4:-5], grey[4:-5:_STEP], grey[:, 4:-5]
    height, width = here.shape
    near, far = np.empty((2, 2 * height, width), np.uint8)  # first across, then down
    cv2.absdiff(here, columns[:, 5:-4], near[:height])
    cv2.absdiff(here, rows[5:-4:_STEP], near[height:])
    cv2.absdiff(columns[:, :-9], columns[:, 9:], far[:height])
    cv2.absdiff(rows[:-9:_STEP], rows[9::_STEP], far[height:])
    cv2.subtract(near, _noise(near.shape), near)  # never below zero
    nine = cv2.add(near, near)
    cv2.add(nine, nine, nine)
    cv2.add(nine, nine, nine)
    cv2.add(nine, near, nine)
    left = cv2.min(nine, far)
    prior = _PRIOR * here.size
    return max(
        (cv2.norm(left[side], cv2.NORM_L1) + prior) / (_TAPS * cv2.norm(near[side], cv2.NORM_L1) + prior)
        for side in (slice(0, height), slice(height, None))
    )


@functools.cache
def _noise(shape: tuple[int, int]) -> np.ndarray:
    return np.full(shape, NOISE, np.uint8)  # OpenCV subtracts an array twice as fast as a number

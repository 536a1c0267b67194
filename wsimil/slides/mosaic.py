"""A few tiles that stand for a slide: clustered by colour, spread over each cluster's area, rich in nuclei.

Yottixel (Kalra et al. 2020) and, with the nuclei, KimiaNet (Riasatian 2021, arXiv 2101.07903).

- Tiles are told apart by their RGB histograms at 5x (2 µm/px): nine kinds of tissue. Of each kind the same share is taken, so what
  is rare on the slide is in the mosaic, too.
- Within a kind, tiles are taken from all over the slide: neighbours look alike.
- Tiles with few nuclei are left out first. The nuclear ratio is the share of a tile whose haematoxylin stands out against the
  slide's own, so a pale slide is not emptied. The papers give no threshold that holds for other stainings; that the poorer half
  goes is our choice.
- Pure arithmetic on pixels and places; the same tiles give the same mosaic on every machine.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from wsimil.slides.slide import Slide

__all__ = ["MOSAIC_MPP", "Mosaic", "choose_mosaic", "mosaic_of_slide", "nuclear_ratio", "rgb_histograms"]

MOSAIC_MPP = 2.0
"""5x by the convention of 10x = 1 µm/px."""

_CLUSTERS = 9
_BINS = 8
_NUCLEAR_MPP = 1.0
"""µm/px at which nuclei are counted: they are 6 to 10 pixels wide there, and reading is four times cheaper than at .5."""

_HAEMATOXYLIN = np.array([0.650, 0.704, 0.286])
_EOSIN = np.array([0.072, 0.990, 0.105])
"""Optical densities of the two dyes in R, G, B (Ruifrok and Johnston 2001)."""


@dataclass(frozen=True)
class Mosaic:
    """Rows of a slide's tiles, in rising order, and the cluster of each."""

    rows: np.ndarray  # (M,) int64
    cluster: np.ndarray  # (M,) int64
    nuclear: np.ndarray  # (N,) of all tiles


def rgb_histograms(tiles: np.ndarray) -> np.ndarray:
    """Share of pixels in eight equal ranges of R, of G and of B: uint8 (n, h, w, 3) → float32 (n, 24)."""
    counts = [[np.bincount(tile[..., channel].ravel() >> 5, minlength=_BINS) for channel in range(3)] for tile in tiles]
    return np.array(counts, np.float32).reshape(len(tiles), 3 * _BINS) / max(1, tiles[0, ..., 0].size if len(tiles) else 1)


def nuclear_ratio(tiles: np.ndarray, *, threshold: float | None = None) -> tuple[np.ndarray, float]:
    """Share of each tile, uint8 (n, h, w, 3), that is nuclei, and the haematoxylin amount from which on it is.

    Args:
        threshold: of the amount; None chooses it by Otsu's method over all these tiles, which should be one slide's.
    """
    if not len(tiles):
        return np.zeros(0, np.float32), 0.0 if threshold is None else threshold
    amounts = np.stack([_haematoxylin(tile) for tile in tiles])  # (n, h, w)
    if threshold is None:
        # Otsu wants 256 levels; two units of density are more than any nucleus has
        levels = np.clip(amounts * (255 / 2), 0, 255).astype(np.uint8).reshape(1, -1)
        # OpenCV names the last level below: what is above begins with the next
        threshold = (float(cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[0]) + 1) * 2 / 255
    return (amounts >= threshold).mean((1, 2), dtype=np.float64).astype(np.float32), threshold


def choose_mosaic(
    descriptors: np.ndarray,
    coords: np.ndarray,
    *,
    most: int = 55,
    clusters: int = _CLUSTERS,
    nuclear: np.ndarray | None = None,
    keep: float = 0.5,
    seed: int = 0,
) -> Mosaic:
    """At most `most` of N tiles, or all where there are no more.

    Args:
        descriptors: (N, K) what tiles are told apart by: `rgb_histograms`, or an encoder's features.
        coords: (N, 2) where they are, in any unit.
        most: tiles in the mosaic; KimiaNet's have about 55.
        clusters: kinds of tissue, fewer where there are fewer different tiles.
        nuclear: (N,) nuclear ratio; the share `keep` of the tiles that have most is what the mosaic is made from.
    """
    n = len(descriptors)
    ratios = np.ones(n, np.float32) if nuclear is None else nuclear
    pool = np.arange(n)
    if nuclear is not None:
        # a slide of few tiles keeps enough for its mosaic
        count = min(n, max(round(keep * n), most))
        pool = np.sort(np.argsort(-ratios, kind="stable")[:count])
    kinds = _clusters(descriptors[pool], clusters, seed)
    chosen: list[np.ndarray] = []
    shares = _proportional(np.bincount(kinds), most)
    for kind, count in enumerate(shares.tolist()):
        members = pool[kinds == kind]
        chosen.append(members[_spread(coords[members], count, seed)])
    rows = np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)
    return Mosaic(rows, kinds[np.searchsorted(pool, rows)], ratios)


def mosaic_of_slide(
    slide: Slide, coords_level0_px: np.ndarray, *, tile_level0_px: float, most: int = 55, keep: float = 0.5, seed: int = 0
) -> Mosaic:
    """The mosaic of a slide's tiles: histograms at 2 µm/px, nuclei at 1 µm/px, both read from its pyramid.

    Raises:
        SlideReadError: the file breaks there.
    """
    tile_um = tile_level0_px * slide.known_mpp()

    def read(mpp: float, row: int) -> np.ndarray:
        x, y = coords_level0_px[row].tolist()
        return slide.read_tile(x, y, tile_level0_px=tile_level0_px, tile_px=max(8, round(tile_um / mpp)))

    n = len(coords_level0_px)
    histograms = np.zeros((n, 3 * _BINS), np.float32)
    nuclear, threshold = np.zeros(n, np.float32), None
    if n:
        # one threshold for the slide, from tiles all over it: memory for all of them there is not
        sample = np.unique(np.linspace(0, n - 1, min(n, 32)).round().astype(np.intp))
        _, threshold = nuclear_ratio(np.stack([read(_NUCLEAR_MPP, row) for row in sample.tolist()]))
    for row in range(n):
        histograms[row] = rgb_histograms(read(MOSAIC_MPP, row)[None])[0]
        nuclear[row] = nuclear_ratio(read(_NUCLEAR_MPP, row)[None], threshold=threshold)[0][0]
    return choose_mosaic(histograms, coords_level0_px, most=most, nuclear=nuclear, keep=keep, seed=seed)


def _haematoxylin(tile: np.ndarray) -> np.ndarray:
    """Amount of haematoxylin in each pixel, (h, w) float32."""
    density = -np.log((tile.astype(np.float32) + 1) / 256)
    residual = np.cross(_HAEMATOXYLIN, _EOSIN)
    dyes = np.stack([row / np.linalg.norm(row) for row in (_HAEMATOXYLIN, _EOSIN, residual)])  # (3, 3)
    return density @ np.linalg.inv(dyes)[:, 0].astype(np.float32)


def _clusters(descriptors: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Cluster (N,) of each row, from 0 without gaps."""
    clusters = min(clusters, len(descriptors))
    if clusters < 2:
        return np.zeros(len(descriptors), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different tiles than clusters: the rest stay empty
        found = _k_means(clusters, seed, starts=3).fit_predict(descriptors.astype(np.float64))
    return np.unique(found, return_inverse=True)[1]


def _k_means(clusters: int, seed: int, *, starts: int) -> KMeans:
    settings: dict[str, Any] = {"n_init": starts, "random_state": seed}  # its own annotation of n_init knows "auto" alone
    return KMeans(clusters, **settings)


def _proportional(sizes: np.ndarray, most: int) -> np.ndarray:
    """How many to take of each cluster: in proportion, at least one of each, no more than there are, `most` in all."""
    if sizes.sum() <= most:
        return sizes
    exact = sizes * (most / sizes.sum())
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    while counts.sum() > most:  # more clusters than tiles asked for, or many that are tiny: the fullest gives way
        counts[np.argmax(counts - exact)] -= 1
    order = np.argsort(-(exact - counts), kind="stable")
    for kind in order[: most - counts.sum()]:
        counts[kind] += 1
    return np.minimum(counts, sizes)


def _spread(coords: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of the places, (n, 2), all over them: of as many clusters of neighbours the one in the middle."""
    if count >= len(coords):
        return np.arange(len(coords))
    if count < 1:
        return np.empty(0, np.intp)
    places = coords.astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        centres = _k_means(count, seed, starts=1).fit(places).cluster_centers_
    taken: list[int] = []
    free = np.ones(len(places), bool)
    for centre in centres:
        distance = np.where(free, ((places - centre) ** 2).sum(1), np.inf)
        taken.append(int(distance.argmin()))
        free[taken[-1]] = False
    return np.array(taken)

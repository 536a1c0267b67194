"""Painted H&E slides with planted tumours: what the demo and the tests look at where no real slide can be had.

- The scene is drawn in micrometres: one seed gives the same tissue at every µm/px, so scanners can be compared.
- Every kind of structure has its own random stream: planting a tumour changes nothing outside it.
- Amounts of two dyes are painted, then turned into light by absorption (Beer-Lambert), as on the glass.
- Nothing but the tumour tells a tumour slide: dark, crowded lymphocytes, glands and fat come with every seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np

__all__ = ["Lesion", "PaintedSlide", "Pen", "Scanner", "Stain", "paint_slide", "place_lesions"]

Pen = Literal["green", "blue", "black"]

_PEN_TRANSMISSION = {"green": (0.10, 0.50, 0.28), "blue": (0.12, 0.22, 0.62), "black": (0.08, 0.08, 0.10)}


@dataclass(frozen=True)
class Lesion:
    """A tumour: its centre on the slide, and the radius that its irregular border keeps to within 15 %."""

    x_um: float
    y_um: float
    radius_um: float


@dataclass(frozen=True)
class Stain:
    """Optical density (natural log, red green blue) that a full amount of each dye adds."""

    haematoxylin: tuple[float, float, float] = (1.30, 1.54, 0.68)
    eosin: tuple[float, float, float] = (0.14, 1.02, 0.54)

    @staticmethod
    def of_seed(seed: int) -> Stain:
        """A laboratory's day: strength ±20 %, hue ±10 %."""
        rng = _rng(seed, "stain")

        def vary(density: tuple[float, float, float]) -> tuple[float, float, float]:
            red, green, blue = np.array(density) * rng.uniform(0.82, 1.18) * rng.uniform(0.92, 1.08, 3)
            return float(red), float(green), float(blue)

        return Stain(vary(Stain.haematoxylin), vary(Stain.eosin))


@dataclass(frozen=True)
class Scanner:
    """What a scanner makes of light: the colour of empty glass, contrast as a factor on optical density, blur."""

    glass: tuple[int, int, int] = (243, 242, 244)
    contrast: float = 1.0
    blur_um: float = 0.25


@dataclass(frozen=True)
class PaintedSlide:
    rgb: np.ndarray  # (H, W, 3) uint8 at mpp
    mpp: float
    tumour: np.ndarray  # (height_um, width_um) bool: one pixel of a mask is 1 µm, whatever mpp is
    tissue: np.ndarray  # likewise; fat and lumina belong to it, holes and cracks do not


def paint_slide(
    width_um: float,
    height_um: float,
    *,
    mpp: float,
    seed: int,
    lesions: Sequence[Lesion] = (),
    pen: Pen | None = None,
    stain: Stain | None = None,
    scanner: Scanner = Scanner(),
) -> PaintedSlide:
    """Paint one slide; `stain=None` draws it from the seed. Tissue is put under a lesion planted on bare glass."""
    if pen is not None and pen not in get_args(Pen):
        raise ValueError(f"pen {pen!r}: expected one of {get_args(Pen)} or None")
    scene = _Scene(seed, (round(height_um), round(width_um)), lesions)
    width, height = round(width_um / mpp), round(height_um / mpp)
    rgb = _develop(scene, (height, width), mpp, stain or Stain.of_seed(seed), scanner)
    if pen is not None:
        _draw_pen(rgb, scene, mpp, _PEN_TRANSMISSION[pen])
    noise = _rng(seed, "sensor").normal(0, 1.6, (512, 512, 3)).round().astype(np.int8)
    _repeat(rgb, noise, lambda a, b: cv2.add(a, b, dtype=cv2.CV_8U))
    return PaintedSlide(rgb, mpp, scene.tumour, scene.tissue)


# ---------------------------------------------------------------- randomness and noise


def _rng(seed: int, part: str) -> np.random.Generator:
    return np.random.default_rng([seed, *part.encode()])


def _noise(rng: np.random.Generator, shape: tuple[int, int], grain: float) -> np.ndarray:
    """Smooth noise, mean 0 and deviation about 1, whose bumps are `grain` pixels apart."""
    if grain < 16:  # so fine that nobody sees a patch repeat
        patch = _enlarge(rng, (512, 512), grain)
        return np.tile(patch, [side // 512 + 1 for side in shape])[: shape[0], : shape[1]]
    if grain < 64:
        return _enlarge(rng, shape, grain)
    small = _enlarge(rng, (shape[0] // 8 + 2, shape[1] // 8 + 2), grain / 8)
    return cv2.resize(small, None, fx=8, fy=8, interpolation=cv2.INTER_LINEAR)[: shape[0], : shape[1]]


def _enlarge(rng: np.random.Generator, shape: tuple[int, int], grain: float) -> np.ndarray:
    cells = rng.standard_normal([int(side / grain) + 4 for side in shape], dtype=np.float32) * np.float32(1.35)
    field = cv2.resize(cells, None, fx=grain, fy=grain, interpolation=cv2.INTER_CUBIC)
    return field[int(grain) :, int(grain) :][: shape[0], : shape[1]]


def _ramp(x: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((x - low) / (high - low), 0, 1)


def _steepness(field: np.ndarray) -> np.ndarray:
    """Change per pixel, never quite 0: field / steepness is about the distance to where the field is 0."""
    return cv2.magnitude(cv2.Sobel(field, cv2.CV_32F, 1, 0), cv2.Sobel(field, cv2.CV_32F, 0, 1)) / 8 + 1e-4


def _scatter(rng: np.random.Generator, where: np.ndarray, pitch: float, jitter: float = 0.32) -> np.ndarray:
    """Points about `pitch` apart (jittered honeycomb) inside the mask, as x, y."""  # (n, 2)
    height, width = where.shape
    rows, columns = int(height / (pitch * 0.866)) + 2, int(width / pitch) + 2
    y, x = np.mgrid[:rows, :columns]
    x = (x + 0.5 * (y % 2) + rng.uniform(-jitter, jitter, x.shape)) * pitch
    y = (y * 0.866 + rng.uniform(-jitter, jitter, x.shape)) * pitch
    points = np.stack([x.ravel(), y.ravel()], 1)
    points = points[(points >= 0).all(1) & (points < (width, height)).all(1)]
    return points[where[_pixels(points)]]


def _pixels(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each point, to index an image with."""
    return points[:, 1].astype(int), points[:, 0].astype(int)


def _blob(rng: np.random.Generator, radius: float, roughness: float, detail: int = 7) -> np.ndarray:
    """A closed outline around (0, 0) whose distance from there stays within `roughness` of the radius."""  # (n, 2)
    angle = np.linspace(0, 2 * np.pi, 192, endpoint=False)
    k = np.arange(2, detail)[:, None]
    wobble = (rng.uniform(0.3, 1, k.shape) / k**0.8 * np.cos(k * angle + rng.uniform(0, 6.3, k.shape))).sum(0)
    r = radius * (1 + roughness * wobble / np.abs(wobble).max())
    return np.stack([r * np.cos(angle), r * np.sin(angle)], 1)


def _fill(image: np.ndarray, outline: np.ndarray, value: float) -> None:
    cv2.fillPoly(image, [np.round(outline * 16).astype(np.int32)], value, cv2.LINE_AA, 4)


# ---------------------------------------------------------------- the tissue


class _Scene:
    """Amounts of dye on a 1 µm grid, and where each kind of nucleus lies; nothing here depends on the scanner."""

    def __init__(self, seed: int, shape: tuple[int, int], lesions: Sequence[Lesion]) -> None:
        self.seed, self.shape = seed, shape
        self.nuclei: dict[str, np.ndarray] = {}  # kind -> (n, 3): x, y in µm, direction in radians
        self.tumour, self.tissue = _outline(seed, shape, lesions)
        self._stroma()
        self._fat()
        self._glands()
        self._vessels()
        self._lymphocytes()
        self._tumour()
        edge = cv2.GaussianBlur(self.tissue.astype(np.float32), (0, 0), 0.8)
        self.eosin *= edge
        self.haematoxylin *= edge
        light = _rng(seed, "light")  # uneven, as seen on the glass; the fine part hides the steps of 8 bits
        self.haematoxylin += 0.006 + 0.005 * _noise(light, shape, 700) + 0.002 * _noise(light, shape, 1.2)
        for kind, nuclei in self.nuclei.items():
            nuclei = nuclei[(nuclei[:, :2] >= 0).all(1) & (nuclei[:, :2] < shape[::-1]).all(1)]
            at = _pixels(nuclei)  # no nuclei on glass, in fat or in a lumen
            self.nuclei[kind] = nuclei[(self.eosin[at] > 0.12) & (self.tumour[at] == (kind == "tumour"))]

    def _stroma(self) -> None:
        """Wavy fibres: noise that is long along one coordinate and short along the other, both coordinates bent."""
        rng = _rng(self.seed, "stroma")
        y, x = np.ogrid[: self.shape[0], : self.shape[1]]
        tilt = rng.uniform(0, np.pi)
        bend = [80 * _noise(rng, self.shape, 280) + 14 * _noise(rng, self.shape, 70) for _ in range(2)]
        along = bend[0] + (x * math.cos(tilt) + y * math.sin(tilt)).astype(np.float32)
        across = bend[1] + (y * math.cos(tilt) - x * math.sin(tilt)).astype(np.float32)
        along -= along.min()
        across -= across.min()

        def fibres(length: float, width: float) -> np.ndarray:
            cells = [int(across.max() / width) + 2, int(along.max() / length) + 2]
            grain = cv2.GaussianBlur(rng.standard_normal(cells, dtype=np.float32), (0, 0), 0.7) * 2.2
            return cv2.remap(grain, along / length, across / width, cv2.INTER_LINEAR)

        thin, bundle = fibres(22, 1.7), fibres(90, 7)
        dense = _noise(rng, self.shape, 180)
        self.eosin = 0.37 + 0.05 * thin + 0.065 * bundle + 0.06 * dense
        self.eosin *= 1 - 0.75 * _ramp(-bundle, 1.1, 1.9)  # clefts between bundles
        self.haematoxylin = 0.035 + 0.012 * thin
        crowd = _noise(rng, self.shape, 90)
        points = np.concatenate([_scatter(rng, crowd > 0.2, 27, 0.5), _scatter(rng, crowd <= 0.2, 46, 0.5)])
        slope_x, slope_y = (cv2.Sobel(across, cv2.CV_32F, *axis)[_pixels(points)] for axis in ((1, 0), (0, 1)))
        self._add("spindle", points, np.arctan2(-slope_x, slope_y) + rng.normal(0, 0.2, len(points)))

    def _add(self, kind: str, points: np.ndarray, direction: np.ndarray) -> None:
        new = np.concatenate([points, direction[:, None]], 1)
        self.nuclei[kind] = np.concatenate([self.nuclei[kind], new]) if kind in self.nuclei else new

    def _window(self, x: float, y: float, reach: int) -> tuple[tuple[slice, slice], np.ndarray]:
        """The part of the canvas around (x, y), and where (x, y) is in it."""
        left, top = max(0, int(x) - reach), max(0, int(y) - reach)
        return (slice(top, int(y) + reach), slice(left, int(x) + reach)), np.array([x - left, y - top])

    def _clear(self, where: np.ndarray, window: tuple[slice, slice] = (slice(0, None), slice(0, None))) -> None:
        """Take away the nuclei painted so far inside the mask."""
        for kind, nuclei in self.nuclei.items():
            local = nuclei[:, :2] - (window[1].start, window[0].start)
            (near,) = np.nonzero((local >= 0).all(1) & (local < where.shape[::-1]).all(1))
            self.nuclei[kind] = np.delete(nuclei, near[where[_pixels(local[near])]], axis=0)

    def _fat(self) -> None:
        """Bubbles with thin walls, near the rim: a cell is what lies nearer to its own centre than to any other."""
        rng = _rng(self.seed, "fat")
        half = (self.shape[0] // 2 + 1, self.shape[1] // 2 + 1)  # bubbles are large and smooth: a 2 µm grid will do
        zone = _noise(rng, half, 160) > 1.4
        centres = _scatter(rng, np.ones(half, bool), 31, 0.3)
        self.fat = np.zeros(self.shape, bool)
        if not len(centres) or not zone.any():
            return
        seeds = np.ones(half, np.uint8)
        seeds[_pixels(centres)] = 0
        _, owner = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
        label = np.asarray(owner, np.intp)
        wall = cv2.morphologyEx(owner.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8)) > 0
        from_wall = cv2.distanceTransform((~wall).astype(np.uint8), cv2.DIST_L2, 3)
        from_wall = cv2.GaussianBlur(from_wall, (0, 0), 2)
        is_fat = np.zeros(len(centres) + 1, np.float32)
        is_fat[label[_pixels(centres)]] = zone[_pixels(centres)]
        empty, fat = (
            cv2.resize(field, None, fx=2, fy=2)[: self.shape[0], : self.shape[1]]
            for field in (_ramp(from_wall, 1.4, 2.2) * is_fat[label], is_fat[label])
        )
        self.fat = fat > 0.5
        self.eosin *= 1 - empty
        self.haematoxylin *= 1 - empty
        self._clear(empty > 0.1)

    def _glands(self) -> None:
        """Rings of tall cells, nuclei at the base, around a pale lumen, in lobules."""
        rng = _rng(self.seed, "glands")
        zone = (_noise(rng, self.shape, 300) > 0.15) & ~self.fat
        cell, lumen, halo = (np.zeros(self.shape, np.float32) for _ in range(3))
        nuclei: list[np.ndarray] = []
        for x, y in _scatter(rng, zone, 118, 0.2):
            radius = rng.uniform(28, 56)
            stretch, tilt = rng.uniform(1, 1.5), rng.uniform(0, np.pi)
            turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
            shape = turn @ np.diag([stretch**0.5, stretch**-0.5]) @ turn.T
            ring = _blob(rng, 1, 0.13) @ shape
            height = min(rng.uniform(17, 22), 0.62 * radius)  # of the cells
            centre = np.array([x, y])
            _fill(halo, centre + ring * (radius + 2.5), 1)
            _fill(cell, centre + ring * radius, 1)
            _fill(lumen, centre + ring * (radius - height), 1)
            for depth, keep in ((5.0, 0.96), (9.5, 0.30)):
                path = ring * (radius - depth)
                steps = np.linalg.norm(np.roll(path, -1, 0) - path, axis=1)
                n = max(6, round(float(steps.sum()) / 5.6))
                at = (np.arange(n) + rng.uniform(-0.25, 0.25, n)) / n * len(path)
                whole, part = at.astype(int) % len(path), (at % 1)[:, None]
                points = path[whole] * (1 - part) + path[(whole + 1) % len(path)] * part + rng.normal(0, 0.8, (n, 2))
                outward = np.arctan2(points[:, 1], points[:, 0])
                nuclei.append(np.column_stack([points + centre, outward])[rng.random(n) < keep])
        grain = _noise(rng, self.shape, 2.5)
        self.eosin = self.eosin * (1 - 0.7 * halo * (1 - cell))
        self.eosin += cell * (0.34 + 0.035 * grain - self.eosin)
        self.haematoxylin += cell * (0.13 + 0.02 * grain - self.haematoxylin)
        mucin = 0.5 + 0.5 * _noise(rng, self.shape, 60)
        self.eosin += lumen * (0.05 * mucin - self.eosin)
        self.haematoxylin += lumen * (0.025 * mucin - self.haematoxylin)
        self._clear(halo > 0.1)
        if nuclei:
            found = np.concatenate(nuclei)
            self._add("gland", found[:, :2], found[:, 2])

    def _vessels(self) -> None:
        """Small vessels: a dense pink wall, red cells in the lumen, flat nuclei along it."""
        rng = _rng(self.seed, "vessels")
        anywhere = np.ones(self.shape, bool)  # not the tissue, which a lesion can enlarge: the stream would shift
        for x, y in _scatter(rng, anywhere, 420, 0.45):
            radius, full = rng.uniform(14, 30), rng.random() < 0.7
            ring = _blob(rng, radius, 0.12) @ np.array([[1.25, 0.2], [0.2, 0.8]])
            window, centre = self._window(x, y, 70)
            eosin, haematoxylin = self.eosin[window], self.haematoxylin[window]
            inner, outer = (np.zeros(eosin.shape, np.float32) for _ in range(2))
            _fill(outer, ring * 1.45 + centre, 1)
            _fill(inner, ring + centre, 1)
            eosin += (outer - inner) * (0.52 - eosin) * 0.8
            eosin *= 1 - inner
            haematoxylin *= 1 - inner
            self._clear(outer > 0.5, window)
            for cell in _scatter(rng, inner > 0.9, 6.0, 0.25) if full else ():
                red = rng.uniform(0.6, 0.8)
                cv2.circle(eosin, np.round(cell * 16).astype(int).tolist(), 46, red, -1, cv2.LINE_AA, 4)
            wall = ring[::16] * 1.08
            self._add("spindle", wall + np.array([x, y]), np.arctan2(wall[:, 1], wall[:, 0]) + np.pi / 2)

    def _lymphocytes(self) -> None:
        """Dense round aggregates and a thin scatter, with or without a tumour: dark and crowded, yet not the label."""
        rng = _rng(self.seed, "lymphocytes")
        anywhere = np.ones(self.shape, bool)
        for x, y in _scatter(rng, anywhere, 560, 0.45):
            radius = rng.uniform(45, 105)
            window, centre = self._window(x, y, 200)
            eosin, haematoxylin = self.eosin[window], self.haematoxylin[window]
            crowd = np.zeros(eosin.shape, np.float32)
            _fill(crowd, centre + _blob(rng, radius, 0.25), 1)
            soft, near = cv2.GaussianBlur(crowd, (0, 0), 6), cv2.GaussianBlur(crowd, (0, 0), 24)
            self._clear(crowd > 0.5, window)
            eosin += soft * (0.24 - eosin)
            haematoxylin += soft * (0.10 - haematoxylin)
            points = [
                _scatter(rng, near > 0.55, 6.5, 0.3),
                _scatter(rng, (near > 0.25) & (near <= 0.55), 9, 0.5),
                _scatter(rng, (near > 0.03) & (near <= 0.25), 17, 0.5),
            ]
            found = np.concatenate(points) + np.array([x, y]) - centre
            self._add("lymphocyte", found, rng.uniform(0, 6.3, len(found)))
        points = _scatter(rng, _noise(rng, self.shape, 120) > 0.3, 55, 0.5)
        self._add("lymphocyte", points, rng.uniform(0, 6.3, len(points)))

    def _tumour(self) -> None:
        """Solid sheets of large irregular cells, split into nests by thin strands of what was there before."""
        if not self.tumour.any():
            return
        rng = _rng(self.seed, "tumour")
        left, top, width, height = cv2.boundingRect(self.tumour.astype(np.uint8))
        window = slice(top, top + height), slice(left, left + width)
        tumour, eosin, haematoxylin = self.tumour[window], self.eosin[window], self.haematoxylin[window]
        fold, loose = _noise(rng, tumour.shape, 80), _noise(rng, tumour.shape, 60)
        depth = cv2.distanceTransform(np.pad(tumour, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
        strand_um = 2 + 2.5 * _noise(rng, tumour.shape, 110) + 8 * np.exp(-depth / 35)  # wider where it invades
        nest = tumour & (np.abs(fold) > strand_um * _steepness(fold))
        nest = cv2.GaussianBlur(nest.astype(np.float32), (0, 0), 1.2)
        grain = _noise(rng, tumour.shape, 3)
        strand = tumour * (1 - nest)
        eosin += strand * 0.8 * (eosin.clip(0.3, 0.4) - eosin)
        eosin += nest * (0.30 + 0.04 * grain + 0.03 * loose - eosin)
        haematoxylin += nest * (0.13 + 0.02 * grain - haematoxylin)
        crowded = loose <= 0.3
        points = [_scatter(rng, (nest > 0.5) & crowded, 12.5, 0.32), _scatter(rng, (nest > 0.5) & ~crowded, 14.5, 0.34)]
        found = np.concatenate(points) + np.array([left, top])
        self._add("tumour", found, rng.uniform(0, 6.3, len(found)))


def _outline(seed: int, shape: tuple[int, int], lesions: Sequence[Lesion]) -> tuple[np.ndarray, np.ndarray]:
    """Where the tumour and where the tissue is."""
    rng = _rng(seed, "outline")
    height, width = shape
    size = min(shape)

    def piece(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        x = np.abs((np.arange(width, dtype=np.float32) / width - cx) / rx)
        y = np.abs((np.arange(height, dtype=np.float32)[:, None] / height - cy) / ry)
        return 1 - (x**2.6 + y**2.6) ** (1 / 2.6)

    if rng.random() < 0.3:
        cut = rng.uniform(0.38, 0.62)
        field = np.maximum(
            piece(cut / 2 + 0.02, 0.5, cut / 2 - 0.03, rng.uniform(0.35, 0.42)),
            piece(cut / 2 + 0.5, 0.5, (1 - cut) / 2 - 0.05, rng.uniform(0.35, 0.42)),
        )
    else:
        field = piece(0.5, 0.5, rng.uniform(0.40, 0.44), rng.uniform(0.38, 0.42))
    for grain, depth in ((0.30, 0.08), (0.10, 0.03), (0.03, 0.012), (0.008, 0.005)):
        field += depth * _noise(rng, shape, max(2.0, grain * size))
    tissue = field > 0

    fold = _noise(rng, shape, 0.28 * size)
    opening = 7 * _noise(rng, shape, 0.15 * size) + 1.5 * _noise(rng, shape, 9) - 5
    tissue &= np.abs(fold) > _steepness(fold) * opening  # cracks
    tissue &= _noise(rng, shape, 45) < 2.6  # holes

    tumour = np.zeros(shape, np.uint8)
    for index, lesion in enumerate(lesions):
        centre = np.array([lesion.x_um, lesion.y_um])
        border = centre + _blob(_rng(seed, f"lesion {index}"), lesion.radius_um, 0.15, 24)
        cv2.fillPoly(tumour, [np.round(border).astype(np.int32)], 1)
    return tumour > 0, tissue | (tumour > 0)


def place_lesions(seed: int, width_um: int, height_um: int) -> tuple[Lesion, ...]:
    """One to three lesions that suit the slide of that seed: well inside its tissue, apart from one another.

    Radii are .1 to .3 of the slide's shorter side.
    """
    rng = _rng(seed, "lesions")
    short = min(width_um, height_um)
    _, tissue = _outline(seed, (height_um, width_um), ())
    room = cv2.distanceTransform(np.pad(tissue, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    n = rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2])
    lesions: list[Lesion] = []
    for _ in range(n):
        radius = short * rng.uniform(0.10, 0.30 if n == 1 else 0.17)
        x, y = rng.integers(0, (width_um, height_um), (200, 2)).T
        fit = room[y, x] / radius  # cracks count as glass here, so few places have room for all of a large one
        for other in lesions:
            fit = np.minimum(fit, np.hypot(x - other.x_um, y - other.y_um) / (1.2 * (radius + other.radius_um)))
        best = int(np.argmax(np.minimum(fit, 1)))
        lesions.append(Lesion(float(x[best]), float(y[best]), round(radius, 1)))
    return tuple(lesions)


# ---------------------------------------------------------------- the nuclei and the light


@dataclass(frozen=True)
class _Nucleus:
    length_um: tuple[float, float]
    aspect: tuple[float, float]
    roughness: float
    darkness: tuple[float, float]
    pale_inside: float
    clumps: int


_NUCLEI = {
    "spindle": _Nucleus((9, 15), (0.18, 0.36), 0.05, (0.60, 0.85), 0.15, 3),
    "gland": _Nucleus((6.8, 8.4), (0.62, 0.82), 0.05, (0.55, 0.75), 0.25, 4),
    "lymphocyte": _Nucleus((4.4, 5.9), (0.84, 1.0), 0.05, (0.70, 1.0), 0.18, 4),
    "tumour": _Nucleus((9, 13.5), (0.60, 0.95), 0.12, (0.50, 0.92), 0.50, 12),
}
_DIRECTIONS = 24
_VARIANTS = 6


def _stamps(kind: str, seed: int, mpp: float) -> np.ndarray:
    """Amounts of haematoxylin of ready-made nuclei, by direction and variant."""  # (directions * variants, n, n) uint8
    look, rng = _NUCLEI[kind], _rng(seed, f"stamps {kind}")
    n = _DIRECTIONS * _VARIANTS

    def draw(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)

    half = int(look.length_um[1] * 0.62 / mpp) + 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32) * np.float32(mpp)
    length, aspect = draw(*look.length_um), draw(*look.aspect)
    turn = (np.arange(n)[:, None, None] // _VARIANTS + draw(-0.5, 0.5)).astype(np.float32) * math.pi / _DIRECTIONS
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    across += draw(-0.4, 0.4) * along**2 / length  # a slight bend
    angle = np.arctan2(across / aspect, along)
    rim = 1 + sum(look.roughness / k**0.5 * draw(-1.5, 1.5) * np.cos(k * angle + draw(0, 6.3)) for k in (2, 3, 4))
    inward = 1 - np.hypot(along, across / aspect) / (length / 2 * rim)  # 1 in the middle, 0 on the rim
    cover = _ramp(inward * length / 2 * aspect, -0.45, 0.6)
    chromatin = 1 - look.pale_inside * _ramp(inward, 0.02, 0.6)
    for _ in range(look.clumps):
        r, phi = length / 2 * draw(0, 0.85), draw(0, 6.3)
        distance = (along - r * np.cos(phi)) ** 2 + (across - r * aspect * np.sin(phi)) ** 2
        chromatin += look.pale_inside * draw(-0.25, 0.75) * np.exp(-distance / draw(0.3, 1.5))
    return (255 * np.clip(cover * chromatin * draw(*look.darkness), 0, 1)).astype(np.uint8)


def _develop(scene: _Scene, shape: tuple[int, int], mpp: float, stain: Stain, scanner: Scanner) -> np.ndarray:
    height, width = shape

    def enlarge(amount: np.ndarray) -> np.ndarray:
        small = np.clip(amount * 255, 0, 255).astype(np.uint8)
        return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)

    margin = int(12 / mpp) + 4  # a nucleus on the rim is cut by the rim
    nuclear = np.zeros((height + 2 * margin, width + 2 * margin), np.uint8)
    for kind, nuclei in scene.nuclei.items():
        stamps = _stamps(kind, scene.seed, mpp)
        side = stamps.shape[-1]
        corner = np.round(nuclei[:, :2] / mpp).astype(int) + margin - side // 2
        which = np.round(nuclei[:, 2] / np.pi * _DIRECTIONS).astype(int) % _DIRECTIONS * _VARIANTS
        # by place, not from a stream: a nucleus that a tumour displaces leaves the others as they are
        which += (nuclei[:, :2] * 977).astype(int).sum(1) % _VARIANTS
        for (left, top), stamp in zip(corner.tolist(), stamps[which], strict=True):
            under = nuclear[top : top + side, left : left + side]
            np.maximum(under, stamp, out=under)
    nuclear = nuclear[margin:-margin, margin:-margin]
    eosin = cv2.multiply(enlarge(scene.eosin), cv2.convertScaleAbs(nuclear, alpha=-0.35, beta=255), scale=1 / 255)
    haematoxylin = cv2.max(enlarge(scene.haematoxylin), nuclear)
    for index, amount in enumerate((eosin, haematoxylin)):
        grain = cv2.resize(_noise(_rng(scene.seed, f"mottle {index}"), (256, 256), 0.8), None, fx=1 / mpp, fy=1 / mpp)
        grain = (128 + 14 * grain).clip(0, 255).astype(np.uint8)
        _repeat(amount, grain, lambda a, b: cv2.multiply(a, b, scale=1 / 128))

    level = np.arange(256, dtype=np.float64)[:, None] / 255
    by_haematoxylin = np.exp(-level * scanner.contrast * stain.haematoxylin) * scanner.glass  # (256, 3)
    by_eosin = np.exp(-level * scanner.contrast * stain.eosin) * 255
    light = [
        [cv2.LUT(amount, table.round().astype(np.uint8)) for table in tables.T]
        for amount, tables in ((haematoxylin, by_haematoxylin), (eosin, by_eosin))
    ]
    rgb = cv2.merge([cv2.multiply(first, second, scale=1 / 255) for first, second in zip(*light, strict=True)])
    return cv2.GaussianBlur(rgb, (0, 0), max(0.3, scanner.blur_um / mpp))


def _repeat(image: np.ndarray, patch: np.ndarray, join: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """Lay the patch over the image like floor tiles."""
    for y in range(0, image.shape[0], patch.shape[0]):
        for x in range(0, image.shape[1], patch.shape[1]):
            part = image[y : y + patch.shape[0], x : x + patch.shape[1]]
            part[...] = join(part, patch[: part.shape[0], : part.shape[1]])


def _draw_pen(rgb: np.ndarray, scene: _Scene, mpp: float, transmission: tuple[float, float, float]) -> None:
    """A felt pen's stroke along part of the tissue's outline, on top of the cover slip, so a little out of focus."""
    rng = _rng(scene.seed, "pen")
    height, width = scene.shape
    start = rng.uniform(0, 2 * np.pi)
    angle = start + np.linspace(0, rng.uniform(0.6, 1.1), 40)
    reach = np.hypot(height, width) / 2
    r = np.arange(0, reach, 2.0)
    x = np.clip(width / 2 + r * np.cos(angle)[:, None], 0, width - 1).astype(int)
    y = np.clip(height / 2 + r * np.sin(angle)[:, None], 0, height - 1).astype(int)
    last = r[np.where(scene.tissue[y, x], np.arange(len(r)), 0).max(1)]
    last = cv2.GaussianBlur(last.astype(np.float32)[:, None], (1, 0), 6, borderType=cv2.BORDER_REPLICATE)[:, 0]
    path = np.stack([width / 2 + last * np.cos(angle), height / 2 + last * np.sin(angle)], 1)
    thick = max(2, round(rng.uniform(0.045, 0.07) * min(scene.shape)))
    low = np.floor(path.min(0)).astype(int) - thick - 20
    ink = np.zeros(np.ceil(path.max(0)).astype(int)[::-1] + thick + 20 - low[::-1], np.uint8)
    cv2.polylines(ink, [np.round(path - low).astype(np.int32)], False, 255, thick, cv2.LINE_AA)
    ink = cv2.GaussianBlur(ink, (0, 0), 5).astype(np.float32)
    ink *= (0.82 + 0.10 * _noise(rng, ink.shape, 40) + 0.05 * _noise(rng, ink.shape, 6)).clip(0, 1)
    ink = cv2.resize(ink.astype(np.uint8), None, fx=1 / mpp, fy=1 / mpp)
    left, top = np.round(low / mpp).astype(int)
    ink = ink[max(0, -top) : rgb.shape[0] - top, max(0, -left) : rgb.shape[1] - left]
    under = rgb[max(0, top) :, max(0, left) :][: ink.shape[0], : ink.shape[1]]
    table = (255 * np.array(transmission) ** (np.arange(256)[:, None] / 255)).round().astype(np.uint8)[None]
    under[...] = cv2.multiply(under, cv2.LUT(cv2.merge([ink] * 3), table), scale=1 / 255)

"""Where the tissue is: from a small picture of the slide to a mask of tissue and one of pen.

- The picture's µm/px follows from the slide's physical size alone, never from its pyramid or from free memory.
- Glass is found first: flat, nearly colourless, in a patch too large for a lumen. A field without glass is all tissue.
- Absorbance is measured against the slide's own glass, so grey or yellow glass and any stain are treated alike. Colour
  counts for more than darkness: dust, bubbles, shading and coverslip edges are grey as a whole; stained tissue is not.
- Two thresholds: whatever is stained a little is tissue if it hangs together with something stained more than Otsu's
  threshold of all that is not glass. Pale stroma, fat and pale IHC stay; faint smears and dust go.
- Pen is told by the ratios of its absorbances, which thickness does not change, and by the width of a stroke. It has a
  mask of its own.
- Every length is physical (µm, mm²). No randomness, no model: the same picture gives the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

__all__ = ["TISSUE_VERSION", "TissueMask", "find_tissue", "tissue_mpp"]

TISSUE_VERSION = "auto-2"
"""Part of the recipe of a bag: count it up with any change that changes a mask."""

TISSUE_MPP = (8.0, 4.0, 2.0)
"""8 µm is a cell: a 112 µm tile is still 14 x 14 px, a 25 x 75 mm slide only 3,125 x 9,375. Finer for small fields."""
LONG_SIDE_PX = 512
"""A field with fewer pixels than this on its long side is looked at more finely, or it would be all edge."""

# Sizes on the glass.
GLASS_MM2 = 0.05
"""Smallest clear patch that is glass. Fat cells (.02) and most lumens are smaller, and stay in the tissue."""
TISSUE_MM2 = 0.01
"""Smallest piece of tissue; less than one tile of 224 px at 0.5 µm/px."""
PEN_MM2 = 0.03
"""Smallest pen mark: a felt tip's dot is .3 mm across or more; margin ink on the tissue itself is thinner."""
BLUR_UM = 8.0
"""Everything is judged on cell-sized averages, whatever the µm/px: single nuclei and JPEG noise decide nothing."""
WINDOW_UM = 40.0
"""Window in which flatness is measured, and the colour of a piece as a whole."""
NECK_UM = 16.0
"""Clear patches joined by a neck thinner than twice this are separate: lumens that cracks connect do not make glass."""
CLOSE_UM = 40.0
"""Gaps in tissue up to twice this are closed: the width of a fat cell, of which only the wall takes stain."""
STROKE_UM = 20.0
"""Half the width of the thinnest pen stroke, or of the rims of one whose middle ran dry."""
PEN_REACH_UM = 500.0
"""What has about a pen's colour is taken for it up to this far from a stroke: red ink pales into eosin's colour."""
PEN_RIM_UM = 60.0
"""A stroke fades out over about this width."""

# Absorbance: -log10 of transmitted light, averaged over BLUR_UM. Real glass varies by .005; pale stroma has .1.
DARKNESS_WEIGHT = 0.3
"""Stain: spread between channels + this times their mean. A grey speck (.1, .1, .1) is nearly glass, pale pink not."""
STAINED = 0.02
"""Stain that is more than glass shows."""
SURELY_STAINED = (0.035, 0.10)
"""Otsu's threshold stays inside this: dust cannot put it into the noise, nor dark nuclei put it above stroma."""
FLAT, FLAT_RELATIVE = 0.005, 0.05
"""Flat: standard deviation in a window below .005 + this share of the absorbance (shading grows with darkness)."""
GREY, GREY_RELATIVE = 0.012, 0.15
"""Grey: spread between channels below .012 + this share of the absorbance. Stains have a share of .4 and more."""
COLOURED = 0.25
"""Spread between channels as a share of absorbance, over a whole piece: so many pixels need no allowance for noise."""
GREY_TISSUE = 0.3
"""Silver stains are dark grey; grey paler than this is dirt or a shadow, unless it hangs together with stain."""
GREY_TISSUE_UM = 60.0
"""Half the width that dark grey tissue has somewhere; bubbles, hairs and the coverslip's edge are thin, dust is small."""
OFF_GLASS_RELATIVE = 0.35
"""What lies beside the glass is flat, may be less grey than GREY_RELATIVE and takes up a whole side of the picture."""
DARK = 0.5
"""Flat patches that are grey and darker than this are padding, the edge of the slide or black pen; not glass."""

_ABSORBANCE = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)


@dataclass(frozen=True)
class TissueMask:
    """What a slide shows, on a grid that covers its canvas exactly. `mask` and `pen` never overlap."""

    mask: np.ndarray  # (h, w) bool, tissue
    pen: np.ndarray  # (h, w) bool, ink on glass or on tissue
    mpp: float  # of the grid
    has_glass: bool  # False: everything but pen and dark edges is tissue


def tissue_mpp(width_um: float, height_um: float) -> float:
    """µm/px of the picture `find_tissue` wants of a slide of this size; a slide that is coarser is taken as it is."""
    for mpp in TISSUE_MPP:
        if max(width_um, height_um) / mpp >= LONG_SIDE_PX:
            return mpp
    return TISSUE_MPP[-1]


def find_tissue(rgb: np.ndarray, mpp: float, *, pen: bool = True) -> TissueMask:
    """Tissue and pen in a picture of the whole slide, uint8 (h, w, 3) at `mpp`.

    `pen=False` looks for no pen, for stains that are blue or green over wide areas themselves (trichrome, Alcian blue).
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or not rgb.size:
        raise ValueError(f"tissue wants a uint8 RGB picture (h, w, 3), got {rgb.dtype} {rgb.shape}")
    if rgb.shape[0] * rgb.shape[1] * mpp**2 < 2 * GLASS_MM2 * 1e6:
        # a field that somebody cut out: too small to hold both tissue and a patch of glass to tell it from
        everything = np.ones(rgb.shape[:2], bool)
        return TissueMask(mask=everything, pen=~everything, mpp=mpp, has_glass=False)
    planes = [_blur(_ABSORBANCE[plane], mpp) for plane in np.moveaxis(rgb, 2, 0)]  # 3 x (h, w), against white
    mean = _mean(planes)
    texture = _texture(mean, mpp)
    planes = _over_glass(planes, (texture < FLAT) & (mean < 0.2) & (rgb < 253).any(axis=2), mpp)

    mean, spread = np.maximum(_mean(planes), 0), _spread(planes)
    stain = spread + DARKNESS_WEIGHT * mean
    flat, grey = texture < FLAT + FLAT_RELATIVE * mean, spread < GREY + GREY_RELATIVE * mean
    glass = _larger(_open(flat & (grey | (stain < STAINED)) & (mean < DARK), NECK_UM / mpp), GLASS_MM2, mpp)
    beside = flat & (mean > 0.1) & (mean < DARK) & (spread < GREY + OFF_GLASS_RELATIVE * mean)
    glass |= _connected(beside, _full_sides(beside))
    dark = grey & (mean >= DARK)
    dark = _connected(dark, _larger(dark & flat, GLASS_MM2, mpp) | _full_sides(dark))
    ink = _find_pen(planes, dark, mpp) if pen else np.zeros_like(dark)
    outside = ink | _dilate(dark, 2 * BLUR_UM / mpp)  # the blur has smeared it
    if not glass.any():
        return TissueMask(~outside, ink, mpp, has_glass=False)

    unclear = ~(glass | outside)
    sure = np.clip(_otsu(stain[unclear]), *SURELY_STAINED)
    tissue = _close(unclear & (stain > STAINED), CLOSE_UM / mpp) & ~outside
    dark_grey = _open(tissue & grey & (mean > GREY_TISSUE), GREY_TISSUE_UM / mpp)
    tissue = _connected(tissue, ((stain > sure) & _coloured(tissue, planes, mpp)) | dark_grey)
    gaps = ~(tissue | outside)
    tissue |= gaps & ~_larger(gaps, GLASS_MM2, mpp)
    return TissueMask(_larger(tissue, TISSUE_MM2, mpp), ink, mpp, has_glass=True)


def _over_glass(planes: list[np.ndarray], candidates: np.ndarray, mpp: float) -> list[np.ndarray]:
    """Absorbances less those of the slide's glass; against white where there is too little glass to tell.

    Candidates leave out pure white, with which readers fill what was never scanned: it is not the glass's own colour.
    """
    candidates &= _spread(planes) < 0.1
    if np.count_nonzero(candidates) * mpp**2 < GLASS_MM2 * 1e6:
        return planes
    mean = _mean(planes)
    # The brightest of them, not the most: a large piece of pale tissue can be flat too.
    candidates &= mean < np.percentile(mean[candidates], 5) + 0.01
    return [plane - np.median(plane[candidates]) for plane in planes]


def _find_pen(planes: list[np.ndarray], dark: np.ndarray, mpp: float) -> np.ndarray:
    """Ink, (h, w): wide strokes of a pen's colour, and what is near them in the same colour."""
    edge = _connected(dark, _frame(dark.shape))  # padding or the slide's own edge, not ink
    red, green, blue = (np.maximum(plane, 1e-3) for plane in planes)
    least = np.minimum(np.minimum(red, green), blue)
    cyan = red - green
    crimson = blue > 0.62 * green
    dense = (red > 0.4) & (blue < 0.55 * green)  # blue ink over haematoxylin; alone, that is never so strong over a cell
    inks = (  # (surely ink, paler ink of that colour, what may be ink or tissue)
        # Green and blue ink take clearly more red than green light. Eosin, haematoxylin, DAB and blood take less, pale
        # blue counterstain up to 1.3 times as much.
        (
            ((red > 1.6 * green) & (red > 0.15)) | ((red > 1.1 * green) & (cyan > 0.15) & (red > 0.4)),
            ((red > 1.6 * green) & (cyan > 0.03)) | (dense & (red > green)),
            ((red > 1.05 * green) & (cyan > 0.03)) | (dense & (red > 0.9 * green)),
        ),
        # Red ink takes blue light almost as it takes green; eosin half as much. So does blood, but never so strongly.
        (
            (red < 0.25 * green) & crimson & (green > 0.7),
            (red < 0.18 * green) & crimson & (green > 0.05),
            (red < 0.25 * green) & crimson,
        ),
        # Black ink over anything: nothing comes through in any colour.
        (least > 0.7, least > 0.5, least > 0.4),
    )
    pen = dark & ~edge
    for surely, paler, alike in inks:
        core = _larger(surely & ~edge, PEN_MM2, mpp)
        if core.any():
            core = _larger(_open(core, STROKE_UM / mpp), PEN_MM2, mpp)
            pen |= core | _connected(paler | (alike & _dilate(core, PEN_REACH_UM / mpp)), core)
    pen = _dilate(pen, PEN_RIM_UM / mpp)
    gaps = ~pen
    return pen | (gaps & ~_larger(gaps, PEN_MM2, mpp))


def _mean(planes: list[np.ndarray]) -> np.ndarray:
    return (planes[0] + planes[1] + planes[2]) / 3


def _spread(planes: list[np.ndarray]) -> np.ndarray:
    a, b, c = planes
    return np.maximum(np.maximum(a, b), c) - np.minimum(np.minimum(a, b), c)


def _blur(plane: np.ndarray, mpp: float) -> np.ndarray:
    return cv2.GaussianBlur(plane, (0, 0), max(BLUR_UM / mpp, 0.5), borderType=cv2.BORDER_REPLICATE)


def _texture(plane: np.ndarray, mpp: float) -> np.ndarray:
    """Standard deviation in a window."""
    first, second = (cv2.blur(p, (_window_px(mpp),) * 2, borderType=cv2.BORDER_REPLICATE) for p in (plane, plane * plane))
    return np.sqrt(np.maximum(second - first * first, 0))


def _window_px(mpp: float) -> int:
    return max(3, 2 * round(WINDOW_UM / mpp / 2) + 1)


def _otsu(stain: np.ndarray) -> float:
    """Otsu's threshold, in steps of .004 up to 1; 0 for no pixels."""
    levels = np.clip(stain * 250, 0, 255).astype(np.uint8).reshape(-1, 1)
    return cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0] / 250 if len(levels) else 0.0


# Morphology by distances (right within 2 %): any radius costs the same, and the picture's edge neither adds nor takes.


def _distance(mask: np.ndarray) -> np.ndarray:
    return cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)


def _erode(mask: np.ndarray, radius_px: float) -> np.ndarray:
    return _distance(mask) > max(1.0, radius_px)


def _dilate(mask: np.ndarray, radius_px: float) -> np.ndarray:
    return ~_erode(~mask, radius_px)


def _open(mask: np.ndarray, radius_px: float) -> np.ndarray:
    return _dilate(_erode(mask, radius_px), radius_px)


def _close(mask: np.ndarray, radius_px: float) -> np.ndarray:
    return _erode(_dilate(mask, radius_px), radius_px)


def _larger(mask: np.ndarray, mm2: float, mpp: float) -> np.ndarray:
    """The connected parts of a mask that are at least so large."""
    labels: np.ndarray
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep: np.ndarray = stats[:, cv2.CC_STAT_AREA] * mpp**2 >= mm2 * 1e6
    keep[0] = False
    return keep[labels]


def _connected(mask: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The connected parts of a mask that contain a seed."""
    labels: np.ndarray
    n, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    keep: np.ndarray = np.bincount(labels[seeds & mask], minlength=n) > 0
    return keep[labels]


def _coloured(mask: np.ndarray, planes: list[np.ndarray], mpp: float) -> np.ndarray:
    """The connected parts of a mask that are not grey as a whole.

    Seen through a wide blur: the coloured fringes of dirt are on two sides of it and make up for each other, while the brown
    and the blue of one tissue lie further apart.
    """
    labels: np.ndarray
    n, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    wide = [cv2.blur(plane, (_window_px(mpp),) * 2, borderType=cv2.BORDER_REPLICATE) for plane in planes]
    spread, mean = (np.bincount(labels.ravel(), plane.ravel(), minlength=n) for plane in (_spread(wide), _mean(wide)))
    keep = spread >= COLOURED * mean
    keep[0] = False
    return keep[labels]


def _frame(shape: tuple[int, ...]) -> np.ndarray:
    """The outermost pixels of a picture."""
    frame = np.ones(shape, bool)
    frame[1:-1, 1:-1] = False
    return frame


def _full_sides(dark: np.ndarray) -> np.ndarray:
    """The sides of the picture that are dark nearly all along: a frame too thin to have a flat patch."""
    sides = np.zeros_like(dark)
    for side in (np.s_[0, :], np.s_[-1, :], np.s_[:, 0], np.s_[:, -1]):
        sides[side] = dark[side].mean() > 0.9
    return sides & dark

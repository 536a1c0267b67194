"""Units and shapes: the letters and words that every other module uses.

Shapes (at the end of a line, as in `# (B, H)`):
    B  bags in a batch           N  instances (tiles) of one bag      ΣN  instances of all bags of a batch
    D  width of the features     H  hidden width                      C   outputs (classes; binary is 1)
    K  attention heads/branches  M  extra outputs beside the bags, or models trained side by side

Lengths are said in the name:
    *_um         micrometres on the glass
    *_px         pixels of the tile, that is at the effective scale
    *_level0_px  pixels of the slide's finest level; (x, y), origin top left of the file's canvas
    mpp          micrometres per pixel, of the scale that the name says (slide_mpp, target_mpp, effective_mpp)
"""

from __future__ import annotations

MIN_MPP = 0.05
MAX_MPP = 20.0
"""A slide's µm/px outside these is a wrong tag, not a microscope (screen dots per inch give 353)."""

SNAP_TOLERANCE = 0.005
"""Largest relative error of the field of view for which a native or integer-reduced scale stands in for the asked one."""

UPSAMPLING_TOLERANCE = 1.10
"""A slide coarser than this many times the asked µm/px is refused unless upsampling was asked for."""


def nominal_magnification(mpp: float) -> int:
    """Objective magnification by the 10x = 1 µm/px convention; names folders, never decides a size."""
    return max(1, round(10.0 / mpp))


def rounded(value: float) -> str:
    """A number for people: three digits, and all of them before the point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"

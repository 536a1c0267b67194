"""What is minimised: one file per technique; objectives import the ground only and meet models through its protocols."""

from __future__ import annotations

from wsimil.objectives.slide_label import SlideLabel

__all__ = ["SlideLabel"]

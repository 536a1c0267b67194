"""The study on one page: numbers with intervals, plots, and every slide with its heatmap."""

from __future__ import annotations

from wsimil.report.page import write_report

__all__ = ["write_report"]

"""`health.html`: the panel's numbers over the run as small charts, each with what it says, and the pictures of the patch tokens.

It shows what health.csv and the pictures hold and computes nothing; it opens from the disk, with no server.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from wsimil.pretraining.health import MEANINGS

__all__ = ["health_page"]

_WIDTH, _HEIGHT, _EDGE = 300, 110, 8
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#222;max-width:1050px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:1.2rem}
figure{margin:0}figcaption{font-size:.82rem;color:#555}svg{width:100%;background:#f7f7f8;border-radius:4px}
.warning{background:#fdecea;padding:.5rem .8rem;border-radius:4px}img{max-width:100%}
"""


def health_page(name: str, rows: Sequence[Mapping[str, object]], pictures: Sequence[tuple[str, Path]]) -> str:
    """The page of a run with these rows of health.csv; `pictures` are (step, file in the run's folder `pictures`)."""
    body = [f"<h1>{html.escape(name)}</h1>"]
    body += [
        f'<p class="warning">step {row["step"]}: {html.escape(str(row["signs"]))}</p>' for row in rows if row.get("signs")
    ] or ["<p>No sign of collapse.</p>"]
    charts = [_chart(column, meaning, rows) for column, meaning in MEANINGS.items()]
    body += ['<div class="charts">', *filter(None, charts), "</div>"]
    if pictures:
        body.append(
            "<h2>Patch tokens</h2><p>Tiles, and below each its patches in the colours of three principal components: "
            "the borders of tissue should show, a pattern that is the same in every tile should not.</p>"
        )
        body += [
            f'<h3>step {html.escape(step)}</h3><img loading="lazy" src="pictures/{html.escape(path.name)}" alt="">'
            for step, path in pictures
        ]
        step, path = pictures[0]
        nearest = html.escape(path.name.replace("patches", "neighbours"))
        body.append(
            f"<h2>Nearest neighbours, step {html.escape(step)}</h2><p>A tile, then those most alike to the network.</p>"
            f'<img src="pictures/{nearest}" alt="">'
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(name)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _chart(column: str, meaning: str, rows: Sequence[Mapping[str, object]]) -> str:
    points = [(float(str(row["step"])), float(str(row[column]))) for row in rows if row.get(column) not in (None, "")]
    points = [point for point in points if math.isfinite(point[1])]
    if not points:
        return ""
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*points, strict=True))
    place = [
        (
            _EDGE + (_WIDTH - 2 * _EDGE) * (x - left) / ((right - left) or 1),
            _HEIGHT - _EDGE - (_HEIGHT - 2 * _EDGE) * (y - low) / ((high - low) or 1),
        )
        for x, y in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
    x, y = place[-1]
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}"><polyline points="{line}" fill="none" stroke="#3558a8" stroke-width="1.5"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#3558a8"/></svg>'
        f"<figcaption><b>{column} {points[-1][1]:.4g}</b> ({low:.3g} to {high:.3g}): {html.escape(meaning)}</figcaption></figure>"
    )

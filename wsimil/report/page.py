"""`report.html`: a page that opens from the disk, with no server and nothing from the network.

- It shows what the stages wrote and computes nothing: every number stands in `metrics.json` or `predictions.csv`, or is the
  mean of a slide's rows there.
- Names of slides and classes are data: they are escaped.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from wsimil.errors import UsageError
from wsimil.evaluation.table import mean_over_folds, read_predictions
from wsimil.files import read_json, write_text
from wsimil.units import rounded

__all__ = ["write_report"]

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse}td,th{padding:.25rem .8rem;text-align:left;border-bottom:1px solid #ddd}
.plots img{max-width:48%;margin-right:1%}
.slides{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:1rem}
.slides figure{margin:0;border:1px solid #ddd;border-radius:6px;overflow:hidden}.slides img{width:100%;display:block}
figcaption{padding:.4rem .6rem;font-size:.85rem}.wrong{background:#fdecea}.note{color:#666}
.leak{background:#fff4ce;padding:.4rem .6rem}
"""


def write_report(study: str | Path) -> Path:
    """Write `report.html` into a study's folder and return its path.

    Raises:
        UsageError: the study has no predictions or evaluation yet.
    """
    study = Path(study)
    try:
        metrics = read_json(study / "evaluation" / "metrics.json")
        predictions = mean_over_folds(read_predictions(study / "predictions" / "predictions.csv"))
    except OSError as error:
        raise UsageError(f"{study}: {error.filename} is missing; `wsimil run` makes a whole study") from error
    except ValueError as error:
        raise UsageError(f"{study / 'evaluation' / 'metrics.json'}: not JSON ({error}); `wsimil evaluate` makes it anew") from error
    body = [
        f"<h1>{html.escape(study.resolve().name)}</h1>",
        _counts(metrics),
        _leaks(metrics),
        "<h2>Metrics</h2>",
        _metric_table(metrics),
        _notes(metrics),
        _plots(metrics),
        f"<h2>Slides ({len(predictions)})</h2>",
        '<p class="note">Slides predicted wrongly come first. A picture opens in full size; the <code>.geojson</code> beside it '
        "opens in QuPath.</p>",
        _slides(study, predictions),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(study.resolve().name)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>"
    )
    path = study / "report.html"
    write_text(path, page)
    return path


def _counts(metrics: dict[str, Any]) -> str:
    names = {
        "n_slides": "slides",
        "n_evaluated": "evaluated",
        "n_empty": "without tissue",
        "n_failed": "failed",
        "n_without_label": "without label",
    }
    parts = [f"{metrics[key]} {text}" for key, text in names.items() if metrics.get(key) or key == "n_slides"]
    return f"<p>{', '.join(parts)}.</p>"


def _leaks(metrics: dict[str, Any]) -> str:
    """What makes the numbers look better than they are stands above them."""
    found = [text for path, text in (metrics.get("notes") or {}).items() if path.startswith("leak.")]
    return "".join(f'<p class="leak">{html.escape(str(text))}</p>' for text in found)


def _metric_table(metrics: dict[str, Any]) -> str:
    pooled = metrics.get("pooled", {}).get("metrics", {})
    folds = metrics.get("fold_mean", {}) or {}
    rows = []
    for name, entry in pooled.items():
        mean = folds.get(name) or {}
        rows.append(
            f"<tr><td>{html.escape(name)}</td><td>{_number(entry.get('value'))}</td>"
            f"<td>{_interval(entry)}</td><td>{_number(mean.get('value'))}</td><td>{_interval(mean)}</td></tr>"
        )
    head = "<tr><th></th><th>pooled</th><th>95 % interval</th><th>mean over folds</th><th>95 % interval</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(entry: dict[str, Any]) -> str:
    low, high = entry.get("low"), entry.get("high")
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _notes(metrics: dict[str, Any]) -> str:
    notes = [
        f"<li>{html.escape(path)}: {html.escape(str(text))}</li>"
        for path, text in (metrics.get("notes") or {}).items()
        if not path.startswith("leak.")
    ]
    return f'<ul class="note">{"".join(notes)}</ul>' if notes else ""


def _plots(metrics: dict[str, Any]) -> str:
    images = "".join(f'<img src="evaluation/{quote(name)}" alt="{html.escape(name)}">' for name in metrics.get("plots", []))
    return f'<h2>Plots</h2><div class="plots">{images}</div>' if images else ""


def _slides(study: Path, predictions: pd.DataFrame) -> str:
    table = predictions.assign(wrong=False)
    if "prediction" in table:
        cells = zip(table["status"], table["label"].astype(str), table["prediction"].astype(str), strict=True)
        table["wrong"] = [status == "done" and label != "" and _disagree(label, said) for status, label, said in cells]
    rows = table.sort_values(["wrong", "slide_id"], ascending=[False, True]).to_dict("records")
    figures = [_figure(study, row) for row in rows]
    return f'<div class="slides">{"".join(figures)}</div>'


def _disagree(label: str, prediction: str) -> bool:
    """Of several labels (`a=1;b=0`) those that are known count."""
    if "=" in prediction:
        return not set(label.split(";")) <= set(prediction.split(";"))
    return label != prediction


def _figure(study: Path, row: dict[str, Any]) -> str:
    name = str(row["slide_id"])
    picture = study / "heatmaps" / f"{name}.png"
    image = ""
    if picture.exists():
        link = f"heatmaps/{quote(name)}.png"
        image = f'<a href="{link}"><img loading="lazy" src="{link}" alt="{html.escape(name)}"></a>'
    text = html.escape(name)
    if row["status"] != "done":
        text += f"<br>{html.escape(str(row['status']))}"
    elif "prediction" in row:
        probability = row.get(f"prob_{row['prediction']}")  # several labels have none of their own
        chance = "" if probability is None else f" ({float(probability):.2f})"
        text += f"<br>{html.escape(str(row['prediction']))}{chance}, true {html.escape(str(row['label']))}"
    else:
        said = f"predicted {rounded(float(row['value']))}" if "value" in row else f"risk {rounded(float(row['risk']))}"
        text += f"<br>{said}, true {html.escape(str(row['label']))}"
    return f'<figure class="{"wrong" if row["wrong"] else ""}">{image}<figcaption>{text}</figcaption></figure>'

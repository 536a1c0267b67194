"""A toy cohort of painted slides: the same for everybody, made in a minute, with the truth beside it.

- What could give the label away without a look at the tumour (scanner, pen, slides per patient) is the same for both
  labels; stain, fat, glands and lymphocytes come from the slide's seed alone.
- The files do not depend on the number of workers; slides that are there are kept, so a killed run goes on.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np

from wsimil.errors import UsageError
from wsimil.slides.painting import Lesion, PaintedSlide, Pen, Scanner, Stain, paint_slide, place_lesions
from wsimil.slides.write_tiff import write_slide

__all__ = [
    "SITES",
    "CohortSlide",
    "Lesion",
    "PaintedSlide",
    "Pen",
    "Scanner",
    "Stain",
    "outlines_geojson",
    "paint_slide",
    "picture_slide",
    "plan_cohort",
    "write_cohort",
    "write_slide",
]


@dataclass(frozen=True)
class CohortSlide:
    """One planned slide of the toy cohort."""

    name: str
    patient: str
    site: str
    label: str
    pen: Pen | None
    seed: int
    lesions: tuple[Lesion, ...]


SITES: dict[str, tuple[float, Scanner]] = {
    "A": (0.50, Scanner()),
    "B": (0.35, Scanner(glass=(238, 243, 240), contrast=1.12, blur_um=0.40)),
}
"""Site → µm/px and scanner."""


def plan_cohort(
    n_slides: int, *, seed: int, width_um: float = 2000, height_um: float = 1500
) -> tuple[CohortSlide, ...]:
    """Decide everything about a cohort but the pixels; the balance is exact for a multiple of 12 slides.

    Half of the slides are labelled `tumour` and have one to three lesions, their radii .1 to .3 of the slide's shorter
    side; half of the patients own two slides. Site, pen and slides per patient are the same for both labels.
    """
    if n_slides < 1:
        raise UsageError(f"n_slides {n_slides}: expected at least 1")
    rng = np.random.default_rng([seed, n_slides])
    order = rng.permutation(n_slides)
    slide_seeds = rng.integers(0, 2**31, n_slides).tolist()
    patients: dict[tuple[int, ...], str] = {}
    slides = []
    for place, k in enumerate(order.tolist()):
        label, site, nth = k % 2, k // 2 % 2, k // 4  # nth of its label and site
        owner = (label, site, nth // 3, nth % 3 == 2)  # owners of two slides and of one, in turn
        patient = patients.setdefault(owner, f"P{len(patients) + 1:02d}")
        pen = get_args(Pen)[(nth // 3 + site) % 3] if nth % 3 == 1 else None
        lesions = place_lesions(slide_seeds[k], round(width_um), round(height_um)) if label else ()
        name, site_name = f"toy-{place + 1:02d}", list(SITES)[site]
        slides.append(CohortSlide(name, patient, site_name, ("normal", "tumour")[label], pen, slide_seeds[k], lesions))
    return tuple(slides)


def write_cohort(
    folder: str | os.PathLike[str],
    *,
    n_slides: int = 24,
    seed: int = 0,
    width_um: float = 2000,
    height_um: float = 1500,
    workers: int = 2,
) -> None:
    """Paint a cohort: `slides/*.tiff`, `labels.csv`, and in `truth/` what a model may not see.

    `truth/<name>.geojson` has the tumour's borders (QuPath, level-0 px), `truth/lesions.csv` centres and radii in µm.
    Slides that are there are kept, so a run that was killed goes on. One process at a time may write to a folder.

    Raises:
        UsageError: the folder holds a cohort made with other arguments.
    """
    folder = Path(folder)
    plan = plan_cohort(n_slides, seed=seed, width_um=width_um, height_um=height_um)
    for part in ("slides", "truth"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    recipe = json.dumps({"n_slides": n_slides, "seed": seed, "width_um": width_um, "height_um": height_um})
    stated = folder / "truth" / "cohort.json"
    if stated.exists() and stated.read_text() != recipe:
        raise UsageError(f"{folder}: holds another cohort ({stated.read_text()}); delete it or choose another folder")
    _publish(stated, recipe)
    labels = [(slide.name, slide.patient, slide.site, slide.label) for slide in plan]
    _publish_table(folder / "labels.csv", ("slide", "patient", "site", "label"), labels)
    lesions = [(slide.name, lesion.x_um, lesion.y_um, lesion.radius_um) for slide in plan for lesion in slide.lesions]
    _publish_table(folder / "truth" / "lesions.csv", ("slide", "x_um", "y_um", "radius_um"), lesions)
    for left_by_a_kill in (folder / "slides").glob(".*.tmp-*"):
        left_by_a_kill.unlink()
    write = functools.partial(_write_one, folder, width_um=width_um, height_um=height_um)
    todo = [slide for slide in plan if not _slide_path(folder, slide).exists()]
    if workers > 1 and len(todo) > 1:
        context = multiprocessing.get_context("spawn")  # fork would copy the locks of threads that do not exist there
        with ProcessPoolExecutor(workers, context, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
            list(pool.map(write, todo))
    else:
        for slide in todo:
            write(slide)


def picture_slide(*, mpp: float = 0.5) -> PaintedSlide:
    """One 3 x 2 mm slide with everything on it, for figures: two tumours, glands, fat, lymphocytes, a pen line."""
    return paint_slide(3000, 2000, mpp=mpp, seed=7, lesions=place_lesions(7, 3000, 2000), pen="green")


def _slide_path(folder: Path, slide: CohortSlide) -> Path:
    return folder / "slides" / f"{slide.name}.tiff"


def _write_one(folder: Path, slide: CohortSlide, *, width_um: float, height_um: float) -> None:
    mpp, scanner = SITES[slide.site]
    painted = paint_slide(
        width_um, height_um, mpp=mpp, seed=slide.seed, lesions=slide.lesions, pen=slide.pen, scanner=scanner
    )
    _publish(folder / "truth" / f"{slide.name}.geojson", json.dumps(outlines_geojson(painted)))
    write_slide(_slide_path(folder, slide), painted.rgb, mpp=mpp)  # last: a slide that is there is complete


def outlines_geojson(slide: PaintedSlide) -> dict[str, Any]:
    """The tumour's borders as a FeatureCollection that QuPath opens, in level-0 px."""
    found, links = cv2.findContours(slide.tumour.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    # a row per border: next and previous of its kind, its first hole, its parent
    tree = np.asarray(links, int).reshape(-1, 4) if found else np.zeros((0, 4), int)
    rings = []
    for border in found:
        corners = (cv2.approxPolyDP(border, 1, True)[:, 0] + 0.5) / slide.mpp
        rings.append([*corners.round(1).tolist(), corners[0].round(1).tolist()])
    features = []
    for outer, (_, _, hole, parent) in enumerate(tree.tolist()):
        if parent >= 0 or len(rings[outer]) < 4:  # a hole, or a speck without area
            continue
        polygon = [rings[outer]]
        while hole >= 0:
            polygon += [rings[hole]] if len(rings[hole]) >= 4 else []
            hole = int(tree[hole, 0])
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": polygon},
                "properties": {"objectType": "annotation", "classification": {"name": "Tumor", "color": [200, 0, 0]}},
            }
        )
    return {"type": "FeatureCollection", "features": features}


def _publish_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    _publish(path, text.getvalue())


def _publish(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)

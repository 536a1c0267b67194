"""150 slides, 90 bags, 60 patches files, damaged: none ends or stops a run, none passes for what it is not.

- A damaged neighbour changes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import speckled
from faults.mutations import mutate
from faults.runs import (
    FEATURES,
    PATCHES,
    assert_same_bag,
    bags_of,
    extract,
    leftovers,
    rows_of,
)
from PIL import Image

from wsimil.bags.bag import read_bag
from wsimil.errors import BagFormatError
from wsimil.slides.write_tiff import write_slide

N_SLIDES, N_BAGS, N_PATCHES = 150, 90, 60
HEALTHY = 4
OPTIONS = ("--slide-mpp", "0.5", "--read-timeout", "20")


def _sources(folder: Path) -> list[Path]:
    folder.mkdir()
    options: dict = {"mpp": 0.5, "compression": "jpeg", "downsamples": (1, 2), "tile_px": 128}
    write_slide(folder / "generic.tiff", speckled(300, 240, 1), **options)
    write_slide(folder / "aperio.svs", speckled(280, 260, 2), vendor="aperio", **options)
    write_slide(folder / "leica.scn", speckled(260, 260, 3), vendor="leica", bounds_offset_px=(100, 60), **options)
    write_slide(folder / "deflate.tif", speckled(260, 200, 4), **{**options, "compression": "deflate"})
    Image.fromarray(speckled(260, 220, 5)).save(folder / "image.png")
    Image.fromarray(speckled(260, 220, 6)).save(folder / "image.jpg", quality=85)
    return sorted(folder.iterdir())


def test_damaged_slides_are_rows_and_leave_their_neighbours_alone(tmp_path: Path) -> None:
    sources = _sources(tmp_path / "sources")
    slides, healthy = tmp_path / "slides", tmp_path / "healthy"
    for folder in (slides, healthy):
        folder.mkdir()
    for number in range(HEALTHY):  # their names lie between those of the damaged
        name = f"m{number * N_SLIDES // HEALTHY:03}-healthy.tiff"
        write_slide(healthy / name, speckled(300, 200, 50 + number), mpp=0.5, compression="jpeg", downsamples=(1, 4))
        shutil.copy(healthy / name, slides)
    for number in range(N_SLIDES):
        source = sources[number % len(sources)]
        kind, content, _ = mutate(source.read_bytes(), number)
        (slides / f"m{number:03}-{source.stem}-{kind}{source.suffix}").write_bytes(content)
    job = tmp_path / "job"
    ending = extract(slides, job, *OPTIONS)
    assert ending.code in (0, 1), ending.said
    assert "Traceback" not in ending.err, ending.said
    rows, bags = rows_of(job), bags_of(job)
    assert len(rows) == N_SLIDES + HEALTHY
    assert (ending.code == 1) == any(row["status"] == "failed" for row in rows.values())
    for slide_id, row in rows.items():
        if row["status"] == "failed":
            assert row["reason"].strip(), row
            assert slide_id not in bags
        else:
            assert row["status"] in ("done", "empty"), row
            bag = read_bag(bags[slide_id])
            assert len(bag.features) == len(bag.coords_level0_px) == int(row["n_tiles"]), row
            assert (row["status"] == "empty") == (len(bag.features) == 0), row
            assert np.isfinite(bag.features).all(), row
    for log in (job / "logs").glob("*.log"):
        assert log.stem in rows and log.stem in log.read_text(encoding="utf-8"), log
    found = Counter(row["status"] for row in rows.values())
    assert found["done"] > 20 and found["failed"] > 20, f"the damage is too mild or too heavy to prove anything: {found}"
    assert leftovers(job) == []

    calm = tmp_path / "calm"
    assert extract(healthy, calm, *OPTIONS).code == 0
    assert len(bags_of(calm)) == HEALTHY
    for slide_id, path in bags_of(calm).items():
        assert_same_bag(bags[slide_id], path)


_READ_ALL = """
import json, os, signal, sys
from wsimil.bags.bag import read_bag
from wsimil.errors import BagFormatError
from wsimil.bags.dataset import BagFolder
from wsimil.errors import WsimilError

def attempt(act):
    try:
        act()
        return "read"
    except WsimilError as error:
        return "refused" if str(error) else "no reason"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"

def load_all(folder):
    bags = BagFolder(folder)
    for slide_id in bags.slide_ids:
        bags.load(slide_id)

for folder in sys.argv[1:]:
    pipe, end = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(20)
        path = os.path.join(folder, "bag.h5")
        words = [attempt(lambda: read_bag(path)), attempt(lambda: load_all(folder))]
        os.write(end, json.dumps(words).encode())
        os._exit(0)
    os.close(end)
    status = os.waitpid(child, 0)[1]
    print(json.dumps([folder, status, os.read(pipe, 4096).decode()]))
    os.close(pipe)
"""


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, set[int]], dict[str, set[int]]]:
    """Many small slides in `slides`, finished in `calm`; the same job with damaged files in `job`; what was lost of which file."""
    root = tmp_path_factory.mktemp("damaged")
    (root / "slides").mkdir()
    for number in range(N_BAGS + N_PATCHES // 2):
        pixels = speckled(150 + 10 * (number % 5), 140, number)
        write_slide(root / "slides" / f"h{number:03}.tiff", pixels, mpp=0.5, compression="deflate", downsamples=(1,))
    ending = extract(root / "slides", root / "calm", *OPTIONS)
    assert ending.code == 0, ending.said
    shutil.copytree(root / "calm", root / "job")
    lost_of_bags, lost_of_patches = {}, {}
    for number, (slide_id, path) in enumerate(bags_of(root / "job").items()):
        if number < N_BAGS:
            _, content, lost_of_bags[slide_id] = mutate(path.read_bytes(), 1000 + number)
            path.write_bytes(content)
        else:
            path.unlink()  # so that the patches are read
        if number >= N_BAGS - N_PATCHES // 2:
            patches = root / "job" / PATCHES / f"{slide_id}_patches.h5"
            _, content, lost_of_patches[slide_id] = mutate(patches.read_bytes(), 2000 + number)
            patches.write_bytes(content)
    assert len(lost_of_bags) == N_BAGS and len(lost_of_patches) == N_PATCHES
    return root / "slides", root / "calm", lost_of_bags, lost_of_patches


def _features_at(path: Path) -> set[int]:
    """Positions of the features in a bag: too much to read for a run that looks what is left to do."""
    with h5py.File(path, "r") as file:
        start = file["features"].id.get_offset()
        return set(range(start, start + file["features"].nbytes))


def _mended(path: Path, original: Path, lost: set[int]) -> bool:
    """Equal; or refused for features that damage has hit."""
    try:
        assert_same_bag(path, original)
    except AssertionError:
        return False
    except BagFormatError as error:
        return bool(lost & _features_at(original)) and "features changed" in str(error)
    return True


def test_reading_a_damaged_bag_is_an_error_and_never_a_crash(damaged, tmp_path: Path) -> None:
    _, calm, lost_of_bags, _ = damaged
    folders = []
    for slide_id in lost_of_bags:
        folder = tmp_path / slide_id / "features_texture"
        folder.mkdir(parents=True)
        shutil.copy(calm.parent / "job" / FEATURES / f"{slide_id}.h5", folder / "bag.h5")
        folders.append(str(folder))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _READ_ALL, *folders]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(answers) == N_BAGS
    unexpected, words = {}, Counter()
    for folder, status, said in answers:
        slide_id = Path(folder).parent.name
        answer = json.loads(said) if said else []
        words.update(answer[:1])
        if status or not set(answer) <= {"read", "refused"}:
            unexpected[slide_id] = (f"status {status}", said)
            continue
        if answer[0] == "read":
            assert_same_bag(Path(folder, "bag.h5"), calm / FEATURES / f"{slide_id}.h5")
    assert unexpected == {}
    assert words["read"] and words["refused"], words


def test_extracting_again_mends_damaged_bags(damaged) -> None:
    slides, calm, lost_of_bags, lost_of_patches = damaged
    job = calm.parent / "job"
    ending = extract(slides, job, *OPTIONS)
    assert "Traceback" not in ending.err, ending.said
    assert ending.code == 0, ending.said + str([row for row in rows_of(job).values() if row["status"] == "failed"])
    assert bags_of(job).keys() == bags_of(calm).keys()
    wrong = {}
    for slide_id, path in bags_of(job).items():
        if not _mended(path, bags_of(calm)[slide_id], lost_of_bags.get(slide_id, set())):
            of_bag, of_patches = (sorted(lost.get(slide_id, ())) for lost in (lost_of_bags, lost_of_patches))
            wrong[slide_id] = f"lost of the bag: {of_bag[:4]}…, of the patches: {of_patches[:4]}…"
    assert wrong == {}
    assert leftovers(job) == []

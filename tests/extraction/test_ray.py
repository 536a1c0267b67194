"""Slides spread over a cluster: the same bags, each slide once, whatever becomes of a node.

The scheduler is tried on a cluster that is played here; one test starts a real one, where Ray is installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import speckled

from wsimil.bags.bag import read_bag
from wsimil.config import ExtractConfig, JobConfig, TileConfig
from wsimil.errors import EncoderError, UsageError, WsimilError
from wsimil.extraction import extract_features
from wsimil.extraction import ray_engine as module
from wsimil.extraction.engine import Stage, run_slides
from wsimil.extraction.job import Job, Row
from wsimil.extraction.ray_engine import News, n_in_hand, places
from wsimil.slides.cohort import SlideFile, find_slides
from wsimil.slides.write_tiff import write_slide

FEATURES = "20x_64px_0px_overlap/features_texture"


def node(name: str, cpus: float, gpus: float = 0, *, alive: bool = True) -> dict[str, Any]:
    resources = {"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {})}
    return {"NodeID": name, "NodeManagerHostname": f"host-{name}", "Alive": alive, "Resources": resources}


def test_a_worker_per_gpu_with_its_share_of_the_cores() -> None:
    found = places([node("head", 8), node("box", 128, 8), node("gone", 64, 8, alive=False)], JobConfig(), on_gpus=True)
    assert [(place.node, place.number) for place in found] == [("box", number) for number in range(8)]
    assert {(place.n_gpus, place.n_cpus, place.n_readers) for place in found} == {(1.0, 16, 16)}


def test_a_gpu_can_be_shared_and_few_cores_are_divided() -> None:
    half = places([node("box", 24, 2)], JobConfig(gpus_per_worker=0.5), on_gpus=True)
    assert [(place.n_gpus, place.n_cpus, place.n_readers) for place in half] == [(0.5, 6, 6)] * 4
    thirds = places([node("box", 24, 1)], JobConfig(gpus_per_worker=1 / 3), on_gpus=True)
    assert len(thirds) == 3
    poor = places([node("box", 4, 8)], JobConfig(), on_gpus=True)
    assert len(poor) == 8 and sum(place.n_cpus for place in poor) <= 4 and all(place.n_readers == 1 for place in poor)


def test_without_gpus_a_worker_per_sixteen_cores() -> None:
    found = places([node("head", 0), node("small", 2), node("large", 40)], JobConfig(), on_gpus=False)
    assert [(place.node, place.n_cpus, place.n_readers) for place in found] == [
        ("small", 2, 2),
        ("large", 16, 16),
        ("large", 16, 16),
    ]
    assert places([node("small", 2)], JobConfig(workers=1), on_gpus=False)[0].n_cpus == 1


def test_what_is_in_hand_never_asks_for_more_cores_than_a_node_has() -> None:
    for cpus in (1, 3, 7, 16, 33, 64, 100):
        for gpus in (1, 2, 3, 8):
            found = places([node("n", cpus, gpus)], JobConfig(), on_gpus=True)
            assert len(found) == gpus and sum(place.n_cpus for place in found) <= cpus


def test_a_worker_holds_less_as_the_end_comes_near() -> None:
    held = [n_in_hand(left, 4, n_readers=16, staging=False) for left in (1000, 100, 40, 8, 1)]
    assert held == [17, 13, 5, 2, 2]
    assert n_in_hand(1000, 4, n_readers=1, staging=True) > n_in_hand(1000, 4, n_readers=1, staging=False)


class PlayedStage(Stage):
    """Workers of the played cluster do as the test says; nothing is read."""

    name, request = "play", {}

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def first_call(self, file: SlideFile) -> tuple[str, tuple]:
        raise AssertionError

    def begin(self, file: SlideFile, value: Any) -> Row:
        raise AssertionError


class LostError(Exception):
    pass


class Actor:
    """A worker that finishes the oldest of its slides whenever it is asked, unless `act` says otherwise."""

    def __init__(self, ray: PlayedRay, where: str) -> None:
        self.ray, self.where, self.hand = ray, where, list[SlideFile]()
        self.told_ready = self.dead = False
        self.news = SimpleNamespace(remote=lambda: Ref(self))
        self.offer = SimpleNamespace(remote=self._offer)
        self.leave = SimpleNamespace(remote=lambda finish: Ref(self))

    def _offer(self, file: SlideFile) -> None:
        self.ray.offered.append((self.where, file.slide_id))
        self.hand.append(file)


class Ref:
    def __init__(self, actor: Actor) -> None:
        self.actor = actor


class PlayedRay:
    """As much of Ray as the run uses; `act` stands for what workers do when they are asked for news."""

    exceptions = SimpleNamespace(RayError=LostError)

    def __init__(self, nodes: list[dict[str, Any]], act: Callable[[PlayedRay, Actor], News]) -> None:
        self._nodes, self.act = nodes, act
        self.offered: list[tuple[str, str]] = []
        self.actors: list[Actor] = []

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes

    def remote(self, kind: type) -> Any:
        def options(scheduling_strategy: str, **_: Any) -> Any:
            def start(*_: Any, **__: Any) -> Actor:
                self.actors.append(Actor(self, scheduling_strategy))
                return self.actors[-1]

            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)

    def wait(self, refs: list[Ref], **_: Any) -> tuple[list[Ref], list[Ref]]:
        time.sleep(0.001)
        return refs, []

    def get(self, ref: Ref) -> News:
        if ref.actor.dead:
            raise LostError("the node is gone\nand more that nobody reads")
        if not ref.actor.told_ready:
            ref.actor.told_ready = True
            return News(ready=True)
        return self.act(self, ref.actor)

    def kill(self, actor: Actor) -> None:
        actor.dead = True


def done(actor: Actor) -> News:
    rows = [Row(file.name, file.slide_id, "done") for file in actor.hand[:1]]
    del actor.hand[:1]
    return News(rows=rows, n_tiles=len(rows))


@pytest.fixture
def files(tmp_path: Path) -> list[SlideFile]:
    (tmp_path / "slides").mkdir()
    for number, size in enumerate((30, 10, 90, 20, 80, 50, 70, 40, 60)):
        (tmp_path / "slides" / f"s{number}.svs").write_bytes(bytes(size))
    return find_slides(tmp_path / "slides")


def play(
    monkeypatch: pytest.MonkeyPatch, files: list[SlideFile], out: Path, ray: PlayedRay, *, device: str = "cpu", **config: Any
) -> list[Row]:
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node_id, soft: node_id)
    modules = {"ray": ray, "ray.util.scheduling_strategies": strategies}
    monkeypatch.setattr(module, "import_module", lambda name: modules[name])
    for name, seconds in (("_NEWS_S", 0.01), ("_STAFF_EVERY_S", 0.05), ("_NOBODY_S", 0.5)):
        monkeypatch.setattr(module, name, seconds)
    return run_slides(Job(out), files, PlayedStage(device), config=JobConfig(engine="ray", **config), quiet=True)


def remarks(out: Path) -> dict[str, list[str]]:
    """All that was said of each slide, oldest first."""
    found: dict[str, list[str]] = {}
    for line in (json.loads(line) for line in (out / "logs" / "manifest.jsonl").read_text().splitlines()):
        if line["event"] == "remark":
            found.setdefault(line["slide_id"], []).append(line["remark"])
    return found


def finished(out: Path) -> list[str]:
    lines = [json.loads(line) for line in (out / "logs" / "manifest.jsonl").read_text().splitlines()]
    return sorted(line["slide_id"] for line in lines if line["event"] == "slide")


def test_large_slides_go_first_and_rows_come_in_the_order_of_the_slides(
    files: list[SlideFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = PlayedRay([node("a", 1), node("b", 1)], lambda ray, actor: done(actor))
    rows = play(monkeypatch, files, tmp_path / "job", ray)
    assert [row.slide_id for row in rows] == [file.slide_id for file in files]
    assert [slide_id for _, slide_id in ray.offered] == ["s2", "s4", "s6", "s8", "s5", "s7", "s0", "s3", "s1"]
    assert {where for where, _ in ray.offered} == {"a", "b"} and all(actor.dead for actor in ray.actors)
    assert not (tmp_path / "job" / "claims").exists()


def test_a_lost_workers_slides_go_to_others_first_and_each_is_finished_once(
    files: list[SlideFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []

    def act(ray: PlayedRay, actor: Actor) -> News:
        if actor.where == "b":
            lost.extend(file.slide_id for file in actor.hand)
            ray._nodes[1] = node("b", 1, alive=False)
            raise LostError("the node is gone")
        return done(actor) if ("b", "s4") in ray.offered else News()

    ray = PlayedRay([node("a", 1), node("b", 1)], act)
    rows = play(monkeypatch, files, tmp_path / "job", ray)
    assert lost and {row.status for row in rows} == {"done"}
    assert finished(tmp_path / "job") == sorted(file.slide_id for file in files)
    at = len([1 for where, _ in ray.offered if where == "b"])
    after = [slide_id for where, slide_id in ray.offered[ray.offered.index(("b", lost[-1])) + 1 :] if where == "a"]
    assert at == len(lost) and after[: len(lost)] == lost, "largest still first"
    assert set(remarks(tmp_path / "job")) == set(lost) and "host-b" in remarks(tmp_path / "job")[lost[0]][-1]
    assert not (tmp_path / "job" / "claims").exists()


def test_a_node_that_comes_later_gets_a_worker(files: list[SlideFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(ray: PlayedRay, actor: Actor) -> News:
        if len(ray._nodes) == 1:
            ray._nodes.append(node("late", 1))
        return done(actor) if any(where == "late" for where, _ in ray.offered) else News()

    ray = PlayedRay([node("a", 1)], act)
    play(monkeypatch, files, tmp_path / "job", ray)
    assert {where for where, _ in ray.offered} == {"a", "late"}


def test_a_slide_that_takes_every_worker_with_it_fails_alone(
    files: list[SlideFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(ray: PlayedRay, actor: Actor) -> News:
        if any(file.slide_id == "s5" for file in actor.hand):
            raise LostError("out of memory")  # and with it what else is in hand
        return done(actor)

    monkeypatch.setattr(module, "_LOSSES_OF_A_NODE", 99)
    rows = play(monkeypatch, files, tmp_path / "job", PlayedRay([node("a", 1)], act))
    assert {row.slide_id: row.status for row in rows} == {
        file.slide_id: "failed" if file.slide_id == "s5" else "done" for file in files
    }
    assert "3 workers were lost" in next(row.reason for row in rows if row.status == "failed")


def test_without_any_node_the_run_ends_and_says_how_to_go_on(
    files: list[SlideFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(ray: PlayedRay, actor: Actor) -> News:
        if sum(worker.told_ready for worker in ray.actors) and len(finished(tmp_path / "job")) == 3:
            ray._nodes[:] = [node("a", 1, alive=False)]
            raise LostError("the node is gone")
        return done(actor)

    with pytest.raises(WsimilError, match=r"no node of the Ray cluster.*host-a: LostError: the node is gone.*goes on"):
        play(monkeypatch, files, tmp_path / "job", PlayedRay([node("a", 1)], act))
    assert len(finished(tmp_path / "job")) == 3 and not (tmp_path / "job" / "claims").exists()


def test_what_ends_a_run_on_one_machine_ends_it_here(
    files: list[SlideFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = PlayedRay([node("a", 1)], lambda ray, actor: News(error=EncoderError("host-a: no such weights")))
    with pytest.raises(EncoderError, match="host-a: no such weights"):
        play(monkeypatch, files, tmp_path / "job", ray)


@pytest.mark.parametrize(
    ("device", "says"), [("cuda", "no node of the Ray cluster has a GPU"), ("cuda:1", "Ray chooses which GPU")]
)
def test_a_device_that_the_cluster_does_not_have_is_refused(
    files: list[SlideFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        play(monkeypatch, files, tmp_path / "job", PlayedRay([node("a", 1)], lambda ray, actor: News()), device=device)


def test_without_ray_the_way_out_is_said(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(module, "import_module", missing)
    with pytest.raises(UsageError, match=r"pip install 'wsimil\[ray\]'"):
        extract_features(slides, tmp_path / "job", tile=TileConfig(tile_px=64), job=JobConfig(engine="ray"), quiet=True)


def test_a_worker_does_what_a_run_does(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The actor itself, without Ray: its stage is made anew, its folder is the run's, its desk tells everything."""
    monkeypatch.chdir(tmp_path)
    (slides / "broken.svs").write_bytes(b"not a slide")

    class Later:
        def __init__(self, get: Callable[[], Any]) -> None:
            self.get = get

    def start(self: Any, place: Any) -> Any:
        actor = module.Worker(
            self._stage,
            self._job,
            JobConfig(workers=1, stage_to="fast"),
            tile_bytes=self._tile_bytes,
            folder=str(tmp_path),
            wsimil_version=module.version("wsimil"),
        )
        offer, leave = SimpleNamespace(remote=actor.offer), SimpleNamespace(remote=actor.leave)
        far = SimpleNamespace(offer=offer, leave=leave, news=SimpleNamespace(remote=lambda: Later(actor.news)))
        return module._Staff(place, far, far.news.remote())

    ray = SimpleNamespace(
        is_initialized=lambda: True,
        nodes=lambda: [node("a", 1)],
        wait=lambda refs, **_: (refs[:1], refs[1:]),
        get=lambda ref: ref.get(),
        kill=lambda actor: None,
        exceptions=SimpleNamespace(RayError=LostError),
    )
    monkeypatch.setattr(module._Run, "_start", start)
    monkeypatch.setattr(module, "import_module", lambda name: ray)
    tile = TileConfig(tile_px=64)
    extraction = extract_features("slides", "job", tile=tile, extract=ExtractConfig(), job=JobConfig(engine="ray"), quiet=True)
    assert {row.slide_id: row.status for row in extraction.rows} == {"a": "done", "b": "done", "broken": "failed", "glass": "empty"}
    assert read_bag(Path("job") / FEATURES / "b.h5").features.shape == (48, 136)
    assert not list(Path("fast/wsimil-staging").glob("run-*"))


def children(pid: int) -> list[int]:
    """Processes that one has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_cluster_that_loses_a_node_half_way_makes_the_bags_of_the_plain_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # other tests take the cores
    ray = pytest.importorskip("ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    slides, tile = tmp_path / "slides", TileConfig(tile_px=64)
    slides.mkdir()
    for number in range(10):
        picture = speckled(1100 + 64 * number, 1000, number)
        kind = ("deflate", "jpeg")[number % 2]
        write_slide(slides / f"s{number}.tiff", picture, mpp=0.5, compression=kind, downsamples=(1, 4))
    plain = extract_features(slides, tmp_path / "plain", tile=tile, quiet=True)
    size = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80_000_000}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    job, killed = tmp_path / "job", threading.Event()
    hand_out, runs = module._Run._hand_out, []

    def in_hand() -> bool:
        return any(worker.slides for (node, _), worker in list(runs[0]._workers.items()) if node == second.node_id)

    def when_both_are_there(self: Any) -> None:  # a node that is slow to start would have nothing in hand yet
        if killed.is_set() or sum(worker.ready for worker in self._workers.values()) == 2:
            monkeypatch.setattr(module._Run, "_hand_out", hand_out)
            runs.append(self)
            hand_out(self)

    monkeypatch.setattr(module._Run, "_hand_out", when_both_are_there)
    try:
        second = cluster.add_node(**size)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)

        def send(what: signal.Signals, pids: list[int]) -> None:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, what)

        def kill() -> None:
            while len(list((job / FEATURES).glob("s*.h5"))) < 2 or not in_hand():
                time.sleep(0.002)
            (raylet,) = second.all_processes["raylet"]
            workers = children(raylet.process.pid)
            send(signal.SIGSTOP, workers)  # nothing is finished between here and the end of the node
            cluster.remove_node(second, allow_graceful=False)
            send(signal.SIGKILL, workers)  # Ray would leave them to notice by themselves, for a second
            killed.set()

        threading.Thread(target=kill, daemon=True).start()
        extraction = extract_features(slides, job, tile=tile, job=JobConfig(engine="ray"), quiet=True)
        assert killed.wait(10)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert [(row.slide_id, row.n_tiles) for row in extraction.rows] == [(row.slide_id, row.n_tiles) for row in plain.rows]
    assert finished(job) == sorted(f"s{number}" for number in range(10)), "none is lost, none is done twice"
    assert "its worker was lost" in str(remarks(job)), "the node had slides in hand when it was killed"
    for number in range(10):
        one, other = (read_bag(folder / FEATURES / f"s{number}.h5") for folder in (tmp_path / "plain", job))
        np.testing.assert_array_equal(one.features, other.features)
        np.testing.assert_array_equal(one.coords_level0_px, other.coords_level0_px)
        assert one.attributes == other.attributes
    assert not (job / "claims").exists()

"""Slides spread over a Ray cluster: a worker per GPU, each with readers and an encoder of its own, fed from the run.

- The run that was started keeps what there is one of: claims, books, the progress view and the exit status. Workers write bags.
- The largest slides go first and no worker holds more than its share of what is left, so that all end together.
- A worker that is lost (its node, the network, out of memory) costs what it had in hand: those slides are given to others.
  Nodes that come later get workers, too.
- What ends a run on one machine (an encoder that cannot be had, a full disk) ends it here: no node is left out in silence.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import socket
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import version
from typing import Any

from wsimil.config import JobConfig
from wsimil.errors import UsageError, WsimilError
from wsimil.extraction.desk import BookedDesk, Desk, no_more_room
from wsimil.extraction.engine import Stage, work_here
from wsimil.extraction.job import Job, Row
from wsimil.extraction.staging import AHEAD
from wsimil.slides.cohort import SlideFile

__all__ = ["Worker", "n_in_hand", "places", "work_on_ray"]

_MOST_READERS = 16
_NEWS_S = 1.0
_STAFF_EVERY_S = 5.0
_NOBODY_S = 60.0
"""When to give up on a cluster on which no worker lives or starts."""
_LOSSES_OF_A_NODE = 3
_LOSSES_OF_A_SLIDE = 3
_GOODBYE_S = 20.0


@dataclass
class News:
    """What happened at a worker since it was last asked."""

    ready: bool = False
    n_tiles: int = 0
    remarks: list[tuple[str, str, bool]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    error: Exception | None = None


class _RemoteDesk(Desk):
    """The desk of a worker: slides come from the run, what became of them lies here until the run asks."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[SlideFile | None] = queue.SimpleQueue()
        self._kept: deque[SlideFile] = deque()
        self._changed = threading.Condition()
        self._news = News()
        self._no_more = False
        self.dropped = False

    @property
    def over(self) -> bool:
        return self._no_more and not self._kept

    def _stay(self) -> None:
        if self.dropped:
            raise WsimilError("the run has ended")

    def next(self) -> SlideFile | None:
        self._stay()
        if self._kept:
            return self._kept.popleft()
        return self._from_inbox(0.0)

    def wait(self) -> None:
        if (file := self._from_inbox(_NEWS_S)) is not None:
            self._kept.append(file)

    def _from_inbox(self, wait_s: float) -> SlideFile | None:
        try:
            file = self.inbox.get(timeout=wait_s) if wait_s else self.inbox.get_nowait()
        except queue.Empty:
            return None
        if file is None:
            self._no_more = True
        return file

    def remark(self, slide_id: str, text: str, *, loud: bool = True) -> None:
        with self._changed:
            self._news.remarks.append((slide_id, text, loud))

    def count(self, n_tiles: int) -> None:
        self._stay()
        with self._changed:
            self._news.n_tiles += n_tiles

    def finish(self, row: Row) -> None:
        with self._changed:
            self._news.rows.append(row)
            self._changed.notify_all()

    def tell(self, *, ready: bool = False, error: Exception | None = None) -> None:
        with self._changed:
            self._news.ready, self._news.error = ready or self._news.ready, error or self._news.error
            self._changed.notify_all()

    def news(self) -> News:
        """What there is to tell; waits a moment for a slide to be finished."""
        with self._changed:
            if not (self._news.ready or self._news.rows or self._news.error):
                self._changed.wait(_NEWS_S)
            news, self._news = self._news, News()
            return news


class Worker:
    """An actor: readers and a stage on one node, with a desk that the run fills and empties from afar.

    Args:
        stage: pickled; made anew here, so that encoders are loaded where they run.
        folder: the run's working folder; relative paths are meant from there.
    """

    def __init__(self, stage: bytes, job: Job, config: JobConfig, *, tile_bytes: int, folder: str, wsimil_version: str) -> None:
        self._desk = _RemoteDesk()
        arguments = stage, job, config, tile_bytes, folder, wsimil_version
        self._thread = threading.Thread(target=self._work, args=arguments, name="work", daemon=True)
        self._thread.start()  # readers end with the thread that started them

    def _work(self, stage: bytes, job: Job, config: JobConfig, tile_bytes: int, folder: str, wsimil_version: str) -> None:
        host = socket.gethostname()
        try:
            if version("wsimil") != wsimil_version:
                raise WsimilError(f"wsimil {version('wsimil')} is installed, the run has {wsimil_version}; make them the same")
            try:
                os.chdir(folder)
            except OSError as error:
                raise WsimilError(f"{folder}: {error.strerror}; all machines of a run have to see its folders") from error
            made = pickle.loads(stage)
            self._desk.tell(ready=True)
            work_here(self._desk, job, made, config, count=config.workers, tile_bytes=tile_bytes)
        except WsimilError as error:
            self._desk.tell(error=type(error)(f"{host}: {error}"))
        except BaseException as error:
            self._desk.tell(error=no_more_room(job, error) or WsimilError(f"{host}: {type(error).__name__}: {error}"))

    def offer(self, file: SlideFile) -> None:
        self._desk.inbox.put(file)

    def news(self) -> News:
        return self._desk.news()

    def leave(self, *, finish: bool) -> None:
        """Finish what is in hand, or drop it; tidy up and return."""
        self._desk.dropped = not finish
        self._desk.inbox.put(None)
        self._thread.join(_GOODBYE_S)


@dataclass(frozen=True)
class Place:
    """What one worker takes of a node."""

    node: str
    number: int  # on that node
    host: str
    n_cpus: float
    n_gpus: float
    n_readers: int


def places(nodes: list[dict[str, Any]], config: JobConfig, *, on_gpus: bool) -> list[Place]:
    """A worker per GPU (or share of one); without GPUs, one per 16 cores of a node.

    Args:
        nodes: as `ray.nodes()` lists them.
    """
    found = []
    for node in nodes:
        n_cpus, n_gpus = (node["Resources"].get(kind, 0.0) if node["Alive"] else 0.0 for kind in ("CPU", "GPU"))
        count = int(n_gpus / config.gpus_per_worker + 1e-6) if on_gpus else max(min(1, int(n_cpus)), int(n_cpus) // _MOST_READERS)
        if not count:
            continue
        share = n_cpus / count
        n_readers = config.workers or max(1, min(_MOST_READERS, int(share)))
        taken = min(n_readers, int(share) or share)  # Ray counts in whole cores from one on
        gpus = config.gpus_per_worker if on_gpus else 0.0
        host = node.get("NodeManagerHostname", node["NodeID"])
        found += [Place(node["NodeID"], number, host, taken, gpus, n_readers) for number in range(count)]
    return found


def n_in_hand(n_left: int, n_workers: int, *, n_readers: int, staging: bool) -> int:
    """How many slides a worker holds: enough for its readers (and copies), but at most half of its share of what is left."""
    most = n_readers + 1 + (AHEAD if staging else 0)
    return max(2, min(most, -(-n_left // (2 * n_workers))))


@dataclass
class _Staff:
    """A worker as the run sees it."""

    place: Place
    actor: Any
    news: Any
    ready: bool = False
    slides: dict[str, SlideFile] = field(default_factory=dict)


def work_on_ray(desk: BookedDesk, job: Job, stage: Stage, config: JobConfig, *, tile_bytes: int) -> None:
    """Take the slides of a desk through a stage on the Ray cluster at hand; without one, on the GPUs of this machine.

    Raises:
        UsageError: Ray is not installed, or the cluster does not have what was asked for.
        WsimilError: what would end a run on one machine; no node is left.
    """
    try:
        ray = import_module("ray")
    except ImportError as error:
        raise UsageError("--engine ray needs Ray: pip install 'wsimil[ray]'") from error
    is_ours = not ray.is_initialized()
    if is_ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what a hospital computes is nobody's business
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 gives a worker 3 % of a core that somebody else uses
        on_notice = signal.getsignal(signal.SIGTERM)
        ray.init(log_to_driver=False, logging_level="error")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_notice)  # Ray would exit at once, with claims and books open
    try:
        _Run(ray, desk, job, stage, config, tile_bytes).work()
    finally:
        if is_ours:
            ray.shutdown()


class _Run:
    def __init__(self, ray: Any, desk: BookedDesk, job: Job, stage: Stage, config: JobConfig, tile_bytes: int) -> None:
        self._ray, self._desk, self._job, self._config = ray, desk, job, config
        self._tile_bytes = tile_bytes
        self._stage = pickle.dumps(stage)
        self._on_gpus = _wants_gpus(ray.nodes(), stage.device)
        self._workers: dict[tuple[str, int], _Staff] = {}  # node and number
        self._returned: deque[SlideFile] = deque()  # from lost workers
        self._losses: Counter[str] = Counter()  # of a node since it last finished a slide, and of a slide
        self._staffed = float("-inf")
        self._began = self._last_seen = time.monotonic()
        self._told = False
        self._why_lost = ""
        desk.sort(key=lambda file: -_size(file))

    def work(self) -> None:
        try:
            while not self._desk.over or self._returned or self._n_in_hand:
                self._find_workers()
                self._hand_out()
                if self._desk.n_waiting or self._returned or self._n_in_hand:
                    self._hear()
                else:
                    self._desk.wait()
            self._say_goodbye(finish=True)
        except BaseException:
            self._say_goodbye(finish=False)  # copies of slides should not stay on the disks of the nodes
            raise
        finally:
            for worker in self._workers.values():
                self._ray.kill(worker.actor)

    def _say_goodbye(self, *, finish: bool) -> None:
        goodbyes = [worker.actor.leave.remote(finish=finish) for worker in self._workers.values() if worker.ready]
        if goodbyes:
            self._ray.wait(goodbyes, num_returns=len(goodbyes), timeout=_GOODBYE_S)

    @property
    def _n_in_hand(self) -> int:
        return sum(len(worker.slides) for worker in self._workers.values())

    def _find_workers(self) -> None:
        """Start workers where there is room for one and none is."""
        now = time.monotonic()
        if self._workers:
            self._last_seen = now
            if not self._told and now - self._began > _NOBODY_S and not any(worker.ready for worker in self._workers.values()):
                self._told = True
                self._desk.say("Ray: no worker has started yet; other work may hold the cores or GPUs (`ray status` shows it)")
        elif now - self._last_seen > _NOBODY_S:
            why = f" (the last loss: {self._why_lost})" if self._why_lost else ""
            raise WsimilError(f"no node of the Ray cluster can take a worker{why}; the same command goes on where this run stopped")
        if now - self._staffed < _STAFF_EVERY_S:
            return
        self._staffed = now
        n_left = self._desk.n_waiting + len(self._returned) + self._n_in_hand
        started = []
        for place in places(self._ray.nodes(), self._config, on_gpus=self._on_gpus):
            free = (place.node, place.number) not in self._workers and self._losses[place.node] < _LOSSES_OF_A_NODE
            if free and len(self._workers) < n_left:
                self._workers[place.node, place.number] = self._start(place)
                started.append(place)
        if started:
            n_nodes = len({place.node for place in started})
            on = f"{started[0].n_gpus:g} GPU" if self._on_gpus else "CPU"
            self._desk.say(
                f"Ray: starting workers: {len(started)} on {n_nodes} nodes ({on} and {started[0].n_readers} readers each)"
            )

    def _start(self, place: Place) -> _Staff:
        strategies = import_module("ray.util.scheduling_strategies")
        actor = (
            self._ray.remote(Worker)
            .options(
                num_cpus=place.n_cpus,
                num_gpus=place.n_gpus,
                max_concurrency=3,
                scheduling_strategy=strategies.NodeAffinitySchedulingStrategy(place.node, soft=False),
            )
            .remote(
                self._stage,
                self._job,
                replace(self._config, engine="local", shard=None, workers=place.n_readers),
                tile_bytes=self._tile_bytes,
                folder=os.getcwd(),
                wsimil_version=version("wsimil"),
            )
        )
        return _Staff(place, actor, actor.news.remote())

    def _hand_out(self) -> None:
        """Give slides to the workers that have fewest."""
        ready = [worker for worker in self._workers.values() if worker.ready]
        n_left = self._desk.n_waiting + len(self._returned) + self._n_in_hand
        staging = self._config.stage_to is not None
        # one that may have taken its workers with it is tried once more, alone: others must not fail along with it
        while free := [worker for worker in ready if not any(map(self._is_suspect, worker.slides))]:
            worker = min(free, key=lambda worker: len(worker.slides))
            if len(worker.slides) >= n_in_hand(n_left, len(ready), n_readers=worker.place.n_readers, staging=staging):
                return
            if self._returned and worker.slides and self._is_suspect(self._returned[0].slide_id):
                return
            file = self._returned.popleft() if self._returned else self._desk.next()
            if file is None:
                return
            worker.slides[file.slide_id] = file
            worker.actor.offer.remote(file)

    def _is_suspect(self, slide_id: str) -> bool:
        return self._losses[slide_id] == _LOSSES_OF_A_SLIDE - 1

    def _hear(self) -> None:
        by_news = {worker.news: worker for worker in self._workers.values()}
        if not by_news:
            time.sleep(_NEWS_S)
            return
        done, _ = self._ray.wait(list(by_news), timeout=_NEWS_S)
        for ref in done:
            worker = by_news[ref]
            try:
                news = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                self._lose(worker, error)
                continue
            worker.news = worker.actor.news.remote()
            self._understand(worker, news)

    def _understand(self, worker: _Staff, news: News) -> None:
        if news.error is not None:
            raise news.error
        worker.ready = worker.ready or news.ready
        for slide_id, text, loud in news.remarks:
            self._desk.remark(slide_id, text, loud=loud)
        if news.n_tiles:
            self._desk.count(news.n_tiles)
        for row in news.rows:
            if worker.slides.pop(row.slide_id, None) is not None:
                self._losses[worker.place.node] = 0
                self._desk.finish(row)

    def _lose(self, worker: _Staff, error: Exception) -> None:
        """A worker is gone: its slides go to others, first of all."""
        place = worker.place
        del self._workers[place.node, place.number]
        self._ray.kill(worker.actor)  # it may live on behind a broken network
        self._losses[place.node] += 1
        self._why_lost = f"{place.host}: {_first_line(error)}"
        self._staffed = time.monotonic()  # Ray may take the node for living for a while
        self._desk.say(f"Ray: a worker was lost; {len(worker.slides)} slides go to others ({self._why_lost})")
        if self._losses[place.node] == _LOSSES_OF_A_NODE:
            self._desk.say(f"Ray: {place.host} is left out: {_LOSSES_OF_A_NODE} workers were lost there one after the other")
        for file in reversed(worker.slides.values()):
            self._losses[file.slide_id] += 1
            if self._losses[file.slide_id] < _LOSSES_OF_A_SLIDE:
                self._desk.remark(file.slide_id, f"its worker was lost, it is done again ({self._why_lost})", loud=False)
                self._returned.appendleft(file)
            else:
                reason = f"{_LOSSES_OF_A_SLIDE} workers were lost while they had it (out of memory?); run again to try again"
                self._desk.finish(Row(file.name, file.slide_id, "failed", reason))


def _wants_gpus(nodes: list[dict[str, Any]], device: str) -> bool:
    """Whether workers take GPUs; with `auto` they do if any node has one.

    Raises:
        UsageError: GPUs were asked for and there are none, or a device that is not for a cluster.
    """
    there = any(node["Alive"] and node["Resources"].get("GPU") for node in nodes)
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device}: with --engine ray it is auto, cpu or cuda; Ray chooses which GPU")
    if device == "cuda" and not there:
        raise UsageError("--device cuda: no node of the Ray cluster has a GPU")
    return there and device != "cpu"


def _size(file: SlideFile) -> int:
    try:
        return sum(path.stat().st_size for path in file.files())
    except OSError:
        return 0  # opening it says what is wrong


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]

"""One training shared by several processes: each takes bags of every step, and what they find is added up before the model moves.

- The sum is over bags: a rank with fewer bags of a step counts for less, one without any for nothing. So a step is the same on one
  device and on eight; the mean of the ranks' means, which is what data-parallel wrappers form, would not be.
- Weights are the same on all ranks at any time: they begin with rank 0's, and every rank takes the same step.
- Rank 0 writes. A rank that fails or dies ends the others, and the error is raised where they were started from.
- One machine: the ranks meet through a file, no port is opened to the outside.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsimil.errors import UsageError, WsimilError

__all__ = ["ALONE", "Ranks", "devices_of", "run_ranks"]

_PATIENCE = timedelta(days=7)
"""Rank 0 may read a whole cohort while the others wait; that a rank is gone is seen by its process, not by waiting."""


@dataclass(frozen=True)
class Ranks:
    """Which of the processes this is, and what they do together. Alone, nothing is sent and no number changes."""

    rank: int = 0
    count: int = 1

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Places of the bags of a step that are this rank's, in order: the largest are dealt first, each to the least busy."""
        load, mine = [0] * self.count, []
        for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
            least = load.index(min(load))
            load[least] += sizes[place]
            if least == self.rank:
                mine.append(place)
        return sorted(mine)

    def begin_alike(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the values of rank 0, in place."""
        if self.count > 1:
            for tensor in tensors:
                if tensor.numel():
                    torch.distributed.broadcast(tensor.detach(), 0)

    def combine(self, parameters: Sequence[nn.Parameter], loss: Tensor, n_items: int) -> Tensor:
        """Gradients and loss of each rank, means over its `n_items`, become the means over all items; the loss is returned.

        A parameter that no rank has a gradient of keeps none: the optimiser passes it over, as it would on one device.
        """
        if self.count == 1:
            return loss
        gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in parameters]
        sums = torch.cat([*(gradient.reshape(-1) for gradient in gradients), loss.reshape(1)]) * n_items
        reached = [float(value.grad is not None) for value in parameters]
        together = torch.cat([sums, sums.new_tensor([*reached, n_items])])
        torch.distributed.all_reduce(together)
        *reached, n_all = together[len(sums) :].tolist()
        *means, mean_loss = (together[: len(sums)] / n_all).split([*(gradient.numel() for gradient in gradients), 1])
        for value, mean, by in zip(parameters, means, reached, strict=True):
            value.grad = mean.view_as(value).to(value.dtype) if by else None
        return mean_loss[0]

    def mean(self, total: float, n_items: int, device: torch.device | str) -> float:
        """Sums of each rank over its `n_items` → the mean over all items."""
        if self.count > 1:
            sums = torch.tensor([total, n_items], dtype=torch.float64, device=device)
            torch.distributed.all_reduce(sums)
            total, n_items = sums.tolist()
        return total / max(1, n_items)


ALONE = Ranks()


def devices_of(device: str, count: int) -> list[str]:
    """The device of each rank: a GPU each, or the one CPU.

    Raises:
        UsageError: fewer GPUs than ranks, or a device that cannot be shared.
    """
    if device == "cpu":
        return ["cpu"] * count
    if device != "cuda":
        raise UsageError(f"--devices {count} with --device {device}: expected cpu, or cuda for the first {count} GPUs")
    if torch.cuda.device_count() < count:
        raise UsageError(f"--devices {count}: there are {torch.cuda.device_count()} GPUs")
    return [f"cuda:{rank}" for rank in range(count)]


def run_ranks(devices: Sequence[str], work: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
    """What `work(ranks, device, *arguments)` yields on rank 0, of as many processes as there are devices.

    Python starts the processes anew: a program of one's own needs its `if __name__ == "__main__":`.

    Args:
        devices: of each rank.
        work: a function of a module; all ranks must call each other's sums in the same order.

    Raises:
        WsimilError: of a rank, as it was raised there; or a rank was ended from outside.
        RuntimeError: any other error of a rank, with its trace.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[Any] = []
    pipes: list[Connection] = []
    task = pickle.dumps((work, arguments))  # by value: torch would hand over a file descriptor for every tensor
    with tempfile.TemporaryDirectory(prefix="wsimil-ranks-") as folder:
        try:
            for rank, device in enumerate(devices):
                pipe, its = context.Pipe(duplex=False)
                told = (Ranks(rank, len(devices)), device, str(Path(folder, "meeting")), its, task)
                processes.append(context.Process(target=_be_rank, args=told, daemon=True))
                processes[-1].start()
                its.close()  # so that the end of the process is the end of the pipe
                pipes.append(pipe)
            open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
            while open_pipes:
                for pipe in wait(list(open_pipes)):
                    assert isinstance(pipe, Connection)
                    try:
                        message = pipe.recv()
                    except EOFError:
                        rank = open_pipes.pop(pipe)
                        processes[rank].join()
                        if processes[rank].exitcode:
                            raise _ended(rank, processes) from None
                        continue
                    if isinstance(message, _Failure):
                        raise _cause(message, pipes, processes)
                    yield message
        finally:
            for process in processes:
                process.kill()
                process.join()


@dataclass(frozen=True)
class _Failure:
    error: WsimilError | None  # one of ours
    trace: str


def _cause(failure: _Failure, pipes: Sequence[Connection], processes: Sequence[Any]) -> Exception:
    """Of the errors of several ranks the one that came first: the others only lost sight of that rank."""
    failures = [failure]
    for rank, pipe in enumerate(pipes):
        processes[rank].join(1.0)
        try:
            while pipe.poll():
                message = pipe.recv()
                failures += [message] if isinstance(message, _Failure) else []
        except EOFError:
            if (processes[rank].exitcode or 0) < 0:
                return _ended(rank, processes)
    ours = [one.error for one in failures if one.error is not None]
    return ours[0] if ours else RuntimeError(f"a rank failed:\n{failure.trace}")


def _ended(rank: int, processes: Sequence[Any]) -> WsimilError:
    code = processes[rank].exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    return WsimilError(
        f"process {rank + 1} of {len(processes)} {how} (out of memory? see --memory-gb); the same command goes on where it stopped"
    )


def _be_rank(ranks: Ranks, device: str, meeting: str, pipe: Connection, task: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends its ranks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries announce themselves; results are for the run to say
    try:
        work, arguments = pickle.loads(task)
        gpu = device.startswith("cuda")
        if gpu:
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // ranks.count))
            if sys.platform == "linux":
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.distributed.init_process_group(
            "nccl" if gpu else "gloo", init_method=f"file://{meeting}", rank=ranks.rank, world_size=ranks.count, timeout=_PATIENCE
        )
        for message in work(ranks, device, *arguments):
            if ranks.rank == 0:
                pipe.send(message)
        torch.distributed.destroy_process_group()
    except Exception as error:
        pipe.send(_Failure(error if isinstance(error, WsimilError) else None, traceback.format_exc()))


def _end_with_parent() -> None:
    """A run that is killed cannot end its ranks: they see to it themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)

"""The training of a run, in this process or in one for each device."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from multiprocessing import active_children
from typing import Any

from wsimil.errors import WsimilError
from wsimil.pretraining.process import Outcome, Plan, train

__all__ = ["launch", "new_fabric"]


def new_fabric(plan: Plan, *, devices: int) -> Any:
    """Lightning's, for a plan's device and precision; not launched yet."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.strategies.ddp import DDPStrategy

    device = plan.config.device
    precision: Any = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[plan.recipe.precision]
    kind, _, number = device.partition(":")
    strategy: Any = "auto"
    if devices > 1:
        # buffers need no sending before each step: DINO's are alike by themselves, and of a network with batch normalisation each
        # device measures its own share; the first one's is exported
        strategy = DDPStrategy(start_method="spawn", broadcast_buffers=False)
    # processes are started here, also in a job of SLURM, which Lightning would take for the one that starts and numbers them
    where = LightningEnvironment()
    return Fabric(
        accelerator=kind, devices=[int(number)] if number else devices, strategy=strategy, precision=precision, plugins=[where]
    )


def launch(plan: Plan, say: Callable[[str], None]) -> Outcome:
    """Train, in this process or in one per device."""
    n_devices = plan.config.devices
    fabric = new_fabric(plan, devices=n_devices)
    if n_devices == 1:
        fabric.launch()
        return train(fabric, plan, say)
    from torch.multiprocessing.spawn import ProcessRaisedException

    with _passing_signals_on():
        try:
            return Outcome(**fabric.launch(_train_apart, pickle.dumps(plan)))
        except ProcessRaisedException as error:
            last = str(error).strip().splitlines()[-1]
            raise WsimilError(f"one of the {n_devices} processes ended with {last}") from error


def _train_apart(fabric: Any, plan: bytes) -> dict[str, Any]:
    """`train` in a process of its own; Lightning would walk through a plan and an outcome, and does not get through frozen ones."""
    return asdict(train(fabric, pickle.loads(plan)))


@contextlib.contextmanager
def _passing_signals_on() -> Iterator[None]:
    """SIGTERM goes on to the processes that train (Ctrl-C reaches them by itself); they save and end, and this one after them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    came: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        came.append(number)
        if len(came) > 2:  # somebody has lost patience
            raise KeyboardInterrupt
        for child in active_children() if number == signal.SIGTERM else ():
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(child.pid, signal.SIGTERM)  # type: ignore[arg-type]

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

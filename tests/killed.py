"""Processes that are killed at a moment of their own work, and not of a clock that runs at another speed each time."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

LIMIT_S = 300


def begun(imported: list[str], target: Callable[..., None], *given: Any) -> ForkServerProcess:
    """A process that calls target, forked from one that has imported these modules (the first caller's) and no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(imported)
    process = context.Process(target=target, args=given)
    process.start()
    return process


def killed(process: ForkServerProcess, reached: Callable[[], bool], after_s: float) -> bool:
    """Kill -9 a process so long after it has reached something; False where it ended before."""
    until = time.monotonic() + LIMIT_S
    while not reached() and process.exitcode is None:
        assert time.monotonic() < until, "the process does not come on"
        time.sleep(0.002)
    process.join(after_s)
    process.kill()
    process.join()
    return process.exitcode == -9

"""How long a planned harvest will take on this machine: some of its own batches, timed.

Letters: X batches of one model.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from harvest import plan
from harvest.bench import Bench
from harvest.worker import Worker
from shared import files
from shared.log import Log, bar
from shared.store import Store

TIMED = 3  # batches of each model
WRITTEN = 2**26  # bytes, to time the disk


@dataclass(frozen=True)
class Estimate:
    """Seconds from here to the finished store, and what they follow from."""

    seconds: float
    tokens_per_second: dict[str, float]  # of each model, as planned, without padding
    disk_bytes_per_second: float


def estimate(store: Store, place: Path, bench: Bench, log: Log) -> Estimate:
    """Load every model, run TIMED batches of it as the harvest will, and write WRITTEN bytes beside `place`."""
    scale = {name: {"factor": 1.0, "sink_norm": float("inf")} for name in store.header.sources}
    trial = Store(store.path, replace(store.header, scale=scale))
    seconds, speeds = 0.0, {}
    models = list(store.header.models)
    with Worker(trial, bench, log) as worker:
        for number, name in enumerate(models):
            load_s = _timed(partial(worker.maker, name))
            padded_X = padded_tokens(store, name)
            per_token = _speed(worker, name, padded_X, log)
            again = 1 if number == len(models) - 1 else 2  # the last model stays in memory after the calibration
            calibration = min(store.header.spec["batch"]["calibration"], len(padded_X)) + 2  # and two to check it
            seconds += again * load_s + per_token * (padded_X.sum() + calibration * padded_X.mean())
            speeds[name] = store.header.plan["tokens"][name] / (per_token * padded_X.sum())
    disk = _disk_speed(place)
    written = sum(plan.stored_bytes(store.header.plan, list(store.header.sources.values())).values())
    return Estimate(max(float(seconds), written / disk), speeds, disk)


def padded_tokens(store: Store, model: str) -> np.ndarray:
    """Tokens of every planned batch, padding included."""
    length_G = np.diff(store.column(f"tokens/{model}/segment"))
    end_X = store.column(f"batches/{model}/end")
    start_X = np.concatenate([[0], end_X[:-1]])
    longest_X = np.maximum.reduceat(length_G[store.column(f"batches/{model}/segment")], start_X)
    padded: np.ndarray = longest_X * (end_X - start_X)
    return padded


def _speed(worker: Worker, name: str, padded_X: np.ndarray, log: Log) -> float:
    """Seconds per padded token: of batches in the middle of equal shares of all tokens, after one to warm up."""
    maker = worker.maker(name)
    shares = (np.arange(TIMED) + 0.5) / TIMED * padded_X.sum()
    chosen = np.unique(np.searchsorted(np.cumsum(padded_X), shares)).tolist()
    batches = [maker.batches.numbered(number) for number in chosen]
    with bar(f"{name}: timing", "batches", len(batches) + 1, quiet=log.quiet) as progress:
        maker.rehearse(batches[-1])
        progress.update()
        seconds = 0.0
        for batch in batches:
            seconds += _timed(partial(maker.rehearse, batch))
            progress.update()
    return seconds / float(padded_X[chosen].sum())


def _disk_speed(place: Path) -> float:
    """Bytes per second of a file that is written and synced."""
    block = os.urandom(2**20)
    probe = place.with_name(f"{place.name}.probe{files.TEMPORARY}")
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        return WRITTEN / _timed(lambda: files.write_atomic(probe, [block] * (WRITTEN // len(block))))
    finally:
        with suppress(FileNotFoundError):
            probe.unlink()


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

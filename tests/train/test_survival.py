"""A run that is killed at any moment goes on to the same weights, to the bit, and leaves nothing behind."""

import multiprocessing
import random
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from shared.errors import CheckpointError
from shared.store import Store
from tests import cases
from tests.build import make_store
from train import checkpoint, report
from train.fit import fit, resume, resume_sweep, sweep

KILLS = 10
ASKED: dict[str, Any] = {
    "wiring": {"kind": "dedicated", "latents": 256}, "steps": 400, "batch": 64, "threads": 1, "device": "cpu",
    "log": {"every": 3, "checkpoint": 20}, "optimiser": {"lr": 1e-2, "warmup": 5},
}  # fmt: skip


def begin_or_go_on(store: Path, name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if (folder / report.STORE).exists():
        resume(folder, quiet=True)
    elif not (folder / report.CONFIG).exists():  # else it was killed within the instant between the two files
        fit(store, {**ASKED, "method": {"name": name}}, folder, quiet=True)


def begun(*given: Any, target: Callable[..., None] = begin_or_go_on) -> ForkServerProcess:
    """A process that trains, forked from one that has imported torch and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.test_survival"])
    process = context.Process(target=target, args=given)
    process.start()
    return process


def content(folder: Path) -> dict[str, bytes]:
    """All that a break must not change: every file but the log, whose lines have times, and the page, drawn from it."""
    names = [path for path in folder.rglob("*") if path.is_file() and path.name not in (report.METRICS, report.PAGE)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    store = make_store(tmp_path / "pair.zarr", rows=2000, sources={"a": 24, "b": 16}, documents=40).path
    assert Store.open(store).rows == 2000
    chance, reached, kills = random.Random(0), set(), 0
    takes_s = 0.0
    for name in cases.names():
        started = time.monotonic()
        whole = begun(store, name, tmp_path / name)
        whole.join()
        assert whole.exitcode == 0
        takes_s = time.monotonic() - started  # of the last: the server has to import torch for the first
    number = 0
    while kills < KILLS:
        name, folder = cases.names()[number % len(cases.names())], tmp_path / f"run-{number}"
        for _ in range(2):  # in the beginning, and when it goes on
            process = begun(store, name, folder)
            process.join(chance.uniform(0, takes_s))
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
                reached.add(len(checkpoint.steps(folder / "checkpoints")) and _step(folder))
        if (folder / report.CONFIG).exists() and not (folder / report.STORE).exists():
            continue
        begin_or_go_on(store, name, folder)
        assert content(folder) == content(tmp_path / name), name
        assert not list(folder.rglob("*.partial"))
        number += 1
    assert len(reached) >= 4  # it was killed before the first checkpoint and behind several


def _step(folder: Path) -> int:
    return int(checkpoint.steps(folder / "checkpoints")[-1].name.removeprefix("step_"))


SWEEP = {**ASKED, "steps": 80, "sweep": {"runs": [{"method.name": name} for name in cases.names()]}}


def sweep_or_go_on(store: Path, place: Path) -> None:
    torch.set_num_threads(1)
    if (place / "sweep.json").exists():
        with suppress(CheckpointError):  # it was killed before its runs had their folders
            resume_sweep(place, quiet=True)
    else:
        sweep(store, SWEEP, place, quiet=True)


def test_kill_9_of_a_sweep(tmp_path: Path) -> None:
    store = make_store(tmp_path / "pair.zarr", rows=2000, sources={"a": 24, "b": 16}, documents=40).path
    started = time.monotonic()
    whole = begun(store, tmp_path / "whole", target=sweep_or_go_on)
    whole.join()
    takes_s, chance, kills, number = time.monotonic() - started, random.Random(1), 0, 0
    assert whole.exitcode == 0
    while kills < 2:
        place, number = tmp_path / f"sweep-{number}", number + 1
        for _ in range(2):
            process = begun(store, place, target=sweep_or_go_on)
            process.join(chance.uniform(0.3, 1) * takes_s)
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
        if not (place / "sweep.json").exists():
            continue
        with suppress(CheckpointError):
            assert not resume_sweep(place, quiet=True).failed
            for name in cases.names():
                [run] = place.glob(f"*-{name}")
                assert content(run) == content(tmp_path / "whole" / run.name), name
            assert not list(place.rglob("*.partial"))

"""A run that is killed at any moment goes on to the same weights, to the bit, and leaves nothing behind."""

import json
import random
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import CheckpointError
from shared.store import Store
from tests import cases
from tests.build import make_store
from tests.killed import begun, killed
from train import report
from train.fit import fit, resume, resume_sweep, sweep
from train.run import kept_step

KILLS = 10
IMPORTED = ["tests.train.test_survival"]
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


def step(logs: Iterable[Path]) -> int:
    """The last step that stands in a log; -1 before there is one."""
    last = -1
    for log in logs:
        for line in log.read_text().splitlines()[::-1]:
            with suppress(ValueError):  # a line that is being written
                if "step" in (event := json.loads(line)):
                    last = max(last, event["step"])
                    break
    return last


def content(folder: Path) -> dict[str, bytes]:
    """All that a break must not change: every file but the log, whose lines have times, and the page, drawn from it."""
    names = [path for path in folder.rglob("*") if path.is_file() and path.name not in (report.METRICS, report.PAGE)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    store = make_store(tmp_path / "pair.zarr", rows=2000, sources={"a": 24, "b": 16}, documents=40).path
    assert Store.open(store).rows == 2000
    chance, reached, kills, number = random.Random(0), set(), 0, 0
    while kills < KILLS:
        name, folder = cases.names()[number % len(cases.names())], tmp_path / f"run-{number}"
        if not (tmp_path / name).exists():
            begin_or_go_on(store, name, tmp_path / name)  # without a break
        moments = sorted(chance.sample(range(-1, ASKED["steps"]), 2))  # in the beginning, and when it goes on
        for moment in moments:
            process = begun(IMPORTED, begin_or_go_on, store, name, folder)
            if killed(process, lambda: step(folder.glob(report.METRICS)) >= moment, chance.uniform(0, 0.05)):  # noqa: B023
                kills += 1
                reached.add(kept_step(folder))
        if (folder / report.CONFIG).exists() and not (folder / report.STORE).exists():
            continue
        begin_or_go_on(store, name, folder)
        assert content(folder) == content(tmp_path / name), name
        assert not list(folder.rglob("*.partial"))
        number += 1
    assert len(reached) >= 4  # it was killed before the first checkpoint and behind several


SWEEP = {**ASKED, "steps": 80, "sweep": {"runs": [{"method.name": name} for name in cases.names()]}}


def sweep_or_go_on(store: Path, place: Path) -> None:
    torch.set_num_threads(1)
    if (place / "sweep.json").exists():
        with suppress(CheckpointError):  # it was killed before its runs had their folders
            resume_sweep(place, quiet=True)
    else:
        sweep(store, SWEEP, place, quiet=True)


@pytest.mark.slow
def test_kill_9_of_a_sweep(tmp_path: Path) -> None:
    store = make_store(tmp_path / "pair.zarr", rows=2000, sources={"a": 24, "b": 16}, documents=40).path
    whole = begun(IMPORTED, sweep_or_go_on, store, tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    chance, kills, number = random.Random(1), 0, 0
    while kills < 2:
        place, number = tmp_path / f"sweep-{number}", number + 1
        for moment in sorted(chance.sample(range(-1, SWEEP["steps"]), 2)):
            process = begun(IMPORTED, sweep_or_go_on, store, place)
            kills += killed(process, lambda: step(place.glob(f"*/{report.METRICS}")) >= moment, chance.uniform(0, 0.05))  # noqa: B023
        if not (place / "sweep.json").exists():
            continue
        with suppress(CheckpointError):
            assert not resume_sweep(place, quiet=True).failed
            for name in cases.names():
                [run] = place.glob(f"*-{name}")
                assert content(run) == content(tmp_path / "whole" / run.name), name
            assert not list(place.rglob("*.partial"))

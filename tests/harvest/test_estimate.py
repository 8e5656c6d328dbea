"""How long a plan will take, from some of its own batches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harvest import estimate as estimates
from harvest.bench import Bench, find
from harvest.estimate import estimate, padded_tokens
from harvest.forward import Batches
from harvest.job import prepare
from harvest.planner import planned
from shared.log import Log
from shared.store import Store
from tests.harvest.pair import config

QUIET = Log(quiet=True)


@pytest.fixture
def plan(home: Path, tmp_path: Path) -> Store:
    return planned(prepare(config(home, tmp_path / "x.zarr"), QUIET), QUIET)


def test_padded_tokens_are_those_of_the_batches(plan: Store) -> None:
    for name in plan.header.models:
        batches = Batches(plan, name)
        counted = [batches.numbered(number).ids_BT.numel() for number in range(len(batches.ends))]
        assert padded_tokens(plan, name).tolist() == counted


def test_time_is_that_of_loading_calibrating_and_running_every_batch(
    plan: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(np.arange(0.0, 1e6).tolist())
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: next(ticks))  # whatever is timed takes a second
    found = estimate(plan, tmp_path / "x.zarr", Bench(find(plan.header, {}, print), "cpu", 1), QUIET)
    seconds = 0.0
    for name, loads in (("llama", 2), ("gemma", 1)):
        padded_X = padded_tokens(plan, name)
        middle = (np.arange(3) + 0.5) / 3 * padded_X.sum()
        chosen = np.unique(np.searchsorted(np.cumsum(padded_X), middle))
        per_token = len(chosen) / padded_X[chosen].sum()
        calibration = min(8, len(padded_X)) + 2
        seconds += loads + per_token * (padded_X.sum() + calibration * padded_X.mean())
        tokens = plan.header.plan["tokens"][name]
        assert found.tokens_per_second[name] == pytest.approx(tokens / (per_token * padded_X.sum()))
    assert found.seconds == pytest.approx(seconds)
    assert found.disk_bytes_per_second == 2**26
    assert not list(tmp_path.rglob("*.partial"))


def test_a_slow_disk_decides_where_it_takes_longer(
    plan: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "_disk_speed", lambda place: 1.0)
    rows = plan.header.plan["rows"]
    assert estimate(plan, tmp_path / "x.zarr", Bench(find(plan.header, {}, print), "cpu", 1), QUIET).seconds > rows


def test_the_plan_is_not_changed(plan: Store, tmp_path: Path) -> None:
    estimate(plan, tmp_path / "x.zarr", Bench(find(plan.header, {}, print), "cpu", 1), QUIET)
    assert Store.at(plan.path).header == replace(plan.header, scale=None)

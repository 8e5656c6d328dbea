"""What a run takes is what it takes, and what is trained at once is what fits and may be."""

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared import config as configs
from shared.errors import ConfigError, TrainingError
from shared.store import Store
from tests import cases
from train import plan, prepare
from train.config import TrainConfig
from train.plan import Cost, costs, parted, passes, require_memory, taken, trial
from train.prepare import Ready, ready
from train.scale import Scale

MB = 10**6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return cases.small_store(tmp_path_factory.mktemp("plan"))


def made(store: Store, *changes: dict[str, Any]) -> list[Ready]:
    return ready(
        store, [configs.parse(TrainConfig, configs.override(cases.MOMENT, configs.settings(c))) for c in changes]
    )


def test_the_state_is_that_of_weights_and_two_moments_and_the_disk_holds_it_and_one_more(store: Store) -> None:
    run, short = made(store, {"log.keep": 3, "steps": 40, "log.checkpoint": 10}, {"log.keep": 3, "log.checkpoint": 3})
    found = trial(run)
    trainer = prepare.initialised(run, Scale(run.wiring.widths))
    numbers = sum(parameter.numel() for parameter in trainer.parameters)
    rest = sum(value.nbytes for name, value in trainer.dictionary.state_dict().items()) - 4 * numbers + 8 * 8
    assert found.parameters == numbers
    assert 0 <= found.state_bytes - (12 * numbers + rest) <= 8 * len(trainer.parameters)  # Adam's step counts
    assert found.weights_bytes == 4 * numbers + rest - 8 * 8
    assert plan.disk_bytes(run, found) == 4 * found.state_bytes + found.weights_bytes
    assert plan.disk_bytes(short, found) == 2 * found.state_bytes + found.weights_bytes  # of steps 3 and 4
    assert found.step_s > 0


def test_what_a_step_takes_is_measured_whatever_was_freed_before(store: Store) -> None:
    big = {"wiring.latents": 2**15, "batch": 128}
    found = []
    for _ in range(3):
        [run] = made(store, big)
        found.append(trial(run).step_bytes)
    least = 128 * 2**15 * 4  # one dense array of pre-activations
    assert all(one is not None and least < one < 20 * least for one in found)


PEAK = """
import torch
from shared.device import peak_memory
with peak_memory("cpu") as peak:
    for _ in range(3):
        torch.zeros(25_000_000).add_(1)  # 100 MB, freed again
    print(peak())
"""


def test_the_peak_is_that_of_what_was_held_at_once() -> None:
    """In a process of its own: in this one what earlier tests have begun may grow meanwhile."""
    told = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout
    assert 95 * MB < int(told) < 140 * MB


def test_runs_of_one_shape_are_tried_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Ready] = []

    def one(run: Ready) -> Cost:
        tried.append(run)
        return Cost(1, 1, 1.0, 1, 1)

    monkeypatch.setattr(plan, "trial", one)
    runs = made(store, {}, {"seed": 1}, {"optimiser.lr": 0.1}, {"steps": 9}, {"method.k": 2}, {"wiring.latents": 9})
    assert len(costs(runs)) == 6 and tried == [runs[0], runs[0], runs[4], runs[5]]  # the first one warms up


sizes = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50), st.booleans()), min_size=1, max_size=9)


@given(sizes, st.integers(0, 200))
def test_passes_hold_every_run_once_and_fit_and_are_alike(
    store: Store, sizes: list[tuple[int, int, bool]], room: int
) -> None:
    runs = made(store, *({"batch": 32 if large else 16} for _, _, large in sizes))
    found = [Cost(state * MB, step * MB, 0.0, 0, 0) for state, step, _ in sizes]
    begun = [0] * len(runs)
    memory = max(taken([n], runs, found) for n in range(len(runs))) + room * MB
    planned = passes(runs, found, begun, memory)
    assert sorted(n for one in planned for n in one) == list(range(len(runs)))
    for one in planned:
        assert taken(one, runs, found) <= memory
        assert len({runs[n].config.batch for n in one}) == 1 and one == sorted(one)
    told = parted(runs, begun, planned)
    assert ("batch" in told) == (len({large for _, _, large in sizes}) == 2)
    assert ("memory" in told) == (len(planned) > len({large for _, _, large in sizes}))
    with pytest.raises(ConfigError, match="does not fit into memory"):
        passes(runs, found, begun, max(taken([n], runs, found) for n in range(len(runs))) - 1)


@pytest.mark.parametrize(("room", "planned"), [(1, [[0, 1]]), (-1, [[0], [1]])])
def test_runs_take_nine_tenths_of_what_is_free_where_no_memory_is_given(
    store: Store, room: int, planned: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, found = made(store, {}, {"seed": 1}), [Cost(10**9, 10**8, 0.0, 0, 0)] * 2
    free = int((taken([0, 1], runs, found) + room * 10) / 0.9)
    monkeypatch.setattr(plan, "free_memory", lambda device: free)
    assert passes(runs, found, [0, 0], None) == planned


def test_a_trial_that_takes_more_than_there_is_is_told_in_a_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nmore")

    monkeypatch.setattr(plan, "_timed", short)
    told = "out of memory: CUDA out of memory. Tried to in a trial of crosscoder topk"
    with pytest.raises(TrainingError, match=re.escape(told)):
        costs(made(store, {}))


def test_windows_that_are_not_mapped_are_counted_once_for_all_runs(store: Store) -> None:
    mapped, read = made(store, {}, {"read.io": "pread"})
    [single] = made(store, {"read.io": "pread", "wiring.kind": "autoencoder", "wiring.sources": ["b"]})
    assert plan.windows_bytes([mapped]) == 0
    whole = len(read.order.kept_N)  # fewer rows than two windows have
    assert plan.windows_bytes([read]) == plan.windows_bytes([read, single]) == whole * 2 * (6 + 4)
    assert plan.windows_bytes([single]) == whole * 2 * 4
    cost = [Cost(0, 0, 0.0, 0, 0)]
    assert taken([0], [read], cost) - taken([0], [mapped], cost) == whole * 2 * (6 + 4)


def test_one_step_at_a_time_is_counted_and_every_state(store: Store) -> None:
    runs = made(store, {}, {"wiring.kind": "autoencoder", "wiring.sources": "b"} | {"wiring.sources": ["b"]})
    found = [Cost(1000, 70, 0.0, 0, 0), Cost(2000, 50, 0.0, 0, 0)]
    assert taken([0, 1], runs, found) == 3000 + 70 + plan.SLOTS * 16 * (6 + 4) * 4
    assert taken([1], runs, found) == 2000 + 50 + plan.SLOTS * 16 * 4 * 4


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"batch": 32}, "batch"), ({"rows.seed": 1}, "rows.seed"), ({"rows.positions": "2:"}, "rows.positions"),
     ({"threads": 2}, "threads"), ({"rows.documents": ["*"]}, "rows.documents")],
)  # fmt: skip
def test_what_keeps_runs_apart_is_named(store: Store, changes: dict[str, Any], key: str) -> None:
    runs = made(store, {}, changes)
    planned = passes(runs, [Cost(1, 1, 0.0, 0, 0)] * 2, [0, 0], 10**9)
    assert planned == [[0], [1]] and parted(runs, [0, 0], planned) == key


def test_a_run_that_can_fit_nowhere_is_refused_before_it_is_tried(store: Store) -> None:
    [run] = made(store, {"wiring.latents": 10**12})
    with pytest.raises(ConfigError, match="does not fit into memory"):
        require_memory(run)

"""Runs in a process each: the same bits as in one, shares that are even, and a stop that reaches all."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError, Stopped, one_line
from shared.store import Store
from tests import cases
from train import spread
from train.fit import fit, sweep
from train.run import begin, claim, finished, kept_step

ASKED: dict[str, Any] = {**cases.MOMENT, "steps": 20}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return cases.small_store(tmp_path_factory.mktemp("spread"))


def claimed(store: Store, place: Path, *changes: dict[str, Any]) -> list[Path]:
    """Folders of runs that have not begun."""
    folders = []
    for n, run in enumerate(cases.ready(store, *({"steps": 20, **one} for one in changes))):
        folders.append(claim(place / str(n), run.config))
        begin(folders[-1], store, run.sources)
    return folders


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 5))
def test_every_run_has_a_device_and_no_device_much_more_than_the_others(
    store: Store, steps: list[int], count: int
) -> None:
    parts = spread.shares(cases.ready(store, *({"steps": one} for one in steps)), count)
    assert sorted(n for part in parts for n in part) == list(range(len(steps)))
    assert len(parts) == min(count, len(steps))
    sums = [sum(steps[n] for n in part) for part in parts]
    assert max(sums) - min(sums) <= max(steps)


def test_runs_that_can_share_a_pass_share_a_device(store: Store) -> None:
    runs = cases.ready(store, *({"batch": batch} for batch in (16, 17, 16, 17)))
    assert spread.shares(runs, 2) == [[1, 3], [0, 2]]
    assert sorted(map(len, spread.shares(runs[::2], 2))) == [1, 1]  # as many as would leave one idle are parted


def test_runs_in_processes_equal_those_in_this_one(store: Store, tmp_path: Path) -> None:
    folders = claimed(store, tmp_path / "runs", {"seed": 0}, {"seed": 1}, {"seed": 2})
    logs = [tmp_path / "one.log", tmp_path / "two.log"]
    spread.run([folders[:2], folders[2:]], [store.path], [{"SOME": "1"}, {}], logs)
    assert all(finished(one) for one in folders)
    for seed, folder in enumerate(folders):
        alone = fit(store, {**ASKED, "seed": seed}, tmp_path / "alone" / str(seed), quiet=True)
        for name in ("dictionary/dictionary.safetensors", "measure.json", "config.toml"):
            assert (folder / name).read_bytes() == (alone.folder / name).read_bytes()
    assert "2 runs, 2 at once" in logs[0].read_text() and "FVE a" in logs[0].read_text()


def test_a_stop_reaches_every_process(store: Store, tmp_path: Path) -> None:
    folders = claimed(store, tmp_path / "runs", {"steps": 10**6}, {"steps": 10**6, "seed": 1})
    metrics = [folder / "metrics.jsonl" for folder in folders]

    def stop() -> None:
        while not all(one.exists() and '"event": "step"' in one.read_text() for one in metrics):
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Stopped), one_line():
        spread.run([folders[:1], folders[1:]], [store.path], [{}, {}], [tmp_path / "one.log", tmp_path / "two.log"])
    for one in metrics:
        assert json.loads(one.read_text().splitlines()[-1])["event"] == "stop"


def test_ctrl_c_in_a_terminal_leaves_a_checkpoint_of_every_run(store: Store, tmp_path: Path) -> None:
    """It goes to the processes of the whole group: the children must not be stopped a second time by their parent."""
    folders = claimed(store, tmp_path / "runs", {"steps": 10**6}, {"steps": 10**6, "seed": 1})
    code = (
        "import signal, sys; from pathlib import Path; from train import spread; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # which is ignored in the background
        "store, one, two = map(Path, sys.argv[1:]); "
        "spread.run([[one], [two]], [store], [{}, {}], [one / 'log', two / 'log'])"
    )
    given = [sys.executable, "-c", code, store.path, *folders]
    with subprocess.Popen(given, start_new_session=True, stderr=subprocess.DEVNULL) as parent:
        metrics = [folder / "metrics.jsonl" for folder in folders]
        while not all(one.exists() and '"event": "step"' in one.read_text() for one in metrics):
            assert parent.poll() is None
            time.sleep(0.05)
        os.killpg(parent.pid, signal.SIGINT)
        parent.wait(60)
    for folder in folders:
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["event"] == "stop" and kept_step(folder) == last["step"] > 0


def test_the_memory_of_a_sweep_is_that_of_each_gpu(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "devices", lambda gpus, asked: ["0", "1"])
    asked = {**ASKED, "sweep": {"grid": {"seed": [0, 1]}}}
    with pytest.raises(ConfigError, match="does not fit into memory"):
        sweep(store, asked, tmp_path / "none", gpus=[0, 1], memory=10, quiet=True)
    assert not (tmp_path / "none").exists()
    given: list[Any] = []
    monkeypatch.setattr(spread.subprocess, "Popen", lambda command, **named: given.append(command) or Ended())
    sweep(store, asked, tmp_path / "runs", gpus=[0, 1], memory=3 * 10**9, quiet=True)
    assert [command[-2:] for command in given] == [["--memory", "3.0"]] * 2


class Ended:
    """A process that has done nothing."""

    def wait(self) -> int:
        return 0


def test_gpus_that_are_not_there_are_refused(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"these GPUs cannot be used: none\. GPUs that this machine shows: 0"):
        sweep(store, {**ASKED, "device": "auto", "sweep": {}}, tmp_path / "runs", gpus=[], quiet=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for wrong in ([2], [-1], [0, 0]):
        with pytest.raises(ConfigError, match="this machine shows: 2"):
            spread.devices(wrong, [])
    assert not (tmp_path / "runs").exists()


def test_runs_that_are_told_another_device_than_a_gpu_are_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"--gpus says where runs are trained: device cpu\. Leave one of the two out"):
        sweep(store, {**ASKED, "device": "cpu", "sweep": {}}, tmp_path / "runs", gpus=[0], quiet=True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("visible", "names"), [(None, ["0", "1", "2"]), ("5,3,GPU-x", ["5", "3", "GPU-x"])])
def test_gpus_are_named_as_this_process_sees_them(
    visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert spread.devices([], []) == names and spread.devices([2, 0], []) == [names[2], names[0]]


def test_a_sweep_over_gpus_is_the_sweep_and_names_what_failed(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        spread, "devices", lambda gpus, asked: ["0", "1"]
    )  # the processes train on the CPU, as they are told
    asked = {**ASKED, "sweep": {"runs": [{"seed": 0}, {"optimiser.lr": 1e30}, {"seed": 2}]}}
    found = sweep(store, asked, tmp_path / "runs", gpus=[0, 1])
    assert [run.folder.name for run in found.runs] == ["0-seed=0", "2-seed=2"]
    [(folder, error)] = found.failed.items()
    assert folder.name == "1-lr=1e+30" and "the loss is not finite" in str(error) and "gpu-" in str(error)
    assert f"2 runs, told in {tmp_path / 'runs' / 'gpu-0.log'}: " in capsys.readouterr().err

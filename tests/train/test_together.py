"""Runs on one loader: each to the bits that it would have alone, whatever becomes of the others."""

import gc
import json
import signal
import tomllib
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from shared import config as configs
from shared.errors import (
    CheckpointError,
    ConfigError,
    Stopped,
    StoreDamagedError,
    StoreError,
    TrainingError,
    one_line,
)
from shared.store import Store
from tests import cases
from train import measure as measures
from train import plan, prepare
from train.config import TrainConfig
from train.dictionary import Dictionary
from train.fit import Sweep, fit, resume_sweep, sweep
from train.loader import Loader
from train.run import folders_of, held
from train.together import Member, _shown
from train.trainer import Trainer

BASE: dict[str, Any] = {
    "steps": 9, "batch": 16, "threads": 1, "device": "cpu", "optimiser": {"lr": 1e-2, "warmup": 2},
    "log": {"every": 2, "checkpoint": 4}, "wiring": {"latents": 32, "exclusive": 4}, "method": {"name": "topk", "k": 3},
}  # fmt: skip
RUNS: list[dict[str, Any]] = [
    {"wiring.kind": "dedicated"},
    {"method.name": "batch_topk", "seed": 1},
    {"method": {"name": "standard"}, "wiring.norm": "joint"},
    {"wiring.kind": "autoencoder", "wiring.sources": ["b"]},
    {"wiring.kind": "transcoder", "wiring.sources": ["b", "a"], "steps": 5},
    {"wiring.sources": ["b", "a"], "scale.kind": "rms", "log.every": 3},
    {"optimiser.lr": 1e30},
    {"wiring.kind": "autoencoder", "wiring.sources": ["a"], "wiring.latents": 64, "log.measure_rows": 40},
]
SWEEP = {**BASE, "sweep": {"runs": RUNS}}
FAILING = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return cases.small_store(tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module")
def eight(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep(store, SWEEP, tmp_path_factory.mktemp("runs") / "eight", quiet=True)


def content(folder: Path) -> dict[str, bytes]:
    """All of a run but what tells times or is drawn from it; the log without its times."""
    names = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("metrics.jsonl", "report.html")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names} | {"log": log(folder)}


def log(folder: Path) -> bytes:
    timed = {"time", "rows_s", "waited_s", "message"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in timed} for line in lines if line["event"] not in ("resume",)]
    return json.dumps([line for line in kept if line["event"] != "stop"]).encode()


def test_eight_runs_of_which_one_fails_equal_those_alone_to_the_bit(eight: Sweep, store: Store, tmp_path: Path) -> None:
    assert len(eight.runs) == 7 and len(folders_of(eight.folder)) == 8
    for folder in folders_of(eight.folder):
        asked = (folder / "config.toml").read_text()
        alone = tmp_path / folder.name
        if folder in eight.failed:
            with pytest.raises(TrainingError, match="not finite"):
                fit(store, tomllib.loads(asked), alone, quiet=True)
        else:
            fit(store, tomllib.loads(asked), alone, quiet=True)
            assert content(alone) == content(folder), folder.name


def test_what_failed_is_named_with_its_fault_and_has_no_figures(eight: Sweep) -> None:
    [(folder, error)] = eight.failed.items()
    assert folder.name == "6-lr=1e+30" and "the loss is not finite" in str(error)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "failed" and "not finite" in last["error"]
    assert not (folder / "measure.json").exists() and not (folder / "dictionary").exists()


def test_a_pass_reads_once_for_all_of_its_runs(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Loader] = []
    close = Loader.close

    def closed(self: Loader) -> None:
        served.append(self)
        close(self)

    monkeypatch.setattr(Loader, "close", closed)
    sweep(store, {**BASE, "sweep": {"grid": {"seed": [0, 1, 2], "steps": [5, 9]}}}, tmp_path / "runs", quiet=True)
    assert [one.rows_served for one in dict.fromkeys(served)] == [9 * 16]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Trainer.update

    def stopping(self: Trainer, x: Any) -> Any:
        if self.step == step:
            signal.raise_signal(signal.SIGTERM)
        return update(self, x)

    monkeypatch.setattr(Trainer, "update", stopping)


@pytest.mark.parametrize("step", [3, 6, 8])  # not 0 to 2: those a trial takes, too
def test_a_sweep_that_was_stopped_goes_on_to_the_same_bits(
    eight: Sweep, store: Store, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "eight"
    with monkeypatch.context() as patch, pytest.raises(Stopped), one_line():
        stop_at(step, patch)
        sweep(store, SWEEP, place, quiet=True)
    assert not any((path / "report.html").exists() for path in folders_of(place))
    again = resume_sweep(place, quiet=True)
    assert [path.name for path in again.failed] == ["6-lr=1e+30"]
    for path in folders_of(place):
        if path not in again.failed:
            assert content(path) == content(eight.folder / path.name), path.name
    assert [one.figures for one in again.runs] == [one.figures for one in eight.runs]


def test_runs_at_other_steps_go_on_in_passes_of_their_own(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**BASE, "sweep": {"grid": {"log.checkpoint": [2, 3]}}}
    whole = sweep(store, asked, tmp_path / "whole", quiet=True)

    class KilledError(BaseException):
        pass

    def killed(self: Trainer, x: Any) -> Any:
        if self.step == 5:
            raise KilledError
        return update(self, x)

    update = Trainer.update
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Trainer, "update", killed)
        sweep(store, asked, tmp_path / "runs", quiet=True)
    capsys.readouterr()
    resume_sweep(tmp_path / "runs")
    assert "2 runs, 1 + 1 at once, since they differ in first step" in capsys.readouterr().err
    for path in folders_of(tmp_path / "runs"):
        assert content(path) == content(whole.folder / path.name)


def test_runs_that_cannot_share_batches_are_parted_and_told_why(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {**BASE, "steps": 2, "sweep": {"grid": {"batch": [16, 32], "rows.positions": ["1:", "2:"], "seed": [0, 1]}}}
    found = sweep(store, asked, tmp_path / "runs")
    assert len(found.runs) == 8
    assert "8 runs, 2 + 2 + 2 + 2 at once, since they differ in batch, rows.positions" in capsys.readouterr().err


def test_runs_that_do_not_fit_at_once_take_turns_and_come_out_the_same(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**BASE, "sweep": {"grid": {"seed": [0, 1, 2]}}}
    whole = sweep(store, asked, tmp_path / "whole", quiet=True)
    monkeypatch.setattr(plan, "trial", lambda run: plan.Cost(1000, 500, 0.0, 0, 0))
    two = 2 * 1000 + 500 + plan.SLOTS * 16 * (6 + 4) * 4
    parts = sweep(store, asked, tmp_path / "parts", memory=two)
    assert "3 runs, 2 + 1 at once, since they differ in memory" in capsys.readouterr().err
    for one, other in zip(whole.runs, parts.runs, strict=True):
        assert content(one.folder) == content(other.folder)
    with pytest.raises(ConfigError, match="does not fit into memory"):
        sweep(store, asked, tmp_path / "none", memory=two - 1001)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_run_that_is_out_of_memory_ends_alone(
    store: Store, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Trainer.update

    def short(self: Trainer, x: Any) -> Any:
        if self.step == 3 and self.config.seed == 1:
            raise error
        return update(self, x)

    monkeypatch.setattr(Trainer, "update", short)
    found = sweep(store, {**BASE, "sweep": {"grid": {"seed": [0, 1]}}}, tmp_path / "runs", quiet=True)
    assert len(found.runs) == 1
    assert [str(one).partition(":")[0] for one in found.failed.values()] == ["out of memory"]


def test_the_line_behind_the_bar_has_the_ranges_of_several_runs_the_rows_and_the_stall(tmp_path: Path) -> None:
    members = [Member(tmp_path, run) for run in cases.ready(cases.small_store(tmp_path), {}, {"seed": 1})]
    assert _shown(members, 1.0, 0.0) == {}  # before the first figures
    members[0].shown = {"loss": 0.5, "l0": 3.0, "dead": 0.25, "fve/a": 0.5, "fve/b": 0.75, "gradient": 1.0}
    members[1].shown = {"loss": 0.25, "l0": 3.0, "dead": 0.0, "fve/a": 0.125}
    assert _shown(members, 12345.6, 0.017) == {
        "runs": "2", "loss": "0.25..0.5", "l0": "3.0", "dead": "0.0%..25.0%", "fve/a": "0.125..0.500",
        "fve/b": "0.750", "rows/s": "12,346", "stall": "2%",
    }  # fmt: skip
    assert list(_shown(members[:1], 1.0, 0.0)) == ["loss", "l0", "dead", "fve/a", "fve/b", "rows/s", "stall"]


def test_what_a_pass_has_trained_is_gone_when_the_next_begins(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, trained, left = prepare.fresh, Trainer.trained, list[weakref.ref[Dictionary]]()

    def watched(self: Trainer) -> Dictionary:
        made = trained(self)
        left.append(weakref.ref(made))
        return made

    def begins(*given: Any) -> Trainer:
        gc.collect()
        assert not any(one() for one in left)
        return fresh(*given)

    monkeypatch.setattr(Trainer, "trained", watched)
    monkeypatch.setattr(prepare, "fresh", begins)
    found = sweep(store, {**BASE, "sweep": {"grid": {"batch": [8, 16]}}}, tmp_path / "runs", quiet=True)
    assert len(found.runs) == len(left) == 2 and not found.failed


def test_another_error_is_our_own_and_is_not_hidden(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "measure_all", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sweep(store, {**BASE, "steps": 1, "sweep": {}}, tmp_path / "runs", quiet=True)


def test_a_run_that_is_out_of_memory_before_its_first_step_ends_alone(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = prepare.fresh

    def short(store: Store, ready: prepare.Ready, *given: Any) -> Trainer:
        if ready.config.seed == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fresh(store, ready, *given)

    monkeypatch.setattr(prepare, "fresh", short)
    found = sweep(store, {**BASE, "sweep": {"grid": {"seed": [0, 1]}}}, tmp_path / "runs", quiet=True)
    assert [run.folder.name for run in found.runs] == ["0-seed=0"]
    assert [str(one) for one in found.failed.values()] == [
        "out of memory: CUDA out of memory before the first step. Lower batch or wiring.latents"
    ]


@pytest.mark.parametrize("sealed", [True, False])
def test_a_store_that_changes_ends_all(tmp_path: Path, sealed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = cases.small_store(tmp_path)
    update = Trainer.update

    def reseal(self: Trainer, x: Any) -> Any:
        if self.step == 3:
            seal = changed.path / "sealed"
            seal.write_bytes(seal.read_bytes() + b" ") if sealed else seal.unlink(missing_ok=True)
        return update(self, x)

    monkeypatch.setattr(Trainer, "update", reseal)
    found = sweep(changed, {**BASE, "sweep": {"grid": {"seed": [0, 1]}}}, tmp_path / "runs", quiet=True)
    assert not found.runs and all("store has changed" in str(error) for error in found.failed.values())


def test_a_store_with_a_value_that_is_not_finite_is_blamed_with_its_row(tmp_path: Path) -> None:
    damaged = cases.small_store(tmp_path)
    ready = prepare.ready(damaged, [configs.parse(TrainConfig, BASE)])[0]
    row = int(ready.order.step(4, 16).min())
    shard, local = divmod(row, damaged.shard_rows)
    with (damaged.path / "activations" / "b" / "c" / str(shard) / "0").open("r+b") as file:
        file.seek(2 * (local * 4 + 1))
        file.write(b"\xff\x7f")  # a NaN, as a bit that fell over may make one
    only_a = {"wiring": {"kind": "autoencoder", "latents": 32, "sources": ["a"]}}
    runs = [{"seed": 1}, {"scale.kind": "none"}, only_a]  # found when its scale is, in a step, and not at all
    found = sweep(damaged, {**BASE, "sweep": {"runs": runs}}, tmp_path / "runs", quiet=True)
    assert [folder.name for folder in found.failed] == ["0-seed=1", "1-kind=none"]
    for error in found.failed.values():
        assert isinstance(error, StoreDamagedError)
        assert str(error).startswith(f"b holds values that are not finite: row {row:,}. See harvest verify --full")
    assert [one.folder.name for one in found.runs] == ["2-kind=autoencoder-latents=32-sources=a"]


def test_a_run_that_another_process_trains_is_left_to_it(store: Store, tmp_path: Path) -> None:
    found = sweep(store, {**BASE, "steps": 1, "sweep": {"grid": {"seed": [0, 1]}}}, tmp_path / "runs", quiet=True)
    first = found.runs[0].folder
    for one in found.runs:
        (one.folder / "report.html").unlink()
    with held(first):
        again = resume_sweep(found.folder, quiet=True)
    assert list(again.failed) == [first] and [one.folder for one in again.runs] == [found.runs[1].folder]


def test_what_is_wrong_with_one_run_is_refused_before_any_begins(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no source: c"):
        sweep(store, {**BASE, "sweep": {"runs": [{}, {"wiring.sources": ["c"]}]}}, tmp_path / "runs", quiet=True)
    with pytest.raises(ConfigError, match=r"Use train\.sweep"):
        fit(store, SWEEP, tmp_path / "runs", quiet=True)
    with pytest.raises(ConfigError, match="no run to train"):
        sweep(store, [], tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(CheckpointError, match="no run here"):
        resume_sweep(tmp_path)


def test_a_sweep_that_was_killed_before_all_of_its_runs_had_folders_does_not_go_on_with_some(
    store: Store, tmp_path: Path
) -> None:
    found = sweep(store, {**BASE, "steps": 1, "sweep": {"grid": {"seed": [0, 1]}}}, tmp_path / "runs", quiet=True)
    (found.runs[1].folder / "store.json").unlink()
    with pytest.raises(CheckpointError, match="this sweep was stopped before it began"):
        resume_sweep(found.folder)


def test_a_list_of_configs_is_a_sweep_too(store: Store, tmp_path: Path) -> None:
    found = sweep(store, [{**BASE, "steps": 1}, {**BASE, "steps": 2}], tmp_path / "runs", quiet=True)
    assert [one.folder.name for one in found.runs] == ["0-topk", "1-topk"]
    assert found.runs[1].dictionary.latents == 32 and not found.runs[1].dictionary.training


def test_the_folder_of_a_sweep_is_taken_and_the_way_on_is_told(store: Store, tmp_path: Path) -> None:
    asked = {**BASE, "steps": 2, "sweep": {"grid": {"seed": [0, 1]}}}
    sweep(store, asked, tmp_path / "runs", quiet=True)
    told = r"this folder holds a sweep already: .*runs\. Give another folder \(--out\), or: train resume .*runs"
    with pytest.raises(CheckpointError, match=told):
        sweep(store, asked, tmp_path / "runs", quiet=True)
    with pytest.raises(CheckpointError, match=told):
        fit(store, BASE, tmp_path / "runs", quiet=True)

"""A run's folder: one process at a time, a log without lines of steps that are taken again, checkpoints that fit."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared import files
from shared.errors import CheckpointError, DivergenceError, TrainingError
from shared.log import Log
from shared.store import Store
from tests import cases
from tests.build import make_store
from train import checkpoint, report, run
from train.run import Training, _cut, finite


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "pair.zarr", sources={"a": 20, "b": 16})


def begun(folder: Path, store: Store, **log: int) -> Training:
    folder.mkdir(exist_ok=True)
    made = cases.trainer("dedicated", "batch_topk", steps=12, log=log)
    [run] = cases.ready(store, {})
    return Training(folder, made.config, made, store, run.order, Log(folder / report.METRICS, quiet=True))


def stepped(training: Training, steps: int) -> list[bool]:
    """Whether each step was logged."""
    told = []
    for _ in range(steps):
        x = cases.random_rows("dedicated", 32, seed=training.trainer.step)
        told.append(training.update(x, epoch=0) is not None)
    return told


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / report.METRICS).read_text().splitlines()]


def test_a_run_logs_and_keeps_at_the_asked_steps_and_the_last(tmp_path: Path, store: Store) -> None:
    training = begun(tmp_path / "run", store, every=5, checkpoint=4, keep=9)
    assert [n for n, told in enumerate(stepped(training, 12), 1) if told] == [5, 10, 12]
    told = [(line["event"], line["step"]) for line in lines(tmp_path / "run")]
    assert told == [("way", 5), ("step", 5), ("step", 10), ("step", 12)]
    assert lines(tmp_path / "run")[0]["way"] == "codes are entries, products fp32"
    kept = checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert [path.name for path in kept] == ["step_00000004", "step_00000008", "step_00000012"]
    assert training.finished


def test_a_run_goes_back_to_its_last_checkpoint_and_so_does_its_log(tmp_path: Path, store: Store) -> None:
    first = begun(tmp_path / "run", store, every=1, checkpoint=4)
    stepped(first, 7)
    left = tmp_path / "run" / f"dictionary.0123abcd{files.TEMPORARY}"
    left.mkdir()
    again = begun(tmp_path / "run", store, every=1, checkpoint=4)
    again.resume()
    assert again.trainer.step == 4 and not left.exists()
    assert [line["step"] for line in lines(tmp_path / "run") if line["event"] == "step"] == [1, 2, 3, 4]


def test_a_run_without_a_checkpoint_begins_again(tmp_path: Path, store: Store) -> None:
    stepped(begun(tmp_path / "run", store, every=1, checkpoint=100), 3)
    again = begun(tmp_path / "run", store, every=1, checkpoint=100)
    again.resume()
    assert again.trainer.step == 0 and lines(tmp_path / "run") == []


def test_weights_that_are_not_finite_are_never_kept_and_the_last_checkpoint_stays(tmp_path: Path, store: Store) -> None:
    training = begun(tmp_path / "run", store, every=100, checkpoint=4, keep=1)
    stepped(training, 5)
    next(iter(training.trainer.parameters)).data[0] = float("nan")
    with pytest.raises(DivergenceError, match="the weights are not finite: after step 5"):
        training.keep()
    stepped(training, 1)  # whose loss nobody logs
    with pytest.raises(DivergenceError, match="the loss is not finite: nan at step 6"):
        training.keep()
    assert [path.name for path in checkpoint.steps(tmp_path / "run" / "checkpoints")] == ["step_00000004"]


def test_a_disk_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*given: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / report.CONFIG).touch()
    monkeypatch.setattr(files.fcntl, "flock", none)
    with pytest.raises(OSError, match=r"No locks available \(locking a file\): .*config\.toml"), run.held(tmp_path):
        pass


def test_a_checkpoint_is_written_once_for_a_step(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, genuine = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *given: (saved.append(given[0].step), genuine(*given))[1])
    training = begun(tmp_path / "run", store, checkpoint=4)
    stepped(training, 4)
    training.keep()
    again = begun(tmp_path / "run", store, checkpoint=4)
    again.resume()
    again.keep()
    assert saved == [4]
    stepped(again, 1)
    again.keep()
    assert saved == [4, 5]


def test_a_store_that_changes_under_a_run_ends_it_before_a_checkpoint_says_otherwise(
    tmp_path: Path, store: Store
) -> None:
    training = begun(tmp_path / "run", store, checkpoint=4)
    stepped(training, 5)
    (store.path / "sealed").write_text((store.path / "sealed").read_text() + " ")
    with pytest.raises(TrainingError, match=r"the store has changed under this run: .*pair\.zarr"):
        stepped(training, 3)
    assert [path.name for path in checkpoint.steps(tmp_path / "run" / "checkpoints")] == ["step_00000004"]


def test_the_log_ends_at_the_step_of_the_checkpoint_and_before_a_torn_line(tmp_path: Path) -> None:
    events = [
        {"event": "start"}, {"event": "step", "step": 5}, {"event": "resume", "step": 4}, {"event": "step", "step": 10},
        {"event": "stop", "step": 3}, {"event": "measure"},
    ]  # fmt: skip
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "ste')
    _cut(metrics, 7)
    assert metrics.read_text() == "".join(json.dumps(event) + "\n" for event in events[:3])
    _cut(tmp_path / "none.jsonl", 7)
    assert (tmp_path / "none.jsonl").read_text() == ""


def test_a_loss_or_gradient_that_is_not_finite_is_refused() -> None:
    with pytest.raises(TrainingError, match="the gradient is not finite: nan at step 3"):
        finite({"loss": torch.tensor(1.0), "gradient": torch.tensor(float("nan"))}, 3)
    with pytest.raises(TrainingError, match="the loss is not finite: inf at step 3"):
        finite({"loss": torch.tensor(float("inf")), "gradient": torch.tensor(0.5)}, 3)
    assert finite({"loss": torch.tensor(1.0), "gradient": torch.tensor(0.5)}, 3)["gradient"] == 0.5


def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / report.CONFIG).write_text("steps = 1\n")
    code = f"""
from pathlib import Path
from train import run
with run.held(Path({str(tmp_path)!r})):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match="another process trains this run"), run.held(tmp_path):
            pass
        other.kill()
    with run.held(tmp_path):  # what a killed process held is free
        pass
    assert (tmp_path / report.CONFIG).read_text() == "steps = 1\n"


@pytest.mark.parametrize(
    ("log", "word"),
    [
        ('{"event": "failed", "step": 3, "error": "no memory"}\n', "the run failed: no memory"),
        ('{"event": "step", "step": 3}\n{"event": "st', "the run was broken off"),
        ('{"event": "step", "step": 3}\n', "the run was broken off"),
        ("", "the run was broken off"),
        (None, "the run was broken off"),
    ],
)
def test_a_run_of_another_process_that_did_not_finish_is_told_by_its_last_word(
    tmp_path: Path, log: str | None, word: str
) -> None:
    if log is not None:
        (tmp_path / report.METRICS).write_text(log)
    assert str(run.ended(tmp_path, tmp_path / "gpu-0.log")).startswith(word)

"""A checkpoint is whole or absent, belongs to one run, and loses nothing."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shared import files
from shared.errors import CheckpointError
from tests import cases
from train import checkpoint
from train.trainer import Trainer

RUN = {"store": "5a3c", "config": "77fe"}


def stepped(steps: int, name: str = "batch_topk") -> Trainer:
    trainer = cases.trainer("dedicated", name, dead_rows=64)
    for step in range(steps):
        trainer.update(cases.random_rows("dedicated", 32, seed=step))
    return trainer


def leaves(state: Any, path: str = "") -> dict[str, Any]:
    """Every value of a nested state by its path."""
    if isinstance(state, dict):
        found = [leaves(value, f"{path}/{key}") for key, value in state.items()]
    elif isinstance(state, list | tuple):
        found = [leaves(value, f"{path}/{index}") for index, value in enumerate(state)]
    else:
        return {path: state}
    return {key: value for part in found for key, value in part.items()}


def assert_same(left: Trainer, right: Trainer) -> None:
    a, b = leaves(left.state_dict()), leaves(right.state_dict())
    assert a.keys() == b.keys()
    for key, value in a.items():
        if torch.is_tensor(value):
            assert torch.equal(value, b[key]) and value.dtype == b[key].dtype, key
        else:
            assert value == b[key], key


@pytest.mark.parametrize("name", cases.names())
def test_a_checkpoint_gives_back_all_that_the_trainer_is(name: str, tmp_path: Path) -> None:
    trainer, fresh = stepped(5, name), cases.trainer("dedicated", name, dead_rows=64, seed=9)
    path = checkpoint.save(trainer, tmp_path, RUN, keep=2)
    assert path == tmp_path / "step_00000005"
    checkpoint.load(fresh, path, RUN)
    assert_same(trainer, fresh)
    x = cases.random_rows("dedicated", 32, seed=77)
    trainer.update(x), fresh.update(x)
    assert_same(trainer, fresh)


def test_files_hold_tensors_and_json_only(tmp_path: Path) -> None:
    path = checkpoint.save(stepped(1), tmp_path, RUN, keep=1)
    assert {entry.name for entry in path.iterdir()} == {"state.safetensors", "state.json"}
    assert files.read_json(path / "state.json")["store"] == "5a3c"


def test_the_last_few_are_kept_and_come_oldest_first(tmp_path: Path) -> None:
    trainer = stepped(0)
    for step in (5, 100, 20, 1000):
        trainer.step = step
        checkpoint.save(trainer, tmp_path, RUN, keep=2)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step_00000100", "step_00001000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000100", "step_00001000"]


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoint.steps(tmp_path) == checkpoint.steps(tmp_path / "nowhere") == []


def test_the_checkpoint_of_another_run_is_refused_and_what_differs_is_named(tmp_path: Path) -> None:
    trainer, fresh = stepped(2), stepped(0)
    path = checkpoint.save(trainer, tmp_path, RUN, keep=1)
    before = fresh.dictionary.decoder["a"].clone()
    with pytest.raises(CheckpointError, match=r"another run; these differ: config: '77fe' -> 'other'\. "):
        checkpoint.load(fresh, path, {**RUN, "config": "other"})
    assert torch.equal(fresh.dictionary.decoder["a"], before) and fresh.step == 0


class KilledError(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("moment", ["save_file", "write_json"])
def test_a_save_that_is_cut_short_leaves_the_old_ones_and_nothing_else(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = stepped(1)
    checkpoint.save(trainer, tmp_path, RUN, keep=2)
    trainer.update(cases.random_rows("dedicated", 32))

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KilledError

    monkeypatch.setattr(files if moment == "write_json" else checkpoint, moment, killed)
    with pytest.raises(KilledError):
        checkpoint.save(trainer, tmp_path, RUN, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    checkpoint.load(stepped(0), tmp_path / "step_00000001", RUN)


def test_what_a_killed_writer_left_is_no_checkpoint_and_is_swept_by_the_next(tmp_path: Path) -> None:
    trainer = stepped(1)
    path = checkpoint.save(trainer, tmp_path, RUN, keep=2)
    left = tmp_path / f"step_00000009.0123abcd{files.TEMPORARY}"
    path.rename(left)  # as if the kill had come just before the rename
    assert checkpoint.steps(tmp_path) == []
    again = checkpoint.save(trainer, tmp_path, RUN, keep=1)
    assert list(tmp_path.iterdir()) == checkpoint.steps(tmp_path) == [again]


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = stepped(1)
    checkpoint.save(trainer, tmp_path, RUN, keep=1)
    trainer.update(cases.random_rows("dedicated", 32))
    genuine = shutil.rmtree

    def killed(path: Path, *given: Any, **named: Any) -> None:
        if (path / checkpoint.STATE).exists():
            (path / checkpoint.STATE).unlink()
            raise KilledError
        genuine(path, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KilledError):
            checkpoint.save(trainer, tmp_path, RUN, keep=1)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step_00000002"]
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


@pytest.mark.parametrize("place", [0.2, 0.5, 0.999])
def test_a_checkpoint_of_which_a_bit_has_changed_is_refused(place: float, tmp_path: Path) -> None:
    path = checkpoint.save(stepped(1), tmp_path, RUN, keep=2)
    data = bytearray((path / checkpoint.TENSORS).read_bytes())
    data[int(place * len(data))] ^= 1
    (path / checkpoint.TENSORS).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"this checkpoint is damaged: .*train resume then goes on from the one"):
        checkpoint.load(stepped(0), path, RUN)


@pytest.mark.parametrize("torn", ["state.json", "state.safetensors"])
def test_a_torn_checkpoint_is_refused(torn: str, tmp_path: Path) -> None:
    path = checkpoint.save(stepped(1), tmp_path, RUN, keep=2)
    (path / torn).write_bytes((path / torn).read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="this checkpoint is damaged"):
        checkpoint.load(stepped(0), path, RUN)
    with pytest.raises(CheckpointError, match="this checkpoint is damaged"):
        checkpoint.load(stepped(0), tmp_path / "step_00000099", RUN)

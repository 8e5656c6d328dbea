"""A harvest that is killed at any moment, or runs out of disk, goes on to the same bytes and leaves nothing behind."""

import errno
import multiprocessing
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch

from harvest import lock
from harvest.config import HarvestConfig
from shared import files
from shared.errors import one_line
from shared.store import Store
from tests.harvest.pair import config, harvest, tree
from tests.killed import begun, killed

KILLS = 25
FAMILIES = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gemma3")]
IMPORTED = ["tests.harvest.test_survival", *FAMILIES, "pydoc_data.topics"]


def run(asked: HarvestConfig) -> None:
    torch.set_num_threads(1)
    harvest(asked)


def nothing_left(path: Path) -> bool:
    return not list(path.parent.rglob("*.partial")) and not lock.folder_of(path).exists()


def test_kill_9_at_random_moments(home: Path, pair: Store, tmp_path: Path) -> None:
    def units() -> int:
        return len(list(path.glob("receipts/0*"))) if path.exists() else -1

    expected, chance = tree(pair.path), random.Random(0)
    whole = begun(IMPORTED, run, config(home, tmp_path / "whole.zarr"))
    whole.join()
    assert (whole.exitcode, tree(tmp_path / "whole.zarr")) == (0, expected)
    kills = number = 0
    reached = set()  # how many units there were when it was killed
    while kills < KILLS:
        path = tmp_path / f"{number}.zarr"
        moment = chance.randint(units(), 8)
        process = begun(IMPORTED, run, config(home, path))
        if killed(process, lambda: units() >= moment, chance.uniform(0, 0.5 if moment < 0 else 0.05)):  # noqa: B023
            kills += 1
            reached.add(units())
        if (path / "sealed").exists() or kills % 5 == 0:
            assert tree(harvest(config(home, path)).path) == expected
            assert nothing_left(path)
            number += 1
    assert len(reached) >= 4  # it was killed while planning, calibrating, and at several units


def test_two_harvests_of_other_ids_into_one_folder_do_not_touch_each_other(home: Path, tmp_path: Path) -> None:
    """Two processes at once, and a name that begins with the other's."""
    together, apart = tmp_path / "together", tmp_path / "apart"
    asked = {"x": {"seed": 0}, "x.zarr": {"seed": 1, "context": 20}}
    alone = {name: harvest(config(home, apart / name, rows=rows)) for name, rows in asked.items()}
    assert len({store.header.id for store in alone.values()}) == 2
    context = multiprocessing.get_context("forkserver")
    barrier = context.Barrier(2, timeout=120)
    processes = [
        context.Process(target=run_beside, args=(config(home, together / name, rows=rows), barrier))
        for name, rows in asked.items()
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for name, store in alone.items():
        assert tree(together / name) == tree(store.path)
        assert nothing_left(together / name)
    assert sorted(path.name for path in together.iterdir()) == ["x", "x.log", "x.zarr", "x.zarr.log"]


def run_beside(asked: HarvestConfig, barrier: Barrier) -> None:
    """Harvest, and write the plan and the first units when the other is about to do the same."""
    create, put, puts = Store.create, Store.put, iter(range(99))

    def create_beside(*given: Any) -> Store:
        barrier.wait()
        return create(*given)

    def put_beside(self: Store, *given: Any) -> dict[str, Any]:
        if next(puts) < 3:
            barrier.wait()
        return put(self, *given)

    Store.create, Store.put = create_beside, put_beside  # type: ignore[method-assign,assignment]
    run(asked)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a disk here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)  # maps of its files may be open


def after_unit(monkeypatch: pytest.MonkeyPatch, number: int, then: Callable[[], Any]) -> None:
    """Do something when so many units are on the disk."""
    genuine, puts = Store.put, []

    def put(self: Store, *given: Any) -> dict[str, Any]:
        receipt = genuine(self, *given)
        puts.append(receipt)
        if len(puts) == number:
            then()
        return receipt

    monkeypatch.setattr(Store, "put", put)


def test_a_disk_that_fills_up_is_a_clean_stop_and_the_harvest_goes_on_when_there_is_room(
    home: Path, pair: Store, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, filler = small_disk / "x.zarr", small_disk / "filler"
    after_unit(monkeypatch, 2, lambda: filler.write_bytes(bytes(files.free_bytes(small_disk) - 8192)))
    with pytest.raises(SystemExit) as ended, one_line():
        harvest(config(home, path))
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: No space left on device: {path}")
    monkeypatch.undo()
    filler.unlink()
    assert 0 < len(Store.at(path).missing()) < 8
    assert nothing_left(path)
    assert tree(harvest(config(home, path)).path) == tree(pair.path)


@pytest.mark.parametrize("call", [1, 2, 5, 20, 60, 120])
def test_a_write_that_fails_anywhere_stops_cleanly_and_resumes(
    home: Path, pair: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        harvest(config(home, tmp_path / "x.zarr"))
    monkeypatch.undo()
    assert nothing_left(tmp_path / "x.zarr")
    assert tree(harvest(config(home, tmp_path / "x.zarr")).path) == tree(pair.path)

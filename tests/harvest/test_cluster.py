"""Workers of a dask cluster make the same bytes as one process, whatever becomes of them."""

import os
import random
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from distributed import LocalCluster, default_client
from safetensors.torch import load_file, save_file

from harvest import cluster, destination, lock, work
from harvest.bench import Bench
from harvest.cluster import Cluster
from harvest.config import HarvestConfig
from harvest.job import prepare
from harvest.work import Crew, Receipt, Tick
from harvest.worker import Scale
from shared.errors import ActivationError, ClusterError
from shared.layout import Unit
from shared.log import Log
from shared.store import Store
from tests.harvest.pair import config, harvest, tree

LOG = Log(quiet=True)
SMALL = {"shard_bytes": 2560}  # many units


def bench(asked: HarvestConfig) -> Bench:
    return Bench(prepare(asked, LOG).checkpoints, "cpu", 1)


def nothing_left(path: Path) -> bool:
    return not list(path.parent.rglob("*.partial")) and not lock.folder_of(path).exists()


class Killing(Crew):
    """A crew one of whose workers is killed when so many units are there."""

    def __init__(self, crew: Cluster, at: int, chance: random.Random) -> None:
        self.crew, self.at, self.chance, self.killed = crew, at, chance, 0

    @property
    def ahead(self) -> int:
        return self.crew.ahead

    def scale(self, store: Store) -> Scale:
        return self.crew.scale(store)

    def make(self, store: Store, units: Sequence[Unit], tick: Tick) -> Iterator[Receipt]:
        for number, receipt in enumerate(self.crew.make(store, units, tick)):
            if number == self.at:
                processes = self.crew._client.run(os.getpid)
                os.kill(self.chance.choice(sorted(processes.values())), signal.SIGKILL)
                self.killed += 1
            yield receipt


@pytest.fixture(scope="module")
def expected(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("expected") / "x.zarr"
    return tree(harvest(config(home, path, store=SMALL)).path)


def test_two_workers_make_the_bytes_of_one_process_and_a_killed_one_costs_nothing_but_its_unit(
    home: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    said = Log(tmp_path / "said", quiet=True)
    asked = config(home, tmp_path / "whole.zarr", store=SMALL)
    with cluster.local(2, bench(asked), said) as crew:
        assert tree(work.run(prepare(asked, LOG), crew, LOG).path) == expected
        asked = config(home, tmp_path / "x.zarr", store=SMALL)
        killing = Killing(crew, 5, random.Random(0))
        assert tree(work.run(prepare(asked, LOG), killing, LOG).path) == expected
        assert killing.killed == 1
    assert nothing_left(tmp_path / "x.zarr")
    assert "2 workers with 1 torch threads each: http://" in (tmp_path / "said").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_killed_workers_at_random_moments(home: Path, tmp_path: Path, expected: dict[str, bytes], workers: int) -> None:
    chance = random.Random(workers)
    for number in range(5):
        asked = config(home, tmp_path / f"{number}.zarr", store=SMALL)
        with cluster.local(workers, bench(asked), LOG) as crew:
            killing = Killing(crew, chance.randrange(1, 25), chance)
            assert tree(work.run(prepare(asked, LOG), killing, LOG).path) == expected
            assert killing.killed == 1
        assert nothing_left(tmp_path / f"{number}.zarr")


@pytest.mark.slow
def test_a_worker_that_raises_ends_the_harvest_with_its_own_error_and_keeps_what_is_there(
    home: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """A model whose embeddings are lost while the units are made, and found again."""
    moved = shutil.copytree(home, tmp_path / "moved", ignore=shutil.ignore_patterns("*.zarr*"))
    asked = config(moved, tmp_path / "x.zarr", store=SMALL)
    job, file = prepare(asked, LOG), moved / "llama" / "model.safetensors"
    scale = harvest(config(home, tmp_path / "whole.zarr", store=SMALL)).header.scale
    assert scale is not None
    work.open_store(job, LOG, 1, destination.Folder(job.path)).freeze(scale)
    whole, torn = file.read_bytes(), load_file(file)
    torn["model.embed_tokens.weight"][:] = float("nan")
    save_file(torn, file, {"format": "pt"})
    with (
        cluster.local(2, bench(asked), LOG) as crew,
        pytest.raises(ActivationError, match="is not finite: document 'doc") as caught,
    ):
        work.run(job, crew, LOG)
    assert "\n" not in str(caught.value)
    assert nothing_left(tmp_path / "x.zarr") and not Store.at(tmp_path / "x.zarr").sealed
    file.write_bytes(whole)
    made = tree(harvest(asked).path)
    assert {name: data for name, data in made.items() if "/c/" in name} == {
        name: data for name, data in expected.items() if "/c/" in name
    }


def test_a_scheduler_that_runs_already_is_used(home: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    asked = config(home, tmp_path / "x.zarr", store=SMALL)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, memory_limit=0, local_directory=str(tmp_path)) as running,
        cluster.remote(running.scheduler_address, bench(asked), LOG) as crew,
    ):
        assert tree(work.run(prepare(asked, LOG), crew, LOG).path) == expected


def test_a_scheduler_that_does_not_answer_is_one_line(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "TIMEOUT_S", 1)
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        with (
            pytest.raises(ClusterError, match=f"no scheduler answers: {address}. Start one: dask scheduler") as caught,
            cluster.remote(address, Bench({}, "cpu", 1), LOG),
        ):
            pass
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match="No clients found"):  # else the next compute() would wait for it for ever
            default_client()


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_make_the_same_store_and_the_last_one_seals_it(
    home: Path, tmp_path: Path, expected: dict[str, bytes], order: tuple[int, ...]
) -> None:
    asked = config(home, tmp_path / "x.zarr", store=SMALL)
    sealed = [harvest(asked, work.Part(number, 3)).sealed for number in order]
    assert sealed == [False, False, True]
    assert tree(tmp_path / "x.zarr") == expected
    assert harvest(asked, work.Part(1, 3)).sealed


def test_every_unit_belongs_to_one_part(pair: Store) -> None:
    for of in (1, 3, 8, 20):
        shares = [work.Part(number, of).units(pair) for number in range(1, of + 1)]
        assert sorted(unit for share in shares for unit in share) == sorted(pair.units)

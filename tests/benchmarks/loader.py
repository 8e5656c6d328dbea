"""Rows per second of the loader, shuffled and filtered, from a warm page cache, against what people do otherwise.

python -m tests.benchmarks.loader [megabytes] [width] [sources] [threads]    ratios, of pairs of runs that take turns
pytest tests/benchmarks/loader.py                                            a table of times, at all widths

memory    the same rows of arrays in memory: index_select in as many threads, and the same cast to float32
copy      a copy of as many bytes within memory
rowwise   a torch DataLoader of two worker processes over a memory-mapped dataset, a row a call, shuffled

Each way does all of its work while it is timed: slots that the loader had filled before are filled again at the end.
"""

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.utils.data import DataLoader, Dataset, RandomSampler

from shared.store import Store
from tests.benchmarks.pairs import Times, interleaved, report
from tests.build import make_store
from train.filter import kept_rows
from train.loader import Loader
from train.order import Order
from train.prepare import order_of

BATCH, BATCHES, ROWWISE = 4096, 384, 12  # the last: batches of `rowwise`
LIMITS = {"memory": 0.9, "copy": 0.0, "rowwise": 20.0}
MEGABYTES, WIDTHS, THREADS = 400, (512, 1024, 2304), 2  # of the table
TABLE_BATCHES, ROUNDS = 96, {"loader": 9, "memory": 9, "copy": 9, "rowwise": 3}


class Ways:
    """Ways to serve batches; each is called with how many."""

    def __init__(self, store: Store, order: Order, threads: int) -> None:
        self.order, self.store, self.threads = order, store, threads
        self.widths = {name: source.width for name, source in store.header.sources.items()}
        self.batch_bytes = 2 * BATCH * sum(self.widths.values())
        self._arrays = {name: torch.from_numpy(store.column(f"activations/{name}")) for name in self.widths}
        self._rows = [torch.from_numpy(order.step(step, BATCH)) for step in range(BATCHES)]
        endless = range(10**6)  # the rest are never served
        cpu = torch.device("cpu")
        self._loader = Loader(store, list(self.widths), order, BATCH, endless, cpu, threads, reuse=True)
        self._batches = iter(self._loader)

    def title(self) -> str:
        widths = " + ".join(map(str, self.widths.values()))
        return f"{self.store.rows:,} rows of {widths}, {self.order.kept:,} kept; {self.threads} threads, float32"

    def loader(self, batches: int) -> None:
        for _ in itertools.islice(self._batches, batches):
            pass
        wait([one for one, _ in self._loader._flying])  # as full as at the beginning

    def memory(self, batches: int) -> None:
        free = [
            {n: (torch.empty(BATCH, w, dtype=torch.float16), torch.empty(BATCH, w)) for n, w in self.widths.items()}
            for _ in range(self.threads)
        ]

        def one(number: int) -> None:
            buffers = free.pop()
            for name, (stored_BD, x_BD) in buffers.items():
                x_BD.copy_(torch.index_select(self._arrays[name], 0, self._rows[number], out=stored_BD))
            free.append(buffers)

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(one, range(batches)))

    def copy(self, batches: int) -> None:
        starts = torch.randint(0, self.store.rows - BATCH, (batches,)).tolist()
        out = {name: torch.empty(BATCH, width, dtype=torch.float16) for name, width in self.widths.items()}

        def one(start: int) -> None:
            for name, out_BD in out.items():
                out_BD.copy_(self._arrays[name][start : start + BATCH])

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(one, starts))

    def rowwise(self, batches: int) -> None:
        data = PerRow(self.store, self.order, list(self.widths))
        sampler = RandomSampler(data, num_samples=batches * BATCH)
        for _ in DataLoader(data, BATCH, sampler=sampler, num_workers=2):
            pass


class PerRow(Dataset[dict[str, torch.Tensor]]):
    """Today's practice: the kept rows of memory-mapped files, one at a time."""

    def __init__(self, store: Store, order: Order, names: list[str]) -> None:
        self.rows = np.flatnonzero(order.kept_N)
        self.shard_rows = store.shard_rows
        self.maps = {name: [store.map(f"activations/{name}", s) for s in range(store.shards)] for name in names}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        shard, local = divmod(int(self.rows[index]), self.shard_rows)
        return {name: torch.from_numpy(maps[shard][local].astype(np.float32)) for name, maps in self.maps.items()}


@contextmanager
def made(folder: str | Path, megabytes: int, width: int, sources: int, threads: int) -> Iterator[Ways]:
    rows = megabytes * 10**6 // (2 * width * sources)
    store = made_store(Path(folder) / "x.zarr", rows, {f"s{n}": width for n in range(sources)})
    ways = Ways(store, order_of(store, kept_rows(store), BATCH, 0), threads)
    with ways._loader:
        yield ways


def made_store(path: Path, rows: int, widths: dict[str, int]) -> Store:
    shard_rows = max(1024, min(rows, 2**28 // (2 * max(widths.values()))) // 1024 * 1024)
    return make_store(path, rows, shard_rows, 1024, widths, documents=max(3, rows // 400), masked=0.0, clipped=0.0)


# --- ratios ---------------------------------------------------------------------------------------------------------


def main() -> None:
    given = [*sys.argv[1:], *["1024", "1024", "2", "2"][len(sys.argv) - 1 :]]
    megabytes, width, sources, threads = (int(one) for one in given)
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(dir=".") as folder,
        made(folder, megabytes, width, sources, threads) as ways,
    ):
        for name, limit in LIMITS.items():
            compare(ways, name, limit)


def compare(ways: Ways, name: str, limit: float) -> None:
    batches = ROWWISE if name == "rowwise" else BATCHES
    other: Callable[[int], None] = getattr(ways, name)
    ours, theirs = interleaved(lambda: ways.loader(BATCHES), lambda: other(batches), ("loader", name))
    seconds, busy = ([one * BATCHES / batches for one in some] for some in (theirs.seconds, theirs.busy))
    theirs = Times(name, seconds, busy)
    report(ways.title(), ours, theirs, BATCHES * ways.batch_bytes / 1e9, "GB", limit)


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(itertools.product(WIDTHS, (1, 2))), ids=lambda one: f"{one[0]}x{one[1]}")
def ways(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    width, sources = request.param
    with made(tmp_path_factory.mktemp("loader"), MEGABYTES, width, sources, THREADS) as found:
        yield found


@pytest.mark.parametrize("way", list(ROUNDS))
def test_way(benchmark: BenchmarkFixture, ways: Ways, way: str) -> None:
    benchmark.group = ways.title()
    benchmark.pedantic(getattr(ways, way), (TABLE_BATCHES,), rounds=ROUNDS[way], warmup_rounds=1)
    if benchmark.enabled:
        benchmark.extra_info["GB/s"] = TABLE_BATCHES * ways.batch_bytes / benchmark.stats.stats.median / 1e9


if __name__ == "__main__":
    main()

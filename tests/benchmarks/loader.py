"""Rows per second of the loader, shuffled and filtered, from a warm page cache, against what people do otherwise.

python -m tests.benchmarks.loader [megabytes] [width] [sources] [threads]

memory    the same rows of arrays in memory: index_select in as many threads, and the same cast to float32
copy      a copy of as many bytes within memory
torch     a DataLoader of two worker processes over a memory-mapped dataset, a row a call, shuffled

Each way does all of its work while it is timed: slots that the loader had filled before are filled again at the end.
"""

import itertools
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from shared.store import Store
from tests.benchmarks.pairs import interleaved, report
from tests.build import make_store
from train.filter import kept_rows
from train.loader import Loader
from train.order import Order
from train.prepare import order_of

BATCH, BATCHES, ROWWISE = 4096, 384, 12  # the last: batches of what takes a row a call
LIMITS = {"memory": 0.9, "torch": 20.0}


def main() -> None:
    given = [*sys.argv[1:], *["1024", "1024", "2", "2"][len(sys.argv) - 1 :]]
    megabytes, width, sources, threads = (int(one) for one in given)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        rows = megabytes * 10**6 // (2 * width * sources)
        store = made(Path(folder) / "x.zarr", rows, {f"s{n}": width for n in range(sources)})
        order = order_of(store, kept_rows(store), BATCH, 0)
        compare(store, order, threads)


def compare(store: Store, order: Order, threads: int) -> None:
    widths = {name: source.width for name, source in store.header.sources.items()}
    names = list(widths)
    arrays = {name: torch.from_numpy(store.column(f"activations/{name}")) for name in names}
    row_bytes = 2 * sum(widths.values())
    size = BATCH * BATCHES * row_bytes / 1e9
    title = f"{store.rows:,} rows of {' + '.join(map(str, widths.values()))}, {order.kept:,} kept"
    rows = [torch.from_numpy(order.step(step, BATCH)) for step in range(BATCHES)]
    steps = range(10**6)  # the rest are never served
    endless = Loader(store, names, order, BATCH, steps, torch.device("cpu"), threads, reuse=True)
    batches = iter(endless)

    def loaded() -> None:
        for _ in itertools.islice(batches, BATCHES):
            pass
        wait([one for one, _ in endless._flying])  # as full as at the beginning

    def in_memory() -> None:
        free = [
            {n: (torch.empty(BATCH, w, dtype=torch.float16), torch.empty(BATCH, w)) for n, w in widths.items()}
            for _ in range(threads)
        ]

        def one(number: int) -> None:
            buffers = free.pop()
            for name, (stored_BD, x_BD) in buffers.items():
                x_BD.copy_(torch.index_select(arrays[name], 0, rows[number], out=stored_BD))
            free.append(buffers)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, range(BATCHES)))

    def copied() -> None:
        starts = torch.randint(0, store.rows - BATCH, (BATCHES,)).tolist()
        out = {name: torch.empty(BATCH, width, dtype=torch.float16) for name, width in widths.items()}

        def one(start: int) -> None:
            for name, out_BD in out.items():
                out_BD.copy_(arrays[name][start : start + BATCH])

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, starts))

    with endless:
        ours, theirs = interleaved(loaded, in_memory, ("loader", "in memory"))
        report(f"{title}; {threads} threads, float32", ours, theirs, size, "GB", LIMITS["memory"])
        report("", *interleaved(loaded, copied, ("loader", "copy")), size, "GB", 0.0)
        ours, theirs = interleaved(loaded, rowwise(store, order, names), ("loader", "torch, a row a call"))
        scaled = [seconds * BATCHES / ROWWISE for seconds in theirs.seconds]
        report("", ours, type(theirs)(theirs.name, scaled, scaled), size, "GB", LIMITS["torch"])


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


def rowwise(store: Store, order: Order, names: list[str]) -> Callable[[], None]:
    data = PerRow(store, order, names)
    loader = DataLoader(data, BATCH, sampler=RandomSampler(data, num_samples=ROWWISE * BATCH), num_workers=2)

    def serve() -> None:
        for _ in loader:
            pass

    return serve


def made(path: Path, rows: int, widths: dict[str, int]) -> Store:
    shard_rows = max(1024, min(rows, 2**28 // (2 * max(widths.values()))) // 1024 * 1024)
    return make_store(path, rows, shard_rows, 1024, widths, documents=max(3, rows // 400), masked=0.0, clipped=0.0)


if __name__ == "__main__":
    main()

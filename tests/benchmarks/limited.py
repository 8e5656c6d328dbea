"""The loader on a store that is larger than the memory: its rate, and what it takes, over two epochs from the disk.

python -m tests.benchmarks.limited [megabytes] [width] [limit in megabytes]

Needs the right to make a memory control group (version 1 or 2): the process is put into one of the given limit, so that
pages of files count as well. Batches are small, since a window of the default size then is a part of the store.
Compared with a DataLoader of two worker processes that reads a row a call from the same files.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from shared.reading import Access
from shared.store import Store
from tests import memory
from tests.benchmarks.pairs import machine
from tests.build import make_store
from train.loader import Loader
from train.order import Order, default_window_blocks

BATCH, ROWWISE, BLOCK_BYTES = 512, 12, 2**18


def main() -> None:
    given = [*sys.argv[1:], *["4000", "1024", "1800"][len(sys.argv) - 1 :]]
    megabytes, width, limit = (int(one) for one in given)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as folder, limited(limit * 10**6):
        store = made(Path(folder) / "x.zarr", megabytes * 10**6 // (4 * width), width)
        order = Order(np.ones(store.rows, bool), BLOCK_BYTES // (2 * width), default_window_blocks(BATCH), seed=0)
        measure(store, order, limit)


def measure(store: Store, order: Order, limit: int) -> None:
    names, size = list(store.header.sources), sum(one.width for one in store.header.sources.values()) * 2
    steps = range(2 * store.rows // BATCH)
    began, most, own = time.perf_counter(), 0, 0
    dropping = store.through(Access(drops=True))  # as a run reads a store that does not fit
    with Loader(dropping, names, order, BATCH, steps, torch.device("cpu"), 2, reuse=True) as loader:
        for number, _ in enumerate(loader):
            if number % 20 == 0:
                most = max(most, memory.mapped("x.zarr/activations") // 1000)
                own = max(own, _own())
    seconds = time.perf_counter() - began
    window = order.window_rows * size / 1e6
    print(f"{store.rows * size / 1e9:.2f} GB read twice in {seconds:.1f} s, limit {limit} MB\n{machine()}\n")
    print(f"loader                  {len(steps) * BATCH * size / seconds / 1e9:>10.4g} GB/s")
    print(f"mapped at most          {most:>10,} MB   two windows are {2 * window:,.0f} MB")
    print(f"memory of its own       {own:>10,} MB   at most")
    data = PerRow(store)
    sampler = RandomSampler(data, num_samples=ROWWISE * BATCH)
    began = time.perf_counter()
    for _ in DataLoader(data, BATCH, sampler=sampler, num_workers=2):
        pass
    theirs = ROWWISE * BATCH * size / (time.perf_counter() - began) / 1e9
    print(f"torch, a row a call     {theirs:>10.4g} GB/s")


class PerRow(Dataset[dict[str, torch.Tensor]]):
    """Today's practice: rows of memory-mapped files, one at a time."""

    def __init__(self, store: Store) -> None:
        self.rows, self.shard_rows = store.rows, store.shard_rows
        self.maps = {
            name: [
                np.memmap(file, np.float16, "r", shape=(store.shard_rows, one.width))
                for file in (store.path / f"activations/{name}/c/{shard}/0" for shard in range(store.shards))
            ]
            for name, one in store.header.sources.items()
        }

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        shard, local = divmod(index, self.shard_rows)
        return {name: torch.from_numpy(maps[shard][local].astype(np.float32)) for name, maps in self.maps.items()}


def _own() -> int:
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) // 1000


def made(path: Path, rows: int, width: int) -> Store:
    """Two sources of this width, written shard by shard: more than memory holds."""
    small = make_store(path, rows=2, sources={"a": width, "b": width}, documents=1)
    shard_rows = 2**27 // (2 * width) // 1024 * 1024
    shards = max(1, rows // shard_rows)
    plan = {**small.header.plan, "rows": shards * shard_rows, "shard_rows": shard_rows, "chunk_rows": 1024}
    store = Store(path, replace(small.header, plan={**plan, "shards": shards}))
    rng = np.random.default_rng(0)
    for source in ("a", "b"):
        for shard in range(shards):
            file = path / f"activations/{source}/c/{shard}/0"
            file.parent.mkdir(exist_ok=True)
            rng.integers(0, 2**14, (shard_rows, width), dtype=np.uint16).tofile(file)
    return store


@contextmanager
def limited(size: int) -> Iterator[None]:
    """This process in a memory control group of `size` bytes."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory").is_dir()
    group = (root / "memory" if old else root) / f"granary-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(size))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        for _ in range(100):  # workers that ended are still counted for a moment
            with suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


if __name__ == "__main__":
    main()

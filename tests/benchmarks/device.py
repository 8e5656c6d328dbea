"""Batches on a device: their rate against a copy from pinned memory, and how long a large crosscoder waits for them.

python -m tests.benchmarks.device [megabytes] [width] [latents] [steps] [device]

copy      as many bytes from pinned memory to the device, a batch at a time
gather    the same rows of arrays in memory, by index_select in as many threads, without a device

The limit is that of whichever of the two is slower. Without a GPU the same runs on the CPU, where no promise is made.
"""

import itertools
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch

from shared import config as configs
from shared.device import device_of
from shared.store import Store
from tests.benchmarks.loader import made_store
from tests.benchmarks.pairs import interleaved, machine, report
from train import prepare
from train.config import TrainConfig
from train.filter import kept_rows
from train.loader import Loader
from train.order import Order
from train.scale import Scale

BATCH, BATCHES, THREADS, WARM = 4096, 96, 2, 3  # the last: steps that are not timed
RATE, STALL = 0.8, 0.02


def main() -> None:
    given = [*sys.argv[1:], *["2000", "1024", "131072", "50", "auto"][len(sys.argv) - 1 :]]
    megabytes, width, latents, steps = (int(one) for one in given[:4])
    device = device_of(given[4])
    with tempfile.TemporaryDirectory(dir=".") as folder:
        store = made_store(Path(folder) / "x.zarr", megabytes * 10**6 // (4 * width), {"a": width, "b": width})
        rates(store, prepare.order_of(store, kept_rows(store), BATCH, 0), device)
        stall(store, latents, steps, device)


def finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(store: Store, order: Order, device: torch.device) -> None:
    widths = {name: source.width for name, source in store.header.sources.items()}
    arrays = {name: torch.from_numpy(store.column(f"activations/{name}")) for name in widths}
    rows = [torch.from_numpy(order.step(step, BATCH)) for step in range(BATCHES)]
    slots = [
        {n: torch.empty(BATCH, w, dtype=torch.float16, pin_memory=device.type == "cuda") for n, w in widths.items()}
        for _ in range(THREADS)
    ]
    there = {name: torch.empty(BATCH, width, dtype=torch.float16, device=device) for name, width in widths.items()}
    loader = Loader(store, list(widths), order, BATCH, range(10**6), device, THREADS, reuse=True)
    batches = iter(loader)

    def loaded() -> None:
        for _ in itertools.islice(batches, BATCHES):
            pass
        wait([one for one, _ in loader._flying])  # as full as at the beginning
        finished(device)

    def copied() -> None:
        for _ in range(BATCHES):
            for name, there_BD in there.items():
                there_BD.copy_(slots[0][name], non_blocking=True)
        finished(device)

    def gathered() -> None:
        free = list(slots)

        def one(number: int) -> None:
            slot = free.pop()
            for name, stored_BD in slot.items():
                torch.index_select(arrays[name], 0, rows[number], out=stored_BD)
            free.append(slot)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(one, range(BATCHES)))

    size = BATCHES * BATCH * 2 * sum(widths.values()) / 1e9
    title = f"{store.rows:,} rows of {' + '.join(map(str, widths.values()))} to {device}, {THREADS} threads"
    with loader:
        report(title, *interleaved(loaded, copied, ("loader", "copy")), size, "GB", RATE)
        report("", *interleaved(loaded, gathered, ("loader", "gather")), size, "GB", RATE)


def stall(store: Store, latents: int, steps: int, device: torch.device) -> None:
    asked = {
        "wiring": {"kind": "crosscoder", "latents": latents}, "method": {"name": "batch_topk", "k": 32},
        "steps": WARM + steps, "batch": BATCH, "device": str(device), "log": {"checkpoint": WARM + steps},
    }  # fmt: skip
    [ready] = prepare.ready(store, [configs.parse(TrainConfig, asked)])
    trainer = prepare.initialised(ready, Scale(ready.wiring.widths))
    began = waited = 0.0
    with Loader(store, ready.sources, ready.order, BATCH, range(WARM + steps), device, reuse=True) as loader:
        for number, rows in enumerate(loader):
            if number == WARM:
                finished(device)
                began, waited = time.perf_counter(), loader.waited_s
            trainer.update(rows.x)
        finished(device)
        share = (loader.waited_s - waited) / (time.perf_counter() - began)
    print(f"\ncrosscoder of {latents:,} latents, {steps} steps of {BATCH:,} rows on {device}\n{machine()}\n")
    print(f"stall                   {share:>10.2%}\nlimit {STALL:.0%}: {'holds' if share < STALL else 'MISSED'}")


if __name__ == "__main__":
    main()

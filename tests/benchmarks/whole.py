"""What is left of the rate of bare steps in a whole training run, on a store that is in the page cache.

python -m tests.benchmarks.whole [method] [latents] [batch] [steps]

run     rows per second of `train run` between its events `start` and the last `step`: files opened and read, batches
        shuffled, filtered and cast, figures logged, a checkpoint written
step    those of Trainer.update alone, from the same weights on the same batches, which are in memory
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from shared import config as configs
from shared.store import Store
from tests.benchmarks.loader import made_store
from tests.benchmarks.pairs import PAIRS, machine
from train import fit, prepare
from train.config import TrainConfig
from train.loader import Loader

LIMIT = 0.9
WIDTHS = {"a": 576, "b": 576}


def run_rate(store: Store, config: TrainConfig, folder: Path) -> float:
    made = fit(store, config, folder, quiet=True)
    events = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    [start] = [one["time"] for one in events if one["event"] == "start"]
    last = max(one["time"] for one in events if one["event"] == "step")
    return config.steps * config.batch / float(last - start)


def step_rate(store: Store, config: TrainConfig) -> float:
    [ready] = prepare.ready(store, [config])
    trainer = prepare.fresh(store, ready, {})
    steps = range(config.steps)
    with Loader(store, list(WIDTHS), ready.order, config.batch, steps, torch.device("cpu")) as loader:
        batches = [rows.x for rows in loader]
    begun = time.perf_counter()
    for x in batches:
        trainer.update(x)
    return config.steps * config.batch / (time.perf_counter() - begun)


def main() -> None:
    given = [*sys.argv[1:], *["batch_topk", "8192", "2048", "60"][len(sys.argv) - 1 :]]
    method, (latents, batch, steps) = given[0], (int(one) for one in given[1:])
    tables: dict[str, Any] = {
        "wiring": {"latents": latents}, "method": {"name": method}, "steps": steps, "batch": batch, "device": "cpu",
        "log": {"measure_rows": 1024},
    }  # fmt: skip
    config = configs.parse(TrainConfig, tables)
    ratios = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        store = made_store(Path(folder) / "x.zarr", max(50_000, 4 * batch), WIDTHS)
        for number in range(PAIRS + 1):
            run, step = run_rate(store, config, Path(folder) / f"run{number}"), step_rate(store, config)
            if number:
                ratios.append(run / step)
                print(f"run {run:>9,.0f} rows/s   step {step:>9,.0f} rows/s   ratio {ratios[-1]:.3f}", flush=True)
    print(f"{machine()}; {method}, {latents:,} latents, batch {batch:,}, {steps} steps, {len(ratios)} pairs")
    median = statistics.median(ratios)
    print(f"ratio {median:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"limit {LIMIT}: {'holds' if median >= LIMIT else 'MISSED'}")


if __name__ == "__main__":
    main()

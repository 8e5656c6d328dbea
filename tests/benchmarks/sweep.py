"""What eight runs at once cost against the sum of what their steps cost alone, on rows that are in memory already.

python -m tests.benchmarks.sweep [latents] [batch] [steps]
"""

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from shared.log import Log
from tests.benchmarks.loader import made_store
from tests.benchmarks.pairs import interleaved, report
from train import prepare
from train.loader import Loader
from train.run import Training
from train.scale import Scale
from train.sweep import expand

LIMIT = round(1 / 1.1, 3)  # of the rates
RUNS: list[dict[str, Any]] = [
    {"method.name": name, "wiring.kind": kind, "wiring.sources": sources}
    for name in ("topk", "batch_topk")
    for kind, sources in (
        ("dedicated", ["a", "b"]), ("crosscoder", ["a", "b"]), ("autoencoder", ["a"]), ("transcoder", ["a", "b"]),
    )
]  # fmt: skip


def main() -> None:
    given = [*sys.argv[1:], *["2048", "1024", "6"][len(sys.argv) - 1 :]]
    latents, batch, steps = (int(one) for one in given)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        store = made_store(Path(folder) / "x.zarr", max(40_000, 4 * batch), {"a": 576, "b": 640})
        asked = {"wiring": {"latents": latents}, "method": {"name": "topk"}, "steps": 10**6, "batch": batch,
                 "device": "cpu", "threads": 1, "log": {"checkpoint": 10**6}, "sweep": {"runs": RUNS}}  # fmt: skip
        ready = prepare.ready(store, [one.config for one in expand(asked)])
        trainers = [prepare.initialised(one, Scale(one.wiring.widths)) for one in ready]
        trainings = [
            Training(Path(folder), one.config, trainer, store, one.order, Log())
            for one, trainer in zip(ready, trainers, strict=True)
        ]
        begun = itertools.count(0, steps)

        def at_once() -> None:
            first = next(begun)
            with Loader(store, ["a", "b"], ready[0].order, batch, range(first, first + steps), torch.device("cpu"),
                        reuse=True) as loader:  # fmt: skip
                for rows in loader:
                    for one, training in zip(ready, trainings, strict=True):
                        training.update({name: rows.x[name] for name in one.sources})

        x = {name: torch.randn(batch, width) for name, width in {"a": 576, "b": 640}.items()}

        def alone() -> None:
            for one, training in zip(ready, trainings, strict=True):
                own = {name: x[name] for name in one.sources}
                for _ in range(steps):
                    training.trainer.update(own)

        both = interleaved(at_once, alone, ("at once", "alone"))
        report(f"{len(ready)} runs of {latents:,} latents, batch {batch:,}", *both, steps * len(ready), "steps", LIMIT)


if __name__ == "__main__":
    main()

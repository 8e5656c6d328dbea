"""Two tiny models of different tokenizers and widths, and their harvest."""

from pathlib import Path
from typing import Any

import numpy as np

from harvest import work
from harvest.bench import Bench
from harvest.config import HarvestConfig
from harvest.job import prepare
from shared import layout
from shared.flags import FIRST, HELD_OUT, SINK, SPECIAL
from shared.log import Log
from shared.store import Store

Tree = dict[str, bytes]


def config(home: Path, path: Path, **tables: Any) -> HarvestConfig:
    """Two sites of the one model and one of the other; four shards, segments across their borders."""
    data: dict[str, Any] = {
        "models": {
            "llama": {"path": str(home / "llama"), "sites": {"early": "resid.0", "inner": "mlp_out.1"}},
            "gemma": {"path": str(home / "gemma"), "sites": ["resid.1"]},
        },
        "corpus": {"path": str(home / "corpus.jsonl"), "id": "id"},
        "rows": {"context": 24, "held_out": 0.3, "count": 300},
        "batch": {"tokens": 100},
        "store": {"path": str(path), "shard_bytes": 10_240, "chunk_bytes": 512},
        "device": "cpu",
        "threads": 1,
    }
    for name, table in tables.items():
        data[name] = {**data.get(name, {}), **table} if isinstance(table, dict) and name != "models" else table
    return HarvestConfig.model_validate(data)


def one(home: Path, path: Path, sites: list[str], **tables: Any) -> HarvestConfig:
    """One model on its own; `models` may add to it."""
    model = {"path": str(home / "llama"), "sites": sites, **tables.pop("model", {})}
    return config(home, path, models={"llama": model}, **tables)


def harvest(settings: HarvestConfig, part: work.Part | None = None, log: Log | None = None) -> Store:
    log = log or Log(quiet=True)
    job = prepare(settings, log)
    return work.run(job, work.OneProcess(Bench(job.checkpoints, settings.device, settings.threads), log), log, part)


def tree(path: Path) -> Tree:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def stored(store: Store, source: str) -> np.ndarray:
    """All rows in the model's own units, fp64."""
    shards = [store.map(f"activations/{source}", shard) for shard in range(store.shards)]
    return layout.floats(np.concatenate(shards)).double().numpy() * store.factor(source)


def classes(store: Store, source: str) -> list[str]:
    """The class of every row, as STORE.md words it."""
    flags_N = np.bitwise_or.reduce([store.column(f"rows/{model}/flags") for model in store.header.models])
    sink_N = store.column(f"faults/{source}") & SINK
    split_n = store.column("documents/split")
    held_N = split_n[store.column("rows/document")] == HELD_OUT
    return [
        ("special" if flag & SPECIAL else "first" if flag & FIRST else "sink" if sink else "ordinary")
        + ("/held_out" if held else "/train")
        for flag, sink, held in zip(flags_N, sink_N, held_N, strict=True)
    ]

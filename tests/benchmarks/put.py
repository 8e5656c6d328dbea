"""Store.put of one unit against a plain write and fsync of the same bytes into one file on the same disk.

python -m tests.benchmarks.put [megabytes] [pairs] [folder]
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from shared.header import Header
from shared.layout import raw
from shared.moments import CLASSES, Moments
from shared.source import Model, Source
from shared.store import Part, Store
from tests.benchmarks.pairs import interleaved, report

WIDTH, CHUNK_BYTES = 2304, 2**21  # of Gemma-2-2b; the default of store.chunk_bytes
LIMIT = 0.8


def main() -> None:
    megabytes, pairs, place, *_ = [*sys.argv[1:], *["512", "15", "."][len(sys.argv) - 1 :]]
    with tempfile.TemporaryDirectory(dir=place) as folder:
        store, part = unit(Path(folder) / "x.zarr", int(megabytes))
        arrays = [part.activations_ND, part.norms_N, part.faults_N, part.moments_XK]
        size = sum(array.nbytes for array in arrays)
        plain = Path(folder) / "plain"

        def put() -> None:
            store.put(0, "m", {"a": part}, {"versions": {}})

        def write() -> None:
            with plain.open("wb") as file:
                for data in map(raw, arrays):
                    for start in range(0, len(data), CHUNK_BYTES):  # a single write of it all is slower, now and then
                        file.write(data[start : start + CHUNK_BYTES])
                file.flush()
                os.fsync(file.fileno())

        def clear() -> None:
            plain.unlink(missing_ok=True)
            for file in (store.path / "activations" / "a" / "c").rglob("*"):
                file.unlink() if file.is_file() else None
            os.sync()

        times = interleaved(put, write, ("Store.put", "write and fsync"), clear, int(pairs))
        report(f"one unit of {size / 1e6:,.0f} MB", *times, size / 1e9, "GB", LIMIT)


def unit(path: Path, megabytes: int) -> tuple[Store, Part]:
    """An empty store of one shard, and what it takes to fill it. Random bytes: no disk can make less of them."""
    chunk = 2 ** ((CHUNK_BYTES // (2 * WIDTH)).bit_length() - 1)
    rows = megabytes * 10**6 // (2 * WIDTH) // chunk * chunk
    plan = {"rows": rows, "shard_rows": rows, "chunk_rows": chunk, "shards": 1, "dtype": "float16"}
    model, source = Model("m", "m", "w", "t", "float32", "eager"), Source("a", "m", "resid.1", WIDTH)
    store = Store.create(path, Header({}, {"m": model}, {"a": source}, plan), {"rows/document": np.zeros(rows, "<i4")})
    rng = np.random.default_rng(0)
    part = Part(
        rng.integers(0, 2**16, (rows, WIDTH), np.uint16).view(np.float16),
        rng.random(rows, np.float32),
        np.zeros(rows, np.uint8),
        np.stack([Moments.empty(WIDTH).pack() for _ in CLASSES]),
    )
    return store.freeze({"a": {"factor": 1.0}}), part


if __name__ == "__main__":
    main()

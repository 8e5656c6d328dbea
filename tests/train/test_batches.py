"""Batches for people's own loops: what training reads, or the store from front to back."""

import gc
import itertools
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.codec import Packing
from shared.errors import ConfigError, StoreError
from shared.store import Store
from tests.build import make_store
from tests.device import every_device
from tests.shared.test_family import extend
from train import batches
from train.filter import RowsConfig, kept_rows
from train.fit import order_of
from train.loader import Loader, Rows

ROWS, FACTOR = 601, {"a": 4.0, "b": 0.5}
MADE: dict[str, Any] = {"rows": ROWS, "factor": FACTOR, "documents": 12, "special": 0.02, "sink": 0.02}
KEEP = {"special": "keep", "positions": ":", "max_norm_multiple": 0, "split": "all"}  # all but rows that are masked


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("batches") / "raw.zarr", **MADE)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path, packing = tmp_path_factory.mktemp("batches") / "packed.zarr", Packing("zstd", 1, {"a": 4, "b": 2})
    return make_store(path, packing=packing, **MADE)


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("granary-")]


def equal(left: Rows, right: Rows) -> bool:
    same = left.x.keys() == right.x.keys() and torch.equal(left.rows_B, right.rows_B)
    return same and all(torch.equal(left.x[name].cpu(), right.x[name].cpu()) for name in left.x)


def require_values(store: Store, rows: Rows) -> None:
    """x is what the store has in the rows that the batch names, in their order."""
    for name, x_BD in rows.x.items():
        stored = store.column(f"activations/{name}")[rows.rows_B.numpy()].astype(np.float32)
        assert np.array_equal(x_BD.cpu().numpy(), stored * np.float32(FACTOR[name])), name


@every_device
@pytest.mark.parametrize("seed", [None, 7])
def test_shuffled_batches_are_those_that_training_reads(store: Store, seed: int | None, device: torch.device) -> None:
    asked = RowsConfig(split="held_out", seed=5)
    order = order_of(store, kept_rows(store, asked), 16, 5 if seed is None else seed)
    with (
        batches(store, ["b", "a"], 16, asked, device=str(device), seed=seed) as found,
        Loader(store, ["b", "a"], order, 16, range(30), device) as expected,
    ):
        for left, right in zip(itertools.islice(found, 30), expected, strict=True):  # behind the end of an epoch
            assert equal(left, right) and left.x["a"].device.type == device.type
            require_values(store, left)


@pytest.mark.parametrize("io", ["map", "pread", "packed"])
@pytest.mark.parametrize("batch", [1, 16, 1000])
def test_in_file_order_each_kept_row_comes_once_and_the_last_batch_is_shorter(
    store: Store, packed: Store, io: str, batch: int
) -> None:
    read, way = (packed, "map") if io == "packed" else (store, io)
    kept = np.flatnonzero(kept_rows(store).kept_N)
    with batches(read, batch=batch, order="file", io=way) as served:  # type: ignore[arg-type]
        assert served.kept == len(kept) and served.dropped == kept_rows(store).dropped
        found = list(served)
    assert torch.cat([one.rows_B for one in found]).tolist() == kept.tolist()
    assert [len(one.rows_B) for one in found[:-1]] == [batch] * (len(found) - 1)
    for one in found:
        require_values(store, one)
        assert list(one.x) == ["a", "b"] and one.x["a"].dtype == torch.float32


def test_steps_are_so_many_batches_at_most(store: Store) -> None:
    for order in ("file", "shuffled"):
        assert [len(list(batches(store, batch=50, order=order, steps=n))) for n in (0, 2)] == [0, 2]  # type: ignore[arg-type]
    assert len(list(batches(store, batch=50, order="file", steps=10**6))) == -(
        -int(kept_rows(store).kept_N.sum()) // 50
    )


def test_a_family_by_its_path_is_read_as_one(tmp_path: Path) -> None:
    first = make_store(tmp_path / "first.zarr", rows=61, documents=2, seed=1)
    more = extend(make_store(tmp_path / "more.zarr", rows=41, documents=2, seed=2), first, "rows")
    with batches(more.path, batch=2, rows=KEEP, order="file") as served:
        rows = torch.cat([one.rows_B for one in served])
        assert len(rows) == served.kept and rows.max() > 90


def test_threads_end_with_the_block_with_close_and_with_the_last_holder(store: Store) -> None:
    with batches(store, batch=16) as served:
        first = next(served)
        assert loader_threads()
    assert not loader_threads() and list(served) == []
    require_values(store, first)
    served = batches(store, batch=16)
    assert not loader_threads()  # it has not begun
    next(served)
    served.close()
    served.close()
    assert not loader_threads()
    for one in batches(store, batch=16):
        assert loader_threads() and len(one.rows_B) == 16
        break
    gc.collect()
    assert not loader_threads()
    assert len(list(batches(store, batch=16, order="file"))) > 1 and not loader_threads()


def test_a_program_that_leaves_batches_behind_ends(store: Store) -> None:
    code = "import sys, train; one = train.batches(sys.argv[1], batch=16); print(len(next(one).rows_B))"
    done = subprocess.run(
        [sys.executable, "-c", code, store.path], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "16\n", "")


@pytest.mark.parametrize(
    ("asked", "error", "told"),
    [
        ({"order": "files"}, ConfigError, "unknown order: files. Did you mean file?"),
        ({"batch": 0}, ConfigError, "batch is too small: 0. Give 1 or more"),
        ({"steps": -1}, ConfigError, "steps is too small: -1. Give 0 or more"),
        ({"batch": 10**4}, ConfigError, "the batch is larger than the rows that are served: 10,000 >"),
        ({"rows": {"documents": ["nothing"]}}, ConfigError, "no document of this name: nothing"),
        ({"rows": {"splits": "all"}}, ConfigError, "split"),
        ({"sources": ["c"]}, StoreError, "this store has no source: c. It has: a, b"),
        ({"sources": []}, ConfigError, "no source is asked for: .*a, b"),
        ({"device": "gpu"}, ConfigError, "this device cannot be used: gpu"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_read(
    store: Store, asked: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        batches(store, **{"batch": 16, **asked})

"""Batches for people's own loops: what training reads, the store from front to back, or neighbours side by side."""

import gc
import itertools
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.codec import Packing
from shared.errors import ConfigError, StoreError
from shared.family import open_family
from shared.store import Store
from shared.view import View
from tests.build import make_store
from tests.device import every_device
from tests.shared.test_family import extend
from train import batches
from train.filter import RowsConfig, kept_rows
from train.loader import Loader, Rows
from train.prepare import order_of

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


@given(st.integers(2, 7), st.integers(1, 6), st.sampled_from(["map", "pread", "packed"]), st.booleans())
@settings(max_examples=8, deadline=None)
def test_every_group_is_of_neighbours_in_one_document_and_comes_once_an_epoch(
    store: Store, packed: Store, length: int, groups: int, io: str, keep: bool
) -> None:
    rows, kept_N = (KEEP, kept_rows(store, RowsConfig(**KEEP)).kept_N) if keep else (None, kept_rows(store).kept_N)
    read, way = (packed, "map") if io == "packed" else (store, io)
    made = batches(read, batch=groups * length, rows=rows, length=length, io=way)  # type: ignore[arg-type]
    document_N, seen = store.column("rows/document"), Counter[int]()
    with made as served:
        assert served.kept + served.dropped["leftover"] == kept_N.sum() and served.kept % length == 0
        epochs = 2 * groups  # whole ones in whole batches
        for one in itertools.islice(served, 2 * served.kept // length):
            group_GT = one.rows_B.reshape(groups, length).numpy()
            assert (np.diff(group_GT, axis=1) == 1).all() and kept_N[group_GT].all()
            assert (document_N[group_GT] == document_N[group_GT[:, :1]]).all()
            assert (np.diff(group_GT[:, 0]) >= 0).all()
            seen.update(group_GT[:, 0].tolist())
            require_values(store, one)
    assert set(seen.values()) == {epochs} and len(seen) == made.kept // length


def test_leftovers_are_those_rows_of_a_run_that_fill_no_group(store: Store) -> None:
    kept_N, document_N = kept_rows(store, RowsConfig(**KEEP)).kept_N, store.column("rows/document")
    runs = [
        len(list(rows))
        for (kept, _), rows in itertools.groupby(zip(kept_N.tolist(), document_N.tolist(), strict=True))
        if kept
    ]
    for length in (2, 3, 5):
        made = batches(store, batch=length, rows=KEEP, length=length)
        assert made.dropped["leftover"] == sum(run % length for run in runs) > 0
        assert made.dropped["masked"] == (~kept_N).sum() > 0


def test_groups_stand_in_file_order_too(store: Store) -> None:
    found = list(batches(store, batch=12, rows=KEEP, order="file", length=3))
    rows = torch.cat([one.rows_B for one in found])
    assert (rows.diff() > 0).all() and len(found[-1].rows_B) % 3 == 0
    assert (rows.view(-1, 3).diff(dim=1) == 1).all()
    assert len(rows) == batches(store, batch=12, rows=KEEP, order="file", length=3).kept


def test_two_segments_of_a_document_share_no_group(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    column = Store.column
    borders = np.array([*range(0, ROWS, 7), ROWS])
    monkeypatch.setattr(Store, "column", lambda self, n: borders if n == "segments/row" else column(self, n))
    with batches(store, batch=4, rows=KEEP, order="file", length=2) as served:
        pairs = torch.cat([one.rows_B for one in served]).view(-1, 2)
    assert (pairs[:, 0] // 7 == pairs[:, 1] // 7).all() and len(pairs) > ROWS // 3


def test_a_family_by_its_path_is_read_as_one_and_its_members_share_no_group(tmp_path: Path) -> None:
    first = make_store(tmp_path / "first.zarr", rows=61, documents=2, seed=1)
    more = extend(make_store(tmp_path / "more.zarr", rows=41, documents=2, seed=2), first, "rows")
    with batches(more.path, batch=2, rows=KEEP, order="file", length=2) as served:
        pairs = torch.cat([one.rows_B for one in served]).view(-1, 2)
        assert pairs.numel() == served.kept
    assert ((pairs < 61).sum(1) != 1).all() and pairs.max() > 90
    borders = np.concatenate([first.column("segments/row")[:-1], more.column("segments/row") + 61])
    assert np.array_equal(open_family(more.path).column("segments/row"), borders)


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
        ({"length": 0}, ConfigError, "length is too small: 0. Give 1 or more"),
        ({"steps": -1}, ConfigError, "steps is too small: -1. Give 0 or more"),
        ({"batch": 16, "length": 3}, ConfigError, "no whole groups: 16 rows, 3 in a group. Take 18 rows"),
        ({"batch": 10**4}, ConfigError, "the batch is larger than the rows that are served: 10,000 >"),
        ({"batch": 700, "length": 700}, ConfigError, "no segment has so many kept rows one after another: 700"),
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


@pytest.mark.parametrize(("free", "drops"), [(10**9, False), (1000, True)])
@pytest.mark.parametrize("order", ["shuffled", "file"])
def test_pages_of_a_store_that_does_not_fit_into_memory_are_dropped_behind_the_batches(
    store: Store, free: int, drops: bool, order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def loader(view: View, *given: Any) -> Loader:
        seen.append(view.access.drops)
        return Loader(view, *given)

    monkeypatch.setattr("train.resident.free_memory", lambda device: free)
    monkeypatch.setattr(sys.modules["train.batches"], "Loader", loader)  # train.batches is the function
    with batches(store, batch=64, rows=KEEP, order=order) as served:
        require_values(store, next(served))
    assert seen == [drops]

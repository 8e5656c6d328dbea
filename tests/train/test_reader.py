"""The reader equals plain indexing."""

import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.codec import Packing
from shared.errors import StoreError
from shared.reading import Access
from shared.store import Store
from tests import memory
from tests.build import make_store
from train.reader import Reader

ROWS = 101  # 4 shards of 32 rows, the last of 5, and chunks of 8


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("reader") / "small.zarr", rows=ROWS, factor={"a": 4.0})


Open = Callable[[list[str]], Reader]


@pytest.fixture(scope="module", params=["map", "pread", "zstd", "blosc", "pcodec"])
def opened(request: pytest.FixtureRequest, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Open:
    """A reader of the rows of `store`: raw, in both ways, and packed by every codec."""
    if request.param in ("map", "pread"):
        return partial(Reader, store.through(Access(request.param)))
    packing = Packing(request.param, 4, {"a": 4, "b": 2})
    path = tmp_path_factory.mktemp("packed") / "small.zarr"
    return partial(Reader, make_store(path, rows=ROWS, factor={"a": 4.0}, packing=packing))


def test_an_unknown_source_is_refused_with_what_there_is(store: Store) -> None:
    with pytest.raises(StoreError, match="a, b"):
        Reader(store, ["c"])


@given(st.lists(st.integers(0, ROWS - 1), max_size=60), st.booleans())
@settings(deadline=None)
def test_gathering_equals_plain_indexing_whether_rows_ascend_or_not(
    store: Store, opened: Open, rows: list[int], ascend: bool
) -> None:
    asked = sorted(rows) if ascend else rows
    with opened(["a", "b"]) as reader:
        out = {name: np.full((len(rows), width), np.nan, np.float16) for name, width in reader.widths.items()}
        reader.gather(np.array(asked, np.int64), out)
    for name, x_BD in out.items():
        assert np.array_equal(x_BD, store.column(f"activations/{name}")[asked])


@given(st.sets(st.integers(0, ROWS - 1)), st.integers(1, 40))
@settings(deadline=None)
def test_streaming_gives_the_rows_in_batches_in_file_order(
    store: Store, opened: Open, rows: set[int], batch: int
) -> None:
    with opened(["b"]) as reader:
        parts = list(reader.stream(np.array(sorted(rows), np.int64), batch))
    assert [len(rows_B) for rows_B, _ in parts[:-1]] == [batch] * (len(parts) - 1)
    assert [int(row) for rows_B, _ in parts for row in rows_B] == sorted(rows)
    for rows_B, x in parts:
        assert np.array_equal(x["b"], store.column("activations/b")[rows_B])


@given(st.lists(st.integers(0, ROWS - 1), max_size=5), st.integers(1, 90))
@settings(deadline=None)
def test_what_is_asked_for_and_forgotten_changes_no_value(
    store: Store, opened: Open, starts: list[int], length: int
) -> None:
    with opened(["a"]) as reader:
        reader.will_need(np.array(starts, np.int64), length)
        reader.forget(np.array(starts, np.int64), length)
        out = {"a": np.empty((ROWS, 6), np.float16)}
        reader.gather(np.arange(ROWS), out)
    assert np.array_equal(out["a"], store.column("activations/a"))


def test_giving_back_memory_gives_it_back(tmp_path: Path) -> None:
    big = make_store(
        tmp_path / "big.zarr", rows=4096, shard_rows=4096, chunk_rows=1024, sources={"a": 1024}, documents=3
    )
    with Reader(big, ["a"]) as reader:
        reader.gather(np.arange(4096), {"a": np.empty((4096, 1024), np.float16)})
        assert memory.mapped("big.zarr/activations/a") == 8 * 1024
        reader.forget(np.array([0, 2048]), 1024)
        assert memory.mapped("big.zarr/activations/a") <= 4 * 1024 + 64


def test_closing_twice_is_harmless(store: Store) -> None:
    reader = Reader(store, ["a"])
    reader.gather(np.arange(ROWS), {"a": np.empty((ROWS, 6), np.float16)})
    assert str(store.path / "activations") in Path("/proc/self/maps").read_text()
    reader.close()
    reader.close()
    assert str(store.path / "activations") not in Path("/proc/self/maps").read_text()


def test_the_limit_of_open_files_is_raised_where_it_may_be(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 1000))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    Reader(store, ["a", "b"]).close()
    assert asked == [(2 * 2 * 4 + 256, 1000)]  # a map's file, and the map itself
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 100))
    with pytest.raises(StoreError, match="ulimit"):
        Reader(store, ["a", "b"])

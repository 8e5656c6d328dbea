"""The loader serves the order's batches, whole, whatever the number of threads."""

import threading
import traceback
from collections.abc import Mapping
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.store import Store
from tests.build import make_store
from train.loader import Loader, Rows
from train.order import Order
from train.reader import Reader, kept_rows

ROWS, BATCH = 101, 16
DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
CPU = DEVICES[0]

every_device = pytest.mark.parametrize("device", DEVICES, ids=str)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("loader") / "small.zarr", rows=ROWS, factor={"a": 4.0, "b": 0.5})


@pytest.fixture(scope="module")
def order(store: Store) -> Order:
    return Order(kept_rows(store, ["a", "b"]).kept_N, block_rows=4, window_blocks=5, seed=0)


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("granary-loader")]


def equal(left: Rows, right: Rows) -> bool:
    return torch.equal(left.rows_B, right.rows_B) and all(torch.equal(left.x[name], right.x[name]) for name in left.x)


@every_device
def test_a_batch_is_the_step_of_the_order_in_the_models_own_units(
    store: Store, order: Order, device: torch.device
) -> None:
    with Loader(store, ["a", "b"], order, BATCH, range(20), device) as loader:
        batches = list(loader)
    assert len(batches) == 20
    for step, rows in enumerate(batches):
        assert rows.rows_B.tolist() == np.sort(order.step(step, BATCH)).tolist()
        for name, factor in (("a", 4.0), ("b", 0.5)):
            stored = store.column(f"activations/{name}")[rows.rows_B.numpy()].astype(np.float32)
            assert np.array_equal(rows.x[name].cpu().numpy(), stored * np.float32(factor))
            assert rows.x[name].dtype == torch.float32 and rows.x[name].device.type == device.type


@every_device
def test_three_threads_and_any_ring_serve_what_one_thread_serves(
    store: Store, order: Order, device: torch.device
) -> None:
    with Loader(store, ["a", "b"], order, BATCH, range(30), device, threads=1, slots=1) as loader:
        expected = list(loader)
    for slots in (2, 5, 40):
        with Loader(store, ["a", "b"], order, BATCH, range(30), device, threads=3, slots=slots) as loader:
            assert all(equal(*pair) for pair in zip(loader, expected, strict=True))


@every_device
def test_a_batch_that_was_handed_out_never_changes(store: Store, order: Order, device: torch.device) -> None:
    with Loader(store, ["a"], order, BATCH, range(12), device, threads=2, slots=2) as loader:
        first = next(iter(loader))
        copy = first.x["a"].clone()
        rest = [rows.x["a"] + 1 for rows in loader]
        assert len(rest) == 11 and torch.equal(first.x["a"], copy)


@given(st.integers(0, 30), st.integers(1, 150), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_a_run_that_starts_anywhere_equals_the_rest_of_the_whole(
    store: Store, order: Order, start: int, batch: int, world: int
) -> None:
    with Loader(store, ["b"], order, batch, range(start, start + 3), CPU, 2, rank=world - 1, world=world) as loader:
        served = [rows.rows_B.tolist() for rows in loader]
    assert served == [sorted(order.step(step, batch, world - 1, world).tolist()) for step in range(start, start + 3)]


def test_an_error_in_a_thread_surfaces_with_its_own_traceback(
    store: Store, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = Reader.gather

    def gather_until_step_2(self: Reader, rows_B: np.ndarray, out: Mapping[str, np.ndarray]) -> np.ndarray:
        if np.array_equal(rows_B, order.step(2, BATCH)):
            raise OSError("the disk is gone")
        return gather(self, rows_B, out)

    monkeypatch.setattr(Reader, "gather", gather_until_step_2)
    served: list[Rows] = []
    with Loader(store, ["a"], order, BATCH, range(10), CPU, threads=3) as loader:
        with pytest.raises(OSError, match="the disk is gone") as error:
            served.extend(iter(loader))
        assert "gather_until_step_2" in [frame.name for frame in traceback.extract_tb(error.tb)]
        assert list(loader) == [] and not loader_threads()
    assert len(served) <= 2


def test_an_abandoned_iteration_leaves_no_thread_and_closing_twice_is_harmless(store: Store, order: Order) -> None:
    loader = Loader(store, ["a"], order, BATCH, range(10**9), CPU, threads=3)
    assert len(list(islice(loader, 3))) == 3 and loader_threads()
    loader.close()
    loader.close()
    assert not loader_threads()
    assert list(loader) == []


def test_no_more_steps_are_read_than_were_asked_for(store: Store, order: Order) -> None:
    with Loader(store, ["a"], order, BATCH, range(7, 7), CPU, slots=4) as loader:
        assert list(loader) == []
    with Loader(store, ["a"], order, BATCH, range(7, 9), CPU, slots=4) as loader:
        assert len(list(loader)) == 2


def test_what_was_served_is_counted(store: Store, order: Order) -> None:
    with Loader(store, ["a", "b"], order, BATCH, range(5), CPU) as loader:
        assert len(list(loader)) == 5
        assert (loader.rows_served, loader.bytes_served) == (5 * 16, 5 * 16 * (6 + 4) * 2)
        assert loader.waited_s > 0

"""Rows that stay on the device or in memory are the same to the bit, and stay where they fit."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.codec import Packing
from shared.reading import Access, File
from shared.shard import PackedPieces
from shared.store import Store
from tests import memory
from tests.build import make_store
from tests.device import CPU, every_device
from train import resident
from train.filter import kept_rows
from train.loader import Loader, Rows
from train.order import Order
from train.reader import Reader
from train.resident import Held, feed, place

ROWS, BATCH, FACTOR = 101, 16, {"a": 4.0, "b": 0.5}
WAYS = {"map": Access(), "pread": Access("pread"), "packed": Access()}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """The same rows, raw and packed."""
    folder, packing = tmp_path_factory.mktemp("resident"), Packing("zstd", 1, {"a": 4, "b": 2})
    raw = make_store(folder / "raw.zarr", rows=ROWS, factor=FACTOR)
    packed = make_store(folder / "packed.zarr", rows=ROWS, factor=FACTOR, packing=packing)
    return {"map": raw, "pread": raw, "packed": packed}


@pytest.fixture(scope="module")
def order(stores: dict[str, Store]) -> Order:
    return Order(kept_rows(stores["map"]).kept_N, block_rows=4, window_blocks=5, seed=0)


def equal(left: Rows, right: Rows) -> bool:
    same = left.x.keys() == right.x.keys() and torch.equal(left.rows_B, right.rows_B)
    return same and all(torch.equal(left.x[name].cpu(), right.x[name].cpu()) for name in left.x)


@every_device
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("copied_rows", [1, 7, 1000])
def test_a_batch_from_the_device_is_that_of_the_loader_to_the_bit(
    stores: dict[str, Store], order: Order, way: str, copied_rows: int, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(resident, "COPY_BYTES", copied_rows * 2 * 6)  # 6: the larger of the widths
    with (
        Loader(stores["map"], ["b", "a"], order, BATCH, range(3, 20), CPU) as expected,
        Held(stores[way].through(WAYS[way]), ["b", "a"], order, BATCH, range(3, 20), device) as found,
    ):
        batches = list(zip(found, expected, strict=True))
    assert all(equal(*pair) for pair in batches)
    assert {x.dtype for x in batches[0][0].x.values()} == {torch.float32}
    assert {x.device.type for x in batches[0][0].x.values()} == {device.type}
    assert (found.rows_served, found.bytes_served) == (expected.rows_served, expected.bytes_served)
    assert found.waited_s > 0


@given(st.integers(0, 30), st.integers(1, 150), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_ranks_and_steps_are_those_of_the_loader(
    stores: dict[str, Store], order: Order, start: int, batch: int, world: int
) -> None:
    steps = range(start, start + 2)
    with (
        Loader(stores["map"], ["a"], order, batch, steps, CPU, rank=world - 1, world=world) as expected,
        Held(stores["map"], ["a"], order, batch, steps, CPU, rank=world - 1, world=world) as found,
    ):
        assert all(equal(*pair) for pair in zip(found, expected, strict=True))


def test_only_the_kept_rows_are_copied_and_none_are_read_behind_that(
    stores: dict[str, Store], order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(stores["map"], ["a", "b"], order, BATCH, range(30), CPU)
    assert {name: tuple(x.shape) for name, x in held._x.items()} == {"a": (order.kept, 6), "b": (order.kept, 4)}
    assert {x.dtype for x in held._x.values()} == {torch.float16}
    monkeypatch.setattr(Reader, "pieces", lambda *_: pytest.fail("rows were read"))
    assert len(list(held)) == 30


def test_closing_lets_go_of_the_copy_and_ends_the_batches(stores: dict[str, Store], order: Order) -> None:
    held = Held(stores["map"], ["a"], order, BATCH, range(30), CPU)
    batches = iter(held)
    first = next(batches)
    held.close()
    held.close()
    assert held._x == {} and list(batches) == [] and first.x["a"].shape == (BATCH, 6)


def test_bfloat16_rows_are_held_as_they_are_stored(tmp_path: Path, order: Order) -> None:
    made = make_store(tmp_path / "x.zarr", rows=ROWS)
    made.header.plan["dtype"] = "bfloat16"  # whatever these bits mean then
    store = Store(made.path, made.header)
    with (
        Loader(store, ["a"], order, BATCH, range(9), CPU) as expected,
        Held(store, ["a"], order, BATCH, range(9), CPU) as found,
    ):
        assert found._x["a"].dtype == torch.bfloat16
        for left, right in zip(found, expected, strict=True):
            assert left.x["a"].numpy().tobytes() == right.x["a"].numpy().tobytes()


@pytest.mark.parametrize("way", ["pread", "packed"])
def test_what_stays_in_memory_is_got_once_and_else_in_every_epoch_again(
    stores: dict[str, Store], order: Order, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, got, wheres = Order(order.kept_N, 4, 2, seed=0), list[int](), list[resident.Where](["memory", "no"])
    fill, decode = File.fill, PackedPieces._decode

    def filled(self: File, parts: Sequence[np.ndarray], offset: int) -> None:
        got.extend(part.size for part in parts)
        fill(self, parts, offset)

    def decoded(self: PackedPieces, chunk: int, rows_CD: np.ndarray) -> None:
        got.append(rows_CD.size)
        decode(self, chunk, rows_CD)

    monkeypatch.setattr(File, "fill", filled)
    monkeypatch.setattr(PackedPieces, "_decode", decoded)
    steps, sizes = range(5 * order.kept // 4), []
    for where in wheres:
        got.clear()
        with (
            feed(where, stores[way].through(WAYS[way]), ["a"], order, 4, steps, CPU) as found,
            Loader(stores["map"], ["a"], order, 4, steps, CPU) as expected,
        ):
            assert all(equal(*pair) for pair in zip(found, expected, strict=True))
        sizes.append(sum(got))
    assert sizes[0] <= 6 * (ROWS + 3) and sizes[1] > 2 * sizes[0]  # 6: the width


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say what is free."""

    def say(cpu: int, cuda: int = 0) -> None:
        monkeypatch.setattr(resident, "free_memory", lambda device: {"cpu": cpu, "cuda": cuda}[device.type])

    return say


def test_rows_stay_where_they_take_less_than_half_of_what_is_free_and_maps_less_than_nine_tenths(
    stores: dict[str, Store], order: Order, free: Callable[..., None]
) -> None:
    cuda, store, both = torch.device("cuda"), stores["map"], ["a", "b"]
    everything, kept = ROWS * 2 * (6 + 4), order.kept * 2 * (6 + 4)
    for way, share in (("map", 0.9), ("pread", 0.5), ("packed", 0.5)):
        one = stores[way].through(WAYS[way])
        free(cpu=int(everything / share) - 1)
        assert place(one, both, order, CPU, 10**6) == "no"
        free(cpu=int(everything / share) + 1)
        assert place(one, both, order, CPU, 10**6) == place(one, both, order, CPU, 1) == "memory"
    free(cpu=2 * everything + 1, cuda=2 * kept)
    assert place(store, both, order, cuda, 10**6) == "memory"
    assert place(store, ["a"], order, cuda, 10**6) == "device"
    free(cpu=everything, cuda=2 * kept + 1)
    assert place(store, both, order, cuda, 10**6) == "device"
    assert place(store, both, order, cuda, order.kept) == "device"
    assert place(store, both, order, cuda, order.kept - 1) == "no"  # a run that reads some rows does not copy all


def test_what_the_run_will_take_is_not_free_and_processes_share_what_is_not_mapped(
    stores: dict[str, Store], order: Order, free: Callable[..., None]
) -> None:
    cuda, everything, kept = torch.device("cuda"), ROWS * 2 * (6 + 4), order.kept * 2 * (6 + 4)
    free(cpu=1000 * everything, cuda=2 * kept + 1)
    assert place(stores["map"], ["a", "b"], order, cuda, 10**6, beside=100) == "memory"
    free(cpu=2 * everything + 10, cuda=0)
    packed = stores["packed"].through(WAYS["packed"])
    assert place(packed, ["a", "b"], order, CPU, 10**6) == "memory"
    assert place(packed, ["a", "b"], order, CPU, 10**6, beside=100) == "no"
    assert place(packed, ["a", "b"], order, CPU, 10**6, alike=2) == "no"
    assert place(stores["map"], ["a", "b"], order, CPU, 10**6, alike=2) == "memory"


def test_each_place_has_its_feed(stores: dict[str, Store], order: Order) -> None:
    wanted: dict[resident.Where, type] = {"device": Held, "memory": Loader, "no": Loader}
    for where, kind in wanted.items():
        with feed(where, stores["map"], ["a"], order, BATCH, range(4), CPU) as found:
            assert type(found) is kind and len(list(found)) == 4


@pytest.fixture
def sixteen(tmp_path: Path) -> Iterator[Store]:
    """16 MiB of rows in maps."""
    values = {"a": np.zeros((4096, 2048), np.float32)}
    yield make_store(tmp_path / "x.zarr", 4096, 4096, 512, {"a": 2048}, documents=3, values=values)


def test_pages_of_a_mapped_store_stay_where_all_of_it_may(sixteen: Store) -> None:
    order, grown = Order(np.ones(4096, bool), block_rows=64, window_blocks=4, seed=0), {}
    wheres: list[resident.Where] = ["no", "memory"]
    for where in wheres:
        with feed(where, sixteen, ["a"], order, 64, range(64), CPU) as found:
            for _ in found:
                pass
            grown[where] = memory.mapped("x.zarr/activations")
    assert grown["no"] < 6 * 1024 and grown["memory"] > 15 * 1024

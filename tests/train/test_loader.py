"""The loader serves the order's batches, whole, whatever the number of threads."""

import itertools
import shutil
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import layout
from shared.codec import CODECS, Packing
from shared.errors import StoreDamagedError
from shared.layout import index_bytes
from shared.mixture import open_mixture
from shared.reading import IO, Access, Pieces
from shared.shard import PackedPieces, RawPieces
from shared.store import Store
from shared.view import View
from tests import memory
from tests.build import make_store
from tests.device import CPU, every_device
from train.filter import RowsConfig, kept_rows
from train.loader import Loader, Rows
from train.order import FileOrder, Groups, Order, Stream, group_starts
from train.reader import Reader

Arrays = Mapping[str, np.ndarray]
ROWS, BATCH = 101, 16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("loader") / "small.zarr", rows=ROWS, factor={"a": 4.0, "b": 0.5})


@pytest.fixture(scope="module")
def order(store: Store) -> Order:
    return Order(kept_rows(store).kept_N, block_rows=4, window_blocks=5, seed=0)


@pytest.fixture(scope="module", params=["pread", *CODECS])
def kept(request: pytest.FixtureRequest, store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, IO]:
    """The rows of `store`, and how they are read into memory: all ways but its maps.

    A piece of `a` is a block of `order`, one of `b` half of one; raw, both are two blocks.
    """
    if request.param == "pread":
        return store, "pread"
    path, default = tmp_path_factory.mktemp("packed") / "small.zarr", CODECS[request.param].default
    packing = Packing(request.param, default, {"a": 4, "b": 2})
    return make_store(path, rows=ROWS, factor={"a": 4.0, "b": 0.5}, packing=packing), "map"


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("granary-")]


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


@pytest.fixture(scope="module", params=[None, *CODECS])
def three(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Sources of which two have one width, mapped and packed."""
    path = tmp_path_factory.mktemp("three") / "small.zarr"
    packing = request.param and Packing(request.param, CODECS[request.param].default, {"a": 4, "b": 2, "c": 4})
    widths, factors = {"a": 6, "b": 4, "c": 6}, {"a": 4.0, "b": 0.5, "c": 0.25}
    return make_store(path, rows=ROWS, sources=widths, factor=factors, masked=0.0, packing=packing)


@every_device
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("piece_rows", [5, 100])
def test_a_difference_is_served_as_fp64_has_it_and_what_it_is_made_of_is_read_once(
    three: Store, device: torch.device, reuse: bool, threads: int, piece_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.loader.PIECE_BYTES", piece_rows * 2 * 6)
    order = Order(kept_rows(three).kept_N, block_rows=4, window_blocks=5, seed=0)
    x_ND = {name: layout.floats(three.stored(name, np.arange(ROWS))).double() * three.factor(name) for name in "abc"}
    expected = {"c": x_ND["c"], "a - c": x_ND["a"] - x_ND["c"], "b": x_ND["b"], "c - a": x_ND["c"] - x_ND["a"]}
    with Loader(three, list(expected), order, BATCH, range(20), device, threads, reuse=reuse) as loader:
        for rows in loader:
            assert list(rows.x) == list(expected)
            for name, x_BD in rows.x.items():
                assert torch.equal(x_BD.cpu(), expected[name][rows.rows_B].float())
        assert loader.bytes_served == 20 * BATCH * (6 + 4 + 6) * 2


@pytest.mark.parametrize("piece_rows", [1, 5, 16, 100])
def test_a_batch_that_is_gathered_piece_by_piece_is_the_same(
    store: Store, order: Order, piece_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.loader.PIECE_BYTES", piece_rows * 2 * 6)  # 6: the larger of the widths
    with Loader(store, ["a", "b"], order, BATCH, range(5), CPU, reuse=True) as loader:
        for rows in loader:
            for name, factor in (("a", 4.0), ("b", 0.5)):
                stored = store.column(f"activations/{name}")[rows.rows_B.numpy()].astype(np.float32)
                assert np.array_equal(rows.x[name].numpy(), stored * np.float32(factor))


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
def test_any_stream_is_the_same_from_any_threads_and_ring(
    store: Store, kept: tuple[Store, IO], device: torch.device
) -> None:
    kept_N = kept_rows(store, RowsConfig(split="all")).kept_N
    firsts_N, read = group_starts(kept_N, np.arange(0, ROWS, 11), 3), kept[0].through(Access(kept[1]))
    assert 8 < firsts_N.sum() < 20  # the batches of 8 groups straddle epochs, and groups stand in them twice
    several: list[tuple[Stream, int]] = [
        (FileOrder(kept_N, 4, 20), 7),
        (Groups(Order(firsts_N, 4, 2, 0), 3), 24),
        (Groups(FileOrder(firsts_N, 2, 9), 3), 6),
    ]
    for line, batch in several:
        expected = [line.served(step, batch) for step in range(9)]
        for threads, slots in ((1, 1), (1, 4), (3, 4), (3, 9)):
            with Loader(read, ["a"], line, batch, range(9), device, threads, slots) as loader:
                found = list(loader)
                assert loader.rows_served == sum(map(len, expected))
            for rows, rows_B in zip(found, expected, strict=True):
                assert np.array_equal(rows.rows_B.numpy(), rows_B)
                stored = store.column("activations/a")[rows_B].astype(np.float32)
                assert np.array_equal(rows.x["a"].cpu().numpy(), stored * np.float32(4.0))


def test_a_shorter_last_batch_is_shorter_in_reused_memory_too(store: Store) -> None:
    line = FileOrder(np.arange(ROWS) < 20, 4, 20)
    with Loader(store, ["a", "b"], line, 16, range(2), CPU, reuse=True) as loader:
        assert [(len(rows.rows_B), len(rows.x["a"]), len(rows.x["b"])) for rows in loader] == [(16,) * 3, (4,) * 3]


@every_device
def test_a_batch_that_was_handed_out_never_changes(store: Store, order: Order, device: torch.device) -> None:
    with Loader(store, ["a"], order, BATCH, range(12), device, threads=2, slots=2) as loader:
        first = next(iter(loader))
        copy = first.x["a"].clone()
        rest = [rows.x["a"] + 1 for rows in loader]
        assert len(rest) == 11 and torch.equal(first.x["a"], copy)


@every_device
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_reused_memory_holds_the_same_batches_each_until_the_next(
    store: Store, order: Order, device: torch.device, slots: int
) -> None:
    steps = range(30)
    with (
        Loader(store, ["a", "b"], order, BATCH, steps, device) as fresh,
        Loader(store, ["a", "b"], order, BATCH, steps, device, 3, slots, reuse=True) as reusing,
    ):
        places = set()
        for left, right in zip(reusing, fresh, strict=True):
            time.sleep(0.001)  # threads that fill what is still in use have time to do so
            assert equal(left, right)
            places.add(left.x["a"].data_ptr())
    assert device.type == "cuda" or len(places) == slots


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: there are no streams")
@pytest.mark.parametrize("late", ["the copies", "the consumer"])
def test_copies_and_the_consumers_work_wait_for_each_other(
    store: Store, order: Order, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches this small would hide a wait that is missing, so one of the two streams is held up."""
    cuda, cycles = torch.device("cuda"), 20_000_000  # some ten milliseconds
    send = Loader._send

    def late_send(self: Loader, *given: Any) -> None:
        torch.cuda._sleep(cycles)  # on the copy stream, where it is current
        send(self, *given)

    if late == "the copies":
        monkeypatch.setattr(Loader, "_send", late_send)
    found, numbers = [], []
    with Loader(store, ["a", "b"], order, BATCH, range(16), cuda, threads=2, slots=2) as loader:
        for rows in loader:
            if late == "the consumer":
                torch.cuda._sleep(cycles)
            found.append({name: x_BD + 0 for name, x_BD in rows.x.items()})
            numbers.append(rows.rows_B.numpy())
            del rows  # its memory may be taken for the next batch, but not before this stream has read it
    for x, rows_B in zip(found, numbers, strict=True):
        for name, factor in (("a", 4.0), ("b", 0.5)):
            stored = store.column(f"activations/{name}")[rows_B].astype(np.float32)
            assert np.array_equal(x[name].cpu().numpy(), stored * np.float32(factor))


@given(st.integers(0, 30), st.integers(1, 150), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_a_run_that_starts_anywhere_equals_the_rest_of_the_whole(
    store: Store, order: Order, start: int, batch: int, world: int
) -> None:
    with Loader(store, ["b"], order, batch, range(start, start + 3), CPU, 2, rank=world - 1, world=world) as loader:
        served = [rows.rows_B.tolist() for rows in loader]
    assert served == [sorted(order.step(step, batch, world - 1, world).tolist()) for step in range(start, start + 3)]


@given(st.integers(0, 40), st.integers(1, 60), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_rows_that_are_kept_in_memory_are_the_same_bits_from_anywhere(
    store: Store, kept: tuple[Store, IO], order: Order, start: int, batch: int, threads: int
) -> None:
    steps, sources, (other, io) = range(start, start + 12), ["b", "a"], kept
    with (
        Loader(store, sources, order, batch, steps, CPU, threads) as expected,
        Loader(other.through(Access(io)), sources, order, batch, steps, CPU, threads) as found,
    ):
        assert all(equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.fixture(scope="module", params=[1, 32, 50, 100])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, View]:
    """A store, and its rows cut into two stores, of which the second is packed."""
    folder, factor, rng = tmp_path_factory.mktemp("cut"), {"a": 4.0, "b": 0.5}, np.random.default_rng(0)
    values = {name: rng.normal(size=(ROWS, width)).astype(np.float32) for name, width in (("a", 6), ("b", 4))}
    packing = {"rest": Packing("zstd", CODECS["zstd"].default, {"a": 4, "b": 2})}

    def made(name: str, rows: slice) -> Store:
        own = {source: x_ND[rows] for source, x_ND in values.items()}
        return make_store(
            folder / f"{name}.zarr", rows=len(own["a"]), values=own, factor=factor, corpus=f"{name}/",
            packing=packing.get(name),
        )  # fmt: skip

    cut = request.param
    return made("whole", slice(0, ROWS)), open_mixture([made("first", slice(0, cut)), made("rest", slice(cut, ROWS))])


@given(st.integers(0, 40), st.integers(1, 60), st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_a_mixture_of_the_parts_of_a_store_serves_the_same_bits(
    parts: tuple[Store, View], start: int, batch: int, threads: int
) -> None:
    order, steps = Order(np.arange(ROWS) % 7 > 0, 4, 5, seed=0), range(start, start + 9)
    with (
        Loader(parts[0], ["b", "a"], order, batch, steps, CPU, threads) as expected,
        Loader(parts[1], ["b", "a"], order, batch, steps, CPU, threads) as found,
    ):
        assert all(equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("start", "batch", "window"), [(0, 4, 5), (7, 4, 5), (13, 16, 11), (3, 9, 19), (5, 10, 26)])
def test_a_piece_is_got_once_for_every_time_that_it_comes_into_reach(
    kept: tuple[Store, IO], start: int, batch: int, window: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, io = kept
    order = Order(kept_rows(store, RowsConfig(sources=["a"])).kept_N, 8 if io == "pread" else 4, window, seed=0)
    got, alone, calls = list[int](), list[int](), itertools.count()
    monkeypatch.setattr("shared.shard.REQUEST_BYTES", 1)  # a piece a request
    for kind in (PackedPieces, RawPieces):
        _spied(kind, "get", got, monkeypatch)
        _spied(kind, "some", alone, monkeypatch)
    pieces = Reader.pieces

    def now_and_then_late(self: Reader, rows_B: np.ndarray, buffers: Arrays) -> Iterator[tuple[str, slice]]:
        time.sleep(0.01 if next(calls) % 7 == 3 else 0)
        yield from pieces(self, rows_B, buffers)

    monkeypatch.setattr(Reader, "pieces", now_and_then_late)
    with Loader(store.through(Access(io)), ["a"], order, batch, range(start, start + 40), CPU, threads) as loader:
        assert len(list(loader)) == 40
    asked = order.front((start + 40) * batch - 1) + order.window_blocks - order.opened(start * batch)
    assert alone == []
    blocks = len(order.reads(0, order.blocks)[0])  # that keep any row
    assert blocks <= len(got) <= (blocks if order.window_blocks == order.blocks else asked)


@pytest.fixture
def big(tmp_path: Path) -> Iterator[Store]:
    """201 MB of rows that nothing but their files says anything of: a plan, and no receipts."""
    small = make_store(tmp_path / "big.zarr", rows=2, sources={"a": 2048}, documents=1)
    plan = {**small.header.plan, "rows": 3 * 2**14, "shard_rows": 2**14, "chunk_rows": 512, "shards": 3}
    store = Store(small.path, replace(small.header, plan=plan))
    for shard in range(3):
        file = store.path / f"activations/a/c/{shard}/0"
        file.parent.mkdir(exist_ok=True)
        np.ones((2**14, 2048), np.float16).tofile(file)
    yield store
    shutil.rmtree(store.path)


@pytest.mark.parametrize("io", ["map", "pread"])
def test_memory_holds_two_windows_of_a_store_that_is_read_twice(big: Store, io: IO) -> None:
    order = Order(np.ones(big.rows, bool), block_rows=128, window_blocks=8, seed=0)
    window, slot = 8 * 128 * 4, 256 * 2 * (4 + 2)  # KiB; with its floats
    own, grown, mapped = memory.own(), [0], [0]
    steps = range(2 * big.rows // 256)
    with Loader(big.through(Access(io)), ["a"], order, 256, steps, CPU, 2, slots=4, reuse=True) as loader:
        for number, rows in enumerate(loader):
            assert (rows.x["a"] == 1).all()
            grown.append(memory.own() - own)
            if number % 4 == 0:
                mapped.append(memory.mapped("big.zarr"))
    rows_of_store = 2 * window + 4 * 2 * 128 * 4  # and the blocks of four batches
    if io == "map":  # a fetch maps 2 MiB more for a moment, and four go on at once
        assert window < max(mapped) <= rows_of_store + 4 * 2048 and max(grown) <= 4 * slot + 8 * 1024
    else:
        assert window < max(grown) <= rows_of_store + 4 * slot + 8 * 1024 and max(mapped) == 0


def _spied(kind: type[Pieces], name: str, seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Append the first argument of every call."""
    method = getattr(kind, name)

    def spied(self: Pieces, first: int, given: Any) -> Any:
        seen.append(first)
        return method(self, first, given)

    monkeypatch.setattr(kind, name, spied)


def test_damage_of_what_is_read_ahead_surfaces_once_and_names_the_file(
    kept: tuple[Store, IO], order: Order, tmp_path: Path
) -> None:
    store, io = Store.open(shutil.copytree(kept[0].path, tmp_path / "x.zarr")), kept[1]
    file = store.path / "activations/a/c/1/0"
    data = np.fromfile(file, np.uint8)
    data[: -index_bytes(8)] ^= 1
    data[: 10 if io == "pread" else None].tofile(file)
    told = rf"shorter while it was read: {file}" if io == "pread" else rf"{file}, rows \d+ to \d+: another checksum"
    with Loader(store.through(Access(io)), ["a", "b"], order, BATCH, range(30), CPU, threads=3) as loader:
        with pytest.raises(StoreDamagedError, match=told):
            list(loader)
        assert list(loader) == [] and not loader_threads()


def test_an_error_in_a_thread_surfaces_with_its_own_traceback(
    store: Store, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = Reader.pieces

    def pieces_until_step_2(self: Reader, rows_B: np.ndarray, buffers: Arrays) -> Iterator[tuple[str, slice]]:
        if np.array_equal(rows_B, np.sort(order.step(2, BATCH))):
            raise OSError("the disk is gone")
        yield from pieces(self, rows_B, buffers)

    monkeypatch.setattr(Reader, "pieces", pieces_until_step_2)
    served: list[Rows] = []
    with Loader(store, ["a"], order, BATCH, range(10), CPU, threads=3) as loader:
        with pytest.raises(OSError, match="the disk is gone") as error:
            served.extend(iter(loader))
        assert "pieces_until_step_2" in [frame.name for frame in traceback.extract_tb(error.tb)]
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

"""Whatever was asked for and forgotten, and by whatever threads, the rows are those that were written."""

import os
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import codec
from shared.errors import StoreDamagedError
from shared.reading import File, Grid, KeptShards, Pieces
from shared.shard import Packed, Raw, RawPieces
from tests import memory
from tests.shards import CHUNK, FORMS, ROWS, SHARD, WAYS, Written, taken, write

IN_MEMORY = [way for way in WAYS if way != "raw"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """The same rows, in every form."""
    return {name: write(form, tmp_path_factory.mktemp(name)) for name, form in FORMS.items()}


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as threads:
        yield threads


spans = st.lists(st.tuples(st.booleans(), st.integers(0, ROWS - 1), st.integers(1, ROWS)), max_size=8)


@pytest.mark.parametrize("way", WAYS)
@given(spans, st.lists(st.integers(0, ROWS - 1), max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_are_what_was_written_whatever_was_asked_for_and_forgotten(
    made: dict[str, Written], way: str, pool: ThreadPoolExecutor, asked: list[tuple[bool, int, int]], rows: list[int]
) -> None:
    written = made[WAYS[way]]
    source, rows_B = written.open(way), np.array(sorted(rows), np.int64)
    for needed, start, length in asked:
        stop = min(start + length, ROWS)
        source.will_need([(start, stop)], pool) if needed else source.forget([(start, stop)])
        assert taken(source, rows_B, written.rows_ND, pool) == written.rows_ND[rows_B].tobytes()


@pytest.mark.parametrize("way", WAYS)
def test_threads_that_ask_take_and_forget_at_once_see_the_same_rows(made: dict[str, Written], way: str) -> None:
    written = made[WAYS[way]]
    source, wrong = written.open(way), list[bytes]()

    def work(seed: int, pool: ThreadPoolExecutor) -> None:
        chance = random.Random(seed)
        for _ in range(150):
            start = chance.randrange(ROWS)
            stop = chance.randrange(start, ROWS) + 1
            rows_B = np.array(sorted(chance.choices(range(ROWS), k=9)))
            source.will_need([(start, stop)], pool)
            if (found := taken(source, rows_B, written.rows_ND, pool)) != written.rows_ND[rows_B].tobytes():
                wrong.append(found)
            source.forget([(start, stop)])

    with ThreadPoolExecutor(2) as pool:
        threads = [threading.Thread(target=work, args=(seed, pool)) for seed in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert wrong == []


def test_what_is_to_stay_is_not_forgotten(made: dict[str, Written], pool: ThreadPoolExecutor) -> None:
    for way in WAYS:
        written = made[WAYS[way]]
        source = written.open(way, stays=True)
        source.will_need([(0, ROWS)], pool)
        source.forget([(0, ROWS)])
        assert taken(source, np.arange(ROWS), written.rows_ND, pool) == written.rows_ND.tobytes()
        if isinstance(source, KeptShards):
            assert (source._asked_X == 1).all() and not source._pending


@pytest.mark.parametrize("width", [1024, 1023])  # pieces of whole pages, and of others
@pytest.mark.parametrize("way", ["packed", "pread", "map"])
def test_a_piece_takes_memory_from_its_first_asking_to_its_last_forgetting(
    tmp_path: Path, way: str, width: int
) -> None:
    rows, shape = 128 * 128, (64 * 128, 128, width, "float16")
    form = Packed(*shape, codec.find("zstd", 1)) if way == "packed" else Raw(*shape)
    written = write(form, tmp_path, np.zeros((rows, width), np.float16))  # 32 MiB
    source, last = written.open(way), np.array([rows - 1])

    def resident() -> int:
        return memory.mapped(str(tmp_path)) if way == "map" else memory.own()

    before = resident()
    for asked in (1, 2):
        with ThreadPoolExecutor(1) as pool:
            source.will_need([(0, rows)], pool)
            source.take(last, np.empty((1, width), np.float16), pool)
        assert resident() - before > 30 * 1024, asked
    source.forget([(0, rows)])
    assert resident() - before > 30 * 1024  # it was asked for twice
    source.forget([(0, rows)])
    assert resident() - before < 4 * 1024
    with ThreadPoolExecutor(1) as pool:
        source.will_need([(0, rows)], pool)
        source.forget([(0, rows)])  # most of it before it is there
    assert resident() - before < 4 * 1024


class Slow(Pieces):
    """Pieces of others, that are got when they may `go`."""

    def __init__(self, others: Pieces) -> None:
        super().__init__(others.files, others.grid)
        self.others, self.together, self.asked = others, others.together, list[range]()
        self.getting, self.go = threading.Event(), threading.Event()

    def get(self, first: int, out: Sequence[np.ndarray]) -> None:
        self.asked.append(range(first, first + len(out)))
        self.getting.set()
        assert self.go.wait(60)
        self.others.get(first, out)

    def some(self, piece: int, local_B: np.ndarray) -> np.ndarray:
        return self.others.some(piece, local_B)


def slow(written: Written, way: str) -> tuple[KeptShards, Slow]:
    source = written.open(way)
    assert isinstance(source, KeptShards)
    pieces = Slow(source._pieces)
    return KeptShards(pieces), pieces


@pytest.mark.parametrize("way", IN_MEMORY)
def test_what_is_being_taken_stays_however_often_it_is_forgotten(made: dict[str, Written], way: str) -> None:
    written, rows_B = made[WAYS[way]], np.arange(CHUNK)
    source, pieces = slow(written, way)
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as consumer:
        source.will_need([(0, CHUNK)], pool)
        assert pieces.getting.wait(60)
        found = consumer.submit(taken, source, rows_B, written.rows_ND, pool)
        while not source._taken_X[0]:  # it has seen that the piece is on its way, and waits for it
            pass
        for _ in range(3):
            source.forget([(0, CHUNK)])
        source.will_need([(0, CHUNK)], pool)  # it is there: nobody writes where the other one reads
        source.forget([(0, CHUNK)])
        pieces.go.set()
        assert found.result(60) == written.rows_ND[rows_B].tobytes()


def test_neighbours_in_one_file_are_got_in_one_request_as_far_as_it_may_reach(made: dict[str, Written]) -> None:
    source, pieces = slow(made["raw"], "pread, half a chunk a piece")  # 12 pieces of 2 rows in a shard of 24
    pieces.together = 5
    with ThreadPoolExecutor(1) as pool:
        source.will_need([(7, 9)], pool)
        source.will_need([(0, ROWS), (0, ROWS)], pool)
        pieces.go.set()
    expected = [(3, 5), (0, 3), (5, 10), (10, 12), (12, 17), (17, 22), (22, 24), (24, 29), (29, 30)]
    assert [(one.start, one.stop) for one in pieces.asked] == expected


@pytest.mark.parametrize("ahead", [False, True])
def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error_that_names_it(
    tmp_path: Path, pool: ThreadPoolExecutor, ahead: bool
) -> None:
    written = write(FORMS["raw"], tmp_path)
    source, rows_B = written.open("pread"), np.arange(ROWS)
    assert taken(source, rows_B, written.rows_ND, pool) == written.rows_ND.tobytes()
    os.truncate(written.path(1), 100)
    if ahead:
        source.will_need([(0, ROWS)], pool)
    for _ in range(2):
        with pytest.raises(StoreDamagedError, match=shorter(written.path(1))):
            taken(source, rows_B, written.rows_ND, pool)
    assert taken(source, np.arange(SHARD), written.rows_ND, pool) == written.rows_ND[:SHARD].tobytes()


def shorter(path: Path) -> str:
    return rf"a file became shorter while it was read: {path}\. See harvest verify"


def test_a_read_that_gives_less_than_it_was_asked_for_goes_on(
    made: dict[str, Written], pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, written = os.preadv, made["raw"]
    monkeypatch.setattr(os, "preadv", lambda file, views, at: preadv(file, [views[0][:7]], at))
    for way in ("pread", "pread, half a chunk a piece"):
        source = written.open(way)
        source.will_need([(0, ROWS)], pool)
        assert taken(source, np.arange(ROWS), written.rows_ND, pool) == written.rows_ND.tobytes()


def test_more_pieces_are_got_at_once_than_one_call_of_the_system_fills(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    rows = 3000
    written = write(Raw(rows, 1, 4, "float16"), tmp_path, np.arange(4.0 * rows, dtype=np.float16).reshape(rows, 4))
    source = written.open("pread")
    source.will_need([(0, rows)], pool)
    assert taken(source, np.arange(rows), written.rows_ND, pool) == written.rows_ND.tobytes()


def test_of_a_piece_that_is_not_kept_only_the_rows_are_read(
    made: dict[str, Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    fill = File.fill

    def spied(self: File, parts: Sequence[np.ndarray], offset: int) -> None:
        read.append((offset // 12, sum(map(len, parts))))  # 12 bytes a row
        fill(self, parts, offset)

    monkeypatch.setattr(File, "fill", spied)
    pieces = RawPieces(made["raw"].files, Grid(SHARD, 8, 6, made["raw"].form.dtype))
    source, rows_B = KeptShards(pieces), np.array([1, 9, 12, 31])
    with ThreadPoolExecutor(1) as pool:
        assert taken(source, rows_B, made["raw"].rows_ND, pool) == made["raw"].rows_ND[rows_B].tobytes()
    assert read == [(1, 1), (9, 4), (7, 1)]  # row 31 is row 7 of the second file


def test_what_the_system_refuses_names_the_file(made: dict[str, Written], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(5, "Input/output error")

    source = made["raw"].open("pread")
    monkeypatch.setattr(os, "preadv", refuse)
    with ThreadPoolExecutor(1) as pool, pytest.raises(OSError, match="Input/output error") as error:
        taken(source, np.array([30]), made["raw"].rows_ND, pool)
    assert error.value.filename == str(made["raw"].path(1))


def test_a_network_disk_is_asked_by_more_threads_than_there_are_cores(made: dict[str, Written]) -> None:
    assert made["raw"].open("pread").threads >= 16
    assert made["raw"].open().threads == made["zstd"].open().threads == len(os.sched_getaffinity(0))

"""Whatever was asked for and forgotten, and by whatever threads, a shard gives the rows that were written."""

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import codec, files, layout
from shared.errors import StoreDamagedError
from shared.shard import Files, Form, Packed, PackedShards, Raw, Shards

ROWS, SHARD, CHUNK, WIDTH = 59, 24, 4, 6  # three shards; a ragged one, with a ragged chunk
FORMS: dict[str, Form] = {
    "raw": Raw(SHARD, CHUNK, WIDTH, "float16"),
    **{name: Packed(SHARD, CHUNK, WIDTH, "float16", codec.find(name)) for name in codec.CODECS},
    "bfloat16": Packed(SHARD, CHUNK, WIDTH, "bfloat16", codec.find("blosc")),
}


@dataclass(frozen=True)
class Written:
    form: Form
    folder: Path
    rows_ND: np.ndarray
    entries: list[dict[str, Any]]

    def path(self, shard: int) -> Path:
        return self.folder / str(shard)

    def open(self) -> Shards:
        return self.form.open(Files(len(self.rows_ND), self.path, lambda shard: self.entries[shard]["chunks"]))


def write(form: Form, folder: Path, rows_ND: np.ndarray | None = None) -> Written:
    bits = np.random.default_rng(0).integers(0, 2**16, (ROWS, form.width), dtype=np.uint16)
    rows_ND = bits.view(form.dtype) if rows_ND is None else rows_ND
    starts = range(0, len(rows_ND), form.shard_rows)
    entries = [form.write(folder / str(n), rows_ND[at : at + form.shard_rows]) for n, at in enumerate(starts)]
    return Written(form, folder, rows_ND, entries)


@pytest.fixture(scope="module", params=FORMS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(FORMS[request.param], tmp_path_factory.mktemp("shard"))


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as threads:
        yield threads


def taken(source: Shards, rows_B: np.ndarray, like: np.ndarray, pool: ThreadPoolExecutor) -> bytes:
    out_BD = np.empty((len(rows_B), like.shape[1]), like.dtype)
    source.take(rows_B, out_BD, pool)
    return out_BD.tobytes()


spans = st.lists(st.tuples(st.booleans(), st.integers(0, ROWS - 1), st.integers(1, ROWS)), max_size=8)


@given(spans, st.lists(st.integers(0, ROWS - 1), max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_are_what_was_written_whatever_was_asked_for_and_forgotten(
    written: Written, pool: ThreadPoolExecutor, asked: list[tuple[bool, int, int]], rows: list[int]
) -> None:
    source, rows_B = written.open(), np.array(sorted(rows), np.int64)
    for needed, start, length in asked:
        stop = min(start + length, ROWS)
        source.will_need([(start, stop)], pool) if needed else source.forget([(start, stop)])
        assert taken(source, rows_B, written.rows_ND, pool) == written.rows_ND[rows_B].tobytes()


def test_what_a_receipt_says_of_the_file_is_so(written: Written) -> None:
    slots, checksums = SHARD // CHUNK, []
    for shard, entry in enumerate(written.entries):
        data = written.path(shard).read_bytes()
        index = layout.parse_index(data[-layout.index_bytes(slots) :], slots)
        assert index is not None
        present = -(-len(written.rows_ND[shard * SHARD :][:SHARD]) // CHUNK)
        assert (index[present:] == layout.ABSENT).all()
        chunks = [data[offset : offset + length] for offset, length in index[:present].tolist()]
        crcs = [layout.crc32c([chunk]) for chunk in chunks]
        assert entry == {"size": len(data), "crc32c": layout.crc32c([data]), "chunks": crcs}
        assert b"".join(chunks) == data[: -layout.index_bytes(slots)]
        checksums += crcs
    assert len(set(checksums)) == len(checksums)  # no two chunks look alike to it


def test_threads_that_ask_take_and_forget_at_once_see_the_same_rows(written: Written) -> None:
    source, wrong = written.open(), list[bytes]()

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


def resident() -> int:
    """KiB of anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0])


@pytest.mark.parametrize("width", [1024, 1023])  # chunks of whole pages, and of others
def test_a_packed_chunk_takes_memory_from_its_first_asking_to_its_last_forgetting(tmp_path: Path, width: int) -> None:
    form, rows = Packed(64 * 128, 128, width, "float16", codec.find("zstd", 1)), 128 * 128
    made = write(form, tmp_path, np.zeros((rows, width), np.float16))  # 32 MiB, and next to nothing on the disk
    source, last = made.open(), np.array([rows - 1])
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
        source.forget([(0, rows)])  # most of it before it is decoded
    assert resident() - before < 4 * 1024


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", codec.CODECS)
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: flip(path, 3), r"rows 24 to 27: another checksum"),
        (lambda path: flip(path, -1), "its index: another checksum"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "its index: another checksum"),
        (lambda path: path.write_bytes(b""), "its index: another checksum"),
    ],
    ids=["a flipped bit", "its index", "cut short", "empty"],
)
def test_damage_is_one_error_that_names_the_file(
    tmp_path: Path, pool: ThreadPoolExecutor, name: str, ahead: bool, damage: Any, what: str
) -> None:
    made = write(FORMS[name], tmp_path)
    damage(made.path(1))
    source = made.open()
    if ahead:
        source.will_need([(0, ROWS)], pool)
    told = f"a packed shard cannot be read: {made.path(1)}, {what}. See harvest verify"
    for _ in range(2):
        with pytest.raises(StoreDamagedError, match=told):
            taken(source, np.array([0, 25, 58]), made.rows_ND, pool)
    assert taken(source, np.array([0, 58]), made.rows_ND, pool) == made.rows_ND[[0, 58]].tobytes()


@pytest.mark.parametrize("name", codec.CODECS)
def test_swapped_shards_are_noticed_by_their_checksums(tmp_path: Path, pool: ThreadPoolExecutor, name: str) -> None:
    made = write(FORMS[name], tmp_path)
    first = made.path(0).read_bytes()
    made.path(0).write_bytes(made.path(1).read_bytes())
    made.path(1).write_bytes(first)
    with pytest.raises(StoreDamagedError, match="rows 0 to 3: another checksum"):
        taken(made.open(), np.array([0]), made.rows_ND, pool)


def test_a_receipt_that_is_gone_is_said(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    made = write(FORMS["zstd"], tmp_path)
    source = made.form.open(Files(ROWS, made.path, lambda shard: files.read_json(tmp_path / "none")))
    with pytest.raises(StoreDamagedError, match="its receipt cannot be read"):
        taken(source, np.array([0]), made.rows_ND, pool)


def test_a_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "shard_index", lambda lengths, slots: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        FORMS["blosc"].write(tmp_path / "0", np.zeros((SHARD, WIDTH), np.float16))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", codec.CODECS)
def test_what_is_being_taken_stays_however_often_it_is_forgotten(tmp_path: Path, name: str) -> None:
    made = write(FORMS[name], tmp_path)
    source, rows_B, decoding, go = made.open(), np.arange(CHUNK), threading.Event(), threading.Event()
    assert isinstance(source, PackedShards)
    decode = source._decode

    def slow(chunk: int, rows_CD: np.ndarray) -> None:
        decoding.set()
        assert go.wait(60)
        decode(chunk, rows_CD)

    source._decode = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as consumer:
        source.will_need([(0, CHUNK)], pool)
        assert decoding.wait(60)
        found = consumer.submit(taken, source, rows_B, made.rows_ND, pool)
        while not source._taken_X[0]:  # it has seen that the chunk is on its way, and waits for it
            pass
        for _ in range(3):
            source.forget([(0, CHUNK)])
        source.will_need([(0, CHUNK)], pool)  # it is there: nobody writes where the other one reads
        source.forget([(0, CHUNK)])
        go.set()
        assert found.result(60) == made.rows_ND[rows_B].tobytes()


@pytest.mark.parametrize("opened", [False, True], ids=["before it is mapped", "behind"])
def test_a_file_that_becomes_shorter_is_an_error_and_not_the_end_of_the_process(tmp_path: Path, opened: bool) -> None:
    made = write(FORMS["raw"], tmp_path)
    source, rows_B = made.open(), np.arange(ROWS)
    with ThreadPoolExecutor(1) as one:
        if opened:
            assert taken(source, rows_B, made.rows_ND, one) == made.rows_ND.tobytes()
        os.truncate(made.path(1), 0)
        source.will_need([(0, ROWS)], one)
        one.submit(int).result()  # what was asked for before it has been done
        with pytest.raises(StoreDamagedError, match=rf"a file became shorter while it was read: {made.path(1)}\. "):
            taken(source, rows_B, made.rows_ND, one)

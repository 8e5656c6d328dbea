"""Maps of shard files: what is asked for is there, what is forgotten is given back, and a lost page is no crash."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shared.errors import StoreDamagedError
from shared.reading import LINUX
from shared.shard import Raw
from tests import memory
from tests.shards import FORMS, ROWS, taken, write


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as threads:
        yield threads


def test_mapped_rows_that_are_to_stay_stay(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    rows = 2**14
    written = write(Raw(rows, 128, 512, "float16"), tmp_path, np.zeros((rows, 512), np.float16))  # 16 MiB
    for stays in (False, True):
        source = written.open(stays=stays)
        taken(source, np.arange(rows), written.rows_ND, pool)
        source.forget([(0, rows)])
        assert (memory.mapped(str(tmp_path)) > 15 * 1024) == stays


@pytest.mark.parametrize("asked", [False, True], ids=["not asked for again", "asked for"])
@pytest.mark.parametrize("opened", [False, True], ids=["before it is mapped", "behind"])
def test_a_mapped_file_that_becomes_shorter_is_an_error_and_not_the_end_of_the_process(
    tmp_path: Path, opened: bool, asked: bool
) -> None:
    written = write(FORMS["raw"], tmp_path)
    source, rows_B = written.open(), np.arange(ROWS)
    with ThreadPoolExecutor(1) as one:
        if opened:
            assert taken(source, rows_B, written.rows_ND, one) == written.rows_ND.tobytes()
        os.truncate(written.path(1), 0)
        if asked:
            source.will_need([(0, ROWS)], one)
            one.submit(int).result()  # what was asked for before it has been done
        with pytest.raises(StoreDamagedError, match=f"a file became shorter while it was read: {written.path(1)}"):
            taken(source, rows_B, written.rows_ND, one)


def cached(path: Path) -> float:
    """The share of a file's pages that the system has in its cache (mincore(2))."""
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m,
    ):
        pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(m))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
        return sum(page & 1 for page in pages) / len(pages)


@pytest.mark.skipif(not LINUX, reason="other systems give no such advice")
@pytest.mark.parametrize("drops", [False, True])
def test_where_it_drops_what_is_forgotten_leaves_the_systems_cache_and_no_more_than_asked_for_is_read(
    tmp_path: Path, pool: ThreadPoolExecutor, drops: bool
) -> None:
    rows = 2**14
    written = write(Raw(rows, 128, 512, "float16"), tmp_path, np.zeros((rows, 512), np.float16))  # 16 MiB
    path = written.path(0)
    os.sync()
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(path) > 0.01:
        pytest.skip("this file system keeps what it is told to drop")
    source = written.open(drops=drops)
    quarter = [(start, start + 256) for start in range(0, rows, 1024)]
    with ThreadPoolExecutor(2) as reading:
        source.will_need(quarter, reading)
    assert 0.24 <= cached(path) < (0.3 if drops else 1.01)
    taken(source, np.concatenate([np.arange(*piece) for piece in quarter]), written.rows_ND, pool)
    source.forget(quarter)
    assert cached(path) < 0.02 if drops else cached(path) >= 0.24

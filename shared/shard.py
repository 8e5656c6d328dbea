"""The rows of one source in its shard files, raw or packed: the one place that knows how they lie there.

Letters: S rows of a shard, C rows of a chunk, B rows that are asked for, D width of the source.
"""

import ctypes
import errno
import math
import mmap
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from shared import codec, files, layout
from shared.codec import Codec, Packing
from shared.errors import StoreDamagedError
from shared.layout import crc32c, padded, raw
from shared.source import Source

LINUX = sys.platform == "linux"
THREADS = len(os.sched_getaffinity(0)) if LINUX else os.cpu_count() or 1  # encode or decode; codecs let go of the GIL
NO_RESERVE = 0x4000 if LINUX else 0  # MAP_NORESERVE: asking for space that is never written is not refused

POPULATE_READ = 22  # MADV_POPULATE_READ, which the mmap module has no name for

Piece = tuple[int, int]  # rows [start, stop)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Files:
    """The shard files of a source: where each is, and the crc32c of each chunk of one, as its receipt says."""

    rows: int  # of the store
    path: Callable[[int], Path]
    crcs: Callable[[int], Sequence[int]]


class Shards(ABC):
    """The rows of a source. Files are opened when they are first needed. Safe to use from several threads."""

    @abstractmethod
    def take(self, rows_B: np.ndarray, out_BD: np.ndarray, pool: Executor) -> None:
        """Fill `out_BD` with these rows, which ascend, as they were stored.

        Raises StoreDamagedError where a packed chunk cannot be read.
        """

    @abstractmethod
    def will_need(self, pieces: Sequence[Piece], pool: Executor) -> None:
        """Have these rows fetched, in the background; each time until the same rows are forgotten."""

    @abstractmethod
    def forget(self, pieces: Sequence[Piece]) -> None:
        """Give back the memory of rows that were asked for."""


class Form(ABC):
    """How the rows of a source lie in its shard files: chunks one after another, then their index."""

    codecs: Sequence[dict[str, Any]] = ()  # of a chunk, as zarr.json spells them
    versions: Mapping[str, str] = {}  # of what decides the bytes

    def __init__(self, shard_rows: int, chunk_rows: int, width: int, dtype: str) -> None:
        self.shard_rows, self.chunk_rows, self.slots = shard_rows, chunk_rows, shard_rows // chunk_rows
        self.width, self.dtype, self._fill = width, np.dtype(layout.DTYPES[dtype]), layout.NANS[dtype]

    @abstractmethod
    def open(self, found: Files) -> Shards: ...

    @abstractmethod
    def encode(self, rows_SD: np.ndarray) -> Iterator[bytes | memoryview]:
        """The chunks as they lie in the file, one after another."""

    def write(self, path: Path, rows_SD: np.ndarray) -> dict[str, Any]:
        """Write the file in one atomic step. Returns what its receipt says: size, crc32c, and that of every chunk."""
        lengths: list[int] = []
        crcs: list[int] = []

        def parts() -> Iterator[bytes | memoryview]:
            for chunk in self.encode(rows_SD):
                lengths.append(len(chunk))
                crcs.append(crc32c([chunk]))  # once, and while the write finds it in the processor's cache
                yield chunk
            index = layout.shard_index(lengths, self.slots)
            lengths.append(len(index))
            crcs.append(crc32c([index]))
            yield index

        files.write_atomic(path, parts())
        whole = layout.crc32c_joined(zip(crcs, lengths, strict=True))
        return {"size": sum(lengths), "crc32c": whole, "chunks": crcs[:-1]}

    def chunk(self, rows_SD: np.ndarray, start: int) -> np.ndarray:
        """C rows from `start` on, the last ones padded."""
        return padded(rows_SD[start : start + self.chunk_rows], self.chunk_rows, self._fill)


def form_of(source: Source, plan: Mapping[str, Any], packing: Packing | None) -> Form:
    """How the rows of `source` lie in a store of this plan. Raises ConfigError for a codec that is not installed."""
    if packing is None:
        return Raw(plan["shard_rows"], plan["chunk_rows"], source.width, plan["dtype"])
    found = codec.find(packing.name, packing.level)
    return Packed(plan["shard_rows"], packing.chunk_rows[source.name], source.width, plan["dtype"], found)


class Raw(Form):
    """Bytes as they are: a shard file is a matrix that can be mapped."""

    def open(self, found: Files) -> Shards:
        return RawShards(self, found)

    def encode(self, rows_SD: np.ndarray) -> Iterator[bytes | memoryview]:
        return (raw(self.chunk(rows_SD, start)) for start in range(0, len(rows_SD), self.chunk_rows))


class RawShards(Shards):
    """Memory maps; the kernel fetches and forgets.

    Pages that were asked for are in the map before their rows are taken, as a rule: so a page that is lost (the file is
    shorter than it was) is an error and not the end of the process, and no row waits for a page fault.
    """

    def __init__(self, form: Raw, found: Files) -> None:
        self._form, self._files = form, found
        self._maps: dict[int, np.ndarray] = {}  # two threads may map one shard: either map will do
        self._lost: StoreDamagedError | None = None

    def take(self, rows_B: np.ndarray, out_BD: np.ndarray, pool: Executor) -> None:
        if self._lost is not None:
            raise self._lost
        size, start = self._form.shard_rows, 0
        while start < len(rows_B):
            shard = int(rows_B[start]) // size
            stop = int(rows_B.searchsorted((shard + 1) * size))
            # The default mode, "raise", gathers into a temporary array first.
            self._map(shard).take(rows_B[start:stop] - shard * size, axis=0, out=out_BD[start:stop], mode="clip")
            start = stop

    def will_need(self, pieces: Sequence[Piece], pool: Executor) -> None:
        if pieces:
            pool.submit(self._fetch, pieces)

    def _fetch(self, pieces: Sequence[Piece]) -> None:
        for shard, rows_ND in self._parts(pieces):
            if not _fetched(rows_ND):
                self._lost = _shorter(self._files.path(shard))

    def forget(self, pieces: Sequence[Piece]) -> None:
        for _, rows_ND in self._parts(pieces):
            _madvise(rows_ND, mmap.MADV_DONTNEED)

    def _parts(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, np.ndarray]]:
        """(shard, its mapped rows) of pieces, one for every shard that they reach into."""
        size = self._form.shard_rows
        for start, stop in pieces:
            for shard in range(start // size, -(-stop // size)):
                yield shard, self._map(shard)[max(start - shard * size, 0) : stop - shard * size]

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            rows = min(self._form.shard_rows, self._files.rows - shard * self._form.shard_rows)
            try:
                mapped = np.memmap(self._files.path(shard), self._form.dtype, "r", shape=(rows, self._form.width))
            except ValueError:  # it was as long as it should be when the store was opened
                raise _shorter(self._files.path(shard)) from None
            self._maps[shard] = np.asarray(mapped)
        return self._maps[shard]


def _shorter(path: Path) -> StoreDamagedError:
    way_out = "See harvest verify; harvest repair makes what is damaged again"
    return StoreDamagedError("a file became shorter while it was read", path, way_out)


def _runs(of_B: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and stop of every run of equal numbers."""
    edges = [*np.flatnonzero(np.diff(of_B, prepend=-1)).tolist(), len(of_B)]
    return pairwise(edges)


def _fetched(rows_ND: np.ndarray) -> bool:
    """Read the pages of mapped rows and map them; false where one is behind the end of its file."""
    found = _madvise(rows_ND, POPULATE_READ) if LINUX else errno.EINVAL
    if found == errno.EINVAL:  # a kernel before 5.14: the reads are queued, and nothing is known
        _madvise(rows_ND, mmap.MADV_WILLNEED)
    return found != errno.EFAULT


def _madvise(rows_ND: np.ndarray, advice: int) -> int:
    """madvise(2) on the pages of mapped rows; 0 or errno. mmap.madvise would hold the GIL while the kernel reads."""
    address = rows_ND.ctypes.data
    start = address - address % mmap.PAGESIZE
    size = ctypes.c_size_t(address + rows_ND.nbytes - start)
    return ctypes.get_errno() if _libc.madvise(ctypes.c_void_p(start), size, advice) else 0


class Packed(Form):
    """Every chunk encoded by itself, so that a chunk is what is read at random."""

    def __init__(self, shard_rows: int, chunk_rows: int, width: int, dtype: str, codec: Codec) -> None:
        super().__init__(shard_rows, chunk_rows, width, dtype)
        self.codec, self.codecs, self.versions = codec, codec.zarr, codec.versions

    def open(self, found: Files) -> Shards:
        return PackedShards(self, found)

    def encode(self, rows_SD: np.ndarray) -> Iterator[bytes | memoryview]:
        flying: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(THREADS, "encode") as pool:
            for start in range(0, len(rows_SD), self.chunk_rows):
                flying.append(pool.submit(self._encode, rows_SD, start))
                if len(flying) > 2 * THREADS:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()

    def _encode(self, rows_SD: np.ndarray, start: int) -> bytes:
        return self.codec.encode(self.chunk(rows_SD, start))


class PackedShards(Shards):
    """Chunks that were asked for are decoded in the background and kept until forgotten; others live for one `take`.

    Each is checked first. (Zarr's own crc32c codec would stand in the file, and make the crc32c of all files alike.)
    """

    def __init__(self, form: Packed, found: Files) -> None:
        self._form = form
        self._files = found
        self._opened: dict[int, _Opened] = {}  # two threads may open one shard: either will do
        row_bytes = form.width * form.dtype.itemsize
        whole_pages = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, row_bytes)  # the fewest rows that fill them
        self._stride = -(-form.chunk_rows // whole_pages) * whole_pages  # rows from chunk to chunk in `_kept_ND`
        chunks = -(-found.rows // form.chunk_rows)
        self._kept_ND = _space(chunks * self._stride, form.width, form.dtype)
        self._asked_X = np.zeros(chunks, np.int32)  # will_need less forget
        self._taken_X = np.zeros(chunks, np.int32)  # by every `take` that runs: what it reads stays, whoever forgets it
        self._pending: dict[int, Future[None]] = {}  # chunks that are being decoded, or could not be
        self._lock = threading.Lock()

    def take(self, rows_B: np.ndarray, out_BD: np.ndarray, pool: Executor) -> None:
        chunk_B, local_B = np.divmod(rows_B, self._form.chunk_rows)
        at_B = chunk_B * self._stride + local_B
        with self._lock:
            kept_B = self._asked_X[chunk_B] > 0
            kept_X = np.unique(chunk_B[kept_B])
            self._taken_X[kept_X] += 1
            waiting = [self._pending[chunk] for chunk in kept_X.tolist() if chunk in self._pending]
        try:
            waiting += self._take_others(np.flatnonzero(~kept_B), chunk_B, local_B, out_BD, pool)
            for one in waiting:
                one.result()
            if kept_B.all():
                np.take(self._kept_ND, at_B, axis=0, out=out_BD, mode="clip")
            else:
                out_BD[kept_B] = self._kept_ND[at_B[kept_B]]
        finally:
            with self._lock:
                self._taken_X[kept_X] -= 1
                self._tidy(kept_X.tolist())

    def _take_others(
        self, at: np.ndarray, chunk_B: np.ndarray, local_B: np.ndarray, out_BD: np.ndarray, pool: Executor
    ) -> list[Future[None]]:
        """Decode chunks that nobody has asked for, for their rows alone."""

        def once(at: np.ndarray) -> None:
            rows_CD = np.empty((self._form.chunk_rows, self._form.width), self._form.dtype)
            self._decode(int(chunk_B[at[0]]), rows_CD)
            out_BD[at] = rows_CD[local_B[at]]

        return [pool.submit(once, at[start:stop]) for start, stop in _runs(chunk_B[at])]

    def will_need(self, pieces: Sequence[Piece], pool: Executor) -> None:
        for chunk in self._chunks(pieces):
            with self._lock:
                if self._asked_X[chunk] + self._taken_X[chunk] == 0 and chunk not in self._pending:
                    self._pending[chunk] = pool.submit(self._fetch, chunk)
                self._asked_X[chunk] += 1

    def forget(self, pieces: Sequence[Piece]) -> None:
        with self._lock:
            for chunk in self._chunks(pieces):
                if self._asked_X[chunk] > 0:
                    self._asked_X[chunk] -= 1
                    self._tidy([chunk])

    def _chunks(self, pieces: Sequence[Piece]) -> Iterator[int]:
        for start, stop in pieces:
            yield from range(start // self._form.chunk_rows, -(-stop // self._form.chunk_rows))

    def _fetch(self, chunk: int) -> None:
        self._decode(chunk, self._kept_ND[chunk * self._stride :][: self._form.chunk_rows])
        with self._lock:
            del self._pending[chunk]
            self._tidy([chunk])  # it may have been forgotten meanwhile

    def _tidy(self, chunks: Iterable[int]) -> None:
        """Drop those of these chunks that nobody wants. Called with the lock held."""
        for chunk in chunks:
            if self._asked_X[chunk] + self._taken_X[chunk] == 0 and chunk not in self._pending:
                self._drop(chunk)

    def _drop(self, chunk: int) -> None:
        _madvise(self._kept_ND[chunk * self._stride :][: self._stride], mmap.MADV_DONTNEED)

    def _decode(self, chunk: int, rows_CD: np.ndarray) -> None:
        shard, slot = divmod(chunk, self._form.slots)
        opened = self._open(shard)
        data = opened.read(*opened.index[slot].tolist())
        try:
            if crc32c([data]) != opened.crcs[slot]:
                raise ValueError("another checksum")
            self._form.codec.decode(data, rows_CD)
        except (ValueError, IndexError) as error:
            first = chunk * self._form.chunk_rows
            rows = range(first, min(first + self._form.chunk_rows, self._files.rows))
            raise _damaged(opened.path, f"rows {rows[0]} to {rows[-1]}: {error}") from None

    def _open(self, shard: int) -> "_Opened":
        if shard not in self._opened:
            path = self._files.path(shard)
            try:
                crcs = np.array(self._files.crcs(shard), np.uint32)
            except (OSError, ValueError, KeyError, TypeError, OverflowError):
                raise _damaged(path, "its receipt cannot be read") from None
            self._opened[shard] = _Opened(path, self._form.slots, crcs)
        return self._opened[shard]


class _Opened:
    """A shard file with offset and length of its chunks, and their checksums."""

    def __init__(self, path: Path, slots: int, crcs: np.ndarray) -> None:
        self.path, self.crcs = path, crcs
        self._file = path.open("rb", buffering=0)
        end = os.fstat(self._file.fileno()).st_size
        size = layout.index_bytes(slots)
        index = layout.parse_index(self.read(max(0, end - size), size), slots)
        if index is None:
            raise _damaged(path, "its index: another checksum")
        self.index = index.clip(max=end)  # what is absent stands beyond all files

    def read(self, offset: int, length: int) -> bytes:
        """By pread, which lets go of the GIL and needs no position."""
        return os.pread(self._file.fileno(), length, offset)


def _damaged(path: Path, what: str) -> StoreDamagedError:
    way_out = "See harvest verify --full; harvest repair makes what is damaged again"
    return StoreDamagedError("a packed shard cannot be read", f"{path}, {what}", way_out)


def _space(rows: int, width: int, dtype: np.dtype) -> np.ndarray:
    """Rows that take memory once they are written, and until they are dropped.

    A place for every chunk, on pages of its own, in one matrix: so a batch is gathered in one call without the GIL.
    """
    size = rows * width * dtype.itemsize
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    if LINUX:
        pages.madvise(mmap.MADV_NOHUGEPAGE)  # else a chunk would take 2 MiB and more
    return np.frombuffer(pages, dtype).reshape(rows, width)

"""The rows of one source from its shard files: how they are asked for, and pieces that are kept in memory.

Letters: S rows of a shard, C rows of a piece, X pieces of the store, B rows that are asked for, D width of the source.
"""

import ctypes
import math
import mmap
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from shared.errors import StoreDamagedError

LINUX = sys.platform == "linux"
THREADS = len(os.sched_getaffinity(0)) if LINUX else os.cpu_count() or 1  # encode or decode; codecs let go of the GIL
MOST_VIEWS = os.sysconf("SC_IOV_MAX")  # that one preadv fills
NO_RESERVE = 0x4000 if LINUX else 0  # MAP_NORESERVE: asking for space that is never written is not refused


IO = Literal["map", "pread"]
Piece = tuple[int, int]  # rows [start, stop)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Files:
    """The shard files of a source: where each is, and the crc32c of each chunk of one, as its receipt says."""

    rows: int  # of the store
    path: Callable[[int], Path]
    crcs: Callable[[int], Sequence[int]]


@dataclass(frozen=True)
class Access:
    """How rows are read."""

    io: IO = "map"  # of raw shards: memory maps, or large reads into memory of our own
    stays: bool = False  # what was fetched stays in memory, and is not forgotten
    drops: bool = False  # of maps: what is forgotten leaves the system's cache, and no more than was asked for is read


MAPPED = Access()


@dataclass(frozen=True)
class Grid:
    """How the rows of a source are divided: into files of `shard_rows`, and these into pieces of `piece_rows`."""

    shard_rows: int
    piece_rows: int
    width: int
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def slots(self) -> int:
        """Pieces of a shard."""
        return self.shard_rows // self.piece_rows

    def pieces(self, start: int, stop: int) -> range:
        """The pieces that rows [start, stop) reach into."""
        return range(start // self.piece_rows, -(-stop // self.piece_rows))

    def slice(self, start: int, stop: int) -> slice:
        """The same, of an array with an item per piece."""
        return slice(start // self.piece_rows, -(-stop // self.piece_rows))


class Shards(ABC):
    """The rows of a source. Files are opened when they are first needed. Safe to use from several threads."""

    threads: int = THREADS  # of an executor that serves it well
    owns: bool = False  # whether rows lie in memory of the process's own, which the system cannot take back

    @abstractmethod
    def take(self, rows_B: np.ndarray, out_BD: np.ndarray, pool: Executor) -> None:
        """Fill `out_BD` with these rows, which ascend and were just checked, as they were stored.

        Raises StoreDamagedError where what is read for it only now is cut short, or cannot be decoded.
        """

    @abstractmethod
    def check(self, rows_B: np.ndarray) -> None:
        """Raise StoreDamagedError where a file of these rows, which ascend, is shorter than it was."""

    @abstractmethod
    def will_need(self, pieces: Sequence[Piece], pool: Executor) -> None:
        """Have these rows fetched, in the background; each time until the same rows are forgotten."""

    @abstractmethod
    def forget(self, pieces: Sequence[Piece]) -> None:
        """Give back the memory of rows that were asked for, unless it is to stay."""


def madvise(rows_ND: np.ndarray, advice: int, inside: bool = False) -> int:
    """madvise(2) on all pages of mapped rows, or those wholly `inside` of them; 0 or errno.

    mmap.madvise would hold the GIL while the kernel reads.
    """
    start, stop = rows_ND.ctypes.data, rows_ND.ctypes.data + rows_ND.nbytes
    first = (-(-start // mmap.PAGESIZE) if inside else start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = stop // mmap.PAGESIZE * mmap.PAGESIZE if inside else stop
    if last <= first:
        return 0
    return ctypes.get_errno() if _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice) else 0


def runs(of_B: np.ndarray, of: bool | None = None) -> Iterator[tuple[int, int]]:
    """Start and stop of every run of equal values: of all, or of this one."""
    edges = [0, *(np.flatnonzero(of_B[1:] != of_B[:-1]) + 1).tolist(), len(of_B)]
    return ((start, stop) for start, stop in pairwise(edges) if start < stop and (of is None or of_B[start] == of))


# --- pieces in memory ------------------------------------------------------------------------------------------------


class Pieces(ABC):
    """How the pieces of a source are got from its files. `together`: so many, of one file, are got in one request."""

    together: int = 1
    threads: int = THREADS  # that get pieces at once

    def __init__(self, found: Files, grid: Grid) -> None:
        self.files, self.grid = found, grid

    @abstractmethod
    def get(self, first: int, out: Sequence[np.ndarray]) -> None:
        """Fill each of `out`, [C, D], with a piece: number `first` and those behind it, of one file."""

    @abstractmethod
    def some(self, piece: int, local_B: np.ndarray) -> np.ndarray:
        """These rows of a piece, which ascend, [B, D]: of a piece that is not to be kept."""


class KeptShards(Shards):
    """Pieces that were asked for are got in the background and kept until forgotten; others live for one `take`.

    asked_X x (will_need - forget) + takes that read it now > 0: the piece is in memory, or on its way

    So what is in memory is what was asked for and not forgotten, whole pieces of it, and no more: of the rows that a
    Loader serves at most two windows (its docstring says what).
    """

    owns = True

    def __init__(self, pieces: Pieces, stays: bool = False) -> None:
        self._pieces, self._grid, self._stays, self.threads = pieces, pieces.grid, stays, pieces.threads
        whole_pages = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, self._grid.row_bytes)  # the fewest rows that fill them
        self._stride = -(-self._grid.piece_rows // whole_pages) * whole_pages  # rows from piece to piece in `_kept_ND`
        count = self._grid.pieces(0, pieces.files.rows).stop
        self._kept_ND = _space(count * self._stride, self._grid.width, self._grid.dtype)
        self._asked_X = np.zeros(count, np.int32)  # will_need less forget
        self._taken_X = np.zeros(count, np.int32)  # by every `take` that runs: what it reads stays, whoever forgets it
        self._pending: dict[int, Future[None]] = {}  # pieces that are being got, or could not be
        self._lock = threading.Lock()

    def check(self, rows_B: np.ndarray) -> None:
        """Nothing: what is short is found where it is read."""

    def take(self, rows_B: np.ndarray, out_BD: np.ndarray, pool: Executor) -> None:
        piece_B, local_B = np.divmod(rows_B, self._grid.piece_rows)
        at_B = piece_B * self._stride + local_B
        with self._lock:
            kept_B = self._asked_X[piece_B] > 0
            kept_X = np.unique(piece_B[kept_B])
            self._taken_X[kept_X] += 1
            waiting = [self._pending[piece] for piece in kept_X.tolist() if piece in self._pending]
        try:
            waiting += self._take_others(np.flatnonzero(~kept_B), piece_B, local_B, out_BD, pool)
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
        self, at: np.ndarray, piece_B: np.ndarray, local_B: np.ndarray, out_BD: np.ndarray, pool: Executor
    ) -> list[Future[None]]:
        """Get rows of pieces that nobody has asked for."""

        def once(at: np.ndarray) -> None:
            out_BD[at] = self._pieces.some(int(piece_B[at[0]]), local_B[at])

        return [pool.submit(once, at[start:stop]) for start, stop in runs(piece_B[at])]

    def will_need(self, pieces: Sequence[Piece], pool: Executor) -> None:
        for start, stop in pieces:
            with self._lock:
                lacking = [piece for piece in self._grid.pieces(start, stop) if self._unwanted(piece)]
                self._asked_X[self._grid.slice(start, stop)] += 1
                for request in self._requests(lacking):
                    self._pending |= dict.fromkeys(request, pool.submit(self._fetch, request))

    def _requests(self, pieces: Sequence[int]) -> Iterator[range]:
        """Runs of neighbours in one file, none longer than what is got together."""
        start = 0
        for stop in range(1, len(pieces) + 1):
            first, last = pieces[start], pieces[stop - 1]
            ends = stop == len(pieces) or pieces[stop] != last + 1 or not pieces[stop] % self._grid.slots
            if ends or stop - start == self._pieces.together:
                yield range(first, last + 1)
                start = stop

    def forget(self, pieces: Sequence[Piece]) -> None:
        with self._lock:
            for start, stop in [] if self._stays else pieces:
                for piece in self._grid.pieces(start, stop):
                    if self._asked_X[piece] > 0:
                        self._asked_X[piece] -= 1
                        self._tidy([piece])

    def _fetch(self, pieces: range) -> None:
        self._pieces.get(pieces[0], [self._place(piece)[: self._grid.piece_rows] for piece in pieces])
        with self._lock:
            for piece in pieces:
                del self._pending[piece]
            self._tidy(pieces)  # they may have been forgotten meanwhile

    def _tidy(self, pieces: Iterable[int]) -> None:
        """Drop those of these pieces that nobody wants. Called with the lock held, as is the next one."""
        for piece in pieces:
            if self._unwanted(piece):
                madvise(self._place(piece), mmap.MADV_DONTNEED)

    def _unwanted(self, piece: int) -> bool:
        return self._asked_X[piece] + self._taken_X[piece] == 0 and piece not in self._pending

    def _place(self, piece: int) -> np.ndarray:
        return self._kept_ND[piece * self._stride :][: self._stride]


def _space(rows: int, width: int, dtype: np.dtype) -> np.ndarray:
    """Rows that take memory once they are written, and until they are dropped.

    A place for every piece, on pages of its own, in one matrix: so a batch is gathered in one call without the GIL.
    """
    size = rows * width * dtype.itemsize
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    if LINUX:
        pages.madvise(mmap.MADV_NOHUGEPAGE)  # else a piece would take 2 MiB and more
    return np.frombuffer(pages, dtype).reshape(rows, width)


# --- files -----------------------------------------------------------------------------------------------------------


class File:
    """An open file. pread and preadv let go of the GIL and need no position; an error of theirs names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, length: int) -> bytes:
        """What there is of these bytes."""
        with _named(self.path):
            return os.pread(self._file.fileno(), length, offset)

    def fill(self, parts: Sequence[np.ndarray], offset: int) -> None:
        """Fill arrays, one after another, from `offset` on. Raises StoreDamagedError where the file ends before."""
        views = [part.reshape(-1).view(np.uint8).data for part in parts]
        while views:
            with _named(self.path):
                count = os.preadv(self._file.fileno(), views[:MOST_VIEWS], offset)
            if not count:
                raise shorter(self.path)
            offset += count
            while views and count >= len(views[0]):  # a read may give less than it was asked for
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What the system refuses of an open file does not say which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def shorter(path: Path) -> StoreDamagedError:
    way_out = "See harvest verify; harvest repair makes what is damaged again"
    return StoreDamagedError("a file became shorter while it was read", path, way_out)

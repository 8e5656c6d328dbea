"""Rows from memory maps of raw shard files.

Letters: B rows that are asked for, D width of the source, X pieces of the source.
"""

import errno
import io
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

import numpy as np

from shared.errors import StoreDamagedError
from shared.reading import LINUX, Access, Files, Grid, Piece, Shards, madvise, runs, shorter

WILL_NEED, NOT_NEEDED = (os.POSIX_FADV_WILLNEED, os.POSIX_FADV_DONTNEED) if LINUX else (0, 0)
POPULATE_READ = 22  # MADV_POPULATE_READ, which the mmap module has no name for
FOLIO, FAULT_AROUND = 2**21, 2**16  # bytes that Linux maps at most where one page of them was to be mapped


class MappedShards(Shards):
    """Memory maps; the kernel fetches and forgets.

    Pages that were asked for are in the map before their rows are taken, as a rule, so that no row waits for a page
    fault. A file that is shorter than it was is an error, and ends the process only where it is cut in the milliseconds
    in which its rows are taken (from `pread` never).

    Of the pages that were fetched those stay in the map that hold pieces which were asked for and not forgotten. The
    kernel maps more, whole folios of up to 2 MiB (from Linux 6.18 on, in small pages, too): they are let go at once.

    Where `access` drops, what is forgotten leaves the system's cache, too, unless another process maps it: with little
    memory the kernel takes the window that is open instead (measured: 12 MB/s, and 700 MB/s so).
    """

    def __init__(self, found: Files, grid: Grid, access: Access) -> None:
        self._files, self._grid = found, grid
        self._stays, self._drops = access.stays, access.drops and not access.stays
        self._around = -(-(FOLIO + FAULT_AROUND) // grid.row_bytes)  # rows that may have been mapped beside others
        self._asked_X = np.zeros(grid.pieces(0, found.rows).stop, np.int32)  # will_need less forget
        self._lock = threading.Lock()
        self._maps: dict[int, np.ndarray] = {}
        self._opened: dict[int, io.FileIO] = {}
        self._lost: StoreDamagedError | None = None

    def check(self, rows_B: np.ndarray) -> None:
        if self._lost is not None:
            raise self._lost
        for shard, _ in self._shares(rows_B):
            rows_ND = self._map(shard)
            if os.fstat(self._opened[shard].fileno()).st_size < rows_ND.nbytes:  # to touch its pages ends the process
                raise shorter(self._files.path(shard))

    def take(self, rows_B: np.ndarray, out_BD: np.ndarray, pool: Executor) -> None:
        for shard, here in self._shares(rows_B):
            local_B = rows_B[here] - shard * self._grid.shard_rows
            # The default mode, "raise", gathers into a temporary array first.
            self._map(shard).take(local_B, axis=0, out=out_BD[here], mode="clip")

    def _shares(self, rows_B: np.ndarray) -> Iterator[tuple[int, slice]]:
        """Each shard that has some of these rows, and which these are."""
        size, start = self._grid.shard_rows, 0
        while start < len(rows_B):
            shard = int(rows_B[start]) // size
            stop = int(rows_B.searchsorted((shard + 1) * size))
            yield shard, slice(start, stop)
            start = stop

    def will_need(self, pieces: Sequence[Piece], pool: Executor) -> None:
        with self._lock:
            for start, stop in pieces:
                self._asked_X[self._grid.slice(start, stop)] += 1
        if pieces:
            pool.submit(self._fetch, pieces)

    def _fetch(self, pieces: Sequence[Piece]) -> None:
        for start, stop in pieces:
            self._advise(start, stop, WILL_NEED)  # all of them at once, so that the disk has them side by side
        for start, stop in pieces:
            for shard, rows_ND in self._parts(start, stop):
                if not _fetched(rows_ND):
                    self._lost = shorter(self._files.path(shard))
            self._unmap(start, stop)

    def forget(self, pieces: Sequence[Piece]) -> None:
        for start, stop in pieces:
            with self._lock:
                asked_X = self._asked_X[self._grid.slice(start, stop)]
                asked_X -= asked_X > 0
            self._unmap(start, stop)
            if self._drops:
                self._advise(start, stop, NOT_NEEDED)

    def _unmap(self, start: int, stop: int) -> None:
        """Let go of the pages in and around these rows that hold no piece that is asked for."""
        if self._stays:
            return
        near = self._grid.pieces(max(start - self._around, 0), min(stop + self._around, self._files.rows))
        with self._lock:  # else what is asked for meanwhile could be fetched, and then let go
            for first, last in runs(self._asked_X[near.start : near.stop] > 0, of=False):
                rows = (near[first] * self._grid.piece_rows, near[last - 1] * self._grid.piece_rows)
                start, stop = rows[0], min(rows[1] + self._grid.piece_rows, self._files.rows)
                for _, rows_ND in self._parts(start, stop):
                    madvise(rows_ND, mmap.MADV_DONTNEED, inside=True)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(shard, its mapped rows) of these rows, one for every shard that they reach into."""
        size = self._grid.shard_rows
        for shard in range(start // size, -(-stop // size)):
            yield shard, self._map(shard)[max(start - shard * size, 0) : stop - shard * size]

    def _advise(self, start: int, stop: int, advice: int) -> None:
        """Have the system read these rows, no more and no less, or drop them where no other process maps them."""
        for shard, rows_ND in self._parts(start, stop) if LINUX else ():
            offset = rows_ND.ctypes.data - self._map(shard).ctypes.data
            os.posix_fadvise(self._opened[shard].fileno(), offset, rows_ND.nbytes, advice)

    def _map(self, shard: int) -> np.ndarray:
        if (found := self._maps.get(shard)) is not None:
            return found
        return self._maps.setdefault(shard, self._new_map(shard))  # of two threads that make one, both use the first

    def _new_map(self, shard: int) -> np.ndarray:
        rows = min(self._grid.shard_rows, self._files.rows - shard * self._grid.shard_rows)
        file = self._opened.setdefault(shard, self._files.path(shard).open("rb", buffering=0))
        try:
            mapped = np.memmap(file, self._grid.dtype, "r", shape=(rows, self._grid.width))
        except ValueError:  # it was as long as it should be when the store was opened
            raise shorter(self._files.path(shard)) from None
        if LINUX and not self._stays:
            madvise(mapped, mmap.MADV_NOHUGEPAGE)  # a huge page is let go as a whole
        if LINUX and self._drops:
            madvise(mapped, mmap.MADV_RANDOM)  # else a row brings 2 MiB along, which push out what was asked for
        return np.asarray(mapped)


def _fetched(rows_ND: np.ndarray) -> bool:
    """Read the pages of mapped rows and map them; false where one is behind the end of its file."""
    found = madvise(rows_ND, POPULATE_READ) if LINUX else errno.EINVAL
    if found == errno.EINVAL:  # a kernel before 5.14: the reads are queued, and nothing is known
        madvise(rows_ND, mmap.MADV_WILLNEED)
    return found != errno.EFAULT

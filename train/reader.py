"""Rows of a store from its shards.

Letters: B rows of a batch, D width of a source.
"""

import resource
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from torch import Tensor

from shared import layout
from shared.errors import StoreDamagedError, StoreError
from shared.reading import Piece
from shared.view import View
from train.sources import Sources

CHECKED = 4096  # rows at once in a search
SPARE_FILES = 256  # descriptors left to the rest of the process


class Reader:
    """Rows of some sources of a store, from what threads of its own fetch ahead.

    map    raw shards are memory maps, whose pages are filled; the kernel keeps and drops them
    pread  raw shards are read into memory of its own, in pieces of 256 KiB or more and up to 4 MiB at once
    A packed store is decoded into memory of its own either way.

    In memory is what was asked for and not forgotten, and where it is to stay nothing is forgotten. Safe to use from
    several threads.

    Stored values are served as they lie on the disk (`dtype`; numbers by layout.floats): multiply by
    `store.factor(source)` for the model's own units.
    """

    def __init__(self, store: View, sources: Iterable[str]) -> None:
        self.store = store
        self.widths = {name: store.source(name).width for name in sources}
        self.dtype = np.dtype(layout.DTYPES[store.header.plan["dtype"]])
        _allow_files(2 * len(self.widths) * store.shards)  # a map has a descriptor of its own
        self._sources = {name: store.activations(name, store.access) for name in self.widths}
        threads = max((source.threads for source in self._sources.values()), default=1)
        self._pool = ThreadPoolExecutor(threads, "granary-fetch")

    def gather(self, rows_B: np.ndarray, out: Mapping[str, np.ndarray]) -> None:
        """Fill `out` {source: [B, width]} with these rows. Where they ascend, a file is read from front to back.

        Raises StoreDamagedError where a file is shorter than it was, or a packed chunk cannot be read.
        """
        for _ in self.pieces(rows_B, out):
            pass

    def pieces(self, rows_B: np.ndarray, buffers: Mapping[str, np.ndarray]) -> Iterator[tuple[str, slice]]:
        """Gather these rows, one source after another, as many at once as its buffer, [any, width], has room for.

        Yields (source, which of the rows lie in its buffer now, from its beginning on). Errors as `gather`.
        """
        edges = [0, *(np.flatnonzero(rows_B[1:] < rows_B[:-1]) + 1).tolist(), len(rows_B)]
        ascending = list(pairwise(edges))
        for name, buffer_BD in buffers.items():
            for start, stop in ascending:
                self._sources[name].check(rows_B[start:stop])
            for first in range(0, len(rows_B), max(len(buffer_BD), 1)):
                last = min(first + len(buffer_BD), len(rows_B))
                for start, stop in ((max(start, first), min(stop, last)) for start, stop in ascending):
                    if start < stop:
                        out_BD = buffer_BD[start - first : stop - first]
                        self._sources[name].take(rows_B[start:stop], out_BD, self._pool)
                yield name, slice(first, last)

    def stream(self, rows: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """(rows_B, {source: [B, width]}) of these ascending rows, batch after batch in file order."""
        for start in range(0, len(rows), batch):
            rows_B = rows[start : start + batch]
            x = {name: np.empty((len(rows_B), width), self.dtype) for name, width in self.widths.items()}
            self.gather(rows_B, x)
            yield rows_B, x
            self.forget(rows_B[:1], int(rows_B[-1] - rows_B[0]) + 1)

    def will_need(self, starts: np.ndarray, length: int | np.ndarray) -> None:
        """Have the `length` rows (one for all, or one each) from each of `starts` fetched, and return before they are.

        What is not mapped is kept until it was forgotten as many times as it was asked for.
        """
        for source in self._sources.values():
            source.will_need(self._pieces(starts, length), self._pool)

    def forget(self, starts: np.ndarray, length: int | np.ndarray) -> None:
        """Give back the memory of the `length` rows from each of `starts` (shared.reading.Access says whose)."""
        for source in self._sources.values():
            source.forget(self._pieces(starts, length))

    def _pieces(self, starts: np.ndarray, length: int | np.ndarray) -> list[Piece]:
        stops = np.minimum(starts + length, self.store.rows)
        return list(zip(starts.tolist(), stops.tolist(), strict=True))

    def close(self) -> None:
        """Stop the threads and drop the shards; each is closed with its last reference."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._sources = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read(store: View, names: Iterable[str], rows: np.ndarray, batch: int) -> Iterator[dict[str, Tensor]]:
    """These ascending rows as a run is given them, {source: float32 [batch, width]}, in file order, on the CPU."""
    sources = Sources(store, names)
    with Reader(store, sources.stored) as reader:
        for _, stored in reader.stream(rows, batch):
            yield sources.rows({part: layout.floats(x_BD) for part, x_BD in stored.items()})


def require_finite(store: View, source: str, rows: np.ndarray) -> None:
    """Raises StoreDamagedError, with the first of these ascending rows that holds a value that is not finite."""
    with Reader(store, [source]) as reader:
        for rows_B, x in reader.stream(rows, CHECKED):
            finite_B = layout.floats(x[source]).isfinite().all(1).numpy()
            if not finite_B.all():
                way_out = "See harvest verify --full; rows.documents can leave its document out"
                row = f"row {rows_B[~finite_B][0]:,}"
                raise StoreDamagedError(f"{source} holds values that are not finite", row, way_out)


def _allow_files(shards: int) -> None:
    """Raise the limit of open files for so many shards, each of which holds a descriptor. Raises StoreError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + SPARE_FILES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise StoreError(
            "too few open files allowed for this store", f"{hard} of {needed}", f"Allow more (ulimit -Hn {needed})"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))

"""Rows of a store from its memory maps, and the filter that says which rows a run keeps.

Letters: N rows of the store, B rows of a batch, D width of a source, n documents.
"""

import ctypes
import mmap
import resource
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from shared import config, layout
from shared.errors import StoreError
from shared.store import FIRST, MASKED, SINK, SPECIAL, TRAIN, Store

RULES = ("special", "first", "sink")  # what the default filter drops beside masked rows and the other split
SPARE_FILES = 256  # descriptors left to the rest of the process

_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Kept:
    """The rows that pass a filter, and how many rows each rule dropped.

    A row counts under the first rule that drops it, so kept + dropped = all.
    """

    kept_N: np.ndarray  # bool
    dropped: dict[str, int]


def kept_rows(store: Store, sources: Iterable[str], split: int = TRAIN, drop: Collection[str] = RULES) -> Kept:
    """The rows of documents of `split` that no rule of `drop` drops for any of `sources` or their models.

    Masked rows are always dropped. Raises ConfigError for an unknown rule, StoreError for an unknown source.
    """
    for rule in drop:
        if rule not in RULES:
            raise config.unknown("unknown rule of the row filter", rule, RULES)
    names = list(sources)
    models = sorted({store.source(name).model for name in names})
    other_split_n = store.column("documents/split") != split
    other = "held_out" if split == TRAIN else "training"
    kept_N, dropped = np.empty(store.rows, bool), dict.fromkeys((other, "masked", *drop), 0)
    for shard in range(store.shards):
        hits = _hits(store, names, models, shard) | {other: other_split_n[store.map("rows/document", shard)]}
        keep_S = np.ones(len(store.rows_of(shard)), bool)
        for rule in dropped:
            dropped[rule] += int(np.count_nonzero(keep_S & hits[rule]))
            keep_S &= ~hits[rule]
        kept_N[shard * store.shard_rows :][: len(keep_S)] = keep_S
    return Kept(kept_N, dropped)


def _hits(store: Store, sources: list[str], models: list[str], shard: int) -> dict[str, np.ndarray]:
    """Which rows of a shard each rule of flags and faults drops."""
    flags_S = np.bitwise_or.reduce([store.map(f"rows/{model}/flags", shard) for model in models])
    faults_S = np.bitwise_or.reduce([store.map(f"faults/{name}", shard) for name in sources])
    return {
        "masked": faults_S & MASKED != 0,
        "special": flags_S & SPECIAL != 0,
        "first": flags_S & FIRST != 0,
        "sink": faults_S & SINK != 0,
    }


class Reader:
    """Rows of some sources of a store, straight from its memory maps. Safe to use from several threads.

    Stored values are served as they lie on the disk (`dtype`; numbers by layout.floats): multiply by
    `store.factor(source)` for the model's own units.
    """

    def __init__(self, store: Store, sources: Iterable[str]) -> None:
        self.store = store
        self.widths = {name: store.source(name).width for name in sources}
        self.dtype = np.dtype(layout.DTYPES[store.header.plan["dtype"]])
        _allow_files(len(self.widths) * store.shards)
        self._maps = {name: _open(store, name) for name in self.widths}
        self._ends = np.arange(1, store.shards + 1) * store.shard_rows

    def gather(self, rows_B: np.ndarray, out: Mapping[str, np.ndarray]) -> np.ndarray:
        """Fill `out` {source: [B, width]} with these rows, in file order. Returns the rows in that order."""
        rows_B = np.sort(rows_B)
        assert not len(rows_B) or (rows_B[0] >= 0 and rows_B[-1] < self.store.rows)
        stops = np.searchsorted(rows_B, self._ends)
        counts = np.diff(stops, prepend=0)
        for shard in np.flatnonzero(counts).tolist():
            part = slice(stops[shard] - counts[shard], stops[shard])
            local = rows_B[part] - shard * self.store.shard_rows
            for name, out_BD in out.items():
                # The default mode, "raise", gathers into a temporary array first.
                np.take(self._maps[name][shard], local, axis=0, out=out_BD[part], mode="clip")
        return rows_B

    def stream(self, rows: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """(rows_B, {source: [B, width]}) of these ascending rows, batch after batch in file order."""
        for start in range(0, len(rows), batch):
            rows_B = rows[start : start + batch]
            x = {name: np.empty((len(rows_B), width), self.dtype) for name, width in self.widths.items()}
            yield self.gather(rows_B, x), x
            self.forget(rows_B[:1], int(rows_B[-1] - rows_B[0]) + 1)

    def will_need(self, starts: np.ndarray, length: int) -> None:
        """Ask the kernel to fetch the `length` rows from each of `starts`. Returns before they are there."""
        self._advise(starts, length, mmap.MADV_WILLNEED)

    def forget(self, starts: np.ndarray, length: int) -> None:
        """Give back the memory of the `length` rows from each of `starts`; the kernel may keep them in its cache."""
        self._advise(starts, length, mmap.MADV_DONTNEED)

    def _advise(self, starts: np.ndarray, length: int, advice: int) -> None:
        size = self.store.shard_rows
        for start in starts.tolist():
            stop = min(start + length, self.store.rows)
            for shard in range(start // size, -(-stop // size)):
                rows = slice(max(start - shard * size, 0), stop - shard * size)
                for maps in self._maps.values():
                    _madvise(maps[shard][rows], advice)

    def close(self) -> None:
        """Drop the maps; each is unmapped with its last reference."""
        self._maps = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _open(store: Store, source: str) -> list[np.ndarray]:
    return [np.asarray(store.map(f"activations/{source}", shard)) for shard in range(store.shards)]


def _madvise(rows_ND: np.ndarray, advice: int) -> None:
    """madvise(2) on the pages of mapped rows. mmap.madvise would hold the GIL while the kernel queues the reads."""
    address = rows_ND.ctypes.data
    start = address - address % mmap.PAGESIZE
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + rows_ND.nbytes - start), advice)


def _allow_files(maps: int) -> None:
    """Raise the limit of open files for `maps` maps, each of which holds a descriptor. Raises StoreError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = maps + SPARE_FILES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise StoreError(
            "too few open files allowed for this store", f"{hard} of {needed}", f"Allow more (ulimit -Hn {needed})"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))

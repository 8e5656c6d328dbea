"""Rows of a store from its shards, and the filter that says which rows a run keeps.

Letters: N rows of the store, B rows of a batch, D width of a source, n documents.
"""

import resource
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from shared import config, layout
from shared.errors import StoreError
from shared.flags import FIRST, MASKED, SINK, SPECIAL, TRAIN
from shared.shard import THREADS
from shared.view import View

RULES = ("special", "first", "sink")  # what the default filter drops beside masked rows and the other split
SPARE_FILES = 256  # descriptors left to the rest of the process


@dataclass(frozen=True)
class Kept:
    """The rows that pass a filter, and how many rows each rule dropped.

    A row counts under the first rule that drops it, so kept + dropped = all.
    """

    kept_N: np.ndarray  # bool
    dropped: dict[str, int]


def kept_rows(store: View, sources: Iterable[str], split: int = TRAIN, drop: Collection[str] = RULES) -> Kept:
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
        kept_N[store.rows_of(shard).start : store.rows_of(shard).stop] = keep_S
    return Kept(kept_N, dropped)


def _hits(store: View, sources: list[str], models: list[str], shard: int) -> dict[str, np.ndarray]:
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
    """Rows of some sources of a store: from its memory maps, or from chunks that threads of its own decode ahead.

    Safe to use from several threads.

    Stored values are served as they lie on the disk (`dtype`; numbers by layout.floats): multiply by
    `store.factor(source)` for the model's own units.
    """

    def __init__(self, store: View, sources: Iterable[str]) -> None:
        self.store = store
        self.widths = {name: store.source(name).width for name in sources}
        self.dtype = np.dtype(layout.DTYPES[store.header.plan["dtype"]])
        _allow_files(len(self.widths) * store.shards)
        self._sources = {name: store.activations(name) for name in self.widths}
        self._pool = ThreadPoolExecutor(THREADS, "granary-decode")  # without a thread where nothing is packed

    def gather(self, rows_B: np.ndarray, out: Mapping[str, np.ndarray]) -> np.ndarray:
        """Fill `out` {source: [B, width]} with these rows, in file order. Returns the rows in that order.

        Raises StoreDamagedError where a packed chunk cannot be read.
        """
        rows_B = np.sort(rows_B)
        assert not len(rows_B) or (rows_B[0] >= 0 and rows_B[-1] < self.store.rows)
        for name, out_BD in out.items():
            self._sources[name].take(rows_B, out_BD, self._pool)
        return rows_B

    def stream(self, rows: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """(rows_B, {source: [B, width]}) of these ascending rows, batch after batch in file order."""
        for start in range(0, len(rows), batch):
            rows_B = rows[start : start + batch]
            x = {name: np.empty((len(rows_B), width), self.dtype) for name, width in self.widths.items()}
            yield self.gather(rows_B, x), x
            self.forget(rows_B[:1], int(rows_B[-1] - rows_B[0]) + 1)

    def will_need(self, starts: np.ndarray, length: int) -> None:
        """Have the `length` rows from each of `starts` fetched. Returns before they are there.

        What is packed is decoded, and kept until it was forgotten as many times as it was asked for.
        """
        for start in starts.tolist():
            for source in self._sources.values():
                source.will_need(start, min(start + length, self.store.rows), self._pool)

    def forget(self, starts: np.ndarray, length: int) -> None:
        """Give back the memory of the `length` rows from each of `starts`; the kernel may keep them in its cache."""
        for start in starts.tolist():
            for source in self._sources.values():
                source.forget(start, min(start + length, self.store.rows))

    def close(self) -> None:
        """Stop the threads and drop the shards; each is closed with its last reference."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._sources = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


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

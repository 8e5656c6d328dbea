"""Siblings as one: a store, and the stores that it extends, by more rows or by more sources (STORE.md).

Letters: N rows, B rows that are asked for, D width of a source.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import StoreError
from shared.header import Header
from shared.layout import GROUP
from shared.reading import MAPPED, Access, Piece, Shards
from shared.store import Store
from shared.view import View

OF_SOURCES = ("activations", "norms", "faults", "moments")
OF_MODELS = ("rows", "tokens", "batches")
BORDERS = ("documents/row", "segments/row")  # rows at which a document or segment begins, and where the last one ends


def open_family(path: str | Path) -> View:
    """A finished store, read as one with the stores that it extends. Raises StoreError where one is not there."""
    store = Store.open(path)
    extends = store.header.extends
    if extends is None:
        return store
    parent = open_family(parent_of(store))
    return Longer(parent, store) if extends.kind == "rows" else Wider(parent, store)


def parent_of(store: Store) -> Path:
    """Where the store lies that this one extends: where it was, or beside this one. Raises StoreError."""
    extends = store.header.extends
    assert extends is not None
    beside = store.path.absolute().parent
    for path in [beside / extends.path, *_stores(beside)]:
        if (path / GROUP).exists() and _id(path) == extends.id:
            return path
    way_out = f"Put it into {beside}: its id begins with {extends.id[:12]}"
    raise StoreError("the store that this one extends is not there", f"{store.path} extends {extends.path}", way_out)


def _stores(folder: Path) -> Iterator[Path]:
    return (group.parent for group in sorted(folder.glob(f"*/{GROUP}")))


def _id(path: Path) -> str:
    try:
        return Header.read(path).id
    except StoreError:  # another Zarr group
        return ""


def _header(first: View, then: Store, **changed: Any) -> Header:
    """Of both, under an id of their own."""
    ids = [*first.members, *then.members]
    return replace(then.header, spec={"family": ids}, codec=None, extends=None, **changed)


class Longer(View):
    """More rows of the same sources: those of `first`, and behind them those of `then`."""

    def __init__(self, first: View, then: Store) -> None:
        assert first.header.sources == then.header.sources and first.chunk_rows == then.chunk_rows
        self._first, self._then = first, then
        plan = dict(first.header.plan)
        for name in ("rows", "shards", "documents", "documents_held_out", "segments"):
            plan[name] += then.header.plan[name]
        super().__init__(then.path, _header(first, then, plan=plan, scale=first.header.scale))

    @property
    def members(self) -> list[str]:
        return [*self._first.members, *self._then.members]

    @property
    def seals(self) -> list[str]:
        return [*self._first.seals, *self._then.seals]

    def beside(self, source: str) -> list[str]:
        return self._first.beside(source)

    def rows_of(self, shard: int) -> range:
        if shard < self._first.shards:
            return self._first.rows_of(shard)
        rows = self._then.rows_of(shard - self._first.shards)
        return range(self._first.rows + rows.start, self._first.rows + rows.stop)

    def activations(self, source: str, access: Access = MAPPED) -> Shards:
        return _Both(self._first.activations(source, access), self._then.activations(source, access), self._first.rows)

    def map(self, name: str, index: int = 0) -> np.ndarray:
        if index < self._first.shards:
            return self._first.map(name, index)
        return self._then.map(name, index - self._first.shards) + self._shift(name)

    def column(self, name: str) -> np.ndarray:
        parts = self._first.column(name), self._then.column(name) + self._shift(name)
        return np.concatenate([parts[0][:-1] if name in BORDERS else parts[0], parts[1]])

    def _shift(self, name: str) -> Any:
        """What the numbers of a table count from, in its own type. Refuses tables that one store alone has."""
        kind, *rest = name.split("/")
        if name == "rows/document":
            return np.int32(self._first.header.plan["documents"])
        if name in BORDERS:
            return np.int64(self._first.rows)
        if name == "documents/id_end":
            return np.int64(len(self._first.column("documents/id")))
        if kind in OF_SOURCES or name in ("documents/id", "documents/split") or rest[-1:] in (["flags"], ["position"]):
            return np.uint8(0)
        way_out = f"Open one store of the family: Store.open({str(self._then.path)!r})"
        raise StoreError("this table is not joined over siblings", name, way_out)


class Wider(View):
    """More sources of the same rows: those of `first`, and those of `then`."""

    def __init__(self, first: View, then: Store) -> None:
        assert first.rows == then.rows and not first.header.sources.keys() & then.header.sources.keys()
        self._first, self._then = first, then
        one, two = first.header, then.header
        assert one.scale is not None and two.scale is not None
        models, sources = {**two.models, **one.models}, {**one.sources, **two.sources}
        joined = _header(first, then, plan=one.plan, models=models, sources=sources, scale={**one.scale, **two.scale})
        super().__init__(then.path, joined)

    @property
    def members(self) -> list[str]:
        return [*self._first.members, *self._then.members]

    @property
    def seals(self) -> list[str]:
        return [*self._first.seals, *self._then.seals]

    def beside(self, source: str) -> list[str]:
        return self._of(f"activations/{source}").beside(source)

    def rows_of(self, shard: int) -> range:
        return self._first.rows_of(shard)

    def activations(self, source: str, access: Access = MAPPED) -> Shards:
        return self._of(f"activations/{source}").activations(source, access)

    def map(self, name: str, index: int = 0) -> np.ndarray:
        return self._of(name).map(name, index)

    def column(self, name: str) -> np.ndarray:
        return self._of(name).column(name)

    def _of(self, name: str) -> View:
        """Which of the two holds an array."""
        kind, owner, *rest = name.split("/")
        if kind in OF_SOURCES:
            return self._first if owner in self._first.header.sources else self._then
        return self._then if kind in OF_MODELS and rest and owner not in self._first.header.models else self._first


class _Both(Shards):
    """The rows of two stores, one behind the other. Rows are asked for in ascending order."""

    def __init__(self, first: Shards, then: Shards, border: int) -> None:
        self._first, self._then, self._border = first, then, border
        self.threads = max(first.threads, then.threads)

    def take(self, rows_B: np.ndarray, out_BD: np.ndarray, pool: Executor) -> None:
        split = int(np.searchsorted(rows_B, self._border))
        if split:
            self._first.take(rows_B[:split], out_BD[:split], pool)
        if split < len(rows_B):
            self._then.take(rows_B[split:] - self._border, out_BD[split:], pool)

    def will_need(self, pieces: Sequence[Piece], pool: Executor) -> None:
        one, two = self._split(pieces)
        self._first.will_need(one, pool)
        self._then.will_need(two, pool)

    def forget(self, pieces: Sequence[Piece]) -> None:
        one, two = self._split(pieces)
        self._first.forget(one)
        self._then.forget(two)

    def _split(self, pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
        border = self._border
        one = [(start, min(stop, border)) for start, stop in pieces if start < border]
        two = [(max(start, border) - border, stop - border) for start, stop in pieces if stop > border]
        return one, two

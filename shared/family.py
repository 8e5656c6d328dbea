"""Siblings as one: a store, and the stores that it extends, by more rows or by more sources (STORE.md)."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import StoreError
from shared.header import Header
from shared.joined import OF_ROWS, Joined, plan_of
from shared.layout import GROUP
from shared.reading import MAPPED, Access, Shards
from shared.store import Store
from shared.view import View

OF_MODELS = ("rows", "tokens", "batches")


def open_family(path: str | Path) -> View:
    """A finished store, read as one with the stores that it extends. Raises StoreError where one is not there."""
    store = Store.open(path)
    extends = store.header.extends
    if extends is None:
        return store
    parent = open_family(parent_of(store))
    return longer(parent, store) if extends.kind == "rows" else Wider(parent, store)


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


def longer(first: View, then: Store) -> View:
    """More rows of the same sources: those of `first`, and behind them those of `then`."""
    assert first.header.sources == then.header.sources and first.chunk_rows == then.chunk_rows
    header = _header(first, then, plan=plan_of([first, then]), scale=first.header.scale)
    return Joined(then.path, header, [first, then])


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
        if kind in OF_ROWS:
            return self._first if owner in self._first.header.sources else self._then
        return self._then if kind in OF_MODELS and rest and owner not in self._first.header.models else self._first

"""The rows of several views of the same sources, one behind the other.

Letters: B rows that are asked for, D width of a source.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import StoreError
from shared.header import Header
from shared.reading import MAPPED, Access, Piece, Shards
from shared.view import View

COUNTS = ("rows", "shards", "documents", "documents_held_out", "segments")  # of a plan, which add up
OF_ROWS = ("activations", "norms", "faults", "moments")


def plan_of(views: Sequence[View]) -> dict[str, Any]:
    """The plan of the first, with the counts of rows and documents of all."""
    return views[0].header.plan | {name: sum(view.header.plan[name] for view in views) for name in COUNTS}


class Joined(View):
    """Several views of the same sources as one, under a header of its own, whose plan is `plan_of` them.

    first: 0 .. n - 1 | second: n .. n + m - 1 | ...      rows, and so shards, documents and characters of their ids

    `stores` are those that it tells apart, if any.
    """

    def __init__(self, path: Path, header: Header, views: Sequence[View], stores: Sequence[View] = ()) -> None:
        super().__init__(path, header, stores)
        self._views = list(views)
        self._first_row = _starts([view.rows for view in views])
        self._first_shard = _starts([view.shards for view in views])

    @property
    def members(self) -> list[str]:
        return [member for view in self._views for member in view.members]

    @property
    def seals(self) -> list[str]:
        return [seal for view in self._views for seal in view.seals]

    def beside(self, source: str) -> list[str]:
        found = self._views[0].beside(source)
        assert all(view.beside(source) == found for view in self._views)  # else: ask each of `stores`
        return found

    def rows_of(self, shard: int) -> range:
        view, local = self._holds(shard)
        rows, first = self._views[view].rows_of(local), self._first_row[view]
        return range(first + rows.start, first + rows.stop)

    def activations(self, source: str, access: Access = MAPPED) -> Shards:
        return _Joined([view.activations(source, access) for view in self._views], self._first_row)

    def map(self, name: str, index: int = 0) -> np.ndarray:
        view, local = self._holds(index)
        return _moved(self._views[view].map(name, local), self._starts_of(name)[view])

    def column(self, name: str) -> np.ndarray:
        starts = self._starts_of(name)
        parts = [_moved(view.column(name), start) for view, start in zip(self._views, starts, strict=False)]
        inner = [part[:-1] if name in ("documents/row", "segments/row") else part for part in parts[:-1]]
        return np.concatenate([*inner, parts[-1]])

    def _holds(self, shard: int) -> tuple[int, int]:
        """Which view holds a shard, and its number there."""
        view = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        return view, shard - self._first_shard[view]

    def _starts_of(self, name: str) -> list[int]:
        """What the numbers of a table count from in each view. Refuses tables that one store alone has."""
        kind, *rest = name.split("/")
        counted: dict[str, Callable[[View], int]] = {
            "rows/document": lambda view: view.header.plan["documents"],
            "documents/row": lambda view: view.rows,
            "segments/row": lambda view: view.rows,
            "documents/id_end": lambda view: len(view.column("documents/id")),
        }
        if name in counted:
            return _starts([counted[name](view) for view in self._views])
        if kind in OF_ROWS or name in ("documents/id", "documents/split") or rest[-1:] in (["flags"], ["position"]):
            return [0] * len(self._views)
        way_out = f"Open one store alone: Store.open({str(self.path)!r})"
        raise StoreError("this table is not joined over several stores", name, way_out)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each begins, and where the last ends."""
    return list(accumulate(sizes, initial=0))


def _moved(values: np.ndarray, start: int) -> np.ndarray:
    """Numbers that count from `start`, in their own type; what counts from 0 stays the map that it is."""
    return values + values.dtype.type(start) if start else values


class _Joined(Shards):
    """The rows of several stores, one behind the other, from `starts` on. Rows are asked for in ascending order."""

    def __init__(self, parts: Sequence[Shards], starts: Sequence[int]) -> None:
        self._parts = [(part, *edges) for part, edges in zip(parts, pairwise(starts), strict=True)]
        self.threads, self.owns = max(part.threads for part in parts), any(part.owns for part in parts)

    def check(self, rows_B: np.ndarray) -> None:
        for part, start, here in self._shares(rows_B):
            part.check(rows_B[here] - start)

    def take(self, rows_B: np.ndarray, out_BD: np.ndarray, pool: Executor) -> None:
        for part, start, here in self._shares(rows_B):
            part.take(rows_B[here] - start, out_BD[here], pool)

    def _shares(self, rows_B: np.ndarray) -> Iterator[tuple[Shards, int, slice]]:
        """Each part that has some of these rows, its first row, and which rows these are."""
        for part, start, stop in self._parts:
            here = slice(*np.searchsorted(rows_B, (start, stop)).tolist())
            if here.start < here.stop:
                yield part, start, here

    def will_need(self, pieces: Sequence[Piece], pool: Executor) -> None:
        for part, here in self._split(pieces):
            part.will_need(here, pool)

    def forget(self, pieces: Sequence[Piece]) -> None:
        for part, here in self._split(pieces):
            part.forget(here)

    def _split(self, pieces: Sequence[Piece]) -> Iterator[tuple[Shards, list[Piece]]]:
        """Each part with what of the pieces lies in it, counted from its first row."""
        for part, start, stop in self._parts:
            inside = [(max(a, start) - start, min(b, stop) - start) for a, b in pieces if a < stop and b > start]
            yield part, inside

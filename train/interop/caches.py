"""Rows of a cache by number: of a source of a store, or of a folder that dictionary_learning's ActivationCache has
written (shared.collected).

Letters: N rows, B rows that are asked for, D width.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared import layout
from shared.collected import Collected
from shared.errors import StoreError
from shared.moments import CLASSES, Moments
from shared.store import Store
from shared.view import View

PIECE = 65_536  # rows that are read at once for statistics


class Rows(ABC):
    """N rows of one width."""

    path: Path
    count: int
    width: int
    dtype: torch.dtype

    @abstractmethod
    def take(self, rows_B: np.ndarray) -> Tensor:
        """These rows in the order asked for, [B, D]."""

    @property
    @abstractmethod
    def tokens(self) -> Tensor | None:
        """The token of every row, int64 [N]; none where they were not kept."""

    @property
    @abstractmethod
    def ranges(self) -> Tensor | None:
        """The row with which every sequence begins, and N behind them; none where they were not kept."""

    @property
    @abstractmethod
    def moments(self) -> Moments:
        """Of all rows, in fp64."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What is known of how it was made."""

    def moments_of(self, count: int) -> Moments:
        """Of the first so many rows, read."""
        total = Moments.empty(self.width)
        for start in range(0, count, PIECE):
            total = total.merge(Moments.of(self.take(np.arange(start, min(start + PIECE, count)))))
        return total


class Folder(Collected, Rows):
    """A folder of an ActivationCache. Raises StoreError where it is none, StoreDamagedError where it is torn."""

    @cached_property
    def moments(self) -> Moments:
        """From the rows: the mean.pt and std.pt beside them were summed in the dtype of the rows, over all runs."""
        return self.moments_of(self.count)


class OfStore(Rows):
    """A source of a store, in the model's own units. Raises StoreError where it has none of this name."""

    def __init__(self, store: View, source: str) -> None:
        self.store, self.source = store, source
        self.width, self.path = store.source(source).width, store.path
        self.count, self.dtype = store.rows, torch.float32

    def take(self, rows_B: np.ndarray) -> Tensor:
        stored_BD = self.store.stored(self.source, rows_B)
        return layout.floats(stored_BD).float() * self.store.factor(self.source)

    @cached_property
    def tokens(self) -> Tensor:
        model = self.store.source(self.source).model
        ids = self.store.column(f"tokens/{model}/id")[self.store.column(f"rows/{model}/token")]
        return torch.from_numpy(ids.astype(np.int64))

    @cached_property
    def ranges(self) -> Tensor:
        return torch.from_numpy(self.store.column("segments/row").astype(np.int64))

    @cached_property
    def moments(self) -> Moments:
        """As the harvest has summed them, but for rows that are never served."""
        return self.store.moments(self.source, CLASSES)

    @property
    def config(self) -> dict[str, Any]:
        one = self.store.source(self.source)
        model = self.store.header.models[one.model]
        return {"store": self.store.header.id, "source": self.source, "model": model.path, "site": one.site}


def open_rows(place: str | Path, name: str | None = None) -> Rows:
    """The rows of a source of a store (`name`, or place/<source>; none: its only one), or of a folder place/<name>.

    Raises StoreError where there is neither.
    """
    path = Path(place).expanduser()
    for store, source in ((path, name), (path.parent, name or path.name)):
        if (store / "zarr.json").exists():
            opened = Store.open(store)
            sources = list(opened.header.sources)
            if source is None and len(sources) > 1:
                raise StoreError("this store has several sources", ", ".join(sources), f"Name one: {path}/{sources[0]}")
            return OfStore(opened, source or sources[0])
    return Folder(path if name is None else path / name)


def positions(index: Any, count: int) -> tuple[np.ndarray, bool]:
    """The numbers of the rows that an index asks for, as NumPy has it, and whether it asks for one row alone.

    An index is a whole number, a slice, a list, an array or tensor of them, or a mask. Raises IndexError.
    """
    if isinstance(index, slice):
        return np.arange(*index.indices(count)), False
    given = np.asarray(index.cpu() if isinstance(index, Tensor) else index)
    if given.dtype == bool:
        if given.shape != (count,):
            raise IndexError(f"a mask of {given.shape} for {count:,} rows")
        return np.flatnonzero(given), False
    if given.size == 0:
        return np.zeros(0, np.int64), False
    if not np.issubdtype(given.dtype, np.integer) or given.ndim > 1:
        raise IndexError(f"rows are asked for by whole numbers, not by {given.dtype} {given.shape}")
    found_B = np.where(given < 0, given + count, given).astype(np.int64).reshape(-1)
    if bool((found_B < 0).any() or (found_B >= count).any()):
        raise IndexError(f"row {int(given.reshape(-1)[(found_B < 0) | (found_B >= count)][0])} of {count:,}")
    return found_B, given.ndim == 0

"""Rows of a cache by number: of a source of a store, or of a folder that dictionary_learning's ActivationCache has
written.

    <folder>/shard_<i>.memmap   raw rows of shard i        shard_<i>.meta   {"shape": [n, D], "dtype": "torch.float16"}
    <folder>/config.json        what it was made with        tokens.pt, sequence_ranges.pt   there, or one level above

Letters: N rows, B rows that are asked for, D width.
"""

import re
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared import layout
from shared.errors import StoreDamagedError, StoreError
from shared.moments import CLASSES, Moments
from shared.store import Store
from shared.view import View
from train.interop.tensors import read_table

DTYPES: dict[str, tuple[np.dtype[Any], torch.dtype]] = {
    "torch.float16": (np.dtype("<f2"), torch.float16), "torch.bfloat16": (np.dtype("<i2"), torch.bfloat16),
    "torch.float32": (np.dtype("<f4"), torch.float32), "torch.float64": (np.dtype("<f8"), torch.float64),
    "torch.int8": (np.dtype("i1"), torch.int8),
}  # fmt: skip
OLDEST = "torch.float32"  # of a .meta without a dtype
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


class Folder(Rows):
    """A folder of an ActivationCache. Raises StoreError where it is none, StoreDamagedError where it is torn."""

    def __init__(self, path: Path) -> None:
        found = {
            int(m[1]): file for file in path.glob("shard_*.meta") if (m := re.fullmatch(r"shard_(\d+)", file.stem))
        }
        if not found:
            raise StoreError("no activations here", path, "Give a store, or a folder with shard_0.memmap and .meta")
        if sorted(found) != list(range(len(found))):
            lacking = min(set(range(len(found) + 1)) - set(found))
            raise StoreDamagedError("a shard is missing", path / f"shard_{lacking}.meta", "Collect it again")
        self.path = path
        self._maps = [self._map(found[n]) for n in range(len(found))]
        shapes = {(one.shape[1], one.dtype) for one in self._maps}
        if len(shapes) > 1:
            raise StoreDamagedError("shards of several kinds", path, "They are of several runs: collect it again")
        self.width = self._maps[0].shape[1]
        self._ends = np.cumsum([len(one) for one in self._maps])
        self.count = int(self._ends[-1])
        if (told := self.config.get("total_size")) not in (None, self.count):
            raise StoreDamagedError("rows are missing", f"{self.count:,} of {told:,} in {path}", "Collect it again")

    def _map(self, meta: Path) -> np.ndarray:
        told = read_table(meta)
        name = str(told.get("dtype", OLDEST))
        if name not in DTYPES or len(told.get("shape", ())) != 2:
            raise StoreDamagedError("a shard of an unknown kind", f"{name} in {meta}", f"Known: {', '.join(DTYPES)}")
        stored, self.dtype = DTYPES[name]
        file, (rows, width) = meta.with_suffix(".memmap"), told["shape"]
        size = file.stat().st_size if file.exists() else 0
        if size != rows * width * stored.itemsize:
            value = f"{file} has {size:,} bytes of {rows * width * stored.itemsize:,}"
            raise StoreDamagedError("a shard is torn", value, "Collect it again")
        return np.memmap(file, stored, "r", shape=(rows, width))

    def take(self, rows_B: np.ndarray) -> Tensor:
        out_BD = np.empty((len(rows_B), self.width), self._maps[0].dtype)
        shard_B = np.searchsorted(self._ends, rows_B, side="right")
        for shard in np.unique(shard_B):
            own_n = np.flatnonzero(shard_B == shard)
            own_n = own_n[np.argsort(rows_B[own_n], kind="stable")]  # in file order
            first = self._ends[shard] - len(self._maps[shard])
            out_BD[own_n] = self._maps[shard][rows_B[own_n] - first]
        found = torch.from_numpy(out_BD)
        return found.view(torch.bfloat16) if self.dtype == torch.bfloat16 else found

    @cached_property
    def tokens(self) -> Tensor | None:
        return self._beside("tokens.pt", self.count)

    @cached_property
    def ranges(self) -> Tensor | None:
        return self._beside("sequence_ranges.pt", None)

    def _beside(self, name: str, length: int | None) -> Tensor | None:
        """A tensor in the folder, or above it. Raises StoreDamagedError for one of another length."""
        for place in (self.path / name, self.path.parent / name):
            if place.exists():
                found: Tensor = torch.load(place, map_location="cpu", weights_only=True)
                if length is not None and len(found) != length:
                    value = f"{len(found):,} in {place} for {length:,} rows"
                    raise StoreDamagedError("tokens are of other rows", value, "Collect it again")
                return found
        return None

    @cached_property
    def moments(self) -> Moments:
        """From the rows: the mean.pt and std.pt beside them were summed in the dtype of the rows, over all runs."""
        total = Moments.empty(self.width)
        for start in range(0, self.count, PIECE):
            total = total.merge(Moments.of(self.take(np.arange(start, min(start + PIECE, self.count)))))
        return total

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_table(self.path / "config.json")


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
        return torch.from_numpy(np.asarray(self.store.column("segments/row"), np.int64))

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

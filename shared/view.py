"""What can be read: one store, siblings as one (shared.family), or a mixture of such (shared.mixture).

Letters: N rows, B rows that are asked for, D width of a source, K length of packed moments.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from shared import layout
from shared.errors import StoreError
from shared.flags import count_faults
from shared.header import Header
from shared.moments import CLASSES, Moments
from shared.reading import MAPPED, THREADS, Access, Shards
from shared.source import Source

if TYPE_CHECKING:
    import dask.array


class View(ABC):
    """Rows of several sources, numbered from 0, and the tables beside them.

    `path` is where people find it; of a mixture, the first of its stores.
    """

    def __init__(self, path: Path, header: Header, stores: Sequence["View"] = ()) -> None:
        self.path, self.header = path, header
        self.access = MAPPED  # how its rows are read
        self._stores = stores
        self.rows: int = header.plan["rows"]
        self.chunk_rows: int = header.plan["chunk_rows"]
        self.shards: int = header.plan["shards"]
        self.dtype: torch.dtype = getattr(torch, header.plan["dtype"])

    def through(self, access: Access) -> Self:
        """The same rows, read in another way by whoever reads them through `access`."""
        other = copy.copy(self)
        other.access, other._stores = access, [store.through(access) for store in self._stores]
        return other

    def __repr__(self) -> str:
        sources = ", ".join(f"{name} ({one.width})" for name, one in self.header.sources.items())
        return f"{type(self).__name__}({self.place!r}: {self.rows:,} rows of {sources})"

    @property
    def stores(self) -> list["View"]:
        """The stores of a mixture, in the order of their rows; of anything else, itself."""
        return list(self._stores) or [self]

    @property
    def place(self) -> str:
        """Where people find all of it."""
        return ", ".join(str(store.path) for store in self.stores)

    @property
    @abstractmethod
    def members(self) -> list[str]:
        """The ids of the stores that are read."""

    @property
    @abstractmethod
    def seals(self) -> list[str]:
        """The sha256 of the seal of every store that is read: equal seals, equal bytes."""

    @abstractmethod
    def beside(self, source: str) -> list[str]:
        """The models whose flags decide the class of a row in the moments of this source."""

    @abstractmethod
    def rows_of(self, shard: int) -> range:
        """The numbers of a shard's rows."""

    @abstractmethod
    def activations(self, source: str, access: Access = MAPPED) -> Shards:
        """The rows of a source as they were stored, open to be read; layout.floats makes numbers of them.

        What is packed is decoded, whatever `access.io` says.
        """

    @abstractmethod
    def map(self, name: str, index: int = 0) -> np.ndarray:
        """A read-only memory map of file `index` of the array `name`, without padding. Refuses what is packed."""

    @abstractmethod
    def column(self, name: str) -> np.ndarray:
        """The whole of an array, in memory where it has several files. Meant for tables, not for activations."""

    def sources_of(self, model: str) -> list[Source]:
        return [source for source in self.header.sources.values() if source.model == model]

    def source(self, name: str) -> Source:
        """Raises StoreError, naming the store's sources, where there is none of this name."""
        if name not in self.header.sources:
            raise StoreError("this store has no source", name, f"It has: {', '.join(self.header.sources)}")
        return self.header.sources[name]

    def factor(self, source: str) -> float:
        """The model's value = stored value x factor."""
        assert self.header.scale is not None
        return self.header.scale[source]["factor"]

    def stored(self, source: str, rows_B: np.ndarray) -> np.ndarray:
        """These rows of a source, in any order, as they were stored: [B, D]. layout.floats makes numbers of them."""
        found_BD = np.empty((len(rows_B), self.source(source).width), layout.DTYPES[self.header.plan["dtype"]])
        order_B = np.argsort(rows_B, kind="stable")
        shards = self.activations(source)
        with ThreadPoolExecutor(THREADS, "decode") as pool:
            shards.check(rows_B[order_B])
            shards.take(rows_B[order_B], found_BD, pool)
        if (order_B[1:] > order_B[:-1]).all():
            return found_BD
        out_BD = np.empty_like(found_BD)
        out_BD[order_B] = found_BD
        return out_BD

    def read(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Rows [start:stop] as Python slices them, in the model's own units: {source: float32 [rows, width]}."""
        rows_B = np.arange(*slice(start, stop).indices(self.rows))
        return {
            name: layout.floats(self.stored(name, rows_B)).float() * self.factor(name) for name in self.header.sources
        }

    def dask(self, source: str, block_rows: int = 65_536) -> "dask.array.Array":
        """The rows of a source in the model's own units, lazily: float32 [N, width], no block across two shards.

        A block is read where it is computed: on a cluster, by the worker, which must see the store under its path.
        """
        import dask.array

        width, blocks = self.source(source).width, []
        for shard in range(self.shards):
            rows = self.rows_of(shard)
            for start in range(rows.start, rows.stop, block_rows):
                piece = dask.delayed(self._piece)(source, start, min(start + block_rows, rows.stop))
                shape = (min(block_rows, rows.stop - start), width)
                blocks.append(dask.array.from_delayed(piece, shape, np.float32))
        return dask.array.concatenate(blocks)

    def _piece(self, source: str, start: int, stop: int) -> np.ndarray:
        stored_BD = self.stored(source, np.arange(start, stop))
        return layout.floats(stored_BD).float().numpy() * np.float32(self.factor(source))

    def moments(self, source: str, classes: Iterable[str]) -> Moments:
        """The moments of all rows of these classes, in the model's own units, merged in shard order."""
        width, wanted = self.header.sources[source].width, [CLASSES.index(name) for name in classes]
        total = Moments.empty(width)
        for packed_XK in self.column(f"moments/{source}"):
            for index in wanted:
                total = total.merge(Moments.unpack(packed_XK[index]))
        return total

    def fault_counts(self, source: str) -> dict[str, int]:
        """Rows that are clipped, masked and sinks."""
        return count_faults(self.column(f"faults/{source}"))

    def document_ids(self) -> list[str]:
        text, ends = self.column("documents/id").tobytes(), self.column("documents/id_end").tolist()
        return [text[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]

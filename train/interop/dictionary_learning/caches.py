"""The caches of dictionary_learning, on stores and on its own folders (train.interop.caches).

Letters: N rows, B rows that are asked for, S sources, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from shared.errors import RowsError, StoreError
from shared.moments import Moments
from train.interop.caches import OfStore, Rows, open_rows, positions

STATE = ("count.pt", "mean.pt", "M2.pt")


class RunningStatWelford:
    """Mean and spread of rows, exact and mergeable, in fp64 whatever they come in (shared.moments).

    Without a row the mean is 0 and the variance not a number; with one row the unbiased one is not, either.
    """

    def __init__(
        self, shape: int | Sequence[int] | None = None, dtype: Any = torch.float64, device: Any = "cpu"
    ) -> None:
        """`shape` is the width; none: that of the first rows. Sums are kept in fp64 on the CPU, whatever is asked."""
        width = shape if isinstance(shape, int | None) else int(np.prod(tuple(shape)))
        self._moments = None if width is None else Moments.empty(width)

    def update(self, x: Tensor) -> None:
        """Take rows [..., D] in."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if self._moments is None:
            self._moments = Moments.empty(x.shape[-1])
        if len(rows):
            self._moments = self._moments.merge(Moments.of(rows))

    def merge(self, other: "RunningStatWelford") -> None:
        """Take in what another one has."""
        if other._moments is not None:
            own = Moments.empty(len(other._moments.mean_D)) if self._moments is None else self._moments
            self._moments = own.merge(other._moments)

    @property
    def n(self) -> int:
        return 0 if self._moments is None else round(self._moments.count)

    @property
    def mean(self) -> Tensor:
        return torch.zeros(0, dtype=torch.float64) if self._moments is None else torch.from_numpy(self._moments.mean_D)

    @property
    def M2(self) -> Tensor:
        """sum of (x - mean)^2."""
        return torch.zeros(0, dtype=torch.float64) if self._moments is None else torch.from_numpy(self._moments.m2_D)

    def var(self, unbiased: bool = True) -> Tensor:
        left = self.n - (1 if unbiased else 0)
        return self.M2 / left if left > 0 else torch.full_like(self.M2, torch.nan)

    def std(self, unbiased: bool = True) -> Tensor:
        return self.var(unbiased).sqrt()

    def save_state(self, folder: str | Path) -> None:
        """count.pt, mean.pt, M2.pt, and std.pt."""
        for name, value in [
            *zip(STATE, (torch.tensor(self.n), self.mean, self.M2), strict=True),
            ("std.pt", self.std()),
        ]:
            torch.save(value, Path(folder) / name)

    @classmethod
    def load_or_create_state(
        cls, folder: str | Path, dtype: Any = None, shape: Any = None, device: Any = "cpu"
    ) -> Self:
        """What `save_state` has written there, or, where it has not, an empty one."""
        if not all((Path(folder) / name).exists() for name in STATE):
            return cls(shape)
        count, mean_D, m2_D = (torch.load(Path(folder) / name, weights_only=True).double() for name in STATE)
        return cls._of(Moments(float(count), 0.0, mean_D.numpy(), m2_D.numpy(), Moments.empty(1).norms_H))

    @classmethod
    def _of(cls, moments: Moments) -> Self:
        made = cls(len(moments.mean_D))
        made._moments = moments
        return made


class Indexed(ABC):
    """Rows that are asked for as NumPy's are, and by torch's DataLoader a batch at once."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def _take(self, rows_B: np.ndarray) -> Tensor:
        """These rows, [B, ...]."""

    def __getitem__(self, index: Any) -> Tensor:
        """One row of a whole number, else [B, ...]."""
        rows_B, one = positions(index, len(self))
        found = self._take(rows_B)
        return found[0] if one else found

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """Rows of a batch of torch's DataLoader, in one read."""
        return list(self[np.asarray(indices, np.int64)])


class ActivationCache(Indexed):
    """The rows of a source of a store, or of a folder of the reference: cache[i], cache[a:b], cache[[3, 1]].

    A source is named as the submodule, or by its path: ActivationCache("pair.zarr/base"). An index is as NumPy has it.
    """

    def __init__(self, store_dir: str | Path, submodule_name: str | None = None) -> None:
        self.rows: Rows = open_rows(store_dir, submodule_name)

    def __len__(self) -> int:
        return self.rows.count

    def _take(self, rows_B: np.ndarray) -> Tensor:
        return self.rows.take(rows_B)

    @property
    def d_model(self) -> int:
        return self.rows.width

    @property
    def config(self) -> dict[str, Any]:
        return self.rows.config

    @property
    def tokens(self) -> Tensor:
        """Of every row, int64 [N]. Raises StoreError where they were not kept."""
        if self.rows.tokens is None:
            raise StoreError("this cache has no tokens", self.rows.path, "Collect it with store_tokens=True")
        return self.rows.tokens

    @property
    def sequence_ranges(self) -> Tensor | None:
        """The row with which every sequence begins, and N behind them."""
        return self.rows.ranges

    @property
    def running_stats(self) -> RunningStatWelford:
        return RunningStatWelford._of(self.rows.moments)

    @property
    def mean(self) -> Tensor:
        """Of all rows, [D], summed in fp64."""
        return self.running_stats.mean.float()

    @property
    def std(self) -> Tensor:
        """The unbiased one."""
        return self.running_stats.std().float()


class SideBySide(Indexed, ABC):
    """Rows [S, D] of several caches of one width."""

    caches: list[ActivationCache]

    def _take(self, rows_B: np.ndarray) -> Tensor:
        return torch.stack([cache.rows.take(rows_B) for cache in self.caches], 1)


class ActivationCacheTuple(SideBySide):
    """Caches of equally many rows of one width, side by side: a row is [S, D]."""

    def __init__(self, *store_dirs: str | Path, submodule_name: str | None = None) -> None:
        """Raises StoreError where their rows are not equally many, RowsError where they are of several widths."""
        self.caches = [ActivationCache(one, submodule_name) for one in store_dirs]
        if len({len(one) for one in self.caches}) > 1:
            told = ", ".join(f"{one.rows.path} {len(one):,}" for one in self.caches)
            raise StoreError("these caches have not equally many rows", told, "Use PairedActivationCache for two")
        _require_width(self.caches)

    def __len__(self) -> int:
        return len(self.caches[0])


class PairedActivationCache(SideBySide):
    """Two caches, row by row: a row is [2, D]. They must be of the same tokens, and are cut to the shorter one.

    PairedActivationCache("base/layer_13_out", "chat/layer_13_out"); of two sources of a store, which are aligned by
    what it is, PairedActivationCache("pair.zarr/base", "pair.zarr/chat").
    """

    def __init__(
        self, store_dir_1: str | Path, store_dir_2: str | Path, submodule_name: str | None = None, verify: bool = True
    ) -> None:
        """Raises StoreError where the tokens of the two differ, or are not there to be compared (`verify` false: they
        are taken to be the same), RowsError where they are of two widths."""
        self.caches = [ActivationCache(store_dir_1, submodule_name), ActivationCache(store_dir_2, submodule_name)]
        _require_width(self.caches)
        self._count = min(len(one) for one in self.caches)
        if verify and not self._of_one_store():
            self._compare()

    def _of_one_store(self) -> bool:
        """Whether both are sources of the same store, whose rows are pairs whatever their tokens are."""
        a, b = (one.rows for one in self.caches)
        stores = [one.store.header.id for one in (a, b) if type(one) is OfStore]
        return len(stores) == 2 and stores[0] == stores[1]

    def _compare(self) -> None:
        for cache in self.caches:
            if cache.rows.tokens is None:
                way_out = "Collect them with store_tokens=True, or say verify=False"
                raise StoreError("nothing tells whether these caches are of the same tokens", cache.rows.path, way_out)
        a, b = (cache.tokens[: self._count] for cache in self.caches)
        if bool((a != b).any()):
            first = int((a != b).nonzero()[0])
            value = f"row {first:,}: {int(a[first])} and {int(b[first])}"
            raise StoreError("these caches are of other tokens", value, "Collect both from the same texts")

    def __len__(self) -> int:
        return self._count

    @property
    def tokens(self) -> Tensor:
        """[2, N]."""
        return torch.stack([cache.tokens[: self._count] for cache in self.caches])

    @cached_property
    def sequence_ranges(self) -> Tensor | None:
        """Of the shorter one."""
        return min(self.caches, key=len).sequence_ranges

    @cached_property
    def _stats(self) -> list[RunningStatWelford]:
        """Of the rows that both have."""
        return [
            one.running_stats if len(one) == self._count else RunningStatWelford._of(one.rows.moments_of(self._count))
            for one in self.caches
        ]

    @property
    def mean(self) -> Tensor:
        """[2, D]."""
        return torch.stack([one.mean.float() for one in self._stats])

    @property
    def std(self) -> Tensor:
        """[2, D], unbiased."""
        return torch.stack([one.std().float() for one in self._stats])


def _require_width(caches: Sequence[ActivationCache]) -> None:
    widths = [one.d_model for one in caches]
    if len(set(widths)) > 1:
        way_out = "Train on a store of both: train run takes sources of several widths"
        raise RowsError("these caches are of several widths", ", ".join(map(str, widths)), way_out)

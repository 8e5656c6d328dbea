"""Kept entries of a matrix of codes, and memory that is handed from one such matrix to the next.

Letters: B rows of a batch, L latents of the dictionary, K kept entries.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entries:
    """Kept entries (row, latent) of a B x L matrix. Positions are int64: B x L may pass 2^31.

    Ordered by row, then latent: sums over a row then round alike whatever the scores behind them were.
    """

    row_K: Tensor
    latent_K: Tensor
    rows: int
    latents: int
    score_K: Tensor | None = None  # by which they were selected, if who did tells

    @cached_property
    def row_starts_B(self) -> Tensor:
        return starts(self.row_K, self.rows)

    @cached_property
    def by_latent_K(self) -> Tensor:
        """The entries' numbers, ordered by latent."""
        return torch.argsort(self.latent_K.int(), stable=True)  # of half the size, which is sorted in half the time

    @cached_property
    def rows_by_latent_K(self) -> Tensor:
        return self.row_K[self.by_latent_K]

    @cached_property
    def latent_starts_L(self) -> Tensor:
        return starts(self.latent_K[self.by_latent_K], self.latents)


def starts(index_K: Tensor, length: int) -> Tensor:
    """Where each number below `length` begins in an ordered index."""
    return torch.searchsorted(index_K, torch.arange(length, device=index_K.device))


_spare: list[Tensor] = []


def borrowed(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat tensor of any contents: on a CPU one that was handed back, whose pages the system need not clear again."""
    while device.type == "cpu" and _spare:
        one = _spare.pop()
        if one.dtype == dtype and len(one) >= size:
            return one[:size]
    return torch.empty(size, dtype=dtype, device=device)


def hand_back(flat: Tensor) -> None:
    """Let the next one have this memory, which nobody reads any more."""
    if flat.device.type == "cpu":
        _spare[:] = [flat]


def drop_spare() -> None:
    """Give what was handed back to the system."""
    _spare.clear()

"""Kept entries of a matrix of codes, and memory that is handed from one such matrix to the next.

Letters: B rows of a batch, L latents of the dictionary, K kept entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

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

    def some(self, which_n: Tensor) -> "Entries":
        """Those of these numbers, in ascending order."""
        scores = None if self.score_K is None else self.score_K[which_n]
        return Entries(self.row_K[which_n], self.latent_K[which_n], self.rows, self.latents, scores)

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


def below_each_other(parts: Sequence[Entries]) -> Entries:
    """Of matrices that lie one below the other, those of the whole."""
    firsts = list(accumulate((one.rows for one in parts), initial=0))
    row_K = torch.cat([one.row_K + first for one, first in zip(parts, firsts, strict=False)])
    scores = [one.score_K for one in parts if one.score_K is not None]
    score_K = torch.cat(scores) if len(scores) == len(parts) else None
    return Entries(row_K, torch.cat([one.latent_K for one in parts]), firsts[-1], parts[0].latents, score_K)


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

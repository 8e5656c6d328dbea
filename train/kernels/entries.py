"""Kept entries of a matrix of codes, and memory that is handed from one such matrix to the next.

Letters: B rows of a batch, L latents of the dictionary, K kept entries; N bags of entries, M pieces of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

PIECE = 128  # entries that a GPU adds up one after the other: of a latent that fires on every row there are many


@dataclass(frozen=True)
class Pieces:
    """Where bags of entries begin and end, which stand one behind the other: in pieces, where bags are long.

    A bag's first piece is its number among N, its further ones are together among M. Of M there are as many as there
    could be, so that nobody waits for the device: those that are too many are of bag N, and end where they begin.
    """

    begin_N: Tensor
    end_N: Tensor
    further_N: Tensor
    begin_M: Tensor
    end_M: Tensor
    bag_M: Tensor

    @classmethod
    def whole(cls, starts_N: Tensor, count: int) -> "Pieces":
        """One of each bag of `count` entries in all."""
        none = starts_N[:0]
        return cls(starts_N, _stops(starts_N, count), none, none, none, none)

    @classmethod
    def split(cls, starts_N: Tensor, count: int) -> "Pieces":
        """Of at most PIECE entries each."""
        if count <= PIECE:
            return cls.whole(starts_N, count)
        stops_N = _stops(starts_N, count)
        further_N = (stops_N - starts_N - 1).clamp_min(0) // PIECE
        behind_N = torch.cumsum(further_N, 0)
        number_M = torch.arange((count - 1) // PIECE, device=starts_N.device)
        bag_M = torch.searchsorted(behind_N, number_M, right=True)
        own_M = bag_M.clamp_max(len(starts_N) - 1)
        begin_M = starts_N[own_M] + (number_M - (behind_N - further_N)[own_M] + 1) * PIECE
        begin_M = torch.minimum(begin_M, stops_N[own_M])
        end_M = torch.minimum(begin_M + PIECE, stops_N[own_M])
        return cls(starts_N, torch.minimum(starts_N + PIECE, stops_N), further_N, begin_M, end_M, bag_M)


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
        return _starts(self.row_K, self.rows)

    @cached_property
    def row_pieces(self) -> Pieces:
        """Not split: rows are many, and none has many more entries than others."""
        return Pieces.whole(self.row_starts_B, len(self.row_K))

    @cached_property
    def by_latent_K(self) -> Tensor:
        """The entries' numbers, ordered by latent."""
        return torch.argsort(self.latent_K.int(), stable=True)  # of half the size, which is sorted in half the time

    @cached_property
    def rows_by_latent_K(self) -> Tensor:
        return self.row_K[self.by_latent_K]

    @cached_property
    def latent_starts_L(self) -> Tensor:
        return _starts(self.latent_K[self.by_latent_K], self.latents)

    @cached_property
    def latent_pieces(self) -> Pieces:
        return Pieces.split(self.latent_starts_L, len(self.latent_K))


def below_each_other(parts: Sequence[Entries]) -> Entries:
    """Of matrices that lie one below the other, those of the whole."""
    firsts = list(accumulate((one.rows for one in parts), initial=0))
    row_K = torch.cat([one.row_K + first for one, first in zip(parts, firsts, strict=False)])
    scores = [one.score_K for one in parts if one.score_K is not None]
    score_K = torch.cat(scores) if len(scores) == len(parts) else None
    return Entries(row_K, torch.cat([one.latent_K for one in parts]), firsts[-1], parts[0].latents, score_K)


def _starts(index_K: Tensor, length: int) -> Tensor:
    """Where each number below `length` begins in an ordered index."""
    return torch.searchsorted(index_K.contiguous(), torch.arange(length, device=index_K.device))


def _stops(starts_N: Tensor, count: int) -> Tensor:
    return torch.cat([starts_N, starts_N.new_full((1,), count)])[1:]


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

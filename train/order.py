"""The order in which rows are served: arithmetic over one stream of kept rows.

Letters: N rows of the store, X blocks, R rows of a block, W windows of an epoch, B rows of a batch, T rows of a group.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shared.errors import StoreError
from train.chance import BLOCKS, ROWS, SAMPLE, distinct, keyed, permutation, permuted

MOST_COMPANIONS = 0.5
SAMPLE_ITEMS = 2**22  # items of the working arrays of `sample`: 32 MiB each


class Stream(ABC):
    """Row numbers one after another, and the line of blocks that they come from: all that a Loader asks for.

    The row at a position lies in a block that is at most `window_blocks` before the `front` there, or behind it.
    """

    kept_N: np.ndarray  # bool: what is served; of rows that come in groups, the first one
    blocks: int  # of the line, before it begins again
    window_blocks: int

    @abstractmethod
    def served(self, step: int, batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """The rows of `rank` at `step`, int64: those of positions [(step x world + rank) x batch, + batch).

        Sorted as a batch has them, so that a file is read from front to back.
        """

    @abstractmethod
    def prepare(self, position: int) -> None:
        """Work out beforehand what rows behind the window of `position` need, so that `served` has it at hand."""

    @abstractmethod
    def opened(self, position: int) -> int:
        """The first block, in the line, that the rows from `position` on may come from."""

    @abstractmethod
    def front(self, position: int) -> int:
        """How far the stream has come at `position`, in blocks of the line. It moves evenly."""

    @abstractmethod
    def reads(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(first row, number of rows) of what is to be read of blocks `start` to `stop` of the line, int64."""


class Order(Stream):
    """The endless stream that training reads; a position in it is all that a resume needs.

    stream = epoch 0, epoch 1, ...      each epoch: every kept row once, in another order
    epoch  = window 0, window 1, ...    all blocks permuted, `window_blocks` of them open at a time
    window = the kept rows of its blocks, permuted

    `block_rows` consecutive rows are a block; the last block may be shorter. Safe to use from several threads.
    """

    def __init__(self, kept_N: np.ndarray, block_rows: int, window_blocks: int, seed: int) -> None:
        assert kept_N.dtype == bool and block_rows > 0 and window_blocks > 0
        self.kept_N, self.block_rows, self.seed = kept_N, block_rows, seed
        self._in_blocks = _InBlocks(kept_N, block_rows)
        self.blocks, self.kept = len(self._in_blocks.counts_X), self._in_blocks.kept  # of an epoch
        self.window_blocks = min(window_blocks, self.blocks)
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    @property
    def window_rows(self) -> int:
        return self.window_blocks * self.block_rows

    def epoch(self, position: int) -> int:
        return position // self.kept

    def step(self, step: int, batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """The rows of `rank` at `step`: positions [(step x world + rank) x batch, + batch)."""
        start = (step * world + rank) * batch
        return self.rows(start, start + batch)

    def served(self, step: int, batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
        return np.sort(self.step(step, batch, rank, world))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The row numbers at positions `start` to `stop` of the stream, int64."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch, window, skipped = self._place(start)
            parts.append(self._window(epoch, window)[skipped : skipped + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def prepare(self, position: int) -> None:
        epoch, window, _ = self._place(position)
        last = (window + 1) * self.window_blocks >= self.blocks
        self._window(*((epoch + 1, 0) if last else (epoch, window + 1)))

    def opened(self, position: int) -> int:
        """The first block of the window that is open at `position`."""
        epoch, window, _ = self._place(position)
        return epoch * self.blocks + window * self.window_blocks

    def front(self, position: int) -> int:
        """It moves evenly through the open window, so that the next window can be fetched a little at every step."""
        epoch, window, skipped = self._place(position)
        first = window * self.window_blocks
        open_blocks = min(self.window_blocks, self.blocks - first)
        before, after = self._epoch(epoch).edges_W[window : window + 2].tolist()
        return epoch * self.blocks + first + open_blocks * skipped // (after - before)

    def reads(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Whole blocks, but those of which no row is kept."""
        return self._in_blocks.ranges(self.starts(start, stop) // self.block_rows)

    def starts(self, start: int, stop: int) -> np.ndarray:
        """The first rows of the blocks number `start` to `stop` in the endless line of blocks, int64."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch, skipped = divmod(start, self.blocks)
            blocks_X = self._epoch(epoch).blocks_X[skipped : skipped + stop - start]
            parts.append(blocks_X.astype(np.int64) * self.block_rows)
            start += len(blocks_X)
        return np.concatenate(parts)

    def sample(self, n: int, seed: int) -> np.ndarray:
        """`n` kept rows (all, where fewer are kept), drawn evenly without replacement, in ascending order, int64."""
        ranks = distinct(keyed(seed, SAMPLE), min(n, self.kept), self.kept)
        slice_ = max(1, SAMPLE_ITEMS // self.block_rows)
        parts = [self._in_blocks.select(ranks[i : i + slice_]) for i in range(0, len(ranks), slice_)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def _place(self, position: int) -> tuple[int, int, int]:
        """(epoch, window, rows of the window that come before) of a position."""
        epoch, skipped = divmod(position, self.kept)
        edges_W = self._epoch(epoch).edges_W
        window = int(np.searchsorted(edges_W, skipped, side="right")) - 1
        return epoch, window, skipped - int(edges_W[window])

    def _make_epoch(self, epoch: int) -> "_Epoch":
        # The smallest type, since a store of terabytes has tens of millions of blocks.
        blocks_X = permutation(keyed(self.seed, BLOCKS, epoch), self.blocks).astype(np.min_scalar_type(self.blocks))
        counts_W = np.add.reduceat(self._in_blocks.counts_X[blocks_X], np.arange(0, self.blocks, self.window_blocks))
        return _Epoch(blocks_X, np.cumsum(np.concatenate([[0], counts_W])))

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        first = window * self.window_blocks
        rows = self._in_blocks.rows(self._epoch(epoch).blocks_X[first : first + self.window_blocks])
        return permuted(keyed(self.seed, ROWS, epoch, window), rows)


@dataclass(frozen=True)
class _Epoch:
    blocks_X: np.ndarray  # all blocks, permuted
    edges_W: np.ndarray  # kept rows of the epoch before each window, and in all


class FileOrder(Stream):
    """The kept rows as they stand in the store, once: the last batch is shorter. The line has the blocks that keep any.

    A window has about `ahead` kept rows. Safe to use from several threads.
    """

    def __init__(self, kept_N: np.ndarray, block_rows: int, ahead: int) -> None:
        assert kept_N.dtype == bool and block_rows > 0 and ahead > 0
        self.kept_N = kept_N
        self._in_blocks = _InBlocks(kept_N, block_rows)
        self._blocks_X = np.flatnonzero(self._in_blocks.counts_X)
        self._ends_X = self._in_blocks.ends_X[self._blocks_X]
        self.blocks, self.kept = len(self._blocks_X), self._in_blocks.kept
        self.window_blocks = min(-(-ahead * self.blocks // self.kept), self.blocks)

    def steps(self, batch: int) -> int:
        """How many batches there are."""
        return -(-self.kept // batch)

    def served(self, step: int, batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
        start = (step * world + rank) * batch
        return self._in_blocks.select(np.arange(start, min(start + batch, self.kept)))

    def prepare(self, position: int) -> None:
        """Nothing: what a batch needs is found with it."""

    def opened(self, position: int) -> int:
        return self.front(position)

    def front(self, position: int) -> int:
        return int(np.searchsorted(self._ends_X, position, side="right"))

    def reads(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self._in_blocks.ranges(self._blocks_X[start:stop])


class Groups(Stream):
    """Runs of `length` neighbouring rows, in the order that another stream has for their first rows (`group_starts`).

    A batch has whole groups, one after another: x [B, width] is x [B / T, T, width]. Positions count rows, and the rows
    of a group follow one another. Safe to use from several threads.
    """

    def __init__(self, firsts: Stream, length: int) -> None:
        assert length > 0
        self.kept_N, self.blocks, self.window_blocks = firsts.kept_N, firsts.blocks, firsts.window_blocks
        self.length, self._firsts = length, firsts

    def served(self, step: int, batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Groups ascend by their first rows; one that comes twice, at the border of two epochs, is there twice."""
        assert batch % self.length == 0
        firsts = self._firsts.served(step, batch // self.length, rank, world)
        return (firsts[:, None] + np.arange(self.length)).ravel()

    def prepare(self, position: int) -> None:
        self._firsts.prepare(position // self.length)

    def opened(self, position: int) -> int:
        return self._firsts.opened(position // self.length)

    def front(self, position: int) -> int:
        return self._firsts.front(position // self.length)

    def reads(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks as far as groups that begin in them reach."""
        starts_X, rows_X = self._firsts.reads(start, stop)
        ends_X = np.minimum(starts_X + rows_X, len(self.kept_N))
        last_XT = ends_X[:, None] - np.arange(1, self.length)  # rows whose group would end in another block
        begins_XT = (last_XT >= starts_X[:, None]) & self.kept_N[last_XT.clip(0)]
        over_X = np.where(begins_XT, self.length - np.arange(1, self.length), 0).max(axis=1, initial=0)
        return starts_X, ends_X - starts_X + over_X


def group_starts(kept_N: np.ndarray, edges: np.ndarray, length: int) -> np.ndarray:
    """Where groups begin, bool N: `length` kept rows that follow one another in the store, within one segment.

    Segments begin at the rows `edges`, each within one document. From the beginning of a run of kept rows on it is
    divided into groups; what is left at its end, fewer rows than `length`, is in none.
    """
    begins_N = kept_N.copy()
    begins_N[1:] &= ~kept_N[:-1]
    inside = edges[edges < len(kept_N)]
    begins_N[inside] = kept_N[inside]
    ends_N = kept_N.copy()
    ends_N[:-1] &= ~kept_N[1:] | begins_N[1:]
    starts, groups = np.flatnonzero(begins_N), (np.flatnonzero(ends_N) + 1 - np.flatnonzero(begins_N)) // length
    found_N = np.zeros(len(kept_N), bool)
    while len(starts := starts[groups > 0]):  # the next group of every run that has one
        groups = groups[groups > 0]
        found_N[starts] = True
        starts, groups = starts + length, groups - 1
    return found_N


class _InBlocks:
    """The kept rows, counted by blocks of `block_rows`."""

    def __init__(self, kept_N: np.ndarray, block_rows: int) -> None:
        self._block_rows, whole = block_rows, len(kept_N) // block_rows
        self._kept_XR = kept_N[: whole * block_rows].reshape(-1, block_rows)  # of the whole blocks
        self._last_R = np.zeros(block_rows, bool)  # of the one that may be shorter
        self._last_R[: len(kept_N) - whole * block_rows] = kept_N[whole * block_rows :]
        starts_X = np.arange(0, len(kept_N), block_rows)
        self.counts_X = np.add.reduceat(kept_N, starts_X, dtype=np.int64) if len(kept_N) else starts_X
        self.ends_X = np.cumsum(self.counts_X)
        self.kept = int(self.counts_X.sum())
        if not self.kept:
            raise StoreError(
                "no row is left to serve",
                f"0 of {len(kept_N)} rows are kept",
                "Loosen the filter of rows, or harvest more",
            )

    def rows(self, blocks_X: np.ndarray) -> np.ndarray:
        """The kept rows of these blocks, block after block."""
        kept_XR = np.empty((len(blocks_X), self._block_rows), bool)
        whole_X = blocks_X < len(self._kept_XR)
        kept_XR[whole_X], kept_XR[~whole_X] = self._kept_XR[blocks_X[whole_X]], self._last_R
        moved_X = (blocks_X.astype(np.int64) - np.arange(len(blocks_X))) * self._block_rows
        return np.flatnonzero(kept_XR) + np.repeat(moved_X, self.counts_X[blocks_X])

    def select(self, ranks: np.ndarray) -> np.ndarray:
        """The rows that are number `ranks` among the kept rows."""
        blocks = np.searchsorted(self.ends_X, ranks, side="right")
        inside = ranks - (self.ends_X[blocks] - self.counts_X[blocks])
        touched_X, which = np.unique(blocks, return_inverse=True)
        counts_X = self.counts_X[touched_X]
        return self.rows(touched_X)[(np.cumsum(counts_X) - counts_X)[which] + inside]

    def ranges(self, blocks_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first row, number of rows) of those of these blocks that keep any."""
        found = blocks_X[self.counts_X[blocks_X] > 0]
        return found.astype(np.int64) * self._block_rows, np.full(len(found), self._block_rows)


def default_window_blocks(batch: int) -> int:
    """Blocks per window: the fewest with which a row has under 0.5 companions, whatever the size of a block."""
    return int(batch / MOST_COMPANIONS) + 1


def own_block(order: Order, batch: int) -> float:
    """How many rows of its own block a kept row is expected to find in its batch, on average.

    Where all rows are kept that is about batch x block_rows / window_rows.
    """
    return own_document(order, np.arange(0, len(order.kept_N), order.block_rows), batch)


def own_document(order: Order, starts_n: np.ndarray, batch: int) -> float:
    """How many rows of its own document a kept row is expected to find in its batch, on average.

    Those of its own block share its window; of the others in its document, as many as other blocks fall into the same
    window; of the window, a batch takes its share:

        (in the own block + elsewhere x (W - 1) / (X - 1)) x (B - 1) / (kept rows of a window - 1)

    `starts_n`: the first row of each document, ascending.
    """
    edges = np.union1d(starts_n, np.arange(0, len(order.kept_N), order.block_rows))
    edges = edges[edges < len(order.kept_N)]
    piece = np.add.reduceat(order.kept_N, edges, dtype=np.int64)  # kept rows of a block and a document
    document = np.searchsorted(starts_n, edges, side="right")
    whole = np.bincount(document, weights=piece)[document]
    near = float((piece * (piece - 1)).sum()) / order.kept
    far = float((piece * (whole - piece)).sum()) / order.kept
    share = (order.window_blocks - 1) / max(order.blocks - 1, 1)
    window = order.kept * order.window_blocks / order.blocks
    return (near + far * share) * (batch - 1) / max(window - 1, 1)

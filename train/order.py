"""The order in which rows are served: arithmetic over one endless stream of kept rows.

Letters: N rows of the store, X blocks, W windows of an epoch, B rows of a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shared.errors import StoreError

MOST_COMPANIONS = 0.5
SAMPLE_ITEMS = 2**22  # items of the working arrays of `sample` and `drawn`: 32 MiB each
MASK = 2**64 - 1
BLOCKS, ROWS, SAMPLE, SHARE = range(4)  # what a key is for


class Order:
    """The stream of row numbers; a position in it is all that a resume needs.

    stream = epoch 0, epoch 1, ...      each epoch: every kept row once, in another order
    epoch  = window 0, window 1, ...    all blocks permuted, `window_blocks` of them open at a time
    window = the kept rows of its blocks, permuted

    `block_rows` consecutive rows are a block; the last block may be shorter. Safe to use from several threads.
    """

    def __init__(self, kept_N: np.ndarray, block_rows: int, window_blocks: int, seed: int) -> None:
        assert kept_N.dtype == bool and block_rows > 0 and window_blocks > 0
        self.kept_N, self.block_rows, self.seed = kept_N, block_rows, seed
        starts_X = np.arange(0, len(kept_N), block_rows)
        self._counts_X = np.add.reduceat(kept_N, starts_X, dtype=np.int64) if len(kept_N) else starts_X
        self._ends_X = np.cumsum(self._counts_X)
        self.blocks, self.kept = len(starts_X), int(self._counts_X.sum())  # of an epoch
        self.window_blocks = min(window_blocks, self.blocks)
        if not self.kept:
            raise StoreError(
                "no row is left to serve",
                f"0 of {len(kept_N)} rows are kept",
                "Loosen the filter of rows, or harvest more",
            )
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

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The row numbers at positions `start` to `stop` of the stream, int64."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch, window, skipped = self._place(start)
            parts.append(self._window(epoch, window)[skipped : skipped + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def opened(self, position: int) -> int:
        """The first block of the window that is open at `position`, in the endless line of blocks."""
        epoch, window, _ = self._place(position)
        return epoch * self.blocks + window * self.window_blocks

    def front(self, position: int) -> int:
        """How far the stream has come at `position`, in blocks of the endless line of blocks.

        It moves evenly through the open window, so that a reader can fetch the next window a little at every step.
        """
        epoch, window, skipped = self._place(position)
        first = window * self.window_blocks
        open_blocks = min(self.window_blocks, self.blocks - first)
        before, after = self._epoch(epoch).edges_W[window : window + 2].tolist()
        return epoch * self.blocks + first + open_blocks * skipped // (after - before)

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
        ranks = _distinct(_key(seed, SAMPLE), min(n, self.kept), self.kept)
        slice_ = max(1, SAMPLE_ITEMS // self.block_rows)
        parts = [self._select(ranks[i : i + slice_]) for i in range(0, len(ranks), slice_)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def _place(self, position: int) -> tuple[int, int, int]:
        """(epoch, window, rows of the window that come before) of a position."""
        epoch, skipped = divmod(position, self.kept)
        edges_W = self._epoch(epoch).edges_W
        window = int(np.searchsorted(edges_W, skipped, side="right")) - 1
        return epoch, window, skipped - int(edges_W[window])

    def _make_epoch(self, epoch: int) -> "_Epoch":
        # The smallest type, since a store of terabytes has tens of millions of blocks.
        blocks_X = permutation(_key(self.seed, BLOCKS, epoch), self.blocks).astype(np.min_scalar_type(self.blocks))
        counts_W = np.add.reduceat(self._counts_X[blocks_X], np.arange(0, self.blocks, self.window_blocks))
        return _Epoch(blocks_X, np.cumsum(np.concatenate([[0], counts_W])))

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        first = window * self.window_blocks
        rows = self._kept_in(self._epoch(epoch).blocks_X[first : first + self.window_blocks])
        return rows[permutation(_key(self.seed, ROWS, epoch, window), len(rows))]

    def _kept_in(self, blocks_X: np.ndarray) -> np.ndarray:
        """The kept rows of these blocks, block after block."""
        rows = (blocks_X.astype(np.int64)[:, None] * self.block_rows + np.arange(self.block_rows)).ravel()
        rows = rows[rows < len(self.kept_N)]
        return rows[self.kept_N[rows]]

    def _select(self, ranks: np.ndarray) -> np.ndarray:
        """The rows that are number `ranks` among the kept rows."""
        blocks = np.searchsorted(self._ends_X, ranks, side="right")
        inside = ranks - (self._ends_X[blocks] - self._counts_X[blocks])
        touched_X, which = np.unique(blocks, return_inverse=True)
        counts_X = self._counts_X[touched_X]
        return self._kept_in(touched_X)[(np.cumsum(counts_X) - counts_X)[which] + inside]


@dataclass(frozen=True)
class _Epoch:
    blocks_X: np.ndarray  # all blocks, permuted
    edges_W: np.ndarray  # kept rows of the epoch before each window, and in all


def permutation(key: int, n: int) -> np.ndarray:
    """A permutation of range(n), int64, that depends on `key` alone, not on the version of any library.

    The numbers stand in the low bits of their own random numbers: sorting values takes a tenth of the time of argsort.
    """
    index = np.arange(n, dtype=np.uint64)
    low = np.uint64((1 << max(n - 1, 0).bit_length()) - 1)
    mixed = splitmix64(key, index) & ~low | index
    mixed.sort()
    return (mixed & low).view(np.int64)


def drawn(n: int, total: int, seed: int) -> np.ndarray:
    """Which `n` of `total` are drawn evenly without replacement: a mask.

    They have the smallest random numbers: no two are alike, as SplitMix64 is a bijection. So those of a smaller n are
    among those of a larger one. The memory is that of the mask, and a few pieces of SAMPLE_ITEMS.
    """
    assert 0 <= n <= total
    if n in (0, total):
        return np.full(total, n > 0)
    key = _key(seed, SHARE)

    def numbers() -> Iterator[np.ndarray]:
        for start in range(0, total, SAMPLE_ITEMS):
            yield splitmix64(key, np.arange(start, min(start + SAMPLE_ITEMS, total)))

    below = np.cumsum(sum(np.bincount(_high(part), minlength=2**16) for part in numbers()))
    last = int(np.searchsorted(below, n))  # the high bits of the largest number that is drawn
    candidates = np.concatenate([part[_high(part) == last] for part in numbers()])
    rank = n - 1 - (int(below[last - 1]) if last else 0)
    largest = np.partition(candidates, rank)[rank]
    return np.concatenate([part <= largest for part in numbers()])


def _high(numbers: np.ndarray) -> np.ndarray:
    """The upper 16 bits."""
    return (numbers >> np.uint64(48)).astype(np.int64)


def splitmix64(key: int, index: np.ndarray) -> np.ndarray:
    """Output number `index` of the generator SplitMix64 seeded with `key` (Steele, Lea and Flood 2014), uint64."""
    z = (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def default_window_blocks(batch: int) -> int:
    """Blocks per window: the fewest with which a row has under 0.5 companions, whatever the size of a block."""
    return int(batch / MOST_COMPANIONS) + 1


def companions(batch: int, block_rows: int, window_rows: int) -> float:
    """About how many rows of its own block a row finds in its batch: batch x block_rows / window_rows."""
    return batch * block_rows / window_rows


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


def _key(*parts: int) -> int:
    key = 0
    for part in parts:
        key = int(splitmix64((key + part) & MASK, np.zeros(1))[0])
    return key


def _distinct(key: int, n: int, total: int) -> np.ndarray:
    """`n` distinct numbers below `total`, ascending, in time and memory O(n)."""
    if 4 * n >= total:
        return np.sort(permutation(key, total)[:n])
    draws, found, first = n, np.empty(0, np.uint64), np.empty(0, np.int64)
    while len(found) < n:
        draws *= 2
        found, first = np.unique(splitmix64(key, np.arange(draws)) % np.uint64(total), return_index=True)
    return np.sort(found[np.argsort(first)[:n]]).astype(np.int64)

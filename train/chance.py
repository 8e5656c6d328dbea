"""Random numbers that depend on a key alone: not on the version of any library, nor on how many are drawn at once."""

from collections.abc import Iterator

import numpy as np

PIECE = 2**22  # items of the working arrays of `drawn`: 32 MiB each
MASK = 2**64 - 1
BLOCKS, ROWS, SAMPLE, SHARE, BEGIN = range(5)  # what a key is for


def keyed(*parts: int) -> int:
    """A key of these parts, in their order."""
    key = 0
    for part in parts:
        key = int(splitmix64((key + part) & MASK, np.zeros(1))[0])
    return key


def permutation(key: int, n: int) -> np.ndarray:
    """A permutation of range(n), int64, that depends on `key` alone, not on the version of any library."""
    return permuted(key, np.arange(n))


def permuted(key: int, numbers: np.ndarray) -> np.ndarray:
    """These numbers (int64, from 0 on, all different) in an order that depends on `key` and them alone.

    They stand in the low bits of random numbers of their own: sorting values takes a tenth of the time of argsort.
    """
    low = np.uint64((1 << int(numbers.max(initial=0)).bit_length()) - 1)
    mixed = splitmix64(key, np.arange(len(numbers)))
    mixed &= ~low
    mixed |= numbers.view(np.uint64)
    mixed.sort()
    mixed &= low
    return mixed.view(np.int64)


def drawn(n: int, total: int, seed: int) -> np.ndarray:
    """Which `n` of `total` are drawn evenly without replacement: a mask.

    They have the smallest random numbers: no two are alike, as SplitMix64 is a bijection. So those of a smaller n are
    among those of a larger one. The memory is that of the mask, and a few pieces of PIECE.
    """
    assert 0 <= n <= total
    if n in (0, total):
        return np.full(total, n > 0)
    key = keyed(seed, SHARE)

    def numbers() -> Iterator[np.ndarray]:
        for start in range(0, total, PIECE):
            yield splitmix64(key, np.arange(start, min(start + PIECE, total)))

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
    z = index.astype(np.uint64) + np.uint64(1)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(key)
    shifted = z >> np.uint64(30)
    z ^= shifted
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= np.right_shift(z, np.uint64(27), out=shifted)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= np.right_shift(z, np.uint64(31), out=shifted)
    return z


def distinct(key: int, n: int, total: int) -> np.ndarray:
    """`n` distinct numbers below `total`, ascending, in time and memory O(n)."""
    if 4 * n >= total:
        return np.sort(permutation(key, total)[:n])
    draws, found, first = n, np.empty(0, np.uint64), np.empty(0, np.int64)
    while len(found) < n:
        draws *= 2
        found, first = np.unique(splitmix64(key, np.arange(draws)) % np.uint64(total), return_index=True)
    return np.sort(found[np.argsort(first)[:n]]).astype(np.int64)


def weighted(key: int, weight_N: np.ndarray, n: int) -> np.ndarray:
    """`n` numbers below N, drawn one after another with chances as these weights (not negative), each of them once.

    Where n is larger than the count of weights above 0, these come again in the same order; of weights that are all 0
    every number has the same chance. By the keys u^(1 / weight) of Efraimidis and Spirakis (2006).
    """
    if not weight_N.any():
        weight_N = np.ones(len(weight_N))
    some = np.flatnonzero(weight_N)
    late = -np.log(uniform(key, some)) * (weight_N.max() / weight_N[some])
    return np.resize(some[np.argsort(late, kind="stable")], n)


def uniform(key: int, index: np.ndarray) -> np.ndarray:
    """Numbers `index` of a stream of evenly distributed ones between 0 and 1, float64."""
    return ((splitmix64(key, index) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normal(key: int, index: np.ndarray) -> np.ndarray:
    """Numbers `index` of a stream of standard normal ones, float64 (Box and Muller 1958)."""
    radius = np.sqrt(-2 * np.log(uniform(keyed(key, 0), index)))
    return radius * np.cos(2 * np.pi * uniform(keyed(key, 1), index))

"""How many rows each store of a mixture gives, and which.

Letters: N rows of one store.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from shared import config
from shared.errors import ConfigError
from shared.remote import name_of
from shared.view import View
from train.chance import drawn


def of_stores(store: View, weights: Mapping[str, float]) -> list[float]:
    """The weight of every store of a mixture, in their order; they are named by their folders, without .zarr.

    Raises ConfigError where the weights and the stores are not the same by name, and for a store that is no mixture.
    """
    names = [name_of(one.path) for one in store.stores]
    if len(names) == 1:
        way_out = "Leave them out, or name several stores: train run A.zarr B.zarr"
        raise ConfigError("rows.weights are of several stores, and this is one", store.place, way_out)
    if twice := next((name for name in names if names.count(name) > 1), None):
        way_out = "Rename one, or name it by a symbolic link of another name"
        raise ConfigError(f"two stores are called {twice}, and rows.weights go by names", store.place, way_out)
    for name in weights:
        if name not in names:
            raise config.unknown("rows.weights names a store that is not there", name, names)
    if lacking := ", ".join(name for name in names if name not in weights):
        raise ConfigError("stores without a weight in rows.weights", lacking, "Weigh every store, or none")
    return [weights[name] for name in names]


def shares(kept: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many of its `kept` rows each store gives, so that the shares are those of the weights, each to a row.

    It is the largest such epoch: n rows, of which a store of weight w gives n x w / sum(w), and has as many. What is
    left over by rounding down goes to the stores with the largest remainders.
    """
    parts = [Fraction(str(weight)) for weight in weights]  # 0.7 is what is written, not the float next to it
    total = sum(parts)
    epoch = min(math.floor(count * total / part) for count, part in zip(kept, parts, strict=True))
    exact = [epoch * part / total for part in parts]
    given = [math.floor(count) for count in exact]
    by_remainder = sorted(range(len(exact)), key=lambda store: given[store] - exact[store])
    for store in by_remainder[: epoch - sum(given)]:
        given[store] += 1
    return given


def thinned(kept_N: np.ndarray, n: int) -> np.ndarray:
    """`n` of the kept rows of a store, drawn evenly: always the same, in every epoch and under every seed.

    Those of a smaller n are among those of a larger one.
    """
    left_N = kept_N.copy()
    left_N[kept_N] = drawn(n, int(np.count_nonzero(kept_N)), seed=0)
    return left_N

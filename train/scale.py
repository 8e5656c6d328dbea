"""Centring and scaling per source: part of the dictionary, which takes raw rows and gives raw rows.

Letters: N rows, B rows of a batch, D width of a source.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from shared.errors import StoreError
from shared.flags import FIRST, MASKED, SINK, SPECIAL, TRAIN
from shared.moments import Moments
from shared.view import View
from train.order import Order
from train.reader import read, require_finite
from train.sources import Sources, parts

Kind = Literal["none", "rms", "median_norm"]
MEDIAN_ROWS = 2**17  # rows behind a median: all where a run keeps no more, else a keyed sample (0.3 % standard error)
CHUNK = 4096


class Scale(nn.Module):
    """scaled = (x - mean) x factor, and back. A mean vector and a factor per source, saved with the dictionary."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        for source, width in widths.items():
            self.register_buffer(f"mean_{source}", torch.zeros(width))
            self.register_buffer(f"factor_{source}", torch.ones(()))

    def mean(self, source: str) -> Tensor:
        return self.get_buffer(f"mean_{source}")

    def factor(self, source: str) -> Tensor:
        return self.get_buffer(f"factor_{source}")

    def scaled(self, source: str, x_BD: Tensor) -> Tensor:
        return (x_BD - self.mean(source)) * self.factor(source)

    def raw(self, source: str, x_BD: Tensor) -> Tensor:
        return x_BD / self.factor(source) + self.mean(source)


def fit(store: View, names: Sequence[str], order: Order, kind: Kind, centre: bool) -> Scale:
    """The scale of the rows that `order` serves.

    mean    the mean of a source's rows, exact, where `centre`; else 0. Of a difference: the difference of the means
    factor  none:         1
            rms:          brings the mean square of a component (behind the centring, where asked) to 1
            median_norm:  brings the median norm of a centred row to the square root of the sources' mean width (the
                          rule of the DFC paper, arXiv 2602.11729 section 3, there without centring)
    Raises StoreError for a source whose rows are all alike.
    """
    sources = Sources(store, names)
    scale = Scale(sources.widths)
    target = math.sqrt(sum(sources.widths.values()) / len(sources.widths))
    stored = {part: kept_moments(store, part, order.kept_N) for part in sources.stored}
    means = {part: moments.mean_D for part, moments in stored.items()}
    for name, width in sources.widths.items():
        moments = stored[name] if name in stored else _difference_moments(store, name, order, kind)
        if not moments.variance() > 0:
            raise StoreError("all rows of this source are alike", name, "Leave it out, or harvest another site")
        mean_D = sources.mean(name, means) if centre else np.zeros(width)
        scale.mean(name).copy_(torch.from_numpy(mean_D))
        if kind == "none":
            continue
        spread = math.sqrt(moments.variance() / width) if centre else _rms(moments)
        size = spread if kind == "rms" else _median_norm(store, name, order, mean_D) / target
        if not size > 0:
            raise StoreError("most rows of this source are alike", name, "Leave it out, or set scale.kind to rms")
        scale.factor(name).fill_(1 / size)
    return scale


def _rms(moments: Moments) -> float:
    return math.sqrt(moments.variance() / len(moments.mean_D) + float(np.square(moments.mean_D).mean()))


def _difference_moments(store: View, name: str, order: Order, kind: Kind) -> Moments:
    """Of a difference no moments are stored: where its spread counts all kept rows are read, else a sample of them."""
    rows = np.flatnonzero(order.kept_N) if kind == "rms" else order.sample(MEDIAN_ROWS, seed=0)
    return _read_moments(store, name, rows)


def kept_moments(store: View, source: str, kept_N: np.ndarray) -> Moments:
    """The moments of the kept rows of a stored source, exact, in the model's own units.

    They are those of the store's class of ordinary training rows, less the few that this run drops for another source's
    sake. Where the two differ by more than a tenth, in a store of a mixture, all its kept rows are read instead.
    """
    total, stores = Moments.empty(store.source(source).width), store.stores
    parts = np.split(kept_N, np.cumsum([one.rows for one in stores])[:-1])
    for one, part_N in zip(stores, parts, strict=True):
        total = total.merge(_kept_of_store(one, source, part_N))
    return total


def _kept_of_store(store: View, source: str, kept_N: np.ndarray) -> Moments:
    total = store.moments(source, ["ordinary/train"])
    ordinary_N = ordinary_rows(store, source)
    extra = np.flatnonzero(ordinary_N & ~kept_N)
    if (kept_N & ~ordinary_N).any() or len(extra) > 0.1 * total.count:
        return _read_moments(store, source, np.flatnonzero(kept_N))
    return total.without(_read_moments(store, source, extra))


def ordinary_rows(store: View, source: str) -> np.ndarray:
    """The rows of the class ordinary/train of this source's moments (STORE.md), bool N."""
    flags_N = np.bitwise_or.reduce([store.column(f"rows/{model}/flags") for model in store.beside(source)])
    train_n = store.column("documents/split") == TRAIN
    bad_N = (flags_N & (SPECIAL | FIRST) > 0) | (store.column(f"faults/{source}") & (SINK | MASKED) > 0)
    return ~bad_N & train_n[store.column("rows/document")]


def _read_moments(store: View, name: str, rows: np.ndarray) -> Moments:
    total = Moments.empty(Sources(store, [name]).widths[name])
    for x in read(store, [name], rows, CHUNK):
        total = total.merge(Moments.of(x[name].double()))
    return total


def _median_norm(store: View, name: str, order: Order, mean_D: np.ndarray) -> float:
    mean = torch.from_numpy(mean_D)
    rows = order.sample(MEDIAN_ROWS, seed=0)
    norms = [torch.linalg.vector_norm(x[name].double() - mean, dim=1) for x in read(store, [name], rows, CHUNK)]
    median = float(np.median(torch.cat(norms).numpy()))
    if not math.isfinite(median):
        for part in parts(name):
            require_finite(store, part, rows)
    return median


def geometric_median(x_ND: Tensor) -> Tensor:
    """The point with the least sum of distances to these rows, [D], fp64, by Weiszfeld's algorithm.

    It ends where a step moves it by less than 1e-6 of the mean distance, or after 100 steps.
    """
    x_ND = x_ND.double()
    point_D = x_ND.mean(0)
    for _ in range(100):
        far_N = torch.linalg.vector_norm(x_ND - point_D, dim=1)
        if not far_N.any():  # rows that are all alike
            break
        weight_N = 1 / far_N.clamp_min(1e-12 * far_N.mean())  # a row that it stands on would have all the weight
        before_D, point_D = point_D, weight_N @ x_ND / weight_N.sum()
        if torch.linalg.vector_norm(point_D - before_D) <= 1e-6 * far_N.mean():
            break
    return point_D

"""Centring and scaling per source: part of the dictionary, which takes raw rows and gives raw rows.

Letters: N rows, B rows of a batch, D width of a source.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from shared import layout
from shared.errors import StoreError
from shared.flags import FIRST, MASKED, SINK, SPECIAL, TRAIN
from shared.moments import Moments
from shared.reading import MAPPED, Access
from shared.view import View
from train.order import Order
from train.reader import Reader

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


def fit(store: View, sources: Sequence[str], order: Order, kind: Kind, centre: bool, access: Access = MAPPED) -> Scale:
    """The scale of the rows that `order` serves.

    mean    the mean of a source's rows, exact, where `centre`; else 0
    factor  none:         1
            rms:          brings the mean square of a component (behind the centring, where asked) to 1
            median_norm:  brings the median norm of a centred row to the square root of the sources' mean width (the
                          rule of the DFC paper, arXiv 2602.11729 section 3, there without centring)
    Raises StoreError for a source whose rows are all alike.
    """
    widths = {name: store.source(name).width for name in sources}
    scale = Scale(widths)
    target = math.sqrt(sum(widths.values()) / len(widths))
    with Reader(store, sources, access) as reader:
        for name in sources:
            moments = kept_moments(store, reader, name, order.kept_N)
            if not moments.variance() > 0:
                raise StoreError("all rows of this source are alike", name, "Leave it out, or harvest another site")
            mean_D = moments.mean_D if centre else np.zeros(widths[name])
            scale.mean(name).copy_(torch.from_numpy(mean_D))
            if kind == "none":
                continue
            spread = math.sqrt(moments.variance() / widths[name]) if centre else _rms(moments)
            size = spread if kind == "rms" else _median_norm(store, reader, name, order, mean_D) / target
            if not size > 0:
                raise StoreError("most rows of this source are alike", name, "Leave it out, or set scale.kind to rms")
            scale.factor(name).fill_(1 / size)
    return scale


def _rms(moments: Moments) -> float:
    return math.sqrt(moments.variance() / len(moments.mean_D) + float(np.square(moments.mean_D).mean()))


def kept_moments(store: View, reader: Reader, source: str, kept_N: np.ndarray) -> Moments:
    """The moments of the kept rows of a source, exact, in the model's own units.

    They are those of the store's class of ordinary training rows, less the few that this run drops for another source's
    sake. Where the two differ by more than a tenth, all kept rows are read instead.
    """
    total = store.moments(source, ["ordinary/train"])
    ordinary_N = ordinary_rows(store, source)
    extra = np.flatnonzero(ordinary_N & ~kept_N)
    if (kept_N & ~ordinary_N).any() or len(extra) > 0.1 * total.count:
        return _read_moments(store, reader, source, np.flatnonzero(kept_N))
    return total.without(_read_moments(store, reader, source, extra))


def ordinary_rows(store: View, source: str) -> np.ndarray:
    """The rows of the class ordinary/train of this source's moments (STORE.md), bool N."""
    flags_N = np.bitwise_or.reduce([store.column(f"rows/{model}/flags") for model in store.beside(source)])
    train_n = store.column("documents/split") == TRAIN
    bad_N = (flags_N & (SPECIAL | FIRST) > 0) | (store.column(f"faults/{source}") & (SINK | MASKED) > 0)
    return ~bad_N & train_n[store.column("rows/document")]


def _read_moments(store: View, reader: Reader, source: str, rows: np.ndarray) -> Moments:
    total = Moments.empty(store.source(source).width)
    for x_ND in _read(store, reader, source, rows):
        total = total.merge(Moments.of(x_ND))
    return total


def _median_norm(store: View, reader: Reader, source: str, order: Order, mean_D: np.ndarray) -> float:
    mean = torch.from_numpy(mean_D)
    rows = order.sample(MEDIAN_ROWS, seed=0)
    norms = [torch.linalg.vector_norm(x_ND - mean, dim=1) for x_ND in _read(store, reader, source, rows)]
    return float(np.median(torch.cat(norms).numpy()))


def _read(store: View, reader: Reader, source: str, rows: np.ndarray) -> Iterable[Tensor]:
    """These rows of one source in the model's own units, float64, a piece at a time."""
    factor = store.factor(source)
    return (layout.floats(x[source]).double() * factor for _, x in reader.stream(rows, CHUNK))

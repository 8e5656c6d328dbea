"""Batches of a store's rows for people's own loops: what training reads, or the store from front to back.

Letters: B rows of a batch, T rows of a group.
"""

import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch

from shared import config as configs
from shared.device import device_of
from shared.errors import ConfigError
from shared.mixture import Place, open_mixture
from shared.reading import IO, Access
from shared.view import View
from train import resident
from train.filter import Kept, RowsConfig, kept_rows, require_rows
from train.loader import Loader, Rows
from train.order import FileOrder, Groups, Order, Stream, default_window_blocks, group_starts
from train.prepare import order_of
from train.sources import Sources

ORDERS = ("shuffled", "file")
ENDLESS = 2**62  # steps
AHEAD = 4  # batches of the file order that are fetched before their time


class Batches(Iterator[Rows]):
    """Batches while they are read. The threads behind it end with the last one, with close(), with the block of a
    `with`, or when nobody holds it any more.

    `kept` rows are served, in an epoch where there are several; `dropped` says how many rows each rule of the filter
    dropped, and `leftover` how many fill no group.
    """

    def __init__(self, served: Generator[Rows], kept: int, dropped: Mapping[str, int]) -> None:
        self._served, self.kept, self.dropped = served, kept, dict(dropped)
        self._close = weakref.finalize(self, served.close)  # also before the interpreter is taken down

    def __next__(self) -> Rows:
        return next(self._served)

    def close(self) -> None:
        """Stop and join the threads. Batches that were handed out hold."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def batches(
    store: Place | Sequence[Place], sources: list[str] | None = None, batch: int = 4096,
    rows: RowsConfig | Mapping[str, Any] | None = None, order: Literal["shuffled", "file"] = "shuffled",
    steps: int | None = None, device: str = "cpu", seed: int | None = None, length: int = 1, io: IO = "map",
) -> Batches:  # fmt: skip
    """Batches of the kept rows of a store, or of several as one, open or by their paths: `x` {source: float32
    [B, width]} in the model's own units, on the device, and `rows_B`, their numbers in the store.

    sources   none: all of the store
    rows      the filter, a RowsConfig or its keys: none: the default one of training
    order     shuffled: what a run of this batch and seed reads, epoch after epoch, without an end
              file: each kept row once, as the store has them; the last batch is shorter
    steps     batches at most; none: all there are
    seed      of the shuffled order; none: rows.seed
    length    T, of which B is a multiple: groups of T rows that follow one another in the store, within one segment of
              a document and all of them kept; groups stand one after another in a batch, x.view(B // T, T, width).
              Each comes once an epoch; rows that are left at the end of a run fill no group and are dropped
    io        map or pread, as read.io of a run

    Raises ConfigError or StoreError before anything is read.
    """
    opened = open_mixture(store).through(Access(io))
    asked = configs.parse(RowsConfig, rows) if isinstance(rows, Mapping) else rows or RowsConfig()
    _require(order, batch, length, steps)
    place = device_of(device)
    names = list(Sources(opened, opened.header.sources if sources is None else sources).widths)
    if not names:
        raise ConfigError("no source is asked for", sources, f"The store has: {', '.join(opened.header.sources)}")
    kept = kept_rows(opened, asked)
    require_rows(kept)
    firsts_N = _firsts(opened, kept, length)
    training = order_of(opened, kept, batch, asked.seed if seed is None else seed)
    line, most = _line(training, firsts_N, order, batch, length)
    served = length * int(firsts_N.sum())
    left = {} if length == 1 else {"leftover": int(kept.kept_N.sum()) - served}
    planned = range(most if steps is None else min(steps, most))
    fits = resident.place(opened, names, training, torch.device("cpu"), served) == "memory"
    opened = opened.through(Access(io, drops=not fits))
    return Batches(_served(opened, names, line, batch, planned, place), served, kept.dropped | left)


def _served(
    store: View, sources: list[str], line: Stream, batch: int, steps: range, device: torch.device
) -> Generator[Rows, None, None]:
    with Loader(store, sources, line, batch, steps, device) as loader:
        yield from loader


def _require(order: str, batch: int, length: int, steps: int | None) -> None:
    if order not in ORDERS:
        raise configs.unknown("unknown order", order, ORDERS)
    for name, value, least in (("batch", batch, 1), ("length", length, 1), ("steps", steps, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name} is too small", value, f"Give {least} or more")
    if batch % length:
        way_out = f"Take {-(-batch // length) * length} rows, or another length"
        raise ConfigError("the batch holds no whole groups", f"{batch} rows, {length} in a group", way_out)


def _firsts(store: View, kept: Kept, length: int) -> np.ndarray:
    """The rows with which groups of so many begin, bool N. Raises ConfigError where there is none."""
    if length == 1:
        return kept.kept_N
    firsts_N = group_starts(kept.kept_N, store.column("segments/row"), length)
    if not firsts_N.any():
        raise ConfigError("no segment has so many kept rows one after another", length, "Lower length, or loosen rows")
    return firsts_N


def _line(training: Order, firsts_N: np.ndarray, order: str, batch: int, length: int) -> tuple[Stream, int]:
    """What is served, and how many batches of it there are.

    A block of groups has as many groups as a block of `training` has rows, so that few of them reach into the next one,
    and a window as many rows.
    """
    block_rows, groups = length * training.block_rows, batch // length
    if order == "file":
        whole = FileOrder(firsts_N, block_rows, AHEAD * groups)
        return whole if length == 1 else Groups(whole, length), whole.steps(groups)
    endless = Order(firsts_N, block_rows, default_window_blocks(groups), training.seed)
    if groups > endless.kept:
        value, way_out = f"{batch:,} > {length * endless.kept:,}", "Lower batch, or read a larger store"
        raise ConfigError("the batch is larger than the rows that are served", value, way_out)
    return endless if length == 1 else Groups(endless, length), ENDLESS

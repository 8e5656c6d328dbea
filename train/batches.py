"""Batches of a store's rows for people's own loops: what training reads, or the store from front to back.

Letters: B rows of a batch.
"""

import weakref
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch

from shared import config as configs
from shared.device import device_of
from shared.errors import ConfigError
from shared.family import open_family
from shared.reading import IO, Access
from shared.view import View
from train.filter import RowsConfig, kept_rows, require_rows
from train.fit import order_of
from train.loader import Loader, Rows
from train.order import FileOrder, Order, Stream

ORDERS = ("shuffled", "file")
ENDLESS = 2**62  # steps
AHEAD = 4  # batches of the file order that are fetched before their time


class Batches(Iterator[Rows]):
    """Batches while they are read. The threads behind it end with the last one, with close(), with the block of a
    `with`, or when nobody holds it any more.

    `kept` rows are served, in an epoch where there are several; `dropped` says how many rows each rule of the filter
    dropped.
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
    store: View | str | Path, sources: list[str] | None = None, batch: int = 4096,
    rows: RowsConfig | Mapping[str, Any] | None = None, order: Literal["shuffled", "file"] = "shuffled",
    steps: int | None = None, device: str = "cpu", seed: int | None = None, io: IO = "map",
) -> Batches:  # fmt: skip
    """Batches of the kept rows of a store, or of that at a path: `x` {source: float32 [B, width]} in the model's own
    units, on the device, and `rows_B`, their numbers in the store.

    sources   none: all of the store
    rows      the filter, a RowsConfig or its keys: none: the default one of training
    order     shuffled: what a run of this batch and seed reads, epoch after epoch, without an end
              file: each kept row once, as the store has them; the last batch is shorter
    steps     batches at most; none: all there are
    seed      of the shuffled order; none: rows.seed
    io        map or pread, as read.io of a run

    Raises ConfigError or StoreError before anything is read.
    """
    opened = open_family(store) if isinstance(store, str | Path) else store
    asked = configs.parse(RowsConfig, rows) if isinstance(rows, Mapping) else rows or RowsConfig()
    _require(order, batch, steps)
    place = device_of(device)
    names = [opened.source(name).name for name in (opened.header.sources if sources is None else sources)]
    if not names:
        raise ConfigError("no source is asked for", sources, f"The store has: {', '.join(opened.header.sources)}")
    kept = kept_rows(opened, asked)
    require_rows(kept)
    training = order_of(opened, kept, batch, asked.seed if seed is None else seed)
    line, most = (training, ENDLESS) if order == "shuffled" else _in_file(training, batch)
    if order == "shuffled" and batch > training.kept:
        value, way_out = f"{batch:,} > {training.kept:,}", "Lower batch, or read a larger store"
        raise ConfigError("the batch is larger than the rows that are served", value, way_out)
    planned = range(most if steps is None else min(steps, most))
    return Batches(_served(opened, names, line, batch, planned, place, Access(io)), training.kept, kept.dropped)


def _in_file(training: Order, batch: int) -> tuple[Stream, int]:
    """The same rows as the store has them, and how many batches of them there are."""
    whole = FileOrder(training.kept_N, training.block_rows, AHEAD * batch)
    return whole, whole.steps(batch)


def _served(
    store: View, sources: list[str], line: Stream, batch: int, steps: range, device: torch.device, access: Access
) -> Generator[Rows, None, None]:
    with Loader(store, sources, line, batch, steps, device, access=access) as loader:
        yield from loader


def _require(order: str, batch: int, steps: int | None) -> None:
    if order not in ORDERS:
        raise configs.unknown("unknown order", order, ORDERS)
    for name, value, least in (("batch", batch, 1), ("steps", steps, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name} is too small", value, f"Give {least} or more")

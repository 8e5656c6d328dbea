"""Rows that stay where they are used: whether they fit there, and batches of those that lie on the device.

Letters: K kept rows, B rows of a batch, D width of a source.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shared.device import free_memory, sent
from shared.view import View
from train.loader import Feed, Loader, Rows, ring
from train.order import Order
from train.reader import Reader
from train.sources import Sources

Where = Literal["device", "memory", "no"]
SHARE = 0.5  # of the free memory that rows may take; the rest is for what training takes, and for others
OF_MAPS = 0.9  # of pages of maps, which the system takes back where they are in the way
COPY_BYTES = 2**24  # of a source, on its way to the device at once


def place(
    store: View, sources: list[str], order: Order, device: torch.device, rows: int, beside: int = 0, alike: int = 1
) -> Where:
    """Where the rows of these sources can stay while a run reads `rows` of them.

    device  on the GPU: the kept rows take less than half of its free memory, and the run reads each of them
    memory  on this machine: all rows take less than half of its free memory, or 0.9 of it where they are mapped
    no      nowhere: two windows of them at a time are in memory

    `beside`: bytes of the device that are free now and the run will take. `alike`: processes of this machine that do
    the same, each with memory of its own; they share pages of maps.
    """
    stored = Sources(store, sources).stored
    row_bytes = store.dtype.itemsize * sum(store.source(name).width for name in stored)
    if device.type == "cuda" and rows >= order.kept and order.kept * row_bytes < SHARE * (free_memory(device) - beside):
        return "device"
    share = SHARE / alike if any(store.activations(name, store.access).owns for name in stored) else OF_MAPS
    free = free_memory(torch.device("cpu")) - (beside if device.type == "cpu" else 0)
    return "memory" if store.rows * row_bytes < share * free else "no"


def feed(
    where: Where, store: View, sources: list[str], order: Order, batch: int, steps: range, device: torch.device,
    rank: int = 0, world: int = 1,
) -> Feed:  # fmt: skip
    """The batches of a run whose rows stay there: the same to the bit. On the CPU each holds until the next."""
    if where == "device":
        return Held(store, sources, order, batch, steps, device, rank, world)
    placed = store.through(replace(store.access, stays=where == "memory", drops=where == "no"))
    return Loader(placed, sources, order, batch, steps, device, rank=rank, world=world, reuse=True)


class Held(Feed):
    """The kept rows on the device, copied once, as they are stored; each batch is gathered there.

    order -> rows_B -> their places among the kept rows -> index_select (-> float32 of train.sources) -> Rows
    """

    def __init__(
        self, store: View, sources: list[str], order: Order, batch: int, steps: range, device: torch.device,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.order, self.batch, self.device, self.rank, self.world = order, batch, device, rank, world
        self._steps = iter(steps)
        self._sources = Sources(store, sources)
        self._rows_K = np.flatnonzero(order.kept_N)
        with Reader(store.through(replace(store.access, stays=False, drops=True)), self._sources.stored) as reader:
            self._x = _copied(reader, self._rows_K, order.block_rows, device)
        self._row_bytes = store.dtype.itemsize * sum(reader.widths.values())

    def __iter__(self) -> Iterator[Rows]:
        while (step := next(self._steps, None)) is not None:
            began = time.perf_counter()
            rows_B = self.order.served(step, self.batch, self.rank, self.world)
            at_B = sent(torch.from_numpy(np.searchsorted(self._rows_K, rows_B)), self.device)
            x = self._sources.rows({name: x_KD.index_select(0, at_B) for name, x_KD in self._x.items()})
            self.rows_served += len(rows_B)
            self.bytes_served += len(rows_B) * self._row_bytes
            self.waited_s += time.perf_counter() - began
            yield Rows(x, torch.from_numpy(rows_B))

    def close(self) -> None:
        """Let go of the memory on the device."""
        self._steps, self._x = iter(range(0)), {}


def _copied(reader: Reader, rows_K: np.ndarray, block_rows: int, device: torch.device) -> dict[str, Tensor]:
    """These rows as they are stored, on the device: {source: [K, D]}. One piece is read while another one travels."""
    dtype, most = reader.store.dtype, max(1, COPY_BYTES // (reader.dtype.itemsize * max(reader.widths.values())))
    slots = ring(2, reader, {}, min(most, len(rows_K)), device)
    x = {name: torch.empty(len(rows_K), width, dtype=dtype, device=device) for name, width in reader.widths.items()}
    pieces = [slice(at, at + most) for at in range(0, len(rows_K), most)]
    blocks = [np.unique(rows_K[piece] // block_rows) * block_rows for piece in pieces]
    reader.will_need(blocks[0], block_rows)
    for number, piece in enumerate(pieces):
        for coming in blocks[number + 1 : number + 2]:
            reader.will_need(coming, block_rows)
        slots[number % 2].fill(reader, rows_K[piece], partial(_copy, {name: x_KD[piece] for name, x_KD in x.items()}))
        reader.forget(blocks[number], block_rows)
    for slot in slots:
        slot.wait()
    return x


def _copy(x: dict[str, Tensor], name: str, stored_BD: Tensor, part: slice) -> None:
    x[name][part].copy_(stored_BD, non_blocking=True)

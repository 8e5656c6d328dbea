"""Batches ahead of their use: threads fill a ring of slots, and a copy stream moves them to the device.

Letters: B rows of a batch, D width of a source.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import numpy as np
import torch

from shared import layout
from shared.device import alone
from shared.view import View
from train.order import Stream
from train.reader import Reader
from train.sources import Sources

SLOTS = 3  # batches that are loaded ahead: one that is used, one that travels, one that is gathered
PIECE_BYTES = 2**21  # of a source's rows that a thread gathers before it casts them, on the CPU


@dataclass(frozen=True)
class Rows:
    """One batch: x {source: float32 [B, width]} in the model's own units, and the row numbers (int64, on the CPU)."""

    x: dict[str, torch.Tensor]
    rows_B: torch.Tensor


class Feed(ABC):
    """The batches of some steps, in their order. Used as a context manager, or closed by close().

    `waited_s` is how long the consumer waited, `rows_served` and `bytes_served` what it got, in bytes of the store.
    """

    def __init__(self) -> None:
        self.waited_s, self.rows_served, self.bytes_served = 0.0, 0, 0

    @abstractmethod
    def __iter__(self) -> Iterator[Rows]: ...

    @abstractmethod
    def close(self) -> None:
        """Let go of everything but the batches that were handed out. Twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Pinned:
    """Where the rows of one batch, {source: [B, width]} in the store's type, wait for their copy to the device."""

    def __init__(self, widths: dict[str, int], dtype: torch.dtype, batch: int) -> None:
        self.x = {name: torch.empty(batch, width, dtype=dtype, pin_memory=True) for name, width in widths.items()}


class Piece(threading.local):
    """Where some rows of one source at a time wait for their cast, on the CPU: of each thread its own.

    So they are cast before they leave the caches of the core that gathered them. With pieces that went from thread to
    thread, two threads gave a tenth less (9.0 and 9.9 GB/s, cores with caches of their own).
    """

    def __init__(self, widths: dict[str, int], dtype: torch.dtype, batch: int) -> None:
        piece = torch.empty(max(PIECE_BYTES // dtype.itemsize, *widths.values()), dtype=dtype)
        rows = {name: min(batch, len(piece) // width) for name, width in widths.items()}
        self.x = {name: piece[: rows[name] * width].view(-1, width) for name, width in widths.items()}


class Slot:
    """The buffers of one batch: `stage` in the store's type, and the floats made of it, where they are used again.

    `read` says when the device has read what was staged.
    """

    def __init__(self, stage: Pinned | Piece, widths: dict[str, int], batch: int, device: torch.device) -> None:
        self._stage, self._device = stage, device
        self.read = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        self.floats = {name: torch.empty(batch, width) for name, width in widths.items()}

    def fill(self, reader: Reader, rows_B: np.ndarray, put: Callable[[str, torch.Tensor, slice], object]) -> None:
        """Gather these rows and put(source, [part of B, D], which part) each part; its copy may be under way after."""
        self.wait()
        x = self._stage.x
        for name, part in reader.pieces(rows_B, {name: layout.stored(x_BD) for name, x_BD in x.items()}):
            put(name, x[name][: part.stop - part.start], part)
        if self.read is not None:
            self.read.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Wait until the device has read what was staged."""
        if self.read is not None:
            self.read.synchronize()


def ring(number: int, reader: Reader, widths: dict[str, int], batch: int, device: torch.device) -> list[Slot]:
    """So many slots for batches of what `reader` gathers; on the CPU with floats of these widths."""
    stored, dtype = reader.widths, reader.store.dtype
    if device.type == "cuda":
        return [Slot(Pinned(stored, dtype, batch), {}, batch, device) for _ in range(number)]
    piece = Piece(stored, dtype, batch)
    return [Slot(piece, widths, batch, device) for _ in range(number)]


class Loader(Feed):
    """The batches of `steps`, in their order, whatever the number of threads.

        order -> rows_B -> stage (16 bits, reused) -> copy stream -> device (-> float32 of train.sources) -> Rows
        |------------------- threads, at most `slots` batches ahead ------------------------------------|

    An error in a thread ends the iteration with its own traceback. With `reuse` a batch holds until the next one is
    asked for: fresh memory for each takes a CPU longer than its rows.

    Of the store's rows there are in memory, whatever its size, at most two windows of the order and the blocks of the
    batches under way: the window that is open, what has come of the next, and what is left of the last. All of them
    stay there where `store.access` says so, or a window is the whole store.
    """

    def __init__(
        self, store: View, sources: list[str], order: Stream, batch: int, steps: range, device: torch.device,
        threads: int = 1, slots: int = SLOTS, rank: int = 0, world: int = 1, reuse: bool = False,
    ) -> None:  # fmt: skip
        assert batch > 0 and threads > 0 and slots > 0 and len(order.kept_N) == store.rows
        super().__init__()
        self.order, self.batch, self.device, self.rank, self.world = order, batch, device, rank, world
        stays = store.access.stays or order.window_blocks == order.blocks
        self._sources = Sources(store, sources)
        self._reader = Reader(store.through(replace(store.access, stays=stays)), self._sources.stored)
        self._row_bytes = store.dtype.itemsize * sum(self._reader.widths.values())
        self._behind = (slots - 1) * world * batch  # rows of the stream that may still be loaded when a batch begins
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._drawing = threading.Lock()
        self._asked = self._passed = self._opened = -1  # how far in the line of blocks; none yet
        self._steps = iter(steps)
        self._flying: deque[tuple[Future[Rows], Slot]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="granary-loader", initializer=alone)
        for slot in ring(min(slots, len(steps)), self._reader, self._sources.widths if reuse else {}, batch, device):
            self._launch(slot)

    def __iter__(self) -> Iterator[Rows]:
        while self._flying:
            rows, slot = self._next()
            if not slot.floats:
                self._launch(slot)
            yield rows
            if slot.floats:
                self._launch(slot)

    def close(self) -> None:
        """Stop and join the threads, and drop the maps."""
        self._flying.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    # --- in the consumer's thread -------------------------------------------------------------------------------

    def _launch(self, slot: Slot) -> None:
        """Have the next step, if there is one, loaded into this slot."""
        step = next(self._steps, None)
        if step is not None:
            self._flying.append((self._pool.submit(self._load, step, slot), slot))

    def _next(self) -> tuple[Rows, Slot]:
        future, slot = self._flying.popleft()
        rows = self._wait(future)
        self._hand_over(rows, slot)
        self.rows_served += len(rows.rows_B)
        self.bytes_served += len(rows.rows_B) * self._row_bytes
        return rows, slot

    def _wait(self, future: Future[Rows]) -> Rows:
        began = time.perf_counter()
        try:
            return future.result()
        except BaseException:
            self.close()
            raise
        finally:
            self.waited_s += time.perf_counter() - began

    def _hand_over(self, rows: Rows, slot: Slot) -> None:
        """Let the consumer's stream wait for the copy, and the copy stream's memory for the consumer's work."""
        if slot.read is None:
            return
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_event(slot.read)
        for x_BD in rows.x.values():
            x_BD.record_stream(consumer)

    # --- in the threads -----------------------------------------------------------------------------------------

    def _load(self, step: int, slot: Slot) -> Rows:
        with self._drawing:  # else several threads would permute the same window at once
            position = (step * self.world + self.rank) * self.batch
            rows_B = self.order.served(step, self.batch, self.rank, self.world)
            coming, passed = self._reach(position)
            # In the order of steps, so that nothing is given back before it was asked for.
            if coming:
                self._reader.will_need(*self.order.reads(coming.start, coming.stop))
            if passed:
                self._reader.forget(*self.order.reads(passed.start, passed.stop))
            opened, self._opened = self._opened, self.order.opened(position)
            if self._opened != opened:
                self._pool.submit(self.order.prepare, position)
        with self._copying():
            x = {name: x_BD[: len(rows_B)] for name, x_BD in slot.floats.items()} or {
                name: torch.empty(len(rows_B), w, device=self.device) for name, w in self._sources.widths.items()
            }
            slot.fill(self._reader, rows_B, partial(self._send, x))
        return Rows(x, torch.from_numpy(rows_B))

    def _reach(self, position: int) -> tuple[range, range]:
        """Which blocks, of the endless line of them, come into reach at this batch, and which are a window back now.

        Each is asked for and given back once; a block that comes twice, in two epochs, twice.
        """
        order, window = self.order, self.order.window_blocks
        if self._asked < 0:
            self._asked = self._passed = order.opened(position)
        elif window == order.blocks:  # everything is there already, and stays
            return range(0), range(0)
        asked, passed = self._asked, self._passed
        self._asked = max(asked, order.front(position + self.batch - 1) + window)
        self._passed = max(passed, order.front(max(position - self._behind, 0)) - window)
        return range(asked, self._asked), range(passed, self._passed)

    def _send(self, x: dict[str, torch.Tensor], name: str, stored_BD: torch.Tensor, part: slice) -> None:
        """Copy a part of a source to the device and make floats of it there, so that half the bytes travel."""
        self._sources.put(name, stored_BD.to(self.device, non_blocking=True), x, part)

    def _copying(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

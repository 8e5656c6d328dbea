"""One unit: the batches of one shard of one model -> what store.put takes.

Letters: N rows of a batch, D width, X classes of rows, K packed moments.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from harvest.cast import cast
from harvest.forward import Batch, Batches, rows
from shared import hooks, layout, models
from shared.device import Outward, sent
from shared.errors import ActivationError
from shared.flags import FIRST, HELD_OUT, MASKED, SINK, SPECIAL
from shared.models import Checkpoint
from shared.moments import CLASSES, Moments, class_of, packed
from shared.store import Part, Store

BEHIND = 1  # batches whose rows are on their way from the device while it computes the next

T = TypeVar("T")
_Waiting = dict[str, Callable[[], list[Tensor]]]  # {source: what waits for its rows}


class UnitMaker:
    """Runs the batches of one model and collects its rows, shard by shard."""

    def __init__(self, store: Store, name: str, captured: hooks.Run, checkpoint: Checkpoint, device: str) -> None:
        self.store, self.name, self.captured, self.checkpoint, self.device = store, name, captured, checkpoint, device
        self.batches, self.outward = Batches(store, name), Outward(device)
        self.sites = {source.site: source.name for source in store.sources_of(name)}
        self.held_out_n = store.column("documents/split") == HELD_OUT

    def make(self, shard: int, tick: Any) -> dict[str, Part]:
        """The parts of one unit. Raises ActivationError at a value that is not finite, unless they are to be masked."""
        inside = self.store.rows_of(shard)
        flags_N = np.bitwise_or.reduce([self.store.map(f"rows/{m}/flags", shard) for m in self.store.header.models])
        held_out_N = self.held_out_n[self.store.map("rows/document", shard)]
        made = {source: _Made(self.store, source, len(inside)) for source in self.sites.values()}

        def running() -> Iterator[tuple[Batch, np.ndarray, "_Waiting"]]:
            for batch in self.batches.of(shard):
                at_N = batch.row_N - inside.start
                yield batch, at_N, self._run(batch, flags_N[at_N], held_out_N[at_N])

        for batch, at_N, waiting in _behind(running(), BEHIND):
            self._keep(batch, at_N, waiting, made)
            tick(len(batch.row_N))
        return {source: one.part() for source, one in made.items()}

    def rehearse(self, batch: Batch) -> None:
        """One batch as `make` takes it, and nothing kept."""
        at_N = np.arange(len(batch.row_N))
        none_N = np.zeros(len(at_N), np.uint8)
        made = {source: _Made(self.store, source, len(at_N)) for source in self.sites.values()}
        self._keep(batch, at_N, self._run(batch, none_N, none_N > 0), made)

    def run(self, batch: Batch) -> dict[str, Tensor]:
        """{source: x_ND}, not cast."""
        return rows(self.captured, batch, self.sites, self.device)

    def _run(self, batch: Batch, flags_N: np.ndarray, held_out_N: np.ndarray) -> "_Waiting":
        """Start one forward pass, and the way of its rows, cast, and of their moments to the CPU."""
        assert self.store.header.scale is not None
        special_N, first_N, sinks_N = flags_N & SPECIAL > 0, flags_N & FIRST > 0, np.ones(len(flags_N), bool)
        plain_N, sink_N = (
            sent(torch.from_numpy(class_of(special_N, first_N, one_N, held_out_N)), self.device)
            for one_N in (~sinks_N, sinks_N)
        )
        waiting = {}
        for source, x_ND in self.run(batch).items():
            scale = self.store.header.scale[source]
            done = cast(x_ND, scale["factor"], scale["sink_norm"], self.store.dtype)
            class_N = torch.where(done.faults_N & SINK > 0, sink_N, plain_N)
            class_N = class_N.masked_fill(done.faults_N & MASKED > 0, len(CLASSES))
            moments_XK = packed(done.x_ND, class_N, len(CLASSES) + 1)[:-1]
            waiting[source] = self.outward.begin(
                [done.values_ND, done.norms_N, done.faults_N, moments_XK, done.subnormal]
            )
        return waiting

    def _keep(self, batch: Batch, at_N: np.ndarray, waiting: "_Waiting", made: Mapping[str, "_Made"]) -> None:
        for source, wait in waiting.items():
            values_ND, norms_N, faults_N, moments_XK, subnormal = wait()
            masked_N = faults_N & MASKED > 0
            if masked_N.any() and self.store.header.spec["store"]["nonfinite"] == "fail":
                raise self._nonfinite(source, int(batch.row_N[masked_N.int().argmax()]))
            one = made[source]
            one.activations_ND[at_N] = layout.stored(values_ND)
            one.norms_N[at_N], one.faults_N[at_N] = norms_N.numpy(), faults_N.numpy()
            one.subnormal += int(subnormal)
            one.moments = [a.merge(Moments.unpack(b)) for a, b in zip(one.moments, moments_XK.numpy(), strict=True)]

    def _nonfinite(self, source: str, row: int) -> ActivationError:
        document = self.store.document_ids()[self.store.lazily("rows/document")[row]]
        place = int(self.store.lazily(f"rows/{self.name}/token")[row])
        token = self.store.lazily(f"tokens/{self.name}/id")[place]
        text = models.load_tokenizer(self.checkpoint).decode([int(token)])
        return ActivationError(
            f"{source} ({self.store.header.sources[source].site}) is not finite",
            f"document {document!r}, token {text!r}, row {row}",
            'Run the model in float32 or bfloat16, or set store.nonfinite to "mask"',
        )


class _Made:
    """What a unit stores of one source, while its batches come in."""

    def __init__(self, store: Store, source: str, count: int) -> None:
        width = store.header.sources[source].width
        self.activations_ND = np.empty((count, width), layout.DTYPES[store.header.plan["dtype"]])
        self.norms_N, self.faults_N = np.empty(count, np.float32), np.empty(count, np.uint8)
        self.moments = [Moments.empty(width) for _ in CLASSES]
        self.subnormal = 0

    def part(self) -> Part:
        packed_XK = np.stack([one.pack() for one in self.moments])
        return Part(self.activations_ND, self.norms_N, self.faults_N, packed_XK, self.subnormal)


def _behind(items: Iterable[T], count: int) -> Iterator[T]:
    """The items, each when `count` more have been begun."""
    begun: deque[T] = deque()
    for item in items:
        begun.append(item)
        if len(begun) > count:
            yield begun.popleft()
    yield from begun

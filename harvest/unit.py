"""One unit: the batches of one shard of one model -> what store.put takes.

Letters: N rows of a batch, D width.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from harvest.cast import cast
from harvest.forward import Batch, Batches, rows
from shared import hooks, layout, models
from shared.errors import ActivationError
from shared.flags import FIRST, HELD_OUT, MASKED, SINK, SPECIAL
from shared.models import Checkpoint
from shared.moments import CLASSES, Moments, class_of
from shared.store import Part, Store


class UnitMaker:
    """Runs the batches of one model and collects its rows, shard by shard."""

    def __init__(self, store: Store, name: str, captured: hooks.Run, checkpoint: Checkpoint, device: str) -> None:
        self.store, self.name, self.captured, self.checkpoint, self.device = store, name, captured, checkpoint, device
        self.batches = Batches(store, name)
        self.sites = {source.site: source.name for source in store.sources_of(name)}
        self.held_out_n = store.column("documents/split") == HELD_OUT

    def make(self, shard: int, tick: Any) -> dict[str, Part]:
        """The parts of one unit. Raises ActivationError at a value that is not finite, unless they are to be masked."""
        inside = self.store.rows_of(shard)
        flags_N = np.bitwise_or.reduce([self.store.map(f"rows/{m}/flags", shard) for m in self.store.header.models])
        held_out_N = self.held_out_n[self.store.map("rows/document", shard)]
        made = {source: _Made(self.store, source, len(inside)) for source in self.sites.values()}
        for batch in self.batches.of(shard):
            for source, x_ND in self.run(batch).items():
                at_N = batch.row_N - inside.start
                self._take(source, x_ND, batch, made[source], at_N, flags_N[at_N], held_out_N[at_N])
            tick(len(batch.row_N))
        return {source: one.part() for source, one in made.items()}

    def rehearse(self, batch: Batch) -> None:
        """One batch as `make` takes it, and nothing kept."""
        at_N = np.arange(len(batch.row_N))
        none_N = np.zeros(len(at_N), np.uint8)
        for source, x_ND in self.run(batch).items():
            self._take(source, x_ND, batch, _Made(self.store, source, len(at_N)), at_N, none_N, none_N > 0)

    def run(self, batch: Batch) -> dict[str, Tensor]:
        """{source: x_ND}, not cast."""
        return rows(self.captured, batch, self.sites, self.device)

    def _take(
        self, source: str, x_ND: Tensor, batch: Batch, made: "_Made", at_N: np.ndarray, flags_N: np.ndarray,
        held_out_N: np.ndarray,
    ) -> None:  # fmt: skip
        assert self.store.header.scale is not None
        scale = self.store.header.scale[source]
        done = cast(x_ND, scale["factor"], scale["sink_norm"], self.store.dtype)
        masked_N = done.faults_N & MASKED > 0
        if masked_N.any() and self.store.header.spec["store"]["nonfinite"] == "fail":
            raise self._nonfinite(source, int(batch.row_N[masked_N.argmax()]))
        made.activations_ND[at_N] = layout.stored(done.values_ND.cpu())
        made.norms_N[at_N] = done.norms_N.cpu().numpy()
        made.faults_N[at_N] = done.faults_N
        made.subnormal += done.subnormal
        class_N = class_of(flags_N & SPECIAL > 0, flags_N & FIRST > 0, done.faults_N & SINK > 0, held_out_N)
        x_cpu = done.x_ND.cpu()
        for index in np.unique(class_N[~masked_N]):
            chosen_N = torch.from_numpy((class_N == index) & ~masked_N)
            made.moments[index] = made.moments[index].merge(Moments.of(x_cpu[chosen_N]))

    def _nonfinite(self, source: str, row: int) -> ActivationError:
        document = self.store.document_ids()[self.store.column("rows/document")[row]]
        token = self.store.column(f"tokens/{self.name}/id")[self.store.column(f"rows/{self.name}/token")[row]]
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

"""Segments -> vectors per source: the planned batches, without logits or cache, up to the last site.

Letters: B segments of a batch, T positions, N rows of a batch, D width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.device import sent
from shared.hooks import Run
from shared.store import Store


@dataclass(frozen=True)
class Batch:
    """One forward pass and the rows that it makes: row_N of the store, which stand at place_N = b x T + position."""

    ids_BT: Tensor
    mask_BT: Tensor
    row_N: np.ndarray
    place_N: Tensor


def reshaped(batch: Batch) -> Batch:
    """Some of the same rows in a batch of another shape: half of the segments, or a single one twice."""
    count, length = batch.ids_BT.shape
    if count == 1:
        return Batch(batch.ids_BT.repeat(2, 1), batch.mask_BT.repeat(2, 1), batch.row_N, batch.place_N)
    half = count // 2
    inside_N = batch.place_N < half * length
    return Batch(batch.ids_BT[:half], batch.mask_BT[:half], batch.row_N[inside_N.numpy()], batch.place_N[inside_N])


class Batches:
    """The planned forward batches of one model, read from the store: tokens and rows of one shard at a time."""

    def __init__(self, store: Store, model: str) -> None:
        self.store, self.model = store, model
        self.segment, self.rows = store.column(f"tokens/{model}/segment"), store.column("segments/row")
        self.members, self.ends = store.column(f"batches/{model}/segment"), store.column(f"batches/{model}/end")
        self.shard = store.column(f"batches/{model}/shard")
        self._held: int | None = None
        self._ids: tuple[int, np.ndarray] = (0, np.empty(0, np.int32))

    def of(self, shard: int) -> Iterator[Batch]:
        return (self.batch(shard, number) for number in range(self.shard[shard], self.shard[shard + 1]))

    def holding(self, shard: int, wanted: np.ndarray) -> Iterator[Batch]:
        """The batches of a shard that make one of the wanted rows at least."""
        return (batch for batch in self.of(shard) if np.isin(batch.row_N, wanted).any())

    def spread(self, count: int) -> Iterator[Batch]:
        """`count` batches, evenly over the plan (all, where it has fewer)."""
        total = len(self.ends)
        for number in np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)):
            yield self.numbered(int(number))

    def numbered(self, number: int) -> Batch:
        return self.batch(int(np.searchsorted(self.shard, number, "right")) - 1, number)

    def batch(self, shard: int, number: int) -> Batch:
        segments = self._members(number, number + 1).tolist()
        first, ids = self._tokens(shard)
        tokens = [ids[self.segment[g] - first : self.segment[g + 1] - first] for g in segments]
        length = max(map(len, tokens))
        ids_BT, mask_BT = np.zeros((2, len(segments), length), np.int64)
        for b, one in enumerate(tokens):
            ids_BT[b, : len(one)], mask_BT[b, : len(one)] = one, 1
        inside = self.store.rows_of(shard)
        spans = [range(max(self.rows[g], inside.start), min(self.rows[g + 1], inside.stop)) for g in segments]
        row_N = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        of_N = np.repeat(np.arange(len(segments)), [len(span) for span in spans])
        position_N = self.store.map(f"rows/{self.model}/position", shard)[row_N - inside.start]
        place_N = of_N * length + position_N
        return Batch(torch.from_numpy(ids_BT), torch.from_numpy(mask_BT), row_N, torch.from_numpy(place_N))

    def _members(self, start: int, stop: int) -> np.ndarray:
        """The segments of batches [start:stop]."""
        return self.members[self.ends[start - 1] if start else 0 : self.ends[stop - 1]]

    def _tokens(self, shard: int) -> tuple[int, np.ndarray]:
        """The tokens of a shard's segments, which follow one another, and the number of the first."""
        if self._held != shard:
            members = self._members(self.shard[shard], self.shard[shard + 1])
            first, stop = int(self.segment[members.min()]), int(self.segment[members.max() + 1])
            self._ids, self._held = (first, self.store.lazily(f"tokens/{self.model}/id")[first:stop]), shard
        return self._ids


def rows(run: Run, batch: Batch, names: Mapping[str, str], device: str) -> dict[str, Tensor]:
    """{source: x_ND} of one batch on the device, in the model's own dtype. `names` is {site: source}."""
    caught = run(input_ids=sent(batch.ids_BT, device), attention_mask=sent(batch.mask_BT, device))
    place_N = sent(batch.place_N, device)
    return {names[site]: value_BTD.flatten(0, 1)[place_N] for site, value_BTD in caught.items()}

"""Segments -> vectors per source: the planned batches, without logits or cache, up to the last site.

Letters: B segments of a batch, T positions, N rows of a batch, D width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
    """The planned forward batches of one model, read from the store."""

    def __init__(self, store: Store, model: str) -> None:
        self.store = store
        self.ids, self.segment = store.column(f"tokens/{model}/id"), store.column(f"tokens/{model}/segment")
        self.position, self.rows = store.column(f"rows/{model}/position"), store.column("segments/row")
        self.members, self.ends = store.column(f"batches/{model}/segment"), store.column(f"batches/{model}/end")
        self.shard = store.column(f"batches/{model}/shard")

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
        start = self.ends[number - 1] if number else 0
        segments = self.members[start : self.ends[number]].tolist()
        tokens = [self.ids[self.segment[g] : self.segment[g + 1]] for g in segments]
        length = max(map(len, tokens))
        ids_BT, mask_BT = np.zeros((2, len(segments), length), np.int64)
        for b, one in enumerate(tokens):
            ids_BT[b, : len(one)], mask_BT[b, : len(one)] = one, 1
        inside = self.store.rows_of(shard)
        spans = [range(max(self.rows[g], inside.start), min(self.rows[g + 1], inside.stop)) for g in segments]
        row_N = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        of_N = np.repeat(np.arange(len(segments)), [len(span) for span in spans])
        place_N = of_N * length + self.position[row_N]
        return Batch(torch.from_numpy(ids_BT), torch.from_numpy(mask_BT), row_N, torch.from_numpy(place_N))


def rows(run: Run, batch: Batch, names: Mapping[str, str], device: str) -> dict[str, Tensor]:
    """{source: x_ND} of one batch on the device, in the model's own dtype. `names` is {site: source}."""
    caught = run(input_ids=batch.ids_BT.to(device), attention_mask=batch.mask_BT.to(device))
    place_N = batch.place_N.to(device)
    return {names[site]: value_BTD.flatten(0, 1)[place_N] for site, value_BTD in caught.items()}

"""The rows of two models, found as the scripts of crosscoder_learning keep them, or in a store.

    <store dir>/<model>/<dataset>[/<split>]/layer_<n>_out/      of each model, of the same tokens
    <store>.zarr                                                two of its sources

Letters: N rows, B rows of a batch, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.errors import ConfigError, RowsError, StoreError
from shared.store import Store
from shared.view import View
from train.filter import RowsConfig, kept_rows
from train.interop.dictionary_learning.caches import PairedActivationCache, RunningStatWelford
from train.order import Order, default_window_blocks

BLOCK_ROWS = 256  # of a folder: neighbours that are read together
HELD_OUT_SHARE, HELD_OUT_ROWS = 0.05, 10**6  # of a folder's rows, in whole sequences at its end
PIECE = 8192


class Pairs:
    """Pairs of rows [B, 2, D] of one or several caches, one behind the other: those to learn from, and those held out.

    Of a store, documents are held out as its harvest has drawn them, and rows left out as a run of train does; of
    folders, the last sequences are held out.
    """

    def __init__(
        self, caches: Sequence[PairedActivationCache], train_N: np.ndarray, held_N: np.ndarray, block: int
    ) -> None:
        self.caches, self.train_N, self.held_N, self.block = list(caches), train_N, held_N, block
        self._ends = np.cumsum([len(one) for one in caches])
        widths = {one.caches[0].d_model for one in caches}
        if len(widths) > 1:
            raise RowsError("datasets of several widths", ", ".join(map(str, sorted(widths))), "Give those of one site")
        [self.width] = widths

    def take(self, rows_B: np.ndarray) -> Tensor:
        """These rows in float32, in the order asked for."""
        out_B2D = torch.empty(len(rows_B), 2, self.width)
        of_B = np.searchsorted(self._ends, rows_B, side="right")
        for number in np.unique(of_B):
            own_n = np.flatnonzero(of_B == number)
            first = self._ends[number] - len(self.caches[number])
            out_B2D[torch.from_numpy(own_n)] = self.caches[number][rows_B[own_n] - first].float()
        return out_B2D

    def shuffled(self, batch: int, seed: int, steps: int) -> Iterator[Tensor]:
        """Batches to learn from, epoch after epoch, each in another order. Raises ConfigError for too large a batch."""
        kept = int(self.train_N.sum())
        if batch > kept:
            raise ConfigError("the batch is larger than the rows there are", f"{batch:,} > {kept:,}", "Lower batch")
        order = Order(self.train_N, self.block, default_window_blocks(batch), seed)
        return (self.take(order.served(step, batch)) for step in range(steps))

    def held_out(self, batch: int) -> "HeldOut":
        """Batches of those held out. Raises StoreError where there are none."""
        rows = np.flatnonzero(self.held_N)
        if not len(rows):
            raise StoreError("no rows are held out", self.caches[0].caches[0].rows.path, "Leave validation out")
        return HeldOut(self, rows, batch)

    def spread(self) -> tuple[Tensor, Tensor]:
        """The mean and the unbiased spread of the rows to learn from, [2, D]."""
        stats = [RunningStatWelford(self.width) for _ in range(2)]
        rows = np.flatnonzero(self.train_N)
        for start in range(0, len(rows), PIECE):
            x_B2D = self.take(rows[start : start + PIECE])
            for number, one in enumerate(stats):
                one.update(x_B2D[:, number])
        return torch.stack([one.mean for one in stats]), torch.stack([one.std() for one in stats])


@dataclass(frozen=True)
class HeldOut:
    """Batches of these rows, as often as they are asked for."""

    pairs: Pairs
    rows: np.ndarray
    batch: int

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.rows), self.batch):
            yield self.pairs.take(self.rows[start : start + self.batch])


def found(place: Path, base: str, chat: str, layer: int | None, datasets: Sequence[str] | None) -> Pairs:
    """The pairs of two models in a store, by the names of sources or models; or below a folder of caches, of these
    datasets (none: of all that both models have).

    Raises StoreError where they are not there.
    """
    if (place / "zarr.json").exists():
        return _of_store(Store.open(place), base, chat, layer)
    datasets = datasets or _datasets(place, base, chat)
    pairs = [
        PairedActivationCache(_folder(place, base, one, layer), _folder(place, chat, one, layer)) for one in datasets
    ]
    train, held = zip(*(_split(one) for one in pairs), strict=True)
    return Pairs(pairs, np.concatenate(train), np.concatenate(held), BLOCK_ROWS)


def _of_store(store: View, base: str, chat: str, layer: int | None) -> Pairs:
    names = [_source(store, model, layer) for model in (base, chat)]
    kept = kept_rows(store, RowsConfig())
    held = kept_rows(store, RowsConfig(split="held_out"))
    pair = PairedActivationCache(store.path / names[0], store.path / names[1])
    return Pairs([pair], kept.kept_N, held.kept_N, min(store.chunk_rows, BLOCK_ROWS))


def _source(store: View, model: str, layer: int | None) -> str:
    """The source of this name, or that of the model of this name at the output of block `layer`."""
    sources = store.header.sources
    if model in sources:
        return model
    named = {
        name: one for name, one in sources.items()
        if model in (one.model, Path(store.header.models[one.model].path).name)
    }  # fmt: skip
    at = [name for name, one in named.items() if layer is None or one.site == f"resid.{layer}"]
    if len(at) != 1:
        told = ", ".join(f"{name} ({one.site})" for name, one in sources.items())
        what = f"{model} at resid.{layer}" if layer is not None else model
        raise StoreError("no single source of this store is this model's", what, f"It has {told}: name a source")
    return at[0]


def _datasets(place: Path, base: str, chat: str) -> list[str]:
    below = [place / Path(model).name for model in (base, chat)]
    for folder in below:
        if not folder.is_dir():
            raise StoreError("no store, and no caches of this model", folder, "Give the folder of MODEL/DATASET/...")
    both = set.intersection(*({one.name for one in folder.iterdir() if one.is_dir()} for folder in below))
    if not both:
        raise StoreError("no dataset of both models", ", ".join(map(str, below)), "Collect both from the same texts")
    return sorted(both)


def _folder(place: Path, model: str, dataset: str, layer: int | None) -> Path:
    """The folder of a model's rows, or the one below it that holds them (train, train-col...)."""
    below, name = place / Path(model).name / dataset, f"layer_{layer}_out"
    if layer is None:
        raise ConfigError("a folder of caches has many layers", "--layer", "Give one")
    if (below / name).is_dir():
        return below / name
    splits = sorted(path for path in below.glob(f"*/{name}") if path.is_dir())
    if len(splits) != 1:
        value = below / name if not splits else ", ".join(str(one) for one in splits)
        raise StoreError("no single cache of this model and dataset", value, "Give --dataset DATASET/SPLIT")
    return splits[0]


def _split(pair: PairedActivationCache) -> tuple[np.ndarray, np.ndarray]:
    """The rows to learn from, and those of the last sequences, bool N each."""
    count = len(pair)
    wanted = min(int(HELD_OUT_SHARE * count), HELD_OUT_ROWS)
    border, ranges = count - wanted, pair.sequence_ranges
    if ranges is not None:
        starts = ranges.numpy()
        border = int(starts[np.searchsorted(starts, border, side="left")]) if wanted else count
    held_N = np.arange(count) >= border
    return ~held_N, held_N

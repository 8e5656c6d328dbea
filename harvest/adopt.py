"""Caches of dictionary_learning and SAELens -> a store, as if their models had been harvested: one source of each.

Letters: N rows, G sequences, D width of a source.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from harvest.cached import Cached
from harvest.cast import calibrated, cast
from harvest.config import RowsConfig, StoreConfig
from harvest.draft import split_of
from harvest.plan import shard_sizes
from shared import files, layout
from shared.collected import Collected
from shared.errors import ActivationError, CorpusError, StoreError
from shared.flags import FIRST, HELD_OUT, MASKED, SINK
from shared.header import FORMAT, Header
from shared.log import Log, bar
from shared.moments import CLASSES, Moments, class_of
from shared.source import Model, Source
from shared.store import Part, Store

PIECE = 8192  # rows that are cast at once
ROUNDING = 0.0  # nothing is computed twice
UNKNOWN = "unknown"


class Cache(Protocol):
    """Rows of one model at one site, with what is known of them."""

    path: Path
    count: int
    width: int
    dtype: torch.dtype

    @property
    def made_by(self) -> str: ...
    @property
    def site(self) -> str: ...
    @property
    def tokens(self) -> Tensor | None: ...
    @property
    def ranges(self) -> Tensor | None:
        """Where sequences begin, and the number of rows."""

    def take(self, rows_B: np.ndarray) -> Tensor: ...
    def fingerprint(self) -> str: ...


def find(path: Path) -> Cache:
    """The cache in a folder. Raises StoreError where there is none, StoreDamagedError where it is torn."""
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return Cached(path)
    return Collected(path)


@dataclass(frozen=True)
class Adopted:
    """What a store is made of: {source: folder}, all of the same tokens in the same sequences."""

    folders: Mapping[str, Cache]
    rows: int
    tokens_N: np.ndarray
    starts_G: np.ndarray  # and N behind them


def gathered(folders: Mapping[str, Cache]) -> Adopted:
    """What these folders have in common: of caches of several lengths the sequences that all of them have whole.

    Raises CorpusError where tokens or sequences were not kept, StoreError where the tokens differ.
    """
    for name, one in folders.items():
        if one.tokens is None:
            way_out = "Collect it with store_tokens=True (of SAELens: by a version that writes token_ids)"
            what = "this cache has no tokens, by which rows are told to be pairs"
            raise CorpusError(what, f"{name}: {one.path}", way_out)
    ranges = [one.ranges for one in folders.values() if one.ranges is not None]
    if not ranges:
        told = ", ".join(str(one.path) for one in folders.values())
        raise CorpusError("no cache tells where sequences begin", told, "It needs sequence_ranges.pt")
    rows = min(one.count for one in folders.values())
    starts = min((one.numpy().astype(np.int64) for one in ranges), key=len)
    starts = np.unique(starts[starts <= rows])  # twice the same: a sequence of which nothing was kept
    rows = int(starts[-1])
    first, *others = ((name, one.tokens) for name, one in folders.items())
    for name, tokens in others:
        assert tokens is not None and first[1] is not None
        if bool((differ := tokens[:rows] != first[1][:rows]).any()):
            at = int(differ.nonzero()[0])
            value = f"row {at:,}: {first[0]} {int(first[1][at])}, {name} {int(tokens[at])}"
            raise StoreError("these caches are of other tokens", value, "Collect all of them from the same texts")
    assert first[1] is not None
    return Adopted(folders, rows, first[1][:rows].numpy().astype(np.int64), starts)


def adopt(found: Adopted, asked: StoreConfig, rows: RowsConfig, log: Log) -> Store:
    """The store at `asked.path`: made, gone on with, or as it is where it is finished.

    A sequence is a document, held out by `rows.held_out` and `rows.seed`; its first row is flagged as such. Raises
    StoreMismatchError for a path with another store, SpaceError where it does not fit, ActivationError at a value that
    is not finite, unless such are to be masked.
    """
    path = Path(asked.path)
    header, tables = _planned(found, asked, rows)
    held, documents = header.plan["documents_held_out"], header.plan["documents"]
    if held in (0, documents):
        told = f"{held} of {documents} sequences are held out, and runs need both kinds: another --seed or --held-out"
        log.event("held_out", told)
    needed = sum(found.rows * source.width * 2 for source in header.sources.values())
    store = Store.resume(path, header) if path.exists() else None
    if store is None:
        files.require_space(path, needed)
        store = Store.create(path, header, tables)
    if store.sealed:
        return Store.open(path)
    if store.header.scale is None:
        store = store.freeze({name: _scale(one, found.rows, store.dtype) for name, one in found.folders.items()})
    else:
        store.declare()
    made_with = {
        "device": "cpu", "threads": torch.get_num_threads(),
        "versions": {"torch": str(torch.__version__), "numpy": str(np.__version__)},
    }  # fmt: skip
    todo = store.missing()
    with bar("importing", "rows", sum(len(store.rows_of(shard)) for shard, _ in todo), quiet=log.quiet) as progress:
        for shard, model in todo:
            part = _part(store, found.folders[model], model, shard)
            if asked.nonfinite == "fail" and (part.faults_N & MASKED).any():
                row = store.rows_of(shard).start + int((part.faults_N & MASKED > 0).argmax())
                way_out = "Say --nonfinite mask: such rows are flagged and never served"
                raise ActivationError(f"{model} has values that are not finite", f"row {row:,}", way_out)
            store.put(shard, model, {model: part}, made_with)
            progress.update(len(store.rows_of(shard)))
    store.seal()
    return Store.open(path)


def _planned(found: Adopted, asked: StoreConfig, rows: RowsConfig) -> tuple[Header, dict[str, np.ndarray]]:
    names, starts_G = list(found.folders), found.starts_G
    sequences, length_G = len(starts_G) - 1, np.diff(starts_G)
    ids = [f"sequence {number}" for number in range(sequences)]
    split_G = np.array([split_of(one, rows) for one in ids], np.uint8)
    sources = {name: Source(name, name, one.site, one.width) for name, one in found.folders.items()}
    models = {
        name: Model(name, str(one.path), one.fingerprint(), UNKNOWN, str(one.dtype).removeprefix("torch."), UNKNOWN)
        for name, one in found.folders.items()
    }
    sizes = shard_sizes(found.rows, list(sources.values()), asked)
    sequence_N = np.repeat(np.arange(sequences), length_G)
    position_N = (np.arange(found.rows) - starts_G[sequence_N]).astype(np.int32)
    inside = [
        np.unique(sequence_N[shard * sizes["shard_rows"] : (shard + 1) * sizes["shard_rows"]])
        for shard in range(sizes["shards"])
    ]
    encoded = [one.encode() for one in ids]
    tables: dict[str, np.ndarray] = {
        "rows/document": sequence_N.astype(np.int32), "segments/document": np.arange(sequences, dtype=np.int32),
        "segments/row": starts_G, "documents/id": np.frombuffer(b"".join(encoded), np.uint8),
        "documents/id_end": np.cumsum([len(one) for one in encoded]), "documents/row": starts_G,
        "documents/split": split_G,
    }  # fmt: skip
    for name in names:
        tables |= {
            f"rows/{name}/token": np.arange(found.rows), f"rows/{name}/position": position_N,
            f"rows/{name}/flags": np.where(position_N == 0, FIRST, 0).astype(np.uint8),
            f"tokens/{name}/id": found.tokens_N.astype(np.int32),
            f"tokens/{name}/end": np.full(found.rows, -1, np.int32), f"tokens/{name}/segment": starts_G,
            f"batches/{name}/segment": np.concatenate(inside).astype(np.int32),
            f"batches/{name}/end": np.cumsum([len(one) for one in inside]),
            f"batches/{name}/shard": np.arange(sizes["shards"] + 1),
        }  # fmt: skip
    plan = {
        "rows": found.rows, **sizes, "documents": sequences, "documents_held_out": int((split_G == HELD_OUT).sum()),
        "segments": sequences, "tokens": dict.fromkeys(names, found.rows), "read": dict.fromkeys(names, found.rows),
        "aligned_tokens": dict.fromkeys(names, 1.0), "aligned_documents": 1.0, "skipped": {},
        "alignment": "identical", "dtype": asked.dtype,
    }  # fmt: skip
    made_by = sorted({one.made_by for one in found.folders.values()})
    spec: dict[str, Any] = {
        "format": FORMAT, "imported": " ".join(made_by), "models": {n: m.identity() for n, m in models.items()},
        "tokens": layout.crc32c([found.tokens_N.tobytes(), starts_G.tobytes()]), "rows": found.rows, **sizes,
        "dtype": asked.dtype, "nonfinite": asked.nonfinite, "held_out": rows.held_out, "seed": rows.seed,
        "sites": {name: source.site for name, source in sources.items()},
    }  # fmt: skip
    return Header(spec, models, sources, plan), tables


def _scale(folder: Cache, rows: int, dtype: torch.dtype) -> dict[str, float]:
    """From all rows: nothing is beyond it."""
    norms, largest = [], 0.0
    for start in range(0, rows, PIECE):
        x_ND = folder.take(np.arange(start, min(start + PIECE, rows))).float()
        x_ND = x_ND[torch.isfinite(x_ND).all(1)]
        norms.append(torch.linalg.vector_norm(x_ND, dim=1))
        largest = max(largest, float(x_ND.abs().max()) if x_ND.numel() else 0.0)
    return calibrated(norms, largest, ROUNDING, dtype)


def _part(store: Store, folder: Cache, name: str, shard: int) -> Part:
    """The rows of a shard as the store has them. What is not finite is masked."""
    assert store.header.scale is not None
    inside, scale = store.rows_of(shard), store.header.scale[name]
    first_N = store.map(f"rows/{name}/flags", shard) & FIRST > 0
    held_N = (store.column("documents/split") == HELD_OUT)[store.map("rows/document", shard)]
    pieces, moments, subnormal = [], [Moments.empty(folder.width) for _ in CLASSES], 0
    for start in range(inside.start, inside.stop, PIECE):
        rows_B = np.arange(start, min(start + PIECE, inside.stop))
        done = cast(folder.take(rows_B), scale["factor"], scale["sink_norm"], store.dtype)
        faults_B, at_B = done.faults_N.numpy(), rows_B - inside.start
        class_B = class_of(np.zeros(len(at_B), bool), first_N[at_B], faults_B & SINK > 0, held_N[at_B])
        class_B[faults_B & MASKED > 0] = -1
        for index in np.unique(class_B[class_B >= 0]):
            moments[index] = moments[index].merge(Moments.of(done.x_ND[torch.from_numpy(class_B == index)]))
        pieces.append((layout.stored(done.values_ND), done.norms_N.numpy(), faults_B))
        subnormal += int(done.subnormal)
    values, norms, faults = (np.concatenate(same) for same in zip(*pieces, strict=True))
    return Part(values, norms, faults, np.stack([one.pack() for one in moments]), subnormal)

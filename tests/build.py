"""A small random store on the disk, complete in all that STORE.md asks for.

Letters: N rows, D width of a source, n documents, G segments, X classes, K length of packed moments.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from shared.codec import Packing
from shared.flags import CLIPPED, FIRST, HELD_OUT, MASKED, SINK, SPECIAL
from shared.header import Header
from shared.moments import CLASSES, Moments, class_of
from shared.source import Model, Source
from shared.store import Part, Store

Tree = dict[str, bytes]
LARGEST, SINK_TIMES = 65504.0, 10.0  # of fp16; sinks are 10 x the median norm


def tree(path: Path) -> Tree:
    """{name: content} of every file below a folder."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def make_store(
    path: Path,
    rows: int = 100,
    shard_rows: int = 32,
    chunk_rows: int = 8,
    sources: Mapping[str, int] | None = None,  # {source: width}; default {"a": 6, "b": 4}
    models: Mapping[str, str] | None = None,  # {source: model}; default one each, model_a and model_b
    documents: int = 10,
    held_out: float = 0.2,  # share of the documents
    special: float = 0.1,  # share of the rows, drawn for every model
    sink: float = 0.05,  # share of the rows, drawn for every source, as for the next two
    masked: float = 0.02,
    clipped: float = 0.02,
    factor: Mapping[str, float] | None = None,  # {source: power of two}; default 1
    values: Mapping[str, np.ndarray] | None = None,  # {source: [N, D]} instead of random values without planted faults
    flags: Mapping[str, np.ndarray] | None = None,  # {model: uint8 [N]} written as they are
    faults: Mapping[str, np.ndarray] | None = None,  # {source: uint8 [N]} written as they are
    split: np.ndarray | None = None,  # uint8 [n] instead of a draw
    seed: int = 0,
    packing: Packing | None = None,  # how the activations are encoded
    corpus: str = "",  # before the ids of the documents, and part of the store's id
) -> Store:
    """A finished store at `path`. Every row of a document is one token of one segment; all models read the same."""
    rng = np.random.default_rng(seed)
    widths = dict(sources or {"a": 6, "b": 4})
    of = dict(models or {name: f"model_{name}" for name in widths})
    row_n = np.concatenate([[0], np.sort(rng.integers(0, rows + 1, documents - 1)), [rows]])
    split_n = (rng.random(documents) < held_out).astype(np.uint8) if split is None else split
    document_N = np.repeat(np.arange(documents), np.diff(row_n))
    position_N = np.arange(rows) - row_n[document_N]
    drawn = {name: _flags(rng, position_N, special) for name in dict.fromkeys(of.values())}
    flags_N = {**drawn, **(flags or {})}
    tables = _tables(rows, shard_rows, row_n, split_n, document_N, position_N, flags_N, corpus)
    header = replace(_header(rows, shard_rows, chunk_rows, widths, of, tables, corpus), codec=packing)
    store = Store.create(path, header, tables)

    factors = {name: (factor or {}).get(name, 1.0) for name in widths}
    x = {name: _values(rng, rows, width, factors[name], sink, masked, clipped) for name, width in widths.items()}
    x |= {name: np.asarray(given, np.float32) for name, given in (values or {}).items()}
    scale = {name: _scale(x[name], factors[name]) for name in widths}
    parts = {name: _cast(x[name], scale[name], (faults or {}).get(name)) for name in widths}
    flags_any = np.bitwise_or.reduce(list(flags_N.values()))
    return _fill(store.freeze(scale), of, x, parts, flags_any, split_n[document_N] == HELD_OUT)


def _flags(rng: np.random.Generator, position_N: np.ndarray, special: float) -> np.ndarray:
    flags_N = np.where(position_N == 0, FIRST, 0) | np.where(rng.random(len(position_N)) < special, SPECIAL, 0)
    return flags_N.astype(np.uint8)


def _tables(
    rows: int, shard_rows: int, row_n: np.ndarray, split_n: np.ndarray,
    document_N: np.ndarray, position_N: np.ndarray, flags: Mapping[str, np.ndarray], corpus: str,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The plan: one segment per document that has rows, one batch per shard with all segments that reach into it."""
    ids = [f"{corpus}document-{d}".encode() for d in range(len(split_n))]
    document_G = np.flatnonzero(np.diff(row_n))
    shards = -(-rows // shard_rows)
    batches = [np.unique(document_N[s * shard_rows : (s + 1) * shard_rows]) for s in range(shards)]
    tables: dict[str, np.ndarray] = {
        "rows/document": document_N.astype(np.int32),
        "segments/document": document_G.astype(np.int32),
        "segments/row": np.concatenate([row_n[document_G], [rows]]).astype(np.int64),
        "documents/id": np.frombuffer(b"".join(ids), np.uint8),
        "documents/id_end": np.cumsum([len(id_) for id_ in ids]),
        "documents/row": row_n.astype(np.int64),
        "documents/split": split_n.astype(np.uint8),
    }
    for model, flags_N in flags.items():
        tables |= {
            f"rows/{model}/token": np.arange(rows),
            f"rows/{model}/position": position_N.astype(np.int32),
            f"rows/{model}/flags": flags_N.astype(np.uint8),
            f"tokens/{model}/id": (10 + np.arange(rows) % 90).astype(np.int32),
            f"tokens/{model}/end": np.where(flags_N & SPECIAL, -1, position_N + 1).astype(np.int32),
            f"tokens/{model}/segment": np.concatenate([row_n[document_G], [rows]]).astype(np.int64),
            f"batches/{model}/segment": np.searchsorted(document_G, np.concatenate(batches)).astype(np.int32),
            f"batches/{model}/end": np.cumsum([len(batch) for batch in batches]),
            f"batches/{model}/shard": np.arange(shards + 1),
        }
    return tables


def _header(
    rows: int, shard_rows: int, chunk_rows: int, widths: Mapping[str, int], of: Mapping[str, str],
    tables: Mapping[str, np.ndarray], corpus: str,
) -> Header:  # fmt: skip
    names = list(dict.fromkeys(of.values()))
    models = {
        name: Model(name, f"/models/{name}", f"weights-{name}", "tokenizer", "float32", "eager") for name in names
    }
    sources = {name: Source(name, of[name], "resid.1", width) for name, width in widths.items()}
    plan = {
        "rows": rows, "shard_rows": shard_rows, "chunk_rows": chunk_rows, "shards": -(-rows // shard_rows),
        "documents": len(tables["documents/split"]),
        "documents_held_out": int((tables["documents/split"] == HELD_OUT).sum()),
        "segments": len(tables["segments/document"]),
        "tokens": dict.fromkeys(names, rows), "read": dict.fromkeys(names, rows),
        "aligned_tokens": dict.fromkeys(names, 1.0), "aligned_documents": 1.0, "skipped": {}, "alignment": "identical",
        "dtype": "float16",
    }  # fmt: skip
    spec = {"models": {name: model.identity() for name, model in models.items()}, "widths": dict(widths), "rows": rows}
    return Header(spec | ({"corpus": corpus} if corpus else {}), models, sources, plan)


def _values(
    rng: np.random.Generator, rows: int, width: int, factor: float, sink: float, masked: float, clipped: float
) -> np.ndarray:
    """Normal values of about `factor` with planted sinks, non-finite values and values beyond fp16."""
    x_ND = rng.normal(size=(rows, width)) * factor + 0.5 * factor
    x_ND[rng.random(rows) < sink] *= 100.0
    x_ND[rng.random(rows) < clipped, 0] = 2 * LARGEST * factor
    x_ND[rng.random(rows) < masked, -1] = np.inf
    return x_ND.astype(np.float32)


def _scale(x_ND: np.ndarray, factor: float) -> dict[str, float]:
    finite_ND = x_ND[np.isfinite(x_ND).all(1)].astype(np.float64)
    median = float(np.median(np.linalg.norm(finite_ND, axis=1))) if len(finite_ND) else 0.0
    largest = float(np.abs(finite_ND).max(initial=0.0))
    return {"factor": factor, "largest": largest, "median_norm": median, "sink_norm": SINK_TIMES * median}


def _cast(x_ND: np.ndarray, scale: Mapping[str, float], faults_N: np.ndarray | None) -> Part:
    """What a unit stores of all rows, without moments. `x_ND` loses its non-finite rows."""
    masked_N = ~np.isfinite(x_ND).all(1)
    x_ND[masked_N] = 0.0
    scaled_ND = x_ND / scale["factor"]
    norms_N = np.linalg.norm(x_ND.astype(np.float64), axis=1)
    found_N = masked_N * MASKED + (np.abs(scaled_ND) > LARGEST).any(1) * CLIPPED + (norms_N > scale["sink_norm"]) * SINK
    rows_ND = np.clip(scaled_ND, -LARGEST, LARGEST).astype(np.float16)
    return Part(
        rows_ND, norms_N.astype(np.float32), (found_N if faults_N is None else faults_N).astype(np.uint8), np.empty(0)
    )


def _fill(
    store: Store, of: Mapping[str, str], x: Mapping[str, np.ndarray], parts: Mapping[str, Part],
    flags_N: np.ndarray, held_out_N: np.ndarray,
) -> Store:  # fmt: skip
    """Put every unit and seal."""
    for shard in range(store.shards):
        rows = slice(store.rows_of(shard).start, store.rows_of(shard).stop)
        for model in store.header.models:
            unit = {}
            for name in (name for name in x if of[name] == model):
                part = Part(
                    parts[name].activations_ND[rows], parts[name].norms_N[rows], parts[name].faults_N[rows], np.empty(0)
                )
                moments_XK = _moments(x[name][rows], part.faults_N, flags_N[rows], held_out_N[rows])
                unit[name] = Part(part.activations_ND, part.norms_N, part.faults_N, moments_XK)
            store.put(shard, model, unit, {"device": "cpu", "threads": 1, "versions": {}})
    store.seal()
    return Store.open(store.path)


def _moments(x_SD: np.ndarray, faults_S: np.ndarray, flags_S: np.ndarray, held_out_S: np.ndarray) -> np.ndarray:
    class_S = class_of(flags_S & SPECIAL != 0, flags_S & FIRST != 0, faults_S & SINK != 0, held_out_S)
    class_S[faults_S & MASKED != 0] = -1  # belongs to no class: its values are unknown
    return np.stack([Moments.of(torch.from_numpy(x_SD[class_S == index])).pack() for index in range(len(CLASSES))])

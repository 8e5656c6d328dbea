"""Configuration and corpus -> Plan: every row, shard and forward batch of a store, before any model runs. Pure.

Letters: M models, J places, N rows, G segments, T tokens of one model.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harvest.align import RULES, complete
from harvest.config import HarvestConfig
from harvest.corpus import Document
from harvest.segments import Speller, Tokens, cut
from shared.errors import AlignmentError
from shared.moments import CLASSES, packed_fields
from shared.source import Source
from shared.store import BOS, FIRST, HELD_OUT, SPECIAL, TRAIN


@dataclass(frozen=True)
class Plan:
    """The tables of STORE.md that the plan writes, and its summary (attributes.granary.plan)."""

    tables: dict[str, np.ndarray]
    summary: dict[str, Any]


@dataclass
class _Model:
    """What grows, segment by segment, of one model."""

    ids: list[np.ndarray] = field(default_factory=list)
    ends: list[np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    token: list[np.ndarray] = field(default_factory=list)
    position: list[np.ndarray] = field(default_factory=list)
    total: int = 0  # tokens in segments
    read: int = 0  # tokens of the documents that were looked at
    aligned: int = 0  # of them, those that became rows


def build(
    documents: Iterable[Document],
    spellers: Mapping[str, Speller],
    sources: Sequence[Source],
    limits: Mapping[str, int],
    config: HarvestConfig,
    align: str,
) -> Plan:
    """Plan a store. `limits` are tokens of a segment at most, per model, special tokens included.

    Raises AlignmentError where no row comes of the corpus, or where `identical` cannot hold.
    """
    if align == "identical":
        _require_same_around(spellers)
    draft = _Draft(dict(spellers), limits, align)
    for document in documents:
        draft.add(document, _is_held_out(document.id, config), config.rows.count)
        if config.rows.count is not None and draft.rows >= config.rows.count:
            break
    if not draft.rows:
        raise AlignmentError("no row came of the corpus", draft.skipped, "Check rows.align and the tokenizers")
    sizes = shard_sizes(draft.rows, sources, config)
    tables = draft.tables() | _batches(draft, sizes["shard_rows"], config.batch.tokens)
    summary = {**sizes, **draft.summary(), "alignment": align, "dtype": config.store.dtype}
    return Plan(tables, {"rows": draft.rows, **summary})


def notes(summary: Mapping[str, Any], config: HarvestConfig) -> list[str]:
    """What a user should know of a plan before anything is spent."""
    said = []
    if config.rows.count is not None and summary["rows"] < config.rows.count:
        said.append(f"the corpus gives {summary['rows']:,} rows, fewer than rows.count = {config.rows.count:,}")
    if summary["documents_held_out"] in (0, summary["documents"]):
        share = f"{summary['documents_held_out']} of {summary['documents']} documents"
        said.append(f"{share} are held out, and training needs both kinds: give more documents, or another rows.seed")
    return said


def _require_same_around(spellers: Mapping[str, Speller]) -> None:
    """Rows of `identical` hold special tokens too, so all models must read the same ones around a segment."""
    around = {name: (speller.prefix, speller.suffix) for name, speller in spellers.items()}
    first, *others = around
    for other in others:
        if around[other] != around[first]:
            raise AlignmentError(
                "the tokenizers put different special tokens around a text", f"{first} and {other}",
                'Set rows.bos to "never", or rows.align to "offsets"',
            )  # fmt: skip


def shuffled(documents: Iterable[Document], seed: int) -> list[Document]:
    """The documents in an order that their ids and the seed decide alone."""
    return sorted(documents, key=lambda document: hashlib.sha256(f"{seed}:order:{document.id}".encode()).digest())


def _is_held_out(document_id: str, config: HarvestConfig) -> bool:
    digest = hashlib.sha256(f"{config.rows.seed}:split:{document_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < config.rows.held_out


def shard_sizes(rows: int, sources: Sequence[Source], config: HarvestConfig) -> dict[str, int]:
    """Rows per chunk (a power of two, by the widest source's bytes) and per shard (by the largest unit's bytes)."""
    widest = 2 * max(source.width for source in sources)
    unit = max(
        sum(2 * source.width for source in sources if source.model == model) for model in {s.model for s in sources}
    )
    chunk = 2 ** max(0, (config.store.chunk_bytes // widest).bit_length() - 1)
    most = max(chunk, config.store.shard_bytes // unit // chunk * chunk)
    evenly = -(-rows // -(-rows // most))  # as many shards as needed, of nearly one size
    shard = -(-evenly // chunk) * chunk
    return {"chunk_rows": chunk, "shard_rows": shard, "shards": -(-rows // shard)}


def stored_bytes(
    summary: Mapping[str, Any], tables: Mapping[str, np.ndarray], sources: Sequence[Source]
) -> dict[str, int]:
    """Bytes on disk: {source: its arrays, "plan": the tables}."""
    rows, shards = summary["rows"], summary["shards"]
    chunks = -(-rows // summary["chunk_rows"]) * summary["chunk_rows"]
    padded = shards * summary["shard_rows"]
    sizes = {}
    for source in sources:
        moments = shards * len(CLASSES) * packed_fields(source.width)["norm_histogram"][1] * 8
        sizes[source.name] = chunks * source.width * 2 + padded * 5 + moments
    return {**sizes, "plan": sum(table.nbytes for table in tables.values())}


class _Draft:
    """The plan while documents are added to it."""

    def __init__(self, spellers: dict[str, Speller], limits: Mapping[str, int], align: str) -> None:
        self.spellers, self.limits, self.align = spellers, limits, align
        self.models = {name: _Model() for name in spellers}
        self.rows = 0
        self.segment_rows: list[int] = [0]
        self.segment_document: list[int] = []
        self.ids: list[str] = []
        self.document_rows: list[int] = [0]
        self.splits: list[int] = []
        self.seen = self.whole = 0
        self.skipped = {"documents_not_spelled": 0, "documents_without_rows": 0, "tokens_out_of_reach": 0}

    def add(self, document: Document, held_out: bool, most: int | None) -> None:
        self.seen += 1
        tokens = [speller.spell(document.text) for speller in self.spellers.values()]
        if self.align == "offsets" and not all(one.spelled for one in tokens):  # better no row than a wrong one
            self.skipped["documents_not_spelled"] += 1
            return
        before = self.rows
        stops_MJ = RULES[self.align](tokens)
        rooms = [self.limits[name] - len(s.prefix) - len(s.suffix) for name, s in self.spellers.items()]
        lost = 0
        reached_M = np.zeros(len(tokens), np.int64)
        read_M = [len(one.ids_T) for one in tokens]
        for first, last, start_M in cut(stops_MJ, rooms):
            if most is not None and self.rows >= most:
                read_M = reached_M.tolist()
                break
            lost += int((start_M - reached_M).sum())
            self._segment(tokens, stops_MJ[:, first:last], start_M, most)
            reached_M = stops_MJ[:, last - 1]
        else:
            lost += int((stops_MJ[:, -1:].sum(1) - reached_M).sum())  # places behind the last segment
        self.skipped["tokens_out_of_reach"] += lost
        for model, read in zip(self.models.values(), read_M, strict=True):
            model.read += read
        self._close(document, held_out, before, lost == 0 and complete(tokens, stops_MJ))

    def _segment(self, tokens: Sequence[Tokens], stops_MJ: np.ndarray, start_M: np.ndarray, most: int | None) -> None:
        """Add one segment and its rows: the special tokens around it too, where all models have the same tokens."""
        whole = self.align == "identical"
        added = 0
        for (name, model), one, stops_J, start in zip(self.models.items(), tokens, stops_MJ, start_M, strict=True):
            speller = self.spellers[name]
            stop = int(stops_J[-1])
            ids = np.concatenate([speller.prefix, one.ids_T[start:stop], speller.suffix])
            ends = np.full(len(ids), -1)
            ends[len(speller.prefix) : len(speller.prefix) + stop - start] = one.ends_T[start:stop]
            position = np.arange(len(ids)) if whole else stops_J - 1 - start + len(speller.prefix)
            position = position[: None if most is None else most - self.rows]
            model.ids.append(ids.astype(np.int32))
            model.ends.append(ends.astype(np.int32))
            model.lengths.append(len(ids))
            model.token.append(model.total + position)
            model.position.append(position.astype(np.int32))
            model.total += len(ids)
            model.aligned += len(stops_J)
            added = len(position)
        self.rows += added
        self.segment_rows.append(self.rows)
        self.segment_document.append(len(self.ids))

    def _close(self, document: Document, held_out: bool, before: int, whole: bool) -> None:
        if self.rows == before:
            self.skipped["documents_without_rows"] += 1
            return
        self.whole += whole
        self.ids.append(document.id)
        self.splits.append(HELD_OUT if held_out else TRAIN)
        self.document_rows.append(self.rows)

    def tables(self) -> dict[str, np.ndarray]:
        encoded = [name.encode() for name in self.ids]
        document_row = np.array(self.document_rows, np.int64)
        tables: dict[str, np.ndarray] = {
            "rows/document": np.repeat(np.arange(len(self.ids), dtype=np.int32), np.diff(document_row)),
            "segments/document": np.array(self.segment_document, np.int32),
            "segments/row": np.array(self.segment_rows, np.int64),
            "documents/id": np.frombuffer(b"".join(encoded), np.uint8),
            "documents/id_end": np.cumsum([len(name) for name in encoded], dtype=np.int64),
            "documents/row": document_row,
            "documents/split": np.array(self.splits, np.uint8),
        }
        for name, model in self.models.items():
            tables |= self._model_tables(name, model)
        return tables

    def _model_tables(self, name: str, model: _Model) -> dict[str, np.ndarray]:
        ids, token, position = np.concatenate(model.ids), np.concatenate(model.token), np.concatenate(model.position)
        speller, of_row = self.spellers[name], ids[token]
        bos = -1 if speller.tokenizer.bos_token_id is None else int(speller.tokenizer.bos_token_id)
        flags = FIRST * (position == 0) | SPECIAL * np.isin(of_row, speller.special)
        return {
            f"rows/{name}/token": token.astype(np.int64),
            f"rows/{name}/position": position,
            f"rows/{name}/flags": (flags | BOS * (of_row == bos)).astype(np.uint8),
            f"tokens/{name}/id": ids,
            f"tokens/{name}/end": np.concatenate(model.ends),
            f"tokens/{name}/segment": np.cumsum([0, *model.lengths], dtype=np.int64),
        }

    def summary(self) -> dict[str, Any]:
        return {
            "documents": len(self.ids),
            "documents_held_out": self.splits.count(HELD_OUT),
            "segments": len(self.segment_document),
            "tokens": {name: model.total for name, model in self.models.items()},
            "read": {name: model.read for name, model in self.models.items()},
            "aligned_tokens": {name: model.aligned / max(model.read, 1) for name, model in self.models.items()},
            "aligned_documents": self.whole / self.seen,
            "skipped": self.skipped,
        }


def _batches(draft: _Draft, shard_rows: int, budget: int) -> dict[str, np.ndarray]:
    """batches/<model>/...: per shard, its segments by length, longest first, as many to a batch as fit the budget."""
    rows_G = np.array(draft.segment_rows)
    shards = [_segments_of(rows_G, start, start + shard_rows) for start in range(0, draft.rows, shard_rows)]
    tables = {}
    for name, model in draft.models.items():
        lengths_G = np.array(model.lengths)
        segments: list[int] = []
        ends: list[int] = []
        starts = [0]
        for inside in shards:
            for batch in group(lengths_G, inside, budget):
                segments += batch
                ends.append(len(segments))
            starts.append(len(ends))
        tables[f"batches/{name}/segment"] = np.array(segments, np.int32)
        tables[f"batches/{name}/end"] = np.array(ends, np.int64)
        tables[f"batches/{name}/shard"] = np.array(starts, np.int64)
    return tables


def _segments_of(rows_G: np.ndarray, start: int, stop: int) -> range:
    """The segments that have rows in [start, stop). One on a border belongs to both shards and is run for each."""
    return range(int(np.searchsorted(rows_G, start, "right")) - 1, int(np.searchsorted(rows_G[:-1], stop, "left")))


def group(lengths_G: np.ndarray, segments: Sequence[int], budget: int) -> list[list[int]]:
    """Forward batches: by length, the longest first (memory is tried first), padded tokens within the budget."""
    batches: list[list[int]] = []
    for segment in sorted(segments, key=lambda g: (-int(lengths_G[g]), g)):
        if batches and (len(batches[-1]) + 1) * int(lengths_G[batches[-1][0]]) <= budget:
            batches[-1].append(segment)
        else:
            batches.append([segment])
    return batches

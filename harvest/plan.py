"""Drafted documents -> Plan: every row, shard and forward batch of a store, before any model runs. Pure.

Letters: M models, N rows, G segments, T tokens of one model, d documents.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harvest.config import HarvestConfig, StoreConfig
from harvest.draft import Piece
from shared.errors import AlignmentError
from shared.flags import HELD_OUT
from shared.moments import CLASSES, packed_fields
from shared.source import Source

Room = Callable[[str, int, str], np.ndarray]  # (table, length, dtype) -> an array to fill


@dataclass(frozen=True)
class Plan:
    """The tables of STORE.md that the plan writes, and its summary (attributes.granary.plan)."""

    tables: dict[str, np.ndarray]
    summary: dict[str, Any]


def in_memory(table: str, length: int, dtype: str) -> np.ndarray:
    return np.empty(length, dtype)


def build(
    pieces: Sequence[Piece], models: Sequence[str], sources: Sequence[Source], config: HarvestConfig, align: str,
    room: Room = in_memory,
) -> Plan:  # fmt: skip
    """Plan a store of these documents, in the order of their keys. Raises AlignmentError where no row comes of them."""
    columns = _columns(pieces, models)
    order_d, repeated = _order(columns, config)
    order_d = _until(columns, order_d, config.rows.count, pieces, models)
    seen = {name: values[order_d] for name, values in columns.items()}
    skipped = {
        "documents_not_rendered": int(np.count_nonzero(~seen["rendered"])),
        "documents_not_spelled": int(np.count_nonzero(~seen["spelled"])),
        "documents_without_rows": int(np.count_nonzero(seen["rendered"] & seen["spelled"] & (seen["rows"] == 0))),
        "documents_repeated": repeated,
        "tokens_out_of_reach": int(seen["lost"].sum()),
    }
    rows = int(seen["rows"].sum())
    if not rows:
        why = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in skipped.items() if count)
        raise AlignmentError("no row came of the corpus", why or "no document", "Check rows.align and the tokenizers")
    sizes = shard_sizes(rows, sources, config.store)
    tables = _tables(pieces, models, columns, order_d[seen["rows"] > 0], room)
    tables |= _batches(tables, models, sizes["shard_rows"], config.batch.tokens)
    read = {name: int(seen[f"{name}/read"].sum()) for name in models}
    whole_d = seen["complete"] & (seen["lost"] == 0) & (seen["rows"] > 0)
    summary = {
        "documents": len(tables["documents/split"]),
        "documents_held_out": int(np.count_nonzero(tables["documents/split"] == HELD_OUT)),
        "segments": len(tables["segments/document"]),
        "tokens": {name: len(tables[f"tokens/{name}/id"]) for name in models},
        "read": read,
        "aligned_tokens": {name: int(seen["places"].sum()) / max(read[name], 1) for name in models},
        "aligned_documents": int(np.count_nonzero(whole_d)) / len(order_d),
        "skipped": skipped,
        "alignment": align,
        "dtype": config.store.dtype,
    }
    return Plan(tables, {"rows": rows, **sizes, **summary})


def notes(summary: Mapping[str, Any], config: HarvestConfig) -> list[str]:
    """What a user should know of a plan before anything is spent."""
    said = []
    if config.rows.count is not None and summary["rows"] < config.rows.count:
        why = "the corpus gives" if not config.corpora else "at these weights the corpora give"
        said.append(f"{why} {summary['rows']:,} rows, fewer than rows.count = {config.rows.count:,}")
    of_a_family = config.store.extends is not None  # whose other rows may have what these have not
    if not of_a_family and summary["documents_held_out"] in (0, summary["documents"]):
        share = f"{summary['documents_held_out']} of {summary['documents']} documents"
        way_out = "give more documents, or another rows.seed" if config.rows.held_out else "raise rows.held_out"
        said.append(f"{share} are held out, and training needs both kinds: {way_out}")
    return said


def shard_sizes(rows: int, sources: Sequence[Source], store: StoreConfig) -> dict[str, int]:
    """Rows per chunk (a power of two, by the widest source's bytes) and per shard (by the largest unit's bytes)."""
    widest = 2 * max(source.width for source in sources)
    unit = max(
        sum(2 * source.width for source in sources if source.model == model) for model in {s.model for s in sources}
    )
    chunk = 2 ** max(0, (store.chunk_bytes // widest).bit_length() - 1)
    most = max(chunk, store.shard_bytes // unit // chunk * chunk)
    evenly = -(-rows // -(-rows // most))  # as many shards as needed, of nearly one size
    shard = -(-evenly // chunk) * chunk
    return {"chunk_rows": chunk, "shard_rows": shard, "shards": -(-rows // shard)}


def stored_bytes(summary: Mapping[str, Any], sources: Sequence[Source]) -> dict[str, int]:
    """Bytes on disk of each source's arrays."""
    rows, shards = summary["rows"], summary["shards"]
    chunks = -(-rows // summary["chunk_rows"]) * summary["chunk_rows"]
    padded = shards * summary["shard_rows"]
    sizes = {}
    for source in sources:
        moments = shards * len(CLASSES) * packed_fields(source.width)["norm_histogram"][1] * 8
        sizes[source.name] = chunks * source.width * 2 + padded * 5 + moments
    return sizes


# --- which documents, in which order --------------------------------------------------------------------------------


def _columns(pieces: Sequence[Piece], models: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of all pieces that have one value per document, and its piece."""
    names = ["key", "part", "number", "split", "id_bytes", "rendered", "spelled", "complete", "segments", "rows"]
    names += ["places", "lost"]
    names += [f"{model}/{what}" for model in models for what in ("read", "tokens")]
    counts = [len(piece["key"]) for piece in pieces]
    columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in names}
    return {**columns, "piece": np.repeat(np.arange(len(pieces)), counts)}


def wanted(config: HarvestConfig) -> list[int | None]:
    """Rows that each corpus must give at least, so that all of them give rows.count at their weights; none: all."""
    weights = [one.weight for one in config.texts.values()]
    count = config.rows.count
    return [None if count is None else math.ceil(count * weight / sum(weights)) for weight in weights]


def _order(columns: Mapping[str, np.ndarray], config: HarvestConfig) -> tuple[np.ndarray, int]:
    """The documents by their keys, the first of those with one id, and how many others there were.

    Of a stream, those that come before it has given its rows. With several corpora, the next document is one of that
    which has the fewest rows for its weight, until it has no more.
    """
    weights = [one.weight for one in config.texts.values()]
    order_d = np.lexsort((columns["number"], columns["key"]))
    order_d = order_d[_in_reach(columns, config)[order_d]]
    key_d = columns["key"][order_d]
    fresh_d = np.append(True, key_d[1:] != key_d[:-1]) if len(key_d) else np.empty(0, bool)
    repeated, order_d = int(np.count_nonzero(~fresh_d)), order_d[fresh_d]
    if len(weights) < 2:
        return order_d, repeated
    part_d, rows_d = columns["part"][order_d], columns["rows"][order_d]
    waiting = [iter(np.flatnonzero(part_d == part).tolist()) for part in range(len(weights))]
    filled = [0.0] * len(weights)
    mixed: list[int] = []
    while (chosen := next(waiting[part := filled.index(min(filled))], None)) is not None:
        mixed.append(chosen)
        filled[part] += float(rows_d[chosen]) / weights[part]
    return order_d[mixed], repeated


def _in_reach(columns: Mapping[str, np.ndarray], config: HarvestConfig) -> np.ndarray:
    """Which documents count: of a stream no more than it takes, however far it was read."""
    reach_d = np.ones(len(columns["key"]), bool)
    for part, (corpus, rows) in enumerate(zip(config.texts.values(), wanted(config), strict=True)):
        if corpus.stream and rows is not None:
            mine = np.flatnonzero(columns["part"] == part)
            mine = mine[np.argsort(columns["number"][mine])]
            rows_d = columns["rows"][mine]
            reach_d[mine] = np.cumsum(rows_d) - rows_d < rows
    return reach_d


def _until(
    columns: dict[str, np.ndarray], order_d: np.ndarray, most: int | None, pieces: Sequence[Piece],
    models: Sequence[str],
) -> np.ndarray:  # fmt: skip
    """The documents that are needed for `most` rows. Of the last one `columns` then says what is needed of it."""
    rows_d = columns["rows"][order_d]
    before_d = np.cumsum(rows_d) - rows_d
    if most is None or most >= rows_d.sum():
        return order_d
    order_d = order_d[before_d < most]
    last, left = int(order_d[-1]), most - int(before_d[len(order_d) - 1])
    piece = pieces[int(columns["piece"][last])]
    first = int(np.flatnonzero(columns["piece"] == columns["piece"][last])[0])
    start = int(piece["segments"][: last - first].sum())
    segments = slice(start, start + int(columns["segments"][last]))
    count = int(np.searchsorted(np.cumsum(piece["rows_G"][segments]), left)) + 1
    columns["rows"][last] = left
    if count == columns["segments"][last]:
        return order_d
    used = slice(start, start + count)
    columns["segments"][last] = count
    columns["places"][last], columns["lost"][last] = piece["places_G"][used].sum(), piece["lost_G"][used].sum()
    for name in models:
        columns[f"{name}/read"][last] = piece[f"{name}/reached_G"][used][-1]
        columns[f"{name}/tokens"][last] = piece[f"{name}/length_G"][used].sum()
    return order_d


# --- the tables -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Level:
    """Where a kind of values goes: of each document the first `take_d`, from `start_d` on, `total` in all."""

    take_d: np.ndarray
    start_d: np.ndarray
    total: int

    @classmethod
    def of(cls, count_d: np.ndarray, stored_d: np.ndarray) -> "_Level":
        take_d, start_d = np.zeros((2, len(count_d)), np.int64)
        take_d[stored_d] = count_d[stored_d]
        start_d[stored_d] = np.cumsum(take_d[stored_d]) - take_d[stored_d]
        return cls(take_d, start_d, int(take_d.sum()))

    def within(self, documents: slice) -> "_Level":
        return _Level(self.take_d[documents], self.start_d[documents], self.total)

    def scatter(self, out: np.ndarray, values: np.ndarray, length_d: np.ndarray) -> None:
        """Bring the values of these documents, `length_d` of each, to their places."""
        inside = np.arange(len(values)) - np.repeat(_starts(length_d), length_d)
        chosen = inside < np.repeat(self.take_d, length_d)
        out[(np.repeat(self.start_d, length_d) + inside)[chosen]] = values[chosen]


def _starts(length: np.ndarray) -> np.ndarray:
    """Where each run of values begins that stand one behind the other."""
    return np.cumsum(length) - length


def _tables(
    pieces: Sequence[Piece], models: Sequence[str], columns: Mapping[str, np.ndarray], stored_d: np.ndarray, room: Room
) -> dict[str, np.ndarray]:
    """All tables but the batches, filled piece by piece, every document at its place."""
    levels = {name: _Level.of(columns[name], stored_d) for name in ("rows", "segments", "id_bytes")}
    levels |= {name: _Level.of(columns[f"{name}/tokens"], stored_d) for name in models}
    tables = _empty({name: level.total for name, level in levels.items()}, models, room)
    tables["documents/id_end"] = np.cumsum(columns["id_bytes"][stored_d])
    tables["documents/row"] = np.append(levels["rows"].start_d[stored_d], levels["rows"].total)
    tables["documents/split"] = columns["split"][stored_d]
    place_d = np.zeros(len(columns["key"]), np.int32)
    place_d[stored_d] = np.arange(len(stored_d))
    ends = np.cumsum(np.bincount(columns["piece"], minlength=len(pieces))).tolist()
    for piece, start, stop in zip(pieces, [0, *ends], ends, strict=False):
        within = {name: level.within(slice(start, stop)) for name, level in levels.items()}
        _common(tables, piece, within, place_d[start:stop])
        for name in models:
            _of_model(tables, piece, within, name)
    return tables


def _empty(totals: Mapping[str, int], models: Sequence[str], room: Room) -> dict[str, np.ndarray]:
    rows, segments = totals["rows"], totals["segments"]
    tables = {
        "rows/document": room("rows/document", rows, "int32"),
        "segments/document": room("segments/document", segments, "int32"),
        "segments/row": room("segments/row", segments + 1, "int64"),
        "documents/id": room("documents/id", totals["id_bytes"], "uint8"),
    }
    tables["segments/row"][segments] = rows
    for name in models:
        kinds = {"rows/{}/token": "int64", "rows/{}/position": "int32", "rows/{}/flags": "uint8"}
        tables |= {table.format(name): room(table.format(name), rows, dtype) for table, dtype in kinds.items()}
        tables |= {
            f"tokens/{name}/{what}": room(f"tokens/{name}/{what}", totals[name], "int32") for what in ("id", "end")
        }
        tables[f"tokens/{name}/segment"] = room(f"tokens/{name}/segment", segments + 1, "int64")
        tables[f"tokens/{name}/segment"][segments] = totals[name]
    return tables


def _common(tables: Mapping[str, np.ndarray], piece: Piece, levels: Mapping[str, _Level], place_d: np.ndarray) -> None:
    rows_d, segments_d, rows_G = piece["rows"], piece["segments"], piece["rows_G"]
    row_G = _starts(rows_G) + np.repeat(levels["rows"].start_d - _starts(rows_d), segments_d)
    levels["id_bytes"].scatter(tables["documents/id"], piece["id"], piece["id_bytes"])
    levels["rows"].scatter(tables["rows/document"], np.repeat(place_d, rows_d), rows_d)
    levels["segments"].scatter(tables["segments/document"], np.repeat(place_d, segments_d), segments_d)
    levels["segments"].scatter(tables["segments/row"], row_G, segments_d)


def _of_model(tables: Mapping[str, np.ndarray], piece: Piece, levels: Mapping[str, _Level], name: str) -> None:
    rows_d, segments_d, tokens_d = piece["rows"], piece["segments"], piece[f"{name}/tokens"]
    position_N, length_G = piece[f"{name}/position_N"], piece[f"{name}/length_G"]
    token_G = _starts(length_G) + np.repeat(levels[name].start_d - _starts(tokens_d), segments_d)
    token_N = np.repeat(token_G, piece["rows_G"]) + position_N
    levels["rows"].scatter(tables[f"rows/{name}/token"], token_N, rows_d)
    levels["rows"].scatter(tables[f"rows/{name}/position"], position_N, rows_d)
    levels["rows"].scatter(tables[f"rows/{name}/flags"], piece[f"{name}/flags_N"], rows_d)
    levels["segments"].scatter(tables[f"tokens/{name}/segment"], token_G, segments_d)
    levels[name].scatter(tables[f"tokens/{name}/id"], piece[f"{name}/id_T"], tokens_d)
    levels[name].scatter(tables[f"tokens/{name}/end"], piece[f"{name}/end_T"], tokens_d)


def _batches(
    tables: Mapping[str, np.ndarray], models: Sequence[str], shard_rows: int, budget: int
) -> dict[str, np.ndarray]:
    """batches/<model>/...: per shard, its segments by length, longest first, as many to a batch as fit the budget."""
    rows_G = np.asarray(tables["segments/row"])
    shards = [_segments_of(rows_G, start, start + shard_rows) for start in range(0, int(rows_G[-1]), shard_rows)]
    made = {}
    for name in models:
        lengths_G = np.diff(tables[f"tokens/{name}/segment"])
        segments: list[int] = []
        ends: list[int] = []
        starts = [0]
        for inside in shards:
            for batch in group(lengths_G, inside, budget):
                segments += batch
                ends.append(len(segments))
            starts.append(len(ends))
        made[f"batches/{name}/segment"] = np.array(segments, np.int32)
        made[f"batches/{name}/end"] = np.array(ends, np.int64)
        made[f"batches/{name}/shard"] = np.array(starts, np.int64)
    return made


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

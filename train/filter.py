"""Which rows of a store a run learns from, and what dropped the others.

Letters: N rows of the store, S rows of a shard, n documents.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from shared import config, files
from shared.errors import ConfigError
from shared.flags import FIRST, HELD_OUT, MASKED, SINK, SINK_MULTIPLE, SPECIAL, TRAIN
from shared.view import View
from train.weights import of_stores, shares, thinned

RULES = 1  # a rule that comes to drop other rows takes the next number: what older versions kept is then not read
WORTH_KEEPING = 2**20  # rows from which on a bitmap is kept in the user's cache: fewer take milliseconds
SPLITS = {"train": TRAIN, "held_out": HELD_OUT}


class RowsConfig(config.Config):
    """Which rows a run learns from."""

    split: Literal["train", "held_out", "all"] = "train"  # of the documents
    special: Literal["drop", "keep"] = "drop"  # tokens such as <bos> and </s>, of any model
    positions: str = "1:"  # START:STOP in the forward pass, of every model; the first one is no usual row
    max_norm_multiple: float = Field(10.0, ge=0)  # rows above so many times a source's median norm are dropped; 0: none
    documents: list[str] | None = None  # their ids, or patterns with * and ?; none: all
    sources: list[str] | None = None  # whose norms and whose models' tokens decide; none: all of the store
    weights: dict[str, float] | None = None  # of several stores, {folder without .zarr: share of the rows}; none: all
    seed: int = Field(0, ge=0, lt=2**63)  # of their order, which runs of other seeds can share

    @field_validator("positions")
    @classmethod
    def _a_slice(cls, text: str) -> str:
        found = re.fullmatch(r"(\d*):(\d*)", text)
        if not found or (found[2] and int(found[2]) <= int(found[1] or 0)):
            raise ValueError("Write START:STOP, such as 1: or 0:128")
        return text

    @field_validator("weights")
    @classmethod
    def _above_0(cls, weights: dict[str, float] | None) -> dict[str, float] | None:
        if weights is not None and not all(weight > 0 for weight in weights.values()):
            raise ValueError("Give every store a weight above 0, or leave the store out")
        return weights

    @property
    def span(self) -> tuple[int, float]:
        """The positions that are kept, [start, stop)."""
        start, _, stop = self.positions.partition(":")
        return int(start or 0), int(stop) if stop else math.inf


@dataclass(frozen=True)
class Kept:
    """The rows that pass a filter, and how many rows each rule dropped.

    A row counts under the first rule that drops it, so kept + dropped = all.
    """

    kept_N: np.ndarray  # bool
    dropped: dict[str, int]


def kept_rows(store: View, asked: RowsConfig | None = None) -> Kept:
    """The rows that a filter (none: the default one) keeps; masked ones never.

    Of a mixture, each store keeps what it would keep alone: a row is too long by the median of its own store. Then the
    weights, where there are some, drop rows of every store but the one that is scarcest for its weight (train.weights).
    What takes a while, of a large store, is kept below the user's cache folder, under the store's seals and the filter.
    Raises ConfigError for a document or a weight, StoreError for a source, that the store has not.
    """
    asked = asked or RowsConfig()
    names = sorted(asked.sources if asked.sources is not None else store.header.sources)
    for name in names:
        store.source(name)
    weights = None if asked.weights is None else of_stores(store, asked.weights)
    if store.rows < WORTH_KEEPING:
        return _filtered(store, asked, names)
    rules = asked.model_dump(mode="json", exclude={"sources", "weights", "seed"})
    key: dict[str, object] = {"version": RULES, "seals": store.seals, "filter": rules, "sources": names}
    if weights is not None:
        key["weights"] = [store.header.id, *weights]  # not by names: folders may be renamed
    place = files.cache_folder() / "rows" / config.fingerprint(key)
    if (known := _read(place, store.rows)) is None:
        known = _filtered(store, asked, names)
        with suppress(OSError):  # a cache that cannot be written costs time, and nothing else
            _write(place, known)
    return known


def _filtered(store: View, asked: RowsConfig, names: list[str]) -> Kept:
    wanted_n, borders = _documents(store, asked.documents), [one.header.plan["documents"] for one in store.stores]
    wanted = np.split(wanted_n, np.cumsum(borders)[:-1])
    dropped = dict[str, int]()
    kept = [_of_store(one, asked, names, here_n, dropped) for one, here_n in zip(store.stores, wanted, strict=True)]
    if asked.weights is not None:
        counts = [int(np.count_nonzero(kept_N)) for kept_N in kept]
        left = shares(counts, of_stores(store, asked.weights))
        kept = [thinned(kept_N, n) for kept_N, n in zip(kept, left, strict=True)]
        dropped["weights"] = sum(counts) - sum(left)
    return Kept(np.concatenate(kept), dropped)


def _of_store(
    store: View, asked: RowsConfig, names: list[str], wanted_n: np.ndarray, dropped: dict[str, int]
) -> np.ndarray:
    """The rows of one store that pass all rules but the weights, bool N."""
    models = sorted({store.source(name).model for name in names})
    split_n, kept_N = store.column("documents/split"), np.empty(store.rows, bool)
    for shard in range(store.shards):
        keep_S = np.ones(len(store.rows_of(shard)), bool)
        document_S = store.map("rows/document", shard)
        if asked.split != "all":
            other = "held_out" if asked.split == "train" else "training"
            _drop(keep_S, dropped, other, split_n[document_S] != SPLITS[asked.split])
        if asked.documents is not None:
            _drop(keep_S, dropped, "documents", ~wanted_n[document_S])
        for rule, hit_S in _rules(store, asked, names, models, shard):
            _drop(keep_S, dropped, rule, hit_S)
        kept_N[store.rows_of(shard).start : store.rows_of(shard).stop] = keep_S
    return kept_N


def _drop(keep_S: np.ndarray, dropped: dict[str, int], rule: str, hit_S: np.ndarray) -> None:
    dropped[rule] = dropped.get(rule, 0) + int(np.count_nonzero(keep_S & hit_S))
    keep_S &= ~hit_S


def _rules(
    store: View, asked: RowsConfig, names: list[str], models: list[str], shard: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(rule, the rows of a shard that it drops), of what stands beside the activations."""
    flags_S = np.bitwise_or.reduce([store.map(f"rows/{model}/flags", shard) for model in models])
    faults_S = np.bitwise_or.reduce([store.map(f"faults/{name}", shard) for name in names])
    yield "masked", faults_S & MASKED > 0
    if asked.special == "drop":
        yield "special", flags_S & SPECIAL > 0
    start, stop = asked.span
    if (start, stop) == (1, math.inf):  # a bit says so already
        yield "positions", flags_S & FIRST > 0
    elif (start, stop) != (0, math.inf):
        positions = [store.map(f"rows/{model}/position", shard) for model in models]
        yield "positions", np.logical_or.reduce([(one_S < start) | (one_S >= stop) for one_S in positions])
    if asked.max_norm_multiple == SINK_MULTIPLE:  # and here
        yield "sink", faults_S & SINK > 0
    elif asked.max_norm_multiple:
        norms = [store.map(f"norms/{name}", shard) > _largest(store, name, asked.max_norm_multiple) for name in names]
        yield "sink", np.logical_or.reduce(norms)


def _largest(store: View, source: str, multiple: float) -> np.float32:
    """The largest norm that is no sink's: a multiple of the median, which the store's calibration found."""
    assert store.header.scale is not None
    median = store.header.scale[source]["median_norm"]
    return np.float32(multiple * median if median else np.inf)


def _documents(store: View, wanted: list[str] | None) -> np.ndarray:
    """Which documents a list of ids and patterns (none: all) names. Raises ConfigError where one names none."""
    if wanted is None:
        return np.ones(store.header.plan["documents"], bool)
    ids = store.document_ids()
    exact, found_n = {one: list[int]() for one in wanted}, np.zeros(len(ids), bool)
    for number, name in enumerate(ids):
        if name in exact:
            exact[name].append(number)  # once in each store of a mixture, at most
    for one in wanted:
        hits = exact[one] or [number for number, name in enumerate(ids) if fnmatchcase(name, one)]
        if not hits:
            few = ", ".join(ids[:3])
            raise ConfigError("no document of this name", one, f"rows.documents takes ids, such as {few}, and patterns")
        found_n[hits] = True
    return found_n


def _write(place: Path, kept: Kept) -> None:
    head = json.dumps({"rows": len(kept.kept_N), "kept": int(kept.kept_N.sum()), "dropped": kept.dropped})
    files.write_atomic(place, [head.encode() + b"\n", np.packbits(kept.kept_N).tobytes()])


def _read(place: Path, rows: int) -> Kept | None:
    """What was written there; none where nothing was, or something else stands there now."""
    try:
        head, _, bits = place.read_bytes().partition(b"\n")
        told = json.loads(head)
        kept_N = np.unpackbits(np.frombuffer(bits, np.uint8), count=rows).astype(bool)
        whole = told["rows"] == rows == len(kept_N) and told["kept"] == int(kept_N.sum())
        return Kept(kept_N, told["dropped"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def require_rows(kept: Kept) -> None:
    """Raises ConfigError where a filter keeps nothing."""
    if not kept.kept_N.any():
        what = ", ".join(f"{rule} {count:,}" for rule, count in kept.dropped.items() if count)
        way_out = "Loosen [rows], or harvest more"
        if "weights" in kept.dropped:
            way_out += ": every store of rows.weights must have rows that pass the other rules"
        raise ConfigError("no row is left to serve", f"dropped: {what or 'all'}", way_out)

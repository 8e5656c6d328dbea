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
    seed: int = Field(0, ge=0, lt=2**63)  # of their order, which runs of other seeds can share

    @field_validator("positions")
    @classmethod
    def _a_slice(cls, text: str) -> str:
        found = re.fullmatch(r"(\d*):(\d*)", text)
        if not found or (found[2] and int(found[2]) <= int(found[1] or 0)):
            raise ValueError("Write START:STOP, such as 1: or 0:128")
        return text

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

    What takes a while, of a large store, is kept below the user's cache folder, under the store's seals and the filter.
    Raises ConfigError for a document, StoreError for a source, that the store has not.
    """
    asked = asked or RowsConfig()
    names = sorted(asked.sources if asked.sources is not None else store.header.sources)
    for name in names:
        store.source(name)
    if store.rows < WORTH_KEEPING:
        return _filtered(store, asked, names)
    key = {"seals": store.seals, "filter": asked.model_dump(mode="json", exclude={"sources", "seed"}), "sources": names}
    place = files.cache_folder() / "rows" / config.fingerprint(key)
    if (known := _read(place, store.rows)) is None:
        known = _filtered(store, asked, names)
        with suppress(OSError):  # a cache that cannot be written costs time, and nothing else
            _write(place, known)
    return known


def _filtered(store: View, asked: RowsConfig, names: list[str]) -> Kept:
    models = sorted({store.source(name).model for name in names})
    split_n, wanted_n = store.column("documents/split"), _documents(store, asked.documents)
    kept_N, dropped = np.empty(store.rows, bool), dict[str, int]()
    for shard in range(store.shards):
        keep_S = np.ones(len(store.rows_of(shard)), bool)
        document_S = store.map("rows/document", shard)
        if asked.split != "all":
            other = "held_out" if asked.split == "train" else "training"
            _drop(keep_S, dropped, other, split_n[document_S] != SPLITS[asked.split])
        if wanted_n is not None:
            _drop(keep_S, dropped, "documents", ~wanted_n[document_S])
        for rule, hit_S in _rules(store, asked, names, models, shard):
            _drop(keep_S, dropped, rule, hit_S)
        kept_N[store.rows_of(shard).start : store.rows_of(shard).stop] = keep_S
    return Kept(kept_N, dropped)


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


def _documents(store: View, wanted: list[str] | None) -> np.ndarray | None:
    """Which documents a list of ids and patterns names. Raises ConfigError where one names none."""
    if wanted is None:
        return None
    ids = store.document_ids()
    number, found_n = {name: index for index, name in enumerate(ids)}, np.zeros(len(ids), bool)
    for one in wanted:
        hits = [number[one]] if one in number else [n for n, name in enumerate(ids) if fnmatchcase(name, one)]
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
        raise ConfigError("no row is left to serve", f"dropped: {what or 'all'}", "Loosen [rows], or harvest more")

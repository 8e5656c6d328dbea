"""Rows of a store as a person reads them: the paired tokens side by side, with their norms."""

from collections.abc import Mapping, Sequence

import numpy as np

from shared.models import Tokenizer
from shared.store import CLIPPED, FIRST, MASKED, SINK, SPECIAL, Store

FLAGS = {FIRST: "first", SPECIAL: "special"}
FAULTS = {CLIPPED: "clipped", MASKED: "masked", SINK: "sink"}


def table(store: Store, rows: Sequence[int], tokenizers: Mapping[str, Tokenizer]) -> list[dict[str, str]]:
    """One record per row: row, document, and per model its token, position and flags; per source its norm and faults."""
    ids, document = store.document_ids(), store.column("rows/document")
    records = [{"row": str(row), "document": ids[document[row]]} for row in rows]
    for model, tokenizer in tokenizers.items():
        columns = [store.column(f"rows/{model}/{name}") for name in ("token", "position", "flags")]
        for record, row in zip(records, rows, strict=True):
            token, position, flags = (column[row] for column in columns)
            record[model] = repr(token_text(store, model, int(token), tokenizer))
            record[f"{model}@"] = str(position) + _named(int(flags), FLAGS)
    for source in store.header.sources:
        norms, faults = store.column(f"norms/{source}"), store.column(f"faults/{source}")
        for record, row in zip(records, rows, strict=True):
            record[f"|{source}|"] = f"{norms[row]:.1f}" + _named(int(faults[row]), FAULTS)
    return records


def token_text(store: Store, model: str, token: int, tokenizer: Tokenizer) -> str:
    """The text that token number `token` adds to its segment; a token inside a character shows as U+FFFD."""
    ids, segments = store.column(f"tokens/{model}/id"), store.column(f"tokens/{model}/segment")
    start = int(segments[np.searchsorted(segments, token, "right") - 1])
    before = prefix_text(tokenizer, ids[max(start, token - 16) : token]).rstrip("\ufffd")  # the start of a character
    return prefix_text(tokenizer, ids[max(start, token - 16) : token + 1])[len(before) :]


def prefix_text(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def lines(records: Sequence[Mapping[str, str]]) -> list[str]:
    """The records as columns under a heading."""
    names = list(records[0])
    widths = {name: max(len(name), *(len(record[name]) for record in records)) for name in names}
    heading = "  ".join(name.ljust(widths[name]) for name in names)
    return [heading, *("  ".join(record[name].ljust(widths[name]) for name in names).rstrip() for record in records)]


def _named(bits: int, names: Mapping[int, str]) -> str:
    return "".join(f" {name}" for bit, name in names.items() if bits & bit)

"""Rows of a store as a person reads them: the paired tokens side by side, with their norms.

Letters: T tokens of a model, G segments.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shared.flags import CLIPPED, MASKED, SINK, flag_names
from shared.models import Tokenizer
from shared.store import Store

SEEN = 2**16  # tokens of the beginning
FAULTS = {CLIPPED: "clipped", MASKED: "masked", SINK: "sink"}


def table(store: Store, rows: Sequence[int], tokenizers: Mapping[str, Tokenizer]) -> list[dict[str, Any]]:
    """One record per row: row, document, {model: token, id, position, flags} and {source: norm, faults}."""
    names, document = store.document_ids(), store.lazily("rows/document")
    records: list[dict[str, Any]] = [
        {"row": row, "document": names[document[row]], "models": {}, "sources": {}} for row in rows
    ]
    for model, tokenizer in tokenizers.items():
        columns = [store.lazily(f"rows/{model}/{name}") for name in ("token", "position", "flags")]
        texts = Texts(store, model, tokenizer)
        for record, row in zip(records, rows, strict=True):
            token, position, flags = (column[row] for column in columns)
            record["models"][model] = {
                "token": texts.text(int(token)), "id": int(texts.ids_T[token]), "position": int(position),
                "flags": flag_names(int(flags)),
            }  # fmt: skip
    for source in store.header.sources:
        norms, faults = store.lazily(f"norms/{source}"), store.lazily(f"faults/{source}")
        for record, row in zip(records, rows, strict=True):
            record["sources"][source] = {
                "norm": float(norms[row]),
                "faults": [name for bit, name in FAULTS.items() if faults[row] & bit],
            }
    return records


class Texts:
    """Every token of a model in a store, as text."""

    def __init__(self, store: Store, model: str, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids_T, self.ends_T = store.lazily(f"tokens/{model}/id"), store.lazily(f"tokens/{model}/end")
        self.segment_G = store.column(f"tokens/{model}/segment")
        self._tells = bool((self.ends_T[:SEEN] >= 0).any())  # whether the tokenizer tells where characters end

    def text(self, token: int) -> str:
        """What a token adds to its segment: of the tokens of one character, the last adds it, the others U+FFFD.

        Decoded behind one more whole character, since a text's first space, and a part of a character among others,
        decode to something else.
        """
        start = int(self.segment_G[np.searchsorted(self.segment_G, token, "right") - 1])
        whole_T = self._whole(start, token + 1)
        if not whole_T[-1]:
            return "\ufffd"
        behind = start + 1 + np.flatnonzero(whole_T[:-1])  # where a text behind a whole character begins
        first, last = ([start, start, *behind.tolist()])[-2:]
        return self._decode(first, token + 1)[len(self._decode(first, last)) :]

    def _whole(self, start: int, stop: int) -> np.ndarray:
        """Whether a token ends with a character, or is special; where the tokenizer does not tell, all may."""
        ends_T = self.ends_T[start:stop]
        special_T = np.isin(self.ids_T[start:stop], self.tokenizer.all_special_ids)
        return (ends_T >= 0) | special_T if self._tells else np.full(len(ends_T), True)

    def _decode(self, start: int, stop: int) -> str:
        return str(self.tokenizer.decode(self.ids_T[start:stop].tolist(), clean_up_tokenization_spaces=False))


def lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The records as columns under a heading: token and position per model, norm per source."""
    cells = [_cells(record) for record in records]
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in cells[0]}
    heading = "  ".join(name.ljust(widths[name]) for name in widths)
    return [line.rstrip() for line in (heading, *("  ".join(row[n].ljust(widths[n]) for n in widths) for row in cells))]


def _cells(record: Mapping[str, Any]) -> dict[str, str]:
    cells = {"row": str(record["row"]), "document": record["document"]}
    for name, model in record["models"].items():
        cells |= {name: repr(model["token"]), f"{name}@": " ".join([str(model["position"]), *model["flags"]])}
    for name, source in record["sources"].items():
        cells[f"|{name}|"] = " ".join([f"{source['norm']:.1f}", *source["faults"]])
    return cells

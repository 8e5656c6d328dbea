"""Documents -> tokens with the characters at which they end -> segments that fit every model's context.

Letters: T tokens of a document in one model, M models, J places at which the tokens of all models end together.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from shared.errors import ModelError
from shared.models import Tokenizer


@dataclass(frozen=True)
class Tokens:
    """One document in one model's tokens, without the special tokens that stand around a segment.

    `ends_T` counts the document's characters up to each token's end; -1 where a token is special, ends inside a
    character, or the tokenizer does not tell. `spelled` is false where the tokens' bytes are not the text's, since a
    normaliser changed it: then no end is known. `pieces` are the bytes of each token, none for a special one.
    """

    ids_T: np.ndarray
    ends_T: np.ndarray
    pieces: Sequence[bytes]
    spelled: bool = True
    marks_T: np.ndarray | None = None  # of a chat: flags of role and template (shared.store)


class Speller:
    """A tokenizer as the plan needs it: ids, the ends of tokens, and what stands around a segment.

    Ends are derived from the tokens' bytes, since some fast tokenizers trim white space from their offsets, and since
    the tokens of a split character share one end there.
    """

    def __init__(self, tokenizer: Tokenizer, bos: str, name: str, replaced: Mapping[str, str] | None = None) -> None:
        self.tokenizer, self.name = tokenizer, name
        self._replaced = [(self._known(one), self._known(other)) for one, other in (replaced or {}).items()]
        self.prefix, self.suffix = _around(tokenizer, bos, name)
        self.special = np.array(sorted(tokenizer.all_special_ids), np.int64)
        self.added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}

    @cached_property
    def style(self) -> str:
        """How pieces spell bytes: "bytes" (GPT-2's alphabet), "words" (SentencePiece) or "offsets" (not at all)."""
        if not self.tokenizer.is_fast:
            return "none"
        decoder = json.dumps(json.loads(self.tokenizer.backend_tokenizer.to_str())["decoder"])
        if '"ByteLevel"' in decoder:
            return "bytes"
        return "words" if '"ByteFallback"' in decoder or "\\u2581" in decoder else "offsets"

    def spell(self, text: str) -> Tokens:
        encoding = self.tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=self.style == "offsets"
        )
        ids_T = np.array(encoding["input_ids"], np.int64)
        pieces = [self._piece(index) for index in ids_T.tolist()]
        if self.style == "none":
            ends_T: np.ndarray | None = np.full(len(ids_T), -1)
        elif self.style == "offsets":
            ends_T = _ends_by_offset(np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2))
        else:
            ends_T = _ends_by_bytes(pieces, text)
        special_T = np.isin(ids_T, self.special)
        pieces = [b"" if special else piece for piece, special in zip(pieces, special_T.tolist(), strict=True)]
        if ends_T is None:
            return Tokens(ids_T.astype(np.int32), np.full(len(ids_T), -1, np.int32), pieces, spelled=False)
        return Tokens(ids_T.astype(np.int32), np.where(special_T, -1, ends_T).astype(np.int32), pieces)

    def read(self, ids_T: np.ndarray) -> np.ndarray:
        """The ids that the model reads: all replacements at once, so that none is replaced again."""
        read_T = ids_T.copy()
        for index, other in self._replaced:
            read_T[ids_T == index] = other
        return read_T

    @property
    def written(self) -> list[int]:
        """The ids that stand in the place of others."""
        return [other for _, other in self._replaced]

    def _known(self, token: str) -> int:
        ids: list[int] = self.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            way_out = f"It reads it as {len(ids)} tokens; a token is replaced by one token (models.{self.name}.replace)"
            raise ModelError(f"the tokenizer of {self.name} has no such token", repr(token), way_out)
        return ids[0]

    def _piece(self, index: int) -> bytes:
        if index not in self._pieces:
            piece = self.added.get(index)
            if self.style in ("none", "offsets"):
                self._pieces[index] = str(self.tokenizer.decode([index])).removeprefix("##").encode()
            elif piece is None:
                self._pieces[index] = _unspell(str(self.tokenizer.convert_ids_to_tokens(index)), self.style)
            else:
                self._pieces[index] = piece.replace("\u2581", " ").encode() if self.style == "words" else piece.encode()
        return self._pieces[index]

    @cached_property
    def _pieces(self) -> dict[int, bytes]:
        return {}


def _around(tokenizer: Tokenizer, bos: str, name: str) -> tuple[list[int], list[int]]:
    """The special tokens before and behind a segment: what the tokenizer adds, its BOS, or none."""
    if bos == "never":
        return [], []
    if bos == "always":
        if tokenizer.bos_token_id is None:
            raise ModelError("the tokenizer has no BOS token", name, "Set rows.bos to model or never")
        return [tokenizer.bos_token_id], []
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    start = next(i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 for itself, the others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _unspell(piece: str, style: str) -> bytes:
    if style == "bytes":
        alphabet = _byte_alphabet()
        return bytes(alphabet[letter] for letter in piece) if all(c in alphabet for c in piece) else piece.encode()
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes([int(match[1], 16)])
    return piece.replace("\u2581", " ").encode()


def _ends_by_bytes(pieces: Sequence[bytes], text: str) -> np.ndarray | None:
    spelled, data = b"".join(pieces), text.encode("utf-8", "surrogatepass")
    shift = 0
    if spelled == b" " + data:  # some SentencePiece tokenizers put a space before the text
        shift = 1
    elif spelled != data:
        return None
    ends_T = np.cumsum([len(piece) for piece in pieces], dtype=np.int64) - shift
    starts = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80  # first bytes of characters
    characters = np.concatenate([[0], np.cumsum(starts)])
    whole = np.append(starts, True)[np.maximum(ends_T, 0)] & (ends_T > 0)
    return np.where(whole, characters[np.maximum(ends_T, 0)], -1)


def _ends_by_offset(offsets_T2: np.ndarray) -> np.ndarray:
    """Ends that a tokenizer without white space in its tokens gives; of tokens with one end, only the last has it."""
    ends_T = offsets_T2[:, 1]
    last = np.append(ends_T[1:] != ends_T[:-1], True) if len(ends_T) else np.empty(0, bool)
    return np.where(last & (offsets_T2[:, 0] < ends_T), ends_T, -1)


def cut(stops_MJ: np.ndarray, limits_M: Sequence[int]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Cut a document at places where the tokens of all models end together: (first place, last place + 1, start_M).

    `stops_MJ[m, j]` is how many tokens of model m stand before the end of place j, ascending in j. A segment takes as
    many places as fit every limit; its tokens in model m are start_M[m] to stops_MJ[m, last]. Where the next place is
    out of reach of some model, the tokens up to it are left out, and the next segment starts behind them.
    """
    places = stops_MJ.shape[1]
    start_M = np.zeros(len(stops_MJ), np.int64)
    first = 0
    while first < places:
        fitting = [
            int(np.searchsorted(row_J, start + limit, "right"))
            for row_J, start, limit in zip(stops_MJ, start_M, limits_M, strict=True)
        ]
        last = min(fitting)
        if last > first:
            yield first, last, start_M
            first, start_M = last, stops_MJ[:, last - 1]
        else:
            first, start_M = first + 1, stops_MJ[:, first]

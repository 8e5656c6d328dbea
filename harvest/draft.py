"""One document -> what the plan stores of it, whatever the other documents are; many of them -> a piece. Pure.

Letters: M models, J places, G segments, T tokens of one model, N rows, d documents of a piece.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from harvest.align import RULES, complete
from harvest.chat import Template, placed, templates
from harvest.config import HarvestConfig, RowsConfig
from harvest.corpus import Document
from harvest.segments import Speller, Tokens, cut
from shared.errors import AlignmentError, ConfigError
from shared.flags import BOS, FIRST, HELD_OUT, SPECIAL, TRAIN
from shared.models import Tokenizer

Piece = Mapping[str, np.ndarray]  # columns of many documents, one after another, in the order in which they were read


@dataclass
class _Model:
    """What one model reads of a document, segment after segment."""

    ids: list[np.ndarray] = field(default_factory=list)
    ends: list[np.ndarray] = field(default_factory=list)
    position: list[np.ndarray] = field(default_factory=list)
    flags: list[np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)  # tokens of the document up to the end of each segment


@dataclass
class Draft:
    """What one document gives to a plan, before it is known how much of it is wanted.

    `lost` counts tokens of all models out of every segment's reach: before each segment, and behind the last one.
    """

    document: Document
    number: int
    split: int
    read: list[int]  # tokens of the document, per model
    rendered: bool = True
    spelled: bool = True
    complete: bool = False  # no content is left behind the last place
    rows: list[int] = field(default_factory=list)  # per segment
    places: list[int] = field(default_factory=list)  # per segment: rows, less those of tokens around it
    lost: list[int] = field(default_factory=lambda: [0])
    models: list[_Model] = field(default_factory=list)


class Drafter:
    """Drafts documents for the models of `spellers`. `limits` are tokens of a segment at most, with special ones.

    Raises AlignmentError where `identical` cannot hold.
    """

    def __init__(
        self, spellers: Mapping[str, Speller], limits: Mapping[str, int], rows: RowsConfig, align: str,
        chats: Mapping[str, Template] | None = None,
    ) -> None:  # fmt: skip
        self.spellers, self.limits, self.rows, self.align = dict(spellers), dict(limits), rows, align
        self.chats = dict(chats or {})
        if align == "identical":
            _require_same_around(spellers)
        self.rooms = [limits[name] - len(one.prefix) - len(one.suffix) for name, one in self.spellers.items()]

    def draft(self, document: Document, number: int) -> Draft:
        """`number` is the document's place in the corpus: of two with one id, the first counts."""
        made = Draft(document, number, split_of(document.id, self.rows), [0 for _ in self.spellers])
        made.models = [_Model() for _ in self.spellers]
        tokens = self._tokens(document)
        if tokens is None:
            made.rendered = False
            return made
        made.read = [len(one.ids_T) for one in tokens]
        if self.align == "offsets" and not all(one.spelled for one in tokens):  # better no row than a wrong one
            made.spelled = False
            return made
        stops_MJ = RULES[self.align](tokens)
        reached_M = np.zeros(len(tokens), np.int64)
        for first, last, start_M in cut(stops_MJ, self.rooms):
            made.lost[-1] += int((start_M - reached_M).sum())
            reached_M = stops_MJ[:, last - 1]
            self._segment(made, tokens, stops_MJ[:, first:last], start_M)
        made.lost[-1] += int((stops_MJ[:, -1:].sum(1) - reached_M).sum())  # places behind the last segment
        made.complete = complete(tokens, stops_MJ)
        return made

    def _tokens(self, document: Document) -> list[Tokens] | None:
        """The document in every model's tokens; none where a chat template refuses it."""
        if not document.messages:
            return [speller.spell(document.text) for speller in self.spellers.values()]
        rendered = {name: template.render(document) for name, template in self.chats.items()}
        if not all(rendered.values()):
            return None
        joint = self.align == "offsets" and len(set(self.chats.values())) > 1
        tokens = []
        for name, speller in self.spellers.items():
            chat = rendered[name]
            assert chat is not None
            tokens.append(placed(speller.spell(chat.text), chat, document.messages, joint))
        return tokens

    def _segment(self, made: Draft, tokens: Sequence[Tokens], stops_MJ: np.ndarray, start_M: np.ndarray) -> None:
        """Add one segment and its rows: the special tokens around it too, where all models have the same tokens."""
        prefixes = np.array([len(speller.prefix) for speller in self.spellers.values()])
        places_MJ = stops_MJ - 1 - start_M[:, None] + prefixes[:, None]
        kept_J = (places_MJ >= self.rows.skip).all(0)
        position_MN = places_MJ[:, kept_J]
        if self.align == "identical":
            suffix = len(next(iter(self.spellers.values())).suffix)
            whole = np.arange(self.rows.skip, places_MJ[0, -1] + 1 + suffix)
            position_MN = np.tile(whole, (len(tokens), 1))
        if not position_MN.shape[1]:
            return
        parts = zip(made.models, self.spellers.values(), tokens, stops_MJ[:, -1], start_M, position_MN, strict=True)
        for model, speller, one, stop, start, position_N in parts:
            ids = np.concatenate([speller.prefix, one.ids_T[start:stop], speller.suffix])
            inside = slice(len(speller.prefix), len(speller.prefix) + stop - start)
            ends, marks = np.full(len(ids), -1), np.zeros(len(ids), np.uint8)
            ends[inside] = one.ends_T[start:stop]
            if one.marks_T is not None:
                marks[inside] = one.marks_T[start:stop]
            ids = speller.read(ids)
            model.ids.append(ids.astype(np.int32))
            model.ends.append(ends.astype(np.int32))
            model.position.append(position_N.astype(np.int32))
            model.flags.append(marks[position_N] | _flags(ids[position_N], position_N, speller))
            model.lengths.append(len(ids))
            model.reached.append(int(stop))
        made.rows.append(position_MN.shape[1])
        made.places.append(int(kept_J.sum()))
        made.lost.append(0)


def drafter(config: HarvestConfig, tokenizers: Mapping[str, Tokenizer], align: str) -> Drafter:
    """Raises ModelError, ConfigError or AlignmentError where these tokenizers cannot read the corpora so."""
    spellers = {
        name: Speller(tokenizer, config.rows.bos, name, config.models[name].replace)
        for name, tokenizer in tokenizers.items()
    }
    chats = templates(config.chat, spellers) if any(text.messages for text in config.texts.values()) else {}
    if align == "greedy" and len(set(chats.values())) > 1:
        way_out = "Set chat.template to one for all models, or rows.align to offsets"
        raise ConfigError("greedy pairs one text, and each model has a chat template of its own", align, way_out)
    return Drafter(spellers, dict.fromkeys(spellers, config.rows.context), config.rows, align, chats)


def _flags(ids_N: np.ndarray, position_N: np.ndarray, speller: Speller) -> np.ndarray:
    bos = -1 if speller.tokenizer.bos_token_id is None else int(speller.tokenizer.bos_token_id)
    flags_N = FIRST * (position_N == 0) | SPECIAL * np.isin(ids_N, speller.special) | BOS * (ids_N == bos)
    return flags_N.astype(np.uint8)


def _require_same_around(spellers: Mapping[str, Speller]) -> None:
    """Rows of `identical` hold special tokens too, so all models must read the same ones around a segment."""
    around = {name: (speller.prefix, speller.suffix) for name, speller in spellers.items()}
    for one, other in pairwise(around):
        if around[other] != around[one]:
            raise AlignmentError(
                "the tokenizers put different special tokens around a text", f"{one} and {other}",
                'Set rows.bos to "never", or rows.align to "offsets"',
            )  # fmt: skip


def key_of(document_id: str, seed: int) -> bytes:
    """Where a document stands in the order of a store, by its id and the seed alone: 32 hexadecimal digits."""
    return hashlib.sha256(f"{seed}:order:{document_id}".encode()).hexdigest()[:32].encode()


def split_of(document_id: str, rows: RowsConfig) -> int:
    """TRAIN or HELD_OUT, by the id and the seed alone."""
    digest = hashlib.sha256(f"{rows.seed}:split:{document_id}".encode()).digest()
    return HELD_OUT if int.from_bytes(digest[:8], "big") / 2**64 < rows.held_out else TRAIN


def piece(drafts: Iterable[Draft], models: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """The columns of these documents: per document, per segment (G), per token (T) and per row (N)."""
    made = list(drafts)
    ids = [one.document.id.encode() for one in made]
    columns = {
        "key": np.array([key_of(one.document.id, seed) for one in made], "S32"),
        "id": np.frombuffer(b"".join(ids), np.uint8),
        "id_bytes": np.array([len(name) for name in ids], np.int64),
        "part": np.array([one.document.part for one in made], np.int64),
        "characters": np.array([one.document.characters for one in made], np.int64),
        "number": np.array([one.number for one in made], np.int64),
        "split": np.array([one.split for one in made], np.uint8),
        "rendered": np.array([one.rendered for one in made], bool),
        "spelled": np.array([one.spelled for one in made], bool),
        "complete": np.array([one.complete for one in made], bool),
        "segments": np.array([len(one.rows) for one in made], np.int64),
        "rows": np.array([sum(one.rows) for one in made], np.int64),
        "places": np.array([sum(one.places) for one in made], np.int64),
        "lost": np.array([sum(one.lost) for one in made], np.int64),
        "rows_G": np.array([n for one in made for n in one.rows], np.int64),
        "places_G": np.array([n for one in made for n in one.places], np.int64),
        "lost_G": np.array([n for one in made for n in one.lost[:-1]], np.int64),
    }
    for m, name in enumerate(models):
        of = [one.models[m] for one in made]
        columns |= {
            f"{name}/read": np.array([one.read[m] for one in made], np.int64),
            f"{name}/tokens": np.array([sum(one.lengths) for one in of], np.int64),
            f"{name}/length_G": np.array([n for one in of for n in one.lengths], np.int64),
            f"{name}/reached_G": np.array([n for one in of for n in one.reached], np.int64),
            f"{name}/id_T": _joined([a for one in of for a in one.ids], np.int32),
            f"{name}/end_T": _joined([a for one in of for a in one.ends], np.int32),
            f"{name}/position_N": _joined([a for one in of for a in one.position], np.int32),
            f"{name}/flags_N": _joined([a for one in of for a in one.flags], np.uint8),
        }
    return columns


def _joined(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts])

"""All corpora of a harvest, read once before anything is planned: fingerprints, and the order of documents.

Letters: d documents.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harvest import corpus
from harvest.config import CorpusConfig
from harvest.corpus import Document
from harvest.draft import key_of
from shared.errors import CorpusError

IN_MEMORY = 2**28  # characters of documents that are kept, so that a small corpus is read once


@dataclass(frozen=True)
class Survey:
    """What is known of the corpora. A stream is not read before it is drafted, so it has no documents here.

    `identity` is what the store's id takes of them. `key_d` is where a document stands in the order of a store.
    """

    corpora: Sequence[CorpusConfig]
    names: Sequence[str]
    identity: Any
    key_d: np.ndarray
    part_d: np.ndarray
    characters_d: np.ndarray
    kept: Sequence[Document] | None
    left_out: np.ndarray  # keys of documents that another store of the family has

    def without(self, keys: np.ndarray) -> "Survey":
        return replace(self, left_out=keys)

    @property
    def open_d(self) -> np.ndarray:
        """Which documents may be planned."""
        return ~np.isin(self.key_d, self.left_out)

    def first(self, characters: Sequence[float]) -> np.ndarray:
        """The first documents of each corpus, in the order of keys, up to so many characters of it: bool d."""
        chosen_d, order_d = np.zeros(len(self.key_d), bool), np.argsort(self.key_d, kind="stable")
        open_d = self.open_d
        for part, most in enumerate(characters):
            mine = order_d[(self.part_d[order_d] == part) & open_d[order_d]]
            before_d = np.cumsum(self.characters_d[mine]) - self.characters_d[mine]
            chosen_d[mine[before_d < most]] = True
        return chosen_d

    def documents(self) -> Iterator[Document]:
        """All documents but those of streams, in the order of the columns."""
        return iter(self.kept) if self.kept is not None else _all(self.corpora, self.names)


NO_KEYS, NO_NUMBERS = np.empty(0, "S32"), np.empty(0, np.int64)
NOTHING = Survey((), (), None, NO_KEYS, NO_NUMBERS, NO_NUMBERS, (), NO_KEYS)


def survey(corpora: Mapping[str, CorpusConfig], seed: int) -> Survey:
    """Read the corpora. Raises CorpusError where one has no text, or two documents share an id."""
    configs, names = list(corpora.values()), list(corpora)
    digests = [hashlib.sha256() for _ in configs]
    keys, parts, characters = [], [], []
    kept: list[Document] | None = []
    total = 0
    for document in _all(configs, names):
        _digest(digests[document.part], document)
        keys.append(key_of(document.id, seed))
        parts.append(document.part)
        characters.append(document.characters)
        total += document.characters
        if kept is not None:
            kept.append(document)
        if total > IN_MEMORY:
            kept = None
    columns = np.array(keys, "S32"), np.array(parts, np.int64), np.array(characters, np.int64)
    for number, config in enumerate(configs):
        if not config.stream and number not in set(parts):
            field = f"corpus.messages={config.messages}" if config.messages else f"corpus.text={config.text}"
            way_out = f"Check the file and the field {field}"
            raise CorpusError("no text in the corpus", config.path, way_out)
    identity = _identity(corpora, [digest.hexdigest() for digest in digests])
    made = Survey(configs, names, identity, *columns, kept, NO_KEYS)
    _require_distinct(made, configs)
    return made


def _all(configs: Sequence[CorpusConfig], names: Sequence[str]) -> Iterator[Document]:
    for number, config in enumerate(configs):
        if not config.stream:
            yield from (placed(document, number, names) for document in corpus.read(config))


def placed(document: Document, part: int, names: Sequence[str]) -> Document:
    """The document in its part; where there are several, its id begins with the part's name."""
    if len(names) == 1:
        return document
    return replace(document, id=f"{names[part]}/{document.id}", part=part)


def _digest(digest: Any, document: Document) -> None:
    try:
        digest.update(f"{len(document.id)}:{document.id}{len(document.text)}:{document.text}".encode())
    except UnicodeEncodeError as error:
        way_out = f"Replace the lone surrogates in its text or id ({error.reason})"
        raise CorpusError("no valid Unicode in the corpus", f"document {document.id!r}", way_out) from None


def _identity(corpora: Mapping[str, CorpusConfig], digests: Sequence[str]) -> Any:
    """The fingerprint of a corpus on its own, sha256 over ids and texts; of several, with their weights."""
    marks = [
        corpus.revision(one) if one.stream else digest for one, digest in zip(corpora.values(), digests, strict=True)
    ]
    if len(marks) == 1:
        return marks[0]
    return {name: [mark, one.weight] for (name, one), mark in zip(corpora.items(), marks, strict=True)}


def _require_distinct(made: Survey, configs: Sequence[CorpusConfig]) -> None:
    strict = [number for number, config in enumerate(configs) if config.repeats == "refuse"]
    key_d, count_d = np.unique(made.key_d[np.isin(made.part_d, strict)], return_counts=True)
    if not (count_d > 1).any():
        return
    repeated = set(key_d[count_d > 1].tolist())
    document = next(one for one, key in zip(made.documents(), made.key_d.tolist(), strict=True) if key in repeated)
    way_out = 'Set corpus.id to a field that tells them apart, or corpus.repeats to "drop"'
    raise CorpusError("two documents share an id", document.id, way_out)

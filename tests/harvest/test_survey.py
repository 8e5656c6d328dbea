"""What one reading of the corpora tells."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harvest import survey as surveys
from harvest.config import CorpusConfig
from harvest.corpus import Document
from harvest.draft import key_of
from harvest.survey import Survey, survey
from shared.errors import CorpusError


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def of(path: Path, **settings: Any) -> Survey:
    return survey({"corpus": CorpusConfig(path=str(path), **settings)}, seed=3)


def test_the_columns_are_those_of_the_documents_in_their_order(tmp_path: Path) -> None:
    found = of(write(tmp_path / "a.jsonl", {"text": "abc"}, {"text": " "}, {"text": "de"}))
    assert list(found.documents()) == [Document("a.jsonl:0", "abc"), Document("a.jsonl:2", "de")]
    assert found.characters_d.tolist() == [3, 2] and found.part_d.tolist() == [0, 0]
    assert found.key_d.tolist() == [key_of("a.jsonl:0", 3), key_of("a.jsonl:2", 3)]


def test_the_fingerprint_is_that_of_ids_and_texts_wherever_they_lie(tmp_path: Path) -> None:
    def mark(name: str, *records: dict[str, str], **settings: str) -> Any:
        return of(write(tmp_path / name / "a.jsonl", *records), **settings).identity

    first = mark("x", {"text": "a"}, {"text": "b"})
    assert mark("y", {"text": "a", "more": "z"}, {"text": "b"}) == first
    others = [
        mark("x", {"text": "b"}, {"text": "a"}),
        mark("x", {"text": "a"}, {"text": "b"}, {"text": "c"}),
        mark("x", {"text": "ab"}, {"text": "b"}),
        mark("x", {"text": "a", "key": "k"}, {"text": "b", "key": "l"}, id="key"),
    ]
    assert len({first, *others}) == 5


def test_a_corpus_that_does_not_fit_in_memory_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "de"})
    small = of(path)
    monkeypatch.setattr(surveys, "IN_MEMORY", 4)
    large = of(path)
    assert small.kept is not None and large.kept is None
    assert list(small.documents()) == list(large.documents()) == list(large.documents())
    assert small.identity == large.identity and np.array_equal(small.key_d, large.key_d)


def test_the_first_documents_are_those_of_the_smallest_keys_up_to_so_many_characters(tmp_path: Path) -> None:
    found = of(write(tmp_path / "a.jsonl", *({"text": "x" * (1 + number % 3)} for number in range(40))))
    order_d = np.argsort(found.key_d)
    for most in (0, 1, 7, 30, 1000):
        chosen_d = found.first([most])
        count = int(chosen_d.sum())
        assert set(order_d[:count].tolist()) == set(np.flatnonzero(chosen_d).tolist())
        assert found.characters_d[order_d[: count - 1]].sum() < most or not count
        assert found.characters_d[chosen_d].sum() >= min(most, found.characters_d.sum())


def test_several_corpora_have_ids_under_their_names_and_weights_in_their_identity(tmp_path: Path) -> None:
    paths = [write(tmp_path / name / "a.jsonl", {"text": name}) for name in ("x", "y")]

    def both(weight: float) -> Survey:
        configs = [CorpusConfig(path=str(path), weight=weight) for path in paths]
        return survey({"one": configs[0], "two": configs[1]}, 0)

    assert [(one.id, one.part) for one in both(1).documents()] == [("one/a.jsonl:0", 0), ("two/a.jsonl:0", 1)]
    assert both(1).identity != both(2).identity


def test_two_documents_with_one_id_are_refused_or_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "x", "key": 1}, {"text": "y", "key": "1"})
    with pytest.raises(CorpusError, match=r'two documents share an id: 1. Set corpus.id .* corpus.repeats to "drop"'):
        of(path, id="key")
    assert len(of(path, id="key", repeats="drop").key_d) == 2  # the plan takes the first


def test_the_text_itself_can_be_the_id(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "x"}, {"text": "y"}, {"text": "x"})
    ids = [document.id for document in of(path, id="text", repeats="drop").documents()]
    assert ids[0] == ids[2] != ids[1] and len(ids[0]) == 64


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no text in the corpus: .*a.jsonl. Check the file and the field corpus.tex"):
        of(write(tmp_path / "a.jsonl", {"text": " "}))
    with pytest.raises(CorpusError, match=r"no text in the corpus"):
        survey({"full": CorpusConfig(), "empty": CorpusConfig(path=str(write(tmp_path / "b.jsonl", {"text": ""})))}, 0)


def test_text_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud800"}')
    with pytest.raises(CorpusError, match=r"no valid Unicode in the corpus: document 'a.jsonl:0'"):
        of(path)

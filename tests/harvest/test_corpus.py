"""Every kind of corpus gives the same documents as its source holds, or one line that says what is wrong."""

import builtins
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from harvest import corpus
from harvest.config import CorpusConfig
from harvest.corpus import Document
from harvest.survey import survey
from shared.errors import CorpusError

TEXTS = ["one text", "two\n\nlines — ünïcode 日本 😀", "three"]


def read(path: Path, **settings: Any) -> list[Document]:
    return list(corpus.read(CorpusConfig(path=str(path), **settings)))


def refused(path: Path | str, **settings: Any) -> str:
    with pytest.raises(CorpusError) as caught:
        survey({"corpus": CorpusConfig(path=str(path), **settings)}, 0)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


# --- each format ----------------------------------------------------------------------------------------------------


def test_a_txt_file_is_one_document_under_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[1])
    assert read(tmp_path / "a.txt") == [Document("a.txt", TEXTS[1])]


def test_a_jsonl_file_has_a_document_per_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "name": f"n{i}"} for i, text in enumerate(TEXTS)])
    assert read(path) == [Document(f"a.jsonl:{i}", text) for i, text in enumerate(TEXTS)]
    assert read(path, id="name") == [Document(f"n{i}", text) for i, text in enumerate(TEXTS)]
    assert [document.text for document in read(path, text="name")] == ["n0", "n1", "n2"]
    path.write_text("\n" + path.read_text().replace("\n", "\n\n"))  # blank lines count for nothing
    assert [document.id for document in read(path)] == ["a.jsonl:0", "a.jsonl:1", "a.jsonl:2"]


def test_a_parquet_file_has_a_document_per_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"body": TEXTS, "number": [7, 8, 9]})
    assert read(path, text="body") == [Document(f"a.parquet:{i}", text) for i, text in enumerate(TEXTS)]
    assert [document.id for document in read(path, text="body", id="number")] == ["7", "8", "9"]


@pytest.mark.parametrize("value", [["a", "b"], [{"role": "user"}], 7, True])
def test_a_field_that_holds_no_text_is_refused(tmp_path: Path, value: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": value}])
    assert f"the field 'text' in {path}, line 1 is no text: {type(value).__name__}. Set" in refused(path)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "notes.md").write_text("not read")
    write_jsonl(tmp_path / "c.jsonl", [{"text": "c0"}, {"text": "c1"}])
    write_parquet(tmp_path / "d.parquet", {"text": ["d"]})
    assert [(document.id, document.text) for document in read(tmp_path)] == [
        ("a.txt", "a"), ("c.jsonl:0", "c0"), ("c.jsonl:1", "c1"), ("d.parquet:0", "d"), ("sub/b.txt", "b"),
    ]  # fmt: skip


def test_a_dataset_that_was_saved_to_disk_is_read(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": TEXTS, "key": ["x", "y", "z"]})
    one.save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "one") == [Document(f"train:{i}", text) for i, text in enumerate(TEXTS)]
    assert [document.id for document in read(tmp_path / "one", id="key")] == ["x", "y", "z"]
    datasets.DatasetDict({"train": one, "test": one.select([2])}).save_to_disk(str(tmp_path / "dict"))
    assert read(tmp_path / "dict", split="test") == [Document("test:0", "three")]
    assert "no such corpus here or on the hub" in refused(tmp_path / "dict", split="validation")


def test_documents_without_text_are_left_out_and_at_most_so_many_are_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ["", "a", " \n\t", "b", "c"]])
    assert [(document.id, document.text) for document in read(path)] == [
        ("a.jsonl:1", "a"), ("a.jsonl:3", "b"), ("a.jsonl:4", "c"),
    ]  # fmt: skip
    assert [document.text for document in read(path, documents=2)] == ["a", "b"]


def test_a_limited_corpus_is_not_read_further_than_needed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\nnot json\n')
    assert len(read(path, documents=2)) == 2


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl", "gone.parquet", "gone"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    assert refused(tmp_path / name) == f"no such corpus: {tmp_path / name}. Check corpus.path"


def test_a_name_that_is_neither_here_nor_on_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert refused("nobody/nothing").startswith(
        "no such corpus here or on the hub: nobody/nothing. Check corpus.path ("
    )


Write = Callable[[Path], object]
BAD: dict[str, tuple[str, Write, str]] = {
    "missing field": (
        "a.jsonl", lambda path: write_jsonl(path, [{"text": "x"}, {"body": "y", "id": 1}]),
        "no field 'text' in {path}, line 2: body, id. Set corpus.text",
    ),
    "null": (
        "a.jsonl", lambda path: write_jsonl(path, [{"text": None}]),
        "no field 'text' in {path}, line 1: text (it is null). ",
    ),
    "no record": ("a.jsonl", lambda path: write_jsonl(path, [[1, 2]]), "no field 'text' in {path}, line 1: list. "),
    "malformed line": (
        "a.jsonl", lambda path: path.write_text('{"text": "x"}\n\n{"text": "y"\n'),
        "not JSON in the corpus: {path}, line 3. Expecting",
    ),
    "bytes": ("a.txt", lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot read the corpus: {path}. "),
    "bytes in jsonl": ("a.jsonl", lambda path: path.write_bytes(b'{"text": "\xff"}\n'), "cannot read the corpus: "),
    "half a character": (
        "a.jsonl", lambda path: path.write_text('{"text": "x"}\n{"text": "\\ud83d!"}\n'),
        "no valid Unicode in the corpus: document 'a.jsonl:1'. Replace the lone surrogates",
    ),
    "no parquet": ("a.parquet", lambda path: path.write_bytes(b"PAR1 but no more"), "cannot read the corpus: {path}. "),
    "missing column": (
        "a.parquet", lambda path: write_parquet(path, {"body": ["x"]}), "no field 'text' in {path}: body. ",
    ),
    "empty txt": ("a.txt", lambda path: path.write_text("\n \n"), "no text in the corpus: {path}. "),
    "empty jsonl": ("a.jsonl", lambda path: path.write_text(""), "no text in the corpus: {path}. "),
    "empty parquet": (
        "a.parquet", lambda path: write_parquet(path, {"text": pyarrow.array([], pyarrow.string())}),
        "no text in the corpus: {path}. ",
    ),
    "unknown kind": ("a.csv", lambda path: path.write_text("text\nx\n"), "unknown kind of corpus: {path}. Known: "),
    "empty folder": ("folder", lambda path: path.mkdir(), "no text files in the folder: {path}. "),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_corpus_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    name, write, told = BAD[case]
    write(tmp_path / name)
    assert refused(tmp_path / name).startswith(told.format(path=tmp_path / name))


def test_a_parquet_file_that_is_torn_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": TEXTS * 100})
    whole = path.read_bytes()
    for cut in (1, 9, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:cut])
        assert "corpus: " in refused(path)
    path.write_bytes(whole[:8] + bytes(200) + whole[208:])
    assert "corpus: " in refused(path)


def test_a_field_for_ids_that_is_missing_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    assert refused(path, id="key").startswith(f"no field 'key' in {path}, line 1: text. ")


# --- streams --------------------------------------------------------------------------------------------------------


def make_stream(folder: Path, documents: int = 12) -> CorpusConfig:
    """A dataset of three files, as one on the hub would be."""
    folder.mkdir()
    for file in range(3):
        numbers = range(file * documents // 3, (file + 1) * documents // 3)
        write_jsonl(
            folder / f"{file}.jsonl", [{"text": f"document {number}", "key": f"k{number}"} for number in numbers]
        )
    return CorpusConfig(path=str(folder), stream=True)


def test_a_stream_goes_on_behind_any_of_its_documents(tmp_path: Path) -> None:
    config = make_stream(tmp_path / "web")
    whole = [(document, json.loads(json.dumps(place))) for document, place in corpus.stream(config, None)]
    documents = [document for document, _ in whole]
    assert documents == [Document(f"train:{number}", f"document {number}") for number in range(12)]
    for number, (_, place) in enumerate(whole, 1):
        assert [document for document, _ in corpus.stream(config, place)] == documents[number:]
    assert [document.id for document in read(tmp_path / "web", stream=True, id="key", documents=2)] == ["k0", "k1"]


def test_the_identity_of_a_stream_is_that_of_its_files_and_fields(tmp_path: Path) -> None:
    config = make_stream(tmp_path / "web")
    first = corpus.revision(config)
    assert corpus.revision(config.model_copy(update={"id": "key"})) != first
    assert corpus.revision(make_stream(tmp_path / "same").model_copy()) == first
    write_jsonl(tmp_path / "web" / "1.jsonl", [{"text": "another"}])
    assert corpus.revision(config) != first


def test_the_identity_of_a_stream_from_the_hub_is_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {None: "aaa", "v2": "bbb"}

    class Api:
        def dataset_info(self, path: str, revision: str | None) -> SimpleNamespace:
            assert path == "org/web"
            return SimpleNamespace(sha=commits[revision])

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    marks = [corpus.revision(CorpusConfig(path="org/web", stream=True, revision=name)) for name in (None, "v2")]
    assert marks[0] != marks[1]
    commits["v2"] = "aaa"
    assert corpus.revision(CorpusConfig(path="org/web", stream=True, revision="v2")) == marks[0]


def test_a_stream_that_cannot_be_asked_for_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: Any, path: str, revision: str | None) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    assert refused("org/web", stream=True).startswith("cannot ask for the stream's commit: org/web. Check corpus.path")


def test_a_stream_that_breaks_off_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_stream(tmp_path / "web")

    class Broken:
        def __init__(self, records: Any) -> None:
            self.records, self.state_dict = records, records.state_dict

        def __iter__(self) -> Iterator[Any]:
            yield from islice(self.records, 5)
            raise ConnectionError("connection reset")

    opened = corpus._dataset
    monkeypatch.setattr(corpus, "_dataset", lambda path, config: Broken(opened(path, config)))
    with pytest.raises(CorpusError, match=r"the stream broke off: .*web at document 5. Run it again: it goes on there"):
        list(corpus.stream(config, None))


def test_a_file_is_no_stream() -> None:
    with pytest.raises(ValueError, match="A file is read as it is: leave out stream"):
        CorpusConfig(path="a.jsonl", stream=True)
    for table in ({"name": "en"}, {"revision": "main"}):
        with pytest.raises(ValueError, match="A file has no configurations and no revisions"):
            CorpusConfig(path="a.jsonl", **table)


# --- the built-in text ----------------------------------------------------------------------------------------------

SCRIPT = """
import hashlib, json, sys
before = set(sys.modules)
from harvest import corpus
from harvest.config import CorpusConfig
loaded = set(sys.modules)
documents = list(corpus.read(CorpusConfig()))
mark = hashlib.sha256(repr(documents).encode()).hexdigest()
print(json.dumps({"mark": mark, "ids": [d.id for d in documents], "loaded": sorted(set(sys.modules) - loaded),
                  "characters": sum(len(d.text) for d in documents)}))
"""


def python_docs(seed: str, *flags: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run([sys.executable, *flags, "-c", SCRIPT], env=environment, capture_output=True, check=True)
    return dict(json.loads(done.stdout))


def test_the_built_in_text_is_the_same_in_every_process_and_imports_nothing() -> None:
    first, second = python_docs("1"), python_docs("2", "-O")
    assert first == second
    assert len(set(first["ids"])) == len(first["ids"]) > 200
    assert 1e6 < first["characters"] < 3e6
    assert set(first["loaded"]) <= {"pydoc_data", "pydoc_data.topics"}


def test_the_built_in_text_takes_nothing_from_what_others_put_into_builtins(monkeypatch: pytest.MonkeyPatch) -> None:
    before = corpus._builtins()

    class Display:
        """What a notebook adds."""

    monkeypatch.setattr(builtins, "display", Display(), raising=False)
    monkeypatch.setattr(builtins, "show", lambda: None, raising=False)
    assert corpus._builtins() == before
    assert before.startswith("ArithmeticError\n\nBase class for arithmetic errors.")
    assert "str.upper\n\nReturn a copy of the string converted to uppercase." in before


def test_docstrings_are_read_without_running_the_module(tmp_path: Path) -> None:
    source = (
        '"""The module."""\nraise SystemExit\ndef f():\n    """Of f."""\n    def inner():\n        """Not this."""\n'
        'class A:\n    """Of A."""\n    def m(self):\n        """Of m."""\n    def _p(self):\n        """Nor this."""\n'
        'async def g():\n    """Of g."""\ndef _h():\n    """Nor that."""\n'
    )
    (tmp_path / "m.py").write_text(source)
    assert (
        corpus._docstrings(tmp_path / "m.py") == "The module.\n\nf\n\nOf f.\n\nA\n\nOf A.\n\nA.m\n\nOf m.\n\ng\n\nOf g."
    )

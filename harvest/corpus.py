"""Documents with stable ids, from local files, a dataset, or the text that every Python carries."""

import ast
import builtins
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from harvest.config import BUILT_IN, SUFFIXES, CorpusConfig
from shared import files
from shared.config import canonical
from shared.errors import CorpusError


@dataclass(frozen=True)
class Message:
    """What one side says in a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """One text, or one chat, whose text is then canonical JSON of its messages.

    Its id is the same however often and wherever the corpus is read. `part` is its corpus' number.
    """

    id: str
    text: str
    part: int = 0
    messages: tuple[Message, ...] = ()

    @property
    def characters(self) -> int:
        return len(self.text)

    @property
    def empty(self) -> bool:
        return not any(one.content.strip() for one in self.messages) if self.messages else not self.text.strip()


@dataclass(frozen=True)
class Fields:
    """What one record gives of a document."""

    id: str | None
    text: str
    messages: tuple[Message, ...] = ()

    def document(self, id: str) -> Document:
        """`id` counts where the record has none."""
        return Document(id if self.id is None else self.id, self.text, messages=self.messages)


def read(config: CorpusConfig) -> Iterator[Document]:
    """The corpus in its own order, without empty documents. Raises CorpusError where it is missing or unreadable."""
    documents = (document for document in _open(config) if not document.empty)
    yield from islice(documents, config.documents)


def _open(config: CorpusConfig) -> Iterator[Document]:
    if config.stream:
        return (document for document, _ in stream(config, None))
    if config.path == BUILT_IN:
        return python_docs()
    path = Path(config.path).expanduser()
    if path.is_dir() and not _is_dataset(path):
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not found:
            raise CorpusError("no text files in the folder", path, f"It needs files that end in {', '.join(SUFFIXES)}")
        return (document for file in found for document in _file(file, config, file.relative_to(path).as_posix()))
    if path.is_file():
        return _file(path, config, path.name)
    if not path.is_dir() and (path.suffix in SUFFIXES or config.path.startswith((".", "/", "~"))):
        raise CorpusError("no such corpus", config.path, "Check corpus.path")
    return _records(_dataset(path, config), config)


def _file(path: Path, config: CorpusConfig, label: str) -> Iterator[Document]:
    readers: dict[str, Callable[[Path, CorpusConfig], Iterator[Fields]]] = {
        ".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet,
    }  # fmt: skip
    if path.suffix not in readers:
        raise CorpusError("unknown kind of corpus", path, f"Known: {BUILT_IN}, {', '.join(SUFFIXES)}, a dataset")
    try:
        for number, one in enumerate(readers[path.suffix](path, config)):
            yield one.document(label if path.suffix == ".txt" else f"{label}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError("cannot read the corpus", path, f"It must be readable UTF-8 ({_reason(error)})") from None


def _txt(path: Path, config: CorpusConfig) -> Iterator[Fields]:
    yield Fields(None, path.read_text(encoding="utf-8"))


def _jsonl(path: Path, config: CorpusConfig) -> Iterator[Fields]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError("not JSON in the corpus", f"{path}, line {number}", str(error)) from None
            yield _fields(record, config, f"{path}, line {number}")


def _parquet(path: Path, config: CorpusConfig) -> Iterator[Fields]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        for batch in table.iter_batches():
            for record in batch.to_pylist():
                yield _fields(record, config, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        way_out = f"It must be a whole parquet file ({_reason(error)})"
        raise CorpusError("cannot read the corpus", path, way_out) from None


def _dataset(path: Path, config: CorpusConfig) -> Iterable[Any]:
    import datasets

    try:
        if path.is_dir() and not config.stream:
            loaded = datasets.load_from_disk(str(path))
            return loaded[config.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        options = {"split": config.split, "revision": config.revision, "streaming": config.stream}
        return datasets.load_dataset(config.path, config.name, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        way_out = f"Check corpus.path ({_reason(error)})"
        raise CorpusError("no such corpus here or on the hub", config.path, way_out) from None


def _records(records: Iterable[Any], config: CorpusConfig, start: int = 0) -> Iterator[Document]:
    for number, record in enumerate(records, start):
        yield _fields(record, config, config.path).document(f"{config.split}:{number}")


def revision(config: CorpusConfig) -> str:
    """What tells the text of a stream apart without reading it: the files' checksums, or the dataset's commit.

    Raises CorpusError where there is no such dataset, or no network to ask for its commit.
    """
    path = Path(config.path)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        mark = [f"{file.relative_to(path)}:{files.sha256_file(file)}" for file in found]
    else:
        import huggingface_hub

        try:
            sha = huggingface_hub.HfApi().dataset_info(config.path, revision=config.revision).sha
        except (OSError, ValueError) as error:
            way_out = f"Check corpus.path, corpus.revision and the network ({_reason(error)})"
            raise CorpusError("cannot ask for the stream's commit", config.path, way_out) from None
        mark = [config.path, str(config.name), str(sha)]
    fields = [config.split, config.messages or config.text, str(config.id), str(config.documents)]
    return hashlib.sha256("\n".join(["stream", *mark, *fields]).encode()).hexdigest()


def stream(config: CorpusConfig, place: Any) -> Iterator[tuple[Document, Any]]:
    """A dataset as it comes over the network, each document with the place behind it, where a later call goes on.

    Raises CorpusError where the connection is lost.
    """
    records = _dataset(Path(config.path), config)
    number = 0
    if place is not None:
        number = place["number"]
        records.load_state_dict(place["state"])  # type: ignore[attr-defined]
    try:
        for document in _records(records, config, number):
            number += 1
            yield document, {"number": number, "state": records.state_dict()}  # type: ignore[attr-defined]
    except (OSError, RuntimeError) as error:
        raise CorpusError(
            "the stream broke off",
            f"{config.path} at document {number:,}",
            f"Run it again: it goes on there ({_reason(error)})",
        ) from None


def _reason(error: Exception) -> str:
    """The first line of an error's message: libraries write pages."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _is_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def _fields(record: Any, config: CorpusConfig, where: str) -> Fields:
    """What a document needs of one record. Raises CorpusError, naming the record's fields, where one is missing."""
    field = config.messages or config.text
    for name in dict.fromkeys([field, *([config.id] if config.id else [])]):
        if not isinstance(record, dict) or record.get(name) is None:
            known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            known = f"{known} (it is null)" if isinstance(record, dict) and name in record else known
            way_out = f"Set corpus.{'messages' if config.messages else 'text'} (and corpus.id) to its fields"
            raise CorpusError(f"no field {name!r} in {where}", known, way_out)
    messages = _messages(record[field], field, where) if config.messages else ()
    text = record[field]
    if config.messages:
        text = canonical([[one.role, one.content] for one in messages]) if messages else ""
    if not isinstance(text, str):
        kind = type(text).__name__
        raise CorpusError(f"the field {field!r} in {where} is no text", kind, "Set corpus.text to a field of text")
    if config.id == field:
        return Fields(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), text, messages)
    return Fields(str(record[config.id]) if config.id else None, text, messages)


def _messages(listed: Any, field: str, where: str) -> tuple[Message, ...]:
    """Raises CorpusError where these are no messages of text. Empty ones are left in: templates show them."""
    found = []
    for one in listed if isinstance(listed, list) else [listed]:
        role, content = (one.get("role"), one.get("content")) if isinstance(one, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            way_out = "A chat is a list of {role, content}, both of them text"
            raise CorpusError(f"no messages in the field {field!r} in {where}", repr(one)[:80], way_out)
        found.append(Message(role, content))
    return tuple(found)


def python_docs() -> Iterator[Document]:
    """Help topics, and one document per module of the standard library: its docstring and those of its members.

    The docstrings are parsed from the sources, so nothing is imported, and a version of CPython has one text.
    """
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield Document(f"topic/{name}", str(topics.topics[name]))
    yield Document("module/builtins", _builtins())
    library = Path(os.__file__).parent
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library).with_suffix("").as_posix()
        if not _LEFT_OUT.intersection(name.split("/")) and not name.startswith("_"):
            yield Document(f"module/{name}", _docstrings(file))


# Tests, demonstrations, installed packages, and parts that some distributions of Python leave out.
_LEFT_OUT = frozenset(
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "tkinter",
        "turtledemo",
        "ensurepip",
        "venv",
        "distutils",
        "pydoc_data",
    ]
)


def _docstrings(file: Path) -> str:
    """The docstrings of a module, its public functions and classes, and their public methods, in the file's order."""
    module = ast.parse(file.read_bytes())
    parts = [ast.get_docstring(module) or ""]
    for name, node in _public(module, ""):
        if text := ast.get_docstring(node):
            parts.append(f"{name}\n\n{text}")
    return "\n\n".join(part for part in parts if part.strip())


_Defined = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _public(parent: ast.Module | _Defined, prefix: str) -> Iterator[tuple[str, _Defined]]:
    for node in parent.body:
        if isinstance(node, _Defined) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node, f"{prefix}{node.name}.")


def _builtins() -> str:
    """The docstrings of the built-in functions, classes and their public methods, which have no source."""
    parts = []
    for name, member in sorted(vars(builtins).items()):
        if not (inspect.isclass(member) or inspect.isbuiltin(member)):  # what site, IPython or gettext put there
            continue
        methods = sorted(vars(member).items()) if inspect.isclass(member) else []
        for label, item in [(name, member), *((f"{name}.{method}", value) for method, value in methods)]:
            text = getattr(item, "__doc__", None)
            if not label.split(".")[-1].startswith("_") and isinstance(text, str) and text.strip():
                parts.append(f"{label}\n\n{inspect.cleandoc(text)}")
    return "\n\n".join(parts)

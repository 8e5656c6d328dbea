"""Documents with stable ids, from local files, a dataset, or the text that every Python carries."""

import ast
import builtins
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from harvest.config import CorpusConfig
from shared.errors import CorpusError

BUILT_IN = "python-docs"
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text. Its id is the same however often and wherever the corpus is read."""

    id: str
    text: str


def read(config: CorpusConfig) -> Iterator[Document]:
    """The corpus in its own order, without empty documents. Raises CorpusError where it is missing or unreadable."""
    documents = (document for document in _open(config) if document.text.strip())
    yield from islice(documents, config.documents)


def load(config: CorpusConfig) -> tuple[list[Document], str]:
    """All documents and the corpus' fingerprint, sha256 over ids and texts. Raises CorpusError where there are none."""
    documents = list(read(config))
    if not documents:
        raise CorpusError(
            "no text in the corpus", config.path, f"Check the file and the field corpus.text={config.text}"
        )
    digest = hashlib.sha256()
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            raise CorpusError(
                "two documents share an id", document.id, "Set corpus.id to a field that tells them apart"
            )
        seen.add(document.id)
        try:
            digest.update(f"{len(document.id)}:{document.id}{len(document.text)}:{document.text}".encode())
        except UnicodeEncodeError as error:
            way_out = f"Replace the lone surrogates in its text or id ({error.reason})"
            raise CorpusError("no valid Unicode in the corpus", f"document {document.id!r}", way_out) from None
    return documents, digest.hexdigest()


def _open(config: CorpusConfig) -> Iterator[Document]:
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
    return _dataset(path, config)


def _file(path: Path, config: CorpusConfig, label: str) -> Iterator[Document]:
    readers: dict[str, Callable[[Path, CorpusConfig], Iterator[tuple[str | None, str]]]] = {
        ".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet,
    }  # fmt: skip
    if path.suffix not in readers:
        raise CorpusError("unknown kind of corpus", path, f"Known: {BUILT_IN}, {', '.join(SUFFIXES)}, a dataset")
    try:
        for number, (given, text) in enumerate(readers[path.suffix](path, config)):
            yield Document(
                given if given is not None else label if path.suffix == ".txt" else f"{label}:{number}", text
            )
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError("cannot read the corpus", path, f"It must be readable UTF-8 ({_reason(error)})") from None


def _txt(path: Path, config: CorpusConfig) -> Iterator[tuple[str | None, str]]:
    yield None, path.read_text(encoding="utf-8")


def _jsonl(path: Path, config: CorpusConfig) -> Iterator[tuple[str | None, str]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError("not JSON in the corpus", f"{path}, line {number}", str(error)) from None
            yield _fields(record, config, f"{path}, line {number}")


def _parquet(path: Path, config: CorpusConfig) -> Iterator[tuple[str | None, str]]:
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


def _dataset(path: Path, config: CorpusConfig) -> Iterator[Document]:
    import datasets

    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(str(path))
            records = loaded[config.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            records = datasets.load_dataset(config.path, config.name, split=config.split)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        way_out = f"Check corpus.path ({_reason(error)})"
        raise CorpusError("no such corpus here or on the hub", config.path, way_out) from None
    for number, record in enumerate(records):
        given, text = _fields(record, config, config.path)
        yield Document(given if given is not None else f"{config.split}:{number}", text)


def _reason(error: Exception) -> str:
    """The first line of an error's message: libraries write pages."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _is_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def _fields(record: Any, config: CorpusConfig, where: str) -> tuple[str | None, str]:
    """(id, text) of one record. Raises CorpusError, naming the record's fields, where one is missing."""
    for name in [config.text, *([config.id] if config.id else [])]:
        if not isinstance(record, dict) or record.get(name) is None:
            known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise CorpusError(f"no field {name!r} in {where}", known, "Set corpus.text (and corpus.id) to its fields")
    if not isinstance(record[config.text], str):
        kind = type(record[config.text]).__name__
        raise CorpusError(
            f"the field {config.text!r} in {where} is no text", kind, "Set corpus.text to a field of text"
        )
    return (str(record[config.id]) if config.id else None), record[config.text]


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

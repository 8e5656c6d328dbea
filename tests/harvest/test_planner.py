"""Planning may stop anywhere and be done by anyone: the plan is the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harvest import corpus, plan, planner, work
from harvest.config import CorpusConfig
from harvest.corpus import Document
from harvest.draft import Draft, Drafter
from harvest.job import Job, prepare
from harvest.planner import Piece
from shared.errors import CorpusError, StoreMismatchError
from shared.log import Log
from tests.harvest.pair import Tree, config, harvest, tree

QUIET = Log(quiet=True)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "PIECE", 100)


def job(home: Path, path: Path, **tables: Any) -> Job:
    return prepare(config(home, path, **tables), QUIET)


def made(asked: Job) -> Tree:
    return tree(planner.planned(asked, QUIET).path)


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of all documents that are drafted from now on."""
    ids: list[str] = []
    draft = Drafter.draft

    def counted(self: Drafter, document: Document, number: int) -> Draft:
        ids.append(document.id)
        return draft(self, document, number)

    monkeypatch.setattr(Drafter, "draft", counted)
    return ids


def test_a_plan_is_what_the_run_takes_over_and_nothing_is_left(home: Path, tmp_path: Path, drafted: list[str]) -> None:
    asked = config(home, tmp_path / "x.zarr")
    planned = work.look(prepare(asked, QUIET), QUIET)
    assert planned.path.parent == tmp_path / "x.zarr.plan" and planned.header.scale is None
    count = len(drafted)
    assert work.look(prepare(asked, QUIET), QUIET).header.id == planned.header.id
    tables = {name: data for name, data in tree(planned.path).items() if name != "zarr.json"}
    store = harvest(asked)
    assert len(drafted) == count > 0
    assert tables.items() <= tree(store.path).items()
    assert {path.name for path in tmp_path.iterdir()} == {"x.zarr", "x.zarr.log"}


def test_a_store_that_is_there_is_its_own_plan_and_another_is_refused(home: Path, tmp_path: Path) -> None:
    store = harvest(config(home, tmp_path / "x.zarr"))
    assert work.look(job(home, tmp_path / "x.zarr"), QUIET).path == store.path
    with pytest.raises(StoreMismatchError, match=r"rows.count: 300 -> 200"):
        work.look(job(home, tmp_path / "x.zarr", rows={"count": 200}), QUIET)
    assert not planner.folder_of(store.path).exists()


def test_only_as_much_of_the_corpus_is_drafted_as_the_rows_need(
    home: Path, tmp_path: Path, drafted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = len(job(home, tmp_path / "x.zarr").survey.key_d)
    monkeypatch.setattr(planner, "FIRST_GUESS", 0.01)  # far too few characters: more rounds
    few = made(job(home, tmp_path / "few.zarr", rows={"count": 20}))
    assert 0 < len(drafted) < whole
    monkeypatch.setattr(planner, "FIRST_GUESS", 1e6)  # all at once
    drafted.clear()
    assert made(job(home, tmp_path / "all.zarr", rows={"count": 20})) == few
    assert len(drafted) == whole


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_planning_that_stops_goes_on_with_the_documents_that_are_left(
    home: Path, tmp_path: Path, drafted: list[str], monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = made(job(home, tmp_path / "whole.zarr"))
    everything = len(drafted)
    write, written = planner._draft, 0

    def stopping(*arguments: Any) -> planner.Done:
        nonlocal written
        written += 1
        if written > stop:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(planner, "_draft", stopping)
    asked = job(home, tmp_path / "x.zarr")
    with pytest.raises(KeyboardInterrupt):
        planner.planned(asked, QUIET)
    monkeypatch.setattr(planner, "_draft", write)
    done = sum(len(Piece(path)["key"]) for path in (tmp_path / "x.zarr.plan/pieces").iterdir())
    assert done > 0
    drafted.clear()
    assert made(asked) == whole
    assert len(drafted) == everything - done


def test_other_rows_and_sites_use_the_pieces_again_and_another_context_does_not(
    home: Path, tmp_path: Path, drafted: list[str]
) -> None:
    made(job(home, tmp_path / "x.zarr"))
    count = len(drafted)
    fewer = made(job(home, tmp_path / "x.zarr", rows={"count": 100}, batch={"tokens": 50}))
    assert len(drafted) == count
    assert fewer == made(job(home, tmp_path / "y.zarr", rows={"count": 100}, batch={"tokens": 50}))
    drafted.clear()
    other = made(job(home, tmp_path / "x.zarr", rows={"context": 12}))
    assert drafted and other == made(job(home, tmp_path / "z.zarr", rows={"context": 12}))


def test_several_processes_plan_the_same(home: Path, tmp_path: Path) -> None:
    asked = config(home, tmp_path / "x.zarr").model_copy(update={"processes": 2})
    assert made(prepare(asked, QUIET)) == made(job(home, tmp_path / "y.zarr"))


SLOW = """
import sys, time
from pathlib import Path
from harvest import planner, work
from harvest.draft import Drafter
from harvest.job import prepare
from shared.log import Log
from tests.harvest.pair import config
planner.PIECE = 300
draft = Drafter.draft
def slowly(self, document, number):
    time.sleep(0.2)
    return draft(self, document, number)
Drafter.draft = slowly
work.look(prepare(config(Path(sys.argv[1]), Path(sys.argv[2])), Log(quiet=True)), Log(quiet=True))
"""


def test_a_planning_that_is_killed_leaves_whole_pieces_and_another_takes_over(
    home: Path, tmp_path: Path, drafted: list[str]
) -> None:
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(home), str(tmp_path / "x.zarr")])
    pieces = tmp_path / "x.zarr.plan/pieces"
    while len(list(pieces.glob("files-*.npz"))) < 2:
        assert child.poll() is None
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    (pieces / "files-000099.npz.abc.partial").write_bytes(b"half")  # what a writer leaves that is killed
    store = harvest(config(home, tmp_path / "x.zarr"))
    taken = len(drafted)
    other = harvest(config(home, tmp_path / "y.zarr"))
    assert tree(store.path) == tree(other.path) and taken < len(drafted) - taken
    assert {path.name for path in tmp_path.iterdir()} == {"x.zarr", "x.zarr.log", "y.zarr", "y.zarr.log"}


def test_a_corpus_that_changes_while_it_is_planned_is_refused(home: Path, tmp_path: Path) -> None:
    records = [{"id": f"d{number}", "text": "some words of text"} for number in range(9)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    asked = job(home, tmp_path / "x.zarr", corpus={"path": str(path)})
    path.write_text("\n".join(map(json.dumps, records[::-1])))
    large = Job(**{**vars(asked), "survey": type(asked.survey)(**{**vars(asked.survey), "kept": None})})
    with pytest.raises(CorpusError, match=r"the corpus has changed while it was read: d8. Run it again"):
        planner.planned(large, QUIET)


# --- several corpora and streams ------------------------------------------------------------------------------------


def lines(path: Path, word: str, count: int) -> Path:
    path.write_text("\n".join(json.dumps({"text": f"{word} {number} and {word} again"}) for number in range(count)))
    return path


def test_a_mixture_stops_drafting_a_corpus_that_has_given_its_share(
    home: Path, tmp_path: Path, drafted: list[str]
) -> None:
    web, code = lines(tmp_path / "web.jsonl", "quick fox", 200), lines(tmp_path / "code.jsonl", "radius", 200)
    corpora = {"web": {"path": str(web), "weight": 3.0}, "code": {"path": str(code)}}
    asked = config(home, tmp_path / "x.zarr").model_dump()
    asked = {**asked, "corpora": corpora}
    del asked["corpus"]
    store = planner.planned(prepare(type(config(home, tmp_path)).model_validate(asked), QUIET), QUIET)
    names = [name.split("/")[0] for name in store.document_ids()]
    rows = dict.fromkeys(names, 0)
    for name, count in zip(
        names,
        (b - a for a, b in zip(store.column("documents/row"), store.column("documents/row")[1:], strict=False)),
        strict=True,
    ):
        rows[name] += int(count)
    assert store.rows == 300 and abs(rows["web"] - 225) <= 30
    assert len(drafted) < 150


def stream_job(home: Path, folder: Path, path: Path, **rows: Any) -> Job:
    return job(home, path, corpus={"path": str(folder), "stream": True, "id": None}, rows=rows, processes=1)


@pytest.fixture
def web(tmp_path: Path) -> Path:
    folder = tmp_path / "web"
    folder.mkdir()
    for number in range(3):
        lines(folder / f"{number}.jsonl", f"words of file {number}", 40)
    return folder


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of all documents that come over the network."""
    ids: list[str] = []
    stream = corpus.stream

    def counted(text: CorpusConfig, place: Any) -> Iterator[tuple[Document, Any]]:
        for document, behind in stream(text, place):
            ids.append(document.id)
            yield document, behind

    monkeypatch.setattr(corpus, "stream", counted)
    return ids


def test_a_stream_is_read_so_far_as_its_rows_are_wanted(
    home: Path, tmp_path: Path, web: Path, fetched: list[str]
) -> None:
    store = planner.planned(stream_job(home, web, tmp_path / "x.zarr", count=200), QUIET)
    assert store.rows == 200 and 0 < len(fetched) < 60
    taken = sorted(int(name.split(":")[1]) for name in store.document_ids())
    assert taken == list(range(len(taken)))
    fetched.clear()
    more = planner.planned(stream_job(home, web, tmp_path / "x.zarr", count=400), QUIET)
    assert more.rows == 400 and min(int(name.split(":")[1]) for name in fetched) > 0  # it went on
    fewer = planner.planned(stream_job(home, web, tmp_path / "x.zarr", count=200), QUIET)
    assert tree(fewer.path) == made(stream_job(home, web, tmp_path / "y.zarr", count=200))


def test_a_stream_that_ends_gives_all_it_has(home: Path, tmp_path: Path, web: Path, fetched: list[str]) -> None:
    asked = stream_job(home, web, tmp_path / "x.zarr", count=None)
    store = planner.planned(asked, QUIET)
    assert len(fetched) == 120 == store.header.plan["documents"]
    fetched.clear()
    again = planner.planned(stream_job(home, web, tmp_path / "x.zarr", count=10**6), QUIET)
    assert again.rows == store.rows and not fetched
    assert plan.notes(again.header.plan, stream_job(home, web, tmp_path / "x.zarr", count=10**6).config)


@pytest.mark.parametrize("broken", [[7], [31, 60], [3, 4, 5, 90]])
def test_a_connection_that_is_lost_costs_nothing_that_was_drafted(
    home: Path, tmp_path: Path, web: Path, drafted: list[str], monkeypatch: pytest.MonkeyPatch, broken: list[int]
) -> None:
    whole = made(stream_job(home, web, tmp_path / "whole.zarr", count=None))
    stream = corpus.stream
    for stop in broken:

        def breaking(text: CorpusConfig, place: Any, stop: int = stop) -> Iterator[tuple[Document, Any]]:
            for document, behind in stream(text, place):
                if behind["number"] > stop:
                    raise CorpusError("the stream broke off", text.path, "Run it again: it goes on there")
                yield document, behind

        monkeypatch.setattr(corpus, "stream", breaking)
        with pytest.raises(CorpusError, match="the stream broke off"):
            planner.planned(stream_job(home, web, tmp_path / "x.zarr", count=None), QUIET)
    monkeypatch.setattr(corpus, "stream", stream)
    drafted.clear()
    assert made(stream_job(home, web, tmp_path / "x.zarr", count=None)) == whole
    assert len(drafted) == 120 - max(broken)


def test_a_piece_of_a_stream_that_is_missing_is_drafted_again_with_all_behind_it(
    home: Path, tmp_path: Path, web: Path
) -> None:
    asked = stream_job(home, web, tmp_path / "x.zarr", count=None)
    store = planner.planned(asked, QUIET)
    whole = tree(store.path)
    shutil.rmtree(store.path)
    pieces = sorted((store.path.parent / "pieces").iterdir())
    pieces[len(pieces) // 2].unlink()
    assert made(asked) == whole


def test_a_piece_on_disk_is_a_mapping_of_its_columns(home: Path, tmp_path: Path) -> None:
    planner.planned(job(home, tmp_path / "x.zarr"), QUIET)
    one = Piece(min((tmp_path / "x.zarr.plan/pieces").iterdir()))
    assert set(one) >= {"key", "rows", "rows_G", "llama/id_T", "place"} and len(one) == len(set(one))

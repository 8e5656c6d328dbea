"""The effect of planning: corpora -> pieces on disk, by several processes -> a store with its plan, beside its place.

A piece holds some documents as drafts; it is whole or absent, so a planning that is killed goes on with the next one.
"""

import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from harvest import corpus, plan
from harvest.config import CorpusConfig, HarvestConfig
from harvest.corpus import Document
from harvest.draft import Drafter, drafter, key_of, piece
from harvest.job import Job
from harvest.survey import placed
from shared import config as configs
from shared import files, models
from shared.errors import CorpusError
from shared.header import Header
from shared.layout import GROUP
from shared.log import Log, bar
from shared.store import Store

PIECE = 2**20  # characters of a piece: some seconds of work
ALONE = 2**25  # characters up to which one process drafts them sooner than others have started
FIRST_GUESS = 5.0  # characters of a row, until some are drafted
MARGIN = 1.05
AHEAD = 16  # pieces under way at most

Numbered = tuple[int, Document]


def folder_of(store: Path) -> Path:
    """Where the plan of a store is made: beside it, so that it needs but a new name."""
    return store.with_name(f"{store.name}.plan")


def planned(job: Job, log: Log) -> Store:
    """The store of this job with its plan, in folder_of(its path): as an earlier call has left it, or made now."""
    folder, mark = folder_of(job.path), _mark(job)
    if not (folder / "mark").exists() or files.read_json(folder / "mark") != mark:
        shutil.rmtree(folder, ignore_errors=True)
        files.write_json(folder / "mark", mark)
    files.sweep(folder)
    made = folder / job.path.name
    if (made / GROUP).exists():
        if Header.read(made).id == configs.fingerprint(job.spec):
            return Store.at(made)
        shutil.rmtree(made)
    if job.sibling is not None and job.sibling.kind == "sources":
        return job.sibling.share(made, job.header(job.sibling.plan))
    pieces = [piece([], list(job.models), 0), *map(Piece, _drafted(job, folder, log))]  # never none at all
    sources = list(job.sources.values())
    with _rooms(folder / "tables") as room:
        built = plan.build(pieces, list(job.models), sources, job.config, job.align, room)
        return Store.create(made, job.header(built.summary), built.tables)


def place(store: Store, path: Path) -> Store:
    """Bring a planned store to its place."""
    store.path.rename(path)
    files.sync_folder(path.parent)
    sweep(path)
    return Store.at(path)


def sweep(path: Path) -> None:
    """Remove what planning the store at `path` has left."""
    shutil.rmtree(folder_of(path), ignore_errors=True)


def _mark(job: Job) -> dict[str, Any]:
    """What decides the drafts of documents: with another number of rows or other sites, the pieces serve again."""
    rows = {key: value for key, value in job.spec["rows"].items() if key != "count"}
    readers = {name: [one.tokenizer, job.config.models[name].replace] for name, one in job.models.items()}
    same: dict[str, Any] = {key: job.spec[key] for key in ("corpus", "chats", "extends") if key in job.spec}
    return {"readers": readers, "rows": rows, **same}


@contextmanager
def _rooms(folder: Path) -> Iterator[plan.Room]:
    """Tables on disk while they are filled, however long they are."""
    folder.mkdir(exist_ok=True)

    def room(table: str, length: int, dtype: str) -> np.ndarray:
        if not length:
            return np.empty(0, dtype)
        return np.lib.format.open_memmap(folder / f"{table.replace('/', '.')}.npy", "w+", np.dtype(dtype), (length,))

    try:
        yield room
    finally:
        shutil.rmtree(folder)


# --- which documents are drafted -------------------------------------------------------------------------------------


def _drafted(job: Job, folder: Path, log: Log) -> list[Path]:
    """Draft as many documents as the plan may need, but those that lie in `folder`. Returns all pieces."""
    pieces = folder / "pieces"
    pieces.mkdir(exist_ok=True)
    if there := len(list(pieces.iterdir())):
        log.event("plan", f"planning goes on behind {there} pieces")
    for part, (text, rows) in enumerate(zip(job.config.texts.values(), plan.wanted(job.config), strict=True)):
        if text.stream:
            _draft_stream(job, part, rows, pieces, log)
    _draft_files(job, pieces, log)
    return sorted(pieces.iterdir())


def _draft_files(job: Job, pieces: Path, log: Log) -> None:
    """In the order of keys, as many characters of each corpus as give its rows: more, as long as they do not."""
    survey, rows = job.survey, plan.wanted(job.config)
    tried = [math.inf if count is None else FIRST_GUESS * count for count in rows]
    short: Sequence[int] = range(len(rows))
    while short:
        chosen_d = survey.first(tried)
        left_d = chosen_d & ~np.isin(survey.key_d, _columns(pieces, "key")["key"])
        total = int(survey.characters_d[left_d].sum())
        documents = _read_again(job, left_d)
        start = len(list(pieces.glob("files-*")))
        named = ((pieces / f"files-{number:06d}.npz", group) for number, group in enumerate(_grouped(documents), start))
        with _drafting(job, total) as submit, bar("planning", "characters", total, quiet=log.quiet) as progress:
            for done in _ahead((submit(path, group, None) for path, group in named), AHEAD):
                progress.update(done.characters)
        drafted = _columns(pieces, "key", "rows")
        missing_d = chosen_d & ~np.isin(survey.key_d, drafted["key"])  # another process may have written over a piece
        short = [int(part) for part in np.unique(survey.part_d[missing_d])]
        for part, count in enumerate(rows):
            mine_d = survey.part_d == part
            given = int(drafted["rows"][np.isin(drafted["key"], survey.key_d[mine_d & chosen_d])].sum())
            if count is not None and given < count and (mine_d & survey.open_d & ~chosen_d).any():
                tried[part] = MARGIN * max(tried[part] * count / max(given, 1), tried[part] + PIECE)
                short.append(part)


def _columns(pieces: Path, *names: str) -> dict[str, np.ndarray]:
    """Columns of all pieces that are there, one behind the other."""
    there: list[Mapping[str, np.ndarray]] = [piece([], [], 0), *map(Piece, sorted(pieces.iterdir()))]
    return {name: np.concatenate([one[name] for one in there]) for name in names}


def _read_again(job: Job, wanted_d: np.ndarray) -> Iterator[Numbered]:
    """These documents. Raises CorpusError where they are not those of the survey."""
    if not wanted_d.any():
        return
    seed, keys = job.config.rows.seed, job.survey.key_d.tolist()
    for number, document in enumerate(job.survey.documents()):
        if number < len(keys) and wanted_d[number]:
            if key_of(document.id, seed) != keys[number]:
                raise CorpusError("the corpus has changed while it was read", document.id, "Run it again")
            yield number, document


def _draft_stream(job: Job, part: int, rows: int | None, pieces: Path, log: Log) -> None:
    """In the order in which the stream comes, until it has given its rows, from where an earlier call has stopped."""
    text = list(job.config.texts.values())[part]
    names = (pieces / f"stream{part}-{number:06d}.npz" for number in itertools.count())
    whole = list(itertools.takewhile(Path.exists, names))
    for path in set(pieces.glob(f"stream{part}-*")).difference(whole):  # drafted behind one that is missing
        path.unlink()
    given, place = sum(int(Piece(path)["rows"].sum()) for path in whole), _place(whole)
    if (place is not None and place["over"]) or (rows is not None and given >= rows):
        return
    groups = _stream_groups(job, part, text, place)
    names = (pieces / f"stream{part}-{number:06d}.npz" for number in itertools.count(len(whole)))
    characters = math.inf if rows is None else FIRST_GUESS * (rows - given)
    with _drafting(job, characters) as submit, bar("planning", "rows", rows or 0, quiet=log.quiet) as progress:
        progress.update(given)
        futures = (submit(path, group, place) for path, (group, place) in zip(names, groups, strict=False))
        for done in _ahead(futures, AHEAD, math.inf if rows is None else rows - given):
            progress.update(done.rows)


def _place(pieces: Sequence[Path]) -> dict[str, Any] | None:
    """Where the stream goes on behind these pieces."""
    if not pieces:
        return None
    found: dict[str, Any] = json.loads(str(Piece(pieces[-1])["place"]))
    return found


def _stream_groups(job: Job, part: int, text: CorpusConfig, start: Any) -> Iterator[tuple[list[Numbered], Any]]:
    """Documents for one piece, and the place behind them. What came before a stream broke off is not lost."""
    group: list[Numbered] = []
    names, size, place = list(job.config.texts), 0, start
    seed, left_out = job.config.rows.seed, set(job.survey.left_out.tolist())
    try:
        for document, place in corpus.stream(text, start):
            if text.documents is not None and place["number"] > text.documents:
                break
            one = placed(document, part, names)
            if not one.empty and key_of(one.id, seed) not in left_out:
                group.append((place["number"] - 1, one))
                size += one.characters
            if size >= PIECE:
                yield group, {**place, "over": False}
                group, size = [], 0
        yield group, {"over": True}
    except CorpusError:
        if group:
            yield group, {**place, "over": False}
        raise


# --- pieces ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece(Mapping[str, np.ndarray]):
    """A piece on disk: columns are read as they are asked for, and no file stays open."""

    path: Path

    def __getitem__(self, name: str) -> np.ndarray:
        with np.load(self.path) as columns:
            values: np.ndarray = columns[name]
            return values

    def __iter__(self) -> Iterator[str]:
        with np.load(self.path) as columns:
            return iter(list(columns))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Done:
    """What was drafted into one piece."""

    rows: int
    characters: int


Submit = Callable[[Path, Sequence[Numbered], Any], "Future[Done]"]


def _grouped(documents: Iterable[Numbered]) -> Iterator[list[Numbered]]:
    """Documents for one piece each."""
    group: list[Numbered] = []
    size = 0
    for number, document in documents:
        group.append((number, document))
        size += document.characters
        if size >= PIECE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _ahead(futures: Iterable["Future[Done]"], count: int, rows: float = math.inf) -> Iterator[Done]:
    """The results in their order, with `count` under way at most, until there are so many rows."""
    flying: deque[Future[Done]] = deque()
    try:
        for future in futures:
            flying.append(future)
            while flying and (len(flying) > count or flying[0].done()):
                done = flying.popleft().result()
                rows -= done.rows
                yield done
            if rows <= 0:
                break
    except CorpusError:  # a stream broke off: what has come is drafted
        wait(flying)
        raise
    while flying:
        yield flying.popleft().result()


@contextmanager
def _drafting(job: Job, characters: float) -> Iterator[Submit]:
    """How pieces are drafted: here, or by several processes where that is worth their start."""
    count = job.config.processes or (os.cpu_count() or 1 if characters > ALONE else 1)
    if count == 1:

        def here(path: Path, group: Sequence[Numbered], place: Any) -> "Future[Done]":
            future: Future[Done] = Future()
            future.set_result(_draft(job.drafter, path, group, place))
            return future

        yield here
        return
    recipe = (job.config, job.checkpoints, job.align)
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin, recipe)
    try:
        yield lambda path, group, place: pool.submit(_draft_there, path, group, place)
    finally:
        pool.shutdown(cancel_futures=True)


def _draft(drafter: Drafter, path: Path, group: Sequence[Numbered], place: Any) -> Done:
    """Write one piece, whole."""
    columns = piece(
        [drafter.draft(document, number) for number, document in group], list(drafter.spellers), drafter.rows.seed
    )
    buffer, whole = BytesIO(), {**columns, "place": np.array(json.dumps(place))}
    np.savez(buffer, **whole)  # type: ignore[arg-type]
    files.write_atomic(path, [buffer.getbuffer()])
    return Done(int(columns["rows"].sum()), sum(document.characters for _, document in group))


_drafter: Drafter | None = None  # of a process that drafts


def _begin(config: HarvestConfig, checkpoints: Mapping[str, models.Checkpoint], align: str) -> None:
    global _drafter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tokenizers = {name: models.load_tokenizer(checkpoint) for name, checkpoint in checkpoints.items()}
    _drafter = drafter(config, tokenizers, align)


def _end_with_parent() -> None:
    """Else a process whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _draft_there(path: Path, group: Sequence[Numbered], place: Any) -> Done:
    assert _drafter is not None
    return _draft(_drafter, path, group, place)

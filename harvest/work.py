"""The effect: plan -> store. One unit is one shard of one model, safe to make twice, by whoever makes it."""

import os
import platform
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harvest import destination, extend, lock, plan, planner
from harvest.bench import Bench
from harvest.job import Job
from harvest.worker import Scale, Worker
from shared import files
from shared.device import torch_threads
from shared.errors import StoreDamagedError, StoreError
from shared.header import Header
from shared.layout import GROUP, Unit
from shared.log import Log, bar
from shared.store import Store

Receipt = Mapping[str, Any]
Tick = Callable[[int], object]


class Crew(ABC):
    """Who makes units: this process, or the workers of a cluster."""

    @property
    @abstractmethod
    def ahead(self) -> int:
        """Units that may be made before the receipts of those before them are taken."""

    @abstractmethod
    def scale(self, store: Store) -> Scale:
        """The scale of every source, from a calibration on some of the plan's batches."""

    @abstractmethod
    def make(self, store: Store, units: Sequence[Unit], tick: Tick) -> Iterator[Receipt]:
        """Make and put these units. `tick` is called with rows made."""


@dataclass(frozen=True)
class Part:
    """Every n-th unit, for job arrays without a scheduler: part i of n, from 1."""

    number: int
    of: int

    @property
    def slot(self) -> str:
        return f"{self.number}-of-{self.of}"

    def units(self, store: Store) -> set[Unit]:
        return set(store.units[self.number - 1 :: self.of])


def run(job: Job, crew: Crew, log: Log, part: Part | None = None) -> Store:
    """Make every unit that is missing (of a part: its own), and seal the store where none is missing any more.

    Raises LockError where another harvest is at it.
    """
    with destination.of(job.config.store) as to:
        if to.is_finished(job.spec):
            lock.sweep(job.path, _told(log))
            store = to.finished(job.spec, log)  # raises where it is damaged
            log.event("done", f"{to.name} is already finished: nothing to do")
            return store
        with lock.hold(job.path, _told(log), part.slot if part else lock.WHOLE):
            with _beginning(job.path, log, part):
                to.begin(job.spec, _share(part), log)
                store = _begun(open_store(job, log, crew.ahead, to), crew, log, to, part)
                if part and store.condemned[0]:
                    raise StoreDamagedError("parts cannot mend a store", to.name, f"First: harvest repair {to.name}")
            return finish(store, crew, log, to, part)


def repair(
    store: Store, units: Sequence[Unit], crew: Crew, log: Log, to: destination.Destination | None = None
) -> Store:
    """Make these units again, and those that a check has condemned. The store is unfinished meanwhile.

    `to` is where the store is; none: in its folder.
    """
    with to or destination.Folder(store.path) as to, lock.hold(to.path, _told(log)):
        files.sweep(to.path)
        return finish(_begun(to.reopen(store, units, log), crew, log, to), crew, log, to)


def mend_plan(store: Store, job: Job, log: Log) -> list[str]:
    """Plan again what the store was made from, and write those files of its plan that differ. Returns their names.

    Raises StoreMismatchError where `job` is another harvest. (zarr.json of the store must be readable.)
    """
    store.header.require_same(job.spec, store.path)
    with lock.hold(store.path, _told(log)):
        made = planner.planned(job, log)
        if store.header.scale is not None:  # as the store says of itself: it may be packed, or its models have moved
            header = replace(store.header, plan=made.header.plan, scale=None)
            made = Store(made.path, header).freeze(store.header.scale)
        right = {file.relative_to(made.path): file.read_bytes() for file in made.path.rglob("*") if file.is_file()}
        wrong = [name for name, data in right.items() if not _holds(store.path / name, data)]
        for name in wrong:
            files.write_atomic(store.path / name, right[name])
        planner.sweep(store.path)
    return sorted(map(str, wrong))


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def finish(store: Store, crew: Crew, log: Log, to: destination.Destination, part: Part | None = None) -> Store:
    """Make the units that are missing. What a check has condemned is made again."""
    if units := store.condemned[1]:
        store.reopen(units)
    share = _share(part)(store)
    todo = [unit for unit in store.missing() if unit in share]
    total = sum(len(store.rows_of(shard)) for shard, _ in todo)
    with bar("harvest", "rows", total, quiet=log.quiet) as progress:
        for receipt in crew.make(store, todo, progress.update):
            to.made((receipt["shard"], receipt["model"]))
            _report(receipt, log)
    with _beginning(store.path, log, part):
        to.seal(store)
    if store.sealed:
        log.event("done", f"finished {to.name}")
    return store


def _share(part: Part | None) -> destination.Share:
    return part.units if part else lambda store: set(store.units)


@contextmanager
def _beginning(path: Path, log: Log, part: Part | None) -> Iterator[None]:
    """Alone at the plan, the scale and the seal: parts do these one after another, and the first one for all."""
    if part is None:
        files.sweep(path)
        yield
        return
    with lock.wait(path, _told(log)):
        if len(lock.holders(path)) == 2:  # this part, twice: nobody else is writing
            files.sweep(path)
        yield


def _told(log: Log) -> Callable[[str], None]:
    return lambda text: log.event("lock", text)


def _begun(store: Store, crew: Crew, log: Log, to: destination.Destination, part: Part | None = None) -> Store:
    """The store with its scale. The log goes on beside it, as NAME.zarr.log."""
    log.attach(store.path.with_name(f"{store.path.name}.log"))
    log.event("start", host=platform.node(), process=os.getpid(), arguments=sys.argv[1:])
    to.planned(store, log)
    if store.header.scale is None:
        scale = extend.scale(store, crew.scale(store))
        factors = ", ".join(f"{name} {values['factor']:g}" for name, values in scale.items())
        log.event("scale", f"scale factors: {factors}", scale=scale)
        store = store.freeze(scale)
    return to.frozen(store, _share(part), log)


def is_finished(job: Job) -> bool:
    """Raises StoreMismatchError where another store is there."""
    with destination.of(job.config.store) as to:
        return to.is_finished(job.spec)


def look(job: Job, log: Log) -> Store:
    """The store of this job as it stands, or its plan, which `run` will take over. No model is run."""
    is_finished(job)  # refuses another store
    if (job.path / GROUP).exists():
        return Store.resume(job.path, _header(job))
    with lock.hold(job.path, _told(log)):
        return planner.planned(job, log)


def _header(job: Job) -> Header:
    return job.header({})


def open_store(job: Job, log: Log, ahead: int, to: destination.Destination) -> Store:
    """The store of this job: as it stands, or newly planned. The disk is checked before anything is written."""
    if job.path.exists():
        if not (job.path / GROUP).exists():
            raise StoreError("this path is in use and is no store", job.path, "Give another path (store.path)")
        store = Store.resume(job.path, _header(job))
        planner.sweep(job.path)
        missing = Counter(model for _, model in store.missing())
        files.require_space(job.path, _at_once(job, store, missing, to, ahead), to.room)
        return store
    made = planner.planned(job, log)
    units = Counter(dict.fromkeys(job.models, made.shards))
    files.require_space(job.path, _at_once(job, made, units, to, ahead), to.room)
    needed = sum(plan.stored_bytes(made.header.plan, list(job.sources.values())).values())
    log.event("plan", f"planned {made.rows:,} rows, {needed / 1e6:,.0f} MB", **made.header.plan)
    for note in plan.notes(made.header.plan, job.config):
        log.event("plan", note)
    return planner.place(made, job.path)


def _at_once(job: Job, store: Store, units: Counter[str], to: destination.Destination, ahead: int) -> int:
    """Bytes of the largest of `units` {model: how many} that lie in the folder at once."""
    sizes = plan.stored_bytes(store.header.plan, list(job.sources.values()))
    of = {model: sum(sizes[one.name] for one in store.sources_of(model)) / store.shards for model in job.models}
    largest = sorted((of[name] for name in units.elements()), reverse=True)
    return int(sum(largest[: to.at_once(len(largest), ahead)]))


def _report(receipt: Receipt, log: Log) -> None:
    unit = {key: receipt[key] for key in ("shard", "model", "faults", "threads", "device")}
    bad = {source: counts for source, counts in receipt["faults"].items() if counts["clipped"] or counts["masked"]}
    log.event("unit", f"shard {receipt['shard']}: clipped or masked rows: {bad}" if bad else "", **unit)


class OneProcess(Crew):
    """Units are made in this process; a second thread puts the last one on disk meanwhile."""

    ahead = 1

    def __init__(self, bench: Bench, log: Log) -> None:
        self._bench, self._log = bench, log
        self._worker: Worker | None = None

    def scale(self, store: Store) -> Scale:
        with torch_threads(self._bench.threads):
            return self._at(store).scale()

    def make(self, store: Store, units: Sequence[Unit], tick: Tick) -> Iterator[Receipt]:
        waiting: Future[dict[str, Any]] | None = None
        with torch_threads(self._bench.threads), self._at(store) as worker, ThreadPoolExecutor(1, "put") as writer:
            for shard, model in sorted(units, key=lambda unit: unit[1] != worker.holds):  # what is in memory first
                parts = worker.make((shard, model), tick)
                if waiting is not None:
                    yield waiting.result()
                waiting = writer.submit(store.put, shard, model, parts, worker.made_with)
            if waiting is not None:
                yield waiting.result()

    def _at(self, store: Store) -> Worker:
        """The worker, with the model that the calibration has left in memory."""
        if self._worker is None:
            self._worker = Worker(store, self._bench, self._log)
        self._worker.store = store
        return self._worker

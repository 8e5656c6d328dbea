"""The effect: plan -> store. One unit is one shard of one model, safe to make twice."""

import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harvest import lock, plan
from harvest.bench import Bench
from harvest.cast import calibrated, cast, difference
from harvest.forward import Batches, reshaped, rows
from harvest.job import Job
from harvest.unit import UnitMaker
from shared import files, hooks, models
from shared.device import device_of, torch_threads
from shared.errors import StoreError
from shared.layout import GROUP, Unit
from shared.log import Log, bar
from shared.store import Header, Part, Store

Scale = dict[str, dict[str, float]]  # {source: attributes.granary.scale}


def run(job: Job, log: Log) -> Store:
    """Make every unit that is missing, and seal the store. Raises LockError where another harvest is at it."""
    if _is_finished(job):
        log.event("done", f"{job.path} is already finished: nothing to do")
        return Store.open(job.path)
    with _alone(job.path, log):
        return finish(open_store(job, log), Bench(job.checkpoints, job.config.device, job.config.threads), log)


@contextmanager
def _alone(path: Path, log: Log) -> Iterator[None]:
    """Nobody else is at the store, and what killed writers left there is swept."""
    with lock.hold(path, lambda text: log.event("lock", text)):
        files.sweep(path)
        yield


def _is_finished(job: Job) -> bool:
    return (job.path / GROUP).exists() and _stored(job).sealed


def _stored(job: Job) -> Store:
    """The store that is at the job's path. Raises StoreMismatchError where it is another."""
    return Store.resume(job.path, Header(job.spec, job.models, job.sources, {}))


def open_store(job: Job, log: Log) -> Store:
    """The store of this job: as it stands, or newly planned. The disk is checked before anything is written."""
    if job.path.exists():
        if not (job.path / GROUP).exists():
            raise StoreError("this path is in use and is no store", job.path, "Give another path (store.path)")
        store = _stored(job)
        whole = sum(plan.stored_bytes(store.header.plan, {}, list(job.sources.values())).values())
        files.require_space(job.path, whole * len(store.missing()) // len(store.units))
        return store
    made = job.make_plan(log)
    sizes = plan.stored_bytes(made.summary, made.tables, list(job.sources.values()))
    files.require_space(job.path, sum(sizes.values()))
    log.event("plan", f"planned {made.summary['rows']:,} rows, {sum(sizes.values()) / 1e6:,.0f} MB", **made.summary)
    for note in plan.notes(made.summary, job.config):
        log.event("plan", note)
    return Store.create(job.path, job.header(made), made.tables)


def repair(store: Store, units: Sequence[Unit], bench: Bench, log: Log) -> Store:
    """Make these units again, and those that a check has condemned. The store is unfinished meanwhile."""
    with _alone(store.path, log):
        store.reopen(units)
        return finish(store, bench, log)


def finish(store: Store, bench: Bench, log: Log) -> Store:
    """Fix the scale, make the units that are missing, seal. What a check has condemned is made again.

    The log goes on beside the store, as NAME.zarr.log.
    """
    log.attach(store.path.with_name(f"{store.path.name}.log"))
    log.event("start", host=platform.node(), process=os.getpid(), arguments=sys.argv[1:])
    if units := store.condemned[1]:
        store.reopen(units)
    with torch_threads(bench.threads), Worker(store, bench, log) as worker:
        if store.header.scale is None:
            store = worker.fix_scale()
        for name in sorted(store.header.models, key=lambda name: name != worker.holds):  # the one in memory first
            shards = [shard for shard, model in store.missing() if model == name]
            if shards:
                _put_all(worker, name, shards, log)
    store.seal()
    log.event("done", f"finished {store.path}")
    return store


def _put_all(worker: "Worker", name: str, shards: Sequence[int], log: Log) -> None:
    """Forward passes in this thread; a second one puts the last shard on disk meanwhile."""
    store = worker.store
    waiting: Future[dict[str, Any]] | None = None
    with (
        ThreadPoolExecutor(1, "put") as writer,
        bar(name, "rows", sum(len(store.rows_of(shard)) for shard in shards), quiet=log.quiet) as progress,
    ):
        for shard in shards:
            parts = worker.make((shard, name), progress.update)
            if waiting is not None:
                _report(waiting.result(), log)
            waiting = writer.submit(store.put, shard, name, parts, worker.made_with)
        if waiting is not None:
            _report(waiting.result(), log)


def _report(receipt: Mapping[str, Any], log: Log) -> None:
    unit = {key: receipt[key] for key in ("shard", "model", "faults", "threads", "device")}
    bad = {source: counts for source, counts in receipt["faults"].items() if counts["clipped"] or counts["masked"]}
    log.event("unit", f"shard {receipt['shard']}: clipped or masked rows: {bad}" if bad else "", **unit)


class Worker:
    """One process that makes units of a store, with one model in memory at a time."""

    def __init__(self, store: Store, bench: Bench, log: Log) -> None:
        self.store, self._bench, self._log = store, bench, log
        self._device = str(device_of(bench.device))
        self.holds: str | None = None
        self._model: nn.Module | None = None
        self._maker: UnitMaker | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()

    @property
    def made_with(self) -> dict[str, Any]:
        """What decides the bytes of a unit beside the plan, for its receipt."""
        versions = {"torch": str(torch.__version__), "transformers": models.version(), "numpy": str(np.__version__)}
        return {"device": torch.device(self._device).type, "threads": torch.get_num_threads(), "versions": versions}

    def make(self, unit: Unit, tick: Any) -> dict[str, Part]:
        """The parts of one unit. `tick` is called with rows made."""
        return self.maker(unit[1]).make(unit[0], tick)

    def maker(self, name: str) -> UnitMaker:
        if self._maker is None or self._maker.name != name:
            self._hooks.close()
            model = self._load(name)
            captured = self._hooks.enter_context(self._capturing(model))
            tokenizer = models.load_tokenizer(self._bench.checkpoints[name])
            self._maker = UnitMaker(self.store, name, captured, tokenizer, self._device)
        return self._maker

    def fix_scale(self) -> Store:
        """Calibrate every source on some of the plan's batches, and write the scale into the store."""
        scale: Scale = {}
        for name in self.store.header.models:
            scale |= self._calibrate(name)
        factors = ", ".join(f"{name} {values['factor']:g}" for name, values in scale.items())
        self._log.event("scale", f"scale factors: {factors}", scale=scale)
        self.store = self.store.freeze(scale)
        return self.store

    def _calibrate(self, name: str) -> Scale:
        """Check the hooks against the model's own hidden states, and choose the scale of each of its sources."""
        batches = list(Batches(self.store, name).spread(self.store.header.spec["batch"]["calibration"]))
        sites = {source.site: source.name for source in self.store.sources_of(name)}
        model, device, first = self._load(name), self._device, batches[-1]  # the shortest segments
        hooks.self_check(model, list(sites), first.ids_BT[:2].to(device), first.mask_BT[:2].to(device))
        norms: dict[str, list[Tensor]] = {source: [] for source in sites.values()}
        largest = dict.fromkeys(sites.values(), 0.0)
        with (
            self._capturing(model) as captured,
            bar(f"{name}: scale", "batches", len(batches), quiet=self._log.quiet) as progress,
        ):
            for batch in batches:
                for source, x_ND in rows(captured, batch, sites, device).items():
                    one = cast(x_ND, 1.0, math.inf)
                    norms[source].append(one.norms_N.cpu())
                    largest[source] = max(largest[source], float(one.x_ND.abs().max()))
                progress.update()
            once, again = (rows(captured, one, sites, device) for one in (first, reshaped(first)))
        rounding = {
            name: float(difference(once[name][: len(x_ND)].float(), x_ND.float()).nan_to_num(0.0).max())
            for name, x_ND in again.items()
        }
        return {source: calibrated(norms[source], largest[source], rounding[source]) for source in norms}

    def _load(self, name: str) -> nn.Module:
        if self._model is None or self.holds != name:
            self._model = self._maker = None  # let the last one go before the next is read
            model = self.store.header.models[name]
            self._log.event("load", f"loading {name} ({model.dtype}, {model.attention} attention, {self._device})")
            self._model = models.load(self._bench.checkpoints[name], model.dtype, model.attention, self._device)
            self.holds = name
        return self._model

    @contextmanager
    def _capturing(self, model: nn.Module) -> Iterator[hooks.Run]:
        assert self.holds is not None
        sites = [hooks.find(model, source.site) for source in self.store.sources_of(self.holds)]
        with torch.inference_mode(), hooks.capture(model, sites) as captured:
            yield captured

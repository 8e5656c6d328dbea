"""The thin effect: plan -> store. One unit is one shard of one model, safe to make twice.

Letters: N rows of a shard, D width.
"""

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harvest import plan
from harvest.cast import calibrated, cast
from harvest.forward import Batch, Batches, rows
from harvest.job import Job
from shared import files, hooks, models
from shared.device import device_of, torch_threads
from shared.errors import ActivationError, StoreError
from shared.log import Log, bar
from shared.moments import CLASSES, Moments, class_of
from shared.store import FIRST, HELD_OUT, MASKED, SINK, SPECIAL, Header, Part, Store


def open_store(job: Job, log: Log) -> Store:
    """The store of this job: as it stands, or newly planned. The disk is checked before anything is written."""
    if job.path.exists():
        if not (job.path / "zarr.json").exists():
            raise StoreError("this path is in use and is no store", job.path, "Give another path (store.path)")
        store = Store.resume(job.path, Header(job.spec, job.models, job.sources, {}))
        if not store.sealed:
            whole = sum(plan.stored_bytes(store.header.plan, {}, list(job.sources.values())).values())
            files.require_space(job.path, whole * len(store.missing()) // (store.shards * len(job.models)))
        return store
    made = job.make_plan(log)
    sizes = plan.stored_bytes(made.summary, made.tables, list(job.sources.values()))
    files.require_space(job.path, sum(sizes.values()))
    log.event("plan", f"planned {made.summary['rows']:,} rows, {sum(sizes.values()) / 1e6:,.0f} MB", **made.summary)
    for note in plan.notes(made.summary, job.config):
        log.event("plan", note)
    return Store.create(job.path, job.header(made), made.tables)


def run(job: Job, log: Log) -> Store:
    """Make every unit that is missing, and seal the store."""
    store = open_store(job, log)
    if store.sealed:
        log.event("done", f"{store.path} is already finished: nothing to do")
        return store
    files.sweep(store.path)
    with torch_threads(job.config.threads):
        store = _finish(job, store, log)
    log.event("done", f"finished {store.path}")
    return store


def _finish(job: Job, store: Store, log: Log) -> Store:
    device = str(device_of(job.config.device))
    loaded = Loaded(job, device, log)
    if store.header.scale is None:
        scale: dict[str, dict[str, float]] = {}
        for name in store.header.models:
            scale |= calibrate(job, store, name, loaded.model(name), device, log)
        store = store.freeze(scale)
        factors = ", ".join(f"{name} {values['factor']:g}" for name, values in scale.items())
        log.event("scale", f"scale factors: {factors}", scale=scale)
    todo = {name: [shard for shard, model in store.missing() if model == name] for name in store.header.models}
    for name in sorted(todo, key=lambda name: name != loaded.name):  # the one in memory first
        if todo[name]:
            _make_units(job, store, name, loaded.model(name), device, todo[name], log)
    store.seal()
    return store


class Loaded:
    """One model in memory at a time."""

    def __init__(self, job: Job, device: str, log: Log) -> None:
        self._job, self._device, self._log = job, device, log
        self.name: str | None = None
        self._model: nn.Module | None = None

    def model(self, name: str) -> nn.Module:
        if self._model is None or name != self.name:
            self._model = None  # before the next one is read
            model = self._job.models[name]
            self._log.event("load", f"loading {name} ({model.dtype}, {model.attention} attention, {self._device})")
            self._model = models.load(self._job.checkpoints[name], model.dtype, model.attention, self._device)
            self.name = name
        return self._model


def _sites(store: Store, model: str) -> dict[str, str]:
    """{site: source} of one model."""
    return {source.site: name for name, source in store.header.sources.items() if source.model == model}


@contextmanager
def capturing(store: Store, name: str, model: nn.Module) -> Iterator[hooks.Run]:
    sites = [hooks.find(model, site) for site in _sites(store, name)]
    with torch.inference_mode(), hooks.capture(model, sites) as captured:
        yield captured


def calibrate(
    job: Job, store: Store, name: str, model: nn.Module, device: str, log: Log
) -> dict[str, dict[str, float]]:
    """Check the hooks against the model's own hidden states, and choose the scale of each of its sources."""
    batches = list(Batches(store, name).spread(job.config.batch.calibration))
    sites = _sites(store, name)
    first = batches[-1]  # the shortest segments
    hooks.self_check(model, list(sites), first.ids_BT[:2].to(device), first.mask_BT[:2].to(device))
    norms: dict[str, list[Tensor]] = {source: [] for source in sites.values()}
    largest = dict.fromkeys(sites.values(), 0.0)
    with (
        capturing(store, name, model) as captured,
        bar(f"{name}: scale", "batches", len(batches), quiet=log.quiet) as progress,
    ):
        for batch in batches:
            for source, x_ND in rows(captured, batch, sites, device).items():
                one = cast(x_ND, 1.0, math.inf)
                norms[source].append(one.norms_N.cpu())
                largest[source] = max(largest[source], float(one.x_ND.abs().max()))
            progress.update()
    return {source: calibrated(norms[source], largest[source]) for source in norms}


def _make_units(job: Job, store: Store, name: str, model: nn.Module, device: str, shards: list[int], log: Log) -> None:
    """Forward passes in this thread; a second one puts the last shard on disk meanwhile."""
    total = sum(len(store.rows_of(shard)) for shard in shards)
    made_with = {
        "device": torch.device(device).type,
        "threads": torch.get_num_threads(),
        "versions": {"torch": str(torch.__version__), "transformers": models.version(), "numpy": str(np.__version__)},
    }
    waiting: Future[dict[str, Any]] | None = None
    with (
        ThreadPoolExecutor(1, "put") as writer,
        capturing(store, name, model) as captured,
        bar(name, "rows", total, quiet=log.quiet) as progress,
    ):
        maker = UnitMaker(job, store, name, captured, device)
        for shard in shards:
            parts = maker.make(shard, progress.update)
            if waiting is not None:
                _report(waiting.result(), log)
            waiting = writer.submit(store.put, shard, name, parts, made_with)
        if waiting is not None:
            _report(waiting.result(), log)


def _report(receipt: Mapping[str, Any], log: Log) -> None:
    unit = {key: receipt[key] for key in ("shard", "model", "faults", "threads", "device")}
    bad = {source: counts for source, counts in receipt["faults"].items() if counts["clipped"] or counts["masked"]}
    log.event("unit", f"shard {receipt['shard']}: clipped or masked rows: {bad}" if bad else "", **unit)


class UnitMaker:
    """Runs the batches of one model and collects its rows, shard by shard."""

    def __init__(self, job: Job, store: Store, name: str, captured: hooks.Run, device: str) -> None:
        self.job, self.store, self.name, self.captured, self.device = job, store, name, captured, device
        self.batches, self.sites = Batches(store, name), _sites(store, name)
        flags = [store.column(f"rows/{model}/flags") for model in store.header.models]
        self.special_N = np.logical_or.reduce([one & SPECIAL > 0 for one in flags])
        self.first_N = np.logical_or.reduce([one & FIRST > 0 for one in flags])
        self.held_out_N = store.column("documents/split")[store.column("rows/document")] == HELD_OUT

    def make(self, shard: int, tick: Any) -> dict[str, Part]:
        """The parts of one unit. Raises ActivationError at a value that is not finite, unless they are to be masked."""
        inside = self.store.rows_of(shard)
        parts = {source: self._empty(source, len(inside)) for source in self.sites.values()}
        moments = {
            source: [Moments.empty(part.activations_ND.shape[1]) for _ in CLASSES] for source, part in parts.items()
        }
        for batch in self.batches.of(shard):
            for source, x_ND in rows(self.captured, batch, self.sites, self.device).items():
                self._take(source, x_ND, batch, parts[source], moments[source], inside.start)
            tick(len(batch.row_N))
        for source, part in parts.items():
            part.moments_XK[:] = [one.pack() for one in moments[source]]
        return parts

    def _empty(self, source: str, count: int) -> Part:
        width = self.store.header.sources[source].width
        packed = np.empty((len(CLASSES), len(Moments.empty(width).pack())))
        return Part(
            np.empty((count, width), np.float16), np.empty(count, np.float32), np.empty(count, np.uint8), packed
        )

    def _take(self, source: str, x_ND: Tensor, batch: Batch, part: Part, moments: list[Moments], start: int) -> None:
        assert self.store.header.scale is not None
        scale = self.store.header.scale[source]
        done = cast(x_ND, scale["factor"], scale["sink_norm"])
        masked_N = done.faults_N & MASKED > 0
        if masked_N.any() and self.job.config.store.nonfinite == "fail":
            raise self._nonfinite(source, int(batch.row_N[masked_N.argmax()]))
        at_N = batch.row_N - start
        part.activations_ND[at_N] = done.values_ND.cpu().numpy()
        part.norms_N[at_N] = done.norms_N.cpu().numpy()
        part.faults_N[at_N] = done.faults_N
        row_N = batch.row_N
        class_N = class_of(self.special_N[row_N], self.first_N[row_N], done.faults_N & SINK > 0, self.held_out_N[row_N])
        x_cpu = done.x_ND.cpu()
        for index in np.unique(class_N[~masked_N]):
            moments[index] = moments[index].merge(Moments.of(x_cpu[torch.from_numpy((class_N == index) & ~masked_N)]))

    def _nonfinite(self, source: str, row: int) -> ActivationError:
        document = self.store.document_ids()[self.store.column("rows/document")[row]]
        token = self.store.column(f"tokens/{self.name}/id")[self.store.column(f"rows/{self.name}/token")[row]]
        text = self.job.spellers[self.name].tokenizer.decode([int(token)])
        return ActivationError(
            f"{source} ({self.store.header.sources[source].site}) is not finite",
            f"document {document!r}, token {text!r}, row {row}",
            'Run the model in float32 or bfloat16, or set store.nonfinite to "mask"',
        )

"""The thin effect: plan -> store. One unit is one shard of one model, safe to make twice.

Letters: N rows of a shard, D width.
"""

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harvest import corpus, plan
from harvest.cast import calibrated, cast
from harvest.config import HarvestConfig
from harvest.forward import Batch, Batches, rows
from harvest.segments import Speller
from shared import files, hooks, models
from shared.device import device_of
from shared.errors import ActivationError, ModelError, StoreError
from shared.log import Log, bar
from shared.moments import CLASSES, Moments, class_of
from shared.source import Model, Source
from shared.store import FIRST, HELD_OUT, MASKED, SINK, SPECIAL, Header, Part, Store

SCALE_RULE = "power of two, fourfold headroom; sink at 10 x the median norm"


@dataclass(frozen=True)
class Job:
    """A harvest with its models found, its corpus read and its id known, before anything is planned or spent."""

    config: HarvestConfig
    checkpoints: dict[str, models.Checkpoint]
    spellers: dict[str, Speller]
    models: dict[str, Model]
    sources: dict[str, Source]
    documents: list[corpus.Document]
    spec: dict[str, Any]
    align: str

    @property
    def path(self) -> Path:
        return Path(self.config.store.path)

    def make_plan(self, log: Log) -> plan.Plan:
        with bar("planning", "documents", len(self.documents)) as progress:

            def counted() -> Iterator[corpus.Document]:
                for document in plan.shuffled(self.documents, self.config.rows.seed):
                    yield document
                    progress.update()

            limits = dict.fromkeys(self.models, self.config.rows.context)
            return plan.build(counted(), self.spellers, list(self.sources.values()), limits, self.config, self.align)

    def header(self, made: plan.Plan) -> Header:
        return Header(self.spec, self.models, self.sources, made.summary)


def prepare(config: HarvestConfig, log: Log) -> Job:
    """Find the models, check sites and context, read the corpus, and compute the store's spec."""

    def say(text: str) -> None:
        log.event("prepare", text)

    checkpoints = {name: models.resolve(m.path, m.revision, say) for name, m in config.models.items()}
    found_models: dict[str, Model] = {}
    sources: dict[str, Source] = {}
    tokenizers = {name: models.load_tokenizer(checkpoint) for name, checkpoint in checkpoints.items()}
    for name, checkpoint in checkpoints.items():
        asked = config.models[name]
        _check_context(checkpoint, config.rows.context)
        skeleton = models.skeleton(checkpoint)
        sites = asked.source_names(name)
        width = hooks.widths(skeleton, list(sites.values()))
        sources |= {source: Source(source, name, site, width[site]) for source, site in sites.items()}
        found_models[name] = Model(
            name, asked.path, checkpoint.weights_fingerprint(), models.tokenizer_fingerprint(tokenizers[name]),
            checkpoint.dtype() if asked.dtype == "auto" else asked.dtype, models.attention(checkpoint, asked.attention),
        )  # fmt: skip
    align = _alignment(config, found_models)
    if align == "offsets":
        _require_fast(tokenizers)
    spellers = {name: Speller(tokenizer, config.rows.bos, name) for name, tokenizer in tokenizers.items()}
    documents, text = corpus.load(config.corpus)
    spec = _spec(config, found_models, sources, text, align)
    return Job(config, checkpoints, spellers, found_models, sources, documents, spec, align)


def _spec(
    config: HarvestConfig, found: Mapping[str, Model], sources: Mapping[str, Source], text: str, align: str
) -> dict[str, Any]:
    """Everything that decides a value, and nothing else."""
    return {
        "format": 1,
        "models": {name: model.identity() for name, model in found.items()},
        "sources": {name: {"model": source.model, "site": source.site} for name, source in sources.items()},
        "corpus": text,
        "rows": {**config.rows.model_dump(), "align": align},
        "batch": config.batch.model_dump(),
        "store": config.store.model_dump(exclude={"path"}),
        "scale": SCALE_RULE,
    }


def _check_context(checkpoint: models.Checkpoint, context: int) -> None:
    limit = checkpoint.context()
    if limit is not None and context > limit:
        way_out = f"Set rows.context to {limit} or less"
        raise ModelError(
            "rows.context is longer than the model's", f"{context} > {limit} of {checkpoint.path}", way_out
        )


def _alignment(config: HarvestConfig, found: Mapping[str, Model]) -> str:
    if config.rows.align != "auto":
        return config.rows.align
    return "identical" if len({model.tokenizer for model in found.values()}) == 1 else "offsets"


def _require_fast(tokenizers: Mapping[str, models.Tokenizer]) -> None:
    for name, tokenizer in tokenizers.items():
        if not tokenizer.is_fast:
            way_out = "Save a tokenizer.json with the model, or set rows.align to identical"
            raise ModelError('rows.align "offsets" needs fast tokenizers, and this model has a slow one', name, way_out)


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
    return Store.create(job.path, job.header(made), made.tables)


def run(job: Job, log: Log) -> Store:
    """Make every unit that is missing, and seal the store."""
    store = open_store(job, log)
    if store.sealed:
        log.event("done", f"{store.path} is already finished: nothing to do")
        return store
    files.sweep(store.path)
    device = str(device_of(job.config.device))
    if job.config.threads:
        torch.set_num_threads(job.config.threads)
    loaded: tuple[str, nn.Module] | None = None
    if store.header.scale is None:
        scale: dict[str, dict[str, float]] = {}
        for name in store.header.models:
            loaded = None  # one model in memory at a time
            loaded = (name, _load(job, name, device, log))
            scale |= calibrate(job, store, name, loaded[1], device)
        store = store.freeze(scale)
        factors = ", ".join(f"{name} {values['factor']:g}" for name, values in scale.items())
        log.event("scale", f"scale factors: {factors}", scale=scale)
    todo = {name: [shard for shard, model in store.missing() if model == name] for name in store.header.models}
    for name in sorted(todo, key=lambda name: loaded is None or name != loaded[0]):
        if todo[name]:
            if loaded is None or loaded[0] != name:
                loaded = None
                loaded = (name, _load(job, name, device, log))
            _make_units(job, store, name, loaded[1], device, todo[name], log)
    store.seal()
    log.event("done", f"finished {store.path}")
    return store


def _load(job: Job, name: str, device: str, log: Log) -> nn.Module:
    model = job.models[name]
    log.event("load", f"loading {name} ({model.dtype}, {model.attention} attention, {device})")
    return models.load(job.checkpoints[name], model.dtype, model.attention, device)


def _sites(store: Store, model: str) -> dict[str, str]:
    """{site: source} of one model."""
    return {source.site: name for name, source in store.header.sources.items() if source.model == model}


@contextmanager
def capturing(store: Store, name: str, model: nn.Module) -> Iterator[hooks.Run]:
    sites = [hooks.find(model, site) for site in _sites(store, name)]
    with torch.inference_mode(), hooks.capture(model, sites) as captured:
        yield captured


def calibrate(job: Job, store: Store, name: str, model: nn.Module, device: str) -> dict[str, dict[str, float]]:
    """Check the hooks against the model's own hidden states, and choose the scale of each of its sources."""
    batches = list(Batches(store, name).spread(job.config.batch.calibration))
    sites = _sites(store, name)
    first = batches[-1]  # the shortest segments
    hooks.self_check(model, list(sites), first.ids_BT[:2].to(device), first.mask_BT[:2].to(device))
    norms: dict[str, list[Tensor]] = {source: [] for source in sites.values()}
    largest = dict.fromkeys(sites.values(), 0.0)
    with capturing(store, name, model) as captured:
        for batch in batches:
            for source, x_ND in rows(captured, batch, sites, device).items():
                one = cast(x_ND, 1.0, math.inf)
                norms[source].append(one.norms_N.cpu())
                largest[source] = max(largest[source], float(one.x_ND.abs().max()))
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
        bar(name, "rows", total) as b,
    ):
        maker = UnitMaker(job, store, name, captured, device)
        for shard in shards:
            parts = maker.make(shard, b.update)
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

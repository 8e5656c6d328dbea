"""A config and a store -> a trainer that can begin. What can be wrong is refused here, before anything is written."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from shared import config as configs
from shared import layout
from shared.device import device_of
from shared.errors import ConfigError
from shared.view import View
from train import dictionary, measure, parallel, reader, scale, shards, trackers, wiring
from train.config import TrainConfig, WiringConfig
from train.filter import Kept, kept_rows, require_rows
from train.order import Order, default_window_blocks
from train.scale import Scale
from train.sources import Sources
from train.trainer import Trainer
from train.wiring import Span, Wiring

READ = 4096  # rows at once


@dataclass(frozen=True)
class Shape:
    """What a trainer is made of."""

    config: TrainConfig
    wiring: Wiring
    device: torch.device

    @property
    def sources(self) -> list[str]:
        return list(self.wiring.widths)

    @property
    def name(self) -> str:
        return f"{self.config.wiring.kind} {self.config.method.name}"


@dataclass(frozen=True)
class Ready(Shape):
    """A run that can begin: its config, and what follows from it on its store."""

    order: Order
    dropped: dict[str, int]
    owned: dict[str, int]  # bytes of a row of each stored source that is not mapped: of it two windows are in memory

    @property
    def notes(self) -> list[str]:
        """What works, and is hardly what was meant."""
        short = self.config.optimiser.warmup >= self.config.steps
        return ["optimiser.warmup is as long as the run: the learning rate never reaches its peak"] if short else []


def ready(store: View, asked: Sequence[TrainConfig]) -> list[Ready]:
    """Check everything that can be wrong with these runs. Runs that serve the same rows share one order.

    Raises ConfigError, WiringError or StoreError for the first that cannot be used.
    """
    kept: dict[str, Kept] = {}
    orders: dict[tuple[str, int], Order] = {}
    return [_ready(store, one, kept, orders) for one in asked]


def _ready(store: View, asked: TrainConfig, kept: dict[str, Kept], orders: dict[tuple[str, int], Order]) -> Ready:
    sources = asked.wiring.sources or list(store.header.sources)
    widths = Sources(store, sources).widths
    if len(widths) < len(sources):
        raise ConfigError("a source is named twice", ", ".join(sources), "Name each source once in wiring.sources")
    made = shape(asked, widths)
    order, dropped = _order(store, asked, kept, orders)
    if asked.batch > order.kept:
        value = f"{asked.batch:,} > {order.kept:,}"
        raise ConfigError("the batch is larger than the rows that are kept", value, "Lower batch, or harvest more rows")
    read = store.through(asked.read.access)
    stored = [part for part in Sources(store, widths).stored if read.activations(part, read.access).owns]
    owned = {part: store.dtype.itemsize * store.source(part).width for part in stored}
    return Ready(asked, made.wiring, made.device, order, dropped, owned)


def shape(asked: TrainConfig, widths: Mapping[str, int]) -> Shape:
    """Check everything that can be wrong with a run on sources of these widths. Raises ConfigError or WiringError."""
    trackers.require(asked.log)
    wires = _wiring(asked, widths)
    if asked.method.settled() > asked.steps:
        value = f"{asked.method.settled()} > {asked.steps}"
        raise ConfigError("the method's schedule is longer than the run", value, "Raise steps, or shorten the schedule")
    with torch.device("meta"):  # without the memory
        given = (asked.method, Scale(wires.widths), asked.wiring.norm, asked.steps)
        dictionary.create(shards.local(wires), *given)  # refuses before the store is read, as do the next lines
    if asked.method.weighs_codes() and asked.wiring.norm == "none" and asked.wiring.decoder == "free":
        way_out = "Set wiring.decoder to unit, or another wiring.norm"
        raise ConfigError("codes would shrink out of their penalty while decoders grow", "wiring.norm none", way_out)
    if late := [step for step in asked.resample.steps if not 0 < step < asked.steps]:
        value = f"step {late[0]:,} of {asked.steps:,}"
        raise ConfigError("latents cannot be resampled outside of the run", value, "Change resample.steps")
    if asked.wiring.decoder == "unit" and asked.wiring.decoder_norm is not None:
        raise ConfigError("decoders of length 1 have no other", "wiring.decoder_norm", "Leave one of the two out")
    if asked.micro_batch is not None:
        _require_parts(asked)
    parallel.share(asked.batch)  # refuses one that the ranks cannot share
    if asked.resample.steps and parallel.latent_ranks() > 1:
        way_out = "Leave out resample.steps, or set parallel to rows"
        raise ConfigError("latents that ranks share are not resampled", "parallel latents", way_out)
    return Shape(asked, wires, device_of(asked.device))


def _require_parts(asked: TrainConfig) -> None:
    """Raises ConfigError where more than the scores of kept latents is in memory for all rows of a batch."""
    why = ""
    if "k" not in type(asked.method).model_fields:
        why = f"{asked.method.name}, which does not keep k latents"
    elif asked.kernels == "dense":
        why = "kernels dense, whose codes are matrices"
    elif asked.wiring.norm == "decoupled":
        why = "wiring.norm decoupled"
    if why:
        way_out = "Leave out micro_batch; lower batch where it does not fit"
        raise ConfigError("a batch cannot be computed in parts", why, way_out)


def _order(
    store: View, asked: TrainConfig, kept: dict[str, Kept], orders: dict[tuple[str, int], Order]
) -> tuple[Order, dict[str, int]]:
    """The order of a run's rows, and what dropped the others; from the first run that asked for it."""
    rows = configs.canonical(asked.rows.model_dump(mode="json"))
    if rows not in kept:
        kept[rows] = kept_rows(store, asked.rows)
        require_rows(kept[rows])
        measure.require_held_out(store, asked.rows)  # the figures come last, and must not fail then
    if (rows, asked.batch) not in orders:
        orders[rows, asked.batch] = order_of(store, kept[rows], asked.batch, asked.rows.seed)
    return orders[rows, asked.batch], kept[rows].dropped


def _wiring(asked: TrainConfig, widths: Mapping[str, int]) -> Wiring:
    wires = replace(_of_kind(asked.wiring, widths), skip=asked.wiring.skip)
    if asked.wiring.k and "k" not in type(asked.method).model_fields:
        raise ConfigError("this method keeps no k latents", f"{asked.method.name}, wiring.k", "Leave out wiring.k")
    return wiring.with_k(wires, asked.wiring.k)


def _of_kind(asked: WiringConfig, widths: Mapping[str, int]) -> Wiring:
    if asked.kind != "spans":
        if asked.spans:
            raise ConfigError(
                "wiring.spans are of the kind spans", f"wiring.kind {asked.kind}", "Leave one of them out"
            )
        return wiring.build(asked.kind, widths, asked.latents, asked.exclusive, asked.readers)
    every = tuple(widths)
    spans = [
        Span(one.name, 0, tuple(one.readers or every), tuple(one.writers or every), None, one.weight, one.tied)
        for one in asked.spans
    ]
    return wiring.from_spans(spans, [one.size for one in asked.spans], widths, asked.latents)


def order_of(store: View, kept: Kept, batch: int, seed: int) -> Order:
    """The order of these rows. Its blocks are those of the store, whichever sources a run reads: runs can share it."""
    block_rows = layout.block_rows(store.chunk_rows, 2 * min(source.width for source in store.header.sources.values()))
    return Order(kept.kept_N, block_rows, default_window_blocks(batch), seed)


def fresh(store: View, made: Ready, known: dict[str, Scale]) -> Trainer:
    """The trainer at step 0. `known` keeps scales, which read the store, for runs that have the same."""
    asked = made.config
    key = configs.canonical([made.sources, asked.scale.model_dump(), asked.rows.model_dump(mode="json")])
    if key not in known:
        known[key] = scale.fit(store, made.sources, made.order, asked.scale.kind, asked.scale.centre)
    trainer = initialised(made, copy.deepcopy(known[key]))
    if asked.init.bias != "zero":
        trainer.dictionary.begin_at(_points(store, made, trainer.dictionary.scale))
    return trainer


def _points(store: View, made: Ready, scaled: Scale) -> dict[str, torch.Tensor]:
    """Where biases begin, {writer: [D]}, in scaled space: a property of rows that the run keeps, or one of them."""
    asked, writers = made.config.init, made.wiring.writers
    rows = made.order.sample(1 if asked.bias == "row" else asked.rows, seed=made.config.seed)
    read = list(reader.read(store, writers, rows, READ))
    of = scale.geometric_median if asked.bias == "median" else lambda x_ND: x_ND.double().mean(0)
    return {name: of(scaled.scaled(name, torch.cat([x[name] for x in read]))).float() for name in writers}


def initialised(made: Shape, scaled: Scale) -> Trainer:
    """The trainer at step 0, over rows of this scale."""
    trainer = blank(made, scaled)
    asked = made.config.wiring
    trainer.dictionary.initialise(
        made.config.seed, asked.decoder_norm or wiring.default_decoder_norm(made.wiring), made.config.init.tied
    )
    if asked.decoder == "unit":
        trainer.dictionary.normalise_decoders()
    return trainer


def blank(made: Shape, scaled: Scale | None = None) -> Trainer:
    """The trainer with weights of 0, and (none given) without a scale: for a checkpoint to fill."""
    asked = made.config
    scaled = scaled or Scale(made.wiring.widths)
    built, terms = dictionary.create(
        shards.local(made.wiring), asked.method, scaled, asked.wiring.norm, asked.steps, asked.wiring.alpha
    )
    return Trainer(built.to(made.device), list(terms), asked)

"""A run from store to report, from its beginning or its last checkpoint: one loader feeds the trainer."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared import config as configs
from shared import files, layout
from shared.device import device_of, torch_threads
from shared.errors import CheckpointError, ConfigError, Stopped, StoreError, deferred_stop
from shared.family import open_family
from shared.log import Log, bar
from shared.view import View
from train import checkpoint, dictionary, measure, report, run, scale, trackers, wiring
from train.config import TrainConfig
from train.filter import Kept, kept_rows, require_rows
from train.loader import Loader
from train.order import Order, companions, default_window_blocks
from train.trainer import Trainer


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the trained dictionary (in evaluation mode) and its figures (train.measure)."""

    folder: Path
    dictionary: dictionary.Dictionary
    figures: dict[str, Any] = field(repr=False)


def fit(
    store: View | str | Path, config: TrainConfig | Mapping[str, Any], folder: str | Path | None = None,
    quiet: bool = False,
) -> Run:  # fmt: skip
    """Train one dictionary on a store, or on that at a path. `config` is a TrainConfig or its tables as a mapping.

    The folder (none: a new one below runs/) gets config.toml, store.json, metrics.jsonl, checkpoints/, dictionary/,
    measure.json, report.html and what the trackers of `log` write. Raises ConfigError, WiringError, StoreError,
    TrainingError or CheckpointError.
    """
    asked = configs.parse(TrainConfig, config) if isinstance(config, Mapping) else config
    opened = open_family(store) if isinstance(store, str | Path) else store
    with torch_threads(asked.threads):
        run.require_free(folder)
        made = prepare(opened, asked)
        path = run.claim(folder, asked)
        with run.held(path):
            files.write_json(path / report.STORE, run.origin(opened, made.sources))
            with Log(path / report.METRICS, quiet) as log:
                mixing = companions(asked.batch, made.order.block_rows, made.order.window_rows)
                kept = {"dropped": made.dropped, "kept": made.order.kept, "companions": mixing}
                log.event("start", _opening(made, path), **kept)
                return _finish(opened, made, run.Training(path, asked, made.trainer, opened, log))


def resume(folder: str | Path, store: View | str | Path | None = None, quiet: bool = False) -> Run:
    """Go on with a run from its last checkpoint, to the bits that it would have had without a break.

    `store` (none: where it was) must be the one that the run began on. A finished run is returned as it is. Raises
    CheckpointError, StoreError or TrainingError.
    """
    path = Path(folder)
    try:
        asked = configs.parse(TrainConfig, configs.read_toml(path / report.CONFIG))
    except ConfigError as error:
        raise CheckpointError("no run here", path, f"Give the folder of a run ({error})") from None
    if not (path / report.STORE).exists():
        raise CheckpointError("this run was stopped before it began", path, "Remove the folder, and run it again")
    began = files.read_json(path / report.STORE)
    with run.held(path), torch_threads(asked.threads):
        if (path / report.PAGE).exists():
            return Run(path, dictionary.Dictionary.load(path), files.read_json(path / report.MEASURE))
        place = began["path"] if store is None else store
        opened = open_family(place) if isinstance(place, str | Path) else place
        if (opened.header.id, opened.seals) != (began["id"], began.get("seals")):
            way_out = f"Give the store whose id begins with {began['id'][:12]}, as it was"
            raise StoreError("this is not the store that the run began on", opened.path, way_out)
        made = prepare(opened, asked, fresh=not checkpoint.steps(path / run.CHECKPOINTS))
        with Log(quiet=quiet) as log:
            training = run.Training(path, asked, made.trainer, opened, log)
            training.resume()
            log.attach(path / report.METRICS)
            step = made.trainer.step
            log.event("resume", f"going on with {path} at step {step:,} of {asked.steps:,}", step=step)
            return _finish(opened, made, training)


def _finish(store: View, made: "Made", training: run.Training) -> Run:
    """Train to the end, measure and report."""
    with training.trackers.opened(made.trainer.step):
        return _to_the_end(store, made, training)


def _to_the_end(store: View, made: "Made", training: run.Training) -> Run:
    log, path, asked = training.log, training.folder, made.config
    try:
        while not training.finished:  # a stop may be one that its handler does not mind
            _train(store, made, training)
        trained = made.trainer.dictionary.eval()
        trained.save(path / "dictionary")
        figures = measure.measure(trained, store, asked.log.measure_rows, asked.rows, log.quiet)
        files.write_json(path / report.MEASURE, figures)
        log.event("measure", figures=figures)
        training.trackers.finish(made.trainer.step, figures)
        report.write(path)
    except (Stopped, KeyboardInterrupt):
        step = made.trainer.step
        log.event("stop", f"stopped at step {step:,}; to go on: train resume {path}", step=step)
        raise
    return Run(path, trained.requires_grad_(False), figures)


@dataclass(frozen=True)
class Made:
    """A run that is ready to start."""

    config: TrainConfig
    trainer: Trainer
    order: Order
    sources: list[str]
    dropped: dict[str, int]


def prepare(store: View, config: TrainConfig, fresh: bool = True) -> Made:
    """Check everything that can be wrong, and build order, scale, dictionary and trainer. Writes nothing.

    Where not `fresh`, scale and weights are left for a checkpoint to fill.
    """
    trackers.require(config.log)
    sources = config.wiring.sources or list(store.header.sources)
    widths = {name: store.source(name).width for name in sources}
    if len(widths) < len(sources):
        raise ConfigError("a source is named twice", ", ".join(sources), "Name each source once in wiring.sources")
    wires = wiring.build(config.wiring.kind, widths, config.wiring.latents, config.wiring.exclusive)
    if config.method.settled() > config.steps:
        value = f"{config.method.settled()} > {config.steps}"
        raise ConfigError("the method's schedule is longer than the run", value, "Raise steps, or shorten the schedule")
    config.method.build(wires, config.steps)  # refuses before the store is read, as does the next line
    device = device_of(config.device)
    measure.require_held_out(store, config.rows)  # the figures come last, and must not fail then
    kept = kept_rows(store, config.rows)
    require_rows(kept)
    order = order_of(store, kept, config.batch, config.rows.seed)
    if config.batch > order.kept:
        value = f"{config.batch:,} > {order.kept:,}"
        raise ConfigError("the batch is larger than the rows that are kept", value, "Lower batch, or harvest more rows")
    kind = config.scale
    scaled = scale.fit(store, sources, order, kind.kind, kind.centre) if fresh else scale.Scale(widths)
    made, terms = dictionary.create(wires, config.method, scaled, config.wiring.norm, config.steps)
    if fresh:
        made.initialise(config.seed, config.wiring.decoder_norm or dictionary.default_decoder_norm(wires))
    return Made(config, Trainer(made.to(device), list(terms), config), order, sources, kept.dropped)


def order_of(store: View, kept: Kept, batch: int, seed: int) -> Order:
    """The order of these rows. Its blocks are those of the store, whichever sources a run reads: runs can share it."""
    block_rows = layout.block_rows(store.chunk_rows, 2 * min(source.width for source in store.header.sources.values()))
    return Order(kept.kept_N, block_rows, default_window_blocks(batch), seed)


def _opening(made: Made, path: Path) -> str:
    short = made.config.optimiser.warmup >= made.config.steps
    note = "\noptimiser.warmup is as long as the run: the learning rate never reaches its peak" if short else ""
    dropped = ", ".join(f"{name} {count:,}" for name, count in made.dropped.items() if count)
    epochs = made.config.steps * made.config.batch / made.order.kept
    return (
        f"training {made.config.wiring.kind} {made.config.method.name} in {path}: {made.order.kept:,} rows (dropped: "
        f"{dropped or 'none'}), {made.config.steps:,} steps of {made.config.batch:,} rows, {epochs:.1f} epochs{note}"
    )


def _train(store: View, made: Made, training: run.Training) -> None:
    config, trainer, log = made.config, made.trainer, training.log
    steps = range(trainer.step, config.steps)
    started = time.monotonic()
    with (
        deferred_stop() as stopping,
        Loader(store, made.sources, made.order, config.batch, steps, trainer.idle_L.device, reuse=True) as loader,
        bar("training", "steps", config.steps, quiet=log.quiet, done=trainer.step) as progress,
    ):
        for rows in loader:
            seconds = time.monotonic() - started
            epoch = made.order.epoch((trainer.step + 1) * config.batch)
            speed = {"rows_s": loader.rows_served / seconds, "waited_s": loader.waited_s}
            if values := training.update(rows.x, epoch=epoch, **speed):
                progress.set_postfix(_shown(values, loader.waited_s / seconds), refresh=False)
            progress.update()
            if stopping():
                training.keep()
                break


def _shown(values: Mapping[str, float], stalled: float) -> dict[str, str]:
    """The latest figures behind the bar; `stall` is the share of the time that was spent waiting for rows."""
    shown = {"loss": f"{values['loss']:.4g}", "l0": f"{values['l0']:.1f}", "dead": f"{values['dead']:.1%}"}
    shown |= {name: f"{value:.3f}" for name, value in values.items() if name.startswith("fve/")}
    return shown | {"stall": f"{stalled:.0%}"}

"""A run: one loader feeds the trainer; when to log, to checkpoint and to measure is decided here."""

import itertools
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shared import config as configs
from shared import files, layout
from shared.device import device_of, torch_threads
from shared.errors import CheckpointError, ConfigError, TrainingError
from shared.family import open_family
from shared.log import Log, bar
from shared.view import View
from train import checkpoint, dictionary, measure, report, scale, wiring
from train.config import TrainConfig
from train.filter import kept_rows, require_rows
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
    measure.json and report.html. Raises ConfigError, WiringError, StoreError, TrainingError or CheckpointError.
    """
    asked = configs.parse(TrainConfig, config) if isinstance(config, Mapping) else config
    opened = open_family(store) if isinstance(store, str | Path) else store
    with torch_threads(asked.threads):
        return _fit(opened, asked, folder, quiet)


def _fit(store: View, asked: TrainConfig, folder: str | Path | None, quiet: bool) -> Run:
    _require_free(folder)
    made = prepare(store, asked)
    path = _claim(folder, asked)
    files.write_json(path / report.STORE, _origin(store, made.sources))
    with Log(path / report.METRICS, quiet) as log:
        mixing = companions(asked.batch, made.order.block_rows, made.order.window_blocks * made.order.block_rows)
        log.event("start", _opening(made, path), dropped=made.dropped, kept=made.order.kept, companions=mixing)
        _train(store, made, path, log)
        trained = made.trainer.dictionary.eval()
        trained.save(path / "dictionary")
        figures = measure.measure(trained, store, asked.log.measure_rows, asked.rows, quiet)
        files.write_json(path / report.MEASURE, figures)
        log.event("measure", figures=figures)
    report.write(path)
    return Run(path, trained.requires_grad_(False), figures)


@dataclass(frozen=True)
class Made:
    """A run that is ready to start."""

    config: TrainConfig
    trainer: Trainer
    order: Order
    sources: list[str]
    dropped: dict[str, int]


def prepare(store: View, config: TrainConfig) -> Made:
    """Check everything that can be wrong, and build order, scale, dictionary and trainer. Writes nothing."""
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
    order = Order(kept.kept_N, _block_rows(store, widths), default_window_blocks(config.batch), config.seed)
    if config.batch > order.kept:
        value = f"{config.batch:,} > {order.kept:,}"
        raise ConfigError("the batch is larger than the rows that are kept", value, "Lower batch, or harvest more rows")
    scaled = scale.fit(store, sources, order, config.scale.kind, config.scale.centre)
    made, terms = dictionary.create(wires, config.method, scaled, config.wiring.norm, config.steps)
    made.initialise(config.seed, config.wiring.decoder_norm or dictionary.default_decoder_norm(wires))
    return Made(config, Trainer(made.to(device), list(terms), config), order, sources, kept.dropped)


def _origin(store: View, sources: list[str]) -> dict[str, Any]:
    """What a run was trained on: the store's id and place, and per source its model and site."""
    found = [store.source(name) for name in sources]
    places = {
        one.name: {"model": store.header.models[one.model].path, "site": one.site, "width": one.width} for one in found
    }
    path = str(store.path.absolute())
    return {"id": store.header.id, "members": store.members, "path": path, "rows": store.rows, "sources": places}


def _block_rows(store: View, widths: Mapping[str, int]) -> int:
    return layout.block_rows(store.chunk_rows, 2 * min(widths.values()))


def _require_free(folder: str | Path | None) -> None:
    """Before any work, what `_claim` would refuse after it."""
    if folder is not None and (Path(folder) / report.CONFIG).exists():
        raise CheckpointError("this folder holds a run already", folder, "Give another folder (--out)")
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise CheckpointError("this is a file", folder, "Give a folder (--out)")
    if folder is not None and Path(folder).exists() and any(Path(folder).iterdir()):
        raise CheckpointError("this folder is in use and holds no run", folder, "Give another folder (--out)")


def _claim(folder: str | Path | None, config: TrainConfig) -> Path:
    """The run's folder with its config.toml, which one run alone can make."""
    name = f"{config.wiring.kind}-{config.method.name}-{config.wiring.latents}"
    numbered = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
    for path in [Path(folder)] if folder is not None else numbered:
        with suppress(FileExistsError):
            path.mkdir(parents=True, exist_ok=folder is not None)
            with (path / report.CONFIG).open("x", encoding="utf-8") as file:
                file.write(configs.to_toml(config))
            return path
    raise CheckpointError("this folder holds a run already", folder, "Give another folder (--out)")


def _opening(made: Made, path: Path) -> str:
    short = made.config.optimiser.warmup >= made.config.steps
    note = "\noptimiser.warmup is as long as the run: the learning rate never reaches its peak" if short else ""
    dropped = ", ".join(f"{name} {count:,}" for name, count in made.dropped.items() if count)
    epochs = made.config.steps * made.config.batch / made.order.kept
    return (
        f"training {made.config.wiring.kind} {made.config.method.name} in {path}: {made.order.kept:,} rows (dropped: "
        f"{dropped or 'none'}), {made.config.steps:,} steps of {made.config.batch:,} rows, {epochs:.1f} epochs{note}"
    )


def _train(store: View, made: Made, path: Path, log: Log) -> None:
    config, trainer = made.config, made.trainer
    identity = {"store": store.header.id, "config": configs.fingerprint(config.model_dump(mode="json"))}
    device = trainer.idle_L.device
    steps = range(trainer.step, config.steps)
    started = time.monotonic()
    with (
        Loader(store, made.sources, made.order, config.batch, steps, device) as loader,
        bar("training", "steps", config.steps, quiet=log.quiet) as progress,
    ):
        for rows in loader:
            record = trainer.update(rows.x)
            last = trainer.step == config.steps
            logs, saves = (last or trainer.step % every == 0 for every in (config.log.every, config.log.checkpoint))
            values = _finite(record, trainer.step) if logs or saves else {}
            if logs:
                speed = {"rows_s": loader.rows_served / (time.monotonic() - started), "waited_s": loader.waited_s}
                log.event(
                    "step", step=trainer.step, epoch=made.order.epoch(trainer.step * config.batch), **values, **speed
                )
                progress.set_postfix(_shown(values), refresh=False)
            progress.update()
            if saves:
                checkpoint.save(trainer, path / "checkpoints", identity, config.log.keep)


def _finite(record: Mapping[str, torch.Tensor], step: int) -> dict[str, float]:
    """The figures of a step as numbers. Weights behind a loss or gradient that is not finite are not worth keeping."""
    values = {name: float(value) for name, value in record.items()}
    for name in ("loss", "gradient"):
        if not math.isfinite(values[name]):
            raise TrainingError(f"the {name} is not finite", f"{values[name]} at step {step}", "Lower optimiser.lr")
    return values


def _shown(values: Mapping[str, float]) -> dict[str, str]:
    """The latest figures behind the bar."""
    shown = {"loss": f"{values['loss']:.4g}", "l0": f"{values['l0']:.1f}", "dead": f"{values['dead']:.1%}"}
    return shown | {name: f"{value:.3f}" for name, value in values.items() if name.startswith("fve/")}

"""A run on batches that are made as they are needed, such as those of a toy model: no store, and no checkpoints.

Letters: B rows of a batch, D width of a source.
"""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared import files
from shared.device import memory_minded, torch_threads
from shared.errors import ConfigError, GranaryError, RowsError, TrainingError
from shared.log import Log, bar
from train import measure, parallel, plan, prepare, report, run
from train.calibrate import calibrate_on
from train.config import InitConfig, ReadConfig, ResampleConfig, RowsConfig, ScaleConfig, TrainConfig
from train.dictionary import Dictionary
from train.prepare import Shape
from train.scale import Scale
from train.trackers import Trackers
from train.trainer import Trainer

Rows = Mapping[str, Tensor]  # {source: float32 [B, D]}
NAME = r"[\w\- ]+"  # what the tables of a dictionary can be named
NONE = ScaleConfig(kind="none", centre=False)
FIXED = {"rows": RowsConfig(), "read": ReadConfig(), "resample": ResampleConfig()}  # of what there is not


class Stream:
    """Batches of an iterator, whose widths are those of the first."""

    def __init__(self, rows: Iterator[Rows], config: TrainConfig) -> None:
        first = next(rows, None)
        if not isinstance(first, Mapping) or not first:
            given = first if first is None else f"a {type(first).__name__}"  # not all the numbers of a tensor
            raise ConfigError("the iterator gives no batch of rows", given, "Give {source: rows [batch, width]}")
        names = config.wiring.sources or list(first)
        if missing := [name for name in names if name not in first]:
            raise ConfigError("the batches have no such source", missing[0], f"They have: {', '.join(map(str, first))}")
        for name in names:
            if not isinstance(name, str) or not re.fullmatch(NAME, name):
                raise ConfigError("a source of this name cannot be", repr(name), "Take letters, digits, - and _")
        if len(set(names)) < len(names):
            raise ConfigError("a source is named twice", ", ".join(names), "Name each source once in wiring.sources")
        self._rows, self.batch, self.taken = chain([first], rows), config.batch, 0
        self.widths = {name: torch.as_tensor(first[name]).shape[-1:].numel() for name in names}
        self._fits(first)

    def take(self, count: int, device: torch.device) -> Iterator[Rows]:
        """So many batches. Raises RowsError for one that does not fit, TrainingError where there are no more."""
        for x in islice(self._rows, count):
            fitting = self._fits(x)
            self.taken, count = self.taken + 1, count - 1
            yield {name: x_BD.to(device, torch.float32) for name, x_BD in fitting.items()}
        if count:
            raise TrainingError(
                "the batches have come to an end", f"after {self.taken:,}", f"{count:,} more are needed"
            )

    def _fits(self, x: Rows) -> Rows:
        """The rows of the run's sources. Raises RowsError where they are others, or not finite."""
        fitting, what = {}, f"batch {self.taken:,} does not fit the run"
        for name, width in self.widths.items():
            rows_BD = torch.as_tensor(x[name]) if name in x else torch.empty(0)
            if tuple(rows_BD.shape) != (self.batch, width) or not width:
                value = (
                    f"{name}: {tuple(rows_BD.shape) if name in x else 'no rows'}, not ({self.batch}, {width or 'D'})"
                )
                raise RowsError(what, value, "All have `batch` rows of one width")
            if not bool(rows_BD.isfinite().all()):
                raise RowsError(what, f"{name} holds values that are not finite", "Leave such rows out")
            fitting[name] = rows_BD
        return fitting


def train(rows: Iterator[Rows], config: TrainConfig, folder: str | Path | None, quiet: bool) -> Path:
    """Train, measure on further batches, and report. Returns the run's folder.

    Raises ConfigError, WiringError, RowsError or TrainingError.
    """
    _require(config)
    run.require_free(folder)
    stream = Stream(rows, config)
    made = prepare.shape(config, stream.widths)
    plan.require_memory(made)
    path = run.claim(folder, config)
    run.begin_without_store(path, stream.widths)
    with ExitStack() as stack:
        stack.enter_context(torch_threads(config.threads))
        log = stack.enter_context(Log(path / report.METRICS, quiet))
        stack.enter_context(memory_minded("while it was trained"))
        log.event("start", f"training {made.name} in {path}: {config.steps:,} steps of {config.batch:,} rows")
        trackers = Trackers(path, config, log)
        try:
            with trackers.opened(0):
                _run(stream, made, path, log, trackers)
        except GranaryError as error:
            log.event("failed", f"{path} failed: {error}", error=str(error))
            raise
    report.write(path)
    return path


def _run(stream: Stream, made: Shape, path: Path, log: Log, trackers: Trackers) -> None:
    """Train, save and measure."""
    config, trainer = made.config, prepare.initialised(made, Scale(made.wiring.widths))
    _steps(stream, trainer, made, log, trackers)
    dictionary, count = trainer.trained(), -(-config.log.measure_rows // config.batch)
    if config.method.calibrates():
        calibrate_on(dictionary, stream.take(count, made.device))
    dictionary.save(path / "dictionary")
    figures = _measured(dictionary, bar("measuring", "batches", count, stream.take(count, made.device), log.quiet))
    files.write_json(path / report.MEASURE, figures)
    log.event("measure", figures=figures)
    trackers.finish(trainer.step, figures)


def _require(config: TrainConfig) -> None:
    """Raises ConfigError for what takes a store."""
    if parallel.ranks() > 1:
        raise ConfigError("ranks share no iterator", f"{parallel.ranks()} ranks", "Train on one")
    if config.scale != NONE:
        way_out = 'Scale them, and set scale = {kind = "none", centre = false}'
        value = f"scale.kind {config.scale.kind}, centre {config.scale.centre}"
        raise ConfigError("batches from an iterator have no known scale", value, way_out)
    if config.init.bias != InitConfig().bias:
        raise ConfigError("a bias begins at rows of a store", f"init.bias {config.init.bias}", "Leave it out")
    for name, default in FIXED.items():
        if getattr(config, name) != default:
            raise ConfigError("this is for runs on a store", f"[{name}]", "Leave it out")


def _steps(stream: Stream, trainer: Trainer, made: Shape, log: Log, trackers: Trackers) -> None:
    config, started, way = made.config, time.monotonic(), ""
    for x in bar("training", "steps", config.steps, stream.take(config.steps, made.device), log.quiet):
        record = trainer.update(x)
        if trainer.step % config.log.every == 0 or trainer.step == config.steps:
            values = run.finite(record, trainer.step)
            told = {"rows_s": trainer.step * config.batch / (time.monotonic() - started)}
            way = trainer.tell_way(log, way)
            log.event("step", step=trainer.step, **values, **told)
            trackers.step(trainer.step, values | told)


def _measured(dictionary: Dictionary, batches: Iterator[Rows]) -> dict[str, Any]:
    total = measure.Measure(dictionary)
    with measure.evaluating(dictionary):
        for x in batches:
            total.add(x)
    return total.result() | {"training_rows": 0}

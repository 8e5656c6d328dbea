"""The runs of one pass: trained on one loader, each as if it were alone."""

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from shared import files
from shared.device import memory_minded, torch_threads
from shared.errors import DivergenceError, GranaryError, Stopped, deferred_stop
from shared.log import Log, bar
from shared.view import View
from train import measure, parallel, prepare, report, resident, run
from train.calibrate import calibrate
from train.dictionary import Dictionary
from train.order import own_block
from train.prepare import Ready
from train.reader import require_finite
from train.scale import Scale
from train.sources import Sources


class Member:
    """One run of a pass: its folder, what it needs, and what became of it.

    begin -> update, until it is `finished` or has an `error` -> finish
    """

    def __init__(self, folder: Path, ready: Ready, goes_on: bool = False) -> None:
        self.folder, self.ready, self.config = folder, ready, ready.config
        self.error: GranaryError | None = None
        self.shown: Mapping[str, float] = {}  # the latest figures
        self._goes_on = goes_on
        self._training: run.Training | None = None
        self._opened = ExitStack()  # what `end` closes

    @property
    def training(self) -> run.Training:
        assert self._training is not None
        return self._training

    @property
    def runs(self) -> bool:
        return self.error is None and not self.training.finished

    def begin(self, store: View, log: Log, scales: dict[str, Scale]) -> None:
        """Build the trainer, or go back to the last checkpoint. Raises CheckpointError, StoreError or TrainingError."""
        kept = run.kept_step(self.folder)
        trainer = prepare.blank(self.ready) if kept else prepare.fresh(store, self.ready, scales)
        self._training = run.Training(self.folder, self.config, trainer, store, self.ready.order, log)
        self._training.resume()
        if parallel.rank() == 0:
            log.attach(self.folder / report.METRICS)
            self._opened.enter_context(self._training.trackers.opened(trainer.step))

    def announce(self, resident: str) -> None:
        """Say that it begins, or goes on, and where its rows stay meanwhile."""
        log, step, order = self.training.log, self.training.trainer.step, self.ready.order
        if self._goes_on:
            told = f"going on with {self.folder} at step {step:,} of {self.config.steps:,}"
            before, ranks = self.training.ranks, parallel.ranks()
            if before != ranks:
                told += (
                    f" on {ranks} ranks, before on {before}: the sums of a batch round in another order from here on"
                )
            log.event("resume", told, step=step, ranks=ranks, resident=resident)
        else:
            kept = {"dropped": self.ready.dropped, "kept": order.kept, "own_block": own_block(order, self.config.batch)}
            log.event("start", self._opening(), **kept, resident=resident)

    def update(self, x: Mapping[str, Tensor], **told: Any) -> None:
        """One step on the rows of its own sources."""
        epoch = self.ready.order.epoch((self.training.trainer.step + 1) * self.config.batch)
        with self.minded():
            own = {name: x[name] for name in self.ready.sources}
            try:
                self.shown = self.training.update(own, epoch=epoch, **told) or self.shown
            except DivergenceError:
                self._require_finite_rows()
                raise

    def _require_finite_rows(self) -> None:
        """Raises StoreDamagedError where a row that was served since the figures were finite is not."""
        batch, step = self.config.batch, self.training.trainer.step
        rows = self.ready.order.rows(max(0, step - self.config.log.every) * batch, step * batch)
        for name in Sources(self.training.store, self.ready.sources).stored:
            require_finite(self.training.store, name, np.unique(rows))

    @contextmanager
    def minded(self) -> Iterator[None]:
        """A fault of this run ends it, and leaves the others alone.

        Of several ranks a fault that one of them alone may have met, such as too little memory, ends the process and so
        all ranks: the others are in the middle of a step and wait for it. Sums that are not finite are so on all.
        """
        try:
            yield
        except DivergenceError as error:
            self._failed(error)
        except GranaryError as error:
            self._failed(error)
            if parallel.ranks() > 1:
                raise

    def _failed(self, error: GranaryError) -> None:
        self.error = error
        if self._training is not None:
            step = self._training.trainer.step
            self._training.log.event("failed", f"{self.folder} failed at step {step:,}: {error}", error=str(error))
        self.end(type(error), error, error.__traceback__)
        self.release()

    def end(self, *exc: Any) -> bool:
        """Close what was opened for it, and say whether it was an error that ended it; twice is harmless."""
        self._opened.__exit__(*exc)
        return False

    def keep(self) -> None:
        """Write a checkpoint of what it is now."""
        with self.minded():
            self.training.keep()

    def stopped(self) -> None:
        if self._training is not None:
            self._training.log.event("stop", step=self._training.trainer.step)

    def finish(self, figures: Mapping[str, Any]) -> None:
        """Write down the figures, and report."""
        files.write_json(self.folder / report.MEASURE, figures)
        self.training.log.event("measure", figures=figures)
        self.training.trackers.finish(self.training.trainer.step, figures)
        report.write(self.folder)

    def release(self) -> None:
        """Let its memory go."""
        self._training = None

    def _opening(self) -> str:
        asked, order = self.config, self.ready.order
        shared = [f"{parallel.ranks()} ranks share its {asked.parallel}"] if parallel.ranks() > 1 else []
        note = "".join(f"\n{note}" for note in [*shared, *self.ready.notes])
        dropped = ", ".join(f"{name} {count:,}" for name, count in self.ready.dropped.items() if count)
        return (
            f"training {self.ready.name} in {self.folder}: {order.kept:,} rows (dropped: {dropped or 'none'}), "
            f"{asked.steps:,} steps of {asked.batch:,} rows, {asked.steps * asked.batch / order.kept:.1f} epochs{note}"
        )


def train(store: View, members: Sequence[Member], place: Path, quiet: bool) -> None:
    """Train runs to their ends, measure and report. Each then has an error, or its figures in its folder.

    `place` is what a user who stopped them gives to `train resume`. Under torchrun the first rank alone logs, keeps
    checkpoints and measures.
    """
    quiet, first = quiet or parallel.rank() > 0, members[0].config
    store, scales = store.through(first.read.access), dict[str, Scale]()
    with ExitStack() as stack:
        stack.enter_context(torch_threads(first.threads))
        console = stack.enter_context(Log(quiet=quiet))
        for one in members:
            with one.minded(), memory_minded("before the first step"):
                stack.enter_context(run.held(one.folder))
                log = stack.enter_context(Log(quiet=quiet))
                stack.push(one.end)
                one.begin(store, log, scales)
        try:
            if running := [one for one in members if one.runs]:
                where = _place(store, running)
                for one in running:
                    one.announce(where)
            while running := [one for one in members if one.runs]:  # a stop may be one that its handler does not mind
                with memory_minded("beside the steps"):
                    _steps(store, running, where, quiet)
            whole = [one for one in members if one.error is None]
            with memory_minded("while it was measured"):
                trained = [one.training.trainer.trained() for one in whole]
                with parallel.over("rows"):  # of which one rank then measures all
                    parallel.first(lambda: _finish(store, whole, trained, quiet))
        except (Stopped, KeyboardInterrupt):
            reached = max((one.training.trainer.step for one in members if one.error is None), default=0)
            for one in members:
                one.stopped()
            console.event("stop", f"stopped at step {reached:,}; to go on: train resume {place}")
            raise
        finally:
            for one in members:
                one.release()


def _sources(running: Sequence[Member]) -> list[str]:
    return list(dict.fromkeys(name for one in running for name in one.ready.sources))


def _place(store: View, running: Sequence[Member]) -> resident.Where:
    """Where the rows of these runs stay, of all ranks alike."""
    ready = running[0].ready
    if ready.config.read.resident == "never":
        return "no"
    rows = max(one.config.steps - one.training.trainer.step for one in running) * ready.config.batch
    # Gradients of one run at a time, and the moments of those that take their first step.
    weights = [sum(p.nbytes for p in one.training.trainer.parameters) for one in running]
    moments = [0 if one.training.trainer.step else 2 * n for one, n in zip(running, weights, strict=True)]
    given = (store, _sources(running), ready.order, ready.device, rows, max(weights) + sum(moments), parallel.local())
    return parallel.first(lambda: resident.place(*given))


def _steps(store: View, running: list[Member], where: resident.Where, quiet: bool) -> None:
    """All steps that are left, or until a signal comes."""
    ready, done = running[0].ready, running[0].training.trainer.step
    assert all(one.training.trainer.step == done for one in running)
    steps, started = range(done, max(one.config.steps for one in running)), time.monotonic()
    batch, ranks, stops = parallel.share(ready.config.batch), (parallel.row_rank(), parallel.row_ranks()), False
    with (
        resident.feed(where, store, _sources(running), ready.order, batch, steps, ready.device, *ranks) as loader,
        deferred_stop() as stopping,
        bar("training", "steps", steps.stop, quiet=quiet, done=done) as progress,
    ):
        for rows in loader:
            seconds = time.monotonic() - started
            speed = {"rows_s": loader.rows_served * parallel.row_ranks() / seconds, "waited_s": loader.waited_s}
            for one in running:
                one.update(rows.x, **speed)
            progress.set_postfix(_shown(running, speed["rows_s"], loader.waited_s / seconds), refresh=False)
            progress.update()
            running = [one for one in running if one.runs]
            stops = parallel.any_rank(stopping(), ready.device)
            if stops:
                for one in running:
                    one.keep()
            if stops or not running:
                break
    if stops and parallel.ranks() > 1:  # the signal may have come to another rank
        raise Stopped(128 + signal.SIGTERM)


def _finish(store: View, members: Sequence[Member], trained: Sequence[Dictionary], quiet: bool) -> None:
    """Save and measure, those that read the same rows at once."""
    alike: dict[int, list[tuple[Member, Dictionary]]] = {}
    for one, made in zip(members, trained, strict=True):
        if one.config.method.calibrates():
            calibrate(made, store, np.flatnonzero(one.ready.order.kept_N), quiet)
        made.save(one.folder / "dictionary")
        alike.setdefault(one.config.log.measure_rows, []).append((one, made))
    for most, some in alike.items():
        runs, dictionaries = [one for one, _ in some], [made for _, made in some]
        found = measure.measure_all(dictionaries, store, most, runs[0].config.rows, quiet)
        for one, figures in zip(runs, found, strict=True):
            one.finish(figures)


def _shown(running: Sequence[Member], rows_s: float, stalled: float) -> dict[str, str]:
    """The latest figures behind the bar, of several runs from the least to the largest; `stall` is the share of the
    time that was spent waiting for rows."""
    forms = {"loss": "{:.4g}", "l0": "{:.1f}", "dead": "{:.1%}"}
    names = dict.fromkeys(key for one in running for key in one.shown if key in forms or key.startswith("fve/"))
    shown = {"runs": str(len(running))} if len(running) > 1 else {}
    for name in names:
        values = [one.shown[name] for one in running if name in one.shown]
        ends = dict.fromkeys(forms.get(name, "{:.3f}").format(value) for value in (min(values), max(values)))
        shown[name] = "..".join(ends)
    return shown | {"rows/s": f"{rows_s:,.0f}", "stall": f"{stalled:.0%}"} if names else {}

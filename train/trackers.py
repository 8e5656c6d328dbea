"""Trackers beside metrics.jsonl, one of each kind for one run: the only file that knows tensorboard and wandb.

A tracker is a view. Where it fails (a full disk, a network that is away), that is told once in the run's log, and the
run goes on without it. Our own mistakes in its use are not caught.
"""

import importlib.util
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from shared import files
from shared.errors import ConfigError
from shared.log import Log
from train import report
from train.config import LogConfig, TrainConfig

EVENTS = "events.out.tfevents."  # TensorBoard reads files with `tfevents` in their names, sorted
FINISH_S = 60.0  # that W&B gets at the end to send the rest; its own default is to wait for ever
OLDEST = (0, 29)  # of wandb: older ones wait for ever where the server does not answer (seen in 0.27.0 and 0.28.0)
FLUSH = "x_transaction_log_flush_interval"  # of W&B's own file: from 0.31 on, and without a promise


class Tracker(ABC):
    """Shows the figures of one run, {name: number}. Made at the step that the run begins or goes on from."""

    package: ClassVar[str]  # and extra of that name
    place: str  # where a user finds the figures
    shown: int  # the last step that it has figures of, or needs none of

    @classmethod
    def require(cls, config: LogConfig) -> None:
        """Raises ConfigError where the tracker cannot be used here."""
        found = importlib.util.find_spec(cls.package)
        if found is None or found.origin is None:  # none: of a folder of that name, such as W&B leaves behind
            way_out = f"pip install 'granary-sae[{cls.package}]', or leave log.{cls.package} out"
            raise ConfigError("this tracker is not installed", cls.package, way_out)

    @classmethod
    def causes(cls, error: Exception) -> bool:
        """Whether an error is the system's, or of a kind that the tracker's package defines. Any other one is ours."""
        return isinstance(error, OSError) or type(error).__module__.partition(".")[0] == cls.package

    @abstractmethod
    def __init__(self, folder: Path, config: TrainConfig, step: int) -> None: ...

    @abstractmethod
    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Show the figures of a step. Those that an earlier process showed of steps behind its checkpoint do not stay
        beside them.
        """

    @abstractmethod
    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        """Show the figures of the whole run, of `step` steps."""

    @abstractmethod
    def close(self, well: bool) -> None:
        """`well`: the run has come to its end."""


class TensorBoard(Tracker):
    """Event files tensorboard/events.out.tfevents.<part>, one part for each start of the run.

    A part begins with a mark from which on readers forget the steps that earlier parts have. They take parts by name:
    numbers, as TensorBoard's own names begin with the second, by which two starts may stand in the wrong order.
    Nothing stays open or unwritten between two steps.
    """

    package = "tensorboard"

    def __init__(self, folder: Path, config: TrainConfig, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        place = folder / "tensorboard"
        place.mkdir(exist_ok=True)
        taken = [name for path in place.iterdir() if (name := path.name.removeprefix(EVENTS)).isdigit()]
        self.place, self.shown = str(place), step
        self._path = place / f"{EVENTS}{1 + max(map(int, taken), default=-1):06d}"
        self._write(file_version="brain.Event:2")
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._write(step=step, summary=Summary(value=values))

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        """They stand one step behind the last, so that a run that is measured again shows them once, too."""
        self.step(step + 1, figures)

    def close(self, well: bool) -> None:
        pass

    def _write(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        with self._path.open("ab") as file:
            RecordWriter(file).write(Event(wall_time=time.time(), **event).SerializeToString())


class WandB(Tracker):
    """A W&B run of the folder's name, whose id stays in the folder: wandb.json {id, step}.

    W&B takes steps in rising order, and the first figures of a step stay. A run that was killed takes the steps behind
    its last checkpoint again, to the same bits on the CPU: of those, W&B gets what its server does not have. Offline
    there is none to ask, so wandb.json keeps the last step: `wandb sync` would give steps that come twice new numbers
    behind the last. What W&B had not yet written when it was killed offline is missing there (all seen in wandb 0.31).
    """

    package = "wandb"

    @classmethod
    def require(cls, config: LogConfig) -> None:
        super().require(config)
        import wandb

        if tuple(map(int, wandb.__version__.split(".")[:2])) < OLDEST:
            raise ConfigError("this wandb is too old", wandb.__version__, "pip install --upgrade 'granary-sae[wandb]'")
        try:
            settings = wandb.setup().settings
            if settings.mode in ("online", "run", "shared") and not settings.api_key:
                wandb.login(verify=False)  # at a terminal it asks for a key: now, not behind an hour of preparation
        except wandb.Error as error:
            way_out = f"Run wandb login, or set WANDB_API_KEY or WANDB_MODE=offline ({error})"
            raise ConfigError("W&B cannot be used here", config.wandb, way_out) from None

    def __init__(self, folder: Path, config: TrainConfig, step: int) -> None:
        import wandb

        self._file = folder / "wandb.json"
        fresh = {"id": uuid.uuid4().hex[:12], "step": 0}
        kept: dict[str, Any] = files.read_json(self._file) if self._file.exists() else fresh
        self._id = kept["id"]
        self._keep(kept["step"])
        flush = {FLUSH: 0.1} if FLUSH in wandb.Settings.model_fields else {}  # 15 s, or when 32 KiB have come together
        self._run = wandb.init(
            project=config.log.wandb, id=self._id, name=folder.resolve().name, dir=str(folder),
            config=config.model_dump(mode="json"), resume="allow",
            reinit="create_new",  # other runs of this process stay as they are
            settings=wandb.Settings(
                console="off", silent=True, finish_timeout=FINISH_S, finish_timeout_raises=True, **flush
            ),
        )  # fmt: skip
        self.shown = kept["step"] if self._run.offline else self._run.starting_step - 1
        self.place = f"{folder / 'wandb'} (offline; wandb sync sends it)" if self._run.offline else self._run.url or ""

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        if step <= self.shown:
            return
        self._keep(step)
        self._run.log(dict(figures), step=step, commit=True)  # or the last ones wait for the next step

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.summary.update(dict(figures))

    def close(self, well: bool) -> None:
        self._run.finish(exit_code=0 if well else 1)

    def _keep(self, step: int) -> None:
        files.write_json(self._file, {"id": self._id, "step": step})


class Trackers:
    """What a run is shown in. Without any, or before they are opened, all of this does nothing."""

    def __init__(self, folder: Path, config: TrainConfig, log: Log) -> None:
        self._folder, self._config, self._log = folder, config, log
        self._open: dict[type[Tracker], Tracker] = {}

    @contextmanager
    def opened(self, step: int) -> Iterator[None]:
        """Show what comes inside, from behind `step` on. They are closed whatever ends it."""
        well = False
        try:
            for kind in asked(self._config.log):
                with self._without(kind, step):
                    self._begin(kind, step)
            yield
            well = True
        finally:
            self._close(well)

    def _begin(self, kind: type[Tracker], step: int) -> None:
        """Open a tracker, and show it what it has missed of metrics.jsonl."""
        self._open[kind] = tracker = kind(self._folder, self._config, step)
        self._log.event("tracker", f"{kind.__name__}: {tracker.place}", tracker=kind.package)
        for missed, figures in logged(self._folder / report.METRICS):
            if missed > tracker.shown:
                tracker.step(missed, figures)

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of a step that is logged."""
        for kind, tracker in list(self._open.items()):
            with self._without(kind, step):
                tracker.step(step, figures)

    def finish(self, step: int, measured: Mapping[str, Any]) -> None:
        """The figures that train.measure found, behind the last step."""
        for kind, tracker in list(self._open.items()):
            with self._without(kind, step):
                tracker.finish(step, final(measured))

    def _close(self, well: bool) -> None:
        for kind, tracker in list(self._open.items()):
            with self._without(kind):
                tracker.close(well)
        self._open.clear()

    @contextmanager
    def _without(self, kind: type[Tracker], step: int | None = None) -> Iterator[None]:
        """Go on without a tracker that fails inside."""
        try:
            yield
        except Exception as error:
            if not kind.causes(error):
                raise
            self._open.pop(kind, None)
            what = f"{kind.__name__} fails and gets no more of this run; metrics.jsonl has every figure"
            told = {} if step is None else {"step": step}
            self._log.event("tracker_failed", f"{what} ({error!r})", tracker=kind.package, **told)


def asked(config: LogConfig) -> list[type[Tracker]]:
    """The kinds of trackers that a config names."""
    return [*([TensorBoard] if config.tensorboard else []), *([WandB] if config.wandb else [])]


def require(config: LogConfig) -> None:
    """Before any work. Raises ConfigError where a tracker that is asked for cannot be used here."""
    for kind in asked(config):
        kind.require(config)


def logged(metrics: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The steps of a metrics.jsonl and their figures."""
    for line in metrics.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event.pop("event") == "step":
            event.pop("time")
            yield event.pop("step"), event


def final(measured: Mapping[str, Any]) -> dict[str, float]:
    """measure/l0, measure/dead, measure/dense, by source measure/fve/<source> and so on; what is none is left out."""
    whole = {f"measure/{name}": measured[name] for name in ("l0", "dead", "dense")}
    for source, figures in measured["sources"].items():
        whole |= {f"measure/{name}/{source}": value for name, value in figures.items()}
    return {name: value for name, value in whole.items() if value is not None}


def watched(project: str, entity: str, group: str | None, told: Mapping[str, Any]) -> Any:
    """A run of W&B for a loop that logs by itself. Raises ConfigError where it is not installed."""
    WandB.require(LogConfig())
    import wandb

    name = told.get("wandb_name")
    keys = {"project": project or None, "entity": entity or None, "group": group, "name": name}
    return wandb.init(**keys, config=dict(told), reinit="create_new")

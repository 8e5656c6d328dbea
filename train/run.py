"""A run in its folder: what is claimed, written down, kept and found again when it goes on.

config.toml  store.json  metrics.jsonl  checkpoints/  dictionary/  measure.json  report.html
and, where they are asked for (train.trackers), tensorboard/  wandb/  wandb.json

A sweep's folder has sweep.json, which names its runs, and a folder for each.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared import config as configs
from shared import files
from shared.device import memory_minded
from shared.errors import CheckpointError, ConfigError, DivergenceError, StoreError, TrainingError
from shared.log import Log
from shared.mixture import open_mixture
from shared.view import View
from train import checkpoint, parallel, report
from train.config import TrainConfig
from train.order import Order
from train.resample import resample
from train.sources import Sources
from train.trackers import Trackers
from train.trainer import Trainer

CHECKPOINTS, SWEEP = "checkpoints", "sweep.json"


def require_free(folder: str | Path | None) -> None:
    """Before any work, what `claim` would refuse after it."""
    if folder is not None and any((Path(folder) / name).exists() for name in (report.CONFIG, SWEEP)):
        raise _taken(folder)
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise CheckpointError("this is a file", folder, "Give a folder (--out)")
    if folder is not None and Path(folder).exists() and any(Path(folder).iterdir()):
        raise CheckpointError("this folder is in use and holds no run", folder, "Give another folder (--out)")


def claim(folder: str | Path | None, config: TrainConfig) -> Path:
    """The run's folder with its config.toml, which one run alone can make; none: a new one below runs/."""
    name = f"{config.wiring.kind}-{config.method.name}-{config.wiring.latents}"
    path = _new(name) if folder is None else Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    try:
        with (path / report.CONFIG).open("x", encoding="utf-8") as file:
            file.write(configs.to_toml(config))
    except FileExistsError:
        raise _taken(path) from None
    return path


def claim_sweep(folder: str | Path | None, names: Sequence[str]) -> Path:
    """The folder of several runs, with the names of theirs; none: a new one below runs/."""
    path = _new("sweep") if folder is None else Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    files.write_json(path / SWEEP, {"runs": list(names)})
    return path


def _new(name: str) -> Path:
    """A folder below runs/ that this call has made."""
    numbered = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
    for path in numbered:
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError


def _taken(folder: str | Path) -> CheckpointError:
    what = "a sweep" if (Path(folder) / SWEEP).exists() else "a run"
    way_out = f"Give another folder (--out), or: train resume {folder}"
    return CheckpointError(f"this folder holds {what} already", folder, way_out)


def begin(folder: Path, store: View, sources: list[str]) -> None:
    """Write down what a run is trained on, so that it can go on from here."""
    files.write_json(folder / report.STORE, origin(store, sources))


def folders_of(place: Path) -> list[Path]:
    """The runs of a sweep, or the run that stands there. Raises CheckpointError where there is neither."""
    if (place / report.CONFIG).exists():
        return [place]
    if not (place / SWEEP).exists():
        raise CheckpointError("no run here", place, "Give the folder of a run, or of a sweep")
    runs = [place / name for name in files.read_json(place / SWEEP)["runs"]]
    if not all((run / report.STORE).exists() for run in runs):
        raise CheckpointError("this sweep was stopped before it began", place, "Remove the folder, and run it again")
    return runs


def config_of(folder: Path) -> TrainConfig:
    """What a run was told. Raises CheckpointError where there is none, or one that had not begun."""
    try:
        asked = configs.parse(TrainConfig, configs.read_toml(folder / report.CONFIG))
    except ConfigError as error:
        raise CheckpointError("no run here", folder, f"Give the folder of a run ({error})") from None
    if not (folder / report.STORE).exists():
        raise CheckpointError("this run was stopped before it began", folder, "Remove the folder, and run it again")
    return asked


def store_of(folder: Path, store: View | None = None) -> View:
    """The store that a run began on, where it was or as it is given. Raises StoreError where it is another one,
    CheckpointError where there was none."""
    began = files.read_json(folder / report.STORE)
    if not began["paths"]:
        way_out = "Train it again; from Python, train.measure.Measure takes further batches"
        raise CheckpointError("this run read no store, but batches that were made for it", folder, way_out)
    opened = store or _where_it_was(began["paths"])
    if (opened.header.id, opened.seals) != (began["id"], began.get("seals")):
        way_out = f"Give the store whose id begins with {began['id'][:12]}, as it was"
        if len(began["paths"]) > 1:
            way_out = f"Give these as they were, in this order: {', '.join(began['paths'])}"
        raise StoreError("this is not the store that the run began on", opened.place, way_out)
    return opened


def begin_without_store(folder: Path, widths: Mapping[str, int]) -> None:
    """Write down that a run is trained on batches that were made as they were needed."""
    sources = {name: {"model": "-", "site": "-", "width": width} for name, width in widths.items()}
    files.write_json(folder / report.STORE, {"id": "", "paths": [], "rows": 0, "sources": sources})


def _where_it_was(paths: list[str]) -> View:
    if gone := [path for path in paths if not Path(path).exists()]:
        raise StoreError("the store of this run is not where it was", gone[0], "Say where it lies now: --store")
    return open_mixture(paths)


def finished(folder: Path) -> bool:
    return (folder / report.PAGE).exists()


def ended(folder: Path, log: Path) -> TrainingError:
    """Why a run that another process trained is not finished: its own last word, or that it had none."""
    with suppress(OSError, ValueError, IndexError, KeyError):  # a process that was killed may leave half a line
        last = json.loads((folder / report.METRICS).read_text(encoding="utf-8").splitlines()[-1])
        return TrainingError("the run failed", last["error"], f"See {log}")
    return TrainingError("the run was broken off", folder, f"See {log}")


def kept_step(folder: Path) -> int:
    """The step of the last checkpoint; 0 where there is none."""
    found = checkpoint.steps(folder / CHECKPOINTS)
    return int(found[-1].name.removeprefix("step_")) if found else 0


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """One process at a time trains in a folder (under torchrun the first rank). Raises CheckpointError in another."""
    if parallel.rank():
        yield
        return
    with (folder / report.CONFIG).open("rb") as file:  # whose lock the system lets go when its holder ends
        if not files.locked(file):
            raise CheckpointError("another process trains this run", folder, "Wait for it, or stop it")
        yield


def origin(store: View, sources: list[str]) -> dict[str, Any]:
    """What a run is trained on: the store's id, places and seals, and per source its model and site."""
    paths = [str(one.path.absolute()) for one in store.stores]
    ids = {"id": store.header.id, "members": store.members, "seals": store.seals}
    return {**ids, "paths": paths, "rows": store.rows, "sources": Sources(store, sources).described()}


class Training:
    """A run while it goes on: its trainer, and when it logs and keeps what it has."""

    def __init__(
        self, folder: Path, config: TrainConfig, trainer: Trainer, store: View, order: Order, log: Log
    ) -> None:
        self.folder, self.config, self.trainer, self.order, self.log = folder, config, trainer, order, log
        self.trackers = Trackers(folder, config, log)
        self.store = store
        told = config.model_dump(mode="json", exclude={"read"})  # which changes no bit of what comes out
        self._identity = {"store": store.header.id, "seals": store.seals, "config": told}
        self.ranks = parallel.ranks()  # that trained it until now
        self._kept = -1  # the step of the last checkpoint
        self._record: Mapping[str, Tensor] = {}  # of the last update
        self._way = ""  # in which updates are computed, as it was last told

    @property
    def finished(self) -> bool:
        return self.trainer.step >= self.config.steps

    def resume(self) -> None:
        """Go back to the last checkpoint, if there is one, and let the log end there. Raises CheckpointError."""
        if found := checkpoint.steps(self.folder / CHECKPOINTS):
            self.ranks = checkpoint.load(self.trainer, found[-1], self._identity)
        self._kept = self.trainer.step if found else -1
        if parallel.rank() == 0:
            files.sweep(self.folder)
            kept = _cut(self.folder / report.METRICS, self.trainer.step)
            self._way = next((event["way"] for event in reversed(kept) if event["event"] == "way"), "")

    def update(self, x: Mapping[str, Tensor], **told: Any) -> dict[str, float] | None:
        """One step on raw rows. The figures that were logged, or none. Raises TrainingError."""
        with memory_minded(f"at step {self.trainer.step}"):
            if self.trainer.step in self.config.resample.steps:
                self._resample()
            self._record = self.trainer.update(x)
        step, every = self.trainer.step, self.config.log
        logs, saves = (self.finished or step % n == 0 for n in (every.every, every.checkpoint))
        if not (logs or saves):
            return None
        values = finite(self._record, step)
        if logs:
            self._way = self.trainer.tell_way(self.log, self._way)
            self.log.event("step", step=step, **values, **told)
            self.trackers.step(step, values | told)
        if saves:
            self.keep()
        return values if logs else None

    def _resample(self) -> None:
        """Before the step, so that a run that goes on from a checkpoint of it does the same."""
        counts = resample(self.trainer, self.store, self.order)
        told = ", ".join(f"{count} of {span}" for span, count in counts.items() if count) or "no latent is dead"
        self.log.event("resample", f"resampled {self.folder}: {told}", step=self.trainer.step + 1, latents=counts)

    def keep(self) -> None:
        """Write a checkpoint, if there is none of this step.

        Raises TrainingError where the store has changed, DivergenceError where the weights are not finite.
        """
        step = self.trainer.step
        if self._kept == step:
            return
        seals = None
        with suppress(OSError):  # a store that is being repaired has none
            seals = self.store.seals
        if seals != self._identity["seals"]:
            way_out = "Its last checkpoint is of the store as it was: harvest verify tells what the store is now"
            raise TrainingError("the store has changed under this run", self.store.place, way_out)
        if self._record:
            finite(self._record, step)
        finite_P = torch.stack([weights.isfinite().all() for weights in self.trainer.parameters])
        if not parallel.least(finite_P.float()).all():
            raise DivergenceError("the weights are not finite", f"after step {step}", "Lower optimiser.lr")
        checkpoint.save(self.trainer, self.folder / CHECKPOINTS, self._identity, self.config.log.keep)
        self._kept = step


def _cut(metrics: Path, step: int) -> list[dict[str, Any]]:
    """Leave out of a log what a run that goes on from `step` will write again, and a line that was torn.

    Returns the events that stay.
    """
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        with suppress(ValueError):
            event = json.loads(line)
            if event["event"] not in ("measure", "stop") and event.get("step", 0) <= step:
                kept.append((line, event))
    files.write_atomic(metrics, "".join(line + "\n" for line, _ in kept).encode())
    return [event for _, event in kept]


def finite(record: Mapping[str, Tensor], step: int) -> dict[str, float]:
    """The figures of a step as numbers, but those that have none: a batch of equal rows has no FVE.

    Weights behind a loss or gradient that is not finite are not worth keeping.
    """
    values = {name: float(value) for name, value in record.items()}
    for name in ("loss", "gradient"):
        if not math.isfinite(values[name]):
            raise DivergenceError(f"the {name} is not finite", f"{values[name]} at step {step}", "Lower optimiser.lr")
    return {name: value for name, value in values.items() if math.isfinite(value)}

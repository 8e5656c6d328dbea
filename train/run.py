"""A run in its folder: what is claimed, written down, kept and found again when it goes on.

config.toml  store.json  metrics.jsonl  checkpoints/  dictionary/  measure.json  report.html
and, where they are asked for (train.trackers), tensorboard/  wandb/  wandb.json
"""

import fcntl
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from shared import config as configs
from shared import files
from shared.errors import CheckpointError, TrainingError
from shared.log import Log
from shared.view import View
from train import checkpoint, report
from train.config import TrainConfig
from train.trackers import Trackers
from train.trainer import Trainer

CHECKPOINTS = "checkpoints"


def require_free(folder: str | Path | None) -> None:
    """Before any work, what `claim` would refuse after it."""
    if folder is not None and (Path(folder) / report.CONFIG).exists():
        raise _taken(folder)
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise CheckpointError("this is a file", folder, "Give a folder (--out)")
    if folder is not None and Path(folder).exists() and any(Path(folder).iterdir()):
        raise CheckpointError("this folder is in use and holds no run", folder, "Give another folder (--out)")


def claim(folder: str | Path | None, config: TrainConfig) -> Path:
    """The run's folder with its config.toml, which one run alone can make."""
    name = f"{config.wiring.kind}-{config.method.name}-{config.wiring.latents}"
    numbered = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
    for path in [Path(folder)] if folder is not None else numbered:
        with suppress(FileExistsError):
            path.mkdir(parents=True, exist_ok=folder is not None)
            with (path / report.CONFIG).open("x", encoding="utf-8") as file:
                file.write(configs.to_toml(config))
            return path
    raise _taken(str(folder))


def _taken(folder: str | Path) -> CheckpointError:
    return CheckpointError(
        "this folder holds a run already", folder, f"Give another folder (--out), or: train resume {folder}"
    )


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """One process at a time trains in a folder. Raises CheckpointError in another."""
    with (folder / report.CONFIG).open("rb") as file:  # whose lock the system lets go when its holder ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError("another process trains this run", folder, "Wait for it, or stop it") from None
        yield


def origin(store: View, sources: list[str]) -> dict[str, Any]:
    """What a run is trained on: the store's id, place and seals, and per source its model and site."""
    found = [store.source(name) for name in sources]
    places = {
        one.name: {"model": store.header.models[one.model].path, "site": one.site, "width": one.width} for one in found
    }
    path = str(store.path.absolute())
    ids = {"id": store.header.id, "members": store.members, "seals": store.seals}
    return {**ids, "path": path, "rows": store.rows, "sources": places}


class Training:
    """A run while it goes on: its trainer, and when it logs and keeps what it has."""

    def __init__(self, folder: Path, config: TrainConfig, trainer: Trainer, store: View, log: Log) -> None:
        self.folder, self.config, self.trainer, self.log = folder, config, trainer, log
        self.trackers = Trackers(folder, config, log)
        self._store = store
        self._identity = {"store": store.header.id, "seals": store.seals, "config": config.model_dump(mode="json")}
        self._kept = -1  # the step of the last checkpoint

    @property
    def finished(self) -> bool:
        return self.trainer.step >= self.config.steps

    def resume(self) -> None:
        """Go back to the last checkpoint, if there is one, and let the log end there. Raises CheckpointError."""
        if found := checkpoint.steps(self.folder / CHECKPOINTS):
            checkpoint.load(self.trainer, found[-1], self._identity)
        self._kept = self.trainer.step if found else -1
        files.sweep(self.folder)
        _cut(self.folder / report.METRICS, self.trainer.step)

    def update(self, x: Mapping[str, Tensor], **told: Any) -> dict[str, float] | None:
        """One step on raw rows. The figures that were logged, or none. Raises TrainingError."""
        record = self.trainer.update(x)
        step, every = self.trainer.step, self.config.log
        logs, saves = (self.finished or step % n == 0 for n in (every.every, every.checkpoint))
        if not (logs or saves):
            return None
        values = _finite(record, step)
        if logs:
            self.log.event("step", step=step, **values, **told)
            self.trackers.step(step, values | told)
        if saves:
            self.keep()
        return values if logs else None

    def keep(self) -> None:
        """Write a checkpoint, if there is none of this step. Raises TrainingError where the store has changed."""
        if self._kept == self.trainer.step:
            return
        if self._store.seals != self._identity["seals"]:
            way_out = "Its last checkpoint is of the store as it was: harvest verify tells what the store is now"
            raise TrainingError("the store has changed under this run", self._store.path, way_out)
        checkpoint.save(self.trainer, self.folder / CHECKPOINTS, self._identity, self.config.log.keep)
        self._kept = self.trainer.step


def _cut(metrics: Path, step: int) -> None:
    """Leave out of a log what a run that goes on from `step` will write again, and a line that was torn."""
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        with suppress(ValueError):
            event = json.loads(line)
            if event["event"] not in ("measure", "stop") and event.get("step", 0) <= step:
                kept.append(line + "\n")
    files.write_atomic(metrics, "".join(kept).encode())


def _finite(record: Mapping[str, Tensor], step: int) -> dict[str, float]:
    """The figures of a step as numbers. Weights behind a loss or gradient that is not finite are not worth keeping."""
    values = {name: float(value) for name, value in record.items()}
    for name in ("loss", "gradient"):
        if not math.isfinite(values[name]):
            raise TrainingError(f"the {name} is not finite", f"{values[name]} at step {step}", "Lower optimiser.lr")
    return values

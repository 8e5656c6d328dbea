"""Runs from store to report, from their beginning or their last checkpoint, one by one or as many as fit at once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shared import config as configs
from shared import files
from shared.errors import ConfigError, GranaryError
from shared.log import Log
from shared.mixture import Place, open_mixture
from shared.view import View
from train import parallel, plan, prepare, report, run, spread, stream, together
from train.config import TrainConfig
from train.dictionary import Dictionary
from train.prepare import Ready
from train.sweep import TABLE, Asked, expand
from train.together import Member

Config = TrainConfig | Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its figures (train.measure), and the trained dictionary."""

    folder: Path
    figures: dict[str, Any] = field(repr=False)
    device: str = "cpu"

    @cached_property
    def dictionary(self) -> Dictionary:
        """In evaluation mode, on the device that it was trained on; read when it is first asked for."""
        return Dictionary.load(self.folder, self.device)


@dataclass(frozen=True)
class Sweep:
    """What became of the runs of a sweep: those that are finished, and what ended the others."""

    folder: Path
    runs: list[Run]
    failed: dict[Path, GranaryError]


def fit(
    store: Place | Sequence[Place] | Iterable[stream.Rows], config: Config, folder: str | Path | None = None,
    quiet: bool = False,
) -> Run:  # fmt: skip
    """Train one dictionary on a store, or on several as one (shared.mixture), open or by their paths; or on batches
    {source: float32 [batch, width]} of an iterator, or what gives one, without a store (train.stream).

    `config` is a TrainConfig or its tables as a mapping.

    The folder (none: a new one below runs/) gets config.toml, store.json, metrics.jsonl, checkpoints/, dictionary/,
    measure.json, report.html and what the trackers of `log` write. Batches of an iterator are taken as they are
    (scale.kind none), measured on those that follow, and not to be had again: such a run keeps no checkpoints and
    cannot go on. Raises ConfigError, WiringError, StoreError, TrainingError, CheckpointError, or RowsError for batches
    that do not fit.
    """
    asked = _parsed(config)
    if isinstance(store, Iterable) and not isinstance(store, str | Sequence):
        return _result(stream.train(iter(store), asked, folder, quiet))
    if isinstance(store, Sequence) and any(isinstance(one, Mapping) for one in store):
        raise ConfigError(
            "these are batches, and no stores", f"a list of {len(store)}", "Give their iterator: iter(...)"
        )
    opened = open_mixture(store)
    parallel.first(lambda: run.require_free(folder))
    with parallel.over(asked.parallel):
        [ready] = prepare.ready(opened, [asked])
        plan.require_memory(ready)
        path = parallel.first(lambda: _claimed(folder, opened, ready))
        return _alone(opened, Member(path, ready), quiet)


def sweep(
    store: Place | Sequence[Place], config: Mapping[str, Any] | Sequence[Config], folder: str | Path | None = None,
    quiet: bool = False, memory: int | None = None, gpus: Sequence[int] | None = None,
) -> Sweep:  # fmt: skip
    """Train several dictionaries on a store: the runs that `config` names in its table `sweep`, or a list of configs.

    Runs that serve the same batches are trained at once on one loader, to the bits that they would have had alone, as
    long as they fit into `memory` bytes (none: 0.9 of what is free); the others in further passes. A run that fails
    ends alone. With `gpus` (their numbers; an empty list: all) each has a process that trains its share of the runs.
    The folder (none: a new one below runs/) gets the folder of every run, as `fit` writes it.
    Raises ConfigError, WiringError or StoreError before anything is written.
    """
    asked, opened = _asked(config), open_mixture(store)
    parallel.first(lambda: run.require_free(folder))
    configs_asked = [one.config for one in asked]
    devices = None if gpus is None else spread.devices(gpus, configs_asked)
    with parallel.over(_over(configs_asked)):
        return _swept(opened, asked, folder, quiet, memory, devices)


def _over(asked: Sequence[TrainConfig]) -> parallel.Over:
    """What the ranks share in all of these runs. Raises ConfigError where they differ."""
    found = list(dict.fromkeys(one.parallel for one in asked))
    if len(found) > 1:
        raise ConfigError("runs of a sweep differ in what ranks share", ", ".join(found), "Give all one parallel")
    return found[0]


def _swept(
    opened: View, asked: Sequence[Asked], folder: str | Path | None, quiet: bool, memory: int | None,
    devices: Sequence[str] | None,
) -> Sweep:  # fmt: skip
    ready = prepare.ready(opened, [one.config for one in asked])
    # Without `memory` each GPU's process plans by what is free there.
    planned = devices is None or memory is not None
    passes = _passes(ready, [0] * len(ready), memory, quiet or devices is not None) if planned else []
    place = parallel.first(lambda: run.claim_sweep(folder, [one.name for one in asked]))
    places = [place / one.name for one in asked]
    folders = parallel.first(lambda: [_claimed(path, opened, one) for path, one in zip(places, ready, strict=True)])
    if devices is not None:
        return _spread(opened, ready, folders, devices, folders, place, quiet, memory)
    members = [Member(path, one) for path, one in zip(folders, ready, strict=True)]
    return _together(opened, [[members[n] for n in one] for one in passes], folders, place, quiet)


def resume(folder: str | Path, store: Place | Sequence[Place] | None = None, quiet: bool = False) -> Run:
    """Go on with a run from its last checkpoint, to the bits that it would have had without a break.

    `store` (none: where it was) must be the one that the run began on. A finished run is returned as it is. Raises
    CheckpointError, StoreError or TrainingError.
    """
    path = Path(folder)
    asked = run.config_of(path)
    if run.finished(path):
        Log(quiet=quiet).event("finished", f"{path} is finished already")
        return _result(path)
    opened = run.store_of(path, None if store is None else open_mixture(store))
    with parallel.over(asked.parallel):
        [ready] = prepare.ready(opened, [asked])
        return _alone(opened, Member(path, ready, goes_on=True), quiet)


def resume_sweep(
    places: str | Path | Sequence[str | Path], store: Place | Sequence[Place] | None = None, quiet: bool = False,
    memory: int | None = None, gpus: Sequence[int] | None = None,
) -> Sweep:  # fmt: skip
    """Go on with the runs of a sweep, or with several runs, as `resume` does with one.

    Those that failed begin at their last checkpoint. `memory` and `gpus` are those of `sweep`.
    """
    given = [Path(one) for one in ([places] if isinstance(places, str | Path) else places)]
    folders = list(dict.fromkeys(path for one in given for path in run.folders_of(one)))
    left = [path for path in folders if not run.finished(path)]
    if not left:
        Log(quiet=quiet).event("finished", f"{given[0]} is finished already")
        return _results(given[0], folders, {})
    asked = [run.config_of(path) for path in left]
    opened = run.store_of(left[0], None if store is None else open_mixture(store))
    for path in left[1:]:
        run.store_of(path, opened)
    devices = None if gpus is None else spread.devices(gpus, asked)
    with parallel.over(_over(asked)):
        ready = prepare.ready(opened, asked)
        if devices is not None:
            return _spread(opened, ready, left, devices, folders, given[0], quiet, memory)
        passes = _passes(ready, [run.kept_step(path) for path in left], memory, quiet)
        members = [Member(path, one, goes_on=True) for path, one in zip(left, ready, strict=True)]
        return _together(opened, [[members[n] for n in one] for one in passes], folders, given[0], quiet)


def _spread(
    store: View, ready: Sequence[Ready], left: Sequence[Path], devices: Sequence[str], folders: Sequence[Path],
    place: Path, quiet: bool, memory: int | None,
) -> Sweep:  # fmt: skip
    """Runs over GPUs, each in the process of its device."""
    parts = spread.shares(ready, len(devices))
    logs = [place / f"gpu-{name}.log" for name in devices[: len(parts)]]
    with Log(quiet=quiet) as console:
        for part, log in zip(parts, logs, strict=True):
            console.event("spread", f"{len(part)} runs, told in {log}: {', '.join(left[n].name for n in part)}")
    environments = [{"CUDA_VISIBLE_DEVICES": name} for name in devices[: len(parts)]]
    stores = [one.path for one in store.stores]
    spread.run([[left[n] for n in part] for part in parts], stores, environments, logs, memory)
    failed: dict[Path, GranaryError] = {}
    for part, log in zip(parts, logs, strict=True):
        failed |= {left[n]: run.ended(left[n], log) for n in part if not run.finished(left[n])}
    return _results(place, folders, failed)


def _claimed(folder: str | Path | None, store: View, ready: Ready) -> Path:
    """The run's folder, with all that it needs to go on."""
    path = run.claim(folder, ready.config)
    run.begin(path, store, ready.sources)
    return path


def _alone(store: View, member: Member, quiet: bool) -> Run:
    together.train(store, [member], member.folder, quiet)
    if member.error is not None:
        raise member.error
    return _result(member.folder)


def _together(
    store: View, passes: Sequence[Sequence[Member]], folders: Sequence[Path], place: Path, quiet: bool
) -> Sweep:
    for members in passes:
        together.train(store, members, place, quiet)
    errors = {one.folder: one.error for members in passes for one in members if one.error is not None}
    return _results(place, folders, errors)


def _results(place: Path, folders: Sequence[Path], failed: dict[Path, GranaryError]) -> Sweep:
    return Sweep(place, [_result(path) for path in folders if path not in failed], failed)


def _result(folder: Path) -> Run:
    return Run(folder, files.read_json(folder / report.MEASURE), run.config_of(folder).device)


def _passes(ready: Sequence[Ready], begun: Sequence[int], memory: int | None, quiet: bool) -> list[list[int]]:
    """Which runs are trained at once, and a line that says so."""
    found = plan.costs(ready)  # by all ranks, since their steps wait for each other
    passes = parallel.first(lambda: plan.passes(ready, found, begun, memory))
    why = plan.parted(ready, begun, passes)
    sizes = " + ".join(str(len(one)) for one in passes)
    told = f"{len(ready)} runs, {sizes} at once" + (f", since they differ in {why}" if why else "")
    Log(quiet=quiet or parallel.rank() > 0).event("passes", told)
    return passes


def _parsed(config: Config) -> TrainConfig:
    if isinstance(config, Mapping) and TABLE in config:
        raise ConfigError("this config stands for several runs", f"it has a table {TABLE}", "Use train.sweep")
    return configs.parse(TrainConfig, config) if isinstance(config, Mapping) else config


def _asked(config: Mapping[str, Any] | Sequence[Config]) -> list[Asked]:
    if isinstance(config, Mapping):
        return expand({TABLE: {}, **config})
    if not config:
        raise ConfigError("no run to train", "an empty list", "Give a config for each run")
    parsed = [_parsed(one) for one in config]
    digits = len(str(len(parsed) - 1))
    return [Asked(f"{n:0{digits}}-{one.method.name}", one) for n, one in enumerate(parsed)]

"""[sweep] of a config -> the configs of its runs.

grid: values of keys, every combination      runs: tables laid over the config, a run each

    [sweep.grid]                                 [[sweep.runs]]
    method.k = [32, 64]                          method = {name = "topk", k = 32}
    seed = [0, 1]                                wiring.sources = ["gemma"]

Both at once: every combination of the grid for every one of the runs.
"""

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shared import config
from shared.errors import ConfigError
from train import method as methods
from train.config import SweepConfig, TrainConfig

TABLE = "sweep"
VALUES = frozenset(config.keys_of(TrainConfig))  # the keys that hold a value, of methods their names alone
LONGEST = 100  # characters of a run's name: file systems take 255 bytes


@dataclass(frozen=True)
class Asked:
    """One run: a name that tells it from the others, and its config."""

    name: str
    config: TrainConfig


def expand(data: Mapping[str, Any]) -> list[Asked]:
    """The runs of a config with or without a table `sweep`, the last key of the grid turning fastest.

    Raises ConfigError.
    """
    base = {key: value for key, value in data.items() if key != TABLE}
    sweep = config.parse(SweepConfig, data.get(TABLE, {}), f"{TABLE}.")
    grid = dict(_values(sweep.grid))
    entries = [dict(_leaves(entry)) for entry in sweep.runs] or [{}]
    if both := sorted({*grid} & {key for entry in entries for key in entry}):
        raise ConfigError("a key stands in sweep.grid and in sweep.runs", ", ".join(both), "Leave it in one of them")
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    changes = [entry | one for entry in entries for one in combinations]
    runs = [Asked(_name(n, one, len(changes)), _laid_over(base, one)) for n, one in enumerate(changes)]
    _require_different(runs)
    return runs


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested tables, whose keys may have dots themselves. Some values are tables, too."""
    for key, value in table.items():
        if isinstance(value, Mapping) and prefix + key not in VALUES:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield "method.name" if prefix + key == "method" else prefix + key, value


def _values(grid: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    for key, values in _leaves(grid):
        if not isinstance(values, list) or not values:
            raise ConfigError(f"wrong value for {TABLE}.grid.{key}", repr(values), "Give a list of values, such as [1]")
        yield key, values


def _laid_over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> TrainConfig:
    """The config with these keys changed. Another method keeps those of the first one's keys that it knows itself."""
    data = copy.deepcopy(dict(base))
    if isinstance(data.get("method"), str):
        data["method"] = {"name": data["method"]}
    if changes.get("method.name", own := data.get("method", {}).get("name")) != own and own is not None:
        known = methods.find(changes["method.name"]).model_fields
        data["method"] = {key: value for key, value in data["method"].items() if key in known}
    for key, value in changes.items():
        config.put(data, key, value)
    return config.parse(TrainConfig, data)


def _name(number: int, changes: Mapping[str, Any], runs: int) -> str:
    """Such as 03-topk-k=32: the number makes it the only one. `run` where there is no other."""
    if not changes:
        return "run"
    told = [str(v) if k == "method.name" else f"{k.rpartition('.')[2]}={_short(v)}" for k, v in changes.items()]
    digits = len(str(runs - 1))
    return re.sub(r"[^\w.=+-]+", "_", "-".join([f"{number:0{digits}}", *told]))[:LONGEST]


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _require_different(runs: list[Asked]) -> None:
    seen: dict[str, str] = {}
    for one in runs:
        same = seen.setdefault(config.canonical(one.config.model_dump(mode="json")), one.name)
        if same != one.name:
            raise ConfigError("two runs of the sweep are the same", f"{same} and {one.name}", "Leave one out")

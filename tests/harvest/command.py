"""The harvest command as tests type it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from shared.store import Store
from tests.harvest.pair import config


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Harvest = Callable[..., Done]


def write_config(home: Path, folder: Path, **tables: Any) -> Path:
    file = folder / "pair.toml"
    made = config(home, folder / "pair.zarr", rows={"context": 24, "count": 120}).model_dump(exclude_none=True)
    for name, values in tables.items():
        made[name] = {**made[name], **values}
    file.write_text(tomli_w.dumps(made))
    return file


def config_of(pair: Store) -> Path:
    return pair.path.with_suffix(".toml")


def assert_one_line(done: Done, code: int, told: str) -> None:
    assert done.err.startswith(told), done.err
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    assert done.out == ""
    assert done.code == code

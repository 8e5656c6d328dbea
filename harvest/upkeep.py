"""The commands that look after stores: status | ls | verify | repair | pack | push | pull | import | inspect."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from harvest import adopt as adopting
from harvest import bench, check, destination, lock, overview, work
from harvest import inspect as view
from harvest import pack as packing
from harvest import push as pushing
from harvest.config import RowsConfig, StoreConfig
from harvest.console import Json, Settings, config_of, resumable, show
from harvest.job import prepare
from shared import codec as codecs
from shared import config as configs
from shared import models, remote, staging
from shared.errors import ConfigError
from shared.log import Log
from shared.store import Store

Again = Annotated[str | None, typer.Option("--device", help="cpu, cuda or auto; none: as the store was made.")]
AgainThreads = Annotated[int | None, typer.Option("--threads", help="Torch threads; none: as the store was made.")]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="The folder of a store, or its URL.")]
URLS = "Example: s3://bucket/pair.zarr, or hf://datasets/ORG/pair"
_SENT = {True: "the store is there", False: "the store was there already"}
Moved = Annotated[list[str] | None, typer.Option("--model", help="NAME=PATH: where a model of the store lies now.")]


def status(store: StoreArgument, as_json: Json = False) -> None:
    """How far a store is: units and rows made, faults of values, damage that was found, who is at work on it.

    Example: harvest status pair.zarr
    """
    found = _status_at(store) if remote.is_url(store) else overview.status(Path(store))
    if not as_json:
        found["units"] = {name: f"{made} of {all_}" for name, (made, all_) in found.get("units", {}).items()}
        for key in ("held_by", "damage"):
            found[key] = "; ".join(found.get(key, []))
        found["made_with"] = "; ".join(
            f"{one['device']}, {one['threads']} threads" for one in found.get("made_with", [])
        )
        found = {key: value for key, value in found.items() if value not in ("", [], {})}
    show(found, as_json)


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
    harvest repair has made the faulty shards again. (Not at a URL, where --full reads every object, and --deep needs a
    copy.)

    Example: harvest verify pair.zarr --full --deep 100
    """
    with Log(quiet=as_json) as log:
        if remote.is_url(store) and not deep:
            with staging.outlined(store) as (path, sizes):
                faults = check.files_of(Store.at(path), full, log, sizes, store)
        else:
            opened = Store.at(remote.local(store, f"--deep looks at the copy that harvest pull {store} makes"))
            faults = check.files_of(opened, full, log)
            if deep and not faults:
                faults = check.contents(opened, _bench(opened, model, device, threads, log), deep, seed, log)
            check.write_down(opened, faults, log)
    if as_json:
        print(json.dumps([{"file": f.file, "what": f.what, "unit": f.unit} for f in faults]))
    else:
        print("\n".join(map(str, faults)) if faults else f"{store}: sound ({_checked(full, deep)})")
    raise typer.Exit(1 if faults else 0)


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
    with Log() as log, _found(store) as (opened, to, sizes), resumable(to.path):
        if config_file is not None:
            place = str(remote.local(store, f"harvest pull {store} makes a copy, whose plan can be mended"))
            for name in work.mend_plan(
                opened, prepare(config_of(config_file, settings, place, device, threads), log), log
            ):
                log.event("repair", f"made again: {name}")
        units = check.to_mend(opened, check.files_of(opened, full, log, sizes, store if sizes is not None else None))
        if units or not opened.sealed or opened.condemned[0]:
            work.repair(opened, units, work.OneProcess(_bench(opened, model, device, threads, log), log), log, to)
    print(f"{store}: {len(units)} units made again")


def pull(
    url: Annotated[str, typer.Argument(help="The URL of a finished store.")],
    below: Annotated[str | None, typer.Option("--stage", help="Where copies lie; none: in the user's cache.")] = None,
) -> None:
    """Copy a finished store from a URL to this machine, as train run does too, and print its folder.

    Every checksum is checked. What lies there already is not fetched again. On the hub it is
    hf://datasets/ORG/NAME[@REVISION][/FOLDER].

    Example: harvest pull s3://bucket/pair.zarr
    """
    if not remote.is_url(url):
        raise ConfigError("this is no URL", url, URLS)
    print(staging.stage(url, below))


def push(
    store: Annotated[str, typer.Argument(metavar="STORE", help="The folder of a finished store.")],
    url: Annotated[str, typer.Argument(help="hf://datasets/ORG/NAME, or the URL of an object store.")],
    private: Annotated[
        bool, typer.Option("--private", help="Where a repository is made; else as its owner's are.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Send all files, those that seem to be there, too.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a finished store from this machine to a URL: a dataset repository of the hub, or an object store.

    Every checksum is checked first. A push that was stopped goes on: what is there, by its size, is not sent again. The
    URL holds a finished store when all of it has arrived, and not before. The token of the hub is HF_TOKEN, or that of
    hf auth login.

    Example: harvest push pair.zarr hf://datasets/ORG/pair --private
    """
    if not remote.is_url(url):
        raise ConfigError("this is no URL", url, URLS)
    opened = Store.open(remote.local(store, "Give the folder that is to be copied"))
    with Log(quiet=as_json) as log:
        sent = pushing.push(opened, url, private or None, log, again)
    print(json.dumps({"url": url, "id": opened.header.id, "sent": sent}) if as_json else f"{url}: {_SENT[sent]}")


def pack(
    store: StoreArgument,
    out: Annotated[Path, typer.Option("--out", metavar="PACKED", help="Where the packed store goes.")],
    codec: Annotated[str, typer.Option("--codec", help="zstd, blosc or pcodec.")] = "blosc",
    level: Annotated[int | None, typer.Option("--level", help="Of the codec; none: its own choice.")] = None,
    as_json: Json = False,
) -> None:
    """Write a finished store once more with its activations compressed, without loss. It is read like any other.

    Prints bytes, ratio and the speed of encoding and decoding, as measured. An unfinished pack is finished.

    Example: harvest pack pair.zarr --out cold.zarr --codec blosc
    """
    found = codecs.find(codec, level)
    with Log(quiet=as_json) as log, resumable(out):
        result = packing.pack(Store.open(store), out, found, log)
    print(json.dumps(result) if as_json else "\n".join(packing.lines(result)))


def import_(
    caches: Annotated[
        list[str], typer.Argument(metavar="SOURCE=FOLDER", help="A folder with a cache, and a name for its rows.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="STORE", help="Where the store goes.")],
    held_out: Annotated[float, typer.Option(min=0, max=0.99, help="Share of sequences that no run trains on.")] = 0.1,
    seed: Annotated[int, typer.Option(help="By which they are drawn.")] = 0,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    nonfinite: Annotated[str, typer.Option(help="fail, or mask: such rows are flagged and never served.")] = "fail",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make a store of caches, all of the same tokens: of dictionary_learning's ActivationCache (layer_13_out), and of
    SAELens' CacheActivationsRunner.

    Their tokens and sequences must have been kept; tokens are compared, and every row is looked at. A sequence counts
    as a document. What a store knows beside rows (models, special tokens, texts) it does not have: first rows of
    sequences are flagged. A call that was stopped is gone on with.

    Example: harvest import base=activations/gemma-2-2b/fineweb/layer_13_out
    chat=activations/gemma-2-2b-it/fineweb/layer_13_out --out pair.zarr
    """
    folders = {}
    for text in caches:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in folders:
            raise ConfigError("a cache is given as SOURCE=FOLDER, each name once", text, "Example: base=layer_13_out")
        folders[name] = adopting.find(Path(path).expanduser())
    told = {"path": str(out), "dtype": dtype, "nonfinite": nonfinite}
    asked, rows = configs.parse(StoreConfig, told), configs.parse(RowsConfig, {"held_out": held_out, "seed": seed})
    with Log(quiet=as_json) as log, resumable(out), lock.hold(out, lambda text: log.event("lock", text)):
        made = adopting.adopt(adopting.gathered(folders), asked, rows, log)
    sources = {name: f"{one.site}, width {one.width}" for name, one in made.header.sources.items()}
    kept = {key: made.header.plan[key] for key in ("rows", "documents", "documents_held_out", "shards", "dtype")}
    factors = {name: made.factor(name) for name in made.header.sources}
    show({"store": str(out), "id": made.header.id, "sources": sources, **kept, "scale_factor": factors}, as_json)


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


def _status_at(url: str) -> dict[str, Any]:
    with staging.outlined(url) as (path, _):
        return {**overview.status(path), "store": url}


@contextmanager
def _found(store: str) -> Iterator[tuple[Store, destination.Destination, dict[str, int] | None]]:
    """A store in whatever state it is, where it is, and the sizes of its files where these are at a URL."""
    if not remote.is_url(store):
        yield Store.at(Path(store)), destination.Folder(Path(store)), None
        return
    with staging.outlined(store) as (path, sizes):
        yield Store.at(path), destination.of(StoreConfig(path=store)), sizes


def _checked(full: bool, deep: int) -> str:
    what = "receipts, sizes and checksums" if full else "receipts and sizes; --full reads every file"
    return what + (f"; {deep} rows run again and decoded" if deep else "")

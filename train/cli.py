"""train run | plan | resume | measure | compare | methods | show, and those of train.exchange."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from shared import config as configs
from shared import files, remote, staging
from shared.errors import CheckpointError, ConfigError, StoreError, TrainingError, one_line
from shared.mixture import open_mixture
from shared.view import View
from train import compare as comparing
from train import crosscoder, exchange, parallel, report, trackers
from train import measure as measuring
from train import method as method_files
from train.config import LogConfig, ReadConfig, TrainConfig
from train.dictionary import Dictionary
from train.fit import Run, Sweep, fit, resume_sweep, sweep
from train.fit import resume as going_on
from train.outlook import outlook, text
from train.run import config_of, folders_of
from train.sources import Sources, in_brackets
from train.sweep import TABLE, expand

app = typer.Typer(
    help="Train dictionaries on a store: no model and no network are needed.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

RunFolder = Annotated[str, typer.Argument(help="The folder of a run, or its dictionary/.")]
Stage = Annotated[
    str | None, typer.Option("--stage", help="Where the copy of a store at a URL lies; none: in the user's cache.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Caches = Annotated[list[str], typer.Argument(help="A finished store, or several as one: folders or URLs.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file of the run, or of several in its table [sweep].")
]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any config key: --set method.k=64.")]
Grid = Annotated[
    list[str] | None,
    typer.Option("--grid", help="Several values of a key, a run each: --grid method.k=32,64. Grids multiply."),
]
MethodName = Annotated[str | None, typer.Option("--method", help="Method (method.name); train methods lists them.")]
WiringKind = Annotated[
    str | None, typer.Option("--wiring", help="autoencoder, transcoder, crosscoder or dedicated (wiring.kind).")
]
Latents = Annotated[int | None, typer.Option("--latents", help="Latents of the dictionary (wiring.latents).")]
SourceNames = Annotated[
    str | None,
    typer.Option("--sources", help='In order, with commas: gemma,smol or "base,chat - base" (wiring.sources).'),
]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimiser updates (steps).")]
Batch = Annotated[int | None, typer.Option("--batch", help="Rows of a batch (batch).")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the weights (seed).")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or auto (device).")]
Threads = Annotated[int | None, typer.Option("--threads", help="Torch threads on the CPU (threads).")]
Memory = Annotated[
    float | None, typer.Option("--memory", min=0, help="GB that runs may take at once; none: 0.9 of what is free.")
]
Gpus = Annotated[
    str | None, typer.Option("--gpus", help="Spread the runs of a sweep over these GPUs, a process each: 0,1 or all.")
]
Out = Annotated[
    str | None, typer.Option("--out", help="Folder of the run or of the sweep; none: a new one below runs/.")
]


def main() -> None:
    with one_line():
        app()


@app.command()
def run(
    caches: Caches, config_file: ConfigFile = None, settings: Settings = None, grid: Grid = None,
    method: MethodName = None, wiring: WiringKind = None, latents: Latents = None, sources: SourceNames = None,
    steps: Steps = None, batch: Batch = None, seed: Seed = None, device: Device = None, threads: Threads = None,
    memory: Memory = None, gpus: Gpus = None, out: Out = None, below: Stage = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Train a dictionary on a store (or several as one), measure it on held-out documents, and write a report. Or train
    several dictionaries at once.

    Example: train run pair.zarr --method batch_topk --wiring dedicated --latents 16384 --steps 5000 --set method.k=64
    """
    flags = _flags(method, wiring, latents, sources, steps, batch, seed, device, threads)
    asked = _asked(config_file, settings, grid, flags)
    folder = None if out is None else remote.local(out, "A run is written to a folder (--out)")
    for one in expand(asked):  # before a store at a URL is copied
        trackers.require(one.config.log)
    with parallel.joined(str(asked.get("device", "auto"))):
        store = _opened(caches, below, as_json)
        if TABLE in asked or gpus is not None:
            _tell_all(sweep(store, asked, folder, memory=_bytes(memory), gpus=_numbers(gpus)), caches, as_json)
        else:
            _tell(fit(store, asked, folder), caches, as_json)


@app.command()
def plan(
    caches: Caches, config_file: ConfigFile = None, settings: Settings = None, grid: Grid = None,
    method: MethodName = None, wiring: WiringKind = None, latents: Latents = None, sources: SourceNames = None,
    steps: Steps = None, batch: Batch = None, seed: Seed = None, device: Device = None, threads: Threads = None,
    memory: Memory = None, out: Out = None, below: Stage = None, as_json: Json = False,
) -> None:  # fmt: skip
    """What a run, or a sweep, would read and take: rows, order, memory, time and disk.

    Takes the options of train run, but --gpus: each GPU plans its share when it begins.

    Example: train plan pair.zarr --method batch_topk --wiring dedicated --latents 16384 --steps 5000 --grid seed=0,1
    """
    flags = _flags(method, wiring, latents, sources, steps, batch, seed, device, threads)
    asked = _asked(config_file, settings, grid, flags)
    told = outlook(_opened(caches, below, as_json), expand(asked), _bytes(memory), Path(out or "runs"))
    print(json.dumps(told) if as_json else text(told))


@app.command()
def resume(
    run_folders: Annotated[list[str], typer.Argument(help="The folder of a run or of a sweep; or several.")],
    caches: Annotated[
        list[str] | None, typer.Option("--store", help="Where its store lies now, each of several; none: where it was.")
    ] = None,
    memory: Memory = None,
    gpus: Gpus = None,
    below: Stage = None,
    as_json: Json = False,
) -> None:
    """Go on with a run that was stopped or killed, from its last checkpoint: the weights come out the same to the bit.

    Of a sweep, with all runs that are not finished. A finished run is left as it is.

    Example: train resume runs/dedicated-batch_topk-16384
    """
    folders = [_run_folder(one) for one in run_folders]
    runs = [one for folder in folders for one in folders_of(folder)]
    with parallel.joined(config_of(runs[0]).device):
        opened = _opened(caches, below, as_json) if caches else None
        if runs != folders or len(runs) > 1 or gpus is not None:
            _tell_all(resume_sweep(folders, opened, memory=_bytes(memory), gpus=_numbers(gpus)), caches, as_json)
        else:
            _tell(going_on(folders[0], opened), caches or _own_stores(folders[0]), as_json)


def _flags(
    method: str | None, wiring: str | None, latents: int | None, sources: str | None, steps: int | None,
    batch: int | None, seed: int | None, device: str | None, threads: int | None,
) -> dict[str, Any]:  # fmt: skip
    """The config keys of the flags that `run` and `plan` share."""
    return {
        "method.name": method, "wiring.kind": wiring, "wiring.latents": latents,
        "wiring.sources": None if sources is None else [name.strip() for name in sources.split(",")],
        "steps": steps, "batch": batch, "seed": seed, "device": device, "threads": threads,
    }  # fmt: skip


def _asked(
    config_file: Path | None, settings: list[str] | None, grid: list[str] | None, flags: dict[str, Any]
) -> dict[str, Any]:
    """The tables of a config: the file, over it what was set, over that the flags, and a sweep where there is one."""
    data = configs.read_toml(config_file) if config_file else {}
    asked = configs.override(data, [*(settings or []), *configs.settings(flags)])
    for one in grid or []:
        key, _, values = one.partition("=")
        grids = asked.setdefault(TABLE, {}).setdefault("grid", {})
        grids[key] = [configs.toml_value(value) for value in values.split(",") if value]
    return asked


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else round(gigabytes * 1e9)


def _numbers(gpus: str | None) -> list[int] | None:
    """all is an empty list. Raises ConfigError for what is no number."""
    if gpus is None or gpus == "all":
        return None if gpus is None else []
    try:
        return [int(one) for one in gpus.split(",")]
    except ValueError:
        raise ConfigError("wrong value for --gpus", gpus, "Give numbers, such as 0,1, or: all") from None


def _tell_all(made: Sweep, stores: list[str] | None, as_json: bool) -> None:
    """The runs side by side. Raises TrainingError where one failed."""
    if parallel.rank():  # the first one tells
        return
    figures = {one.folder.name: one.figures for one in made.runs}
    if as_json:
        failed = {path.name: str(error) for path, error in made.failed.items()}
        print(json.dumps({"folder": str(made.folder), "runs": figures, "failed": failed}))
    else:
        if figures:
            print(report.compared(figures))
            print()
            for store in stores or _own_stores(made.runs[0].folder):
                print(f"store   {store}")
            print(f"runs    {made.folder}")
        for path, error in made.failed.items():
            print(f"{path.name}: {error}")
    if made.failed:
        count = f"{len(made.failed)} of {len(made.failed) + len(made.runs)}"
        way_out = f"Where another try may help, they go on with: train resume {made.folder}"
        raise TrainingError("runs failed", count, way_out)


def _tell(made: Run, stores: list[str], as_json: bool) -> None:
    if parallel.rank():  # the first one tells
        return
    if as_json:
        print(json.dumps({"folder": str(made.folder), **made.figures}))
        return
    print(f"{report.text(made.figures)}\n")
    print("\n".join(f"store       {store}" for store in stores))
    print(f"dictionary  {made.folder / 'dictionary'}\nreport      {made.folder / report.PAGE}")


@app.command()
def measure(
    run_folder: RunFolder,
    caches: Annotated[
        list[str] | None, typer.Option("--store", help="The store to measure on, or several; none: the run's own.")
    ] = None,
    below: Stage = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of each split to read at most; none: as the run did.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """The figures of a dictionary on held-out documents: FVE, L0, dead latents, exclusive latents.

    Example: train measure runs/dedicated-batch_topk-16384
    """
    folder = _run_folder(run_folder)
    dictionary = Dictionary.load(folder, device)
    store = _opened(caches or _own_stores(folder), below, as_json)
    _require_same_sites(folder, store, dictionary)
    trained = _own_config(folder)
    most = rows or (trained.log if trained else LogConfig()).measure_rows
    kept, store = trained.rows if trained else None, store.through((trained.read if trained else ReadConfig()).access)
    if kept and len(store.stores) == 1:
        kept = kept.model_copy(update={"weights": None})  # which are shares of several
    figures = measuring.measure(dictionary, store, most, kept, as_json)
    print(json.dumps(figures) if as_json else report.text(figures))


@app.command()
def compare(
    first: RunFolder,
    second: Annotated[str, typer.Argument(help="Another run, or its dictionary/.")],
    as_json: Json = False,
) -> None:
    """How alike the decoder vectors of two dictionaries are, such as of two seeds: for each latent of the first its
    largest cosine with any of the second, per source.

    Example: train compare runs/sweep/0-seed=0 runs/sweep/1-seed=1
    """
    figures = comparing.compare(*(Dictionary.load(_run_folder(one)) for one in (first, second)))
    if as_json:
        print(json.dumps(figures))
        return
    heads = ["source", "latents", *comparing.FORMULAS]
    rows = [[name, f"{one['latents']:,}", *(f"{one[key]:.4f}" for key in heads[2:])] for name, one in figures.items()]
    print(report.aligned([heads, *rows]))


@app.command()
def methods(as_json: Json = False) -> None:
    """The training methods and their config keys.

    Example: train methods
    """
    found = {name: method_files.find(name) for name in method_files.names()}
    if as_json:
        keys = {name: {k: f.default for k, f in kind.model_fields.items()} for name, kind in found.items()}
        print(json.dumps(keys))
        return
    for name, kind in found.items():
        module = sys.modules[kind.__module__].__doc__ or ""
        keys_shown = ", ".join(f"{key}={field.default}" for key, field in kind.model_fields.items() if key != "name")
        print(f"{name}\n  {module.splitlines()[0]}\n  {keys_shown}")


@app.command()
def show(
    run_folder: RunFolder,
    as_json: Json = False,
) -> None:
    """What a saved dictionary is: its sources, spans, method and scale.

    Example: train show runs/dedicated-batch_topk-16384
    """
    dictionary = Dictionary.load(_run_folder(run_folder))
    described = dictionary.config()
    described["scale"] = {name: float(dictionary.scale.factor(name)) for name in dictionary.wiring.widths}
    described["parameters"] = sum(parameter.numel() for parameter in dictionary.parameters())
    if as_json:
        print(json.dumps(described))
        return
    keys = ", ".join(
        f"{key} {value}" for key, value in described["method"].items() if key != "name" and value is not None
    )
    print(f"method      {described['method']['name']}: {keys}")
    print(f"norm        {described['norm']}\nparameters  {described['parameters']:,}")
    for name, width in described["sources"].items():
        print(f"source      {name}: width {width}, rows are scaled by {described['scale'][name]:.6g}")
    for span in described["spans"]:
        ends = " -> ".join(" + ".join(map(in_brackets, span[key])) for key in ("readers", "writers"))
        own = {"one vector for all": span["tied"], f"keeps {span['k']}": span["k"], f"weight {span['weight']:g}": True}
        told = [word for word, holds in own.items() if holds and word != "weight 1"]
        print(f"span        {span['name']}: {span['size']:,} latents, {', '.join([ends, *told])}")
    if described["skip"]:
        print("skip        a linear map from what is read to what is written")


app.command("import")(exchange.import_)
app.command()(exchange.export)
app.command()(exchange.check)
app.command()(crosscoder.crosscoder)


def _opened(stores: list[str], below: str | None, quiet: bool) -> View:
    """The stores in these folders as one; of one at a URL the copy on this machine, which is made first."""
    return open_mixture([staging.stage(one, below, quiet) if remote.is_url(one) else one for one in stores])


def _run_folder(path: str) -> Path:
    return remote.local(path, "Give the folder of a run")


def _require_same_sites(folder: Path, store: View, dictionary: Dictionary) -> None:
    """Figures on rows of another site look like any others."""
    if (origin := _of_run(folder, report.STORE)) is None:
        return
    trained_on = files.read_json(origin)["sources"]
    for name, one in Sources(store, dictionary.wiring.widths).described().items():
        asked, found = trained_on[name]["site"], one["site"]
        if asked != found:
            way_out = "Give a store of the site that it was trained on"
            raise StoreError(f"{name} is another site in this store", f"{asked} -> {found}", way_out)


def _own_config(folder: Path) -> TrainConfig | None:
    """What the run was told, so that its own figures come out again."""
    found = _of_run(folder, report.CONFIG)
    return configs.parse(TrainConfig, configs.read_toml(found)) if found else None


def _own_stores(folder: Path) -> list[str]:
    if (origin := _of_run(folder, report.STORE)) is None:
        raise CheckpointError("this folder does not name its store", folder, "Give --store CACHE")
    return [str(path) for path in files.read_json(origin)["paths"]]


def _of_run(folder: Path, name: str) -> Path | None:
    """A file of a run, found from its folder or from its dictionary/."""
    return next((place / name for place in (folder, folder.parent) if (place / name).exists()), None)

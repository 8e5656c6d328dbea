"""train run | resume | measure | methods | show."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from shared import config as configs
from shared import files, remote
from shared.errors import CheckpointError, StoreError, one_line
from shared.family import open_family
from shared.view import View
from train import measure as measuring
from train import method as method_files
from train import report, trackers
from train.config import LogConfig, TrainConfig
from train.dictionary import Dictionary
from train.fit import Run, fit
from train.fit import resume as going_on

app = typer.Typer(
    help="Train dictionaries on a store: no model and no network are needed.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

RunFolder = Annotated[str, typer.Argument(help="The folder of a run, or its dictionary/.")]
Stage = Annotated[
    str | None, typer.Option("--stage", help="Where the copy of a store at a URL lies; none: in the user's cache.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def main() -> None:
    with one_line():
        app()


@app.command()
def run(
    cache: Annotated[str, typer.Argument(help="A finished store: its folder, or its URL.")],
    config_file: Annotated[Path | None, typer.Option("--config", help="TOML file of the run.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any config key: --set method.k=64.")] = None,
    method: Annotated[str | None, typer.Option(help="Training method (method.name); train methods lists them.")] = None,
    wiring: Annotated[
        str | None, typer.Option(help="autoencoder, transcoder, crosscoder or dedicated (wiring.kind).")
    ] = None,
    latents: Annotated[int | None, typer.Option(help="Latents of the dictionary (wiring.latents).")] = None,
    sources: Annotated[
        str | None, typer.Option(help="Sources in order, with commas: gemma,smol (wiring.sources).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser updates (steps).")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a batch (batch).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of order and weights (seed).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto (device).")] = None,
    threads: Annotated[int | None, typer.Option(help="Torch threads on the CPU (threads).")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder of the run; none: a new one below runs/.")] = None,
    below: Stage = None,
    as_json: Json = False,
) -> None:
    """Train one dictionary on a store, measure it on held-out documents, and write a report.

    Example: train run pair.zarr --method batch_topk --wiring dedicated --latents 16384 --steps 5000 --set method.k=64
    """
    flags: dict[str, Any] = {
        "method.name": method, "wiring.kind": wiring, "wiring.latents": latents,
        "wiring.sources": None if sources is None else sources.split(","), "steps": steps, "batch": batch,
        "seed": seed, "device": device, "threads": threads,
    }  # fmt: skip
    data = configs.read_toml(config_file) if config_file else {}
    asked = configs.parse(TrainConfig, configs.override(data, [*(settings or []), *configs.settings(flags)]))
    trackers.require(asked.log)  # before a store at a URL is copied
    folder = None if out is None else remote.local(out, "A run is written to a folder (--out)")
    _tell(fit(_opened(cache, below, as_json), asked, folder), cache, as_json)


@app.command()
def resume(
    run_folder: Annotated[str, typer.Argument(help="The folder of a run.")],
    cache: Annotated[str | None, typer.Option("--store", help="Where its store lies now; none: where it was.")] = None,
    below: Stage = None,
    as_json: Json = False,
) -> None:
    """Go on with a run that was stopped or killed, from its last checkpoint: the weights come out the same to the bit.

    A finished run is left as it is.

    Example: train resume runs/dedicated-batch_topk-16384
    """
    folder = _run_folder(run_folder)
    made = going_on(folder, _opened(cache, below, as_json) if cache else None)
    _tell(made, cache or _own_store(folder), as_json)


def _tell(made: Run, store: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"folder": str(made.folder), **made.figures}))
        return
    print(report.text(made.figures))
    print(f"\nstore       {store}\ndictionary  {made.folder / 'dictionary'}\nreport      {made.folder / report.PAGE}")


@app.command()
def measure(
    run_folder: RunFolder,
    cache: Annotated[str | None, typer.Option("--store", help="The store to measure on; none: the run's own.")] = None,
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
    store = _opened(cache or _own_store(folder), below, as_json)
    _require_same_sites(folder, store, dictionary)
    trained = _own_config(folder)
    most = rows or (trained.log if trained else LogConfig()).measure_rows
    figures = measuring.measure(dictionary, store, most, trained.rows if trained else None, as_json)
    print(json.dumps(figures) if as_json else report.text(figures))


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
        ends = f"{' + '.join(span['readers'])} -> {' + '.join(span['writers'])}"
        print(f"span        {span['name']}: {span['size']:,} latents, {ends}")


def _opened(store: str, below: str | None, quiet: bool) -> View:
    """The store in a folder; of one at a URL the copy on this machine, which is made first."""
    return open_family(remote.stage(store, below, quiet) if remote.is_url(store) else store)


def _run_folder(path: str) -> Path:
    return remote.local(path, "Give the folder of a run")


def _require_same_sites(folder: Path, store: View, dictionary: Dictionary) -> None:
    """Figures on rows of another site look like any others."""
    if (origin := _of_run(folder, report.STORE)) is None:
        return
    trained_on = files.read_json(origin)["sources"]
    for name in dictionary.wiring.widths:
        asked, found = trained_on[name]["site"], store.source(name).site
        if asked != found:
            way_out = "Give a store of the site that it was trained on"
            raise StoreError(f"{name} is another site in this store", f"{asked} -> {found}", way_out)


def _own_config(folder: Path) -> TrainConfig | None:
    """What the run was told, so that its own figures come out again."""
    found = _of_run(folder, report.CONFIG)
    return configs.parse(TrainConfig, configs.read_toml(found)) if found else None


def _own_store(folder: Path) -> str:
    if (origin := _of_run(folder, report.STORE)) is None:
        raise CheckpointError("this folder does not name its store", folder, "Give --store CACHE")
    return str(files.read_json(origin)["path"])


def _of_run(folder: Path, name: str) -> Path | None:
    """A file of a run, found from its folder or from its dictionary/."""
    return next((place / name for place in (folder, folder.parent) if (place / name).exists()), None)

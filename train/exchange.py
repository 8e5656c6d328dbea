"""train import | export | check: dictionaries of other libraries, and ours for them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from shared import files, remote
from shared.errors import CheckpointError, TrainingError
from train import report
from train.dictionary import Dictionary
from train.interop import check as checking
from train.interop import formats, hub
from train.interop.formats import Origin

HUB, REGISTRY = "hub:", "sae_lens:"

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Out = Annotated[str, typer.Option("--out", help="A new folder for it.")]


def import_(
    path: Annotated[
        str,
        typer.Argument(
            help="A folder of another library, or a file of its weights; or hub:ORG/NAME[/FOLDER], or"
            " sae_lens:RELEASE/ID of SAELens' registry."
        ),
    ],
    out: Out,
    sources: Annotated[
        str | None,
        typer.Option("--sources", help="Names of its sources as stores have them, with commas; none: x, or a,b."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--class", help="The class of dictionary_learning, where no file says it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a dictionary of ours of one of SAELens, sparsify, dictionary_learning, crosscoder_learning or dfc_learning.

    What it is must be in its files: what they lack is told, or refused, and never guessed. The new folder is one for
    train show, measure and compare.

    Example: train import downloads/crosscoder-l13 --out imported/l13 --sources base,chat
    """
    names = None if sources is None else [name.strip() for name in sources.split(",")]
    folder = Path(remote.local(out, "A dictionary is written to a folder (--out)"))
    if folder.exists():
        raise CheckpointError("this folder is there already", folder, "Give another one (--out)")
    found = _found(path, names, kind)
    found.dictionary.save(folder)
    widths = found.dictionary.wiring.widths
    told = {"folder": str(folder), "kind": found.kind, "latents": found.dictionary.latents, "sources": widths}
    _tell({**told, "notes": list(found.notes)}, as_json)


def _found(path: str, names: list[str] | None, kind: str | None) -> formats.Found:
    if path.startswith(REGISTRY):
        release, _, sae_id = path.removeprefix(REGISTRY).partition("/")
        return hub.of_registry(release, sae_id, names)
    if path.startswith(HUB):
        return formats.load(hub.fetched(path.removeprefix(HUB)), names, kind)
    return formats.load(remote.local(path, "Copy it here first"), names, kind)


def export(
    run_folder: Annotated[str, typer.Argument(help="The folder of a run, or its dictionary/.")],
    to: Annotated[str, typer.Option("--to", help=f"The library: {', '.join(formats.TARGETS)}.")],
    out: Out,
    as_json: Json = False,
) -> None:
    """Write a dictionary as another library has it, with the same reconstructions of raw rows.

    sae_lens: cfg.json and sae_weights.safetensors. sparsify: cfg.json and sae.safetensors. dictionary_learning: ae.pt
    and config.json, of crosscoders model_final.pt. hub: config.json and model.safetensors as crosscoder_learning and
    its from_pretrained have them, and a model card. The scale is folded into the weights, but of crosscoders, whose
    files have a place for it.

    Example: train export runs/autoencoder-topk-4096 --to sae_lens --out exported/gemma-l13
    """
    folder = remote.local(run_folder, "Give the folder of a run")
    made = formats.export(Dictionary.load(folder), to, _origins(folder))
    formats.write(made, target := Path(remote.local(out, "Files are written to a folder (--out)")))
    names = [*made.states, *made.tables, *made.texts]
    _tell({"folder": str(target), "kind": made.kind, "files": names, "notes": list(made.notes)}, as_json)


def check(as_json: Json = False) -> None:
    """Eight quick checks of dedicated crosscoders, on this machine: their partition, gradients and steps.

    Example: train check
    """
    found = dict(checking.run())
    if as_json:
        print(json.dumps(found))
    else:
        print(
            "\n".join(
                f"{'failed' if wrong else 'ok':<7} {name}{wrong and f': {wrong}'}" for name, wrong in found.items()
            )
        )
    if wrong := [name for name, fault in found.items() if fault]:
        raise TrainingError("checks failed", f"{len(wrong)} of {len(found)}", "Report them, with your version of torch")


def _origins(folder: Path) -> dict[str, Origin]:
    """Models and sites of the sources of a run, as far as it lies beside its dictionary."""
    for place in (folder, folder.parent):
        if (place / report.STORE).exists():
            sources = files.read_json(place / report.STORE)["sources"]
            return {name: Origin(one["model"], one["site"]) for name, one in sources.items()}
    return {}


def _tell(told: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(told))
        return
    for key, value in told.items():
        many = value if key == "notes" else [_text(value)]
        for one in many:
            print(f"{key.removesuffix('s') if key == 'notes' else key:<10}{one}")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} (width {width})" for name, width in value.items())
    return ", ".join(value) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else str(value)

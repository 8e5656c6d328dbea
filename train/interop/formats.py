"""Which library a file is of, and how it is read; and how a dictionary is written for one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared import files
from shared.errors import CheckpointError, ConfigError
from shared.hooks import hook_name
from train.dictionary import CONFIG, WEIGHTS, Dictionary
from train.interop import crosscoders, crosscoders_written, plain, sae_lens, saes, sparsify
from train.interop.found import Found, Sidecar
from train.interop.plain import Plain
from train.interop.tensors import State, Taken, read_state, read_table, write_state

HUB = "model.safetensors"
KISSANE = "cc_weights.pt"
RUNS = ("ae.pt", "model_final.pt", "ae_final.pt")  # of dictionary_learning, and of crosscoder_learning
LAYOUT = {sae_lens.WEIGHTS: sae_lens.CONFIG, sparsify.WEIGHTS: sparsify.CONFIG}
SINGLE = ("x",)
TRANSCODER = ("x", "y")


def load(
    path: str | Path, names: Sequence[str] | None = None, kind: str | None = None,
    code_normalization: str | None = None, k: int | None = None,
) -> Found:  # fmt: skip
    """The dictionary in a file or a folder of another library, in evaluation mode.

    path   a folder of SAELens, of sparsify, of a run of dictionary_learning or crosscoder_learning, or as the hub has
           it (config.json, model.safetensors); or one of their files of weights
    names  of its sources, as a store has them; none: x, of a transcoder x and y, of a crosscoder a, b, ...
    kind, code_normalization, k  the class of dictionary_learning, the norm that ranks the latents of a crosscoder, and
           how many are kept, where neither the weights nor what lies beside them say it

    Raises CheckpointError for what cannot be read, or lacks what decides its values.
    """
    file = _weights(Path(path).expanduser())
    if file.name in LAYOUT and (file.parent / LAYOUT[file.name]).exists():
        return _of_folder(file, names)
    sidecar = Sidecar.of(file)
    said = {"dict_class": kind, "code_normalization": code_normalization, "k": k}
    said = {key: value for key, value in said.items() if value is not None and sidecar.get(key) is None}
    sidecar = Sidecar(sidecar.trainer, {**said, **sidecar.arguments})
    state, factor = _unpacked(read_state(file))
    taken = Taken(state, file)
    if crosscoders.is_crosscoder(taken):
        return crosscoders.read(taken, sidecar, names)
    told, found, notes = saes.read(taken, sidecar)
    if factor is not None:
        found = found.over(torch.zeros_like(found.bias_E), torch.tensor(1 / factor))
        notes = (*notes, f"a backup of a run: rows are divided by {factor:.6g}, which is folded into the weights")
    return Found(_named(found, names), told, notes, {"form": found.form, "scaled": found.scaled})


def _weights(path: Path) -> Path:
    """The file of weights that is meant. Raises CheckpointError where there is none."""
    if path.is_file():
        return path
    if (path / WEIGHTS).exists() and (path / CONFIG).exists():
        raise CheckpointError("this is a dictionary of Granary", path, "Use Dictionary.load")
    if (path / "dictionary" / WEIGHTS).exists():
        raise CheckpointError("this is a run of Granary", path, "Use Dictionary.load")
    for name in (*LAYOUT, HUB, KISSANE, *RUNS):
        if (path / name).exists():
            return path / name
    told = ", ".join((*LAYOUT, HUB, KISSANE, *RUNS))
    what = "no dictionary of another library here" if path.exists() else "no such file or folder"
    raise CheckpointError(what, path, f"Give a file of weights, or a folder with one of {told}")


def _of_folder(file: Path, names: Sequence[str] | None) -> Found:
    """Of SAELens or sparsify, whose cfg.json says all."""
    config, state = read_table(file.parent / LAYOUT[file.name]), Taken(read_state(file), file)
    if file.name == sparsify.WEIGHTS:
        found = sparsify.read(state, config)
        transcodes = bool(config.get("transcode"))
        return Found(_named(found, names, transcodes), f"sparsify, {'transcoder' if transcodes else 'autoencoder'}")
    return of_sae_lens(state, config, names)


def of_sae_lens(state: Taken, config: Mapping[str, Any], names: Sequence[str] | None) -> Found:
    """Of the state and the table of one of SAELens."""
    kind, found = sae_lens.read(state, config)
    notes = ("codes are those of SAELens: times the length of the decoder's vector",) if found.rescaled else ()
    return Found(_named(found, names, "transcoder" in kind), f"SAELens, {kind}", notes)


def _named(found: Plain, names: Sequence[str] | None, transcodes: bool = False) -> Dictionary:
    wanted = TRANSCODER if transcodes else SINGLE
    given = tuple(names or wanted)
    if len(given) != len(wanted) or len(set(given)) < len(given):
        raise CheckpointError("names of sources do not fit", ", ".join(given), f"It has {len(wanted)}")
    return found.dictionary(given)


def _unpacked(state: State) -> tuple[State, float | None]:
    """The weights of a backup of a run {step, ae, optimizer, config, norm_factor}, and the factor of its rows."""
    if "ae" not in state or "optimizer" not in state:
        return state, None
    factor = state.get("norm_factor")
    return dict(state["ae"]), None if factor is None or float(factor) == 1.0 else float(factor)


# --- writing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where the rows of a source come from, as a run's store.json has it."""

    model: str = ""
    site: str = ""


@dataclass(frozen=True)
class Export:
    """Files of another library: tensors and tables by file name, and what has to be known of them."""

    kind: str
    states: dict[str, State]
    tables: dict[str, dict[str, Any]]
    texts: dict[str, str]
    notes: tuple[str, ...] = ()


def export(dictionary: Dictionary, to: str, origins: dict[str, Origin] | None = None) -> Export:
    """What a library needs to have this dictionary: sae_lens, sparsify, dictionary_learning, hub.

    `origins` are those of its sources. Raises CheckpointError or WiringError where it has no such dictionary,
    ConfigError for a library of another name.
    """
    if to not in TARGETS:
        raise ConfigError("no library of this name", to, f"Choose one of {', '.join(TARGETS)}")
    return TARGETS[to](dictionary, origins or {})


def write(made: Export, folder: Path) -> None:
    """Put the files into a new folder, whole. Raises CheckpointError where there is one."""
    if folder.exists():
        raise CheckpointError("this folder is there already", folder, "Give another one")
    with files.folder_atomic(folder) as temporary:
        put(made, temporary)


def put(made: Export, folder: Path) -> None:
    """Put the files into a folder, over those that have their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in made.states.items():
        write_state(folder / name, state)
    for name, table in made.tables.items():
        files.write_json(folder / name, table)
    for name, text in made.texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _transcodes(dictionary: Dictionary) -> bool:
    return dictionary.wiring.readers != dictionary.wiring.writers


def _codes(found: Plain) -> tuple[str, ...]:
    return ("codes are those of the dictionary times the length of its decoder vectors",) if found.rescaled else ()


def _to_sae_lens(dictionary: Dictionary, origins: dict[str, Origin]) -> Export:
    found = plain.of(dictionary, "SAELens")
    state, config = sae_lens.written(found, _transcodes(dictionary))
    reader, writer = dictionary.wiring.readers[0], dictionary.wiring.writers[0]
    origin = origins.get(reader, Origin())
    metadata: dict[str, Any] = {"sae_lens_version": sae_lens.VERSION, "granary": stated(dictionary, origins)}
    metadata |= {"model_name": origin.model or None, "hook_name": hook_name(origin.site)}
    if _transcodes(dictionary):
        metadata["hook_name_out"] = hook_name(origins.get(writer, Origin()).site)
    if str(metadata["hook_name"]).endswith("hook_z"):
        config["reshape_activations"] = "hook_z"
    notes = _codes(found.jumping().unranked())
    if metadata["hook_name"] is None:
        notes = (*notes, f"no hook_name: TransformerLens has none for {origin.site or 'an unknown site'}")
    tables = {sae_lens.CONFIG: {**config, "metadata": metadata}}
    return Export(config["architecture"], {sae_lens.WEIGHTS: state}, tables, {}, notes)


def _to_sparsify(dictionary: Dictionary, origins: dict[str, Origin]) -> Export:
    found = plain.of(dictionary, "sparsify")
    state, config = sparsify.written(found, _transcodes(dictionary))
    tables = {sparsify.CONFIG: config, "granary.json": stated(dictionary, origins)}
    return Export("SparseCoder", {sparsify.WEIGHTS: state}, tables, {}, _codes(found.unranked()))


def _reference(dictionary: Dictionary) -> tuple[str, State, dict[str, Any], tuple[str, ...]]:
    """The class of dictionary_learning or crosscoder_learning, its state and arguments."""
    wiring = dictionary.wiring
    if len(wiring.readers) > 1 or len(wiring.writers) > 1:
        found = crosscoders_written.written(dictionary)
        return found.kind, found.state, found.arguments, found.notes
    one = plain.of(dictionary, "dictionary_learning")
    kind, state = saes.written(one)
    arguments: dict[str, Any] = {"activation_dim": one.encoder_LD.shape[1], "dict_size": len(one.bias_L)}
    arguments |= {"k": int(state["k"])} if "k" in state else {}
    arguments |= {"group_sizes": list(one.groups)} if one.groups else {}
    return kind, state, arguments, _codes(one.unranked())


def _trainer(
    dictionary: Dictionary, kind: str, arguments: dict[str, Any], origins: dict[str, Origin]
) -> dict[str, Any]:
    """config.json as a trainer writes it."""
    wiring = dictionary.wiring
    models = [origins.get(name, Origin()).model for name in wiring.widths]
    told = {
        "trainer_class": "granary", "dict_class": kind, **arguments, "lm_name": ", ".join(models),
        "layer": None, "submodule_name": ", ".join(origins.get(n, Origin()).site for n in wiring.widths),
        "dict_class_kwargs": {},
    }  # fmt: skip
    return {"trainer": told, "granary": stated(dictionary, origins)}


def _to_dictionary_learning(dictionary: Dictionary, origins: dict[str, Origin]) -> Export:
    kind, state, arguments, notes = _reference(dictionary)
    name = "ae.pt"
    if "CrossCoder" in kind:
        name = "model_final.pt"
    if kind.startswith("Dedicated"):
        keys = ("dict_size", *crosscoders.SHARES)
        state = {**state, crosscoders.PARTITION: {key: arguments[key] for key in keys}}
    table = _trainer(dictionary, kind, arguments, origins)
    return Export(kind, {name: state}, {"config.json": table}, {}, notes)


def _to_hub(dictionary: Dictionary, origins: dict[str, Origin]) -> Export:
    kind, state, arguments, notes = _reference(dictionary)
    return for_hub(dictionary, kind, state, arguments, origins, notes)


def for_hub(
    dictionary: Dictionary, kind: str, state: State, arguments: dict[str, Any],
    origins: dict[str, Origin] | None = None, notes: tuple[str, ...] = (),
) -> Export:  # fmt: skip
    """A folder as the hub has it, of a class with this state and these arguments."""
    origins = origins or {}
    tables = {
        "config.json": {**arguments, "dict_class": kind},
        "trainer_config.json": _trainer(dictionary, kind, arguments, origins),
    }
    tensors = {name: value for name, value in state.items() if name != crosscoders.PARTITION}  # which a table has
    return Export(kind, {HUB: tensors}, tables, {"README.md": card(dictionary, kind, origins, notes)}, notes)


TARGETS: dict[str, Callable[[Dictionary, dict[str, Origin]], Export]] = {
    "dictionary_learning": _to_dictionary_learning, "sae_lens": _to_sae_lens, "sparsify": _to_sparsify, "hub": _to_hub,
}  # fmt: skip


def stated(dictionary: Dictionary, origins: dict[str, Origin]) -> dict[str, Any]:
    """What a target has no place for: models and sites, the scale that rows were given, and how it was trained."""
    sources = {
        name: {
            "model": origins.get(name, Origin()).model, "site": origins.get(name, Origin()).site, "width": width,
            "scale": float(dictionary.scale.factor(name)),
            "mean_norm": float(torch.linalg.vector_norm(dictionary.scale.mean(name))),
        }
        for name, width in dictionary.wiring.widths.items()
    }  # fmt: skip
    return {"sources": sources, "method": dictionary.method.model_dump(mode="json"), "norm": dictionary.norm}


def card(dictionary: Dictionary, kind: str, origins: dict[str, Origin], notes: tuple[str, ...]) -> str:
    """A model card."""
    told = stated(dictionary, origins)
    rows = [
        f"| {name} | {one['model'] or '-'} | {one['site'] or '-'} | {one['width']} | {one['scale']:.6g} |"
        for name, one in told["sources"].items()
    ]
    lines = [
        "---", "library_name: dictionary_learning", "tags:", "- sparse-autoencoder", "---", "",
        f"# {kind}, {dictionary.latents:,} latents", "",
        "Rows are raw activations; what they were scaled by is in the weights.", "",
        "| source | model | site | width | scale |", "|---|---|---|---|---|", *rows, "",
        f"Method: {dictionary.method.name}. {' '.join(f'{note[0].upper()}{note[1:]}.' for note in notes)}".rstrip(), "",
    ]  # fmt: skip
    return "\n".join(lines)

"""Checkpoints of a run: safetensors and JSON, whole or absent, the last few kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared import config, files
from shared.errors import CheckpointError
from train.trainer import Trainer

TENSORS, STATE = "state.safetensors", "state.json"


def save(trainer: Trainer, folder: Path, identity: Mapping[str, Any], keep: int) -> Path:
    """Write folder/step_<step>, and remove all but the last `keep`. `identity` says of which store and config."""
    state = trainer.state_dict()
    path = folder / f"step_{trainer.step:08d}"
    tensors = {f"dictionary/{name}": value for name, value in state["dictionary"].items()} | {"idle_L": state["idle_L"]}
    for index, moments in state["optimiser"]["state"].items():
        tensors |= {f"optimiser/{index}/{name}": value for name, value in moments.items()}
    files.sweep(folder)  # of what a killed run left
    with files.folder_atomic(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary / TENSORS)
        groups = state["optimiser"]["param_groups"]
        files.write_json(temporary / STATE, {"step": trainer.step, "groups": groups, **identity})
    for old in steps(folder)[:-keep]:
        files.remove_folder(old)
    return path


def steps(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    whole = (path for path in folder.glob("step_*") if path.suffix != files.TEMPORARY)
    return sorted(path for path in whole if (path / STATE).exists())


def load(trainer: Trainer, path: Path, identity: Mapping[str, Any]) -> None:
    """Put a checkpoint into a trainer of the same config. Raises CheckpointError, naming what differs."""
    try:
        saved, tensors = files.read_json(path / STATE), load_file(path / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError("no checkpoint here", path, f"Give a folder step_... of a run ({error})") from None
    if different := config.differences({key: saved.get(key) for key in identity}, identity):
        raise CheckpointError(
            "this checkpoint is of another run; these differ", ", ".join(different), "Use its own config and store"
        )
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser/"):
            _, index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = value
    trainer.load_state_dict(
        {
            "dictionary": {n.removeprefix("dictionary/"): v for n, v in tensors.items() if n.startswith("dictionary/")},
            "optimiser": {"state": moments, "param_groups": saved["groups"]},
            "idle_L": tensors["idle_L"],
            "step": saved["step"],
        }
    )

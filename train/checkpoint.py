"""Checkpoints of a run: safetensors and JSON, whole or absent, the last few kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared import config, files
from shared.errors import CheckpointError
from shared.layout import crc32c
from train import parallel
from train.trainer import Trainer

PIECE_BYTES = 2**24
PARTS = ("dictionary", "terms", "averages")
TENSORS, STATE = "state.safetensors", "state.json"


def save(trainer: Trainer, folder: Path, identity: Mapping[str, Any], keep: int) -> Path:
    """Write folder/step_<step>, and remove all but the last `keep`. `identity` says of which store and config.

    To be called on every rank; the first one writes.
    """
    state, path = trainer.state_dict(), folder / f"step_{trainer.step:08d}"
    if parallel.rank():
        return path
    tensors = {f"{part}/{name}": value for part in PARTS for name, value in state[part].items()}
    tensors["idle_L"] = state["idle_L"]
    for index, moments in state["optimiser"]["state"].items():
        tensors |= {f"optimiser/{index}/{name}": value for name, value in moments.items()}
    files.sweep(folder)  # of what a killed run left
    with files.folder_atomic(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary / TENSORS)
        files.open_like_folder(temporary / TENSORS)
        told = {"step": trainer.step, "ranks": parallel.ranks(), "crc32c": _crc32c(temporary / TENSORS)}
        files.write_json(temporary / STATE, {**told, "groups": state["optimiser"]["param_groups"], **identity})
    for old in steps(folder)[:-keep]:
        files.remove_folder(old)
    return path


def _crc32c(path: Path) -> int:
    with path.open("rb") as file:
        return crc32c(iter(lambda: file.read(PIECE_BYTES), b""))


def steps(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    whole = (path for path in folder.glob("step_*") if path.suffix != files.TEMPORARY)
    return sorted(path for path in whole if (path / STATE).exists())


def load(trainer: Trainer, path: Path, identity: Mapping[str, Any]) -> int:
    """Put a checkpoint into a trainer of the same config. Returns how many ranks made it.

    Raises CheckpointError, naming what differs.
    """
    way_out = "Remove its folder: train resume then goes on from the one before it, or begins again"
    try:
        saved, tensors = files.read_json(path / STATE), load_file(path / TENSORS)
        if saved["ranks"] < 1 or _crc32c(path / TENSORS) != saved["crc32c"]:
            raise CheckpointError("this checkpoint is damaged", path / TENSORS, way_out)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError("this checkpoint is damaged", path, f"{way_out} ({error})") from None
    if different := config.differences({key: saved.get(key) for key in identity}, identity):
        way_out = "Put config.toml back as it was, and give the store as it was"
        raise CheckpointError("this checkpoint is of another run; these differ", ", ".join(different), way_out)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in _below(tensors, "optimiser/").items():
        index, key = name.split("/")
        moments.setdefault(int(index), {})[key] = value
    trainer.load_state_dict(
        {
            **{part: _below(tensors, f"{part}/") for part in PARTS},
            "optimiser": {"state": moments, "param_groups": saved["groups"]},
            "idle_L": tensors["idle_L"],
            "step": saved["step"],
        }
    )
    return int(saved["ranks"])


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

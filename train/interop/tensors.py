"""Tensors and tables in files of other libraries. Nothing that is pickled in them is run."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared import files
from shared.errors import CheckpointError

State = dict[str, Any]
COMPILED = "_orig_mod."  # what torch.compile puts before every name


def read_state(path: Path) -> State:
    """The state of a .safetensors or a pickled file, on the CPU, with the names that it had before torch.compile.

    Raises CheckpointError where it cannot be read, or not without running what is in it.
    """
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        way_out = "Save its state_dict: a file of tensors and plain values alone"
        raise CheckpointError("this file holds more than tensors", path, f"{way_out} ({_first(error)})") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        raise CheckpointError("this file cannot be read", path, f"Save it again ({_first(error)})") from None
    if not isinstance(found, Mapping):
        raise CheckpointError("this file holds no state_dict", path, "Save model.state_dict()")
    return {str(name).removeprefix(COMPILED): value for name, value in found.items()}


def read_table(path: Path) -> dict[str, Any]:
    """A JSON table, {} where there is no such file. Raises CheckpointError for a file that holds none."""
    if not path.exists():
        return {}
    try:
        found = files.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError("this file cannot be read", path, f"Put it right ({_first(error)})") from None
    if not isinstance(found, dict):
        raise CheckpointError("this file holds no table", path, "Put it right, or move it away")
    return found


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """A .safetensors file, or one that torch.load reads, by the name's end."""
    if path.suffix == ".safetensors":
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, path)
    else:
        torch.save({n: v.detach().cpu().clone() if isinstance(v, Tensor) else v for n, v in state.items()}, path)
    files.open_like_folder(path)


class Taken:
    """What is taken out of a state, by name, once each: `left` tells what nobody has asked for."""

    def __init__(self, state: Mapping[str, Any], path: Path) -> None:
        self.left, self.path = dict(state), path

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def plain(self, name: str) -> Any:
        """A value as it is. Raises CheckpointError where there is none."""
        if name not in self.left:
            way_out = f"It has {', '.join(sorted(self.left)) or 'nothing'}"
            raise CheckpointError("this file lacks a value that its kind has", f"{name} in {self.path}", way_out)
        return self.left.pop(name)

    def tensor(self, name: str, *shape: int | None, finite: bool = True) -> Tensor:
        """A tensor in float32, of this shape where one is given (None: any). Raises CheckpointError."""
        value = self.plain(name)
        if not isinstance(value, Tensor) or (shape and not _fits(value, shape)):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            wanted = f"({', '.join('any' if size is None else str(size) for size in shape)})"
            raise CheckpointError("a tensor of another shape than its kind has", f"{name}: {found}", f"Not {wanted}")
        value = value.float()
        if finite and not torch.isfinite(value).all():
            raise CheckpointError("weights that are not finite", f"{name} in {self.path}", "Take an earlier checkpoint")
        return value

    def number(self, name: str) -> float:
        return float(self.tensor(name, finite=False).reshape(()))

    def done(self) -> None:
        """Raises CheckpointError where something is left, whose meaning would be lost."""
        if self.left:
            value = f"{', '.join(sorted(self.left))} in {self.path}"
            raise CheckpointError("this file has values that its kind does not", value, "It may be of another kind")


def _fits(value: Tensor, shape: tuple[int | None, ...]) -> bool:
    return value.ndim == len(shape) and all(want in (None, size) for size, want in zip(value.shape, shape, strict=True))


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

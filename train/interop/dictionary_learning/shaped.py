"""Dictionaries of ours in the shapes that dictionary_learning has, and the class that others derive theirs from.

Weights are shown as copies (train.interop.dictionary_learning.shown): they have gradients, assigning one puts it into
the dictionary, and writing into one raises. Codes, reconstructions and files are those of the reference; what it does
wrong is told in docs/coming_from.md.

Letters: B rows, D width, L latents.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from shared.errors import CheckpointError, ConfigError
from train import dictionary as cores
from train.interop import formats, hub
from train.interop.dictionary_learning.shown import Shown
from train.interop.found import Found
from train.interop.tensors import State
from train.kernels.choice import Kernels
from train.schedule import constant

HERE = Path("here")  # where a state lies that is in no file


class Dictionary(nn.Module, ABC):
    """A dictionary of any kind: what a class of one's own derives from, to be given as `dict_class`."""

    activation_dim: int
    dict_size: int

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Codes [..., L] of rows [..., D]."""

    @abstractmethod
    def decode(self, f: Tensor) -> Tensor:
        """Rows [..., D] of codes [..., L]."""

    @classmethod
    def from_pretrained(cls, *args: Any, **keys: Any) -> Self:
        """One that was saved. A class of one's own says how."""
        raise NotImplementedError(f"{cls.__name__}.from_pretrained")

    @classmethod
    def require(cls, made: Any) -> Self:
        """The same. Raises ConfigError for what is none of this class."""
        if not issubclass(type(made), cls):
            way_out = "Derive a trainer from Trainer, with a loss of your own"
            raise ConfigError("this is no such dictionary", type(made).__name__, way_out)
        found: Self = made
        return found


class Shaped(Dictionary, ABC):
    """One of ours in the shapes of the reference. `shown` names the tensors of its state."""

    core: cores.Dictionary
    shown: ClassVar[tuple[str, ...]] = ()

    def __init__(self, core: cores.Dictionary) -> None:
        super().__init__()
        self.core = core
        core.kernels = Kernels(precision="fp32")

    # --- its state ----------------------------------------------------------------------------------------------

    @abstractmethod
    def _state(self) -> State:
        """Its tensors by the reference's names, in its shapes, with the graph of the weights."""

    @abstractmethod
    def _small(self) -> State:
        """Those of its state that are no weights: to be had without a copy of these."""

    @abstractmethod
    def _found(self, state: Mapping[str, Any]) -> Found:
        """The dictionary of a state, and what the class knows beside it. Raises CheckpointError for another kind."""

    @abstractmethod
    def _gradient(self, name: str) -> Tensor | None:
        """That of one of the tensors of its state."""

    @abstractmethod
    def _arguments(self) -> dict[str, Any]:
        """Those that make one of its size."""

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """That of the reference: its names and shapes. Plain copies."""
        found = {} if destination is None else destination
        with torch.no_grad():
            state = self._state()
        found |= {f"{prefix}{n}": v.detach().clone() if isinstance(v, Tensor) else v for n, v in state.items()}
        return found

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Its part of the state of a module around it (torch's protocol: called for every module, parents first)."""
        own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        try:
            self.load_state_dict(own, strict)
        except CheckpointError as error:
            error_msgs.append(str(error))
        state_dict.update({f"{prefix}core.{name}": value for name, value in self.core.state_dict().items()})

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Put a state of the reference into the weights, which stay the tensors that they are. The state stays, too.

        `strict` false: tensors that it lacks stay as they are. Raises CheckpointError.
        """
        found = self._found(state_dict if strict else {**self.state_dict(), **state_dict})
        adopt(self.core, found.dictionary.to(self.core.activation.bias_L))
        self._tell(found.told)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def __getattr__(self, name: str) -> Any:
        if name in type(self).shown:
            return self.tensor(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).shown:
            self.put(name, value)
        else:
            super().__setattr__(name, value)

    def tensor(self, name: str) -> Tensor:
        """One of the tensors of its state, to look at and to compute with."""
        small = self._small()
        value = small[name] if name in small else self._state()[name]
        return Shown.of(value.clone(), f"{type(self).__name__}.{name}", lambda: self._gradient(name))

    def put(self, name: str, value: Any) -> None:
        """Put a tensor, or a number, where the state has one of this name. Raises CheckpointError for another shape."""
        small = self._small()
        there = small[name] if name in small else self.state_dict()[name]
        given = torch.as_tensor(value, dtype=there.dtype, device=there.device).detach()
        if given.shape != there.shape:
            way_out = f"It has {tuple(there.shape)}"
            raise CheckpointError("a tensor of another shape", f"{name}: {tuple(given.shape)}", way_out)
        if not (name in small and self._put_small(name, given)):
            self.load_state_dict({**self.state_dict(), name: given})

    @torch.no_grad()
    def _put_small(self, name: str, given: Tensor) -> bool:
        """Put k or a threshold where it belongs, if it is one that latents are selected by."""
        form = self.core.activation.form()
        if name == "k":
            set_k(self.core, int(given))
        elif name == "threshold" and form.kind == "batch_topk":
            assert form.threshold_L is not None
            each = given[..., None].to(form.threshold_L).expand_as(form.threshold_L)
            self.core.activation.adopt(replace(form, threshold_L=each))
        else:
            return False
        return True

    def scale_biases(self, scale: float) -> None:
        """Multiply biases, and thresholds that are set, so that the same is done of rows that are so much longer."""
        state = self.state_dict()
        for name, value in state.items():
            untrained = name == "threshold" and bool((value < 0).all())
            if not untrained and ("bias" in name or name in ("b_dec", "b_enc", "threshold")):
                state[name] = value * scale
        self.load_state_dict(state)

    # --- codes --------------------------------------------------------------------------------------------------

    @contextmanager
    def _selecting(self, by_threshold: bool) -> Iterator[None]:
        """Let latents be selected by thresholds, as at evaluation, or by their number, as in training."""
        before = self.core.training
        self.core.train(not by_threshold)
        try:
            yield
        finally:
            self.core.train(before)

    # --- files --------------------------------------------------------------------------------------------------

    @classmethod
    def _loaded(cls, path: str | Path, from_hub: bool, device: Any, dtype: Any, **told: Any) -> Self:
        found = formats.load(hub.fetched(str(path)) if from_hub else path, kind=cls.__name__, **told)
        return cls.of(found).to(device=device, dtype=dtype)

    @classmethod
    def of(cls, found: Found) -> Self:
        """The class with what was found in a file as its weights. Raises CheckpointError where it is of another one."""
        made = cls.around(found.dictionary.requires_grad_(True))
        made._tell(found.told)
        return made

    def _tell(self, told: Mapping[str, Any]) -> None:
        """Take what a file says beside the dictionary."""

    @classmethod
    def around(cls, core: cores.Dictionary) -> Self:
        """The class with a dictionary of ours as its weights. Raises CheckpointError for one of another kind."""
        made = cls.__new__(cls)
        Shaped.__init__(made, core)
        made._settle()
        return made

    @abstractmethod
    def _settle(self) -> None:
        """Take sizes from the weights. Raises CheckpointError where they are of another class."""

    def save_pretrained(self, path: str | Path, repo_id: str | None = None, push_to_hub: bool = False) -> None:
        """A folder as the hub has it: config.json, model.safetensors, and a card; on `push_to_hub` it is uploaded."""
        with torch.no_grad():
            formats.put(
                formats.for_hub(self.core, type(self).__name__, self.state_dict(), self._arguments()), Path(path)
            )
        if push_to_hub:
            self.push_to_hub(repo_id or Path(path).name)

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, token: str | None = None, commit_message: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes. Returns the address of the commit."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "it")
            return hub.upload(Path(folder) / "it", repo_id, private, token, commit_message)


def require_unscaled(scales: bool) -> None:
    """Raises CheckpointError where rows are scaled by their spread already."""
    if scales:
        raise CheckpointError("rows are scaled already", "a normaliser", "Leave normalize_activations out")


@torch.no_grad()
def adopt(core: cores.Dictionary, made: cores.Dictionary) -> None:
    """Give a dictionary the weights, scale and form of another of its wiring, in the tensors that it has."""
    if core.wiring.widths != made.wiring.widths or core.wiring.spans != made.wiring.spans:
        value = f"{made.latents} latents of width {', '.join(map(str, made.wiring.widths.values()))}"
        raise CheckpointError("a state of another size", value, f"This one has {core.latents} latents")
    core.folded_WL = made.folded_WL
    core.load_state_dict(made.state_dict())
    core.norm, core.alpha = made.norm, made.alpha
    if (k := made.activation.form().k) and k[0] != kept(core):
        set_k(core, k[0])


def kept(core: cores.Dictionary) -> int:
    """How many latents of a row are kept now."""
    return int(core.activation.counts[0])  # type: ignore[index]


def set_k(core: cores.Dictionary, k: int) -> None:
    """Keep so many latents of a row from here on."""
    core.method = core.method.model_copy(update={"k": k})
    core.activation.budgets.k_at = constant(k)  # type: ignore[union-attr]
    core.activation.schedule(0)


class LinearShown:
    """A layer of a state: its weight, and its bias where it has one. It can be called as a torch Linear."""

    def __init__(self, owner: Shaped, name: str) -> None:
        object.__setattr__(self, "_owner", owner)
        object.__setattr__(self, "_name", name)

    def __getattr__(self, name: str) -> Any:
        if f"{self._name}.{name}" not in type(self._owner).shown:
            return None if name == "bias" else object.__getattribute__(self, name)
        return self._owner.tensor(f"{self._name}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        self._owner.put(f"{self._name}.{name}", value)

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

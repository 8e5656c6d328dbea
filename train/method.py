"""A training method: one file in train/methods, found by its file name."""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pydantic import Field

import train.methods
from shared import config
from shared.errors import ConfigError, WiringError
from train.code import Activation
from train.objective import AuxK, Reconstruction, Term
from train.schedule import Schedule, constant, ramp
from train.wiring import Wiring


@dataclass(frozen=True)
class Method:
    """What a method file builds for one dictionary: its activation and the terms of its loss."""

    activation: Activation
    terms: Sequence[Term]


class MethodConfig(config.Config, ABC):
    """Base of the class `Config` that every method file defines."""

    name: str

    def settled(self) -> int:
        """The step from which its schedules stand still."""
        return 0

    @abstractmethod
    def build(self, wiring: Wiring, steps: int) -> Method:
        """Raises WiringError, with the reason, for a wiring on which the method makes no sense."""


class TopKConfig(MethodConfig, ABC):
    """What the methods that keep k latents per row have in common."""

    k: int = Field(32, ge=1)  # latents per row (batch_topk: on average)
    k_start: int | None = Field(None, ge=1)  # k at step 0; none: k
    k_anneal: int = Field(0, ge=0)  # steps from k_start to k; 0: k from the first step on
    aux: float = Field(1 / 32, ge=0)  # weight of AuxK
    k_aux: int | None = Field(None, ge=1)  # dead latents per row in AuxK; none: half the mean width of the sources

    def settled(self) -> int:
        return self.k_anneal if self.k_start is not None else 0

    def k_at(self, wiring: Wiring) -> Schedule:
        """k over steps. Raises WiringError where it is larger than the latents."""
        start = self.k if self.k_start is None else self.k_start
        if max(self.k, start) > wiring.latents:
            value = f"{max(self.k, start)} > {wiring.latents}"
            raise WiringError("k is larger than the latents", value, "Lower method.k (method.k_start) or add latents")
        return ramp(start, self.k, self.k_anneal)

    def terms(self, wiring: Wiring) -> list[Term]:
        k_aux = self.k_aux or max(1, round(sum(wiring.widths.values()) / len(wiring.widths) / 2))
        return [Reconstruction("recon", constant(1.0)), AuxK("aux", constant(self.aux), k_aux)]


def names() -> list[str]:
    return sorted(info.name for info in pkgutil.iter_modules(train.methods.__path__))


def find(name: str) -> type[MethodConfig]:
    """The config class of a method. Raises ConfigError, naming the nearest, where there is none of this name."""
    if name not in names():
        raise config.unknown("unknown method", name, names())
    found: type[MethodConfig] = import_module(f"train.methods.{name}").Config
    return found


def parse(data: Mapping[str, Any] | str) -> MethodConfig:
    """A method's table {name = ..., ...}, or its name alone. Raises ConfigError."""
    if isinstance(data, str):
        data = {"name": data}
    if "name" not in data:
        raise ConfigError("missing key", "method.name", f"Choose one of {', '.join(names())}")
    return config.parse(find(str(data["name"])), data, "method.")

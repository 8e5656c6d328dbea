"""A training method: one file in train/methods, found by its file name."""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Self

from pydantic import Field, model_validator

import train.methods
from shared import config
from shared.errors import ConfigError, WiringError
from train import parallel
from train.code import Activation
from train.objective import AuxForm, AuxK, Entropy, Ghost, Power, PowerForm, ReconForm, Reconstruction, Term
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
    recon: ReconForm = "squared"  # of a row and source: |x - y|^2, or |x - y| (norm), beside which penalties weigh more

    def reconstruction(self) -> Term:
        return Reconstruction("recon", constant(1.0), self.recon)

    def settled(self) -> int:
        """The step from which its schedules stand still."""
        return 0

    def calibrates(self) -> bool:
        """Whether thresholds are set anew behind the training (train.calibrate)."""
        return False

    def weighs_codes(self) -> bool:
        """Whether smaller codes cost less: then they shrink without end unless decoder norms count, or are fixed."""
        return False

    def nested(self, wiring: Wiring) -> tuple[int, ...]:
        """The sizes of groups of latents of which the first few reconstruct alone; none: no group does."""
        return ()

    @abstractmethod
    def build(self, wiring: Wiring, steps: int) -> Method:
        """Raises WiringError, with the reason, for a wiring on which the method makes no sense."""


class PenaltyConfig(MethodConfig, ABC):
    """What the methods with a price on the sum of codes have in common."""

    entropy: float = Field(0.0, ge=0)  # weight of the entropy of a row's codes
    ghost: float = Field(0.0, ge=0)  # weight of ghost gradients, which teach dead latents (1: as published)

    @model_validator(mode="after")
    def _of_one_size(self) -> Self:
        if self.ghost and self.recon == "norm":
            raise ValueError("ghost gradients are scaled to a squared reconstruction error")
        return self

    def weighs_codes(self) -> bool:
        return True

    def extras(self) -> list[Term]:
        """The terms of the weights above that are not 0."""
        entropy = [Entropy("entropy", constant(self.entropy))] if self.entropy else []
        return [*entropy, *([Ghost("ghost", constant(self.ghost))] if self.ghost else [])]


class PowerConfig(PenaltyConfig, ABC):
    """What the methods whose penalty is a falling power of the codes have in common."""

    lp: float = Field(1.0, ge=0)  # weight of the penalty, for rows scaled to a mean square of 1 per component
    lp_warmup: int = Field(0, ge=0)  # steps over which it grows from 0
    form: PowerForm = "lp_p"  # lp_p: sum of f^p; lp: its 1/p-th power
    p_end: float = Field(0.2, gt=0, le=1)  # p is 1 at first
    p_updates: int = Field(10, ge=2)  # steps at which p is set, evenly spaced; at the first it is still 1
    p_first: float = Field(0.1, ge=0, le=1)  # share of the run at which they begin
    p_last: float = Field(0.9, ge=0, le=1)  # and at which they end

    def settled(self) -> int:
        return self.lp_warmup

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.p_first > self.p_last:
            raise ValueError("p_first is behind p_last")
        return self

    def penalty(self, steps: int) -> Power:
        """Of a run with fewer steps than values of p, some are passed over."""
        first, last = round(self.p_first * steps), round(self.p_last * steps)
        return Power("lp", ramp(0.0, self.lp, self.lp_warmup), self.form, self.p_end, first, last, self.p_updates)


class TopKConfig(MethodConfig, ABC):
    """What the methods that keep k latents per row have in common."""

    k: int = Field(32, ge=1)  # latents per row (batch_topk, matryoshka: on average)
    k_start: int | None = Field(None, ge=1)  # k at step 0; none: k
    k_anneal: int = Field(0, ge=0)  # steps from k_start to k; 0: k from the first step on
    aux: float = Field(1 / 32, ge=0)  # weight of AuxK
    k_aux: int | None = Field(None, ge=1)  # dead latents per row in AuxK; none: half the mean width of the sources
    aux_form: AuxForm = "input"  # what AuxK encodes: input (Gao et al. 2024) or error (DFC paper)

    def settled(self) -> int:
        return self.k_anneal if self.k_start is not None else 0

    def k_at(self, wiring: Wiring) -> Schedule:
        """k over steps. Raises WiringError where it is larger than the latents that compete for it."""
        start = self.k if self.k_start is None else self.k_start
        latents = sum(span.size for span in wiring.spans if span.k is None) * parallel.latent_ranks()
        if latents and max(self.k, start) > latents:
            value = f"{max(self.k, start)} > {latents}"
            raise WiringError("k is larger than the latents", value, "Lower method.k (method.k_start) or add latents")
        return ramp(start, self.k, self.k_anneal)

    def auxk(self, wiring: Wiring) -> Term:
        """Raises WiringError where a source has no error to encode."""
        if self.aux_form == "error" and (silent := set(wiring.readers) - set(wiring.writers)):
            value = f"{', '.join(sorted(silent))} is read and not written"
            raise WiringError("AuxK cannot encode an error that there is not", value, "Set method.aux_form to input")
        k_aux = self.k_aux or max(1, round(sum(wiring.widths.values()) / len(wiring.widths) / 2))
        return AuxK("aux", constant(self.aux), k_aux, self.aux_form)


class BatchTopKConfig(TopKConfig, ABC):
    """What the methods that share k x B latents between the rows of a batch have in common."""

    threshold_decay: float = Field(0.99, ge=0, lt=1)  # of the running mean; 0.999 lags while weights still move
    calibrate: bool = False  # set it once more behind the training, by a pass over all rows that the run keeps

    def calibrates(self) -> bool:
        return self.calibrate


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

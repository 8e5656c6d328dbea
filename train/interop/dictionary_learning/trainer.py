"""A trainer of any kind, and those that are ours.

Letters: B rows, S sources, D width, L latents.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from shared.config import unknown
from shared.device import device_of
from shared.errors import ConfigError, RowsError
from train.code import Forward
from train.interop.dictionary_learning.loose import Loose
from train.interop.dictionary_learning.recipes import Recipe, trainer
from train.interop.dictionary_learning.sae import SAE
from train.interop.dictionary_learning.shaped import Dictionary, Shaped, kept
from train.objective import Now
from train.resample import begin_again_on
from train.scale import geometric_median

BATCH_DEAD = 1e-4  # largest f x norm of a batch, of a latent that counts as dead in it (crosscoder_learning)


class LossLog(NamedTuple):
    """What `loss` gives where it is asked to log."""

    x: Tensor
    x_hat: Tensor
    f: Tensor
    losses: dict[str, float]


class Trainer(ABC):
    """A trainer of any kind: what one of one's own derives from. It has a dictionary `ae` and says what it minimises.

    `update` takes a step of Adam on `ae`, with `lr`; override it for another one.
    """

    ae: nn.Module
    lr: float = 1e-3

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.logging_parameters: list[str] = []
        if seed is not None:
            torch.manual_seed(seed)

    @abstractmethod
    def loss(self, x: Any, step: int | None = None, logging: bool = False, **keys: Any) -> Any:
        """The loss of a batch, a scalar with its graph; where `logging`, (x, x_hat, f, losses)."""

    def update(self, step: int, x: Any) -> float:
        """One step on a batch. Returns its loss."""
        value: Tensor = self.loss(x, step=step)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(value.detach())

    @cached_property
    def optimizer(self) -> Any:
        """Adam with `lr`, begun at the first step; a trainer of one's own may set another one."""
        return torch.optim.Adam(self.ae.parameters(), self.lr)

    def get_logging_parameters(self) -> dict[str, Any]:
        """What `logging_parameters` names."""
        return {name: getattr(self, name) for name in self.logging_parameters}

    @property
    def config(self) -> dict[str, Any]:
        """What config.json of a run says of it."""
        kind = type(self.ae).__name__
        return {"trainer_class": type(self).__name__, "dict_class": kind, "lr": self.lr, "seed": self.seed}


class Built(Trainer, ABC):
    """A trainer of the reference: a trainer of ours on one of its dictionaries."""

    arguments: ClassVar[type["Arguments"]]
    logged: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **keys: Any) -> None:
        """Raises ConfigError for an argument that it does not have, naming the nearest."""
        self.asked = asked = _parsed(self.arguments, keys)
        super().__init__(asked.seed)
        self.logging_parameters = list(self.logged)
        self.recipe = replace(
            self.recipe_of(asked), steps=asked.steps, warmup=asked.warmup_steps, decay_start=asked.decay_start
        )
        self.lr = self.recipe.lr
        self.ae: Any = asked.made().to(device_of("auto") if asked.device is None else asked.device)
        self.core: Any
        self.ours = issubclass(type(self.ae), Shaped)
        if self.ours:
            self._fits()
            core: Any = self.ae.core
            self.core = trainer(core, self.recipe)
            self.ae.core = self.core.dictionary
        else:
            self.core = Loose(self.ae, self.recipe, asked.activation_dim, asked.dict_size)
        self.device = self.core.idle_L.device
        self.last: dict[str, Tensor] = {}

    def _fits(self) -> None:
        """Raises ConfigError for a dictionary of ours that another trainer is for."""
        own: Any = next(one.default for one in fields(self.arguments) if one.name == "dict_class")
        kind: Any = type(self.ae)
        if kind.method != own.method or issubclass(kind, SAE) != issubclass(own, SAE):
            way_out = f"Give one such as {own.__name__}"
            raise ConfigError("this trainer is for another dictionary", kind.__name__, way_out)

    @property
    def optimizer(self) -> Any:
        return self.core.optimiser

    @abstractmethod
    def recipe_of(self, asked: Any) -> Recipe:
        """What it minimises, and how it learns; the schedule of the rate is that of its arguments."""

    def _rows(self, x: Any) -> dict[str, Tensor]:
        """{source: [B, D]} of a batch: [B, D]; of crosscoders [B, S, D]; of transcoders a pair, or [B, 2, D]."""
        widths = self.ae.core.wiring.widths if self.ours else ("x",)
        if len(widths) == 1:
            rows = [x]
        else:
            rows = list(x) if isinstance(x, tuple | list) else list(torch.as_tensor(x).unbind(1))
        if len(rows) != len(widths):
            raise RowsError("a batch of other sources than the dictionary", len(rows), f"It takes {len(widths)}")
        return {name: one.to(self.device, torch.float32) for name, one in zip(widths, rows, strict=True)}

    def loss(self, x: Any, step: int | None = None, logging: bool = False, **keys: Any) -> Any:
        """Of a batch as training sees it (`use_threshold`: as evaluation does). Changes nothing."""
        rows, now = self._rows(x), Now(self.core.step if step is None else step, self.core.dead_L)
        if not self.ours:
            return self._valued(rows, self.core(rows), None, now, logging)
        core = self.ae.core
        training = core.training
        core.train(not keys.get("use_threshold", False))
        try:
            return self._valued(rows, core(rows), core, now, logging)
        finally:
            core.train(training)

    def _valued(self, rows: Mapping[str, Tensor], out: Forward, core: Any, now: Now, logging: bool) -> Any:
        values = {term.name: term(core, out, now) for term in self.core.terms}
        value = torch.stack([term.weight(now.step) * values[term.name] for term in self.core.terms]).sum()
        return self._logged(rows, out, {**values, "loss": value}) if logging else value

    @torch.no_grad()
    def _logged(self, rows: Mapping[str, Tensor], out: Forward, values: Mapping[str, Tensor]) -> LossLog:
        f_BL = out.code.dense()
        norm_L = out.norm_L.sum(0) if out.norm_L.ndim > 1 else out.norm_L
        errors = [out.target[source] - y_BD for source, y_BD in out.y.items()]
        losses = {
            "l2_loss": torch.stack([e_BD.norm(dim=1).mean() for e_BD in errors]).mean(),
            "mse_loss": torch.stack([e_BD.square().sum(1).mean() for e_BD in errors]).mean(),
            "loss": values["loss"], "deads": (f_BL * norm_L <= BATCH_DEAD).all(0).float().mean(),
        }  # fmt: skip
        if "aux" in values:
            losses["auxk_loss"] = values["aux"]
        for name in ("l1", "lp", "price"):
            if name in values:
                losses["sparsity_loss"] = values[name]
        y = out.y
        if self.ours:
            y = {source: self.ae.core.scale.raw(source, y_BD) for source, y_BD in y.items()}
        x_hat = torch.stack(list(y.values()), 1) if len(y) > 1 else next(iter(y.values()))
        goals = [rows[source] for source in y]
        x = torch.stack(goals, 1) if len(goals) > 1 else goals[0]
        return LossLog(x, x_hat, f_BL, {name: float(value) for name, value in losses.items()})

    def update(self, step: int, x: Any) -> float:
        """One step on a batch. Returns its loss."""
        rows = self._rows(x)
        if step == 0 and self.recipe.median and self.asked.pretrained_ae is None:
            scale, writers = self.ae.core.scale, self.ae.core.wiring.writers
            point = {name: geometric_median(scale.scaled(name, rows[name])) for name in writers}
            self.ae.core.begin_at({name: one.to(rows[name]) for name, one in point.items()})
        every = self.asked.resample_steps
        if every and not issubclass(type(self.ae), Shaped):
            raise unlike(
                "resample_steps", every, "Latents of a dictionary of your own cannot be told apart: leave it out"
            )
        if every and step and step % every == 0:
            idle_L = self.core.idle_L
            begin_again_on(self.core, rows, (idle_L > 0) & (2 * idle_L >= every * len(next(iter(rows.values())))))
        self.core.step = step
        record = self.core.update(rows)
        self.last = record
        return float(record["loss"])

    # --- what is logged -----------------------------------------------------------------------------------------

    @property
    def effective_l0(self) -> float:
        """Latents of a row in the last batch."""
        return float(self.last["l0"])

    @property
    def dead_features(self) -> int:
        """Latents that have not fired for ten million rows."""
        return int(self.core.dead_L.sum())

    running_deads = dead_features

    @property
    def pre_norm_auxk_loss(self) -> float:
        """AuxK of the last batch; -1 while nothing is dead."""
        return float(self.last["aux"]) if self.dead_features else -1.0

    @property
    def k_current_value(self) -> int:
        return kept(self.ae.core)

    @property
    def config(self) -> dict[str, Any]:
        told = {one.name: getattr(self.asked, one.name) for one in fields(self.asked)}
        plain = {name: value for name, value in told.items() if isinstance(value, str | int | float | list | None)}
        sizes = {"activation_dim": self.ae.activation_dim, "dict_size": self.ae.dict_size, "lr": self.lr}
        return {
            "trainer_class": type(self).__name__, **plain, "dict_class": type(self.ae).__name__, **sizes,
            "dict_class_kwargs": {n: str(v) for n, v in (self.asked.dict_class_kwargs or {}).items()},
            **{n: v for n, v in (self.ae._arguments() if self.ours else {}).items() if n not in sizes},
            "device": str(self.device), "granary_method": self.recipe.method,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments that all trainers have."""

    activation_dim: int = 512
    dict_size: int = 64 * 512
    lr: Any = None
    steps: int | None = None  # none: as many as there are batches, and a rate that does not fall
    warmup_steps: int = 1000
    decay_start: int | None = None  # the step from which the rate falls to 0
    resample_steps: int | None = None  # between which latents that fired on none of the last half begin again
    dict_class: Any = None
    dict_class_kwargs: dict[str, Any] | None = None
    pretrained_ae: Any = None
    seed: int | None = None
    device: Any = None
    layer: Any = None
    lm_name: Any = None
    wandb_name: str | None = None
    submodule_name: Any = None
    compile: bool = False
    transcoder: bool = False  # batches are pairs: what is read, and what is to be written

    def made(self) -> nn.Module:
        """The dictionary to train. Raises ConfigError for a class that is no dictionary."""
        if self.pretrained_ae is not None:
            return Dictionary.require(self.pretrained())
        found = self.fresh(**{**self.sized(), **(self.dict_class_kwargs or {})})
        return SAE.require(found).reading("x", "y") if self.transcoder else found

    def pretrained(self) -> Any:
        """What training goes on with. Raises ConfigError where arguments of a fresh one are given, too."""
        if self.dict_class_kwargs:
            way_out = "Leave dict_class_kwargs out: it has its own"
            raise unlike("pretrained_ae beside", ", ".join(self.dict_class_kwargs), way_out)
        if issubclass(type(self.pretrained_ae), Shaped) and self.pretrained_ae.core.folded_WL is not None:
            way_out = "Its rows are scaled by coordinate, which is folded into its weights: train a fresh one"
            raise unlike("pretrained_ae", "folded", way_out)
        return self.pretrained_ae

    def sized(self) -> dict[str, Any]:
        """Arguments of the dictionary beside its width and latents."""
        return {}

    def fresh(self, **keys: Any) -> nn.Module:
        return Dictionary.require(self.dict_class(self.activation_dim, self.dict_size, **keys))


def _parsed(kind: type[Arguments], keys: Mapping[str, Any]) -> Arguments:
    known = [one.name for one in fields(kind)]
    for name in keys:
        if name not in known:
            raise unknown("this trainer has no argument", name, known)
    needed = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]
    if lacking := [name for name in needed if name not in keys]:
        raise ConfigError("this trainer needs an argument", lacking[0], "Give it")
    return kind(**keys)


def unlike(name: str, value: Any, way_out: str) -> ConfigError:
    """An argument that this trainer cannot follow."""
    return ConfigError("this trainer cannot follow an argument", f"{name} {value}", way_out)

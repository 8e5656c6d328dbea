"""Dictionaries of a user's own, trained by terms of ours that ask for nothing but rows and codes.

Letters: B rows, D width, L latents.
"""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from train import method as methods
from train.code import DenseCode, Forward
from train.interop.dictionary_learning.recipes import DEAD_ROWS, FOREVER, Recipe, weighed
from train.objective import Now
from train.schedule import learning_rate
from train.wiring import build

SOURCE = "x"
TERMS = ("recon", "l1", "lp", "entropy")  # that look at no weights


class ConstrainedAdam(torch.optim.Adam):
    """Adam that keeps the columns of some matrices [D, L] at the length 1: their gradient loses what lies along them,
    and they are brought back after each step (Bricken et al. 2023)."""

    def __init__(
        self, params: Iterable[Any], constrained_params: Iterable[nn.Parameter], lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:  # fmt: skip
        super().__init__(params, lr=lr, betas=(float(betas[0]), float(betas[1])))
        self.constrained_params = list(constrained_params)
        self.normalise()

    @torch.no_grad()
    def normalise(self) -> None:
        for one in self.constrained_params:
            length_L = torch.linalg.vector_norm(one, dim=0)
            one.div_(torch.where(length_L > 0, length_L, 1.0))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for one in self.constrained_params:
            if one.grad is not None:
                one.grad -= (one.grad * one).sum(0) * one
        found = super().step(closure)
        self.normalise()
        return found


class Loose:
    """A trainer of one: what `train.trainer.Trainer` is to dictionaries of ours, as far as Built asks for it."""

    def __init__(self, ae: nn.Module, recipe: Recipe, width: int, latents: int) -> None:
        """Raises ConfigError for a method that looks at weights, or a constraint on weights that are not there."""
        steps = recipe.steps or FOREVER
        wiring = build("autoencoder", {SOURCE: width}, latents)
        self.terms = weighed(methods.parse(recipe.method).build(wiring, steps).terms, recipe, 1)
        if strange := [term.name for term in self.terms if term.name not in TERMS]:
            way_out = "Derive a trainer from Trainer, with a loss of your own"
            raise ConfigError("this trainer looks at the weights of a dictionary", ", ".join(strange), way_out)
        self.ae, self.recipe = ae, recipe
        betas = (recipe.beta1, 0.999)
        self.optimiser = ConstrainedAdam(
            ae.parameters(), [_decoder(ae, width, latents)] if recipe.unit else [], recipe.lr, betas
        )
        decay = 0 if recipe.decay_start is None else steps - recipe.decay_start
        self.rate = learning_rate(recipe.lr, steps, recipe.warmup, decay)
        device = next(ae.parameters()).device
        self.step, self.idle_L = 0, torch.zeros(latents, dtype=torch.int64, device=device)

    @property
    def dead_L(self) -> Tensor:
        return self.idle_L >= DEAD_ROWS

    def __call__(self, rows: Mapping[str, Tensor]) -> Forward:
        """One pass, by what the module gives: rows, and codes."""
        x_BD = rows[SOURCE]
        hat_BD, f_BL = self.ae(x_BD, output_features=True)
        ones_L = torch.ones(f_BL.shape[1], device=f_BL.device)
        pre: Any = SimpleNamespace(rows=len(x_BD))  # which no term here looks at
        return Forward({SOURCE: x_BD}, {SOURCE: hat_BD}, DenseCode(f_BL), pre, ones_L, ones_L, {})

    def update(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Learn from a batch. Returns its loss, terms, and l0."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(self.step)
        out, now = self(rows), Now(self.step, self.dead_L)
        values = {term.name: term(cast(Any, None), out, now) for term in self.terms}
        loss = torch.stack([term.weight(self.step) * values[term.name] for term in self.terms]).sum()
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.ae.parameters()), self.recipe.clip)
        self.optimiser.step()
        with torch.no_grad():
            for term in self.terms:
                term.observe(out, now)
            fires_L = out.code.fires_L()
        self.idle_L = torch.where(fires_L > 0, 0, self.idle_L + out.rows)
        self.step += 1
        return {"loss": loss.detach(), "l0": fires_L.sum() / out.rows, **{n: v.detach() for n, v in values.items()}}


def _decoder(ae: nn.Module, width: int, latents: int) -> nn.Parameter:
    """ae.decoder.weight, [D, L]. Raises ConfigError where there is none."""
    found = getattr(getattr(ae, "decoder", None), "weight", None)
    if not isinstance(found, nn.Parameter) or found.shape != (width, latents):
        way_out = "Give it, or use StandardTrainerAprilUpdate, which constrains nothing"
        raise ConfigError("this trainer keeps decoder vectors at the length 1", "no decoder.weight [D, L]", way_out)
    return found

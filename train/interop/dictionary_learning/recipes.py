"""What the trainers of the reference minimise, in terms of ours.

Letters: B rows, S sources, D width, L latents.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shared import config as configs
from train import dictionary as cores
from train import method as methods
from train.code import Forward
from train.config import TrainConfig
from train.objective import Now, Term
from train.schedule import Schedule, constant
from train.trainer import Trainer

if TYPE_CHECKING:
    from train.dictionary import Dictionary

FOREVER = 10**12  # steps of a run whose end nobody has told: its rate stays
UNCLIPPED = 1e30
DEAD_ROWS = 10_000_000


@dataclass(frozen=True)
class Recipe:
    """A trainer of the reference: a method of ours with its keys, and how it learns."""

    method: dict[str, Any]
    lr: float
    steps: int | None = None
    warmup: int = 0
    decay_start: int | None = None  # the step from which the rate falls to 0
    beta1: float = 0.9
    clip: float = UNCLIPPED
    unit: bool = False  # decoder vectors have the length 1, as ConstrainedAdam keeps them
    median: bool = False  # decoder biases begin at the geometric median of the first batch
    mean_of_sources: bool = False  # the reconstruction error is the mean over sources, not the sum
    over_error: bool = False  # AuxK is divided by the variance of the error
    weights: dict[str, Schedule] = field(default_factory=dict)  # of terms, where they are not those of the method


class OverError(Term):
    """A term over the mean of |e - mean e|^2, e = x - y; 0 where that is 0 (as the reference has AuxK)."""

    apart = True

    def __init__(self, term: Term) -> None:
        super().__init__(term.name, term.weight)
        self.term = term

    def forward(self, dictionary: "Dictionary", out: Forward, now: Now) -> Tensor:
        value: Tensor = self.term(dictionary, out, now)
        if not out.y:
            return value
        error = [(out.target[source] - y_BD).detach() for source, y_BD in out.y.items()]
        spread = torch.stack([(e_BD - e_BD.mean(0)).square().sum(1).mean() for e_BD in error]).sum()
        return value * torch.where(spread > 0, 1 / spread, 0.0)


def trainer(core: cores.Dictionary, recipe: Recipe) -> Trainer:
    """A trainer of ours of a dictionary like this one, with its weights. Raises ConfigError, WiringError."""
    steps = recipe.steps or FOREVER
    method = methods.parse(recipe.method)
    made, terms = cores.create(core.wiring, method, core.scale, core.norm, steps, core.alpha)
    made.load_state_dict(core.state_dict())
    decay = 0.0 if recipe.decay_start is None else (steps - recipe.decay_start) / steps
    asked = {
        "wiring": {"latents": core.latents, "norm": core.norm, "alpha": core.alpha,
                   "decoder": "unit" if recipe.unit else "free"},
        "method": recipe.method, "steps": steps, "dead_rows": DEAD_ROWS, "precision": "fp32",
        "optimiser": {"lr": recipe.lr, "warmup": recipe.warmup, "decay": decay, "beta1": recipe.beta1,
                      "clip": recipe.clip},
    }  # fmt: skip
    device = core.activation.bias_L.device
    if recipe.unit:
        made.normalise_decoders()
    return Trainer(made.to(device), weighed(terms, recipe, len(core.wiring.writers)), configs.parse(TrainConfig, asked))


def weighed(terms: Iterable[Term], recipe: Recipe, sources: int) -> list[Term]:
    """The terms of a method with the weights of a recipe."""
    found = []
    for term in terms:
        term.weight = recipe.weights.get(term.name, term.weight)
        if term.name in ("recon", "frozen") and recipe.mean_of_sources:
            term.weight = constant(1 / sources)
        found.append(OverError(term) if term.name == "aux" and recipe.over_error else term)
    return found

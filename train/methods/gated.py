"""A gate decides which latents fire, a magnitude how much (Rajamanoharan et al. 2024, arXiv 2404.16014).

f = 1[h > 0] x relu(exp(r) x (h - b) + m)
loss = |x - y|^2 + l1 x sum relu(h) x norm + |x - y(relu(h)), by a frozen decoder|^2
"""

from typing import Literal

from pydantic import Field

from train.activation import Gated
from train.method import Method, PenaltyConfig
from train.objective import L1, Frozen
from train.schedule import constant, ramp
from train.wiring import Wiring


class Config(PenaltyConfig):
    """Gated. Set wiring.decoder to unit, as the paper does (with optimiser.beta1 = 0): free ones shrink out of the
    penalty while magnitudes grow."""

    name: Literal["gated"] = "gated"
    l1: float = Field(1.0, ge=0)  # weight of the penalty on relu(h)
    l1_warmup: int = Field(0, ge=0)  # steps over which it grows from 0

    def settled(self) -> int:
        return self.l1_warmup

    def build(self, wiring: Wiring, steps: int) -> Method:
        terms = [
            self.reconstruction(),
            L1("l1", ramp(0.0, self.l1, self.l1_warmup)),
            Frozen("frozen", constant(1.0), self.recon),
        ]
        return Method(Gated(wiring.latents), [*terms, *self.extras()])

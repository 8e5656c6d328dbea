"""Gated, with a penalty of a power p that falls from 1 on its gate (Karvonen et al. 2024, arXiv 2408.00113).

f = 1[h > 0] x relu(exp(r) x (h - b) + m)
loss = |x - y|^2 + lp x gain x sum (relu(h) x norm)^p + |x - y(relu(h)), by a frozen decoder|^2
"""

from typing import Literal

from train.activation import Gated
from train.method import Method, PowerConfig
from train.objective import Frozen
from train.schedule import constant
from train.wiring import Wiring


class Config(PowerConfig):
    """Gated with p-anneal. Set wiring.decoder to unit, as with gated."""

    name: Literal["gated_anneal"] = "gated_anneal"

    def build(self, wiring: Wiring, steps: int) -> Method:
        terms = [self.reconstruction(), self.penalty(steps), Frozen("frozen", constant(1.0), self.recon)]
        return Method(Gated(wiring.latents), [*terms, *self.extras()])

"""ReLU with a penalty of a power p that falls from 1 (Karvonen et al. 2024, https://arxiv.org/abs/2408.00113).

f = relu(h)        loss = |x - y|^2 + lp x gain x sum (f x norm)^p        gain: train.objective.Power
"""

from typing import Literal

from train.activation import Relu
from train.method import Method, PowerConfig
from train.wiring import Wiring


class Config(PowerConfig):
    """p-anneal."""

    name: Literal["p_anneal"] = "p_anneal"

    def build(self, wiring: Wiring, steps: int) -> Method:
        terms = [self.reconstruction(), self.penalty(steps)]
        return Method(Relu(wiring.latents), [*terms, *self.extras()])

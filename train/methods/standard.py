"""ReLU with an L1 penalty weighted by decoder norms: free decoders, no constraint (Anthropic's April 2024 form).

f = relu(h)        loss = |x - y|^2 + l1 x sum f x norm

With wiring.decoder = "unit" it is the form of Bricken et al. 2023: decoder vectors of length 1, their gradient without
the part along them. https://transformer-circuits.pub/2023/monosemantic-features/index.html
"""

from typing import Literal

from pydantic import Field

from train.activation import Relu
from train.method import Method, PenaltyConfig
from train.objective import L1
from train.schedule import ramp
from train.wiring import Wiring


class Config(PenaltyConfig):
    """ReLU and L1."""

    name: Literal["standard"] = "standard"
    l1: float = Field(1.0, ge=0)  # weight of the penalty, for rows scaled to a mean square of 1 per component
    l1_warmup: int = Field(0, ge=0)  # steps over which it grows from 0

    def settled(self) -> int:
        return self.l1_warmup

    def build(self, wiring: Wiring, steps: int) -> Method:
        terms = [self.reconstruction(), L1("l1", ramp(0.0, self.l1, self.l1_warmup))]
        return Method(Relu(wiring.latents), [*terms, *self.extras()])

"""ReLU with an L1 penalty weighted by decoder norms: free decoders, no constraint (Anthropic's April 2024 form).

f = relu(h)        loss = |x - y|^2 + l1 x sum f x norm
"""

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import relu

from train.code import Activation, Code, DenseCode, Pre
from train.method import Method, MethodConfig
from train.objective import L1, Reconstruction
from train.schedule import constant, ramp
from train.wiring import Wiring


class Config(MethodConfig):
    """ReLU and L1."""

    name: Literal["standard"] = "standard"
    l1: float = Field(1.0, ge=0)  # weight of the penalty, for rows scaled to a mean square of 1 per component
    l1_warmup: int = Field(0, ge=0)  # steps over which it grows from 0

    def settled(self) -> int:
        return self.l1_warmup

    def build(self, wiring: Wiring, steps: int) -> Method:
        terms = [Reconstruction("recon", constant(1.0)), L1("l1", ramp(0.0, self.l1, self.l1_warmup))]
        return Method(Relu(wiring.latents), terms)


class Relu(Activation):
    """f = relu(h)."""

    def forward(self, pre: Pre, norm_L: Tensor) -> Code:
        f_BL = relu(pre.dense())
        return DenseCode(f_BL, f_BL)

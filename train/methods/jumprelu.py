"""A learned threshold per latent (Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435).

f = h x 1[h > t]        gradients: train.activation.JumpReLU

loss = |x - y|^2 + price x
    l0      sum of 1[h > t]
    target  (mean of sum of 1[h > t] / target - 1)^2
    tanh    sum of tanh(c x f x norm)         Anthropic, https://transformer-circuits.pub/2025/january-update/index.html
+ silent x sum of relu(t - h) x norm, which brings back latents that do not fire (Anthropic, there)
"""

from typing import TYPE_CHECKING, Literal, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import relu

from train import parallel, shards
from train.activation import JumpReLU
from train.code import Forward
from train.method import Method, MethodConfig
from train.objective import Now, Term
from train.schedule import Schedule, constant, ramp
from train.wiring import Wiring

if TYPE_CHECKING:
    from train.dictionary import Dictionary

Penalty = Literal["l0", "target", "tanh"]


class Config(MethodConfig):
    """JumpReLU. The paper trains with unit decoders (wiring.decoder) and optimiser.beta1 = 0."""

    name: Literal["jumprelu"] = "jumprelu"
    penalty: Penalty = "l0"  # what firing costs
    price: float = Field(1.0, ge=0)  # weight of the penalty, for rows scaled to a mean square of 1 per component
    price_warmup: int = Field(0, ge=0)  # steps over which it grows from 0
    target: float = Field(32.0, gt=0)  # latents per row, of `target`
    c: float = Field(4.0, gt=0)  # of tanh
    silent: float = Field(0.0, ge=0)  # weight of the term for latents that do not fire (Anthropic: 3e-6)
    bandwidth: float = Field(0.001, gt=0)  # of pre-activations around the threshold, from which it learns
    threshold: float = Field(0.001, gt=0)  # at the beginning

    def settled(self) -> int:
        return self.price_warmup

    def weighs_codes(self) -> bool:
        return self.penalty == "tanh"

    def build(self, wiring: Wiring, steps: int) -> Method:
        activation = JumpReLU(wiring.latents, self.threshold, self.bandwidth)
        price = ramp(0.0, self.price, self.price_warmup)
        terms = [self.reconstruction(), Price(price, self.penalty, self.target, self.c)]
        return Method(activation, [*terms, *([Silent("silent", constant(self.silent))] if self.silent else [])])


class Price(Term):
    """What firing costs: `l0`, `target` or `tanh`, as the head of this file has them."""

    def __init__(self, weight: Schedule, penalty: Penalty, target: float, c: float) -> None:
        super().__init__("price", weight)
        self.penalty, self.target, self.c = penalty, target, c

    def forward(self, dictionary: "Dictionary", out: Forward, now: Now) -> Tensor:
        if self.penalty == "tanh":
            return out.code.sums(torch.tanh, self.c * out.norm_L, out.weight_L).mean()
        l0 = out.code.soft.l1(out.weight_L)
        if self.penalty == "l0":
            return l0
        [total] = parallel.summed([l0.detach()])
        return ((l0 + (total / parallel.row_ranks() - l0.detach())) / self.target - 1).square()  # the mean of all ranks


class Silent(Term):
    """mean over rows of sum over latents of relu(t - h) x norm."""

    def forward(self, dictionary: "Dictionary", out: Forward, now: Now) -> Tensor:
        below_BL = relu(cast(JumpReLU, dictionary.activation).threshold_L - out.pre.dense_BL)
        return shards.total((below_BL * out.norm_L).sum(1).mean())

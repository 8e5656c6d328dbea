"""The k x B largest relu(h) x decoder norm of a batch of B (Bussmann et al. 2024, https://arxiv.org/abs/2412.06410).

training:    f = relu(h) where relu(h) x norm is among the batch's k x B largest
evaluation:  f = relu(h) where relu(h) x norm > threshold, a running mean of the smallest score that was kept
loss = |x - y|^2 + aux x AuxK
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import relu

from train import parallel
from train.code import Activation, Code, Pre, SparseCode
from train.kernels import above, top_of_batch
from train.method import Method, TopKConfig
from train.schedule import Schedule
from train.wiring import Wiring


class Config(TopKConfig):
    """BatchTopK."""

    name: Literal["batch_topk"] = "batch_topk"
    threshold_decay: float = Field(0.99, ge=0, lt=1)  # of the running mean; 0.999 lags while weights still move

    def build(self, wiring: Wiring, steps: int) -> Method:
        activation = BatchTopK(wiring.latents, self.k_at(wiring), self.threshold_decay)
        return Method(activation, self.terms(wiring))


class BatchTopK(Activation):
    """f = relu(h) on the k x B largest relu(h) x norm of the batch; above a threshold at evaluation.

    The threshold is the mean over training steps of the smallest positive kept score, with weights decay^age, so that
    it is right from the first step on and follows k while that is annealed.
    """

    mean: Tensor
    mass: Tensor

    def __init__(self, latents: int, k: Schedule, decay: float) -> None:
        super().__init__(latents)
        self.k_at, self.decay = k, decay
        self.schedule(0)
        self.register_buffer("mean", torch.zeros(()))  # sum of decay^age x (1 - decay) x score
        self.register_buffer("mass", torch.zeros(()))  # sum of decay^age x (1 - decay)

    @property
    def threshold(self) -> Tensor:
        """0 before the first step: then every positive pre-activation passes."""
        return self.mean / self.mass.clamp_min(1e-12)

    def forward(self, pre: Pre, norm_L: Tensor) -> Code:
        score_BL = relu(pre.h_BL) * norm_L.detach()
        if self.training:
            entries = top_of_batch(score_BL, min(self.k * len(score_BL), score_BL.numel()))
        else:
            entries = above(score_BL, self.threshold)
        return SparseCode(entries, relu(pre.at(entries)))

    def observe(self, code: Code, norm_L: Tensor) -> None:
        smallest = parallel.least(code.smallest(norm_L))
        kept = torch.isfinite(smallest)  # a batch without a positive code says nothing
        weight = (1 - self.decay) * kept
        self.mean.lerp_(torch.where(kept, smallest, self.mean), weight)
        self.mass.lerp_(torch.ones_like(self.mass), weight)

    def schedule(self, step: int) -> None:
        self.k = round(self.k_at(step))

"""The k x B largest relu(h) x decoder norm of a batch of B (Bussmann et al. 2024, https://arxiv.org/abs/2412.06410).

training:    f = relu(h) where relu(h) x norm is among the batch's k x B largest
evaluation:  f = relu(h) where relu(h) x norm > threshold, a running mean of the smallest score that was kept
loss = |x - y|^2 + aux x AuxK
"""

from typing import Literal

from train.activation import BatchTopK
from train.method import BatchTopKConfig, Method
from train.wiring import Wiring


class Config(BatchTopKConfig):
    """BatchTopK."""

    name: Literal["batch_topk"] = "batch_topk"

    def build(self, wiring: Wiring, steps: int) -> Method:
        activation = BatchTopK(wiring, self.k_at(wiring), self.threshold_decay)
        return Method(activation, [self.reconstruction(), self.auxk(wiring)])

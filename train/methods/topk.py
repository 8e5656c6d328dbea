"""The k largest of every row (Gao et al. 2024, https://arxiv.org/abs/2406.04093), ranked by relu(h) x decoder norm.

f = relu(h) where relu(h) x norm is among the row's k largest        loss = |x - y|^2 + aux x AuxK
"""

from typing import Literal

from torch import Tensor
from torch.nn.functional import relu

from train.code import Activation, Code, Pre, SparseCode
from train.kernels import top_per_row
from train.method import Method, TopKConfig
from train.schedule import Schedule
from train.wiring import Wiring


class Config(TopKConfig):
    """TopK."""

    name: Literal["topk"] = "topk"

    def build(self, wiring: Wiring, steps: int) -> Method:
        return Method(TopK(wiring.latents, self.k_at(wiring)), self.terms(wiring))


class TopK(Activation):
    """f = relu(h) on the k largest relu(h) x norm of every row."""

    def __init__(self, latents: int, k: Schedule) -> None:
        super().__init__(latents)
        self.k_at = k
        self.schedule(0)

    def forward(self, pre: Pre, norm_L: Tensor) -> Code:
        entries = top_per_row(relu(pre.h_BL) * norm_L.detach(), self.k)
        return SparseCode(entries, relu(pre.at(entries)))

    def schedule(self, step: int) -> None:
        self.k = round(self.k_at(step))

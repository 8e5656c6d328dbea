"""The k largest of every row (Gao et al. 2024, https://arxiv.org/abs/2406.04093), ranked by relu(h) x decoder norm.

f = relu(h) where relu(h) x norm is among the row's k largest
loss = |x - y|^2 + aux x AuxK + multi x |x - y of the 4 k largest|^2
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field
from torch import Tensor
from torch.nn.functional import relu

from train.activation import Budgets
from train.code import Activation, Forward, Pre, SparseCode
from train.kernels import top_per_row
from train.method import Method, TopKConfig
from train.objective import Now, Reconstruction, Term, squared_error
from train.schedule import Schedule, constant
from train.wiring import Wiring

if TYPE_CHECKING:
    from train.dictionary import Dictionary

MULTI = 4  # times k


class Config(TopKConfig):
    """TopK."""

    name: Literal["topk"] = "topk"
    multi: float = Field(0.0, ge=0)  # weight of the reconstruction by 4 k latents (Multi-TopK: 0.125); 0: none

    def build(self, wiring: Wiring, steps: int) -> Method:
        activation = TopK(wiring, self.k_at(wiring))
        terms = [Reconstruction("recon", constant(1.0)), self.auxk(wiring)]
        return Method(activation, [*terms, *([Multi("multi", constant(self.multi))] if self.multi else [])])


class TopK(Activation):
    """f = relu(h) on the k largest relu(h) x norm of every row."""

    def __init__(self, wiring: Wiring, k: Schedule) -> None:
        super().__init__(wiring.latents)
        self.budgets = Budgets(wiring, k)
        self.schedule(0)

    def forward(self, pre: Pre, norm_L: Tensor) -> SparseCode:
        return self.strongest(pre, norm_L, self.counts)

    def strongest(self, pre: Pre, norm_L: Tensor, counts: Sequence[int]) -> SparseCode:
        entries = self.budgets.select(relu(pre.h_BL) * norm_L.detach(), counts, top_per_row)
        return SparseCode(entries, relu(pre.at(entries)))

    def schedule(self, step: int) -> None:
        self.counts = self.budgets.counts(step)


class Multi(Term):
    """mean over rows of sum over sources of |x - y|^2 where y is written by the 4 k strongest latents of each row."""

    def forward(self, dictionary: "Dictionary", out: Forward, now: Now) -> Tensor:
        activation = cast(TopK, dictionary.activation)
        code = activation.strongest(out.pre, out.norm_L, [MULTI * k for k in activation.budgets.counts(now.step)])
        return squared_error(out.target, dictionary.written(code))

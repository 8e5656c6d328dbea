"""The k largest of every row (Gao et al. 2024, https://arxiv.org/abs/2406.04093), ranked by relu(h) x decoder norm.

f = relu(h) where relu(h) x norm is among the row's k largest
loss = |x - y|^2 + aux x AuxK + multi x |x - y of the 4 k largest|^2
"""

from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field
from torch import Tensor

from train.activation import Selecting
from train.code import Form, Forward
from train.kernels.entries import Entries
from train.kernels.select import top_per_row
from train.method import Method, TopKConfig
from train.objective import Now, ReconForm, Term, error
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
        terms = [self.reconstruction(), self.auxk(wiring)]
        multi = [Multi("multi", constant(self.multi), self.recon)] if self.multi else []
        return Method(activation, [*terms, *multi])


class TopK(Selecting):
    """f = relu(h) on the k largest relu(h) x norm of every row."""

    def pick(self, score_BL: Tensor, writer: int) -> Entries:
        return self.budgets.select(score_BL, self.counts, top_per_row)

    def form(self) -> Form:
        return Form("topk", self.k)


class Multi(Term):
    """The reconstruction error where y is written by the 4 k strongest latents of each row."""

    def __init__(self, name: str, weight: Schedule, form: ReconForm) -> None:
        super().__init__(name, weight)
        self.form = form

    def forward(self, dictionary: "Dictionary", out: Forward, now: Now) -> Tensor:
        activation = cast(TopK, dictionary.activation)
        counts = [MULTI * k for k in activation.budgets.counts(now.step)]
        code = activation.kept(
            out.pre, out.norm_L, lambda score, _: activation.budgets.select(score, counts, top_per_row)
        )
        return error(out.target, dictionary.written(code, out.base), self.form)

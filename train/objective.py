"""What is minimised: a sum of named terms.

Letters: B rows of a batch, D width of a source, L latents, K kept entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import relu

from train import parallel
from train.code import Forward, SparseCode
from train.kernels import Entries, top_per_row
from train.schedule import Schedule

if TYPE_CHECKING:
    from train.dictionary import Dictionary


@dataclass(frozen=True)
class Now:
    """The state of training that terms may look at."""

    step: int
    dead_L: Tensor  # bool: latents that have not fired for `dead_rows` rows


class Term(ABC):
    """One addend of the loss: weight(step) x value. A final class per formula."""

    def __init__(self, name: str, weight: Schedule) -> None:
        self.name, self.weight = name, weight

    @abstractmethod
    def __call__(self, dictionary: Dictionary, out: Forward, now: Now) -> Tensor:
        """The unweighted value, a scalar. Changes nothing."""


class Reconstruction(Term):
    """mean over rows of sum over written sources of |x - y|^2, in scaled space."""

    def __call__(self, dictionary: Dictionary, out: Forward, now: Now) -> Tensor:
        return torch.stack([_squared(out.target[source] - out.y[source]) for source in out.y]).sum()


class L1(Term):
    """mean over rows of sum over latents of f x norm (Lindsey et al. 2024 for crosscoders, with norm = sum)."""

    def __call__(self, dictionary: Dictionary, out: Forward, now: Now) -> Tensor:
        return out.code.l1(out.norm_L)


class AuxK(Term):
    """The error that the k_aux strongest dead latents of a row could explain (Gao et al. 2024, section A.2).

    e = x - y, taken as given; e_hat = sum over those latents of relu(h) x W; mean over rows of |e - e_hat|^2, summed
    over sources. A latent reaches only the sources that it writes to. 0 while no latent is dead, or where the value is
    not finite.
    """

    def __init__(self, name: str, weight: Schedule, k_aux: int) -> None:
        super().__init__(name, weight)
        self.k_aux = k_aux

    def __call__(self, dictionary: Dictionary, out: Forward, now: Now) -> Tensor:
        dead = torch.nonzero(now.dead_L).flatten()
        first = next(iter(out.y.values()))
        if not len(dead):
            return first.new_zeros(())
        top = top_per_row(out.pre.h_BL[:, dead], min(self.k_aux, len(dead)))
        entries = Entries(top.row_K, dead[top.latent_K], len(first), len(now.dead_L))
        code = SparseCode(entries, relu(out.pre.at(entries)))
        parts = []
        for source, y_BD in out.y.items():
            error_BD = (out.target[source] - y_BD).detach()
            parts.append(_squared(error_BD - code.write(dictionary.decoder[source], dictionary.writes[source])))
        value = torch.stack(parts).sum()
        # Not torch.where: behind it the gradient would be 0 x inf = NaN. This waits for the device, as `nonzero` did.
        return value if parallel.least(torch.isfinite(value).float()) else torch.zeros_like(value)


def _squared(x_BD: Tensor) -> Tensor:
    return x_BD.square().sum(1).mean()

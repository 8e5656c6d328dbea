"""BatchTopK whose first latents also reconstruct alone (Bussmann, Nabeshima et al. 2025, arXiv 2503.17547).

loss = mean over prefixes m of |x - (f[:m] W[:m] + bias)|^2 + aux x AuxK

Latents are selected once, for the whole code. A prefix takes the same share of every span, so that exclusive latents
are nested among themselves.
"""

from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from shared.errors import WiringError
from train import parallel
from train.activation import BatchTopK
from train.code import Forward
from train.method import BatchTopKConfig, Method
from train.objective import Now, ReconForm, Term, error
from train.schedule import constant
from train.wiring import Wiring

if TYPE_CHECKING:
    from train.dictionary import Dictionary


class Config(BatchTopKConfig):
    """Matryoshka BatchTopK."""

    name: Literal["matryoshka"] = "matryoshka"
    groups: list[float] = Field([1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32], min_length=1)  # shares of each span, sum 1

    @field_validator("groups")
    @classmethod
    def _whole(cls, value: list[float]) -> list[float]:
        if min(value) <= 0 or abs(sum(value) - 1) > 1e-6:
            raise ValueError("shares above 0 whose sum is 1 are needed")
        return value

    def nested(self, wiring: Wiring) -> tuple[int, ...]:
        return tuple(np.bincount(group_of(wiring, self.groups)).tolist())

    def build(self, wiring: Wiring, steps: int) -> Method:
        activation = BatchTopK(wiring, self.k_at(wiring), self.threshold_decay)
        return Method(
            activation, [Nested(group_of(wiring, self.groups), len(self.groups), self.recon), self.auxk(wiring)]
        )


def group_of(wiring: Wiring, shares: list[float]) -> Tensor:
    """The number of each latent's group, int64 L: borders are rounded, and the last group ends with its span.

    Raises WiringError where a group has no latent, or not as many on every rank that shares latents.
    """
    parts, ranks = [], parallel.latent_ranks()
    for span in wiring.spans:
        ends = np.array([round(share * span.size * ranks) for share in accumulate(shares)][:-1])
        if (ends % ranks).any():
            value = f"the first {ends[ends % ranks > 0][0]:,} latents of {span.name} over {ranks} ranks"
            raise WiringError("a group of latents cannot be shared evenly", value, "Change method.groups")
        parts.append(np.searchsorted(ends // ranks, np.arange(span.size), side="right"))
    group_L = np.concatenate(parts)
    if empty := sorted(set(range(len(shares))) - set(group_L.tolist())):
        way_out = "Add latents, or give fewer or larger method.groups"
        raise WiringError("a group of latents is empty", f"group {empty[0]} of {wiring.latents} latents", way_out)
    return torch.from_numpy(group_L)


class Nested(Term):
    """The mean over prefixes of the reconstruction error of what the prefix writes, with the bias."""

    group_L: Tensor

    def __init__(self, group_L: Tensor, groups: int, form: ReconForm) -> None:
        super().__init__("recon", constant(1.0))
        self.groups, self.form = groups, form
        self.register_buffer("group_L", group_L, persistent=False)

    def forward(self, dictionary: "Dictionary", out: Forward, now: Now) -> Tensor:
        x, y = {}, {}
        for source, x_BD in out.target.items():
            weights_SD, ports = dictionary.decoder[source], dictionary.writes[source]
            y[source] = out.code.write_groups(weights_SD, ports, self.group_L, self.groups).cumsum(1)
            x[source] = (x_BD - out.base[source])[:, None].expand_as(y[source])
        return error(x, y, self.form)

"""Weights of a wiring, rows and kept entries for tests of kernels and of what calls them.

Letters: B rows of a batch, D width of a source, L latents, K kept entries.
"""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import CASES, random_rows, wiring
from tests.train.dense import full, places
from train.kernels.choice import Kernels
from train.kernels.select import above
from train.pre import Ports, Pre
from train.wiring import Wiring

ROWS, LATENTS = 7, 20
EXACT = Kernels()
every_case = pytest.mark.parametrize("case", CASES)
seeds = st.integers(0, 2**16)


def matrix(rows: int, latents: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, latents, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Problem:
    """Random weights of a wiring, as leaves, and entries of which some rows and latents have none."""

    def __init__(self, case: str, seed: int, dtype: torch.dtype = torch.float64, keep: float = 0.3) -> None:
        self.wiring: Wiring = wiring(case, LATENTS)
        generator = torch.Generator().manual_seed(seed)
        self.x = {name: x_BD.to(dtype) for name, x_BD in random_rows(case, ROWS, seed).items()}
        self.reads = {n: Ports.of(n, self.wiring.read_by(n), LATENTS) for n in self.wiring.readers}
        self.writes = {n: Ports.of(n, self.wiring.written_to(n), LATENTS) for n in self.wiring.writers}

        def leaf(rows: int, *width: int) -> Tensor:
            return torch.randn(rows, *width, generator=generator, dtype=dtype).requires_grad_()

        self.encoder = {n: leaf(p.size, self.wiring.widths[n]) for n, p in self.reads.items()}
        self.decoder = {n: leaf(p.size, self.wiring.widths[n]) for n, p in self.writes.items()}
        self.bias_L = leaf(LATENTS)
        kept_BL = torch.rand(ROWS, LATENTS, generator=generator) < keep
        kept_BL[2], kept_BL[:, 3] = False, False
        self.entries = above(kept_BL.to(dtype), 0.5)
        self.value_K = leaf(len(self.entries.row_K))
        self.generator = generator

    def pre(self, bias_L: Tensor, encoder: Mapping[str, Tensor], kernels: Kernels = EXACT) -> Pre:
        return Pre(self.wiring, self.x, dict(encoder), self.reads, bias_L, kernels)

    def dense_h(self) -> Tensor:
        h_BL = self.bias_L.double()
        for name, weights in self.encoder.items():
            h_BL = h_BL + self.x[name].double() @ full(weights, places(self.wiring, name, "readers")).T
        return h_BL


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}

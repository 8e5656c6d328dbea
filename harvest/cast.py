"""fp16 with a guard: a power-of-two scale per source, and counts of what it cannot hold.

Letters: N rows, D width.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.store import CLIPPED, MASKED, SINK

FP16_MAX = 65_504.0
LARGEST_NORM = float(torch.finfo(torch.float32).max)  # no norm is above it; JSON has no infinity
HEADROOM = 4.0  # times the largest component that the calibration saw
TOLERANCES = 2.0**-9, 8.0  # at least, and times the difference that the calibration saw between two shapes of a batch
SINK_MULTIPLE = 10.0  # a row is a sink where its norm is above this multiple of the median (pitfalls of Qwen, Gemma)


@dataclass(frozen=True)
class Cast:
    """Rows as they are stored; `x_ND` are the same rows before division and rounding, masked ones zeroed."""

    values_ND: Tensor
    norms_N: Tensor
    faults_N: np.ndarray
    x_ND: Tensor


def factor_for(largest: float) -> float:
    """The smallest power of two >= 1 with which `largest` x HEADROOM fits into fp16."""
    return 2.0 ** max(0, math.ceil(math.log2(max(largest, 1e-30) * HEADROOM / FP16_MAX)))


def cast(x_ND: Tensor, factor: float, sink_norm: float) -> Cast:
    """Divide by `factor` (exact, a power of two), clip, round to fp16; what was done to a row is in its faults."""
    x_ND = x_ND.float()
    finite_N = torch.isfinite(x_ND).all(1)
    x_ND = torch.where(finite_N[:, None], x_ND, 0.0)
    norms_N = torch.linalg.vector_norm(x_ND, dim=1)
    scaled_ND = x_ND / factor
    clipped_N = (scaled_ND.abs() > FP16_MAX).any(1)
    faults_N = CLIPPED * clipped_N.to(torch.uint8) + MASKED * (~finite_N).to(torch.uint8)
    faults_N += SINK * (norms_N > sink_norm).to(torch.uint8)
    return Cast(scaled_ND.clamp_(-FP16_MAX, FP16_MAX).half(), norms_N, faults_N.cpu().numpy(), x_ND)


def calibrated(norms: list[Tensor], largest: float, rounding: float) -> dict[str, float]:
    """attributes.granary.scale of one source, from the rows that the calibration saw. Norms of zero are left out.

    `rounding` is the largest relative difference between rows of one token in two batches of other shapes.
    """
    norms_N = torch.cat(norms).double()
    median = float(norms_N[norms_N > 0].median()) if bool((norms_N > 0).any()) else 0.0
    least, times = TOLERANCES
    return {
        "factor": factor_for(largest),
        "largest": largest,
        "median_norm": median,
        "sink_norm": SINK_MULTIPLE * median if median else LARGEST_NORM,
        "tolerance": max(least, times * rounding),
    }


def difference(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """|x - y| / |x| per row (0 where both are 0): what rounding leaves of it is small, another token's is not."""
    norms_N = torch.linalg.vector_norm(x_ND, dim=1)
    return torch.linalg.vector_norm(x_ND - y_ND, dim=1) / norms_N.clamp_min(1e-30)

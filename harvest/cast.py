"""fp16 (or bfloat16) with a guard: a power-of-two scale per source, and counts of what it cannot hold.

Letters: N rows, D width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.flags import CLIPPED, MASKED, SINK, SINK_MULTIPLE

LARGEST_NORM = float(torch.finfo(torch.float32).max)  # no norm is above it; JSON has no infinity
HEADROOM = 4.0  # times the largest component that the calibration saw
# Times the stored type's epsilon at least, and times the difference between two shapes of a batch.
TOLERANCES = 2.0, 8.0


@dataclass(frozen=True)
class Cast:
    """Rows as they are stored; `x_ND` are the same rows before division and rounding, masked ones zeroed.

    `subnormal` counts components that are not zero and below the smallest normal number of the stored type: there the
    precision falls, down to 0. All are on the rows' device, and nothing has waited for them.
    """

    values_ND: Tensor
    norms_N: Tensor
    faults_N: Tensor
    x_ND: Tensor
    subnormal: Tensor


def factor_for(largest: float, dtype: torch.dtype) -> float:
    """The smallest power of two >= 1 with which `largest` x HEADROOM fits into the stored type."""
    return 2.0 ** max(0, math.ceil(math.log2(max(largest, 1e-30) * HEADROOM / torch.finfo(dtype).max)))


def cast(x_ND: Tensor, factor: float, sink_norm: float, dtype: torch.dtype = torch.float16) -> Cast:
    """Divide by `factor` (exact, a power of two), clip, round to `dtype`; what was done to a row is in its faults."""
    limits = torch.finfo(dtype)
    x_ND = x_ND.float()
    finite_N = torch.isfinite(x_ND).all(1)
    x_ND = torch.where(finite_N[:, None], x_ND, 0.0)
    norms_N = torch.linalg.vector_norm(x_ND, dim=1)
    scaled_ND = x_ND / factor
    size_ND = scaled_ND.abs()
    clipped_N = (size_ND > limits.max).any(1)
    faults_N = CLIPPED * clipped_N.to(torch.uint8) + MASKED * (~finite_N).to(torch.uint8)
    faults_N += SINK * (norms_N > sink_norm).to(torch.uint8)
    subnormal = ((size_ND < limits.tiny) & (size_ND > 0)).sum()
    values_ND = scaled_ND.clamp_(-limits.max, limits.max).to(dtype)
    return Cast(values_ND, norms_N, faults_N, x_ND, subnormal)


def calibrated(norms: list[Tensor], largest: float, rounding: float, dtype: torch.dtype) -> dict[str, float]:
    """attributes.granary.scale of one source, from the rows that the calibration saw. Norms of zero are left out.

    `rounding` is the largest relative difference between rows of one token in two batches of other shapes.
    """
    norms_N = torch.cat(norms).double()
    median = float(norms_N[norms_N > 0].median()) if bool((norms_N > 0).any()) else 0.0
    steps, times = TOLERANCES
    return {
        "factor": factor_for(largest, dtype),
        "largest": largest,
        "median_norm": median,
        "sink_norm": SINK_MULTIPLE * median if median else LARGEST_NORM,
        "tolerance": max(steps * torch.finfo(dtype).eps, times * rounding),
    }


def difference(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """|x - y| / |x| per row (0 where both are 0): what rounding leaves of it is small, another token's is not."""
    norms_N = torch.linalg.vector_norm(x_ND, dim=1)
    return torch.linalg.vector_norm(x_ND - y_ND, dim=1) / norms_N.clamp_min(1e-30)

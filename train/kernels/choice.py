"""How a step is computed: kept codes as entries or matrices, products in fp32 or bf16; by what was measured.

And whether what is kept is selected and summed by torch or by Triton.
"""

import os
from dataclasses import dataclass
from functools import cache
from textwrap import shorten
from typing import Literal

import torch

from shared.errors import ConfigError

Codes = Literal["auto", "sparse", "dense"]
Precision = Literal["auto", "fp32", "bf16"]
# The share of entries up to which kept ones are faster than whole matrices: tests/benchmarks/LOG.md.
SPARSE = {"cpu": 0.07, "cuda": 0.02}
# Multiplications of a product from which bf16 saves a sixth of a step, there too.
LARGE = 2**28
TRITON = "GRANARY_TRITON"  # in the environment


@dataclass(frozen=True)
class Kernels:
    """What a dictionary is told of how to compute. Its own: exact products, and what is faster for codes."""

    codes: Codes = "auto"
    precision: Precision = "fp32"
    micro_batch: int | None = None  # rows whose scores are held at once; none: all

    def exact(self) -> "Kernels":
        """These without rounding: for evaluation."""
        return Kernels(self.codes)

    def sparse(self, device: torch.device, share: float) -> bool:
        """Whether codes of which this share is kept go by their entries."""
        return share <= SPARSE.get(device.type, 0.0) if self.codes == "auto" else self.codes == "sparse"

    def bf16(self, device: torch.device, size: int) -> bool:
        """Whether a product of so many multiplications takes factors that are rounded to bf16."""
        if self.precision != "auto":
            return self.precision == "bf16"
        return size >= LARGE and has_bf16(device.type)


@cache
def by_latent(device: str) -> bool:
    """Whether scores are written with the rows of a latent side by side: so a CPU without AVX-512 multiplies sooner."""
    return device == "cpu" and not torch.cpu._is_avx512_supported()


@cache
def has_bf16(device: str) -> bool:
    """Whether a kind of device multiplies bf16 in hardware: a GPU from Ampere on, a CPU with AMX or AVX512-BF16."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@cache
def by_triton(device: torch.device) -> bool:
    """Whether Triton selects and sums kept entries on a device: on CUDA, where it can be had.

    $GRANARY_TRITON: 0 never, 1 always. Raises ConfigError where it is asked for and cannot be had.
    """
    asked = os.environ.get(TRITON, "")
    if asked not in ("", "0", "1"):
        raise ConfigError(f"no such {TRITON}", asked, "Set it to 0 (never) or 1 (always), or leave it out")
    if asked == "0" or (not asked and device.type != "cuda"):
        return False
    try:
        from train.kernels import fused, radix

        fused.check(device)
        radix.check(device)
    except ImportError as error:
        if not asked:
            return False
        reason = shorten(str(error), 300).rstrip(".")
        way_out = f"It needs a GPU, the package triton and a C compiler. Leave {TRITON} out to do without"
        raise ConfigError(f"no Triton on {device}", reason, way_out) from error
    return True

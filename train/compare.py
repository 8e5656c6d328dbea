"""How alike the latents of two dictionaries are, or those of one and the features that were planted.

Letters: L latents, M latents of another dictionary, G planted features, D width of a source.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from shared.errors import StoreError
from train.dictionary import Dictionary

TOGETHER = 4096  # vectors that are compared with all others at once
ALIKE = (0.7, 0.9)  # cosines above which latents are counted

FORMULAS = {
    "mean": "mean over latents of the first of their largest cosine with any latent of the second",
    "median": "the median of these",
    **{f"above_{bar}": f"share of latents of the first for which it is above {bar}" for bar in ALIKE},
}


def largest_cosines(of_LD: Tensor, with_MD: Tensor) -> Tensor:
    """For each vector its largest cosine with any of the others, [L]; that of a vector of zeros is 0."""
    with_MD = normalize(with_MD, dim=1)
    parts = [(normalize(part, dim=1) @ with_MD.T).max(1).values for part in of_LD.split(TOGETHER)]
    return torch.cat(parts)


def mmcs(planted_GD: Tensor, found_LD: Tensor) -> float:
    """Mean over planted features of the largest cosine with any latent (Sharkey et al. 2022)."""
    return float(largest_cosines(planted_GD, found_LD).double().mean())


def mcc(planted_GD: Tensor, found_LD: Tensor) -> float:
    """The same, each latent standing for one feature at most: the best assignment (Kuhn 1955); 0 for what is left."""
    from scipy.optimize import linear_sum_assignment

    cosine_GL = (normalize(planted_GD, dim=1) @ normalize(found_LD, dim=1).T).double().numpy()
    rows, columns = linear_sum_assignment(cosine_GL, maximize=True)
    return float(cosine_GL[rows, columns].sum() / len(planted_GD))


@torch.no_grad()
def compare(first: Dictionary, second: Dictionary) -> dict[str, dict[str, Any]]:
    """{source: figures} of the decoder vectors that both dictionaries write to it (FORMULAS), such as of two seeds.

    Raises StoreError where they have no written source of one name and width.
    """
    shared = [
        name for name in first.wiring.writers
        if name in second.wiring.writers and first.wiring.widths[name] == second.wiring.widths[name]
    ]  # fmt: skip
    if not shared:
        told = " and ".join(", ".join(one.wiring.writers) for one in (first, second))
        raise StoreError("these dictionaries write to no source of one name and width", told, "Give two of one store")
    return {name: _figures(largest_cosines(first.decoder[name], second.decoder[name])) for name in shared}


def _figures(cosine_L: Tensor) -> dict[str, float]:
    found = cosine_L.double().numpy()
    shares = {f"above_{bar}": float((found > bar).mean()) for bar in ALIKE}
    return {"latents": len(found), "mean": float(found.mean()), "median": float(np.median(found)), **shares}

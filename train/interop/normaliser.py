"""How crosscoder_learning has scaled rows, by what its files have of it.

E4     activation_normalizer.mean, .std               (x - mean) / (std + 1e-8), per coordinate
E5     activation_mean, activation_std                the same; not a number: none
E6     and target_rms, activation_global_scale ()     (x - mean) x scale, one for all sources
E7     and activation_global_scale (sources,)         (x - mean) x scale, of each source

scale = target_rms / sqrt(sum of std^2 + 1e-8). Its files' own way back divides by scale + 1e-8; here it is the inverse.

Letters: S sources, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.errors import CheckpointError
from train.interop.tensors import Taken

OLD = ("activation_normalizer.mean", "activation_normalizer.std")
NEW = ("activation_mean", "activation_std")
SMALL = 1e-8


@dataclass(frozen=True)
class Normaliser:
    """x -> (x - mean) x factor: a factor of each source, [S], or of each of its coordinates, [S, D]."""

    mean_SD: Tensor
    factor: Tensor
    std_SD: Tensor
    target: float = 1.0


def taken(state: Taken, sources: int, width: int) -> tuple[Normaliser | None, str]:
    """The normaliser in a state, none where there is none or it is not in use, and the era that has it so."""
    if OLD[0] in state:
        mean_SD, std_SD = (state.tensor(name).reshape(sources, width) for name in OLD)
        return Normaliser(mean_SD, 1 / (std_SD + SMALL), std_SD), "E4"
    if NEW[0] not in state:
        return None, ""
    mean_SD, std_SD = (state.tensor(name, finite=False).reshape(sources, width) for name in NEW)
    used = not (mean_SD.isnan().any() or std_SD.isnan().any())
    if "target_rms" not in state:
        return (Normaliser(mean_SD, 1 / (std_SD + SMALL), std_SD) if used else None), "E5"
    target = state.number("target_rms")
    scale = state.tensor("activation_global_scale", finite=False)
    era = "E7" if scale.shape == (sources,) else "E6"
    if not used:
        return None, era
    if not torch.isfinite(scale).all():
        over = (0, 1) if era == "E6" else 1
        scale = target / (std_SD.square().sum(over) + SMALL).sqrt()
    if not torch.isfinite(scale).all():
        way_out = "Take a checkpoint that has target_rms and activation_global_scale"
        raise CheckpointError("rows are scaled by what is not a number", state.path, way_out)
    return Normaliser(mean_SD, scale.reshape(-1).expand(sources), std_SD, target), era

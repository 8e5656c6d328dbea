"""How crosscoder_learning has scaled rows, by what its files have of it.

E4     activation_normalizer.mean, .std               (x - mean) / (std + 1e-8), per coordinate
E5     activation_mean, activation_std                the same; not a number: none
E6     and target_rms, activation_global_scale ()     (x - mean) x scale, one for all sources
E7     and activation_global_scale (sources,)         (x - mean) x scale, of each source

scale = target_rms / sqrt(sum of std^2 + 1e-8). Its files' own way back divides by scale + 1e-8; here it is the inverse.

Letters: S sources, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.errors import CheckpointError
from train.interop.tensors import State, Taken
from train.scale import Scale

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

    @classmethod
    def of(
        cls, mean_SD: Tensor | None, std_SD: Tensor | None, target: float, shape: tuple[int, int]
    ) -> "Normaliser | None":
        """That of E7, which scales rows to a root mean square length of `target`; none without means and spreads that
        are numbers. Raises CheckpointError for those of another shape."""
        if mean_SD is None or std_SD is None or bool(mean_SD.isnan().any() or std_SD.isnan().any()):
            return None
        for what, given in (("means", mean_SD), ("spreads", std_SD)):
            if given.shape != shape:
                way_out = f"{shape[1]} of each source: {shape[0]}"
                raise CheckpointError(f"{what} of another shape", tuple(given.shape), way_out)
        std_SD = std_SD.detach().float().cpu()
        factor_S = target / (std_SD.double().square().sum(1) + SMALL).sqrt()
        return cls(mean_SD.detach().float().cpu(), factor_S.float(), std_SD, float(target))

    @classmethod
    def off(cls, sources: int, width: int) -> "Normaliser":
        """What a state has where none is in use."""
        off_SD = torch.full((sources, width), torch.nan)
        return cls(off_SD, torch.ones(sources), off_SD)

    def put(self, scale: Scale, sources: Sequence[str]) -> None:
        """Let the scale of a dictionary be this one. One row here: for all of them."""
        for number, name in enumerate(sources):
            own = number if len(self.factor) > 1 else 0
            scale.mean(name).copy_(self.mean_SD[own])
            scale.factor(name).copy_(self.factor[own])

    def single_state(self) -> State:
        """Of a dictionary of one source, as crosscoder_learning keeps it."""
        return {
            "target_rms": torch.tensor(self.target), "activation_mean": self.mean_SD[0],
            "activation_std": self.std_SD[0], "activation_global_scale": self.factor[0],
        }  # fmt: skip


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

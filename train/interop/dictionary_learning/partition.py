"""Which latents of a dedicated crosscoder belong to which model, in the order of dfc_learning: A | B | shared.

Letters: L latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.errors import WiringError


@dataclass(frozen=True)
class FeaturePartition:
    """Of `dict_size` latents the first are A's alone, the next B's alone, and all others are shared."""

    dict_size: int
    model_a_exclusive_size: int
    model_b_exclusive_size: int

    def __post_init__(self) -> None:
        own = (self.model_a_exclusive_size, self.model_b_exclusive_size)
        if min(own) < 0 or sum(own) > self.dict_size:
            way_out = f"They are 0 or more, and {self.dict_size} together at most"
            raise WiringError("these sizes are no partition", f"A {own[0]}, B {own[1]}", way_out)

    @classmethod
    def from_percentages(cls, dict_size: int, model_a_pct: float, model_b_pct: float) -> "FeaturePartition":
        """Shares of all latents, rounded: 5 % of 131,072 are 6,554. (dfc_learning cuts off: 6,553.)"""
        return cls(dict_size, round(dict_size * model_a_pct), round(dict_size * model_b_pct))

    @property
    def shared_size(self) -> int:
        return self.dict_size - self.model_a_exclusive_size - self.model_b_exclusive_size

    @property
    def model_a_indices(self) -> range:
        return range(self.model_a_exclusive_size)

    @property
    def model_b_indices(self) -> range:
        return range(self.model_a_exclusive_size, self.dict_size - self.shared_size)

    @property
    def shared_indices(self) -> range:
        return range(self.dict_size - self.shared_size, self.dict_size)

    @property
    def model_a_allowed_indices(self) -> list[int]:
        return [*self.model_a_indices, *self.shared_indices]

    @property
    def model_b_allowed_indices(self) -> list[int]:
        return [*self.model_b_indices, *self.shared_indices]

    def get_encoder_mask(self, layer: int, device: Any = None) -> Tensor:
        """1 where model A (layer 0) or B (layer 1) is read, else 0, [L]. Raises WiringError for another layer."""
        if layer not in (0, 1):
            raise WiringError("a partition is of two models", f"layer {layer}", "They are 0 and 1")
        mask_L = torch.zeros(self.dict_size, device=device)
        mask_L[self.model_b_allowed_indices if layer else self.model_a_allowed_indices] = 1.0
        return mask_L

    def get_decoder_mask(self, layer: int, device: Any = None) -> Tensor:
        """The same of what is written."""
        return self.get_encoder_mask(layer, device)

    def get_bias_mask(self, device: Any = None) -> Tensor:
        """Biases are everyone's: ones, [L]."""
        return torch.ones(self.dict_size, device=device)

    def to_dict(self) -> dict[str, int]:
        return {
            "dict_size": self.dict_size, "model_a_exclusive_size": self.model_a_exclusive_size,
            "model_b_exclusive_size": self.model_b_exclusive_size, "shared_size": self.shared_size,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, told: Mapping[str, int]) -> "FeaturePartition":
        return cls(told["dict_size"], told["model_a_exclusive_size"], told["model_b_exclusive_size"])

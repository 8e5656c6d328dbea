"""The dedicated feature crosscoders of dfc_learning.

Letters: S sources, D width, L latents.
"""

from typing import Any, final

from torch import Tensor

from train.interop.crosscoders import PARTITION, SHARES, SIZES
from train.interop.crosscoders_written import arguments_of, sizes
from train.interop.dictionary_learning.crosscoders import BatchTopKCrossCoder, CrossCoder
from train.interop.dictionary_learning.partition import FeaturePartition
from train.interop.tensors import State


class Partitioned(CrossCoder):
    """What both classes have: latents that only A, or only B, reads and writes. They come first: A | B | shared.

    Weights that the partition forbids have no storage, and are shown as zeros.
    """

    dedicated = True

    def _partitioned(self, dict_size: int, own: dict[str, Any]) -> tuple[int, int] | None:
        shares, given = [own.pop(name) for name in SHARES], [own.pop(name, None) for name in SIZES]
        made = FeaturePartition.from_percentages(dict_size, *shares)
        a, b = (
            size if told is None else int(told)
            for size, told in zip((made.model_a_exclusive_size, made.model_b_exclusive_size), given, strict=True)
        )
        made = FeaturePartition(dict_size, a, b)
        return made.model_a_exclusive_size, made.model_b_exclusive_size

    @property
    def partition(self) -> FeaturePartition:
        found = sizes(self.core.wiring)
        assert found is not None
        return FeaturePartition(self.core.latents, *found)

    def _state(self) -> State:
        told = arguments_of(self.core)
        return {**super()._state(), PARTITION: {name: told[name] for name in ("dict_size", *SHARES)}}

    def verify_partition_integrity(self, tolerance: float = 1e-6) -> dict[str, dict[str, float]]:
        """The largest weight where the partition allows none, {"encoder" and "decoder": {"layer_0", "layer_1"}}.

        0, since such a weight has no storage: measured on what is shown of the weights. `tolerance` changes nothing.
        """
        partition = self.partition
        found: dict[str, dict[str, float]] = {"encoder": {}, "decoder": {}}
        for layer in (0, 1):
            forbidden_L = partition.get_encoder_mask(layer) == 0
            for name, weight_SLD in [
                ("encoder", self.tensor("encoder.weight").transpose(1, 2)),
                ("decoder", self.tensor("decoder.weight")),
            ]:
                own_LD: Tensor = weight_SLD.detach().cpu()[layer][forbidden_L]
                found[name][f"layer_{layer}"] = float(own_LD.abs().max()) if own_LD.numel() else 0.0
        return found

    def get_partition_statistics(self) -> dict[str, float]:
        """How many latents each has, and the share of all of them."""
        partition = self.partition
        counts = {
            "model_a_exclusive": partition.model_a_exclusive_size,
            "model_b_exclusive": partition.model_b_exclusive_size,
            "shared": partition.shared_size,
        }
        shares = {f"{name}_pct": count / partition.dict_size for name, count in counts.items()}
        return {"total_features": partition.dict_size, **counts, **shares}


@final
class DedicatedFeatureCrossCoder(Partitioned):
    """CrossCoder of two models, of whose latents some are dedicated to one (Jiralerspong & Bricken 2026, 2602.11729).

    Shares of all latents are rounded; `model_a_exclusive_size` and `model_b_exclusive_size` are sizes themselves.
    """

    def __init__(
        self, activation_dim: int, dict_size: int, num_layers: int = 2, model_a_exclusive_pct: float = 0.05,
        model_b_exclusive_pct: float = 0.05, **keys: Any,
    ) -> None:  # fmt: skip
        """`keys` are those of CrossCoder."""
        shares = dict(zip(SHARES, (model_a_exclusive_pct, model_b_exclusive_pct), strict=True))
        super().__init__(activation_dim, dict_size, num_layers, **{**shares, **keys})


@final
class DedicatedFeatureBatchTopKCrossCoder(Partitioned, BatchTopKCrossCoder):
    """BatchTopKCrossCoder of two models, of whose latents some are dedicated to one."""

    def __init__(
        self, activation_dim: int, dict_size: int, num_layers: int = 2, k: int | Tensor = 100,
        model_a_exclusive_pct: float = 0.05, model_b_exclusive_pct: float = 0.05, **keys: Any,
    ) -> None:  # fmt: skip
        """`keys` are those of CrossCoder."""
        shares = dict(zip(SHARES, (model_a_exclusive_pct, model_b_exclusive_pct), strict=True))
        super().__init__(activation_dim, dict_size, num_layers, k, **{**shares, **keys})

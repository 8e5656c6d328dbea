"""The trainers of crosscoders, as crosscoder_learning has them."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor, nn

from train.interop.dictionary_learning.crosscoders import BatchTopKCrossCoder, CrossCoder
from train.interop.dictionary_learning.dedicated import Partitioned
from train.interop.dictionary_learning.recipes import Recipe
from train.interop.dictionary_learning.shaped import Shaped
from train.interop.dictionary_learning.trainer import Arguments, Built
from train.interop.dictionary_learning.trainers import BatchTopK


@dataclass(frozen=True, kw_only=True)
class Crossing(Arguments):
    """Arguments that trainers of crosscoders have in common."""

    num_layers: int = 2
    activation_mean: Tensor | None = None
    activation_std: Tensor | None = None
    target_rms: float = 1.0

    def made(self) -> nn.Module:
        if self.pretrained_ae is not None:
            found: Any = Shaped.require(self.pretrained())
            if self.activation_mean is not None:
                found.set_normalizer(self.activation_mean, self.activation_std, self.target_rms)
            return found
        scale = {"activation_mean": self.activation_mean, "activation_std": self.activation_std}
        keys = {"num_layers": self.num_layers, **scale, "target_rms": self.target_rms, **self.sized()}
        return self.fresh(**{**keys, **(self.dict_class_kwargs or {})})


@dataclass(frozen=True, kw_only=True)
class Relus(Crossing):
    """Arguments of CrossCoderTrainer."""

    dict_size: int = 32_768
    lr: float = 1e-3
    l1_penalty: float = 1e-1
    use_mse_loss: bool = False  # |x - x_hat|^2 instead of |x - x_hat|
    dict_class: Any = CrossCoder


@final
class CrossCoderTrainer(Built):
    """mean over sources of |x - x_hat| + l1 sum of f x norm (Lindsey et al. 2024), nothing clipped."""

    arguments = Relus

    def recipe_of(self, asked: Relus) -> Recipe:
        method = {"name": "standard", "l1": asked.l1_penalty, "recon": "squared" if asked.use_mse_loss else "norm"}
        return Recipe(method, asked.lr, mean_of_sources=True)


@dataclass(frozen=True, kw_only=True)
class Batched(Crossing, BatchTopK):
    """Arguments of BatchTopKCrossCoderTrainer."""

    steps: int
    dict_class: Any = BatchTopKCrossCoder

    def made(self) -> nn.Module:
        return Crossing.made(self)


@final
class BatchTopKCrossCoderTrainer(Built):
    """mean over sources of |x - x_hat| + AuxK, the k x B largest f x norm of a batch (Minder et al. 2025).

    Of a dedicated crosscoder it also logs the largest weight where its partition allows none: 0.
    """

    arguments = Batched
    logged: ClassVar[tuple[str, ...]] = ("effective_l0", "running_deads", "pre_norm_auxk_loss", "k_current_value")

    def recipe_of(self, asked: Batched) -> Recipe:
        method = {**asked.keeping("batch_topk"), "recon": "norm"}
        return Recipe(method, asked.auto_rate(), clip=1.0, median=True, mean_of_sources=True, over_error=True)

    def get_logging_parameters(self) -> dict[str, Any]:
        found = super().get_logging_parameters()
        if issubclass(type(self.ae), Partitioned):
            for name, layers in self.ae.verify_partition_integrity().items():
                found[f"partition_integrity_{name}_max"] = max(layers.values())
        return found

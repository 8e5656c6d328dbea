"""The trainers of the reference by name; what they minimise is said in terms of ours (recipes).

Every trainer takes the arguments of its table of arguments, by keyword, as saprmarks' dictionary_learning has them;
what differs on purpose is told in docs/coming_from.md.

Letters: D width, L latents, k latents of a row.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from train.interop.dictionary_learning.autoencoders import (
    AutoEncoder,
    AutoEncoderNew,
    AutoEncoderTopK,
    BatchTopKSAE,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
)
from train.interop.dictionary_learning.recipes import Recipe
from train.interop.dictionary_learning.trainer import Arguments, Built, Trainer, unlike


@dataclass(frozen=True, kw_only=True)
class Penalised(Arguments):
    """Arguments of the trainers with a price on codes."""

    lr: float = 1e-3
    l1_penalty: float = 1e-1
    sparsity_warmup_steps: int | None = 2000  # over which the price grows from 0

    def priced(self, name: str) -> dict[str, Any]:
        return {"name": name, "l1": self.l1_penalty, "l1_warmup": self.sparsity_warmup_steps or 0}


@dataclass(frozen=True, kw_only=True)
class Standard(Penalised):
    """Arguments of StandardTrainer."""

    entropy: float = 0.0  # weight of - sum of q log q, q = f / sum of f, over a row's codes (0 for l1_penalty: alone)
    ghost_grads: bool = False  # dead latents learn as exp(h) (train.objective.Ghost)
    dict_class: Any = AutoEncoder


@final
class StandardTrainer(Built):
    """|x - x_hat|^2 + l1 |f|_1, decoder vectors of length 1 (Bricken et al. 2023)."""

    arguments = Standard

    def recipe_of(self, asked: Standard) -> Recipe:
        method = {**asked.priced("standard"), "entropy": asked.entropy, "ghost": float(asked.ghost_grads)}
        return Recipe(method, asked.lr, unit=True)


@dataclass(frozen=True, kw_only=True)
class April(Penalised):
    """Arguments of StandardTrainerAprilUpdate."""

    dict_class: Any = AutoEncoderNew


@final
class StandardTrainerAprilUpdate(Built):
    """|x - x_hat|^2 + l1 sum of f |d|, decoders free, gradients clipped at 1 (Anthropic's April 2024 form)."""

    arguments = April

    def recipe_of(self, asked: April) -> Recipe:
        return Recipe(asked.priced("standard"), asked.lr, clip=1.0)


@dataclass(frozen=True, kw_only=True)
class Gated(Penalised):
    """Arguments of GatedSAETrainer."""

    lr: float = 5e-5
    dict_class: Any = GatedAutoEncoder


@final
class GatedSAETrainer(Built):
    """|x - x_hat|^2 + l1 sum of relu(gate) + |x - x_hat(relu(gate)), by a frozen decoder|^2 (Rajamanoharan et al.)."""

    arguments = Gated

    def recipe_of(self, asked: Gated) -> Recipe:
        return Recipe(asked.priced("gated"), asked.lr, beta1=0.0, unit=True)


@dataclass(frozen=True, kw_only=True)
class Annealed(Arguments):
    """Arguments of the trainers whose penalty is a power p of codes that falls from 1."""

    lr: float = 1e-3
    initial_sparsity_penalty: float = 1e-1
    sparsity_warmup_steps: int | None = None
    sparsity_function: str = "Lp^p"  # sum of f^p; Lp: its 1/p-th power
    anneal_start: int = 15_000  # steps
    anneal_end: int | None = None  # none: the last
    p_start: float = 1
    p_end: float = 0.2
    n_sparsity_updates: int | str = 10  # continuous: every step
    sparsity_queue_length: int = 10  # batches over which the size is carried from p to p: 10
    seed: int | None = 42
    dict_class: Any = AutoEncoder

    def powers(self, name: str) -> dict[str, Any]:
        """The keys of ours. Raises ConfigError for values that have no meaning there."""
        forms = {"Lp": "lp", "Lp^p": "lp_p"}
        if self.steps is None:
            raise unlike("steps", None, "Say how many there are: p falls over them")
        if self.p_start != 1 or self.sparsity_queue_length != 10:
            raise unlike("p_start, sparsity_queue_length", (self.p_start, self.sparsity_queue_length), "Give 1 and 10")
        if self.p_end <= 0:
            raise unlike("p_end", self.p_end, "Give one above 0: at 0 the penalty counts codes, and has no gradient")
        if self.sparsity_function not in forms:
            raise unlike("sparsity_function", self.sparsity_function, f"Give {' or '.join(forms)}")
        last, every = self.anneal_end or self.steps, self.n_sparsity_updates == "continuous"
        updates = last - self.anneal_start if every else int(self.n_sparsity_updates)
        return {
            "name": name, "lp": self.initial_sparsity_penalty, "lp_warmup": self.sparsity_warmup_steps or 0,
            "form": forms[self.sparsity_function], "p_end": self.p_end, "p_updates": max(2, updates),
            "p_first": self.anneal_start / self.steps, "p_last": last / self.steps,
        }  # fmt: skip


@final
class PAnnealTrainer(Built):
    """|x - x_hat|^2 + a power p of codes, p from 1 down, decoder vectors of length 1 (Karvonen et al. 2024)."""

    arguments = Annealed

    def recipe_of(self, asked: Annealed) -> Recipe:
        return Recipe(asked.powers("p_anneal"), asked.lr, unit=True)


@dataclass(frozen=True, kw_only=True)
class GatedAnnealed(Annealed):
    """Arguments of GatedAnnealTrainer."""

    lr: float = 3e-4
    dict_class: Any = GatedAutoEncoder


@final
class GatedAnnealTrainer(Built):
    """The loss of GatedSAETrainer with a power p in the place of its price."""

    arguments = GatedAnnealed

    def recipe_of(self, asked: GatedAnnealed) -> Recipe:
        return Recipe(asked.powers("gated_anneal"), asked.lr, beta1=0.0, unit=True)


@dataclass(frozen=True, kw_only=True)
class Jumping(Arguments):
    """Arguments of JumpReluTrainer."""

    lr: float = 7e-5
    dict_size: int = 8192
    bandwidth: float = 0.001
    sparsity_penalty: float = 1.0
    target_l0: float = 20.0
    sparsity_warmup_steps: int | None = 2000
    dict_class: Any = JumpReluAutoEncoder


@final
class JumpReluTrainer(Built):
    """|x - x_hat|^2 + price (L0 / target - 1)^2, decoder vectors of length 1 (Rajamanoharan et al. 2024)."""

    arguments = Jumping

    def recipe_of(self, asked: Jumping) -> Recipe:
        method = {
            "name": "jumprelu", "penalty": "target", "target": asked.target_l0, "price": asked.sparsity_penalty,
            "price_warmup": asked.sparsity_warmup_steps or 0, "bandwidth": asked.bandwidth,
        }  # fmt: skip
        return Recipe(method, asked.lr, beta1=0.0, clip=1.0, unit=True)


@dataclass(frozen=True, kw_only=True)
class Kept(Arguments):
    """Arguments of the trainers that keep k latents of a row. k falls from `k_max`, or, where only `k_anneal_steps` is
    given, from D."""

    k: int
    auxk_alpha: float = 1 / 32
    k_max: int | None = None
    k_annealing_steps: int = 0
    k_anneal_steps: int | None = None

    def auto_rate(self) -> float:
        """2e-4 / sqrt(L / 2^14), where no other is asked for."""
        return self.lr if self.lr is not None else 2e-4 / (self.dict_size / 2**14) ** 0.5

    def keeping(self, name: str) -> dict[str, Any]:
        steps = self.k_annealing_steps or self.k_anneal_steps or 0
        start = self.k_max if self.k_max is not None else self.activation_dim if self.k_anneal_steps else None
        return {
            "name": name, "k": self.k, "aux": self.auxk_alpha, "k_aux": max(1, self.activation_dim // 2),
            "k_anneal": steps, **({"k_start": start} if steps else {}),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TopK(Kept):
    """Arguments of TopKTrainer."""

    threshold_beta: float = 0.999
    threshold_start_step: int = 1000
    dict_class: Any = AutoEncoderTopK

    def sized(self) -> dict[str, Any]:
        return {"k": self.k}


@final
class TopKTrainer(Built):
    """|x - x_hat|^2 + AuxK, the k largest of a row, decoder vectors of length 1 (Gao et al. 2024).

    `threshold` follows the mean over rows of the smallest kept code, for `use_threshold`.
    """

    arguments = TopK
    logged = ("effective_l0", "dead_features", "pre_norm_auxk_loss")

    def recipe_of(self, asked: TopK) -> Recipe:
        return Recipe(asked.keeping("topk"), asked.auto_rate(), clip=1.0, unit=True, median=True, over_error=True)

    def update(self, step: int, x: Any) -> float:
        value = super().update(step, x)
        asked: Any = self.asked
        if step > asked.threshold_start_step:
            self._follow(next(iter(self._rows(x).values())), asked.threshold_beta)
        return value

    @torch.no_grad()
    def _follow(self, x_BD: Tensor, beta: float) -> None:
        f_BL = self.ae.encode(x_BD)
        smallest_B = f_BL.masked_fill(f_BL <= 0, float("inf")).min(1).values
        found = smallest_B[smallest_B.isfinite()]
        if len(found):
            before = float(self.ae.threshold)
            self.ae.threshold = found.mean() if before < 0 else beta * before + (1 - beta) * found.mean()


@dataclass(frozen=True, kw_only=True)
class BatchTopK(TopK):
    """Arguments of BatchTopKTrainer. `threshold_start_step`: our threshold is right from the first step on."""

    dict_class: Any = BatchTopKSAE

    def keeping(self, name: str) -> dict[str, Any]:
        return {**super().keeping(name), "threshold_decay": self.threshold_beta}


@dataclass(frozen=True, kw_only=True)
class ScaledBatchTopK(BatchTopK):
    """And those of its normaliser: of a fresh dictionary, or in the place of a pretrained one's."""

    activation_mean: Tensor | None = None
    activation_std: Tensor | None = None
    target_rms: float = 1.0
    encoder_init_norm: float = 1.0

    def made(self) -> nn.Module:
        found: Any = super().made()
        if self.pretrained_ae is not None and self.activation_mean is not None:
            found.set_normalizer(self.activation_mean, self.activation_std, self.target_rms)
        return found

    def sized(self) -> dict[str, Any]:
        own: dict[str, Any] = {} if self.encoder_init_norm == 1.0 else {"encoder_init_norm": self.encoder_init_norm}
        if self.activation_mean is not None:
            own |= {"activation_mean": self.activation_mean, "activation_std": self.activation_std}
            own |= {"target_rms": self.target_rms}
        return {**super().sized(), **own}


@final
class BatchTopKTrainer(Built):
    """|x - x_hat|^2 + AuxK, the k x B largest of a batch, decoder vectors of length 1 (Bussmann et al. 2024)."""

    arguments = ScaledBatchTopK
    logged = ("effective_l0", "dead_features", "pre_norm_auxk_loss")

    def recipe_of(self, asked: BatchTopK) -> Recipe:
        return Recipe(asked.keeping("batch_topk"), asked.auto_rate(), clip=1.0, unit=True, median=True, over_error=True)


@dataclass(frozen=True, kw_only=True)
class Matryoshka(BatchTopK):
    """Arguments of MatryoshkaBatchTopKTrainer. Weights of groups: even ones."""

    group_fractions: tuple[float, ...]
    group_weights: tuple[float, ...] | None = None
    dict_class: Any = MatryoshkaBatchTopKSAE

    def sizes(self) -> list[int]:
        """Of the groups: cut off, what is left over in the last."""
        found = [int(share * self.dict_size) for share in self.group_fractions[:-1]]
        return [*found, self.dict_size - sum(found)]

    def sized(self) -> dict[str, Any]:
        return {"k": self.k, "group_sizes": self.sizes()}


@final
class MatryoshkaBatchTopKTrainer(Built):
    """The mean over prefixes of groups of |x - x_hat of the prefix|^2, + AuxK (Bussmann, Nabeshima et al. 2025)."""

    arguments = Matryoshka
    logged = ("effective_l0", "dead_features", "pre_norm_auxk_loss")

    def recipe_of(self, asked: Matryoshka) -> Recipe:
        even = asked.group_weights
        if even is not None and len({round(weight, 6) for weight in even}) > 1:
            raise unlike("group_weights", even, "Prefixes count alike here: leave them out")
        method = {**asked.keeping("matryoshka"), "groups": [size / asked.dict_size for size in asked.sizes()]}
        return Recipe(method, asked.auto_rate(), clip=1.0, unit=True, median=True, over_error=True)


TrainerTopK, TrainerJumpRelu, SAETrainer = TopKTrainer, JumpReluTrainer, Trainer

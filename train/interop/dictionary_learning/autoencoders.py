"""The autoencoders of dictionary_learning.

Letters: B rows, D width, L latents.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor
from torch.nn.functional import relu

from shared.errors import CheckpointError
from train.interop import hub, saes
from train.interop.dictionary_learning.sae import SAE, SOURCE
from train.interop.dictionary_learning.shaped import Dictionary, require_unscaled
from train.interop.normaliser import Normaliser
from train.interop.tensors import State
from train.scale import Scale

LAYERS = ("encoder.weight", "encoder.bias", "decoder.weight")
BUFFERS = ("target_rms", "activation_mean", "activation_std", "activation_global_scale")
MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec")


@final
class AutoEncoder(SAE):
    """f = relu(W_e (x - b) + b_e), x_hat = W_d f + b. Decoder vectors begin with the length 0.1."""

    shown = ("bias", *LAYERS)
    method, decoder_norm = "standard", 0.1

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        self._begin(activation_dim, dict_size)

    def encode(self, x: Tensor) -> Tensor:
        return self._codes(x)

    def forward(self, x: Tensor, output_features: bool = False, ghost_mask: Tensor | None = None) -> Any:
        """x_hat, and f where asked. With `ghost_mask` [L], as x_ghost behind x_hat, what exp(h) x mask writes, without
        the bias."""
        f = self.encode(x)
        if ghost_mask is None:
            return given(self.decode(f), f, output_features=output_features)
        ghost = self._h(x).exp() * ghost_mask.to(f)
        x_hat, x_ghost = self.decode(f), self.decode(ghost) - self.decode(torch.zeros_like(ghost))
        return (x_hat, x_ghost, f) if output_features else (x_hat, x_ghost)

    def normalize_decoder(self) -> None:
        """Bring decoder vectors to the length 1, with the same reconstructions: codes are so much larger."""
        state = self.state_dict()
        length_L = torch.linalg.vector_norm(state["decoder.weight"], dim=0)
        for name, factor in [("decoder.weight", 1 / length_L), ("encoder.bias", length_L)]:
            state[name] = state[name] * factor
        self.load_state_dict({**state, "encoder.weight": state["encoder.weight"] * length_L[:, None]})

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, from_hub: bool = False, device: Any = None,
        normalize_decoder: bool = False,
    ) -> Self:  # fmt: skip
        """The weights of a file or folder as they are; on `normalize_decoder`, with decoder vectors of length 1."""
        made = cls._loaded(path, from_hub, device, dtype)
        if normalize_decoder:
            made.normalize_decoder()
        return made


@final
class AutoEncoderNew(SAE):
    """f = relu(W_e x + b_e), x_hat = W_d f + b_d (Anthropic's April 2024 form). A forward pass gives f |d|."""

    shown = (*LAYERS, "decoder.bias")
    method, decoder_norm = "standard", 0.1

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        self._begin(activation_dim, dict_size)

    def encode(self, x: Tensor) -> Tensor:
        return self._codes(x)

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        f = self.encode(x)
        return given(self.decode(f), f * self.core.norms(), output_features=output_features)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, from_hub: bool = False, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> Self:
        return cls._loaded(path, from_hub, device, dtype)


@final
class GatedAutoEncoder(SAE):
    """z = W_e (x - b), f = 1[z + b_g > 0] relu(exp(r) z + b_m), x_hat = W_d f + b (Rajamanoharan et al. 2024)."""

    shown = ("decoder_bias", "r_mag", "gate_bias", "mag_bias", "encoder.weight", "decoder.weight")
    method = "gated"

    def __init__(
        self, activation_dim: int, dict_size: int, initialization: str | Callable[[Any], None] = "default",
        device: Any = None,
    ) -> None:  # fmt: skip
        self._begin(activation_dim, dict_size)
        if callable(initialization):
            initialization(self)
        self.to(device)

    def encode(self, x: Tensor, return_gate: bool = False, normalize_decoder: bool = False) -> Any:
        """f, and relu(z + b_g) where asked. `normalize_decoder`: f |d|, as `decode` then takes it."""
        f = self._codes(x)
        f = f * self.core.norms() if normalize_decoder else f
        return (f, relu(self._h(x))) if return_gate else f

    def decode(self, f: Tensor, normalize_decoder: bool = False) -> Tensor:
        return super().decode(f / self.core.norms() if normalize_decoder else f)

    def forward(self, x: Tensor, output_features: bool = False, normalize_decoder: bool = False) -> Any:
        f = self.encode(x)
        shown = f * self.core.norms() if normalize_decoder else f
        return given(self.decode(f), shown, output_features=output_features)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, from_hub: bool = False, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> Self:
        return cls._loaded(path, from_hub, device, dtype)


@final
class JumpReluAutoEncoder(SAE):
    """h = x W_enc + b_enc, f = relu(h) 1[h > threshold], x_hat = f W_dec + b_dec (Rajamanoharan et al. 2024).

    With `apply_b_dec_to_input`, which no file keeps, rows are seen less b_dec.
    """

    shown = (*MATRICES, "threshold")
    method = "jumprelu"

    def __init__(self, activation_dim: int, dict_size: int, device: Any = "cpu") -> None:
        self._begin(activation_dim, dict_size, threshold=0.001)
        self.to(device)

    def _settle(self) -> None:
        super()._settle()
        self.apply_b_dec_to_input = False

    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Any:
        x = x - self.core.bias[self._to] if self.apply_b_dec_to_input else x
        f = self._codes(x)
        return (f, self._h(x)) if output_pre_jump else f

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        f = self.encode(x)
        return given(self.decode(f), f, output_features=output_features)

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, load_from_sae_lens: bool = False, from_hub: bool = False,
        dtype: torch.dtype = torch.float32, device: Any = None, release: str = "", sae_id: str = "",
    ) -> Self:  # fmt: skip
        """Of a file or folder; or of SAELens' registry by its names, for which sae-lens has to be installed."""
        if load_from_sae_lens:
            return cls.of(hub.of_registry(release, sae_id, (SOURCE,))).to(device=device, dtype=dtype)
        return cls._loaded(path or "", from_hub, device, dtype)


class KeepingK(SAE):
    """What those have in common that keep k latents of a row."""

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        f = self.encode(x)
        return given(self.decode(f), f, output_features=output_features)

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "k": self.core.activation.form().k[0]}

    @classmethod
    def from_pretrained(
        cls, path: str | Path, k: int | None = None, device: Any = None, from_hub: bool = False, dtype: Any = None
    ) -> Self:
        """`k` is for weights that do not tell theirs. Raises CheckpointError where they tell another one."""
        made = cls._loaded(path, from_hub, device, dtype, k=k)
        own = made.core.activation.form().k[0]
        if k not in (None, own):
            raise CheckpointError("these weights have another k", f"{own}, not {k}", "Leave k out")
        return made


@final
class AutoEncoderTopK(KeepingK):
    """f: the k largest of every row of relu(W_e (x - b_dec) + b_e), x_hat = W_d f + b_dec (Gao et al. 2024).

    `use_threshold`: those above `threshold` instead, which its trainer sets.
    """

    shown = ("b_dec", *LAYERS, "k", "threshold")
    method = "topk"

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        self._begin(activation_dim, dict_size, k=k)

    def _settle(self) -> None:
        super()._settle()
        self.register_buffer("_threshold", torch.tensor(saes.UNTRAINED), persistent=False)

    def _small(self) -> State:
        return {**super()._small(), "threshold": self._threshold}

    def _put_small(self, name: str, given: Tensor) -> bool:
        if name == "threshold":
            self._threshold.copy_(given)
            return True
        return super()._put_small(name, given)

    def _tell(self, told: Mapping[str, Any]) -> None:
        form = told.get("form")
        if form is not None and form.threshold_L is not None:
            self._threshold.copy_(form.threshold_L[0])

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        """f; with `return_topk` also the k largest, where they are, and all of them: [..., k], [..., k], [..., L]."""
        if not (return_topk or use_threshold):
            return self._codes(x)
        a = relu(self._h(x))
        f = a * (a > self._threshold) if use_threshold else self._codes(x)
        return (f, *a.topk(int(self.k), sorted=False), a) if return_topk else f


@final
class BatchTopKSAE(KeepingK):
    """f: those of a = relu(W_e (x~ - b_dec) + b_e) above a threshold, x~_hat = W_d f + b_dec (Bussmann et al. 2024).

    Without `use_threshold`: the k x B largest of a batch. x~ = (x - mean) x target_rms / sqrt(sum of std^2), where
    means and spreads [D] are given; then they are of its state, too.
    """

    shown = ("b_dec", *LAYERS, "k", "threshold", *BUFFERS)
    method = "batch_topk"

    def __init__(
        self, activation_dim: int, dict_size: int, k: int, activation_mean: Tensor | None = None,
        activation_std: Tensor | None = None, target_rms: float = 1.0, encoder_init_norm: float = 1.0,
    ) -> None:  # fmt: skip
        self._begin(activation_dim, dict_size, k=k)
        with torch.no_grad():
            self.core.encoder[self._name].mul_(encoder_init_norm)
        self.set_normalizer(activation_mean, activation_std, target_rms)

    def _settle(self) -> None:
        super()._settle()
        self._scaled: Normaliser | None = None

    def set_normalizer(self, mean: Tensor | None, std: Tensor | None, target_rms: float = 1.0) -> None:
        """Let rows be scaled by means and spreads [D], to a root mean square of their length; none: as they are."""
        mean_SD, std_SD = (None if one is None else one[None] for one in (mean, std))
        scaled = Normaliser.of(mean_SD, std_SD, target_rms, (1, self.activation_dim))
        self.core.scale = Scale(self.core.wiring.widths).to(self.core.activation.bias_L)
        self._scale(scaled)

    @torch.no_grad()
    def _scale(self, scaled: Normaliser | None) -> None:
        self._scaled = scaled
        if scaled is not None:
            scaled.put(self.core.scale, self._ends)

    @property
    def has_activation_normalizer(self) -> bool:
        return self._scaled is not None

    def normalize_activations(self, x: Tensor) -> Tensor:
        """x~ of rows [..., D]."""
        return self.core.scale.scaled(self._name, x)

    def denormalize_activations(self, x: Tensor) -> Tensor:
        """Rows of x~ [..., D]."""
        return self.core.scale.raw(self._to, x)

    def scale_biases(self, scale: float) -> None:
        """Raises CheckpointError where rows are scaled by their spread."""
        require_unscaled(self.has_activation_normalizer)
        super().scale_biases(scale)

    def reading(self, source: str, writing: str) -> Self:
        require_unscaled(self.has_activation_normalizer)
        return super().reading(source, writing)

    def _state(self) -> State:
        found = super()._state()
        return found if self.has_activation_normalizer else {n: v for n, v in found.items() if n not in BUFFERS}

    def _small(self) -> State:
        scaled = self._scaled or Normaliser.off(1, self.activation_dim)
        return {**super()._small(), **scaled.single_state()}

    def _put_small(self, name: str, given: Tensor) -> bool:
        if name in BUFFERS:
            raise CheckpointError("this is changed with the others", name, "Use set_normalizer(mean, std, target_rms)")
        return super()._put_small(name, given)

    def _tell(self, told: Mapping[str, Any]) -> None:
        self._scale(told.get("scaled"))

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        """f; with `return_active` also which latents fire, [L], and a."""
        f = self._codes(x, use_threshold)
        return (f, fires(f), relu(self._h(x))) if return_active else f


@final
class MatryoshkaBatchTopKSAE(KeepingK):
    """BatchTopK of nested groups (Bussmann, Nabeshima et al. 2025), of which the first `active_groups` have codes."""

    shown = (*MATRICES, "k", "threshold", "group_sizes")
    method = "matryoshka"

    def __init__(self, activation_dim: int, dict_size: int, k: int, group_sizes: list[int]) -> None:
        if sum(group_sizes) != dict_size:
            value = f"{' + '.join(map(str, group_sizes))} = {sum(group_sizes)}"
            raise CheckpointError(f"groups do not add up to {dict_size} latents", value, "Change group_sizes")
        self._begin(activation_dim, dict_size, k=k, groups=[size / dict_size for size in group_sizes])

    def _settle(self) -> None:
        super()._settle()
        self.active_groups = len(self.core.method.nested(self.core.wiring))

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        f = self._codes(x, use_threshold)
        first = sum(self.core.method.nested(self.core.wiring)[: self.active_groups])
        f = f * (torch.arange(self.dict_size, device=f.device) < first)
        return (f, fires(f), relu(self._h(x))) if return_active else f

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "group_sizes": self.group_sizes.tolist()}


@final
class IdentityDict(Dictionary):
    """Codes are the rows."""

    def __init__(self, activation_dim: int | None = None, dtype: Any = None, device: Any = None) -> None:
        super().__init__()
        self.activation_dim = self.dict_size = activation_dim  # type: ignore[assignment]
        self._as = {"dtype": dtype, "device": device}

    def encode(self, x: Tensor) -> Tensor:
        return x.to(**{key: value for key, value in self._as.items() if value is not None})

    def decode(self, f: Tensor) -> Tensor:
        return f

    def forward(self, x: Tensor, output_features: bool = False, ghost_mask: Tensor | None = None) -> Any:
        return given(self.encode(x), self.encode(x), output_features=output_features)

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, from_hub: bool = False, device: Any = None, dtype: Any = None
    ) -> Self:
        return cls(None, dtype, device)


def given(x_hat: Tensor, f: Tensor, output_features: bool) -> Any:
    """What a forward pass of the reference gives: rows, and codes where they are asked for."""
    return (x_hat, f) if output_features else x_hat


def fires(f: Tensor) -> Tensor:
    """Which latents have a code on any row, bool [L]."""
    return f.flatten(0, -2).sum(0) > 0

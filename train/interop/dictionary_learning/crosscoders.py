"""The crosscoders of crosscoder_learning and dfc_learning: rows are [B, S, D], of S sources in one tensor.

Letters: B rows, S sources, D width, L latents.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import relu

from shared.errors import CheckpointError, RowsError
from train import dictionary as cores
from train import method as methods
from train.code import DenseCode
from train.interop import crosscoders as files
from train.interop import crosscoders_written as written
from train.interop.dictionary_learning.codes import CodeNormalization
from train.interop.dictionary_learning.layers import CrossCoderDecoder, CrossCoderEncoder
from train.interop.dictionary_learning.shaped import HERE, Shaped, kept, require_unscaled
from train.interop.found import Found, Sidecar
from train.interop.normaliser import Normaliser
from train.interop.saes import UNTRAINED
from train.interop.tensors import COMPILED, State, Taken
from train.scale import Scale

WEIGHTS = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
BUFFERS = ("code_normalization_id", "target_rms", "activation_mean", "activation_std", "activation_global_scale")


class CrossCoder(Shaped):
    """f = relu(sum over sources of x~ W_enc + b), x_hat = f W_dec + b_dec, x~ = (x - mean) x scale of each source.

    `encode` gives f; `get_activations`, and a forward pass that is asked for features, give f x norm.
    """

    shown: ClassVar[tuple[str, ...]] = (*WEIGHTS, *BUFFERS)
    method: ClassVar[str] = "standard"
    dedicated: ClassVar[bool] = False
    norm_init_scale: ClassVar[float | None] = None  # the length of fresh vectors; none: as they are drawn

    def __init__(
        self, activation_dim: int, dict_size: int, num_layers: int = 2, same_init_for_all_layers: bool = False,
        norm_init_scale: float | None = None, init_with_transpose: bool = True,
        encoder_layers: Sequence[int] | None = None, latent_processor: Callable[[Tensor], Tensor] | None = None,
        num_decoder_layers: int | None = None,
        code_normalization: CodeNormalization | str = CodeNormalization.CROSSCODER,
        code_normalization_alpha_sae: float = 1.0, code_normalization_alpha_cc: float = 0.1,
        activation_mean: Tensor | None = None, activation_std: Tensor | None = None, target_rms: float | None = None,
        **own: Any,
    ) -> None:  # fmt: skip
        """`own`: of a method or a partition, by the classes that have one. Raises CheckpointError, WiringError."""
        if num_decoder_layers not in (None, num_layers):
            value = f"{num_decoder_layers} of {num_layers}"
            raise CheckpointError("every source is written", value, "Leave num_decoder_layers out")
        names = files.named(None, num_layers)
        readers = [names[n] for n in (range(num_layers) if encoder_layers is None else encoder_layers)]
        partition = self._partitioned(dict_size, own)
        wiring = files.wired(names, readers, activation_dim, dict_size, partition)
        norm = CodeNormalization.of(code_normalization)
        alphas = (code_normalization_alpha_sae, code_normalization_alpha_cc)
        ranked = files.ranking(norm.name, alphas, "k" in own)
        asked = methods.parse({"name": self.method, **own})
        super().__init__(cores.create(wiring, asked, Scale(wiring.widths), ranked.norm, 1, ranked.alpha)[0])
        self._settle()
        self._norm, self._alphas, self.latent_processor = norm, alphas, latent_processor
        scale = self.norm_init_scale if norm_init_scale is None else norm_init_scale
        self._initialise(same_init_for_all_layers, scale, init_with_transpose)
        self.set_normalizer(activation_mean, activation_std, target_rms)

    def _partitioned(self, dict_size: int, own: dict[str, Any]) -> tuple[int, int] | None:
        """The sizes of a partition, taken out of `own`."""
        return None

    def _settle(self) -> None:
        wiring, form = self.core.wiring, self.core.activation.form()
        parted = written.sizes(wiring) is not None
        if form.kind not in ("relu", "batch_topk") or (form.kind != "relu") != ("k" in self.shown):
            raise CheckpointError(f"this is no {type(self).__name__}", form.kind, "Load it as its own class")
        if self.dedicated != parted:
            raise CheckpointError(f"this is no {type(self).__name__}", wiring.spans[0].name, "Load it as its own class")
        [self.activation_dim] = set(wiring.widths.values())
        self.dict_size, self.num_layers, self._names = wiring.latents, len(wiring.widths), tuple(wiring.widths)
        name = next(name for name, norm in files.BY_NAME.items() if norm == self.core.norm)
        self._norm, self._alphas = CodeNormalization[name], (1.0, self.core.alpha)
        self.latent_processor = None
        self._target, self._std = 1.0, torch.full((self.num_layers, self.activation_dim), torch.nan)
        order_L = files.order(self.dict_size, written.sizes(wiring))
        self.register_buffer("_order_L", order_L, persistent=False)  # of a latent here, its place there
        self.register_buffer("_place_L", torch.argsort(order_L), persistent=False)  # and the other way round

    latent_processor: Callable[[Tensor], Tensor] | None
    _order_L: Tensor
    _place_L: Tensor

    @torch.no_grad()
    def _initialise(self, same: bool, length: float | None, transpose: bool) -> None:
        """Kaiming's uniform weights over D x L inputs; `same`: of the first source for all, over L (decoders: D)."""
        for table, ports in [(self.core.encoder, self.core.reads), (self.core.decoder, self.core.writes)]:
            decodes = table is self.core.decoder
            inputs = self.activation_dim * self.dict_size
            if same:
                inputs = self.activation_dim if decodes else self.dict_size
            whole_LD = torch.zeros(0)
            for name in table:
                if decodes and transpose and name in self.core.encoder:
                    table[name].copy_(self.core.encoder[name])
                    continue
                if not same or not whole_LD.numel():
                    bound = math.sqrt(6 / inputs)
                    whole_LD = torch.empty(self.dict_size, self.activation_dim).uniform_(-bound, bound)
                drawn_LD = whole_LD if length is None else length * torch.nn.functional.normalize(whole_LD, dim=1)
                table[name].copy_(ports[name].own(drawn_LD[self._order_L]))

    @torch.no_grad()
    def set_normalizer(self, mean: Tensor | None, std: Tensor | None, target_rms: float | None = None) -> None:
        """Let x~ be (x - mean) x target_rms / sqrt(sum of std^2): means and spreads are [S, D]. None: rows as they are.

        (In crosscoder_learning they are arguments of the class, too.)
        """
        self._target = 1.0 if target_rms is None else float(target_rms)
        self._std, none = torch.full_like(self._std, torch.nan), torch.zeros_like(self._std)
        off = Normaliser(none, torch.ones(self.num_layers), self._std)
        scaled = Normaliser.of(mean, std, self._target, (self.num_layers, self.activation_dim)) or off
        self._std = scaled.std_SD
        scaled.put(self.core.scale, self._names)

    def normalize_activations(self, x: Tensor) -> Tensor:
        """x~ of rows [B, S, D]."""
        rows = self._rows(x, normalize=True)
        return torch.stack([self.core.scale.scaled(name, rows[name]) for name in self._names], 1)

    def denormalize_activations(self, x: Tensor) -> Tensor:
        """Rows of x~ [B, S, D]."""
        rows = self._rows(x, normalize=True)
        return torch.stack([self.core.scale.raw(name, rows[name]) for name in self._names], 1)

    def scale_biases(self, scale: float) -> None:
        """Raises CheckpointError where rows are scaled by their spread."""
        require_unscaled(self.has_activation_normalizer)
        super().scale_biases(scale)

    @property
    def code_normalization(self) -> CodeNormalization:
        return self._norm

    @property
    def code_normalization_alpha_sae(self) -> float:
        return self._alphas[0]

    @property
    def code_normalization_alpha_cc(self) -> float:
        return self._alphas[1]

    @property
    def has_activation_normalizer(self) -> bool:
        return not bool(self._std.isnan().any())

    @property
    def encoder(self) -> CrossCoderEncoder:
        return CrossCoderEncoder(self, "encoder")

    @property
    def decoder(self) -> CrossCoderDecoder:
        return CrossCoderDecoder(self, "decoder")

    # --- its state ----------------------------------------------------------------------------------------------

    def _state(self) -> State:
        written.require_own_norms(self.core)
        state = written.weights(self.core, dict(self.core.named_parameters()))
        scaled, off = written.normaliser_state(self.core), torch.full_like(self._std, torch.nan)
        used = self.has_activation_normalizer
        state |= {"activation_mean": scaled["activation_mean"] if used else off, "activation_std": self._std}
        ones_S = torch.ones(self.num_layers)
        state["activation_global_scale"] = scaled["activation_global_scale"] if used else ones_S
        return {**state, **self._small()}

    def _small(self) -> State:
        found: State = {
            "code_normalization_id": torch.tensor(self._norm.value), "target_rms": torch.tensor(self._target),
        }  # fmt: skip
        form = self.core.activation.form()
        if form.threshold_L is None:
            return found
        own = form.threshold_L[..., 0]
        threshold = torch.where(own < 0, UNTRAINED, own * self._unit)
        return {**found, "k": torch.tensor(kept(self.core), dtype=torch.int32), "threshold": threshold}

    def _put_small(self, name: str, given: Tensor) -> bool:
        return super()._put_small(name, given / self._unit if name == "threshold" else given)

    @property
    def _unit(self) -> float:
        return files.ranking(self._norm.name, self._alphas, ranked="k" in self.shown).unit

    def _found(self, state: Mapping[str, Any]) -> Found:
        given = {name.removeprefix(COMPILED): value for name, value in state.items()}
        taken, told = Taken(given, HERE), {**self._arguments(), "dict_class": type(self).__name__}
        return files.read(taken, Sidecar(arguments=told), self._names)

    def _tell(self, told: Mapping[str, Any]) -> None:
        """Take what a file says beside the dictionary."""
        self._norm, self._alphas = CodeNormalization[told["code_normalization"]], told["alphas"]
        self._target, self._std = told["target_rms"], told["std"]

    def _gradient(self, name: str) -> Tensor | None:
        grads = {n: value.grad for n, value in self.core.named_parameters()}
        if name not in WEIGHTS or all(value is None for value in grads.values()):
            return None
        found: Tensor = written.weights(self.core, grads)[name]
        return found

    def _arguments(self) -> dict[str, Any]:
        alphas = dict(zip(("code_normalization_alpha_sae", "code_normalization_alpha_cc"), self._alphas, strict=True))
        told = {"code_normalization": self._norm.name, **alphas, "target_rms": self._target}
        return {**written.arguments_of(self.core), **told}

    # --- codes --------------------------------------------------------------------------------------------------

    def _rows(self, x: Tensor, normalize: bool) -> dict[str, Tensor]:
        """{source: [B, D]} of [B, S, D]. Raises RowsError for another shape."""
        if x.ndim != 3 or x.shape[1:] != (self.num_layers, self.activation_dim):
            way_out = f"This crosscoder takes (B, {self.num_layers}, {self.activation_dim})"
            raise RowsError("rows that do not fit the crosscoder", tuple(x.shape), way_out)
        given = {name: x[:, n].to(self.core.activation.bias_L.dtype) for n, name in enumerate(self._names)}
        return given if normalize else {name: self.core.scale.raw(name, x_BD) for name, x_BD in given.items()}

    def _codes(self, x: Tensor, by_threshold: bool, normalize: bool) -> Tensor:
        """f, [B, L], or [B, S, L] where every source selects for itself, in the order of the reference."""
        with self._selecting(by_threshold):
            code = self.core.code(self._rows(x, normalize))
        if self.core.norm != "decoupled":
            return code.dense()[:, self._place_L]
        return torch.stack([code.of[name].dense()[:, self._place_L] for name in self._names], 1)  # type: ignore[attr-defined]

    def _norms(self) -> Tensor:
        """[L], or [S, L], in the order of the reference."""
        return self._unit * self.core.norms()[..., self._place_L]

    def _h(self, x: Tensor, normalize: bool = True) -> Tensor:
        return self.core.pre(self._rows(x, normalize)).dense_BL[:, self._place_L]

    def encode(
        self, x: Tensor, return_no_sum: bool = False, select_features: Sequence[int] | None = None,
        normalize_activations: bool = True, use_threshold: bool = True,
    ) -> Any:  # fmt: skip
        """f [B, L]; with `return_no_sum` also relu(x~ W_enc + b) of each source by itself, [B, S, L].

        `select_features`: of these latents only. `normalize_activations` false: rows are x~.
        """
        some = slice(None) if select_features is None else list(select_features)
        f = self._codes(x, by_threshold=True, normalize=normalize_activations)[..., some]
        if not return_no_sum:
            return f
        rows = self._rows(x, normalize_activations)
        alone = []
        for name in self._names:
            h_BL = self.core.scale.scaled(name, rows[name]) @ self._encoder(name).T
            alone.append(relu(h_BL + self.core.activation.bias_L)[:, self._place_L][:, some])
        return f, torch.stack(alone, 1)

    def _encoder(self, name: str) -> Tensor:
        """Over all latents, [L, D], in the order of the dictionary."""
        if name not in self.core.encoder:
            return self.core.activation.bias_L.new_zeros(self.dict_size, self.activation_dim)
        return self.core.reads[name].spread(self.core.encoder[name])

    def decode(
        self, f: Tensor, denormalize_activations: bool = True, add_bias: bool = True,
        select_features: Sequence[int] | None = None,
    ) -> Tensor:  # fmt: skip
        """Rows [B, S, D] of codes [B, L], or of those of each source, [B, S, L]; of these latents only."""
        if select_features is not None:
            whole = f.new_zeros(*f.shape[:-1], self.dict_size)
            f = whole.index_copy(-1, torch.as_tensor(select_features, device=f.device), f)
        y = []
        for number, name in enumerate(self._names):
            own_BL = (f[:, number] if f.ndim == 3 else f)[:, self._order_L]
            y_BD = DenseCode(own_BL).write(self.core.decoder[name], self.core.writes[name])
            y_BD = y_BD + self.core.bias[name] if add_bias else y_BD
            y.append(self.core.scale.raw(name, y_BD) if denormalize_activations else y_BD)
        return torch.stack(y, 1)

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        """x_hat [B, S, D]; with `output_features` also f x norm, [B, L], as `get_activations` gives it."""
        f = self._codes(x, by_threshold=True, normalize=True)
        f = f if self.latent_processor is None else self.latent_processor(f)
        x_hat = self.decode(f)
        return (x_hat, self._weighed(f)) if output_features else x_hat

    def _weighed(self, f: Tensor) -> Tensor:
        """f x norm; of codes of each source their sum."""
        weighed = f * self._norms()
        return weighed.sum(1) if f.ndim == 3 else weighed

    def get_activations(
        self, x: Tensor, use_threshold: bool = True, select_features: Sequence[int] | None = None,
        normalize_activations: bool = True, inplace_normalize: bool = False,
    ) -> Tensor:  # fmt: skip
        """f x norm, [B, L], summed over sources that select for themselves; of these latents only."""
        some = slice(None) if select_features is None else list(select_features)
        return self._weighed(self._codes(x, use_threshold, normalize_activations))[:, some]

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: Any = None, from_hub: bool = False,
        code_normalization: CodeNormalization | str | None = None,
    ) -> Self:  # fmt: skip
        """A file or folder of any era. `code_normalization` is for weights that do not tell theirs.

        Raises CheckpointError where they tell another one.
        """
        told = None if code_normalization is None else CodeNormalization.of(code_normalization).name
        made = cls._loaded(path, from_hub, device, dtype, code_normalization=told)
        if code_normalization is not None and made.code_normalization != CodeNormalization.of(code_normalization):
            value = f"{made.code_normalization.name}, not {CodeNormalization.of(code_normalization).name}"
            raise CheckpointError("these weights have another code normalisation", value, "Leave it out")
        return made


class BatchTopKCrossCoder(CrossCoder):
    """f: those of relu(h) for which relu(h) x norm is above a threshold, or, without `use_threshold`, among the k x B
    largest of a batch (Minder et al. 2025, https://arxiv.org/abs/2504.02922)."""

    shown = (*WEIGHTS, *BUFFERS, "k", "threshold")
    method = "batch_topk"
    norm_init_scale = 1.0

    def __init__(
        self, activation_dim: int, dict_size: int, num_layers: int = 2, k: int | Tensor = 100,
        norm_init_scale: float | None = 1.0, activation_mean: Tensor | None = None,
        activation_std: Tensor | None = None, target_rms: float | None = 1.0, **keys: Any,
    ) -> None:  # fmt: skip
        """`keys` are those of CrossCoder."""
        scaled = {"activation_mean": activation_mean, "activation_std": activation_std, "target_rms": target_rms}
        keys = {"norm_init_scale": norm_init_scale, **scaled, **keys}
        super().__init__(activation_dim, dict_size, num_layers, k=int(k), **keys)

    def encode(  # type: ignore[override]
        self, x: Tensor, return_active: bool = False, use_threshold: bool = True,
        select_features: Sequence[int] | None = None, normalize_activations: bool = True,
        inplace_normalize: bool = False,
    ) -> Any:  # fmt: skip
        """f; with `return_active` also f x norm, which latents fire [L], relu(h) [B, L], and relu(h) x norm.

        Of sources that select for themselves f and f x norm are [B, S, L], the last one is summed over them.
        """
        some = slice(None) if select_features is None else list(select_features)
        f = self._codes(x, use_threshold, normalize_activations)
        if not return_active:
            return f[..., some]
        norms, a = self._norms(), relu(self._h(x, normalize_activations))
        active_L = (f > 0).flatten(0, -2).any(0)
        weighed = a * (norms.sum(0) if f.ndim == 3 else norms)
        return f[..., some], (f * norms)[..., some], active_L[some], a[:, some], weighed[:, some]

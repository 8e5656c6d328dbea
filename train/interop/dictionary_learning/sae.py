"""What the autoencoders of dictionary_learning have in common.

Letters: B rows, D width, L latents.
"""

from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from shared.errors import CheckpointError, RowsError
from train import dictionary as cores
from train import method as methods
from train.interop import saes
from train.interop.dictionary_learning.shaped import HERE, LinearShown, Shaped, kept
from train.interop.found import Found, Sidecar
from train.interop.plain import Plain
from train.interop.tensors import COMPILED, State, Taken
from train.pre import Pre
from train.scale import Scale
from train.wiring import build

SOURCE = "x"


class SAE(Shaped, ABC):
    """A dictionary of one source."""

    method: ClassVar[str]
    decoder_norm: ClassVar[float] = 1.0

    def _begin(self, activation_dim: int, dict_size: int, **keys: Any) -> None:
        """Random weights, by torch's own generator: encoders are the decoders', whose vectors have one length."""
        wiring = build("autoencoder", {SOURCE: activation_dim}, dict_size)
        method = methods.parse({"name": self.method, **keys})
        norm: cores.Norm = "none" if "k" in keys else "sum"
        core, _ = cores.create(wiring, method, Scale(wiring.widths), norm, steps=1)
        core.initialise(int(torch.randint(2**62, ())), self.decoder_norm)
        Shaped.__init__(self, core)
        self._settle()

    def _settle(self) -> None:
        form, wiring = self.core.activation.form(), self.core.wiring
        ends = {*wiring.readers, *wiring.writers}
        if len(ends) > 2 or len(wiring.readers) > 1 or saes.FORMS[type(self).__name__] != form.kind:
            told = f"{form.kind} of {', '.join(wiring.widths)}"
            raise CheckpointError(
                f"these weights are of no {type(self).__name__}", told, "Load them as their own class"
            )
        [self._name], [self._to] = wiring.readers, wiring.writers
        self.activation_dim = wiring.widths[self._name]
        self.dict_size = wiring.latents

    @property
    def _ends(self) -> tuple[str, ...]:
        return (self._name,) if self._name == self._to else (self._name, self._to)

    @torch.no_grad()
    def reading(self, source: str, writing: str) -> Self:
        """The same that reads one source and writes another, of the same width: a transcoder. Decoders begin at 0."""
        core, width = self.core, self.activation_dim
        wiring = build("transcoder", {source: width, writing: width}, self.dict_size)
        made, _ = cores.create(wiring, core.method, Scale(wiring.widths), core.norm, steps=1)
        made.encoder[source].copy_(core.encoder[self._name])
        made.activation.load_state_dict(core.activation.state_dict())
        return type(self).around(made)

    def _plain(self) -> Plain:
        core = self.core
        form, bias_L = core.activation.form(), core.activation.bias_L
        encoder, decoder, bias = core.encoder[self._name], core.decoder[self._to], core.bias[self._to]
        return Plain(
            form, encoder, bias_L, decoder, bias, torch.ones_like(bias_L), groups=core.method.nested(core.wiring)
        )

    def _state(self) -> State:
        return {**saes.state_of(type(self).__name__, self._plain()), **self._small()}

    def _small(self) -> State:
        form, groups = self.core.activation.form(), self.core.method.nested(self.core.wiring)
        found: State = {"k": torch.tensor(kept(self.core), dtype=torch.int32)} if form.k else {}
        if form.kind == "batch_topk" and form.threshold_L is not None:
            found["threshold"] = form.threshold_L[0]
        return {**found, "group_sizes": torch.tensor(groups)} if groups else found

    def _read(self, state: Mapping[str, Any]) -> Plain:
        taken = Taken({name.removeprefix(COMPILED): value for name, value in state.items()}, HERE)
        found, _ = saes.READERS[type(self).__name__](taken, Sidecar(arguments=self._arguments()))
        taken.done()
        return found

    def _found(self, state: Mapping[str, Any]) -> Found:
        found = self._read(state)
        told = {"form": found.form, "scaled": found.scaled}
        return Found(found.dictionary(self._ends), type(self).__name__, told=told)

    def _gradient(self, name: str) -> Tensor | None:
        """By the chain rule from those of the weights, which are functions of the state."""
        core = self.core
        state = {n: v.requires_grad_() if v.is_floating_point() and v.ndim else v for n, v in self.state_dict().items()}
        if not isinstance(state[name], Tensor) or not state[name].requires_grad:
            return None
        made = self._read(state).parameters(self._ends)
        pairs = [(value, core.get_parameter(n).grad) for n, value in made.items() if value.requires_grad]
        pairs = [(value, gradient) for value, gradient in pairs if gradient is not None]
        if not pairs:
            return None
        values, gradients = zip(*pairs, strict=True)
        [found] = torch.autograd.grad(values, [state[name]], gradients, allow_unused=True)
        return torch.zeros_like(state[name]) if found is None else found

    def _arguments(self) -> dict[str, Any]:
        return {"activation_dim": self.activation_dim, "dict_size": self.dict_size}

    def _rows(self, x: Tensor) -> Tensor:
        """[B, D] in the weights' dtype. Raises RowsError for another width."""
        if x.shape[-1] != self.activation_dim:
            way_out = f"This dictionary is of width {self.activation_dim}"
            raise RowsError("rows of another width", tuple(x.shape), way_out)
        return x.reshape(-1, self.activation_dim).to(self.core.activation.bias_L.dtype)

    def _codes(self, x: Tensor, by_threshold: bool = True) -> Tensor:
        """Codes of rows of any leading dimensions."""
        with self._selecting(by_threshold):
            f_BL = self.core.encode({self._name: self._rows(x)})
        return f_BL.view(*x.shape[:-1], self.dict_size)

    def _pre(self, x: Tensor) -> Pre:
        return self.core.pre({self._name: self._rows(x)})

    def _h(self, x: Tensor) -> Tensor:
        """Pre-activations, with a graph."""
        return self._pre(x).dense_BL.view(*x.shape[:-1], self.dict_size)

    def decode(self, f: Tensor) -> Tensor:
        weights = self.core.activation.bias_L
        y_BD = self.core.decode(f.reshape(-1, self.dict_size).to(weights.dtype))[self._to]
        return y_BD.view(*f.shape[:-1], self.activation_dim)

    @property
    def encoder(self) -> LinearShown:
        return LinearShown(self, "encoder")

    @property
    def decoder(self) -> LinearShown:
        return LinearShown(self, "decoder")

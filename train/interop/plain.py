"""An autoencoder or a transcoder as other libraries have it: matrices over raw rows.

    h = x W_enc^T + b    f by its form (train.code.Form)    y = f W_dec + bias (+ x W_skip^T)

Letters: D width of what is read, E width of what is written, L latents.
"""

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shared.errors import CheckpointError, WiringError
from train import method as methods
from train.activation import log_threshold
from train.code import Form
from train.dictionary import Dictionary, Norm, create
from train.interop.normaliser import Normaliser
from train.scale import Scale
from train.wiring import Span, Wiring

METHODS = {"relu": "standard"}  # of a form; the others are called as it is
ALIKE = 1e-5  # of the largest: norms that differ by less are one


@dataclass(frozen=True)
class Plain:
    """Matrices, biases and the form of the codes. `norm_L` weighs h where latents are ranked; `groups` are nested."""

    form: Form
    encoder_LD: Tensor
    bias_L: Tensor
    decoder_LE: Tensor
    bias_E: Tensor
    norm_L: Tensor
    skip_ED: Tensor | None = None
    groups: tuple[int, ...] = ()
    rescaled: bool = False  # codes are those of the dictionary times the length of the decoder's vector
    scaled: Normaliser | None = None  # the matrices are of (x - mean) x factor, one factor for all coordinates

    @property
    def ranked(self) -> bool:
        """Whether codes depend on how latents compare."""
        return self.form.kind in ("topk", "batch_topk")

    def k(self, target: str) -> int:
        """The one budget. Raises CheckpointError where spans have their own."""
        if len(self.form.k) != 1:
            way_out = "Train without wiring.k"
            raise CheckpointError(f"{target} has one k for all latents", f"k {self.form.k}", way_out)
        return self.form.k[0]

    def unranked(self) -> "Plain":
        """The same reconstructions from latents that are ranked by h alone.

        Where norms differ they go from the decoder, whose vectors then have the length 1, into the latent:
        h <- h |d|, and so f <- f |d|.
        """
        if not self.ranked:
            return self
        largest = float(self.norm_L.max())
        if float(self.norm_L.min()) >= (1 - ALIKE) * largest:
            return replace(self, norm_L=torch.ones_like(self.norm_L), form=self._divided(largest))
        length_L = torch.linalg.vector_norm(self.decoder_LE.double(), dim=1)
        unit = float((self.norm_L.double() / length_L)[length_L > 0].median())
        size_L = self.norm_L.double() / unit
        decoder_LE = torch.where(size_L > 0, 1 / size_L, 0.0)[:, None] * self.decoder_LE.double()
        return replace(
            self, encoder_LD=(self.encoder_LD.double() * size_L[:, None]).float(),
            bias_L=(self.bias_L.double() * size_L).float(), decoder_LE=decoder_LE.float(),
            norm_L=torch.ones_like(self.norm_L), form=self._divided(unit), rescaled=True,
        )  # fmt: skip

    def jumping(self) -> "Plain":
        """batch_topk as the JumpReLU that it is at evaluation, with the same codes; anything else as it is."""
        if self.form.kind != "batch_topk":
            return self
        assert self.form.threshold_L is not None
        # A latent that writes nothing scores 0, which is above no threshold.
        threshold_L = torch.where(self.norm_L > 0, self.form.threshold_L / self.norm_L, torch.inf)
        return replace(
            self, form=Form("jumprelu", threshold_L=threshold_L.nan_to_num(posinf=torch.finfo(torch.float32).max)),
            norm_L=torch.ones_like(self.norm_L), groups=(),
        )  # fmt: skip

    def over(self, mean_D: Tensor, factor: Tensor) -> "Plain":
        """The same of raw rows, where this is of (x - mean) x factor: one for all coordinates, or one of each."""
        encoder_LD = self.encoder_LD.double() * factor.double()
        bias_E = self.bias_E.double() / factor.double() + mean_D.double()
        seen_L = encoder_LD @ mean_D.double()
        return replace(
            self, form=shifted(self.form, seen_L), encoder_LD=encoder_LD.float(),
            bias_L=(self.bias_L.double() - seen_L).float(),
            decoder_LE=(self.decoder_LE.double() / factor.double()).float(), bias_E=bias_E.float(),
        )  # fmt: skip

    def _divided(self, by: float) -> Form:
        threshold_L = self.form.threshold_L
        return self.form if threshold_L is None else replace(self.form, threshold_L=threshold_L / by)

    def threshold(self, target: str) -> float:
        """The one threshold. Raises CheckpointError where spans have their own."""
        assert self.form.threshold_L is not None
        if float(self.form.threshold_L.min()) != float(self.form.threshold_L.max()):
            raise CheckpointError(f"{target} has one threshold for all latents", "several", "Train without wiring.k")
        return float(self.form.threshold_L[0])

    def dictionary(self, names: tuple[str, ...]) -> Dictionary:
        """A dictionary that does the same, of one source of this name, or of two, from the first to the second.

        Latents that are ranked by more than h are those of `unranked`.
        """
        if self.ranked and not bool((self.norm_L == 1).all()):
            return self.unranked().dictionary(names)
        reader, writer = names[0], names[-1]
        widths = {reader: self.encoder_LD.shape[1], writer: self.decoder_LE.shape[1]}
        spans = (Span("all", len(self.bias_L), (reader,), (writer,)),)
        wiring = Wiring(spans, widths, self.skip_ED is not None)
        norm: Norm = "none" if self.ranked else "sum"
        made, _ = create(wiring, methods.parse(self._method()), Scale(widths), norm, steps=1)
        with torch.no_grad():
            for name, value in self.parameters(names).items():
                made.get_parameter(name).copy_(value)
            made.activation.adopt(self.form)
            if self.scaled is not None:
                self.scaled.put(made.scale, (reader, writer))
        made.activation.schedule(sys.maxsize)
        return made.eval().requires_grad_(False)

    def parameters(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Those of the dictionary, by their names in it, with the graph of the matrices."""
        reader, writer, form = names[0], names[-1], self.form
        found = {
            f"encoder.{reader}": self.encoder_LD, f"decoder.{writer}": self.decoder_LE, f"bias.{writer}": self.bias_E,
            "activation.bias_L": self.bias_L,
        }  # fmt: skip
        if self.skip_ED is not None:
            found[f"skip.{reader} to {writer}"] = self.skip_ED
        if form.rescale_L is not None and form.magnitude_L is not None:
            found |= {"activation.rescale_L": form.rescale_L, "activation.magnitude_L": form.magnitude_L}
        if form.kind == "jumprelu" and form.threshold_L is not None:
            found["activation.log_threshold_L"] = log_threshold(form.threshold_L)
        return found

    def _method(self) -> dict[str, Any]:
        """The training method whose dictionaries have this form."""
        keys = {"k": self.form.k[0]} if self.form.k else {}
        if not self.groups:
            return {"name": METHODS.get(self.form.kind, self.form.kind), **keys}
        return {"name": "matryoshka", "groups": [size / len(self.bias_L) for size in self.groups], **keys}


def less(bias_L: Tensor, encoder_LD: Tensor, point_D: Tensor) -> Tensor:
    """The bias of latents that see rows as they are, of ones that see them less a point."""
    return (bias_L.double() - encoder_LD.double() @ point_D.double()).float()


def shifted(form: Form, seen_L: Tensor) -> Form:
    """The form where h of rows as they are is larger by `seen_L` (fp64): magnitudes of gated codes are less by it."""
    if form.rescale_L is None or form.magnitude_L is None:
        return form
    return replace(form, magnitude_L=(form.magnitude_L.double() - form.rescale_L.double().exp() * seen_L).float())


def of(dictionary: Dictionary, target: str) -> Plain:
    """A dictionary of one source, or of a transcoder, as matrices, its scale folded into them.

    Raises WiringError for one of several sources, which `target` does not hold.
    """
    wiring = dictionary.wiring
    if len(wiring.readers) > 1 or len(wiring.writers) > 1:
        value = f"{', '.join(wiring.readers)} -> {', '.join(wiring.writers)}"
        way_out = "Crosscoders go to dictionary_learning or hub"
        raise WiringError(f"{target} holds dictionaries of one source, and transcoders", value, way_out)
    [reader], [writer] = wiring.readers, wiring.writers
    folded = dictionary.fold()
    form, norm = folded.activation.form(), folded.norms()
    if form.threshold_L is not None:
        form = replace(form, threshold_L=form.threshold_L.view(-1, wiring.latents)[0])
    skip_ED = folded.skip[f"{reader} to {writer}"] if wiring.skip else None
    return Plain(
        form, folded.encoder[reader], folded.activation.bias_L, folded.decoder[writer], folded.bias[writer],
        norm.view(-1, wiring.latents)[0], skip_ED, dictionary.method.nested(wiring),
    )  # fmt: skip

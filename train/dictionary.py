"""The dictionary: the one nn.Module.

Letters: B rows of a batch, D width of a source, L latents, S latents of one source.
"""

import copy
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shared import files
from shared.device import device_of
from shared.errors import CheckpointError, RowsError
from train import method as methods
from train import shards
from train.code import Activation, Code, Forward
from train.kernels.choice import Kernels
from train.pre import Ports, Pre
from train.scale import Scale
from train.sources import parts
from train.wiring import Span, Wiring

FORMAT = 3
WEIGHTS, CONFIG = "dictionary.safetensors", "config.json"
Norm = Literal["sum", "joint", "mixed", "mean", "none", "decoupled"]


class Weights(nn.Module):
    """{source: parameter}, saved as `<table>.<source>`. nn.ParameterDict refuses sources named `half` or `values`."""

    def __init__(self, table: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._parameters.update({name: nn.Parameter(value) for name, value in table.items()})

    def __getitem__(self, source: str) -> nn.Parameter:
        found = self._parameters[source]
        assert found is not None
        return found

    def __contains__(self, source: str) -> bool:
        return source in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((source, self[source]) for source in self)


class Dictionary(nn.Module):
    """Raw rows in, raw rows out; between them codes over the latents of a wiring.

        x -> scale -> h = b + sum over readers of x W_enc^T -> activation -> f -> y = f W_dec + bias -> unscale -> raw y

    and, where the wiring has a skip connection, + sum over readers of x W_skip^T in y, which begins at 0 (Paulo et al.
    2025, https://arxiv.org/abs/2501.18823).

    Each source owns one encoder and one decoder matrix (S, D), latent-major, over the spans that it takes part in, so a
    weight that a span forbids does not exist.
    """

    def __init__(
        self, wiring: Wiring, method: methods.MethodConfig, activation: Activation, scale: Scale, norm: Norm,
        alpha: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.wiring, self.method, self.norm, self.alpha = wiring, method, norm, alpha
        self.activation, self.scale, self.kernels = activation, scale, Kernels()
        self.reads = {name: Ports.of(name, wiring.read_by(name), wiring.latents) for name in wiring.readers}
        self.writes = {name: Ports.of(name, wiring.written_to(name), wiring.latents) for name in wiring.writers}
        self.encoder = Weights({n: torch.zeros(p.size, wiring.widths[n]) for n, p in self.reads.items()})
        self.decoder = Weights({n: torch.zeros(p.size, wiring.widths[n]) for n, p in self.writes.items()})
        self.bias = Weights({n: torch.zeros(wiring.widths[n]) for n in wiring.writers})
        self.skip = Weights({f"{r} to {n}": torch.zeros(wiring.widths[n], wiring.widths[r]) for r, n in self._passes()})
        if norm == "decoupled":
            activation.decouple()
        weight_L = torch.cat([torch.full((span.size,), span.weight) for span in wiring.spans])
        self.register_buffer("weight_L", weight_L, persistent=False)
        self.register_buffer("folded_WL", None)  # decoder norms in scaled space, of weights that are not

    weight_L: Tensor
    folded_WL: Tensor | None

    @torch.no_grad()
    def initialise(self, seed: int, decoder_norm: float, tied: bool = True) -> "Dictionary":
        """Random directions of length `decoder_norm` per latent and source in the decoders; encoders equal them where
        `tied` and a source both reads and writes (Gao et al. 2024), else directions of their own. Biases are 0.

        Sources that a latent reads are scaled by 1 / their number, so that h does not grow with it.
        """
        generator = torch.Generator().manual_seed(seed)
        for name in self.wiring.widths:
            for table, weights in [("decoder", self.decoder), ("encoder", self.encoder)]:
                if name in weights:
                    random = shards.random(self.wiring, f"{table}.{name}", generator)
                    weights[name].copy_(random * (decoder_norm / torch.linalg.vector_norm(random, dim=1, keepdim=True)))
            if tied and name in self.decoder and name in self.encoder and self._same_latents(name):
                self.encoder[name].copy_(self.decoder[name])
        for span in self._tied():
            for name in span.writers[1:]:
                self._vectors(name, span).copy_(self._vectors(span.writers[0], span))
                if tied and name in span.readers and self._same_latents(name):
                    own = self._own(self.reads[name], span)
                    self.encoder[name][own] = self.decoder[name][own]
        for name in self.encoder:
            readers = [torch.full((s.size,), float(len(s.readers))) for s in self.wiring.spans if name in s.readers]
            self.encoder[name].div_(torch.cat(readers)[:, None].to(self.encoder[name].device))
        return self

    @torch.no_grad()
    def begin_at(self, bias: Mapping[str, Tensor]) -> None:
        """Let the decoders' biases begin at these points of scaled space, {writer: [D]}.

        Latents see rows less them: h = (x - bias) . W + b, as far as a source is read.
        """
        for name, point_D in bias.items():
            self.bias[name].copy_(point_D)
            if name in self.encoder:
                self.activation.shift(self.reads[name].spread(self.encoder[name] @ self.bias[name]))

    def _passes(self) -> list[tuple[str, str]]:
        """(reader, writer) of every matrix of a skip connection."""
        return [(r, w) for w in self.wiring.writers for r in self.wiring.readers] if self.wiring.skip else []

    def _tied(self) -> list[Span]:
        """Spans whose latents write one vector to several sources."""
        return [span for span in self.wiring.spans if span.tied and len(span.writers) > 1]

    def _own(self, ports: Ports, span: Span) -> slice:
        """Where a span's latents stand in the matrices of one of its sources."""
        first = int(ports.local_L[self.wiring.slices[span.name].start])
        return slice(first, first + span.size)

    def _vectors(self, source: str, span: Span) -> Tensor:
        return self.decoder[source][self._own(self.writes[source], span)]

    @torch.no_grad()
    def tie_gradients(self) -> None:
        """Give the copies of a vector that a tied span writes the gradient of one: their sum. So they stay alike to the
        bit. (In the norm by which gradients are clipped it counts once per source.)"""
        for span in self._tied():
            grads = [self.decoder[name].grad for name in span.writers]
            own = [self._own(self.writes[name], span) for name in span.writers]
            parts = [grad[at] for grad, at in zip(grads, own, strict=True) if grad is not None]
            if parts:
                total = torch.stack(parts).sum(0)
                for part in parts:
                    part.copy_(total)

    def _same_latents(self, source: str) -> bool:
        return self.reads[source].slices == self.writes[source].slices

    def _apply(self, fn: Any, recurse: bool = True) -> "Dictionary":
        """Moves the static maps along with the weights (`.to`, `.cuda`)."""
        super()._apply(fn, recurse)
        device = self.activation.bias_L.device
        self.reads = {name: ports.to(device) for name, ports in self.reads.items()}
        self.writes = {name: ports.to(device) for name, ports in self.writes.items()}
        return self

    def extra_repr(self) -> str:
        spans = ", ".join(f"{span.name} {span.size:,}" for span in self.wiring.spans)
        return f"{self.method.name}; {self.latents:,} latents: {spans}"

    @property
    def latents(self) -> int:
        return self.wiring.latents

    def pre(self, x: Mapping[str, Tensor]) -> Pre:
        """The pre-activations of raw rows {reader: [B, D]}. Raises RowsError where they do not fit."""
        scaled = {name: self.scale.scaled(name, self._rows(name, x)) for name in self.wiring.readers}
        kernels = self.kernels if self.training else self.kernels.exact()
        return Pre(self.wiring, scaled, dict(self.encoder.items()), self.reads, self.activation.bias_L, kernels)

    def _rows(self, source: str, x: Mapping[str, Tensor]) -> Tensor:
        """The rows of a source; those of a difference are made of its two sources where they are not given."""
        width = self.wiring.widths[source]
        if source in x or len(parts(source)) == 1:
            return self._given(source, x, width)
        whole_BD, less_BD = (self._given(part, x, width).float() for part in parts(source))
        return whole_BD - less_BD

    def _given(self, source: str, x: Mapping[str, Tensor], width: int) -> Tensor:
        way_out = "Give {source: rows [B, width]}, as Store.read does"
        if source not in x:
            raise RowsError("no rows of a source that the dictionary takes", source, way_out)
        rows_BD = torch.as_tensor(x[source])
        if rows_BD.ndim != 2 or rows_BD.shape[1] != width:
            value = f"{source} has the shape {tuple(rows_BD.shape)}, not (B, {width})"
            raise RowsError("rows that do not fit the dictionary", value, way_out)
        return rows_BD

    def forward(self, x: Mapping[str, Tensor]) -> Forward:
        """One pass over raw rows {source: float32 [B, D]} of every reader and writer. Changes nothing."""
        norm_L = self.norms()
        pre = self.pre(x)
        code = self.activation(pre, norm_L)
        unread = {n: self.scale.scaled(n, self._rows(n, x)) for n in self.wiring.writers if n not in pre.x}
        scaled = {**pre.x, **unread}
        target = {name: scaled[name] for name in self.wiring.writers}
        base = self.base(pre.x)
        return Forward(target, self.written(code, base), code, pre, norm_L, self.weight_L, base)

    def base(self, scaled: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What every writer is given beside the codes, of scaled rows {reader: [B, D]}: {writer: [D] or [B, D]}."""
        base: dict[str, Tensor] = dict(self.bias.items())
        for reader, writer in self._passes():
            base[writer] = base[writer] + scaled[reader] @ self.skip[f"{reader} to {writer}"].T
        return base

    def written(self, code: Code, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a code writes on top of `base`, in scaled space: {writer: [B, D]}."""
        return {name: code.write(self.decoder[name], self.writes[name]) + base[name] for name in self.decoder}

    def encode(self, x: Mapping[str, Tensor]) -> Tensor:
        """The codes f_BL of raw rows {reader: [B, D]}. Those that are kept have a gradient to rows that ask for one."""
        return self.code(x).dense()

    def code(self, x: Mapping[str, Tensor]) -> Code:
        """The codes of raw rows as the method makes them: those of sparse methods as kept entries."""
        return self.activation(self.pre(x), self.norms())

    def decode(self, f_BL: Tensor, x: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Raw rows {writer: [B, D]} of codes, and, where there is a skip connection, of raw rows {reader: [B, D]}.

        Decoupled, every writer selects once more of these codes, as it did of all: codes that were changed may let
        others in.
        """
        if f_BL.ndim != 2 or f_BL.shape[1] != self.latents:
            value = f"{tuple(f_BL.shape)}, not (B, {self.latents})"
            raise RowsError("codes that do not fit the dictionary", value, "Give what encode returns")
        if self.wiring.skip and x is None:
            raise RowsError("a skip connection takes rows", "decode(f)", "Give them too: decode(f, x)")
        readers = self.wiring.readers if self.wiring.skip else ()
        scaled = {name: self.scale.scaled(name, self._rows(name, x or {})) for name in readers}
        if any(len(rows_BD) != len(f_BL) for rows_BD in scaled.values()):
            raise RowsError("codes and rows are not equally many", len(f_BL), "Give the rows that the codes are of")
        y = self.written(self.activation.again(f_BL, self.norms()), self.base(scaled))
        return {name: self.scale.raw(name, y_BD) for name, y_BD in y.items()}

    def decoder_norms(self) -> Tensor:
        """|d| of every latent in every source, in scaled space: [writers, L]; 0 where it does not write."""
        if self.folded_WL is not None:
            return self.folded_WL
        lengths = {name: torch.linalg.vector_norm(W_SD, dim=1) for name, W_SD in self.decoder.items()}
        return torch.stack([ports.spread(lengths[name]) for name, ports in self.writes.items()])

    def norms(self) -> Tensor:
        """The norm_L that weights sparsity and selection, by the option `norm`:

        sum        sum over sources of |d| (the crosscoders of Lindsey et al. 2024)
        joint      length of all that a latent writes, sqrt(sum of |d|^2)
        mixed      joint + alpha x sum
        mean       sum / number of sources that the latent writes to
        none       1
        decoupled  |d| of each source, [writers, L]: each selects k latents for itself, by a threshold of its own
        """
        norm_WL = self.decoder_norms()
        if self.norm == "decoupled":
            return norm_WL
        if self.norm == "none":
            return torch.ones_like(norm_WL[0])
        total_L = norm_WL.sum(0)
        if self.norm in ("joint", "mixed"):
            joint_L = torch.linalg.vector_norm(norm_WL, dim=0)
            return joint_L if self.norm == "joint" else joint_L + self.alpha * total_L
        writers_L = torch.stack([ports.present_L for ports in self.writes.values()]).sum(0)
        return total_L / writers_L if self.norm == "mean" else total_L

    @torch.no_grad()
    def normalise_decoders(self) -> None:
        """Bring all that a latent writes, over its sources together, to the length 1. A latent of zeros stays."""
        norm_L = torch.linalg.vector_norm(self.decoder_norms(), dim=0)
        safe_L = torch.where(norm_L > 0, norm_L, 1.0)
        for name, W_SD in self.decoder.items():
            W_SD.div_(self.writes[name].own(safe_L)[:, None])

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Take from the decoders' gradients what lies along the vectors, over a latent's sources together.

        It would only change lengths that are brought back to 1 (Bricken et al. 2023).
        """
        along_L = torch.zeros_like(self.activation.bias_L)
        for name, W_SD in self.decoder.items():
            if W_SD.grad is not None:
                along_L += self.writes[name].spread((W_SD.grad * W_SD).sum(1))
        norm_L = self.decoder_norms().square().sum(0)
        share_L = torch.where(norm_L > 0, along_L / norm_L, 0.0)
        for name, W_SD in self.decoder.items():
            if W_SD.grad is not None:
                W_SD.grad -= self.writes[name].own(share_L)[:, None] * W_SD

    @torch.no_grad()
    def fold(self) -> "Dictionary":
        """The same dictionary with its scale in the weights: raw rows times encoders give pre-activations, codes times
        decoders give raw rows. Codes and reconstructions at evaluation are those of before, to rounding.

            W_enc <- factor W_enc    b <- b - sum over readers of factor W_enc . mean
            W_dec <- W_dec / factor  bias <- bias / factor + mean (a skip connection likewise, on both its sides)

        The decoder norms by which latents were ranked and compared (R) are kept as they were, in scaled space, since
        those of the new vectors are in each model's own units. It is in evaluation mode, its weights without gradient.
        """
        made = copy.deepcopy(self).eval().requires_grad_(False)
        made.folded_WL = self.decoder_norms().detach().clone()
        for name, W_SD in made.encoder.items():
            W_SD.copy_(W_SD.double() * self.scale.factor(name))
            seen_S = W_SD.double() @ self.scale.mean(name).double()
            made.activation.shift(made.reads[name].spread(seen_S).to(W_SD.dtype))
        for name, W_SD in made.decoder.items():
            factor, mean_D = self.scale.factor(name), self.scale.mean(name)
            W_SD.copy_(W_SD.double() / factor)
            made.bias[name].copy_(made.bias[name].double() / factor + mean_D)
        for reader, name in self._passes():
            W, ratio = made.skip[f"{reader} to {name}"], self.scale.factor(reader) / self.scale.factor(name)
            W.copy_(W.double() * ratio)
            made.bias[name].copy_(made.bias[name].double() - W.double() @ self.scale.mean(reader).double())
        made.scale = Scale(self.wiring.widths).to(made.activation.bias_L)
        return made

    # --- files --------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the folder whole: dictionary.safetensors and config.json."""
        with files.folder_atomic(folder) as temporary:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()},
                temporary / WEIGHTS,
            )
            files.open_like_folder(temporary / WEIGHTS)
            files.write_json(temporary / CONFIG, self.config())

    def config(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "sources": self.wiring.widths,
            "spans": [asdict(span) for span in self.wiring.spans],
            "skip": self.wiring.skip,
            "method": self.method.model_dump(mode="json"),
            "norm": self.norm,
            "alpha": self.alpha,
            "folded": self.folded_WL is not None,
        }

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "Dictionary":
        """A saved dictionary from its folder or from that of the run: in evaluation mode, its weights without gradient.

        Raises CheckpointError where there is none, ConfigError for a device that cannot be used.
        """
        folder = Path(path)
        folder = folder if (folder / CONFIG).exists() else folder / "dictionary"
        try:
            saved = files.read_json(folder / CONFIG)
            weights = load_file(folder / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                "no dictionary here", path, f"Give a run's folder or its dictionary/ ({error})"
            ) from None
        if saved.get("format") != FORMAT:
            raise CheckpointError("another format of dictionary", saved.get("format"), f"This version reads {FORMAT}")
        try:
            spans = [s | {side: tuple(s[side]) for side in ("readers", "writers")} for s in saved["spans"]]
            wiring = Wiring(tuple(Span(**span) for span in spans), saved["sources"], saved["skip"])
            scale, norm = Scale(saved["sources"]), (saved["norm"], 1, saved["alpha"])
            made = create(wiring, methods.parse(saved["method"]), scale, *norm)[0]
            if saved["folded"]:
                made.folded_WL = made.decoder_norms().detach()
            made.load_state_dict(weights)
        except (KeyError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                "config and weights do not fit each other", path, f"Save it again ({reason})"
            ) from None
        made.activation.schedule(sys.maxsize)
        return made.to(device_of(device)).eval().requires_grad_(False)


def create(
    wiring: Wiring, config: methods.MethodConfig, scale: Scale, norm: Norm, steps: int, alpha: float = 0.1
) -> tuple[Dictionary, Iterable[Any]]:
    """A dictionary of zeros and the terms of its method's loss."""
    built = config.build(wiring, steps)
    return Dictionary(wiring, config, built.activation, scale, norm, alpha), built.terms


def relative_norms(norm_WL: Tensor) -> Tensor:
    """R = |d_s| / sum over sources of |d|: the share in what a latent writes, [writers, L] (DFC paper, eq. 1)."""
    total_L = norm_WL.sum(0)
    return torch.where(total_L > 0, norm_WL / total_L.clamp_min(torch.finfo(norm_WL.dtype).tiny), math.nan)

"""Crosscoders as files of crosscoder_learning, in its last era, and of dfc_learning.

Letters: S sources, D width, L latents.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.errors import CheckpointError
from train.code import Form
from train.dictionary import Dictionary, Weights
from train.interop import normaliser
from train.interop.crosscoders import BY_NAME, NORMS, SIZES, Ranking, order
from train.interop.tensors import State
from train.pre import Ports
from train.wiring import Wiring


@dataclass(frozen=True)
class Written:
    """A crosscoder as crosscoder_learning has it in its last era: the class, its state, and its arguments."""

    kind: str
    state: State
    arguments: dict[str, Any]
    notes: tuple[str, ...] = ()


def written(dictionary: Dictionary) -> Written:
    """The crosscoder that does the same. Raises CheckpointError where there is none."""
    wiring, form = dictionary.wiring, dictionary.activation.form()
    _require_written(dictionary, form)
    names, latents = list(wiring.widths), wiring.latents
    sizes = _sizes(wiring)
    place_L = torch.argsort(order(latents, sizes))  # of each latent of the file, where it stands here
    encoder, decoder = (
        torch.stack([_whole(table, ports, name, wiring)[place_L] for name in names])
        for table, ports in ((dictionary.encoder, dictionary.reads), (dictionary.decoder, dictionary.writes))
    )
    ranking, divided = _ranked(dictionary)
    state = {
        "encoder.weight": encoder.transpose(1, 2), "encoder.bias": dictionary.activation.bias_L[place_L],
        "decoder.bias": torch.stack([dictionary.bias[name] for name in names]), "decoder.weight": decoder,
        "code_normalization_id": torch.tensor({name: n for n, (name, _) in NORMS.items()}[ranking.name]),
        **_scale_state(dictionary, names),
    }  # fmt: skip
    arguments: dict[str, Any] = {
        "activation_dim": wiring.widths[names[0]], "dict_size": latents, "num_layers": len(names),
        "code_normalization": ranking.name, "code_normalization_alpha_sae": 1.0,
        "code_normalization_alpha_cc": ranking.alpha, "target_rms": 1.0,
    }  # fmt: skip
    if form.kind == "batch_topk":
        assert form.threshold_L is not None
        thresholds = form.threshold_L[..., 0] * divided
        state |= {"k": torch.tensor(form.k[0], dtype=torch.int32), "threshold": thresholds}
        arguments |= {"k": form.k[0]}
    kind = "BatchTopKCrossCoder" if form.kind == "batch_topk" else "CrossCoder"
    if sizes is None:
        notes = () if len(wiring.spans) == 1 else ("weights that a span forbids are zeros, which training would fill",)
        return Written(kind, state, arguments, notes)
    arguments |= {**dict(zip(SIZES, sizes, strict=True)), **_shares(latents, sizes)}
    return Written(f"DedicatedFeature{kind}", state, arguments, ("latents are in the order A | B | shared",))


def _require_written(dictionary: Dictionary, form: Form) -> None:
    wiring = dictionary.wiring
    what, value, way_out = "crosscoder_learning has no such crosscoder", "", "Keep it in its own format"
    if form.kind not in ("relu", "batch_topk"):
        value, way_out = f"{dictionary.method.name}", "It has ReLU and BatchTopK"
    elif len(set(wiring.widths.values())) > 1:
        value = ", ".join(f"{name} has width {width}" for name, width in wiring.widths.items())
        way_out = "All of its sources have one width"
    elif wiring.skip or wiring.writers != tuple(wiring.widths):
        value = "a skip connection, or a source that is not written"
    elif len(form.k) > 1:
        value = "spans with a k of their own"
    elif dictionary.folded_WL is not None and dictionary.norm != "none":
        value, way_out = "a folded one, whose norms are those of other weights", "Export what it was folded from"
    if value:
        raise CheckpointError(what, value, way_out)


def _whole(table: Weights, ports: Mapping[str, Ports], name: str, wiring: Wiring) -> Tensor:
    """A source's matrix over all latents, [L, D], 0 where it has no part."""
    if name not in table:
        return torch.zeros(wiring.latents, wiring.widths[name])
    return ports[name].spread(table[name])


def _sizes(wiring: Wiring) -> tuple[int, int] | None:
    """Of a dedicated crosscoder of two sources in the order A | shared | B."""
    names = tuple(wiring.widths)
    ends = [(span.readers, span.writers) for span in wiring.spans]
    if ends != [(names[:1], names[:1]), (names, names), (names[1:], names[1:])] or len(names) != 2:
        return None
    return wiring.spans[0].size, wiring.spans[2].size


def _ranked(dictionary: Dictionary) -> tuple[Ranking, float]:
    """The norm there, and how much larger it is than the norm here."""
    if dictionary.norm != "mean":
        [name] = [name for name, norm in BY_NAME.items() if norm == dictionary.norm]
        return Ranking(name, dictionary.norm, dictionary.alpha), 1.0
    writers = {len(span.writers) for span in dictionary.wiring.spans}
    if len(writers) > 1:
        way_out = "Train with another wiring.norm"
        raise CheckpointError("crosscoder_learning has no mean of norms", "wiring.norm mean", way_out)
    return Ranking("CROSSCODER", "sum"), float(writers.pop())


def _scale_state(dictionary: Dictionary, names: list[str]) -> State:
    """The scale as a normaliser whose target is 1. Spreads are even ones that lead to the same factor."""
    scale = dictionary.scale
    factor_S = torch.stack([scale.factor(name) for name in names])
    mean_SD = torch.stack([scale.mean(name) for name in names])
    even_S = ((factor_S.double().pow(-2) - normaliser.SMALL) / mean_SD.shape[1]).sqrt()
    return {
        "target_rms": torch.tensor(1.0), "activation_mean": mean_SD,
        "activation_std": even_S.float()[:, None].expand_as(mean_SD), "activation_global_scale": factor_S,
    }  # fmt: skip


def _shares(latents: int, sizes: tuple[int, int]) -> dict[str, float]:
    """Shares that become these sizes when they are cut off."""
    found = []
    for size in sizes:
        share = size / latents
        while int(latents * share) < size:
            share = math.nextafter(share, 1.0)
        found.append(share)
    return {"model_a_exclusive_pct": found[0], "model_b_exclusive_pct": found[1]}

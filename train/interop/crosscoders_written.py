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
from train.dictionary import Dictionary
from train.interop.crosscoders import BY_NAME, NORMS, SIZES, Ranking, even_spreads, order
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
    found, (ranked, divided) = sizes(wiring), _ranked(dictionary)
    state = {**weights(dictionary, dict(dictionary.named_parameters())), **normaliser_state(dictionary)}
    state["code_normalization_id"] = torch.tensor({name: n for n, (name, _) in NORMS.items()}[ranked.name])
    arguments: dict[str, Any] = {
        **arguments_of(dictionary), "code_normalization": ranked.name, "code_normalization_alpha_sae": 1.0,
        "code_normalization_alpha_cc": ranked.alpha, "target_rms": 1.0,
    }  # fmt: skip
    if form.kind == "batch_topk":
        assert form.threshold_L is not None
        k, threshold = torch.tensor(form.k[0], dtype=torch.int32), form.threshold_L[..., 0] * divided
        state, arguments = {**state, "k": k, "threshold": threshold}, {**arguments, "k": form.k[0]}
    kind = "BatchTopKCrossCoder" if form.kind == "batch_topk" else "CrossCoder"
    if found is None:
        notes = () if len(wiring.spans) == 1 else ("weights that a span forbids are zeros, which training would fill",)
        return Written(kind, state, arguments, notes)
    return Written(f"DedicatedFeature{kind}", state, arguments, ("latents are in the order A | B | shared",))


def arguments_of(dictionary: Dictionary) -> dict[str, Any]:
    """Those of a class that say how large it is, who is read, and which latents are dedicated."""
    wiring = dictionary.wiring
    read = [number for number, name in enumerate(wiring.widths) if name in wiring.readers]
    found: dict[str, Any] = {
        "activation_dim": next(iter(wiring.widths.values())), "dict_size": wiring.latents,
        "num_layers": len(wiring.widths), "encoder_layers": None if len(read) == len(wiring.widths) else read,
    }  # fmt: skip
    if (own := sizes(wiring)) is not None:
        found |= {**dict(zip(SIZES, own, strict=True)), **_shares(wiring.latents, own)}
    return found


def weights(dictionary: Dictionary, of: Mapping[str, Tensor | None]) -> State:
    """The four tensors of a state, of the dictionary's parameters by name, or of their gradients; what is None is 0."""
    wiring, names = dictionary.wiring, list(dictionary.wiring.widths)
    place_L = torch.argsort(order(wiring.latents, sizes(wiring))).to(dictionary.activation.bias_L.device)

    def whole(table: str, ports: Mapping[str, Ports], name: str) -> Tensor:
        value_SD = of.get(f"{table}.{name}")
        if value_SD is None:
            return dictionary.activation.bias_L.new_zeros(wiring.latents, wiring.widths[name])
        return ports[name].spread(value_SD)[place_L]

    def bias(name: str, like: Tensor) -> Tensor:
        value = of.get(name)
        return torch.zeros_like(like) if value is None else value

    encoder = torch.stack([whole("encoder", dictionary.reads, name) for name in names if name in wiring.readers])
    return {
        "encoder.weight": encoder.transpose(1, 2),
        "encoder.bias": bias("activation.bias_L", dictionary.activation.bias_L)[place_L],
        "decoder.bias": torch.stack([bias(f"bias.{name}", dictionary.bias[name]) for name in names]),
        "decoder.weight": torch.stack([whole("decoder", dictionary.writes, name) for name in names]),
    }  # fmt: skip


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
    if value:
        raise CheckpointError(what, value, way_out)
    require_own_norms(dictionary)


def require_own_norms(dictionary: Dictionary) -> None:
    """Raises CheckpointError for a folded one: the norms that rank its latents are those of other weights."""
    if dictionary.folded_WL is not None and dictionary.norm != "none":
        what, way_out = "a folded dictionary has no such state", "Take what it was folded from, scaled by source"
        raise CheckpointError(what, "its norms are those of other weights", way_out)


def sizes(wiring: Wiring) -> tuple[int, int] | None:
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


def normaliser_state(dictionary: Dictionary) -> State:
    """The scale as a normaliser whose target is 1. Spreads are even ones that lead to the same factor."""
    scale, names = dictionary.scale, list(dictionary.wiring.widths)
    return {
        "target_rms": torch.tensor(1.0), "activation_mean": torch.stack([scale.mean(name) for name in names]),
        "activation_std": even_spreads(dictionary),
        "activation_global_scale": torch.stack([scale.factor(name) for name in names]),
    }  # fmt: skip


def _shares(latents: int, own: tuple[int, int]) -> dict[str, float]:
    """Shares that become these sizes when they are cut off."""
    found = []
    for size in own:
        share = size / latents
        while int(latents * share) < size:
            share = math.nextafter(share, 1.0)
        found.append(share)
    return {"model_a_exclusive_pct": found[0], "model_b_exclusive_pct": found[1]}

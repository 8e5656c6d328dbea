"""Files of the autoencoders of dictionary_learning: ae.pt, and config.json beside it.

AutoEncoder             f = relu(W_e (x - b) + b_e)              y = W_d f + b
AutoEncoderNew          f = relu(W_e x + b_e)                    y = W_d f + b_d
GatedAutoEncoder        z = W_e (x - b), f = 1[z + b_g > 0] relu(exp(r) z + b_m)
JumpReluAutoEncoder     h = x W_e + b_e, f = relu(h) 1[h > threshold]
AutoEncoderTopK         the k largest of a row of relu(W_e (x - b) + b_e)
BatchTopKSAE            those above a threshold
MatryoshkaBatchTopKSAE  the same, of nested groups

Letters: D width, L latents.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shared.errors import CheckpointError
from train.code import Form
from train.interop import normaliser
from train.interop.found import Sidecar
from train.interop.plain import Plain, less, shifted
from train.interop.tensors import State, Taken

Read = tuple[Plain, tuple[str, ...]]  # and what has to be known of it
UNTRAINED = -1.0  # the threshold of a class before its trainer sets one


def kind_of(state: Taken, sidecar: Sidecar) -> str:
    """The class of a state, by its names and shapes; by what lies beside it where two classes have the same.

    Raises CheckpointError where neither tells.
    """
    if "group_sizes" in state:
        return "MatryoshkaBatchTopKSAE"
    if "r_mag" in state:
        return "GatedAutoEncoder"
    if "W_enc" in state:
        return "JumpReluAutoEncoder"
    if "decoder.bias" in state:
        return "AutoEncoderNew"
    if "bias" in state:
        return "AutoEncoder"
    if "k" not in state:
        return "AutoEncoderTopK"
    if normaliser.NEW[0] in state or normaliser.OLD[0] in state:
        return "BatchTopKSAE"
    if sidecar.kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        return sidecar.kind
    way_out = "Put its config.json beside it: the names of its tensors are those of both"
    raise CheckpointError("AutoEncoderTopK or BatchTopKSAE", state.path, way_out)


def read(state: Taken, sidecar: Sidecar) -> tuple[str, Plain, tuple[str, ...]]:
    """The class, the dictionary, and what has to be known of it. Raises CheckpointError."""
    kind = kind_of(state, sidecar)
    found, notes = READERS[kind](state, sidecar)
    state.done()
    return kind, found, notes


def _auto_encoder(state: Taken, sidecar: Sidecar) -> Read:
    encoder_LD, bias_L = _linear(state)
    bias_D = state.tensor("bias", encoder_LD.shape[1])
    return _plain(state, Form("relu"), encoder_LD, bias_L, bias_D), ()


def _new(state: Taken, sidecar: Sidecar) -> Read:
    encoder_LD, bias_L = _linear(state)
    bias_D = state.tensor("decoder.bias", encoder_LD.shape[1])
    return _plain(state, Form("relu"), encoder_LD, bias_L, bias_D, seen=False), ()


def _gated(state: Taken, sidecar: Sidecar) -> Read:
    encoder_LD = state.tensor("encoder.weight", None, None)
    latents, width = encoder_LD.shape
    rescale_L, gate_L, magnitude_L = (state.tensor(n, latents) for n in ("r_mag", "gate_bias", "mag_bias"))
    bias_D = state.tensor("decoder_bias", width)
    form = shifted(Form("gated", rescale_L=rescale_L, magnitude_L=magnitude_L), encoder_LD.double() @ bias_D.double())
    note = "codes are those of saprmarks/dictionary_learning; crosscoder_learning multiplied them by decoder norms"
    return _plain(state, form, encoder_LD, gate_L, bias_D), (note,)


def _jump(state: Taken, sidecar: Sidecar) -> Read:
    encoder_LD, bias_L, decoder_LD, bias_D = _matrices(state)
    form = Form("jumprelu", threshold_L=state.tensor("threshold", len(bias_L)))
    notes = (
        "rows are taken as they are: whether a class took b_dec from them (apply_b_dec_to_input) is in no file",
        "codes are those of saprmarks/dictionary_learning; crosscoder_learning multiplied them by decoder norms",
    )
    return Plain(form, encoder_LD, bias_L, decoder_LD, bias_D, torch.ones_like(bias_L)), notes


def _topk(state: Taken, sidecar: Sidecar) -> Read:
    encoder_LD, bias_L = _linear(state)
    form, notes = Form("topk", (_k(state, sidecar),)), tuple[str, ...]()
    if "threshold" in state:
        threshold = state.number("threshold")
        form = replace(form, threshold_L=torch.full((len(bias_L),), threshold))
        told = f"codes are the k largest; its threshold for use_threshold is {threshold:.6g}"
        notes = (told,) if threshold >= 0 else ()
    return _plain(state, form, encoder_LD, bias_L, state.tensor("b_dec", encoder_LD.shape[1])), notes


def _batch_topk(state: Taken, sidecar: Sidecar) -> Read:
    encoder_LD, bias_L = _linear(state)
    form, notes = _threshold(state, sidecar, len(bias_L))
    found = _plain(state, form, encoder_LD, bias_L, state.tensor("b_dec", encoder_LD.shape[1]))
    scaled, era = normaliser.taken(state, 1, encoder_LD.shape[1])
    if scaled is None:
        return found, notes
    if scaled.factor.ndim == 1:
        return replace(found, scaled=scaled), (f"rows are scaled as {era} does", *notes)
    found = found.over(scaled.mean_SD[0], scaled.factor[0])
    return found, (f"rows are scaled as {era} does, which is folded into the weights", *notes)


def _matryoshka(state: Taken, sidecar: Sidecar) -> Read:
    encoder_LD, bias_L, decoder_LD, bias_D = _matrices(state)
    form, notes = _threshold(state, sidecar, len(bias_L))
    groups = tuple(int(size) for size in state.plain("group_sizes"))
    bias_L = less(bias_L, encoder_LD, bias_D)
    return Plain(form, encoder_LD, bias_L, decoder_LD, bias_D, torch.ones_like(bias_L), groups=groups), notes


READERS: dict[str, Callable[[Taken, Sidecar], Read]] = {
    "AutoEncoder": _auto_encoder, "AutoEncoderNew": _new, "GatedAutoEncoder": _gated, "JumpReluAutoEncoder": _jump,
    "AutoEncoderTopK": _topk, "BatchTopKSAE": _batch_topk, "MatryoshkaBatchTopKSAE": _matryoshka,
}  # fmt: skip


def _linear(state: Taken) -> tuple[Tensor, Tensor]:
    encoder_LD = state.tensor("encoder.weight", None, None)
    return encoder_LD, state.tensor("encoder.bias", len(encoder_LD))


def _matrices(state: Taken) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encoder, its bias, decoder, its bias, where they are parameters called W_enc and so on."""
    encoder_LD = state.tensor("W_enc", None, None).T.contiguous()
    latents, width = encoder_LD.shape
    bias_L, decoder_LD = state.tensor("b_enc", latents), state.tensor("W_dec", latents, width)
    return encoder_LD, bias_L, decoder_LD, state.tensor("b_dec", width)


def _plain(state: Taken, form: Form, encoder_LD: Tensor, bias_L: Tensor, bias_D: Tensor, seen: bool = True) -> Plain:
    """With the decoder of a torch Linear; `seen`: latents see rows less the decoder's bias."""
    decoder_LD = state.tensor("decoder.weight", encoder_LD.shape[1], len(encoder_LD)).T.contiguous()
    bias_L = less(bias_L, encoder_LD, bias_D) if seen else bias_L
    return Plain(form, encoder_LD, bias_L, decoder_LD, bias_D, torch.ones_like(bias_L))


def _k(state: Taken, sidecar: Sidecar) -> int:
    """The weights' own k, which annealing has changed and a config has not."""
    if "k" in state:
        return int(state.plain("k"))
    if (told := sidecar.get("k")) is not None:
        return int(told)
    raise CheckpointError("k is in neither the weights nor a config.json", state.path, "Put its config.json beside it")


def _threshold(state: Taken, sidecar: Sidecar, latents: int) -> tuple[Form, tuple[str, ...]]:
    threshold = state.number("threshold")
    notes = () if threshold >= 0 else ("its threshold was never set: every positive pre-activation is a code",)
    return Form("batch_topk", (_k(state, sidecar),), torch.full((latents,), threshold)), notes


# --- writing ----------------------------------------------------------------------------------------------------


def written(found: Plain) -> tuple[str, State]:
    """The class that does the same, and its state. Raises CheckpointError where there is none."""
    if found.encoder_LD.shape[1] != found.decoder_LE.shape[1] or found.skip_ED is not None:
        raise CheckpointError("dictionary_learning has no transcoders", "a transcoder", "Export it to sae_lens")
    found = found.unranked()
    kind = "MatryoshkaBatchTopKSAE" if found.groups else CLASSES[found.form.kind]
    return kind, state_of(kind, found)


def state_of(kind: str, found: Plain) -> State:
    """The state of a class, with the graph of what it is made of. Raises CheckpointError where spans have their own k
    or threshold."""
    return WRITERS[kind](found)


def _write_auto_encoder(found: Plain) -> State:
    return {
        "bias": found.bias_E, "encoder.weight": found.encoder_LD, "encoder.bias": _more(found),
        "decoder.weight": found.decoder_LE.T,
    }  # fmt: skip


def _write_new(found: Plain) -> State:
    return {
        "encoder.weight": found.encoder_LD, "encoder.bias": found.bias_L, "decoder.weight": found.decoder_LE.T,
        "decoder.bias": found.bias_E,
    }  # fmt: skip


def _write_gated(found: Plain) -> State:
    form = shifted(found.form, -(found.encoder_LD.double() @ found.bias_E.double()))
    return {
        "decoder_bias": found.bias_E, "r_mag": form.rescale_L, "gate_bias": _more(found),
        "mag_bias": form.magnitude_L, "encoder.weight": found.encoder_LD, "decoder.weight": found.decoder_LE.T,
    }  # fmt: skip


def _write_jump(found: Plain) -> State:
    return {**_named(found, found.bias_L), "threshold": found.form.threshold_L}


def _write_topk(found: Plain) -> State:
    threshold = UNTRAINED if found.form.threshold_L is None else found.threshold("AutoEncoderTopK")
    return {**_layers(found), **_buffers(found, "AutoEncoderTopK", threshold)}


def _write_batch_topk(found: Plain) -> State:
    return {**_layers(found), **_buffers(found, "BatchTopKSAE", found.threshold("BatchTopKSAE"))}


def _write_matryoshka(found: Plain) -> State:
    kind = "MatryoshkaBatchTopKSAE"
    buffers = _buffers(found, kind, found.threshold(kind))
    return {**_named(found, _more(found)), **buffers, "group_sizes": torch.tensor(found.groups)}


WRITERS: Mapping[str, Callable[[Plain], State]] = {
    "AutoEncoder": _write_auto_encoder, "AutoEncoderNew": _write_new, "GatedAutoEncoder": _write_gated,
    "JumpReluAutoEncoder": _write_jump, "AutoEncoderTopK": _write_topk, "BatchTopKSAE": _write_batch_topk,
    "MatryoshkaBatchTopKSAE": _write_matryoshka,
}  # fmt: skip
FORMS = {
    "AutoEncoder": "relu", "AutoEncoderNew": "relu", "GatedAutoEncoder": "gated", "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk", "BatchTopKSAE": "batch_topk", "MatryoshkaBatchTopKSAE": "batch_topk",
}  # fmt: skip
# The class for a form. Of ReLU not AutoEncoder, which load_dictionary rescales.
CLASSES = {
    "relu": "AutoEncoderNew", "gated": "GatedAutoEncoder", "jumprelu": "JumpReluAutoEncoder", "topk": "AutoEncoderTopK",
    "batch_topk": "BatchTopKSAE",
}  # fmt: skip


def _more(found: Plain) -> Tensor:
    """The bias of latents that see rows less the decoder's bias."""
    return less(found.bias_L, found.encoder_LD, -found.bias_E)


def _layers(found: Plain) -> State:
    return {
        "b_dec": found.bias_E, "encoder.weight": found.encoder_LD, "encoder.bias": _more(found),
        "decoder.weight": found.decoder_LE.T,
    }  # fmt: skip


def _named(found: Plain, bias_L: Tensor) -> State:
    return {"W_enc": found.encoder_LD.T, "b_enc": bias_L, "W_dec": found.decoder_LE, "b_dec": found.bias_E}


def _buffers(found: Plain, kind: str, threshold: float) -> dict[str, Any]:
    return {"k": torch.tensor(found.k(kind), dtype=torch.int32), "threshold": torch.tensor(threshold)}

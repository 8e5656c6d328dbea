"""Folders of SAELens: cfg.json and sae_weights.safetensors, of version 6 and of those before it.

standard, transcoder            f = relu(h)             h = x W_enc + b_enc (less b_dec W_enc: apply_b_dec_to_input)
jumprelu, jumprelu_transcoder   f = relu(h) 1[h > threshold]
gated                           f = 1[h + b_gate > 0] relu(exp(r_mag) h + b_mag)
topk                            f = relu(h), the k largest; rescaled: of h |d|, f |d| with decoder vectors d / |d|
batchtopk, matryoshka_batchtopk as they are saved while they train: those above topk_threshold
..._skip_transcoder             y + x W_skip^T

Letters: D width of what is read, E width of what is written, L latents.
"""

from collections.abc import Mapping
from typing import Any

import torch

from shared.errors import CheckpointError
from train.code import Form
from train.interop.plain import Plain, less, shifted
from train.interop.tensors import State, Taken

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FORMS = {
    "standard": "relu", "gated": "gated", "jumprelu": "jumprelu", "topk": "topk", "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk", "transcoder": "relu", "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu", "jumprelu_skip_transcoder": "jumprelu",
}  # fmt: skip
RENAMED = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}  # in versions before 6
VERSION = "6.0.0"  # of the layout that is written


def read(state: Taken, config: Mapping[str, Any]) -> tuple[str, Plain]:
    """The architecture, and the dictionary. Raises CheckpointError for what a dictionary cannot hold."""
    config = {RENAMED.get(key, key): value for key, value in config.items()}
    kind = architecture(config)
    if kind not in FORMS:
        raise CheckpointError("this architecture of SAELens is not here", kind, f"Known: {', '.join(FORMS)}")
    _require_linear(config, state)
    encoder_LD = state.tensor("W_enc", None, None).T.contiguous()
    latents, width = encoder_LD.shape
    decoder_LE = state.tensor("W_dec", latents, None)
    bias_E = state.tensor("b_dec", decoder_LE.shape[1])
    bias_L = state.tensor("b_gate" if kind == "gated" else "b_enc", latents)
    skip_ED = state.tensor("W_skip", len(bias_E), width) if "skip" in kind else None
    form = _form(state, config, FORMS[kind], latents)
    if "scaling_factor" in state:  # of fine-tuning, which a file says it has not had
        state.tensor("scaling_factor", latents)
    state.done()
    if config.get("apply_b_dec_to_input", "transcoder" not in kind):
        form = shifted(form, encoder_LD.double() @ bias_E.double())
        bias_L = less(bias_L, encoder_LD, bias_E)
    rescaled = form.k and config.get("rescale_acts_by_decoder_norm", False)
    norm_L = torch.linalg.vector_norm(decoder_LE, dim=1) if rescaled else torch.ones(latents)
    groups = _groups(config, latents) if kind == "matryoshka_batchtopk" else ()
    return kind, Plain(form, encoder_LD, bias_L, decoder_LE, bias_E, norm_L, skip_ED, groups).unranked()


def architecture(config: Mapping[str, Any]) -> str:
    """By its name; before version 6 TopK was an activation of the standard one."""
    if config.get("activation_fn") == "topk":
        return "topk"
    return str(config.get("architecture", "standard"))


def _require_linear(config: Mapping[str, Any], state: Taken) -> None:
    """Raises CheckpointError where rows are changed on their way in, in a way that no matrix does or no file tells."""
    way = config.get("normalize_activations") or "none"
    if way is True or way == "expected_average_only_in":
        way_out = "Fold the factor in SAELens (fold_activation_norm_scaling_factor) and save it again"
        raise CheckpointError("rows are scaled by a factor that is in no file", "expected_average_only_in", way_out)
    if way != "none":
        raise CheckpointError("every row is scaled by itself", f"normalize_activations {way}", "It is no dictionary")
    if config.get("finetuning_scaling_factor"):
        raise CheckpointError("codes are scaled behind the training", state.path, "Fold finetuning_scaling_factor")


def _form(state: Taken, config: Mapping[str, Any], kind: str, latents: int) -> Form:
    if kind == "gated":
        return Form("gated", rescale_L=state.tensor("r_mag", latents), magnitude_L=state.tensor("b_mag", latents))
    if kind == "jumprelu":
        if "log_threshold" in state:
            return Form("jumprelu", threshold_L=state.tensor("log_threshold", latents).exp())
        return Form("jumprelu", threshold_L=state.tensor("threshold", latents))
    if kind == "relu":
        return Form("relu")
    k = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
    if k is None:
        raise CheckpointError("k is not in cfg.json", state.path, "Put it there")
    if kind == "topk":
        return Form("topk", (int(k),))
    return Form("batch_topk", (round(k),), torch.full((latents,), state.number("topk_threshold")))


def _groups(config: Mapping[str, Any], latents: int) -> tuple[int, ...]:
    """Sizes of nested groups, of the widths at which they end."""
    ends = sorted({*(config.get("matryoshka_widths") or []), latents})
    return tuple(end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True))


def written(found: Plain, transcodes: bool) -> tuple[State, dict[str, Any]]:
    """The state and cfg.json of what does the same. Raises CheckpointError where there is none."""
    found = found.jumping().unranked()
    kind = _named(found, transcodes)
    (latents, width), form = found.encoder_LD.shape, found.form
    state: State = {
        "W_enc": found.encoder_LD.T, "W_dec": found.decoder_LE, "b_dec": found.bias_E,
        "b_gate" if kind == "gated" else "b_enc": found.bias_L,
    }  # fmt: skip
    config: dict[str, Any] = {
        "architecture": kind, "d_in": width, "d_sae": latents, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
    }  # fmt: skip
    if form.threshold_L is not None:
        state["threshold"] = form.threshold_L
    if kind == "gated":
        state |= {"r_mag": form.rescale_L, "b_mag": form.magnitude_L}
    if kind == "topk":
        config |= {"k": found.k("SAELens"), "rescale_acts_by_decoder_norm": False}
    if transcodes:
        config["d_out"] = found.decoder_LE.shape[1]
    if found.skip_ED is not None:
        state["W_skip"] = found.skip_ED
    return state, config


def _named(found: Plain, transcodes: bool) -> str:
    kind = {"relu": "standard"}.get(found.form.kind, found.form.kind)
    if not transcodes:
        return kind
    names = {"standard": "", "jumprelu": "jumprelu_"}
    if kind not in names:
        way_out = "It has those of ReLU, JumpReLU and BatchTopK"
        raise CheckpointError("SAELens has no such transcoder", kind, way_out)
    return f"{names[kind]}{'skip_' if found.skip_ED is not None else ''}transcoder"

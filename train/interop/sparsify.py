"""Checkpoints of sparsify: cfg.json and sae.safetensors.

f = the k largest of a row of relu(W_e (x - b) + b_e)    y = f W_dec + b    transcoders see x, and may add x W_skip^T

Letters: D width, L latents.
"""

from collections.abc import Mapping
from typing import Any

import torch

from shared.errors import CheckpointError
from train.code import Form
from train.interop.plain import Plain, less
from train.interop.tensors import State, Taken

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(state: Taken, config: Mapping[str, Any]) -> Plain:
    """Raises CheckpointError for what is no TopK."""
    if (activation := config.get("activation", "topk")) != "topk":
        raise CheckpointError("this activation is not here", activation, "Only topk can be read")
    if "k" not in config:
        raise CheckpointError("k is not in cfg.json", state.path, "Put it there")
    encoder_LD = state.tensor("encoder.weight", None, None)
    latents, width = encoder_LD.shape
    bias_L, decoder_LD = state.tensor("encoder.bias", latents), state.tensor("W_dec", latents, width)
    bias_D = state.tensor("b_dec", width)
    skip_DD = state.tensor("W_skip", width, width) if "W_skip" in state else None
    state.done()
    if not config.get("transcode"):
        if skip_DD is not None:
            way_out = "A dictionary of one source has none: is transcode missing in cfg.json?"
            raise CheckpointError("a skip connection from a source to itself", state.path, way_out)
        bias_L = less(bias_L, encoder_LD, bias_D)
    form = Form("topk", (int(config["k"]),))
    return Plain(form, encoder_LD, bias_L, decoder_LD, bias_D, torch.ones(latents), skip_DD)


def written(found: Plain, transcodes: bool) -> tuple[State, dict[str, Any]]:
    """The state and cfg.json of what does the same. Raises CheckpointError where there is none."""
    if found.form.kind != "topk":
        raise CheckpointError("sparsify has TopK alone", found.form.kind, "Export to sae_lens or dictionary_learning")
    found = found.unranked()
    latents, width = found.encoder_LD.shape
    if found.decoder_LE.shape[1] != width:
        value = f"{width} -> {found.decoder_LE.shape[1]}"
        raise CheckpointError("sparsify has transcoders of one width", value, "Export to sae_lens")
    state = {
        "encoder.weight": found.encoder_LD,
        "encoder.bias": found.bias_L if transcodes else less(found.bias_L, found.encoder_LD, -found.bias_E),
        "W_dec": found.decoder_LE, "b_dec": found.bias_E,
    }  # fmt: skip
    if found.skip_ED is not None:
        state["W_skip"] = found.skip_ED
    config = {
        "activation": "topk", "expansion_factor": max(1, latents // width), "normalize_decoder": not transcodes,
        "num_latents": latents, "k": found.k("sparsify"), "multi_topk": False,
        "skip_connection": found.skip_ED is not None, "transcode": transcodes, "d_in": width,
    }  # fmt: skip
    return state, config

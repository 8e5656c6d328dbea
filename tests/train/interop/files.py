"""Small files as other libraries write them, made from descriptions of their layouts, and what they must give.

The maths is in numpy and fp64: every source's product by itself, then their sum, then the bias.

Letters: B rows, S sources, D width, L latents.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

S, D, L, B, K = 2, 6, 40, 30, 5
ERAS = ("E1", "E2", "E3", "E4", "E5", "E6", "E7")
NORM_IDS = {"CROSSCODER": 1, "SAE": 2, "MIXED": 3, "NONE": 4, "DECOUPLED": 5}
ALPHAS = (0.7, 0.2)  # of MIXED: sae, cc
TARGET = 1.5  # target_rms
Array = np.ndarray


@dataclass
class File:
    """Tensors by name and the tables beside them; `rows` [B, S, D] or [B, D], and the codes and rows they give."""

    state: dict[str, Any]
    tables: dict[str, Any] = field(default_factory=dict)
    rows: Array = field(default_factory=lambda: np.zeros(0))
    codes: Array = field(default_factory=lambda: np.zeros(0))
    y: Array = field(default_factory=lambda: np.zeros(0))

    def write(self, folder: Path, name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({key: value.contiguous() for key, value in self.state.items()}, folder / name)
        else:
            torch.save(self.state, folder / name)
        for table, value in self.tables.items():
            (folder / table).write_text(json.dumps(value))
        return folder / name


def tensors(**arrays: Any) -> dict[str, Any]:
    return {name.replace("__", "."): torch.from_numpy(np.asarray(a, dtype=np.float32)) for name, a in arrays.items()}


def number(value: int | float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


def rounded(*shape: int, rng: np.random.Generator, size: float = 1.0) -> Array:
    """Random numbers that fp32 has exactly, as fp64."""
    return (size * rng.standard_normal(shape)).astype(np.float32).astype(np.float64)


def between(score: Array, share: float = 0.8) -> float:
    """A threshold in the middle between two neighbouring scores, which rounding does not cross."""
    ascending = np.sort(score[score > 0])
    at = int(share * (len(ascending) - 1))
    gaps = np.diff(ascending[at : at + 20])
    widest = at + int(np.argmax(gaps))
    return float(np.float32((ascending[widest] + ascending[widest + 1]) / 2))


def relu(h: Array) -> Array:
    return np.maximum(h, 0)


def norms(decoder: Array, name: str, alphas: tuple[float, float] = ALPHAS) -> Array:
    """The code normalisation of a decoder [S, L, D]: [L], or [S, L] where every source has its own."""
    each = np.linalg.norm(decoder, axis=2)
    total, joint = each.sum(0), np.sqrt(np.square(each).sum(0))
    return {
        "CROSSCODER": total, "SAE": joint, "MIXED": alphas[0] * joint + alphas[1] * total, "NONE": np.ones(len(total)),
        "DECOUPLED": each,
    }[name]  # fmt: skip


@dataclass
class Weights:
    """Those of a crosscoder: encoder [S, D, L], bias [L], decoder [S, L, D], its bias [S, D]."""

    encoder: Array
    bias: Array
    decoder: Array
    decoder_bias: Array

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Weights":
        shapes = ((S, D, L), (L,), (S, L, D), (S, D))
        return cls(*(rounded(*shape, rng=rng) for shape in shapes))

    def codes(self, x: Array, norm: Array | None, threshold: Array | float) -> Array:
        """[B, L], or [B, S, L] where every source has its own norm. No norm: by ReLU alone."""
        f = relu(sum(x[:, s] @ self.encoder[s] for s in range(S)) + self.bias)
        if norm is None:
            return f
        if norm.ndim == 1:
            return f * (f * norm > threshold)
        return f[:, None] * (f[:, None] * norm > np.asarray(threshold)[:, None])

    def written(self, f: Array) -> Array:
        each = f if f.ndim == 3 else np.repeat(f[:, None], S, 1)
        return np.stack([each[:, s] @ self.decoder[s] + self.decoder_bias[s] for s in range(S)], 1)

    def state(self) -> dict[str, Any]:
        return tensors(
            encoder__weight=self.encoder, encoder__bias=self.bias, decoder__bias=self.decoder_bias,
            decoder__weight=self.decoder,
        )  # fmt: skip


def scaling(era: str, rows: Array) -> tuple[dict[str, Any], Array, Array, Array]:
    """The state of an era's normaliser, its mean [S, D], and what rows are multiplied and divided by [S, D]."""
    mean = rows.mean(0).astype(np.float32).astype(np.float64)
    std = rows.std(0, ddof=1).astype(np.float32).astype(np.float64)
    if era in ("E4", "E5"):
        names = ("activation_normalizer.mean", "activation_normalizer.std")
        names = names if era == "E4" else ("activation_mean", "activation_std")
        state = {
            name: torch.from_numpy(value.astype(np.float32)) for name, value in zip(names, (mean, std), strict=True)
        }
        return state, mean, 1 / (std + 1e-8), 1 / (std + 1e-8)
    over: Any = 1 if era == "E7" else (0, 1)
    scale = np.asarray(TARGET / np.sqrt(np.square(std).sum(over) + 1e-8))
    state = tensors(activation_mean=mean, activation_std=std, target_rms=TARGET, activation_global_scale=scale)
    each = np.broadcast_to(scale[..., None] if era == "E7" else scale, mean.shape)
    return state, mean, each, each + 1e-8


def crosscoder(era: str, batch_topk: bool, norm: str = "CROSSCODER", seed: int = 0, normalised: bool = True) -> File:
    """A crosscoder as an era has it. `normalised`: rows are scaled, in the eras that can."""
    rng = np.random.default_rng(seed)
    weights, rows = Weights.random(rng), rounded(B, S, D, rng=rng, size=3.0) + 2.0
    return of_weights(weights, rows, era, batch_topk, norm, normalised)


def of_weights(weights: Weights, rows: Array, era: str, batch_topk: bool, norm: str, normalised: bool = True) -> File:
    state, tables = weights.state(), {}
    mean, times, by = np.zeros((S, D)), np.ones((S, D)), np.ones((S, D))
    if era >= "E4" and normalised:
        scaled, mean, times, by = scaling(era, rows)
        state |= scaled
    elif era >= "E5":
        off = torch.full((S, D), torch.nan)
        state |= {"activation_mean": off, "activation_std": off.clone()}
        ones = torch.ones(S) if era == "E7" else torch.ones(())
        state |= {} if era == "E5" else {"target_rms": number(1.0), "activation_global_scale": ones}
    x = (rows - mean) * times
    own: Array | None = None
    threshold: Any = 0.0
    if batch_topk:
        own = norms(weights.decoder, norm)
        f = relu(sum(x[:, s] @ weights.encoder[s] for s in range(S)) + weights.bias)
        threshold = between(f * own) if own.ndim == 1 else np.array([between(f * own[s]) for s in range(S)])
        threshold = np.asarray(threshold, dtype=np.float32).astype(np.float64)
        state |= {"k": number(K, torch.int32), **tensors(threshold=threshold)}
    if era >= "E3":
        state["code_normalization_id"] = number(NORM_IDS[norm], torch.int64)
    trainer: dict[str, Any] = {"dict_class": "BatchTopKCrossCoder" if batch_topk else "CrossCoder", "k": 100}
    if era == "E2":
        trainer |= {"sparsity_loss_type": f"LossType.{norm}"}
    if norm == "MIXED":
        key = "sparsity_loss_alpha" if era == "E2" else "code_normalization_alpha"
        trainer |= {f"{key}_sae": ALPHAS[0], f"{key}_cc": ALPHAS[1]}
    tables["config.json"] = {"trainer": trainer, "buffer": None}
    codes = weights.codes(x, own, threshold)
    return File(state, tables, rows, codes, weights.written(codes) / by + mean)


def dedicated(a: int, b: int, shares: Mapping[str, float] | None = None, broken: float = 0.0) -> File:
    """A file of dfc_learning, in the order A | B | shared; `broken` is put where its partition allows no weight."""
    rng = np.random.default_rng(3)
    weights, rows = Weights.random(rng), rounded(B, S, D, rng=rng)
    for s, forbidden in enumerate([slice(a, a + b), slice(0, a)]):
        weights.encoder[s][:, forbidden] = broken
        weights.decoder[s][forbidden] = broken
    made = of_weights(weights, rows, "E7", batch_topk=True, norm="CROSSCODER", normalised=False)
    told = shares or {"model_a_exclusive_pct": a / L, "model_b_exclusive_pct": b / L}
    made.state["_partition_config"] = {"dict_size": L, **told}
    return made


def autoencoder(kind: str, seed: int = 0) -> File:
    """A class of dictionary_learning; of JumpReLU and others that have one, a threshold that some latents pass."""
    rng = np.random.default_rng(seed)
    W, b_e, W_d, b = (rounded(*shape, rng=rng) for shape in ((L, D), (L,), (D, L), (D,)))
    x = rounded(B, D, rng=rng, size=2.0)
    trainer: dict[str, Any] = {"dict_class": kind}
    if kind == "AutoEncoder":
        f, state = relu((x - b) @ W.T + b_e), tensors(bias=b, encoder__weight=W, encoder__bias=b_e, decoder__weight=W_d)
    elif kind == "AutoEncoderNew":
        f = relu(x @ W.T + b_e)
        state = tensors(encoder__weight=W, encoder__bias=b_e, decoder__weight=W_d, decoder__bias=b)
    elif kind == "GatedAutoEncoder":
        r, gate, magnitude = (rounded(L, rng=rng, size=0.5) for _ in range(3))
        z = (x - b) @ W.T
        f = (z + gate > 0) * relu(np.exp(r) * z + magnitude)
        state = tensors(
            decoder_bias=b, r_mag=r, gate_bias=gate, mag_bias=magnitude, encoder__weight=W, decoder__weight=W_d
        )
    elif kind == "JumpReluAutoEncoder":
        threshold = np.full(L, between(relu(x @ W.T + b_e)))
        threshold[:4] = [0.0, -1.0, 0.5, 0.25]
        pre = x @ W.T + b_e
        f = relu(pre * (pre > threshold))
        state = tensors(W_enc=W.T, b_enc=b_e, W_dec=W_d.T, b_dec=b, threshold=threshold)
    elif kind == "AutoEncoderTopK":
        f = topk(relu((x - b) @ W.T + b_e))
        state = tensors(b_dec=b, encoder__weight=W, encoder__bias=b_e, decoder__weight=W_d, threshold=-1.0)
        state["k"] = number(K, torch.int32)
        trainer["k"] = K
    else:
        a = relu((x - b) @ W.T + b_e)
        threshold_ = between(a)
        f = a * (a > threshold_)
        state = {"k": number(K, torch.int32), **tensors(threshold=threshold_)}
        if kind == "BatchTopKSAE":
            state |= tensors(b_dec=b, encoder__weight=W, encoder__bias=b_e, decoder__weight=W_d)
        else:
            state |= tensors(W_enc=W.T, b_enc=b_e, W_dec=W_d.T, b_dec=b)
            state["group_sizes"] = torch.tensor([8, 12, 20])
    return File(state, {"config.json": {"trainer": trainer}}, x, f, f @ W_d.T + b)


def topk(score: Array, k: int = K) -> Array:
    """The k largest of every row, all else 0."""
    border = np.sort(score, axis=1)[:, -k][:, None]
    return score * (score >= border)

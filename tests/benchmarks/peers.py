"""A training step of another library, in its own environment: started by tests.benchmarks.step with that Python.

python peers.py LIBRARY METHOD K WEIGHTS.pt

WEIGHTS.pt has `encoder` and `decoder`, [latents, width], the latents' `bias`, of JumpReLU their `threshold`, and the
batch `x`, [rows, width]. On every line of its input
it takes a step and answers with its seconds; first of all it says the mean squared error of the rows, summed over
components. A step is what the library's own trainer does in one, with its defaults. Nothing of this project is
imported.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], object]
Made = tuple[Callable[[], torch.Tensor], Step]  # the reconstruction, and a step
STEPS = 10**6


def dictionary_learning(method: str, k: int, saved: dict[str, torch.Tensor]) -> Made:
    from dictionary_learning import trainers

    latents, width = saved["encoder"].shape
    asked: dict[str, Any] = {
        "steps": STEPS, "activation_dim": width, "dict_size": latents, "layer": 0, "lm_name": "none", "device": "cpu",
    }  # fmt: skip
    if method == "jumprelu":
        return jumprelu(trainers.JumpReluTrainer(**asked, target_l0=float(k)), saved)
    if method in ("topk", "batch_topk"):
        kind = trainers.TopKTrainer if method == "topk" else trainers.BatchTopKTrainer
        trainer = kind(**asked, k=k)
    else:
        trainer = trainers.StandardTrainer(**asked)
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(saved["encoder"])
        trainer.ae.decoder.weight.copy_(saved["decoder"].T)
        for bias in (one for one in trainer.ae.parameters() if one.ndim == 1):
            bias.zero_()
        trainer.ae.encoder.bias.copy_(saved["bias"])
    x, count = saved["x"], iter(range(1, STEPS))  # step 0 looks for a bias to begin at
    encoded = {"use_threshold": False} if method in ("topk", "batch_topk") else {}
    return lambda: trainer.ae.decode(trainer.ae.encode(x, **encoded)), lambda: trainer.update(next(count), x)


def jumprelu(trainer: Any, saved: dict[str, torch.Tensor]) -> Made:
    with torch.no_grad():
        trainer.ae.W_enc.copy_(saved["encoder"].T)
        trainer.ae.W_dec.copy_(saved["decoder"])
        trainer.ae.b_enc.copy_(saved["bias"])
        trainer.ae.b_dec.zero_()
        trainer.ae.threshold.copy_(saved["threshold"])
    x, count = saved["x"], iter(range(1, STEPS))
    return lambda: trainer.ae(x), lambda: trainer.update(next(count), x)


def sparsify(method: str, k: int, saved: dict[str, torch.Tensor]) -> Made:
    """Its trainer is one with the model; these are the lines of its loop, with Adam."""
    from sparsify import SparseCoder, SparseCoderConfig

    latents, width = saved["encoder"].shape
    coder = SparseCoder(width, SparseCoderConfig(num_latents=latents, k=k))
    with torch.no_grad():
        coder.encoder.weight.copy_(saved["encoder"])
        coder.W_dec.copy_(saved["decoder"])
    optimiser, idle = torch.optim.Adam(coder.parameters(), lr=1e-4), torch.zeros(latents, dtype=torch.int64)
    x = saved["x"]

    def step() -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, dead_mask=idle > 10_000_000)
        (out.fvu + out.auxk_loss / 32).backward()
        fired = torch.zeros(latents, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        idle.add_(len(x))
        idle[fired] = 0
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    return lambda: coder(x).sae_out, step


def sae_lens(method: str, k: int, saved: dict[str, torch.Tensor]) -> Made:
    """A step of its SAETrainer, made without the parts that need a model."""
    from sae_lens.saes import batchtopk_sae, jumprelu_sae, standard_sae, topk_sae
    from sae_lens.saes.sae import TrainStepInput

    latents, width = saved["encoder"].shape
    asked: dict[str, Any] = {"d_in": width, "d_sae": latents, "dtype": "float32", "device": "cpu"}
    if method == "topk":
        sae = topk_sae.TopKTrainingSAE(topk_sae.TopKTrainingSAEConfig(**asked, k=k))
    elif method == "batch_topk":
        sae = batchtopk_sae.BatchTopKTrainingSAE(batchtopk_sae.BatchTopKTrainingSAEConfig(**asked, k=float(k)))
    elif method == "jumprelu":
        sae = jumprelu_sae.JumpReLUTrainingSAE(jumprelu_sae.JumpReLUTrainingSAEConfig(**asked))
    else:
        sae = standard_sae.StandardTrainingSAE(standard_sae.StandardTrainingSAEConfig(**asked))
    with torch.no_grad():
        sae.W_enc.copy_(saved["encoder"].T)
        sae.W_dec.copy_(saved["decoder"])
        sae.b_enc.copy_(saved["bias"])
        if method == "jumprelu":
            sae.threshold.copy_(saved["threshold"])
    sae.train()
    optimiser, x = torch.optim.Adam(sae.parameters(), lr=1e-4), saved["x"]
    idle, seen = torch.zeros(latents), torch.zeros(latents)
    coefficients = {name: getattr(one, "value", one) for name, one in sae.get_coefficients().items()}

    def forward() -> Any:
        given = {"sae_in": x, "coefficients": coefficients, "dead_neuron_mask": idle > 1000}
        return sae.training_forward_pass(TrainStepInput(**given, n_training_steps=1, is_logging_step=False))

    def step() -> None:
        out = forward()
        with torch.no_grad():
            firing = out.feature_acts.bool().float()
            fired = firing.sum(-2).bool()
            fired = fired.to_dense() if fired.is_sparse else fired
            idle.add_(1)
            idle[fired] = 0
            seen.add_(firing.sum(0))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return lambda: forward().sae_out, step


LIBRARIES = {"dictionary-learning": dictionary_learning, "eai-sparsify": sparsify, "sae-lens": sae_lens}


def main() -> None:
    library, method, k, weights = sys.argv[1:]
    answers = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no answer
    saved = torch.load(weights, weights_only=True)
    reconstruction, step = LIBRARIES[library](method, int(k), saved)
    with torch.no_grad():
        error = float((reconstruction() - saved["x"]).square().sum(1).mean())
    print(json.dumps(error), file=answers, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print(json.dumps(time.perf_counter() - began), file=answers, flush=True)


if __name__ == "__main__":
    main()

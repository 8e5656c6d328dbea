"""Live buffers, and the everyday programs of dictionary_learning's documentation, unchanged but for their imports.

Letters: B rows, H heads, D width, L latents.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shared.errors import ConfigError
from tests.peers import python_of
from tests.shared.test_live import WIDTH, expected, loaded  # noqa: F401 (a fixture)
from tests.tiny import TEXTS
from train.interop.dictionary_learning import (
    ActivationBuffer,
    AutoEncoder,
    HeadActivationBuffer,
    IdentityDict,
    NNsightActivationBuffer,
    StandardTrainer,
    TopKTrainer,
    evaluate,
    loss_recovered,
    trainSAE,
)

ROOT = Path(__file__).parents[3]
SIZES: dict[str, Any] = {"n_ctxs": 8, "ctx_len": 12, "refresh_batch_size": 4, "out_batch_size": 16}
Loaded = tuple[Any, Any]


def test_rows_are_those_of_the_model(loaded: Loaded) -> None:  # noqa: F811
    model, tokenizer = loaded
    submodule = model.gpt_neox.layers[1]
    buffer = ActivationBuffer(iter(TEXTS), model, submodule, d_submodule=WIDTH, tokenizer=tokenizer, **SIZES)
    whole = torch.cat(expected(loaded, TEXTS))
    torch.testing.assert_close(torch.cat(list(buffer)).sort(0).values, whole.sort(0).values, rtol=1e-4, atol=1e-4)
    assert buffer.config == {**SIZES, "device": "cpu", "d_submodule": WIDTH, "io": "out", "remove_bos": False}
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    tokens = NNsightActivationBuffer(iter(ids), model, submodule, tokenizer=tokenizer, **SIZES)
    torch.testing.assert_close(torch.cat(list(tokens)).sort(0).values, whole.sort(0).values, rtol=1e-4, atol=1e-4)


def test_as_many_contexts_as_the_reference_has_by_default(loaded: Loaded) -> None:  # noqa: F811
    model, tokenizer = loaded
    buffer = ActivationBuffer(iter(TEXTS), model, model.gpt_neox.layers[1], tokenizer=tokenizer)
    assert buffer.config["n_ctxs"] == 30_000 and buffer.pool.size == 30_000 * 128
    assert next(buffer).shape[1] == WIDTH  # n_ctxs = 3e4 is a float


def test_token_ids_need_no_tokenizer(loaded: Loaded) -> None:  # noqa: F811
    model, tokenizer = loaded
    module, ids = model.gpt_neox.layers[1], [tokenizer(text)["input_ids"] for text in TEXTS]
    of_ids = list(NNsightActivationBuffer(iter(ids), model, module, **SIZES))
    of_texts = list(NNsightActivationBuffer(iter(TEXTS), model, module, tokenizer=tokenizer, **SIZES))
    assert len(of_ids) > 1 and all(torch.equal(a, b) for a, b in zip(of_ids, of_texts, strict=True))
    with pytest.raises(ConfigError, match="texts without a tokenizer"):
        next(NNsightActivationBuffer(iter(TEXTS), model, module, **SIZES))


@pytest.mark.parametrize("apply", [False, True])
def test_heads_stand_apart(apply: bool, loaded: Loaded) -> None:  # noqa: F811
    model, tokenizer = loaded
    buffer = HeadActivationBuffer(iter(TEXTS), model, 1, apply_W_O=apply, tokenizer=tokenizer, **SIZES)
    x = next(buffer)
    assert x.shape == (16, 4, WIDTH if apply else WIDTH // 4)
    dense = model.gpt_neox.layers[1].attention.dense
    plain = HeadActivationBuffer(iter(TEXTS), model, 1, tokenizer=tokenizer, **SIZES)
    with torch.no_grad():
        whole = dense(next(plain).flatten(1)) - dense.bias
    if apply:  # the heads' shares add up to what the projection makes of all
        torch.testing.assert_close(x.sum(1), whole, rtol=1e-4, atol=1e-4)


def test_what_is_no_model_is_told(loaded: Loaded) -> None:  # noqa: F811
    model, tokenizer = loaded
    with pytest.raises(ConfigError, match="has no tokenizer of its own"):
        ActivationBuffer(iter(TEXTS), model, model.gpt_neox.layers[1])
    with pytest.raises(ConfigError, match="this is no model and no module: Tensor"):
        ActivationBuffer(iter(TEXTS), model, torch.zeros(1), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="models run on this machine"):
        HeadActivationBuffer(iter(TEXTS), model, 1, remote=True, tokenizer=tokenizer)


def test_an_autoencoder_is_trained_from_texts_by_a_live_buffer(loaded: Loaded, tmp_path: Path) -> None:  # noqa: F811
    model, tokenizer = loaded
    submodule = model.gpt_neox.layers[1]  # layer 1 of the model
    activation_dim = WIDTH  # output dimension of the layer
    dictionary_size = 4 * activation_dim

    def data() -> Any:
        for number in range(400):
            yield TEXTS[number % len(TEXTS)]

    buffer = ActivationBuffer(
        data=data(), model=model, submodule=submodule, d_submodule=activation_dim, n_ctxs=32, ctx_len=16,
        refresh_batch_size=8, out_batch_size=64, device="cpu", tokenizer=tokenizer,
    )  # fmt: skip
    trainer_cfg = {
        "trainer": StandardTrainer, "dict_class": AutoEncoder, "activation_dim": activation_dim,
        "dict_size": dictionary_size, "lr": 3e-3, "device": "cpu", "l1_penalty": 0.01, "warmup_steps": 5, "seed": 0,
    }  # fmt: skip
    ae = trainSAE(data=buffer, trainer_configs=[trainer_cfg], save_dir=tmp_path)
    assert isinstance(ae, AutoEncoder)
    config = json.loads((tmp_path / "trainer_0" / "config.json").read_text())
    assert config["buffer"]["ctx_len"] == 16
    fresh = ActivationBuffer(iter(TEXTS), model, submodule, tokenizer=tokenizer, n_ctxs=4, ctx_len=16,
                             refresh_batch_size=4, out_batch_size=32)  # fmt: skip
    figures = evaluate(ae, fresh)
    assert figures["frac_variance_explained"] > 0.5
    assert figures["loss_original"] < figures["loss_reconstructed"] or figures["frac_recovered"] > 0.9
    assert set(figures) > {"l2_loss", "l1_loss", "l0", "frac_alive", "cossim", "loss_zero"}
    texts = ActivationBuffer(iter(TEXTS), model, submodule, tokenizer=tokenizer, refresh_batch_size=4)
    assert texts.text_batch(1) + texts.text_batch(2) == list(TEXTS[:3])


def test_an_mlp_is_stretched_from_its_input_to_its_output(loaded: Loaded) -> None:  # noqa: F811
    model, tokenizer = loaded
    mlp = model.gpt_neox.layers[1].mlp
    texts = (TEXTS[number % len(TEXTS)] for number in range(600))
    buffer = ActivationBuffer(
        texts, model, mlp, io="in_to_out", n_ctxs=64, ctx_len=16, refresh_batch_size=8, out_batch_size=64,
        tokenizer=tokenizer,
    )  # fmt: skip
    config = {
        "trainer": TopKTrainer, "activation_dim": WIDTH, "dict_size": 128, "k": 16, "lr": 3e-3, "warmup_steps": 5,
        "seed": 0, "device": "cpu",
    }  # fmt: skip
    ae = trainSAE(buffer, config, transcoder=True)
    original, made, zero = loss_recovered(TEXTS, model, mlp, ae, 16, io="in_to_out", tokenizer=tokenizer)
    assert abs(made - original) < abs(zero - original)
    same = loss_recovered(TEXTS, model, model.gpt_neox.layers[1], IdentityDict(), tokenizer=tokenizer)
    assert same[0] == pytest.approx(same[1])


def test_a_loss_is_recovered_of_rows_that_are_scaled(loaded: Loaded) -> None:  # noqa: F811
    model, tokenizer = loaded

    class Seen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.size = float(x.norm(dim=-1).mean())
            return x

    seen = Seen()
    losses = loss_recovered(TEXTS[:2], model, model.gpt_neox.layers[1], seen, normalize_batch=True, tokenizer=tokenizer)
    assert seen.size == pytest.approx(WIDTH**0.5, rel=1e-4) and losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.peers
def test_nnsights_models_and_envoys_are_taken(loaded: Loaded, tmp_path: Path) -> None:  # noqa: F811
    python = python_of("nnsight")
    model, tokenizer = loaded
    model.save_pretrained(tmp_path / "neox")
    tokenizer.save_pretrained(tmp_path / "neox")
    script = Path(__file__).with_name("nnsight_rows.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(python), str(script), str(tmp_path / "neox")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"rows": [True, True], "same": True, "zero": True}

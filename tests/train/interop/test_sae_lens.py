"""Folders of SAELens and sparsify give what their formulas give, and every dictionary that fits is written as one.

Letters: B rows, D width of what is read, E width of what is written, L latents.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shared.errors import CheckpointError
from tests import cases
from tests.train.interop.files import B, D, File, K, L, between, number, relu, rounded, tensors, topk
from tests.train.interop.test_crosscoders import near
from tests.train.interop.test_saes import random_dictionary
from train.interop import formats, sae_lens

E = 9
ARCHITECTURES = list(sae_lens.FORMS)


def of_sae_lens(kind: str, apply_b_dec: bool = True, rescaled: bool = False) -> File:
    rng = np.random.default_rng(2)
    out = E if "transcoder" in kind else D
    W, b_e, W_d, b = (rounded(*shape, rng=rng) for shape in ((D, L), (L,), (L, out), (out,)))
    x = rounded(B, D, rng=rng, size=2.0)
    apply_b_dec = apply_b_dec and "transcoder" not in kind
    z = (x - b if apply_b_dec else x) @ W
    state, config = tensors(W_enc=W, W_dec=W_d, b_dec=b), {"architecture": kind, "d_in": D, "d_sae": L}
    length = np.linalg.norm(W_d, axis=1) if rescaled else np.ones(L)
    pre = (z + b_e) * length
    if kind == "gated":
        r, magnitude = rounded(L, rng=rng, size=0.5), rounded(L, rng=rng)
        f = (z + b_e > 0) * relu(np.exp(r) * z + magnitude)
        state |= tensors(b_gate=b_e, r_mag=r, b_mag=magnitude)
    else:
        state |= tensors(b_enc=b_e)
        f = relu(pre)
    if "jumprelu" in kind:
        threshold = np.full(L, between(f))
        f = f * (pre > threshold)
        state |= tensors(threshold=threshold)
    if kind == "topk":
        f = topk(f)
        config |= {"k": K}
    if "batchtopk" in kind:
        threshold = between(f)
        f = f * (f > threshold)
        state |= {"topk_threshold": number(threshold, torch.float64)}
        config |= {"k": float(K)}
    if "matryoshka" in kind:
        config["matryoshka_widths"] = [8, 20, L]
    y = (f / length) @ W_d + b
    if "skip" in kind:
        W_skip = rounded(out, D, rng=rng)
        state |= tensors(W_skip=W_skip)
        y = y + x @ W_skip.T
    config |= {"apply_b_dec_to_input": apply_b_dec, "normalize_activations": "none", "reshape_activations": "none"}
    if rescaled:
        config["rescale_acts_by_decoder_norm"] = True
    config["metadata"] = {"sae_lens_version": "6.0.0", "hook_name": "blocks.3.hook_resid_post"}
    return File(state, {"cfg.json": config}, x, f, y)


def assert_gives(found: formats.Found, made: File) -> None:
    assert (made.codes > 0).any(), "a test of nothing"
    x = {"x": torch.from_numpy(made.rows.astype(np.float32))}
    dictionary = found.dictionary
    f_BL = dictionary.encode(x)
    assert near(f_BL, made.codes)
    [writer] = dictionary.wiring.writers
    assert near(dictionary.decode(f_BL, x)[writer], made.y)


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_gives_what_its_formula_gives(kind: str, apply_b_dec: bool, tmp_path: Path) -> None:
    made = of_sae_lens(kind, apply_b_dec)
    found = formats.load(made.write(tmp_path, sae_lens.WEIGHTS).parent)
    assert found.kind == f"SAELens, {kind}"
    assert_gives(found, made)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka_batchtopk"])
def test_codes_that_are_rescaled_there_are_so_here(kind: str, tmp_path: Path) -> None:
    made = of_sae_lens(kind, rescaled=True)
    found = formats.load(made.write(tmp_path, sae_lens.WEIGHTS))
    assert_gives(found, made)
    assert "times the length" in found.notes[0]


def test_nested_groups_are_kept(tmp_path: Path) -> None:
    found = formats.load(of_sae_lens("matryoshka_batchtopk").write(tmp_path, sae_lens.WEIGHTS))
    assert found.dictionary.method.nested(found.dictionary.wiring) == (8, 12, 20)


def test_tables_of_versions_before_6_are_read(tmp_path: Path) -> None:
    made = of_sae_lens("topk")
    made.tables["cfg.json"] = {
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "d_in": D, "d_sae": L,
        "normalize_activations": False, "hook_point": "blocks.3.hook_resid_post",
    }  # fmt: skip
    assert_gives(formats.load(made.write(tmp_path / "topk", sae_lens.WEIGHTS)), made)
    made = of_sae_lens("jumprelu")
    made.state["log_threshold"] = made.state.pop("threshold").log()
    found = formats.load(made.write(tmp_path / "jumprelu", sae_lens.WEIGHTS))
    assert near(found.dictionary.encode({"x": torch.from_numpy(made.rows).float()}), made.codes)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"normalize_activations": "layer_norm"}, "every row is scaled by itself"),
        ({"normalize_activations": "expected_average_only_in"}, "a factor that is in no file"),
        ({"normalize_activations": True}, "a factor that is in no file"),
        ({"finetuning_scaling_factor": True}, "behind the training"),
        ({"architecture": "temporal"}, "architecture of SAELens is not here"),
    ],
)
def test_what_no_dictionary_holds_is_refused(keys: dict[str, Any], match: str, tmp_path: Path) -> None:
    made = of_sae_lens("standard")
    made.tables["cfg.json"] |= keys
    with pytest.raises(CheckpointError, match=match):
        formats.load(made.write(tmp_path, sae_lens.WEIGHTS))


@pytest.mark.parametrize("norm", ["sum", "none"])
@pytest.mark.parametrize("name", cases.names())
def test_a_dictionary_of_every_method_is_read_again_as_it_was(name: str, norm: str, tmp_path: Path) -> None:
    made, x = random_dictionary(name, norm=norm)
    written = formats.export(made, "sae_lens", {"a": formats.Origin("org/model", "resid.13")})
    formats.write(written, tmp_path / "out")
    again = formats.load(tmp_path / "out", ["a"]).dictionary
    f_BL, again_BL = made.encode(x), again.encode(x)
    assert torch.equal(f_BL > 0, again_BL > 0)
    if not written.notes:
        torch.testing.assert_close(again_BL, f_BL, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.decode(again_BL)["a"], made.decode(f_BL)["a"], rtol=1e-4, atol=1e-4)
    metadata = written.tables["cfg.json"]["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("org/model", "blocks.13.hook_resid_post")
    assert metadata["granary"]["sources"]["a"]["scale"] == 0.5


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ["standard", "jumprelu", "batch_topk"])
def test_a_transcoder_is_read_again_as_it_was(name: str, skip: bool, tmp_path: Path) -> None:
    made, x = random_dictionary(name, "transcoder", skip=skip)
    origins = {"a": formats.Origin("org/model", "mlp_in.3"), "b": formats.Origin("org/model", "mlp_out.3")}
    written = formats.export(made, "sae_lens", origins)
    formats.write(written, tmp_path / "out")
    again = formats.load(tmp_path / "out", ["a", "b"]).dictionary
    torch.testing.assert_close(again.encode(x), made.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        again.decode(again.encode(x), x)["b"], made.decode(made.encode(x), x)["b"], rtol=1e-4, atol=1e-4
    )
    assert written.tables["cfg.json"]["d_out"] == cases.WIDTHS["b"]
    assert written.tables["cfg.json"]["metadata"]["hook_name_out"] == "blocks.3.hook_mlp_out"
    assert written.notes[-1] == "no hook_name: TransformerLens has none for mlp_in.3"


def test_what_sae_lens_has_not_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no such transcoder: topk"):
        formats.export(random_dictionary("topk", "transcoder")[0], "sae_lens")


def of_sparsify(transcodes: bool, skip: bool = False) -> File:
    rng = np.random.default_rng(4)
    W, b_e, W_d, b = (rounded(*shape, rng=rng) for shape in ((L, D), (L,), (L, D), (D,)))
    x = rounded(B, D, rng=rng, size=2.0)
    f = topk(relu((x if transcodes else x - b) @ W.T + b_e))
    y, state = f @ W_d + b, tensors(encoder__weight=W, encoder__bias=b_e, W_dec=W_d, b_dec=b)
    if skip:
        W_skip = rounded(D, D, rng=rng)
        y, state = y + x @ W_skip.T, {**state, **tensors(W_skip=W_skip)}
    config = {"k": K, "d_in": D, "num_latents": L, "transcode": transcodes, "skip_connection": skip}
    return File(state, {"cfg.json": config}, x, f, y)


@pytest.mark.parametrize(("transcodes", "skip"), [(False, False), (True, False), (True, True)])
def test_sparsify_gives_what_its_formula_gives(transcodes: bool, skip: bool, tmp_path: Path) -> None:
    made = of_sparsify(transcodes, skip)
    found = formats.load(made.write(tmp_path / "theirs", "sae.safetensors").parent)
    assert_gives(found, made)
    formats.write(formats.export(found.dictionary, "sparsify"), tmp_path / "ours")
    again = formats.load(tmp_path / "ours")
    assert_gives(again, made)
    assert set(load_file(tmp_path / "ours" / "sae.safetensors")) == set(made.state)


def test_what_sparsify_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="TopK alone"):
        formats.export(random_dictionary("batch_topk")[0], "sparsify")
    with pytest.raises(CheckpointError, match="transcoders of one width"):
        formats.export(random_dictionary("topk", "transcoder")[0], "sparsify")
    made = of_sparsify(transcodes=False)
    made.tables["cfg.json"]["activation"] = "groupmax"
    with pytest.raises(CheckpointError, match="this activation is not here"):
        formats.load(made.write(tmp_path, "sae.safetensors"))


def test_files_are_written_whole_and_never_over_others(tmp_path: Path) -> None:
    made = formats.export(random_dictionary("topk")[0], "sae_lens")
    formats.write(made, tmp_path / "out")
    with pytest.raises(CheckpointError, match="there already"):
        formats.write(made, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

"""The classes of dictionary_learning give what their formulas give, and keep their promises about weights and files.

Letters: B rows, S sources, D width, L latents.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.errors import CheckpointError, ConfigError, CopyError, RowsError
from tests.train.interop import files
from tests.train.interop.files import ALPHAS, NORM_IDS, B, D, File, K, L, S, norms
from tests.train.interop.test_crosscoders import near
from tests.train.interop.test_sae_lens import of_sae_lens
from train.interop import dictionary_learning as reference
from train.interop.dictionary_learning import (
    AutoEncoder,
    AutoEncoderNew,
    AutoEncoderTopK,
    BatchTopKCrossCoder,
    BatchTopKSAE,
    CodeNormalization,
    CrossCoder,
    CrossCoderDecoder,
    CrossCoderEncoder,
    Dictionary,
    GatedAutoEncoder,
    IdentityDict,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
    load_dictionary,
)
from train.interop.saes import READERS

KINDS = list(READERS)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_norm = pytest.mark.parametrize("norm", NORM_IDS)


def rows(made: File) -> Tensor:
    return torch.from_numpy(made.rows.astype(np.float32))


def fresh(kind: str) -> Any:
    more = {"AutoEncoderTopK": [K], "BatchTopKSAE": [K], "MatryoshkaBatchTopKSAE": [K, [8, 12, 20]]}.get(kind, [])
    return getattr(reference, kind)(D, L, *more)


@every_kind
def test_a_loaded_autoencoder_gives_what_its_formula_gives(kind: str, tmp_path: Path) -> None:
    made = files.autoencoder(kind)
    found = getattr(reference, kind).from_pretrained(made.write(tmp_path, "ae.pt"))
    x = rows(made)
    x_hat, f = found(x, output_features=True)
    length_L = np.linalg.norm(made.state["decoder.weight"].numpy(), axis=0) if kind == "AutoEncoderNew" else 1.0
    assert near(found.encode(x).detach(), made.codes)
    assert near(f.detach(), made.codes * length_L)
    assert near(x_hat.detach(), made.y) and torch.equal(x_hat, found(x))
    assert torch.equal(found.decode(found.encode(x)), x_hat)
    # Any leading dimensions, where codes do not depend on who else is in the batch.
    assert torch.equal(found.encode(x.view(3, -1, D)), found.encode(x).view(3, -1, L))


@every_kind
def test_a_state_is_that_of_the_reference(kind: str, tmp_path: Path) -> None:
    made = files.autoencoder(kind)
    found = getattr(reference, kind).from_pretrained(made.write(tmp_path, "ae.pt"))
    state = found.state_dict()
    assert set(state) == set(made.state)
    for name, value in made.state.items():
        # A threshold of 0 or less is kept as the smallest number: the same codes.
        expected = value.clamp_min(0) if name == "threshold" and kind == "JumpReluAutoEncoder" else value
        torch.testing.assert_close(state[name], expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.tensor(name).detach(), expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    again = fresh(kind)
    again.load_state_dict({f"_orig_mod.{name}": value for name, value in state.items()})
    assert torch.equal(again.encode(rows(made)), found.encode(rows(made)))


@every_kind
def test_a_folder_is_loaded_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = fresh(kind)
    if "k" in made.shown:
        made.threshold = 0.3
    made.save_pretrained(tmp_path / "it")
    again = type(made).from_pretrained(str(tmp_path / "it"))
    x = torch.randn(B, D)
    torch.testing.assert_close(again.encode(x), made.encode(x), rtol=1e-6, atol=1e-6)
    assert {n: tuple(v.shape) for n, v in again.state_dict().items()} == {
        n: tuple(v.shape) for n, v in made.state_dict().items()
    }
    assert sorted(path.name for path in (tmp_path / "it").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "trainer_config.json",
    ]  # fmt: skip


def formula(kind: str, s: dict[str, Tensor], x: Tensor) -> Tensor:
    """x_hat of a state, as the reference computes it."""
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        seen = x if kind == "JumpReluAutoEncoder" else x - s["b_dec"]
        h = seen @ s["W_enc"] + s["b_enc"]
        return (h.relu() * (h > s["threshold"])) @ s["W_dec"] + s["b_dec"]
    if kind == "GatedAutoEncoder":
        z = (x - s["decoder_bias"]) @ s["encoder.weight"].T
        f = (z + s["gate_bias"] > 0) * (s["r_mag"].exp() * z + s["mag_bias"]).relu()
        return f @ s["decoder.weight"].T + s["decoder_bias"]
    bias = s[{"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")]
    f = ((x if kind == "AutoEncoderNew" else x - bias) @ s["encoder.weight"].T + s["encoder.bias"]).relu()
    if kind == "AutoEncoderTopK":
        f = f * (f >= f.topk(K, dim=1).values[:, -1:])
    if kind == "BatchTopKSAE":
        f = f * (f > s["threshold"])
    return f @ s["decoder.weight"].T + bias


@every_kind
def test_gradients_are_those_of_the_reference(kind: str) -> None:
    torch.manual_seed(1)
    made, x = fresh(kind), torch.randn(B, D)
    names = [name for name in made.shown if name in made.state_dict()]
    for name in names:
        if name not in ("k", "threshold", "group_sizes"):
            made.put(name, made.tensor(name).detach() + 0.1 * torch.randn(made.tensor(name).shape))
    made.threshold = torch.full((L,), 0.1) if kind == "JumpReluAutoEncoder" else 0.1
    assert made.tensor(made.shown[0]).grad is None
    (made(x) - x).square().sum().backward()
    leaves = {n: v.double().requires_grad_() if v.is_floating_point() else v for n, v in made.state_dict().items()}
    (formula(kind, leaves, x.double()) - x.double()).square().sum().backward()
    for name in names:
        gradient = made.tensor(name).grad
        if name in ("k", "threshold", "group_sizes"):  # JumpReLU's is an estimate, and no gradient of this
            continue
        assert gradient is not None
        expected = torch.zeros_like(leaves[name]) if leaves[name].grad is None else leaves[name].grad
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4)


def test_biases_that_are_scaled_do_the_same_of_longer_rows() -> None:
    torch.manual_seed(2)
    for kind in KINDS:
        made = fresh(kind)
        for name in made.shown:
            if "bias" in name or name in ("b_dec", "b_enc"):
                made.put(name, torch.randn(made.tensor(name).shape))
        if "k" in made.shown:
            made.threshold = 0.2
        x = torch.randn(B, D)
        f, x_hat = made.encode(x).detach(), made(x).detach()
        made.scale_biases(3.0)
        torch.testing.assert_close(made.encode(3 * x).detach(), 3 * f, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made(3 * x).detach(), 3 * x_hat, rtol=1e-5, atol=1e-5)


def test_a_decoder_of_length_1_gives_the_same_rows() -> None:
    made, x = AutoEncoder(D, L), torch.randn(B, D)
    made.bias, made.encoder.bias = torch.randn(D), torch.randn(L)
    x_hat, f = made(x, output_features=True)
    x_hat, f = x_hat.detach(), f.detach()
    made.normalize_decoder()
    torch.testing.assert_close(made.decoder.weight.norm(dim=0).detach(), torch.ones(L))
    torch.testing.assert_close(made(x).detach(), x_hat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.encode(x).detach(), 0.1 * f, rtol=1e-5, atol=1e-5)


def test_simple_numbers() -> None:
    made = AutoEncoder(2, 2)
    made.encoder.weight, made.decoder.weight = torch.eye(2), torch.eye(2)
    assert made.encode(torch.tensor([[2.0, -1.0]])).tolist() == [[2.0, 0.0]]
    assert made.decode(torch.tensor([[2.0, 0.0]])).tolist() == [[2.0, 0.0]]
    gated = GatedAutoEncoder(2, 2)
    gated.encoder.weight = torch.eye(2)
    f, gate = gated.encode(torch.tensor([[2.0, -1.0]]), return_gate=True)
    assert f.tolist() == gate.tolist() == [[2.0, 0.0]]


def test_ghosts_are_exponentials_without_the_bias() -> None:
    made, x = AutoEncoder(D, L), torch.randn(B, D)
    made.bias = torch.randn(D)
    mask = torch.arange(L) < 3
    x_hat, x_ghost, f = made(x, output_features=True, ghost_mask=mask)
    h = (x - made.bias) @ made.encoder.weight.T + made.encoder.bias
    torch.testing.assert_close(x_ghost, (h.exp() * mask) @ made.decoder.weight.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(x_hat, made(x)) and torch.equal(f, made.encode(x))


def test_a_norm_counts_in_the_features_of_a_forward_pass_alone() -> None:
    made, x = AutoEncoderNew(D, L), torch.randn(B, D)
    _, f = made(x, output_features=True)
    torch.testing.assert_close(f, 0.1 * made.encode(x))
    gated = GatedAutoEncoder(D, L, initialization=lambda made: setattr(made.decoder, "weight", torch.ones(D, L)))
    torch.testing.assert_close(gated.encode(x, normalize_decoder=True), D**0.5 * gated.encode(x))
    f = gated.encode(x, normalize_decoder=True)
    torch.testing.assert_close(gated.decode(f, normalize_decoder=True), gated(x))


def test_jumprelu_sees_rows_less_the_bias_where_it_is_told_so() -> None:
    made, x = JumpReluAutoEncoder(D, L), torch.randn(B, D)
    made.b_dec = torch.randn(D)
    seen = made.encode(x - made.b_dec)
    made.apply_b_dec_to_input = True
    f, h = made.encode(x, output_pre_jump=True)
    torch.testing.assert_close(f, seen)
    torch.testing.assert_close(f, h * (h > made.threshold))


def test_topk_has_its_k_largest_and_its_threshold() -> None:
    made, x = AutoEncoderTopK(D, L, K), torch.randn(B, D)
    f, values, places, a = made.encode(x, return_topk=True)
    assert torch.equal(f.gather(1, places), values) and int((f > 0).sum(1).max()) <= K
    made.threshold = 0.5
    torch.testing.assert_close(made.encode(x, use_threshold=True), a * (a > 0.5))
    assert float(made.state_dict()["threshold"]) == 0.5


def test_batch_topk_has_k_of_a_row_on_the_mean_or_a_threshold() -> None:
    made, x = BatchTopKSAE(D, L, K), torch.randn(B, D)
    f, active_L, a = made.encode(x, return_active=True, use_threshold=False)
    assert int((f > 0).sum()) == K * B and torch.equal(active_L, f.sum(0) > 0)
    assert torch.equal(made.encode(x), a)  # a threshold that was never set
    made.threshold = 0.5
    torch.testing.assert_close(made.encode(x), a * (a > 0.5))
    assert made.core.training == made.training


def test_a_threshold_and_k_are_put_without_a_copy_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    alphas = {"code_normalization_alpha_sae": ALPHAS[0], "code_normalization_alpha_cc": ALPHAS[1]}
    made: list[Any] = [fresh("AutoEncoderTopK"), fresh("BatchTopKSAE"), fresh("MatryoshkaBatchTopKSAE")]
    made += [BatchTopKCrossCoder(D, L, 2, k=K, code_normalization=norm, **alphas) for norm in NORM_IDS]
    for one in made:
        split = one.threshold.ndim == 1
        with monkeypatch.context() as patched:
            patched.setattr(type(one), "_state", None)
            one.threshold = torch.tensor([0.5, 0.25]) if split else 0.5
            one.k = 7
            assert int(one.k) == 7 and float(one.threshold.max()) == 0.5
        state = one.state_dict()
        assert int(state["k"]) == 7
        torch.testing.assert_close(state["threshold"], torch.tensor([0.5, 0.25]) if split else torch.tensor(0.5))
        one.threshold = -torch.ones_like(state["threshold"])  # as before it was ever set
        assert (one.threshold == -1).all()


def test_matryoshka_has_codes_of_its_active_groups() -> None:
    made, x = MatryoshkaBatchTopKSAE(D, L, K, [8, 12, 20]), torch.randn(B, D)
    whole = made.encode(x)
    made.active_groups = 2
    assert torch.equal(made.encode(x)[:, :20], whole[:, :20]) and not made.encode(x)[:, 20:].any()
    with pytest.raises(CheckpointError, match="groups do not add up to 40"):
        MatryoshkaBatchTopKSAE(D, L, K, [8, 12])


def test_identity_is_identity() -> None:
    x = torch.randn(3, D)
    assert all(one is x for one in IdentityDict(D)(x, output_features=True))
    assert IdentityDict.from_pretrained("anything").encode(x) is x


def test_what_is_written_into_shown_weights_is_not_lost() -> None:
    made = AutoEncoder(D, L)
    for write in (
        lambda: made.decoder.weight.data.mul_(2), lambda: made.bias.fill_(1), lambda: torch.nn.init.zeros_(made.bias),
        lambda: made.encoder.weight.T[0].zero_(), lambda: torch.add(made.bias, 1, out=made.bias.detach()),
        lambda: made.encoder.weight.detach().__iadd__(1),
    ):  # fmt: skip
        with pytest.raises(CopyError, match=r"AutoEncoder\.\S+\. Assign it"):
            write()
    made(torch.randn(B, D)).sum().backward()
    with pytest.raises(CopyError, match=r"AutoEncoder\.bias\.grad\. Assign it"):
        made.bias.grad.zero_()
    with pytest.raises(ValueError, match="read-only"):
        made.bias.detach().numpy()[0] = 1
    with pytest.raises(CheckpointError, match="a tensor of another shape"):
        made.bias = torch.zeros(D + 1)
    made.bias = torch.nn.Parameter(torch.ones(D))
    assert made.bias.tolist() == [1.0] * D


def test_a_pretrained_k_is_not_another_one(tmp_path: Path) -> None:
    path = files.autoencoder("BatchTopKSAE").write(tmp_path, "ae.pt")
    assert int(BatchTopKSAE.from_pretrained(path, k=K).k) == K
    with pytest.raises(CheckpointError, match="another k: 5, not 7"):
        BatchTopKSAE.from_pretrained(path, k=7)
    with pytest.raises(CheckpointError, match="no GatedAutoEncoder"):
        GatedAutoEncoder.from_pretrained(path)


@every_kind
def test_a_folder_tells_the_class(kind: str, tmp_path: Path) -> None:
    made = files.autoencoder(kind)
    made.write(tmp_path, "ae.pt")
    found, config = load_dictionary(tmp_path)
    assert type(found).__name__ == kind and config == made.tables["config.json"]
    assert near(found.encode(rows(made)).detach(), made.codes)
    files.dedicated(4, 4).write(tmp_path / "dfc", "model_final.pt")
    assert type(load_dictionary(tmp_path / "dfc")[0]).__name__ == "DedicatedFeatureBatchTopKCrossCoder"
    of_sae_lens("gated").write(tmp_path / "lens", "sae_weights.safetensors")
    with pytest.raises(CheckpointError, match=r"no dictionary of dictionary_learning: SAELens, gated"):
        load_dictionary(tmp_path / "lens")


def test_half_precision_is_that_of_weights_and_codes() -> None:
    made, x = BatchTopKSAE(D, L, K).to(torch.bfloat16), torch.randn(B, D)
    f = made.encode(x, use_threshold=False)
    assert f.dtype == torch.bfloat16 and made.decode(f).dtype == torch.bfloat16


def test_a_class_of_ones_own_is_a_dictionary() -> None:
    class Mine(Dictionary):
        def encode(self, x: Tensor) -> Tensor:
            return x.relu()

        def decode(self, f: Tensor) -> Tensor:
            return f

    assert Mine().encode(torch.tensor([-1.0, 1.0])).tolist() == [0.0, 1.0]
    with pytest.raises(TypeError):
        Dictionary()  # type: ignore[abstract]


# --- crosscoders ------------------------------------------------------------------------------------------------


def of_file(made: File, path: Path, batch_topk: bool) -> Any:
    kind = BatchTopKCrossCoder if batch_topk else CrossCoder
    return kind.from_pretrained(made.write(path, "model_final.pt"))


@pytest.mark.parametrize("batch_topk", [False, True])
@pytest.mark.parametrize("era", ["E2", "E3", "E5", "E6", "E7"])
@every_norm
def test_a_loaded_crosscoder_gives_what_its_formula_gives(
    norm: str, era: str, batch_topk: bool, tmp_path: Path
) -> None:
    made = files.crosscoder(era, batch_topk, norm)
    found, x = of_file(made, tmp_path, batch_topk), rows(made)
    x_hat, f = found(x, output_features=True)
    own = norms(made.state["decoder.weight"].double().numpy(), norm)
    weighed = made.codes * own if made.codes.ndim == own.ndim + 1 else made.codes * own.sum(0)
    weighed = weighed.sum(1) if weighed.ndim == 3 else weighed
    assert near(found.encode(x).detach(), made.codes)
    assert near(x_hat.detach(), made.y)
    assert near(f.detach(), weighed) and torch.equal(found.get_activations(x), f)
    some = [3, 1, 20]
    assert torch.equal(found.get_activations(x, select_features=some), f[:, some])
    assert torch.equal(found.encode(x, select_features=some), found.encode(x)[..., some])


@every_norm
def test_scaled_rows_give_the_same_codes_as_rows_that_are_scaled(norm: str, tmp_path: Path) -> None:
    """DECOUPLED scales twice in the reference."""
    made = files.crosscoder("E7", batch_topk=True, norm=norm)
    found, x = of_file(made, tmp_path, batch_topk=True), rows(made)
    mean, scale = found.activation_mean, found.activation_global_scale
    scaled = (x - mean) * scale[:, None]
    torch.testing.assert_close(found.encode(scaled, normalize_activations=False), found.encode(x), rtol=1e-5, atol=1e-5)
    y = found.decode(found.encode(x), denormalize_activations=False)
    torch.testing.assert_close(y / scale[:, None] + mean, found(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.decoder(found.encode(x)), y)


@every_norm
def test_what_an_encoding_tells_of_itself(norm: str, tmp_path: Path) -> None:
    made = files.crosscoder("E7", batch_topk=True, norm=norm)
    found, x = of_file(made, tmp_path, batch_topk=True), rows(made)
    f, weighed, active_L, a, a_weighed = found.encode(x, return_active=True)
    own = torch.from_numpy(norms(found.state_dict()["decoder.weight"].numpy(), norm, ALPHAS)).float()
    assert torch.equal(active_L, (f > 0).flatten(0, -2).any(0))
    torch.testing.assert_close(weighed, f * own)
    torch.testing.assert_close(a_weighed, a * (own.sum(0) if norm == "DECOUPLED" else own))
    threshold = found.threshold[:, None] if norm == "DECOUPLED" else found.threshold
    each = a[:, None] if norm == "DECOUPLED" else a
    torch.testing.assert_close(f, each * (each * own > threshold))
    selected = found.encode(x, use_threshold=False)
    assert int((selected > 0).sum()) == K * B * (S if norm == "DECOUPLED" else 1)


def test_sources_by_themselves_and_the_views() -> None:
    torch.manual_seed(3)
    made, x = CrossCoder(D, L, 3), torch.randn(B, 3, D)
    made.encoder.bias = torch.randn(L)
    f, each = made.encode(x, return_no_sum=True)
    h = torch.einsum("bsd,sdl->bsl", x, made.encoder.weight)
    torch.testing.assert_close(f, (h.sum(1) + made.encoder.bias).relu())
    torch.testing.assert_close(each, (h + made.encoder.bias).relu())
    assert isinstance(made.encoder, CrossCoderEncoder) and isinstance(made.decoder, CrossCoderDecoder)
    torch.testing.assert_close(made.encoder(x), f)
    torch.testing.assert_close(made.encoder(x, return_no_sum=True)[1], each)
    torch.testing.assert_close(made.encoder(x, select_features=[2, 0]), f[:, [2, 0]])
    bare = torch.einsum("bl,sld->bsd", f, made.decoder.weight)
    torch.testing.assert_close(made.decode(f, add_bias=False), bare)
    torch.testing.assert_close(
        made.decode(f[:, [2, 0]], select_features=[2, 0], add_bias=False),
        torch.einsum("bl,sld->bsd", f[:, [2, 0]], made.decoder.weight[:, [2, 0]]),
    )


def test_fresh_weights_are_drawn_as_the_reference_draws_them() -> None:
    made = CrossCoder(D, 4000, 2)
    assert float(made.encoder.weight.abs().max().detach()) == pytest.approx((6 / (D * 4000)) ** 0.5, rel=1e-3)
    assert torch.equal(made.encoder.weight.transpose(1, 2), made.decoder.weight)
    same = CrossCoder(D, 4000, 2, same_init_for_all_layers=True, init_with_transpose=False)
    assert torch.equal(same.encoder.weight[0], same.encoder.weight[1])
    assert float(same.encoder.weight.abs().max().detach()) == pytest.approx((6 / 4000) ** 0.5, rel=1e-3)
    assert float(same.decoder.weight.abs().max().detach()) == pytest.approx((6 / D) ** 0.5, rel=1e-3)
    long = BatchTopKCrossCoder(D, 50, 2, k=4)
    torch.testing.assert_close(long.decoder.weight.norm(dim=2).detach(), torch.ones(2, 50))
    assert float(long.threshold) == -1 and not long.decoder.bias.any()


def test_encoder_layers_and_a_processor() -> None:
    made = CrossCoder(D, L, 2, encoder_layers=[1], latent_processor=lambda f: 2 * f)
    x = torch.randn(B, 2, D)
    assert made.encoder.weight.shape == (1, D, L) and made.decoder.weight.shape == (2, L, D)
    other = x.clone()
    other[:, 0] = 0
    assert torch.equal(made.encode(x), made.encode(other))
    torch.testing.assert_close(made(x), made.decode(2 * made.encode(x)))


def test_a_normaliser_is_that_of_means_and_spreads(tmp_path: Path) -> None:
    torch.manual_seed(4)
    mean, std = torch.randn(2, D), torch.rand(2, D) + 0.5
    made = CrossCoder(D, L, activation_mean=mean, activation_std=std, target_rms=3.0)
    x = mean + std * torch.randn(50_000, 2, D)
    scaled = (x - made.activation_mean) * made.activation_global_scale[:, None]
    torch.testing.assert_close(scaled.square().sum(2).mean(0).detach(), torch.full((2,), 9.0), rtol=2e-2, atol=0)
    made.save_pretrained(tmp_path / "it")
    again = CrossCoder.from_pretrained(tmp_path / "it")
    for name, value in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert not CrossCoder(D, L, activation_mean=mean * torch.nan, activation_std=std).has_activation_normalizer


def test_a_normaliser_of_an_autoencoder_is_of_its_state(tmp_path: Path) -> None:
    torch.manual_seed(4)
    mean, std = torch.randn(D), torch.rand(D) + 0.5
    made = BatchTopKSAE(D, L, K, activation_mean=mean, activation_std=std, target_rms=3.0, encoder_init_norm=0.5)
    made.threshold, made.b_dec = 0.2, 0.1 * torch.randn(D)
    x = mean + std * torch.randn(50_000, D)
    scaled = (x - mean) * 3.0 / (std.square().sum() + 1e-8).sqrt()
    torch.testing.assert_close(made.normalize_activations(x), scaled, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.denormalize_activations(scaled), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled.square().sum(1).mean(), torch.tensor(9.0), rtol=2e-2, atol=0)
    state = made.state_dict()
    assert float(state["target_rms"]) == 3.0 and torch.equal(state["activation_mean"], mean)
    torch.testing.assert_close(state["encoder.weight"].norm(dim=1), torch.full((L,), 0.5))
    expected = formula("BatchTopKSAE", state, scaled[:B]) / state["activation_global_scale"] + mean
    torch.testing.assert_close(made(x[:B]), expected, rtol=1e-4, atol=1e-4)
    made.save_pretrained(tmp_path / "it")
    torch.save(state, tmp_path / "ae.pt")
    for path in ("it", "ae.pt"):
        again = BatchTopKSAE.from_pretrained(tmp_path / path)
        assert again.has_activation_normalizer and torch.equal(again(x[:B]), made(x[:B]))
        assert {n: v.tolist() for n, v in again.state_dict().items()} == {n: v.tolist() for n, v in state.items()}
    other = BatchTopKSAE(D, L, K)
    other.load_state_dict(state)
    assert torch.equal(other(x[:B]), made(x[:B]))


def test_what_a_normaliser_of_an_autoencoder_does_not_allow() -> None:
    mean, std = torch.zeros(D), torch.ones(D)
    made = BatchTopKSAE(D, L, K, activation_mean=mean, activation_std=std)
    for refused in (lambda: made.scale_biases(2.0), lambda: made.reading("x", "y")):
        with pytest.raises(CheckpointError, match="scaled already"):
            refused()
    with pytest.raises(CheckpointError, match="set_normalizer"):
        made.activation_mean = torch.ones(D)
    for wrong in (torch.zeros(D + 1), torch.zeros(1, D)):
        with pytest.raises(CheckpointError, match="means of another shape"):
            made.set_normalizer(wrong, std)
    with pytest.raises(CheckpointError, match="spreads of another shape"):
        CrossCoder(D, L, activation_mean=torch.zeros(2, D), activation_std=torch.ones(3, D))
    with pytest.raises(CheckpointError, match="means of another shape"):
        CrossCoder(D, L, activation_mean=torch.zeros(3, D), activation_std=torch.ones(3, D))
    made.set_normalizer(None, None)
    x = torch.randn(B, D)
    assert not made.has_activation_normalizer and torch.equal(made.normalize_activations(x), x)
    assert "activation_mean" not in made.state_dict() and made.activation_mean.isnan().all()
    assert not BatchTopKSAE(D, L, K, activation_mean=mean * torch.nan, activation_std=std).has_activation_normalizer


@every_norm
def test_a_crosscoder_is_saved_and_loaded_as_it_was(norm: str, tmp_path: Path) -> None:
    alphas = {"code_normalization_alpha_sae": ALPHAS[0], "code_normalization_alpha_cc": ALPHAS[1]}
    made = BatchTopKCrossCoder(D, L, 2, k=torch.tensor(7), code_normalization=norm.lower(), **alphas)
    made.threshold = torch.tensor([0.5, 0.25]) if norm == "DECOUPLED" else 0.5
    made.save_pretrained(tmp_path / "it")
    again = BatchTopKCrossCoder.from_pretrained(tmp_path / "it", code_normalization=norm)
    for name, value in made.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, equal_nan=True)
    x = torch.randn(B, 2, D)
    torch.testing.assert_close(again.get_activations(x), made.get_activations(x))
    other = "SAE" if norm != "SAE" else "NONE"
    with pytest.raises(CheckpointError, match=f"another code normalisation: {norm}, not {other}"):
        BatchTopKCrossCoder.from_pretrained(tmp_path / "it", code_normalization=other)


def test_a_code_normalisation_is_taken_where_no_file_tells_it(tmp_path: Path) -> None:
    made = files.crosscoder("E2", batch_topk=True, norm="SAE")
    made.tables = {}
    path = made.write(tmp_path, "model_final.pt")
    with pytest.raises(CheckpointError, match="decoder norm that ranks"):
        BatchTopKCrossCoder.from_pretrained(path)
    found = BatchTopKCrossCoder.from_pretrained(path, code_normalization=CodeNormalization.SAE)
    assert near(found.encode(rows(made)).detach(), made.codes)


def test_loading_a_state_keeps_the_tensors_that_an_optimiser_has() -> None:
    made, other = BatchTopKCrossCoder(D, L, 2, k=3), BatchTopKCrossCoder(D, L, 2, k=4, code_normalization="SAE")
    before = {name: id(value) for name, value in made.named_parameters()}
    state = other.state_dict()
    kept = dict(state)
    made.load_state_dict(state)
    assert {name: id(value) for name, value in made.named_parameters()} == before
    assert state.keys() == kept.keys()
    assert (int(made.k), made.code_normalization) == (4, CodeNormalization.SAE)


def test_wrong_rows_and_states_are_told() -> None:
    made = CrossCoder(D, L, 2)
    with pytest.raises(RowsError, match=rf"takes \(B, 2, {D}\)"):
        made.encode(torch.zeros(3, D))
    with pytest.raises(RowsError, match="rows of another width"):
        AutoEncoder(D, L).encode(torch.zeros(3, D + 1))
    with pytest.raises(CheckpointError, match="another size"):
        made.load_state_dict(CrossCoder(D, L + 1, 2).state_dict())
    with pytest.raises(CheckpointError, match="an unknown code normalisation"):
        CrossCoder(D, L, code_normalization="joint")
    with pytest.raises(CheckpointError, match="every source is written"):
        CrossCoder(D, L, num_decoder_layers=1)
    with pytest.raises(CheckpointError, match="the weights of MIXED leave no norm"):
        BatchTopKCrossCoder(
            D, L, code_normalization="MIXED", code_normalization_alpha_sae=0, code_normalization_alpha_cc=0
        )


def test_folded_weights_have_codes_and_no_state_of_this_kind(tmp_path: Path) -> None:
    found = of_file(files.crosscoder("E5", batch_topk=True), tmp_path, batch_topk=True)
    with pytest.raises(CheckpointError, match="a folded dictionary has no such state"):
        found.state_dict()
    with pytest.raises(ConfigError, match="pretrained_ae folded"):
        reference.BatchTopKCrossCoderTrainer(k=K, steps=1, activation_dim=D, pretrained_ae=found)


def test_losses_reach_norms_through_what_is_shown() -> None:
    made, x = CrossCoder(D, L, 2), torch.randn(B, 2, D)
    made(x, output_features=True)[1].sum().backward()
    grad = made.decoder.weight.grad
    assert grad is not None and grad.abs().max() > 0


def test_a_normaliser_is_taken_off_again() -> None:
    own = CrossCoder(D, L, S)
    x, plain = torch.randn(B, S, D), CrossCoder(D, L, S)
    plain.load_state_dict(own.state_dict())
    own.set_normalizer(torch.rand(S, D), 1 + torch.rand(S, D))
    assert own.has_activation_normalizer and not torch.equal(own(x), plain(x))
    torch.testing.assert_close(own.denormalize_activations(own.normalize_activations(x)), x, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match="rows are scaled already"):
        own.scale_biases(2.0)
    own.set_normalizer(None, None)
    assert not own.has_activation_normalizer and torch.equal(own(x), plain(x))


def test_biases_of_a_crosscoder_that_are_scaled_do_the_same_of_longer_rows() -> None:
    own = BatchTopKCrossCoder(D, L, S, K)
    x = torch.randn(B, S, D)
    own.encoder.bias, own.decoder.bias = torch.randn(L), torch.randn(S, D)
    own.threshold = torch.tensor(0.25)
    y = own(x)
    own.scale_biases(4.0)
    assert float(own.threshold) == 1.0
    torch.testing.assert_close(own(4 * x), 4 * y, rtol=1e-4, atol=1e-4)


def test_the_arguments_of_a_crosscoder_have_their_places() -> None:
    mean, std = torch.rand(S, D), 1 + torch.rand(S, D)
    own = BatchTopKCrossCoder(D, L, S, K, 0.5, mean, std, 2.0)
    torch.testing.assert_close(own.state_dict()["activation_mean"].float(), mean)
    assert float(own.state_dict()["target_rms"]) == 2.0
    torch.testing.assert_close(own.decoder.weight.detach().norm(dim=2), torch.full((S, L), 0.5))


def test_a_threshold_of_topk_is_loaded_and_saved(tmp_path: Path) -> None:
    own = AutoEncoderTopK(D, L, K)
    own.threshold = torch.tensor(0.5)
    own.save_pretrained(tmp_path / "a")
    own.save_pretrained(tmp_path / "a")  # over itself
    assert float(AutoEncoderTopK.from_pretrained(tmp_path / "a").threshold) == 0.5
    again = AutoEncoderTopK(D, L, K)
    again.load_state_dict(own.state_dict())
    assert float(again.threshold) == 0.5


def test_k_of_weights_that_do_not_tell_it_is_an_argument(tmp_path: Path) -> None:
    own = AutoEncoderTopK(D, L, K)
    state = {name: value for name, value in own.state_dict().items() if name != "k"}
    torch.save(state, tmp_path / "ae.pt")
    assert int(AutoEncoderTopK.from_pretrained(tmp_path / "ae.pt", k=3).k) == 3
    with pytest.raises(CheckpointError):
        AutoEncoderTopK.from_pretrained(tmp_path / "ae.pt")


@pytest.mark.parametrize("kind", ["AutoEncoder", "BatchTopKSAE", "CrossCoder", "BatchTopKCrossCoder"])
def test_a_module_around_dictionaries_is_saved_and_loaded_with_them(kind: str) -> None:
    keys = {"k": K} if "TopK" in kind else {}
    make = lambda: nn.ModuleList([nn.Linear(2, 3), getattr(reference, kind)(D, L, **keys)])  # noqa: E731
    one, two = make(), make()
    x = torch.randn(B, 2, D) if "Cross" in kind else torch.randn(B, D)
    assert not torch.equal(one[1](x), two[1](x))
    assert list(two.load_state_dict(one.state_dict()).missing_keys) == []
    assert torch.equal(one[1](x), two[1](x)) and torch.equal(one[0].weight, two[0].weight)
    lacking = {name: value for name, value in one.state_dict().items() if name != "1.encoder.weight"}
    with pytest.raises(RuntimeError, match=r"encoder\.weight"):
        two.load_state_dict(lacking)

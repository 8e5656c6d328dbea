"""Dedicated feature crosscoders by the names that dfc_learning gives their tests, and what those left out.

Letters: B rows, D width, L latents.
"""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.errors import CheckpointError, CopyError, WiringError
from train.interop.dictionary_learning import (
    BatchTopKCrossCoder,
    CodeNormalization,
    DedicatedFeatureBatchTopKCrossCoder,
    DedicatedFeatureCrossCoder,
    FeaturePartition,
)

D, L, B, K = 64, 1000, 16, 50
A, B_ONLY, SHARED = range(50), range(50, 100), range(100, 1000)


@pytest.fixture
def dfc() -> DedicatedFeatureBatchTopKCrossCoder:
    torch.manual_seed(0)
    return DedicatedFeatureBatchTopKCrossCoder(D, L, 2, k=K, model_a_exclusive_pct=0.05, model_b_exclusive_pct=0.05)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, 2, D, generator=torch.Generator().manual_seed(1))


def worst(made: DedicatedFeatureCrossCoder | DedicatedFeatureBatchTopKCrossCoder) -> float:
    return max(value for table in made.verify_partition_integrity().values() for value in table.values())


def test_feature_partition_creation() -> None:
    partition = FeaturePartition(L, 50, 50)
    assert partition.shared_size == 900
    assert (partition.model_a_indices, partition.model_b_indices, partition.shared_indices) == (A, B_ONLY, SHARED)
    assert len(partition.model_a_allowed_indices) == len(partition.model_b_allowed_indices) == 950
    assert FeaturePartition.from_dict(partition.to_dict()) == partition
    for sizes in [(-1, 0), (0, -1), (600, 500)]:
        with pytest.raises(WiringError, match="no partition"):
            FeaturePartition(L, *sizes)


def test_feature_partition_from_percentages() -> None:
    assert FeaturePartition.from_percentages(L, 0.05, 0.05) == FeaturePartition(L, 50, 50)
    # Cut off it would be 6,553, and 28 of 100 for 0.29.
    large = FeaturePartition.from_percentages(131_072, 0.05, 0.05)
    assert (large.model_a_exclusive_size, large.shared_size) == (6_554, 117_964)
    assert FeaturePartition.from_percentages(100, 0.29, 0.1).model_a_exclusive_size == 29


def test_partition_masks() -> None:
    partition = FeaturePartition(L, 50, 50)
    for get in (partition.get_encoder_mask, partition.get_decoder_mask):
        a_L, b_L = get(0), get(1)
        assert a_L[:50].all() and a_L[100:].all() and not a_L[50:100].any()
        assert b_L[50:].all() and not b_L[:50].any()
        with pytest.raises(WiringError, match="two models"):
            get(2)
    assert torch.equal(partition.get_bias_mask(), torch.ones(L))


def test_dfc_initialization(dfc: DedicatedFeatureBatchTopKCrossCoder) -> None:
    assert (dfc.activation_dim, dfc.dict_size, dfc.num_layers, int(dfc.k)) == (D, L, 2, K)
    assert dfc.partition == FeaturePartition(L, 50, 50)
    assert isinstance(dfc, BatchTopKCrossCoder)


def test_dfc_forward_pass(dfc: DedicatedFeatureBatchTopKCrossCoder, x: Tensor) -> None:
    x_hat, f = dfc(x, output_features=True)
    assert x_hat.shape == x.shape and f.shape == (B, L)


def test_forbidden_weights_initialized_to_zero(dfc: DedicatedFeatureBatchTopKCrossCoder) -> None:
    encoder, decoder = dfc.encoder.weight, dfc.decoder.weight
    for forbidden in (encoder[0, :, 50:100], encoder[1, :, :50], decoder[0, 50:100], decoder[1, :50]):
        assert forbidden.abs().max() == 0


def test_allowed_weights_nonzero(dfc: DedicatedFeatureBatchTopKCrossCoder) -> None:
    encoder = dfc.encoder.weight
    assert encoder[0, :, :50].abs().min(0).values.max() > 0 and encoder[0, :, 100:].abs().max() > 0
    # With the length that BatchTopKCrossCoder gives its vectors.
    torch.testing.assert_close(encoder[0].norm(dim=0)[100:], torch.ones(900))


def test_partition_integrity_after_init(dfc: DedicatedFeatureBatchTopKCrossCoder) -> None:
    assert worst(dfc) == 0


def loss(made: DedicatedFeatureBatchTopKCrossCoder, x: Tensor) -> Tensor:
    return (made(x) - x).square().sum(-1).mean()


def test_gradient_masking_encoder(dfc: DedicatedFeatureBatchTopKCrossCoder, x: Tensor) -> None:
    loss(dfc, x).backward()
    grad = dfc.encoder.weight.grad
    assert grad is not None and grad.shape == (2, D, L)
    assert grad[0, :, 50:100].abs().max() == 0 and grad[1, :, :50].abs().max() == 0


def test_gradient_masking_decoder(dfc: DedicatedFeatureBatchTopKCrossCoder, x: Tensor) -> None:
    loss(dfc, x).backward()
    grad = dfc.decoder.weight.grad
    assert grad is not None and grad.shape == (2, L, D)
    assert grad[0, 50:100].abs().max() == 0 and grad[1, :50].abs().max() == 0


def test_gradients_flow_to_allowed_features(dfc: DedicatedFeatureBatchTopKCrossCoder, x: Tensor) -> None:
    loss(dfc, x).backward()
    grad = dfc.encoder.weight.grad
    assert grad is not None
    assert grad[0, :, :50].abs().max() > 0 and grad[1, :, 50:100].abs().max() > 0
    assert grad[0, :, 100:].abs().max() > 0 and grad[1, :, 100:].abs().max() > 0


def test_weights_stay_zero_after_backward(dfc: DedicatedFeatureBatchTopKCrossCoder, x: Tensor) -> None:
    loss(dfc, x).backward()
    assert worst(dfc) == 0


def leakage(made: DedicatedFeatureBatchTopKCrossCoder, x: Tensor, latents: slice) -> Tensor:
    """The gradient of decoders where these latents alone reconstruct both models."""
    f = torch.zeros(B, L)
    f[:, latents] = torch.rand(B, latents.stop - latents.start, generator=torch.Generator().manual_seed(2))
    (made.decode(f) - x).square().sum().backward()
    grad = made.decoder.weight.grad
    assert grad is not None
    return grad


def test_auxiliary_loss_no_gradient_leakage(dfc: DedicatedFeatureBatchTopKCrossCoder, x: Tensor) -> None:
    grad = leakage(dfc, x, slice(10, 20))
    assert grad[1, :50].abs().max() == 0 and grad[0, 10:20].abs().min(1).values.min() >= 0
    assert grad[0, 10:20].abs().max() > 0


def test_auxiliary_loss_both_directions(dfc: DedicatedFeatureBatchTopKCrossCoder, x: Tensor) -> None:
    grad = leakage(dfc, x, slice(60, 70))
    assert grad[0, 50:100].abs().max() == 0 and grad[1, 60:70].abs().max() > 0


def steps(made: DedicatedFeatureBatchTopKCrossCoder, x: Tensor, count: int, decay: float = 0.0) -> None:
    optimiser = torch.optim.AdamW(made.parameters(), 1e-2, weight_decay=decay)
    for _ in range(count):
        loss(made, x).backward()
        optimiser.step()
        optimiser.zero_grad()


def test_optimizer_step_maintains_zero_weights(dfc: DedicatedFeatureBatchTopKCrossCoder, x: Tensor) -> None:
    steps(dfc, x, 1)
    assert worst(dfc) == 0


def test_multiple_optimizer_steps_maintain_zero(dfc: DedicatedFeatureBatchTopKCrossCoder, x: Tensor) -> None:
    before = float(loss(dfc, x).detach())
    steps(dfc, x, 10, decay=0.1)
    assert worst(dfc) == 0 and float(loss(dfc, x).detach()) < before


@pytest.mark.parametrize("kind", ["pt", "folder"])
def test_save_and_load_preserves_partition(
    kind: str, dfc: DedicatedFeatureBatchTopKCrossCoder, x: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / ("dfc.pt" if kind == "pt" else "dfc")
    if kind == "pt":
        torch.save(dfc.state_dict(), path)
        assert torch.load(path, weights_only=True)["_partition_config"]["dict_size"] == L
    else:
        dfc.save_pretrained(path)
    again = DedicatedFeatureBatchTopKCrossCoder.from_pretrained(path)
    assert again.partition == dfc.partition
    assert torch.equal(again.encode(x), dfc.encode(x))


def test_partition_integrity_after_load(dfc: DedicatedFeatureBatchTopKCrossCoder, x: Tensor, tmp_path: Path) -> None:
    steps(dfc, x, 5)
    torch.save(dfc.state_dict(), tmp_path / "dfc.pt")
    assert worst(DedicatedFeatureBatchTopKCrossCoder.from_pretrained(tmp_path / "dfc.pt")) == 0


def test_get_partition_statistics(dfc: DedicatedFeatureBatchTopKCrossCoder) -> None:
    assert dfc.get_partition_statistics() == {
        "total_features": L, "model_a_exclusive": 50, "model_b_exclusive": 50, "shared": 900,
        "model_a_exclusive_pct": 0.05, "model_b_exclusive_pct": 0.05, "shared_pct": 0.9,
    }  # fmt: skip


# --- what those tests left out ----------------------------------------------------------------------------------


def test_codes_of_the_top_k_path_are_k_of_a_row(dfc: DedicatedFeatureBatchTopKCrossCoder, x: Tensor) -> None:
    assert int((dfc.encode(x, use_threshold=False) > 0).sum()) == K * B


def test_exclusive_codes_do_not_depend_on_the_other_model(dfc: DedicatedFeatureBatchTopKCrossCoder, x: Tensor) -> None:
    dfc.threshold = 0.5
    other = x.clone()
    other[:, 1] = torch.randn(B, D)
    assert torch.equal(dfc.encode(x)[:, A], dfc.encode(other)[:, A])
    assert not torch.equal(dfc.encode(x)[:, B_ONLY], dfc.encode(other)[:, B_ONLY])
    only_a = torch.zeros(B, L)
    only_a[:, A] = 1.0
    bias = dfc.decoder.bias
    assert torch.equal(dfc.decode(only_a)[:, 1], bias[1].expand(B, D))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_keep_the_partition(copied: object, dfc: DedicatedFeatureBatchTopKCrossCoder, x: Tensor) -> None:
    made: DedicatedFeatureBatchTopKCrossCoder = copied(dfc)  # type: ignore[operator]
    assert torch.equal(made.encode(x), dfc.encode(x))
    steps(made, x, 3)
    assert worst(made) == 0


def test_half_precision_keeps_the_partition(dfc: DedicatedFeatureBatchTopKCrossCoder, x: Tensor) -> None:
    half = copy.deepcopy(dfc).to(torch.bfloat16)
    assert worst(half) == 0
    torch.testing.assert_close(half(x).float(), dfc(x), rtol=0.1, atol=0.1)


def test_a_state_of_another_partition_is_refused(dfc: DedicatedFeatureBatchTopKCrossCoder) -> None:
    other = DedicatedFeatureBatchTopKCrossCoder(D, L, 2, k=K, model_a_exclusive_pct=0.2)
    with pytest.raises(CheckpointError, match="another size"):
        dfc.load_state_dict(other.state_dict())
    assert worst(dfc) == 0


def test_a_state_without_a_partition_is_refused(dfc: DedicatedFeatureBatchTopKCrossCoder, tmp_path: Path) -> None:
    plain = BatchTopKCrossCoder(D, L, 2, k=K)
    with pytest.raises(CheckpointError, match="where its partition allows none"):
        dfc.load_state_dict(plain.state_dict())
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="which latents are dedicated"):
        DedicatedFeatureBatchTopKCrossCoder.from_pretrained(tmp_path / "plain.pt")


def test_what_is_written_into_shown_weights_is_not_lost(dfc: DedicatedFeatureBatchTopKCrossCoder) -> None:
    with pytest.raises(CopyError, match="Assign it"):
        dfc.decoder.weight[0, 50:100] = 1.0
    with pytest.raises(CopyError, match="Assign it"):
        dfc.encoder.weight.data.mul_(2.0)
    forbidden = dfc.decoder.weight.detach().clone()
    forbidden[0, 60, 3] = 0.25
    with pytest.raises(CheckpointError, match=r"allows none: up to 0\.25"):
        dfc.decoder.weight = forbidden
    doubled = 2 * dfc.decoder.weight.detach()
    dfc.decoder.weight = doubled
    assert torch.equal(dfc.decoder.weight.detach(), doubled) and worst(dfc) == 0


@pytest.mark.parametrize("norm", list(CodeNormalization))
@pytest.mark.parametrize("kind", ["pt", "folder"])
def test_the_code_normalisation_is_loaded(norm: CodeNormalization, kind: str, x: Tensor, tmp_path: Path) -> None:
    made = DedicatedFeatureBatchTopKCrossCoder(
        D, 200, 2, k=8, code_normalization=norm, code_normalization_alpha_sae=0.7, code_normalization_alpha_cc=0.2
    )
    made.threshold = torch.tensor([0.5, 0.7]) if norm == CodeNormalization.DECOUPLED else 0.5
    if kind == "pt":
        torch.save(made.state_dict(), tmp_path / "model_final.pt")
        (tmp_path / "config.json").write_text(
            '{"trainer": {"code_normalization_alpha_sae": 0.7, "code_normalization_alpha_cc": 0.2}}'
        )
    else:
        made.save_pretrained(tmp_path / "folder")
    path = tmp_path / ("model_final.pt" if kind == "pt" else "folder")
    again = DedicatedFeatureBatchTopKCrossCoder.from_pretrained(path)
    assert again.code_normalization == norm
    assert torch.equal(again.encode(x), made.encode(x))
    torch.testing.assert_close(again.get_activations(x), made.get_activations(x))
    torch.testing.assert_close(again.threshold, made.threshold)


@pytest.mark.parametrize(("a", "b"), [(3, 11), (1, 1), (0.25, 0.01)])
def test_sizes_can_be_given_and_differ(a: float, b: float, x: Tensor) -> None:
    sizes = {"model_a_exclusive_size": a, "model_b_exclusive_size": b}
    shares = {"model_a_exclusive_pct": a, "model_b_exclusive_pct": b}
    made = DedicatedFeatureCrossCoder(D, 400, 2, **(shares if isinstance(a, float) else sizes))
    expected = (round(a * 400), round(b * 400)) if isinstance(a, float) else (a, b)
    assert (made.partition.model_a_exclusive_size, made.partition.model_b_exclusive_size) == expected
    assert made(x).shape == x.shape and worst(made) == 0

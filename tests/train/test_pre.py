"""Pre-activations in every way in which they are asked for: one matrix, and its gradients."""

import pytest
import torch
from hypothesis import given, settings

from tests.train.problem import LATENTS, ROWS, Problem, every_case, matrix, seeds, tolerance


@every_case
def test_dense_and_sparse_pre_activations_are_one_matrix_with_equal_gradients(case: str) -> None:
    one = Problem(case, 1)
    pre = one.pre(one.bias_L, one.encoder)
    torch.testing.assert_close(pre.dense_BL, one.dense_h(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pre.h_BL, one.dense_h(), rtol=1e-12, atol=1e-12)
    leaves, grad_BL = [one.bias_L, *one.encoder.values()], matrix(ROWS, LATENTS, 5)
    found = torch.autograd.grad(pre.dense_BL, leaves, grad_BL)
    expected = torch.autograd.grad(one.dense_h(), leaves, grad_BL)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@settings(max_examples=10)
@given(seed=seeds)
def test_codes_of_some_latents_and_every_gradient_equal_the_dense_ones(
    case: str, dtype: torch.dtype, seed: int
) -> None:
    one = Problem(case, seed, dtype)
    latents = torch.tensor([1, 2, 7, 11, 19])
    h_Bn = one.dense_h()[:, latents]
    f_Bn = h_Bn.clamp_min(0) * (torch.rand(h_Bn.shape, generator=one.generator) < 0.7)
    pre = one.pre(one.bias_L, one.encoder)
    torch.testing.assert_close(pre.columns(latents).double(), h_Bn, **tolerance(dtype))
    pre.weighed(torch.rand(LATENTS, generator=one.generator, dtype=dtype))
    torch.testing.assert_close(pre.columns(latents).double(), h_Bn, **tolerance(dtype))
    grad_Bn = torch.randn(f_Bn.shape, generator=one.generator, dtype=dtype)
    leaves = [one.bias_L, *one.encoder.values()]
    expected = torch.autograd.grad(f_Bn, leaves, grad_Bn.double())
    for sparse in (False, True):
        found = torch.autograd.grad(pre.graph_of(f_Bn.detach().to(dtype), latents, sparse), leaves, grad_Bn)
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got.to_dense(), wanted, **tolerance(dtype))
        assert [got.is_sparse for got in found] == [False, *[sparse] * len(one.encoder)]


@every_case
def test_scores_are_pre_activations_times_norms_and_give_them_back(case: str) -> None:
    one = Problem(case, 2)
    pre, norm_L = one.pre(one.bias_L, one.encoder), torch.rand(LATENTS, dtype=torch.float64)
    norm_L[4] = 0
    exact: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(pre.weighed(norm_L), one.dense_h() * norm_L, **exact)
    torch.testing.assert_close(pre.at(one.entries), one.dense_h()[one.entries.row_K, one.entries.latent_K], **exact)
    torch.testing.assert_close(pre.h_BL, one.dense_h(), **exact)


def test_scores_stay_until_they_are_handed_back_and_are_computed_again_then() -> None:
    one, other = Problem("crosscoder", 0), Problem("crosscoder", 1)
    first, second = (each.pre(each.bias_L, each.encoder) for each in (one, other))
    norm_L = torch.ones(LATENTS, dtype=torch.float64)
    kept_BL = first.weighed(norm_L).clone()
    second.weighed(norm_L)
    assert torch.equal(first.weighed(norm_L), kept_BL)
    first.release()
    third = other.pre(other.bias_L, other.encoder)
    assert torch.equal(third.weighed(norm_L), second.weighed(norm_L))
    assert torch.equal(first.weighed(norm_L), kept_BL) and torch.equal(first.h_BL, kept_BL)

"""Pre-activations in every way in which they are asked for: one matrix, and its gradients."""

import pytest
import torch
from hypothesis import given, settings

from tests.train.problem import LATENTS, ROWS, Problem, every_case, matrix, seeds, tolerance
from train import pre as pres
from train.kernels import choice
from train.kernels.choice import Kernels


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
def test_pre_activations_of_some_latents_on_some_rows_equal_the_dense_ones(
    case: str, dtype: torch.dtype, seed: int
) -> None:
    one = Problem(case, seed, dtype)
    latents = torch.tensor([1, 2, 7, 11, 19])
    h_Bn = one.dense_h()[:, latents]
    rows = slice(1, 3)
    norm_L = torch.rand(LATENTS, generator=one.generator, dtype=dtype)
    for by_latent in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choice, "by_latent", lambda device, by_latent=by_latent: by_latent)
            pre = one.pre(one.bias_L, one.encoder)
            torch.testing.assert_close(pre.columns(latents).double(), h_Bn, **tolerance(dtype))
            torch.testing.assert_close(pre.columns(latents, rows).double(), h_Bn[rows], **tolerance(dtype))
            score_BL = pre.weighed(norm_L)
            assert (score_BL.T if by_latent else score_BL).is_contiguous()
            torch.testing.assert_close(score_BL.double(), one.dense_h().detach() * norm_L, **tolerance(dtype))
            torch.testing.assert_close(pre.columns(latents).double(), h_Bn, **tolerance(dtype))
            torch.testing.assert_close(pre.columns(latents, rows).double(), h_Bn[rows], **tolerance(dtype))


@pytest.mark.parametrize("most", [1, 40, 41, 10**9])
def test_parts_of_the_rows_are_all_of_them_once_and_no_larger_than_they_may_be(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setitem(pres.COLUMNS, "cpu", most)
    one = Problem("autoencoder", 0, torch.float32)
    pre, latents = one.pre(one.bias_L, one.encoder), torch.arange(8)
    parts = pre.parts_of(latents)
    assert pre.rows > 5
    rows = [row for part in parts for row in range(pre.rows)[part]]
    assert rows == list(range(pre.rows))
    assert all(8 * (part.stop - part.start) <= most or part.stop - part.start == 1 for part in parts)
    assert most < 10**9 or len(parts) == 1


@every_case
@settings(max_examples=10)
@given(seed=seeds)
def test_products_in_bf16_are_near_and_gradients_at_entries_exact(case: str, seed: int) -> None:
    one = Problem(case, seed, torch.float32)
    pre, norm_L = one.pre(one.bias_L, one.encoder, Kernels(precision="bf16")), torch.rand(LATENTS)
    h_BL, latents = one.dense_h(), torch.tensor([1, 2, 7, 11, 19])
    near = {"rtol": 0.02, "atol": 0.02 * float(h_BL.detach().abs().max())}
    assert pre.weighed(norm_L).dtype == torch.bfloat16
    torch.testing.assert_close(pre.weighed(norm_L).double(), h_BL.detach() * norm_L, **near)
    torch.testing.assert_close(pre.columns(latents).double(), h_BL.detach()[:, latents], **near)
    exact_K, leaves = h_BL[one.entries.row_K, one.entries.latent_K], [one.bias_L, *one.encoder.values()]
    torch.testing.assert_close(pre.at(one.entries).double(), exact_K, **near)
    grad_K, grad_BL = matrix(1, len(exact_K), seed, torch.float32)[0], matrix(ROWS, LATENTS, seed, torch.float32)
    found = torch.autograd.grad(pre.at(one.entries), leaves, grad_K)
    expected = torch.autograd.grad(exact_K, leaves, grad_K.double(), retain_graph=True)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, **tolerance(torch.float32))
    dense_BL = one.pre(one.bias_L, one.encoder, Kernels(precision="bf16")).dense_BL
    torch.testing.assert_close(dense_BL.double(), h_BL, **near)
    found, expected = (torch.autograd.grad(made_BL, leaves, grad_BL.to(made_BL)) for made_BL in (dense_BL, h_BL))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


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

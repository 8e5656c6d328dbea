"""Codes as a matrix and as kept entries are one thing: every question has one answer, that of the formula in fp64.

Letters: B rows of a batch, D width of a source, L latents, S latents of one source.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import CASES, LATENTS, wiring
from tests.train.dense import full, places
from train.code import Code, DenseCode, SparseCode
from train.kernels.entries import Entries
from train.pre import Ports

CASE = st.sampled_from(list(CASES))
SEED = st.integers(0, 2**31)


def made(seed: int, rows: int = 5) -> tuple[DenseCode, SparseCode]:
    """The same codes twice. Kept entries may hold a zero."""
    generator = torch.Generator().manual_seed(seed)
    kept_BL = torch.rand(rows, LATENTS, generator=generator) < 0.2
    f_BL = torch.rand(rows, LATENTS, generator=generator) * kept_BL * (torch.rand(rows, 1, generator=generator) < 0.8)
    row_K, latent_K = torch.nonzero(kept_BL, as_tuple=True)
    return DenseCode(f_BL), SparseCode(Entries(row_K, latent_K, rows, LATENTS), f_BL[row_K, latent_K])


def ports(case: str, source: str) -> Ports:
    made_of = wiring(case)
    return Ports.of(source, made_of.written_to(source), made_of.latents)


@given(CASE, SEED)
def test_what_a_code_writes_is_its_product_with_the_full_decoder(case: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    made_of = wiring(case)
    for source in made_of.writers:
        own = ports(case, source)
        W_SD = torch.randn(own.size, made_of.widths[source], generator=generator)
        dense, sparse = made(seed)
        expected_BD = dense.f_BL.double() @ full(W_SD, places(made_of, source, "writers"))
        for code in (dense, sparse):
            torch.testing.assert_close(code.write(W_SD, own).double(), expected_BD, rtol=1e-5, atol=1e-5)


@given(SEED)
def test_both_kinds_of_code_answer_alike(seed: int) -> None:
    weight_L = torch.rand(LATENTS, generator=torch.Generator().manual_seed(seed)) + 0.1
    dense, sparse = made(seed)
    f_BL = dense.f_BL.double()
    group_L = torch.arange(LATENTS) % 3
    scores = [(f_BL * weight_L)[:, group_L == g][f_BL[:, group_L == g] > 0] for g in range(3)]
    wanted = [float(one.min()) if len(one) else torch.inf for one in scores]
    for code in (dense, sparse):
        assert torch.equal(code.dense(), dense.f_BL)
        assert torch.equal(code.sparse().to_dense(), dense.f_BL) and code.sparse().is_coalesced()
        assert code.fires_L().tolist() == (f_BL > 0).sum(0).tolist()
        assert code.l1(weight_L).item() == pytest.approx(float((f_BL @ weight_L.double()).mean()), rel=1e-5, abs=1e-7)
        assert code.smallest(weight_L, group_L, 3).tolist() == pytest.approx(wanted)
        sums_B = code.sums(torch.square, weight_L)
        torch.testing.assert_close(sums_B.double(), (f_BL * weight_L).square().sum(1), rtol=1e-5, atol=1e-7)


def test_penalties_see_the_soft_code() -> None:
    f_BL, soft_BL, weight_L = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 5.0]]), torch.tensor([1.0, 2.0])
    both = Entries(torch.tensor([0, 0]), torch.tensor([0, 1]), 1, 2)
    codes: list[Code] = [DenseCode(f_BL, soft_BL=soft_BL), SparseCode(both, f_BL[0], soft_BL[0])]
    for code in codes:
        assert (code.l1(weight_L).item(), code.soft.l1(weight_L).item()) == (1.0, 13.0)
        assert code.sums(torch.square, weight_L).tolist() == [1.0]
        assert code.soft.sums(torch.square, weight_L, weight_L).tolist() == [9.0 + 2 * 100.0]
        assert code.fires_L().tolist() == [1, 0]
        assert (soft := code.soft).soft is soft


def test_a_code_without_entries_writes_zeros_and_has_no_smallest() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    code = SparseCode(Entries(none, none, 3, LATENTS), torch.zeros(0))
    W_SD = torch.ones(LATENTS, 4)
    assert torch.equal(code.write(W_SD, ports("autoencoder", "a")), torch.zeros(3, 4))
    assert code.smallest(torch.ones(LATENTS), torch.zeros(LATENTS, dtype=torch.int64), 1).tolist() == [torch.inf]
    assert code.sums(torch.square, torch.ones(LATENTS)).tolist() == [0, 0, 0]
    assert code.l1(torch.ones(LATENTS)).item() == 0
    assert int(code.fires_L().sum()) == 0


@pytest.mark.parametrize("case", CASES)
def test_ports_tell_where_each_latent_stands_in_a_sources_own_matrix(case: str) -> None:
    made_of = wiring(case)
    for source in made_of.writers:
        own, present_L = ports(case, source), places(made_of, source, "writers")
        assert torch.equal(own.present_L, present_L.float())
        assert own.local_L[present_L].tolist() == list(range(own.size))
        assert own.size == int(present_L.sum())
        assert not own.local_L[~present_L].any()


@pytest.mark.parametrize("case", CASES)
def test_penalty_and_write_have_the_gradients_of_the_formula(case: str) -> None:
    made_of = wiring(case)
    source = made_of.writers[0]
    own = ports(case, source)
    generator = torch.Generator().manual_seed(3)
    W_SD = torch.randn(own.size, made_of.widths[source], generator=generator)
    target_BD, weight_L = torch.randn(5, made_of.widths[source], generator=generator), torch.rand(LATENTS)
    dense, sparse = made(11)

    def gradients(code: DenseCode | SparseCode, f: Tensor) -> tuple[Tensor, ...]:
        loss = ((code.write(weights, own) - target_BD) ** 2).mean() + code.l1(weight_L)
        return torch.autograd.grad(loss, (f, weights))

    weights = W_SD.requires_grad_()
    f_BL, value_K = dense.f_BL.clone().requires_grad_(), sparse.value_K.clone().requires_grad_()
    by_matrix, dW_matrix = gradients(DenseCode(f_BL), f_BL)
    by_entry, dW_entry = gradients(SparseCode(sparse.entries, value_K), value_K)
    torch.testing.assert_close(by_entry, by_matrix[sparse.entries.row_K, sparse.entries.latent_K], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dW_entry, dW_matrix, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_what_groups_of_latents_write_is_what_each_of_them_would_alone(case: str) -> None:
    made_of, group_L = wiring(case), torch.arange(LATENTS) % 3
    for source in made_of.writers:
        own = ports(case, source)
        W_SD = torch.randn(own.size, made_of.widths[source], generator=torch.Generator().manual_seed(1))
        for code in made(5):
            y_BGD = code.write_groups(W_SD, own, group_L, 3)
            for group in range(3):
                f_BL = code.dense() * (group_L == group)
                torch.testing.assert_close(y_BGD[:, group], DenseCode(f_BL).write(W_SD, own), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(y_BGD.sum(1), code.write(W_SD, own), rtol=1e-5, atol=1e-5)

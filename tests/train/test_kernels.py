"""The sparse kernels equal their dense references: what is selected, every value and every gradient.

Letters: B rows of a batch, D width of a source, L latents, S latents of one source, K kept entries.
"""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import CASES, random_rows, wiring
from tests.train.dense import full, places, top_mask, top_mask_of_batch
from train.code import Ports, Pre, SparseCode
from train.kernels import Decode, Entries, above, sums_by_latent, top_of_batch, top_per_row
from train.wiring import Wiring

ROWS, LATENTS = 7, 20
every_case = pytest.mark.parametrize("case", CASES)
seeds = st.integers(0, 2**16)


def matrix(rows: int, latents: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, latents, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask(entries: Entries) -> Tensor:
    mask_BL = torch.zeros(entries.rows, entries.latents, dtype=torch.int64)
    mask_BL.index_put_((entries.row_K, entries.latent_K), torch.tensor(1), accumulate=True)
    assert int(mask_BL.max()) <= 1  # no entry twice
    return mask_BL.bool()


# --- select -----------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 9), latents=st.integers(1, 12), seed=seeds, data=st.data())
def test_top_per_row_keeps_exactly_the_k_largest_of_every_row(
    rows: int, latents: int, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, latents))
    score_BL = matrix(rows, latents, seed)
    entries = top_per_row(score_BL, k)
    assert len(entries.row_K) == rows * k
    assert torch.equal(mask(entries), top_mask(score_BL, k))


@given(rows=st.integers(1, 9), latents=st.integers(1, 12), seed=seeds, data=st.data())
def test_top_of_batch_keeps_exactly_the_largest_of_the_whole_matrix(
    rows: int, latents: int, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, rows * latents))
    score_BL = matrix(rows, latents, seed)
    entries = top_of_batch(score_BL, count)
    assert len(entries.row_K) == count
    assert torch.equal(mask(entries), top_mask_of_batch(score_BL, count))


@given(rows=st.integers(1, 9), latents=st.integers(1, 12), seed=seeds, threshold=st.floats(-3, 3))
def test_above_keeps_what_is_above_and_not_what_is_equal(rows: int, latents: int, seed: int, threshold: float) -> None:
    score_BL = matrix(rows, latents, seed)
    score_BL[0, 0] = threshold
    assert torch.equal(mask(above(score_BL, threshold)), score_BL > threshold)


def test_among_ties_any_are_kept_but_as_many_as_asked_and_none_twice() -> None:
    score_BL = torch.tensor([[1.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    per_row, of_batch = mask(top_per_row(score_BL, 2)), mask(top_of_batch(score_BL, 3))
    assert per_row.sum(1).tolist() == [2, 2] and per_row[0, 3]
    assert int(of_batch.sum()) == 3 and of_batch[0, 3] and not of_batch[1].any()


def test_negative_rows_still_give_k_entries_and_a_batch_may_leave_rows_empty() -> None:
    score_BL = torch.tensor([[-1.0, -2.0, -3.0], [5.0, 6.0, 7.0]])
    assert mask(top_per_row(score_BL, 1)).tolist() == [[True, False, False], [False, False, True]]
    entries = top_of_batch(score_BL, 3)
    assert entries.row_K.tolist() == [1, 1, 1] and entries.row_starts_B.tolist() == [0, 0]


@given(rows=st.integers(1, 9), latents=st.integers(1, 12), seed=seeds)
def test_entries_stand_in_order_of_rows_then_latents_and_know_where_both_start(
    rows: int, latents: int, seed: int
) -> None:
    score_BL = matrix(rows, latents, seed)
    for entries in (
        top_per_row(score_BL, min(3, latents)),
        top_of_batch(score_BL, max(1, rows * latents // 2)),
        above(score_BL, 0.5),
    ):
        assert entries.row_K.dtype == entries.latent_K.dtype == torch.int64
        flat_K = entries.row_K * latents + entries.latent_K
        assert torch.equal(flat_K, flat_K.sort().values)
        counts_L = mask(entries).sum(0)
        assert torch.equal(entries.latent_starts_L, counts_L.cumsum(0) - counts_L)
        assert torch.equal(entries.latent_K[entries.by_latent_K], entries.latent_K.sort().values)


def test_positions_beyond_32_bits_are_computed_in_64() -> None:
    score_BL = torch.empty(2**14 + 1, 2**17, device="meta")  # above 2^31 entries, of which none has storage
    assert score_BL.numel() > 2**31
    for entries in (top_of_batch(score_BL, 2**19), top_per_row(score_BL, 32)):
        assert entries.row_K.dtype == entries.latent_K.dtype == torch.int64
        assert (entries.rows, entries.latents) == score_BL.shape


def test_sums_by_latent_add_weighted_rows_and_are_zero_where_a_latent_has_no_entry() -> None:
    entries = Entries(torch.tensor([0, 0, 1]), torch.tensor([2, 0, 2]), rows=2, latents=4)
    x_BD = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    sums_LD = sums_by_latent(entries, x_BD, torch.tensor([1.0, 3.0, -1.0]))
    assert sums_LD.tolist() == [[3.0, 6.0], [0.0, 0.0], [-9.0, -18.0], [0.0, 0.0]]


# --- values and gradients ---------------------------------------------------------------------------------------


class Problem:
    """Random weights of a wiring, as leaves, and entries of which some rows and latents have none."""

    def __init__(self, case: str, seed: int, dtype: torch.dtype = torch.float64, keep: float = 0.3) -> None:
        self.wiring: Wiring = wiring(case, LATENTS)
        generator = torch.Generator().manual_seed(seed)
        self.x = {name: x_BD.to(dtype) for name, x_BD in random_rows(case, ROWS, seed).items()}
        self.reads = {n: Ports.of(n, self.wiring.read_by(n), LATENTS) for n in self.wiring.readers}
        self.writes = {n: Ports.of(n, self.wiring.written_to(n), LATENTS) for n in self.wiring.writers}

        def leaf(rows: int, *width: int) -> Tensor:
            return torch.randn(rows, *width, generator=generator, dtype=dtype).requires_grad_()

        self.encoder = {n: leaf(p.size, self.wiring.widths[n]) for n, p in self.reads.items()}
        self.decoder = {n: leaf(p.size, self.wiring.widths[n]) for n, p in self.writes.items()}
        self.bias_L = leaf(LATENTS)
        kept_BL = torch.rand(ROWS, LATENTS, generator=generator) < keep
        kept_BL[2], kept_BL[:, 3] = False, False
        self.entries = above(kept_BL.to(dtype), 0.5)
        self.value_K = leaf(len(self.entries.row_K))
        self.generator = generator

    def pre(self, bias_L: Tensor, encoder: Mapping[str, Tensor]) -> Pre:
        return Pre(self.wiring, self.x, dict(encoder), self.reads, bias_L)

    def dense_h(self) -> Tensor:
        h_BL = self.bias_L.double()
        for name, weights in self.encoder.items():
            h_BL = h_BL + self.x[name].double() @ full(weights, places(self.wiring, name, "readers")).T
        return h_BL


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@settings(max_examples=20)
@given(seed=seeds)
def test_pre_activations_at_entries_and_every_gradient_equal_the_dense_ones(
    case: str, dtype: torch.dtype, seed: int
) -> None:
    one = Problem(case, seed, dtype)
    leaves = [one.bias_L, *one.encoder.values()]
    grad_K = torch.randn(len(one.entries.row_K), generator=one.generator, dtype=dtype)
    h_K = one.pre(one.bias_L, one.encoder).at(one.entries)
    reference_K = one.dense_h()[one.entries.row_K, one.entries.latent_K]
    torch.testing.assert_close(h_K.double(), reference_K, **tolerance(dtype))
    found = torch.autograd.grad(h_K, leaves, grad_K)
    expected = torch.autograd.grad(reference_K, leaves, grad_K.double())
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted, **tolerance(dtype))


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
@settings(max_examples=20)
@given(seed=seeds)
def test_decoding_entries_and_every_gradient_equal_the_dense_ones(case: str, dtype: torch.dtype, seed: int) -> None:
    one = Problem(case, seed, dtype)
    f_BL = one.value_K.new_zeros(ROWS, LATENTS, dtype=torch.float64)
    f_BL = f_BL.index_put((one.entries.row_K, one.entries.latent_K), one.value_K.double())
    code = SparseCode(one.entries, one.value_K)
    for name, ports in one.writes.items():
        y_BD = code.write(one.decoder[name], ports)
        reference_BD = f_BL @ full(one.decoder[name], places(one.wiring, name, "writers"))
        torch.testing.assert_close(y_BD.double(), reference_BD, **tolerance(dtype))
        assert not y_BD[2].any()  # a row without entries
        grad_BD = torch.randn(y_BD.shape, generator=one.generator, dtype=dtype)
        leaves = [one.value_K, one.decoder[name]]
        found = torch.autograd.grad(y_BD, leaves, grad_BD)
        expected = torch.autograd.grad(reference_BD, leaves, grad_BD.double(), retain_graph=True)
        for got, wanted in zip(found, expected, strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got, wanted, **tolerance(dtype))


@every_case
def test_gradcheck_agrees_with_both_kernels(case: str) -> None:
    one = Problem(case, 3)
    names = list(one.encoder)

    def at(bias_L: Tensor, *weights: Tensor) -> Tensor:
        return one.pre(bias_L, dict(zip(names, weights, strict=True))).at(one.entries)

    assert torch.autograd.gradcheck(at, (one.bias_L, *one.encoder.values()))
    for name, ports in one.writes.items():

        def decode(value_K: Tensor, W_SD: Tensor, ports: Ports = ports) -> Tensor:
            return SparseCode(one.entries, value_K).write(W_SD, ports)

        assert torch.autograd.gradcheck(decode, (one.value_K, one.decoder[name]))


@every_case
def test_a_batch_without_any_entry_decodes_to_zeros_with_zero_gradients(case: str) -> None:
    one = Problem(case, 4, keep=0.0)
    assert not len(one.entries.row_K)
    code = SparseCode(one.entries, one.pre(one.bias_L, one.encoder).at(one.entries))
    total = torch.stack([code.write(one.decoder[name], ports).sum() for name, ports in one.writes.items()]).sum()
    total.backward()
    assert float(total.detach()) == 0
    for leaf in (one.bias_L, *one.encoder.values(), *one.decoder.values()):
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and not leaf.grad.any()


def test_the_backward_pass_hands_back_no_dense_matrix_of_rows_by_latents() -> None:
    one = Problem("dedicated", 5)
    pre = one.pre(one.bias_L, one.encoder)
    assert not pre.h_BL.requires_grad
    pre.at(one.entries).sum().backward()
    assert one.bias_L.grad is not None


@every_case
def test_entries_of_latents_that_do_not_write_to_a_source_add_nothing_to_it(case: str) -> None:
    one = Problem(case, 6)
    changed_K = one.value_K.detach().clone()
    for name, ports in one.writes.items():
        present_K = ports.present_L[one.entries.latent_K].bool()
        expected = SparseCode(one.entries, changed_K).write(one.decoder[name], ports)
        loud_K = torch.where(present_K, changed_K, 1e30)
        assert torch.equal(SparseCode(one.entries, loud_K).write(one.decoder[name], ports), expected)


def test_decode_gives_no_gradient_that_nobody_asked_for() -> None:
    one = Problem("autoencoder", 7)
    ports = one.writes["a"]
    local_K = ports.local_L[one.entries.latent_K]
    present_K = torch.ones_like(one.value_K)
    Decode.apply(one.value_K, one.decoder["a"].detach(), one.entries, ports.slices, local_K, present_K).sum().backward()
    assert one.value_K.grad is not None and one.decoder["a"].grad is None

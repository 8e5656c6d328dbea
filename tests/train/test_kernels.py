"""The sparse kernels equal their dense references: what is selected, every value and every gradient.

Letters: B rows of a batch, D width of a source, L latents, S latents of one source, K kept entries.
"""

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train.kernels
from shared.errors import ConfigError
from tests.train.dense import full, places, top_mask, top_mask_of_batch
from tests.train.problem import LATENTS, ROWS, Problem, every_case, matrix, seeds, tolerance
from train.code import SparseCode
from train.kernels import choice
from train.kernels.choice import Kernels, has_bf16
from train.kernels.entries import Entries, Pieces
from train.kernels.products import Decode, Known, SquaredDistance, product, sums_by_latent
from train.kernels.select import APART, above, top_of_batch, top_per_row
from train.pre import Ports


def mask(entries: Entries) -> Tensor:
    mask_BL = torch.zeros(entries.rows, entries.latents, dtype=torch.int64)
    mask_BL.index_put_((entries.row_K, entries.latent_K), torch.tensor(1), accumulate=True)
    assert int(mask_BL.max()) <= 1  # no entry twice
    return mask_BL.bool()


# --- select -----------------------------------------------------------------------------------------------------


def laid_out(score_BL: Tensor, by_latent: bool) -> Tensor:
    """The same matrix, the rows of a latent side by side in memory, or the latents of a row."""
    return score_BL.T.contiguous().T if by_latent else score_BL


@given(rows=st.integers(1, 9), latents=st.integers(1, 400), seed=seeds, by_latent=st.booleans(), data=st.data())
def test_top_per_row_keeps_exactly_the_k_largest_of_every_row(
    rows: int, latents: int, seed: int, by_latent: bool, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, min(latents, 40)))
    score_BL = laid_out(matrix(rows, latents, seed), by_latent)
    entries = top_per_row(score_BL, k)
    assert len(entries.row_K) == rows * k
    assert torch.equal(mask(entries), top_mask(score_BL, k))


@given(rows=st.integers(1, 40), latents=st.integers(1, 200), seed=seeds, by_latent=st.booleans(), data=st.data())
def test_top_of_batch_keeps_exactly_the_largest_of_the_whole_matrix(
    rows: int, latents: int, seed: int, by_latent: bool, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, max(1, rows * latents // data.draw(st.sampled_from([1, 20, 100])))))
    score_BL = laid_out(matrix(rows, latents, seed), by_latent)
    entries = top_of_batch(score_BL, count)
    assert len(entries.row_K) == count
    assert torch.equal(mask(entries), top_mask_of_batch(score_BL, count))


def largest_places(score_N: Tensor, count: int) -> list[int]:
    return sorted(score_N.argsort(descending=True)[:count].tolist())


def test_a_bound_that_a_sample_misses_is_guessed_again_and_in_the_end_done_without() -> None:
    """The largest scores stand where the sample looks, or nowhere that it looks: groups are a multiple of its step."""
    for sampled in (True, False):
        score_N = matrix(1, APART * 64 * 16, 0)[0]
        score_N = torch.where((torch.arange(len(score_N)) % APART == 0) == sampled, score_N + 100, score_N)
        for count in (40, 900, 1100):
            entries = top_of_batch(score_N.view(64, -1), count)
            assert (entries.row_K * APART * 16 + entries.latent_K).tolist() == largest_places(score_N, count)


@pytest.mark.parametrize("by_latent", [False, True])
def test_what_is_not_a_number_is_kept_so_that_it_is_seen(by_latent: bool) -> None:
    score_BL = laid_out(matrix(20, 300, 0), by_latent)
    score_BL[7, 211] = torch.nan
    assert mask(top_per_row(score_BL, 2))[7, 211] and mask(top_of_batch(score_BL, 40))[7, 211]


@given(
    rows=st.integers(1, 9), latents=st.integers(1, 12), seed=seeds, threshold=st.floats(-3, 3), by_latent=st.booleans()
)  # fmt: skip
def test_above_keeps_what_is_above_and_not_what_is_equal(
    rows: int, latents: int, seed: int, threshold: float, by_latent: bool
) -> None:
    score_BL = laid_out(matrix(rows, latents, seed), by_latent)
    score_BL[0, 0] = threshold
    assert torch.equal(mask(above(score_BL, threshold)), score_BL > threshold)


def test_among_ties_any_are_kept_but_as_many_as_asked_and_none_twice() -> None:
    score_BL = torch.tensor([[1.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    for zeros_BL in (torch.zeros(30, 600), torch.zeros(600, 30).T):
        assert mask(top_per_row(zeros_BL, 3)).sum(1).tolist() == [3] * 30
        assert int(mask(top_of_batch(zeros_BL, 90)).sum()) == 90
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
        if entries.score_K is not None:
            assert torch.equal(entries.score_K, score_BL[entries.row_K, entries.latent_K])
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


PIECE = 4


@given(counts=st.lists(st.one_of(st.just(0), st.integers(0, 5 * PIECE)), min_size=1, max_size=12))
def test_pieces_hold_every_entry_once_in_its_bag_and_in_order(counts: list[int]) -> None:
    bags = [[n] * count for n, count in enumerate(counts)]
    bag_K = [n for bag in bags for n in bag]
    starts_N = torch.tensor([0, *counts]).cumsum(0)[:-1]
    whole = Pieces.whole(starts_N, len(bag_K))
    assert (whole.end_N - whole.begin_N).tolist() == counts and not len(whole.begin_M)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.kernels.entries.PIECE", PIECE)
        pieces = Pieces.split(starts_N, len(bag_K))
    places: dict[int, list[int]] = {}
    ends = zip(pieces.begin_N.tolist(), pieces.end_N.tolist(), strict=True)
    further = zip(pieces.begin_M.tolist(), pieces.end_M.tolist(), strict=True)
    for bag, (begin, end) in [*enumerate(ends), *zip(pieces.bag_M.tolist(), further, strict=True)]:
        assert begin <= end <= begin + PIECE
        places.setdefault(bag, []).extend(range(begin, end))
    assert not places.pop(len(counts), []), "those that are too many"
    assert [bag_K[place] for places_of_bag in places.values() for place in places_of_bag] == bag_K
    assert [place for bag in sorted(places) for place in places[bag]] == list(range(len(bag_K)))
    if len(bag_K) > PIECE:
        assert pieces.further_N.tolist() == torch.bincount(pieces.bag_M, minlength=len(counts))[: len(counts)].tolist()


# --- values and gradients ---------------------------------------------------------------------------------------


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


def test_how_codes_are_held_is_a_matter_of_their_share_or_of_what_is_asked() -> None:
    cpu = torch.device("cpu")
    assert [Kernels().sparse(cpu, share) for share in (0.001, 0.05, 0.5)] == [True, True, False]
    assert [Kernels("sparse").sparse(cpu, share) for share in (0.001, 0.5)] == [True, True]
    assert [Kernels("dense").sparse(cpu, share) for share in (0.001, 0.5)] == [False, False]


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing is asked of Triton, which any device runs, and what is known of it is forgotten before and after."""
    monkeypatch.delenv(choice.TRITON, raising=False)
    for name in ("fused", "radix"):
        monkeypatch.setattr(train.kernels, name, SimpleNamespace(check=lambda device: None), raising=False)
    choice.by_triton.cache_clear()
    yield monkeypatch
    choice.by_triton.cache_clear()


def test_sums_are_by_triton_on_cuda_or_where_it_is_asked(asked: pytest.MonkeyPatch) -> None:
    for value, wanted in (("", [False, True]), ("0", [False, False]), ("1", [True, True])):
        asked.setenv(choice.TRITON, value)
        choice.by_triton.cache_clear()
        assert [choice.by_triton(device) for device in (CPU, CUDA)] == wanted
    choice.by_triton.cache_clear()
    asked.setenv(choice.TRITON, "yes")
    with pytest.raises(ConfigError, match=r"^no such GRANARY_TRITON: yes\. Set it to 0"):
        choice.by_triton(CPU)


@pytest.mark.parametrize("lacks", ["", "fused", "radix"], ids=lambda name: name or "not installed")
def test_where_triton_cannot_be_had_all_is_torchs_unless_it_is_asked_for(asked: pytest.MonkeyPatch, lacks: str) -> None:
    def check(device: torch.device) -> None:
        raise ImportError("RuntimeError: no C compiler\nhere.")

    if lacks:
        asked.setattr(train.kernels, lacks, SimpleNamespace(check=check))
    else:
        asked.delattr(train.kernels, "fused")
        asked.delitem(sys.modules, "train.kernels.fused", raising=False)
        asked.setitem(sys.modules, "triton", None)
    assert not choice.by_triton(CUDA)
    choice.by_triton.cache_clear()
    asked.setenv(choice.TRITON, "1")
    reason = "RuntimeError: no C compiler here" if lacks else "import of triton halted.*"
    with pytest.raises(ConfigError, match=rf"^no Triton on cuda: {reason}\. It needs .* to do without$"):
        choice.by_triton(CUDA)


def test_products_are_rounded_where_it_is_asked_or_where_a_large_one_is_faster_so() -> None:
    cpu, large = torch.device("cpu"), 2**40
    assert not Kernels(precision="fp32").bf16(cpu, large) and Kernels(precision="bf16").bf16(cpu, 1)
    assert not Kernels(precision="auto").bf16(cpu, 1000)
    assert Kernels(precision="auto").bf16(cpu, large) == has_bf16("cpu")
    assert not Kernels(precision="auto").bf16(torch.device("meta"), large)


@given(rows=st.integers(1, 9), latents=st.integers(1, 300), seed=seeds, by_latent=st.booleans(), data=st.data())
def test_of_scores_in_bf16_as_many_are_kept_and_none_that_is_less_than_another(
    rows: int, latents: int, seed: int, by_latent: bool, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, min(latents, 40)))
    score_BL = laid_out(matrix(rows, latents, seed, torch.bfloat16), by_latent)
    kept_BL, kept_of_all_BL = mask(top_per_row(score_BL, k)), mask(top_of_batch(score_BL, k * rows))
    assert kept_BL.sum(1).tolist() == [k] * rows and int(kept_of_all_BL.sum()) == k * rows
    least = torch.where(kept_BL, score_BL, torch.inf).amin(1), torch.where(kept_of_all_BL, score_BL, torch.inf).amin()
    assert not (torch.where(kept_BL, -torch.inf, score_BL).amax(1) > least[0]).any()
    assert not (torch.where(kept_of_all_BL, -torch.inf, score_BL) > least[1]).any()


@given(seed=seeds)
def test_a_rounded_product_and_its_gradients_are_those_of_rounded_factors(seed: int) -> None:
    """All factors of both passes; what is left is the rounding of results."""
    a, b, grad = (matrix(*shape, seed + n, torch.float32) for n, shape in enumerate([(6, 9), (9, 5), (6, 5)]))
    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    made = product(*leaves, bf16=True)
    found = torch.autograd.grad(made, leaves, grad)
    a, b, grad = (one.bfloat16().double() for one in (a, b, grad))
    for got, wanted in zip([made.detach(), *found], [a @ b, grad @ b.T, a.T @ grad], strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=2**-8, atol=1e-6)
    assert torch.equal(product(*leaves, bf16=False), leaves[0] @ leaves[1])


def test_a_squared_distance_and_its_gradients_are_those_of_the_formula() -> None:
    x, y = (matrix(4, 3, seed).requires_grad_() for seed in (0, 1))
    torch.testing.assert_close(SquaredDistance.apply(x, y), (x - y).square().sum(), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(SquaredDistance.apply, (x, y))
    assert torch.autograd.gradcheck(SquaredDistance.apply, (x.T, y.T)), "in any layout"


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


@pytest.mark.parametrize("in_place", [False, True])
def test_a_gradient_that_is_known_goes_where_it_belongs(in_place: bool) -> None:
    bias_L, first_SD, second_SD = torch.zeros(5), torch.zeros(4, 2), torch.zeros(3, 2)
    leaves = [leaf.requires_grad_() for leaf in (bias_L, first_SD, second_SD)]
    first_SD.grad = torch.ones(4, 2)  # of what went backward before
    rows = [(torch.tensor([3, 0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])), (torch.tensor([0, 0]), torch.eye(2))]
    value = Known.apply(torch.tensor(7.0), (torch.tensor([1, 4]), torch.tensor([5.0, 6.0])), rows, in_place, *leaves)
    assert value.item() == 7.0
    (2 * value).backward()
    assert [leaf.grad.tolist() for leaf in leaves] == [
        [0, 10, 0, 0, 12], [[7, 9], [1, 1], [1, 1], [3, 5]], [[2, 2], [0, 0], [0, 0]]
    ]  # fmt: skip

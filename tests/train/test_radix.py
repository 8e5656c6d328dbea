"""Triton selects the entries that a stable sort has first: on a GPU, or where there is none in its interpreter.

Letters: B rows of a batch, L latents, K kept entries.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.train.by_triton import DEVICE, Ask, asking, updated
from tests.train.problem import matrix
from train.activation import Budgets
from train.kernels.entries import Entries
from train.kernels.select import top_of_batch, top_per_row
from train.schedule import constant
from train.wiring import Wiring

pytest.importorskip("triton", reason="Triton is not installed: it is for Linux on x86_64")

from tests.train.compiling import apart
from train.kernels import fused, radix

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, LATENTS = 3, 300


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """`asking` for selections, by programs that hold so little that small matrices take several of them and turns."""
    monkeypatch.setattr(radix, "TILE", 256)
    monkeypatch.setattr(radix, "CHUNK", 600)
    for module in (fused, radix):
        monkeypatch.setattr(module, "check", lambda device: None)  # which is slow, and has a test of its own
    with asking(monkeypatch, radix, "top_per_row", "top_of_all") as ask:
        yield ask


def only(*values: float) -> Tensor:
    """A matrix of nothing but these."""
    which_BL = torch.randint(len(values), (ROWS, LATENTS), generator=torch.Generator().manual_seed(0))
    return torch.tensor(values)[which_BL]


def without_a_number() -> Tensor:
    """NaN of either sign and of other bits than usual, between infinities and numbers."""
    score_BL = torch.cat([matrix(ROWS, LATENTS - 4, 1).float(), only(torch.inf, -torch.inf)[:, :4]], 1)
    score_BL[1, 40], score_BL[1, 270], score_BL[2, 9] = torch.nan, -torch.nan, torch.nan
    score_BL.view(torch.int32)[2, 10:12] = torch.tensor([0x7FFF0001, -0x10000])
    return score_BL


def far_apart() -> Tensor:
    """Every exponent of fp32, numbers without a leading one too."""
    exponent_BL = torch.randint(-149, 128, (ROWS, LATENTS), generator=torch.Generator().manual_seed(2))
    return (matrix(ROWS, LATENTS, 3) * 2.0 ** exponent_BL.double()).float()


MATRICES: dict[str, Callable[[], Tensor]] = {
    "random": lambda: matrix(ROWS, LATENTS, 0).float(),
    "many ties": lambda: only(-2, -1, 0, 1, 2),
    "all equal": lambda: only(1.5),
    "negative only": lambda: -matrix(ROWS, LATENTS, 0).float().abs() - 1,
    "infinities": lambda: only(torch.inf, -torch.inf, 3),
    "zeros of both signs": lambda: only(-0.0, 0.0),
    "zeros between numbers": lambda: only(-0.0, 0.0, 1, -1, 1e-30),
    "not numbers": without_a_number,
    "nothing but NaN": lambda: only(torch.nan, -torch.nan),
    "far apart": far_apart,
    "differing in the last bit": lambda: 1 + torch.randperm(ROWS * LATENTS).view(ROWS, LATENTS) * 2.0**-23,
    "one latent": lambda: matrix(ROWS, 1, 0).float(),
    "one row": lambda: matrix(1, LATENTS, 0).float(),
    "one score": lambda: torch.ones(1, 1),
}
OF_ALL_DTYPES = ("random", "many ties", "not numbers")  # the interpreter is slow
every_matrix = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in MATRICES
        for dtype in (DTYPES if DEVICE.type == "cuda" or name in OF_ALL_DTYPES else DTYPES[:1])
    ],
)


def counts(length: int) -> list[int]:
    return sorted({1, length // 3 or 1, length})


def first(score_BL: Tensor, k: int) -> Tensor:
    """Where the k largest of every row stand, in order; of equal ones the first, NaN above all: [B, k]."""
    return score_BL.cpu().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def assert_kept(entries: Entries, score_BL: Tensor, place_K: Tensor) -> None:
    """That entries are those at these places of the flat matrix, in that order, with the very bits of their scores."""
    assert entries.row_K.dtype == entries.latent_K.dtype == torch.int64
    assert (entries.rows, entries.latents) == score_BL.shape
    assert torch.equal((entries.row_K * entries.latents + entries.latent_K).cpu(), place_K)
    assert entries.score_K is not None and entries.score_K.dtype == score_BL.dtype
    kind = radix.KINDS[score_BL.dtype]
    assert torch.equal(entries.score_K.view(kind).cpu(), score_BL.cpu().flatten()[place_K].view(kind))


@every_matrix
def test_the_first_of_the_largest_of_every_row_are_kept(name: str, dtype: torch.dtype, ask: Ask) -> None:
    calls, score_BL = ask("1"), MATRICES[name]().to(dtype).to(DEVICE)
    rows, latents = score_BL.shape
    for k in counts(latents):
        found = top_per_row(score_BL, k)
        assert_kept(found, score_BL, (first(score_BL, k) + torch.arange(rows)[:, None] * latents).flatten())
        assert calls.pop() == "top_per_row" and not calls
        by_torch = score_BL.float().topk(k, dim=1).values.sort(dim=1).values
        assert found.score_K is not None
        mine = found.score_K.view(rows, k).float().sort(dim=1).values
        torch.testing.assert_close(mine, by_torch, rtol=0, atol=0, equal_nan=True)


@every_matrix
def test_the_first_of_the_largest_of_a_batch_are_kept(name: str, dtype: torch.dtype, ask: Ask) -> None:
    calls, score_BL = ask("1"), MATRICES[name]().to(dtype).to(DEVICE)
    for count in counts(score_BL.numel()):
        found = top_of_batch(score_BL, count)
        assert_kept(found, score_BL, first(score_BL.reshape(1, -1), count)[0])
        assert calls.pop() == "top_of_all" and not calls
        by_torch = score_BL.float().flatten().topk(count).values.sort().values
        assert found.score_K is not None
        torch.testing.assert_close(found.score_K.float().sort().values, by_torch, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["transposed", "columns", "every other row", "one row many times"])
def test_scores_may_lie_in_memory_in_any_way(layout: str, ask: Ask) -> None:
    score_BL = MATRICES["random"]().to(DEVICE)
    ways = {
        "transposed": lambda: score_BL.T.contiguous().T,
        "columns": lambda: score_BL[:, 3:-4],
        "every other row": lambda: score_BL[::2],
        "one row many times": lambda: score_BL[:1].expand(4, -1),
    }
    calls, laid_BL = ask("1"), ways[layout]()
    assert not laid_BL.is_contiguous()
    for select in (top_per_row, top_of_batch):
        found, wanted = select(laid_BL, 9), select(laid_BL.contiguous(), 9)
        assert torch.equal(found.row_K, wanted.row_K) and torch.equal(found.latent_K, wanted.latent_K)
        assert torch.equal(found.score_K, wanted.score_K)
    assert len(calls) == 4


def test_the_same_entries_are_kept_every_time_and_scores_are_left_as_they_were(ask: Ask) -> None:
    ask("1")
    score_BL = MATRICES["many ties"]().to(DEVICE)
    before_BL = score_BL.clone()
    for select, count in ((top_per_row, 200), (top_of_batch, 1000)):
        one, other = select(score_BL, count), select(score_BL, count)
        assert torch.equal(one.row_K, other.row_K) and torch.equal(one.latent_K, other.latent_K)
    assert torch.equal(score_BL, before_BL)


def test_of_more_than_there_is_all_is_kept_and_of_nothing_nothing(ask: Ask) -> None:
    ask("1")
    score_BL = MATRICES["random"]().to(DEVICE)
    assert len(top_per_row(score_BL, LATENTS + 1).row_K) == len(top_of_batch(score_BL, 10**5).row_K) == ROWS * LATENTS
    assert len(radix.top_per_row(score_BL[:0], 3).row_K) == len(radix.top_of_all(score_BL, 0).row_K) == 0


def test_fp64_is_left_to_torch(ask: Ask) -> None:
    calls, score_BL = ask("1"), matrix(ROWS, LATENTS, 0).to(DEVICE)
    assert torch.equal(top_per_row(score_BL, 3).latent_K.view(ROWS, 3).cpu(), first(score_BL, 3))
    assert len(top_of_batch(score_BL, 5).row_K) == 5 and not calls


def test_tiles_and_chunks_of_their_own_size_keep_the_same(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    ask("1")
    score_BL = matrix(2, 2500, 4).float().to(DEVICE)
    small = [top_per_row(score_BL, 30), top_of_batch(score_BL, 60)]
    monkeypatch.undo()
    for found, wanted in zip([radix.top_per_row(score_BL, 30), radix.top_of_all(score_BL, 60)], small, strict=True):
        assert torch.equal(found.row_K, wanted.row_K) and torch.equal(found.latent_K, wanted.latent_K)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="takes 4 GiB, which the interpreter would copy")
def test_scores_beyond_31_bits_are_found() -> None:
    score_BL = torch.zeros(2**16 + 1, 2**15, dtype=torch.bfloat16, device=DEVICE)
    score_BL[0, 5], score_BL[-1, -1] = 2, 3
    found = radix.top_of_all(score_BL, 3)
    assert (found.row_K.tolist(), found.latent_K.tolist()) == ([0, 0, 2**16], [0, 5, 2**15 - 1])
    assert radix.top_per_row(score_BL, 1).latent_K[[0, 1, -1]].tolist() == [5, 0, 2**15 - 1]


# --- budgets and whole steps ------------------------------------------------------------------------------------


def with_own_k(wiring: Wiring) -> Wiring:
    """Its first span has a k of its own."""
    return replace(wiring, spans=(replace(wiring.spans[0], k=2), *wiring.spans[1:]))


@pytest.mark.parametrize("select", [top_per_row, top_of_batch])
def test_spans_with_a_k_of_their_own_keep_what_they_keep_by_torch(
    select: Callable[[Tensor, int], Entries], ask: Ask
) -> None:
    budgets = Budgets(with_own_k(cases.wiring("dedicated", 40)), constant(5)).to(DEVICE)
    score_BL = matrix(ROWS, 40, 0).float().to(DEVICE)
    ask("0")
    wanted = budgets.select(score_BL, budgets.counts(0), select)
    calls = ask("1")
    found = budgets.select(score_BL, budgets.counts(0), select)
    assert len(calls) == 2
    assert torch.equal(found.row_K, wanted.row_K) and torch.equal(found.latent_K, wanted.latent_K)
    assert torch.equal(found.score_K, wanted.score_K)


@pytest.mark.parametrize("kernels", ["sparse", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["topk", "batch_topk"])
@pytest.mark.parametrize("case", ["autoencoder", "dedicated, a span with a k of its own"])
def test_whole_steps_select_as_torch_does(
    case: str, method: str, kernels: str, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, _, own = case.partition(",")
    if own:
        wiring = cases.wiring
        monkeypatch.setattr(cases, "wiring", lambda *given: with_own_k(wiring(*given)))
    calls = ask("0")
    by_torch, wanted = updated(case, method, kernels)
    assert not calls
    calls = ask("1")
    by_triton, found = updated(case, method, kernels)
    assert ("top_per_row" if method == "topk" else "top_of_all") in calls
    assert by_triton.idle_L.equal(by_torch.idle_L)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
def test_parts_of_a_batch_keep_what_the_whole_batch_keeps(ask: Ask) -> None:
    ask("1")
    whole, _ = updated("dedicated", "batch_topk")
    parts, _ = updated("dedicated", "batch_topk", micro_batch=3)
    assert parts.idle_L.equal(whole.idle_L)


# --- whether it can be had --------------------------------------------------------------------------------------


def test_a_device_that_selects_wrongly_or_not_at_all_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    radix.check(DEVICE)
    right = radix.top_of_all
    monkeypatch.setattr(radix, "top_of_all", lambda score_BL, count: right(-score_BL, count))
    with pytest.raises(ImportError, match="its selection is wrong"):
        radix.check(DEVICE)

    def fails(*_: object) -> Entries:
        raise RuntimeError("PTX is too new")

    monkeypatch.setattr(radix, "top_of_all", fails)
    with pytest.raises(ImportError, match="RuntimeError: PTX is too new"):
        radix.check(DEVICE)


COMPILE = """
import torch
from tests.train.compiling import CAPABILITIES, compiled, products
from train.kernels import fused, radix

for capability in CAPABILITIES:
    options = radix.OPTIONS, capability
    compiled(radix._narrow, {}, {}, *options)
    for dtype, bits in ((torch.float32, "*i32"), (torch.bfloat16, "*i16")):
        scores = {"score": bits, "kept": bits}
        for length in (1, 2**20):
            how = radix._how(dtype, length)
            chunked = {**how, "CHUNK": radix.CHUNK}
            own = ({"latents": "i32"}, {}) if length > 1 else ({}, {"latents": 1})
            irs = [compiled(radix._top_of_row, {**scores, **own[0], "k": "i32"}, {**how, **own[1]}, *options)]
            for size in ({"size": "i32"}, {"size": "i64"}) if length > 1 else ({},):
                one = {} if size else {"size": 1}
                of_count = {"score": bits, "shift": "i32", **size}
                irs.append(compiled(radix._count, of_count, {**chunked, **one}, *options))
                irs.append(compiled(radix._compare, {"score": bits, **size}, {**chunked, **one}, *options))
                irs.append(compiled(radix._gather, {**scores, **size}, {**chunked, **one}, *options))
            for ir in irs:
                lines, small = products(ir)
                assert lines and not small, lines
"""


def test_every_kernel_compiles_for_gpus_and_multiplies_places_in_64_bits() -> None:
    apart(COMPILE)

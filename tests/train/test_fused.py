"""Triton's sums over kept entries equal dense ones and torch's: on a GPU, or where there is none in its interpreter.

Letters: B rows of a batch, D width of a source, L latents, S latents of one source, K kept entries.
"""

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.by_triton import DEVICE, Ask, asking, updated
from tests.train.problem import matrix
from train.kernels import entries
from train.kernels.entries import Entries, Pieces
from train.kernels.products import dots, sums_by_latent, sums_by_row

pytest.importorskip("triton", reason="Triton is not installed: it is for Linux on x86_64")

from tests.train.compiling import apart
from train.kernels import fused, radix

ROWS, LATENTS = 30, 9
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """`asking` for sums, in pieces so short that small bags have several."""
    monkeypatch.setattr(entries, "PIECE", 6)
    for module in (fused, radix):
        monkeypatch.setattr(module, "check", lambda device: None)  # which is slow, and has a test of its own
    with asking(monkeypatch, fused, "sums", "dots") as ask:
        yield ask


def drawn(share: float) -> Tensor:
    return torch.nonzero(torch.rand(ROWS, LATENTS, generator=torch.Generator().manual_seed(1)) < share)


PATTERNS = {
    "some": drawn(0.1),
    "many": drawn(0.7),
    "one latent on every row": torch.stack([torch.arange(ROWS), torch.full((ROWS,), 4)], 1),
    "one row with every latent": torch.stack([torch.full((LATENTS,), 7), torch.arange(LATENTS)], 1),
    "some of them twice": torch.cat([drawn(0.3), drawn(0.3)[::2]]),
    "none": drawn(0),
}


def kept(pattern: str) -> Entries:
    place_K2 = PATTERNS[pattern]
    place_K = (place_K2[:, 0] * LATENTS + place_K2[:, 1]).sort().values.to(DEVICE)
    return Entries(place_K // LATENTS, place_K % LATENTS, ROWS, LATENTS)


class Sums:
    """What is summed, and how: {name: what our functions give, and what it is, in fp64}."""

    def __init__(self, pattern: str, width: int, dtype: torch.dtype) -> None:
        self.entries = kept(pattern)
        self.local_L = torch.randperm(LATENTS, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        self.x_BD, self.W_SD = (matrix(n, width, n, dtype).to(DEVICE) for n in (ROWS, LATENTS))
        self.weight_K = matrix(1, len(self.entries.row_K), 3, dtype)[0].to(DEVICE)

    def found(self) -> dict[str, Tensor]:
        local_K = self.local_L[self.entries.latent_K]
        return {
            "by row": sums_by_row(self.entries, self.W_SD, local_K, self.weight_K),
            "by latent": sums_by_latent(self.entries, self.x_BD, self.weight_K),
            "dots": dots(self.x_BD, self.W_SD, self.entries, local_K),
        }

    def wanted(self) -> dict[str, Tensor]:
        x_BD, W_SD, row_K, latent_K = self.x_BD.double(), self.W_SD.double(), self.entries.row_K, self.entries.latent_K
        f_BL = torch.zeros(ROWS, LATENTS, dtype=torch.float64, device=DEVICE)
        f_BL.index_put_((row_K, latent_K), self.weight_K.double(), accumulate=True)
        every_BL = x_BD @ W_SD[self.local_L].T
        return {"by row": f_BL @ W_SD[self.local_L], "by latent": f_BL.T @ x_BD, "dots": every_BL[row_K, latent_K]}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("pattern", "width"), [*((one, 20) for one in PATTERNS), ("some of them twice", 1), ("some of them twice", 530)]
)
def test_sums_and_dots_equal_dense_ones_and_those_of_torch(
    pattern: str, width: int, dtype: torch.dtype, ask: Ask
) -> None:
    given, calls = Sums(pattern, width, dtype), ask("1")
    found = given.found()
    assert calls == ["sums", "sums", "dots"]
    calls = ask("0")
    by_torch = given.found()
    assert not calls
    for name, wanted in given.wanted().items():
        close = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name].double(), wanted, **close, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(found[name], by_torch[name], **close, msg=lambda m, name=name: f"{name}: {m}")


def test_sums_of_bf16_are_rounded_once(ask: Ask) -> None:
    ask("1")
    given = Sums("many", 20, torch.bfloat16)
    found, wanted = given.found(), given.wanted()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name].bfloat16(), rtol=2**-7, atol=1e-5)  # the last bit, at most
        assert (found[name] == wanted[name].bfloat16()).float().mean() > 0.99


def test_tables_and_weights_may_lie_in_memory_in_any_way(ask: Ask) -> None:
    ask("1")
    given = Sums("many", 20, torch.float32)
    before = given.found()
    given.x_BD, given.W_SD = given.x_BD.T.contiguous().T, torch.cat([given.W_SD, given.W_SD], 1)[:, :20]
    given.weight_K = given.weight_K.repeat_interleave(2)[::2]
    assert not given.x_BD.is_contiguous() and not given.W_SD.is_contiguous() and not given.weight_K.is_contiguous()
    assert all(torch.equal(found, before[name]) for name, found in given.found().items())


def test_a_long_bag_is_summed_in_pieces_with_the_same_bits_every_time(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask("1")
    given = Sums("one latent on every row", 20, torch.float32)
    assert len(given.entries.latent_pieces.begin_M) == 4
    first, second = given.found(), Sums("one latent on every row", 20, torch.float32).found()
    assert all(torch.equal(found, second[name]) for name, found in first.items())
    monkeypatch.setattr(entries, "PIECE", 1000)
    whole = Sums("one latent on every row", 20, torch.float32).found()
    assert not torch.equal(first["by latent"], whole["by latent"]), "added up in another order"


def test_what_is_not_a_number_is_seen_where_it_belongs(ask: Ask) -> None:
    ask("1")
    given = Sums("some", 20, torch.float32)
    row = int(given.entries.row_K[0])
    given.x_BD[row, 3] = torch.nan
    found, latent_n = given.found(), given.entries.latent_K[given.entries.row_K == row]
    assert found["by latent"].isnan().nonzero().tolist() == [[latent, 3] for latent in sorted(latent_n.tolist())]
    assert torch.equal(found["dots"].isnan(), given.entries.row_K == row)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="takes 4 GiB, which the interpreter would copy")
def test_rows_beyond_31_bits_of_a_table_are_found() -> None:
    W_SD = torch.zeros(2**16 + 1, 2**15, dtype=torch.bfloat16, device=DEVICE)
    W_SD[-1] = 3
    index_K = torch.tensor([2**16, 0, 2**16], device=DEVICE)
    pieces = Pieces.whole(torch.tensor([0], device=DEVICE), 3)
    assert torch.equal(fused.sums(pieces, W_SD, index_K, torch.ones(3, device=DEVICE)), 2 * W_SD[-1:])


# --- whole steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["topk", "batch_topk"])
@pytest.mark.parametrize("case", ["autoencoder", pytest.param("dedicated", marks=pytest.mark.slow)])
def test_whole_steps_are_those_of_torch_and_have_the_same_bits_every_time(case: str, method: str, ask: Ask) -> None:
    calls = ask("0")
    by_torch, wanted = updated(case, method)
    assert not calls
    calls = ask("1")
    by_triton, found = updated(case, method)
    sources = len(by_triton.dictionary.wiring.widths)
    assert calls.count("sums") >= 3 * calls.count("dots") >= 2 * 3 * sources  # of two steps; on a GPU biases, too
    _, again = updated(case, method)
    assert by_torch.way == "codes are entries, products fp32"
    assert by_triton.way == "codes are entries, products fp32, sums by triton"
    assert found.keys() == wanted.keys() and any(name.startswith("encoder") for name in found)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(value, again[name]), name


def test_codes_as_matrices_name_no_sums(ask: Ask) -> None:
    calls = ask("1")
    trainer, _ = updated("autoencoder", "topk", "dense")
    assert trainer.way == "codes are matrices, products fp32" and not calls


# --- whether it can be had --------------------------------------------------------------------------------------


def test_a_device_that_computes_wrongly_or_not_at_all_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fused.check(DEVICE)
    wrong = fused.sums
    monkeypatch.setattr(fused, "sums", lambda *given: wrong(*given) * 2)
    with pytest.raises(ImportError, match="its sums are wrong"):
        fused.check(DEVICE)

    def fails(*_: Any) -> Tensor:
        raise subprocess.CalledProcessError(1, "gcc")

    monkeypatch.setattr(fused, "sums", fails)
    with pytest.raises(ImportError, match=r"CalledProcessError: .*gcc"):
        fused.check(DEVICE)


COMPILE = """
import torch
from tests.train.compiling import CAPABILITIES, compiled, products
from train.kernels import fused, radix

for capability in CAPABILITIES:
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64), ("bf16", torch.bfloat16)):
        table, total = f"*{name}", f"*{str(fused.KINDS[fused._kind(dtype)])}"
        for width in (1, 20, 2304):
            tile = fused._tile(torch.empty(1, width, dtype=dtype, device="meta"))
            size = ({}, {"width": 1}) if width == 1 else ({"width": "i32"}, {})
            how = fused.OPTIONS, capability
            of_sum = {"out": total, "table": table, "weight": table, **size[0]}
            for order in ({}, {"order": None}):
                ir = compiled(fused._sum, of_sum, {**tile, **size[1], **order}, *how)
            of_dot = {"out": table, "a": table, "b": table, **size[0]}
            irs = [ir, compiled(fused._dot, of_dot, {**tile, **size[1]}, *how)]
            of_join = {"out": total, "more": total, "bags": "i32", **size[0]}
            irs.append(compiled(fused._join, of_join, {"COLUMNS": tile["COLUMNS"], **size[1]}, *how))
            for ir in irs:
                lines, small = products(ir)
                assert len(lines) > len(small) <= 1 or width == 1, lines
"""


def test_every_kernel_compiles_for_gpus_and_multiplies_places_in_64_bits() -> None:
    """In 32 bits nothing but the number of a block of columns."""
    apart(COMPILE)

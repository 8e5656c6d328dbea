"""Sums and products over kept entries on a GPU, in Triton: every row is read where it is summed, and none is copied.

A sum's terms are added in one order, whichever program is first, and tiles have a fixed size: the same bits every time.
Sums are taken in fp32, those of fp64 in fp64.

Entries stand bag after bag (those of a row, or of a latent). `row` is told by the place where one stands, `weight` and
`local` by its number, which `order` has of each place; without `order` it is the place.

Letters: B rows of a batch, D width of a source, S latents of one source, R rows of either, K entries, N bags, M their
further pieces.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.kernels.entries import PIECE, Pieces

ENTRIES, COLUMNS = 4, 512  # of a tile, which takes 48 registers of a thread in fp32
KINDS = {torch.float32: tl.float32, torch.float64: tl.float64}
OPTIONS = {"enable_fp_fusion": True}  # said, since Triton is about to change its mind


@triton.jit
def _sum(
    out: tl.tensor,
    table: tl.tensor,
    row: tl.tensor,
    weight: tl.tensor,
    order: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    width: tl.tensor,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    """out[piece] = sum over the piece's entries of weight x table[row]."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    first, last = tl.load(begin + piece), tl.load(end + piece)
    total = tl.zeros((ENTRIES, COLUMNS), KIND)
    for start in range(first, last, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        known = place < last
        number = place if order is None else tl.load(order + place, known, 0)
        share = tl.load(weight + number, known, 0).to(KIND)
        start_of_row = tl.load(row + place, known, 0) * width
        value = tl.load(table + start_of_row[:, None] + column[None, :], known[:, None] & inside[None, :], 0)
        total += share[:, None] * value.to(KIND)
    tl.store(out + piece * width + column, tl.sum(total, 0), inside)


@triton.jit
def _join(
    out: tl.tensor,
    more: tl.tensor,
    bag: tl.tensor,
    further: tl.tensor,
    width: tl.tensor,
    bags: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    """out[bag] += the sums of its further pieces; by the program of the first of them."""
    piece = tl.program_id(0).to(tl.int64)
    own, before = tl.load(bag + piece), tl.load(bag + piece - 1, piece > 0, -1)
    if (own < bags) & (own != before):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        total = tl.load(out + own * width + column, inside, 0)
        for one in range(piece, piece + tl.load(further + own)):
            total += tl.load(more + one * width + column, inside, 0)
        tl.store(out + own * width + column, total, inside)


@triton.jit
def _dot(
    out: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    row: tl.tensor,
    local: tl.tensor,
    order: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    width: tl.tensor,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    """out = a[row] . b[local of the piece] for every entry of a piece."""
    piece = tl.program_id(0).to(tl.int64)
    first, last = tl.load(begin + piece), tl.load(end + piece)
    number = tl.load(order + first, first < last, 0)
    start_of_b = tl.load(local + number, first < last, 0) * width
    for start in range(first, last, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        known = place < last
        start_of_a = tl.load(row + place, known, 0) * width
        total = tl.zeros((ENTRIES, COLUMNS), KIND)
        for left in range(0, width, COLUMNS):
            column = left + tl.arange(0, COLUMNS)
            inside = column < width
            of_b = tl.load(b + start_of_b + column, inside, 0).to(KIND)
            of_a = tl.load(a + start_of_a[:, None] + column[None, :], known[:, None] & inside[None, :], 0)
            total += of_a.to(KIND) * of_b[None, :]
        tl.store(out + tl.load(order + place, known, 0), tl.sum(total, 1), known)


def sums(pieces: Pieces, table_RD: Tensor, row_K: Tensor, weight_K: Tensor, order_K: Tensor | None = None) -> Tensor:
    """sum over the entries of a bag of weight x table[row]: [N, D], of the table's dtype."""
    table_RD, width = table_RD.contiguous(), table_RD.shape[1]
    tile, bags, further = _tile(table_RD), len(pieces.begin_N), len(pieces.begin_M)
    sums_ND, more_MD = (table_RD.new_empty(n, width, dtype=_kind(table_RD.dtype)) for n in (bags, further))
    given = table_RD, row_K.contiguous(), weight_K.contiguous(), order_K
    blocks = triton.cdiv(width, tile["COLUMNS"])
    with torch.cuda.device_of(table_RD):
        if sums_ND.numel():
            _sum[bags, blocks](sums_ND, *given, pieces.begin_N, pieces.end_N, width, **tile, **OPTIONS)
        if more_MD.numel():
            _sum[further, blocks](more_MD, *given, pieces.begin_M, pieces.end_M, width, **tile, **OPTIONS)
            joined = more_MD, pieces.bag_M, pieces.further_N, width, bags, tile["COLUMNS"]
            _join[further, blocks](sums_ND, *joined, **OPTIONS)
    return sums_ND.to(table_RD.dtype)


def dots(pieces: Pieces, a_BD: Tensor, b_SD: Tensor, row_K: Tensor, local_K: Tensor, order_K: Tensor) -> Tensor:
    """a[row] . b[local] per entry, by number: [K]. All entries of a bag have one `local`."""
    a_BD, b_SD, width = a_BD.contiguous(), b_SD.contiguous(), a_BD.shape[1]
    dots_K, tile = a_BD.new_empty(len(row_K), dtype=_kind(a_BD.dtype)), _tile(a_BD)
    given = a_BD, b_SD, row_K.contiguous(), local_K.contiguous(), order_K
    with torch.cuda.device_of(a_BD):
        for begin_P, end_P in ((pieces.begin_N, pieces.end_N), (pieces.begin_M, pieces.end_M)):
            if len(row_K) and len(begin_P):
                _dot[len(begin_P),](dots_K, *given, begin_P, end_P, width, **tile, **OPTIONS)
    return dots_K.to(a_BD.dtype)


def _tile(table_RD: Tensor) -> dict[str, object]:
    columns = min(COLUMNS, triton.next_power_of_2(max(16, table_RD.shape[1])))
    return {"ENTRIES": ENTRIES, "COLUMNS": columns, "KIND": KINDS[_kind(table_RD.dtype)]}


def _kind(dtype: torch.dtype) -> torch.dtype:
    """In which sums are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(device: torch.device) -> None:
    """Raise ImportError, with the reason, where a device cannot run these kernels."""
    count = PIECE + 1
    try:
        row_K, order_K = torch.zeros(count, dtype=torch.int64, device=device), torch.arange(count, device=device)
        one, weight_K = torch.ones(1, 1, device=device), torch.ones(count, device=device)
        pieces = Pieces.split(row_K[:1], count)
        found = [sums(pieces, one, row_K, weight_K, order).sum() for order in (None, order_K)]
        found.append(dots(pieces, one, one, row_K, row_K, order_K).sum())
        right = torch.stack(found).tolist() == [count] * 3
    except Exception as error:  # each compiler, linker and driver has its own
        raise ImportError(f"{type(error).__name__}: {error}") from error
    if not right:
        raise ImportError("its sums are wrong")

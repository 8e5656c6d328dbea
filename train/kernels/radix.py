"""Which entries of a matrix of scores are kept, on a GPU, in Triton: exactly, without a sort and without a wait.

The least score that is kept, the border, is found digit by digit from the highest on: of the scores that begin like it,
how many have each next digit? Then those above it are written as they stand, and of those that equal it the first.
Nothing depends on which program is first, so the same entries are kept every time. Scores are read as their bits.

Letters: B rows of a batch, L latents, N scores, M chunks of them, K kept entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.kernels.entries import Entries

TILE, CHUNK = 2048, 2**15  # scores that a program holds at once, and those of one program where it has no row
OPTIONS = {"num_warps": 8}
KINDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
INFINITIES = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F800000, torch.float16: 0x7C000000}  # from the highest bit


@triton.jit
def _key(bits: tl.tensor, INFINITY: tl.constexpr, LOW: tl.constexpr) -> tl.tensor:
    """Whole numbers in the order of these scores: both zeros are one, and what is not a number is above all."""
    bits = bits.to(tl.int32) << LOW
    size = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -size, size).to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(size > INFINITY, 0xFFFFFFFF, key)


@triton.jit
def _digits(
    score: tl.tensor,
    length: tl.tensor,
    border: tl.tensor,
    shift: tl.tensor,
    INFINITY: tl.constexpr,
    LOW: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """How many scores have each next digit, of those whose keys begin like the border: behind 256 counts of others.

    Others are told apart by where they stand, so that a GPU does not add all of them to one number in turn.
    """
    counts = tl.zeros((512,), tl.int32)
    for start in range(0, length, TILE):
        column = start + tl.arange(0, TILE)
        head = _key(tl.load(score + column, column < length, 0), INFINITY, LOW) >> shift
        alike = (column < length) & (head >> 8 == border)
        if tl.max(alike.to(tl.int32), 0) > 0:
            digit = (head & 255).to(tl.int32) + 256
            counts += tl.histogram(tl.where(alike, digit, column >> 2 & 255), 512)
    return counts


@triton.jit
def _narrowed(border: tl.tensor, left: tl.tensor, counts: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The border with one more digit, how many that equal it are to be taken, and how many there are."""
    at_least = tl.cumsum(counts, 0, reverse=True)
    enough = at_least >= left
    place = tl.sum(enough.to(tl.int32), 0) - 1
    above = tl.max(tl.where(enough, 0, at_least), 0)
    equal = tl.sum(tl.where(tl.arange(0, 512) == place, counts, 0), 0)
    return border << 8 | (place - 256).to(tl.uint32), left - above, equal


@triton.jit
def _write(
    out: tl.tensor,
    kept: tl.tensor,
    score: tl.tensor,
    length: tl.tensor,
    begin: tl.tensor,
    border: tl.tensor,
    shift: tl.tensor,
    left: tl.tensor,
    INFINITY: tl.constexpr,
    LOW: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The scores above the border and the first `left` that equal it, with their places, which count from `begin`."""
    for start in range(0, length, TILE):
        column = start + tl.arange(0, TILE)
        bits = tl.load(score + column, column < length, 0)
        head = _key(bits, INFINITY, LOW) >> shift
        equal = ((column < length) & (head == border)).to(tl.int32)
        takes = ((column < length) & (head > border)) | ((equal > 0) & (tl.cumsum(equal, 0) <= left))
        number = tl.cumsum(takes.to(tl.int32), 0) - 1
        tl.store(out + number, begin + column, takes)
        tl.store(kept + number, bits, takes)
        taken = tl.sum(takes.to(tl.int32), 0)
        out += taken
        kept += taken
        left -= tl.sum(equal, 0)


@triton.jit(do_not_specialize=["k"])
def _top_of_row(
    out: tl.tensor,
    kept: tl.tensor,
    score: tl.tensor,
    latents: tl.tensor,
    k: tl.tensor,
    INFINITY: tl.constexpr,
    LOW: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The k largest of a row. Digits are looked at until all that equal the border are taken."""
    row = tl.program_id(0).to(tl.int64)
    begin, first = row * latents, row * k
    score += begin
    border, shift, left, equal = tl.full((), 0, tl.uint32), 32, k, k + 1
    while (shift > LOW) & (equal > left):
        shift -= 8
        counts = _digits(score, latents, border, shift, INFINITY, LOW, TILE)
        border, left, equal = _narrowed(border, left, counts)
    _write(out + first, kept + first, score, latents, begin, border, shift, left, INFINITY, LOW, TILE)


@triton.jit
def _chunk(size: tl.tensor, CHUNK: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A program's: its number, where it begins and how long it is."""
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * CHUNK
    return chunk, begin, tl.minimum(size - begin, CHUNK).to(tl.int32)


@triton.jit(do_not_specialize=["shift"])
def _count(
    totals: tl.tensor,
    score: tl.tensor,
    border: tl.tensor,
    size: tl.tensor,
    shift: tl.tensor,
    INFINITY: tl.constexpr,
    LOW: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """totals += how many scores of a chunk have each next digit, of those whose keys begin like the border."""
    _, begin, length = _chunk(size, CHUNK)
    counts = _digits(score + begin, length, tl.load(border).to(tl.uint32), shift, INFINITY, LOW, TILE)
    place = tl.arange(0, 512)
    tl.atomic_add(totals + place, counts.to(tl.int64), (place >= 256) & (counts > 0))


@triton.jit
def _narrow(border: tl.tensor, left: tl.tensor, totals: tl.tensor) -> None:
    """The border with one more digit, in place."""
    counts = tl.load(totals + tl.arange(0, 512))
    longer, rest, _ = _narrowed(tl.load(border).to(tl.uint32), tl.load(left), counts)
    tl.store(border, longer.to(tl.int64))
    tl.store(left, rest)


@triton.jit
def _compare(
    above: tl.tensor,
    equal: tl.tensor,
    score: tl.tensor,
    border: tl.tensor,
    size: tl.tensor,
    INFINITY: tl.constexpr,
    LOW: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """How many scores of a chunk are above the border, and how many equal it."""
    chunk, begin, length = _chunk(size, CHUNK)
    least = tl.load(border).to(tl.uint32)
    larger, alike = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int32)
    for start in range(0, length, TILE):
        column = start + tl.arange(0, TILE)
        head = _key(tl.load(score + begin + column, column < length, 0), INFINITY, LOW) >> LOW
        larger += ((column < length) & (head > least)).to(tl.int32)
        alike += ((column < length) & (head == least)).to(tl.int32)
    tl.store(above + chunk, tl.sum(larger, 0).to(tl.int64))
    tl.store(equal + chunk, tl.sum(alike, 0).to(tl.int64))


@triton.jit
def _gather(
    out: tl.tensor,
    kept: tl.tensor,
    score: tl.tensor,
    border: tl.tensor,
    first: tl.tensor,
    take: tl.tensor,
    size: tl.tensor,
    INFINITY: tl.constexpr,
    LOW: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """What a chunk has of the kept entries."""
    chunk, begin, length = _chunk(size, CHUNK)
    out += tl.load(first + chunk)
    kept += tl.load(first + chunk)
    least, left = tl.load(border).to(tl.uint32), tl.load(take + chunk)
    _write(out, kept, score + begin, length, begin, least, LOW, left, INFINITY, LOW, TILE)


def top_per_row(score_BL: Tensor, k: int) -> Entries:
    """The k largest of every row; of equal ones the first."""
    (rows, latents), bits_N = score_BL.shape, _bits(score_BL)
    place_K, kept_K = _room(bits_N, rows * k)
    with torch.cuda.device_of(bits_N):
        if len(place_K):
            _top_of_row[rows,](place_K, kept_K, bits_N, latents, k, **_how(score_BL.dtype, latents), **OPTIONS)
    return _entries(place_K, kept_K, score_BL)


def top_of_all(score_BL: Tensor, count: int) -> Entries:
    """The `count` largest of the whole matrix; of equal ones the first."""
    bits_N = _bits(score_BL)
    place_K, kept_K = _room(bits_N, count)
    with torch.cuda.device_of(bits_N):
        if count:
            _top_of_all(place_K, kept_K, bits_N, _how(score_BL.dtype, len(bits_N)))
    return _entries(place_K, kept_K, score_BL)


def _top_of_all(place_K: Tensor, kept_K: Tensor, bits_N: Tensor, how: dict[str, int]) -> None:
    chunks, size, how = triton.cdiv(len(bits_N), CHUNK), len(bits_N), {**how, "CHUNK": CHUNK}
    border, left = place_K.new_zeros(()), place_K.new_full((), len(place_K))
    for shift in range(24, how["LOW"] - 1, -8):
        totals = place_K.new_zeros(512)
        _count[chunks,](totals, bits_N, border, size, shift, **how, **OPTIONS)
        _narrow[1,](border, left, totals, **OPTIONS)
    above_M, equal_M = place_K.new_empty(chunks), place_K.new_empty(chunks)
    _compare[chunks,](above_M, equal_M, bits_N, border, size, **how, **OPTIONS)
    take_M = (left - equal_M.cumsum(0) + equal_M).clamp_min(0).minimum(equal_M)
    kept_M = above_M + take_M
    first_M = kept_M.cumsum(0) - kept_M
    _gather[chunks,](place_K, kept_K, bits_N, border, first_M, take_M, size, **how, **OPTIONS)


def _bits(score_BL: Tensor) -> Tensor:
    """Row after row."""
    return score_BL.detach().contiguous().flatten().view(KINDS[score_BL.dtype])


def _room(bits_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For places of kept entries, and for their scores."""
    return bits_N.new_empty(count, dtype=torch.int64), bits_N.new_empty(count)


def _how(dtype: torch.dtype, length: int) -> dict[str, int]:
    """What kernels are told of scores, so many of which stand together."""
    tile = min(TILE, triton.next_power_of_2(max(256, length)))
    return {"INFINITY": INFINITIES[dtype], "LOW": 32 - 8 * dtype.itemsize, "TILE": tile}


def _entries(place_K: Tensor, kept_K: Tensor, score_BL: Tensor) -> Entries:
    rows, latents = score_BL.shape
    return Entries(place_K // latents, place_K % latents, rows, latents, kept_K.view(score_BL.dtype))


def check(device: torch.device) -> None:
    """Raise ImportError, with the reason, where a device cannot run these kernels: of several tiles and chunks."""
    try:
        score_BL = (torch.arange(40_000, device=device) * 7919 % 40_009 - 20_000).view(2, 20_000)
        right = all(_selects(score_BL.to(dtype), 700) for dtype in (torch.float32, torch.bfloat16))
    except Exception as error:  # each compiler, linker and driver has its own
        raise ImportError(f"{type(error).__name__}: {error}") from error
    if not right:
        raise ImportError("its selection is wrong")


def _selects(score_BL: Tensor, k: int) -> bool:
    """Whether what is kept of rows, and of all of them as a batch, is what a stable sort has first."""
    rows, latents = score_BL.shape
    first = torch.arange(rows, device=score_BL.device)[:, None] * latents
    place_Bk = score_BL.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values + first
    place_K = score_BL.flatten().sort(descending=True, stable=True).indices[: rows * k].sort().values
    found = top_per_row(score_BL, k), top_of_all(score_BL, rows * k)
    place = [one.row_K * latents + one.latent_K for one in found]
    return torch.equal(place[0], place_Bk.flatten()) and torch.equal(place[1], place_K)

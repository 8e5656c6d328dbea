"""Sparse select, decode and backward on kept entries only; the dense references stand in the tests.

Letters: B rows of a batch, D width of a source, L latents of the dictionary, S latents of one source, K kept entries.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import embedding_bag

from train import parallel

Choice = Literal["auto", "sparse", "dense"]
AUTO: Choice = "auto"
# The share of entries up to which kept ones are faster than whole matrices: tests/benchmarks/LOG.md.
SPARSE = {"cpu": 0.1, "cuda": 0.02}


def sparse(choice: Choice, device: torch.device, share: float) -> bool:
    """Whether codes of which this share is kept go by their entries."""
    return share <= SPARSE.get(device.type, 0.0) if choice == AUTO else choice == "sparse"


@dataclass(frozen=True)
class Entries:
    """Kept entries (row, latent) of a B x L matrix. Positions are int64: B x L may pass 2^31.

    Ordered by row, then latent: sums over a row then round alike whatever the scores behind them were.
    """

    row_K: Tensor
    latent_K: Tensor
    rows: int
    latents: int

    @cached_property
    def row_starts_B(self) -> Tensor:
        return _starts(self.row_K, self.rows)

    @cached_property
    def by_latent_K(self) -> Tensor:
        """The entries' numbers, ordered by latent."""
        return torch.argsort(self.latent_K, stable=True)

    @cached_property
    def latent_starts_L(self) -> Tensor:
        return _starts(self.latent_K, self.latents)


def _starts(index_K: Tensor, length: int) -> Tensor:
    counts = torch.bincount(index_K, minlength=length)
    return torch.cumsum(counts, 0) - counts


_spare: list[Tensor] = []


def borrowed(size: int, like: Tensor) -> Tensor:
    """A flat tensor of any contents: on a CPU one that was handed back, whose pages the system need not clear again."""
    while like.device.type == "cpu" and _spare:
        one = _spare.pop()
        if one.dtype == like.dtype and len(one) >= size:
            return one[:size]
    return like.new_empty(size)


def hand_back(flat: Tensor) -> None:
    """Let the next one have this memory, which nobody reads any more."""
    if flat.device.type == "cpu":
        _spare[:] = [flat]


def drop_spare() -> None:
    """Give what was handed back to the system."""
    _spare.clear()


def by_latent(score_BL: Tensor) -> bool:
    """Whether the rows of a latent lie side by side in memory, and not the latents of a row."""
    return score_BL.T.is_contiguous() and not score_BL.is_contiguous()


APART = 17  # of so many, one is in the sample that a bound is guessed from; not in step with the latents of a row


def top_per_row(score_BL: Tensor, k: int) -> Entries:
    """The k largest of every row. Exactly B x k entries; among ties, any."""
    rows, latents = score_BL.shape
    latent_Bk = largest(score_BL, k).sort(dim=1).values
    row_K = torch.arange(rows, device=score_BL.device).repeat_interleave(k)
    return Entries(row_K, latent_Bk.flatten(), rows, latents)


def largest(score_BL: Tensor, k: int) -> Tensor:
    """Where the k largest of every row are, [B, k], in any order.

    None of them is outside of the k groups whose largest scores are the largest, which are found in the same way:
    nothing else is sorted.
    """
    latents, device = score_BL.shape[1], score_BL.device
    group = _group(latents, k)
    if group == 1:
        return score_BL.contiguous().topk(k, dim=1, sorted=False).indices
    groups = latents // group
    whole_BN = score_BL[:, : groups * group]
    if by_latent(score_BL):
        largest_BG = whole_BN.T.view(group, groups, -1).amax(0).T.contiguous()
    else:
        largest_BG = whole_BN.unflatten(1, (group, groups)).amax(1)
    best_Bk = largest(largest_BG, k)
    members_G1 = torch.arange(0, groups * group, groups, device=device)[:, None]
    left = torch.arange(groups * group, latents, device=device).expand(len(score_BL), -1)
    place_BN = torch.cat([(best_Bk[:, None] + members_G1).flatten(1), left], 1)
    return place_BN.gather(1, score_BL.gather(1, place_BN).topk(k, dim=1, sorted=False).indices)


def _group(length: int, k: int) -> int:
    """How many scores are a group; 1: do without. As measured: tests/benchmarks/LOG.md."""
    return 1 if length < 16 * k or not k else 2 ** round(math.log2(length / k) * 3 / 8)


def top_of_batch(score_BL: Tensor, count: int) -> Entries:
    """The `count` largest of the whole matrix. Exactly `count` entries; among ties, any.

    Under torchrun those of this matrix that are among the `count` x ranks largest of all ranks' matrices together.
    """
    rows, latents = score_BL.shape
    ranks, transposed = parallel.world(), by_latent(score_BL)
    score_N = (score_BL.T if transposed else score_BL).flatten()
    flat_K = _top_of_all(score_N, min(count * ranks, len(score_N)))
    if ranks > 1:
        best = score_N[flat_K].sort(descending=True)
        flat_K = flat_K[best.indices[: _share_of_best(best.values, count * ranks)]]
    return _entries(flat_K, rows, latents, transposed)


def _entries(flat_K: Tensor, rows: int, latents: int, transposed: bool) -> Entries:
    """Of places in a matrix, or in the transposed one, in any order."""
    if transposed:
        flat_K = flat_K % rows * latents + flat_K // rows
    flat_K = flat_K.sort().values
    return Entries(flat_K // latents, flat_K % latents, rows, latents)


def _top_of_all(score_N: Tensor, count: int) -> Tensor:
    """Where the `count` largest are, in any order.

    A CPU sorts one row on one core: there all but what is not below a bound is left out first. This waits for how much
    that is, which costs a CPU nothing.
    """
    group = _group(len(score_N), count)
    if score_N.device.type != "cpu" or group == 1:
        return largest(score_N[None], count)[0]
    groups = len(score_N) // group
    grouped_GN, left_N = score_N[: groups * group].view(group, groups), score_N[groups * group :]
    best_N = grouped_GN.amax(0)
    bound = _bound(best_N, count)
    group_n = torch.nonzero(~(best_N < bound)).flatten()  # NaN passes, so that it is seen
    inside_Gn = grouped_GN.index_select(1, group_n)
    member_m, which_m = torch.nonzero(~(inside_Gn < bound), as_tuple=True)
    place_m = torch.cat([member_m * groups + group_n[which_m], torch.arange(groups * group, len(score_N))])
    score_m = torch.cat([inside_Gn[member_m, which_m], left_N])
    return place_m[score_m.topk(count, sorted=False).indices]


def _bound(score_N: Tensor, count: int) -> Tensor:
    """A value that at least `count` of these are not below, and few more: of a sample, and verified."""
    sample_n = score_N[::APART]
    expected = count / APART
    for sigmas in (4, 16):
        take = math.ceil(expected + sigmas * math.sqrt(expected)) + 1
        if take >= len(sample_n):
            break
        bound = sample_n.topk(take, sorted=False).values.amin()
        if int(torch.count_nonzero(~(score_N < bound))) >= count:
            return bound
    return torch.full((), -torch.inf)


def _share_of_best(value_n: Tensor, count: int) -> int:
    """How many of these values, the largest first, are among the `count` largest of all ranks' values.

    Of equal ones those of the first ranks are taken.
    """
    every = parallel.gathered(value_n)
    border = torch.cat(every).topk(count).values[-1]
    larger = [int((one > border).sum()) for one in every]
    equal = [int((one == border).sum()) for one in every]
    rank = parallel.rank()
    left = count - sum(larger) - sum(equal[:rank])
    return larger[rank] + max(0, min(equal[rank], left))


def above(score_BL: Tensor, threshold: Tensor | float) -> Entries:
    """The entries above a threshold: as many as there are, so this waits for the device."""
    rows, latents = score_BL.shape
    above_BL, transposed = score_BL > threshold, by_latent(score_BL)
    flat_K = torch.nonzero((above_BL.T if transposed else above_BL).flatten()).flatten()
    return _entries(flat_K, rows, latents, transposed)


def sums_by_latent(entries: Entries, x_BD: Tensor, weight_K: Tensor) -> Tensor:
    """sum over entries of latent l of weight x x[row]: [L, D]. The gradient of an encoder, and of a decoder."""
    order_K = entries.by_latent_K
    weights = weight_K[order_K].to(x_BD.dtype)
    return embedding_bag(entries.row_K[order_K], x_BD, entries.latent_starts_L, mode="sum", per_sample_weights=weights)


class PreActivation(Function):
    """Pre-activations at kept entries, given their values: h = b[latent] + sum over sources of x[row] . W[latent].

    `h_K` was computed without a graph; the backward pass touches the kept entries only, and never holds a dense B x L
    gradient. Rows need no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_K: Tensor,
        entries: Entries,
        slices: list[tuple[slice, ...]],
        x: list[Tensor],
        bias_L: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.entries, ctx.slices, ctx.x = entries, slices, x
        return h_K.view_as(h_K)

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor | None, ...]:
        entries: Entries = ctx.entries
        bias = torch.bincount(entries.latent_K, grad_K.double(), minlength=entries.latents).to(grad_K.dtype)
        weights = []
        for slices, x_BD in zip(ctx.slices, ctx.x, strict=True):
            sums_LD = sums_by_latent(entries, x_BD, grad_K)
            weights.append(torch.cat([sums_LD[one] for one in slices]) if len(slices) > 1 else sums_LD[slices[0]])
        return None, None, None, None, bias, *weights


class Columns(Function):
    """The codes of some latents, given their values `f_Bn`: relu(h) where it is kept, and 0.

    With the gradients that PreActivation has of kept entries, by products over these latents alone; those of weights
    may be sparse, the rows of these latents. Of every source `places` has its rows, where each of the latents stands in
    its weights, and 1, or 0 where it has no part in it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        f_Bn: Tensor,
        latent_n: Tensor,
        places: list[tuple[Tensor, Tensor, Tensor]],
        sparse_gradient: bool,
        bias_L: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(f_Bn, bias_L, *weights)
        ctx.latent_n, ctx.places, ctx.sparse = latent_n, places, sparse_gradient
        return f_Bn.view_as(f_Bn)

    @staticmethod
    def backward(ctx: Any, grad_Bn: Tensor) -> tuple[Tensor | None, ...]:
        f_Bn, bias_L, *weights = ctx.saved_tensors
        grad_Bn = grad_Bn * (f_Bn > 0)
        bias = torch.zeros_like(bias_L).index_copy_(0, ctx.latent_n, grad_Bn.sum(0))
        grads = []
        for W_SD, (x_BD, local_n, present_n) in zip(weights, ctx.places, strict=True):
            rows_nD = (grad_Bn.T @ x_BD) * present_n[:, None]
            if ctx.sparse:
                grads.append(torch.sparse_coo_tensor(local_n[None], rows_nD, W_SD.shape, check_invariants=False))
            else:
                grads.append(torch.zeros_like(W_SD).index_add_(0, local_n, rows_nD))
        return None, None, None, None, bias, *grads


class Decode(Function):
    """y[row] = sum over kept entries of value x W[latent], for one source: [B, D].

    `local_K` is the entry's row in W, and `present_K` is 1, or 0 where the latent does not write to this source.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value_K: Tensor,
        W_SD: Tensor,
        entries: Entries,
        slices: tuple[slice, ...],
        local_K: Tensor,
        present_K: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(value_K, W_SD, local_K, present_K)
        ctx.entries, ctx.slices = entries, slices
        weights = value_K * present_K
        return embedding_bag(local_K, W_SD, entries.row_starts_B, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        value_K, W_SD, local_K, present_K = ctx.saved_tensors
        entries: Entries = ctx.entries
        grad_BD = grad_BD.contiguous()
        value = weight = None
        if ctx.needs_input_grad[0]:
            value = dots(grad_BD, W_SD, entries, local_K) * present_K
        if ctx.needs_input_grad[1]:
            sums_LD = sums_by_latent(entries, grad_BD, value_K)
            weight = torch.cat([sums_LD[one] for one in ctx.slices]) if len(ctx.slices) > 1 else sums_LD[ctx.slices[0]]
        return value, weight, None, None, None, None


def dots(a_BD: Tensor, b_SD: Tensor, entries: Entries, local_K: Tensor) -> Tensor:
    """a[row] . b[local] per entry: the gradient of embedding_bag by its weights, which holds no K x D product."""
    of_sum = 0  # among the modes of embedding_bag
    given = (a_BD, b_SD, local_K, entries.row_starts_B, entries.row_K, of_sum)
    dots_K: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(*given)
    return dots_K

"""Sparse select, decode and backward on kept entries only; the dense references stand in the tests.

Letters: B rows of a batch, D width of a source, L latents of the dictionary, S latents of one source, K kept entries.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import embedding_bag

from train import parallel


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


def top_per_row(score_BL: Tensor, k: int) -> Entries:
    """The k largest of every row. Exactly B x k entries; among ties, any."""
    rows, latents = score_BL.shape
    latent_Bk = score_BL.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    row_K = torch.arange(rows, device=score_BL.device).repeat_interleave(k)
    return Entries(row_K, latent_Bk.flatten(), rows, latents)


def top_of_batch(score_BL: Tensor, count: int) -> Entries:
    """The `count` largest of the whole matrix. Exactly `count` entries; among ties, any.

    Under torchrun those of this matrix that are among the `count` x ranks largest of all ranks' matrices together.
    """
    rows, latents = score_BL.shape
    ranks = parallel.world()
    best = score_BL.flatten().topk(min(count * ranks, score_BL.numel()), sorted=ranks > 1)
    flat_K = best.indices if ranks == 1 else best.indices[: _share_of_best(best.values, count * ranks)]
    flat_K = flat_K.sort().values
    return Entries(flat_K // latents, flat_K % latents, rows, latents)


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
    row_K, latent_K = torch.nonzero(score_BL > threshold, as_tuple=True)
    return Entries(row_K, latent_K, rows, latents)


def sums_by_latent(entries: Entries, x_BD: Tensor, weight_K: Tensor) -> Tensor:
    """sum over entries of latent l of weight x x[row]: [L, D]. The gradient of an encoder, and of a decoder."""
    order_K = entries.by_latent_K
    weights = weight_K[order_K].to(x_BD.dtype)
    return embedding_bag(entries.row_K[order_K], x_BD, entries.latent_starts_L, mode="sum", per_sample_weights=weights)


class PreActivation(Function):
    """Pre-activations at kept entries, given their values: h = b[latent] + sum over sources of x[row] . W[latent].

    The forward pass gathers from `h_BL`, which was computed without a graph; the backward pass touches the kept
    entries only, and never holds a dense B x L gradient. Rows need no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_BL: Tensor,
        entries: Entries,
        slices: list[tuple[slice, ...]],
        x: list[Tensor],
        bias_L: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.entries, ctx.slices, ctx.x = entries, slices, x
        return h_BL[entries.row_K, entries.latent_K]

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor | None, ...]:
        entries: Entries = ctx.entries
        bias = torch.bincount(entries.latent_K, grad_K.double(), minlength=entries.latents).to(grad_K.dtype)
        weights = []
        for slices, x_BD in zip(ctx.slices, ctx.x, strict=True):
            sums_LD = sums_by_latent(entries, x_BD, grad_K)
            weights.append(torch.cat([sums_LD[one] for one in slices]) if len(slices) > 1 else sums_LD[slices[0]])
        return None, None, None, None, bias, *weights


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
    with torch.enable_grad():
        weight_K = torch.zeros(len(local_K), dtype=b_SD.dtype, device=b_SD.device, requires_grad=True)
        sums_BD = embedding_bag(local_K, b_SD.detach(), entries.row_starts_B, mode="sum", per_sample_weights=weight_K)
        return torch.autograd.grad(sums_BD, weight_K, a_BD)[0]
